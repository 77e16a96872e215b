"""The tuning stage on Ray Tune: TPE asks, Hyperband stops, and the same seed always gives the same study.

Parallel ask and tell make TPE depend on which trial happens to end first. Here a searcher is told results,
and asked for more, only at the borders of Hyperband's brackets, in trial order. As scores, suggestions and
decisions are then functions of (config, seed), a killed run needs no restored Tune: a fresh one replays it,
and each trial finds its earlier results by its number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from hyperopt import hp
from hyperopt.pyll import scope
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.tune.error import TuneError
from ray.tune.search import Searcher
from ray.tune.search.hyperopt import HyperOptSearch
from ray.tune.search.optuna import OptunaSearch

from kr_ray.cluster.hyperband import (
    METRIC,
    RESOURCE,
    TRIAL,
    Bracket,
    Reported,
    TrialKeys,
    build_scheduler,
    hyperband_brackets,
)
from kr_ray.cluster.quiet import in_a_line, killed_for_memory, quiet_tune
from kr_ray.cluster.runtime import ray_storage
from kr_ray.cluster.watched import TrialCounts, with_resources
from kr_ray.config import TuningConfig
from kr_ray.runs.progress import report_progress
from kr_ray.runs.storage import local_output, remove_tree

STUDY_NAME = "tuning"
"""`optuna.load_study(study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(study_path))))`
opens the study."""


class TuningError(RuntimeError):
    """A trial, or Tune itself, kept failing."""


@dataclass
class TrialOutcome:
    """What became of one trial.

    Attributes:
        number: from 0, in order of suggestion.
        params: by the names of `tuning.space`.
        state: `complete` if trained for all R units, `pruned` if Hyperband stopped it earlier.
        history: validation CAS, in [0, 1], by units of training done (1 to R).
    """

    number: int
    params: dict[str, float]
    state: Literal["running", "complete", "pruned", "error"] = "running"
    history: dict[int, float] = field(default_factory=dict)

    @property
    def resource(self) -> int:
        """Units of training done; 0 before the first report."""
        return max(self.history, default=0)


class PruningOptunaSearch(OptunaSearch):
    """OptunaSearch that tells a stopped trial as PRUNED.

    Ray's class tells it as COMPLETE: TPE would take a score after 1/9 of the training for a final one.
    """

    def __init__(self, max_resource: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_resource = max_resource

    def on_trial_complete(self, trial_id: str, result: Reported | None = None, error: bool = False) -> None:
        final = result if result and not error and result[RESOURCE] >= self._max_resource else None
        super().on_trial_complete(trial_id, final, error)


class BracketBarrier(Searcher):
    """Puts any searcher in step with Hyperband: no trial of a bracket is
    asked for before its predecessors' results are told.

    Adds the trial's number to the suggested parameters. With `in_flight` = L, bracket b sees the results of
    the brackets up to b - L: more trials run at a time, TPE learns later, and the study is another one, yet
    just as reproducible.
    """

    def __init__(
        self,
        inner: Searcher,
        brackets: list[Bracket],
        in_flight: int = 1,
        on_pruned: Callable[[TrialOutcome], None] = lambda outcome: None,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._on_pruned = on_pruned
        self.outcomes: list[TrialOutcome] = []
        # Not called `searcher`: Tune would look inside wrappers by that name and pickle what it finds.
        self._inner = inner
        self._brackets = brackets
        self._in_flight = in_flight
        self._told = 0
        self._trial_ids: list[str] = []

    def suggest(self, trial_id: str) -> TrialKeys | str | None:
        number = len(self.outcomes)
        failed = any(outcome.state == "error" for outcome in self.outcomes)
        if failed or number not in range(self._brackets[-1].trials.stop):
            return str(Searcher.FINISHED)
        bracket = next(i for i, bracket in enumerate(self._brackets) if number in bracket.trials)
        if not self._tell(bracket - self._in_flight + 1):
            return None  # Tune asks again later
        params = self._inner.suggest(trial_id)
        self._trial_ids.append(trial_id)
        self.outcomes.append(TrialOutcome(number, params))
        return {**params, TRIAL: number}

    def on_trial_result(self, trial_id: str, result: Reported) -> None:
        if METRIC in result:
            self._outcome(trial_id).history[result[RESOURCE]] = result[METRIC]

    def on_trial_complete(self, trial_id: str, result: Reported | None = None, error: bool = False) -> None:
        if result:  # Tune passes the result that made Hyperband stop the trial only to this function
            self.on_trial_result(trial_id, result)
        outcome = self._outcome(trial_id)
        full = outcome.resource >= self._brackets[0].rungs[-1][1]
        outcome.state = "error" if error else "complete" if full else "pruned"
        if outcome.state == "pruned":
            self._on_pruned(outcome)
        if len(self.outcomes) == self._brackets[-1].trials.stop:
            self._tell(len(self._brackets))

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: runs are replayed, not restored."""

    def _outcome(self, trial_id: str) -> TrialOutcome:
        return self.outcomes[self._trial_ids.index(trial_id)]

    def _tell(self, brackets: int) -> bool:
        """Tell the first `brackets` brackets, in trial order; False if some have not ended."""
        while self._told < brackets:
            numbers = self._brackets[self._told].trials
            if any(self.outcomes[n].state == "running" for n in numbers):
                return False
            for n in numbers:
                self._tell_trial(self._trial_ids[n], self.outcomes[n])
            self._told += 1
        return True

    def _tell_trial(self, trial_id: str, outcome: TrialOutcome) -> None:
        result: Reported | None = None
        for resource, cas in outcome.history.items():
            result = {
                METRIC: cas,
                RESOURCE: resource,
                "training_iteration": resource,
            }  # the step of Ray's OptunaSearch
            self._inner.on_trial_result(trial_id, result)
        self._inner.on_trial_complete(trial_id, result, error=outcome.state == "error")


Kinds = Mapping[str, type]
"""int or float, by the names of `tuning.space`."""


def build_search(
    config: TuningConfig,
    kinds: Kinds,
    seed: int,
    study_path: Path,
    brackets_in_flight: int = 1,
    stage_dir: Path | None = None,
) -> BracketBarrier:
    """The searcher of a tuning stage, whose folder is `stage_dir` (by default that of the study).

    `optuna` (TPE) and `random` keep an Optuna study with all parameters, intermediate values and states in
    the journal file `study_path`, which is started anew. `hyperopt` keeps none, and takes the last score of a
    pruned trial for its result: it knows no pruned trials.
    """
    if config.searcher == "hyperopt":
        inner = HyperOptSearch(
            _hyperopt_space(config, kinds),
            metric=METRIC,
            mode="max",
            n_initial_points=config.startup_trials,
            random_state_seed=seed % 2**32,
        )
    else:
        inner = _optuna_search(config, kinds, seed % 2**32, study_path)
    brackets = hyperband_brackets(config.trials, config.rungs, config.reduction_factor)
    stage = stage_dir or study_path.parent
    return BracketBarrier(inner, brackets, brackets_in_flight, lambda outcome: _report_pruned(stage, outcome))


def _report_pruned(stage: Path, outcome: TrialOutcome) -> None:
    """A pruned trial is finished work: it will report no more."""
    cas = outcome.history.get(outcome.resource)
    report_progress(
        stage, f"{outcome.number:04d}", 1.0, f"{outcome.number:04d}: pruned", cas=cas, pruned=True
    )


def _optuna_search(config: TuningConfig, kinds: Kinds, seed: int, study_path: Path) -> PruningOptunaSearch:
    study_path.parent.mkdir(parents=True, exist_ok=True)
    for stale in study_path.parent.glob(
        study_path.name + "*"
    ):  # also the lock of a killed run: Optuna would wait for it
        stale.unlink()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return PruningOptunaSearch(
            max_resource=config.rungs,
            space={
                name: FloatDistribution(*bounds)
                if kinds[name] is float
                else IntDistribution(*map(int, bounds))
                for name, bounds in config.space.items()
            },
            metric=METRIC,
            mode="max",
            # Trials of one bracket are suggested without results of each
            # other: the constant liar keeps them apart.
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=config.startup_trials, multivariate=True, constant_liar=True
            )
            if config.searcher == "optuna"
            else optuna.samplers.RandomSampler(seed=seed),
            storage=JournalStorage(JournalFileBackend(str(study_path))),
            study_name=STUDY_NAME,
        )
    finally:
        optuna.logging.set_verbosity(verbosity)


def _hyperopt_space(config: TuningConfig, kinds: Kinds) -> TrialKeys:
    space: TrialKeys = {}
    for name, (low, high) in config.space.items():
        if kinds[name] is float:
            space[name] = hp.uniform(name, low, high) if low < high else low
        else:
            # hp.uniformint rounds uniform(low, high): both bounds would come half as often as the others.
            space[name] = scope.int(hp.quniform(name, low - 0.49, high + 0.49, 1))
    return space


def run_tuning(
    trainable: type[tune.Trainable],
    config: TuningConfig,
    kinds: Kinds,
    constants: TrialKeys,
    *,
    seed: int,
    stage_dir: Path,
    resources: dict[str, float],
    max_retries: int = 0,
    brackets_in_flight: int = 1,
) -> list[TrialOutcome]:
    """Run the tuning stage; on a second call, replay it.

    Args:
        trainable: each `step()` trains one unit, of `config.rungs` in all, and returns at least
            `{"resource": k}` with k counting from 1, and at the rungs of its bracket also `"cas"`. Its config
            holds `constants`, the parameters of the search space, their `names` and `trial`, a number by
            which it must keep its results and state, on storage all workers share, so as to return them again
            without computing. Must have `reset_config` (workers are reused) and save and load k as its
            checkpoint.
        kinds: whether a parameter is a whole number.
        constants: same for all trials; plain values.
        stage_dir: local or shared; receives `study.journal` and Tune's own
            files in `tune/`, both started anew.
        resources: of one trial: `{"cpu": ..., "gpu": ...}`. They bound how many run at a time.
        max_retries: how often a trial is tried again at once, and how often all is
            replayed when a worker or Tune is lost.

    Returns:
        All `config.trials` outcomes by number, `complete` or `pruned`. The same whatever the timing, the
        number of workers and earlier interruptions, if the trainable's scores are.

    Raises:
        TuningError: a trial failed for good. Earlier results stay; the same call resumes.
    """
    stage_dir = stage_dir.resolve()
    for replays_left in reversed(range(max_retries + 1)):
        with local_output(stage_dir / "study.journal") as journal:
            search = build_search(config, kinds, seed, journal, brackets_in_flight, stage_dir)
            errors = _fit(
                with_resources(trainable, resources), config, constants, search, stage_dir, max_retries
            )
        if not errors:
            if len(search.outcomes) < config.trials or any(
                o.state not in ("complete", "pruned") for o in search.outcomes
            ):
                raise KeyboardInterrupt  # Tune catches Ctrl-C and returns as if all were well
            return search.outcomes
        error = _tuning_error(errors, search.outcomes, max_retries)
        if not replays_left or not all(_worker_lost(cause) for cause in errors.values()):
            raise error
        logging.getLogger(__name__).warning("%s; replaying", error)
    raise AssertionError("unreachable")


def _fit(
    trainable: Any,
    config: TuningConfig,
    constants: TrialKeys,
    search: BracketBarrier,
    stage_dir: Path,
    max_retries: int,
) -> dict[int, Exception]:
    """Run a fresh Tune experiment; return what failed by trial number, -1 for Tune itself."""
    remove_tree(stage_dir / "tune")
    tuner = tune.Tuner(
        trainable,
        param_space=constants | {"names": list(config.space)},
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=build_scheduler(config),
            num_samples=config.trials,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config[TRIAL]:04d}",
        ),
        run_config=tune.RunConfig(
            **ray_storage(stage_dir),
            name="tune",
            verbose=0,
            failure_config=tune.FailureConfig(max_retries),
            callbacks=[TrialCounts(stage_dir)],
        ),
    )
    try:
        with quiet_tune(config.trials):
            # Trials without any report have no `result.config`.
            return {int(Path(result.path).name): result.error for result in tuner.fit() if result.error}
    except (TuneError, RayError) as error:
        return {-1: error}
    except RuntimeError as error:
        if out_of_memory := killed_for_memory(error):
            return {-1: out_of_memory}
        raise


def _worker_lost(cause: Exception) -> bool:
    """Whether a replay may help: Tune retries a trial's own exceptions,
    but not a worker that dies between two trials."""
    return isinstance(cause, TuneError | OutOfMemoryError) or (
        isinstance(cause, RayActorError) and not cause.actor_init_failed
    )


def _tuning_error(
    errors: dict[int, Exception], outcomes: list[TrialOutcome], max_retries: int
) -> TuningError:
    number, cause = min(errors.items())
    what = "Ray Tune" if number < 0 else f"tuning trial {number} ({outcomes[number].params})"
    error = TuningError(
        f"{what} must end without error, but failed with max_retries={max_retries}: {in_a_line(cause)}; "
        "remove the cause and run the same command again: what was computed is kept"
    )
    error.__cause__ = cause
    return error
