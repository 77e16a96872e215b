"""The worst-case audit of one arm: all attacks on the scores of many runs, and what they find.

Pure functions of arrays. Every attack pools all (run, sample) pairs, each run attacked with the help of the
others only, and of those only in ways that do not give away the audit's own design (see `leave_one_out` and
`matched_shadow_scores`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from kr_ray.privacy.arrays import BoolArray, FloatArray
from kr_ray.privacy.epsilon import DELTA, epsilon_bounds
from kr_ray.privacy.leave_one_out import leave_one_out
from kr_ray.privacy.lira import compared_sides, hinge, lira_scores, logit_scaled
from kr_ray.privacy.rates import (
    Pairs,
    auc_interval,
    balanced_accuracy,
    pair_scores,
    thinned_roc,
    tpr_figures,
)
from kr_ray.privacy.rmia import rmia_scores
from kr_ray.privacy.scores import ReferenceScores, SampleScores, ScoreError
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.privacy.shadow_attack import Attack, fit_class_attack
from kr_ray.runs.figures import AttackFigures, RateFigures, Roc, TakenFigures

HEADLINE = "lira_online_fixed_logit"
"""Chosen before any figure is known; the best of several attacks would be optimistic. Carlini et al. find the
fixed variance better below about 64 models, and the online attack on the logit-scaled confidence is their
main one."""
MATCHED_RUNS = 4
MATCHED_SAMPLES = 500

ByAttack = dict[str, dict[str, AttackFigures]]
"""Name of the attack -> name of the group of samples -> what the attack finds."""


@dataclass(frozen=True)
class ArmFigures:
    """What the attacks find in all runs of one arm.

    Attributes:
        models, queries: their numbers.
        headline: name of the attack behind the next three.
        population, canary: by group of samples.
        canary_true_label: scoring the canaries' true label (None where no label is wrong): success here shows
            that the model has learned the sample's class rather than its given label.
        true_label_share, given_label_share: over (run, canary) pairs "in" and "out", how often the run's
            model predicts that label (query 0).
    """

    models: int
    queries: int
    headline: str
    population: AttackFigures
    canary: AttackFigures
    canary_true_label: AttackFigures | None
    true_label_share: dict[str, float]
    given_label_share: dict[str, float]
    attacks: ByAttack


def audit_arm(
    canary: SampleScores,
    population: SampleScores,
    reference: ReferenceScores | None,
    seed: int,
    delta: float = DELTA,
) -> ArmFigures:
    """Attack all runs of one arm.

    Args:
        canary, population: the two groups of audit samples, the same runs in the same order.
        reference: images no run saw, for RMIA, which is left out without them.
        seed: of resampling and splitting; the same seed gives the same figures.

    Raises:
        ScoreError: the groups, or `reference`, hold another number of runs.
    """
    groups = {"population": population, "canary": canary}
    attacks = attack_groups(groups, reference, seed, delta)
    return ArmFigures(
        models=len(canary.logits),
        queries=canary.logits.shape[2],
        headline=HEADLINE,
        population=attacks[HEADLINE]["population"],
        canary=attacks[HEADLINE]["canary"],
        canary_true_label=true_label_figures(canary, seed, delta),
        true_label_share=_share(canary, "true_labels"),
        given_label_share=_share(canary, "labels"),
        attacks=attacks,
    )


def true_label_figures(samples: SampleScores, seed: int, delta: float = DELTA) -> AttackFigures | None:
    """Figures of the headline attack scoring the true label; None where no given label is wrong."""
    scores = true_label_scores(samples)
    return None if scores is None else figures(scores, samples.member, seed, delta)


def true_label_scores(samples: SampleScores) -> FloatArray | None:
    """Scores of the headline attack on the true label, float64 [models,
    samples]; None where no given label is wrong."""
    if (samples.labels == samples.true_labels).all():
        return None
    statistic = logit_scaled(samples.logits, samples.true_labels)
    return lira_scores(statistic, samples.member, online=True, per_sample_variance=False)


def taken_figures(samples: SampleScores, taken: BoolArray, seed: int) -> TakenFigures:
    """The headline attack on the members that a method took for itself and on those that it left.

    Both are beside all non-members, so they share the thresholds. Taking may depend on the sample itself, so
    neither rate gives an epsilon.

    Args:
        taken: bool [models, samples]; of non-members it does not matter.
    """
    statistic = logit_scaled(samples.logits, samples.labels)
    scores = lira_scores(statistic, samples.member, online=True, per_sample_variance=False)
    judged, member = judged_pairs(samples.member), samples.member

    def found(group: BoolArray) -> RateFigures | None:
        counted = judged & (group | ~member)
        if not (counted & member).any():
            return None
        return RateFigures.model_validate(rate_values(pair_scores(scores, member, counted), seed))

    return TakenFigures(share=float(taken[member].mean()), taken=found(taken), left=found(~taken))


def attack_groups(
    groups: Mapping[str, SampleScores], reference: ReferenceScores | None, seed: int, delta: float = DELTA
) -> ByAttack:
    """Figures of every attack on every group: name of the attack -> name of the group -> `figures`."""
    return {
        name: {
            group: figures(values, groups[group].member, seed, delta) for group, values in by_group.items()
        }
        for name, by_group in group_scores(groups, reference, seed).items()
    }


def group_scores(
    groups: Mapping[str, SampleScores], reference: ReferenceScores | None, seed: int
) -> dict[str, dict[str, FloatArray]]:
    """Scores of every attack on every group: name of the attack -> name
    of the group -> float64 [models, samples]."""
    runs = {group: len(samples.logits) for group, samples in groups.items()}
    if len(set(runs.values())) > 1:
        raise ScoreError(
            f"the groups must hold the same runs, but got {runs}; score every group in every run"
        )
    if reference is not None:
        for samples in groups.values():
            reference.check_fits(samples)
    scores: dict[str, dict[str, FloatArray]] = {}
    for group, samples in groups.items():
        for name, values in attack_scores(samples, reference).items():
            scores.setdefault(name, {})[group] = values
    scores["shokri_matched"] = matched_shadow_scores(groups, seed)
    return scores


def attack_scores(samples: SampleScores, reference: ReferenceScores | None) -> dict[str, FloatArray]:
    """Membership scores of one group by attack, each float64 [models, samples], higher = member.

    lira_{online, offline}_{fixed, per_sample}_{logit, hinge}; global_threshold: the loss of the given label
    on the unaltered image (its logit-scaled confidence, which orders all pairs as the loss does and does not
    saturate); rmia_{online, offline}.
    """
    statistics = {
        "logit": logit_scaled(samples.logits, samples.labels),
        "hinge": hinge(samples.logits, samples.labels),
    }
    result = {"global_threshold": statistics["logit"][..., 0]}
    for kind, statistic in statistics.items():
        result |= {
            f"{name}_{kind}": scores for name, scores in lira_variants(statistic, samples.member).items()
        }
    if reference is not None:
        for online in (True, False):
            result[f"rmia_{'online' if online else 'offline'}"] = rmia_scores(
                samples, reference, online=online
            )
    return result


def lira_variants(statistic: FloatArray, member: BoolArray) -> dict[str, FloatArray]:
    """lira_{online, offline}_{fixed, per_sample} of one statistic [models, samples, queries]."""
    sides = compared_sides(statistic, member)
    return {
        f"lira_{'online' if online else 'offline'}_{'per_sample' if per_sample else 'fixed'}": sides.scores(
            online=online, per_sample_variance=per_sample
        )
        for online in (True, False)
        for per_sample in (False, True)
    }


def judged_pairs(member: BoolArray) -> BoolArray:
    """The pairs of a run and a sample whose figures count: of a
    single model all, else see `leave_one_out`."""
    return leave_one_out(member).judged if len(member) > 1 else np.ones_like(member)


def figures(scores: FloatArray, member: BoolArray, seed: int, delta: float = DELTA) -> AttackFigures:
    """What the scores of one attack show; see `rates` for each
    interval's meaning and `epsilon` for the bounds.

    Args:
        scores: [models, samples], finite, higher = member.
        member: [models, samples].

    Returns:
        The figures at 0.1 % and 1 % FPR are all null, with `refused` (`refused_0.01`) saying why, where there
        are too few non-members; balanced_accuracy is null where a half of the samples has one class only;
        members and non-members are pairs.
    """
    judged = judged_pairs(member)
    pairs = pair_scores(scores, member, judged)
    return AttackFigures(
        **rate_values(pairs, seed),  # type: ignore[arg-type]  # by their names in JSON
        balanced_accuracy=balanced_accuracy(scores, member, seed, judged),
        epsilon=epsilon_bounds(scores, member, seed, delta, judged=judged),
        finest_fpr=1 / len(pairs.non_members),
        roc=Roc.model_validate(thinned_roc(pairs)),
    )


def rate_values(pairs: Pairs, seed: int) -> dict[str, float | int | str | None]:
    """Rates, AUC and how many pairs there are: the values of a `RateFigures`."""
    area, low, high = auc_interval(pairs)
    areas = {"auc": area, "auc_low": low, "auc_high": high}
    counts = {"n_members": len(pairs.members), "n_non_members": len(pairs.non_members)}
    return {**tpr_figures(pairs, seed), **areas, **counts}


def statistic_figures(
    statistic: FloatArray, member: BoolArray, seed: int, delta: float = DELTA
) -> AttackFigures:
    """Figures of the headline attack on a statistic of one's own, such as how near handed-on images lie.

    Args:
        statistic: [models, samples], finite; member: [models, samples].
    """
    scores = lira_scores(statistic[..., None], member, online=True, per_sample_variance=False)
    return figures(scores, member, seed, delta).model_copy(update={"roc": None})


def matched_shadow_scores(groups: Mapping[str, SampleScores], seed: int) -> dict[str, FloatArray]:
    """Shokri et al.'s attack with pipeline-matched shadows: the other runs
    are the shadow models; [models, samples] per group.

    Runs and samples are halved at random. Attacks fitted on (at most four) runs of one half attack every run
    of the other, and the reverse, so that no run helps to attack itself; and they attack the samples that
    they were not fitted on. For where every sample is in half of the runs, an attack that recognises a sample
    knows from the runs that it was fitted on where it is missing. That takes four fits; their log-odds are
    calibrated, hence pooled. The shadows' rows are (at most 250 of each half of) the samples of each group,
    on query 0, by given label. A class that lacks members or non-members there scores zero, "no evidence".
    """
    models = len(next(iter(groups.values())).logits)
    rng = np.random.default_rng([seed, 2])
    order = rng.permutation(models)
    runs = order[: models // 2], order[models // 2 :]
    rows = {name: np.array_split(rng.permutation(len(group.labels)), 2) for name, group in groups.items()}
    classes = np.unique(np.concatenate([group.labels for group in groups.values()])).tolist()
    result = {name: np.zeros(group.member.shape) for name, group in groups.items()}
    for (shadows, attacked), part in product((runs, runs[::-1]), (0, 1)):
        fitted_on = {name: halves[part][: MATCHED_SAMPLES // 2] for name, halves in rows.items()}
        scores = [_shadow(groups, fitted_on, int(run)) for run in shadows[:MATCHED_RUNS]]
        attack = Attack({index: fit_class_attack(scores, index, seed, holdout=0.5) for index in classes})
        for name, group in groups.items():
            others = rows[name][1 - part]
            logits = np.concatenate(group.logits[np.ix_(attacked, others, [0])][:, :, 0])
            found = attack.scores(logits, np.tile(group.labels[others], len(attacked)))
            result[name][np.ix_(attacked, others)] = found.reshape(len(attacked), -1)
    return result


def _shadow(groups: Mapping[str, SampleScores], rows: Mapping[str, Any], run: int) -> ShadowScores:
    parts = [
        (group.logits[run, kept, 0], group.labels[kept], group.member[run, kept])
        for group, kept in ((groups[n], rows[n]) for n in groups)
    ]
    logits, labels, member = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ShadowScores(run, logits, labels, member)


def _share(samples: SampleScores, labels: str) -> dict[str, float]:
    hit = samples.logits[:, :, 0].argmax(axis=-1) == getattr(samples, labels)
    return {"in": float(hit[samples.member].mean()), "out": float(hit[~samples.member].mean())}
