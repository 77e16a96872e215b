"""What is said of a data set before anything is paid for.

Images of two splits, images that show nothing, classes without images. A copy of a training image in the test
split makes a model look better than it is, and a non-member look like a member to an attack: the audit and
the copies stage leave such images out, accuracies do not. So a few are told, and many are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kr_ray.data.checks import DataError
from kr_ray.data.datasets import duplicate_indices
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.runs.results import Duplicates

NEARLY_BLACK = 10
"""Of 255: an image without a brighter pixel shows a person nothing, as
do images in [0, 1] that were cast to uint8."""
MOST_COPIED = 0.5
"""Bound of `data.max_copied_share`: the audit needs test images that nothing was trained on."""
SHOWN_CLASSES = 10

WHAT_COUNTS_THEM = {
    "validation": "the choice of checkpoint and parameters counts them, "
    "and shadow models are trained on them",
    "test": "test accuracies count them, the audit and the copies stage leave them out",
}


def count_copies(splits: Splits) -> Duplicates:
    """Pixel-exact copies within the training split and between splits.

    `distinct_train` counts the training images that equal no other
    image of any split: those that can be audited.
    """
    train, validation, test = splits.train.images, splits.validation.images, splits.test.images
    repeated = duplicate_indices(train)
    others = torch.cat([train[repeated], validation, test])
    return Duplicates(
        within_train=len(repeated),
        validation_in_train=len(duplicate_indices(validation, train)),
        test_in_train=len(duplicate_indices(test, train)),
        test_in_validation=len(duplicate_indices(test, validation)),
        distinct_train=len(train) - len(duplicate_indices(train, others)),
    )


def check_copies(splits: Splits, counts: Duplicates, most: float) -> None:
    """Refuse splits that share too many images.

    Args:
        counts: see `count_copies`.
        most: share of a split, in [0, 1], that may be copies of another split's images.

    Raises:
        DataError: with the numbers of all pairs of splits that share more.
    """
    wrong = [
        f"{_copies(counts, split, other)} of {len(part)} {split} images are also {_adjective(other)} images"
        for split, other, part in _pairs(splits)
        if _copies(counts, split, other) > most * len(part) + 1e-9  # 0.29 x 100 is a little less than 29
    ]
    if wrong:
        few = all(
            _copies(counts, split, other) <= MOST_COPIED * len(part) for split, other, part in _pairs(splits)
        )
        raise DataError(
            f"`share of a split's images that another split holds too <= {most:g}` must hold, or no "
            "accuracy and no audit means anything, but got: "
            f"{'; '.join(wrong)}{_of_which_constant(splits)}; remove the copies from one of the splits "
            "(compare the files' bytes), or split the data "
            f"anew{f', or raise data.max_copied_share (at most {MOST_COPIED:g})' if few else ''}"
        )


def remark(splits: Splits, counts: Duplicates) -> list[str]:
    """Sentences on what makes figures less than they seem, for a person and for the report."""
    said = [
        f"{_copies(counts, split, other)} of {len(part)} {split} images are also {_adjective(other)} images: "
        f"{WHAT_COUNTS_THEM[split]}"
        for split, other, part in _pairs(splits)
        if _copies(counts, split, other)
    ]
    if repeated := counts.within_train:
        said.append(
            f"{repeated} of {len(splits.train)} training images repeat an "
            "earlier one: the audit counts them once"
        )
    for name, part in _parts(splits):
        said += _on_content(name, part.images) + _on_classes(name, part.labels, splits.class_names)
    return said


def _copies(counts: Duplicates, split: str, other: str) -> int:
    found: int = getattr(counts, f"{split}_in_{other}")
    return found


def _pairs(splits: Splits) -> list[tuple[str, str, LabelledImages]]:
    validation, test = splits.validation, splits.test
    return [("validation", "train", validation), ("test", "train", test), ("test", "validation", test)]


def _parts(splits: Splits) -> list[tuple[str, LabelledImages]]:
    return [("training", splits.train), ("validation", splits.validation), ("test", splits.test)]


def _adjective(split: str) -> str:
    return "training" if split == "train" else split


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Darkest and brightest value of each image (uint8 [N, C, H, W]): uint8 [N]."""
    flat = images.flatten(1)
    return flat.amin(1), flat.amax(1)


def _on_content(name: str, images: Tensor) -> list[str]:
    low, high = _extremes(images)
    constant, dark = low == high, high <= NEARLY_BLACK
    said = []
    if count := int(constant.sum()):
        said.append(
            f"{count} of {len(images)} {name} images are constant, all pixels "
            f"alike (the first: number {_first(constant)})"
        )
    if count := int((dark & ~constant).sum()):
        said.append(
            f"{count} of {len(images)} {name} images are nearly black, no value above "
            f"{NEARLY_BLACK} of 255 (the first: number {_first(dark & ~constant)}); were "
            "they scaled to [0, 1] before they were saved?"
        )
    return said


def _on_classes(name: str, labels: Tensor, class_names: tuple[str, ...]) -> list[str]:
    """Of a training split `check_classes` refuses what is told here of the others."""
    counts = labels.bincount(minlength=len(class_names))
    lacking = [class_names[k] for k in (counts == 0).nonzero().flatten().tolist()]
    if not lacking:
        return []
    shown = ", ".join(lacking[:SHOWN_CLASSES]) + ", ..." * (len(lacking) > SHOWN_CLASSES)
    return [
        f"the {name} split has no image of {len(lacking)} of {len(class_names)} classes ({shown}): "
        "its figures say nothing on them"
    ]


def _first(which: Tensor) -> int:
    """Index, from 0, of the first that holds."""
    return int(which.nonzero()[0])


def _of_which_constant(splits: Splits) -> str:
    counts = {name: int(torch.eq(*_extremes(part.images)).sum()) for name, part in _parts(splits)}
    if not any(counts.values()):
        return ""
    return (
        " (constant images, all pixels alike: "
        f"{', '.join(f'{count} {name}' for name, count in counts.items())})"
    )
