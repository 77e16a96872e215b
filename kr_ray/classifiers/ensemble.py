"""Several classifiers that answer as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Frozen classifiers of the same classes.

    Its logits are the logarithm of the members' mean probabilities: softmax gives that mean, and a
    temperature sharpens or flattens it as it does one classifier's answer.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor) -> Tensor:
        """Float images [N, C, H, W] -> logits float32 [N, K]."""
        logits = torch.stack([member(inputs).float() for member in self.members])
        return logits.log_softmax(2).logsumexp(0) - math.log(len(self.members))
