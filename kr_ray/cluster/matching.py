"""Methods tuned to equal accuracy on Ray: a task per method, whose trainings follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kr_ray.audits.matching import matched, next_value, standard_error
from kr_ray.cluster.tasks import run_tasks
from kr_ray.config import Config, MainKey
from kr_ray.config.file import with_overrides
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.methods.interface import Site, inputs_of, train_here
from kr_ray.methods.registry import method_of
from kr_ray.runs.artifacts import RunDirectory, fingerprint, read_own_json, write_json
from kr_ray.runs.figures import Matched, Tried
from kr_ray.runs.locks import lock_file
from kr_ray.runs.progress import report_progress
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.storage import remove_tree
from kr_ray.synthesis.student_set import StudentSpec

TRIED_FILE = "tried.json"


def main_key_settings(name: str, key: MainKey, value: float) -> list[str]:
    """Overrides of a configuration that give the method's main key this value."""
    given = int(value) if key.whole else value
    return [f"students.{name}.{key.name}={given!r}", *(f"students.{name}.{k}=null" for k in key.excludes)]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What all searches of a run share.

    Attributes:
        run: the run directory, whose whole training split is trained on.
        folder: of the stage; every method gets a folder in it.
        student: of the run, for methods of its generator.
        target: validation accuracy.
        digest: of the run's data.
    """

    run: Path
    folder: Path
    config: Config
    student: StudentSpec
    target: float
    digest: str

    def search(self, name: str, key: MainKey) -> Matched:
        """Tune one method; a killed search goes on, and trainings of an earlier one are found again."""
        folder, tried = self.folder / name, list[Tried]()
        with lock_file(self.folder / f"{name}.lock", timeout=120):
            while (value := next_value(key, self.target, tried, self.most)) is not None:
                tried.append(self._try(name, key, value, len(tried)))
            for path in folder.iterdir():  # real images and models stay in no more places than needed
                if path.name != TRIED_FILE:
                    remove_tree(path) if path.is_dir() else path.unlink()
        report_progress(self.folder, name, 1.0, f"{name}: done")
        return matched(key, self.target, tried)

    @property
    def most(self) -> int:
        return self.config.frontier.match_trainings

    def _try(self, name: str, key: MainKey, value: float, done: int) -> Tried:
        config = with_overrides(self.config, main_key_settings(name, key, value))
        site = Site(path=self.folder / name, config=config, seed=config.seed, student=self.student)
        parts = method_of(name, config).parts(site, f"student_{name}")
        file = site.path / TRIED_FILE
        stamp = fingerprint(self.digest, site.seed, inputs_of(parts), config.cluster.trial.threads)
        if (known := read_own_json(file).get(stamp)) is not None:
            return Tried.model_validate(known)

        def tell(what: str) -> None:
            note = f"{name}, {key.name} {value:g}: {what}"
            report_progress(self.folder, name, done / self.most, note)

        splits = load_stored_splits(self.run / SPLITS_FILE)
        save_splits(site.path / SPLITS_FILE, splits)
        try:
            train_here(site, parts, self.digest, tell)
            found = RunDirectory(site.path).latest(parts[-1].name)
            accuracy = ClassifierResult.model_validate(found).val_accuracy
        except FloatingPointError:  # nothing was learnt at this value, which is an answer, too
            accuracy = 0.0
        error = standard_error(accuracy, len(splits.validation))
        tried = Tried(value=value, accuracy=accuracy, error=error)
        write_json(file, read_own_json(file) | {stamp: tried.model_dump(mode="json")})
        return tried


def match_methods(matching: Matching, keys: Mapping[str, MainKey]) -> dict[str, Matched]:
    """Tune every method of `keys` to the accuracy, as many at a time as the cluster has room for."""
    cluster = matching.config.cluster
    work = [(matching, name, key) for name, key in keys.items()]
    done = run_tasks("matching", Matching.search, work, cluster.trial, cluster.max_retries)
    return dict(zip(keys, done, strict=True))
