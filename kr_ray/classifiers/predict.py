"""What a classifier answers: logits, probabilities, accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kr_ray.compute.devices import autocast
from kr_ray.data.augment import to_float


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device, batch_size: int = 512) -> Tensor:
    """Logits float32 [N, K] on the CPU of uint8 images [N, C, H,
    W], in full precision and evaluation mode."""
    model.eval()
    return torch.cat([model(to_float(batch.to(device))).float().cpu() for batch in images.split(batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels.cpu()).double().mean().item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts [K][K]: row = true class, column = predicted class."""
    classes = logits.shape[1]
    return (
        torch.bincount(labels.cpu() * classes + logits.argmax(1), minlength=classes**2)
        .view(classes, classes)
        .tolist()
    )


@torch.inference_mode()
def teacher_probabilities(teacher: nn.Module, images: Tensor, temperature: float = 1.0) -> Tensor:
    """The teacher's softmax on clean uint8 images [N, C, H, W]: float32 [N, K]."""
    return softened(teacher, to_float(images), temperature)


def softened(teacher: nn.Module, inputs: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), float32 [N, K], of float images
    [N, C, H, W] as augment.to_float gives them."""
    with autocast(inputs.device, "mixed"):
        logits = teacher(inputs.contiguous(memory_format=torch.channels_last))
    return (logits.float() / temperature).softmax(1)
