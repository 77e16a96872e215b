"""A configuration from YAML: presets filled in, keys overridden, every mistake told at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from kr_ray.config.base import ConfigError, Raw, Section
from kr_ray.config.dp import PrivacySection
from kr_ray.config.generators import GeneratorSection, SamplingSection
from kr_ray.config.kinds import GENERATORS, METHODS, TEACHERS
from kr_ray.config.methods import MethodSection, TeacherConfig
from kr_ray.config.plugins import plugin_sections
from kr_ray.config.privacy import RunPrivacyConfig
from kr_ray.config.renamed import RENAMED
from kr_ray.config.run import (
    DEFAULT_KIND,
    DEFAULT_TEACHER,
    STUDENT_NAME,
    Config,
    RunKeys,
    cross_section_mistakes,
)
from kr_ray.config.several import SeveralConfig, SeveralSampling
from kr_ray.foreign.files import read_text, shown
from kr_ray.foreign.yaml_core import YamlError, read_value, read_yaml
from kr_ray.masking import HIDDEN, is_secret_name, masked

S = TypeVar("S", bound=Section)
Mistake = tuple[tuple[str, ...], str]
"""Key path, and what is wrong there."""


LARGEST_FILE = 2**18
"""Bytes of a configuration; a mistyped path may name anything."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override (`section.key=value`) and validate a
    configuration; file and values are YAML 1.2 (core schema).

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
        raise ConfigError(
            f"{shown(path)} must hold `section: {{key: value}}` mappings, "
            f"but holds {kind_of(raw)}; see configs/"
        )
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The same configuration but for `overrides` (`section.key=value`), checked as a whole.

    Raises:
        ConfigError: an override is wrong, or does not fit the rest.
    """
    raw = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw)


def _apply_override(raw: Raw, override: str) -> None:
    key_path, equals, text = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {shown(override)!r} must read section.key=value, for example --set teacher.epochs=20"
        )
    for key in keys[:-1]:
        if not isinstance(raw.setdefault(key, {}), dict):
            raise ConfigError(
                f"--set {shown(override)!r}: {key!r} is a value, not a section; shorten the key path"
            )
        raw = raw[key]
    try:
        raw[keys[-1]] = read_value(text)
    except YamlError as error:
        raise ConfigError(f"--set {shown(override)!r}: the value is not valid YAML: {error}") from error


# --- validation ---------------------------------------------------------------------------------------------


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Validate a plain mapping (as read from YAML): each section by the
    class of its kind, then the rules between them.

    Raises:
        ConfigError: with every mistake in one message.
    """
    sections, mistakes = _Sections(raw).validated()
    if mistakes:
        mistakes += [(("config",), line) for line in cross_section_mistakes(sections)]
        raise ConfigError(_told(mistakes))
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(_told(list(_mistakes_of(error, ("config",), Config)))) from error


class _Sections:
    """A raw configuration being taken apart."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        own = RunKeys.model_fields
        self.raw = {key: value for key, value in raw.items() if key not in own}
        self.own = {key: value for key, value in raw.items() if key in own}
        self.mistakes: list[Mistake] = []
        self.found: Raw = {}

    def validated(self) -> tuple[Raw, list[Mistake]]:
        """The sound sections by name, and all mistakes in the others."""
        keys = self._section(self.own, RunKeys, ())
        self.found |= {name: getattr(keys, name) for name in RunKeys.model_fields} if keys else {}
        plugins = plugin_sections(keys.plugins if isinstance(keys, RunKeys) else ())
        generator = self._kind(
            "generator", self.raw.pop("generator", {}), GENERATORS | plugins.generators, DEFAULT_KIND
        )
        students = self.raw.pop("students", None) or {}
        self._students(students, METHODS | plugins.methods)
        for name, field in Config.model_fields.items():
            if name in RunKeys.model_fields or name in ("generator", "students"):
                continue
            if name in self.raw or field.is_required():
                self._fill(name, cast("type[Section]", field.annotation), generator)
            else:
                self.found[name] = self._default(name, field.get_default(), generator)
        self.mistakes += [((name,), _unknown((name,), value, Config)) for name, value in self.raw.items()]
        return self.found, self.mistakes

    def _fill(self, name: str, kind: type[Section], generator: type[GeneratorSection] | None) -> None:
        if name not in self.raw:
            self.mistakes.append(((name,), "required key is missing; add it"))
            return
        value = self.raw.pop(name)
        own = self._own_class(name, value, kind)
        if own is None:
            return
        if name == "synthesis" and isinstance(value, dict) and generator:
            value = self._synthesis_defaults() | value
            sampling = self._sampling(value.get("sampling") or {}, generator)
            checked = self._section({k: v for k, v in value.items() if k != "sampling"}, own, (name,))
            if checked and sampling:
                self.found[name] = checked.model_copy(update={"sampling": sampling})
            return
        if name == "tuning" and isinstance(value, dict) and generator:
            value = {"space": self._space()} | value
        if checked := self._section(value, own, (name,)):
            self.found[name] = checked

    def _own_class(self, name: str, value: Any, kind: type[Section]) -> type[Section] | None:
        """The class that a section's value is of, where its field allows several; None: nothing is left to
        check."""
        if name == "teacher":
            return (
                self._class_of(value, (name,), TEACHERS, DEFAULT_TEACHER)
                if isinstance(value, dict)
                else TeacherConfig
            )
        if name == "privacy" and value is None:
            self.found[name] = None
            return None
        return RunPrivacyConfig if name == "privacy" else kind

    def _default(self, name: str, default: Any, generator: type[GeneratorSection] | None) -> Any:
        if name == "synthesis" and generator:
            own = self._synthesis_defaults()
            section: GeneratorSection | None = self.found.get("generator")
            return default.model_copy(
                update=own | ({"sampling": section.default_sampling()} if section else {})
            )
        if name == "tuning" and generator:
            return default.model_copy(update={"space": self._space()})
        return default

    def _space(self) -> dict[str, tuple[float, float]]:
        """The generator's own, as far as a pool bears it; of one that is refused, what every kind has."""
        section: GeneratorSection | None = self.found.get("generator")
        whole: dict[str, tuple[float, float]] = {"regeneration_rate": (1, 10)}
        space = section.space() if section else whole
        pool = getattr(self.found.get("synthesis"), "pool_scale", 0)
        if pool and (bounds := space.get("cardinality_scale")):
            space["cardinality_scale"] = (min(bounds[0], pool), min(bounds[1], pool))
        return space

    def _sampling(self, value: Any, generator: type[GeneratorSection]) -> SamplingSection | None:
        path, several = ("synthesis", "sampling"), self.found.get("generator")
        if generator is not SeveralConfig or not isinstance(value, dict):
            return self._section(value, generator.sampling(), path)
        if not isinstance(several, SeveralConfig):
            return None  # what the members' keys are cannot be known
        own = several.default_sampling()
        members = value.get("members", [{}] * len(own.members))
        if not isinstance(members, list) or len(members) != len(own.members):
            said = f"must list the keys of each of the {len(own.members)} members, but got "
            self.mistakes.append(((*path, "members"), f"{said}{_said(path, members)}; use {{}} for defaults"))
            return None
        ways = [
            self._section(keys, type(way), (*path, "members", str(k)))
            for k, (keys, way) in enumerate(zip(members, own.members, strict=True))
        ]
        shares = value.get("shares", own.shares)
        keys = value | {
            "members": tuple(ways),
            "shares": tuple(shares) if isinstance(shares, list) else shares,
        }
        return None if None in ways else self._checked(keys, SeveralSampling, path)

    def _synthesis_defaults(self) -> Raw:
        section: GeneratorSection | None = self.found.get("generator")
        return dict(section.synthesis_defaults()) if section else {}

    def _kind(
        self, name: str, value: Any, kinds: Mapping[str, type[GeneratorSection]], default: str
    ) -> type[GeneratorSection] | None:
        """Validate the section that names its kind; returns the kind's class."""
        found = self._class_of(value, (name,), kinds, default)
        if found is SeveralConfig:
            self._several(value, kinds, default)
        elif found and (checked := self._section(found.expand(dict(value)), found, (name,))):
            self.found[name] = checked
        return found

    def _several(self, value: Raw, kinds: Mapping[str, type[GeneratorSection]], default: str) -> None:
        path, listed = ("generator", "members"), value.get("members")
        if not isinstance(listed, list) or not listed:
            said = "must list the sections of at least one generator, but got "
            self.mistakes.append((path, f"{said}{_said(path, listed)}; see configs/README.md"))
            return
        refused = (SeveralConfig, PrivacySection)  # a private one's noise is fitted to it alone
        plain = {kind: found for kind, found in kinds.items() if not issubclass(found, refused)}
        members: list[GeneratorSection | None] = []
        for k, keys in enumerate(listed):
            kind = self._class_of(keys, (*path, str(k)), plain, default)
            members.append(self._section(kind.expand(dict(keys)), kind, (*path, str(k))) if kind else None)
        sound = tuple(member for member in members if member)
        if len(sound) == len(members):
            keys = SeveralConfig.derived(sound) | value | {"members": sound}
            if checked := self._checked(keys, SeveralConfig, ("generator",)):
                self.found["generator"] = checked

    def _students(self, students: Any, kinds: Mapping[str, type[MethodSection]]) -> None:
        if not isinstance(students, dict):
            self.mistakes.append(
                (
                    ("students",),
                    "must map names to sections, but got "
                    f"{_said(('students',), students)}; see configs/README.md",
                )
            )
            return
        sound = {}
        for name, value in students.items():
            path = ("students", str(name))
            if not re.fullmatch(STUDENT_NAME, str(name)):
                self.mistakes.append(
                    (path, "a student's name must be at most 100 letters, digits, - and _; rename it")
                )
            elif (kind := self._class_of(value, path, kinds, None)) and (
                checked := self._section(value, kind, path)
            ):
                sound[name] = checked
        self.found["students"] = sound

    def _class_of(
        self, value: Any, path: tuple[str, ...], kinds: Mapping[str, type[S]], default: str | None
    ) -> type[S] | None:
        if not isinstance(value, dict):
            self.mistakes.append(
                (path, f"must be a section of keys, but got {_said(path, value)}; write it as a mapping")
            )
            return None
        kind = str(value.get("kind", default))
        if kind not in kinds:
            close = get_close_matches(kind, list(kinds), n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else "or name the module that brings it in `plugins`"
            )
            self.mistakes.append(
                ((*path, "kind"), f"must be one of {', '.join(kinds)}, but got {_said(path, kind)}; {hint}")
            )
            return None
        return kinds[kind]

    def _checked(self, keys: Raw, kind: type[S], path: tuple[str, ...]) -> S | None:
        """Of keys among which there are sections already."""
        try:
            return kind.model_validate(keys)
        except ValidationError as error:
            self.mistakes += _mistakes_of(error, path, kind)
        return None

    def _section(self, value: Any, kind: type[S], path: tuple[str, ...]) -> S | None:
        try:
            # JSON mode is strict about types yet takes a list for a tuple, which is all that YAML can write.
            return kind.model_validate_json(json.dumps(value))
        except TypeError as error:
            self.mistakes.append(
                (path, f"holds a value that is neither text, number, list nor mapping: {error}; quote it")
            )
        except ValidationError as error:
            self.mistakes += _mistakes_of(error, path, kind)
        return None


# --- messages -----------------------------------------------------------------------------------------------


def _mistakes_of(error: ValidationError, path: tuple[str, ...], model: type[BaseModel]) -> Iterator[Mistake]:
    """Of one section: rule, value, remedy."""
    for item in error.errors():
        place = (*path, *(str(part) for part in item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            yield place, _unknown(place, item["input"], _model_at(model, item["loc"][:-1]))
        elif item["type"] == "missing":
            yield place, "required key is missing; add it"
        elif item["type"] == "value_error":
            for line in message.splitlines():
                yield place, line
        else:
            remedy = WORDS_FOR_BOOLEANS.get(str(item["input"]).lower(), "correct the value")
            yield (
                place,
                f"{message}, but got {_said(place, item['input'])} ({kind_of(item['input'])}); {remedy}",
            )


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    found: Any = model
    for part in location:
        field = found.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        found = field.annotation
    return found  # type: ignore[no-any-return]


def _unknown(place: tuple[str, ...], value: Any, model: type[BaseModel] | None) -> str:
    return f"unknown key (value {_said(place, value)}); {_suggest(place, model)}"


LONGEST_VALUE = 80
WORDS_FOR_BOOLEANS = {
    **dict.fromkeys(("yes", "on", "y"), "yes and on are text in YAML 1.2: write true"),
    **dict.fromkeys(("no", "off", "n"), "no and off are text in YAML 1.2: write false"),
}


def kind_of(value: Any) -> str:
    """What a value is, in the words of YAML."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return "nothing" if value is None else names.get(type(value), "another kind of value")


def _said(place: Sequence[str], value: Any) -> str:
    """A refused value in few words, unless it or the name of its key speaks of a secret."""
    if any(map(is_secret_name, place)):
        return HIDDEN
    text = shown(masked(repr(value)))  # hidden before it is cut: half a URI is none
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _suggest(place: tuple[str, ...], model: type[BaseModel] | None) -> str:
    if new := RENAMED.get(".".join(place)):
        return f"it is called {new} now"
    if model is None:
        return "remove it"
    close = get_close_matches(place[-1], list(model.model_fields), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(model.model_fields))}"


def _told(mistakes: Sequence[Mistake]) -> str:
    """One line per mistake."""
    lines = [f"  - {shown('.'.join(place)) or 'config'}: {message}" for place, message in mistakes]
    return f"{len(lines)} mistake(s) in the configuration:\n" + "\n".join(lines)
