"""The import contracts of pyproject.toml have eyes: each finds a violation that is planted in a copy of the
package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed")

REPOSITORY = Path(__file__).parents[1]
LAYERS = "imports run one way, and siblings do not import each other"
RAY = "only kr_ray.cluster imports ray"
CONFIG = "the config needs neither torch nor ray"
PRIVACY = "privacy figures are functions of scores: no network, no data set, no training"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "kr_ray", tmp_path / "kr_ray", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def lint(copy: Path) -> tuple[dict[str, str], str]:
    """KEPT or BROKEN by contract, and all that is said."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--no-logo", "--no-cache"],
        cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    found = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert found.keys() == {LAYERS, RAY, CONFIG, PRIVACY}, done.stdout + done.stderr
    assert done.returncode == ("BROKEN" in found.values())
    return found, done.stdout


def plant(copy: Path, module: str, line: str) -> None:
    """Write `line` into a new module below the package, or at the end of one that is there."""
    with (copy / "kr_ray" / f"{module.replace('.', '/')}.py").open("a") as file:
        file.write(f"\n{line}\n")


def test_the_package_as_it_is_keeps_all(copy: Path) -> None:
    assert set(lint(copy)[0].values()) == {"KEPT"}


@pytest.mark.parametrize(
    ("module", "line", "contracts", "told"),
    [
        pytest.param("runs.planted", "from kr_ray import pipeline", {LAYERS},
                     "kr_ray.runs.planted -> kr_ray.pipeline", id="upwards"),
        pytest.param("classifiers.planted", "import kr_ray.report", {LAYERS},
                     "kr_ray.classifiers.planted -> kr_ray.report", id="a sibling"),
        pytest.param("data.planted", "from kr_ray.synthesis import labelling", {LAYERS},
                     "kr_ray.data.planted -> kr_ray.synthesis", id="within a function's layer"),
        pytest.param("utils", "", {LAYERS}, "- kr_ray.utils", id="a module without a layer"),
        pytest.param("config.planted", "import torch", {CONFIG},
                     "kr_ray.config.planted -> torch", id="torch in the config"),
        pytest.param("doctor", "from kr_ray.runs import planted", {CONFIG},
                     "kr_ray.runs.planted -> torch", id="torch, by another module"),
        pytest.param("privacy.planted", "import torch", {PRIVACY},
                     "kr_ray.privacy.planted -> torch", id="torch in privacy"),
        pytest.param("privacy.planted", "from kr_ray.compute import devices", {LAYERS, PRIVACY},
                     "kr_ray.privacy.planted -> kr_ray.compute.devices", id="a network's home in privacy"),
    ],
)  # fmt: skip
def test_a_planted_import_is_found(
    copy: Path, module: str, line: str, contracts: set[str], told: str
) -> None:
    plant(copy, module, line)
    if "runs import planted" in line:
        plant(copy, "runs.planted", "import torch")
    found, said = lint(copy)
    assert {name for name, state in found.items() if state == "BROKEN"} == contracts
    assert told in said


def test_ray_is_found_wherever_else_it_is_imported(copy: Path) -> None:
    """In every package and module but kr_ray.cluster, so that none is missing in the contract's list."""
    names = sorted(path.stem for path in (copy / "kr_ray").iterdir() if path.suffix == ".py" or path.is_dir())
    elsewhere = [name for name in names if name not in ("cluster", "__init__", "__main__")]
    for name in elsewhere:
        folder = (copy / "kr_ray" / name).is_dir()
        plant(copy, f"{name}.planted" if folder else name, "import ray")
    found, said = lint(copy)
    assert found[RAY] == "BROKEN" and len(elsewhere) >= 26
    missed = [name for name in elsewhere if not re.search(rf"kr_ray\.{name}(\.planted)? -> ray\b", said)]
    assert not missed, said
