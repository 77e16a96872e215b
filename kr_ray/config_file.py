"""A configuration from YAML: presets filled in, keys overridden, every mistake told at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kr_ray.config import Config, ConfigError, Section, cross_section_mistakes
from kr_ray.foreign.files import read_text, shown
from kr_ray.foreign.yaml_core import YamlError, read_value, read_yaml

# --- presets ---------------------------------------------------------------------------------------------------------

TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    # Table 3, column by column; "D basket size" is how many batches StudioGAN's loader preloads and changes no result.
    "ours": {
        "loss": "logistic", "output": "sigmoid", "precision": "mixed", "d_optimizer": "adamw",
        "d_weight_decay": 0.004, "d_label_smoothing": 0.1, "d_steps": 4,
    },
    "vanilla": {
        "loss": "hinge", "output": "tanh", "precision": "full", "d_optimizer": "adam",
        "d_weight_decay": 0.0, "d_label_smoothing": 0.0, "d_steps": 2,
    },
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # 9.34M / 3.18M parameters at 10 classes: the public 32-px table at 128 channels.
    "studiogan32": {"channels": 128, "g_in": [4, 4, 4], "g_out": [4, 4, 4], "d_in": [1, 4, 4], "d_out": [4, 4, 4],
                    "bottleneck_ratio": 4},
    # 41.01M / 39.13M: the sizes printed in Table 3.
    "kr41m": {"channels": 128, "g_in": [8, 8, 4], "g_out": [8, 4, 4], "d_in": [1, 4, 8, 8], "d_out": [4, 8, 8, 8],
              "bottleneck_ratio": 2},
    # For CPUs: same blocks, fewer channels.
    "small32": {"channels": 32, "g_in": [4, 4, 4], "g_out": [4, 4, 2], "d_in": [1, 2, 4, 4], "d_out": [2, 4, 4, 4],
                "bottleneck_ratio": 4, "attention_resolution": 0},
    "small16": {"channels": 32, "g_in": [4, 4], "g_out": [4, 2], "d_in": [1, 2, 4], "d_out": [2, 4, 4],
                "bottleneck_ratio": 4, "attention_resolution": 0},
    "tiny16": {"channels": 8, "g_in": [2, 2], "g_out": [2, 2], "d_in": [1, 2, 2], "d_out": [2, 2, 2],
               "bottleneck_ratio": 2, "attention_resolution": 0, "depth": 1, "latent_dim": 16, "shared_dim": 16},
}  # fmt: skip


def expand_presets(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill the generator section from its two presets; keys the user wrote win. Unknown preset names are left to validation."""
    section = raw.get("generator", {})
    if not isinstance(section, dict):
        return raw
    preset = TRAINING_PRESETS.get(str(section.get("preset", "ours")), TRAINING_PRESETS["ours"])
    architecture = ARCHITECTURES.get(str(section.get("architecture", "studiogan32")), ARCHITECTURES["studiogan32"])
    return raw | {"generator": preset | architecture | section}


# --- loading ---------------------------------------------------------------------------------------------------------


LARGEST_FILE = 2**18
"""Bytes of a configuration; a mistyped path may name anything."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`section.key=value`) and validate a configuration; file and values are YAML 1.2 (core schema).

    Raises:
        ConfigError: the file is missing or not YAML, or any keys are wrong; the message names all of them.
    """
    path = Path(path)
    text = read_text(path, "must be a configuration in YAML (see configs/)", ConfigError, LARGEST_FILE)
    try:
        raw = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{shown(path)} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{shown(path)} must hold `section: {{key: value}}` mappings, but holds {kind_of(raw)}; see configs/")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Validate a plain mapping (as read from YAML).

    Raises:
        ConfigError: with every mistake in one message.
    """
    try:
        # JSON mode is strict about types yet takes a list for a tuple, which is all that YAML can write.
        return Config.model_validate_json(json.dumps(expand_presets(raw)))
    except TypeError as error:
        raise ConfigError(f"config holds a value that is neither text, number, list nor mapping: {error}; quote it") from error
    except ValidationError as error:
        raise ConfigError(_describe(error, cross_section_mistakes(_sound_sections(raw, error)))) from error


def _sound_sections(raw: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The sections without a mistake of their own; none if all of them are sound (the rules between them have then been told)."""
    faulty = {item["loc"][0] for item in error.errors() if item["loc"]}
    models = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        name: model.model_validate_json(json.dumps(value))
        for name, value in (expand_presets(raw).items() if faulty else ())
        if name not in faulty and isinstance(model := models.get(name), type) and issubclass(model, Section)
    }


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key_path, equals, text = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {shown(override)!r} must read section.key=value, for example --set teacher.epochs=20")
    for key in keys[:-1]:
        if not isinstance(raw.setdefault(key, {}), dict):
            raise ConfigError(f"--set {shown(override)!r}: {key!r} is a value, not a section; shorten the key path")
        raw = raw[key]
    try:
        raw[keys[-1]] = read_value(text)
    except YamlError as error:
        raise ConfigError(f"--set {shown(override)!r}: the value is not valid YAML: {error}") from error


def _describe(error: ValidationError, further: Sequence[str]) -> str:
    """One line per mistake: key path, value, rule, remedy."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "config"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key (value {_said(item['input'])}); {_suggest(item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required key is missing; add it")
        elif item["type"] == "value_error":
            lines += [f"{key}: {line}" for line in message.splitlines()]
        else:
            remedy = WORDS_FOR_BOOLEANS.get(str(item["input"]).lower(), "correct the value")
            lines.append(f"{key}: {message}, but got {_said(item['input'])} ({kind_of(item['input'])}); {remedy}")
    lines += [f"config: {line}" for line in further]
    return f"{len(lines)} mistake(s) in the configuration:\n" + "\n".join(f"  - {line}" for line in lines)


LONGEST_VALUE = 80
WORDS_FOR_BOOLEANS = {
    **dict.fromkeys(("yes", "on", "y"), "yes and on are text in YAML 1.2: write true"),
    **dict.fromkeys(("no", "off", "n"), "no and off are text in YAML 1.2: write false"),
}


def kind_of(value: Any) -> str:
    """What a value is, in the words of YAML."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), "another kind of value")


def _said(value: Any) -> str:
    text = shown(repr(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _suggest(location: tuple[int | str, ...]) -> str:
    from difflib import get_close_matches

    model: Any = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return "remove it"
        model = field.annotation
    close = get_close_matches(str(location[-1]), list(model.model_fields), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(model.model_fields))}"
