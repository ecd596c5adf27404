"""Which way imports point, and the habits that no linter of ours checks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "datamodules", "callbacks", "federated")
FILES = [p.relative_to(ROOT) for d in PACKAGES for p in (ROOT / d).rglob("*.py")]
# Files (beginning of the path) -> modules that they may not import. Every row that fits a file counts.
FORBIDDEN = {
    r"": r"(lightning|lightning_fabric|tests|benchmarks)(\.|$)",
    # An extra: who does not ask for it has neither the package nor Flower.
    r"(?!federated/|lightning_modules/cli\.py)": r"federated(\.|$)",
    r"(?!federated/)": r"(flwr|ray)(\.|$)",
    # What a client does, and what the command line reads, is there without Flower.
    r"federated/(?!(averaging|client_app|cohort|in_process|privacy|rounds|run|server_app|simulation|steps|strategy|wire)"
    r"\.py)": r"(flwr|ray)(\.|$)",
    r"lightning_modules/": r"(datamodules|callbacks)(\.|$)",
    r"datamodules/": r"(lightning_modules|callbacks|torchmetrics)(\.|$)",
    # Of the datamodules, callbacks know the files that one stage hands to the next, and how files are written.
    r"callbacks/": r"lightning_modules(\.|$)|datamodules(?!\.(atomic|pseudo_labels|synthetic_images)$)(\.|$)",
    r"lightning_modules/(networks|diffusion|ssl|metrics)/": r"pytorch_lightning(\.|$)|jsonargparse(\.|$)|"
    r"lightning_modules(?!\.(networks|diffusion|ssl|metrics)(\.|$))",
    r"lightning_modules/(networks|diffusion|ssl)/": r"torchmetrics(\.|$)",
    # What is run arrives in the command line as class_paths.
    r"lightning_modules/(cli|command_line|lightning_cli|pipeline|run_config|run_files|stages|stage_summary|__main__)"
    r"\.py": (
        r"lightning_modules\.(?!(checkpoints|cli|command_line|export|lightning_cli|pipeline|run_config|run_files|"
        r"stage_summary|stages)$)"
    ),
}


def _imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from lightning_modules import stages` is an import of lightning_modules.stages.
            own = module in PACKAGES
            yield from ([f"{module}.{alias.name}" for alias in node.names] if own else [module])


def offences(path: str, source: str) -> list[str]:
    """What is wrong with a source file, one word each: the module, name or rule it breaks."""
    tree = ast.parse(source)
    rules = [re.compile(modules) for files, modules in FORBIDDEN.items() if re.match(files, path)]
    found = [m for m in _imports(tree, Path(path).parent.parts) if any(rule.match(m) for rule in rules)]
    if path == "lightning_modules/cli.py":  # with the command, not with the program
        at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        found += [m for m in _imports(at_top, ()) if re.match(r"federated(\.|$)", m)]
    found += ["name"] if re.search(r"(^|/)(utils|helpers)(\.py|/)", path) else []
    found += ["file"] if len(source.splitlines()) > 400 else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append("assert")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [f"length of {node.name}"] if (node.end_lineno or 0) - node.lineno >= 60 else []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            found += re.findall(r"(?m)^ {4}\*{0,2}(\w+ \([^()]+\)):", ast.get_docstring(node) or "")
    return found


@pytest.mark.parametrize("path", sorted(FILES), ids=str)
def test_packages_keep_the_rules(path: Path) -> None:
    assert offences(path.as_posix(), (ROOT / path).read_text()) == []


def test_there_are_files_to_look_at() -> None:
    assert {path.parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("lightning_modules/base.py", "def f():\n    from datamodules.pairs import Pair", ["datamodules.pairs"]),
        ("lightning_modules/base.py", "from pytorch_lightning import Trainer", []),
        ("lightning_modules/base.py", "from lightning.pytorch import Trainer", ["lightning.pytorch"]),
        ("lightning_modules/base.py", "from .metrics import x\nfrom ..callbacks import y", ["callbacks.y"]),
        ("lightning_modules/networks/a.py", "import pytorch_lightning as pl", ["pytorch_lightning"]),
        ("lightning_modules/networks/a.py", "import torchmetrics, torch", ["torchmetrics"]),
        ("lightning_modules/networks/a.py", "from lightning_modules import base", ["lightning_modules.base"]),
        ("lightning_modules/metrics/a.py", "import torchmetrics", []),
        ("lightning_modules/cli.py", "from lightning_modules.base import B", ["lightning_modules.base"]),
        ("lightning_modules/lightning_cli.py", "from lightning_modules import stages", []),
        ("lightning_modules/lightning_cli.py", "def f():\n    import federated.command", ["federated.command"]),
        ("lightning_modules/cli.py", "def f():\n    from federated.command import run", []),
        ("lightning_modules/cli.py", "from federated.command import run", ["federated.command"]),
        ("datamodules/a.py", "import flwr.app", ["flwr.app"]),
        ("federated/client.py", "from flwr.app import Message", ["flwr.app"]),
        ("federated/client.py", "from lightning_modules.checkpoints import x\nfrom federated import roles", []),
        ("federated/wire.py", "from flwr.app import Message", []),
        ("datamodules/a.py", "import lightning_modules", ["lightning_modules"]),
        ("datamodules/a.py", "import lightning_fabric", ["lightning_fabric"]),
        ("callbacks/a.py", "from datamodules import ISIC2018DataModule", ["datamodules.ISIC2018DataModule"]),
        ("callbacks/a.py", "from datamodules.pseudo_labels import read", []),
        ("callbacks/a.py", "from datamodules.atomic import write_atomically", []),
        ("callbacks/utils.py", "", ["name"]),
        ("callbacks/a.py", "\n" * 401, ["file"]),
        ("callbacks/a.py", "def f():\n" + "    x = 1\n" * 59, []),
        ("callbacks/a.py", "def f():\n" + "    x = 1\n" * 60, ["length of f"]),
        ("callbacks/a.py", "assert 1", ["assert"]),
        (
            "callbacks/a.py",
            '"""D.\n\nArgs:\n    x (int): y.\n    z: f(x): fine.\n\nPH2 (2013): fine.\n"""',
            ["x (int)"],
        ),
    ],
)
def test_the_rules_can_be_broken(path: str, source: str, expected: list[str]) -> None:
    assert offences(path, source) == expected
