"""The audits: the paper's shadow attack, copies, the worst case."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Section


class ShadowAttackConfig(Section):
    """Shokri-style membership inference (section 3.6)."""

    shadow_models: int = Field(10, ge=2)
    epochs: int = Field(500, ge=1)
    attack_holdout: float = Field(0.2, gt=0, lt=0.9)
    """Share of the shadow models whose scores only select among the attack models."""
    max_svc_rows: int = Field(20000, ge=100)


class CopiesConfig(Section):
    """Whether generated images are copies of training images, and how well they cover the real ones."""

    images: int = Field(2000, ge=100)
    """Generated for the comparison, and at most so many test images as its yardstick."""
    quantile: float = Field(0.01, gt=0, lt=0.5)
    """A generated image is a near-copy if it is as near to a training image as the nearest such share of the test images is."""
    encoder: str = ""
    """TorchScript or ONNX file of the feature space; empty: the teacher's penultimate layer. A TorchScript file is a program that
    is run: give only files you trust."""
    encoder_size: int = Field(0, ge=0)
    """Images are resized to this side for the encoder; 0 = as they are."""
    encoder_normalisation: Literal["none", "imagenet"] = "none"


ArmName = Literal["teacher", "kr", "student_only"]


class AuditConfig(ShadowAttackConfig):
    """The paper's attack, and the worst-case audit: whole pipelines trained again with and without canaries.

    Protocol of Zhao & Zhang, "Does Training with Synthetic Data Truly Protect Privacy?" (ICLR 2025): 500 canaries, 32 models.
    """

    arms: tuple[ArmName, ...] = ()
    """What is trained again in every one of `models` runs: `teacher` (real data, no defence), `kr` (teacher, generator and
    student), `student_only` (a student of this run's own generator). Empty: no worst-case audit, which costs many trainings."""
    models: int = Field(32, ge=4)
    """Runs; even, because every audit sample is a member in exactly half of them. More of them extend an audit already made."""
    canary_kind: Literal["mislabeled", "outlier", "random"] = "mislabeled"
    canaries: int = Field(0, ge=0)
    """0 = 500, or as many as `max_canary_share` allows if those are fewer."""
    population: int = Field(0, ge=0)
    """Correctly labelled audit samples, for the average beside the worst case; 0 = as for `canaries`."""
    max_canary_share: float = Field(0.1, gt=0, le=0.25)
    """Most of the training split that may be canaries, and again that may be population samples. Half of them are missing in a
    run: more would make its models differ from the ones they stand for."""
    reference: int = Field(1000, ge=10)
    """At most this many test images, trained on by no model, against which scores are calibrated."""
    queries: int = Field(18, ge=1, le=18)
    """Images a model is asked for each audit sample: itself, its mirror image and shifts, as far as training augments so."""
    keep_models: bool = False
    """Keep the models of all runs; else only their logits stay."""
    copies: CopiesConfig = CopiesConfig()

    @model_validator(mode="after")
    def _runs_come_in_pairs(self) -> AuditConfig:
        if self.models % 2:
            raise ValueError(
                f"`models` must be even, but got models={self.models}; use {self.models + 1}: every sample is in half of them"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"`arms` must be different, but got {list(self.arms)}; name each once")
        return self

    def worst_case_keys(self) -> dict[str, Any]:
        """What decides the worst-case audit's figures, as JSON."""
        return self.model_dump(mode="json", exclude={*ShadowAttackConfig.model_fields, "keep_models", "copies"})

    def shadow_attack(self) -> ShadowAttackConfig:
        """The keys of the paper's attack alone."""
        return ShadowAttackConfig(**self.model_dump(include=set(ShadowAttackConfig.model_fields)))
