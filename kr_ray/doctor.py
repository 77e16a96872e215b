"""`kr doctor`: is this machine fit for a run? Looks without importing torch or ray, so that it answers at
once and answers even where they are broken."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kr_ray.masking import masked

Row = tuple[Literal["ok", "note", "FAIL"], str, str]
"""State, what was looked at, what was found (with the remedy where something is wrong)."""

GB = 1e9
FREE_DISK_NOTE_GB, FREE_DISK_FAIL_GB = 10, 1
FREE_MEMORY_NOTE_GB = 3
"""Ray, a driver and one small worker."""
CONNECT_TIMEOUT_S, NVIDIA_SMI_TIMEOUT_S = 1.0, 2.0
BF16_FLAGS = ("amx_bf16",)

MEDMNIST = (
    "bloodmnist", "breastmnist", "dermamnist", "octmnist", "organamnist", "organcmnist", "organsmnist",
    "pathmnist",
    "pneumoniamnist", "retinamnist", "tissuemnist",
)  # fmt: skip
FASHION_FILES = tuple(
    f"{split}-{part}-ubyte.gz" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
)
CIFAR_FILES = {
    "cifar10": (
        "cifar-10-batches-py",
        (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"),
    ),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
}


def examine(data_root: Path) -> list[Row]:
    """Look at versions, devices, memory, disk, Ray's address and data sets.

    Args:
        data_root: where data sets are looked for (`data.root` of a config).

    Returns:
        Rows in the order to print. FAIL: a run cannot work here. note: it can, but look at this.
    """
    return [
        *_packages(),
        *_gpus(),
        _cpu(),
        _memory(),
        _disk(Path.cwd()),
        _ray_address(),
        _data_sets(data_root),
    ]


# --- packages -----------------------------------------------------------------------------------------------


def _packages() -> list[Row]:
    """Python and the packages that kr_ray's own metadata requires, by their metadata."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:
        return [("FAIL", "packaging", "missing; pip install packaging")]
    try:
        package = metadata.distribution("kr_ray")
    except metadata.PackageNotFoundError:
        return [("FAIL", "kr_ray", "not installed; run pip install -e . in its source folder")]
    rows: list[Row] = []
    python, needed = platform.python_version(), package.metadata["Requires-Python"] or ""
    fits = SpecifierSet(needed).contains(python, prereleases=True)
    rows.append(
        ("ok", "python", python)
        if fits
        else ("FAIL", "python", f"{python}, but kr_ray needs {needed}; install that")
    )
    rows.append(("ok", "kr_ray", package.version))
    for text in package.requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            rows.append(("FAIL", requirement.name, f"missing; pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            rows.append(("FAIL", requirement.name, f"{version}; pip install '{requirement}'"))
        else:
            rows.append(("ok", requirement.name, version))
    return rows + _torch_pair()


def _torch_pair() -> list[Row]:
    """torchvision's kernels load only into a torch of the release and the
    build (CUDA version or CPU) they were made for."""
    from packaging.requirements import Requirement

    torch, vision = _version("torch"), _version("torchvision")
    if torch is None or vision is None:
        return []
    wanted = next(
        (r for r in map(Requirement, metadata.requires("torchvision") or []) if r.name == "torch"),
        Requirement("torch"),
    )
    remedy = "reinstall both from one index: pip install --force-reinstall torch torchvision"
    if not wanted.specifier.contains(torch, prereleases=True):
        return [
            (
                "FAIL",
                "torch + torchvision",
                f"torchvision {vision} needs '{wanted}', but torch is {torch}; {remedy}",
            )
        ]
    builds = {name: _build(name) for name in ("torch", "torchvision")}
    # Builds from source carry a commit there, which says nothing.
    targets = {
        build.partition("+")[2]
        for build in builds.values()
        if re.search(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$", build)
    }
    if len(targets) > 1:
        found = " and ".join(f"{name} {build}" for name, build in builds.items())
        return [("FAIL", "torch + torchvision", f"different builds: {found}; {remedy}")]
    return [
        (
            "ok",
            "torch + torchvision",
            f"a matching pair{''.join(f', both for {target}' for target in targets)}",
        )
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build(package: str, variable: str = "__version__") -> str:
    """What the package's version.py says, such as 2.11.0+cpu: the
    metadata of some wheels leaves the build out."""
    file = Path(str(metadata.distribution(package).locate_file(f"{package}/version.py")))
    try:
        found = re.search(rf"^{variable}\b.*?= (.+)$", file.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return str(ast.literal_eval(found[1])) if found else ""


# --- machine ------------------------------------------------------------------------------------------------


def _gpus() -> list[Row]:
    if shutil.which("nvidia-smi") is None:
        return [("ok", "GPU", "none found (no nvidia-smi); everything runs on the CPU")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        return [("note", "GPU", f"nvidia-smi does not answer ({error}); check the driver")]
    rows: list[Row] = [
        ("ok", f"GPU {k}", line.strip()) for k, line in enumerate(answer.stdout.strip().splitlines())
    ]
    if rows and _version("torch") is not None and _build("torch", "cuda") == "None":
        rows.append(
            (
                "note",
                "GPU",
                "torch is a build without CUDA, so GPUs stay idle; install torch and torchvision for CUDA",
            )
        )
    return rows


def _cpu() -> Row:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.is_file() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = set(re.findall(r"\w+", (re.search(r"^flags\s*:(.*)$", text, re.MULTILINE) or [""])[0]))
    bf16 = [flag for flag in BF16_FLAGS if flag in flags]
    precision = f"bf16 by {', '.join(bf16)}" if bf16 else "no AMX: mixed precision runs in float32"
    return "ok", "CPU", f"{cores} cores, {model[1] if model else platform.machine()}, {precision}"


def _memory() -> Row:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    information = Path("/proc/meminfo")
    available = re.search(
        r"^MemAvailable:\s+(\d+) kB", information.read_text() if information.is_file() else "", re.MULTILINE
    )
    if available is None:
        return "ok", "memory", f"{total:.1f} GB"
    free = int(available[1]) * 1024 / GB
    found = f"{free:.1f} of {total:.1f} GB available"
    return (
        ("ok", "memory", found)
        if free >= FREE_MEMORY_NOTE_GB
        else ("note", "memory", f"{found}; Ray may stop workers")
    )


def _disk(folder: Path) -> Row:
    free = shutil.disk_usage(folder).free / GB
    found = f"{free:.1f} GB free in {folder}"
    if free < FREE_DISK_FAIL_GB:
        return "FAIL", "disk", f"{found}; free some, or point `storage` elsewhere"
    return ("ok" if free >= FREE_DISK_NOTE_GB else "note"), "disk", found


def _ray_address() -> Row:
    """Only whether something listens there; joining the cluster would take seconds."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return (
            "ok",
            "Ray",
            "starts its own (RAY_ADDRESS is not set)"
            if not address
            else "starts its own (RAY_ADDRESS=local)",
        )
    if address == "auto":
        return "note", "Ray", "RAY_ADDRESS=auto: joins the Ray of this machine, which must be running"
    shown = f"RAY_ADDRESS={masked(address)}"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        return "FAIL", "Ray", f"{shown} must read host:port; correct or unset it"
    if parts.scheme in ("http", "https"):
        return (
            "note",
            "Ray",
            f"{shown} is an address for `ray job submit`, not for `kr run` "
            "on this machine; unset it for the latter",
        )
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return "FAIL", "Ray", f"{shown} does not answer ({error}); start that cluster, or unset RAY_ADDRESS"
    return "ok", "Ray", f"{shown} answers"


# --- data ---------------------------------------------------------------------------------------------------


def _data_sets(root: Path) -> Row:
    """Sets whose files lie where `kr_ray.data.public_sets` looks for them;
    their checksums are compared when they are used."""
    root = root.expanduser()
    homes: dict[str, list[Path]] = {}
    files: dict[str, tuple[str, ...]] = {}
    for flag in MEDMNIST:
        homes[flag], files[flag] = [root / "medmnist"], (f"{flag}.npz",)
    homes["fashionmnist"], files["fashionmnist"] = (
        [root / "fashionmnist", root / "FashionMNIST" / "raw"],
        FASHION_FILES,
    )
    for name, (folder, names) in CIFAR_FILES.items():
        homes[name], files[name] = [root / folder, root / name / folder], names
    found = [
        name
        for name in homes
        if any(all((home / file).is_file() for file in files[name]) for home in homes[name])
    ]
    if not found:
        return (
            "note",
            "data sets",
            f"digits (needs no file); none below {root}, so others would be downloaded",
        )
    return "ok", "data sets", f"digits (needs no file); below {root}: {', '.join(found)}"
