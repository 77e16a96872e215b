"""The worst-case audit in words and tables, for readers who run no
code; see kr_ray.privacy for what is computed."""

from __future__ import annotations

from dataclasses import dataclass

from kr_ray.report.schema import Report
from kr_ray.report.words import bind, count, percent
from kr_ray.runs.figures import AttackFigures, LiraArm, TakenFigures

CANARY_WORDS = {
    "mislabeled": "real training images that were given a wrong label, so "
    "that a model can only know it by heart",
    "outlier": "the training images that models not trained on them find hardest",
    "random": "training images drawn at random",
}
ATTACK_NAMES = {
    "global_threshold": "loss threshold", "rmia_online": "RMIA, online", "rmia_offline": "RMIA, offline",
    "shokri_matched": "Shokri et al., shadows trained by the same pipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """A share with what is behind it, ready to print."""

    value: str
    interval: str
    counts: str


@dataclass(frozen=True)
class WorstCaseRow:
    """One arm in the table."""

    name: str
    note: str
    accuracy: str
    accuracy_sd: str
    canary: Rate
    population: Rate
    epsilon: str
    epsilon_one_run: str


def titles(report: Report) -> dict[str, str]:
    """What each arm is called in tables and figures."""
    return {name: arm.title or name for name, arm in _arms(report).items()}


def rows(report: Report) -> list[WorstCaseRow]:
    """One line per arm, in the order in which they were asked for; empty without a worst-case audit."""
    return [
        WorstCaseRow(
            name=arm.title or name,
            note=arm.note,
            accuracy=percent(arm.test_accuracy),
            accuracy_sd=percent(arm.test_accuracy_sd),
            canary=_rate(arm.canary),
            population=_rate(arm.population),
            epsilon=_bound(arm.canary.epsilon.clopper_pearson),
            epsilon_one_run=_bound(arm.canary.epsilon.one_run),
        )
        for name, arm in _arms(report).items()
    ]


def findings(report: Report) -> list[str]:
    """What the attack found, a few sentences per arm."""
    return [sentence for name, arm in _arms(report).items() for sentence in _of_arm(arm.title or name, arm)]


def attack_rows(report: Report) -> list[dict[str, object]]:
    """Every attack against every arm: arm, attack, group (its figures), headline."""
    return [
        {
            "arm": arm.title or name,
            "attack": attack_name(attack),
            "group": group,
            "figures": figures,
            "headline": attack == arm.headline,
        }
        for name, arm in _arms(report).items()
        for attack, groups in arm.attacks.items()
        for group, figures in groups.items()
    ]


def attack_name(attack: str) -> str:
    """`lira_online_fixed_logit` -> `LiRA online, fixed variance, logit score`."""
    if attack in ATTACK_NAMES:
        return ATTACK_NAMES[attack]
    if not attack.startswith("lira_"):
        return attack
    _, way, *variance, score = attack.split("_")
    return f"LiRA {way}, {'-'.join(variance)} variance, {score} score"


def headline_attack(report: Report) -> str:
    """Name of the attack that the first table shows."""
    return next((attack_name(arm.headline) for arm in _arms(report).values()), "")


def _arms(report: Report) -> dict[str, LiraArm]:
    return report.audit.lira if report.audit else {}


def _rate(figures: AttackFigures) -> Rate:
    if figures.tpr_at_01 is None:
        coarser = "" if figures.tpr_at_1 is None else f"at 1 % FPR: {percent(figures.tpr_at_1, 1)}"
        return Rate("–", f"needs 1,000 pairs, has {count(figures.n_non_members)}", coarser)
    return Rate(
        percent(figures.tpr_at_01, 1),
        f"{percent(figures.ci_low, 1)} to {percent(figures.ci_high, 1)}",
        f"{count(figures.true_positives)} of {count(figures.n_members)}",
    )


def _bound(bound: float | None) -> str:
    return "–" if bound is None else f"{bound:.2f}"


def _of_arm(name: str, arm: LiraArm) -> list[str]:
    sentences = []
    if arm.canary.tpr_at_01 is not None:
        ordinary = (
            ""
            if arm.population.tpr_at_01 is None
            else f" Of ordinary images it finds {percent(arm.population.tpr_at_01, 1)} %."
        )
        sentences.append(
            f"{name}: an attacker who accepts one false accusation in 1,000 recognises "
            f"{percent(arm.canary.tpr_at_01, 1)} % of the canaries that were trained on "
            f"({count(arm.canary.true_positives)} of {count(arm.canary.n_members)} pairs of a "
            f"run and an image; 95 % interval {percent(arm.canary.ci_low, 1)} to "
            f"{percent(arm.canary.ci_high, 1)} %).{ordinary}"
        )
    elif arm.canary.refused:
        sentences.append(f"{name}: {arm.canary.refused}.")
    if arm.canary_true_label is not None:
        given, true = arm.given_label_share, arm.true_label_share
        sentences.append(
            f"{name}: asked about a canary it was trained on, a model gives the wrong label it was taught "
            f"in {percent(given['in'], 1)} % of the cases ({percent(given['out'], 1)} % without that "
            f"training) and the true one in {percent(true['in'], 1)} % ({percent(true['out'], 1)} %): the "
            "first is memory, the second generalisation."
        )
    if arm.canary_taken is not None:
        sentences.append(_of_taken(name, arm.canary_taken))
    bound = arm.canary.epsilon.clopper_pearson
    if bound:
        sentences.append(
            f"{name}: whatever is claimed for this training, it is not differentially private with an "
            f"epsilon below {bound:.2f} (delta {arm.canary.epsilon.delta:g}, confidence "
            f"{percent(arm.canary.epsilon.confidence, 0)} %)."
        )
    return [bind(sentence) for sentence in sentences]


def _of_taken(name: str, groups: TakenFigures) -> str:
    """How many canaries a method took for itself, and how many of either kind were recognised."""
    said = [
        f"{percent(found.tpr_at_01, 1)} % of those {kind} ({count(found.n_members)} pairs)"
        for kind, found in (("taken", groups.taken), ("left", groups.left))
        if found is not None and found.tpr_at_01 is not None
    ]
    recognised = f"; recognised were {' and '.join(said)}" if said else ""
    return f"{name}: the method took {percent(groups.share, 1)} % of the canaries it was given{recognised}."
