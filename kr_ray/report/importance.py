"""How much each generation parameter mattered in the tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kr_ray.runs.figures import Trial

MIN_TRIALS = 4
"""Below this many complete trials a variance decomposition says nothing."""


def parameter_importance(history: Sequence[Trial], parameters: Sequence[str]) -> dict[str, float] | None:
    """fANOVA (Hutter et al. 2014) over the complete trials, whatever searcher made them; shares that sum to 1.

    None if there are too few complete trials, or if no parameter or no score varies among them.
    """
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution

    complete = [trial for trial in history if trial.state == "complete"]
    if len(complete) < MIN_TRIALS or len({trial.val_cas for trial in complete}) == 1:
        return None
    values = {key: [trial.params[key] for trial in complete] for key in parameters}
    spans = {key: (min(found), max(found)) for key, found in values.items()}
    varied = [key for key in parameters if spans[key][0] < spans[key][1]]
    if not varied:
        return None
    kinds: dict[str, Any] = {
        key: IntDistribution if all(isinstance(value, int) for value in values[key]) else FloatDistribution for key in varied
    }
    distributions = {key: kinds[key](*spans[key]) for key in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.study.create_study(direction="maximize")
    for trial in complete:
        params = {key: trial.params[key] for key in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.val_cas))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(found.get(key, 0.0)) for key in parameters}
