"""ADMUNet to a folder and back, and what is no such folder."""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.networks import ADMUNet, pretrained

WEIGHTS, CONFIG, ABOUT = "diffusion_pytorch_model.safetensors", "config.json", "fewlight.json"

TINY: dict[str, Any] = {
    "out_channels": 5,
    "image_size": 16,
    "base_channels": 8,
    "channel_mult": (1, 2, 3),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "head_channels": 8,
    "dropout": 0.1,
    "norm_groups": 4,
    "zero_init": False,
}
X = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.0, 2.5, 917.3])  # fractions are kept only if they are passed as a float tensor


def tiny(seed: int = 0, **changes: Any) -> ADMUNet:
    torch.manual_seed(seed)
    return ADMUNet(**TINY | changes).eval()


def maps(network: ADMUNet) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(X.to(next(network.parameters()).dtype), T)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported network with other numbers than `tiny()`."""
    tiny(seed=9).save_pretrained(tmp_path / "net", about={"num_classes": 2})
    return tmp_path / "net"


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def _entries(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"out_channels": 2, "attention_resolutions": (), "dropout": 0.0},
        {"channel_mult": (2, 3), "layers_per_block": 2, "attention_resolutions": (16, 8)},
        {"in_channels": 3, "channel_mult": (2,), "attention_resolutions": ()},
    ],
)
def test_round_trip_is_bit_equal(changes: dict[str, Any], tmp_path: Path) -> None:
    network = tiny(**changes)
    network.save_pretrained(str(tmp_path / "net"))
    before = torch.get_rng_state()
    back = ADMUNet.from_pretrained(str(tmp_path / "net"))
    assert torch.equal(torch.get_rng_state(), before)
    own, theirs = network.state_dict(), back.state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert torch.equal(maps(back), maps(network))
    assert not back.training
    for name in ("in_channels", "out_channels", "downsample_factor"):
        assert getattr(back, name) == getattr(network, name)
    first, second = (dict(net.unet.config) for net in (network, back))
    assert {k: v for k, v in first.items() if k[0] != "_"} == {k: v for k, v in second.items() if k[0] != "_"}


def test_what_was_loaded_trains_and_does_not_hang_on_the_file(folder: Path) -> None:
    network = ADMUNet.from_pretrained(folder).train()
    (folder / WEIGHTS).write_bytes(b"")
    network(X, T).square().mean().backward()
    assert all(parameter.grad is not None and parameter.device.type == "cpu" for parameter in network.parameters())


def test_a_replaced_head_and_other_memory_layouts_and_precisions_come_back(tmp_path: Path) -> None:
    network = tiny().to(memory_format=torch.channels_last).double()
    network.reset_head(7, keep_first=3)
    network.save_pretrained(tmp_path / "net")
    back = ADMUNet.from_pretrained(tmp_path / "net")
    assert back.out_channels == 7
    assert next(back.parameters()).dtype == torch.float64
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in network.state_dict().items())


def test_small_comes_back(tmp_path: Path) -> None:
    ADMUNet.small(out_channels=4).save_pretrained(tmp_path / "net")
    back = ADMUNet.from_pretrained(tmp_path / "net")
    # One output channel less than its docstring counts with.
    assert sum(parameter.numel() for parameter in back.parameters()) == 847_349 - (9 * 16 + 1)


ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"lightning_modules", "datamodules", "callbacks", "pytorch_lightning"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder, given, result = sys.argv[1:]
unet, info = UNet2DModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
given = load_file(given)
with torch.no_grad():
    out = unet(given["x"], given["t"]).sample
save_file({"out": out, **{f"weight.{name}": value for name, value in unet.state_dict().items()}}, result)
assert not any(info.values()), info
try:
    import lightning_modules
except ImportError:
    print("alone")
"""


def test_diffusers_alone_loads_the_folder_bit_equal(tmp_path: Path) -> None:
    network = tiny()
    network.save_pretrained(tmp_path / "net", about={"num_classes": 2})
    save_file({"x": X, "t": T}, tmp_path / "in.safetensors")
    # Isolated, and elsewhere: neither the working directory nor PYTHONPATH leads to this package.
    command = [sys.executable, "-I", "-c", ALONE, *(str(tmp_path / name) for name in ("net", "in.safetensors", "out"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "alone\n", done.stderr
    assert "fewlight" not in done.stderr
    got = load_file(tmp_path / "out")
    assert torch.equal(got.pop("out"), maps(network))
    expected = network.unet.state_dict()
    assert len(got) == len(expected)
    assert all(torch.equal(got[f"weight.{name}"], value) for name, value in expected.items())


def test_a_folder_that_diffusers_wrote_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(3)
    unet = UNet2DModel(
        sample_size=16,
        out_channels=5,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
        norm_num_groups=4,
        attn_norm_num_groups=4,
    ).eval()
    unet.save_pretrained(tmp_path)
    _edit(tmp_path / CONFIG, add_attention="absent", invented_later=None)  # as another version may write it
    with torch.no_grad():
        assert torch.equal(maps(ADMUNet.from_pretrained(tmp_path)), unet(X, T).sample)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]},
            r"down_block_types is \['DownBlock2D', .*, ADM's \['ResnetDownsampleBlock2D', 'AttnDownBlock2D', ",
        ),
        (
            {"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]},
            "hold an ADM UNet, but in .*config.json up_block_types is",
        ),
        ({"downsample_type": "conv"}, "downsample_type is conv, ADM's resnet; load such a network with diffusers"),
        ({"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift is default, ADM's scale_shift"),
        ({"flip_sin_to_cos": False, "freq_shift": 1}, "flip_sin_to_cos is False, ADM's True; freq_shift is 1, ADM's 0"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups is None, ADM's 4"),
        ({"attn_norm_num_groups": "absent"}, "attn_norm_num_groups is None, ADM's 4"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10, ADM's None"),
        ({"class_embed_type": "timestep"}, "class_embed_type is timestep, ADM's None"),
        ({"act_fn": "gelu"}, "act_fn is gelu, ADM's silu"),
        pytest.param(
            {"mid_block_type": None},
            "mid_block_type is None, ADM's UNetMidBlock2D",
            marks=pytest.mark.skipif(
                "mid_block_type" not in inspect.signature(UNet2DModel).parameters, reason="an option of later versions"
            ),
        ),
        ({"rotary": True}, "rotary is True, which this diffusers does not know"),
        ({"_class_name": "UNet2DConditionModel"}, "to hold a UNet2DModel, but .*config.json describes UNet2DCond"),
        ({"attention_head_dim": None}, r"`attention_head_dim` in .* to be a positive integer, got None"),
        ({"sample_size": [16, 16]}, r"`sample_size` in .* to be a positive integer, got \[16, 16\]"),
        ({"sample_size": 18}, "`image_size` divisible by 4 for 3 levels, got 18"),
        ({"block_out_channels": "8, 16"}, "`block_out_channels` in .* to be positive integers, one a level"),
        ({"block_out_channels": [8, 16]}, "`down_block_types` in .* to be 2 names, one a level"),
        ({"dropout": 1.5}, r"`dropout` in .* to be a number in \[0, 1\), got 1.5"),
        ({"out_channels": 6}, r"`folder` .* but 2 tensors differ, the first unet.conv_out.bias: \[6\] there, \[5\]"),
        ({"layers_per_block": 2}, r"tensors differ, the first unet.down_blocks.* there, absent among the weights"),
    ],
)
def test_another_config_is_refused(folder: Path, changes: dict[str, Any], match: str) -> None:
    _edit(folder / CONFIG, **changes)
    with pytest.raises(ValueError, match=match):
        ADMUNet.from_pretrained(folder)


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def _only_pickle(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (folder.parent / "ran",))

    (folder / WEIGHTS).unlink()
    torch.save(Evil(), folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (_truncate, ValueError, "to hold a complete diffusion_pytorch_model.safetensors, .*cannot be read"),
        (
            _only_pickle,
            FileNotFoundError,
            r"in one .*safetensors, but .* has diffusion_pytorch_model.bin; pickles .*are",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b"<html>"), ValueError, "cannot be read"),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "has none; pickles"),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "`folder` to hold config.json, but there is none in"),
        (lambda f: (f / CONFIG).write_text("{"), ValueError, r"a JSON object, but .*config.json is none \(Expecting"),
        (lambda f: (f / CONFIG).write_text("[]"), ValueError, r"config.json is none \(it holds a list\)"),
        (
            lambda f: f.rename(f.parent / "x"),
            FileNotFoundError,
            r"`folder` to be a folder with config.json .*looked in",
        ),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], match: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=match):
        ADMUNet.from_pretrained(folder)
    assert not (folder.parent / "ran").exists()


def test_what_stands_beside_the_network_is_read_and_checked(folder: Path) -> None:
    assert pretrained.read_about(folder) == {"num_classes": 2}
    (folder / ABOUT).write_text('{"num_classes": "two"}')
    with pytest.raises(ValueError, match=r"`num_classes` in .*fewlight.json to be a positive integer, got 'two'"):
        pretrained.read_about(folder)
    (folder / ABOUT).unlink()
    assert pretrained.read_about(folder) == {}


# ---------------------------------------------------------------- whole or not at all


def test_a_folder_in_use_is_replaced_only_when_asked_to(folder: Path) -> None:
    before, network = _entries(folder), tiny()
    with pytest.raises(
        FileExistsError, match=r"`folder` to be new or empty, but .*net holds config.json, .*`overwrite`"
    ):
        network.save_pretrained(folder)
    assert _entries(folder) == before
    network.save_pretrained(folder, overwrite=True)
    assert torch.equal(maps(ADMUNet.from_pretrained(folder)), maps(network))
    assert not (folder / ABOUT).exists()  # nothing of the previous network is mixed in
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_a_folder_with_other_files_and_a_file_are_never_replaced(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"nothing but an exported network .* holds thesis.tex; choose another"):
        tiny().save_pretrained(folder, overwrite=True)
    with pytest.raises(FileExistsError, match=r"`folder` to be a folder, but .*thesis.tex is a file"):
        tiny().save_pretrained(folder / "thesis.tex", overwrite=True)
    with pytest.raises(OSError, match=r"Could not write `folder` .*Not a directory"):
        tiny().save_pretrained(folder / "thesis.tex" / "net")
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_empty_folders_links_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("link", "a/b/c"):
        tiny().save_pretrained(tmp_path / name)
        assert torch.equal(maps(ADMUNet.from_pretrained(tmp_path / name)), maps(tiny()))
    assert (tmp_path / "link").is_symlink()
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    def half(_: object, file: Path, **__: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(pretrained, "save_file", half)
    before = _entries(folder.parent)
    with pytest.raises(type(error), match="No space left.*before still is" if isinstance(error, OSError) else None):
        tiny().save_pretrained(folder if existing else folder.parent / "new", overwrite=True)
    assert _entries(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_a_failed_exchange_brings_the_previous_network_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, before = Path.rename, _entries(folder)

    def fail_for_new(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="Input/output error"):
        tiny().save_pretrained(folder, overwrite=True)
    assert _entries(folder.parent) == {f"net/{name}": content for name, content in before.items()}


def test_a_kill_while_writing_leaves_the_previous_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _entries(folder)
    monkeypatch.setattr(pretrained, "save_file", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    network = tiny()
    child = os.fork()
    if child == 0:
        network.save_pretrained(folder, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert _entries(folder) == before
    monkeypatch.undo()
    network.save_pretrained(folder, overwrite=True)  # what the killed one left does not stand in the way
    assert torch.equal(maps(ADMUNet.from_pretrained(folder)), maps(network))
