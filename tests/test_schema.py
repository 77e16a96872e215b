"""`kr schema`: what it allows is what the program reads, and every key has its meaning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kr_ray.cli import main
from kr_ray.config import ConfigError
from kr_ray.config.file import parse_config
from kr_ray.config.schema import config_schema
from kr_ray.foreign.yaml_core import read_yaml

REPOSITORY = Path(__file__).parents[1]
SCHEMA = config_schema()
ALLOWED = jsonschema.Draft202012Validator(SCHEMA)
LEAST: dict[str, Any] = {"name": "x", "data": {"name": "digits", "image_size": 32}}


def keys(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key with its schema, by class and name."""
    for name, key in schema.get("properties", {}).items():
        yield f"{place}.{name}", key
    for name, section in schema.get("$defs", {}).items():
        yield from keys(section, name)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_allowed(path: Path) -> None:
    ALLOWED.validate(read_yaml(path.read_text()))


def test_every_key_has_its_meaning() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    found = dict(keys(SCHEMA))
    assert {"BigGanConfig.g_in", "EdmSampling.guidance", "DpSgdSection.norm", ".students"} <= found.keys()
    for place, key in found.items():
        section = SCHEMA["$defs"].get(key.get("$ref", "").removeprefix("#/$defs/"), {})
        assert key.get("description") or section.get("description"), place


WRONG: list[dict[str, Any]] = [
    {"teacher": {"epoch": 3}},
    {"teacher": {"epochs": "3"}},
    {"teacher": {"epochs": 0}},
    {"teacher": {"epochs": 2_000_000}},
    {"unknown": {}},
    {"generator": {"kind": "edn"}},
    {"generator": {"preset": "theirs"}},
    {"generator": {"kind": "edm", "architecture": "kr41m"}},
    {"generator": {"channels": 2**17}},
    {"synthesis": {"labelling": "soft"}},
    {"synthesis": {"sampling": {"latent": 1.0}}},
    {"students": {"one": {"kind": "dp_sdg"}}},
    {"students": {"one": {}}},
    {"students": {"one two": {"kind": "teacher"}}},
    {"students": {"one": {"kind": "parquet"}}},
    {"audit": {"shadow_models": 3}},
    {"tuning": {"space": {"latent_std": [1.0]}}},
    {"name": "../x"},
]
RIGHT: list[dict[str, Any]] = [
    {},
    {"generator": {}},
    {"generator": {"preset": "vanilla", "architecture": "small32", "channels": 16}},
    {"generator": {"kind": "edm", "preset": "edm32"}, "synthesis": {"sampling": {"guidance": 1.2}}},
    {"students": {"free": {"kind": "data_free"}, "half": {"kind": "coreset", "selection": "herding"}}},
    {"students": {"private": {"kind": "dp_sgd", "target_epsilon": 3.0}, "t": {"kind": "teacher"}}},
    {"synthesis": {"sampling": {"latent_std": 1.5}}, "tuning": {"space": {"latent_std": [1.0, 2.0]}}},
    {"cluster": {"train": {"cpu": 1, "gpu": 0.5}}},
    {"teacher": {"kind": "classifier", "epochs": 3}},
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_what_the_program_refuses_is_not_allowed(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(LEAST | changes)
    assert not ALLOWED.is_valid(LEAST | changes)


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_what_the_program_reads_is_allowed(changes: dict[str, Any]) -> None:
    parse_config(LEAST | changes)
    ALLOWED.validate(LEAST | changes)


def test_a_plugins_kinds_are_allowed_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "plugins"))
    own = LEAST | {"generator": {"kind": "gaussian_pixels"}, "students": {"means": {"kind": "nearest_mean"}}}
    own |= {"plugins": ["gaussian_pixels", "nearest_mean"]}
    assert main(["schema", "--plugin", "gaussian_pixels", "--plugin", "nearest_mean"]) == 0
    schema = json.loads(capsys.readouterr().out)
    parse_config(own)
    jsonschema.validate(own, schema)
    assert not ALLOWED.is_valid(own)
    assert main(["schema", "--plugin", "nothing"]) == 2
    assert "`plugins` must name modules that can be imported" in capsys.readouterr().err


def test_the_command_prints_it_without_torch_or_ray() -> None:
    code = (
        "import sys; from kr_ray.cli import main; code = main(['schema']);"
        "assert not {'torch', 'ray'} & set(sys.modules), 'imported for nothing'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == SCHEMA
