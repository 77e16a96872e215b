"""The spaces in which images are compared: pixels, the teacher's features, or a user's own encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kr_ray.classifiers.interface import Classifier
from kr_ray.config import CopiesConfig
from kr_ray.data.augment import to_float
from kr_ray.data.checks import DataError
from kr_ray.foreign.files import check_file, decoding, shown
from kr_ray.foreign.onnx import OnnxModel
from kr_ray.runs.storage import local_copy, storage_path

Encoder = Callable[[Tensor], Tensor]
"""uint8 [N, C, H, W] -> float32 [N, D], on the images' device."""

BATCH = 256
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(images: Tensor) -> Tensor:
    """Intensities in [0, 1], scaled so that the Euclidean distance is the
    root mean square difference of the intensities."""
    flat = images.flatten(1).float() / 255
    return flat / flat.shape[1] ** 0.5


def teacher_features(teacher: Classifier) -> Encoder:
    """The teacher's penultimate layer."""
    return lambda images: _in_batches(lambda batch: teacher.features(to_float(batch)), images)


def file_encoder(config: CopiesConfig, device: torch.device) -> Encoder:
    """An encoder from a TorchScript (.pt, .pth, .ts, .torchscript; for
    example SSCD's published files) or ONNX (.onnx) file.

    It is given float32 [N, 3, S, S], S = `encoder_size` or the images' own, in [0, 1] or normalised with
    ImageNet's statistics; what it returns is flattened to [N, D].

    Raises:
        DataError: the file is missing, of another kind, or cannot be read or run;
            later, that its features are no numbers.
    """
    path = storage_path(config.encoder)
    check_file(path, ENCODER_MUST, DataError)
    with local_copy(path) as local:
        run = _onnx(local) if path.suffix.lower() == ".onnx" else _torchscript(local, device)

    def encode(images: Tensor) -> Tensor:
        try:
            return _checked(_in_batches(lambda batch: _flat(run(_prepare(batch, config))), images), path)
        except RuntimeError as error:  # what TorchScript and onnxruntime raise for inputs they cannot take
            raise DataError(
                f"`audit.copies.encoder`: {path} does not take float32 "
                f"{list(_prepare(images[:1], config).shape)}: "
                f"{(str(error).splitlines() or ['it fails'])[-1]}; set "
                "audit.copies.encoder_size to the side it was made for"
            ) from error

    return encode


def _flat(features: object) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim < 2:
        raise DataError(
            f"`audit.copies.encoder` must return one tensor [N, ...], but got {type(features).__name__}; "
            "save a network whose forward returns the features alone"
        )
    return features.flatten(1)


def _checked(features: Tensor, path: Path) -> Tensor:
    if not features.isfinite().all():
        raise DataError(
            f"`audit.copies.encoder` must return finite features, but {path} gave NaN or infinity; check "
            "audit.copies.encoder_normalisation"
        )
    return features


def _in_batches(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([encode(batch).float() for batch in images.split(BATCH)])


def _prepare(images: Tensor, config: CopiesConfig) -> Tensor:
    inputs = (images.float() / 255).expand(-1, 3, -1, -1)
    if config.encoder_size:
        inputs = functional.interpolate(
            inputs, size=[config.encoder_size] * 2, mode="bilinear", antialias=True
        )
    if config.encoder_normalisation == "imagenet":
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        inputs = (inputs - mean) / std
    return inputs.contiguous()


ENCODER_MUST = "(`audit.copies.encoder`) must be a TorchScript or ONNX file"


def _torchscript(path: Path, device: torch.device) -> Encoder:
    with decoding(
        path, ENCODER_MUST, ("zip",), DataError, "save the network with torch.jit.save or torch.onnx.export"
    ):
        module = torch.jit.load(str(path), map_location=device).eval()
    return lambda inputs: module(inputs)


def _onnx(path: Path) -> Encoder:
    model = OnnxModel(path, ENCODER_MUST, DataError, "export it again")
    if len(model.inputs) != 1 or not model.outputs:
        raise DataError(
            f"`{shown(path)}` {ENCODER_MUST} of one input, but got {len(model.inputs)} inputs and "
            f"{len(model.outputs)} outputs; export the encoder alone"
        )
    name = model.inputs[0][0]

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(model.run(model.outputs[:1], {name: inputs.cpu().numpy()})[0]).to(
            inputs.device
        )

    return run
