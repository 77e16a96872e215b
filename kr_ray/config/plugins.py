"""Kinds that modules outside the package bring: `plugins: [my_generators]` in a configuration.

Such a module has a constant `SECTIONS` with the sections of its kinds, subclasses of GeneratorSection or
MethodSection that also say what does the work (`member()`, see kr_ray.generators.registry and
kr_ray.methods.registry).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

from kr_ray.config.base import ConfigError
from kr_ray.config.generators import GeneratorSection
from kr_ray.config.methods import MethodSection


@dataclass(frozen=True)
class PluginSections:
    """Sections by kind."""

    generators: dict[str, type[GeneratorSection]] = field(default_factory=dict)
    methods: dict[str, type[MethodSection]] = field(default_factory=dict)


def plugin_sections(modules: Sequence[str]) -> PluginSections:
    """The kinds of all `modules`.

    Raises:
        ConfigError: a module cannot be imported, or has no `SECTIONS`.
    """
    found = PluginSections()
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"`plugins` must name modules, but got {name[:80]!r}; write package.module, without .py"
            )
        try:
            sections = import_module(name).SECTIONS
        except ImportError as error:
            raise ConfigError(
                f"`plugins` must name modules that can be imported, but {name!r} "
                f"cannot be ({error}); set PYTHONPATH to its folder"
            ) from error
        except AttributeError as error:
            raise ConfigError(
                f"`plugins` must name modules with a constant SECTIONS, but {name!r} has none; add it"
            ) from error
        for section in sections:
            family = found.generators if issubclass(section, GeneratorSection) else found.methods
            family[section.model_fields["kind"].default] = section
    return found
