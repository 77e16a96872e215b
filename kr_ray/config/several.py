"""The generator `several`: members of any kinds, each trained by itself, whose images are mixed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from kr_ray.config.base import Stamp
from kr_ray.config.generators import GeneratorSection, SamplingSection

MOST_MEMBERS = 32
LEAST_SHARE = 0.01
"""That tuning tries: with 0 of all members there would be no image."""
SHARE = re.compile(r"share_(\d+)")


class SeveralSampling(SamplingSection):
    """What part of the images each member draws, and how. Tuning varies `share_0`, `share_1`, ..., the
    entries of `shares`."""

    shares: tuple[float, ...] = Field(max_length=MOST_MEMBERS)
    """Of the members, in their order and relative to each other; by default equal."""
    members: tuple[SerializeAsAny[SamplingSection], ...] = Field(max_length=MOST_MEMBERS)
    """How each member draws, by the keys of its kind; by default as its kind does."""

    @model_validator(mode="after")
    def _shares_of_something(self) -> SeveralSampling:
        if len(self.shares) != len(self.members) or min(self.shares, default=0.0) < 0 or not sum(self.shares):
            raise ValueError(
                f"`shares` must be a number >= 0 for each of the {len(self.members)} members, not all of "
                f"them 0, but got shares={list(self.shares)}; equal ones: leave the key out"
            )
        return self

    def calibration_batches(self) -> int:
        return sum(member.calibration_batches() for member in self.members)

    def stamp(self) -> Stamp:
        return {"shares": list(self.shares), "members": [member.stamp() for member in self.members]}

    def searchable(self) -> dict[str, type]:
        return {f"share_{k}": float for k in range(len(self.shares))}

    def value(self, name: str) -> float:
        return self.shares[int(name.removeprefix("share_"))]

    def with_values(self, values: Mapping[str, Any]) -> SeveralSampling:
        own, shares = dict(values), list(self.shares)
        for name in list(own):
            found = SHARE.fullmatch(name)
            if found and int(found[1]) < len(shares):
                shares[int(found[1])] = float(own.pop(name))
        keys = {"shares": tuple(shares), "members": self.members}
        return SeveralSampling.model_validate(keys | own)

    def parts(self) -> list[tuple[float, SamplingSection]]:
        return [(share, self.only(k)) for k, share in enumerate(self.shares) if share]

    def only(self, member: int) -> SeveralSampling:
        """Drawing from one member alone."""
        shares = tuple(float(k == member) for k in range(len(self.shares)))
        return SeveralSampling(shares=shares, members=self.members)


class SeveralConfig(GeneratorSection):
    """Generators side by side. After `epochs` of its own epochs every member is trained to its own end; a
    checkpoint holds all of them as far as they have come by then. Equal members differ in their seeds."""

    kind: Literal["several"] = "several"
    """Of generator; tells this section from the others'."""
    members: tuple[SerializeAsAny[GeneratorSection], ...] = Field(min_length=1, max_length=MOST_MEMBERS)
    """Sections of generators, each with its `kind`, its own keys and its own `epochs`."""
    batch_size: int = Field(64, ge=2)
    """The members' largest, and not to be set."""
    epochs: int = Field(500, ge=1)
    """By default the longest member's. A member of E epochs trains E / `epochs` of its epochs in each."""
    checkpoint_every: int = Field(5, ge=1)
    """By default the longest member's."""

    @model_validator(mode="after")
    def _batch_is_the_members(self) -> SeveralConfig:
        largest = max(member.batch_size for member in self.members)
        if self.batch_size != largest:
            raise ValueError(
                f"`batch_size` must be the members' largest, {largest}, but got {self.batch_size}; "
                "set it in the members, and leave it out here"
            )
        return self

    @staticmethod
    def derived(members: tuple[GeneratorSection, ...]) -> dict[str, int]:
        """The keys that follow from the members unless they are set."""
        longest = max(members, key=lambda member: member.epochs)
        return {
            "epochs": longest.epochs,
            "checkpoint_every": min(longest.checkpoint_every, longest.epochs),
            "batch_size": max(member.batch_size for member in members),
        }

    def stamp(self) -> Stamp:
        return super().stamp() | {"members": [member.stamp() for member in self.members]}

    @classmethod
    def sampling(cls) -> type[SamplingSection]:
        return SeveralSampling

    def default_sampling(self) -> SeveralSampling:
        own = tuple(member.default_sampling() for member in self.members)
        return SeveralSampling(shares=(1.0,) * len(own), members=own)

    def space(self) -> dict[str, tuple[float, float]]:
        """The shares, and what all kinds have, as far as every member bears it."""
        shares = {f"share_{k}": (LEAST_SHARE, 1.0) for k in range(len(self.members))}
        spaces = [member.space() for member in self.members]
        common = {
            key: (max(space[key][0] for space in spaces), min(space[key][1] for space in spaces))
            for key in super().space()
            if all(key in space for space in spaces)
        }
        return shares | common

    def synthesis_defaults(self) -> dict[str, int]:
        """Pools if any member wants them: then of every member, so that any shares can be dealt from them."""
        found: dict[str, int] = {}
        for member in self.members:
            own = member.synthesis_defaults()
            found |= {key: max(value, found.get(key, 0)) for key, value in own.items()}
        return found

    def fits(self, image_size: int, sampling: SamplingSection | None = None) -> list[str]:
        ways: tuple[SamplingSection | None, ...] = (None,) * len(self.members)
        if isinstance(sampling, SeveralSampling):
            if len(sampling.members) != len(self.members):
                return [
                    "`synthesis.sampling` must have an entry for each of the "
                    f"{len(self.members)} members, but got {len(sampling.members)}; add or remove entries"
                ]
            ways = sampling.members
        return [
            f"member {k}: {text}"
            for k, (member, way) in enumerate(zip(self.members, ways, strict=True))
            for text in member.fits(image_size, way)
        ]

    def trained_to(self, member: int, epoch: int) -> int:
        """Epochs of a member that are done after `epoch` own ones: at least 1, at the end all."""
        return math.ceil(epoch * self.members[member].epochs / self.epochs)

    def up_to(self, epoch: int) -> SeveralConfig:
        """The same, ending with the checkpoint of `epoch`."""
        members = tuple(
            member.model_copy(update=dict.fromkeys(("epochs", "checkpoint_every"), self.trained_to(k, epoch)))
            for k, member in enumerate(self.members)
        )
        return self.model_copy(update={"epochs": epoch, "checkpoint_every": epoch, "members": members})

    def measured(self, batch: int) -> SeveralConfig:
        """Every member so that it is trained as often beside the others as it will be."""
        whole = super().measured(batch)
        members = tuple(
            member.measured(batch).model_copy(
                update={"epochs": max(1, whole.epochs * member.epochs // self.epochs)}
            )
            for member in self.members
        )
        return whole.model_copy(update={"members": members})
