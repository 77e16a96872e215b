"""What people put where a file is read: each foreign, damaged or mistyped
input gets one message with a remedy, and code 2."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config, tiny_settings
from PIL import Image

from kr_ray import cli
from kr_ray.classifiers.export import PredictError, export_student, predict_files
from kr_ray.config import ConfigError
from kr_ray.config.file import load_config
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import load_splits
from kr_ray.data.user_data import read_image
from kr_ray.foreign.files import contents_of, recognise, shown, what_lies_at
from kr_ray.foreign.yaml_core import write_yaml
from kr_ray.privacy.score_files import audit_score_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
PAGE = b"<!DOCTYPE html><title>404</title>"
LONG = "a" * 300


def npz_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# --- what lies there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file; write or copy it again"),
        (
            bytes(4096),
            "a file that begins with zeros only, as an interrupted copy leaves it; write or copy it again",
        ),
        (LFS, "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
        (PAGE, "an HTML page, such as a server's error or login page; download the file itself"),
        (b"1,2,3\n", "a text table (CSV)"),
        (b'{"a": 1}', "JSON text"),
        (
            gzip.compress(npz_bytes(train_images=np.zeros((1, 8, 8)))),
            "a gzip-compressed file; unpack it with gunzip",
        ),
        (b"\x80\x04\x95\x00.", "a Python pickle, which is a program and is never loaded"),
        (bytes(128) + b"DICM", "a DICOM file; export its images as PNG"),
        (npz_bytes(a=np.zeros(3))[:-40], "a damaged one"),
    ],
)
def test_what_is_no_npz_is_told_what_it_is(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = tmp_path / "own.npz", tmp_path / "config.yaml"
    path.write_bytes(content)
    config.write_text(write_yaml(tiny_settings(data={"name": "npz", "path": str(path)})))
    assert cli.main(["plan", str(config), "--devices", "1xH200"]) == 2
    message = capsys.readouterr().err
    assert f"`{path}` must be a complete .npz file, but got {said}" in message
    for word in ("Error", "unsafely", "allow_pickle", "Traceback"):
        assert word not in message


def special(kind: str, path: Path) -> Path:
    """Something that is no file, at `path` or elsewhere."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a broken link":
        path.symlink_to("nowhere")
    return {"a device": Path("/dev/null"), "a name that cannot be opened": path.with_name(LONG)}.get(
        kind, path
    )


SPECIAL = (
    "nothing there",
    "a folder",
    "a named pipe",
    "a broken link",
    "a device",
    "a name that cannot be opened",
)


@pytest.mark.parametrize("kind", SPECIAL)
def test_no_reader_waits_for_or_stumbles_over_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path / "x")
    assert what_lies_at(path).startswith(kind)
    readers: list[tuple[Callable[[Path], object], type[Exception]]] = [
        (load_config, ConfigError),
        (read_image, DataError),
        (lambda path: audit_score_file(path, 0), ValueError),
        (lambda path: predict_files(path, []), PredictError),
    ]
    for read, error in readers:
        with pytest.raises(error, match=f"but got {kind}") as caught:
            read(path)
        assert "correct" in str(caught.value) and len(str(caught.value)) < 400


def test_a_name_with_a_zero_byte_is_no_file(tmp_path: Path) -> None:
    assert what_lies_at(tmp_path / "a\0b") in ("nothing there", "a name with a zero byte")


def test_a_files_first_bytes_say_what_it_is(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "gif", "tiff", "webp"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, kind)
        assert recognise(buffer.getvalue()).kind == kind
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t")
    assert contents_of(tmp_path / "t").kind == "parquet"
    assert recognise(npz_bytes(a=np.zeros(2))).kind == "zip"
    assert recognise("größe\n".encode()).kind == "text"
    assert recognise(Path("/bin/ls").read_bytes()[:4096]).kind == "program"
    assert recognise("name: x".encode("utf-16")).kind == "utf16"
    assert recognise(bytes(range(1, 200))).kind == "other"


# --- images -------------------------------------------------------------------------------------------------


def png16(pixels: np.ndarray[Any, Any], path: Path) -> None:
    """A PNG of 16 bits per channel, RGB, which Pillow can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff16(pixels: np.ndarray[Any, Any], path: Path) -> None:
    """An uncompressed TIFF of 16 bits per channel, RGB."""
    height, width, _ = pixels.shape
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, 3),
        (278, 3, 1, height), (279, 4, 1, pixels.size * 2),
    ]  # fmt: skip
    body = struct.pack("<3H", 16, 16, 16) + pixels.astype("<u2").tobytes()
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def test_colour_of_sixteen_bits_is_refused_like_grey(tmp_path: Path) -> None:
    pixels = (np.arange(192).reshape(8, 8, 3) * 16).astype(np.uint16)
    png16(pixels, tmp_path / "deep.png")
    tiff16(pixels, tmp_path / "deep.tif")
    (tmp_path / "deep.ppm").write_bytes(b"P6 8 8 4095\n" + pixels.astype(">u2").tobytes())
    (tmp_path / "deep.pgm").write_bytes(b"P5 8 8 4095\n" + pixels[..., 0].astype(">u2").tobytes())
    for name in ("deep.png", "deep.tif", "deep.ppm", "deep.pgm"):
        assert Image.open(tmp_path / name).size == (8, 8)  # Pillow reads it
        with pytest.raises(
            DataError,
            match=rf"{name}` must have 8 bits per channel, grey or RGB, but got .*; scale and convert it",
        ):
            read_image(tmp_path / name)
    (tmp_path / "shallow.ppm").write_bytes(b"P6 8 8 15\n" + (pixels // 16 % 16).astype(np.uint8).tobytes())
    assert read_image(tmp_path / "shallow.ppm").shape == (8, 8, 3)


def test_other_formats_and_sizes_are_not_even_tried(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    shutil.copy(tmp_path / "a.eps", tmp_path / "a.png")  # PostScript is a program, whatever it is called
    with pytest.raises(DataError, match=r"a\.png` must be a readable image"):
        read_image(tmp_path / "a.png")
    header = struct.pack(
        "<IiiHH", 40, 60_000, 60_000, 1, 24
    )  # found by the slow suite of test_foreign_bytes.py
    (tmp_path / "huge.bmp").write_bytes(b"BM" + bytes(8) + struct.pack("<I", 54) + header + bytes(24))
    with pytest.raises(
        DataError, match=r"huge\.bmp` must have at most 134,217,728 pixels, but claims many more"
    ):
        read_image(tmp_path / "huge.bmp")


def class_folders(root: Path) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for index in range(20):
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(root / name / f"{index}.png")
    return root


def test_folders_with_odd_names_or_pipes_are_refused_before_an_image_is_read(tmp_path: Path) -> None:
    for number, name in enumerate((b"a\nb", b"a\tb", b"a\xff")):
        root = class_folders(tmp_path / str(number))
        odd = os.fsdecode(name)
        (root / "a").rename(root / odd)
        with pytest.raises(DataError, match=r"printable UTF-8 text.*rename it") as caught:
            load_splits(tiny_config(data={"name": "folder", "path": str(root)}).data)
        assert str(caught.value).isprintable() and shown(odd) in str(caught.value)
    root = class_folders(tmp_path / "pipe")
    os.mkfifo(root / "a" / "zz.png")
    with pytest.raises(DataError, match=r"but got the named pipe zz\.png"):
        load_splits(tiny_config(data={"name": "folder", "path": str(root)}).data)


# --- scores -------------------------------------------------------------------------------------------------


def test_scores_are_read_by_what_the_file_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "model": [0] * 60,
            "sample": list(range(60)),
            "score": rng.normal(size=60),
            "member": [True, False] * 30,
        }
    )
    pq.write_table(table, tmp_path / "scores.PARQUET")
    shutil.copy(tmp_path / "scores.PARQUET", tmp_path / "scores")
    for name in ("scores.PARQUET", "scores"):
        assert audit_score_file(tmp_path / name, 0).form == "one model"
    for content, said in (
        (
            b"model,sample,score,member\n0,0,1.5,1\n",
            r"a text table \(CSV\); save the table as Parquet: pandas.read_csv",
        ),
        (LFS, "git lfs pull"),
        (PAGE, "HTML page"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file; save the scores as .npz or .parquet"),
    ):
        (tmp_path / "scores").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            audit_score_file(tmp_path / "scores", 0)
    pq.write_table(table.set_column(0, "model", pa.array([[0]] * 60)), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=r"lists\.parquet: `model` must be numbers, or text"):
        audit_score_file(tmp_path / "lists.parquet", 0)


# --- ONNX ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "null",
        "[]",
        '{"author": "me"}',
        '{"class_names": ["a", "b"], "image_size": 8, "channels": 1}',
    ],
)
def test_a_foreign_model_with_an_entry_of_our_name_is_refused(text: str, tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", onnx.TensorProto.FLOAT, [1])], [value("y", onnx.TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.helper.set_model_props(model, {"kr_ray": text})
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(
        PredictError, match=r"metadata does not describe its inputs and outputs; use the student\.onnx"
    ):
        predict_files(tmp_path / "m.onnx", [])


def test_predict_refuses_names_that_would_break_its_table(tmp_path: Path) -> None:
    from kr_ray.classifiers.networks import save_classifier
    from kr_ray.classifiers.resnet import ResNet14

    save_classifier(tmp_path / "w.safetensors", ResNet14(2, 1, 4, torch.Generator().manual_seed(0)))
    export_student(tmp_path / "w.safetensors", tmp_path / "m.onnx", ["a", "b"], 8)
    for name in (b"a\tb.png", b"a\nb.png", b"a\xff.png"):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        Image.new("L", (8, 8)).save(path, "PNG")
        with pytest.raises(
            PredictError, match=r"must have a name of printable UTF-8 text.*rename it"
        ) as caught:
            list(predict_files(tmp_path / "m.onnx", [path]))
        assert str(caught.value).isprintable()
