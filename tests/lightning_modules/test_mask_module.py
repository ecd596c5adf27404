"""What modules that predict masks have in common, on the simplest of them."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import LightningDataModule
from tiny_nets import adamw, squares_loader, tiny_trainer, tiny_unet
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.diffusion.noise import EDMProcess
from lightning_modules.diffusion.vp_noise import VPProcess
from lightning_modules.hybrid_segmentation import HybridSegmentation
from lightning_modules.ledm_segmentation import LEDMSegmentation, Verdict
from lightning_modules.mask_module import MaskModule
from lightning_modules.uncertainty import entropy


class SquaresData(LightningDataModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def train_dataloader(self) -> DataLoader[Any]:
        return squares_loader()


def _modules(num_classes: int) -> list[MaskModule]:
    unet = tiny_unet(out_channels=3 + num_classes)
    return [
        HybridSegmentation(unet, num_classes, ema_decay=0.0, optimizer=adamw),
        LEDMSegmentation(tiny_unet(), num_classes, blocks=(1, 2), num_members=2, min_class_pixels=0, optimizer=adamw),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_the_data_must_have_as_many_classes(which: int, tmp_path: Path) -> None:
    module = _modules(3)[which]
    with pytest.raises(ValueError, match=r"`num_classes` to be the data's, got 3 .* and 2 from the data"):
        tiny_trainer(tmp_path).fit(module, datamodule=SquaresData(2))


@pytest.mark.parametrize("which", [0, 1])
def test_a_mask_with_other_ids_is_named(which: int) -> None:
    module = _modules(2)[which]
    mask = torch.tensor([[[0, 1], [255, 1]]])
    assert module.known(mask) is mask
    mask[0, 0, 0] = 7
    with pytest.raises(ValueError, match="class ids below `num_classes` = 2, or 255 to ignore a pixel, got id 7"):
        module.training_step({"image": torch.rand(1, 3, 8, 8), "mask": mask, "index": torch.tensor([0])}, 0)


def test_classes_that_no_training_image_shows_are_named_once(recwarn: pytest.WarningsRecorder, tmp_path: Path) -> None:
    tiny_trainer(tmp_path, max_epochs=2).fit(_modules(4)[1], squares_loader())
    said = [str(w.message) for w in recwarn if "did not occur" in str(w.message)]
    assert len(said) == 1
    assert "of the `num_classes` = 4 classes, [2, 3] did not occur" in said[0].replace("Of", "of")


@pytest.mark.parametrize("which", [0, 1])
def test_predictions_agree_with_each_other(which: int) -> None:
    module = _modules(2)[which].eval()
    image = torch.rand(3, 3, 8, 8)
    said = module.predict_step({"image": image, "index": torch.arange(3)}, 0)
    torch.testing.assert_close(said["probabilities"], module.segment(image))
    torch.testing.assert_close(said["uncertainty"], module.uncertainty(image))
    if which == 0:
        torch.testing.assert_close(said["uncertainty"], entropy(said["probabilities"]))
        assert torch.equal(said["mask"], said["probabilities"].argmax(1))


@pytest.mark.parametrize("split", ["val", "test"])
def test_reliability_counts_the_pixels_of_a_split(split: Any) -> None:  # noqa: ANN401 - a Literal
    module = _modules(2)[0]
    module.metrics_of(split).update(torch.full((2, 2, 4, 4), 0.5), torch.zeros(2, 4, 4, dtype=torch.long))
    bins = module.reliability(split)
    assert bins is not None
    assert bins[2].sum() == 32
    generative = HybridSegmentation(tiny_unet(), 2, objective="generative")
    assert generative.reliability(split) is None


def _resumed(module: MaskModule, other: MaskModule, folder: Path) -> None:
    trainer = tiny_trainer(folder, max_steps=1)
    trainer.fit(module, squares_loader())
    trainer.save_checkpoint(folder / "one.ckpt")
    tiny_trainer(folder, max_steps=2).fit(other, squares_loader(), ckpt_path=str(folder / "one.ckpt"))


def _ledm(**changes: Any) -> LEDMSegmentation:
    options: dict[str, Any] = {"blocks": (1, 2), "num_members": 2, "min_class_pixels": 0, "optimizer": adamw}
    return LEDMSegmentation(tiny_unet(), 2, **options | changes)


@pytest.mark.parametrize(
    ("module", "other", "named"),
    [
        (
            HybridSegmentation(tiny_unet(), 2, optimizer=adamw),
            HybridSegmentation(tiny_unet(), 2, optimizer=adamw, process=VPProcess("cosine"), mask_loss="ce"),
            r"mask_loss mse -> ce; process \{.*'linear'.*\} -> \{.*'cosine'",
        ),
        (
            HybridSegmentation(tiny_unet(), 2, optimizer=adamw, objective="supervised"),
            HybridSegmentation(tiny_unet(), 2, optimizer=adamw, objective="supervised", mask_loss="mse"),
            "mask_loss ce -> mse",
        ),
        (_ledm(), _ledm(sigmas=(0.1, 0.2, 0.3), process=EDMProcess()), r"process .*sigmas \[0.176, 0.522, 0.958\] -> "),
    ],
)
def test_weights_do_not_meet_other_settings(module: MaskModule, other: MaskModule, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`ckpt_path` to hold weights .*trained with others: .*{named}"):
        _resumed(module, other, tmp_path)


def test_a_network_that_only_sees_clean_images_does_not_mind_the_process(tmp_path: Path) -> None:
    supervised = partial(HybridSegmentation, tiny_unet(), 2, optimizer=adamw, objective="supervised")
    _resumed(supervised(), supervised(process=VPProcess("cosine")), tmp_path)


def test_features_are_taken_with_the_process_of_the_backbone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(HybridSegmentation(tiny_unet(), 2, optimizer=adamw), squares_loader())
    trainer.save_checkpoint(tmp_path / "linear.ckpt")
    cosine = _ledm(process=VPProcess("cosine"))
    with pytest.raises(ValueError, match=r"`process` to be the one that `init_from` .*linear.ckpt was trained with"):
        cosine.load_backbone(str(tmp_path / "linear.ckpt"))
    _ledm(process=VPProcess("cosine"), sigmas=(0.0,)).load_backbone(str(tmp_path / "linear.ckpt"))
    _ledm().load_backbone(str(tmp_path / "linear.ckpt"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_second_fit_goes_on_from_the_first(which: int, tmp_path: Path) -> None:
    source = HybridSegmentation(tiny_unet(), 2, ema_decay=0.0, optimizer=adamw)
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(source, squares_loader())
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    path = str(tmp_path / "source.ckpt")
    frozen = partial(torch.optim.SGD, lr=0.0)
    module = (
        HybridSegmentation(tiny_unet(), 2, ema_decay=0.0, optimizer=frozen, init_from=path)
        if which == 0
        else _ledm(init_from=path, optimizer=frozen)
    )
    tiny_trainer(tmp_path).fit(module, squares_loader())
    kept = cast("nn.Module", module.network if which == 0 else module.backbone)
    weight = next(p for p in kept.parameters() if p.ndim == 4)
    weight.data.add_(1.0)
    before = weight.detach().clone()
    tiny_trainer(tmp_path).fit(module, squares_loader())
    assert torch.equal(weight, before)


def test_the_pictures_show_the_verdict_that_is_evaluated() -> None:
    ledm = _ledm()
    # Members say .4, .4 and .99 of class 1: the vote is class 0, the likeliest by the mean is class 1.
    p = torch.tensor([0.4, 0.4, 0.99]).mean()
    verdict = Verdict(torch.stack([1 - p, p]).view(1, 2, 1, 1), torch.tensor([[[[2]], [[1]]]]), torch.zeros(1, 1, 1))
    ledm.judge = lambda image: verdict  # type: ignore[method-assign]  # what an ensemble says
    image = torch.zeros(1, 3, 1, 1)
    assert ledm.segment(image).argmax(1).item() == 1
    assert ledm.masks(image).item() == 0
    said = ledm.predict_step({"image": image, "index": torch.tensor([0])}, 0)
    assert said["mask"].item() == 0
    assert said["votes"].flatten().tolist() == [2, 1]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ([torch.rand(2, 3, 8, 8)], r"`image` \[B, C, H, W\] floating, in \[0, 1\], got none; `mask` .*got none"),
        ({"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "`image` .*, got torch.uint8"),
        ({"mask": torch.zeros(2, 1, 8, 8, dtype=torch.long)}, r"`mask` \[B, H, W\] .*, got \[2, 1, 8, 8\]"),
        ({"mask": torch.zeros(2, 8, 8)}, "`mask` .* int64, 255 = unlabelled, got torch.float32"),
    ],
)
def test_batches_that_are_none_are_described(which: int, batch: Any, named: str) -> None:  # noqa: ANN401 - on purpose
    module = _modules(2)[which]
    whole = {"image": torch.rand(2, 3, 8, 8), "mask": torch.ones(2, 8, 8, dtype=torch.long), "index": torch.arange(2)}
    for step in (module.training_step, module.validation_step):
        with pytest.raises(ValueError, match=rf"Expected batches to be dicts with {named}"):
            step(whole | batch if isinstance(batch, dict) else batch, 0)


@pytest.mark.parametrize(("scale", "warnings"), [(255.0, 1), (1.0, 0)])
def test_images_that_were_not_scaled_are_noticed_once(
    scale: float, warnings: int, recwarn: pytest.WarningsRecorder
) -> None:
    module = _modules(2)[0].eval()
    for _ in range(2):
        module.predict_step({"image": scale * torch.rand(2, 3, 8, 8)}, 0)
    assert sum("`image` in [0, 1], got" in str(warning.message) for warning in recwarn) == warnings


def test_images_are_numbered_where_nobody_did() -> None:
    module = _modules(2)[1].eval()
    assert module.predict_step({"image": torch.rand(3, 3, 8, 8)}, 0)["index"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"`index` \[B\] int64, the image's number in the data, got none"):
        module.training_step({"image": torch.rand(1, 3, 8, 8), "mask": torch.zeros(1, 8, 8, dtype=torch.long)}, 0)


def test_weights_that_were_trained_without_images_draw_none(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.fit(HybridSegmentation(tiny_unet(), 2, optimizer=adamw, objective="supervised"), squares_loader())
    trainer.save_checkpoint(tmp_path / "supervised.ckpt")
    hybrid = HybridSegmentation(tiny_unet(), 2, mask_loss="ce")
    hybrid.on_load_checkpoint(torch.load(tmp_path / "supervised.ckpt", weights_only=True))
    with pytest.raises(ValueError, match="got weights trained with 'supervised', which trains no images"):
        hybrid.draw({"seed": torch.tensor([0]), "image_size": 8, "sampler": "euler", "num_steps": 2})
