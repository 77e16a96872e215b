"""Exports: equal to PyTorch, readable without kr_ray, whole or not there, and refused inputs named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

from kr_ray.classifiers import export
from kr_ray.classifiers.export import PredictError, export_student, predict_files
from kr_ray.classifiers.networks import load_classifier, save_classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.cli import main
from kr_ray.config import ClassifierConfig
from kr_ray.data.pools import resize
from kr_ray.runs.artifacts import ArtifactError

SIZE = 16
NAMES = ["cat", "dog", "Größe ≥ 2"]
RECIPE = ClassifierConfig(width=4)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(path: Path, channels: int = 3, width: int = 4) -> Path:
    """A ResNet14 whose batch norms do something."""
    model = ResNet14(len(NAMES), channels, width, random(0))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=random(1))
            module.running_var.uniform_(0.3, 2.0, generator=random(2))
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=random(3))
                module.bias.uniform_(-0.3, 0.3, generator=random(4))
    save_classifier(path, model)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with weights.safetensors and student.onnx, by channels."""
    folders = {channels: tmp_path_factory.mktemp(f"channels{channels}") for channels in (1, 3)}
    for channels, folder in folders.items():
        weights = classifier(folder / "weights.safetensors", channels)
        assert export_student(weights, folder / "student.onnx", NAMES, SIZE) < 1e-5
    return folders


# --- ONNX ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_onnx_takes_raw_pixels_and_equals_pytorch(exported: dict[int, Path], channels: int) -> None:
    """The normalisation is written out here, so that an error shared with `to_float` would show."""
    folder = exported[channels]
    model = load_classifier(folder / "weights.safetensors", torch.device("cpu"))
    session = onnxruntime.InferenceSession(str(folder / "student.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        pixels = torch.randint(256, (batch, channels, SIZE, SIZE), generator=random(batch)).to(torch.uint8)
        logits, probabilities = session.run(["logits", "probabilities"], {"images": pixels.numpy()})
        with torch.no_grad():
            expected = model((pixels.double() / 255 - 0.5).float() / 0.5)
        assert logits.dtype == probabilities.dtype == np.float32
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(probabilities, expected.softmax(1).numpy(), atol=1e-5)


def test_onnx_is_one_valid_file_that_describes_itself(exported: dict[int, Path]) -> None:
    path = exported[3] / "student.onnx"
    assert sorted(file.name for file in exported[3].iterdir()) == ["student.onnx", "weights.safetensors"]
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    properties = {item.key: item.value for item in model.metadata_props}
    assert json.loads(properties["kr_ray"]) == {"class_names": NAMES, "image_size": SIZE, "channels": 3}
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_onnx_holds_no_path_of_this_machine(exported: dict[int, Path]) -> None:
    content = (exported[3] / "student.onnx").read_bytes()
    for trace in (b".py", b"stack_trace", str(Path(export.__file__).parents[1]).encode()):
        assert trace not in content


def test_export_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    export_student(classifier(tmp_path / "w.safetensors", 1), tmp_path / "m.onnx", NAMES, SIZE)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_model_that_differs_is_not_put_in_place(
    exported: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_text("older")
    graph, other = (exported[3] / "student.onnx").read_bytes(), tmp_path / "w.safetensors"
    model = load_classifier(exported[3] / "weights.safetensors", torch.device("cpu"))
    model.head.bias.data[1] += 0.01
    save_classifier(other, model)
    monkeypatch.setattr(export, "_to_onnx", lambda *_: graph)
    with pytest.raises(ArtifactError, match=r"got 0\.0100.*was not written"):
        export_student(other, tmp_path / "m.onnx", NAMES, SIZE)
    assert (tmp_path / "m.onnx").read_text() == "older"
    model.head.bias.data[1] = torch.nan
    save_classifier(other, model)
    with pytest.raises(ArtifactError, match="got nan"):
        export_student(other, tmp_path / "m.onnx", NAMES, SIZE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "w.safetensors"]


def test_class_names_must_fit(exported: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"len\(class_names\) == 3.*got 2 names; give one per class"):
        export_student(exported[3] / "weights.safetensors", tmp_path / "m.onnx", NAMES[:2], SIZE)


# --- predictions --------------------------------------------------------------------------------------------


def write(path: Path, shape: tuple[int, ...], seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def expected(weights: Path, pixels: Tensor) -> tuple[str, float]:
    """By PyTorch, from uint8 [C, H, W] of any size."""
    model = load_classifier(weights, torch.device("cpu"))
    with torch.no_grad():
        probabilities = model(resize(pixels[None], SIZE).float() / 127.5 - 1).softmax(1)[0]
    return NAMES[int(probabilities.argmax())], float(probabilities.max())


def test_predict_converts_and_resizes_as_the_training(exported: dict[int, Path], tmp_path: Path) -> None:
    grey, colour = write(tmp_path / "grey.png", (20, 24)), write(tmp_path / "colour.png", (31, 16, 3), 1)
    pixels_grey = torch.from_numpy(np.array(Image.open(grey)))[None]
    pixels_colour = torch.from_numpy(np.array(Image.open(colour))).permute(2, 0, 1)
    luma = torch.from_numpy(np.array(Image.open(colour).convert("L")))[None]
    wanted = {1: (pixels_grey, luma), 3: (pixels_grey.expand(3, -1, -1), pixels_colour)}
    for channels, pixels in wanted.items():
        folder = exported[channels]
        found = list(predict_files(folder / "student.onnx", [grey, colour]))
        assert [row[0] for row in found] == [grey, colour]
        for (_, name, probability), image in zip(found, pixels, strict=True):
            assert (name, pytest.approx(probability, abs=1e-5)) == expected(
                folder / "weights.safetensors", image
            )


def test_predict_keeps_the_order_over_batches(
    exported: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path / f"{k}.png", (16, 16, 3), k) for k in range(7)]
    together = list(predict_files(exported[3] / "student.onnx", files))
    monkeypatch.setattr(export, "PREDICTED_AT_ONCE", 3)
    apart = list(predict_files(exported[3] / "student.onnx", files))
    assert [row[:2] for row in apart] == [row[:2] for row in together]
    assert [row[0] for row in apart] == files
    np.testing.assert_allclose([row[2] for row in apart], [row[2] for row in together], atol=1e-6)


def foreign_onnx(path: Path) -> Path:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", onnx.TensorProto.FLOAT, [1])], [value("y", onnx.TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)]),
        str(path),
    )
    return path


def test_predict_refuses_what_is_no_model_of_ours(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"hello" * 100)
    for path, found in (
        (tmp_path / "none.onnx", "nothing there; correct --model, or run `kr export`"),
        (tmp_path, "a folder"),
        (broken, "but got text; export or copy it again"),
        (foreign_onnx(tmp_path / "foreign.onnx"), "no `kr_ray` metadata; use the student.onnx"),
    ):
        with pytest.raises(PredictError, match=found) as caught:
            predict_files(path, [])
        assert str(path) in str(caught.value)


def test_predict_names_the_image_it_cannot_read(exported: dict[int, Path], tmp_path: Path) -> None:
    model, good = exported[3] / "student.onnx", write(tmp_path / "good.png", (16, 16, 3))
    with pytest.raises(
        PredictError, match=r"none\.png` must be an image file, but got nothing there; correct the path"
    ):
        predict_files(model, [good, tmp_path / "none.png"])  # before anything is predicted
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name, found in (
        ("text.png", "readable image"),
        ("cut.png", "readable image"),
        ("deep.png", "8 bits per channel"),
    ):
        with pytest.raises(PredictError, match=found) as caught:
            list(predict_files(model, [good, tmp_path / name]))
        assert name in str(caught.value)


def test_one_bad_image_does_not_cost_the_good_ones_of_its_batch(
    exported: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "PREDICTED_AT_ONCE", 3)
    model = exported[3] / "student.onnx"
    files = [write(tmp_path / f"{k}.png", (16, 16, 3), k) for k in range(8)]
    alone = {file: row for file in files for row in predict_files(model, [file])}
    for bad in (files[1], files[5], files[6]):
        bad.write_bytes(b"junk")
    good = [file for file in files if file not in (files[1], files[5], files[6])]
    assert main(["predict", *map(str, files), "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        [str(file), alone[file][1]] for file in good
    ]
    assert all(str(bad) in err for bad in (files[1], files[5], files[6])) and not any(
        str(file) in err for file in good
    )
