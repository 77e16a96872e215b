"""The regenerated, teacher-labelled synthetic set that students are trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kr_ray.config import SynthesisConfig
from kr_ray.seeding import derive_seed, seeded_generator
from kr_ray.synthesis.labelling import FILTERED, REGENERATED, keep_and_label, teacher_probabilities
from kr_ray.synthesis.sampling import Sampler


class CollapsedGenerator(RuntimeError):
    """A filtering strategy found not one image that the teacher accepts."""


class SyntheticSet:
    """A set of generated images, made anew every `regeneration_rate` epochs.

    Block b of regeneration r is drawn from a generator seeded by (seed, r, b): the set does not depend on what was made before
    it or by whom, so a resumed student, or one fed by several makers, sees the same images.

    Args:
        sampler: the checkpoint; its batch-norm statistics are re-estimated here at `config.latent_std`.
        teacher: frozen, in evaluation mode, on the sampler's device.
        prior: class frequencies, float64 [K].
        images: size of the set.
        label_smoothing: of the recipe; applies to hard labels only.
    """

    def __init__(
        self,
        sampler: Sampler,
        teacher: nn.Module,
        prior: Tensor,
        images: int,
        config: SynthesisConfig,
        label_smoothing: float,
        seed: int,
    ) -> None:
        self._sampler, self._teacher, self._config, self._seed = sampler, teacher, config, seed
        self._label_smoothing = label_smoothing
        self._size = images
        self._prior = prior if config.class_prior == "real" else torch.full_like(prior, 1 / len(prior))
        self._regeneration = -1
        self._set: tuple[Tensor, Tensor] | None = None
        sampler.set_latent_std(
            config.latent_std, derive_seed(seed, "standing"), self._prior, config.standing_batches, config.batch_size
        )

    def __len__(self) -> int:
        return self._size

    def epoch(self, index: int) -> tuple[Tensor, Tensor]:
        """The set as of epoch `index`: images uint8 [N, C, H, W], target probabilities float32 [N, K]."""
        regeneration = index // self._config.regeneration_rate if self._config.labelling in REGENERATED else 0
        if self._set is None or regeneration != self._regeneration:
            self._set = None  # free the old set before the new one is made
            self._set = self._generate(regeneration)
            self._regeneration = regeneration
        return self._set

    def _generate(self, regeneration: int) -> tuple[Tensor, Tensor]:
        """Draw blocks until every image of the set has been accepted.

        Rejected images are drawn again for the same class, so that filtering does not change the class frequencies. After
        `max_draws` times the set's size the missing ones are repeats of accepted images.
        """
        classes = torch.multinomial(
            self._prior, self._size, replacement=True, generator=seeded_generator(self._seed, "classes", regeneration)
        )
        wanted, images, targets, drawn, block = classes, [], [], 0, 0
        while len(wanted) and drawn < self._config.max_draws * self._size:
            rejected = []
            for part in wanted.split(self._config.batch_size):
                keep, kept_images, kept_targets = self._block(part, regeneration, block)
                rejected.append(part[~keep])
                images.append(kept_images)
                targets.append(kept_targets)
                drawn, block = drawn + len(part), block + 1
            wanted = torch.cat(rejected)
        accepted_images, accepted_targets = torch.cat(images), torch.cat(targets)
        if not len(accepted_images):
            raise CollapsedGenerator(
                f"none of {drawn} generated images was accepted by labelling={self._config.labelling!r}; the checkpoint has "
                "collapsed: use a later one, or labelling gkd"
            )
        if len(accepted_images) < self._size:
            repeat = torch.arange(self._size, device=accepted_images.device) % len(accepted_images)
            return accepted_images[repeat], accepted_targets[repeat]
        return accepted_images, accepted_targets

    def _block(self, classes: Tensor, regeneration: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """One block: which of `classes` were kept (bool, CPU), and the kept images and targets."""
        generator = seeded_generator(self._seed, "block", regeneration, block)
        images = self._sampler.images(classes, generator)
        on_device = classes.to(images.device)
        probabilities = teacher_probabilities(self._teacher, images)
        keep, targets = keep_and_label(on_device, probabilities, self._config, self._label_smoothing)
        if self._config.labelling not in FILTERED:  # spares the device a synchronisation per block
            return torch.ones_like(classes, dtype=torch.bool), images, targets
        return keep.cpu(), images[keep], targets[keep]
