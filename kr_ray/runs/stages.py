"""How a piece of work is done in a run's directory: once per
fingerprint of its inputs, resumably, with a typed result.

The pipeline's stages and the parts that the worst-case audit trains again are run by the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from kr_ray.runs.artifacts import ArtifactError, RunDirectory
from kr_ray.runs.artifacts import State as State
from kr_ray.runs.results import R

STATE_FILE = "state.pt"
RESULT_FILE = "result.json"
WEIGHTS_FILE = "weights.safetensors"
SAMPLES_FILE = "samples.npy"
"""Of the copies stage: generated images of the first classes, for the report: uint8 [classes, n, C, H, W]."""

Row = dict[str, float]
"""The figures of one tick of a training, `share` (of the whole schedule) among them."""
Save = Callable[[State, Row], None]
"""Keeps a state from which the work can go on, and publishes the tick's figures."""


def found(directory: RunDirectory, name: str, stamp: str, kind: type[R]) -> R | None:
    """The result of the work `name` if it was finished on the inputs that `stamp` names.

    Raises:
        ArtifactError: its file is not what the work writes.
    """
    kept = directory.result(name, stamp)
    if kept is None:
        return None
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise ArtifactError(
            f"{directory / name / 'done.json'} does not hold a result of {name} "
            f"({error.errors()[0]['msg']}); delete that file and run the same command again"
        ) from error


def done_once(
    directory: RunDirectory,
    name: str,
    stamp: str,
    kind: type[R],
    work: Callable[[Path], R],
    attempt: str = "",
) -> tuple[R, bool]:
    """Do `work` in the folder `name` unless it is done there on the same
    inputs; a killed attempt's files are still there.

    Args:
        attempt: names the inputs that the files of an attempt belong to, where that is not `stamp`.

    Returns:
        The result, and whether it stood already.
    """
    if (kept := found(directory, name, stamp, kind)) is not None:
        return kept, True
    result = work(directory.begin(name, attempt or stamp))
    directory.finish(name, stamp, result.model_dump(mode="json", by_alias=True))
    return result, False
