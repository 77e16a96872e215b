"""The selection training: one ordinary training on all images that records what every rule needs.

Its inputs do not name a rule, so that all coresets of a run, and of one run of the audit, share it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kr_ray.classifiers.interface import Classifier
from kr_ray.classifiers.networks import new_classifier
from kr_ray.classifiers.sets import FixedSet, smoothed_one_hot
from kr_ray.classifiers.ticks import WHOLE_TRAINING, TickedTraining
from kr_ray.classifiers.training import ClassifierTraining, Schedule
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import average, own_slice, worker_count, worker_rank
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ClassifierConfig
from kr_ray.data.augment import to_float
from kr_ray.data.images import LabelledImages
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.coreset.rules import SelectionScores
from kr_ray.methods.interface import Part, Site
from kr_ray.runs.results import SelectionResult
from kr_ray.runs.stages import Save, State

SCORES_FILE = "scores.safetensors"
EARLY_TICK = WHOLE_TRAINING.count // 4
"""After which the early scores are taken, at a quarter of the training."""
CLEAN_BATCH = 512


def selection_name(epochs: int) -> str:
    """Of the part and its folder; within a run nothing else decides the training."""
    return f"selection_{epochs}"


def selection_part(site: Site, epochs: int) -> Part[SelectionResult]:
    """`epochs` passes over the real training split; leaves `SelectionScores` in its folder."""
    recipe = site.config.classifier.model_copy(update={"mixup_alpha": 0.0})

    def work(folder: Path, state: State | None, save: Save) -> SelectionResult | None:
        return train_selection(site.path, folder, recipe, epochs, site.seed, state, save)

    return Part(
        name=selection_name(epochs),
        inputs=[recipe, epochs],
        result=SelectionResult,
        work=work,
        costs=("teacher", epochs / site.config.teacher.passes),
    )


def train_selection(
    run: Path,
    folder: Path,
    recipe: ClassifierConfig,
    epochs: int,
    seed: int,
    state: State | None,
    save: Save,
) -> SelectionResult | None:
    """Train on the real training split of `run` and keep the scores in `folder`. Returns the result in the
    first worker."""
    splits, device = load_stored_splits(run / SPLITS_FILE), pick_device()
    own_seed = derive_seed(seed, "selection")
    model = new_classifier(splits.num_classes, splits.channels, recipe, own_seed)
    schedule = Schedule.fit(recipe, len(splits.train), epochs)
    training = SelectionTraining(model, splits.train, recipe, schedule, derive_seed(own_seed, "data"), device)
    ticked = TickedTraining(training, splits.validation, WHOLE_TRAINING, state)
    while not ticked.finished:
        row = ticked.advance()
        if len(ticked.history) == EARLY_TICK:
            training.look_early()
        save(ticked.state_dict(), row)
    if worker_rank() != 0:
        return None
    scores = training.scores()
    scores.save(folder / SCORES_FILE)
    return SelectionResult(
        images=len(splits.train),
        never_learned=int((~scores.learned).sum()),
        mean_forgotten=float(scores.forgotten.double().mean()),
        val_accuracy=ticked.history[-1]["val_accuracy"],
        steps=training.step,
        images_seen=training.images_seen,
        seconds=sum(row["seconds"] for row in ticked.history),
    )


class ForgettingEvents:
    """What happened to every image so far, by its own steps (Toneva et al. 2019, algorithm 1).

    Attributes:
        forgotten: int64 [N], see `SelectionScores`.
        learned: bool [N].
        right: bool [N], at its last step; False before the first.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self.forgotten = torch.zeros(images, dtype=torch.int64, device=device)
        self.learned = torch.zeros(images, dtype=torch.bool, device=device)
        self.right = torch.zeros(images, dtype=torch.bool, device=device)

    def record(self, index: Tensor, right: Tensor) -> None:
        """A step on the images `index` (int64 [B], none twice), answered rightly or not (bool [B])."""
        self.forgotten[index] += self.right[index] & ~right
        self.learned[index] |= right
        self.right[index] = right

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in vars(self).items():
            value.copy_(state[name])


class SelectionTraining(ClassifierTraining):
    """The classifier's training, which notes at every step what it answered to each augmented image.

    Args:
        images: on any device.
    """

    def __init__(
        self,
        model: Classifier,
        images: LabelledImages,
        recipe: ClassifierConfig,
        schedule: Schedule,
        seed: int,
        device: torch.device,
    ) -> None:
        self.real = images.to(device)
        targets = smoothed_one_hot(self.real.labels, model.num_classes, recipe.label_smoothing)
        super().__init__(model, FixedSet(self.real.images, targets), recipe, schedule, seed, device)
        self.events = ForgettingEvents(len(images), device)
        self.early: dict[str, Tensor] = {}
        slots = own_slice(torch.empty(schedule.batch_size, device=device))
        self._answered = torch.zeros(len(slots), dtype=torch.int64, device=device)

    def _saw(self, logits: Tensor) -> None:
        self._answered.copy_(logits.detach().argmax(1))

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        size, position = self.schedule.batch_size, self.step % self.schedule.steps_per_epoch
        index = self._order[1][position * size : (position + 1) * size].to(self.device)
        super()._train_step(images, targets)
        self.events.record(index, self._hits(self.real.labels[index]))

    def _hits(self, labels: Tensor) -> Tensor:
        """Whether the last step's images were answered rightly: bool [B], of the whole batch in every
        worker."""
        hits = torch.zeros(len(labels), device=self.device)
        own_slice(hits).copy_(self._answered == own_slice(labels))
        return average(hits) * worker_count() > 0.5

    def look_early(self) -> None:
        """Take the early scores, now."""
        found = clean_scores(self.model, self.real)
        self.early = {name: found[name] for name in ("el2n", "grand")}

    def scores(self) -> SelectionScores:
        """All scores, at the end of the training."""
        end, events = clean_scores(self.model, self.real), self.events
        return SelectionScores(
            forgotten=events.forgotten.cpu(),
            learned=events.learned.cpu(),
            el2n_early=self.early["el2n"],
            el2n_end=end["el2n"],
            grand_early=self.early["grand"],
            grand_end=end["grand"],
            entropy=end["entropy"],
            features=end["features"],
        )

    def state_dict(self) -> State:
        return super().state_dict() | {"events": self.events.state_dict(), "early": self.early}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.events.load_state_dict(state["events"])
        self.early = state["early"]


@torch.no_grad()
def clean_scores(model: Classifier, images: LabelledImages) -> dict[str, Tensor]:
    """el2n, grand, entropy (float32 [N]) and features (float32 [N, D]) of unaltered images on the model's
    device; on the CPU."""
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    batches = zip(images.images.split(CLEAN_BATCH), images.labels.split(CLEAN_BATCH), strict=True)
    for pixels, labels in batches:
        features = model.features(to_float(pixels)).float()
        found = scores_of(model.head(features), features, labels) | {"features": features}
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def scores_of(logits: Tensor, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """el2n, grand and entropy, [N] each, of logits [N, K], the features [N, D] behind them and labels [N].

    The gradient of the cross-entropy in the last layer's weights and bias is the outer product of the error
    (probabilities minus one-hot label) and the features with a 1 appended.
    """
    probabilities = logits.softmax(1)
    el2n = (probabilities - torch.nn.functional.one_hot(labels, logits.shape[1])).norm(dim=1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
    return {"el2n": el2n, "grand": el2n * (features.square().sum(1) + 1).sqrt(), "entropy": entropy}
