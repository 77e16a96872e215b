"""Generators by kind. A new one: its section in
`kr_ray.config.generators`, a file or folder here, a line below."""

from __future__ import annotations

from typing import Protocol, assert_never, cast, runtime_checkable

from kr_ray.config import BigGanConfig, DpMerfConfig, EdmConfig, GeneratorSection, SeveralConfig
from kr_ray.generators.biggan.member import BigGan
from kr_ray.generators.dp_merf.member import DpMerf
from kr_ray.generators.edm.member import Edm
from kr_ray.generators.interface import Generator
from kr_ray.generators.several import Several

BuiltIn = BigGanConfig | EdmConfig | DpMerfConfig | SeveralConfig
"""The union of the project's own sections: one that has no line in `generator_of` is a type error."""


@runtime_checkable
class PluginSection(Protocol):
    """A section from outside the package says itself what does the work."""

    def member(self) -> Generator: ...


def generator_of(section: GeneratorSection) -> Generator:
    """The generator that a section describes."""
    if isinstance(section, PluginSection):
        return section.member()
    built_in = cast("BuiltIn", section)
    match built_in:
        case BigGanConfig():
            return BigGan(built_in)
        case EdmConfig():
            return Edm(built_in)
        case DpMerfConfig():
            return DpMerf(built_in)
        case SeveralConfig():
            return Several(built_in, tuple(map(generator_of, built_in.members)))
        case _:
            assert_never(built_in)
