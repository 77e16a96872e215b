"""How much each generation parameter mattered in the tuning, where the trials can say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kr_ray.runs.figures import Trial

MIN_TRIALS = 20
"""Below this many complete trials a variance decomposition says nothing."""
SIGNIFICANT = 0.05
Scores = NDArray[np.float64]


def parameter_importance(
    history: Sequence[Trial], parameters: Sequence[str], validation_images: int
) -> dict[str, float] | None:
    """fANOVA (Hutter et al. 2014) over the complete trials,
    whatever searcher made them; shares that sum to 1.

    None where `why_unknown` names a reason: the decomposition shares out
    whatever variance there is, noise included.

    Args:
        history: trials with these parameters.
        parameters: names of the search space.
        validation_images: on which every CAS was counted.
    """
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution

    if why_unknown(history, parameters, validation_images):
        return None
    complete = _complete(history)
    values = {key: [trial.params[key] for trial in complete] for key in _varied(complete, parameters)}
    distributions: dict[str, IntDistribution | FloatDistribution] = {}
    for key, found in values.items():
        kind = IntDistribution if all(isinstance(value, int) for value in found) else FloatDistribution
        distributions[key] = kind(min(found), max(found))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.study.create_study(direction="maximize")
    for trial in complete:
        params = {key: trial.params[key] for key in values}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=trial.val_cas)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(shares.get(key, 0.0)) for key in parameters}


def why_unknown(history: Sequence[Trial], parameters: Sequence[str], validation_images: int) -> str:
    """Why the trials do not tell which parameter mattered, as a sentence; empty where they do.

    Two tests, each at 5 %: the spread of CAS must exceed that of counting on so many images (chi-square), and
    CAS must follow the parameters (F-test of a quadratic response surface against a constant), which the
    noise of training does not.
    """
    complete = _complete(history)
    if len(complete) < MIN_TRIALS:
        return (
            f"Which parameter mattered cannot be said: {len(complete)} trials ran to their end, and below "
            f"{MIN_TRIALS} a decomposition of their variance says nothing."
        )
    cas = np.array([trial.val_cas for trial in complete], dtype=np.float64)
    varied = _varied(complete, parameters)
    if not varied or np.ptp(cas) == 0:
        return "Which parameter mattered cannot be said: the trials do not differ."
    if _counting_noise_explains(cas, validation_images):
        return (
            f"Which parameter mattered cannot be said: the {len(complete)} complete trials differ by no "
            f"more than counting on {validation_images:,} validation images does by chance."
        )
    if (
        _surface_p_value(np.array([[float(trial.params[key]) for key in varied] for trial in complete]), cas)
        > SIGNIFICANT
    ):
        return (
            f"Which parameter mattered cannot be said: the CAS of the {len(complete)} complete trials does "
            "not follow the parameters beyond the noise of training."
        )
    return ""


def parameter_words(importance: Mapping[str, float]) -> str:
    """`latent std 0.31, ...`, the largest first."""
    ordered = sorted(importance.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name.replace('_', ' ')} {share:.2f}" for name, share in ordered)


def _complete(history: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in history if trial.state.lower() == "complete" and trial.val_cas is not None]


def _varied(complete: Sequence[Trial], parameters: Sequence[str]) -> list[str]:
    return [key for key in parameters if len({trial.params[key] for trial in complete}) > 1]


def _counting_noise_explains(cas: Scores, images: int) -> bool:
    """Whether binomial noise of the mean CAS on `images` images explains the variance of `cas`."""
    mean = float(cas.mean())
    expected = max(mean * (1 - mean), 1 / max(images, 1)) / max(images, 1)
    statistic = float(((cas - mean) ** 2).sum()) / expected
    return float(stats.chi2.sf(statistic, len(cas) - 1)) > SIGNIFICANT


def _surface_p_value(parameters: Scores, cas: Scores) -> float:
    """F-test of a surface that is quadratic in every parameter against a constant.

    Args:
        parameters: [trials, varied parameters]; cas: [trials].
    """
    scaled = (parameters - parameters.mean(axis=0)) / parameters.std(axis=0)
    design = np.column_stack([np.ones(len(cas)), scaled, scaled**2])
    fitted, _, rank, _ = np.linalg.lstsq(design, cas, rcond=None)
    rest = float(((cas - design @ fitted) ** 2).sum())
    whole = float(((cas - cas.mean()) ** 2).sum())
    used, left = int(rank) - 1, len(cas) - int(rank)
    if used < 1 or left < 1:
        return 1.0
    statistic = ((whole - rest) / used) / max(rest / left, np.finfo(np.float64).tiny)
    return float(stats.f.sf(statistic, used, left))
