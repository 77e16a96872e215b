"""SweptCheckpoint optimisation (section 3.4) and tuning (3.5) on Ray Tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from kr_ray.classifiers.ticks import Ticks
from kr_ray.cluster.confirm import DEFAULTS, confirm, difference_error
from kr_ray.cluster.hyperband import hyperband_brackets
from kr_ray.cluster.pools import draw_pools
from kr_ray.cluster.search import TrialOutcome, run_tuning
from kr_ray.cluster.trials import (
    StudentWork,
    TuningTrial,
    read_history,
    train_students,
    trial_folder,
    trial_resources,
)
from kr_ray.config import CheckpointsConfig, Config
from kr_ray.dp.scores import NoisyScores
from kr_ray.runs.comparisons import SearchCost
from kr_ray.runs.figures import Best, SweptCheckpoint, Trial
from kr_ray.runs.results import SweepResult, TuningResult
from kr_ray.synthesis.student_set import StudentSpec

SWEEP_TICKS = Ticks(count=5, validated=(5,))
"""A sweep student is judged once, at its end; the ticks in between only bound what a kill can lose."""


def sweep_checkpoints(
    run: Path,
    folder: Path,
    checkpoint_epochs: Sequence[int],
    config: Config,
    scores: NoisyScores | None = None,
) -> list[SweptCheckpoint]:
    """Validation CAS per checkpoint, each with the schedule length (epochs) it was measured at.

    `exhaustive` (the paper) trains every student for the whole schedule. `halving` first tries all
    checkpoints on short but complete schedules (a truncated cosine would rank by what the rate has not yet
    annealed), and gives the whole schedule to the best of them. It cuts once: short schedules tell bad
    checkpoints from good ones, but hardly order the good ones (kr_ray/bench/README.md), and what rounds in
    between would cost tries more of them in earnest.
    """
    found: dict[int, tuple[int, float]] = {}
    for epochs, count in sweep_rounds(config.checkpoints, len(checkpoint_epochs)):
        ranked = sorted(checkpoint_epochs, key=lambda epoch: (-found.get(epoch, (0, 0.0))[1], epoch))
        checkpoint_epochs = sorted(ranked[:count])
        works = [_sweep_student(run, folder, epoch, epochs, config, scores) for epoch in checkpoint_epochs]
        cas = train_students(works, folder, config.cluster)
        found |= {epoch: (epochs, value) for epoch, value in zip(checkpoint_epochs, cas, strict=True)}
    return [
        SweptCheckpoint(epoch=epoch, epochs=epochs, val_cas=cas)
        for epoch, (epochs, cas) in sorted(found.items())
    ]


def sweep_rounds(sweep: CheckpointsConfig, checkpoints: int) -> list[tuple[int, int]]:
    """Epochs and number of students of each round: one round for `exhaustive`,
    and where `halving` would save nothing; else two."""
    whole = sweep.epochs
    short = max(1, round(whole / sweep.shortening))
    stay = max(1, math.floor(checkpoints * (sweep.budget - short / whole) + 1e-9))
    if sweep.search == "exhaustive" or checkpoints * short + stay * whole >= checkpoints * whole:
        return [(whole, checkpoints)]
    return [(short, checkpoints), (whole, stay)]


def selection_scores(config: Config) -> dict[str, int]:
    """Validation scores that a run's sweep and tuning make, at most, by stage."""
    tuning, checkpoints = config.tuning, config.generator.epochs // config.generator.checkpoint_every
    swept = sum(students for _, students in sweep_rounds(config.checkpoints, checkpoints))
    brackets = hyperband_brackets(tuning.trials, tuning.rungs, tuning.reduction_factor)
    judged = sum(trials for bracket in brackets for trials, _ in bracket.rungs)
    defaults = int(tuning.epochs != config.checkpoints.epochs)
    return {"checkpoints": swept, "tuning": judged + defaults + tuning.confirmed_students}


def _sweep_student(
    run: Path,
    folder: Path,
    checkpoint: int,
    epochs: int,
    config: Config,
    scores: NoisyScores | None = None,
) -> StudentWork:
    name = f"checkpoint_{checkpoint:04d}" + (
        f"_{epochs}_epochs" if epochs != config.checkpoints.epochs else ""
    )
    spec = StudentSpec(config.generator, checkpoint, config.synthesis, epochs, config.seed)
    folder = folder / "trials" / name
    return StudentWork(run, folder, spec, config.classifier, SWEEP_TICKS, config.cluster, scores)


def best_checkpoint(swept: Sequence[SweptCheckpoint]) -> SweptCheckpoint:
    """The row of the best validation CAS among those of the longest schedule; of equals, the earliest."""
    return max(swept, key=lambda row: (row.epochs, row.val_cas, -row.epoch))


def sweep_cost(run: Path, folder: Path, swept: Sequence[SweptCheckpoint], config: Config) -> SearchCost:
    """Whom a sweep found, and what it took."""
    lengths = [epochs for epochs, _ in sweep_rounds(config.checkpoints, len(swept))]
    students = [
        _sweep_student(run, folder, row.epoch, epochs, config)
        for row in swept
        for epochs in lengths
        if epochs <= row.epochs
    ]
    histories, best = [student.history() for student in students], best_checkpoint(swept)
    return SearchCost(
        epoch=best.epoch,
        val_cas=best.val_cas,
        students=len(students),
        images_seen=sum(rows[-1]["images_seen"] for rows in histories),
        seconds=sum(row["seconds"] for rows in histories for row in rows),
    )


def tune_generation(
    run: Path,
    folder: Path,
    sweep: SweepResult,
    config: Config,
    validation_images: int,
    scores: NoisyScores | None = None,
) -> TuningResult:
    """The best generation parameters (`tuning.space`) of the best
    checkpoint, and what they gain over the defaults."""
    tuning, kinds = config.tuning, config.synthesis.searchable()
    # Passes of real size: the resource is then images seen, and trials of
    # different scale are compared at equal work.
    synthesis = config.synthesis.model_copy(update={"epoch_unit": "real"})
    spec = StudentSpec(config.generator, sweep.best_epoch, synthesis, tuning.epochs, config.seed)
    shared = StudentWork(run, folder, spec, config.classifier, Ticks(tuning.rungs), config.cluster, scores)
    draw_pools(run, [spec], folder, config.cluster)  # trials that draw otherwise draw their own
    brackets = hyperband_brackets(tuning.trials, tuning.rungs, tuning.reduction_factor)
    judged = [tuple(rung for _, rung in bracket.rungs) for bracket in brackets for _ in bracket.trials]
    outcomes = run_tuning(
        TuningTrial,
        tuning,
        {name: kinds[name] for name in tuning.space},
        {"shared": shared, "judged": judged},
        seed=config.seed,
        stage_dir=folder,
        resources=trial_resources(config.cluster),
        max_retries=config.cluster.max_retries,
        brackets_in_flight=tuning.brackets_in_flight,
    )
    best = max(
        (o for o in outcomes if o.state == "complete"), key=lambda o: (o.history[tuning.rungs], -o.number)
    )
    best_cas, default_cas = best.history[tuning.rungs], _default_cas(run, folder, sweep, config, scores)
    defaults = config.synthesis.values(tuning.space)
    # The defaults are a candidate too: a search that found nothing better must not make the student worse.
    chosen, confirmed = best.params if best_cas >= default_cas else defaults, None
    if tuning.confirm:
        confirmed = confirm(
            outcomes, shared, finalists=tuning.finalists, seeds=tuning.confirm, images=validation_images
        )
        chosen = defaults if confirmed.winner == DEFAULTS else outcomes[confirmed.winner].params
    seen, unpruned = _images_seen(folder, outcomes, tuning.rungs)
    return TuningResult(
        searcher=tuning.searcher,
        trials=len(outcomes),
        best=Best.model_validate(best.params | {"val_cas": best_cas, "trial": best.number}),
        default_cas=default_cas,
        delta_cas=best_cas - default_cas,
        delta_error=difference_error(best_cas, default_cas, validation_images),
        confirmed=confirmed,
        chosen=chosen,
        history=[_trial(outcome) for outcome in outcomes],
        images_seen=round(seen),
        images_unpruned=round(unpruned),
        saved_share=1 - seen / max(unpruned, 1),
    )


def _trial(outcome: TrialOutcome) -> Trial:
    figures = {
        "trial": outcome.number,
        "val_cas": outcome.history.get(outcome.resource),
        "state": outcome.state,
    }
    return Trial.model_validate(outcome.params | figures | {"resource": outcome.resource})


def _images_seen(folder: Path, outcomes: Sequence[TrialOutcome], rungs: int) -> tuple[float, float]:
    """Images that the trials were trained on, and what they would have been without pruning."""
    histories = [read_history(trial_folder(folder, outcome.number)) for outcome in outcomes]
    seen = sum(rows[-1]["images_seen"] for rows in histories)
    return seen, sum(rows[-1]["images_seen"] * rungs / len(rows) for rows in histories)


def _default_cas(
    run: Path, folder: Path, sweep: SweepResult, config: Config, scores: NoisyScores | None
) -> float:
    """Validation CAS of the best checkpoint at the default parameters and the tuning's budget."""
    if config.tuning.epochs == config.checkpoints.epochs:
        return sweep.best_cas  # it is the same student, bit for bit
    spec = StudentSpec(
        config.generator, sweep.best_epoch, config.synthesis, config.tuning.epochs, config.seed
    )
    folder = folder / "trials" / "defaults"
    work = StudentWork(run, folder, spec, config.classifier, SWEEP_TICKS, config.cluster, scores)
    return train_students([work], folder.parent.parent, config.cluster)[0]
