"""The ways of making a classifier: teacher, synthesis, checkpoint
sweep, tuning, student (sections 3.1 to 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, SerializeAsAny, model_validator

from kr_ray.config.base import Location, Section, Stamp
from kr_ray.config.classifiers import ClassifierConfig
from kr_ray.config.data import DataConfig
from kr_ray.config.generators import BigGanSampling, SamplingSection

Labelling = Literal["gkd", "gap_filler", "filter", "hard"]
"""See kr_ray.synthesis.labelling; from the paper's own strategy to its baseline (appendix D)."""


class OwnTeacherSection(Section):
    """Base of the run's own teachers; a kind's own section adds its keys."""

    step_cost: ClassVar[float] = 1.0
    """Of a gradient step, in plain ones."""

    kind: str
    """Which way of training: a key of `kr_ray.config.kinds.TEACHERS`."""

    @property
    def passes(self) -> int:
        """Over the real images that it is trained on."""
        raise NotImplementedError


class TeacherConfig(OwnTeacherSection):
    """The classifier on the real images (section 3.1), with the recipe of `classifier` and without any
    defence."""

    added: ClassVar[frozenset[str]] = frozenset({"kind"})

    kind: Literal["classifier"] = "classifier"
    """Of teacher; tells this section from the others'."""
    epochs: int = Field(500, ge=1)
    """Passes over the real training images."""

    @property
    def passes(self) -> int:
        return self.epochs


UNSEARCHED = frozenset({"pool_scale", "labellers"})
"""Numeric keys of `synthesis` that decide what is made before the tuning."""


class SynthesisConfig(Section):
    """How a synthetic set is drawn and labelled (sections 3.4 and 3.5); tuning varies three of these."""

    added: ClassVar[frozenset[str]] = frozenset(
        {"view", "temperature", "student_mixup", "pool_scale", "labeller", "labellers"}
    )

    labelling: Labelling = "gkd"
    """`gkd` (the paper): the teacher labels all images. Else they keep the class they were made for, and are
    kept: all (`hard`), where the teacher agrees (`filter`), or agrees with confidence (`gap_filler`)."""
    class_prior: Literal["real", "uniform", "released"] = "real"
    """How often each class is drawn: as among the real images, all equally, or as the noisy frequencies say
    that a private generator released."""
    sampling: SerializeAsAny[SamplingSection] = BigGanSampling()
    """How the generator draws; the keys are those of its kind."""
    regeneration_rate: int = Field(10, ge=1)
    """Epochs between two regenerations; an epoch here is one pass
    over the synthetic set, whatever its size."""
    cardinality_scale: int = Field(1, ge=1)
    """Synthetic over real training images."""
    pool_scale: int = Field(0, ge=0)
    """Images of a pool over real training images: they are drawn once, kept with the run, shared by all
    students of a checkpoint and all trials, and every regeneration is a part of them. 0 (the paper): every
    regeneration is drawn anew. The default is that of the generator's kind: 3 for `edm`, else 0."""
    epoch_unit: Literal["synthetic", "real"] = "synthetic"
    """What a student's budget counts. `synthetic` (the paper): passes over the scaled set, so the scale
    multiplies the work. `real`: passes of real size. Tuning always counts in passes of real size, so that all
    scales are compared at equal work."""
    confidence_threshold: float = Field(0.9, ge=0, lt=1)
    """`gap_filler`: the least teacher probability of the kept label."""
    view: Literal["clean", "seen"] = "clean"
    """What the teacher answers to. `clean` (the paper): the generated image, before augmentation; MixUp then
    mixes the answers. `seen`: exactly what the student sees at each step, after crop, flip, TrivialAugment
    and MixUp ("function matching", Beyer et al. 2022, section 3.1). It costs a teacher's forward pass per
    image and epoch, and the student follows its teacher more closely: audit it (configs/README.md)."""
    temperature: float = Field(1.0, gt=0)
    """Of the teacher's softmax(logits / temperature): below 1 it sharpens
    the soft labels, above 1 it flattens them."""
    student_mixup: bool = True
    """Whether students mix images as `classifier.mixup_alpha` says; the teacher does in any case."""
    batch_size: int = Field(128, ge=2)
    """Images that are drawn and labelled together; another number gives other images."""
    labeller: Literal["teacher", "equal_compute"] = "teacher"
    """Who labels: the run's teacher (the paper), or one of as many gradient steps as the student at default
    parameters, which is trained before the sweep."""
    labellers: int = Field(1, ge=1)
    """Teachers whose mean answer is the label: the labeller and others of its kind, of other seeds. Each
    costs a training and a forward pass per label."""
    max_draws: int = Field(20, ge=1)
    """Filtering strategies give up after drawing this many times the wanted number of images."""

    @model_validator(mode="after")
    def _fits_the_pool(self) -> SynthesisConfig:
        if 0 < self.pool_scale < self.cardinality_scale:
            raise ValueError(
                "`cardinality_scale <= pool_scale` must hold with a pool, or its images would be repeated, "
                f"but got cardinality_scale={self.cardinality_scale}, pool_scale={self.pool_scale}; raise "
                "pool_scale, or use 0 for none"
            )
        return self

    @model_validator(mode="after")
    def _only_gkd_hands_on_answers(self) -> SynthesisConfig:
        if self.labelling != "gkd" and (self.view, self.temperature) != ("clean", 1.0):
            raise ValueError(
                "`labelling: gkd` must hold with `view: seen` or a temperature other than 1, for no other "
                f"labels are the teacher's answers, but got labelling={self.labelling}, view={self.view}, "
                f"temperature={self.temperature}; use gkd, or view: clean and temperature: 1"
            )
        return self

    @property
    def asks_the_teacher(self) -> bool:
        """Whether what a student learns depends on a teacher: all but `hard` do."""
        return self.labelling != "hard"

    def labeller_names(self) -> list[str]:
        """The stages whose classifiers label together: the run's teacher, or a longer one, and others like
        it."""
        named = {"teacher": ("teacher", "labeller"), "equal_compute": ("long_labeller_0", "long_labeller")}
        own, further = named[self.labeller]
        return [own, *(f"{further}_{k}" for k in range(1, self.labellers))]

    def student_recipe(self, recipe: ClassifierConfig) -> ClassifierConfig:
        """The recipe as students follow it: without MixUp if `student_mixup` is off."""
        return recipe if self.student_mixup else recipe.model_copy(update={"mixup_alpha": 0.0})

    def labelled_by(self, labelling: Labelling) -> SynthesisConfig:
        """The same generation under another labelling strategy; what
        only GKD knows falls back to its default."""
        only_gkd = {} if labelling == "gkd" else {"view": "clean", "temperature": 1.0}
        return self.with_values({"labelling": labelling} | only_gkd)

    def stamp(self) -> Stamp:
        """The kind's sampling keys stand among the others, as they did before there were kinds."""
        stamp = super().stamp()
        return stamp | stamp.pop("sampling")

    def with_values(self, values: Mapping[str, Any]) -> SynthesisConfig:
        """The same but for `values`, by key or by key of `sampling`, as a search space names them.

        Raises:
            pydantic.ValidationError: a value is out of its key's range.
        """
        fields = type(self).model_fields
        own = {key: value for key, value in values.items() if key in fields}
        drawing = {key: value for key, value in values.items() if key not in fields}
        sampling = self.sampling.with_values(drawing)
        return type(self).model_validate(self.model_dump() | {"sampling": sampling} | own)

    def values(self, names: Iterable[str]) -> dict[str, float]:
        """The opposite of `with_values`."""
        fields = type(self).model_fields
        return {name: getattr(self, name) if name in fields else self.sampling.value(name) for name in names}

    def searchable(self) -> dict[str, type]:
        """The numeric keys that tuning may vary, with int or float:
        this section's and those of `sampling`."""
        fields = type(self).model_fields
        own = {
            name: cast("type", field.annotation)
            for name, field in fields.items()
            if field.annotation in (int, float) and name not in UNSEARCHED
        }
        return own | self.sampling.searchable()


class CheckpointsConfig(Section):
    """The search for the generator's best checkpoint: a student of each, judged on validation images
    (section 3.4)."""

    search: Literal["exhaustive", "halving"] = "exhaustive"
    """`exhaustive` (the paper): every student is trained for the whole schedule. `halving`: all on a
    short one, then the best."""
    epochs: int = Field(100, ge=1)
    """Of a student of the search, in the unit of `synthesis.epoch_unit`."""
    shortening: int = Field(9, ge=2)
    """`halving`: all checkpoints are first tried on complete schedules that are this many times shorter."""
    budget: float = Field(0.35, gt=0, lt=1)
    """`halving`: its share of the exhaustive sweep's epochs; as many of the
    best go on to the whole schedule as it allows."""


class TuningConfig(Section):
    """TPE with Hyperband over the generation parameters (section 3.5)."""

    added: ClassVar[frozenset[str]] = frozenset({"confirm", "finalists"})

    trials: int = Field(50, ge=1)
    """Students, each with other generation parameters."""
    epochs: int = Field(100, ge=1)
    """Of a trial that is not stopped: passes of real size."""
    searcher: Literal["optuna", "hyperopt", "random"] = "optuna"
    """`optuna`: TPE; `hyperopt`: TPE as well, knowing no pruned trials; `random`."""
    space: dict[str, tuple[int, int] | tuple[float, float]] = {
        "latent_std": (1.0, 2.5),
        "regeneration_rate": (1, 10),
        "cardinality_scale": (1, 10),
    }
    """What is varied, and between which bounds: numeric keys of `synthesis`,
    or of `synthesis.sampling`, by their own names."""
    reduction_factor: int = Field(3, ge=2)
    """Hyperband's eta: at a rung about one trial in so many goes on."""
    rungs: int = Field(9, ge=1)
    """Hyperband's resource R. The resource is images seen, in units of 1/R of a trial's budget, which is
    `epochs` passes of real size for every trial, whatever its cardinality scale; the first rung must lie past
    the learning-rate warm-up."""
    startup_trials: int = Field(10, ge=1)
    """Random trials before TPE models anything."""
    brackets_in_flight: int = Field(1, ge=1)
    """Hyperband brackets that run side by side; 1 is the strict sequence. More keeps more workers busy (50
    trials on 8 slots: 84 rounds at 1, 47 at 2), but TPE learns later. Part of the search, not of the machine:
    it must not follow the number of workers, or results would."""
    confirm: int = Field(0, ge=0)
    """Seeds with which the finalists and the defaults are trained again, 2 or more; the best mean is chosen,
    but the defaults stay unless they are beaten by more than the standard error of the difference. 0 (the
    paper): the trials' own scores decide."""
    finalists: int = Field(2, ge=1)
    """`confirm`: so many of the best complete trials."""

    @property
    def confirmed_students(self) -> int:
        """Students that confirm the choice, at most: the defaults are candidates too."""
        return (min(self.finalists, self.trials) + 1) * self.confirm

    @model_validator(mode="after")
    def _confirmed_by_several(self) -> TuningConfig:
        if self.confirm == 1:
            raise ValueError(
                "`confirm >= 2` (or 0) must hold, but got confirm=1; one seed shows no spread: use 3"
            )
        return self

    @model_validator(mode="after")
    def _ranges_fit(self) -> TuningConfig:
        bad = [
            f"`0 <= low <= high` must hold, but got {key}={list(pair)}; swap or widen the two bounds"
            for key, pair in self.space.items()
            if not 0 <= pair[0] <= pair[1]
        ]
        if not self.space:
            bad.append(
                "`space` must name at least one key of `synthesis`, but got "
                "none; remove the key for the paper's three"
            )
        if self.trials > 1 and 1 < self.rungs < self.reduction_factor:
            bad.append(
                f"`rungs >= reduction_factor` must hold, but got rungs={self.rungs}, "
                f"reduction_factor={self.reduction_factor}; else no trial could be "
                "stopped early (rungs: 1 switches Hyperband off)"
            )
        smallest = self.rungs // self.reduction_factor ** int(
            math.log(self.rungs, self.reduction_factor) + 1e-9
        )
        if smallest / self.rungs <= 0.1:
            bad.append(
                "the first rung must lie past the warm-up, a tenth of a trial, but with "
                f"rungs={self.rungs}, reduction_factor={self.reduction_factor} it is at "
                f"{smallest / self.rungs:.3f}; use rungs: 9 with reduction_factor: 3"
            )
        if bad:
            raise ValueError("; ".join(bad))
        return self

    def bounds(self, name: str, synthesis: SynthesisConfig) -> tuple[float, float]:
        """Of a key of `synthesis`: those of the search space, or its value twice where it is not searched."""
        value = synthesis.values([name])[name]
        return self.space.get(name, (value, value))

    def stamp(self) -> Stamp:
        """Each range stands among the other keys, as it did before there was a `space`."""
        stamp = super().stamp()
        return stamp | stamp.pop("space")


@dataclass(frozen=True, kw_only=True)
class MainKey:
    """The numeric key of a method that trades accuracy for something else, for the search for equal accuracy.

    Attributes:
        name: of the key.
        low, high: where it is searched; both above 0, for the search is on a logarithmic scale.
        rising: whether accuracy rises with it.
        start: tried first; None: the geometric middle.
        whole: only whole numbers.
        excludes: keys that must be null where this one is given.
    """

    name: str
    low: float
    high: float
    rising: bool
    start: float | None = None
    whole: bool = False
    excludes: tuple[str, ...] = ()


class MethodSection(Section):
    """Base of the ways of making a classifier that `students` names; a kind's own section adds its keys."""

    kind: str
    """Which way: a key of `kr_ray.config.kinds.METHODS`, or one that a module named in `plugins` brings."""

    def fits(self, classifier: ClassifierConfig | None, data: DataConfig | None) -> list[str]:
        """What is wrong with it beside these sections of the run (None: one that holds mistakes of its own),
        a message each."""
        return []

    def main_key(self) -> MainKey | None:
        """What `kr frontier --match-accuracy` varies of this kind; None: the method stays as it is."""
        return None


class TeacherSection(MethodSection):
    """A classifier trained on the real images, with the run's recipe."""

    kind: Literal["teacher"] = "teacher"
    epochs: int = Field(500, ge=1)
    """Passes over the real training images."""


class KnowledgeRecyclingSection(MethodSection):
    """A further student of the run's teacher and generator, at the best
    checkpoint and the tuned parameters but for `synthesis`."""

    kind: Literal["knowledge_recycling"] = "knowledge_recycling"
    synthesis: dict[str, str | int | float | bool] = {}
    """Keys of the run's `synthesis` (or of its `sampling`) that this student has otherwise."""


class FixedGeneratorSection(MethodSection):
    """As `knowledge_recycling`, but in the audit only teacher and student
    are trained anew: the generator is the run's."""

    kind: Literal["fixed_generator"] = "fixed_generator"


class ParquetSection(MethodSection):
    """A student of an exported synthetic set alone."""

    kind: Literal["parquet"] = "parquet"
    path: Location
    """A labelled set that `kr export` wrote, a file or folder."""
    epochs: int = Field(500, ge=1)
    """Passes over it."""


class ScalingConfig(Section):
    """`kr scaling`: students of more and more synthetic images, without and with the real ones."""

    scales: tuple[int, ...] = Field((1, 2, 4, 7, 10), min_length=1, max_length=32)
    """Synthetic over real training images. A set is drawn once, so that its size is what is compared."""
    seeds: int = Field(3, ge=1)
    """Students of each size, without and with the real images."""

    @model_validator(mode="after")
    def _rising(self) -> ScalingConfig:
        if min(self.scales) < 1 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(
                f"`scales` must be rising whole numbers >= 1, but got {list(self.scales)}; "
                "use [1, 2, 4, 7, 10]"
            )
        return self

    @property
    def students(self) -> int:
        return 2 * self.seeds * len(self.scales)


class StudentConfig(Section):
    """The student that is handed on: of the best checkpoint and the tuned parameters."""

    epochs: int = Field(500, ge=1)
    """Of its schedule, in the unit of `synthesis.epoch_unit`."""
    from_parquet: Location = ""
    """A labelled synthetic set that `kr export` wrote, a file or folder: train on it alone. Then a run has
    neither teacher nor generator, nor what is made with them; of the real images only validation and test
    images are shown to the student."""
    equal_compute_teacher: bool = True
    """Also train a teacher for as many gradient steps as the student."""
