"""A Trainer is given every image of a split exactly once."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules import PH2DataModule


class Recorder(pl.LightningModule):
    """Learns one number and writes down which images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen["train"] += batch["index"].tolist()
        return self.scale * batch["image"].mean()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.seen["val"] += batch["index"].tolist()

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.seen["test"] += batch["index"].tolist()

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen["predict"] += batch["index"].tolist()
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("val_share", [0.0, 0.4])
def test_in_a_trainer(fake_data: Path, tmp_path: Path, val_share: float) -> None:
    data = PH2DataModule(str(fake_data / "ph2"), image_size=8, batch_size=2, num_labels=5, val_share=val_share)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    model = Recorder()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    expected = {0.0: (4, 0), 0.4: (2, 2)}[val_share]
    assert len(model.seen["train"]) == 2 * expected[0]
    assert model.seen["val"] == 2 * list(range(expected[1]))
    assert model.seen["test"] == model.seen["predict"] == list(range(5))
