import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from segmentation_models_pytorch import Unet
from tiny_nets import Segmenter, Squares, adamw, squares_loader, tiny_trainer, tiny_unet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_modules import EDMProcess, HybridSegmentation, LEDMSegmentation
from lightning_modules.hybrid_segmentation import Objective
from lightning_modules.ledm_segmentation import without_rare_classes
from lightning_modules.networks.decoder_features import decoder_blocks
from lightning_modules.networks.pixel_classifiers import EnsemblePrediction, PixelClassifiers
from lightning_modules.uncertainty import entropy, image_confidence, jensen_shannon

pytestmark = pytest.mark.filterwarnings("ignore:`init_from` is None")


def _ledm(network: nn.Module | None = None, **kwargs: Any) -> LEDMSegmentation:
    options: dict[str, Any] = {
        "num_classes": 2,
        "blocks": (1, 2),
        "num_members": 3,
        "hidden": (8, 6),
        "min_class_pixels": 0,
        "optimizer": adamw,
    }
    return LEDMSegmentation(tiny_unet() if network is None else network, **options | kwargs)


def _batch(size: int = 4) -> dict[str, Tensor]:
    return next(iter(squares_loader(size, size)))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Objective], str]:
    """Checkpoints of briefly trained networks, one an objective."""
    folder, made = tmp_path_factory.mktemp("denoiser"), dict[str, str]()

    def make(objective: Objective) -> str:
        if objective not in made:
            pl.seed_everything(0)
            source = HybridSegmentation(tiny_unet(), 2, objective=objective, optimizer=adamw, ema_decay=0.5)
            trainer = tiny_trainer(folder)
            trainer.fit(source, squares_loader())
            made[objective] = str(folder / f"{objective}.ckpt")
            trainer.save_checkpoint(made[objective])
        return made[objective]

    return make


@pytest.mark.parametrize("process", [None, EDMProcess()])
def test_features_are_those_of_the_network_on_images_with_one_shared_noise(process: EDMProcess | None) -> None:
    model = _ledm(process=process, sigmas=(0.2, 0.7, 0.0), noise_seed=5)
    image = _batch()["image"]
    x, eps = 2 * image - 1, torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))
    kept: list[Tensor] = []
    for block in (1, 2):
        decoder_blocks(model.backbone)[block].register_forward_hook(lambda _, __, output: kept.append(output))
    for sigma in (0.2, 0.7, 0.0):
        level = torch.full((4,), sigma)
        scale = model.process.c_in(level).view(-1, 1, 1, 1)
        model.backbone(scale * (x + sigma * eps), model.process.c_noise(level))
    expected, kept[:] = list(kept), []
    found = model.features(image)
    assert [tuple(f.shape) for f in found] == 3 * [(4, 16, 8, 8), (4, 8, 8, 8)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model.features(image[2:3])[0], found[0][2:3])


def _learned(tmp_path: Path, **kwargs: Any) -> tuple[LEDMSegmentation, float]:
    pl.seed_everything(0)
    model = _ledm(num_members=5, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), **kwargs)
    trainer = tiny_trainer(tmp_path, max_epochs=20)
    trainer.fit(model, squares_loader(16, 4))
    return model, trainer.test(model, DataLoader(Squares(48), 16), verbose=False)[0]["test_jaccard"]


@pytest.mark.parametrize("objective", ["hybrid", "generative", "supervised"])
def test_it_learns_squares_on_backbones_of_every_objective(
    objective: Objective, denoiser: Callable[[Objective], str], tmp_path: Path
) -> None:
    path = denoiser(objective)
    sigmas = (0.0,) if objective == "supervised" else (0.05, 0.2)
    # The backbone's last layer may be of any size.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings(
            "ignore", "You defined a|The '.*_dataloader' does not|The number of training|Found .* in eval mode"
        )
        model, jaccard = _learned(
            tmp_path, network=tiny_unet(out_channels=9), blocks=(0, 1, 2, 3), init_from=path, sigmas=sigmas
        )
    # A mask of foreground only would have 0.25.
    assert jaccard > 0.65
    averaged = {
        name.removeprefix("ema.module."): value
        for name, value in torch.load(path, weights_only=True)["state_dict"].items()
        if name.startswith("ema.module.")
    }
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in averaged.items() if "conv_out" not in name)
    assert own["unet.conv_out.weight"].shape[0] == 9


def test_it_learns_on_a_supervised_network_of_segmentation_models_pytorch(tmp_path: Path) -> None:
    network = Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    _, jaccard = _learned(tmp_path, network=network, sigmas=(0.0,), blocks=(0, 1, 2))
    assert jaccard > 0.4  # with a network that was not trained


class _Modes(pl.Callback):
    """The modes of the module in every training batch."""

    def __init__(self) -> None:
        self.seen: set[tuple[bool, bool]] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LEDMSegmentation)
        anywhere = any(module.training for module in pl_module.backbone.modules())
        self.seen.add((pl_module.network.training, anywhere))


@pytest.mark.parametrize("cache_features", [True, False])
def test_the_backbone_is_frozen_in_every_way(cache_features: bool, tmp_path: Path) -> None:
    network = Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    model = _ledm(network, sigmas=(0.0,), cache_features=cache_features)
    before, ensemble, modes = _state(model.backbone), _state(model.network), _Modes()
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[modes])
    trainer.fit(model, squares_loader(), squares_loader())
    assert modes.seen == {(True, False)}
    assert _equal(before, model.backbone.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, ensemble[name])}
    assert changed == set(ensemble)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.network.parameters()}


def test_cached_features_train_as_fresh_ones_and_are_computed_once(tmp_path: Path) -> None:
    ends, runs = [], []
    for cache_features in (True, False):
        pl.seed_everything(1)
        model = _ledm(cache_features=cache_features)
        calls: list[int] = []
        model.backbone.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
        tiny_trainer(tmp_path, max_epochs=3).fit(model, squares_loader(6, 2))
        ends.append(model.state_dict())
        runs.append(sum(calls))
    # Six images at three levels; without a cache in each of three epochs.
    assert runs == [18, 54]
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_pixels_are_drawn_from_the_labelled_ones_only_and_by_each_member_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With features that name their pixel, the members' pixels can be read off what they are given."""
    batch = _batch(3)
    batch["mask"][0, :, :5] = 255
    batch["mask"][1, 2] = 255
    batch["index"][2] = -1  # padding, but with a mask, to see that it is left out
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(x: Tensor, target: Tensor) -> Tensor:
        seen.append((x, target))
        return torch.stack([bias.sum() for bias in model.network.biases[0]])

    model = _ledm(blocks=(2,), sigmas=(0.0,), pixels_per_batch=500)
    names = torch.arange(8 * 64).view(1, 8, 8, 8).float()
    monkeypatch.setattr(model, "features", lambda image: [names + 1000 * image[:, :1, :1, :1].round()])
    monkeypatch.setattr(model.network, "loss", loss)
    batch["image"][:, :, 0, 0] = torch.tensor([0.0, 1.0, 2.0])[:, None]
    tiny_trainer(tmp_path).fit(model, DataLoader(_One(batch), batch_size=None))
    x, target = seen[0]
    image, pixel = x[..., 0].long() // 1000, x[..., 0].long() % 1000
    labelled = {(b, p) for b in range(2) for p in range(64) if batch["mask"][b].flatten()[p] != 255}
    for m in range(3):
        drawn = set(zip(image[m].tolist(), pixel[m].tolist(), strict=True))
        assert drawn == labelled
    assert torch.equal(target, batch["mask"][image, pixel // 8, pixel % 8])
    assert not torch.equal(pixel[0], pixel[1])


class _One(Dataset[dict[str, Tensor]]):
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.batch


def test_a_batch_without_labels_teaches_nothing(tmp_path: Path) -> None:
    batch = _batch()
    batch["mask"][:] = 255
    model = _ledm(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    before = _state(model)
    tiny_trainer(tmp_path).fit(model, DataLoader(_One(batch), batch_size=None))
    assert "train_loss" not in model.trainer.callback_metrics
    assert _equal(before, model.state_dict())


def test_rare_classes_of_an_image_are_ignored_there() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.int64)
    mask[0].view(-1)[:19], mask[1].view(-1)[:20], mask[1].view(-1)[20:30] = 1, 1, 255
    cleaned = without_rare_classes(mask, 3, 20)
    assert torch.equal(cleaned[1], mask[1])
    assert torch.equal(cleaned[0].view(-1), torch.tensor([255] * 19 + [0] * 45))
    assert torch.equal(without_rare_classes(mask, 3, 0), mask)


def test_ties_go_to_the_smallest_class_and_the_vote_may_differ_from_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of three pixels, four members, three classes."""
    sure, unsure = 0.98, 0.40
    members = torch.full((4, 1, 3, 1, 3), 0.01)
    for member, (pixel, label, p) in enumerate([(0, 2, sure), (0, 1, sure), (0, 1, sure), (0, 2, sure)]):
        members[member, 0, :, 0, pixel] = (1 - p) / 2
        members[member, 0, label, 0, pixel] = p
    for member in range(4):  # three lean towards class 0, the last is sure of class 1
        label, p = (0, unsure) if member < 3 else (1, sure)
        members[member, 0, :, 0, 1] = (1 - p) / 2
        members[member, 0, label, 0, 1] = p
        members[member, 0, :, 0, 2] = torch.eye(3)[0]
    votes = F.one_hot(members.argmax(2), 3).float().mean(0).movedim(-1, 1)
    said = EnsemblePrediction(members.mean(0), torch.stack([entropy(p) for p in members]).mean(0), votes)
    model = _ledm(num_classes=3)
    monkeypatch.setattr(model.network, "predict", lambda maps, size: said)
    verdict = model.judge(torch.rand(1, 3, 8, 8))
    assert verdict.mask[0, 0].tolist() == [1, 0, 0]
    assert verdict.probabilities.argmax(1)[0, 0].tolist()[1] == 1
    naive = torch.zeros(3)
    for pixel in range(3):
        mean = members[:, 0, :, 0, pixel].mean(0)
        own = [-(p * p.clamp(min=1e-30).log()).sum() for p in members[:, 0, :, 0, pixel]]
        naive[pixel] = -(mean * mean.clamp(min=1e-30).log()).sum() - torch.stack(own).mean()
    torch.testing.assert_close(verdict.uncertainty[0, 0], naive)
    torch.testing.assert_close(verdict.uncertainty, jensen_shannon(members))
    # What is tested is the vote: with class 1 as the truth of the middle pixel, the mean would have been right.
    model.test_step(
        {"image": torch.rand(1, 3, 8, 8), "mask": torch.tensor([[[1, 1, 0]]]), "index": torch.tensor([0])}, 0
    )
    metrics = model.test_metrics.compute()
    assert metrics["test_jaccard"] == pytest.approx(1 / 2)
    bins = model.reliability("test")
    assert bins is not None
    _, accuracy, count = bins
    assert count.sum() == 3
    assert accuracy.nan_to_num() @ count.to(accuracy) == 3  # calibration looks at the mean, which is right everywhere


def test_predictions_and_pictures(tmp_path: Path) -> None:
    model = _ledm()
    trainer = tiny_trainer(tmp_path)
    predictions = trainer.predict(model, squares_loader(6, 4))
    assert predictions is not None
    first: Any = predictions[0]
    assert set(first) == {"probabilities", "votes", "mask", "uncertainty", "confidence", "index"}
    assert first["mask"].shape == (4, 8, 8)
    assert first["mask"].dtype == torch.int64
    torch.testing.assert_close(first["probabilities"].sum(1), torch.ones(4, 8, 8))
    torch.testing.assert_close(first["confidence"], image_confidence(first["probabilities"]))
    image = _batch()["image"]
    torch.testing.assert_close(model.segment(image), first["probabilities"])
    torch.testing.assert_close(model.uncertainty(image), first["uncertainty"])
    assert 0 <= first["uncertainty"].min() <= first["uncertainty"].max() <= torch.tensor(2.0).log()


def test_evaluation_does_not_depend_on_batch_size_and_skips_padding(tmp_path: Path) -> None:
    model = _ledm()
    alone = tiny_trainer(tmp_path).test(model, squares_loader(6, 2), verbose=False)[0]
    batch = _batch(6)
    padded = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}
    padded["index"][-2:] = -1
    padded["mask"][-2:] = 255
    together = tiny_trainer(tmp_path).test(model, DataLoader(_One(padded), batch_size=None), verbose=False)[0]
    assert together == pytest.approx(alone, rel=1e-4)
    log_p = model.segment(batch["image"]).log()
    assert alone["test_loss"] == pytest.approx(F.nll_loss(log_p, batch["mask"]).item(), rel=1e-4)
    hybrid = HybridSegmentation(tiny_unet(), 2, objective="supervised")
    expected = tiny_trainer(tmp_path).test(hybrid, squares_loader(6, 2), verbose=False)[0]
    assert set(alone) == set(expected) - {"test_mask_loss"}


def _constant(path: Path, patience: int | None, **kwargs: Any) -> LEDMSegmentation:
    """A fit in which no loss improves after its first step."""
    model = _ledm(patience=patience, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    tiny_trainer(path, max_epochs=10, **kwargs).fit(model, squares_loader(8, 2))
    return model


def test_patience_counts_from_the_fifth_epoch_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PixelClassifiers, "loss", lambda self, x, target: self.biases[0].sum(1) + 1.0)
    # Four epochs of four steps, one step to set the best loss, then one more than the patience.
    assert _constant(tmp_path, 5).trainer.global_step == 16 + 1 + 6
    assert _constant(tmp_path, 0).trainer.global_step == 16 + 1 + 1
    assert _constant(tmp_path, None).trainer.global_step == 40


def test_one_member_that_still_improves_keeps_all_going(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def loss(self: PixelClassifiers, x: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        fixed = torch.tensor([1.0, 1.0, 1.0 - 0.01 * min(steps, 24)])
        return 0.0 * torch.stack([b.sum() for b in self.biases[0]]) + fixed

    monkeypatch.setattr(PixelClassifiers, "loss", loss)
    assert _constant(tmp_path, 3).trainer.global_step == 24 + 4


def test_a_resumed_run_ends_bit_equal_and_needs_no_backbone_file(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: str | None = None) -> tuple[pl.Trainer, LEDMSegmentation]:
        pl.seed_everything(3 if ckpt_path is None else 4)
        model = _ledm(patience=1000, ema_decay=0.5, init_from=None if ckpt_path is None else "gone.ckpt")
        trainer = tiny_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(model, squares_loader(8, 4), squares_loader(4, 4), ckpt_path=ckpt_path, weights_only=True)
        return trainer, model

    path = str(tmp_path / "half.ckpt")
    _, straight = run(6)
    run(5)[0].save_checkpoint(path)
    _, resumed = run(6, path)
    assert straight.best_loss.isfinite().all()
    assert _equal(straight.state_dict(), resumed.state_dict())


def test_a_checkpoint_is_complete_and_loads_without_unpickling(tmp_path: Path) -> None:
    model = _ledm(hidden=None, sigmas=(0.3,), noise_seed=2)
    trainer = tiny_trainer(tmp_path)
    trainer.fit(model, squares_loader())
    trainer.save_checkpoint(tmp_path / "ledm.ckpt")
    loaded = LEDMSegmentation.load_from_checkpoint(tmp_path / "ledm.ckpt", network=tiny_unet(), weights_only=True)
    image = _batch()["image"]
    assert torch.equal(loaded.segment(image), model.eval().segment(image))
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    other = LEDMSegmentation(tiny_unet(), 3, blocks=(1, 2), num_members=3, sigmas=(0.3,))
    with pytest.raises(ValueError, match="`num_classes` = 3, got one with 2; to start from it"):
        tiny_trainer(tmp_path).test(other, squares_loader(), ckpt_path=str(tmp_path / "ledm.ckpt"), weights_only=True)


def test_a_backbone_that_does_not_fit_is_refused(denoiser: Callable[[Objective], str], tmp_path: Path) -> None:
    network = Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    for init_from, error, match in (
        (denoiser("hybrid"), ValueError, "`init_from` to hold the same network apart from its last layer"),
        (str(tmp_path / "none.ckpt"), FileNotFoundError, "`init_from` to be a checkpoint file, but there is none"),
    ):
        with pytest.raises(error, match=match):
            tiny_trainer(tmp_path).fit(_ledm(network, sigmas=(0.0,), init_from=init_from), squares_loader())


def test_doubtful_backbones_are_warned_about(denoiser: Callable[[Objective], str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"`init_from` is None: .* If it was not trained before, they are random"):
        tiny_trainer(tmp_path).fit(_ledm(), squares_loader())
    with pytest.warns(UserWarning, match=r"on clean images only.* taken at `sigmas` \(0.176, .*sigmas: \[0.0\]"):
        tiny_trainer(tmp_path).fit(_ledm(init_from=denoiser("supervised")), squares_loader())


def test_augmented_images_are_refused_while_features_are_cached(tmp_path: Path) -> None:
    class Flipped(Squares):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {**super().__getitem__(i), "image": torch.rand(3, 8, 8)}

    with pytest.raises(ValueError, match=r"`cache_features` is true, got other pixels"):
        tiny_trainer(tmp_path, max_epochs=2).fit(_ledm(), DataLoader(Flipped(4), 4))
    tiny_trainer(tmp_path, max_epochs=2).fit(_ledm(cache_features=False), DataLoader(Flipped(4), 4))


def test_a_class_that_the_module_does_not_have_is_named(tmp_path: Path) -> None:
    batch = _batch()
    batch["mask"][1, 3, 3] = 2
    loader = DataLoader(_One(batch), batch_size=None)
    match = r"class ids below `num_classes` = 2, or 255 to ignore a pixel, got id 2; set `num_classes`"
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path).fit(_ledm(), loader)
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path).test(_ledm(), loader, verbose=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"blocks": ()}, r"`blocks` to name decoder blocks of ADMUNet.*got \(\); choose from 0: 16 channels at 1/2"),
        ({"blocks": (5, 6, 7, 8, 12)}, r"of which \[5, 6, 7, 8, 12\] do not exist; choose from 0: 16 channels"),
        ({"num_members": 0}, "`num_members` >= 1, got 0"),
        ({"hidden": (8, 0)}, "`hidden` to be two positive widths"),
        ({"pixels_per_batch": 1}, "`pixels_per_batch` >= 2, got 1"),
        ({"min_class_pixels": -1}, "`min_class_pixels` >= 0, got -1"),
        ({"patience": -1}, "`patience` >= 0, got -1; leave it out"),
        ({"sigmas": ()}, r"`sigmas` to be noise levels from 0 .*got \(\)"),
        ({"sigmas": (0.1, -0.1)}, r"`sigmas` .* sigma_max = 157.*got \(0.1, -0.1\)"),
        ({"sigmas": (81.0,), "process": EDMProcess()}, r"`sigmas` .* sigma_max = 80, got \(81.0,\)"),
        ({"network": Segmenter()}, r"`sigmas` = \(0.0,\) for Segmenter, which has no time input"),
        ({"ema_decay": 1.0}, r"`ema_decay` in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _ledm(**options)


def test_other_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`num_classes` >= 2, got 1; count the background"):
        LEDMSegmentation(tiny_unet(), 1, blocks=(1,))
    with pytest.raises(TypeError, match="tell its decoder blocks, got Segmenter"):
        _ledm(Segmenter(), sigmas=(0.0,))
