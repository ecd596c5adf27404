"""What modules that predict masks have in common, on the simplest of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from tiny_nets import adamw, squares_loader, tiny_trainer, tiny_unet
from torch.utils.data import DataLoader

from lightning_modules.hybrid_segmentation import HybridSegmentation
from lightning_modules.ledm_segmentation import LEDMSegmentation
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
