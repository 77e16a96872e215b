"""Metrics against published numbers and naive versions; the shadow attack against constructed answers."""

from __future__ import annotations

import numpy as np
import pytest

from kr_ray.privacy.metrics import accuracy_over_privacy, auc, auc_standard_error, clamped_auc, roc_curve
from kr_ray.privacy.shadow import ShadowScores, shadow_splits
from kr_ray.privacy.shadow_attack import Attack, _calibrate, attack_model, fit_class_attack, held_out_shadows
from kr_ray.runs.artifacts import ArtifactError

# Knowledge Recycling, Table 2: accuracy, AUC_MIA, AOP of the teacher, then of the student; per cent.
TABLE_2 = {
    "CIFAR10": (96.24, 56.22, 76.13, 95.83, 51.21, 91.34),
    "CIFAR100": (77.65, 63.75, 47.77, 74.92, 52.31, 68.44),
    "FashionMNIST": (95.94, 52.69, 86.38, 95.21, 50.50, 93.34),
    "BloodMNIST": (97.49, 51.20, 92.96, 96.26, 50.38, 94.81),
    "DermaMNIST": (79.50, 59.41, 56.31, 76.46, 50.43, 75.15),
    "OrganCMNIST": (93.16, 55.73, 74.98, 90.23, 53.07, 80.11),
    "OrganSMNIST": (79.78, 54.29, 67.66, 78.76, 52.38, 71.78),
    "PneumoniaMNIST": (86.54, 50.39, 85.19, 86.70, 50.00, 86.70),
    "RetinaMNIST": (54.25, 52.36, 49.48, 55.00, 50.58, 53.74),
}


# --- metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE_2)
def test_aop_reproduces_table_2(name: str) -> None:
    row = np.array(TABLE_2[name]) / 100
    for accuracy, auc_mia, aop in (row[:3], row[3:]):
        assert abs(accuracy_over_privacy(accuracy, auc_mia) - aop) <= 2e-4


def test_mean_aop_gain_of_table_2_is_not_the_printed_one() -> None:
    gains = [row[5] - row[2] for row in TABLE_2.values()]
    assert round(float(np.mean(gains)), 2) == 8.73  # printed: 7.72
    assert max(gains) == pytest.approx(20.67, abs=0.011)


def test_auc_equals_the_share_of_won_pairs() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 6, 50).astype(float), rng.integers(0, 5, 70).astype(float)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - np.mean(pairs), abs=1e-12)


def test_clamped_auc_and_aop_ignore_attacks_worse_than_chance() -> None:
    assert auc([0.0, 1.0], [2.0, 3.0]) == 0.0
    assert clamped_auc([0.0, 1.0], [2.0, 3.0]) == 0.5
    assert accuracy_over_privacy(0.8, 0.3) == accuracy_over_privacy(0.8, 0.5) == 0.8
    assert accuracy_over_privacy(0.8, 1.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("accuracy", "auc_mia"), [(96.2, 0.5), (0.9, 56.2), (-0.1, 0.5), (float("nan"), 0.5)]
)
def test_aop_refuses_percentages(accuracy: float, auc_mia: float) -> None:
    with pytest.raises(ValueError, match="must hold, but got"):
        accuracy_over_privacy(accuracy, auc_mia)


@pytest.mark.parametrize("bad", [[], [[1.0]], [np.nan], [np.inf]])
def test_auc_refuses_bad_scores(bad: list) -> None:
    with pytest.raises(ValueError, match="member_scores"):
        auc(bad, [0.0])


def test_roc_curve_is_thin_monotone_and_keeps_the_area() -> None:
    rng = np.random.default_rng(1)
    members, others = rng.normal(0.8, 1, 20000), rng.normal(0, 1, 15000)
    curve = roc_curve(members, others)
    assert 100 < len(curve.fpr) <= 200
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(curve.fpr) >= 0).all() and (np.diff(curve.tpr) >= 0).all()
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(auc(members, others), abs=1e-3)
    assert roc_curve([1.0, 2.0], [1.0, 2.0]).fpr[-1] == 1.0


def test_auc_standard_error_matches_the_spread_of_repeated_draws() -> None:
    rng = np.random.default_rng(2)
    values = [auc(rng.normal(0.5, 1, 200), rng.normal(0, 1, 120)) for _ in range(400)]
    assert auc_standard_error(float(np.mean(values)), 200, 120) == pytest.approx(np.std(values), rel=0.15)
    # Without any signal the rank sum's variance is known exactly: (m + n + 1) / (12 m n).
    assert auc_standard_error(0.5, 200, 120) == pytest.approx((321 / (12 * 200 * 120)) ** 0.5, rel=1e-9)
    with pytest.raises(ValueError, match="members >= 1"):
        auc_standard_error(0.5, 0, 10)


# --- splits and files ---------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_stratified_and_seeded() -> None:
    labels = np.random.default_rng(0).choice(5, size=997, p=[0.6, 0.2, 0.1, 0.08, 0.02])
    split = shadow_splits(labels, 5, seed=3, shadow=1)
    everything = np.concatenate([split.train, split.validation, split.test])
    assert np.array_equal(np.sort(everything), np.arange(997))
    assert len(split.train) == len(split.test) == round(0.45 * 997)
    for index in range(5):
        of_class = int((labels == index).sum())
        for part in (split.train, split.test):
            assert abs((labels[part] == index).sum() - 0.45 * of_class) <= 1.5
    again, other = (shadow_splits(labels, 5, seed=3, shadow=k) for k in (1, 2))
    assert np.array_equal(split.train, again.train) and not np.array_equal(split.train, other.train)


def test_every_image_is_a_member_about_as_often() -> None:
    labels = np.repeat(np.arange(3), [1, 20, 179])
    hits = np.zeros(200)
    for shadow in range(400):
        hits[shadow_splits(labels, 3, seed=0, shadow=shadow).train] += 1
    # Binomial(400, 0.45): std 0.025; six of them over 200 images.
    assert np.abs(hits / 400 - 0.45).max() < 0.15


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([0, 1, 7]), np.array([0, -1, 1])])
def test_splits_refuse_bad_labels(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="labels"):
        shadow_splits(labels, 3, seed=0, shadow=0)


def test_scores_survive_the_disk_and_refuse_pickles(tmp_path) -> None:
    scores = _shadow(0, shift=1.0, rows=30, classes=3)
    scores.save(tmp_path / "s.npz")
    read = ShadowScores.load(tmp_path / "s.npz")
    assert read.shadow == 0 and [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    for name in ("logits", "labels", "member"):
        assert np.array_equal(getattr(scores, name), getattr(read, name))
        assert getattr(scores, name).dtype == getattr(read, name).dtype
    np.savez(
        tmp_path / "evil.npz", shadow=0, logits=np.array([object()]), labels=read.labels, member=read.member
    )
    with pytest.raises(ArtifactError, match="never unpickled"):
        ShadowScores.load(tmp_path / "evil.npz")


def test_scores_refuse_what_a_diverged_model_answers() -> None:
    good = _shadow(0, 0.0, 10, 3)
    with pytest.raises(ValueError, match="10 of 10 rows"):
        ShadowScores(0, np.full((10, 3), np.nan, np.float32), good.labels, good.member)
    with pytest.raises(ValueError, match="float32"):
        ShadowScores(0, good.logits.astype(np.float64), good.labels, good.member)
    with pytest.raises(ValueError, match="one logit per class"):
        ShadowScores(0, good.logits[:, :1], good.labels + 1, good.member)


# --- the attack ---------------------------------------------------------------------------------------------


def _shadow(shadow: int, shift: float, rows: int, classes: int, seed: int = 0) -> ShadowScores:
    """Normal logits; a member's own-class logit is `shift` standard deviations higher."""
    rng = np.random.default_rng([seed, shadow])
    labels = rng.integers(0, classes, rows)
    member = rng.random(rows) < 0.5
    logits = rng.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 2 + shift * member
    return ShadowScores(shadow, logits.astype(np.float32), labels, member)


def _attack(shift: float, classes: int = 3, shadows: int = 5, rows: int = 300, seed: int = 0) -> Attack:
    scores = [_shadow(index, shift, rows, classes, seed) for index in range(shadows)]
    return Attack({index: fit_class_attack(scores, index, seed=7) for index in range(classes)})


def _result(attack: Attack, target: ShadowScores):
    member = target.member
    return attack_model(
        attack, target.logits[member], target.labels[member], target.logits[~member], target.labels[~member]
    )


def test_attack_finds_a_constructed_shift_and_nearly_attains_the_best_possible_auc() -> None:
    result = _result(_attack(shift=2.0, rows=600), _shadow(99, 2.0, 4000, 3))
    best = 0.9214  # Phi(2 / sqrt(2)): the AUC of the true likelihood ratio
    assert best - 0.03 < result.auc < best + 0.02
    assert all(best - 0.05 < value < best + 0.04 for value in result.per_class if value is not None)
    assert result.members + result.non_members == 4000


def test_attack_on_identical_distributions_is_at_chance() -> None:
    values = [_result(_attack(0.0, seed=seed), _shadow(99, 0.0, 3000, 3, seed)).auc for seed in range(3)]
    assert all(abs(value - 0.5) < 0.05 for value in values)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_attack_on_an_overfitted_model_beats_the_attack_on_a_regular_one() -> None:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    data, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    data = data / 16 + rng.normal(0, 0.6, data.shape)  # noise: there is something to learn by heart
    pool, target = np.arange(800), np.arange(800, len(data))

    def answers(model: MLPClassifier, rows: np.ndarray) -> np.ndarray:
        return np.log(model.predict_proba(data[rows]) + 1e-9).astype(np.float32)

    def fit(rows: np.ndarray, alpha: float) -> MLPClassifier:
        return MLPClassifier((64,), alpha=alpha, max_iter=80, random_state=0, tol=0.0).fit(
            data[rows], labels[rows]
        )

    scores = []
    for shadow in range(4):
        split = shadow_splits(labels[pool], 10, seed=0, shadow=shadow)
        rows = np.concatenate([split.train, split.test])
        member = np.arange(len(rows)) < len(split.train)
        scores.append(
            ShadowScores(shadow, answers(fit(split.train, 1e-4), rows), labels[rows].astype(np.int64), member)
        )
    attack = Attack({index: fit_class_attack(scores, index, seed=0) for index in range(10)})
    inside, outside = target[:500], target[500:]

    def attacked(alpha: float) -> float:
        model = fit(inside, alpha)
        return attack_model(
            attack, answers(model, inside), labels[inside], answers(model, outside), labels[outside]
        ).auc

    overfitted, regular = attacked(1e-4), attacked(30.0)
    assert overfitted > 0.65
    assert abs(regular - 0.5) < 0.08 < overfitted - regular


def test_fit_is_deterministic_and_blind_to_the_target() -> None:
    target = _shadow(99, 1.0, 200, 3)
    first, second = (_attack(1.0).scores(target.logits, target.labels) for _ in range(2))
    assert np.array_equal(first, second)


def test_selection_matches_a_naive_version() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    scores = [_shadow(index, 1.0, 400, 2) for index in range(5)]
    fitted = fit_class_attack(scores, 1, seed=7, holdout=0.4)
    out = held_out_shadows(range(5), 7, 0.4)
    assert len(out) == 2
    rows = {flag: [s for s in scores if (s.shadow in out) is flag] for flag in (True, False)}
    x, y = {}, {}
    for flag, parts in rows.items():
        x[flag] = np.concatenate([s.logits[s.labels == 1] for s in parts])
        y[flag] = np.concatenate([s.member[s.labels == 1] for s in parts])
    scaler = StandardScaler().fit(x[False])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(x[False]), y[False])
    expected = roc_auc_score(y[True], model.decision_function(scaler.transform(x[True])))
    assert fitted.validation_auc["logistic_regression"] == pytest.approx(expected, abs=1e-3)
    assert fitted.validation_auc[fitted.kind] == max(fitted.validation_auc.values())
    assert set(fitted.validation_auc) == {"logistic_regression", "svc_rbf", "random_forest"}


def test_equal_aucs_go_to_the_simplest_model() -> None:
    scores = [_shadow(index, 60.0, 120, 2) for index in range(4)]
    fitted = fit_class_attack(scores, 0, seed=0)
    assert set(fitted.validation_auc.values()) == {1.0}
    assert fitted.kind == "logistic_regression"


def test_pooled_scores_of_different_kinds_are_on_one_scale() -> None:
    """A leaky class beside one that does not leak: pooling must not let the second drown the first."""
    rng = np.random.default_rng(0)

    def shadow(index: int, rows: int) -> ShadowScores:
        part = _shadow(index, 0.0, rows, 2)
        logits = part.logits.copy()
        # Class 1 leaks through the distance from zero alone: no line
        # separates it, so logistic regression loses.
        ring = (part.labels == 1) & part.member
        logits[ring] *= 4
        return ShadowScores(index, logits, part.labels, part.member)

    scores = [shadow(index, 500) for index in range(5)]
    attack = Attack({index: fit_class_attack(scores, index, seed=1) for index in range(2)})
    assert attack.classes[1].kind != "logistic_regression"
    target = shadow(99, 6000)
    result = _result(attack, target)
    leaky = result.per_class[1]
    assert leaky is not None and leaky > 0.8
    # Half of the pairs are within or across the silent class; the Bayes pooling gains from the rest.
    assert result.auc > 0.5 + 0.4 * (leaky - 0.5)
    values = attack.scores(target.logits, target.labels)
    assert values[target.labels == 0].std() < 0.5 * values[target.labels == 1].std()
    order = rng.permutation(len(values))
    assert np.array_equal(attack.scores(target.logits[order], target.labels[order]), values[order])


@pytest.mark.parametrize(
    ("scale", "offset", "members"), [(1.0, 0.0, 4000), (0.01, 0.5, 4000), (250.0, -1e4, 1000)]
)
def test_calibration_recovers_the_log_likelihood_ratio_from_any_scale(
    scale: float, offset: float, members: int
) -> None:
    """Members N(1/2, 1), others N(-1/2, 1): the log-likelihood ratio of x
    is x itself, however many there are of each."""
    rng = np.random.default_rng(0)
    member = np.arange(8000) < members
    values = rng.normal(size=8000) + np.where(member, 0.5, -0.5)
    slope, intercept = _calibrate(scale * values + offset, member)
    probe = np.array([-2.0, 0.0, 2.0])
    assert slope * (scale * probe + offset) + intercept == pytest.approx(probe, abs=0.15)
    useless, _ = _calibrate(scale * rng.normal(size=8000) + offset, member)
    assert 0 < useless * scale < 0.06


def test_degenerate_classes_fall_back_to_a_constant_score() -> None:
    scores = [_shadow(index, 2.0, 200, 4) for index in range(4)]
    absent = [
        ShadowScores(s.shadow, s.logits[s.labels != 3], s.labels[s.labels != 3], s.member[s.labels != 3])
        for s in scores
    ]
    fallback = fit_class_attack(absent, 3, seed=0)
    assert (fallback.kind, fallback.note) == ("constant", "no shadow model saw this class")
    assert (fallback.scores(scores[0].logits) == 0).all()
    one_sided = [ShadowScores(s.shadow, s.logits, s.labels, s.member | (s.labels == 2)) for s in scores]
    assert "0 non-members" in fit_class_attack(one_sided, 2, seed=0).note
    attack = Attack({index: fit_class_attack(absent, index, seed=0) for index in range(4)})
    result = _result(attack, _shadow(99, 2.0, 1000, 4))
    assert result.per_class[3] == 0.5 and result.auc > 0.75
    report = result.figures(accuracy=0.9)
    assert report.auc == result.auc_clamped and report.aop == pytest.approx(0.9 / (2 * result.auc) ** 2)
    assert attack.classes[3].figures().val_auc == 0.5


def test_result_without_non_members_of_a_class_says_none() -> None:
    target = _shadow(99, 1.0, 300, 3)
    keep = target.member | (target.labels != 2)
    cut = ShadowScores(0, target.logits[keep], target.labels[keep], target.member[keep])
    assert _result(_attack(1.0), cut).per_class[2] is None


def test_svc_is_subsampled_above_its_limit() -> None:
    scores = [_shadow(index, 1.0, 400, 1) for index in range(3)]
    small = fit_class_attack(scores, 0, seed=0, max_svc_rows=100)
    full = fit_class_attack(scores, 0, seed=0, max_svc_rows=10**6)
    assert small.validation_auc["svc_rbf"] != full.validation_auc["svc_rbf"]
    assert small.validation_auc["random_forest"] == full.validation_auc["random_forest"]


def test_held_out_shadows() -> None:
    assert len(held_out_shadows(range(10), 0, 0.2)) == 2
    assert len(held_out_shadows(range(2), 0, 0.01)) == len(held_out_shadows(range(2), 0, 0.89)) == 1
    assert held_out_shadows([4, 1, 3], 5, 0.4) == held_out_shadows([3, 4, 1], 5, 0.4)
    for bad in ([0], [], [1, 1]):
        with pytest.raises(ValueError, match="shadow_models >= 2"):
            held_out_shadows(bad, 0, 0.2)


def test_attack_refuses_labels_without_a_class_attack() -> None:
    attack = Attack({0: _attack(1.0).classes[0]})
    with pytest.raises(ValueError, match=r"\[1, 2\] have none"):
        attack.scores(np.zeros((3, 3), np.float32), np.array([0, 1, 2]))
