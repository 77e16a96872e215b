"""ONNX files in onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kr_ray.foreign.files import decoding, reason
from kr_ray.silence import stay_silent


class OnnxRunError(RuntimeError):
    """A model does not take the inputs that it was given, or fails on them; in onnxruntime's words."""


class OnnxModel:
    """A loaded model.

    Attributes:
        inputs: (name, type such as "tensor(uint8)", sides, of which unknown ones are None) of each.
        outputs: their names.
        metadata: what its maker wrote beside it.

    Raises:
        error: no regular file, or not a model that onnxruntime can load.
    """

    def __init__(self, path: Path, must: str, error: type[Exception], remedy: str) -> None:
        stay_silent()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        self._errors = _errors()
        with decoding(path, must, ("other",), error, remedy, also=self._errors):
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.inputs = [
                (item.name, str(item.type), _sides(item.shape)) for item in self._session.get_inputs()
            ]
            self.outputs = [item.name for item in self._session.get_outputs()]
            self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, outputs: list[str], inputs: dict[str, NDArray[Any]]) -> list[Any]:
        """Arrays of the named outputs.

        Raises:
            OnnxRunError: the model refuses the inputs or fails.
        """
        refused: tuple[type[Exception], ...] = (*self._errors, ValueError, RuntimeError)
        try:
            found: list[Any] = self._session.run(outputs, inputs)
        except refused as error:
            raise OnnxRunError(reason(error)) from error
        return found


def _sides(shape: Any) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)


def _errors() -> tuple[type[Exception], ...]:
    """onnxruntime's own errors, which share no base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(
        kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
    )
