"""What a person may write in a configuration, as JSON Schema: for editors, which then complete keys and show
their meaning.

Each section by itself: rules between sections, and those that a section's own code checks, are told by the
commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from kr_ray.config.base import Raw, Section
from kr_ray.config.dp import PrivacySection
from kr_ray.config.kinds import GENERATORS, METHODS, TEACHERS
from kr_ray.config.limits import LARGEST, LARGEST_COUNT, LARGEST_REAL
from kr_ray.config.plugins import plugin_sections
from kr_ray.config.run import DEFAULT_KIND, DEFAULT_TEACHER, STUDENT_NAME, Config
from kr_ray.config.several import SeveralConfig, SeveralSampling

Definitions = dict[str, JsonSchemaValue]
"""Schemas by the name of their class."""


def config_schema(plugins: Sequence[str] = ()) -> JsonSchemaValue:
    """The schema of a whole file.

    Args:
        plugins: modules whose kinds are allowed too.

    Raises:
        ConfigError: one of them cannot be used.
    """
    brought = plugin_sections(plugins)
    generators, methods = GENERATORS | brought.generators, METHODS | brought.methods
    sampling = dict.fromkeys(section.sampling() for section in generators.values())
    models: list[type[Section]] = [
        Config, *generators.values(), *methods.values(), *TEACHERS.values(), *sampling,
    ]  # fmt: skip
    definitions: Definitions = models_json_schema([(model, "validation") for model in models])[1]["$defs"]
    for kind, generator in generators.items():
        unfilled = _unfilled(generator, generator.expand({}))
        _ask_for(definitions[generator.__name__], kind, unfilled, optional=kind == DEFAULT_KIND)
    for kind, method in methods.items():
        _ask_for(definitions[method.__name__], kind, _unfilled(method, {}))
    for kind, teacher in TEACHERS.items():
        unfilled = _unfilled(teacher, {})
        _ask_for(definitions[teacher.__name__], kind, unfilled, optional=kind == DEFAULT_TEACHER)
    drawn = definitions["SynthesisConfig"]["properties"]["sampling"]
    definitions["SynthesisConfig"]["properties"]["sampling"] = {
        "description": drawn["description"], "anyOf": _references(sampling),
    }  # fmt: skip
    whole = definitions.pop("Config")
    _open_kinds(whole, generators.values(), methods.values())
    _open_members(definitions, generators.values(), sampling)
    for section in (whole, *definitions.values()):
        _bound(section)
    used = {name: definitions[name] for name in sorted(_reachable(whole, definitions))}
    return {"$schema": GenerateJsonSchema.schema_dialect} | whole | {"$defs": used}


def _open_kinds(
    whole: JsonSchemaValue, generators: Iterable[type[Section]], methods: Iterable[type[Section]]
) -> None:
    """Let `generator`, `teacher` and each of `students` be of any kind, and a file leave out `generator`."""
    keys = whole["properties"]
    keys["generator"] = {
        "description": "The kind of generator and its keys; its presets fill those that are not there.",
        "oneOf": _references(generators),
    }
    keys["teacher"] = {
        "description": "The kind of the run's own teacher, and its keys.",
        "oneOf": _references(TEACHERS.values()),
    }
    keys["students"] = {
        "description": keys["students"]["description"],
        "type": "object",
        "patternProperties": {f"^{STUDENT_NAME}$": {"oneOf": _references(methods)}},
        "additionalProperties": False,
    }
    whole["required"] = [name for name in whole["required"] if name != "generator"]


def _open_members(
    definitions: Definitions, generators: Iterable[type[Section]], sampling: Iterable[type[Section]]
) -> None:
    """Let the members of `several` be of any other kind, and their sampling be left out."""
    for several, kinds in ((SeveralConfig, generators), (SeveralSampling, sampling)):
        others = _references(kind for kind in kinds if not issubclass(kind, (several, PrivacySection)))
        definitions[several.__name__]["properties"]["members"]["items"] = {"anyOf": others}
    del definitions[SeveralSampling.__name__]["required"]


def _ask_for(schema: JsonSchemaValue, kind: str, required: Sequence[str], optional: bool = False) -> None:
    """Let a section be told from its siblings by its `kind`."""
    about = {"description": "Tells this section from those of other kinds.", "const": kind, "type": "string"}
    schema["properties"]["kind"] = about | ({"default": kind} if optional else {})
    schema["required"] = [*([] if optional else ["kind"]), *(key for key in required if key != "kind")]


def _unfilled(section: type[Section], nothing_said: Raw) -> list[str]:
    """The keys that neither a preset nor a default fills."""
    try:
        section.model_validate(nothing_said)
    except ValidationError as error:
        return [str(item["loc"][0]) for item in error.errors() if item["type"] == "missing"]
    return []


def _references(sections: Iterable[type[Section]]) -> list[JsonSchemaValue]:
    return [{"$ref": f"#/$defs/{section.__name__}"} for section in sections]


def _bound(section: JsonSchemaValue) -> None:
    """Give every number the limit that `kr_ray.config.limits` has for its key, unless it has its own."""
    for name, key in section.get("properties", {}).items():
        for number in (key, key.get("items", {}), *key.get("prefixItems", ()), *key.get("anyOf", ())):
            kind = number.get("type")
            if kind in ("integer", "number") and not {"maximum", "exclusiveMaximum"} & number.keys():
                number["maximum"] = LARGEST.get(name, LARGEST_COUNT if kind == "integer" else LARGEST_REAL)


def _reachable(schema: object, definitions: Definitions) -> set[str]:
    """Names of the definitions that a schema refers to, directly or not."""
    if isinstance(schema, dict):
        name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
        own = {name} | _reachable(definitions[name], definitions) if name else set()
        return own.union(*(_reachable(part, definitions) for part in schema.values()))
    if isinstance(schema, list):
        return set().union(*(_reachable(part, definitions) for part in schema))
    return set()
