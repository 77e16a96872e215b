"""`kr submit` before it reaches a cluster: what would not be uploaded, and addresses."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, tiny_settings
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package

from kr_ray.cli import main
from kr_ray.cluster.submit import JOB_ENVIRONMENT, check_address, entrypoint
from kr_ray.config import ConfigError
from kr_ray.silence import SWITCHES

SECRET = "hunter2"
PLACES = (
    "configs",
    "runs/base",
    "data",
    "docker",
    "tests",
    "mine",
    "mine/deep/er",
    ".venv",
    "node_modules/x",
    "__pycache__",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a user submits from, with the project's ignore files and one in a folder of the user's own."""
    folder = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, folder / name)
    for place in PLACES:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "a.yaml").write_text(yaml.safe_dump(tiny_settings()))
    (folder / "mine" / ".rayignore").write_text("deep/**/a.yaml\n")
    return folder


def test_a_configuration_is_accepted_exactly_if_the_upload_holds_it(checkout: Path, tmp_path: Path) -> None:
    """Compared with the archive that Ray itself makes."""
    excluded = ray_constants.get_runtime_env_default_excludes()
    create_package(str(checkout), tmp_path / "upload.zip", include_gitignore=True, excludes=excluded)
    uploaded = set(zipfile.ZipFile(tmp_path / "upload.zip").namelist())
    refused = []
    for place in PLACES:
        file = f"{place}/a.yaml"
        try:
            entrypoint("run", str(checkout / file), [], checkout)
        except ConfigError as error:
            assert file in str(error) and "copy it" in str(error)
            refused.append(file)
        assert (file in refused) == (file not in uploaded), file
    assert {"runs/base/a.yaml", "mine/deep/er/a.yaml", ".venv/a.yaml"} <= set(refused)
    assert {"configs/a.yaml", "mine/a.yaml"}.isdisjoint(refused)


@pytest.mark.parametrize(
    "address",
    [
        "foo bar",
        f"ftp://me:{SECRET}@h",
        "http://h:-1",
        "http://h:99999999",
        "http://",
        "h:8265",
        "ray://h:10001",
        "",
        "http://h:0",
    ],
)
def test_what_is_no_dashboards_address_is_refused_in_our_words(address: str) -> None:
    with pytest.raises(ConfigError, match="--address") as caught:
        check_address(address)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "https://ray.example.org/prefix", f"http://me:{SECRET}@h:1"]
)
def test_a_dashboards_address_is_taken(address: str) -> None:
    assert check_address(address) == address


def test_the_password_of_an_address_is_not_printed(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", str(checkout / "configs" / "a.yaml"), "--working-dir", str(checkout)]
    for debug in ([], ["--debug"]):
        assert main([*debug, *arguments, "--address", f"http://me:{SECRET}@127.0.0.1:9"]) == 1
        said = capfd.readouterr()
        assert "127.0.0.1:9" in said.err and SECRET not in said.out + said.err


def test_a_secret_among_the_overrides_never_reaches_a_job(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", str(checkout / "configs" / "a.yaml"), "--working-dir", str(checkout)]
    assert main([*arguments, "--set", f"tracking.mlflow=http://me:{SECRET}@h"]) == 2
    assert SECRET not in "".join(capfd.readouterr())


def test_a_job_is_as_silent_as_the_command() -> None:
    assert SWITCHES.items() <= JOB_ENVIRONMENT.items()
