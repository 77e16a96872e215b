"""Data sets: official sizes, checksums, splits, and one refusal per way in which data can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kr_ray.config import DataConfig
from kr_ray.data import public_sets
from kr_ray.data.checks import DataError, verify_md5
from kr_ray.data.datasets import duplicate_indices, known_names, load_splits
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.pools import resize, stratified_index

SHARED = Path(__file__).parents[2] / "shared/data"
real_files = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the official files are not at {SHARED}")

TABLE_5 = {
    "cifar10": (40000, 10000, 10000),
    "cifar100": (40000, 10000, 10000),
    "fashionmnist": (50000, 10000, 10000),
    "bloodmnist": (11959, 1712, 3421),
    "dermamnist": (7007, 1003, 2005),
    "organcmnist": (12975, 2392, 8216),
    "organsmnist": (13932, 2452, 8827),
    "pneumoniamnist": (4708, 524, 624),
    "retinamnist": (1080, 120, 400),
}


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.validation), len(splits.test)


def parts(splits: Splits) -> tuple[LabelledImages, ...]:
    return splits.train, splits.validation, splits.test


def real(name: str, **keys: Any) -> Splits:
    return load_splits(DataConfig(name=name, root=str(SHARED), download=False, **keys))


def arrays(count: int = 12, shape: tuple[int, ...] = (8, 8), classes: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test"):
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = np.arange(count) % classes
    return made


def load_npz(
    folder: Path, made: dict[str, np.ndarray], image_size: int = 8, min_images: int = 2, **keys: Any
) -> Splits:
    np.savez(folder / "own.npz", **made)
    return load_splits(
        DataConfig(name="npz", path=str(folder / "own.npz"), image_size=image_size, **keys), min_images
    )


def save_images(
    folder: Path, count: int, shape: tuple[int, ...] = (8, 8), suffix: str = "png", seed: int = 0
) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index:03d}.{suffix}")


def load_folder(folder: Path, image_size: int = 8, **keys: Any) -> Splits:
    return load_splits(DataConfig(name="folder", path=str(folder), image_size=image_size, **keys))


# --- the public sets ----------------------------------------------------------------------------------------


@real_files
@pytest.mark.parametrize("name", ["pneumoniamnist", "fashionmnist"])
def test_sizes_are_those_of_table_5(name: str) -> None:
    splits = real(name)
    assert sizes(splits) == TABLE_5[name]
    for part in parts(splits):
        assert part.images.shape[1:] == (1, 32, 32)
        assert part.labels.unique().tolist() == list(range(splits.num_classes))


def test_medmnist_sizes_of_table_5_are_the_library_s() -> None:
    from medmnist import INFO

    for name in set(TABLE_5) & set(INFO):
        assert tuple(INFO[name]["n_samples"].values()) == TABLE_5[name]


@real_files
def test_medmnist_equals_the_library_s_reader() -> None:
    import medmnist

    splits = real("pneumoniamnist", image_size=28)
    assert splits.class_names == ("normal", "pneumonia")
    for split, part in zip(("train", "val", "test"), parts(splits), strict=True):
        reference = medmnist.PneumoniaMNIST(split=split, root=SHARED / "medmnist")
        assert torch.equal(part.images[:, 0], torch.from_numpy(reference.imgs))
        assert part.labels.tolist() == reference.labels[:, 0].tolist()


@real_files
def test_fashion_equals_torchvision_s_reader_and_the_split_loses_nothing(tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    for file in (SHARED / "fashionmnist").glob("*.gz"):
        target = tmp_path / "FashionMNIST/raw" / file.stem
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(file.read_bytes()))
    splits = real("fashionmnist", image_size=28)
    train, test = (FashionMNIST(str(tmp_path), train=train) for train in (True, False))
    assert splits.class_names == tuple(train.classes)
    assert torch.equal(splits.test.images[:, 0], test.data)
    assert torch.equal(splits.test.labels, test.targets)

    def census(images: torch.Tensor, labels: torch.Tensor) -> Counter[tuple[bytes, int]]:
        return Counter(
            (image.tobytes(), int(label)) for image, label in zip(images.numpy(), labels, strict=True)
        )

    found = census(splits.train.images, splits.train.labels) + census(
        splits.validation.images, splits.validation.labels
    )
    assert found == census(train.data, train.targets)
    assert splits.train.labels.bincount().tolist() == [5000] * 10
    assert splits.validation.labels.bincount().tolist() == [1000] * 10


@real_files
def test_torchvision_s_folder_layout_is_read_in_place(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.parent.mkdir()
    raw.symlink_to(SHARED / "fashionmnist")
    splits = load_splits(
        DataConfig(
            name="fashionmnist", root=str(tmp_path), download=False, image_size=28, max_train_images=50
        )
    )
    assert sizes(splits) == (50, 10000, 10000)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["FashionMNIST", "raw"]


@real_files
def test_known_duplicates_are_found() -> None:
    train, validation, test = (part.images for part in parts(real("pneumoniamnist", image_size=28)))
    assert len(duplicate_indices(train)) == 18
    assert len(duplicate_indices(validation, train)) == 8
    assert len(duplicate_indices(test, train)) == 0
    train, _, test = (part.images for part in parts(real("breastmnist", image_size=28)))
    assert len(duplicate_indices(test, train)) == 1


def test_duplicates_of_a_constructed_set() -> None:
    a, b, c = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 1, 8, 8)
    images = torch.cat([a, b, a, c, b])
    assert duplicate_indices(images).tolist() == [2, 4]
    assert duplicate_indices(images, torch.cat([c, b])).tolist() == [1, 3, 4]
    assert duplicate_indices(a, b).tolist() == []
    with pytest.raises(DataError, match=r"resize or convert"):
        duplicate_indices(images, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_digits_hold_scikit_learn_s_images_split_by_share() -> None:
    from sklearn.datasets import load_digits

    splits = load_splits(DataConfig(name="digits", image_size=8, validation_share=0.2, test_share=0.1))
    assert sizes(splits) == (1797 - 359 - 180, 359, 180)
    images = torch.cat([part.images for part in parts(splits)])
    assert images.max() == 255
    reference = load_digits()
    by_class = np.bincount(reference.target)
    for part in parts(splits):
        expected = by_class * (len(part) / 1797)
        assert np.abs(part.labels.bincount().numpy() - expected).max() < 2
    total = np.rint(reference.images * 255 / 16).sum()
    assert images.long().sum().item() == total


def test_same_seed_same_splits_other_seed_other_splits() -> None:
    digests = [
        load_splits(DataConfig(name="digits", image_size=8, split_seed=seed)).digest() for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_accepted_medmnist_names_are_the_two_dimensional_single_label_ones() -> None:
    from medmnist import INFO

    expected = {
        flag for flag, info in INFO.items() if not flag.endswith("3d") and "multi-label" not in info["task"]
    }
    assert set(public_sets.medmnist_names()) == expected
    assert len(expected) == 11
    assert set(TABLE_5) <= set(known_names())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("PneumoniaMNIST", "did you mean pneumoniamnist?"),
        ("fashion-mnist", "did you mean fashionmnist"),
        ("cifar-10", "did you mean cifar10"),
        ("chestmnist", "not supported"),
        ("organmnist3d", "not supported"),
        ("zzz", "use npz or folder"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(DataError, match=re.escape(remedy)) as caught:
        load_splits(DataConfig(name=name))
    assert repr(name) in str(caught.value) and "organsmnist" in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist", "bloodmnist"])
def test_absent_without_download_writes_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"must hold .*{name}.*download: false; copy the official files"):
        load_splits(DataConfig(name=name, root=str(tmp_path / "root"), download=False))
    assert not (tmp_path / "root").exists()


def test_unreachable_network_is_one_clear_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets
    import torchvision.datasets.utils

    def unreachable(*args: Any, **keys: Any) -> None:
        (Path(args[1]) / "half").write_bytes(b"half")
        raise ConnectionResetError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", unreachable)
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "__init__", lambda self, root, **keys: unreachable("", root)
    )
    for name in ("bloodmnist", "cifar10"):
        with pytest.raises(
            DataError, match=r"download failed \(ConnectionResetError: no network\); check the network"
        ):
            load_splits(DataConfig(name=name, root=str(tmp_path)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_read_only_root_is_refused_not_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DataError, match=r"read-only; copy the official files there or set data.root"):
            load_splits(DataConfig(name="bloodmnist", root=str(tmp_path)))
    finally:
        tmp_path.chmod(0o755)
    assert not list(tmp_path.iterdir())


@real_files
def test_download_is_moved_into_place_verified_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets.utils

    source = (SHARED / "medmnist/breastmnist.npz").read_bytes()

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(source)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    splits = load_splits(DataConfig(name="breastmnist", root=str(tmp_path)))
    assert sizes(splits) == (546, 78, 156)
    assert [path.name for path in (tmp_path / "medmnist").iterdir()] == ["breastmnist.npz"]


@real_files
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_official_files_are_refused_and_left_alone(damage: str, tmp_path: Path) -> None:
    raw = bytearray((SHARED / "medmnist/breastmnist.npz").read_bytes())
    if damage == "truncated":
        del raw[1000:]
    else:
        raw[len(raw) // 2] ^= 1
    (tmp_path / "medmnist").mkdir()
    file = tmp_path / "medmnist/breastmnist.npz"
    file.write_bytes(raw)
    with pytest.raises(
        DataError, match=r"md5\(.*750601b1f35ba3300ea97c75c52ff8f6.*bytes\); the file is truncated, damaged"
    ):
        load_splits(DataConfig(name="breastmnist", root=str(tmp_path)))
    assert file.read_bytes() == bytes(raw)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.gz` must be readable"):
        verify_md5(tmp_path / "absent.gz", "0")


@pytest.mark.parametrize("home", [".", "cifar10"])
def test_cifar_is_checked_before_torchvision_reads_it_and_split_by_class(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    folder = tmp_path / home / "batches"
    folder.mkdir(parents=True)
    md5s = {}
    for file in ("train_1", "test_1", "meta"):
        (folder / file).write_bytes(file.encode())
        md5s[file] = hashlib.md5(file.encode()).hexdigest()
    made: list[str] = []

    class Fake:
        base_folder = "batches"
        train_list = (("train_1", md5s["train_1"]),)
        test_list = (("test_1", md5s["test_1"]),)
        meta = {"filename": "meta", "md5": md5s["meta"]}

        def __init__(self, root: str, train: bool) -> None:
            made.append(root)
            count = 15000 if train else 1000
            self.classes = [f"class {k}" for k in range(10)]
            self.targets = [k % 10 for k in range(count)]
            self.data = np.zeros((count, 32, 32, 3), np.uint8)
            self.data[:, 0, 0, 2] = self.targets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    splits = load_splits(DataConfig(name="cifar10", root=str(tmp_path)))
    assert sizes(splits) == (5000, 10000, 1000) and splits.channels == 3
    assert splits.validation.labels.bincount().tolist() == [1000] * 10
    assert torch.equal(splits.train.images[:, 2, 0, 0].long(), splits.train.labels)
    made.clear()
    (folder / "test_1").write_bytes(b"other")
    with pytest.raises(DataError, match=r"md5\(.*test_1"):
        load_splits(DataConfig(name="cifar10", root=str(tmp_path)))
    assert not made  # nothing was unpickled


# --- resizing, splitting, thinning --------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pillow_s_bilinear_rounded_to_the_nearest(image_size: int, channels: int) -> None:
    from PIL import Image

    # NHWC in memory, as files come: the result must not depend on the
    # layout, nor on what else is in the batch.
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (5, 28, 20, channels), dtype=np.uint8)
    )
    images = pixels.permute(0, 3, 1, 2)
    resized = resize(images, image_size)
    assert resized.is_contiguous() and resized.dtype == torch.uint8
    for plane, result in zip(images.flatten(0, 1).float(), resized.flatten(0, 1), strict=True):
        exact = Image.fromarray(plane.numpy()).resize((image_size, image_size), Image.Resampling.BILINEAR)
        assert np.abs(result.numpy() - np.array(exact)).max() <= 0.5 + 1e-4
    assert torch.equal(torch.cat([resize(image[None].contiguous(), image_size) for image in images]), resized)


@pytest.mark.parametrize("size", [7, 20, 69, 100])
def test_strata_follow_the_classes_and_none_is_lost(size: int) -> None:
    labels = torch.tensor([0] * 1 + [1] * 9 + [2] * 30 + [5] * 60)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    index = stratified_index(labels, size, [3])
    assert len(index) == size == len(index.unique())
    counts = labels[index].bincount(minlength=6)[[0, 1, 2, 5]]
    assert counts.min() >= 1
    assert (counts - torch.tensor([1, 9, 30, 60]) * size / 100).abs().max() < 2
    assert torch.equal(index, stratified_index(labels, size, [3]))


def test_limits_keep_every_class_and_the_other_splits(tmp_path: Path) -> None:
    made = arrays(200)
    made["train_labels"] = np.array([2] + [0, 1] * 99 + [1])
    whole = load_npz(tmp_path, made)
    thin = load_npz(tmp_path, made, max_train_images=10, max_test_images=7)
    assert sizes(thin) == (10, 200, 7)
    assert thin.train.labels.unique().tolist() == [0, 1, 2]
    assert torch.equal(thin.validation.images, whole.validation.images)
    assert sizes(load_npz(tmp_path, made, max_train_images=1000)) == (200, 200, 200)
    with pytest.raises(DataError, match=r"max_train_images >= 3.*but got max_train_images=2"):
        load_npz(tmp_path, made, max_train_images=2)


def test_too_few_training_images_for_a_batch(tmp_path: Path) -> None:
    assert len(load_npz(tmp_path, arrays(12), min_images=12).train) == 12
    with pytest.raises(DataError, match=r"training images >= 13` \(the batch size\) must hold, but got 12"):
        load_npz(tmp_path, arrays(12), min_images=13)


# --- the user's .npz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_own_npz_comes_back_pixel_by_pixel(shape: tuple[int, ...], tmp_path: Path) -> None:
    made = arrays(shape=shape, classes=3)
    made["val_labels"] = made["val_labels"][:, None].astype(np.uint8)
    splits = load_npz(tmp_path, made)
    assert splits.class_names == ("0", "1", "2")
    for split, part in zip(("train", "val", "test"), parts(splits), strict=True):
        expected = made[f"{split}_images"].reshape(12, 8, 8, -1).transpose(0, 3, 1, 2)
        assert np.array_equal(part.images.numpy(), expected)
        assert part.labels.tolist() == made[f"{split}_labels"].reshape(-1).tolist()


def test_floats_in_zero_to_one_are_scaled(tmp_path: Path) -> None:
    made = arrays()
    expected = made["train_images"]
    made["train_images"] = (expected / 255).astype(np.float32)
    assert np.array_equal(load_npz(tmp_path, made).train.images[:, 0].numpy(), expected)


def nan_pixel(images: np.ndarray) -> np.ndarray:
    floats = images / 255
    floats[3, 2, 1] = np.nan
    return floats


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("train_labels", lambda x: x * 1.0, "train_labels` must be integers, but got float64"),
        ("train_labels", lambda x: x == 1, "must be integers, but got bool"),
        (
            "val_labels",
            lambda x: np.eye(2, dtype=int)[x],
            r"val_labels` must hold one label per image, but got shape \(12, 2\)",
        ),
        ("val_labels", lambda x: x[:, None, None], r"must be \[N\] or \[N, 1\]"),
        ("train_labels", lambda x: x - 1, "train_labels` must lie in 0 to 2147483647, but got -1 to 0"),
        (
            "train_labels",
            lambda x: x.astype(np.uint64) + 2**63,
            "but got 9223372036854775808 to 9223372036854775809",
        ),
        ("train_labels", lambda x: x + 10**9, "`label < 13`.*but got label 1000000001 in .*train"),
        ("test_labels", lambda x: x + 1, "`label < 2` .*but got label 2 in .*test"),
        ("train_labels", lambda x: x * 2, "every class has a training image.*for class 1;"),
        ("train_labels", lambda x: x * 0, "number of classes >= 2` must hold, but got 1"),
        ("train_labels", lambda x: x[:-1], "but got 11 labels and 12 images"),
        ("test_images", lambda x: x[:5], "test_labels` .*but got 12 labels and 5 images"),
        ("test_images", lambda x: x[:0], "test_images` must hold at least one image"),
        ("train_images", lambda x: x.astype(np.int16), "train_images` must be uint8 .*but got int16"),
        (
            "train_images",
            lambda x: x.astype(np.float32),
            r"train_images` in floating point must lie in \[0, 1\], but got",
        ),
        ("train_images", lambda x: x / 255 - 0.5, r"must lie in \[0, 1\], but got -0.5 to"),
        ("train_images", nan_pixel, "train_images` must be finite, but got 1 NaN or infinite pixels"),
        (
            "train_images",
            lambda x: np.repeat(x[:, None], 3, 1),
            r"channels last, but got shape \(12, 3, 8, 8\)",
        ),
        ("train_images", lambda x: np.repeat(x[..., None], 4, 3), r"but got shape \(12, 8, 8, 4\)"),
        ("train_images", lambda x: x[0], r"but got shape \(8, 8\)"),
        (
            "train_images",
            lambda x: np.repeat(x[..., None], 3, 3),
            "all splits are grey .*'train': 3.*convert",
        ),
        (
            "train_images",
            lambda x: np.array([*x, "x"], dtype=object)[:12],
            "Python objects, which are never unpickled",
        ),
    ],
)
def test_bad_arrays_are_refused_with_rule_and_value(
    key: str, change: Any, message: str, tmp_path: Path
) -> None:
    made = arrays()
    made[key] = change(made[key])
    with pytest.raises(DataError, match=message):
        load_npz(tmp_path, made)


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    made = arrays()
    del made["val_labels"]
    with pytest.raises(DataError, match=r"but got train_images, .*; add val_labels"):
        load_npz(tmp_path, made)
    file = tmp_path / "own.npz"
    config = DataConfig(name="npz", path=str(file))
    for raw in (file.read_bytes()[:-100], b"", b"not an archive", b"PK\x03\x04 nor this"):
        file.write_bytes(raw)
        with pytest.raises(
            DataError, match=r"must be a complete .npz file, but got \w+.*; write or copy it again"
        ):
            load_splits(config)
    with file.open("wb") as stream:
        np.save(stream, made["train_images"])
    with pytest.raises(DataError, match="one array without a name"):
        load_splits(config)
    file.unlink()
    with pytest.raises(DataError, match="but got nothing there"):
        load_splits(config)
    file.mkdir()
    with pytest.raises(DataError, match="but got a folder"):
        load_splits(config)


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_never_escapes_as_another_error(compressed: bool, tmp_path: Path) -> None:
    file = tmp_path / "own.npz"
    (np.savez_compressed if compressed else np.savez)(file, **arrays())
    whole = file.read_bytes()
    config = DataConfig(name="npz", path=str(file), image_size=8)
    rng = np.random.default_rng(0)
    for cut in rng.integers(0, len(whole), 150):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            load_splits(config)
    for position, value in zip(rng.integers(0, len(whole), 300), rng.integers(0, 256, 300), strict=True):
        altered = bytearray(whole)
        altered[position] = value
        file.write_bytes(altered)
        try:
            load_splits(config)
        except DataError:
            continue  # the rest are bytes that mean nothing, such as times


# --- the user's folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "suffix"), [((8, 8), "png"), ((8, 8, 3), "png"), ((8, 8), "bmp"), ((8, 8, 3), "tif")]
)
def test_folder_is_read_pixel_by_pixel_with_sorted_class_names(
    shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    for seed, name in enumerate(("zebra", "ant", "cow")):
        save_images(tmp_path / name, 10, shape, suffix, seed)
    (tmp_path / "README.md").write_text("ignored")
    (tmp_path / "ant/.DS_Store").write_text("ignored")
    splits = load_folder(tmp_path, validation_share=0.2, test_share=0.1)
    assert splits.class_names == ("ant", "cow", "zebra")
    assert sizes(splits) == (21, 6, 3)
    assert [part.labels.bincount().tolist() for part in parts(splits)] == [[7] * 3, [2] * 3, [1] * 3]
    whole = torch.cat([part.images for part in parts(splits)])
    labels = torch.cat([part.labels for part in parts(splits)])
    for label, seed in enumerate((1, 2, 0)):
        rng = np.random.default_rng(seed)
        expected = {rng.integers(0, 256, shape, dtype=np.uint8).tobytes() for _ in range(10)}
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in whole[labels == label]} == expected


def test_folder_with_own_splits_keeps_them(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        save_images(tmp_path / split / "a", count)
        save_images(tmp_path / split / "b", count + 1, seed=1)
    splits = load_folder(tmp_path)
    assert sizes(splits) == (11, 5, 7) and splits.class_names == ("a", "b")
    (tmp_path / "val").rename(tmp_path / "validation")
    assert load_folder(tmp_path).digest() == splits.digest()
    (tmp_path / "validation").rename(tmp_path / ".validation")
    assert sizes(load_folder(tmp_path)) == (9, 2, 7)  # 15 % of 11 taken off the training images
    save_images(tmp_path / "test/c", 1)
    with pytest.raises(DataError, match=r"classes of the training folder only, but got 'c' too"):
        load_folder(tmp_path)
    save_images(tmp_path / "dog", 1)
    with pytest.raises(DataError, match="either class folders or train, val and test"):
        load_folder(tmp_path)


def test_images_of_any_size_are_resized_as_arrays_are(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_images(tmp_path / name, 4, (20, 12, 3), seed=seed)
        save_images(tmp_path / name, 2, (9, 30, 3), seed=seed)
    splits = load_folder(tmp_path, image_size=16)
    assert splits.train.images.shape[1:] == (3, 16, 16)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 12, 3), dtype=np.uint8) for _ in range(4)]
    expected = resize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), 16)
    found = torch.cat([part.images for part in parts(splits)])
    assert len(duplicate_indices(expected[2:], found)) == 2


def test_photographs_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png", exif=exif)
    images = load_folder(tmp_path).train.images
    assert images[:, 0, 7].min() == 255 and images[:, 0, :7].max() == 0


def put_text(folder: Path) -> None:
    (folder / "a/labels.csv").write_text("x")


def put_broken(folder: Path) -> None:
    file = folder / "a/001.png"
    file.write_bytes(file.read_bytes()[:60])


def put_other_text_as_image(folder: Path) -> None:
    (folder / "a/001.png").write_text("no image")


def put_sixteen_bits(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "a/001.png")


def put_transparent(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "a/001.png")


def put_frames(folder: Path) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 255)]
    frames[0].save(folder / "a/stack.tif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put_text, "must hold images only .*labels.csv; move or convert"),
        (put_broken, "a/001.png` must be a readable image"),
        (
            put_other_text_as_image,
            "a/001.png` must be a readable image, but got text; repair or remove the file",
        ),
        (put_sixteen_bits, "a/001.png` must have 8 bits per channel, grey or RGB, but got mode I;16"),
        (put_transparent, "a/001.png` must be one opaque image, .*transparent"),
        (put_frames, "stack.tif` must be one opaque image, but got 2 frame"),
        (
            lambda folder: save_images(folder / "b", 1, (8, 8, 3)),
            "all images are grey or all are RGB.*000.png.*convert",
        ),
        (lambda folder: (folder / "c").mkdir(), r"every class has a training image.*for class 2 \(c\)"),
        (lambda folder: save_images(folder, 1), "one folder per class, but got the loose image 000.png"),
        (lambda folder: save_images(folder / "a/deeper", 1), "but got the folder deeper"),
    ],
)
def test_bad_folders_are_refused_by_file(spoil: Any, message: str, tmp_path: Path) -> None:
    save_images(tmp_path / "a", 5)
    save_images(tmp_path / "b", 5)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_folders_that_are_none_or_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="but got nothing there"):
        load_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="class folders with images, but got none"):
        load_folder(tmp_path)
    save_images(tmp_path / "a", 5)
    with pytest.raises(DataError, match="number of classes >= 2"):
        load_folder(tmp_path)
    save_images(tmp_path / "b", 1)
    splits = load_folder(tmp_path)
    assert 1 in splits.train.labels  # the only image of a class trains
    for name in "ab":
        for file in sorted((tmp_path / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(DataError, match="images to take <= 0` must hold to leave 2 of each of 2 classes"):
        load_folder(tmp_path)


def test_importing_the_module_loads_no_data_library() -> None:
    code = (
        "import sys, kr_ray.data.datasets; print(*({'torchvision', "
        "'medmnist', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )
