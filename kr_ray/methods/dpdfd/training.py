"""DPDFD as a resumable part: `sound` on disjoint shards with recorded answers, `paper` as algorithm 1 prints
it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.classifiers.networks import load_classifier, new_classifier, save_classifier
from kr_ray.classifiers.predict import accuracy, confusion_matrix, predict_logits
from kr_ray.classifiers.ticks import WHOLE_TRAINING
from kr_ray.compute.devices import pick_device
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.dp import DpdfdSection
from kr_ray.data.augment import to_float
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.dp.noise import NoiseKey, forget_key, noise_key
from kr_ray.dp.release import Released, read_release
from kr_ray.methods.dpdfd.losses import bounded, generator_loss, output_gradient
from kr_ray.methods.dpdfd.networks import DataFreeGenerator, save_data_free_generator, to_bytes
from kr_ray.methods.dpdfd.plan import DpdfdPlan, plan_dpdfd, privacy_of
from kr_ray.methods.dpdfd.teachers import check_shards, noisy_answers, shards, teacher_file, train_teachers
from kr_ray.runs.artifacts import load_tensors, save_tensors, write_json
from kr_ray.runs.figures import ClassifierPoint, PrivacyRecord
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import RESULT_FILE, WEIGHTS_FILE, Row, Save, State

PAPER_TICKS = WHOLE_TRAINING.count


class Queries(Protocol):
    """Where the asked images come from, if not from the data-free generator: a private generator (its release
    composes), public images."""

    def images(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Labels int64 [N] -> uint8 [N, C, S, S]."""
        ...


class Distillation:
    """Student and generator, and the steps that both accountings share."""

    def __init__(
        self, splits: Splits, recipe: ClassifierConfig, section: DpdfdSection, seed: int, device: torch.device
    ) -> None:
        self.section, self.seed, self.device = section, seed, device
        self.num_classes = splits.num_classes
        channels, height, width = splits.train.images.shape[1:]
        self.shape = (channels, height, width)
        self.student = new_classifier(splits.num_classes, channels, recipe, derive_seed(seed, "student")).to(
            device
        )
        self.generator = DataFreeGenerator(self.shape, section.latent_dim, seed).to(device)
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(), lr=section.student_learning_rate, momentum=0.9
        )
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=section.generator_learning_rate
        )

    def _modules(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "student": self.student,
            "generator": self.generator,
            "student_optimizer": self.student_optimizer,
            "generator_optimizer": self.generator_optimizer,
        }

    def state_dict(self) -> State:
        return {name: module.state_dict() for name, module in self._modules().items()}

    def load_state_dict(self, state: State) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(state[name])

    def outputs(self, images: Tensor) -> Tensor:
        """The student's logits on uint8 images, in evaluation mode, on the CPU."""
        return predict_logits(self.student, images, self.device)

    def student_step(self, images: Tensor, targets: Tensor) -> None:
        """One step of L_S, the cross-entropy with the moved outputs, on normalised images [N, C, S, S] and
        probabilities [N, K]."""
        self.student.train()
        loss = F.cross_entropy(self.student(images.to(self.device)), targets.to(self.device))
        self.student_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.student_optimizer.step()

    def generator_step(self, random: torch.Generator, targets: Tensor | None = None) -> None:
        """One step of the generator against the student as fixed discriminator: L_G, and L_S where `targets`
        are given.

        Costs no privacy: the student is made of noisy answers alone.
        """
        section = self.section
        self.generator.train()
        self.student.eval()
        images = self.generator.draw(section.batch_size, random)
        features = self.student.features(images)
        logits = self.student(images)
        loss = generator_loss(logits, features, section.cross_entropy, section.alpha, section.beta)
        if targets is not None:
            loss = loss + F.cross_entropy(logits, targets.to(self.device))
        gradients = torch.autograd.grad(loss, list(self.generator.parameters()))
        for parameter, gradient in zip(self.generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()


# --- sound
# -----------------------------------------------------------------------------------------------------------


class SoundTraining:
    """Rounds of asking and learning. An answer is recorded once and reused for ever: every query counts, used
    or not."""

    def __init__(
        self, folder: Path, core: Distillation, plan: DpdfdPlan, key: NoiseKey | None, queries: Queries | None
    ) -> None:
        self.folder, self.core, self.plan, self.key, self.queries = folder, core, plan, key, queries

    def round(self, index: int) -> None:
        """Improve the generator, ask about its images (or read the recorded answers), learn from all answers
        so far."""
        core, section = self.core, self.core.section
        random = seeded_generator(core.seed, "round", index)
        if self.queries is None:
            for _ in range(section.generator_steps):
                core.generator_step(random)
        count = section.queries * (index + 1) // section.rounds - section.queries * index // section.rounds
        path = self.folder / f"answers-{index}.safetensors"
        images = self._images(count, random)  # drawn in any case, for it moves the generator's statistics
        if not path.exists():
            self._ask(path, images, index)
        files = [self.folder / f"answers-{past}.safetensors" for past in range(index + 1)]
        records = [read_release(file, lambda file: load_tensors(file)[0]) for file in files]
        self._learn(
            torch.cat([r["images"] for r in records]), torch.cat([r["targets"] for r in records]), index
        )

    def _images(self, count: int, random: torch.Generator) -> Tensor:
        if self.queries is not None:
            return self.queries.images(torch.arange(count) % self.core.num_classes, random).cpu()
        # With the batch's statistics: running ones lag behind a generator trained against a moving student.
        self.core.generator.train()
        with torch.no_grad():
            return to_bytes(self.core.generator.draw(count, random)).cpu()

    def _ask(self, path: Path, images: Tensor, index: int) -> None:
        """Ask and record: images, noisy answers, and the targets made of them."""
        section = self.core.section
        assert self.key is not None, "asking needs the noise key"
        outputs = self.core.outputs(images)
        answers = noisy_answers(self.folder, outputs, images, section, self.plan.sigma, self.key, index)
        if section.answer == "votes":  # GNMax (Papernot et al. 2018): the class of most noisy votes
            targets = F.one_hot(answers.argmax(1), answers.shape[1]).float()
        else:  # y_s of algorithm 1, line 10, with the mean over teachers
            moved = outputs.double() - section.answer_rate * answers / section.teachers
            targets = moved.softmax(1).float()
        save_tensors(path, {"images": images, "answers": answers, "targets": targets})

    def _learn(self, images: Tensor, targets: Tensor, index: int) -> None:
        section = self.core.section
        batch = min(section.batch_size, len(images))
        for step in range(
            section.steps * index // section.rounds, section.steps * (index + 1) // section.rounds
        ):
            chosen = torch.randperm(len(images), generator=seeded_generator(self.core.seed, "order", step))[
                :batch
            ]
            self.core.student_step(to_float(images[chosen]), targets[chosen])


def _train_sound(
    folder: Path,
    splits: Splits,
    core: Distillation,
    plan: DpdfdPlan,
    recipe: ClassifierConfig,
    queries: Queries | None,
    state: State | None,
    save: Save,
) -> list[Row]:
    section, history = core.section, list(state["history"]) if state is not None else []
    recorded = all((folder / f"answers-{index}.safetensors").exists() for index in range(section.rounds))
    key = None if recorded else noise_key(folder, section.insecure_noise_key, started=state is not None)
    if key is not None:
        check_shards(torch.bincount(splits.train.labels, minlength=splits.num_classes), section.teachers)
        parts = shards(splits.train, splits.num_classes, section.teachers, key)
        train_teachers(
            folder,
            splits.train,
            parts,
            splits.num_classes,
            recipe,
            section.teacher_epochs,
            core.seed,
            lambda done: None,
        )
    training = SoundTraining(folder, core, plan, key, queries)
    for index in range(len(history), section.rounds):
        started = time.perf_counter()
        training.round(index)
        history.append(_row(core, splits, index, section.rounds, started))
        save({"history": history, "core": core.state_dict()}, history[-1])
    return history


# --- as printed
# ------------------------------------------------------------------------------------------------------


def _train_paper(
    folder: Path,
    splits: Splits,
    core: Distillation,
    plan: DpdfdPlan,
    recipe: ClassifierConfig,
    state: State | None,
    save: Save,
) -> list[Row]:
    """Algorithm 1 with one teacher, asked anew at every step."""
    section, history = core.section, list(state["history"]) if state is not None else []
    key = noise_key(
        folder, section.insecure_noise_key, started=state is not None and len(history) < PAPER_TICKS
    )
    everything = [torch.arange(len(splits.train))]
    train_teachers(
        folder,
        splits.train,
        everything,
        splits.num_classes,
        recipe,
        section.teacher_epochs,
        core.seed,
        lambda done: None,
    )
    teacher = load_classifier(teacher_file(folder, 0), core.device)
    for tick in range(len(history), PAPER_TICKS):
        started = time.perf_counter()
        for step in range(section.steps * tick // PAPER_TICKS, section.steps * (tick + 1) // PAPER_TICKS):
            _paper_step(core, teacher, plan, key, step)
        history.append(_row(core, splits, tick, PAPER_TICKS, started))
        save({"history": history, "core": core.state_dict()}, history[-1])
    return history


def _paper_step(core: Distillation, teacher: nn.Module, plan: DpdfdPlan, key: NoiseKey, step: int) -> None:
    """Lines 2 to 14. As printed, g~ is *one* vector, the mean over the batch, and all outputs are moved by it
    alike."""
    section = core.section
    random = seeded_generator(core.seed, "latents", step)
    core.generator.train()
    with torch.no_grad():
        images = core.generator.draw(section.batch_size, random)
        core.student.eval()
        outputs, answers = core.student(images).float().cpu(), teacher(images).float().cpu()
    total = bounded(
        output_gradient(outputs, answers, section.weight_of_others), section.norm_bound, section.bound
    ).sum(0)
    noise = plan.sigma * section.norm_bound * key.gaussian(total.shape, "step", step)
    moved = outputs.double() - section.answer_rate * (total + noise) / section.batch_size
    targets = moved.softmax(1).float()
    core.student_step(images, targets)
    core.generator_step(seeded_generator(core.seed, "latents", step), targets)


# --- the part
# --------------------------------------------------------------------------------------------------------


def train_dpdfd(
    run: Path,
    folder: Path,
    section: DpdfdSection,
    recipe: ClassifierConfig,
    seed: int,
    state: State | None,
    save: Save,
    queries: Queries | None = None,
) -> Released:
    """Train a student by noisy answers; leaves weights.safetensors, generator.safetensors and result.json in
    `folder`.

    The teachers (folder `teachers`) are not private and must not leave the run; they are needed for nothing
    once the answers are recorded.

    Args:
        queries: what is asked about; None = the images of a generator trained against the student, which
            costs nothing. What a private generator released composes with this part's event.

    Raises:
        ConfigError: see `plan_dpdfd` and `shards`.
        kr_ray.runs.artifacts.ArtifactError: the training goes on, but its noise key is gone.
    """
    splits = load_stored_splits(run / SPLITS_FILE)
    plan = plan_dpdfd(section, len(splits.train))
    core = Distillation(splits, recipe, section, derive_seed(seed, "dpdfd"), pick_device())
    if state is not None:
        core.load_state_dict(state["core"])
    if section.accounting == "sound":
        history = _train_sound(folder, splits, core, plan, recipe, queries, state, save)
    elif queries is not None:
        raise ConfigError(
            "`queries` must go with `accounting: sound`, but got paper; algorithm 1 asks about its own images"
        )
    else:
        history = _train_paper(folder, splits, core, plan, recipe, state, save)
    result = _result(core, splits, history, privacy_of(plan, section, bool(section.insecure_noise_key)))
    save_classifier(folder / WEIGHTS_FILE, core.student)
    save_data_free_generator(folder / "generator.safetensors", core.generator, core.shape)
    write_json(folder / RESULT_FILE, result.model_dump(mode="json"))
    forget_key(folder)
    return Released(result, plan.event)


def _result(
    core: Distillation, splits: Splits, history: list[Row], privacy: PrivacyRecord
) -> ClassifierResult:
    """What any classifier's training finds; the test images are looked at here and nowhere else."""
    logits, section = core.outputs(splits.test.images), core.section
    return ClassifierResult(
        test_accuracy=accuracy(logits, splits.test.labels),
        test_loss=F.cross_entropy(logits, splits.test.labels).item(),
        val_accuracy=history[-1]["val_accuracy"],
        confusion=confusion_matrix(logits, splits.test.labels),
        steps=section.steps,
        images_seen=section.steps * section.batch_size,
        batch_size=section.batch_size,
        learning_rate=section.student_learning_rate,
        parameters=sum(parameter.numel() for parameter in core.student.parameters()),
        seconds=sum(row["seconds"] for row in history),
        curve=[ClassifierPoint.model_validate(row) for row in history],
        privacy=privacy,
    )


def _row(core: Distillation, splits: Splits, tick: int, ticks: int, started: float) -> Row:
    """Of one tick: how far it is, and the accuracy on validation images (an "epoch" is a tick here)."""
    accurate = accuracy(core.outputs(splits.validation.images), splits.validation.labels)
    share = (tick + 1) / ticks
    row: Row = {"tick": tick, "share": share, "epoch": tick + 1, "step": round(core.section.steps * share)}
    return row | {"val_accuracy": accurate, "seconds": time.perf_counter() - started}
