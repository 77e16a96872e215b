"""Secrets of the driver's environment, and who is let in to a local Ray; test_silence.py looks through the
files of a whole run."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from conftest import tiny_config, tiny_settings
from nodes import config_file
from planted import PLANTED
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE, _ActorClassCache
from signals import Driver, in_stage

from kr_ray.cluster import runtime
from kr_ray.cluster.quiet import quiet_tune
from kr_ray.config import ConfigError
from kr_ray.masking import is_secret_name

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def test_tune_itself_would_pass_the_credentials_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken off its list; when this fails, Ray has changed and another way may be needed."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ray.remote", lambda runtime_env: lambda trainable: runtime_env)
    passed_on = _ActorClassCache().get(object)["env_vars"]
    assert PLANTED["AWS_SECRET_ACCESS_KEY"] in passed_on.values()
    with quiet_tune(1):
        withheld = _ActorClassCache().get(object)["env_vars"]
    assert not set(PLANTED.values()) & set(withheld.values()) and not any(map(is_secret_name, withheld))
    assert any(
        map(is_secret_name, ENV_VARS_TO_PROPAGATE)
    )  # as Ray had it, for other programs of this process


def listeners(driver: Driver) -> dict[str, set[str]]:
    """Addresses on which processes of the run listen, by process name."""
    found: dict[str, set[str]] = {}
    for process in driver.processes():
        try:
            sockets = [
                socket for socket in process.net_connections("inet") if socket.status == psutil.CONN_LISTEN
            ]
            found.setdefault(process.name(), set()).update(socket.laddr.ip for socket in sockets)
        except psutil.Error:
            continue
    return {name: addresses for name, addresses in found.items() if addresses}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("listen", ["loopback", pytest.param("all", marks=pytest.mark.slow)])
def test_a_local_ray_listens_on_loopback_unless_told_otherwise(tmp_path: Path, listen: str) -> None:
    config = config_file(tmp_path, tiny_settings(teacher={"epochs": 600}, cluster={"listen": listen}))
    driver = Driver(["teacher", config], tmp_path / "runs" / "tiny")
    try:
        assert driver.wait_for(in_stage("teacher", 0.02))
        found = listeners(driver)
    finally:
        driver.process.terminate()
        driver.process.wait(30)
        driver.end()
    print(found)
    assert {"gcs_server", "raylet"} <= found.keys()
    outward = {address for addresses in found.values() for address in addresses} - set(LOOPBACK)
    assert bool(outward) == (listen == "all"), found


def test_a_cluster_without_a_key_listens_on_loopback() -> None:
    assert tiny_config().cluster.listen == "loopback"


def test_the_address_of_a_store_travels_but_not_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    travelling = runtime._storage_environment()
    assert travelling["AWS_ENDPOINT_URL"] == "http://store:9000" and not set(PLANTED.values()) & set(
        travelling.values()
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@store:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL") as caught:
        runtime._storage_environment()
    assert "hunter2" not in str(caught.value)
