"""The generators, a section for each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from kr_ray.config.base import Raw, Section

TRAINING_PRESETS: dict[str, Raw] = {
    # Table 3, column by column; "D basket size" is how many batches
    # StudioGAN's loader preloads and changes no result.
    "ours": {
        "loss": "logistic", "output": "sigmoid", "precision": "mixed", "d_optimizer": "adamw",
        "d_weight_decay": 0.004, "d_label_smoothing": 0.1, "d_steps": 4,
    },
    "vanilla": {
        "loss": "hinge", "output": "tanh", "precision": "full", "d_optimizer": "adam",
        "d_weight_decay": 0.0, "d_label_smoothing": 0.0, "d_steps": 2,
    },
}  # fmt: skip

ARCHITECTURES: dict[str, Raw] = {
    # 9.34M / 3.18M parameters at 10 classes: the public 32-px table at 128 channels.
    "studiogan32": {"channels": 128, "g_in": [4, 4, 4], "g_out": [4, 4, 4], "d_in": [1, 4, 4],
                    "d_out": [4, 4, 4],
                    "bottleneck_ratio": 4},
    # 41.01M / 39.13M: the sizes printed in Table 3.
    "kr41m": {"channels": 128, "g_in": [8, 8, 4], "g_out": [8, 4, 4], "d_in": [1, 4, 8, 8],
              "d_out": [4, 8, 8, 8],
              "bottleneck_ratio": 2},
    # For CPUs: same blocks, fewer channels.
    "small32": {"channels": 32, "g_in": [4, 4, 4], "g_out": [4, 4, 2], "d_in": [1, 2, 4, 4],
                "d_out": [2, 4, 4, 4],
                "bottleneck_ratio": 4, "attention_resolution": 0},
    "small16": {"channels": 32, "g_in": [4, 4], "g_out": [4, 2], "d_in": [1, 2, 4], "d_out": [2, 4, 4],
                "bottleneck_ratio": 4, "attention_resolution": 0},
    "tiny16": {"channels": 8, "g_in": [2, 2], "g_out": [2, 2], "d_in": [1, 2, 2], "d_out": [2, 2, 2],
               "bottleneck_ratio": 2, "attention_resolution": 0, "depth": 1, "latent_dim": 16,
               "shared_dim": 16},
}  # fmt: skip


class CollapseConfig(Section):
    """Alarm on one small generated set per checkpoint: what the teacher thinks of it and how varied it is."""

    images: int = Field(256, ge=16)
    """Generated at every checkpoint for the alarm."""
    min_agreement: float = Field(0.0, ge=0, le=1)
    """Alarm when (agreement - chance) / (1 - chance) is at or below this: 0 =
    no better than chance, 1 = never good enough."""
    min_diversity: float = Field(0.1, ge=0)
    """Alarm when the within-class spread of teacher features is
    below this share of the real images' spread."""
    action: Literal["record", "stop", "off"] = "record"
    """`record` only tells; `stop` ends the training; with `off` no teacher looks at checkpoints, as a private
    run demands."""
    patience: int = Field(3, ge=1)
    """`stop` ends the training after this many alarmed checkpoints in a row."""


class SamplingSection(Section):
    """How a kind of generator draws: base of the kinds' own sections (`synthesis.sampling`)."""

    def calibration_batches(self) -> int:
        """Batches that a sampler draws for itself before it is used."""
        return 0

    def searchable(self) -> dict[str, type]:
        """The numeric keys that tuning may vary, with int or float."""
        fields = type(self).model_fields
        return {
            name: cast("type", field.annotation)
            for name, field in fields.items()
            if field.annotation in (int, float)
        }

    def value(self, name: str) -> float:
        """Of a searchable key."""
        return float(getattr(self, name)) if self.searchable()[name] is float else int(getattr(self, name))

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """The same but for `values`, by key.

        Raises:
            pydantic.ValidationError: no such key, or a value out of its range.
        """
        return type(self).model_validate(self.model_dump() | dict(values))

    def parts(self) -> list[tuple[float, SamplingSection]]:
        """Ways of drawing whose images make up this one's, each with its share; a pool is drawn for each."""
        return [(1.0, self)]


class GeneratorSection(Section):
    """What every kind of generator has; a kind's own section adds its keys."""

    added: ClassVar[frozenset[str]] = frozenset({"kind"})
    releases_prior: ClassVar[bool] = False
    """Whether its checkpoints hold noisy class frequencies (`synthesis.class_prior: released`)."""

    kind: str
    """Which generator: `biggan_deep`, or one that a module named in `plugins` brings."""
    batch_size: int = Field(64, ge=2)
    """Real images of one gradient step."""
    epochs: int = Field(500, ge=1)
    """Passes over the real training images."""
    checkpoint_every: int = Field(5, ge=1)
    """Epochs between two checkpoints."""
    collapse: CollapseConfig = CollapseConfig()

    @classmethod
    def sampling(cls) -> type[SamplingSection]:
        """The class of `synthesis.sampling` that goes with this kind."""
        return SamplingSection

    def default_sampling(self) -> SamplingSection:
        """How it draws unless it is told."""
        return self.sampling()()

    def space(self) -> dict[str, tuple[float, float]]:
        """What tuning varies unless it is told."""
        return {"regeneration_rate": (1, 10), "cardinality_scale": (1, 10)}

    def synthesis_defaults(self) -> dict[str, int]:
        """Keys of `synthesis` that this kind has otherwise unless it is told."""
        return {}

    def fits(self, image_size: int, sampling: SamplingSection | None = None) -> list[str]:
        """What is wrong with images of this side, or with drawing as `sampling` says; nothing by default."""
        return []

    def images_trained(self, real: int) -> int:
        """Images that the training of so many real images looks at."""
        return self.epochs * real

    def measured(self, batch: int) -> Self:
        """The same with epochs that can be repeated for ever, to measure their speed at a batch size."""
        return self.model_copy(update={"batch_size": batch, "epochs": 10**6})

    @classmethod
    def expand(cls, raw: Raw) -> Raw:
        """The section as a person wrote it, with its presets filled in; keys the person wrote win."""
        return raw


class BigGanSampling(SamplingSection):
    """Latents and batch-norm statistics of BigGAN at sampling time."""

    latent_std: float = Field(1.0, gt=0)
    """Standard deviation of the Gaussian that latents are drawn from."""
    standing_batches: int = Field(16, ge=1)
    """Batches that re-estimate G's batch-norm statistics at each (checkpoint, latent std)."""

    def calibration_batches(self) -> int:
        return self.standing_batches


class BigGanConfig(GeneratorSection):
    """BigGAN-Deep; `preset` fills the training keys (Table 3),
    `architecture` the channel tables. Own keys win."""

    kind: Literal["biggan_deep"] = "biggan_deep"
    preset: Literal["ours", "vanilla"] = "ours"
    """Fills the training keys, a column of Table 3: `ours` is that of Knowledge Recycling."""
    architecture: Literal["studiogan32", "kr41m", "small32", "small16", "tiny16"] = "studiogan32"
    """Fills the channel tables: `studiogan32` has 9.34M / 3.18M parameters in G / D, `kr41m` 41.0M /
    39.1M (Table 3); the others are for CPUs, named by the side of their images."""
    latent_dim: int = Field(128, ge=2)
    """Numbers of a latent vector."""
    shared_dim: int = Field(128, ge=2)
    """Numbers of the class embedding that all stages of G share."""
    channels: int = Field(ge=4)
    """The unit of the four channel tables."""
    g_in: tuple[int, ...]
    """Input multiples of G's stages, one per doubling of the image."""
    g_out: tuple[int, ...]
    """Output multiples of the same stages."""
    d_in: tuple[int, ...]
    """Input multiples of D's stages; a leading 1 is the stem's width."""
    d_out: tuple[int, ...]
    """Output multiples of D's stages."""
    depth: int = Field(2, ge=1)
    """Residual blocks of a stage."""
    bottleneck_ratio: int = Field(ge=1)
    """Channels of a block over those of its inner convolutions."""
    attention_resolution: int = Field(16, ge=0)
    """Self-attention where the feature map has this side; 0 = none."""
    loss: Literal["logistic", "hinge"]
    """`logistic`: cross-entropy of real and generated; `hinge`: as in BigGAN."""
    output: Literal["sigmoid", "tanh"]
    """Last activation of G."""
    precision: Literal["mixed", "full"]
    """`mixed`: half precision where the device is fast in it."""
    d_optimizer: Literal["adamw", "adam"]
    """`adamw` decays weights apart from the gradients."""
    d_weight_decay: float = Field(ge=0)
    """Of D's optimizer."""
    d_label_smoothing: float = Field(ge=0, lt=0.5)
    """Real images count as 1 minus this (`logistic` only)."""
    d_steps: int = Field(ge=1)
    """Steps of D for each of G."""
    learning_rate_g: float = Field(2e-4, gt=0)
    """Of G's Adam."""
    learning_rate_d: float = Field(2e-4, gt=0)
    """Of D's optimizer."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Of both optimizers: mean of the gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Of both optimizers: mean of their squares."""
    horizontal_flip: bool = False
    """Mirror real images at random before D sees them."""
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    """Per G step at the paper's batch; converted to a half-life in images (see kr_ray.generators.ema)."""
    ema_rampup: float = Field(0.05, gt=0, le=1)
    """The half-life never exceeds this share of the images seen so far."""

    @model_validator(mode="after")
    def _tables_fit(self) -> BigGanConfig:
        if not len(self.g_in) == len(self.g_out) >= 1:
            raise ValueError(
                f"`len(g_in) == len(g_out) >= 1` must hold, but got g_in={self.g_in}, g_out={self.g_out}; "
                "give one entry per doubling of the image"
            )
        if not len(self.d_in) == len(self.d_out) >= len(self.g_in):
            raise ValueError(
                f"`len(d_in) == len(d_out) >= len(g_in)` must hold, but got d_in={self.d_in}, "
                f"d_out={self.d_out}; give one entry per D stage"
            )
        for letter, inputs, outputs in (("g", self.g_in, self.g_out), ("d", self.d_in, self.d_out)):
            if inputs[1:] != outputs[:-1]:
                raise ValueError(
                    f"`{letter}_in[k + 1] == {letter}_out[k]` must hold, but got {letter}_in={inputs}, "
                    f"{letter}_out={outputs}; each stage reads what the one before gives"
                )
        if len(self.d_in) > len(self.g_in) + 2:
            raise ValueError(
                f"`len(d_in) <= len(g_in) + 2` must hold, but got d_in={self.d_in}, g_in={self.g_in}; D "
                "halves the image once per stage: remove stages"
            )
        if min(self.g_in + self.g_out + self.d_in + self.d_out) < 1:
            raise ValueError(
                "channel tables must hold positive multiples of `channels`; remove the zero or negative ones"
            )
        return self

    @property
    def image_size(self) -> int:
        """Side of the generated images: 4 px doubled once per G stage."""
        return 4 * 2 ** len(self.g_in)

    @classmethod
    def sampling(cls) -> type[SamplingSection]:
        return BigGanSampling

    def space(self) -> dict[str, tuple[float, float]]:
        return {"latent_std": (1.0, 2.5)} | super().space()

    def fits(self, image_size: int, sampling: SamplingSection | None = None) -> list[str]:
        wrong = []
        if self.image_size != image_size:
            wrong.append(
                "`data.image_size == 4 * 2**len(generator.g_in)` must hold, but got "
                f"data.image_size={image_size}, generator.g_in={list(self.g_in)} ({self.image_size} px); "
                "choose the architecture for that size"
            )
        sides = _powers_of_two(8, self.image_size // 2)
        if self.attention_resolution and self.attention_resolution not in sides:
            wrong.append(
                f"`generator.attention_resolution` must be a feature-map side among {sides}, "
                f"but got {self.attention_resolution}; use 0 for none"
            )
        return wrong

    @classmethod
    def expand(cls, raw: Raw) -> Raw:
        preset = TRAINING_PRESETS.get(str(raw.get("preset", "ours")), TRAINING_PRESETS["ours"])
        architecture = ARCHITECTURES.get(
            str(raw.get("architecture", "studiogan32")), ARCHITECTURES["studiogan32"]
        )
        return preset | architecture | raw  # unknown preset names are left to validation


def _powers_of_two(low: int, high: int) -> list[int]:
    return [2**k for k in range(int(math.log2(low)), int(math.log2(max(high, 1))) + 1)]
