"""A configuration from YAML: presets filled in, keys overridden, every mistake told at once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kr_ray.config import Config, ConfigError, Section, cross_section_mistakes

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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.2) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is written twice{str(node.start_mark).rstrip()}; keep one")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`section.key=value`, value in YAML) and validate a configuration.

    Raises:
        ConfigError: the file is missing or not YAML, or any keys are wrong; the message names all of them.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist; see configs/ for complete examples")
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold `section: {{key: value}}` mappings, but holds {type(raw).__name__}")
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
        raise ConfigError(f"--set {override!r} must read section.key=value, for example --set teacher.epochs=20")
    for key in keys[:-1]:
        if not isinstance(raw.setdefault(key, {}), dict):
            raise ConfigError(f"--set {override!r}: {key!r} is a value, not a section; shorten the key path")
        raw = raw[key]
    try:
        raw[keys[-1]] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error


def _describe(error: ValidationError, further: Sequence[str]) -> str:
    """One line per mistake: key path, value, rule, remedy."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "config"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key (value {item['input']!r}); {_suggest(item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required key is missing; add it")
        elif item["type"] == "value_error":
            lines += [f"{key}: {line}" for line in message.splitlines()]
        else:
            lines.append(f"{key}: {message}, but got {item['input']!r} ({type(item['input']).__name__}); correct the value")
    lines += [f"config: {line}" for line in further]
    return f"{len(lines)} mistake(s) in the configuration:\n" + "\n".join(f"  - {line}" for line in lines)


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
