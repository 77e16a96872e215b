"""What the report's first sentences say: the worst that was measured, no more, and what was not measured."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from test_report import constructed_arm, fake_report

from kr_ray.privacy import attacks as attacking
from kr_ray.privacy.scores import SampleScores
from kr_ray.report import assessment, verdict, words
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.artefacts import artefacts
from kr_ray.report.build import draw_figures, render_summary
from kr_ray.report.importance import parameter_importance, why_unknown
from kr_ray.report.repetition import repetition
from kr_ray.report.schema import Report, validate_report
from kr_ray.runs.figures import LiraArm, Trial

TITLES = {
    "kr": "Student",
    "teacher": "Teacher",
    "fixed_generator": "Student, fixed generator",
    "private": "DP-SGD: private",
}


@pytest.fixture(scope="module")
def arms() -> dict[str, dict[str, Any]]:
    """Audited arms: `leak` knows canaries by heart, `some` a little, `null` nothing."""
    with pytest.MonkeyPatch.context() as patch:
        quick_attacks(patch)
        return {"leak": constructed_arm(8.0), "some": constructed_arm(2.0), "null": constructed_arm(0.0)}


def quick_attacks(patch: pytest.MonkeyPatch) -> None:
    """The attack that fits models takes most of the time, and no sentence here depends on it: it guesses."""
    rng = np.random.default_rng(9)
    patch.setattr(
        attacking,
        "matched_shadow_scores",
        lambda groups, _: {n: rng.normal(size=g.member.shape) for n, g in groups.items()},
    )


def report_with(lira: dict[str, Any] | None, *without: str) -> Report:
    """The made-up run (average attack 50.4, teacher 51.2, no copies) with such a worst-case audit, and
    without some sections."""
    raw = fake_report()
    if lira:
        raw["audit"]["lira"] = {name: arm | {"title": TITLES[name]} for name, arm in lira.items()}
    for name in without:
        part, _, key = name.rpartition(".")
        del (raw[part] if part else raw)[key]
    return validate_report(raw)


# --- the headline -------------------------------------------------------------------------------------------


def test_a_leak_in_the_worst_case_is_told_before_a_harmless_average(arms: dict[str, Any]) -> None:
    found = arms["some"]["canary"]
    text = verdict.headline(report_with({"kr": arms["some"]})).replace("\u00a0", " ")
    assert "gives away training images" in text
    assert (
        f"{100 * found['tpr_at_fpr_0.001']:.1f} % of the canaries" in text and found["tpr_at_fpr_0.001"] > 0.1
    )
    assert f"epsilon is at least {found['epsilon']['clopper_pearson']:.2f}" in text
    assert "LiRA online, fixed variance, logit score" in text
    assert "50.4" not in text and "not audited" not in text


def test_with_the_average_alone_the_headline_says_that_the_worst_case_is_missing() -> None:
    text = verdict.headline(report_with(None))
    assert "50.4 times in 100" in text and "The worst case" in text and text.endswith("was not audited.")
    assert "canar" not in text and "epsilon" not in text


def test_a_worst_case_that_found_nothing_is_not_called_protection(arms: dict[str, Any]) -> None:
    text = verdict.headline(report_with({"kr": arms["null"]})).replace("\u00a0", " ")
    assert "no more than guessing" in text and "not “protected”" in text and "gives away" not in text
    assert "epsilon is at least" not in text


def test_the_teachers_leak_is_never_the_students_and_a_missing_audit_of_the_student_is_named(
    arms: dict[str, Any],
) -> None:
    alone = verdict.headline(report_with({"teacher": arms["leak"]}))
    assert "gives away" not in alone and "only the teacher's was" in alone
    both = report_with({"teacher": arms["leak"], "kr": arms["null"]})
    assert verdict.worst_found(both) == verdict.found_in("kr", verdict.handed_on(both)["kr"])
    assert "gives away" not in verdict.headline(both)


@pytest.mark.parametrize("order", list(itertools.permutations(("kr", "fixed_generator"))))
def test_the_worse_of_two_arms_is_quoted_whatever_their_order(
    arms: dict[str, Any], order: tuple[str, ...]
) -> None:
    figures = {"kr": arms["null"], "fixed_generator": arms["leak"]}
    report = report_with({name: figures[name] for name in order})
    found = verdict.worst_found(report)
    assert found is not None and found.arm == "fixed_generator" and found.leaks
    assert "the student, fixed generator gives away" in verdict.headline(report)
    assert "the worse of 2 audited" in verdict.shown(report)[0]


def test_without_an_average_attack_that_is_said(arms: dict[str, Any]) -> None:
    report = report_with({"kr": arms["leak"]}, "audit.kr")
    assert verdict.headline(report).endswith("The average attack was not made.")


def test_an_audit_before_any_training_still_tells_its_finding(arms: dict[str, Any]) -> None:
    report = report_with({"kr": arms["leak"]}, "teacher", "student", "audit.kr", "audit.copies")
    assert verdict.headline(report).startswith("The student gives away training images")
    teacher_only = report_with({"teacher": arms["leak"]}, "teacher", "student", "audit.kr", "audit.copies")
    assert verdict.headline(teacher_only).startswith(
        "Only the worst-case audit of a model that is not handed on"
    )


def test_copies_are_told_in_the_headline_beside_a_harmless_attack() -> None:
    raw = fake_report()
    raw["audit"]["copies"]["exact_copies"] = 3
    text = verdict.headline(validate_report(raw)).replace("\u00a0", " ")
    assert (
        "The generator repeats training images: 3 of 2,000 generated images equal one pixel by pixel." in text
    )


def test_few_pairs_give_the_coarser_rate_and_none_the_auc(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_attacks(monkeypatch)
    report = report_with({"kr": constructed_arm(8.0, samples=100, models=8)})
    coarse = verdict.worst_found(report)
    assert coarse is not None and coarse.false_positive_rate == 0.01 and coarse.hits
    assert coarse.share == coarse.hits / coarse.pairs  # type: ignore[operator]
    assert "one false accusation in 100 " in verdict.headline(report)
    tiny = report_with({"kr": constructed_arm(8.0, samples=20, models=4)})
    found = verdict.worst_found(tiny)
    assert found is not None and found.false_positive_rate is None and found.guessing == 0.5
    assert "times in 100 (by guessing: 50)" in verdict.headline(tiny)


# --- many attacks -------------------------------------------------------------------------------------------


def test_noise_is_hardly_ever_called_a_leak_though_several_attacks_were_tried() -> None:
    """40 audits of nothing: a leak by chance in at most one in twenty, within what 40 audits can tell."""
    found = [verdict.found_in("kr", null_arm(seed)) for seed in range(40)]
    assert sum(one.leaks for one in found) <= 7  # 99.9 % quantile of Binomial(40, 0.05)
    assert sum(not one.chosen_before for one in found) <= 7
    assert all(one.attacks == 5 for one in found)


def null_arm(seed: int) -> LiraArm:
    """An arm whose answers know nothing of membership, under all attacks that may be quoted and need no
    fitted models."""
    rng = np.random.default_rng(seed)
    half = rng.random((8, 130)) < 0.5
    member = np.stack([side for coins in half for side in (coins, ~coins)])
    labels = rng.integers(0, 4, 130)
    samples = SampleScores(rng.normal(size=(16, 130, 1, 4)).astype(np.float32), labels, labels, member)
    attacks = {
        name: {"canary": attacking.figures(scores, member, seed)}
        for name, scores in attacking.attack_scores(samples, None).items()
        if "per_sample" not in name
    }
    canary = attacks[attacking.HEADLINE]["canary"]
    facts = {"canary_kind": "random", "canaries": 130, "population_samples": 130, "reference_images": 0}
    return LiraArm.model_validate(
        {
            "models": 16,
            "queries": 1,
            "headline": attacking.HEADLINE,
            "population": canary,
            "canary": canary,
            "attacks": attacks,
        }
        | {
            "true_label_share": {},
            "given_label_share": {},
            "test_accuracy": 0.9,
            "test_accuracy_sd": 0.0,
            "seconds": 1.0,
        }
        | facts
    )


def test_another_attack_is_quoted_only_where_it_stands_out_of_all_of_them(arms: dict[str, Any]) -> None:
    leak = {
        **arms["leak"]["attacks"]["lira_online_fixed_logit"]["canary"],
        "ci_low": 0.5,
    }  # of many false positives
    quiet = arms["null"]
    strong = quiet | {
        "attacks": quiet["attacks"] | {"rmia_online": {"canary": leak, "population": quiet["population"]}}
    }
    report = report_with({"kr": strong})
    found = verdict.worst_found(report)
    assert found is not None and found.attack == "rmia_online" and not found.chosen_before and found.leaks
    text = verdict.headline(report).replace("\u00a0", " ")
    assert f"RMIA, online, the strongest of {found.attacks} attacks" in text and "gives away" in text
    # The same find by an attack with a variance per sample, from 16 models: not to be quoted.
    rough = quiet | {
        "attacks": quiet["attacks"] | {"lira_online_per_sample_logit": {"canary": leak, "population": leak}}
    }
    assert verdict.worst_found(report_with({"kr": rough})).chosen_before  # type: ignore[union-attr]
    # A little more than the attack chosen beforehand is the luck of the best of many.
    lucky = leak | {"tpr_at_fpr_0.001": 0.02, "ci_low": 0.004, "ci_high": 0.03}
    best = quiet | {"attacks": quiet["attacks"] | {"rmia_online": {"canary": lucky, "population": lucky}}}
    assert verdict.worst_found(report_with({"kr": best})).chosen_before  # type: ignore[union-attr]


def test_a_corrected_bound_is_lower_the_more_there_was_to_choose_from() -> None:
    bounds = [verdict.corrected_low(0.3, 0.2, 1000, choices) for choices in (1, 3, 12)]
    assert bounds[0] == pytest.approx(0.2) and bounds == sorted(bounds, reverse=True) and bounds[-1] > 0.1
    assert verdict.corrected_low(0.3, 0.0, 1000, 3) == 0.0
    assert 0.9 < verdict.corrected_low(1.0, 0.99, 1000, 12) < 0.99


# --- copies -------------------------------------------------------------------------------------------------


def copies(**changes: Any) -> Any:
    raw = fake_report()
    own = {key: value for key, value in changes.items() if key in ("exact_copies", "images", "test")}
    pixels = {key: value for key, value in changes.items() if key not in own}
    raw["audit"]["copies"] |= own
    raw["audit"]["copies"]["spaces"] = {
        "pixels": raw["audit"]["copies"]["spaces"]["pixels"] | pixels,
        "features": raw["audit"]["copies"]["spaces"]["features"],
    }
    return validate_report(raw).audit.copies  # type: ignore[union-attr]


def test_whether_training_images_are_repeated_is_answered_in_a_sentence() -> None:
    nothing = repetition(copies())
    assert (
        not nothing.repeats and "were not found" in nothing.sentence and "none of 2,000" in nothing.sentence
    )
    one = repetition(copies(exact_copies=1))
    assert one.repeats and "1 of 2,000 generated images equals one" in one.short
    near = repetition(copies(near_copies=120, near_copy_share=0.06))
    assert (
        near.repeats
        and "near-copies by pixels" in near.short
        and "1.0 % would be expected" in near.short.replace("\u00a0", " ")
    )
    assert repetition(copies(data_copying=-4.0)).repeats and not repetition(copies(data_copying=-2.1)).repeats
    # 30 of 2,000 where 20 are expected: no sign where the threshold rests on a handful of test images.
    assert not repetition(copies(near_copies=30, near_copy_share=0.015, test=300)).repeats


# --- what is handed on --------------------------------------------------------------------------------------


def test_every_artefact_says_what_was_found_and_what_nobody_tried(arms: dict[str, Any]) -> None:
    student, synthetic, generator = artefacts(report_with({"kr": arms["leak"]}))
    assert (student.state, student.verdict) == ("found", "leak found") and len(student.tests) == 2
    assert "epsilon at least" in student.tests[0].found
    for other in (synthetic, generator):
        assert other.state == "partly" and "not attacked" in other.verdict and "membership" in other.open
    average, _, _ = artefacts(report_with(None))
    assert (
        average.state == "partly"
        and "worst case not tried" in average.verdict
        and "worst case" in average.open
    )
    assert artefacts(report_with({"kr": arms["null"]}))[0].verdict == "tried, none found"
    assert [row.verdict for row in artefacts(report_with(None, "audit"))] == ["not attacked"] * 3
    # The teacher's audit attacks nothing that is handed on.
    assert len(artefacts(report_with({"teacher": arms["leak"]}))[0].tests) == 1


def test_the_assessment_names_every_risk_and_whether_it_was_tested(arms: dict[str, Any]) -> None:
    full, bare = (
        assessment.tests(report) for report in (report_with({"kr": arms["leak"]}), report_with(None, "audit"))
    )
    assert {test.risk for test in full} >= {"Singling out", "Linkability", "Inference", "Extraction"}
    assert [test.made for test in full] == ["made", "made", "in part", *["not made"] * 4]
    assert all(test.made == "not made" for test in bare)
    facts = {fact.term: " ".join(fact.texts) for fact in assessment.facts(report_with({"kr": arms["leak"]}))}
    assert facts["Unit"].startswith("One image") and "15 other models" in facts["Attacker’s knowledge"]
    assert "commit" in facts["Made by"] and "2 January 2031" in facts["When"]


@pytest.mark.parametrize("lira", [None, "some", "null"])
def test_the_summary_sheet_says_what_the_report_says(arms: dict[str, Any], lira: str | None) -> None:
    report = report_with({"kr": arms[lira]} if lira else None)
    page = render_summary(report)
    assert verdict.headline(report) in page and "No guarantee." in page and "default-src 'none'" in page
    assert "<script" not in page and "Assessed by" in page
    for row in artefacts(report):
        assert row.name in page and row.verdict in page


def test_every_figure_has_a_text_that_tells_its_finding(arms: dict[str, Any]) -> None:
    report = report_with({"kr": arms["some"]})
    texts = {name: text.replace("\u00a0", " ") for name, text in alt_texts(report).items()}
    assert set(draw_figures(report)) <= set(texts)
    assert "AUC 50.4 % against the student" in texts["roc"] and "of canaries" in texts["worst_case"]
    assert "cardinality scale 0.61" in texts["importance"] and "97.7 %" in texts["checkpoints"]
    assert "13 of 100 checkpoints raised" in texts["collapse"]
    assert "taken for" in texts["student_confusion"] and "not found" in texts["copies"]


def test_exponents_and_per_cent_signs_do_not_break() -> None:
    assert words.bind("delta 1e-05, 3 %") == "delta 1e\u201105, 3\u00a0%"
    assert words.bind("the-best") == "the-best"


# --- importance ---------------------------------------------------------------------------------------------


PARAMETERS = ["latent_std", "regeneration_rate", "cardinality_scale"]


def trials(n: int, noise: float, slope: float, seed: int) -> list[Trial]:
    """Trials whose CAS follows the cardinality scale by `slope` per unit, and noise."""
    rng = np.random.default_rng(seed)
    return [
        Trial.model_validate({
            "trial": number, "latent_std": float(rng.uniform(1, 2.5)),
            "regeneration_rate": int(rng.integers(1, 11)),
            "cardinality_scale": (scale := int(rng.integers(1, 11))), "state": "complete",
            "val_cas": float(0.8 + slope * scale + rng.normal(0, noise)),
        })
        for number in range(n)
    ]  # fmt: skip


def test_the_parameter_that_matters_is_named_where_trials_can_say_so() -> None:
    found = parameter_importance(trials(40, 0.002, 0.01, 0), PARAMETERS, 5000)
    assert found is not None and max(found, key=lambda key: found[key]) == "cardinality_scale"
    assert sum(found.values()) == pytest.approx(1)


def test_few_trials_or_counting_noise_give_a_sentence_and_no_figure() -> None:
    assert parameter_importance(trials(19, 0.002, 0.01, 0), PARAMETERS, 5000) is None
    assert "19 trials ran to their end, and below 20" in why_unknown(
        trials(19, 0.002, 0.01, 0), PARAMETERS, 5000
    )
    assert "counting on 270 validation images" in why_unknown(trials(40, 0.005, 0.0005, 1), PARAMETERS, 270)
    assert "do not differ" in why_unknown(
        [trial.model_copy(update={"val_cas": 0.9}) for trial in trials(25, 0, 0, 2)], PARAMETERS, 500
    )


def test_noise_of_training_is_hardly_ever_taken_for_a_parameter() -> None:
    """200 searches whose CAS differs far more than by counting, but by no parameter."""
    named = sum(not why_unknown(trials(30, 0.05, 0.0, seed), PARAMETERS, 100_000) for seed in range(200))
    assert named <= 20  # 99.9 % quantile of Binomial(200, 0.05)
    assert all(not why_unknown(trials(30, 0.01, 0.01, seed), PARAMETERS, 100_000) for seed in range(20))
