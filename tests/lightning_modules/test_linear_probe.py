"""LinearProbe from the data to predictions: against scikit-learn, with encoders, caches, checkpoints and bad input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from cli_runs import lightning
from sklearn.linear_model import LogisticRegression as Reference
from ssl_toys import ToyNet
from tiny_nets import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ArraySource, SemiSupervisedDataModule
from lightning_modules import LinearProbe, Supervised, TimmClassifier, ViTEncoder
from lightning_modules.cli import main
from lightning_modules.ssl.base import Split
from lightning_modules.ssl_classifier import SSLClassifier

Items = dict[str, Tensor]
PIXELS = np.random.default_rng(0).integers(0, 256, (36, 6, 6, 3), dtype=np.uint8)


def digits(**options: Any) -> SemiSupervisedDataModule:
    chosen: dict[str, Any] = {"labels_per_class": 3, "steps_per_epoch": 1, "batch_size": 4}
    return SemiSupervisedDataModule(**chosen | options)


def squares(labels_seed: int = 0, **options: Any) -> SemiSupervisedDataModule:
    source = ArraySource(options.pop("pixels", PIXELS), [0, 1, 2] * 12, PIXELS[:5], [0, 1, 2, 0, 1])
    return digits(source=source, labels_seed=labels_seed, **options)


def fit(model: LinearProbe, data: pl.LightningDataModule, folder: Path, **options: Any) -> pl.Trainer:
    trainer = tiny_trainer(folder, **{"max_epochs": -1, "max_steps": 1} | options)
    trainer.fit(model, datamodule=data)
    return trainer


class Given(pl.LightningDataModule):
    """Labelled images as they are given, in batches of five, backwards and with fillers.

    Args:
        items: "image", "label" and what else batches have.
    """

    num_classes = 3
    class_names = ("ant", "bee", "cat")

    def __init__(self, **items: Tensor) -> None:
        super().__init__()
        self.items = items | {"index": torch.arange(len(items["label"]))}

    def sweep_dataloader(self, split: Split) -> Iterator[Items]:
        numbers = torch.arange(len(self.items["label"])).flip(0)
        for part in torch.split(numbers, 5):
            batch = {name: torch.cat([values[part], values[:1]]) for name, values in self.items.items()}
            batch["index"][-1], batch["label"][-1] = -1, -1
            yield batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.zeros(1)] * 3)  # type: ignore[arg-type]  # not looked at


def points(n: int = 18, seed: int = 0) -> Items:
    image = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "label": torch.arange(n) % 3}


class Encoder(nn.Module):
    """Three numbers an image, after a layer that depends on the mode; counts the images that it sees."""

    def __init__(self, seed: int = 0, **known: int) -> None:
        super().__init__()
        vars(self).update(known)
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.Dropout(0.5), nn.Tanh())
        self.layers(torch.zeros(1, 3, 6, 6))
        self.seen = 0

    def forward(self, image: Tensor) -> Tensor:
        self.seen += len(image)
        out: Tensor = self.layers(image)
        return out


# -------------------------------------------------------------------- the fit


def test_a_probe_of_digits_is_scikit_learns(tmp_path: Path) -> None:
    model, data = LinearProbe(10, tol=1e-13, folds=0), digits()
    trainer = fit(model, data, tmp_path)
    assert trainer.global_step == 1
    assert float(trainer.callback_metrics["train_converged"]) == 1.0
    assert 0 <= float(trainer.callback_metrics["train_gap"]) <= 1e-13
    (labelled,) = data.sweep_dataloader("labeled")
    theirs = Reference(C=400, fit_intercept=False, tol=1e-8, max_iter=10_000)
    theirs.fit(model.network.rows(labelled["image"].flatten(1)).numpy(), labelled["label"].numpy())
    np.testing.assert_allclose(model.network.weight.detach(), theirs.coef_, atol=1e-3)
    assert float(model.network.weight.detach().sum(1).abs().max()) < 1e-9

    (measured,) = trainer.test(model, datamodule=data, verbose=False)
    batches = list(data.test_dataloader())
    rows = model.network.rows(torch.cat([b["image"] for b in batches]).flatten(1)).numpy()
    label = torch.cat([b["label"] for b in batches]).numpy()
    assert measured["test_accuracy"] == pytest.approx(theirs.score(rows, label), abs=1e-6)
    assert {"test_ece", "test_precision", "test_recall", "test_f1", "test_recall/9"} <= measured.keys()
    found = model.predict_step(batches[0], 0)
    assert set(found) == {"probabilities", "label", "confidence", "index"}
    expected = theirs.predict_proba(rows[: len(found["label"])])
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-4)
    assert torch.equal(found["index"], batches[0]["index"])
    assert torch.equal(found["label"], found["probabilities"].argmax(1))


def test_brightness_and_contrast_of_an_image_change_no_prediction(tmp_path: Path) -> None:
    model, data = LinearProbe(10, folds=0), digits()
    fit(model, data, tmp_path)
    image = next(iter(data.test_dataloader()))["image"][:40]
    before = model.predict_step({"image": image}, 0)["probabilities"]
    after = model.predict_step({"image": 0.3 * image + 0.2}, 0)["probabilities"]
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    # Whether the rows are centred does not matter to the class, as W 1 = 0.
    assert torch.equal((image.flatten(1).double() @ model.network.weight.detach().T).argmax(1), before.argmax(1))


def test_nothing_but_the_data_decides_the_result(tmp_path: Path) -> None:
    found = []
    for seed, batch_size in ((0, 4), (1, 7)):
        torch.manual_seed(seed)
        model = LinearProbe(10, folds=0)
        fit(model, digits(seed=seed, batch_size=batch_size), tmp_path)
        found.append(model.network.weight.detach().clone())
    assert torch.equal(*found)
    again = LinearProbe(10, folds=0)
    again.network.resize(64)
    nn.init.normal_(again.network.weight)
    fit(again, digits(), tmp_path)
    assert torch.equal(again.network.weight.detach(), found[0])


def test_weights_and_origins_of_images_count(tmp_path: Path) -> None:
    items = points()
    weight = torch.tensor([1.0] * 6 + [2.0] * 6 + [0.0] * 6)
    origin = torch.tensor([0] * 6 + [1] * 6 + [2] * 6)
    weighted = LinearProbe(3, tol=1e-12)
    trainer = fit(weighted, Given(**items, weight=weight, origin=origin), tmp_path)
    assert trainer.global_step == 1  # though there are three batches, and nothing says so
    twice = torch.cat([torch.arange(12), torch.arange(6, 12)])
    repeated = LinearProbe(3, tol=1e-12)
    fit(repeated, Given(**{name: values[twice] for name, values in items.items()}), tmp_path, max_steps=-1)
    torch.testing.assert_close(weighted.network.weight, repeated.network.weight, atol=1e-5, rtol=0)
    assert weighted.held_out.sum(1).tolist() == [2, 2, 2]
    assert repeated.held_out.sum(1).tolist() == [6, 6, 6]
    without = LinearProbe(3, folds=0)
    fit(without, Given(**items), tmp_path)
    assert without.label_confusion() is None


def test_single_images_of_classes_cannot_be_left_out(tmp_path: Path) -> None:
    items = points(3)
    model = LinearProbe(3)
    trainer = fit(model, Given(**items), tmp_path)
    assert model.label_confusion() is None
    assert "train_held_out_accuracy" not in trainer.callback_metrics
    drawn = {name: torch.cat([values, values[:1]]) for name, values in items.items()}
    trainer = fit(model, Given(**drawn, origin=torch.tensor([0, 0, 0, 1])), tmp_path)
    counts = model.label_confusion()
    assert counts is not None
    # Its drawn copy stays.
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert float(trainer.callback_metrics["train_held_out_accuracy"]) == 1.0


def test_an_end_before_the_minimum_is_said(tmp_path: Path) -> None:
    model = LinearProbe(10, max_iter=3, folds=0)
    with pytest.warns(UserWarning, match=r"stopped at `max_iter` = 3 .* more than `tol` = 1e-06"):
        trainer = fit(model, digits(), tmp_path)
    assert float(trainer.callback_metrics["train_converged"]) == 0.0
    assert float(trainer.callback_metrics["train_iterations"]) == 3.0


# -------------------------------------------------------------------- encoders and their features


@pytest.mark.parametrize("known", [{}, {"num_features": 5}])
def test_an_encoder_is_asked_and_not_trained(known: dict[str, int], tmp_path: Path) -> None:
    encoder = Encoder(**known)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = LinearProbe(3, encoder)
    trainer = fit(model, squares(), tmp_path)
    assert [p.shape for group in trainer.optimizers[0].param_groups for p in group["params"]] == [(3, 5)]
    model.train()
    assert not encoder.layers.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    image = torch.from_numpy(PIXELS[:6]).permute(0, 3, 1, 2).float() / 255
    rows = encoder.layers.eval()(image).double()
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(image), (rows @ model.network.weight.T).float().detach())


def test_networks_of_timm_and_classifiers_are_encoders() -> None:
    image = torch.rand(2, 3, 32, 32)
    timm = TimmClassifier("resnet18", num_classes=0)
    timm.reset_parameters()
    assert timm(image).shape == (2, 512)
    assert LinearProbe(3, timm).network.embed(image).shape == (2, 512)
    toy = ToyNet(108, 3).eval()
    small = torch.rand(2, 3, 6, 6)
    assert torch.equal(LinearProbe(3, toy).network.embed(small), toy.embed(small))


def test_weights_of_encoders_come_from_files(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"image_size": 6, "patch_size": 3, "embed_dim": 8, "depth": 1, "num_heads": 2}
    trained = ViTEncoder(**sizes)
    state = {f"module.{k}": v for k, v in trained.state_dict().items() if not k.startswith("normalise.")}
    torch.save({"target_encoder": state}, tmp_path / "msn.pth.tar")
    model = LinearProbe(3, ViTEncoder(**sizes), encoder_from=str(tmp_path / "msn.pth.tar"))
    trainer = fit(model, squares(), tmp_path)
    image = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(model.network.embed(image), trained.eval()(image))
    # A checkpoint brings the encoder along.
    trainer.save_checkpoint(tmp_path / "probe.ckpt")
    (tmp_path / "msn.pth.tar").unlink()
    again = LinearProbe(3, ViTEncoder(**sizes), encoder_from=str(tmp_path / "msn.pth.tar"))
    tiny_trainer(tmp_path, max_epochs=-1, max_steps=1).fit(
        again, datamodule=squares(), ckpt_path=tmp_path / "probe.ckpt"
    )
    assert torch.equal(again(image), model(image))

    classifier = SSLClassifier(ToyNet(108, 3), Supervised(), 3)
    saved = tiny_trainer(tmp_path)
    saved.strategy.connect(classifier)
    saved.save_checkpoint(tmp_path / "classifier.ckpt")
    toy = ToyNet(108, 3)
    fit(LinearProbe(3, toy, encoder_from=str(tmp_path / "classifier.ckpt")), squares(), tmp_path)
    for name, value in toy.state_dict().items():
        assert torch.equal(value, classifier.network.state_dict()[name])


def test_features_are_kept_for_other_labels(tmp_path: Path) -> None:
    def fitted(labels_seed: int, cache: bool, seed: int = 0, **options: Any) -> tuple[LinearProbe, Encoder]:
        encoder = Encoder(seed)
        model = LinearProbe(3, encoder, feature_cache=str(tmp_path / "features") if cache else None)
        fit(model, squares(labels_seed, val_share=0.3, **options), tmp_path)
        return model, encoder

    _, first = fitted(0, cache=True)
    assert first.seen == 36 + 1  # and one image for the width of the features
    model, second = fitted(1, cache=True)
    assert second.seen == 1
    assert torch.equal(model.network.weight, fitted(1, cache=False)[0].network.weight)
    # Pseudo-labels need the encoder no more either; what is new does.
    data = squares(1)
    data.setup()
    (batch,) = data.label_dataloader()
    model.predict_step(batch, 0)
    assert second.seen == 1
    new = batch["image"].clone()
    new[3:5] = 0.5
    torch.testing.assert_close(model(new), model.network(new).float())
    assert second.seen == 1 + 2 + 36
    with pytest.raises(ValueError, match=r"`feature_cache` .*the encoder differs"):
        fitted(0, cache=True, seed=1)
    with pytest.raises(ValueError, match=r"the training images differs .*choose another folder"):
        fitted(0, cache=True, pixels=255 - PIXELS)


# -------------------------------------------------------------------- checkpoints and the command line


def config(folder: Path, **trainer: Any) -> Path:
    content = {
        "seed_everything": 0,
        "model": {"class_path": "LinearProbe"},
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {"labels_per_class": 3, "steps_per_epoch": 1, "eval_batch_size": 7},
        },
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "enable_progress_bar": False,
            **trainer,
        },
        "test_after_fit": True,
    }
    file = folder / "probe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_the_command_line_fits_and_goes_on(tmp_path: Path) -> None:
    file, last = str(config(tmp_path)), tmp_path / "run/checkpoints/last.ckpt"
    main(["fit", "--config", file])
    measured = json.loads((tmp_path / "run/metrics.json").read_text())
    assert measured["test_accuracy"] > 0.7
    before = torch.load(last, weights_only=True)
    assert before["global_step"] == 1
    assert not before["optimizer_states"][0]["state"]
    assert int(before["state_dict"]["held_out"].sum()) == 30
    main(["fit", "--config", file, "--ckpt_path", "last"])
    after = torch.load(last, weights_only=True)
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())
    model = LinearProbe.load_from_checkpoint(last)
    (again,) = tiny_trainer(tmp_path).test(model, datamodule=digits(), verbose=False)
    assert again["test_accuracy"] == measured["test_accuracy"]
    counts = model.label_confusion()
    assert counts is not None
    assert torch.equal(counts, before["state_dict"]["held_out"])


def test_weights_do_not_meet_other_preprocessing(tmp_path: Path) -> None:
    trainer = fit(LinearProbe(10, folds=0), digits(), tmp_path)
    trainer.save_checkpoint(tmp_path / "probe.ckpt")
    for model, match in (
        (LinearProbe(10, centre_rows=False), "centre_rows True -> False"),
        (LinearProbe(10, normalize_rows=False), "normalize_rows True -> False"),
        (LinearProbe(3), "`num_classes` = 3, got one with 10"),
    ):
        with pytest.raises(ValueError, match=match):
            model.on_load_checkpoint(torch.load(tmp_path / "probe.ckpt", weights_only=True))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    states = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        file = config(folder, devices=devices, **({"strategy": "ddp"} if devices > 1 else {}))
        done = lightning("fit", "--config", file, cwd=folder)
        assert done.returncode == 0, done.stderr
        states.append(torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"])
        states[-1] = {name: states[-1][name] for name in ("network.weight", "held_out")}
    assert torch.equal(states[0]["network.weight"], states[1]["network.weight"])
    assert torch.equal(states[0]["held_out"], states[1]["held_out"])


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"l2": 0.0}, "positive `l2`"),
        ({"tol": -1.0}, "positive `tol`"),
        ({"max_iter": 0}, "positive `max_iter`"),
        ({"folds": 1}, "`folds` >= 2, or 0"),
        ({"num_classes": 1}, "`num_classes` >= 2"),
        ({"feature_cache": "x"}, "`encoder` with `feature_cache`, got None and 'x'"),
        ({"encoder_from": "x"}, "`encoder` with `encoder_from`"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LinearProbe(**{"num_classes": 3} | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label": torch.arange(18) % 2}, r"every class, got none of cat; images of each class: \[9, 9, 0\]"),
        ({"weight": (torch.arange(18) % 3 != 1).float()}, r"none of bee; images of each class: \[6, 0, 6\]"),
        ({"label": torch.arange(18) % 4}, "`num_classes` = 3"),
        ({"label": torch.arange(18) % 3 - 1}, "labels from 0 to 2"),
        ({"weight": torch.linspace(-1, 1, 18)}, r"`weight` >= 0, got -1\.0"),
        ({"weight": torch.full((18,), torch.nan)}, "finite weights of labelled images"),
        ({"image": torch.full((18, 1, 3, 3), torch.inf)}, "finite features of labelled images"),
        ({"index": torch.arange(18) // 2}, "each of 18 labelled images once"),
    ],
)
def test_data_are_checked(changes: Items, match: str, tmp_path: Path) -> None:
    data = Given(**points() | {k: v for k, v in changes.items() if k != "index"})
    data.items |= changes
    with pytest.raises(ValueError, match=match):
        fit(LinearProbe(3), data, tmp_path)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 4 for the module and 3"):
        fit(LinearProbe(4), Given(**points()), tmp_path)
    with pytest.raises(TypeError, match="datamodule with sweep_dataloader for LinearProbe, got NoneType"):
        tiny_trainer(tmp_path).fit(LinearProbe(3), DataLoader([torch.zeros(1)]))  # type: ignore[arg-type]  # not looked at
    with pytest.raises(TypeError, match="label_dataloader, image_size and images_fingerprint for `feature_cache`"):
        fit(LinearProbe(3, Encoder(num_features=5), feature_cache=str(tmp_path)), Given(**points()), tmp_path)
    with pytest.raises(ValueError, match=r"features \[B, D\] of images .*got \[2, 3, 4, 4\] from Identity"):
        LinearProbe(3, nn.Identity()).network.embed(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images with 0 features, .* got 16; fit it first"):
        LinearProbe(3)(torch.rand(2, 1, 4, 4))
