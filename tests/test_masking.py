"""Passwords and tokens are hidden wherever they stand, and nothing else is."""

from __future__ import annotations

import pytest
from conftest import tiny_settings

from kr_ray.config import ConfigError
from kr_ray.config.file import load_config, parse_config
from kr_ray.masking import HIDDEN, holds_secret, is_secret_name, masked
from kr_ray.runs.storage import LocationError, check_location

SECRET = "hunter2"
WITH_PASSWORD = f"https://me:{SECRET}@example.org/x"
HOLDING = (
    f"https://me:{SECRET}@mlflow.example.org/api",
    f"https://{SECRET}@github.com/owner/name",
    f"http://me:{SECRET}/with-a-slash@127.0.0.1:8265",
    f"postgresql+psycopg2://me:{SECRET}@db:5432/runs",
    f"https://storage.example.org/set.npz?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"https://account.blob.example.org/box?sv=2026&sig={SECRET}",
    f"https://hub.example.org/x?token={SECRET}#part",
    f"https://example.org/x#access_token={SECRET}",
    f"s3://bucket/key?api_key={SECRET}",
    f"--set tracking.password={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET} kr run",
    f"headers were {{'Authorization': 'Bearer {SECRET}'}}",
    f'{{"hf_token": "{SECRET}", "x": 1}}',
    f"Authorization: Bearer {SECRET}",
)
PLAIN = (
    "http://127.0.0.1:8265/#/jobs/raysubmit_x",
    "sqlite:////home/me/mlflow.db",
    "s3://bucket/folder",
    "https://host:8080/~me/a@b.html",
    "--set teacher.epochs=20",
    "`latent_std > 0` must hold, but got latent_std=-1.0; use 1.0 to 2.5",
    "RAY_AUTH_TOKEN_PATH=docker/token",
    "mail me@example.org, section.key=value, design=4",
)


@pytest.mark.parametrize("text", HOLDING)
def test_a_secret_is_hidden_and_told_apart_from_what_holds_none(text: str) -> None:
    assert SECRET not in masked(text, {}) and HIDDEN in masked(text, {})
    assert holds_secret(text)
    assert masked(masked(text, {}), {}) == masked(text, {})


@pytest.mark.parametrize("text", PLAIN)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert masked(text, {}) == text and not holds_secret(text)


def test_a_secret_of_the_environment_is_hidden_without_any_sign_of_what_it_is() -> None:
    environment = {
        "MLFLOW_TRACKING_PASSWORD": "correct horse",
        "PWD": "/work/here",
        "MY_TOKEN": "true",
        "TERM": "xterm-256color",
    }
    said = "401 for correct horse in /work/here, true to xterm-256color"
    assert masked(said, environment) == f"401 for {HIDDEN} in /work/here, true to xterm-256color"


def test_names_of_secrets_are_told_from_names_of_places() -> None:
    secret = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN",
              "HF_TOKEN",
              "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
              "WANDB_API_KEY")  # fmt: skip
    plain = ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "GOOGLE_APPLICATION_CREDENTIALS", "PATH", "PWD",
             "OLDPWD", "AWS_REGION",
             "AWS_ENDPOINT_URL", "RAY_CHDIR_TO_TRIAL_DIR", "KEYBOARD", "TOKENIZERS_PARALLELISM")  # fmt: skip
    assert [is_secret_name(name) for name in secret] == [True] * len(secret)
    assert [is_secret_name(name) for name in plain] == [False] * len(plain)


@pytest.mark.parametrize(
    "key", ["tracking.mlflow", "storage", "data.root", "cluster.address", "student.from_parquet"]
)
@pytest.mark.parametrize(
    "text", [f"https://me:{SECRET}@h/x", f"https://h/x?token={SECRET}", f"s3://b/x?sig={SECRET}"]
)
def test_no_key_of_a_configuration_takes_a_secret_or_repeats_it(
    tmp_path_factory: pytest.TempPathFactory, key: str, text: str
) -> None:
    config = tmp_path_factory.mktemp("config") / "config.yaml"
    config.write_text(str(tiny_settings()))  # JSON-like, which is YAML
    with pytest.raises(ConfigError, match=key) as caught:
        load_config(config, [f"{key}={text}"])
    assert SECRET not in str(caught.value)


def test_an_unknown_key_is_refused_without_its_secret() -> None:
    further = {"students": {"mine": {"kind": "dp_sgd", "api_key": SECRET}}}
    for section in (
        {"tracking": {"password": SECRET}},
        {"mlflow_token": SECRET},
        {"extra": {"api_key": SECRET}},
        further,
    ):
        with pytest.raises(ConfigError, match="unknown key") as caught:
            parse_config(tiny_settings(**section))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"plugins": [WITH_PASSWORD]},
        {"audit": {"worst_case": {"arms": [WITH_PASSWORD]}}},
        {"students": {"mine": {"kind": "knowledge_recycling", "synthesis": {"labelling": WITH_PASSWORD}}}},
        {"students": {"mine": {"kind": WITH_PASSWORD}}},
        {"students": [{"password": SECRET}]},
        {"generator": {"kind": WITH_PASSWORD}},
        {"generator": {"epochs": [{"password": SECRET}]}},
    ],
    ids=str,
)
def test_a_secret_within_a_list_or_mapping_or_for_a_kind_is_refused_and_not_repeated(
    section: dict[str, object],
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_settings(**section))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "file://",
        "file:///",
        "file://runs",
        "file://host/runs",
        "file:/runs",
        "s3:/bucket",
        "s3:bucket",
        "http:/x",
    ],
)
def test_a_location_that_would_become_a_folder_of_its_scheme_is_refused(text: str) -> None:
    with pytest.raises(LocationError, match="must"):
        check_location(text)


@pytest.mark.parametrize(
    "text", ["file:///data/runs", "runs", "./s3:/x", "a:b", "~/runs", "C:/runs", "s3://bucket/runs"]
)
def test_plain_paths_and_whole_uris_stay_locations(text: str) -> None:
    assert check_location(text) == text
