"""The networks and the recipe by which they are trained (section 3.1, Table 4)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kr_ray.config.base import Section

NetworkName = Literal["resnet14"]


class ClassifierConfig(Section):
    """The network and the training recipe of Table 4. Teacher, students
    and shadow models share both (section 3.1)."""

    added: ClassVar[frozenset[str]] = frozenset({"network", "norm"})

    network: NetworkName = "resnet14"
    """`resnet14`: 6n + 2 layers with n = 2, widths 64/128/256."""
    width: int = Field(64, ge=4)
    """Channels of the first stage."""
    norm: Literal["batch", "group"] = "batch"
    """`group` looks at one image alone, as training with differential privacy demands."""
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(0.5, gt=0)
    warmup_epochs: int = Field(10, ge=0)
    warmup_learning_rate: float = Field(1e-5, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    clip: Literal["global", "per_parameter"] = "global"
    """The paper says `clipnorm`: Keras clips each variable by itself, most frameworks the global norm."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Applies to hard labels only."""
    trivial_augment: bool = True
    mixup_alpha: float = Field(0.2, ge=0)
    horizontal_flip: bool = True
    crop_padding: int = Field(2, ge=0)
    precision: Literal["mixed", "full"] = "mixed"
    min_steps: int = Field(1000, ge=0)
    """Budgets of fewer gradient steps than this use a smaller batch
    (and rate); 0 = the paper's recipe unchanged."""
