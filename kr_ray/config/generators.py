"""The generators, a section for each kind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Section


class CollapseConfig(Section):
    """Alarm on one small generated set per checkpoint: what the teacher thinks of it and how varied it is."""

    images: int = Field(256, ge=16)
    min_agreement: float = Field(0.0, ge=0, le=1)
    """Alarm when (agreement - chance) / (1 - chance) is at or below this: 0 = no better than chance, 1 = never good enough."""
    min_diversity: float = Field(0.1, ge=0)
    """Alarm when the within-class spread of teacher features is below this share of the real images' spread."""
    action: Literal["record", "stop"] = "record"
    patience: int = Field(3, ge=1)
    """`stop` ends the training after this many alarmed checkpoints in a row."""


class GeneratorConfig(Section):
    """BigGAN-Deep; `preset` fills the training keys (Table 3), `architecture` the channel tables. Own keys win."""

    preset: Literal["ours", "vanilla"] = "ours"
    architecture: Literal["studiogan32", "kr41m", "small32", "small16", "tiny16"] = "studiogan32"
    latent_dim: int = Field(128, ge=2)
    shared_dim: int = Field(128, ge=2)
    channels: int = Field(ge=4)
    """The unit of the four channel tables."""
    g_in: tuple[int, ...]
    g_out: tuple[int, ...]
    d_in: tuple[int, ...]
    """Input multiples of D's stages; a leading 1 is the stem's width."""
    d_out: tuple[int, ...]
    depth: int = Field(2, ge=1)
    bottleneck_ratio: int = Field(ge=1)
    attention_resolution: int = Field(16, ge=0)
    """Self-attention where the feature map has this side; 0 = none."""
    loss: Literal["logistic", "hinge"]
    output: Literal["sigmoid", "tanh"]
    precision: Literal["mixed", "full"]
    d_optimizer: Literal["adamw", "adam"]
    d_weight_decay: float = Field(ge=0)
    d_label_smoothing: float = Field(ge=0, lt=0.5)
    d_steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate_g: float = Field(2e-4, gt=0)
    learning_rate_d: float = Field(2e-4, gt=0)
    beta1: float = Field(0.5, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    horizontal_flip: bool = False
    """Mirror real images at random before D sees them."""
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    """Per G step at the paper's batch; converted to a half-life in images (see kr_ray.generators.ema)."""
    ema_rampup: float = Field(0.05, gt=0, le=1)
    """The half-life never exceeds this share of the images seen so far."""
    epochs: int = Field(500, ge=1)
    """One epoch is one pass of D over the real training images; every D step takes a fresh batch."""
    checkpoint_every: int = Field(5, ge=1)
    collapse: CollapseConfig = CollapseConfig()

    @model_validator(mode="after")
    def _tables_fit(self) -> GeneratorConfig:
        if not len(self.g_in) == len(self.g_out) >= 1:
            raise ValueError(
                f"`len(g_in) == len(g_out) >= 1` must hold, but got g_in={self.g_in}, g_out={self.g_out}; "
                "give one entry per doubling of the image"
            )
        if not len(self.d_in) == len(self.d_out) >= len(self.g_in):
            raise ValueError(
                f"`len(d_in) == len(d_out) >= len(g_in)` must hold, but got d_in={self.d_in}, d_out={self.d_out}; "
                "give one entry per D stage"
            )
        for letter, inputs, outputs in (("g", self.g_in, self.g_out), ("d", self.d_in, self.d_out)):
            if inputs[1:] != outputs[:-1]:
                raise ValueError(
                    f"`{letter}_in[k + 1] == {letter}_out[k]` must hold, but got {letter}_in={inputs}, {letter}_out={outputs}; "
                    "each stage reads what the one before gives"
                )
        if len(self.d_in) > len(self.g_in) + 2:
            raise ValueError(
                f"`len(d_in) <= len(g_in) + 2` must hold, but got d_in={self.d_in}, g_in={self.g_in}; D halves the image once per "
                "stage: remove stages"
            )
        if min(self.g_in + self.g_out + self.d_in + self.d_out) < 1:
            raise ValueError("channel tables must hold positive multiples of `channels`; remove the zero or negative ones")
        return self

    @property
    def image_size(self) -> int:
        """Side of the generated images: 4 px doubled once per G stage."""
        return 4 * 2 ** len(self.g_in)
