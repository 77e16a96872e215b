"""The networks and the recipe by which they are trained (section 3.1, Table 4)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kr_ray.config.base import Section

NetworkName = Literal["resnet14", "convnet3"]


class ClassifierConfig(Section):
    """The network and the training recipe of Table 4. Teacher, students
    and shadow models share both (section 3.1)."""

    added: ClassVar[frozenset[str]] = frozenset({"network", "norm"})

    network: NetworkName = "resnet14"
    """`resnet14`: 6n + 2 layers with n = 2, widths 64/128/256. `convnet3`: three convolutions with instance
    norm, the network of data set distillation (Zhao et al. 2021); published at `width: 128`."""
    width: int = Field(64, ge=4)
    """Channels of the first stage (`convnet3`: of every layer)."""
    norm: Literal["batch", "group"] = "batch"
    """Of `resnet14`. `group` looks at one image alone, as training with differential privacy demands (and as
    `convnet3` does anyway)."""
    batch_size: int = Field(256, ge=2)
    """Images of one gradient step."""
    learning_rate: float = Field(0.5, gt=0)
    """Highest rate, after the warm-up; a cosine lets it fall to 0."""
    warmup_epochs: int = Field(10, ge=0)
    """Passes in which the rate rises linearly, at most a tenth of the steps."""
    warmup_learning_rate: float = Field(1e-5, gt=0)
    """Rate of the first step."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD (Nesterov's)."""
    weight_decay: float = Field(5e-4, ge=0)
    """L2, on all weights."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of a gradient (see `clip`)."""
    clip: Literal["global", "per_parameter"] = "global"
    """The paper says `clipnorm`: Keras clips each variable by itself, most frameworks the global norm."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Applies to hard labels only."""
    trivial_augment: bool = True
    """TrivialAugment (Mueller and Hutter 2021): one random operation on each image."""
    mixup_alpha: float = Field(0.2, ge=0)
    """Of the Beta distribution that MixUp draws from; 0 = no MixUp."""
    horizontal_flip: bool = True
    """Mirror images at random; not where left and right mean something."""
    crop_padding: int = Field(2, ge=0)
    """Pixels by which a random crop may be shifted; 0 = none."""
    precision: Literal["mixed", "full"] = "mixed"
    """`mixed`: half precision where the device is fast in it."""
    min_steps: int = Field(1000, ge=0)
    """Budgets of fewer gradient steps than this use a smaller batch
    (and rate); 0 = the paper's recipe unchanged."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether its networks keep statistics of the images that they were trained on."""
        return self.network == "resnet14" and self.norm == "batch"
