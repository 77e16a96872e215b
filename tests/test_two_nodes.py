"""A sweep on one node and on two: what a second node gains, and that a node's death costs time alone.

`pytest -m slow -s -k two_nodes` prints the seconds; on a busy machine they mean little.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import tiny_settings
from nodes import config_file, finish, local_nodes, wait_until
from test_faults import copied, figures, result, run_of, run_without_ray, ticks

from kr_ray.runs.artifacts import read_json

CHECKPOINTS = 8
SETTINGS = tiny_settings(
    teacher={"epochs": 20},
    generator={"epochs": CHECKPOINTS, "checkpoint_every": 1},
    checkpoints={"epochs": 200},
)
"""Students of about ten seconds: the start of a worker must not decide."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_two_nodes_equals_that_on_one(tmp_path: Path) -> None:
    base = config_file(tmp_path / "base", SETTINGS)
    run_without_ray(base, "generator")
    one, two, hurt = (copied(run_of(base), tmp_path / name, **SETTINGS) for name in ("one", "two", "hurt"))
    seconds: dict[str, float] = {}
    with local_nodes(1) as nodes:
        nodes.kr("checkpoints", one, limit_s=600)
        seconds["one"] = read_json(run_of(one) / "checkpoints" / "done.json")["result"]["wall_s"]
        nodes.add()
        nodes.kr("checkpoints", two, limit_s=600)
        seconds["two"] = read_json(run_of(two) / "checkpoints" / "done.json")["result"]["wall_s"]
        driver, started = nodes.start_kr("checkpoints", hurt), time.monotonic()
        half = CHECKPOINTS * 5 // 2
        wait_until(lambda: ticks(hurt, "checkpoints") >= half, driver, limit_s=600)
        nodes.kill(next(iter(nodes.cluster.worker_nodes)))
        print(
            f"\nkilled a node {time.monotonic() - started:.1f} s after the "
            f"driver's start, after {half} of {2 * half} ticks"
        )
        finish(driver, limit_s=600)
        seconds["hurt"] = read_json(run_of(hurt) / "checkpoints" / "done.json")["result"]["wall_s"]
    print(
        f"sweep over {CHECKPOINTS} checkpoints: 1 node {seconds['one']:.1f} s, 2 nodes {seconds['two']:.1f} s"
    )
    print(
        f"speed-up {seconds['one'] / seconds['two']:.2f}; with a node "
        f"killed at half time {seconds['hurt']:.1f} s"
    )
    print("CAS", [round(row["val_cas"], 4) for row in result(one, "checkpoints")["checkpoints"]])
    assert result(one, "checkpoints") == result(two, "checkpoints") == result(hurt, "checkpoints")
    assert figures(one, "checkpoints") == figures(two, "checkpoints") == figures(hurt, "checkpoints")
