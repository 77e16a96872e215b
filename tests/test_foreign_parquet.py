"""Parquet sets of other tools: read as they are meant, or refused by
shape, row length or class names; never bent to fit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from kr_ray.config import Config
from kr_ray.data.checks import DataError
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.pipeline import Pipeline
from kr_ray.synthesis.parquet_set import parquet_schema, read_parquet_set, to_table

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


SIDE = 16


def splits(channels: int = 3) -> Splits:
    def part(count: int) -> LabelledImages:
        random = torch.Generator().manual_seed(count)
        images = torch.randint(256, (count, channels, SIDE, SIDE), generator=random).to(torch.uint8)
        return LabelledImages(images, torch.arange(count) % 2)

    return Splits("made", ("a", "b"), part(12), part(6), part(4))


def soft() -> pa.Array:
    return pa.array(np.eye(2, dtype=np.float32)[np.arange(12) % 2].tolist(), pa.list_(pa.float32()))


def tensors(images: torch.Tensor) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.uint8(), list(images.shape[1:]))
    return pa.ExtensionArray.from_storage(
        kind, pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1).numpy()), images[0].numel())
    )


def encoded(images: torch.Tensor, kind: str = "PNG") -> list[dict[str, Any]]:
    found = []
    for image in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, kind)
        found.append({"bytes": buffer.getvalue(), "path": None})
    return found


def hugging_face(table: pa.Table, names: list[str]) -> pa.Table:
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_sets_of_other_tools_are_read_as_they_are_meant(tmp_path: Path) -> None:
    real = splits()
    images = real.train.images
    flat = images.reshape(12, -1).tolist()
    for number, column in enumerate((
        tensors(images), pa.array(flat, pa.list_(pa.uint8())), pa.array(flat, pa.large_list(pa.uint8())),
        pa.array(flat, pa.list_(pa.uint8(), 3 * SIDE * SIDE)),
        pa.array(images.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))), pa.array(encoded(images)),
    )):  # fmt: skip
        path = tmp_path / f"{number}.PARQUET"
        pq.write_table(hugging_face(pa.table({"image": column, "soft_label": soft()}), ["a", "b"]), path)
        found, targets = read_parquet_set(path, real)
        assert torch.equal(found, images) and torch.equal(targets, torch.eye(2)[torch.arange(12) % 2])
    grey = splits(1)
    pq.write_table(
        pa.table({"image": pa.array(encoded(grey.train.images)), "soft_label": soft()}),
        tmp_path / "grey.parquet",
    )
    assert torch.equal(read_parquet_set(tmp_path / "grey.parquet", grey)[0], grey.train.images)


def wrong_sets() -> dict[str, tuple[pa.Table, str]]:
    images = splits().train.images
    flat = images.reshape(12, -1).tolist()
    last = images.permute(0, 2, 3, 1).contiguous()
    kept = pa.fixed_shape_tensor(pa.uint8(), [3, SIDE, SIDE], permutation=[1, 2, 0])
    lists = pa.list_(pa.uint8())
    targets = torch.eye(2)[torch.arange(12) % 2]

    def with_images(column: pa.Array) -> pa.Table:
        return pa.table({"image": column, "soft_label": soft()})

    def named(**metadata: Any) -> pa.Table:
        return to_table(images, targets, parquet_schema((3, SIDE, SIDE), 2, metadata))

    ragged_targets = pa.array([[1.0, 0.0]] * 10 + [[1.0], [0.5, 0.25, 0.25]], pa.list_(pa.float32()))
    return {
        "channels last": (with_images(tensors(last)),
                          r"\[3, 16, 16\], but .* holds \[16, 16, 3\]; transpose it"),
        "permuted": (with_images(pa.ExtensionArray.from_storage(kept, tensors(images).storage)),
                     r"in the order \[1, 2, 0\]"),
        "other sides": (with_images(tensors(images.view(12, 3, 8, 32))),
                        r"holds \[3, 8, 32\]; give a set of images of the same size"),
        "nested channels last": (with_images(pa.array(last.tolist(), pa.list_(pa.list_(lists)))),
                                 "`3 x 16 x 16 numbers in every image`"),
        "ragged": (with_images(pa.array([[*flat[0], 1], flat[1][:-1], *flat[2:]], lists)),
                   "with 767, 768, 769 of them"),
        "an empty cell": (with_images(pa.array([None, *flat[1:]], lists)), "empty cells"),
        "an empty pixel": (with_images(pa.array([[None, *flat[0][1:]], *flat[1:]], lists)), "empty cells"),
        "ragged targets": (pa.table({"image": tensors(images), "soft_label": ragged_targets}),
                           "numbers in every soft_label"),
        "other order": (named(images=12, class_names=["b", "a"]),
                        r"`class names a, b` .*, but got b, a; put the columns"),
        "other classes": (named(images=12, class_names=["a", "c"]), "but got a, c"),
        "other order, datasets": (hugging_face(with_images(tensors(images)), ["b", "a"]), "but got b, a"),
        "other number": (named(images=13, class_names=["a", "b"]), "the set is not whole"),
        "not JSON": (named().replace_schema_metadata({"kr_ray": "text"}),
                     "but it is not JSON; export or copy the set again"),
        "no mapping": (named().replace_schema_metadata({"kr_ray": "[1]"}), "no mapping"),
        "names of another kind": (named(class_names="ab"), "of another kind"),
        "no image file": (with_images(pa.array([{"bytes": b"\x89PNG", "path": None}] * 12)),
                          "row 0 of `image` in .*readable image"),
        "no bytes": (with_images(pa.array([{"bytes": None, "path": "x.png"}] * 12,
                                          pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
                     "embed_external_files"),
        "small image files": (with_images(pa.array(encoded(images[:, :, :8]))),
                              r"must be .* \[3, 16, 16\], but got \[3, 8, 16\]"),
        "text": (with_images(pa.array(["x"] * 12)), "numbers in every image"),
        "no rows": (with_images(tensors(images)).slice(0, 0).cast(with_images(tensors(images)).schema),
                    "has no rows"),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_sets())
def test_sets_that_would_be_misread_are_refused(name: str, tmp_path: Path) -> None:
    table, said = wrong_sets()[name]
    path = tmp_path / "set.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=said) as caught:
        read_parquet_set(path, splits())
    assert str(path) in str(caught.value)


def test_only_parquet_files_of_a_folder_are_read(tmp_path: Path) -> None:
    real = splits()
    schema = parquet_schema((3, SIDE, SIDE), 2, {"images": 12, "class_names": ["a", "b"]})
    targets = torch.eye(2)[torch.arange(12) % 2]
    for number, name in enumerate(("0.parquet", "1.PARQUET")):
        rows = slice(6 * number, 6 * number + 6)
        pq.write_table(to_table(real.train.images[rows], targets[rows], schema), tmp_path / name)
    (tmp_path / "README.md").write_text("a data card")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "_SUCCESS").touch()
    assert torch.equal(read_parquet_set(tmp_path, real)[0], real.train.images)
    (tmp_path / "1.PARQUET").write_bytes(LFS)
    with pytest.raises(
        DataError, match=r"1\.PARQUET` must be a complete Parquet file, but got a Git LFS pointer; fetch"
    ):
        read_parquet_set(tmp_path, real)
    for name in ("0.parquet", "1.PARQUET"):
        (tmp_path / name).unlink()
    with pytest.raises(
        DataError, match=r"must hold Parquet files .*, but got .gitattributes, README.md, _SUCCESS"
    ):
        read_parquet_set(tmp_path, real)


class Silent:
    """A watcher that nobody looks at."""

    def stage_started(self, stage: str) -> None: ...
    def stage_progress(self, stage: str, progress: Any) -> None: ...
    def stage_finished(self, stage: str, result: Any, skipped: bool) -> None: ...
    def notice(self, text: str) -> None: ...


def test_a_wrong_set_is_refused_while_the_finished_student_still_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pa.array([[1, 2, 3]] * 20, pa.list_(pa.uint8(), 3))
    labels = pa.array([[0.1] * 10] * 20, pa.list_(pa.float32(), 10))
    pq.write_table(pa.table({"image": images, "soft_label": labels}), tmp_path / "set.parquet")
    config: Config = tiny_config(
        storage=str(tmp_path / "runs"), student={"from_parquet": str(tmp_path / "set.parquet")}
    )
    monkeypatch.setattr(Pipeline, "connect", lambda self: pytest.fail("Ray was started"))
    with Pipeline(config, Silent()) as pipeline:
        weights = pipeline.run.begin("student", "other inputs") / "weights.safetensors"
        weights.write_bytes(b"trained for days")
        pipeline.run.finish("student", "other inputs", {})
        with pytest.raises(DataError, match="`256 numbers in every image` must hold"):
            pipeline.run_until("student")
    assert weights.read_bytes() == b"trained for days" and (weights.parent / "done.json").exists()
