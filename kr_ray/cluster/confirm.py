"""A choice that is more than noise: the tuning's finalists and the defaults, trained again with fresh seeds.

The best of many trials is partly the luckiest (a winner's curse): its own score says too much. Here it counts
for nothing but a place among the finalists; what decides is the mean of new students.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kr_ray.cluster.search import TrialOutcome
from kr_ray.cluster.trials import StudentWork, train_students
from kr_ray.compute.seeding import derive_seed
from kr_ray.runs.figures import Confirmed, ConfirmedRow, Decision

DEFAULTS = -1
"""The trial number of the default generation parameters."""


def cas_error(cas: float, images: int) -> float:
    """Standard error of a CAS counted on so many validation images
    (binomial); another seed's change comes on top."""
    return math.sqrt(cas * (1 - cas) / images)


def difference_error(left: float, right: float, images: int) -> float:
    """Standard error of the difference of two CAS on the same images, at most.

    Where two students agree on an image, right or wrong, it drops out of
    the difference; how often is unknown here.
    """
    return math.hypot(cas_error(left, images), cas_error(right, images))


def decide(found: Mapping[int, Sequence[float]], images: int) -> Decision:
    """Whether a finalist beats the defaults by more than the standard error of the difference.

    Args:
        found: by trial number (`DEFAULTS` among them), the CAS of two students or
            more, of the same seeds in the same order.
        images: that each CAS was counted on.
    """
    means = {trial: statistics.fmean(values) for trial, values in found.items()}
    best = max((trial for trial in found if trial != DEFAULTS), key=lambda trial: (means[trial], -trial))
    pairs = [own - default for own, default in zip(found[best], found[DEFAULTS], strict=True)]
    by_seed = statistics.stdev(pairs) / math.sqrt(len(pairs))
    gain, error = (
        means[best] - means[DEFAULTS],
        math.hypot(by_seed, difference_error(means[best], means[DEFAULTS], images)),
    )
    return Decision(trial=best, gain=gain, standard_error=error, winner=best if gain > error else DEFAULTS)


def confirm(
    outcomes: Sequence[TrialOutcome], shared: StudentWork, *, finalists: int, seeds: int, images: int
) -> Confirmed:
    """Train the best `finalists` complete trials and the defaults
    again, each with `seeds` seeds that no trial had.

    Args:
        shared: the trials' common part, with the default generation
            parameters; students are kept in its folder.
        images: in the validation split.
    """
    rungs = shared.ticks.count
    complete = [outcome for outcome in outcomes if outcome.state == "complete"]
    ranked = sorted(complete, key=lambda outcome: (-outcome.history[rungs], outcome.number))[:finalists]
    candidates: dict[int, dict[str, float]] = {outcome.number: outcome.params for outcome in ranked}
    candidates[DEFAULTS] = shared.spec.synthesis.values(ranked[0].params)
    works = {
        (trial, k): _student(shared, trial, params, k)
        for trial, params in candidates.items()
        for k in range(seeds)
    }
    cas = dict(zip(works, train_students(list(works.values()), shared.folder, shared.cluster), strict=True))
    found = {trial: [cas[trial, k] for k in range(seeds)] for trial in candidates}
    rows = [
        candidates[trial]
        | {
            "trial": trial,
            "val_cas": values,
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values),
        }
        for trial, values in found.items()
    ]
    decided = decide(found, images).model_dump()
    return Confirmed(**decided, rows=[ConfirmedRow.model_validate(row) for row in rows])


def _student(shared: StudentWork, trial: int, params: Mapping[str, float], k: int) -> StudentWork:
    """The k-th student of a candidate, judged at its end; all candidates' k-th students have one seed."""
    synthesis = shared.spec.synthesis.with_values(params)
    spec = replace(shared.spec, synthesis=synthesis, seed=derive_seed(shared.spec.seed, "confirm", k))
    name = f"confirm_{'defaults' if trial == DEFAULTS else f'{trial:04d}'}_seed{k}"
    ticks = replace(shared.ticks, validated=(shared.ticks.count,))
    return replace(shared, folder=shared.folder / "trials" / name, spec=spec, ticks=ticks)
