"""What is held at once counts bytes, so that large images take no more memory than small ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kr_ray.classifiers.training import augmented_at_once
from kr_ray.config import SynthesisConfig
from kr_ray.synthesis.stream import SyntheticSet, parts_of

SIDES = (8, 16, 28, 32, 64, 128, 224)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_bytes_are_bounded_and_small_images_keep_their_number(device: str, channels: int) -> None:
    most = augmented_at_once(device, 3 * 32 * 32)
    for side in SIDES:
        size = channels * side * side
        assert augmented_at_once(device, size) * size <= most * 3 * 32 * 32
        assert side > 32 or augmented_at_once(device, size) == most


@pytest.mark.parametrize("images", [1, 128, 129, 4096, 10_001])
@pytest.mark.parametrize("side", SIDES)
def test_parts_are_all_blocks_in_order_and_bounded(images: int, side: int) -> None:
    config, size = SynthesisConfig(batch_size=128), 3 * side * side
    parts = parts_of(images, size, config)
    assert [block for part in parts for block in part] == list(range(-(-images // 128)))
    assert all(
        1 <= len(part) <= 32 and (len(part) == 1 or len(part) * 128 * size <= 4096 * 3 * 32 * 32)
        for part in parts
    )


class Noise:
    """A sampler without a generator: the images are the chance that it is handed."""

    device = torch.device("cpu")

    def __init__(self, side: int) -> None:
        self.side = side

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (len(labels), 1, self.side, self.side), generator=random).to(torch.uint8)


def test_a_set_is_the_same_however_it_is_divided() -> None:
    config = SynthesisConfig(batch_size=8, view="seen")
    whole = SyntheticSet(Noise(40), None, torch.ones(3) / 3, 100, config, 0.0, 7)
    images, _ = whole.regeneration(2)
    for step in (1, 3, 13):
        divided = [whole.part(2, range(first, min(first + step, 13)))[0] for first in range(0, 13, step)]
        assert torch.equal(torch.cat(divided), images)
