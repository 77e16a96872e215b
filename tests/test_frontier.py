"""The frontier: who is beaten by whom, what is recommended, how it is drawn, and the search for equal
accuracy, on constructed figures and functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_further_students import bound
from test_report import _Page, constructed_arm, fake_report

from kr_ray.audits.matching import matched, next_value, standard_error
from kr_ray.config import MainKey
from kr_ray.config.dp import DpSgdSection
from kr_ray.report import figures, frontier
from kr_ray.report.alt_texts import alt_texts
from kr_ray.report.build import ReportData, render_page, render_summary, write_report
from kr_ray.report.frontier import Trained, advice, frontier_of
from kr_ray.report.schema import Report, validate_report
from kr_ray.runs.figures import Bound, Frontier, FrontierRow, Leak, LiraArm, Matched, Tried
from kr_ray.runs.results import ClassifierResult, FrontierResult, Result


def row(name: str, accuracy: float | None, share: float | None, **keys: Any) -> FrontierRow:
    """A row whose intervals are 0.02 of accuracy and 0.01 of leak to either side."""
    low, high = keys.pop("low", None), keys.pop("high", None)
    leak = None if share is None else Leak(
        attack="lira_online_fixed_logit", chosen_before=True, false_positive_rate=keys.pop("rate", 0.001),
        share=share, low=max(0.0, share - 0.01) if low is None else low,
        high=min(1.0, share + 0.01) if high is None else high,
        hits=round(1000 * share), pairs=1000, ordinary=0.001, epsilon=keys.pop("epsilon", None),
    )  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "kind": name, "title": name.capitalize(), "note": "", "handed_on": name != "teacher",
        "accuracy": accuracy, "accuracy_low": accuracy and max(0.0, accuracy - 0.02),
        "accuracy_high": accuracy and min(1.0, accuracy + 0.02), "audited_accuracy": accuracy,
        "audited_sd": accuracy and 0.01, "leak": leak, "runs": 16, "missing": [], "bound": None, "alarm": "",
        "cpu_seconds": 60.0, "gpu_seconds": 0.0, "folders": [name], "matched": None, "unmatched": "",
    }  # fmt: skip
    return FrontierRow(**values | keys)


def of_rows(*rows: FrontierRow, **keys: Any) -> Frontier:
    """As `frontier_of` puts them together."""
    beaten = [one.model_copy(update={"dominated_by": frontier.dominators(one, rows)}) for one in rows]
    values: dict[str, Any] = {
        "rows": beaten, "models": 16, "asked_models": 16, "leak_limit": None, "false_positive_rate": 0.001,
        "match": "", "recommended": "", "settings": [],
    }  # fmt: skip
    found = Frontier(**values | keys)
    best = frontier.recommended(found)
    return found.model_copy(update={"recommended": best.name if best else ""})


PRIVATE = Bound.model_validate(bound(2.0))


# --- who is beaten by whom ----------------------------------------------------------------------------------


def test_a_guarantee_counts_and_one_that_is_none_or_contradicted_does_not() -> None:
    proves = Bound.model_validate(bound(8.0))
    rows = (
        row("kr", 0.9, 0.02), row("dp", 0.6, 0.1, bound=proves), row("tight", 0.7, 0.05, bound=PRIVATE),
        row("vacuous", 0.6, 0.1, bound=Bound.model_validate(bound(800.0))),
        row("broken", 0.6, 0.1, bound=proves, alarm="wrong"),
    )  # fmt: skip
    beaten = {one.name: one.dominated_by for one in of_rows(*rows).rows}
    assert beaten["kr"] == [] and beaten["tight"] == [] and beaten["dp"] == ["tight"]
    assert beaten["vacuous"] == beaten["broken"] == ["kr", "dp", "tight"]


def test_a_method_is_beaten_by_those_at_least_as_good_in_both_and_better_in_one() -> None:
    rows = of_rows(
        row("teacher", 0.95, 0.5), row("kr", 0.90, 0.05), row("worse", 0.88, 0.05), row("worst", 0.85, 0.6),
        row("twin", 0.90, 0.05), row("private", 0.6, 0.001),
    ).rows  # fmt: skip
    assert {one.name: one.dominated_by for one in rows} == {
        "teacher": [], "kr": [], "worse": ["kr", "twin"], "worst": ["teacher", "kr", "worse", "twin"],
        "twin": [], "private": [],
    }  # fmt: skip


def test_dominance_is_that_of_a_naive_search_on_random_rows() -> None:
    random = np.random.default_rng(0)
    rows = [row(f"m{k}", float(a), float(b)) for k, (a, b) in enumerate(random.integers(1, 6, (30, 2)) / 10)]
    points = np.array([(one.accuracy, one.leak.share if one.leak else 0) for one in rows])
    for one in rows:
        here = np.array([one.accuracy, one.leak.share if one.leak else 0])
        beats = (points[:, 0] >= here[0]) & (points[:, 1] <= here[1]) & (points != here).any(1)
        assert frontier.dominators(one, rows) == [rows[k].name for k in np.flatnonzero(beats)]
    undominated = [one for one in rows if not frontier.dominators(one, rows)]
    assert undominated and len(undominated) < len(rows)


def test_what_was_not_measured_beats_nobody_and_is_beaten_by_nobody() -> None:
    rows = of_rows(row("kr", 0.9, 0.05), row("unaudited", 0.99, None), row("untrained", None, 0.0)).rows
    assert [one.dominated_by for one in rows] == [[], [], []]


def test_beaten_for_sure_only_where_both_intervals_are_apart() -> None:
    found = of_rows(row("kr", 0.9, 0.02), row("near", 0.89, 0.1), row("far", 0.8, 0.1))
    assert [frontier.surely_beaten(one, found.rows) for one in found.rows] == [False, False, True]
    assert frontier.verdict_of(found.rows[1], found)[0] == "beaten by Kr, intervals overlap"
    assert frontier.verdict_of(found.rows[2], found)[0] == "beaten by Kr, Near"


# --- the recommendation -------------------------------------------------------------------------------------


def said(found: Frontier) -> str:
    return advice(found).answer.replace("\u00a0", " ").replace("\u2011", "-")


def test_the_most_accurate_method_whose_whole_interval_is_below_the_limit() -> None:
    rows = (row("teacher", 0.99, 0.0), row("kr", 0.9, 0.06), row("dm", 0.8, 0.03), row("dp", 0.7, 0.001))
    found = of_rows(*rows, leak_limit=0.05)
    assert found.recommended == "dm" and said(found).startswith("Dm: the most accurate method (80.0 %)")
    assert "5 % of the canaries at one false accusation in 1,000" in said(found)
    # 6 % lies below 6.5, but its interval reaches 7: nobody knows.
    assert of_rows(*rows, leak_limit=0.065).recommended == "dm"
    assert of_rows(*rows, leak_limit=0.08).recommended == "kr"
    assert of_rows(*rows, leak_limit=0.02).recommended == "dp"  # the teacher stays with the images


def test_none_is_said_honestly_and_why() -> None:
    above = of_rows(row("kr", 0.9, 0.3), row("dm", 0.8, 0.2), leak_limit=0.05)
    assert not above.recommended and said(above).startswith("None:")
    assert "Measured above it: Kr, 30.0 %; Dm, 20.0 %." in said(above)
    unsure = of_rows(row("kr", 0.9, 0.04, high=0.07), leak_limit=0.05)
    assert not unsure.recommended
    assert "Measured below it, but with intervals that reach beyond: Kr" in said(unsure)
    # Half widths of 3 points must become 1: nine times the runs.
    assert "About 144 runs would tell" in said(unsure)
    coarse = of_rows(row("kr", 0.9, 0.6, rate=None), leak_limit=0.05, false_positive_rate=None)
    assert not coarse.recommended and "too few runs" in said(coarse)
    unmade = of_rows(row("kr", None, None), leak_limit=0.05)
    assert not unmade.recommended and "Not measured yet: Kr." in said(unmade)
    assert not advice(above).promises and not advice(above).promises_not


def test_without_a_limit_the_frontier_is_named_and_nothing_recommended() -> None:
    found = of_rows(row("teacher", 0.99, 0.5), row("kr", 0.9, 0.06), row("bad", 0.8, 0.07))
    assert not found.recommended and "--leak-limit" in said(found)
    assert "Kr with 90.0 %" in said(found) and "Bad" not in said(found) and "Teacher" not in said(found)
    assert "nothing can be recommended" in said(of_rows(row("kr", None, None)))


def test_accuracies_that_cannot_be_told_apart_are_named() -> None:
    found = of_rows(row("kr", 0.9, 0.03), row("dm", 0.89, 0.02), row("dp", 0.7, 0.0), leak_limit=0.05)
    assert found.recommended == "kr"
    assert "cannot be told from that of others below the limit" in said(found) and "Dm, 89.0 %" in said(found)
    assert "Dp" not in said(found)


def test_what_is_proved_is_told_apart_from_what_was_measured() -> None:
    private = row("dp", 0.7, 0.001, bound=Bound.model_validate(bound(2.0)))
    found = advice(of_rows(private, leak_limit=0.05))
    promised = " ".join(found.promises).replace("\u00a0", " ")
    assert "Proved: ε ≤ 2.00" in promised and "at most 0.7 %" in promised  # e^2 / 1,000
    assert any("not validation and test images" in text for text in found.promises_not)
    open_one = advice(of_rows(row("kr", 0.7, 0.001), leak_limit=0.05))
    assert not any("Proved" in text for text in open_one.promises)
    assert any("No proof" in text.replace("\u00a0", " ") for text in open_one.promises_not)


def test_what_a_guarantee_allows_at_a_false_positive_rate() -> None:
    def proved(epsilon: float, rate: float, **keys: Any) -> float | None:
        return frontier.proved_rate(Bound.model_validate(bound(epsilon) | {"delta": 0.0} | keys), rate)

    assert proved(1.0, 0.01) == pytest.approx(0.01 * math.e)
    assert proved(0.0, 0.01) == pytest.approx(0.01)
    assert proved(3.0, 0.5) == pytest.approx(1 - math.exp(-3) * 0.5)  # e^3 / 2 is no share
    assert proved(80.0, 0.01) is None and proved(2.0, 0.01, guarantee=False) is None


# --- put together from results ------------------------------------------------------------------------------


def trained(name: str, accuracy: float | None, **keys: Any) -> Trained:
    privacy = keys.pop("privacy", None)
    result = None if accuracy is None else ClassifierResult(
        test_accuracy=accuracy, test_loss=1.0, val_accuracy=accuracy, confusion=[], steps=1, images_seen=1,
        batch_size=1, learning_rate=0.1, parameters=1, seconds=3.0, privacy=privacy,
        work=None if accuracy is None else {"cpu_seconds": 5.0, "gpu_seconds": 1.0, "images_trained": 1},
    )  # fmt: skip
    stages: list[Result] = [*([result] if result else []), Result(wall_s=10.0)]
    values: dict[str, Any] = {"kind": name, "title": name, "note": "how", "folders": [name], "on_gpu": False}
    return Trained(name=name, result=result, stages=stages, **values | keys)


def arm(shift: float, **keys: Any) -> LiraArm:
    return LiraArm.model_validate(constructed_arm(shift, **keys))


def together(rows: list[Trained], lira: dict[str, LiraArm], **keys: Any) -> Frontier:
    values: dict[str, Any] = {
        "missing": {}, "matched": {}, "unmatched": {}, "test_images": 400, "models": 16, "asked_models": 16,
        "leak_limit": None, "match": "", "settings": [],
    }  # fmt: skip
    return frontier_of(trained=rows, lira=lira, **values | keys)


@pytest.fixture(scope="module")
def arms() -> dict[str, LiraArm]:
    few, many = {"samples": 40, "models": 8}, {"samples": 130, "models": 16}
    none = lambda groups, seed: {name: np.zeros(one.member.shape) for name, one in groups.items()}  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:  # the slowest of twelve attacks, and not the headline
        patch.setattr("kr_ray.privacy.attacks.matched_shadow_scores", none)
        return _arms(few, many)


def _arms(few: dict[str, int], many: dict[str, int]) -> dict[str, LiraArm]:
    return {"teacher": arm(8.0, **many), "kr": arm(0.0, **many), "few": arm(0.0, **few)}


def test_rows_take_their_figures_from_run_and_audit_at_a_rate_that_all_bear(
    arms: dict[str, LiraArm],
) -> None:
    both = {name: arms[name] for name in ("teacher", "kr")}
    found = together([trained("teacher", 0.97), trained("kr", 0.9)], both)
    teacher, kr = found.rows
    assert found.false_positive_rate == 0.001 and teacher.leak and kr.leak
    assert teacher.leak.share == arms["teacher"].canary.tpr_at_01 and teacher.leak.pairs == 1040
    assert teacher.leak.share > 0.9 and kr.leak.share < 0.03 and not teacher.dominated_by
    assert (kr.cpu_seconds, kr.gpu_seconds) == (
        15.0,
        1.0,
    )  # its own processor time, another stage's wall time
    assert kr.accuracy_low == pytest.approx(0.867, abs=1e-3)  # Wilson, 360 of 400
    both = {name: arms[name] for name in ("teacher", "few")}
    coarse = together([trained("teacher", 0.97), trained("few", 0.9)], both)
    assert coarse.false_positive_rate == 0.01
    assert [one.leak.false_positive_rate for one in coarse.rows if one.leak] == [0.01, 0.01]
    assert coarse.rows[0].leak and coarse.rows[0].leak.share == arms["teacher"].canary.tpr_at_1


def test_a_private_method_that_leaks_more_than_it_promises_is_caught_and_never_recommended(
    arms: dict[str, LiraArm],
) -> None:
    """As if its noise were off and its ledger untouched."""
    promise = {"guarantee": bound(0.5), "release": {}, "words": ""}
    rows = [trained("broken", 0.95, privacy=promise), trained("sound", 0.8, privacy=promise)]
    found = together(rows, {"broken": arms["teacher"], "sound": arms["kr"]}, leak_limit=0.999)
    broken, sound = found.rows
    assert "more than the guarantee allows" in broken.alarm and not sound.alarm
    assert found.recommended == "sound"
    assert frontier.verdict_of(broken, found) == ("guarantee contradicted", "found")
    assert [text for text in FrontierResult(frontier=found).remarks() if "one of the two is wrong" in text]
    page = render_page(report_of(found), ReportData())
    assert "guarantee contradicted" in page and broken.alarm in page
    alone = together(rows[:1], {"broken": arms["teacher"]}, leak_limit=0.999)
    assert not alone.recommended and "its guarantee is contradicted: broken" in said(alone)


def test_a_part_of_a_frontier_says_which_runs_are_missing(arms: dict[str, LiraArm]) -> None:
    rows = [trained("teacher", 0.97), trained("kr", None), trained("late", 0.5)]
    missing = {"teacher": [], "kr": [8, 9, 10, 12], "late": list(range(16))}
    found = together(rows, {k: arms[k] for k in ("teacher", "kr")}, missing=missing, asked_models=32)
    told = [text.replace("\u00a0", " ") for text in frontier.state_sentences(found)]
    assert found.partial and told == [
        "kr has not been trained on the whole set.",
        "kr lacks 4 of 16 runs (8 to 10, 12); the first 16 were attacked.",
        "late lacks 16 of 16 runs (0 to 15); too few to attack.",
        "A budget cut the runs from 32 to 16.",
    ]
    page = render_page(report_of(found), ReportData())
    assert page.count("<strong>Partial.</strong>") == 4 and "not complete" in page
    assert "partial" in FrontierResult(frontier=found).headline()


# --- the figure and the page --------------------------------------------------------------------------------


def report_of(found: Frontier | None) -> Report:
    raw = fake_report() | {"frontier": found.model_dump(mode="json") if found else None}
    return validate_report(raw)


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kr_ray.report.build.draw_figures", lambda report: dict.fromkeys(alt_texts(report), "data:,")
    )


DEGENERATE = {
    "none": [],
    "one": [row("kr", 0.9, 0.05)],
    "unmeasured": [row("kr", None, None), row("dm", 0.5, None), row("dp", None, 0.1)],
    "zeros and ones": [
        row("kr", 0.0, 0.0, accuracy_low=0.0),
        row("dm", 1.0, 1.0, high=1.0, accuracy_high=1.0),
        row("dp", 1.0, 0.0, bound=PRIVATE, accuracy_high=1.0),
    ],
    "equal": [row(f"m{k}", 0.9, 0.05) for k in range(6)],
    "free of cost": [row("kr", 0.9, 0.1, cpu_seconds=0.0), row("dm", 0.8, 0.1, cpu_seconds=None)],
    "AUC": [row("kr", 0.9, 0.55, rate=None)],
    "strange names": [
        row("kr", 0.9, 0.1, title="嗜碱性粒细胞"),
        row("dm", 0.8, 0.2, title="$\\frac{<b>$" * 9),
    ],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DEGENERATE)
def test_few_and_degenerate_rows_are_drawn_and_shown(name: str) -> None:
    rows = DEGENERATE[name]
    rate = None if name == "AUC" else 0.001
    found = of_rows(*rows, false_positive_rate=rate, leak_limit=0.02 if name != "AUC" else None)
    drawing = figures.draw_frontier(found)
    assert drawing.png.startswith(b"\x89PNG") and b"<svg" in drawing.svg and b"nan" not in drawing.svg.lower()
    assert figures.draw_frontier(found) == drawing  # same input, same bytes
    for html in (render_page(report_of(found), ReportData()), render_summary(report_of(found))):
        assert not _Page(html).open
    assert frontier.alt_text(found)


def test_labels_of_equal_points_lie_in_different_places() -> None:
    svg = figures.draw_frontier(of_rows(*DEGENERATE["equal"])).svg.decode()
    places = {re.search(rf'<text style="[^"]*"([^>]*)>M{k}<', svg) for k in range(6)}
    assert None not in places and len({place[1] for place in places if place}) == 6


def test_figure_files_lie_beside_the_page_and_the_rows_in_the_json(tmp_path: Path) -> None:
    found = of_rows(row("teacher", 0.95, 0.4), row("kr", 0.9, 0.02, epsilon=0.3), leak_limit=0.05)
    write_report(report_of(found), ReportData(), tmp_path)
    assert (tmp_path / "frontier.svg").read_bytes() == figures.draw_frontier(found).svg
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert validate_report(kept).frontier == found and kept["frontier"]["recommended"] == "kr"
    write_report(report_of(None), ReportData(), tmp_path / "without")
    assert not list((tmp_path / "without").glob("frontier.*"))


def test_the_page_shows_every_row_and_the_sheet_the_recommendation() -> None:
    found = of_rows(
        row("teacher", 0.95, 0.4), row("kr", 0.9, 0.02), row("dp", 0.6, 0.01, bound=PRIVATE),
        row("bad", 0.5, 0.3), leak_limit=0.05,
    )  # fmt: skip
    page = render_page(report_of(found), ReportData()).replace("\u00a0", " ")
    for text in (
        "Kr<small>", "88.0 to 92.0", "1.0 to 3.0<br>20 of 1,000", "ε ≤ 2.00", ">recommended<",
        ">on the frontier<",
        "beaten by Kr, Dp", "What the recommended method promises", "frontier.svg",
    ):  # fmt: skip
        assert text in page, text
    sheet = render_summary(report_of(found)).replace("\u00a0", " ")
    assert "Recommended of the methods compared. Kr: the most accurate method" in sheet
    assert "Recommended of" not in render_summary(report_of(None))
    assert 'id="frontier"' not in render_page(report_of(None), ReportData())


# --- the search for equal accuracy --------------------------------------------------------------------------


FALLING = MainKey(name="noise_multiplier", low=0.02, high=50.0, rising=False)
RISING = MainKey(name="fraction", low=0.01, high=1.0, rising=True)
WHOLE = MainKey(name="ipc", low=1, high=100, rising=True, whole=True)


def search(
    key: MainKey, accuracy: Callable[[float], float], target: float, most: int = 8, n: int = 500
) -> Matched:
    tried: list[Tried] = []
    while (value := next_value(key, target, tried, most)) is not None:
        assert key.low <= value <= key.high and value not in [one.value for one in tried]
        found = accuracy(value)
        tried.append(Tried(value=value, accuracy=found, error=standard_error(found, n)))
        assert next_value(key, target, tried[:-1], most) == value, "what has been tried decides"
    return matched(key, target, tried)


def test_the_search_finds_a_value_of_the_wanted_accuracy_from_either_side() -> None:
    for target in (0.3, 0.5, 0.7, 0.85):
        found = search(FALLING, lambda value: 0.95 / (1 + value), target)
        assert found.reached and abs(found.accuracy - target) <= found.error
        assert found.value == pytest.approx(0.95 / target - 1, rel=0.25)
        found = search(RISING, lambda value: value**0.3, target)
        assert found.reached and len(found.tried) <= 8
    whole = search(WHOLE, lambda value: math.log10(value) / 2, 0.5, n=100)
    assert whole.reached and whole.value == int(whole.value)


def test_the_first_value_is_the_configured_one_or_the_middle() -> None:
    assert next_value(FALLING, 0.5, [], 8) == 1.0  # the geometric middle of 0.02 and 50
    assert next_value(MainKey(name="z", low=0.02, high=50, rising=False, start=3.0), 0.5, [], 8) == 3.0
    section = DpSgdSection(noise_multiplier=1.1)
    assert section.main_key().start == 1.1 and section.main_key().excludes == ("target_epsilon",)
    assert DpSgdSection(target_epsilon=3.0).main_key().start is None


def test_out_of_reach_is_known_after_few_trainings_and_the_nearest_is_told() -> None:
    found = search(FALLING, lambda value: 0.6 / (1 + value), 0.9)
    assert not found.reached and found.value == FALLING.low and len(found.tried) == 3
    found = search(RISING, lambda value: 0.8, 0.2)
    assert not found.reached and len(found.tried) == 3 and RISING.low in [one.value for one in found.tried]


def test_a_jump_over_the_aim_ends_the_search_with_the_nearest() -> None:
    found = search(FALLING, lambda value: 0.9 if value < 2 else 0.1, 0.5, most=30)
    assert not found.reached and len(found.tried) < 15
    values = [one.value for one in found.tried]
    low, high = max(value for value in values if value < 2), min(value for value in values if value >= 2)
    assert high / low < 1.02  # it is known where it jumps
    steps = search(WHOLE, lambda value: 0.9 if value > 7 else 0.1, 0.5, most=30)
    assert {7, 8} <= {one.value for one in steps.tried} and not steps.reached


def test_no_more_trainings_than_allowed() -> None:
    assert len(search(FALLING, lambda value: 0.95 / (1 + value), 0.123456, most=4, n=10**7).tried) == 4


def test_an_accuracy_that_wobbles_ends_the_search_all_the_same() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        wobble: Callable[[float], float] = lambda value: float(  # noqa: E731
            np.clip(0.95 / (1 + value) + random.normal(0, 0.2), 0, 1)
        )
        tried: list[Tried] = []
        while (value := next_value(FALLING, 0.5, tried, 20)) is not None:
            tried.append(Tried(value=value, accuracy=wobble(value), error=0.001))
        assert 1 <= len(tried) <= 20


def test_an_error_of_all_or_none_right_is_not_zero() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    half = pytest.approx(math.sqrt(0.005 * 0.995 / 100))
    assert standard_error(1.0, 100) == half and standard_error(0.0, 100) == half
