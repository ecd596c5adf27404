import hashlib
from pathlib import Path

import pytest
import torch
from tiny_nets import PointNet, Segmenter, tiny_unet

from lightning_modules.checkpoints import (
    file_sha256,
    head_name,
    load_checkpoint,
    load_trunk_and_head,
    network_weights,
)


def test_a_file_that_runs_code_when_unpickled_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]  # as an attacker would

    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"Expected `init_from` .*evil.ckpt cannot be read as one"):
        load_checkpoint(tmp_path / "evil.ckpt", "init_from")
    assert not (tmp_path / "ran").exists()


def test_truncated_foreign_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"network.a": torch.zeros(1000)}}, whole)
    assert load_checkpoint(whole, "x")["state_dict"]["network.a"].shape == (1000,)
    (tmp_path / "half.ckpt").write_bytes(whole.read_bytes()[:800])
    with pytest.raises(ValueError, match=r"half.ckpt cannot be read as one: .*written completely"):
        load_checkpoint(tmp_path / "half.ckpt", "x")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="with a `state_dict`, got Tensor without one"):
        load_checkpoint(tmp_path / "tensor.ckpt", "x")
    with pytest.raises(FileNotFoundError, match=r"`x` to be a checkpoint file, but there is none at .*gone.ckpt"):
        load_checkpoint(tmp_path / "gone.ckpt", "x")


def test_an_exported_folder_is_read_like_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    network, meant = tiny_unet(), {"num_classes": 2, "objective": "supervised"}
    for name, about in (
        ("averaged", {"weights": "EMA", **meant}),
        ("last", {"weights": "last"}),
        ("bare", None),
    ):
        network.save_pretrained(tmp_path / name, about=about)
        checkpoint = load_checkpoint(tmp_path / name, "init_from")
        weights, kind = network_weights(checkpoint, tmp_path / name, "init_from")
        assert kind == ("EMA" if name == "averaged" else "last")
        assert weights.keys() == network.state_dict().keys()
        assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
        assert checkpoint["hyper_parameters"] == (meant if name == "averaged" else {})
    # What a run goes on from holds more than a network.
    with pytest.raises(FileNotFoundError, match=r"`ckpt_path` to be a checkpoint file, but .* none at .*averaged"):
        load_checkpoint(tmp_path / "averaged", "ckpt_path")


def test_folders_that_hold_no_exported_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`init_from` to hold config.json, but there is none in .*; give the fol"
    ):
        load_checkpoint(tmp_path, "init_from")
    tiny_unet().save_pretrained(tmp_path / "net")
    weights = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"`init_from` to hold a complete .*safetensors, but .* cannot be read: "):
        load_checkpoint(tmp_path / "net", "init_from")
    (tmp_path / "net" / "config.json").write_text('{"_class_name": "UNet2DModel", "block_out_channels": [32, 64]}')
    with pytest.raises(ValueError, match=r"`sample_size` in .*config.json to be a positive integer, got None"):
        load_checkpoint(tmp_path / "net", "init_from")


def test_averaged_weights_are_preferred() -> None:
    state = {"network.a": torch.zeros(1), "ema.module.a": torch.ones(1), "ema.n_averaged": torch.tensor(3)}
    weights, kind = network_weights({"state_dict": state}, "file", "x")
    assert (kind, weights) == ("EMA", {"a": torch.ones(1)})
    weights, kind = network_weights({"state_dict": {"network.a": torch.zeros(1)}}, "file", "x")
    assert (kind, weights) == ("last", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"named network.\* or ema.module.\*, but file has only \['backbone.a'\]"):
        network_weights({"state_dict": {"backbone.a": torch.zeros(1)}}, "file", "x")


def test_the_last_layer_is_found() -> None:
    assert head_name(tiny_unet()) == "unet.conv_out"
    assert head_name(Segmenter()) == "segmentation_head"
    assert head_name(PointNet(1, 2)) == "head"
    with pytest.raises(TypeError, match=r"`network` whose last layer is its attribute `head`.* got Linear"):
        head_name(torch.nn.Linear(2, 2))


def test_another_trunk_is_refused_with_names_and_shapes_and_changes_nothing() -> None:
    network = Segmenter()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    weights = {f"encoder.{name}": value for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"tensors of file differ: .*absent -> .*; give `network` the arguments"):
        load_trunk_and_head(network, weights, "segmentation_head", 0, True, "file")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"fewlight" * 10_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"fewlight" * 10_000).hexdigest()
