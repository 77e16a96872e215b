"""The public data sets, read in place and verified against the checksums of the libraries that publish them.

Table 5 (Knowledge Recycling, appendix C) gives the paper's nine. It prints 7 classes for PneumoniaMNIST,
RetinaMNIST and OrganSMNIST, and 10,015 images for the last; the published sets have 2, 5 and 11 classes, and
25,211 images.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr_ray.data.checks import DataError, verify_md5
from kr_ray.data.pools import PoolSet, array_pool
from kr_ray.data.user_data import npz_pools

SINGLE_LABEL_TASKS = frozenset({"binary-class", "multi-class", "ordinal-regression"})
CIFAR_CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
OFFICIAL_VALIDATION_IMAGES = 10_000
"""Table 5 takes 10,000 of the training images of CIFAR10, CIFAR100 and FashionMNIST for validation."""


def medmnist_names() -> tuple[str, ...]:
    """Flags of the 2-D MedMNIST sets with one label per image."""
    import medmnist
    from medmnist.dataset import MedMNIST2D

    return tuple(
        flag
        for flag, info in medmnist.INFO.items()
        if info["task"] in SINGLE_LABEL_TASKS
        and issubclass(getattr(medmnist, info["python_class"]), MedMNIST2D)
    )


def is_other_medmnist(flag: str) -> bool:
    """Whether MedMNIST has this set, but 3-D or with several labels per image."""
    import medmnist

    return flag in medmnist.INFO and flag not in medmnist_names()


def places(name: str) -> tuple[str, ...]:
    """Where below `data.root` a public set may lie, as the functions
    below look for it; nothing for other names."""
    if name == "fashionmnist":
        return "fashionmnist", "FashionMNIST/raw"
    if name in CIFAR_CLASSES:
        import torchvision.datasets

        folder = getattr(torchvision.datasets, CIFAR_CLASSES[name]).base_folder
        return folder, f"{name}/{folder}"
    return (f"medmnist/{name}.npz",) if name in medmnist_names() else ()


def medmnist_pools(flag: str, root: Path, *, download: bool) -> PoolSet:
    """A MedMNIST set at 28 px with its official splits, from `<root>/medmnist/<flag>.npz`.

    Raises:
        DataError: absent and not to be had, or not the official file.
    """
    from medmnist import INFO
    from torchvision.datasets.utils import download_url

    info = INFO[flag]
    file = root / "medmnist" / f"{flag}.npz"

    def fetch(folder: Path) -> list[Path]:
        download_url(info["url"], str(folder), filename=file.name, md5=info["MD5"])
        return [folder / file.name]

    if not file.is_file():
        _download(flag, file.parent, [file.name], fetch, allowed=download)
    verify_md5(file, info["MD5"])
    return npz_pools(file, tuple(info["label"][key] for key in sorted(info["label"], key=int)))


def fashion_pools(root: Path, *, download: bool) -> PoolSet:
    """FashionMNIST from its four .gz files in `<root>/fashionmnist/`
    or torchvision's `<root>/FashionMNIST/raw/`.

    Raises:
        DataError: absent and not to be had, or not the official files.
    """
    from torchvision.datasets import FashionMNIST

    md5s = dict(FashionMNIST.resources)
    home, library_home = root / "fashionmnist", root / "FashionMNIST" / "raw"

    def fetch(folder: Path) -> list[Path]:
        FashionMNIST(str(folder), download=True)
        return [folder / "FashionMNIST" / "raw" / name for name in md5s]

    found = next(
        (folder for folder in (home, library_home) if all((folder / name).is_file() for name in md5s)), None
    )
    if found is None:
        _download(
            "fashionmnist",
            home,
            [name for name in md5s if not (home / name).is_file()],
            fetch,
            allowed=download,
        )
        found = home
    for name, md5 in md5s.items():
        verify_md5(found / name, md5)
    pools = {
        split: array_pool(
            _read_idx(found / f"{split}-images-idx3-ubyte.gz"),
            _read_idx(found / f"{split}-labels-idx1-ubyte.gz"),
            f"{found}: {split}",
        )
        for split in ("train", "t10k")
    }
    return PoolSet(
        tuple(FashionMNIST.classes),
        pools["train"],
        test=pools["t10k"],
        validation_images=OFFICIAL_VALIDATION_IMAGES,
    )


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of uint8: two zero bytes, type, number of axes, big-endian int32 lengths, values."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def cifar_pools(name: str, root: Path, *, download: bool) -> PoolSet:
    """CIFAR-10 or CIFAR-100 in torchvision's layout, under `<root>` or `<root>/<name>`.

    torchvision unpickles these files; every one of them is compared with its published checksum first.

    Raises:
        DataError: absent and not to be had, or not the official files.
    """
    import torchvision.datasets

    library_set: Any = getattr(torchvision.datasets, CIFAR_CLASSES[name])
    meta = library_set.meta
    md5s = dict([*library_set.train_list, *library_set.test_list, (meta["filename"], meta["md5"])])

    def fetch(folder: Path) -> list[Path]:
        library_set(str(folder), download=True)
        return [folder / library_set.base_folder]

    home = next(
        (folder for folder in (root, root / name) if (folder / library_set.base_folder).is_dir()), None
    )
    if home is None:
        home = root / name
        _download(name, home, [library_set.base_folder], fetch, allowed=download)
    for file, md5 in md5s.items():
        verify_md5(home / library_set.base_folder / file, md5)
    train, test = (library_set(str(home), train=train) for train in (True, False))
    pools = [
        array_pool(part.data, np.asarray(part.targets), f"{home / library_set.base_folder}: {split}")
        for part, split in ((train, "train"), (test, "test"))
    ]
    return PoolSet(
        tuple(train.classes), pools[0], test=pools[1], validation_images=OFFICIAL_VALIDATION_IMAGES
    )


def digits_pools() -> PoolSet:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, its grey levels 0
    to 16 scaled to 0 to 255. Needs no download."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return PoolSet(tuple(str(k) for k in range(10)), array_pool(images, digits.target, "digits"))


def _download(
    name: str, target: Path, missing: list[str], fetch: Callable[[Path], list[Path]], *, allowed: bool
) -> None:
    """Fetch into a temporary folder within `target`, then rename: an
    interrupted download leaves nothing half written."""
    where = f"`{target}` must hold {', '.join(missing)} for name: {name}, but got none there"
    if not allowed:
        raise DataError(
            f"{where} and download: false; copy the official files there, "
            "correct data.root, or set download: true"
        )
    if not _writable(target):
        raise DataError(
            f"{where} and the folder is read-only; copy the official files "
            "there or set data.root to a writable folder"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=target) as temporary:
            for path in fetch(Path(temporary)):
                if not (target / path.name).exists():  # else another process was faster
                    path.replace(target / path.name)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise DataError(
            f"{where} and the download failed ({type(error).__name__}: {error}); "
            "check the network, or copy the official files there"
        ) from error


def _writable(folder: Path) -> bool:
    """By permission bits too: for the superuser every folder counts as
    writable, also one that was made read-only on purpose."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & 0o222)
