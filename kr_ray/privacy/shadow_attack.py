"""Membership inference through shadow models (Shokri et al. 2017), as in Knowledge Recycling, section 3.6.

Per class, three attack models learn to tell the shadow models' members from their non-members by the logits;
the best one per class attacks the teacher and the student, whose members are the real training images and
whose non-members are the test images.

The attack is weak by construction (each shadow sees 45 % of a small
split): a low AUC bounds nothing from above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray, LogitArray
from kr_ray.privacy.metrics import CHANCE_AUC, RocCurve, accuracy_over_privacy, auc, roc_curve
from kr_ray.privacy.shadow import ShadowScores, check_answers
from kr_ray.runs.figures import Attacked, AttackModel, Roc

AttackKind = Literal["logistic_regression", "svc_rbf", "random_forest", "constant"]
CANDIDATES: tuple[AttackKind, ...] = ("logistic_regression", "svc_rbf", "random_forest")
"""From simple to complex: of two with the same AUC the earlier is chosen."""

MIN_SLOPE = 1e-3


# --- attack models ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassAttack:
    """The chosen attack on the images of one class.

    Attributes:
        class_index: the class.
        kind: which of the three candidates was chosen, or `constant` where nothing could be learned.
        validation_auc: AUC of every candidate on the held-out shadows' rows (empty for `constant`).
        members, non_members: rows of the class over all shadows.
        note: why the attack is constant, else empty.
    """

    class_index: int
    kind: AttackKind
    validation_auc: Mapping[str, float]
    members: int
    non_members: int
    note: str = ""
    _model: Pipeline | None = field(default=None, repr=False)
    _slope: float = field(default=0.0, repr=False)
    _intercept: float = field(default=0.0, repr=False)

    def scores(self, logits: LogitArray) -> FloatArray:
        """Calibrated log-odds of membership, float64 [M]; 0 means "no evidence"."""
        if self._model is None or len(logits) == 0:
            return np.zeros(len(logits))
        return self._slope * _raw_scores(self._model, logits) + self._intercept

    def figures(self) -> AttackModel:
        """For the report."""
        return AttackModel(
            class_index=self.class_index,
            kind=self.kind,
            val_auc=self.validation_auc.get(self.kind, CHANCE_AUC),
            val_auc_all=dict(self.validation_auc),
            members=self.members,
            non_members=self.non_members,
            note=self.note,
        )


def held_out_shadows(shadows: Sequence[int], seed: int, holdout: float) -> frozenset[int]:
    """The shadow models whose rows only select and calibrate: `holdout` of
    them, at least one, never all; equal for all classes.

    Raises:
        ValueError: fewer than two shadow models, or an index twice.
    """
    unique = sorted(set(shadows))
    if len(unique) < 2 or len(unique) != len(shadows):
        raise ValueError(
            "`scores` must come from two or more different shadow models, but got "
            f"{sorted(shadows)}; set audit.shadow_models >= 2"
        )
    count = min(max(1, round(holdout * len(unique))), len(unique) - 1)
    return frozenset(np.random.default_rng(seed).permutation(unique)[:count].tolist())


def fit_class_attack(
    scores: Sequence[ShadowScores],
    class_index: int,
    seed: int,
    holdout: float = 0.2,
    max_svc_rows: int = 20000,
) -> ClassAttack:
    """Fit logistic regression, SVC with RBF kernel and random forest on one
    class and keep the best (section 3.6, steps 4-6).

    The paper does not say on which data the best is chosen. Here on the rows of held-out shadow *models*,
    never on the target; equal AUCs go to the simpler model. Then, as scikit-learn's
    `CalibratedClassifierCV(ensemble=False)`: the winner's held-out scores give a logistic calibration, and
    the winner is refitted on the rows of all shadows. Calibration brings probabilities and SVC distances of
    different classes to one scale (log-odds at equal priors) before they are pooled; its slope is kept
    positive, so it never changes the order within a class.

    Falls back to a constant score (AUC 0.5, its reason in `note`) where members or non-members of the class
    are missing among the fitting or among the held-out shadows.

    Args:
        scores: one entry per shadow model, at least two.
        holdout: share of the shadow models held out, in (0, 1).
        max_svc_rows: the SVC, quadratic in rows, is fitted on a random subset of this size.

    Raises:
        ValueError: see `held_out_shadows`.
    """
    held_out = held_out_shadows([part.shadow for part in scores], seed, holdout)
    features, member, is_held_out = _class_rows(scores, class_index, held_out)
    members, non_members = int(member.sum()), int((~member).sum())
    if note := _unfit_reason(member, is_held_out):
        return ClassAttack(class_index, "constant", {}, members, non_members, note)
    rng_seed = int(np.random.SeedSequence([seed, class_index]).generate_state(1)[0])
    raw: dict[AttackKind, FloatArray] = {}
    for kind in CANDIDATES:
        model = _fit(kind, features[~is_held_out], member[~is_held_out], rng_seed, max_svc_rows)
        raw[kind] = _raw_scores(model, features[is_held_out])
    truth = member[is_held_out]
    validation_auc: dict[str, float] = {
        kind: auc(values[truth], values[~truth]) for kind, values in raw.items()
    }
    best = max(CANDIDATES, key=lambda kind: validation_auc[kind])  # max() keeps the first of equals
    slope, intercept = _calibrate(raw[best], truth)
    model = _fit(best, features, member, rng_seed, max_svc_rows)
    return ClassAttack(class_index, best, validation_auc, members, non_members, "", model, slope, intercept)


def _class_rows(
    scores: Sequence[ShadowScores], class_index: int, held_out: frozenset[int]
) -> tuple[LogitArray, BoolArray, BoolArray]:
    """Logits, membership and "comes from a held-out shadow" of all rows
    of one class, in the order of the shadows."""
    rows = [part.labels == class_index for part in scores]
    features = np.concatenate([part.logits[row] for part, row in zip(scores, rows, strict=True)])
    member = np.concatenate([part.member[row] for part, row in zip(scores, rows, strict=True)])
    is_held_out = np.concatenate(
        [np.full(int(row.sum()), part.shadow in held_out) for part, row in zip(scores, rows, strict=True)]
    )
    return features, member, is_held_out


def _unfit_reason(member: BoolArray, is_held_out: BoolArray) -> str:
    if member.size == 0:
        return "no shadow model saw this class"
    for name, part in (("fitting", member[~is_held_out]), ("held-out", member[is_held_out])):
        if part.all() or not part.any():
            return (
                f"the {name} shadows hold {int(part.sum())} members and "
                f"{int((~part).sum())} non-members of this class"
            )
    return ""


def _fit(kind: AttackKind, features: LogitArray, member: BoolArray, seed: int, max_svc_rows: int) -> Pipeline:
    if kind == "svc_rbf" and len(member) > max_svc_rows:
        keep = np.random.default_rng(seed).permutation(len(member))[:max_svc_rows]
        if 0 < member[keep].sum() < len(keep):
            features, member = features[keep], member[keep]
    estimators = {
        "logistic_regression": lambda: LogisticRegression(max_iter=1000),
        # decision_function ranks as well as probability=True, at a fifth of its time.
        "svc_rbf": lambda: SVC(kernel="rbf", cache_size=500),
        "random_forest": lambda: RandomForestClassifier(n_estimators=100, random_state=seed, n_jobs=1),
    }
    model: Pipeline = make_pipeline(StandardScaler(), estimators[kind]())
    return model.fit(features.astype(np.float64), member)


def _raw_scores(model: Pipeline, logits: LogitArray) -> FloatArray:
    features = logits.astype(np.float64)
    if hasattr(model, "decision_function"):
        values: FloatArray = model.decision_function(features)
        return values
    probabilities: FloatArray = model.predict_proba(features)[:, 1]
    return probabilities


def _calibrate(raw: FloatArray, member: BoolArray) -> tuple[float, float]:
    """Slope and intercept of Platt's map from raw scores to log-odds, as
    if members and non-members were equally many."""
    spread = float(raw.std()) or 1.0
    centred = ((raw - raw.mean()) / spread)[:, None]
    # The L2 penalty keeps the slope finite where held-out scores separate perfectly.
    fitted = LogisticRegression(class_weight="balanced").fit(centred, member)
    slope = max(float(fitted.coef_[0, 0]), MIN_SLOPE) / spread
    return slope, float(fitted.intercept_[0]) - slope * float(raw.mean())


# --- the whole attack ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """The best attack of every class."""

    classes: Mapping[int, ClassAttack]

    def scores(self, logits: LogitArray, labels: IndexArray) -> FloatArray:
        """Log-odds of membership, float64 [N]; higher = member; comparable between classes.

        Args:
            logits: the attacked model's answers, float32 [N, K], finite.
            labels: true classes, int64 [N]; each must have a class attack.

        Raises:
            ValueError: wrong shapes or types, or a class without an attack.
        """
        check_answers(logits, labels)
        present = np.unique(labels).tolist()
        if missing := [index for index in present if index not in self.classes]:
            raise ValueError(
                f"`classes` must hold an attack for every label, but {missing} have none; fit them first"
            )
        result = np.zeros(len(labels))
        for index in present:
            rows = labels == index
            result[rows] = self.classes[index].scores(logits[rows])
        return result


@dataclass(frozen=True)
class AttackResult:
    """How well an attack tells members from non-members.

    Attributes:
        auc: over all images pooled, in [0, 1], as measured.
        auc_clamped: max(auc, 0.5), as the paper prints it.
        per_class: AUC within each class, by class index; None where members or non-members are missing.
        roc: at most 200 vertices.
        members, non_members: number of images.
    """

    auc: float
    auc_clamped: float
    per_class: tuple[float | None, ...]
    roc: RocCurve
    members: int
    non_members: int

    def figures(self, accuracy: float) -> Attacked:
        """For the report: `auc` is the clamped one, as in Table 2, beside `auc_raw`.

        Args:
            accuracy: test accuracy (or test CAS) of the attacked model, in [0, 1].
        """
        return Attacked(
            auc=self.auc_clamped,
            auc_raw=self.auc,
            aop=accuracy_over_privacy(accuracy, self.auc_clamped),
            roc=Roc(fpr=self.roc.fpr.tolist(), tpr=self.roc.tpr.tolist()),
            per_class=list(self.per_class),
        )


def attack_model(
    attack: Attack,
    member_logits: LogitArray,
    member_labels: IndexArray,
    non_member_logits: LogitArray,
    non_member_labels: IndexArray,
) -> AttackResult:
    """Attack one model (section 3.6): members are the real training images, non-members the test images.

    Args:
        member_logits, non_member_logits: the model's answers on clean images, float32 [M, K] and [N, K].
        member_labels, non_member_labels: true classes, int64 [M] and [N].

    Raises:
        ValueError: see `Attack.scores`; or one side is empty.
    """
    members = attack.scores(member_logits, member_labels)
    non_members = attack.scores(non_member_logits, non_member_labels)
    per_class: list[float | None] = []
    for index in range(member_logits.shape[1]):
        inside, outside = members[member_labels == index], non_members[non_member_labels == index]
        per_class.append(auc(inside, outside) if inside.size and outside.size else None)
    value = auc(members, non_members)
    return AttackResult(
        value,
        max(value, CHANCE_AUC),
        tuple(per_class),
        roc_curve(members, non_members),
        len(members),
        len(non_members),
    )
