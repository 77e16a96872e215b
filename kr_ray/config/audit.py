"""The audits, a section for each: the paper's shadow attack, the worst case, copies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Location, Section, Stamp


class ShadowConfig(Section):
    """Shokri-style membership inference (section 3.6)."""

    models: int = Field(10, ge=2)
    """Shadow models."""
    epochs: int = Field(500, ge=1)
    """Of each shadow model, in passes over its half of the validation images."""
    attack_holdout: float = Field(0.2, gt=0, lt=0.9)
    """Share of the shadow models whose scores only select among the attack models."""
    max_svc_rows: int = Field(20000, ge=100)
    """Support vector machines are fitted on at most so many rows."""

    def stamp(self) -> Stamp:
        """Under the key's first name."""
        stamp = super().stamp()
        return stamp | {"shadow_models": stamp.pop("models")}


class CopiesConfig(Section):
    """Whether generated images are copies of training images, and how well they cover the real ones."""

    images: int = Field(2000, ge=100)
    """Generated for the comparison, and at most so many test images as its yardstick."""
    quantile: float = Field(0.01, gt=0, lt=0.5)
    """A generated image is a near-copy if it is as near to a training image as
    the nearest such share of the test images is."""
    encoder: Location = ""
    """TorchScript or ONNX file of the feature space; empty: the teacher's penultimate layer. A TorchScript
    file is a program that is run: give only files you trust."""
    encoder_size: int = Field(0, ge=0)
    """Images are resized to this side for the encoder; 0 = as they are."""
    encoder_normalisation: Literal["none", "imagenet"] = "none"
    """Of the encoder's input: pixels in [0, 1] as they are, or by ImageNet's mean and deviation."""


class WorstCaseConfig(Section):
    """Whole pipelines trained again with and without canaries, and attacked.

    Protocol of Zhao & Zhang, "Does Training with Synthetic Data Truly Protect
    Privacy?" (ICLR 2025): 500 canaries, 32 models.
    """

    arms: tuple[str, ...] = ()
    """What is trained again in every one of `models` runs: `teacher` (real data, no defence), `kr` (teacher,
    generator and student), `fixed_generator` (a student of this run's own generator), or a name from
    `students`. Empty: no worst-case audit, which costs many trainings."""
    models: int = Field(32, ge=4)
    """Runs; even, because every audit sample is a member in exactly half of
    them. More of them extend an audit already made."""
    canary_kind: Literal["mislabeled", "outlier", "random"] = "mislabeled"
    """`mislabeled`: with a wrong label (the paper); `outlier`: those that models not trained on them find
    hardest; `random`: any."""
    canaries: int = Field(0, ge=0)
    """0 = 500, or as many as `max_canary_share` allows if those are fewer."""
    population: int = Field(0, ge=0)
    """Correctly labelled audit samples, for the average beside the worst case; 0 = as for `canaries`."""
    max_canary_share: float = Field(0.1, gt=0, le=0.25)
    """Most of the training split that may be canaries, and again that may be population samples. Half of them
    are missing in a run: more would make its models differ from the ones they stand for."""
    reference: int = Field(1000, ge=10)
    """At most this many test images, trained on by no model, against which scores are calibrated."""
    queries: int = Field(18, ge=1, le=18)
    """Images a model is asked for each audit sample: itself, its mirror
    image and shifts, as far as training augments so."""
    keep_models: bool = False
    """Keep the models of all runs; else only their logits stay."""

    @model_validator(mode="after")
    def _runs_come_in_pairs(self) -> WorstCaseConfig:
        if self.models % 2:
            raise ValueError(
                f"`models` must be even, but got models={self.models}; use "
                f"{self.models + 1}: every sample is in half of them"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"`arms` must be different, but got {list(self.arms)}; name each once")
        return self

    def stamp(self) -> Stamp:
        """What decides the figures."""
        return {key: value for key, value in super().stamp().items() if key != "keep_models"}


class AuditConfig(Section):
    """How much of the real data still leaks."""

    shadow: ShadowConfig = ShadowConfig()
    copies: CopiesConfig = CopiesConfig()
    worst_case: WorstCaseConfig = WorstCaseConfig()
