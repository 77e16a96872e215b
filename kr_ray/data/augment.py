"""Augmentation of whole uint8 batches on the device that holds them.

Every image gets what torchvision would give it one at a time (tests/test_augment.py compares all operations,
bins and signs), but an operation is applied to all its images at once. Randomness is drawn on the host from a
CPU `torch.Generator`, so no step waits for the device and the numbers do not depend on it. Nothing here
multiplies matrices or convolves: those would lose bits under autocast or TF32.
"""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.functional as tv
import torchvision.transforms.v2.functional as tv2
from torch import Tensor

# In the order of torchvision's TrivialAugmentWide: an operation is named by its index here.
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
NUM_BINS = 31


def trivial_augment(images: Tensor, random: torch.Generator) -> Tensor:
    """TrivialAugment Wide: one random operation at one random strength per
    image (Müller & Hutter 2021, section 3, Table 1).

    Equal to `torchvision.transforms.TrivialAugmentWide(interpolation=BILINEAR)` on each image, with black
    outside the frame. Translations are up to 32 pixels whatever the image size, as in torchvision; on 1
    channel, Color changes nothing.

    Args:
        images: uint8, [N, C, H, W], C in {1, 3}, any device; not modified.
        random: on the CPU; advanced by 3 N draws (operation, bin, sign).

    Returns:
        uint8, [N, C, H, W], same device.

    Raises:
        ValueError: `images` or `random` is not as described.
    """
    _check_images(images)
    _check_random(random)
    operations = torch.randint(len(OPERATIONS), (len(images),), generator=random)
    magnitude_bins = torch.randint(NUM_BINS, (len(images),), generator=random)
    signs = 1 - 2 * torch.randint(2, (len(images),), generator=random)
    return apply_operations(images, operations, magnitude_bins, signs)


def apply_operations(images: Tensor, operations: Tensor, magnitude_bins: Tensor, signs: Tensor) -> Tensor:
    """The given operation on each image: what `trivial_augment` does once the dice are cast.

    Args:
        images: uint8, [N, C, H, W], C in {1, 3}, any device; not modified.
        operations: int64, [N], on the CPU, index into `OPERATIONS`.
        magnitude_bins: int64, [N], on the CPU, in [0, 30]; Identity, AutoContrast and Equalize ignore it.
        signs: int64, [N], on the CPU, -1 or 1; only ShearX to Sharpness are signed, the others ignore it.

    Returns:
        uint8, [N, C, H, W], same device.

    Raises:
        ValueError: an argument is not as described.
    """
    _check_images(images)
    _check_index("operations", operations, images, 0, len(OPERATIONS) - 1)
    _check_index("magnitude_bins", magnitude_bins, images, 0, NUM_BINS - 1)
    _check_index("signs", signs, images, -1, 1)
    if (signs == 0).any():
        raise ValueError("`signs` must be -1 or 1, but got 0; use 1 for the operations that ignore it")
    order = torch.argsort(operations, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    parameters = _parameters(operations, magnitude_bins, signs, images.shape[-2], images.shape[-1])[order]
    # The batch sorted by operation: each one owns a slice, whose bounds the host knows.
    batch = images.index_select(0, order.to(images.device, non_blocking=True))
    parameters = parameters.to(images.device, non_blocking=True)
    bounds = [0, *torch.bincount(operations, minlength=len(OPERATIONS)).cumsum(0).tolist()]

    def slice_of(first: str, last: str | None = None) -> slice:
        return slice(bounds[OPERATIONS.index(first)], bounds[OPERATIONS.index(last or first) + 1])

    steps = (
        (slice_of("ShearX", "Rotate"), _affine),
        (slice_of("Brightness"), _brightness),
        (slice_of("Color"), _color),
        (slice_of("Contrast"), _contrast),
        (slice_of("Sharpness"), _sharpness),
        (slice_of("Posterize"), _posterize),
        (slice_of("Solarize"), _solarize),
        (slice_of("AutoContrast"), _autocontrast),
        (slice_of("Equalize"), _equalize),
    )
    for part, operate in steps:
        if part.stop > part.start:
            batch[part] = operate(batch[part], parameters[part])
    return batch.index_select(0, inverse.to(images.device, non_blocking=True))


def random_crop(images: Tensor, padding: int, random: torch.Generator) -> Tensor:
    """Pad with `padding` black pixels on every side, then cut a random H x W window per image.

    Arguments, result and errors as in `crop_and_flip`, of which this is the first half.
    """
    return crop_and_flip(images, padding, False, random)


def random_horizontal_flip(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Arguments, result and errors as in `crop_and_flip`, of which this is the second half.
    """
    return crop_and_flip(images, 0, True, random)


def crop_and_flip(images: Tensor, padding: int, flip: bool, random: torch.Generator) -> Tensor:
    """`random_crop`, then `random_horizontal_flip` if `flip`: the same
    numbers from the same generator, in one pass.

    Args:
        images: uint8, [N, C, H, W], C in {1, 3}, any device; not modified.
        padding: pixels, >= 0; 0 crops nothing.
        flip: whether to mirror half of the images.
        random: on the CPU; draws N rows and N columns in [0, 2 padding]
            if padding > 0, then N bits if `flip`.

    Returns:
        uint8, [N, C, H, W], same device; `images` itself if there is nothing to do.

    Raises:
        ValueError: an argument is not as described.
    """
    _check_images(images)
    _check_random(random)
    if padding < 0:
        raise ValueError(
            f"`padding >= 0` must hold, but got padding={padding}; use 2 "
            "to 4 for 32-pixel images, 0 for no crop"
        )
    if padding == 0 and not flip:
        return images
    (count, channels, height, width), device = images.shape, images.device
    left = torch.zeros((count, 1), dtype=torch.int64)
    if padding > 0:
        top = torch.randint(2 * padding + 1, (count, 1), generator=random).to(device, non_blocking=True)
        left = torch.randint(2 * padding + 1, (count, 1), generator=random)
        # Rows first: they are contiguous, so picking them is a plain copy.
        rows = torch.nn.functional.pad(images, (padding,) * 4).flatten(
            0, 2
        )  # [N C (H + 2 padding), W + 2 padding]
        plane = torch.arange(count * channels, device=device).view(count, channels, 1) * (
            height + 2 * padding
        )
        picked = plane + (top + torch.arange(height, device=device))[:, None, :]
        images = rows.index_select(0, picked.flatten()).view(count, channels, height, width + 2 * padding)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        mirrored = torch.randint(2, (count, 1), generator=random).to(device, non_blocking=True)
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
    index = (left.to(device, non_blocking=True) + columns)[:, None, None, :]
    return images.gather(3, index.expand(count, channels, height, width))


def mixup(images: Tensor, targets: Tensor, alpha: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """MixUp: images and soft labels become convex combinations of pairs (Zhang et al. 2018, section 2).

    One weight for the batch, lambda ~ Beta(alpha, alpha); each image
    is paired with one of a random permutation.

    Args:
        images: floating point, [N, C, H, W], any device; not modified.
        targets: floating point, [N, K], one distribution over classes per image, same device; not modified.
        alpha: >= 0; 0 mixes nothing, returns its arguments and draws nothing.
        random: on the CPU; gives a seed for lambda and the permutation.

    Returns:
        lambda x + (1 - lambda) x[permutation] for images and for targets.

    Raises:
        ValueError: an argument is not as described.
    """
    _check_random(random)
    if not alpha >= 0:
        raise ValueError(f"`alpha >= 0` must hold, but got alpha={alpha}; use 0.2, or 0 for no MixUp")
    if not (
        images.is_floating_point()
        and targets.is_floating_point()
        and targets.ndim == 2
        and len(images) == len(targets)
    ):
        raise ValueError(
            "`images` [N, C, H, W] and `targets` [N, K] must be floating point and equally "
            f"many, but got {images.dtype} {tuple(images.shape)} and {targets.dtype} "
            f"{tuple(targets.shape)}; use to_float and one-hot labels"
        )
    if alpha == 0:
        return images, targets
    # torch.distributions.Beta would draw from the global generator.
    seed = int(torch.randint(2**63 - 1, (), generator=random))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    partner = torch.randperm(len(images), generator=random).to(images.device, non_blocking=True)
    return torch.lerp(images[partner], images, weight), torch.lerp(targets[partner], targets, weight)


def to_float(images: Tensor) -> Tensor:
    """What every network here reads: x / 127.5 - 1, so 0 -> -1 and 255 -> 1, for any number of channels.

    That is torchvision's `Normalize(mean=0.5, std=0.5)` after
    `ToTensor`, and the range of the generator's output.

    Args:
        images: uint8, any shape.

    Returns:
        float32 in [-1, 1], same shape and device.

    Raises:
        ValueError: `images` is not uint8 (a float image may be normalised already).
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"`images` must be uint8, but got {images.dtype}; convert "
            "real or generated images to 0..255 first"
        )
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def _magnitudes() -> Tensor:
    """Strength of every operation and bin, float64 [14, 31], before the
    sign; torchvision computes it in float32."""
    table = torch.zeros(len(OPERATIONS), NUM_BINS, dtype=torch.float64)
    for name, low, high in (
        ("ShearX", 0.0, 0.99),
        ("ShearY", 0.0, 0.99),
        ("TranslateX", 0.0, 32.0),  # pixels
        ("TranslateY", 0.0, 32.0),
        ("Rotate", 0.0, 135.0),  # degrees
        ("Brightness", 0.0, 0.99),
        ("Color", 0.0, 0.99),
        ("Contrast", 0.0, 0.99),
        ("Sharpness", 0.0, 0.99),
        ("Solarize", 255.0, 0.0),  # threshold
    ):
        table[OPERATIONS.index(name)] = torch.linspace(low, high, NUM_BINS, dtype=torch.float32).double()
    # Bits kept: 8 to 2.
    table[OPERATIONS.index("Posterize")] = 8 - torch.round(
        torch.arange(NUM_BINS, dtype=torch.float64) / ((NUM_BINS - 1) / 6)
    )
    return table


def _parameters(operations: Tensor, magnitude_bins: Tensor, signs: Tensor, height: int, width: int) -> Tensor:
    """What the kernels need per image, float32 [N, 6], so that one copy brings it to the device.

    Geometric operations: output -> input map (a, b, c, d, e, f), x_in = a x + b y + c, y_in = d x + e y + f,
    in units of half an image from its centre. Blends: weight of the image, weight of the degenerate image.
    Posterize: bit mask. Solarize: first inverted level.
    """
    shear_x, shear_y, translate_x, translate_y, rotate, *_ = (
        operations == OPERATIONS.index(name) for name in OPERATIONS[1:6]
    )
    signed = (operations >= OPERATIONS.index("ShearX")) & (operations <= OPERATIONS.index("Sharpness"))
    magnitude = _magnitudes()[operations, magnitude_bins] * torch.where(signed, signs, 1)
    zero = torch.zeros_like(magnitude)
    angle = torch.where(rotate, torch.deg2rad(magnitude), zero)
    x_by_y = torch.where(shear_x, magnitude, -torch.sin(angle))
    y_by_x = torch.where(shear_y, magnitude, torch.sin(angle))
    # Shears keep the upper left corner in place, not the centre; translations are whole pixels.
    x_shift = torch.where(shear_x, magnitude * height / 2, torch.where(translate_x, -magnitude.trunc(), zero))
    y_shift = torch.where(shear_y, magnitude * width / 2, torch.where(translate_y, -magnitude.trunc(), zero))
    cosine = torch.cos(angle)
    pixels = torch.stack((cosine, x_by_y, x_shift, y_by_x, cosine, y_shift), dim=1).float()
    parameters = pixels / torch.tensor([width / 2] * 3 + [height / 2] * 3, dtype=torch.float32)

    blend = (operations >= OPERATIONS.index("Brightness")) & (operations <= OPERATIONS.index("Sharpness"))
    weight = 1.0 + magnitude
    parameters[blend, :2] = torch.stack((weight, 1.0 - weight), dim=1).float()[blend]
    posterize = operations == OPERATIONS.index("Posterize")
    parameters[posterize, 0] = (256 - 2 ** (8 - magnitude[posterize])).float()
    solarize = operations == OPERATIONS.index("Solarize")
    parameters[solarize, 0] = magnitude[solarize].ceil().float()
    return parameters


def _affine(images: Tensor, parameters: Tensor) -> Tensor:
    """ShearX, ShearY, TranslateX, TranslateY and Rotate: one bilinear
    look-up with a grid per image, black outside."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    by_x, by_y, shift = parameters.view(-1, 2, 3).permute(2, 1, 0)[..., None].unbind(0)  # each [2, N, 1]
    # In this order and with the multiply-add fused, it rounds as the
    # matrix product in torchvision. [2, N, H, W]
    grid = torch.addcmul((by_x * x)[:, :, None, :], by_y[..., None], y[:, None]).add_(shift[..., None])
    sampled = torch.nn.functional.grid_sample(
        images.to(torch.float32),
        grid.permute(1, 2, 3, 0),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled.round_().to(torch.uint8)


def _blend(images: Tensor, degenerate: Tensor, parameters: Tensor) -> Tensor:
    """weight * image + (1 - weight) * degenerate image, cut to [0, 255] and truncated."""
    weight, rest = parameters[:, :2, None, None, None].unbind(1)
    mixed = images.to(torch.float32).mul_(weight).add_(degenerate * rest)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, parameters: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), parameters)


def _color(images: Tensor, parameters: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    return _blend(images, tv.rgb_to_grayscale(images), parameters)


def _contrast(images: Tensor, parameters: Tensor) -> Tensor:
    grey = tv.rgb_to_grayscale(images)
    return _blend(images, grey.to(torch.float32).mean(dim=(1, 2, 3), keepdim=True), parameters)


def _sharpness(images: Tensor, parameters: Tensor) -> Tensor:
    """Away from, or towards, a 3 x 3 blur with weights 1/13 and 5/13
    in the centre; the outermost pixels stay."""
    if min(images.shape[-2:]) <= 2:
        return images
    levels = images.to(torch.int16)  # sums up to 13 * 255
    columns = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    total.add_(levels[..., 1:-1, 1:-1], alpha=4)
    degenerate = images.to(torch.float32)
    degenerate[..., 1:-1, 1:-1] = total.div(13).round_()
    return _blend(images, degenerate, parameters)


def _posterize(images: Tensor, parameters: Tensor) -> Tensor:
    return images & parameters[:, 0, None, None, None].to(torch.uint8)


def _solarize(images: Tensor, parameters: Tensor) -> Tensor:
    # Inverting is flipping all bits: 4 times as fast as torch.where on a CPU.
    inverted = images >= parameters[:, 0, None, None, None].to(torch.uint8)
    return images ^ inverted.view(torch.uint8).neg()


def _autocontrast(images: Tensor, parameters: Tensor) -> Tensor:
    stretched: Tensor = tv.autocontrast(images)
    return stretched


def _equalize(images: Tensor, parameters: Tensor) -> Tensor:
    # torchvision's first kernel loops over images; its v2 kernel is the same map for a whole batch.
    equalized: Tensor = tv2.equalize(images)
    return equalized


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "`images` must be uint8 [N, C, H, W] with 1 or 3 channels, but got "
            f"{images.dtype} {tuple(images.shape)}; augment before to_float"
        )


def _check_random(random: torch.Generator) -> None:
    if random.device.type != "cpu":
        raise ValueError(
            f"`random` must be on the CPU, but got one on {random.device}; use torch.Generator()"
        )


def _check_index(name: str, values: Tensor, images: Tensor, low: int, high: int) -> None:
    if values.dtype != torch.int64 or values.shape != images.shape[:1] or values.device.type != "cpu":
        raise ValueError(
            f"`{name}` must be int64 [{len(images)}] on the CPU, but got {values.dtype} "
            f"{tuple(values.shape)} on {values.device}; give one per image"
        )
    if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(
            f"`{low} <= {name} <= {high}` must hold, but got {int(values.min())} to "
            f"{int(values.max())}; see OPERATIONS and NUM_BINS"
        )
