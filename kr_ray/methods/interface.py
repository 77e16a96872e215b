"""A way of making a classifier from private images is a list of parts:
resumable trainings, each with a typed result.

The same part is run in the run directory, by Ray Train, as a stage of the pipeline, and in a miniature
directory, in its own process, as part of one run of the worst-case audit. So an audited method cannot drift
from the one that is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, runtime_checkable

from torch import Tensor

from kr_ray.config import Config, Section
from kr_ray.runs.artifacts import RunDirectory, fingerprint, load_state, save_state
from kr_ray.runs.results import ClassifierResult, R
from kr_ray.runs.stages import STATE_FILE, Row, Save, State, done_once
from kr_ray.synthesis.student_set import OpenSet, StudentSpec, on_device

Tell = Callable[[str], None]
"""Says what is being done, to the person who waits."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where parts are trained: a run's own directory, or a miniature one of the audit.

    Attributes:
        path: of the directory that holds the real splits that are trained on, and receives a folder per part.
        config: of the run, or of the audited run.
        seed: of all that is trained here.
        student: checkpoint, generation parameters and length of the run's student.
        audited: the run that is audited, for what a method takes over from
            it unchanged; None in the run itself.
        open_set: where students' images are made.
        canaries: of a run of the audit: the positions in its training split of the canaries that are there.
    """

    path: Path
    config: Config
    seed: int
    student: StudentSpec
    audited: Path | None = None
    open_set: OpenSet = on_device
    canaries: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part(Generic[R]):
    """One resumable training of a method.

    Attributes:
        name: of its folder in the site's directory, and of the stage that it is in a run.
        inputs: all that decides its result beside the site's data and seed and the
            parts before it: sections and JSON values.
        after: parts (and `data`) that must be finished first.
        work: trains in the given folder from a state (None: from the start), hands every new state to `save`,
            and leaves its files in the folder. Returns the result in the first worker, None in the others.
        costs: a stage of the run, and the share of its time that this part takes; None: not known beforehand.
    """

    name: str
    inputs: Sequence[Section | Any]
    after: Sequence[str] = ("data",)
    result: type[R]
    work: Callable[[Path, State | None, Save], R | None]
    costs: tuple[str, float] | None = None


class Method(Protocol):
    """A way of making a classifier; the last part's folder holds the weights that an attacker would query."""

    @property
    def title(self) -> str:
        """In the report's tables."""
        ...

    @property
    def note(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def takes_over(self) -> Sequence[str]:
        """Stages of the audited run whose artefacts it uses unchanged in every run of an audit."""
        ...

    def parts(self, site: Site, name: str) -> Sequence[Part[Any]]:
        """In the order in which they are trained. `name` is that of
        the last part, a `Part[ClassifierResult]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class HandedOn:
    """Images that leave the house beside a classifier, or may.

    Attributes:
        images: uint8 [N, C, S, S]; labels: int64 [N], of the class that each was made or taken for.
        set_size: the first so many are the set; those after it are further samples of its generator, if any.
    """

    images: Tensor
    labels: Tensor
    set_size: int


@runtime_checkable
class HandsOnImages(Protocol):
    """A method with a set of images of its own; the worst-case audit then attacks that set, too."""

    def handed_on(self, site: Site, name: str) -> HandedOn:
        """After the parts of `name` have been trained in the site."""
        ...


@runtime_checkable
class HandsOnGenerator(Protocol):
    """A method with a generator of its own, whose weights may say how well they know an image."""

    def knows(self, site: Site, images: Tensor, labels: Tensor) -> Tensor | None:
        """Of uint8 [N, C, S, S] images and int64 [N] labels: float64 [N], higher = better known; None of
        generators that do not say (see kr_ray.generators.interface.Judge)."""
        ...


def train_here(site: Site, parts: Sequence[Part[Any]], stamp: str, tell: Tell) -> Path:
    """Train parts in this process, each unless it is done on the same inputs; returns the last one's folder.

    Args:
        stamp: of the site's data.
        tell: is told the part and its share done.
    """
    directory, prints = RunDirectory(site.path), {"data": stamp}
    for part in parts:
        before = {name: prints[name] for name in part.after}
        prints[part.name] = fingerprint(stamp, site.seed, inputs_of([part]), before)
        done_once(directory, part.name, prints[part.name], part.result, partial(_train_here, part, tell))
    return site.path / parts[-1].name


def _train_here(part: Part[R], tell: Tell, folder: Path) -> R:
    def save(state: State, row: Row) -> None:
        save_state(folder / STATE_FILE, state)
        tell(f"{part.name} {row['share']:.0%}")

    result = part.work(folder, load_state(folder / STATE_FILE), save)
    assert result is not None, "this process is the only worker"
    (folder / STATE_FILE).unlink(missing_ok=True)
    return result


def inputs_of(parts: Sequence[Part[Any]]) -> list[Any]:
    """What decides the method's classifier beside data and seed: its parts' inputs, as JSON values."""
    return [item.stamp() if isinstance(item, Section) else item for part in parts for item in part.inputs]


ClassifierPart = Part[ClassifierResult]
