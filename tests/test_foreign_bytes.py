"""Whatever bytes are put where a file of ours or a person's should be:
only the project's own errors come out of its reader.

Each reader is given random bytes and its own good file cut, flipped, zeroed, spliced or
repeated: 100 inputs by default, 2,000 in the slow suite.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kr_ray.classifiers.export import PredictError, export_student, predict_files
from kr_ray.classifiers.networks import save_classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.config import ConfigError
from kr_ray.config.file import load_config
from kr_ray.data.checks import DataError
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import load_stored_splits, save_splits
from kr_ray.data.user_data import npz_pools, read_image
from kr_ray.foreign.yaml_core import YamlError, read_value, read_yaml, write_yaml
from kr_ray.privacy.score_files import audit_score_file
from kr_ray.privacy.scores import ScoreError
from kr_ray.runs.artifacts import ArtifactError, load_tensors, save_tensors
from kr_ray.runs.progress import look_at_stage
from kr_ray.synthesis.parquet_set import parquet_schema, read_parquet_set, to_table

SIZE = 8
FORBIDDEN = ("Error:", "Traceback", "NoneType", "allow_pickle", "weights_only", "unsafely", "object at 0x")
"""What no message to a person may hold: classes, code, advice to read unsafely."""


def splits() -> Splits:
    def part(count: int) -> LabelledImages:
        random = torch.Generator().manual_seed(count)
        return LabelledImages(
            torch.randint(256, (count, 3, SIZE, SIZE), generator=random).to(torch.uint8),
            torch.arange(count) % 2,
        )

    return Splits("made", ("a", "b"), part(12), part(6), part(4))


# --- good files ---------------------------------------------------------------------------------------------


def _bytes_of(write: Callable[[Path], object], folder: Path) -> bytes:
    path = folder / "good"
    write(path)
    return path.read_bytes()


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _images() -> bytes:
    made = {
        f"{part}_images": np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
        for part in ("train", "val", "test")
    }
    return _npz(**made, **{f"{part}_labels": np.arange(4) % 2 for part in ("train", "val", "test")})


def _scores() -> bytes:
    return _npz(member_scores=np.arange(20.0), non_member_scores=np.arange(20.0) - 5)


def _table() -> bytes:
    rows = {
        "model": [0] * 20,
        "sample": list(range(20)),
        "score": [float(k) for k in range(20)],
        "member": [True, False] * 10,
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    return buffer.getvalue()


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
    return buffer.getvalue()


def _parquet(folder: Path) -> bytes:
    images, targets = splits().train.images, torch.eye(2)[torch.arange(12) % 2]
    schema = parquet_schema((3, SIZE, SIZE), 2, {"images": 12, "class_names": ["a", "b"]})
    return _bytes_of(lambda path: pq.write_table(to_table(images, targets, schema), path), folder)


def _onnx(folder: Path) -> bytes:
    model = ResNet14(2, 1, 4, torch.Generator().manual_seed(0))
    save_classifier(folder / "weights.safetensors", model)
    return _bytes_of(
        lambda path: export_student(folder / "weights.safetensors", path, ["a", "b"], SIZE), folder
    )


def _report(path: Path) -> None:
    """As it is read while a run goes on: from the folder `progress` of a stage."""
    (path.parent / "progress").mkdir(exist_ok=True)
    (path.parent / "progress" / "unit.json").write_bytes(path.read_bytes())
    (path.parent / "trials.json").write_bytes(path.read_bytes())
    assert 0 <= look_at_stage(path.parent, 2, 1.0).share <= 1


def _predict(path: Path) -> None:
    image = path.parent / "image.png"
    if not image.exists():
        image.write_bytes(_picture("PNG"))
    list(predict_files(path, [image]))


@dataclass(frozen=True)
class Reader:
    """`read` opens a file; `good` makes one; of what `read` may raise are only `errors`."""

    read: Callable[[Path], object]
    good: Callable[[Path], bytes]
    errors: tuple[type[Exception], ...]


READERS = {
    "configuration": Reader(load_config, lambda _: write_yaml(tiny_settings()).encode(), (ConfigError,)),
    "npz of images": Reader(npz_pools, lambda _: _images(), (DataError,)),
    "png": Reader(read_image, lambda _: _picture("PNG"), (DataError,)),
    "jpeg": Reader(read_image, lambda _: _picture("JPEG"), (DataError,)),
    "tiff": Reader(read_image, lambda _: _picture("TIFF"), (DataError,)),
    "gif": Reader(read_image, lambda _: _picture("GIF"), (DataError,)),
    "bmp": Reader(read_image, lambda _: _picture("BMP"), (DataError,)),
    "webp": Reader(read_image, lambda _: _picture("WEBP"), (DataError,)),
    "ppm": Reader(read_image, lambda _: _picture("PPM"), (DataError,)),
    "parquet set": Reader(lambda path: read_parquet_set(path, splits()), _parquet, (DataError,)),
    "npz of scores": Reader(lambda path: audit_score_file(path, 0), lambda _: _scores(), (ScoreError,)),
    "table of scores": Reader(lambda path: audit_score_file(path, 0), lambda _: _table(), (ScoreError,)),
    "onnx": Reader(_predict, _onnx, (PredictError,)),
    "stored splits": Reader(load_stored_splits, lambda folder: _bytes_of(lambda path: save_splits(path,
                                                                                                  splits()),
                                                                                                  folder),
                                                                                                  (ArtifactError,)),
    "tensors": Reader(
        load_tensors, lambda folder: _bytes_of(lambda path: save_tensors(path, {"a": torch.arange(9)}),
                                               folder), (ArtifactError,)
    ),
    "progress": Reader(_report, lambda _: b'{"share": 0.5, "note": "loss 1.0", "cas": 0.7, "running": 1}',
                       ()),
}  # fmt: skip


# --- damage -------------------------------------------------------------------------------------------------


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """`good`, altered in one of the ways in which disks, networks and
    people alter files; or bytes of no origin."""
    place = st.integers(0, len(good))
    flips = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(1, 255)), min_size=1, max_size=8)
    return st.one_of(
        st.binary(max_size=400),
        st.binary(max_size=400).map(lambda tail: good[:8] + tail),
        place.map(lambda end: good[:end]),
        place.map(lambda start: good[start:]),
        flips.map(lambda changes: _flipped(good, changes)),
        st.tuples(place, place).map(lambda ends: _zeroed(good, *sorted(ends))),
        st.tuples(place, st.binary(max_size=40)).map(lambda new: good[: new[0]] + new[1] + good[new[0] :]),
        st.tuples(place, place).map(lambda ends: good[: ends[0]] + good[ends[1] :]),
    )


def _flipped(good: bytes, changes: list[tuple[int, int]]) -> bytes:
    altered = bytearray(good)
    for place, change in changes:
        altered[place] ^= change
    return bytes(altered)


def _zeroed(good: bytes, start: int, end: int) -> bytes:
    return good[:start] + bytes(end - start) + good[end:]


def check_reader(name: str, folder: Path, examples: int) -> None:
    reader = READERS[name]
    path, good = folder / "file", reader.good(folder)
    path.write_bytes(good)
    reader.read(
        path
    )  # the undamaged file is read, so that what follows tries more than a refusal of everything

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(good))
    def only_our_own_errors(data: bytes) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a library's warning would be printed among our own words
            try:
                reader.read(path)
            except reader.errors as error:
                message = str(error)
                assert not [word for word in FORBIDDEN if word in message], message
                assert name == "configuration" or len(message.splitlines()) == 1, message

    only_our_own_errors()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_our_own_errors(name: str, tmp_path: Path) -> None:
    check_reader(name, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_two_thousand_damaged_files_end_in_our_own_errors(name: str, tmp_path: Path) -> None:
    check_reader(name, tmp_path, 2000)


# --- what a person types ------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["a", "#", " #", ": ", "- ", "[", "]", "{", "}", ",", "&a", "*a", "<<", "!!int", "!", "|", ">", "'", '"',
     "010", "12:30", "1e999",
     ".inf", ".nan", "yes", "~", "\n", "\t", "\\", "%", "@", "`", "0x1f", "0o17", "-", "1_000", "\x00",
     "\ud800", "\u2028", "é"]
)  # fmt: skip
TYPED = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=12).map("".join))


def check_typed(folder: Path, examples: int) -> None:
    path = folder / "config.yaml"
    path.write_text(write_yaml(tiny_settings()))
    keys = st.sampled_from(
        [
            "teacher.epochs",
            "storage",
            "name",
            "tuning.space.latent_std",
            "data",
            "generator",
            "audit.worst_case.arms",
            "students.x",
            "students",
            "plugins",
            "x.y",
            "",
        ]
    )

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(keys, TYPED)
    def only_our_own_errors(key: str, text: str) -> None:
        try:
            load_config(path, [f"{key}={text}"])
        except ConfigError as error:
            assert not [word for word in FORBIDDEN if word in str(error)], str(error)

    only_our_own_errors()


def test_whatever_is_typed_after_set_ends_in_our_own_errors(tmp_path: Path) -> None:
    check_typed(tmp_path, 100)


@pytest.mark.slow
def test_two_thousand_values_after_set_end_in_our_own_errors(tmp_path: Path) -> None:
    check_typed(tmp_path, 2000)


PRINTABLE = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), PRINTABLE,
              WORDS.filter(lambda w: w != "\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(PRINTABLE, inner, max_size=4)),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(VALUES)
def test_what_is_written_as_yaml_is_read_as_it_was(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    st.text(
        st.characters(whitelist_categories=("L", "N"), whitelist_characters=" #_/.-"), min_size=1, max_size=30
    )
)
def test_plain_text_after_set_is_kept_to_its_end(text: str) -> None:
    """Whatever it says: text as it is, or a number, null or boolean
    of which the whole text is the spelling."""
    try:
        value = read_value(text)
    except YamlError:
        return  # a text that YAML takes for a mark of its own, such as "- a # b": refused, not cut
    if isinstance(value, str):
        assert value == text.strip()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        assert (
            value
            == (
                int(text, 0)
                if text.strip().lower().startswith(("0x", "0o"))
                else float(text.replace(".inf", "inf").replace(".nan", "nan"))
            )
            or value != value
        )
    elif value is None or isinstance(value, bool):
        assert text.strip().lower() in ("", "~", "null", "true", "false")
    else:
        assert text.strip().startswith("-") and "#" not in text  # "- a" is a list of YAML's


def test_names_of_any_bytes_are_shown_in_one_line(tmp_path: Path) -> None:
    for raw in (b"tab\tnew\nline.png", b"latin\xff.png", "größe.png".encode(), b"[bold]x.png"):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + raw))
        path.write_bytes(b"")
        with pytest.raises(DataError) as caught:
            read_image(path)
        message = str(caught.value)
        assert message.isprintable() and "an empty file; write or copy it again" in message
        assert ("größe.png" in message) == (raw == "größe.png".encode())
