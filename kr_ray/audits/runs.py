"""The runs of the worst-case audit: each is trained on its own splits,
asked about all audit samples, and forgotten."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kr_ray.audits.design import AuditDesign
from kr_ray.audits.handed_on import SetScores, set_scores
from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.predict import accuracy, predict_logits
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig, ClusterConfig, Config
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.methods.interface import HandsOnGenerator, HandsOnImages, Part, Site, Tell, inputs_of, train_here
from kr_ray.methods.registry import method_of
from kr_ray.methods.taken import load_taken
from kr_ray.runs.artifacts import READ_ERRORS, atomic_write, fingerprint, is_damage, load_arrays
from kr_ray.runs.locks import lock_file
from kr_ray.runs.stages import WEIGHTS_FILE
from kr_ray.runs.storage import remove_tree
from kr_ray.synthesis.student_set import StudentSpec

# --- queries ------------------------------------------------------------------------------------------------


def query_offsets(recipe: ClassifierConfig, most: int) -> list[tuple[bool, int, int]]:
    """What a model is asked for each sample: (mirrored, rows down, columns right), the unaltered image first.

    The mirror image if training mirrors, and shifts by the training's crop padding to the eight sides: at
    most 2 x 9 = 18 queries, those of Aerni et al. (2024), the nearest first.
    """
    flips = (False, True) if recipe.horizontal_flip else (False,)
    steps = (0, -recipe.crop_padding, recipe.crop_padding) if recipe.crop_padding else (0,)
    shifts = sorted(itertools.product(steps, steps), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    return [(flip, down, right) for down, right in shifts for flip in flips][:most]


def query_images(images: Tensor, offset: tuple[bool, int, int]) -> Tensor:
    """`images` (uint8 [N, C, H, W]) as one query shows them; shifts
    bring in black, as the crops in training do."""
    flip, down, right = offset
    height, width = images.shape[-2:]
    pad = max(abs(down), abs(right))
    padded = nn.functional.pad(images, (pad,) * 4)
    shifted = padded[..., pad - down : pad - down + height, pad - right : pad - right + width]
    return shifted.flip(-1) if flip else shifted


# --- scores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunScores:
    """What the model of one arm in one run answers.

    Attributes:
        samples: float32 [C + P, queries, K], logits on the canaries, then on the population.
        reference: float32 [R, K], logits on the reference images.
        test_accuracy: on the whole test split, in [0, 1].
        seconds: it took to train and to ask it, without what earlier arms of the run had left for it.
        taken: of a method that took some training images for itself (see kr_ray.methods.taken), which samples
            are among them: bool [C + P].
    """

    samples: NDArray[np.float32]
    reference: NDArray[np.float32]
    test_accuracy: float
    seconds: float
    taken: NDArray[np.bool_] | None = None

    def save(self, path: Path, stamp: str) -> None:
        """Write atomically; `stamp` names the inputs."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, stamp=np.array(stamp), **arrays)

    @classmethod
    def load(cls, path: Path, stamp: str) -> RunScores | None:
        """The scores at `path` if they are whole and were made of the
        inputs that `stamp` names, else None."""
        if not path.exists():
            return None
        try:
            found = load_arrays(path)
            if str(found["stamp"]) != stamp:
                return None
            figures = float(found["test_accuracy"]), float(found["seconds"])
            return cls(found["samples"], found["reference"], *figures, found.get("taken"))
        except READ_ERRORS as error:
            if not is_damage(error, path):
                raise
            return None


def _nobody_asks(what: str) -> None:
    """For runs that are looked up and not trained."""


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What all runs of an audit share.

    Attributes:
        run: the audited run directory.
        folder: where the runs' own directories are, `runs/<number>`.
        student: checkpoint, generation parameters and length of the audited run's student.
        digest: of the audited run's data.
    """

    run: Path
    folder: Path
    config: Config
    student: StudentSpec
    design: AuditDesign
    digest: str

    @property
    def arms(self) -> tuple[str, ...]:
        return self.config.audit.worst_case.arms

    def site(self, number: int) -> Site:
        """The miniature run directory of run `number`; its seed differs from run to
        run, as a shadow model differs from its target."""
        seed = derive_seed(self.config.seed, "audit run", number)
        student = replace(self.student, seed=derive_seed(seed, "student"))
        path = self.folder / "runs" / str(number)
        return Site(
            path=path,
            config=self.config,
            seed=seed,
            student=student,
            audited=self.run,
            canaries=self.design.canaries_of_run(number),
        )

    def parts(self, number: int, arm: str) -> Sequence[Part[Any]]:
        """What is trained in run `number` for an arm; parts of one name and inputs are shared by its arms."""
        last = arm if arm == "teacher" else f"student_{arm}"
        return method_of(arm, self.config).parts(self.site(number), last)

    def data_stamp(self, number: int) -> str:
        """Of all that decides the run's splits."""
        design = self.design
        parts = (design.canaries, design.given_labels, design.population, design.members_of(number))
        usual, threads = ClusterConfig().trial.threads, self.config.cluster.trial.threads
        return fingerprint(
            self.digest, [part.tolist() for part in parts], *([threads] if threads != usual else [])
        )

    def scores(self, number: int, arm: str) -> RunScores | None:
        """What the arm answered in this run, if it has been trained on just these inputs."""
        return RunScores.load(self.scores_file(number, arm), self._stamp(number, arm))

    def scores_file(self, number: int, arm: str) -> Path:
        return self.folder / "runs" / str(number) / f"scores_{arm}.npz"

    def set_scores(self, number: int, arm: str) -> SetScores | None:
        """What the images that the arm hands on say; None of a method without any, or of runs made before
        sets were attacked."""
        return SetScores.load(self._set_file(number, arm), self._stamp(number, arm))

    def _set_file(self, number: int, arm: str) -> Path:
        return self.folder / "runs" / str(number) / f"set_{arm}.npz"

    def _stamp(self, number: int, arm: str) -> str:
        asked = [
            self.design.reference.tolist(),
            query_offsets(self.config.classifier, self.config.audit.worst_case.queries),
        ]
        inputs = inputs_of(self.parts(number, arm))
        return fingerprint(self.data_stamp(number), self.site(number).seed, arm, asked, inputs)

    def missing(self, number: int) -> list[str]:
        return [arm for arm in self.arms if self.scores(number, arm) is None]

    def train(self, number: int, tell: Callable[[float, str], None]) -> None:
        """Train and score the arms of run `number` that have no scores yet;
        then only the scores stay, unless `keep_models`.

        Args:
            tell: is told the share of arms done and what is being trained.
        """
        splits, folder = load_stored_splits(self.run / SPLITS_FILE), self.folder / "runs"
        # A worker whose driver was killed lives on for a moment: the next one waits until it has let go.
        with lock_file(folder / f"{number}.lock", timeout=120):
            missing = self.missing(number)
            save_splits(folder / str(number) / SPLITS_FILE, self.design.splits_of_run(splits, number))
            for arm in missing:
                share = (len(self.arms) - len(missing) + missing.index(arm)) / len(self.arms)
                scores = self._train_and_ask(number, arm, splits, partial(tell, share))
                scores.save(self.scores_file(number, arm), self._stamp(number, arm))
            self._tidy(number)

    def _train_and_ask(self, number: int, arm: str, splits: Splits, tell: Tell) -> RunScores:
        """Train one arm and ask it all that an attacker asks: audit samples
        with their queries, reference and test images."""
        started, recipe, device = time.perf_counter(), self.config.classifier, pick_device()
        folder = train_here(self.site(number), self.parts(number, arm), self.data_stamp(number), tell)
        self._attack_images(number, arm, splits)
        model = load_classifier(folder / WEIGHTS_FILE, device)
        asked = splits.train.images[torch.from_numpy(self.design.samples)]
        offsets = query_offsets(recipe, self.config.audit.worst_case.queries)
        answers = [predict_logits(model, query_images(asked, offset), device).numpy() for offset in offsets]
        on_test = predict_logits(model, splits.test.images, device)
        taken = load_taken(folder)
        return RunScores(
            samples=np.stack(answers, axis=1),
            reference=on_test.numpy()[self.design.reference],
            test_accuracy=accuracy(on_test, splits.test.labels),
            seconds=time.perf_counter() - started,
            taken=None if taken is None else self.design.samples_among(taken, number, len(splits.train)),
        )

    def _attack_images(self, number: int, arm: str, splits: Splits) -> None:
        """Of a method that hands on images: keep what they say of the audit samples."""
        method, design = method_of(arm, self.config), self.design
        if not isinstance(method, HandsOnImages):
            return
        handed = method.handed_on(self.site(number), self.parts(number, arm)[-1].name)
        true = splits.train.labels[torch.from_numpy(design.population)]
        labels = torch.cat([torch.from_numpy(design.given_labels), true])
        images = splits.train.images[torch.from_numpy(design.samples)]
        site = self.site(number)
        known = method.knows(site, images, labels) if isinstance(method, HandsOnGenerator) else None
        found = set_scores(handed, images, labels, known)
        found.save(self._set_file(number, arm), self._stamp(number, arm))

    def _tidy(self, number: int) -> None:
        """Real images never stay in more places than needed; models stay if asked for."""
        for path in (self.folder / "runs" / str(number)).iterdir():
            scores = path.name.startswith(("scores_", "set_"))
            if path.name == SPLITS_FILE.parts[0] or not (scores or self.config.audit.worst_case.keep_models):
                remove_tree(path) if path.is_dir() else path.unlink()
