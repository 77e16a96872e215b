"""Further generators of a run, named on the command line: `vanilla`, `edm,preset=edm32`, ..."""

from __future__ import annotations

import re
from typing import Any

from kr_ray.config.base import ConfigError, Raw
from kr_ray.config.edm import PRESETS
from kr_ray.config.file import parse_config
from kr_ray.config.generators import ARCHITECTURES, TRAINING_PRESETS
from kr_ray.config.kinds import GENERATORS
from kr_ray.config.run import Config
from kr_ray.foreign.files import shown
from kr_ray.foreign.yaml_core import YamlError, read_value

OWN = "run"
"""Names the run's own generator."""
KINDS_OF_PRESETS = dict.fromkeys(TRAINING_PRESETS, "biggan_deep") | dict.fromkeys(PRESETS, "edm")
KEYS_OF_PRESETS = {
    ("biggan_deep", "preset"): frozenset[str]().union(*TRAINING_PRESETS.values()),
    ("biggan_deep", "architecture"): frozenset[str]().union(*ARCHITECTURES.values()),
    ("edm", "preset"): frozenset[str]().union(*PRESETS.values()),
}
"""What a preset fills in; it must not stay as another one has filled it."""


def with_generator(config: Config, name: str) -> Config:
    """The run with another generator, drawn from as its kind is by default.

    Args:
        name: `run`, a kind or a preset, and keys of that kind: `vanilla`, `edm,epochs=8`. A generator of the
            run's own kind has the run's keys but for those; one of another kind the run's epochs and
            checkpoints.

    Raises:
        ConfigError: no such kind, preset or key; the message names all mistakes.
    """
    head, *pairs = re.split(r",(?=\w+=)", name)
    if head == OWN and not pairs:
        return config
    raw = config.model_dump(mode="json")
    given = {key: _value(name, text) for key, _, text in (pair.partition("=") for pair in pairs)}
    raw["generator"] = _section(head, given, raw["generator"]) | given
    if raw["generator"]["kind"] != config.generator.kind:  # keys of another kind mean nothing to it
        del raw["synthesis"]["sampling"], raw["synthesis"]["pool_scale"], raw["tuning"]["space"]
    try:
        return parse_config(raw)
    except ConfigError as error:
        raise ConfigError(f"`--generators {shown(name)}`: {error}") from error


def _section(head: str, given: Raw, own: Raw) -> Raw:
    kind = KINDS_OF_PRESETS.get(head, own["kind"] if head == OWN else head)
    if kind not in GENERATORS and kind != own["kind"]:
        known = [OWN, *KINDS_OF_PRESETS, *GENERATORS]
        raise ConfigError(
            f"`--generators` must begin with one of {', '.join(known)}, but got {shown(head)}; "
            "write vanilla, or edm,epochs=8"
        )
    preset = {"preset": head} if head in KINDS_OF_PRESETS else {}
    if kind != own["kind"]:
        kept = {key: own[key] for key in ("epochs", "checkpoint_every", "collapse")}
    else:
        named = [key for key in ("preset", "architecture") if key in given | preset]
        refilled = frozenset[str]().union(*(KEYS_OF_PRESETS.get((kind, key), ()) for key in named))
        kept = {key: value for key, value in own.items() if key not in refilled}
    return kept | {"kind": kind} | preset


def _value(name: str, text: str) -> Any:
    try:
        return read_value(text)
    except YamlError as error:
        raise ConfigError(
            f"`--generators` must hold values in YAML, but got {shown(name)}: {error}"
        ) from error
