"""What a person takes away of a student: an ONNX file, and predictions by it.

Imports of the training are within functions: `kr predict` needs none of
them and starts three times as fast without.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kr_ray.data.checks import DataError
from kr_ray.data.pools import resize
from kr_ray.data.user_data import read_image as read_image
from kr_ray.foreign.files import check_file, is_plain_name, shown
from kr_ray.foreign.onnx import OnnxModel, OnnxRunError
from kr_ray.runs.artifacts import ArtifactError, atomic_write

METADATA_KEY = "kr_ray"
"""Of the JSON in ONNX `metadata_props`."""
MAX_LOGIT_DIFFERENCE = 1e-3
"""Between PyTorch and onnxruntime. Rounding alone gives some 1e-6 per unit of the largest logit (ONNX folds
batch norms into the convolutions); this is far above it, and still moves no probability by more than 5e-4."""
PREDICTED_AT_ONCE = 64


class PredictError(DataError):
    """`kr predict` was given a model or an image that it cannot use.
    The message gives rule, values and remedy."""


@dataclass(frozen=True)
class Description:
    """What an exported file says of its inputs and outputs, as JSON in its metadata.

    Attributes:
        class_names: in the order of the logits.
        image_size: side in pixels.
        channels: 1 or 3.
    """

    class_names: list[str]
    image_size: int
    channels: int


# --- the student --------------------------------------------------------------------------------------------


class _Deployed(nn.Module):
    """The classifier from pixels to probabilities."""

    def __init__(self, normalise: Callable[[Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.normalise, self.classifier = normalise, classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.classifier(self.normalise(images))
        return logits, torch.softmax(logits, dim=1)


def export_student(weights: Path, path: Path, class_names: Sequence[str], image_size: int) -> float:
    """Write a classifier as one ONNX file that takes raw pixels: its normalisation is inside.

    Input `images`: uint8 [N, C, image_size, image_size], any N. Outputs: `logits` float32 [N, K] and
    `probabilities` float32 [N, K]. `metadata_props` holds, under `kr_ray`, JSON with `class_names`,
    `image_size` and `channels`. The file is put in place only after onnxruntime has given the same logits as
    PyTorch.

    Args:
        weights: what `save_classifier` wrote.
        path: of the ONNX file; an older one is replaced.
        class_names: one per class, in the order of the logits.

    Returns:
        The largest absolute difference between the logits of onnxruntime
        and of PyTorch, both on the CPU in float32.

    Raises:
        ValueError: not one name per class.
        ArtifactError: the weights cannot be read, or the exported file computes something else.
    """
    from kr_ray.classifiers.networks import load_classifier
    from kr_ray.data.augment import to_float

    classifier = load_classifier(weights, torch.device("cpu"))
    if len(class_names) != classifier.num_classes:
        raise ValueError(
            f"`len(class_names) == {classifier.num_classes}` (the student's classes) must hold, but got "
            f"{len(class_names)} names; give one per class"
        )
    described = Description(list(class_names), image_size, classifier.channels)
    model = _to_onnx(_Deployed(to_float, classifier).eval(), described)
    with atomic_write(path) as temporary:
        temporary.write_bytes(model)
        difference = _difference(temporary, classifier, image_size)
        if not difference <= MAX_LOGIT_DIFFERENCE:  # also catches NaN
            raise ArtifactError(
                "`largest difference of logits between ONNX and PyTorch <= "
                f"{MAX_LOGIT_DIFFERENCE:g}` must hold, but got {difference:g}; {path} was not "
                "written: try another version of torch, onnxscript or onnxruntime"
            )
    return difference


def _to_onnx(model: nn.Module, described: Description) -> bytes:
    """The model as a serialised ONNX graph, with `described` in its metadata."""
    import onnx

    channels, size = described.channels, described.image_size
    example = torch.zeros(
        2, channels, size, size, dtype=torch.uint8
    )  # of 2: a batch of 1 would be taken for a constant
    with _quiet():
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    assert program is not None
    graph_file = program.model_proto
    # The exporter notes at every node which line of which file on this
    # machine it came from; that is nobody's business.
    graph = graph_file.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(graph_file, {METADATA_KEY: json.dumps(asdict(described))})
    serialised: bytes = graph_file.SerializeToString()
    return serialised


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, which concern its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _difference(path: Path, classifier: nn.Module, image_size: int) -> float:
    """Largest absolute difference of logits on noise of every contrast, in
    batches of other sizes than the exported one."""
    from kr_ray.classifiers.predict import predict_logits

    session, described = _open_model(path)
    random = torch.Generator().manual_seed(0)
    shape = (32, described.channels, image_size, image_size)
    contrast = torch.linspace(0, 1, shape[0]).view(-1, 1, 1, 1)
    images = (torch.randint(256, shape, generator=random) * contrast).to(torch.uint8)
    found = [session.run(["logits"], {"images": batch.numpy()})[0] for batch in (images[:1], images[1:])]
    expected = predict_logits(classifier, images, torch.device("cpu")).numpy()
    return float(np.abs(np.concatenate(found) - expected).max())


# --- predictions --------------------------------------------------------------------------------------------


def predict_files(model: Path, images: Sequence[Path]) -> Iterator[tuple[Path, str, float]]:
    """Class and its probability for each image file, in their order.

    Images are read and resized as the training's own were (Pillow, EXIF orientation, `resize`), and converted
    to grey or RGB as the model wants them. Model and presence of all files are checked before the first
    prediction.

    Args:
        model: an ONNX file written by `export_student`.
        images: files that Pillow can read.

    Raises:
        PredictError: `model` is missing or not such a file, or an image is missing; after the last
            prediction: images that cannot be read, all of them named.
    """
    session, described = _open_model(model)
    for image in images:
        check_file(image, "must be an image file", PredictError)
    return _predictions(session, described, images)


def _predictions(
    session: OnnxModel, described: Description, images: Sequence[Path]
) -> Iterator[tuple[Path, str, float]]:
    unread: list[str] = []
    for start in range(0, len(images), PREDICTED_AT_ONCE):
        pixels: dict[int, NDArray[np.uint8]] = {}
        for number in range(start, min(start + PREDICTED_AT_ONCE, len(images))):
            try:
                pixels[number] = _read_for(described, images[number])
            except PredictError as error:  # the others are none the worse for it
                unread.append(str(error))
        if not pixels:
            continue
        names = described.class_names
        probabilities = _probabilities(session, np.concatenate(list(pixels.values())), len(names))
        for number, row in zip(pixels, probabilities, strict=True):
            best = int(row.argmax())
            yield images[number], names[best], float(row[best])
    if unread:
        raise PredictError("\n".join(unread))


def _probabilities(session: OnnxModel, pixels: NDArray[np.uint8], classes: int) -> NDArray[np.float32]:
    """float32 [N, classes]."""
    try:
        found: NDArray[np.float32] = session.run(["probabilities"], {"images": pixels})[0]
    except OnnxRunError as error:
        raise PredictError(
            f"the model must run on images {list(pixels.shape)}, but failed ({error}); export it again"
        ) from error
    if found.shape != (len(pixels), classes) or not np.isfinite(found).all():
        raise PredictError(
            f"the model must give {classes} finite probabilities per image, but gave other numbers, "
            f"{list(found.shape)}; export it again"
        )
    return found


def _read_for(described: Description, file: Path) -> NDArray[np.uint8]:
    """One file as the model's input: uint8 [1, C, H, W]."""
    from PIL import Image

    if not is_plain_name(str(file)):
        raise PredictError(
            f"`{shown(file)}` must have a name of printable UTF-8 text, for "
            "it stands in a line of a table; rename it"
        )
    try:
        pixels = read_image(file)
    except DataError as error:
        raise PredictError(str(error)) from None  # the message holds all that the cause says
    image = Image.fromarray(pixels).convert("L" if described.channels == 1 else "RGB")
    # np.array, not asarray: Pillow's buffer is read-only, which torch warns of.
    tensor = (
        torch.from_numpy(np.array(image))
        .view(1, image.height, image.width, described.channels)
        .permute(0, 3, 1, 2)
    )
    return resize(tensor, described.image_size).numpy()


MODEL_MUST = "must be an ONNX file written by `kr export`"


def _open_model(path: Path) -> tuple[OnnxModel, Description]:
    """The model, and what `export_student` wrote beside its weights."""
    remedy = "correct --model, or run `kr export`"
    check_file(path, "must be a model written by `kr export`", PredictError, remedy)
    model = OnnxModel(path, MODEL_MUST, PredictError, "export or copy it again")
    text = model.metadata.get(METADATA_KEY)
    if text is None:
        raise PredictError(
            f"`{shown(path)}` {MODEL_MUST}, but it has no `{METADATA_KEY}` "
            "metadata; use the student.onnx of a run's export folder"
        )
    try:
        described = _description(json.loads(text), model)
    except (ValueError, RecursionError):
        described = None
    if described is None:
        raise PredictError(
            f"`{shown(path)}` {MODEL_MUST}, but its `{METADATA_KEY}` metadata does not describe its inputs "
            "and outputs; use the student.onnx of a run's export folder"
        )
    return model, described


def _description(found: Any, model: OnnxModel) -> Description | None:
    """The metadata if they are those of `export_student`, and inputs and outputs are those it speaks of."""
    if not isinstance(found, dict):
        return None
    names, size, channels = (found.get(key) for key in ("class_names", "image_size", "channels"))
    if not (isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        return None
    wanted = ("images", "tensor(uint8)", (None, channels, size, size))
    if type(size) is not int or type(channels) is not int or model.inputs != [wanted]:
        return None
    return Description(names, size, channels) if model.outputs == ["logits", "probabilities"] else None
