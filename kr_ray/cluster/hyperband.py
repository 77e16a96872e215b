"""Hyperband as a Ray Tune scheduler whose decisions depend on the reported scores alone, never on timing."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from kr_ray.config import TuningConfig

METRIC = "cas"
"""Result key: validation CAS, in [0, 1], to be maximised."""
RESOURCE = "resource"
"""Result key: units of training done, 1 to R."""
TRIAL = "trial"
"""Config key: the trial's number, from 0, the same in every run of one configuration."""

Reported = dict[str, Any]
"""What a trial reports to Ray Tune, which adds keys of its own."""
TrialKeys = dict[str, Any]
"""A trial's config as Ray Tune hands it on, or the space that it is drawn from."""


@dataclass(frozen=True)
class Bracket:
    """One round of successive halving.

    Attributes:
        first: number of its first trial.
        rungs: (trials, resource) pairs; the best `trials` of the rung before are trained up to `resource`.
    """

    first: int
    rungs: tuple[tuple[int, int], ...]

    @property
    def trials(self) -> range:
        """Numbers of its trials."""
        return range(self.first, self.first + self.rungs[0][0])

    def goals(self, history: Mapping[int, Mapping[int, float]], left: Set[int]) -> dict[int, int]:
        """Resource up to which each trial may be trained by now; trials that are missing are pruned.

        A rung is decided when every trial in it has reported or left; equal scores favour the lower number.

        Args:
            history: CAS by trial number and resource.
            left: trials that will report no more (ended or failed). Their earlier reports count.
        """
        members = list(self.trials)
        goals = dict.fromkeys(members, self.rungs[0][1])
        for (_, resource), (kept, next_resource) in pairwise(self.rungs):
            reports = {n: history[n][resource] for n in members if resource in history.get(n, {})}
            if any(n not in reports and n not in left for n in members):
                break
            members = sorted(reports, key=lambda n: (-reports[n], n))[:kept]
            goals = dict.fromkeys(members, next_resource)
        return goals


def hyperband_brackets(trials: int, rungs: int, eta: int) -> list[Bracket]:
    """Cut `trials` trials into Hyperband's brackets (Li et al. 2018, Algorithm 1).

    With R = `rungs` and s_max = floor(log_eta R), brackets s = s_max, ..., 0 follow each other, again and
    again. Bracket s starts n = ceil((s_max + 1) / (s + 1) * eta^s) trials; its rung i trains floor(n / eta^i)
    of them up to R / eta^(s - i) units (rounded down). For R = 9 and eta = 3: 9 -> 3 -> 1 at 1, 3, 9 units; 5
    -> 1 at 3, 9; 3 at 9; 17 trials in all. The last bracket takes what trials remain; each bracket trains at
    least one trial to the end.

    Ray's HyperBandScheduler goes from s = 0 up, rounds log_eta R to
    nearest, and keeps ceil(n / eta) trials per rung.
    """
    s_max = max(s for s in range(rungs) if eta**s <= rungs)
    brackets: list[Bracket] = []
    first = 0
    while first < trials:
        s = s_max - len(brackets) % (s_max + 1)
        n = min(-(-(s_max + 1) * eta**s // (s + 1)), trials - first)
        brackets.append(
            Bracket(first, tuple((max(n // eta**i, 1), rungs // eta ** (s - i)) for i in range(s + 1)))
        )
        first += n
    return brackets


class SynchronousHyperBand(FIFOScheduler):
    """Hyperband with fixed bracket membership (by trial number) and rungs that wait for all their trials.

    Ray's HyperBandScheduler fills brackets in order of arrival, may halve one that is not yet full, and
    pauses for ever what a failure has thrown out of step. Here everything follows from `Bracket.goals`.
    """

    _supports_buffered_results = False
    _metric = METRIC

    def __init__(self, brackets: list[Bracket]) -> None:
        super().__init__()
        self._bracket_of = {number: bracket for bracket in brackets for number in bracket.trials}
        self._trials: dict[int, Trial] = {}
        self._history: dict[int, dict[int, float]] = {}
        self._left: set[int] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Also called when Tune queues a failed trial again."""
        self._trials[trial.config[TRIAL]] = trial
        self._history.setdefault(trial.config[TRIAL], {})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Reported) -> str:
        if METRIC not in result:  # between two rungs: nothing to decide
            return TrialScheduler.CONTINUE
        number, resource = trial.config[TRIAL], result[RESOURCE]
        self._history[number][resource] = result[METRIC]
        goal = self._settle(tune_controller, number).get(number, 0)
        action: str = TrialScheduler.STOP
        if resource < goal:
            action = TrialScheduler.CONTINUE
        elif resource == goal < self._bracket_of[number].rungs[-1][1]:
            action = TrialScheduler.PAUSE
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Reported) -> None:
        self._leave(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._leave(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        # Tune marks a trial ERROR before this call only if it is about to
        # queue it again: then its rung waits for it.
        if trial.status != Trial.ERROR:
            self._leave(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The lowest-numbered trial that is new or was promoted."""
        for number in sorted(self._trials.keys() - self._left):
            trial = self._trials[number]
            if trial.status == Trial.PENDING:
                return trial
            if trial.status == Trial.PAUSED:
                goals = self._bracket_of[number].goals(self._history, self._left)
                if max(self._history[number]) < goals.get(number, 0):
                    return trial
        return None

    def debug_string(self) -> str:
        return f"Hyperband: {len(self._left)} of {len(self._bracket_of)} trials ended."

    def _leave(self, tune_controller: Any, trial: Trial) -> None:
        number = trial.config[TRIAL]
        if number not in self._left:
            self._left.add(number)
            self._settle(tune_controller, number)

    def _settle(self, tune_controller: Any, number: int) -> dict[int, int]:
        """Stop whom the bracket of trial `number` no longer needs,
        save that trial itself; return the goals."""
        bracket = self._bracket_of[number]
        goals = bracket.goals(self._history, self._left)
        for other in bracket.trials:
            if other != number and other not in goals and other not in self._left:
                self._left.add(
                    other
                )  # before: Tune calls `on_trial_remove`, which must not settle again meanwhile
                tune_controller.stop_trial(self._trials[other])
        return goals


def build_scheduler(config: TuningConfig) -> SynchronousHyperBand:
    """The scheduler of a tuning stage."""
    return SynchronousHyperBand(hyperband_brackets(config.trials, config.rungs, config.reduction_factor))
