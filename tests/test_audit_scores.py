"""The arrays of an audit, score files and `kr audit --scores`: round
trips, forms that agree, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from kr_ray.cli import main
from kr_ray.privacy.attacks import HEADLINE, attack_groups, figures, judged_pairs
from kr_ray.privacy.score_files import audit_score_file
from kr_ray.privacy.scores import ReferenceScores, SampleScores, ScoreError
from kr_ray.runs.artifacts import ArtifactError

MODELS, SAMPLES = 6, 40


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, SAMPLES)
    values = {
        "logits": rng.normal(size=(MODELS, SAMPLES, 2, 3)).astype(np.float32),
        "labels": labels,
        "true_labels": (labels + 1) % 3,
        "member": np.argsort(rng.random((MODELS, SAMPLES)), axis=0) < MODELS // 2,
    }
    return values | changes


def long_table(scores: np.ndarray, member: np.ndarray, **columns: Any) -> pyarrow.Table:
    """Rows in random order, samples by name."""
    models, samples = scores.shape
    order = np.random.default_rng(1).permutation(scores.size)
    table = {
        "model": np.repeat(np.arange(models), samples),
        "sample": np.tile([f"s{index:05}" for index in range(samples)], models),
        "score": scores.ravel(),
        "member": member.ravel(),
    } | {name: np.asarray(values).ravel() for name, values in columns.items()}
    return pyarrow.table({name: values[order] for name, values in table.items()})


# --- arrays -------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were_saved(tmp_path: Path) -> None:
    samples = SampleScores(**arrays())
    reference = ReferenceScores(samples.logits[:, :, 0], samples.labels)
    for scores in (samples, reference):
        scores.save(tmp_path / "deep" / "scores.npz")
        loaded = type(scores).load(tmp_path / "deep" / "scores.npz")
        assert vars(loaded).keys() == vars(scores).keys()
        for name, values in vars(scores).items():
            np.testing.assert_array_equal(getattr(loaded, name), values)
    with pytest.raises(ScoreError, match="lacks true_labels, member"):
        SampleScores.load(tmp_path / "deep" / "scores.npz")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays(labels=np.array([object()] * SAMPLES)), allow_pickle=True)
    with pytest.raises(ArtifactError, match="Python objects, which are never unpickled, in labels"):
        SampleScores.load(tmp_path / "x.npz")


LOGITS = arrays()["logits"]
MEMBER = arrays()["member"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logits": np.where(np.arange(3) == 1, np.nan, LOGITS).astype(np.float32)},
            "`logits` must be finite, but 480 of 1440",
        ),
        ({"logits": LOGITS.astype(np.float64)}, "must be float32"),
        ({"logits": LOGITS[:, :, 0]}, "must be float32 .models, samples, queries, classes"),
        ({"logits": LOGITS[..., :1]}, "`classes >= 2` must hold"),
        ({"labels": np.zeros(SAMPLES - 1, dtype=np.int64)}, r"`labels` must be int64 \[40\]"),
        ({"labels": np.full(SAMPLES, 3)}, "`0 <= labels < 3` must hold, but got 3 to 3"),
        ({"true_labels": np.full(SAMPLES, -1)}, "`0 <= true_labels < 3` must hold"),
        ({"member": MEMBER.astype(np.int64)}, r"`member` must be bool \[6, 40\]"),
        ({"member": MEMBER[:, 1:]}, r"`member` must be bool \[6, 40\]"),
        ({"member": np.ones_like(MEMBER)}, "sample 0 is in 6 .40 of 40 samples fail."),
        (
            {"member": np.arange(MODELS)[:, None] < np.where(np.arange(SAMPLES) == 7, 1, 3)},
            "sample 7 is in 1 .1 of 40 samples",
        ),
    ],
)
def test_wrong_arrays_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        SampleScores(**arrays(**changes))


# --- score files --------------------------------------------------------------------------------------------


def test_one_model_as_npz_and_as_parquet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 1500), rng.normal(0, 1, 1200)
    np.savez(tmp_path / "a.npz", member_scores=inside, non_member_scores=outside)
    found = audit_score_file(tmp_path / "a.npz", seed=0)
    member = (np.arange(2700) < 1500)[None]
    assert (found.form, found.models) == ("one model", 1)
    assert found.attacks == {"global_threshold": {"all": figures(np.r_[inside, outside][None], member, 0)}}
    parquet.write_table(long_table(np.r_[inside, outside][None], member), tmp_path / "a.parquet")
    again = audit_score_file(tmp_path / "a.parquet", seed=0)
    assert (again.form, again.attacks) == (found.form, found.attacks)


def test_many_models_as_npz_and_as_parquet(tmp_path: Path) -> None:
    member, canary = MEMBER, np.arange(SAMPLES) < 15
    scores = LOGITS[:, :, 0, 0].astype(np.float64)
    np.savez(tmp_path / "b.npz", scores=scores, member=member.astype(int), canary=canary)
    parquet.write_table(
        long_table(scores, member, canary=np.tile(canary, (MODELS, 1))), tmp_path / "b.parquet"
    )
    found, again = (audit_score_file(tmp_path / f"b.{kind}", seed=0) for kind in ("npz", "parquet"))
    assert found.attacks == again.attacks
    assert sorted(found.attacks) == [
        "global_threshold", "lira_offline_fixed", "lira_offline_per_sample", "lira_online_fixed",
        "lira_online_per_sample"
    ]  # fmt: skip
    assert found.attacks["global_threshold"]["canary"] == figures(scores[:, canary], member[:, canary], 0)
    assert found.attacks["global_threshold"]["population"].n_members == 25 * 3


def test_logits_get_all_attacks(tmp_path: Path) -> None:
    samples = SampleScores(**arrays())
    samples.save(tmp_path / "c.npz")  # what the audit itself writes is such a file
    found = audit_score_file(tmp_path / "c.npz", seed=0).attacks
    assert f"{HEADLINE}_true_label" in found
    assert {name: found[name] for name in found if name != f"{HEADLINE}_true_label"} == attack_groups(
        {"all": samples}, None, 0
    )
    extra = {"reference_logits": LOGITS[:, :9, 0], "reference_labels": np.zeros(9, dtype=np.int32)}
    np.savez(
        tmp_path / "d.npz",
        logits=LOGITS[:, :, 0].astype(np.float64),
        labels=samples.labels,
        member=MEMBER,
        **extra,
    )
    assert "rmia_offline" in audit_score_file(tmp_path / "d.npz", seed=0).attacks


# --- the command --------------------------------------------------------------------------------------------

ONE = {"member_scores": np.arange(50.0), "non_member_scores": np.arange(60.0)}
MANY = {"scores": LOGITS[:, :, 0, 0], "member": MEMBER}
ALL = {name: values for name, values in arrays().items() if name != "true_labels"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ONE | {"member_scores": np.array([1.0, np.nan])}, "`member_scores` must be finite, but 1 of 2"),
        (ONE | {"non_member_scores": np.zeros(0)}, "`non_member_scores` must hold at least one score"),
        (ONE | {"member_scores": np.zeros((2, 2))}, "`member_scores` must be numbers, [M]"),
        (
            {"members": np.zeros(3)},
            "must hold one of these sets of arrays: member_scores, non_member_scores;",
        ),
        (MANY | {"cannary": np.zeros(SAMPLES)}, "rename or remove"),
        (MANY | {"scores": LOGITS[:, 1:, 0, 0]}, "`member` must be bool [6, 39]"),
        (MANY | {"member": np.ones_like(MEMBER)}, "is a member of >= 2 models"),
        (MANY | {"member": np.arange(MODELS)[:, None] < np.ones(SAMPLES)}, "sample 0 is in 1"),
        (MANY | {"member": 2 * MEMBER}, "`member` must be bool or 0 and 1"),
        (MANY | {"canary": np.zeros(3, dtype=bool)}, "`canary` must be [40]"),
        (ALL | {"labels": np.zeros(3, dtype=int)}, "`labels` must be int64 [40]"),
        (ALL | {"logits": np.full((MODELS, SAMPLES, 3), 1e300)}, "`logits` must be finite"),
        (ALL | {"labels": np.zeros(SAMPLES)}, "`labels` must be integers"),
        (ALL | {"reference_logits": LOGITS[:, :, 0]}, "must come together"),
        (
            ALL | {"reference_logits": LOGITS[1:, :9, 0], "reference_labels": np.zeros(9, dtype=int)},
            "`reference` must hold the 6 models",
        ),
        (
            ALL | {"reference_logits": LOGITS[:, :9, 0], "reference_labels": np.full(9, 7)},
            "`0 <= reference_labels < 3` must hold, but got 7 to 7; `reference_logits` has 3 classes",
        ),
        (
            ALL | {"reference_logits": LOGITS[:, :9, 0], "reference_labels": np.zeros(8, dtype=int)},
            "`reference_labels` must be int64 [9], but got int64 (8,); one per sample of `reference_logits`",
        ),
        (
            ALL
            | {
                "reference_logits": LOGITS[:, :9, 0].repeat(2, axis=-1),
                "reference_labels": np.zeros(9, dtype=int),
            },
            "`reference_logits` must have the 3 classes of `logits`, but got 6",
        ),
        (
            ALL
            | {
                "reference_logits": np.full((MODELS, 9, 3), np.nan),
                "reference_labels": np.zeros(9, dtype=int),
            },
            "`reference_logits` must be finite, but 162 of 162",
        ),
        (
            MANY | {"scores": LOGITS[:, :, 0, 0].astype(np.float64) * 1e300},
            "`|scores| <= 1e+100` must hold with several models, but got",
        ),
        (ALL | {"logits": LOGITS[:, :, 0].astype(np.float64) * 1e300}, "at most 3.4e+38 in size, but got"),
        (
            ALL | {"member": np.array([None] * 3)},
            "must hold arrays of numbers, but got Python objects, which are never unpickled, in member",
        ),
    ],
)
def test_bad_score_files_end_with_one_message_and_code_2(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **content, allow_pickle=True)
    assert main(["audit", "--scores", str(tmp_path / "bad.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("kr: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.drop_columns(["score"]), "must hold the columns model, sample, score, member"),
        (lambda table: table.append_column("x", table["score"]), "rename or remove columns"),
        (lambda table: table.slice(1), "every sample under every model exactly once"),
        (
            lambda table: pyarrow.concat_tables([table.slice(1), table.slice(1, 1)]),
            "every sample under every model exactly once",
        ),
        (
            lambda table: table.set_column(2, "score", pyarrow.nulls(len(table), pyarrow.float64())),
            "no empty cells",
        ),
        (
            lambda table: table.set_column(2, "score", pyarrow.array(["a"] * len(table))),
            "`score` must be numbers",
        ),
        (
            lambda table: table.append_column("canary", pyarrow.array(np.arange(len(table)) < 3)),
            "same for a sample under all",
        ),
    ],
)
def test_bad_tables_end_with_code_2(
    edit: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet.write_table(edit(long_table(LOGITS[:, :, 0, 0], MEMBER)), tmp_path / "bad.parquet")
    assert main(["audit", "--scores", str(tmp_path / "bad.parquet")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not an archive at all"]
)
@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_damaged_or_missing_files_end_with_code_2(
    name: str, damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert main(["audit", "--scores", str(path)]) == 2
    assert "nothing there" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", **ONE)
    parquet.write_table(long_table(LOGITS[:, :, 0, 0], MEMBER), tmp_path / "x.parquet")
    path.write_bytes(damage(path.read_bytes()))
    assert main(["audit", "--scores", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"kr: `{path}` must be")


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e99])
def test_finite_scores_of_any_size_give_the_same_figures(size: float, tmp_path: Path) -> None:
    """LiRA and ranks do not mind a factor; numpy's warnings are errors here."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(MODELS, SAMPLES)) + 2 * MEMBER
    np.savez(tmp_path / "plain.npz", scores=scores, member=MEMBER)
    np.savez(tmp_path / "sized.npz", scores=scores * size, member=MEMBER)
    with np.errstate(all="raise", under="ignore"):
        plain, sized = (
            audit_score_file(tmp_path / f"{name}.npz", seed=0).attacks for name in ("plain", "sized")
        )
    for name, groups in plain.items():
        assert sized[name]["all"].auc == pytest.approx(groups["all"].auc, abs=2e-3), name


def test_one_model_s_scores_may_be_of_any_finite_size(tmp_path: Path) -> None:
    largest = np.finfo(np.float64).max
    inside, outside = np.array([largest, 1.0, 2.0, 5e-324]), np.array([-largest, 0.0, -1.0])
    np.savez(tmp_path / "huge.npz", member_scores=inside, non_member_scores=outside)
    with np.errstate(all="raise"):
        found = audit_score_file(tmp_path / "huge.npz", seed=0)
    assert found.attacks["global_threshold"]["all"].auc == 1.0


def test_scores_of_the_wrong_sign_are_told_with_the_turned_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    losses = {
        "member_scores": -np.log(rng.beta(9, 1, 2000)),
        "non_member_scores": -np.log(rng.beta(3, 2, 2000)),
    }
    np.savez(tmp_path / "losses.npz", **losses)
    np.savez(tmp_path / "scores.npz", **{name: -values for name, values in losses.items()})
    right = audit_score_file(tmp_path / "scores.npz", seed=0)
    figure = right.attacks["global_threshold"]["all"]
    assert right.remarks == [] and figure.auc > 0.9
    (remark,) = audit_score_file(tmp_path / "losses.npz", seed=0).remarks
    assert f"AUC {1 - figure.auc:.4f} lies below 0.5" in remark
    assert f"AUC {figure.auc:.4f}, epsilon >= {figure.epsilon.clopper_pearson:.2f}" in remark
    assert main(["audit", "--scores", str(tmp_path / "losses.npz")]) == 0
    assert remark in capsys.readouterr().out


def test_many_models_losses_are_told_where_levels_hide_them_from_the_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(MODELS, SAMPLES)) + 30 * rng.normal(size=SAMPLES) - 3 * MEMBER
    np.savez(tmp_path / "x.npz", scores=losses, member=MEMBER)
    np.savez(tmp_path / "y.npz", scores=-losses, member=MEMBER)
    told, quiet = (audit_score_file(tmp_path / name, seed=0) for name in ("x.npz", "y.npz"))
    (remark,) = [remark for remark in told.remarks if "offline" in remark]
    turned = quiet.attacks["lira_offline_fixed"]["all"].auc
    assert remark.startswith("lira_offline_fixed, all: AUC 0.") and f"give AUC {turned:.4f}" in remark
    assert quiet.remarks == []


def test_equal_scores_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", member_scores=np.ones(40), non_member_scores=np.ones(50))
    found = audit_score_file(tmp_path / "x.npz", seed=0)
    assert "all 90 scores are equal" in found.remarks[0]
    figure = found.attacks["global_threshold"]["all"]
    assert figure.auc_low < 0.5 == figure.auc < figure.auc_high


def test_pairs_that_membership_settles_are_left_out_and_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    member = np.argsort(rng.random((6, 200)), axis=0) < rng.choice([2, 3, 4], size=200)
    np.savez(tmp_path / "x.npz", scores=rng.normal(size=(6, 200)), member=member)
    found = audit_score_file(tmp_path / "x.npz", seed=0)
    judged = judged_pairs(member)
    assert f"{(~judged).sum()} of 1200 pairs" in found.remarks[0]
    assert found.attacks["lira_online_fixed"]["all"].n_members == (judged & member).sum()


def test_what_is_proven_is_said_for_one_attack_and_for_all_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    member = np.argsort(rng.random((8, 300)), axis=0) < 4
    np.savez(tmp_path / "x [a].npz", scores=rng.normal(size=(8, 300)) + 3 * member, member=member)
    assert main(["audit", "--scores", str(tmp_path / "x [a].npz"), "--json", str(tmp_path / "out.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    proven = found["proven"]
    bounds = [row["all"]["epsilon"] for row in found["attacks"].values()]
    assert found["headline"] == "lira_online_fixed" and proven["rows"] == 5
    assert 1.0 < proven["epsilon"] < max(max(row["clopper_pearson"], row["one_run"]) for row in bounds)
    assert f"epsilon >= {proven['epsilon']:.2f} ({proven['attack']}, all)" in shown
    assert "here lira_online_fixed" in shown and "[a].npz" in shown


@pytest.mark.parametrize("name", ["x.csv", "x.npz"])
def test_other_formats_are_named_as_such(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("model,sample,score,member\n0,0,1.5,1\n")
    assert main(["audit", "--scores", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert (
        "must be a score file (.npz or .parquet), but got a text table (CSV); save the table as Parquet"
        in error
    )
    assert "pickle" not in error and "unsafe" not in error


def test_a_parquet_file_s_name_may_end_in_capitals(tmp_path: Path) -> None:
    parquet.write_table(long_table(LOGITS[:, :, 0, 0].astype(np.float64), MEMBER), tmp_path / "x.PARQUET")
    assert audit_score_file(tmp_path / "x.PARQUET", seed=0).form == "many models"


def test_configuration_and_scores_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["audit"],
        ["audit", "x.yaml", "--scores", "y.npz"],
        ["audit", "x.yaml", "--json", "z"],
        ["audit", "--scores", "y.npz", "--arms", "kr"],
        ["audit", "--scores", "y.npz", "--models", "4"],
    ):
        assert main(arguments) == 2
    assert capsys.readouterr().err.count("kr: ") == 5


def test_the_command_prints_counts_and_intervals_without_torch_or_ray(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz", member_scores=rng.normal(1, 1, 2000), non_member_scores=rng.normal(0, 1, 500)
    )
    code = (
        "import sys; from kr_ray.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported for nothing'; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "audit", "--scores", "own.npz", "--json", "out.json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**_environment(), "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["attacks"]["global_threshold"]["all"]
    assert f"{found['true_positives_0.01']} TP, 5 FP" in done.stdout
    assert f"[{found['ci_low_0.01']:.2%}, {found['ci_high_0.01']:.2%}]" in done.stdout
    assert "2000 / 500" in done.stdout and "refused: finest FPR is 0.002" in done.stdout
    assert "no guarantee" in done.stdout


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
