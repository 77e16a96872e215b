"""Several generators through the product: the run with pools, then `kr compare` and `kr scaling` on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import kr, without_times, write_config
from test_several import GAN, several_settings

from kr_ray.runs.artifacts import read_json

TINY_EDM = {"kind": "edm", "channels": [8, 8], "embedding": 8, "epochs": 2, "batch_size": 32}
SETTINGS = several_settings(
    GAN | {"batch_size": 32},
    TINY_EDM,
    name="both",
    data={"max_train_images": 96},
    teacher={"epochs": 2},
    synthesis={
        "pool_scale": 2,
        "labellers": 2,
        "sampling": {"members": [{"standing_batches": 1}, {"steps": 2}]},
    },
    checkpoints={"epochs": 2},
    student={"epochs": 2, "equal_compute_teacher": False},
    scaling={"scales": [1, 2], "seeds": 1},
)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run as far as its student."""
    folder = tmp_path_factory.mktemp("several")
    config = write_config(folder, SETTINGS)
    kr("student", config)
    return config, folder / "runs" / "both"


def test_a_run_of_two_kinds_sweeps_tunes_and_trains_from_their_pools(finished: tuple[str, Path]) -> None:
    run = finished[1]
    sweep, tuning, student = (
        read_json(run / stage / "done.json")["result"] for stage in ("checkpoints", "tuning", "student")
    )
    assert [row["epoch"] for row in sweep["checkpoints"]] == [2, 4]
    assert {"share_0", "share_1"} <= tuning["chosen"].keys()
    pools = list((run / "pools").iterdir())
    assert len(pools) == 2 and all(path.suffix == ".safetensors" for path in pools)  # a member's each
    assert student["work"]["images_generated"] == 2 * 2 * 96
    assert len(student["synthesis"]["shares"]) == 2
    assert (run / "labeller_1" / "weights.safetensors").exists()


def test_generators_are_compared_with_one_teacher(finished: tuple[str, Path]) -> None:
    config, run = finished
    names = ["run", "edm,channels=[8, 8],embedding=8,epochs=2,checkpoint_every=1"]
    done = kr("compare", config, "--generators", *names, "--labels", "hard", "gkd")
    found = read_json(run / "compare" / "done.json")["result"]
    assert [(row["generator"], row["labelling"], row["epoch"]) for row in found["rows"]] == [
        (name, labelling, epoch)
        for name, epochs in zip(names, ((2, 4), (1, 2)), strict=True)
        for labelling in ("hard", "gkd")
        for epoch in epochs
    ]
    assert found["teacher"] == read_json(run / "teacher" / "done.json")["result"]["val_accuracy"]
    assert "teacher: " in done.stdout and (run / "compare" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    before = (run / "compare" / "done.json").read_bytes()
    kr("compare", config, "--generators", *names, "--labels", "hard", "gkd")
    assert (run / "compare" / "done.json").read_bytes() == before  # nothing was done again
    refused = kr("compare", config, "--generators", "vanila", check=False)
    assert refused.returncode == 2 and "must begin with one of run" in refused.stderr


def test_the_scaling_curve_is_measured_once_and_reported(finished: tuple[str, Path]) -> None:
    config, run = finished
    done = kr("scaling", config)
    rows = read_json(run / "scaling" / "done.json")["result"]["rows"]
    assert [(row["scale"], row["with_real"]) for row in rows] == [
        (1, False),
        (2, False),
        (1, True),
        (2, True),
    ]
    assert "real + synthetic" in done.stdout
    report = read_json(run / "report" / "report.json")
    assert without_times(report["scaling"]["rows"]) == without_times(rows)
    page = (run / "report" / "report.html").read_text()
    assert "More synthetic images" in page and "Test accuracy by number of synthetic images" in page
    assert not list((run / "scaling").rglob("weights.safetensors"))
    again = kr("report", config)  # it stays in the report
    assert json.loads((run / "report" / "report.json").read_text())["scaling"] == report["scaling"], again
