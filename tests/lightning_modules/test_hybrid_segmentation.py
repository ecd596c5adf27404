import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from tiny_nets import PointNet, Segmenter, Squares, adamw, squares_loader, tiny_trainer, tiny_unet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_modules import EDMProcess, HybridSegmentation, VPProcess
from lightning_modules.hybrid_segmentation import Objective


def _batch(size: int = 4) -> dict[str, Tensor]:
    return next(iter(squares_loader(size, size)))


def _loss(model: HybridSegmentation, batch: dict[str, Tensor], sigma: Tensor, eps: Tensor | None) -> Tensor:
    return model._total(*model._terms(model.network, batch, sigma, eps)).mean()


def test_hybrid_loss_is_the_papers_with_means() -> None:
    model = HybridSegmentation(tiny_unet(dropout=0.0), 2, mask_weight=0.03)
    batch, sigma = _batch(), torch.tensor([0.0, 0.1, 1.0, 5.0])
    eps = torch.randn_like(batch["image"])
    x = 2 * batch["image"] - 1
    alpha = 1 / (1 + sigma**2).sqrt()
    t = model.process.c_noise(sigma)
    output = model.network(alpha.view(-1, 1, 1, 1) * (x + sigma.view(-1, 1, 1, 1) * eps), t)
    one_hot = torch.stack([(batch["mask"] == k).float() for k in range(2)], 1)
    expected = ((output[:, :3] - x) ** 2).mean() + 0.03 * ((output[:, 3:] - one_hot) ** 2).mean()
    torch.testing.assert_close(_loss(model, batch, sigma, eps), expected)


def test_head_gradient_of_the_mask_is_linear_in_the_mask_weight_and_blocks_do_not_mix() -> None:
    batch, sigma = _batch(), torch.full((4,), 0.5)
    eps = torch.randn_like(batch["image"])
    network = tiny_unet(dropout=0.0)
    gradients = []
    for weight in (1e-4, 3e-4, 0.0):
        model = HybridSegmentation(network, 2, mask_weight=weight)
        gradient = torch.autograd.grad(_loss(model, batch, sigma, eps), network.head.weight)[0]
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1][3:], 3 * gradients[0][3:])
    torch.testing.assert_close(gradients[1][:3], gradients[0][:3])
    assert gradients[2][3:].abs().max() == 0
    mask_only = HybridSegmentation(network, 2, objective="supervised")
    gradient = torch.autograd.grad(_loss(mask_only, batch, torch.zeros(4), None), network.head.weight)[0]
    assert gradient[:3].abs().max() == 0
    assert gradient[3:].abs().max() > 0


@pytest.mark.parametrize("process", [VPProcess(), EDMProcess()])
def test_t_zero_means_the_same_in_training_and_prediction(process: VPProcess | EDMProcess) -> None:
    """What `segment` gives is what the supervised loss was computed on, and what the hybrid loss sees at sigma 0."""
    seen: list[tuple[Tensor, Tensor]] = []
    network = tiny_unet(dropout=0.0)
    network.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1].detach())))
    batch = _batch()
    for objective in ("supervised", "hybrid"):
        model = HybridSegmentation(network, 2, objective=objective, process=process, ema_decay=0.0)
        eps = None if objective == "supervised" else torch.randn_like(batch["image"])
        model._terms(network, batch, torch.zeros(4), eps)
        model.segment(batch["image"])
    inputs = [x for x, _ in seen]
    times = [t for _, t in seen]
    for x, t in zip(inputs[1:], times[1:], strict=True):
        torch.testing.assert_close(x, inputs[0])
        torch.testing.assert_close(t, times[0])
    expected = 0.0 if isinstance(process, VPProcess) else math.log(0.002) / 4
    assert times[0].tolist() == pytest.approx([expected] * 4)


def test_the_supervised_step_of_a_training_batch_uses_clean_images(tmp_path: Path) -> None:
    noisy: list[float] = []

    class Spy(Segmenter):
        def forward(self, x: Tensor) -> Tensor:
            noisy.append(float((x - x.clamp(-1, 1)).abs().max()))
            return super().forward(x)

    model = HybridSegmentation(Spy(), 2, objective="supervised", optimizer=adamw)
    tiny_trainer(tmp_path).fit(model, squares_loader())
    assert noisy
    assert max(noisy) == 0


class _Normal(Dataset[dict[str, Tensor]]):
    """Toy A: x ~ N(0, 1) as a 1x1 image in the module's units, y = 1[x > 0]."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = self.x[i].view(1, 1, 1)
        return {"image": (x + 1) / 2, "mask": (x[0] > 0).long(), "index": torch.tensor(i)}


def test_toy_a_reaches_its_loss_floor(tmp_path: Path) -> None:
    """With x ~ N(0, 1) and y = 1[x > 0] the Bayes losses are known: 1 - abar_t, and 1/4 - arcsin(abar_t) / (2 pi).

    Their means over t = 1..1000 of the linear schedule are 0.72449 and 0.19778.
    """
    model = HybridSegmentation(
        PointNet(1, 3),
        2,
        mask_weight=1.0,
        image_channels=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
        ema_decay=0.99,
    )
    pl.seed_everything(0)
    data = _Normal(4096 * 20)
    tiny_trainer(tmp_path, max_steps=600, max_epochs=-1).fit(model, DataLoader(_Fast(data), batch_size=None))
    table = model.process.sigma_at(torch.linspace(0, 1, 1001))
    x = _Normal(1000 * 100).x.view(100, 1000)
    generator = torch.Generator().manual_seed(1)
    image_loss = mask_loss = 0.0
    with torch.no_grad():
        for row in x:
            batch = {"image": ((row + 1) / 2).view(-1, 1, 1, 1), "mask": (row > 0).long().view(-1, 1, 1)}
            eps = torch.randn(1000, 1, 1, 1, generator=generator)
            image, mask = model._terms(model.ema_network, batch, table[1:], eps)
            assert image is not None
            assert mask is not None
            image_loss += float(image.mean()) / 100
            mask_loss += float(mask.mean()) / 100
    assert image_loss == pytest.approx(0.72449, rel=0.01)
    assert mask_loss == pytest.approx(0.19778, rel=0.02)


class _Fast(Dataset[dict[str, Tensor]]):
    """Whole batches of 4096 sliced out of the tensor."""

    def __init__(self, data: _Normal) -> None:
        self.x = data.x.view(-1, 4096, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i >= len(self):
            raise IndexError(i)
        x = self.x[i]
        return {"image": (x + 1) / 2, "mask": (x[:, 0] > 0).long(), "index": torch.arange(4096)}


@pytest.mark.parametrize("objective", ["hybrid", "supervised", "generative"])
def test_every_objective_trains_validates_tests_and_predicts(objective: Objective, tmp_path: Path) -> None:
    model = HybridSegmentation(
        tiny_unet(), 2, objective=objective, process=EDMProcess(clean_share=0.25), optimizer=adamw
    )
    trainer = tiny_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, squares_loader(), squares_loader(6, 4))
    logged = dict(trainer.callback_metrics)
    assert ("train_mask_loss/clean" in logged) == (objective != "generative")
    assert ("train_image_loss" in logged) == (objective != "supervised")
    metrics = trainer.test(model, squares_loader(6, 4), verbose=False)[0]
    if objective == "generative":
        assert set(metrics) == {"test_loss", "test_image_loss"}
    else:
        assert {
            "test_jaccard",
            "test_jaccard_isic2018",
            "test_dice",
            "test_miou",
            "test_iou_class_0",
            "test_iou_class_1",
            "test_loss",
            "test_mask_loss",
        } <= set(metrics)
    predictions = trainer.predict(model, squares_loader(6, 4))
    assert predictions is not None
    first: Any = predictions[0]
    assert first["mask"].shape == (4, 8, 8)
    torch.testing.assert_close(first["probabilities"].sum(1), torch.ones(4, 8, 8))


def test_it_learns_squares(tmp_path: Path) -> None:
    pl.seed_everything(0)
    model = HybridSegmentation(
        tiny_unet(),
        2,
        objective="supervised",
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        ema_decay=0.9,
    )
    trainer = tiny_trainer(tmp_path, max_epochs=10)
    trainer.fit(model, squares_loader(32, 8))
    assert trainer.test(model, DataLoader(Squares(64), 32), verbose=False)[0]["test_jaccard"] > 0.95


def test_evaluation_does_not_depend_on_batch_size_and_skips_padding(tmp_path: Path) -> None:
    model = HybridSegmentation(tiny_unet(), 2)
    loader = squares_loader(6, 6)
    alone = tiny_trainer(tmp_path).test(model, squares_loader(6, 2), verbose=False)[0]
    batch = next(iter(loader))
    padded = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}
    padded["index"][-2:] = -1
    padded["mask"][-2:] = 255
    together = tiny_trainer(tmp_path).test(model, DataLoader(_One(padded), batch_size=None), verbose=False)[0]
    assert together == pytest.approx(alone, rel=1e-5)


class _One(Dataset[dict[str, Tensor]]):
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.batch


def test_denoise_returns_images_and_probabilities() -> None:
    model = HybridSegmentation(tiny_unet(), 2)
    image = _batch()["image"]
    noisy, denoised, probabilities = model.denoise(image, 0.0)
    torch.testing.assert_close(noisy, image)
    assert denoised.shape == image.shape
    assert probabilities.shape == (4, 2, 8, 8)
    first = model.denoise(image, 0.7, torch.Generator().manual_seed(1))[0]
    again = model.denoise(image, 0.7, torch.Generator().manual_seed(1))[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, image, atol=0.1)
    with pytest.raises(ValueError, match="that denoises, got Segmenter"):
        HybridSegmentation(Segmenter(), 2, objective="supervised").denoise(image, 0.5)


def _save(model: HybridSegmentation, path: Path) -> str:
    trainer = tiny_trainer(path, max_epochs=1)
    trainer.fit(model, squares_loader())
    trainer.save_checkpoint(path / "model.ckpt")
    return str(path / "model.ckpt")


def test_fine_tuning_starts_from_the_ema_weights(tmp_path: Path) -> None:
    source = HybridSegmentation(tiny_unet(), 2, optimizer=adamw, ema_decay=0.5)
    path = _save(source, tmp_path)
    model = HybridSegmentation(tiny_unet(), 2, objective="supervised", init_from=path, optimizer=adamw)
    start: dict[str, Tensor] = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            start.update({n: p.clone() for n, p in model.network.state_dict().items()})

    tiny_trainer(tmp_path, callbacks=[Start()]).fit(model, squares_loader())
    expected = source.ema_network.state_dict()
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    assert not torch.equal(start["unet.conv_in.weight"], source.network.state_dict()["unet.conv_in.weight"])


def test_other_classes_replace_the_last_layer_only_and_keep_its_image_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = HybridSegmentation(tiny_unet(), 2, optimizer=adamw)
    path = _save(source, tmp_path)
    model = HybridSegmentation(tiny_unet(out_channels=3 + 4), 4)
    before = model.network.head.weight.clone() if isinstance(model.network.head, nn.Conv2d) else torch.empty(0)
    with caplog.at_level("INFO"):
        model.load_network(path)
    expected = source.ema_network.state_dict()
    for name, value in model.network.state_dict().items():
        if not name.startswith("unet.conv_out"):
            assert torch.equal(value, expected[name])
    assert torch.equal(model.network.state_dict()["unet.conv_out.weight"][:3], expected["unet.conv_out.weight"][:3])
    assert torch.equal(model.network.state_dict()["unet.conv_out.weight"][3:], before[3:])
    assert "5 -> 7 output channels" in caplog.text
    assert all(
        torch.equal(a, b) for a, b in zip(model.ema_network.parameters(), model.network.parameters(), strict=True)
    )


def test_a_last_layer_of_the_same_size_that_means_something_else_is_replaced(tmp_path: Path) -> None:
    source = HybridSegmentation(tiny_unet(out_channels=5), 5, objective="supervised", optimizer=adamw)
    path = _save(source, tmp_path)
    model = HybridSegmentation(tiny_unet(out_channels=5), 2)
    before = model.network.state_dict()["unet.conv_out.weight"].clone()
    model.load_network(path)
    assert torch.equal(model.network.state_dict()["unet.conv_out.weight"], before)
    assert torch.equal(
        model.network.state_dict()["unet.conv_in.weight"], source.ema_network.state_dict()["unet.conv_in.weight"]
    )


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_segmentation_is_the_same_twice_and_leaves_the_mode_alone(ema_decay: float) -> None:
    model = HybridSegmentation(tiny_unet(dropout=0.5), 2, ema_decay=ema_decay).train()
    image = _batch()["image"]
    first, second = model.segment(image), model.segment(image)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.network.training


def test_weights_in_16_bits_are_refused(tmp_path: Path) -> None:
    model = HybridSegmentation(tiny_unet(), 2, optimizer=adamw)
    with pytest.raises(ValueError, match=r"weights in 32 bits, got bf16-true: .* use bf16-mixed"):
        tiny_trainer(tmp_path, precision="bf16-true").fit(model, squares_loader())


def test_a_checkpoint_with_other_classes_is_refused_for_resume(tmp_path: Path) -> None:
    path = _save(HybridSegmentation(tiny_unet(), 2, optimizer=adamw), tmp_path)
    model = HybridSegmentation(tiny_unet(out_channels=7), 4, optimizer=adamw)
    with pytest.raises(ValueError, match=r"`num_classes` = 4, got one with 2; .*init_from"):
        tiny_trainer(tmp_path).fit(model, squares_loader(), ckpt_path=path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HybridSegmentation(tiny_unet(), 1), "`num_classes` from 2 to 255"),
        (lambda: HybridSegmentation(tiny_unet(259), 256), "`num_classes` from 2 to 255 .*, got 256"),
        (lambda: HybridSegmentation(tiny_unet(), 2, mask_weight=-1), "`mask_weight` >= 0, got -1"),
        (lambda: HybridSegmentation(tiny_unet(), 2, num_level_bins=0), "`num_level_bins` >= 1"),
        (lambda: HybridSegmentation(tiny_unet(), 2, ema_decay=1.0), r"`ema_decay` in \[0, 1\), got 1.0"),
        (lambda: HybridSegmentation(tiny_unet(), 2, trunk_lr_scale=0.0), "positive `trunk_lr_scale`"),
        (
            lambda: HybridSegmentation(tiny_unet(), 2, objective=cast("Any", "hybird")),
            "`objective` to be one of hybrid, .*'hybird'",
        ),
        (
            lambda: HybridSegmentation(tiny_unet(), 2, mask_loss=cast("Any", "dice")),
            "`mask_loss` to be one of mse, ce, dice_ce",
        ),
        (lambda: HybridSegmentation(tiny_unet(4), 2), "5 output channels for objective 'hybrid'.* got 4"),
        (lambda: HybridSegmentation(Segmenter(), 2), "Segmenter without a time input; use ADMUNet"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], HybridSegmentation], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_network_that_returns_other_channels_is_named() -> None:
    model = HybridSegmentation(Segmenter(3), 2, objective="supervised")
    with pytest.raises(ValueError, match=r"5 or 2 output channels.* got 3"):
        model.segment(torch.rand(1, 3, 8, 8))


def test_a_loss_that_is_not_finite_stops_the_fit_and_names_step_and_terms(tmp_path: Path) -> None:
    class Exploding(Segmenter):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    model = HybridSegmentation(Exploding(), 2, objective="supervised", optimizer=adamw)
    weights = {name: value.clone() for name, value in model.network.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"got nan at step 0 \(train_mask_loss = nan\).*learning rate"):
        tiny_trainer(tmp_path).fit(model, squares_loader())
    assert all(torch.equal(weights[name], value) for name, value in model.network.named_parameters())


def test_plain_api_checkpoint_loads_without_unpickling(tmp_path: Path) -> None:
    model = HybridSegmentation(tiny_unet(), 2, optimizer=adamw, mask_weight=0.5)
    path = _save(model, tmp_path)
    loaded = HybridSegmentation.load_from_checkpoint(path, network=tiny_unet(), weights_only=True)
    assert loaded.mask_weight == 0.5
    image = _batch()["image"]
    assert torch.equal(loaded.segment(image), model.segment(image))
