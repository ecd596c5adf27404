"""From a checkpoint of `lightning fit` to a folder for diffusers, and into the next fit."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import write
from torch import Tensor

from lightning_modules import ADMUNet, EDMProcess, HybridSegmentation, LEDMSegmentation, VPProcess, export_checkpoint
from lightning_modules.checkpoints import file_sha256
from lightning_modules.cli import main
from lightning_modules.hybrid_segmentation import Objective

LAST = Path("runs/a/checkpoints/last.ckpt")
NETWORK = "model.init_args.network"
IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch on generated lesions; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LOCAL_RANK", raising=False)
        patch.setenv("FEWLIGHT_STAGES_RAN", "")
        main(["fit", "--config", str(write(folder, "a", trainer__max_epochs=1))])
    return folder


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FEWLIGHT_STAGES_RAN", "")
    return tmp_path


def _network(**changes: Any) -> ADMUNet:
    """The network of the run, built by hand."""
    arguments: dict[str, Any] = {
        "image_size": 16,
        "base_channels": 8,
        "channel_mult": (1, 2),
        "layers_per_block": 1,
        "attention_resolutions": (8,),
        "head_channels": 8,
        "norm_groups": 4,
        "zero_init": False,
    }
    return ADMUNet(**arguments | changes)


def _module(checkpoint: Path, **changes: Any) -> HybridSegmentation:
    model = HybridSegmentation(_network(), num_classes=2, ema_decay=0.9, **changes)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return model


def _changed(source: Path, target: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a checkpoint with other settings and entries; None takes one out."""
    checkpoint = torch.load(source, weights_only=True)
    config = json.loads(checkpoint["config"]) | (settings or {})
    checkpoint["config"] = json.dumps({key: value for key, value in config.items() if value != "absent"})
    checkpoint |= changes
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, target)
    return target


def _maps(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = network.eval()(2 * IMAGE - 1, torch.tensor([0.0, 2.5]))
    return out


# ---------------------------------------------------------------- there


def test_the_command_writes_the_averaged_network(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt_path", str(trained / LAST), "--output_dir", "out/net"]) is None
    printed = capsys.readouterr().out
    model = _module(trained / LAST)
    count = sum(parameter.numel() for parameter in model.network.parameters())
    assert printed.startswith(
        f"out/net: {count:,} parameters, EMA weights of step 4, 3 channels in, 3 (image) + 2 (mask) out\n"
    )
    assert not torch.equal(_maps(model.ema_network), _maps(model.network))
    assert torch.equal(_maps(ADMUNet.from_pretrained("out/net")), _maps(model.ema_network))
    # What it printed is what loads it.
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[2:]), names)
    with torch.no_grad():
        assert torch.equal(names["unet"](2 * IMAGE - 1, torch.tensor([0.0, 2.5])).sample, _maps(model.ema_network))


def test_what_diffusers_has_no_place_for_stands_beside_it(trained: Path) -> None:
    about = export_checkpoint(trained / LAST, "net")
    assert json.loads(Path("net/fewlight.json").read_text()) == about
    manifest = json.loads((trained / "runs/a/manifest.json").read_text())
    assert about == about | {
        "weights": "EMA",
        "config_hash": manifest["config_hash"],
        "global_step": 4,
        "num_classes": 2,
        "class_names": ["background", "lesion"],
        "image_channels": 3,
        "outputs": {"image": 3, "mask": 2},
        "objective": "hybrid",
        "mask_loss": "mse",
        "process": {
            "class_path": "lightning_modules.VPProcess",
            "init_args": {"schedule": "linear", "num_steps": 1000, "clean_share": 0.0, "prediction": "x0"},
        },
        "clean_image": {"scale": 1.0, "timestep": 0.0},
    }


@pytest.mark.parametrize(
    ("process", "settings"),
    [
        (VPProcess("cosine", 50), {"class_path": "lightning_modules.VPProcess", "init_args.schedule": "cosine"}),
        (EDMProcess(0.4), {"class_path": "lightning_modules.EDMProcess", "init_args.sigma_data": 0.4}),
    ],
)
def test_a_segmentation_follows_from_the_folder_alone(
    trained: Path, process: VPProcess | EDMProcess, settings: dict[str, Any]
) -> None:
    placed = {f"model.init_args.process.{key}": value for key, value in settings.items()}
    file = _changed(trained / LAST, Path("other.ckpt"), {"model.init_args.process": "absent"} | placed)
    about = export_checkpoint(file, "net")
    network, clean = ADMUNet.from_pretrained("net"), about["clean_image"]
    with torch.no_grad():
        maps = network(clean["scale"] * (2 * IMAGE - 1), torch.tensor(clean["timestep"]))
    got = maps[:, about["outputs"]["image"] :].softmax(1)
    wanted = _module(trained / LAST, process=process, mask_loss="ce").segment(IMAGE)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert about["class_names"] == ["background", "lesion"]  # the checkpoint knows them, wherever it lies


def test_without_an_average_the_last_weights_are_taken(trained: Path) -> None:
    state = torch.load(trained / LAST, weights_only=True)["state_dict"]
    last = {name: value for name, value in state.items() if name.startswith("network.")}
    about = export_checkpoint(_changed(trained / LAST, Path("last.ckpt"), state_dict=last), "net")
    assert about["weights"] == "last"
    assert torch.equal(_maps(ADMUNet.from_pretrained("net")), _maps(_module(trained / LAST).network))


def test_networks_from_other_constructors_are_exported(trained: Path) -> None:
    export_checkpoint(trained / LAST, "net")
    given = {f"{NETWORK}.class_path": "lightning_modules.ADMUNet.from_pretrained", f"{NETWORK}.init_args.folder": "net"}
    export_checkpoint(_changed(trained / LAST, Path("b.ckpt"), given), "again")
    assert Path("again/diffusion_pytorch_model.safetensors").read_bytes() == (
        Path("net/diffusion_pytorch_model.safetensors").read_bytes()
    )
    small = ADMUNet.small(2)
    arguments = json.loads(torch.load(trained / LAST, weights_only=True)["config"])
    gone = {key: "absent" for key in arguments if key.startswith(f"{NETWORK}.init_args.")}
    named = {
        f"{NETWORK}.class_path": "lightning_modules.networks.ADMUNet.small",
        f"{NETWORK}.init_args.out_channels": 2,
    }
    state = {f"network.{name}": value for name, value in small.state_dict().items()}
    hyper = {"num_classes": 2, "objective": "supervised", "mask_loss": None}
    file = _changed(trained / LAST, Path("c.ckpt"), gone | named, state_dict=state, hyper_parameters=hyper)
    about = export_checkpoint(file, "small")
    assert (about["outputs"], about["mask_loss"]) == ({"image": 0, "mask": 2}, "ce")
    assert ADMUNet.from_pretrained("small").out_channels == 2


# ---------------------------------------------------------------- what is refused


def _python(trained: Path) -> Path:
    return _changed(trained / LAST, Path("x.ckpt"), config=None)


def _with(settings: dict[str, Any] | None = None, **changes: Any) -> Callable[[Path], Path]:
    return lambda trained: _changed(trained / LAST, Path("x.ckpt"), settings, **changes)


def _more_than_a_unet(trained: Path) -> Path:
    state = torch.load(trained / LAST, weights_only=True)["state_dict"]
    return _changed(trained / LAST, Path("x.ckpt"), state_dict=state | {"classifiers.0": torch.zeros(1)})


def _half(trained: Path) -> Path:
    Path("x.ckpt").write_bytes((trained / LAST).read_bytes()[:5000])
    return Path("x.ckpt")


SMP = {f"{NETWORK}.class_path": "segmentation_models_pytorch.Unet"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_python, r"`ckpt_path` to carry the configuration .*call model.ema_network.save_pretrained\(folder, about=\{"),
        (_with(config="[]"), "to carry the configuration of its network"),
        (_with(config="{"), "to carry the configuration of its network"),
        (_with(SMP), "to hold an ADMUNet, .* the network of x.ckpt is segmentation_models_pytorch.Unet"),
        (_with({f"{NETWORK}.class_path": "os.system"}), "the network of x.ckpt is os.system; use the checkpoint"),
        (_with({f"{NETWORK}.init_args.width": 3}), "do not fit: .*unexpected keyword argument 'width'; export it with"),
        (
            _with({f"{NETWORK}.init_args.base_channels": 16}),
            r"`ckpt_path` x.ckpt to hold the weights .* tensors differ",
        ),
        (_with({f"{NETWORK}.init_args.norm_groups": 3}), "`norm_groups` to divide every width"),
        (_with(hyper_parameters={}), "`ckpt_path` to hold a HybridSegmentation, but x.ckpt is of .*HybridSegmentation"),
        (_more_than_a_unet, "HybridSegmentation with classifiers.0, more or other than a UNet; export the checkpoint"),
        (_half, "x.ckpt cannot be read as one: .*written completely"),
        (lambda _: Path("gone.ckpt"), "`ckpt_path` to be a checkpoint file, but there is none at gone.ckpt"),
        (lambda trained: trained, "`ckpt_path` to be a checkpoint file, but there is none at"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    trained: Path, make: Callable[[Path], Path], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make(trained)
    with pytest.raises(SystemExit) as ended:
        main(["export", "--ckpt_path", str(file), "--output_dir", "net"])
    assert ended.value.code == 1
    assert re.match(f"error: Expected .*{match}.*\n$", capsys.readouterr().err)
    assert not Path("net").exists()


def test_an_exported_folder_is_replaced_only_when_asked_to(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--ckpt_path", str(trained / LAST), "--output_dir", "net"]
    main(words)
    weights = Path("net/diffusion_pytorch_model.safetensors")
    weights.write_bytes(b"old")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--overwrite", "false"])
    assert ended.value.code == 1
    assert "`output_dir` to be new or empty" in capsys.readouterr().err
    assert weights.read_bytes() == b"old"
    main([*words, "--overwrite=true"])
    assert ADMUNet.from_pretrained("net").out_channels == 5


@pytest.mark.parametrize(
    "words", [[], ["--ckpt_path", "x.ckpt"], ["--ckpt_path", "x", "--output_dir", "y", "--overwrite", "perhaps"]]
)
def test_a_command_line_that_cannot_be_parsed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: lightning export")


def test_help_names_export_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lightning_modules.cli import main\n"
        "main(['--help'])\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'jsonargparse', 'diffusers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "{fit,validate,test,predict,export,federate}" in done.stdout
    assert "  lightning export   --ckpt_path FILE --output_dir FOLDER" in done.stdout
    assert done.stdout.endswith("\n0\n[]\n")


# ---------------------------------------------------------------- and back


def test_a_fit_starts_from_an_exported_folder_as_from_its_checkpoint(trained: Path) -> None:
    export_checkpoint(trained / LAST, "net")
    ends = []
    for start in (trained / LAST, Path("net")):
        config = write(Path(), "b", trainer__max_steps=1, trainer__max_epochs=1)
        cli = main(["fit", "--config", str(config), "--model.init_args.init_from", str(start)])
        assert cli is not None
        ends.append(cli.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    inputs = json.loads(Path("runs/b/manifest.json").read_text())["inputs"]
    weights = Path("net/diffusion_pytorch_model.safetensors")
    assert inputs == {str(weights): file_sha256(weights)}


def test_other_classes_keep_the_image_head_of_a_folder(trained: Path) -> None:
    export_checkpoint(trained / LAST, "net")
    source = ADMUNet.from_pretrained("net").state_dict()
    objectives: list[tuple[int, int, Objective, int]] = [
        (7, 4, "hybrid", 3),
        (5, 2, "hybrid", 5),
        (5, 5, "supervised", 0),  # as many outputs as in the folder, but all of them the mask's
    ]
    for outputs, classes, objective, kept in objectives:
        model = HybridSegmentation(_network(out_channels=outputs), classes, objective)
        model.load_network("net")
        own = model.network.state_dict()
        assert torch.equal(own["unet.conv_in.weight"], source["unet.conv_in.weight"])
        same = (own["unet.conv_out.weight"][:5] == source["unet.conv_out.weight"]).flatten(1).all(1)
        assert int(same.sum()) == kept


def test_pixel_classifiers_take_their_backbone_from_a_folder_and_are_no_unet_themselves(trained: Path) -> None:
    export_checkpoint(trained / LAST, "net")
    ledm = LEDMSegmentation(_network(), num_classes=4, blocks=(0, 2))
    ledm.load_backbone("net")
    source, own = ADMUNet.from_pretrained("net").state_dict(), ledm.backbone.state_dict()
    trunk = [name for name in source if "conv_out" not in name]
    assert trunk
    assert all(torch.equal(own[name], source[name]) for name in trunk)
    file = _changed(trained / LAST, Path("ledm.ckpt"), state_dict=ledm.state_dict())
    with pytest.raises(
        ValueError, match=r"with backbone\..*, more or other than a UNet; export the checkpoint that its"
    ):
        export_checkpoint(file, "ledm")
