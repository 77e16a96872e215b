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

from functools import partial

import torch
from torch import Tensor, nn

from kr_ray.classifiers.predict import softened
from kr_ray.classifiers.sets import smoothed_one_hot
from kr_ray.classifiers.training import Labeller
from kr_ray.compute.graphs import Captured
from kr_ray.config import SynthesisConfig

REGENERATED = ("gkd", "gap_filler")
FILTERED = ("filter", "gap_filler")


def seen_labeller(teacher: nn.Module, temperature: float, device: torch.device) -> Labeller:
    """Asks `teacher`, frozen and in evaluation mode on `device`,
    about the input of a student's gradient step.

    Its answers depend on each image alone, so a worker asks about its slice of the batch only.
    """
    return Captured(partial(_seen_probabilities, teacher, temperature), device)


@torch.no_grad()  # not inference_mode: the student's loss keeps the answers for its backward pass
def _seen_probabilities(teacher: nn.Module, temperature: float, inputs: Tensor) -> Tensor:
    return softened(teacher, inputs, temperature)


def keep_and_label(
    classes: Tensor, probabilities: Tensor, config: SynthesisConfig, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Apply the strategy to one block.

    Args:
        classes: int64 [N], the classes the images were generated for.
        probabilities: float32 [N, K], the teacher's.
        label_smoothing: for the hard labels; soft labels are left as they are.

    Returns:
        keep: bool [N]; targets: float32 [N, K].
    """
    keep = torch.ones_like(classes, dtype=torch.bool)
    if config.labelling == "gkd":
        return keep, probabilities
    if config.labelling in FILTERED:
        keep = probabilities.argmax(1) == classes
    if config.labelling == "gap_filler":
        keep &= probabilities.gather(1, classes[:, None])[:, 0] >= config.confidence_threshold
    return keep, smoothed_one_hot(classes, probabilities.shape[1], label_smoothing)
