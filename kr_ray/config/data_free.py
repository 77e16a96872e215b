"""Configuration of data-free distillation. Imports neither torch nor ray."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Raw
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.methods import MainKey, MethodSection

OFF = {
    "bn_weight": 0.0,
    "onehot_weight": 0.0,
    "adversarial_weight": 0.0,
    "balance_weight": 0.0,
    "activation_weight": 0.0,
}
PRESETS: dict[str, Raw] = {
    "ae": OFF | {"bn_weight": 1.0, "synthesis_steps": 2, "kd_steps": 600},
    "fast": OFF
    | {
        "bn_weight": 10.0,
        "onehot_weight": 0.5,
        "adversarial_weight": 1.33,
        "synthesis_steps": 10,
        "kd_steps": 400,
    },
    "dafl": OFF
    | {
        "onehot_weight": 1.0,
        "balance_weight": 5.0,
        "activation_weight": 0.1,
        "onehot_labels": "answered",
        "synthesis_steps": 10,
        "kd_steps": 400,
    },
}
SIDE_MULTIPLE = 4
"""The generator's layers double the side twice."""


class DataFreeSection(MethodSection):
    """A student of images that are made to please the teacher: no real image is seen after the teacher.

    The loop of Fast-Datafree (Fang et al. 2022) without meta-learning: a generator and fresh latents are
    fitted to the teacher for a few steps, the best batch joins a memory, the student learns from the memory.
    `preset` fills the weights and steps; own keys win.
    """

    kind: Literal["data_free"] = "data_free"
    preset: Literal["fast", "ae", "dafl"] = "fast"
    """`fast`: all three losses of Fast-Datafree. `ae`: batch-norm statistics alone (Aerni et al. 2024).
    `dafl`: the losses of DAFL (Chen et al. 2019), which need no batch norm: for teachers of `norm: group`."""
    rounds: int = Field(240, ge=1)
    """Batches of images that are made."""
    warmup_rounds: int = Field(20, ge=0)
    """The first so many only fill the memory; the student learns, and its disagreement counts, after them."""
    synthesis_steps: int = Field(ge=1)
    """Of Adam, per round, on generator and latents."""
    synthesis_batch: int = Field(256, ge=2)
    """Images of a round."""
    kd_steps: int = Field(ge=1)
    """Gradient steps of the student per round, on the whole memory so far."""
    batch_size: int = Field(256, ge=2)
    """Images of a student's step."""
    latent_dim: int = Field(256, ge=1)
    """Numbers that an image is made of."""
    channels: tuple[int, int] = Field((64, 32), strict=False)
    """Of the generator's two levels."""
    generator_learning_rate: float = Field(5e-3, gt=0)
    """Of Adam, on the generator, which is kept from round to round."""
    latent_learning_rate: float = Field(1.5e-2, gt=0)
    """Of Adam, on a round's latents."""
    student_learning_rate: float = Field(0.1, gt=0)
    """At the first step; it falls to 0 along a cosine. Momentum, weight decay and clipping are the classifier
    recipe's, as are crop and mirroring."""
    temperature: float = Field(20.0, gt=0)
    """Of both softmaxes in the student's loss, KL times its square (Hinton et al. 2015)."""
    bn_weight: float = Field(ge=0)
    """Of the distance between the statistics that enter the teacher's batch norms and those stored there."""
    bn_momentum: float = Field(0.9, ge=0, lt=1)
    """How much of the earlier rounds' statistics counts, so that not every batch alone must look like the
    whole set."""
    onehot_weight: float = Field(ge=0)
    """Of the teacher's cross-entropy with the image's label."""
    onehot_labels: Literal["drawn", "answered"] = "drawn"
    """Labels drawn uniformly before the images, or the teacher's own answers (DAFL)."""
    adversarial_weight: float = Field(ge=0)
    """Of the student's divergence from the teacher where both answer alike, which is made large."""
    balance_weight: float = Field(ge=0)
    """Of the negative entropy of the batch's mean answer (DAFL's information entropy)."""
    activation_weight: float = Field(ge=0)
    """Of the teacher's mean absolute feature, which is made large (DAFL's activation loss)."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, raw: Any) -> Any:
        """Left to validation: what is not a mapping, and unknown presets."""
        if not isinstance(raw, dict):
            return raw
        return PRESETS.get(str(raw.get("preset", "fast")), PRESETS["fast"]) | raw

    @model_validator(mode="after")
    def _the_student_learns(self) -> DataFreeSection:
        if self.warmup_rounds >= self.rounds:
            raise ValueError(
                f"`warmup_rounds < rounds` must hold, for the student learns after the warm-up, but got "
                f"warmup_rounds={self.warmup_rounds}, rounds={self.rounds}; raise rounds"
            )
        if not any(getattr(self, name) for name in OFF):
            raise ValueError(
                f"at least one of {', '.join(f'`{name}`' for name in OFF)} must be > 0, but all are 0; "
                "remove them for the preset's"
            )
        if min(self.channels) < 1:
            raise ValueError(f"`channels >= 1` must hold, but got {list(self.channels)}; use [64, 32]")
        return self

    def main_key(self) -> MainKey:
        """More rounds make more images and more steps of the student."""
        low, high = self.warmup_rounds + 1.0, 10.0 * self.rounds
        return MainKey(name="rounds", low=low, high=high, rising=True, start=self.rounds, whole=True)

    def fits(self, classifier: ClassifierConfig | None, data: DataConfig | None) -> list[str]:
        wrong = []
        if classifier and not classifier.has_batch_norm and self.bn_weight > 0:
            wrong.append(
                "`bn_weight: 0` must hold for a teacher without batch norm, but got "
                f"bn_weight={self.bn_weight:g}, classifier.network={classifier.network}, "
                f"classifier.norm={classifier.norm}; use preset: dafl"
            )
        if data and data.image_size % SIDE_MULTIPLE:
            wrong.append(
                f"`data.image_size` must be a multiple of {SIDE_MULTIPLE} for data_free, but got "
                f"{data.image_size}; use {SIDE_MULTIPLE * round(data.image_size / SIDE_MULTIPLE)}"
            )
        return wrong
