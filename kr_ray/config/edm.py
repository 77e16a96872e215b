"""The generator `edm`: a class-conditional diffusion model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Raw
from kr_ray.config.generators import GeneratorSection, SamplingSection

PRESETS: dict[str, Raw] = {
    # Parameters at 10 classes: 0.50 M, 1.98 M, 12.5 M, 12.5 M.
    "edm16": {"unshuffle": 2, "channels": (32, 64), "blocks": 1, "embedding": 128},
    "edm32": {"unshuffle": 2, "channels": (64, 128), "blocks": 1, "embedding": 256},
    "edm32-large": {"unshuffle": 2, "channels": (128, 256), "blocks": 2, "embedding": 512},
    "edm64": {"unshuffle": 4, "channels": (128, 256), "blocks": 2, "embedding": 512},
}  # fmt: skip
POOL_SCALE = 3
"""Drawing 16-px images takes 12 times as long as with a GAN of as many CPU seconds of training. A pool of 2
to 3 times the real images was enough for every student measured."""


class EdmSampling(SamplingSection):
    """How images are drawn; tuning may vary these. A latent std has no twin here: scaling the initial noise
    by 1.15 alone doubles the distance to the real images."""

    steps: int = Field(6, ge=2, le=1000)
    """Noise levels. `dpmpp_2m` and `euler` ask the network once at each, `heun` twice at all but the last."""
    solver: Literal["dpmpp_2m", "heun", "euler"] = "dpmpp_2m"
    """DPM-Solver++(2M) (Lu et al. 2022), or the second-order or first-order scheme of EDM's Algorithm 1."""
    sigma_max: float = Field(20.0, gt=0)
    """Noise of the start. EDM has 80; with few steps 20 keeps the images' spread nearer to the real one, and
    10 is too little."""
    sigma_min: float = Field(0.01, gt=0)
    """Noise of the last step; from there the network's answer is the image. EDM has 0.002."""
    rho: float = Field(7.0, ge=1)
    """Larger: more of the steps at small noise (EDM, equation 5)."""
    churn: float = Field(0.0, ge=0)
    """Fresh noise along the way: EDM's S_churn (Algorithm 2), spread over the steps; 0 = deterministic."""
    guidance: float = Field(1.0, ge=0, le=20)
    """Classifier-free guidance (Ho and Salimans 2022): 1 = none, 0 = no class; others double the cost. More
    narrows each class."""
    precision: Literal["mixed", "full"] = "mixed"
    """`mixed`: the network in half precision where that is fast; preconditioning and steps always in full."""

    @property
    def evaluations(self) -> int:
        """How often the network is asked for each image, which is what drawing it costs."""
        calls = 2 * self.steps - 1 if self.solver == "heun" else self.steps
        return calls * (1 if self.guidance in (0, 1) else 2)

    @model_validator(mode="after")
    def _levels_fall(self) -> EdmSampling:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                "`sigma_min < sigma_max` must hold, but got "
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; use 0.01 and 20"
            )
        return self


class EdmConfig(GeneratorSection):
    """Diffusion model; `preset` fills the keys of the network's size. Own keys win."""

    kind: Literal["edm"] = "edm"
    """Of generator; tells this section from the others'."""
    preset: Literal["edm16", "edm32", "edm32-large", "edm64"] = "edm16"
    """The network's size: 0.50, 1.98, 12.5 and 12.5 million parameters, for 16, 32, 32 and 64 px."""
    unshuffle: int = Field(ge=1)
    """Blocks of so many times so many pixels become channels before the first convolution: 2 makes it 3.6
    times as fast at 16 px."""
    channels: tuple[int, ...] = Field(min_length=1, strict=False)
    """Of each level, multiples of 8; each level has half the side of the one before."""
    blocks: int = Field(ge=1)
    """Residual blocks of a level on the way down, and as many on the way up."""
    embedding: int = Field(ge=8)
    """Width of the embedding of noise level and class."""
    batch_size: int = Field(32, ge=2)
    """Small, for a few passes over a few thousand images: at equal work 32 was better than 64, and a rate of
    2e-3 than 1e-3."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of Adam (0.9, 0.99), after the warm-up."""
    warmup_steps: int = Field(100, ge=0)
    """Gradient steps of linear warm-up."""
    clip_norm: float = Field(1.0, gt=0)
    """Global norm that gradients are clipped to."""
    null_share: float = Field(0.1, ge=0, lt=1)
    """Share of the training images that are shown without their class, which is what guidance needs."""
    noise_mean: float = -1.2
    """Mean of ln sigma in training (EDM's P_mean)."""
    noise_std: float = Field(1.2, gt=0)
    """Std of ln sigma in training (EDM's P_std)."""
    horizontal_flip: bool = False
    """Mirror real images at random."""
    precision: Literal["mixed", "full"] = "mixed"
    """`mixed`: the network in half precision where that is fast; preconditioning and loss always in full."""
    ema_half_life_images: float = Field(500_000.0, gt=0)
    """Half-life of the averaged weights (EDM, Table 7: 0.5 M images)."""
    ema_rampup: float = Field(0.1, gt=0, le=1)
    """The half-life never exceeds this share of the images seen so far."""
    epochs: int = Field(24, ge=1)
    """Passes over the real training images."""
    checkpoint_every: int = Field(4, ge=1)
    """Epochs between two checkpoints. Few are enough: quality rises with training."""

    @classmethod
    def sampling(cls) -> type[EdmSampling]:
        return EdmSampling

    def space(self) -> dict[str, tuple[float, float]]:
        """Not how images are drawn, so that all trials share one pool."""
        return super().space()

    def synthesis_defaults(self) -> dict[str, int]:
        return {"pool_scale": POOL_SCALE}

    def fits(self, image_size: int, sampling: SamplingSection | None = None) -> list[str]:
        wrong = []
        if image_size % self.side_multiple:
            wrong.append(
                f"`data.image_size` must be a multiple of {self.side_multiple} for "
                f"generator.unshuffle={self.unshuffle} and {len(self.channels)} levels, but got "
                f"{image_size}; choose another size or preset"
            )
        if isinstance(sampling, EdmSampling) and (mistake := self.guidance_mistake(sampling)):
            wrong.append(mistake)
        return wrong

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, raw: Any) -> Any:
        """Left to validation: what is not a mapping, and unknown presets."""
        if not isinstance(raw, dict):
            return raw
        return PRESETS.get(str(raw.get("preset", "edm16")), PRESETS["edm16"]) | raw

    @model_validator(mode="after")
    def _channels_fit(self) -> EdmConfig:
        if any(width < 8 or width % 8 for width in self.channels):
            raise ValueError(
                "`channels` must be positive multiples of 8, but got "
                f"channels={list(self.channels)}; round them up"
            )
        return self

    def guidance_mistake(self, sampling: EdmSampling) -> str:
        """What is wrong with drawing as `sampling` says from a network of this training; empty: nothing."""
        if self.null_share > 0 or sampling.guidance == 1:
            return ""
        return (
            "`null_share > 0` must hold for guidance, but got "
            f"null_share={self.null_share}, guidance={sampling.guidance}; set guidance: 1, "
            "or train anew with null_share: 0.1"
        )

    @property
    def side_multiple(self) -> int:
        """The images' side must be a multiple of this: 4 (8 for `edm64`)."""
        return int(self.unshuffle * 2 ** (len(self.channels) - 1))
