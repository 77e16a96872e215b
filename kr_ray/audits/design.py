"""Who is audited: the canaries, the population samples, the reference
images, and which run trains on which of them.

Protocol of Zhao & Zhang, "Does Training with Synthetic Data Truly Protect Privacy?" (ICLR 2025), after Aerni
et al. (2024): canaries stand for the most vulnerable points of the data; they are real training images, not
poisoned patterns. In every run each of them is in or out, and all other training images are always in.
Departure: the population samples, too, are in in exactly half of the runs, so that the figure for the average
and the one for the worst case come from one and the same estimator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError, WorstCaseConfig
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import duplicate_indices
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.pools import stratified_index
from kr_ray.privacy.arrays import BoolArray, IndexArray

DEFAULT_SAMPLES = 500
"""Audit samples of the paper."""
FEWEST_SAMPLES = 2


@dataclass(frozen=True)
class AuditDesign:
    """The samples of an audit. Equal inputs give equal designs.

    Attributes:
        canaries: int64 [C], indices into the training split.
        given_labels: int64 [C], the canaries' labels in training: wrong ones for mislabeled canaries.
        population: int64 [P], indices into the training split; none of them a canary.
        reference: int64 [R], indices into the test split.
        excluded: training images that may not be audit samples, for they equal another image of any split.
        seed: of the membership.
    """

    canaries: IndexArray
    given_labels: IndexArray
    population: IndexArray
    reference: IndexArray
    excluded: int
    seed: int

    @property
    def samples(self) -> IndexArray:
        """Canaries, then population: int64 [C + P]."""
        return np.concatenate([self.canaries, self.population])

    def member(self, models: int) -> BoolArray:
        """Which run trains on which sample: bool [models, C + P].

        Runs come in pairs; a fair coin per pair and sample says which of the two gets the sample. So every
        sample is a member in exactly half of the runs, samples are independent of each other, and the first m
        runs are a design of their own for every even m: an audit can be cut short or extended.

        Raises:
            ValueError: `models` is odd or less than 2.
        """
        if models < 2 or models % 2:
            raise ValueError(f"`models` must be even and >= 2, but got models={models}; runs come in pairs")
        coins = [
            np.random.default_rng([self.seed, pair]).random(len(self.canaries) + len(self.population)) < 0.5
            for pair in range(models // 2)
        ]
        return np.stack([half for coin in coins for half in (coin, ~coin)])

    def members_of(self, run: int) -> BoolArray:
        """Which samples run `run` trains on: bool [C + P]. The first runs of
        a longer audit are those of a shorter one."""
        return self.member(run - run % 2 + 2)[run]

    def canaries_of_run(self, run: int) -> tuple[int, ...]:
        """Positions of the canaries of run `run` in its own training split, which lacks its non-members."""
        member = self.members_of(run)
        missing, there = np.sort(self.samples[~member]), self.canaries[member[: len(self.canaries)]]
        return tuple((there - np.searchsorted(missing, there)).tolist())

    def splits_of_run(self, splits: Splits, run: int) -> Splits:
        """What run `run` is trained on: all training images but its
        non-members, the canaries with their given labels."""
        labels = splits.train.labels.clone()
        labels[torch.from_numpy(self.canaries)] = torch.from_numpy(self.given_labels)
        kept = torch.from_numpy(self._kept_in(run, len(labels)))
        return replace(splits, train=LabelledImages(splits.train.images, labels).subset(kept))

    def samples_among(self, taken: IndexArray, run: int, images: int) -> BoolArray:
        """Which audit samples are among the images `taken` (indices into run `run`'s own training split) of a
        training split of `images` images: bool [C + P]."""
        return np.isin(self.samples, np.flatnonzero(self._kept_in(run, images))[taken])

    def _kept_in(self, run: int, images: int) -> BoolArray:
        """Which of the training split's `images` images run `run` trains on."""
        kept = np.ones(images, dtype=np.bool_)
        kept[self.samples[~self.members_of(run)]] = False
        return kept


def design_audit(
    splits: Splits, config: WorstCaseConfig, seed: int, losses: NDArray[np.float64] | None = None
) -> AuditDesign:
    """Choose canaries, population and reference.

    Exact copies are kept out of all three: the copy of a sample that is
    out may still be in, or be among the reference.

    Args:
        splits: the real data.
        config: kind and number of the samples.
        seed: equal seeds give equal designs.
        losses: for `outlier` canaries alone: float [N], each training image's loss under models that were not
            trained on it (see audits.outliers.held_out_losses); the highest are chosen.

    Raises:
        DataError: more canaries or population samples are asked for than the set
            can bear; the message says how many fit.
    """
    train = splits.train
    eligible = _unique_training_images(splits)
    wanted, population_size = sample_counts(config, len(train), len(eligible))
    if config.canary_kind == "outlier":
        if losses is None:
            raise ValueError(
                "`losses` must be given for outlier canaries, but got None; see "
                "audits.outliers.held_out_losses"
            )
        canaries = _highest(losses, eligible, train.labels.numpy(), wanted)
    else:
        canaries = _draw(train.labels, eligible, wanted, derive_seed(seed, "canaries"))
    rest = np.setdiff1d(eligible, canaries)
    given = train.labels.numpy()[canaries]
    if config.canary_kind == "mislabeled":
        given = wrong_labels(given, splits.num_classes, derive_seed(seed, "wrong labels"))
    return AuditDesign(
        canaries=canaries,
        given_labels=given,
        population=_draw(train.labels, rest, population_size, derive_seed(seed, "population")),
        reference=_reference(splits, config.reference, derive_seed(seed, "reference")),
        excluded=len(train) - len(eligible),
        seed=derive_seed(seed, "membership"),
    )


def sample_counts(config: WorstCaseConfig, images: int, distinct: int) -> tuple[int, int]:
    """How many canaries and population samples there will be.

    Args:
        images: of the training split.
        distinct: those among them that equal no other image of any split.

    Raises:
        DataError: see `design_audit`.
    """
    most = int(config.max_canary_share * images + 1e-9)
    canaries = _how_many("canaries", config.canaries, min(most, distinct // 2), config)
    return canaries, _how_many("population", config.population, min(most, distinct - canaries), config)


def check_samples(config: Config, images: int, distinct: int) -> None:
    """Whether a training split of so many images, of which so many are
    no copies, can bear `audit.worst_case.arms`.

    Raises:
        DataError: it has too few for as many audit samples.
        ConfigError: without them it has too few for a batch.
    """
    check_batches(config, images, sum(sample_counts(config.audit.worst_case, images, distinct)))


def check_batches(config: Config, images: int, samples: int) -> None:
    """Whether a run of the audit that trains on none of the samples fills a batch of the generator.

    Raises:
        ConfigError: it does not.
    """
    left = images - samples
    if "kr" in config.audit.worst_case.arms and left < config.generator.batch_size:
        raise ConfigError(
            "`training images - audit samples >= generator.batch_size` must hold, but got "
            f"{images} - {samples} < {config.generator.batch_size}; lower "
            "generator.batch_size, canaries or population of audit.worst_case"
        )


def wrong_labels(labels: IndexArray, num_classes: int, seed: int) -> IndexArray:
    """For each label one of the other classes, uniformly: int64 [N]."""
    offset = np.random.default_rng(seed).integers(1, num_classes, len(labels))
    return (labels + offset) % num_classes


def _how_many(name: str, asked: int, most: int, config: WorstCaseConfig) -> int:
    """The number asked for, or for 0 the paper's as far as it fits."""
    if most < FEWEST_SAMPLES or asked > most:
        shown = asked or f"{DEFAULT_SAMPLES} by default"
        raise DataError(
            f"`audit.worst_case.{name} <= {most}` must hold with "
            f"max_canary_share={config.max_canary_share:g} of this training split, but got {shown}; use "
            f"{most if most >= FEWEST_SAMPLES else 'more training images'}, or raise "
            "audit.worst_case.max_canary_share (at most 0.25)"
        )
    if 0 < asked < FEWEST_SAMPLES:
        raise DataError(
            f"`audit.worst_case.{name} >= {FEWEST_SAMPLES}` must hold, but got "
            f"{asked}; use 0 for as many as fit, up to 500"
        )
    return asked or min(DEFAULT_SAMPLES, most)


def _unique_training_images(splits: Splits) -> IndexArray:
    """Training images that equal no other image of any split: int64, ascending."""
    images = splits.train.images
    copies = images[duplicate_indices(images)]
    others = torch.cat([copies, splits.validation.images, splits.test.images])
    return np.setdiff1d(np.arange(len(images)), duplicate_indices(images, others).numpy())


def _reference(splits: Splits, most: int, seed: int) -> IndexArray:
    """Test images of which no copy is trained on, none of them twice: int64, ascending."""
    images = splits.test.images
    copies = [duplicate_indices(images), duplicate_indices(images, splits.train.images)]
    candidates = np.setdiff1d(np.arange(len(images)), torch.cat(copies).numpy())
    if len(candidates) == 0:
        raise DataError(
            "the audit needs test images that are not copies of training "
            "images, but there is none; use another test split"
        )
    return np.sort(np.random.default_rng(seed).permutation(candidates)[:most])


def _draw(labels: torch.Tensor, among: IndexArray, size: int, seed: int) -> IndexArray:
    """`size` of the images `among`, in the classes' proportions and
    never all of a class: int64, ascending."""
    drawn: IndexArray = among[
        stratified_index(labels[torch.from_numpy(among)], size, [seed], leave=1).numpy()
    ]
    return drawn


def _highest(losses: NDArray[np.float64], among: IndexArray, labels: IndexArray, size: int) -> IndexArray:
    """The `size` images `among` of highest loss, never more than half of a class: int64, ascending."""
    if losses.shape != labels.shape or not np.isfinite(losses).all():
        raise ValueError(
            f"`losses` must be finite, one per training image ({len(labels)}), but got shape "
            f"{losses.shape}; compute them anew"
        )
    free = np.bincount(labels[among]) // 2
    chosen: list[int] = []
    for index in among[np.argsort(-losses[among], kind="stable")]:
        if free[labels[index]] > 0 and len(chosen) < size:
            free[labels[index]] -= 1
            chosen.append(int(index))
    return np.sort(np.array(chosen, dtype=np.int64))
