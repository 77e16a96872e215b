"""Jobs on a real head: submitted, followed, refused, stopped and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from conftest import REPOSITORY, tiny_settings
from heads import Head, client_environment, local_head
from test_pipeline import final_numbers, kr, without_times, write_config

from kr_ray.cli import STAGE_COMMANDS
from kr_ray.cluster.submit import entrypoint
from kr_ray.config import ConfigError
from kr_ray.report.table import results_table
from kr_ray.runs.artifacts import load_state, read_json
from kr_ray.runs.progress import read_progress

COMMANDS = {*STAGE_COMMANDS, "frontier", "compare", "scaling", "compare-labels", "compare-search", "export"}
TOKEN = "0123456789abcdef-of-these-tests-alone"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head() as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits from: the code in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("kr_ray", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def kr_submit(head: Head, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kr_ray.cli", "submit", "--address", head.dashboard, *arguments]
    environment = dict(head.environment) | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def details(head: Head, submission: str, token: str = "") -> dict[str, Any]:
    request = Request(
        f"{head.dashboard}/api/jobs/{submission}",
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    with urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def wait_for(condition: Any, limit_s: float = 120.0) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_an_entry_point_that_refuses_a_wrong_config_with_2(
    command: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(teacher={"epochs": 0})))
    job = REPOSITORY / "jobs" / f"{command.replace('-', '_')}.py"
    environment = client_environment() | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(job), str(config)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "teacher.epochs" in done.stderr


def test_there_is_no_other_entry_point() -> None:
    assert {path.stem for path in (REPOSITORY / "jobs").glob("*.py")} == {
        name.replace("-", "_") for name in COMMANDS
    }


def stage_results(run: Path) -> dict[str, Any]:
    """The finished stages' results but times."""
    return {path.parent.name: without_times(read_json(path)["result"]) for path in run.glob("*/done.json")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_job_submit_computes_what_kr_run_computes(head: Head, checkout: Path, tmp_path: Path) -> None:
    """As far as the sweep: Ray Train and Ray Tune have then both been at work."""
    submitted, here = (
        write_config(tmp_path / "submitted", tiny_settings()),
        write_config(tmp_path / "here", tiny_settings()),
    )
    job = ["--working-dir", str(checkout), "--", "python", "jobs/checkpoints.py", submitted]
    done = head.job("submit", "--submission-id", "the-sweep", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher: done" in done.stdout and "checkpoints: done" in done.stdout  # the logs come through
    assert details(head, "the-sweep")["status"] == "SUCCEEDED"
    kr("checkpoints", here)
    found = stage_results(tmp_path / "submitted" / "runs" / "tiny")
    assert found.keys() == {"data", "teacher", "generator", "checkpoints"}
    assert found == stage_results(tmp_path / "here" / "runs" / "tiny")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_quickstart_as_a_job_equals_kr_run(head: Head, checkout: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    submitted, here = write_config(tmp_path / "submitted", raw), write_config(tmp_path / "here", raw)
    head.job(
        "submit",
        "--working-dir",
        str(checkout),
        "--",
        "python",
        "jobs/run.py",
        submitted,
        limit_s=3600,
        check=True,
    )
    kr("run", here)
    runs = [tmp_path / name / "runs" / "quickstart" for name in ("submitted", "here")]
    for run in runs:
        print(results_table(run.parent))
    found, expected = (final_numbers(run) for run in runs)
    for report in (found, expected):
        del report["versions"]["commit"]  # an uploaded folder holds no repository
    assert found == expected


def test_the_job_computes_with_the_code_that_was_submitted(head: Head, checkout: Path) -> None:
    done = head.job(
        "submit",
        "--working-dir",
        str(checkout),
        "--",
        "python",
        "-c",
        "import kr_ray; print(kr_ray.__file__)",
    )
    assert "/working_dir_files/" in done.stdout, done.stdout


def test_a_wrong_config_fails_the_job_with_2_and_its_message(
    head: Head, checkout: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_settings(teacher={"epochs": 0}))
    done = head.job(
        "submit",
        "--submission-id",
        "wrong",
        "--working-dir",
        str(checkout),
        "--",
        "python",
        "jobs/run.py",
        config,
    )
    job = details(head, "wrong")
    assert done.returncode != 0 and "teacher.epochs" in done.stdout
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


@pytest.mark.timeout(600)
def test_a_stopped_job_says_so_and_the_next_submission_goes_on(
    head: Head, checkout: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_settings(teacher={"epochs": 600}))
    run = tmp_path / "runs" / "tiny"
    job = ["--working-dir", str(checkout), "--", "python", "jobs/teacher.py", config]
    head.job("submit", "--submission-id", "stopped", "--no-wait", *job, check=True)
    wait_for(lambda: (progress := read_progress(run / "teacher")) and progress[0].share >= 0.15)
    head.job("stop", "stopped", check=True)
    assert details(head, "stopped")["status"] == "STOPPED"
    assert (
        read_json(run / "status.json")["state"] == "interrupted"
    )  # it ended by itself, nobody had to kill it
    kept = [load_state(path) for path in run.rglob("state.pt")]
    rows = max((list(state["history"]) for state in kept if state), key=len)
    assert 3 <= len(rows) < 20
    done = head.job("submit", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    curve = read_json(run / "teacher" / "result.json")["curve"]
    assert len(curve) == 20
    kept_rows = rows[:-1]  # the stop may fall between the last state's file and Ray's record of it
    assert curve[: len(kept_rows)] == kept_rows  # to the second: these epochs were not trained again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_head_died_goes_on_under_the_next_head(checkout: Path, tmp_path: Path) -> None:
    settings = tiny_settings(teacher={"epochs": 600})
    config, undisturbed = write_config(tmp_path / "hurt", settings), write_config(tmp_path / "here", settings)
    run = tmp_path / "hurt" / "runs" / "tiny"
    job = ["--working-dir", str(checkout), "--", "python", "jobs/teacher.py", config]
    with local_head() as first:
        first.job("submit", "--no-wait", *job, check=True)
        wait_for(lambda: (progress := read_progress(run / "teacher")) and progress[0].share >= 0.3)
        first.kill()
    assert not (run / "teacher" / "done.json").exists()
    kept = max(len(state["history"]) for path in run.rglob("state.pt") if (state := load_state(path)))
    assert 4 <= kept < 20
    with local_head() as second:
        done = second.job("submit", *job)
        assert done.returncode == 0, done.stdout + done.stderr
    kr("teacher", undisturbed)
    assert stage_results(run) == stage_results(tmp_path / "here" / "runs" / "tiny")


def test_kr_submit_follows_the_job_and_ends_like_it(head: Head, checkout: Path, tmp_path: Path) -> None:
    config = checkout / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(storage=str(tmp_path))))
    done = kr_submit(head, checkout, "--command", "teacher", "config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    submission = done.stdout.split()[1].rstrip(":")
    assert f"{head.dashboard}/#/jobs/{submission}" in done.stdout and "teacher: done" in done.stdout
    assert (
        details(head, submission)["metadata"] | {"run": "tiny", "command": "teacher"}
        == details(head, submission)["metadata"]
    )
    absent = kr_submit(
        head, checkout, "config.yaml", "--set", "data.name=bloodmnist", "--set", "data.download=false"
    )
    assert (
        absent.returncode == 2 and "bloodmnist" in absent.stdout
    )  # refused there, for only the cluster can know its data


def test_kr_submit_refuses_what_would_not_be_uploaded(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--working-dir"):
        entrypoint("run", "config.yaml", [], tmp_path)
    with pytest.raises(ConfigError, match="copy it there"):
        entrypoint("run", str(tmp_path / "elsewhere.yaml"), [], checkout)
    inside = str(checkout / "configs" / "a b.yaml")
    command = entrypoint("compare-labels", inside, ["seed=1"], checkout)
    assert command == "python jobs/compare_labels.py 'configs/a b.yaml' --set seed=1"


@pytest.mark.timeout(600)
def test_a_submission_without_the_token_is_refused(checkout: Path, tmp_path: Path) -> None:
    config = checkout / "with_token.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(storage=str(tmp_path))))
    with local_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}):
            stranger = Head(head.ports, client_environment(HOME=str(tmp_path), **wrong))
            refused = stranger.job("submit", "--", "touch", str(tmp_path / "was_here"))
            assert refused.returncode != 0 and "uthentication" in refused.stdout + refused.stderr
            refused = kr_submit(stranger, checkout, "with_token.yaml")
            assert refused.returncode == 1 and "token" in refused.stderr and TOKEN not in refused.stderr
        with pytest.raises(HTTPError, match=r"40[13]"):
            details(head, "any")
        done = kr_submit(head, checkout, "--command", "teacher", "with_token.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        submission = done.stdout.split()[1].rstrip(":")
        assert TOKEN not in done.stdout + json.dumps(details(head, submission, TOKEN))
    assert not (tmp_path / "was_here").exists()
