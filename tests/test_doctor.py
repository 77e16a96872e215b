"""The doctor: quick, without torch, and right about machines that were made to be sick."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from kr_ray import doctor
from kr_ray.data import public_sets
from kr_ray.doctor import examine


def row(rows: list[doctor.Row], what: str) -> tuple[str, str]:
    """State and finding of the only row about `what`."""
    ((state, _, found),) = [each for each in rows if each[1] == what]
    return state, found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that plays site-packages: `add` puts packages there, and the doctor sees no others."""

    class Finder:
        @staticmethod
        def find(name: str) -> metadata.Distribution:
            return next(iter(metadata.distributions(name=name, path=[str(tmp_path)])), None) or missing(name)

    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", Finder.find)
    return tmp_path


def add(
    folder: Path,
    name: str,
    version: str,
    requires: tuple[str, ...] = (),
    build: str = "",
    python: str = ">=3.11",
) -> None:
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    (information / "METADATA").write_text(
        "\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n"
    )
    (information / "RECORD").write_text("")
    (folder / name).mkdir()
    (folder / name / "version.py").write_text(
        "from typing import Optional\n__version__ = "
        f"'{version}{build}'\ndebug = False\ncuda: Optional[str] = None\n"
    )


def test_this_environment_is_sound(tmp_path: Path) -> None:
    rows = examine(tmp_path)
    packages = [name for name in ("python", "kr_ray", "ray", "torch", "torchvision", "torch + torchvision")]
    assert [row(rows, name)[0] for name in packages] == ["ok"] * len(packages)
    assert row(rows, "ray")[1] == metadata.version("ray")
    assert {state for state, _, _ in rows} <= {"ok", "note", "FAIL"}
    assert "ruff" not in {what for _, what, _ in rows}  # extras are not required


def test_it_imports_neither_torch_nor_ray_and_is_quick() -> None:
    """Processor time, which does not depend on what else the machine does."""
    program = (
        "import json, sys, time; from pathlib import Path; from kr_ray.doctor import examine; "
        "examine(Path('data'));print(json.dumps([time.process_time(), [m for m in ('torch', 'ray', "
        "'numpy') if m in sys.modules]]))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, imported = json.loads(answer.stdout)
    assert imported == []
    assert seconds < 1.5


# --- packages -----------------------------------------------------------------------------------------------


def test_missing_and_old_packages_fail_with_a_remedy(installed: Path) -> None:
    add(
        installed,
        "kr_ray",
        "0.1",
        ("torch>=2.11", "ray[tune,train]>=2.50", "onnx>=1.17", "ruff>=1; extra == 'dev'"),
    )
    add(installed, "torch", "2.10.0")
    add(installed, "onnx", "1.17.0")
    rows = doctor._packages()
    assert row(rows, "torch") == ("FAIL", "2.10.0; pip install 'torch>=2.11'")
    assert row(rows, "ray") == ("FAIL", "missing; pip install 'ray[train,tune]>=2.50'")
    assert row(rows, "onnx") == ("ok", "1.17.0")
    assert "ruff" not in {what for _, what, _ in rows}


def test_python_and_kr_ray_themselves(installed: Path) -> None:
    ((state, what, found),) = doctor._packages()
    assert (state, what) == ("FAIL", "kr_ray") and "pip install -e ." in found
    add(installed, "kr_ray", "0.1", python=">=4")
    state, found = row(doctor._packages(), "python")
    assert state == "FAIL" and "needs >=4" in found


PAIRS = [
    # As in the published metadata: torchvision 0.26 pins its torch, 0.29 asks for a minimum.
    ("2.11.0", "+cpu", "0.26.0", "+cpu", "torch==2.11.0", "ok", "both for cpu"),
    ("2.11.0+cpu", "", "0.26.0+cpu", "", "torch==2.11.0", "ok", "both for cpu"),
    ("2.11.0", "", "0.26.0", "", "torch==2.11.0", "ok", "a matching pair"),
    ("2.12.0", "", "0.26.0", "", "torch==2.11.0", "FAIL",
     "needs 'torch==2.11.0', but torch is 2.12.0; reinstall both"),
    ("2.15.0", "+cpu", "0.29.2", "+cu132", "torch>=2.14.0", "FAIL",
     "different builds: torch 2.15.0+cpu and torchvision 0.29.2+cu132"),
    ("2.15.0", "+cu132", "0.29.2", "+cu132", "torch>=2.14.0", "ok", "both for cu132"),
    # Built from source: commits, of two repositories.
    ("2.12.0a0", "+34c6371d24", "0.27.0a0", "+428a54c9", "torch", "ok", "a matching pair"),
]  # fmt: skip


@pytest.mark.parametrize(("torch", "torch_build", "vision", "vision_build", "needs", "state", "found"), PAIRS)
def test_torch_and_torchvision_must_match(
    installed: Path,
    torch: str,
    torch_build: str,
    vision: str,
    vision_build: str,
    needs: str,
    state: str,
    found: str,
) -> None:
    add(installed, "torch", torch, build=torch_build)
    add(installed, "torchvision", vision, ("numpy", needs), build=vision_build)
    ((got, what, text),) = doctor._torch_pair()
    assert (got, what) == (state, "torch + torchvision")
    assert found in text


# --- machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program to be filled in, the only one on the PATH."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def test_gpus(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'A100, 40960 MiB, 570.1'\necho 'A100, 40960 MiB, 570.1'\n")
    monkeypatch.setattr(doctor, "_build", lambda package, variable="__version__": "13.0")
    assert doctor._gpus() == [("ok", f"GPU {k}", "A100, 40960 MiB, 570.1") for k in (0, 1)]
    monkeypatch.setattr(doctor, "_build", lambda package, variable="__version__": "None")
    state, _, found = doctor._gpus()[-1]
    assert state == "note" and "without CUDA" in found


def test_gpus_that_do_not_answer(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    ((state, _, found),) = doctor._gpus()
    assert state == "note" and "does not answer" in found
    monkeypatch.setattr(doctor, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    nvidia_smi.write_text(f"#!/bin/sh\nexec {shutil.which('sleep', path='/bin:/usr/bin')} 30\n")
    started = time.monotonic()
    assert doctor._gpus()[0][0] == "note"
    assert time.monotonic() - started < 5
    nvidia_smi.unlink()
    assert doctor._gpus()[0][0] == "ok"


@pytest.mark.parametrize(("free_gb", "state"), [(0.9, "FAIL"), (9.9, "note"), (10.1, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, free_gb: float, state: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, free_gb * 1e9))
    assert doctor._disk(Path())[:2] == (state, "disk")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="reads /proc")
def test_cpu_and_memory_agree_with_the_system() -> None:
    assert doctor._cpu()[2].startswith(f"{len(os.sched_getaffinity(0))} cores")
    torch = pytest.importorskip("torch")
    supported = torch.cpu._is_amx_tile_supported()
    assert ("bf16 by" in doctor._cpu()[2]) == supported
    assert "GB" in doctor._memory()[2]


# --- Ray ----------------------------------------------------------------------------------------------------


def test_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor._ray_address() == ("ok", "Ray", "starts its own (RAY_ADDRESS is not set)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert doctor._ray_address() == ("ok", "Ray", f"RAY_ADDRESS={address} answers")
    state, _, found = doctor._ray_address()  # the server is gone
    assert state == "FAIL" and "does not answer" in found and "unset RAY_ADDRESS" in found
    for address, state in (
        ("local", "ok"),
        ("auto", "note"),
        ("http://head:8265", "note"),
        ("head", "FAIL"),
        ("head:x", "FAIL"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert doctor._ray_address()[0] == state, address


# --- data ---------------------------------------------------------------------------------------------------


def test_file_names_are_those_of_the_libraries() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

    assert sorted(doctor.MEDMNIST) == sorted(public_sets.medmnist_names())
    assert sorted(doctor.FASHION_FILES) == sorted(name for name, _ in FashionMNIST.resources)
    assert doctor.CIFAR_FILES.keys() == public_sets.CIFAR_CLASSES.keys()
    for name, library_set in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        folder, files = doctor.CIFAR_FILES[name]
        assert folder == library_set.base_folder
        listed = [file for file, _ in library_set.train_list + library_set.test_list]
        assert sorted(files) == sorted([*listed, library_set.meta["filename"]])


def test_data_sets_are_found_where_they_are_read(tmp_path: Path) -> None:
    assert doctor._data_sets(tmp_path / "none")[0] == "note"
    files = ["medmnist/bloodmnist.npz", "medmnist/chestmnist.npz", "cifar100/cifar-100-python/train"]
    files += [f"FashionMNIST/raw/{name}" for name in doctor.FASHION_FILES]
    files += [f"cifar-10-batches-py/{name}" for name in doctor.CIFAR_FILES["cifar10"][1]]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    state, _, found = doctor._data_sets(tmp_path)
    assert state == "ok"
    assert found.endswith(
        ": bloodmnist, fashionmnist, cifar10"
    )  # neither a multi-label nor an incomplete set
