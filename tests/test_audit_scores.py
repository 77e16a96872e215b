"""The arrays of an audit, score files and `kr audit --scores`: round trips, forms that agree, and what is refused."""

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
from kr_ray.privacy.attacks import HEADLINE, attack_groups, figures
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


# --- arrays ----------------------------------------------------------------------------------------------------------


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
        ({"member": np.arange(MODELS)[:, None] < np.where(np.arange(SAMPLES) == 7, 1, 3)}, "sample 7 is in 1 .1 of 40 samples"),
    ],
)
def test_wrong_arrays_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        SampleScores(**arrays(**changes))


# --- score files -----------------------------------------------------------------------------------------------------


def test_one_model_as_npz_and_as_parquet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 1500), rng.normal(0, 1, 1200)
    np.savez(tmp_path / "a.npz", member_scores=inside, non_member_scores=outside)
    found = audit_score_file(tmp_path / "a.npz", seed=0)
    member = (np.arange(2700) < 1500)[None]
    assert (found["form"], found["models"]) == ("one model", 1)
    assert found["attacks"] == {"global_threshold": {"all": figures(np.r_[inside, outside][None], member, 0)}}
    parquet.write_table(long_table(np.r_[inside, outside][None], member), tmp_path / "a.parquet")
    again = audit_score_file(tmp_path / "a.parquet", seed=0)
    assert (again["form"], again["attacks"]) == (found["form"], found["attacks"])


def test_many_models_as_npz_and_as_parquet(tmp_path: Path) -> None:
    member, canary = MEMBER, np.arange(SAMPLES) < 15
    scores = LOGITS[:, :, 0, 0].astype(np.float64)
    np.savez(tmp_path / "b.npz", scores=scores, member=member.astype(int), canary=canary)
    parquet.write_table(long_table(scores, member, canary=np.tile(canary, (MODELS, 1))), tmp_path / "b.parquet")
    found, again = (audit_score_file(tmp_path / f"b.{kind}", seed=0) for kind in ("npz", "parquet"))
    assert found["attacks"] == again["attacks"]
    assert sorted(found["attacks"]) == [
        "global_threshold", "lira_offline_fixed", "lira_offline_per_sample", "lira_online_fixed", "lira_online_per_sample"
    ]  # fmt: skip
    assert found["attacks"]["global_threshold"]["canary"] == figures(scores[:, canary], member[:, canary], 0)
    assert found["attacks"]["global_threshold"]["population"]["n_members"] == 25 * 3


def test_logits_get_all_attacks(tmp_path: Path) -> None:
    samples = SampleScores(**arrays())
    samples.save(tmp_path / "c.npz")  # what the audit itself writes is such a file
    found = audit_score_file(tmp_path / "c.npz", seed=0)["attacks"]
    assert f"{HEADLINE}_true_label" in found
    assert {name: found[name] for name in found if name != f"{HEADLINE}_true_label"} == attack_groups({"all": samples}, None, 0)
    extra = {"reference_logits": LOGITS[:, :9, 0], "reference_labels": np.zeros(9, dtype=np.int32)}
    np.savez(tmp_path / "d.npz", logits=LOGITS[:, :, 0].astype(np.float64), labels=samples.labels, member=MEMBER, **extra)
    assert "rmia_offline" in audit_score_file(tmp_path / "d.npz", seed=0)["attacks"]


# --- the command -----------------------------------------------------------------------------------------------------

ONE = {"member_scores": np.arange(50.0), "non_member_scores": np.arange(60.0)}
MANY = {"scores": LOGITS[:, :, 0, 0], "member": MEMBER}
ALL = {name: values for name, values in arrays().items() if name != "true_labels"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ONE | {"member_scores": np.array([1.0, np.nan])}, "`member_scores` must be finite, but 1 of 2"),
        (ONE | {"non_member_scores": np.zeros(0)}, "`non_member_scores` must hold at least one score"),
        (ONE | {"member_scores": np.zeros((2, 2))}, "`member_scores` must be numbers, [M]"),
        ({"members": np.zeros(3)}, "must hold one of these sets of arrays: member_scores, non_member_scores;"),
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
        (lambda table: table.set_column(2, "score", pyarrow.nulls(len(table), pyarrow.float64())), "no empty cells"),
        (lambda table: table.set_column(2, "score", pyarrow.array(["a"] * len(table))), "`score` must be numbers"),
        (lambda table: table.append_column("canary", pyarrow.array(np.arange(len(table)) < 3)), "same for a sample under all"),
    ],
)
def test_bad_tables_end_with_code_2(edit: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    np.savez(tmp_path / "own.npz", member_scores=rng.normal(1, 1, 2000), non_member_scores=rng.normal(0, 1, 500))
    code = (
        "import sys; from kr_ray.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported for nothing'; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "audit", "--scores", "own.npz", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**_environment(), "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["attacks"]["global_threshold"]["all"]
    assert f"{found['true_positives_0.01']} TP, 5 FP" in done.stdout
    assert f"[{found['ci_low_0.01']:.2%}, {found['ci_high_0.01']:.2%}]" in done.stdout
    assert "2000 / 500" in done.stdout and "refused: finest FPR is 0.002" in done.stdout
    assert "no guarantee" in done.stdout


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
