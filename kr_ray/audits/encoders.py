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
from kr_ray.runs.storage import local_copy, storage_path

Encoder = Callable[[Tensor], Tensor]
"""uint8 [N, C, H, W] -> float32 [N, D], on the images' device."""

BATCH = 256
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(images: Tensor) -> Tensor:
    """Intensities in [0, 1], scaled so that the Euclidean distance is the root mean square difference of the intensities."""
    flat = images.flatten(1).float() / 255
    return flat / flat.shape[1] ** 0.5


def teacher_features(teacher: Classifier) -> Encoder:
    """The teacher's penultimate layer."""
    return lambda images: _in_batches(lambda batch: teacher.features(to_float(batch)), images)


def file_encoder(config: CopiesConfig, device: torch.device) -> Encoder:
    """An encoder from a TorchScript (.pt, .pth, .ts, .torchscript; for example SSCD's published files) or ONNX (.onnx) file.

    It is given float32 [N, 3, S, S], S = `encoder_size` or the images' own, in [0, 1] or normalised with ImageNet's statistics;
    what it returns is flattened to [N, D].

    Raises:
        DataError: the file is missing, of another kind, or cannot be read or run; later, that its features are no numbers.
    """
    path = storage_path(config.encoder)
    if not path.is_file():
        raise DataError(f"`audit.copies.encoder` must name a file, but {config.encoder!r} does not exist; correct the path")
    with local_copy(path) as local:
        run = _onnx(local) if path.suffix == ".onnx" else _torchscript(local, device)

    def encode(images: Tensor) -> Tensor:
        try:
            return _checked(_in_batches(lambda batch: _flat(run(_prepare(batch, config))), images), path)
        except RuntimeError as error:  # what TorchScript and onnxruntime raise for inputs they cannot take
            raise DataError(
                f"`audit.copies.encoder`: {path} does not take float32 {list(_prepare(images[:1], config).shape)}: "
                f"{str(error).splitlines()[-1]}; set audit.copies.encoder_size to the side it was made for"
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
            f"`audit.copies.encoder` must return finite features, but {path} gave NaN or infinity; check audit.copies.encoder_normalisation"
        )
    return features


def _in_batches(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([encode(batch).float() for batch in images.split(BATCH)])


def _prepare(images: Tensor, config: CopiesConfig) -> Tensor:
    inputs = (images.float() / 255).expand(-1, 3, -1, -1)
    if config.encoder_size:
        inputs = functional.interpolate(inputs, size=[config.encoder_size] * 2, mode="bilinear", antialias=True)
    if config.encoder_normalisation == "imagenet":
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        inputs = (inputs - mean) / std
    return inputs.contiguous()


def _torchscript(path: Path, device: torch.device) -> Encoder:
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"`audit.copies.encoder` must be a TorchScript or ONNX file, but {path} cannot be read as one; "
            "save the network with torch.jit.save or torch.onnx.export"
        ) from error
    return lambda inputs: module(inputs)


def _onnx(path: Path) -> Encoder:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    # None of them is a RuntimeError, and they share no other base than Exception.
    unreadable = (
        ort.Fail,
        ort.InvalidArgument,
        ort.InvalidGraph,
        ort.InvalidProtobuf,
        ort.NotImplemented,
        ort.RuntimeException,
    )
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except unreadable as error:
        raise DataError(
            f"`audit.copies.encoder` must be a TorchScript or ONNX file, but {path} is not valid ONNX; export it again"
        ) from error
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: inputs.cpu().numpy()})[0]).to(inputs.device)
        except (ort.Fail, ort.InvalidArgument, ort.NotImplemented, ort.RuntimeException) as error:
            raise RuntimeError(str(error)) from error

    return run
