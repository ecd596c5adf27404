"""TDSMDiffusion on points: what it learns, what it must not do, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import ModelCheckpoint
from tdsm_toys import MEANS, ClassPoint, PointPosterior, Points, plain, points_loader, tiny_tdsm
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_modules.base import HalfLife
from lightning_modules.diffusion.denoisers import ClassDenoiser
from lightning_modules.diffusion.transition import FileTransition, IdentityTransition, SymmetricTransition
from lightning_modules.tdsm_diffusion import TDSMDiffusion

REQUEST: dict[str, Any] = {"image_size": 1, "sampler": "heun", "num_steps": 12, "guidance": 0.0}


def fitted(model: TDSMDiffusion, path: Path, **options: Any) -> TDSMDiffusion:
    torch.manual_seed(0)  # the seed of the run
    tiny_trainer(path, **options).fit(model, points_loader())
    return model


def asked(classes: list[int], first_seed: int = 0, **options: Any) -> dict[str, Any]:
    seeds = torch.arange(first_seed, first_seed + len(classes))
    return REQUEST | {"seed": seeds, "label": torch.tensor(classes)} | options


@pytest.mark.parametrize("others", ["exact", "sampled"])
@pytest.mark.parametrize("label_dropout", [0.0, 0.3])
def test_the_identity_is_plain_diffusion_to_the_last_bit(others: str, label_dropout: float, tmp_path: Path) -> None:
    common: dict[str, Any] = {"label_dropout": label_dropout, "dropout": 0.2}
    weighted = tiny_tdsm(transition=IdentityTransition(), others=others, **common)
    states = [fitted(model, tmp_path, max_epochs=3).state_dict() for model in (weighted, plain(**common))]
    for name, value in states[1].items():
        assert torch.equal(value, states[0][name]), name


def test_an_image_without_its_label_is_matched_unweighted() -> None:
    model = tiny_tdsm(others="exact")
    x, sigma, eps = torch.randn(6, 1, 1, 1), torch.rand(6) + 0.1, torch.randn(6, 1, 1, 1)
    label = torch.tensor([3, 0, 3, 1, 2, 3])
    model.weighting.transition.copy_(SymmetricTransition(0.4).matrix(3))
    weighted = model.loss_per_image(model.network, x, sigma, eps, label)
    unweighted = model.loss_per_image(model.network, x, sigma, eps, label, weighted=False)
    is_null = label == 3
    assert torch.equal(weighted[is_null], unweighted[is_null])
    assert not torch.isclose(weighted[~is_null], unweighted[~is_null]).any()
    torch.autograd.backward(weighted[is_null].sum())  # no class learns from it, class 0 neither
    gradient = cast("ClassPoint", model.network).classes.weight.grad
    assert gradient is not None
    assert not gradient[:3].any()
    assert gradient[3].any()


def test_classifier_and_generator_see_the_same_noisy_images(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[Tensor, ...]]] = {"network": [], "classifier": []}
    model = tiny_tdsm()
    assert model.weighting.classifier is not None

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen[name].append(inputs)

    model.network.register_forward_pre_hook(listen("network"))
    model.weighting.classifier.network.register_forward_pre_hook(listen("classifier"))
    fitted(model, tmp_path, max_epochs=1, limit_train_batches=1)
    (x, t, _), (noisy, level) = seen["network"][0], seen["classifier"][0]
    assert torch.equal(x, noisy)
    assert torch.equal(t, level)
    # Others are passes of whole images through the same network: a part of these images at the same levels.
    assert {float(v) for v in seen["network"][1][0].flatten()} <= {float(v) for v in x.flatten()}


def right_among_drawn(model: TDSMDiffusion) -> float:
    """Learn points without a trainer, which would take most of the time; share of draws that show their class."""
    points = Points(1500)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=0.02)
    for _ in range(150):
        rows = torch.randint(1500, (500,))
        x, label = 2 * points.image[rows] - 1, points.label[rows]
        sigma = model.process.sample_sigma(len(x))
        loss = model.loss_per_image(model.network, x, sigma, torch.randn_like(x), label).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.reset_ema()
    classes = torch.arange(3).repeat_interleave(100)
    drawn = model.draw(asked(classes.tolist()))["image"].flatten() * 2 - 1
    return float(((drawn[:, None] - MEANS).abs().argmin(1) == classes).float().mean())


def test_clean_classes_are_learnt_from_wrong_labels() -> None:
    model = tiny_tdsm(draw_batch=300)
    model.weighting.transition.copy_(SymmetricTransition(0.4).matrix(3))
    assert right_among_drawn(model) > 0.93
    assert 0.5 < right_among_drawn(plain(draw_batch=300)) < 0.7  # as wrong as its labels


def test_weights_without_a_classifier_are_those_of_the_label() -> None:
    model = tiny_tdsm(weighting="reverse", classifier=None)
    model.weighting.transition.copy_(SymmetricTransition(0.4).matrix(3))
    weights = model.weighting.weights(model.process, torch.randn(3, 1, 1, 1), torch.ones(3), torch.arange(3))
    assert weights is not None
    assert_close(weights, torch.full((3, 3), 0.2).fill_diagonal_(0.6))


@pytest.mark.parametrize("weighting", ["posterior", "reverse", "none"])
def test_a_trusted_label_has_all_the_weight(weighting: str) -> None:
    judge = PointPosterior() if weighting == "posterior" else None
    model = tiny_tdsm(weighting=weighting, classifier=judge, others="exact")
    model.weighting.transition.copy_(SymmetricTransition(0.4).matrix(3))
    x, sigma = torch.randn(6, 1, 1, 1), torch.rand(6) + 0.1
    label = torch.tensor([0, 1, 2, 0, 3, 3])  # 3 is no label
    trusted = torch.tensor([True, False, True, False, True, False])
    denoiser = ClassDenoiser(model.network, model.process)
    found = model.weighting.estimate(denoiser, x, sigma, label, trusted)
    weights = model.weighting.weights(model.process, x, sigma, label.clamp(max=2))
    for b in range(6):
        by_class = [denoiser(x[[b]], sigma[[b]], torch.tensor([c]))[0] for c in range(4)]
        expected = by_class[int(label[b])]
        if not trusted[b] and label[b] < 3 and weights is not None:
            expected = torch.stack([weights[b, c] * by_class[c] for c in range(3)]).sum(0)
        assert_close(found[b], expected)
    assert torch.equal(
        model.weighting.estimate(denoiser, x, sigma, label, torch.zeros(6, dtype=torch.bool)),
        model.weighting.estimate(denoiser, x, sigma, label),
    )


def test_what_a_batch_says_of_its_labels_reaches_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(tiny_tdsm(others="exact"), tmp_path, max_epochs=1)
    monkeypatch.setattr(model, "log", lambda *_, **__: None)  # there is no trainer's loop
    batch = next(iter(points_loader()))
    losses = []
    for sure in (None, False, True):
        told = {} if sure is None else {"trusted": torch.full((4,), sure)}
        torch.manual_seed(3)
        losses.append(float(model.training_step(batch | told, 0)))
    torch.manual_seed(3)
    model.weighting.transition.copy_(torch.eye(3))
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == float(model.training_step(batch, 0))


def test_a_fit_goes_on_bit_equal(tmp_path: Path) -> None:
    class Saves(ModelCheckpoint):
        def __init__(self) -> None:
            super().__init__(tmp_path, filename="{epoch}", save_top_k=-1)

    options: dict[str, Any] = {"dropout": 0.2, "label_dropout": 0.2}
    whole = tiny_tdsm(**options)
    tiny_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[Saves()]).fit(whole, points_loader())
    rest = tiny_tdsm(**options)
    rest.weighting.transition.zero_()  # comes from the checkpoint
    path = str(tmp_path / "epoch=0.ckpt")
    tiny_trainer(tmp_path, max_epochs=2).fit(rest, points_loader(), ckpt_path=path, weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_one_image_is_the_same_alone_and_among_others() -> None:
    model = tiny_tdsm(side=4, label_dropout=0.1)
    options: dict[str, Any] = {"image_size": 4, "guidance": 0.5}
    together = model.draw(asked([i % 3 for i in range(64)], **options))
    alone = model.draw(asked([40 % 3], first_seed=40, **options))
    assert torch.equal(together["image"][40], alone["image"][0])
    assert (together["image"].flatten(1).std(0) > 0).all()


def test_sixteen_bits_train_every_weight_and_draw(tmp_path: Path) -> None:
    """The passes without gradient come first, and what autocast keeps of their weights must not have none later."""
    model = tiny_tdsm(others="exact")
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    tiny_trainer(tmp_path, precision="bf16-mixed").fit(model, points_loader())
    for name, value in model.network.named_parameters():
        assert not torch.equal(value, before[name]), name
    with torch.autocast("cpu", torch.bfloat16):
        image = model.draw(asked([0, 1, 2]))["image"]
    assert image.dtype == torch.float32
    assert bool(torch.isfinite(image).all())


def test_a_compiled_network_is_the_same_network(tmp_path: Path) -> None:
    compiled, plain_one = fitted(tiny_tdsm(compile="eager"), tmp_path), fitted(tiny_tdsm(), tmp_path)
    for name, value in plain_one.state_dict().items():
        assert_close(value, compiled.state_dict()[name])


def test_half_life_counts_images() -> None:
    weight = HalfLife(1000.0)
    weight.images_per_update = 50
    # Far into a run, 20 updates are one half-life; early ones remember a twentieth of the run.
    kept = 1.0
    for n in range(10_000, 10_020):
        kept *= 1 - weight(n)
    assert kept == pytest.approx(0.5)
    assert weight(0) == 1.0
    assert 1 - weight(100) == pytest.approx(0.5 ** (50 / 250))


def test_images_are_counted_over_batches(tmp_path: Path) -> None:
    model = tiny_tdsm()
    trainer = tiny_trainer(tmp_path, max_epochs=3)
    trainer.fit(model, points_loader(8, 4))
    assert float(trainer.callback_metrics["train_kimg"]) == pytest.approx(0.024)


def test_validation_is_the_same_every_time_and_ignores_fillers(tmp_path: Path) -> None:
    model = tiny_tdsm()
    trainer = tiny_trainer(tmp_path)
    losses = [trainer.validate(model, points_loader(8, b), verbose=False)[0]["val_loss"] for b in (4, 4)]
    assert losses[0] == losses[1]
    assert_close(model.weighting.transition, SymmetricTransition(0.4).matrix(3).float())  # without any fit
    batch = {"image": torch.rand(2, 1, 1, 1), "label": torch.tensor([0, 1]), "index": torch.tensor([-1, -1])}
    model._eval_step(batch, "val")
    assert not cast("Any", model.losses["val_"]).update_called


def test_nan_stops_the_training(tmp_path: Path) -> None:
    model = tiny_tdsm()
    cast("ClassPoint", model.network).first.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="finite training loss"):
        fitted(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier": None}, "`classifier` of noisy images with `weighting` posterior"),
        ({"weighting": "none"}, "`classifier` .* got PointPosterior with 'none'"),
        ({"weighting": "all"}, "`weighting` to be one of posterior, reverse, none, got 'all'"),
        ({"others": "some"}, "`others` to be one of exact, sampled"),
        ({"threshold": 1.0}, r"`threshold` in \[0, 1\), got 1.0"),
        ({"label_dropout": -0.1}, r"`label_dropout` in \[0, 1\), got -0.1"),
        ({"pairs_at_once": 0}, "`pairs_at_once` to be at least 1, got 0"),
        ({"draw_batch": 0}, "`draw_batch` to be at least 1, got 0"),
        ({"num_level_bins": 0}, "`num_level_bins` to be at least 1, got 0"),
        ({"latent_cache": "somewhere"}, "`latent` with `latent_cache`"),
        ({"ema_half_life": 0.0}, "positive `ema_half_life`, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_tdsm(**options)


def test_networks_without_classes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"network\(x, t, label\).*got Linear; use UViT"):
        TDSMDiffusion(nn.Linear(1, 1), 3)


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (SymmetricTransition(2 / 3), "invertible `transition`, got one with condition number"),
        ([[0.6, 0.4], [0.4, 0.6]], r"3 x 3 .* got shape \(2, 2\)"),
        (None, "Expected `transition`, got None"),
    ],
)
def test_transitions_that_do_not_fit_are_refused(transition: object, message: str, tmp_path: Path) -> None:
    if isinstance(transition, list):
        (tmp_path / "t.csv").write_text("\n".join(",".join(map(str, row)) for row in transition))
        transition = FileTransition(str(tmp_path / "t.csv"))
    with pytest.raises(ValueError, match=message):
        fitted(tiny_tdsm(transition=transition), tmp_path)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_outside_the_classes_are_refused(label: int, tmp_path: Path) -> None:
    model = tiny_tdsm()
    batch = {"image": torch.rand(1, 1, 1, 1), "label": torch.tensor([label]), "index": torch.tensor([0])}
    with pytest.raises(ValueError, match=rf"labels from 0 to 2 .*got {label}"):
        model.training_step(batch, 0)
    with pytest.raises(ValueError, match=rf"labels from 0 to 2 .*got {label}"):
        model.draw(asked([label]))


def test_requests_that_cannot_be_drawn_are_refused() -> None:
    model = tiny_tdsm()
    with pytest.raises(ValueError, match=r"`image_size` 1, .* got 8"):
        model.draw(asked([0], image_size=8))
    with pytest.raises(ValueError, match=r"trained without `label_dropout`, got 1\.5"):
        model.draw(asked([0], guidance=1.5))
    with pytest.raises(TypeError, match=r"`seed`, `label` and `image_size`, got \['image'\]"):
        model.predict_step({"image": torch.rand(1, 1, 1, 1)}, 0)


@pytest.mark.parametrize(
    ("image_size", "image_channels", "wrong"), [(2, 1, "image_size 2"), (1, 3, "image_channels 3")]
)
def test_images_of_another_size_are_refused(image_size: int, image_channels: int, wrong: str, tmp_path: Path) -> None:
    data = LightningDataModule.from_datasets(Points(), batch_size=4)
    vars(data).update(image_size=image_size, image_channels=image_channels)
    with pytest.raises(ValueError, match=rf"`network` for the images of the data, {wrong}, got one for 1;"):
        tiny_trainer(tmp_path).fit(tiny_tdsm(), datamodule=data)


def test_another_process_is_refused_for_resume(tmp_path: Path) -> None:
    from lightning_modules.diffusion.noise import EDMProcess

    model = tiny_tdsm()
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="sigma_data"):
        tiny_tdsm(process=EDMProcess(sigma_data=0.3)).on_load_checkpoint(checkpoint)


def test_the_classifier_is_never_trained(tmp_path: Path) -> None:
    class Learnable(PointPosterior):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            logits: Tensor = self.norm(super().forward(x, t) * self.scale)
            return logits

    model = fitted(tiny_tdsm(classifier=Learnable()), tmp_path)
    assert model.weighting.classifier is not None
    state = model.weighting.classifier.network.state_dict()
    assert torch.equal(state["scale"], torch.ones(3))
    assert torch.equal(state["norm.running_mean"], torch.zeros(3))
    assert not model.weighting.classifier.network.training
