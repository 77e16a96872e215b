"""Nothing leaves the machine: what commands write to an empty HOME and ask of the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_settings
from nodes import config_file
from offline import kr_offline, recording_proxy, require_no_words, run_offline
from PIL import Image
from planted import PLANTED, found_in
from test_export import classifier
from test_faults import run_without_ray

from kr_ray.classifiers.export import export_student
from kr_ray.silence import SWITCHES, stay_silent


@pytest.fixture
def session() -> Iterator[Path]:
    """Where Ray keeps its sessions; short, for a Unix socket's path holds 107 characters."""
    root = Path(tempfile.mkdtemp(prefix="kr", dir="/tmp"))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(np.full((16, 16), 99, np.uint8)).save(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A student whose classes have three names."""
    export_student(
        classifier(tmp_path / "weights.safetensors", 1), tmp_path / "student.onnx", ["cat", "dog", "newt"], 16
    )
    return tmp_path / "student.onnx"


def test_a_program_that_asks_another_machine_is_noticed(tmp_path: Path) -> None:
    """What the other tests count, on a program that does write and ask."""
    program = (
        "import pathlib, urllib.request\n"
        "(pathlib.Path.home() / 'device_id').write_text('me')\n"
        "try: urllib.request.urlopen('http://192.0.2.77/telemetry', timeout=1)\n"
        "except OSError: pass"
    )
    noisy = run_offline([sys.executable, "-c", program], tmp_path / "home")
    assert noisy.files == ["device_id"] and noisy.sent > 0


def test_kr_predict_writes_nothing_to_home_and_asks_nobody(tmp_path: Path, model: Path, image: Path) -> None:
    outcome = kr_offline("predict", str(image), "--model", str(model), home=tmp_path / "home")
    require_no_words(outcome)
    assert str(image) in outcome.output


def test_onnxruntime_alone_would_keep_a_device_id(tmp_path: Path, model: Path) -> None:
    """The reason for its switch; when this fails, the library has changed and the switch is to be looked
    at."""
    pytest.importorskip("onnxruntime", minversion="1.29")
    program = (
        f"import onnxruntime; onnxruntime.InferenceSession({str(model)!r}, "
        "providers=['CPUExecutionProvider'])"
    )
    outcome = run_offline([sys.executable, "-c", program], tmp_path / "home")
    assert any(name.endswith("deviceid") for name in outcome.files), outcome


def test_an_onnx_file_opened_without_the_command_line_is_as_silent(
    tmp_path: Path, model: Path, image: Path
) -> None:
    program = (
        "from pathlib import Path; from kr_ray.classifiers.export import predict_files; "
        f"print(list(predict_files(Path({str(model)!r}), [Path({str(image)!r})])))"
    )
    require_no_words(run_offline([sys.executable, "-c", program], tmp_path / "home"))


def test_kr_doctor_plan_runs_and_results_ask_nobody(tmp_path: Path) -> None:
    config = config_file(tmp_path, tiny_settings())
    for number, command in enumerate(
        (["doctor"], ["runs"], ["results"], ["plan", config, "--devices", "1xH200"])
    ):
        outcome = kr_offline(*command, home=tmp_path / f"home{number}")
        assert not outcome.files and not outcome.sent, (command, outcome)


@pytest.mark.timeout(600)
def test_a_run_on_ray_and_its_export_write_nothing_to_home_ask_nobody_and_keep_no_secret(
    tmp_path: Path, session: Path
) -> None:
    """Tune, Train, Data and onnxruntime, with the secrets of a driver and a Ray that would report its use,
    keep a token, and ask clouds where it is."""
    config = config_file(tmp_path, tiny_settings())
    run_without_ray(config, "generator")
    environment = {"RAY_TMPDIR": str(session), **PLANTED}
    outcome = kr_offline("export", config, home=tmp_path / "home", environment=environment)
    require_no_words(outcome)
    assert "student.onnx" in outcome.output and "Starting execution" not in outcome.output
    assert (tmp_path / "runs" / "tiny" / "tuning" / "done.json").exists()
    assert list(session.rglob("runtime_env_agent.log"))
    assert found_in(PLANTED, session, tmp_path) == []


def test_the_switches_stand_before_any_library_is_imported() -> None:
    program = (
        "import sys; from kr_ray import cli; print(sorted({'ray', 'torch', "
        "'onnxruntime', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_environment_cannot_switch_reports_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.setenv(name, "as-the-user-had-it")
    stay_silent()
    assert {name: os.environ[name] for name in SWITCHES} == SWITCHES


def test_containers_are_as_silent() -> None:
    """Whatever runs in one: workers of Ray, a shell, a job's own program."""
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    found = dict(re.findall(r"^\s*(?:ENV )?([A-Z_]+)=(\S+?)(?: \\)?$", text, re.MULTILINE))
    assert {name: found.get(name) for name in SWITCHES} == SWITCHES


def test_every_start_of_ray_that_we_hand_out_switches_its_statistics_off() -> None:
    files = [*(REPOSITORY / "docker").rglob("*.yaml"), *(REPOSITORY / "configs" / "clusters").iterdir()]
    for file in files:
        for line in re.findall(r"ray start (?:.|\\\n|\n\s+--)*", file.read_text()):
            assert "--disable-usage-stats" in line or "RAY_USAGE_STATS_ENABLED" in file.read_text(), (
                file,
                line,
            )


def test_hugging_face_and_mlflow_take_their_switches() -> None:
    """As those libraries read them."""
    constants = pytest.importorskip("huggingface_hub.constants")
    program = (
        "from kr_ray.silence import stay_silent; stay_silent(); from huggingface_hub import constants as "
        "c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True" and constants.__name__.startswith("huggingface_hub")


@pytest.mark.parametrize("switch", ["MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
def test_mlflow_takes_either_switch(switch: str) -> None:
    pytest.importorskip("mlflow.telemetry.utils", reason="mlflow is an optional dependency (kr_ray[mlflow])")
    program = "from mlflow.telemetry.utils import is_telemetry_disabled as off; print(off())"
    environment = {key: value for key, value in os.environ.items() if key not in SWITCHES} | {
        switch: SWITCHES[switch]
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_the_proxy_records_what_it_is_asked_for() -> None:
    """Where namespaces are not allowed, the tests above count by it."""
    with recording_proxy() as (proxy, requests):
        program = (
            f"import urllib.request as u; u.install_opener(u.build_opener(u.ProxyHandler({{'http': "
            f"{proxy!r}}})))\ntry: u.urlopen('http://example.invalid/x', timeout=5)\nexcept Exception: pass"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
    assert requests and requests[0].startswith(b"GET http://example.invalid/x")
