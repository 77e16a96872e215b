"""How much each generation parameter mattered in the tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PARAMETERS = ("latent_std", "regeneration_rate", "cardinality_scale")
MIN_TRIALS = 4
"""Below this many complete trials a variance decomposition says nothing."""


def parameter_importance(history: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """fANOVA (Hutter et al. 2014) over the complete trials, whatever searcher made them; shares that sum to 1.

    None if there are too few complete trials, or if no parameter or no score varies among them.
    """
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution

    complete = [trial for trial in history if trial["state"] == "complete"]
    if len(complete) < MIN_TRIALS or len({trial["val_cas"] for trial in complete}) == 1:
        return None
    spans = {key: (min(trial[key] for trial in complete), max(trial[key] for trial in complete)) for key in PARAMETERS}
    varied = [key for key in PARAMETERS if spans[key][0] < spans[key][1]]
    if not varied:
        return None
    kinds: dict[str, Any] = {key: FloatDistribution if key == "latent_std" else IntDistribution for key in varied}
    distributions = {key: kinds[key](*spans[key]) for key in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.study.create_study(direction="maximize")
    for trial in complete:
        params = {key: trial[key] for key in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial["val_cas"]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(found.get(key, 0.0)) for key in PARAMETERS}
