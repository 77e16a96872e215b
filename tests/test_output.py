"""What commands do not print: complaints about a reader that left, and lines of libraries' sources."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
WARNING = """
import sys, warnings
from kr_ray import cli, commands

def work(parsed):
    import numpy as np
    print(np.log(np.zeros(1)) + np.ones(2))
    warnings.warn("a library is not content")
    return 0

commands.runs = work
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("command", "code"), [("doctor", 141), ("runs", 141), ("--help", 0)])
def test_a_reader_that_leaves_is_no_error(command: str, code: int) -> None:
    """`kr doctor | head -3`; argparse's own help takes it for a success."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "kr_ray.cli", command],
        env=ENVIRONMENT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


def test_another_pipe_that_breaks_is_told() -> None:
    program = WARNING.replace("import numpy as np", "raise BrokenPipeError('the store has hung up')")
    command = [sys.executable, "-c", program, "runs"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the store has hung up" in done.stderr


def test_warnings_of_libraries_are_shown_to_those_who_debug_alone() -> None:
    said = {}
    for options in ((), ("--debug",)):
        command = [sys.executable, "-c", WARNING, *options, "runs"]
        said[options] = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert said[()].stdout == said["--debug",].stdout == "[-inf -inf]\n"
    assert said[()].stderr == ""
    assert "divide by zero" in said["--debug",].stderr and "not content" in said["--debug",].stderr
