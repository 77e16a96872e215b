"""Who labels a generated image, and which images are kept: the four strategies that appendix D compares.

| strategy     | label                               | kept                                       | anew |
|--------------|-------------------------------------|--------------------------------------------|------|
| `hard`       | the class it was made for           | all                                        | no   |
| `filter`     | the class it was made for           | where the teacher agrees (Dat et al. 2019) | no   |
| `gap_filler` | the class it was made for           | teacher agrees with enough confidence      | yes  |
|              |                                     | (Lampis et al. 2023)                       |      |
| `gkd`        | the teacher's softmax (section 3.4) | all                                        | yes  |

GKD asks the teacher about the clean generated image (the paper's way), or about exactly what the student sees
("function matching", Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent",
section 3.1): a crop or a mixture may show something else than the image it was made of, and then no label of
that image fits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar, assert_never

import torch
from torch import Tensor, nn

from kr_ray.classifiers.predict import softened
from kr_ray.classifiers.sets import smoothed_one_hot
from kr_ray.classifiers.training import Labeller
from kr_ray.compute.graphs import Captured
from kr_ray.config import SynthesisConfig
from kr_ray.config.methods import Labelling


class Strategy(ABC):
    """One of the four.

    Attributes:
        anew: whether the set is another one at every regeneration.
        filters: whether images are rejected, and others drawn in their places.
    """

    anew: ClassVar[bool]
    filters: ClassVar[bool]

    @abstractmethod
    def label(
        self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Label one block.

        Args:
            classes: int64 [N], the classes the images were generated for.
            probabilities: float32 [N, K], the teacher's.
            label_smoothing: for the hard labels; soft labels are left as they are.

        Returns:
            keep: bool [N]; targets: float32 [N, K].
        """


class Hard(Strategy):
    """Images keep the class they were made for; those that are rejected have one too."""

    anew, filters = False, False

    def label(
        self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        keep = self.keep(classes, probabilities, config)
        return keep, smoothed_one_hot(classes, probabilities.shape[1], label_smoothing)

    def keep(self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig) -> Tensor:
        """Bool [N]; arguments as those of `label`."""
        return torch.ones_like(classes, dtype=torch.bool)


class Filter(Hard):
    """Where the teacher agrees."""

    filters = True

    def keep(self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig) -> Tensor:
        return probabilities.argmax(1) == classes


class GapFiller(Filter):
    """Where it agrees with enough confidence."""

    anew = True

    def keep(self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig) -> Tensor:
        confidence = probabilities.gather(1, classes[:, None])[:, 0]
        return super().keep(classes, probabilities, config) & (confidence >= config.confidence_threshold)


class Gkd(Strategy):
    """The teacher's answers are the labels."""

    anew, filters = True, False

    def label(
        self, classes: Tensor, probabilities: Tensor, config: SynthesisConfig, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ones_like(classes, dtype=torch.bool), probabilities


def strategy_of(name: Labelling) -> Strategy:
    """The strategy called so; one that has no line here is a type error."""
    match name:
        case "gkd":
            return Gkd()
        case "gap_filler":
            return GapFiller()
        case "filter":
            return Filter()
        case "hard":
            return Hard()
        case _:
            assert_never(name)


def seen_labeller(teacher: nn.Module, temperature: float, device: torch.device) -> Labeller:
    """Asks `teacher`, frozen and in evaluation mode on `device`,
    about the input of a student's gradient step.

    Its answers depend on each image alone, so a worker asks about its slice of the batch only.
    """
    return Captured(partial(_seen_probabilities, teacher, temperature), device)


@torch.no_grad()  # not inference_mode: the student's loss keeps the answers for its backward pass
def _seen_probabilities(teacher: nn.Module, temperature: float, inputs: Tensor) -> Tensor:
    return softened(teacher, inputs, temperature)
