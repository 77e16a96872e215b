"""The figures that stages find and reports show, as typed models.

All shares (accuracies, CAS, AUC, AOP, rates) are fractions in [0, 1]; times are seconds; counts are images
unless named otherwise. Null: not measured, or refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kr_ray.runs.artifacts import Json

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Epoch = Annotated[float, Field(ge=0)]


class Figures(BaseModel):
    """Immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class OpenFigures(Figures):
    """As `Figures`, but further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")


class Work(Figures):
    """What a training took.

    Of a student generation and labelling are included (of makers, what its images took).
    """

    cpu_seconds: Annotated[float, Field(ge=0)]
    """Of all its processes."""
    gpu_seconds: Annotated[float, Field(ge=0)]
    """GPUs times the time they were held; 0 without any."""
    images_trained: Count
    """One per image and epoch."""
    images_generated: Count | None = None
    teacher_queries: Count | None = None
    """Images that the teacher was asked about; filtering strategies count what they keep."""


class ScalingRow(Figures):
    """A student of a scaling curve."""

    scale: Annotated[int, Field(ge=1)]
    """Synthetic over real training images."""
    with_real: bool
    """Whether it was shown the real training images, too."""
    seed: Count
    """Which of the students of this size it is."""
    test_accuracy: Fraction
    val_accuracy: Fraction
    steps: Count
    work: Work | None = None


class Bound(OpenFigures):
    """What a private method proves: (epsilon, delta)-differential
    privacy (see kr_ray.privacy.ledger.Guarantee)."""

    epsilon: Annotated[float, Field(ge=0)] | None
    """Null: infinite."""
    delta: Annotated[float, Field(ge=0, lt=1)]
    unit: str = "image"
    """Whose presence is hidden."""
    group_size: Annotated[int, Field(ge=1)] = 1
    """Images of one unit, at most."""
    guarantee: bool
    """Whether it may be called one: epsilon is not absurdly large, and nobody knows the noise."""
    insecure_noise: bool = False
    """Somebody knows the noise."""
    covers: list[str] = []
    """The parts whose releases are composed."""
    uncovered: list[str] = []
    """The parts that said nothing of what they released: each makes epsilon infinite."""


class PrivacyRecord(OpenFigures):
    """What a private part released, and the guarantee of this part alone; further keys are its own constants
    (see kr_ray.dp.release.privacy_record)."""

    release: Json
    """The event, for the run's ledger (see kr_ray.privacy.accountants.event_record)."""
    guarantee: Bound
    words: str
    """The guarantee, for people."""


class Generation(OpenFigures):
    """The generation parameters that a student was trained with; further keys are the others of
    `synthesis` and of its `sampling`. Keys that are not there had their defaults, and stay away."""

    labelling: str
    view: str = "clean"
    temperature: float = 1.0
    labeller: str = "teacher"
    labellers: int = 1

    @model_serializer(mode="wrap")
    def _as_it_came(self, dump: SerializerFunctionWrapHandler) -> Json:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class AuditedKeys(OpenFigures):
    """The keys of a worst-case audit that decided its figures (`audit.worst_case`, stamped)."""

    arms: list[str]


class ClassifierPoint(OpenFigures):
    epoch: Epoch
    train_loss: float | None = None
    val_accuracy: Fraction | None = None


class GeneratorPoint(OpenFigures):
    """One epoch of a generator's training; further keys are its losses and rates."""

    epoch: Epoch


def by_network(value: Any) -> Any:
    """A generator's figures with `parameters` by network: until
    version 0.1 the two networks had a key each."""
    if isinstance(value, dict) and "parameters_g" in value:
        counts = {"generator": value["parameters_g"], "discriminator": value["parameters_d"]}
        return {key: item for key, item in value.items() if not key.startswith("parameters_")} | {
            "parameters": counts
        }
    return value


class CollapsePoint(OpenFigures):
    epoch: Epoch
    agreement: float | None
    """Share of generated images that the teacher takes for the class
    they were generated for, mean over classes."""
    diversity: float | None
    """Within-class spread of teacher features over that of real images."""
    alarm: bool


class SweptCheckpoint(OpenFigures):
    """The sweep's student of one checkpoint."""

    epoch: Count
    epochs: Count = 0
    """Length of its schedule."""
    val_cas: Fraction


class Trial(OpenFigures):
    """One trial of the tuning; further keys are the generation parameters that it was given."""

    trial: Count
    val_cas: Fraction | None
    state: str
    """`complete`, `pruned`, `failed`, ..., in any case."""
    resource: float | None = None

    @property
    def params(self) -> dict[str, float]:
        return dict(self.model_extra or {})


class Best(OpenFigures):
    """The best complete trial; further keys are its generation parameters."""

    val_cas: Fraction
    trial: Count

    @property
    def params(self) -> dict[str, float]:
        return dict(self.model_extra or {})


class ConfirmedRow(OpenFigures):
    """One candidate; further keys are its generation parameters."""

    trial: int
    """-1: the default parameters."""
    val_cas: list[Fraction]
    mean: Fraction
    sd: Annotated[float, Field(ge=0)]


class Decision(Figures):
    """Whether a finalist beats the defaults by more than the standard error of the difference."""

    trial: Count
    """The finalist of the highest mean."""
    gain: Annotated[float, Field(ge=-1, le=1)]
    """Its mean minus the defaults'."""
    standard_error: Annotated[float, Field(ge=0)]
    """Of the gain, from its spread over the seeds (pairwise) and from the number of images."""
    winner: int
    """The finalist, or -1, the defaults, unless the gain is larger than its error."""


class Confirmed(Decision):
    """The finalists and the defaults trained again with fresh seeds (see kr_ray.cluster.confirm.decide)."""

    rows: list[ConfirmedRow]


class Roc(Figures):
    fpr: list[Fraction]
    tpr: list[Fraction]

    @model_validator(mode="after")
    def _same_length(self) -> Roc:
        if len(self.fpr) != len(self.tpr):
            raise ValueError(
                f"`len(fpr) == len(tpr)` must hold, but got {len(self.fpr)} and {len(self.tpr)}; give pairs"
            )
        return self


class Attacked(Figures):
    """One attacked model."""

    auc: Annotated[float, Field(ge=0.5, le=1)]
    """max(auc_raw, 0.5), as the paper prints it."""
    auc_raw: Fraction
    aop: Fraction
    roc: Roc | None = None
    per_class: list[Fraction | None] = []


class AttackModel(OpenFigures):
    """The attack on the images of one class; further keys are what it was fitted on."""

    class_index: Count = Field(alias="class")
    kind: str
    val_auc: Fraction | None = None


class KrAudit(Figures):
    """The attack of Knowledge Recycling, section 3.6."""

    teacher: Attacked | None = None
    student: Attacked | None = None
    attack_models: list[AttackModel] = []
    shadow_models: Count
    members: Count
    non_members: Count


class Epsilon(OpenFigures):
    """Lower bounds: with `confidence`, no (epsilon, delta)-differential
    privacy below them holds. Null: not computable."""

    clopper_pearson: float | None
    one_run: float | None
    delta: float
    confidence: Fraction


class RateFigures(OpenFigures):
    """What an attack finds among pairs of a run and an audit sample (see kr_ray.privacy.rates for the
    intervals). Further keys: `refused_0.01`; of both rates clopper_pearson_ and bootstrap_low, _high."""

    tpr_at_01: Fraction | None = Field(alias="tpr_at_fpr_0.001")
    """Share of members called members where one in 1,000 non-members is; null
    if there are too few, `refused` then says so."""
    ci_low: Fraction | None
    ci_high: Fraction | None
    true_positives: Count | None
    false_positives: Count | None
    refused: str | None = None
    tpr_at_1: Fraction | None = Field(alias="tpr_at_fpr_0.01")
    ci_low_at_1: Fraction | None = Field(alias="ci_low_0.01")
    ci_high_at_1: Fraction | None = Field(alias="ci_high_0.01")
    true_positives_at_1: Count | None = Field(None, alias="true_positives_0.01")
    false_positives_at_1: Count | None = Field(None, alias="false_positives_0.01")
    auc: Fraction
    auc_low: Fraction
    auc_high: Fraction
    n_members: Count
    n_non_members: Count

    def tpr(self) -> str:
        """At 0.1 % FPR, with its counts."""
        if self.tpr_at_01 is None:
            return "–"
        return f"{self.tpr_at_01:.1%} ({self.true_positives} of {self.n_members})"


class AttackFigures(RateFigures):
    """What one attack finds among all pairs of a run and an audit sample."""

    balanced_accuracy: Fraction | None
    epsilon: Epsilon
    finest_fpr: Fraction
    roc: Roc | None = None
    """Of the headline attack only."""


class TakenFigures(Figures):
    """Of a method that takes some training images for itself (a coreset): the headline attack on the members
    that it took and on those that it left, each beside all non-members. Null: there were no such members."""

    share: Fraction
    """Of the members (pairs of a run and a sample) that were taken."""
    taken: RateFigures | None
    left: RateFigures | None


class Proven(Figures):
    """The largest bound of several attacks, corrected for being the largest
    (see kr_ray.privacy.epsilon.simultaneous_epsilon)."""

    epsilon: float | None
    """Null: none can be computed; then `attack` is null, and `group` is not there."""
    attack: str | None
    group: str | None = None
    """Of samples: `all`, or `population` or `canary`."""
    rows: Count
    """Attacks times groups: those it is the largest of."""
    delta: float
    confidence: Fraction


class ScoreAudit(Figures):
    """What attacks find in somebody's own scores (`kr audit --scores`)."""

    file: str
    form: Literal["one model", "many models", "logits"]
    models: Count
    headline: str
    """The attack chosen beforehand."""
    attacks: dict[str, dict[str, AttackFigures]]
    """By name and group."""
    proven: Proven
    remarks: list[str]
    """Sentences on what a reader must know."""


class Exposed(Figures):
    """What may be told of the list of the most exposed training images, which stays in the run directory."""

    file: str
    images: Count
    """Audited images, all of them listed."""
    beyond_chance: Count
    """Those that stand out after correction for all of them (see kr_ray.privacy.exposure)."""


SetArtefact = Literal["set", "generator"]
SetAttackName = Literal["nearest", "density", "denoising"]


class SetAttack(Figures):
    """Membership inferred from images that are handed on, no model being asked (see
    kr_ray.audits.handed_on)."""

    artefact: SetArtefact
    attack: SetAttackName
    """`denoising`: by the loss of a diffusion model's weights; else by images."""
    images: Count
    """Of a run, that were looked at; 0: the weights were."""
    canary: AttackFigures
    population: AttackFigures


class LiraArm(OpenFigures):
    """The worst-case audit of one arm: `models` runs, each trained on half of
    the canaries and half of the population samples."""

    title: str = ""
    """Of the method, in tables."""
    note: str = ""
    """What the method is, in a few words."""
    kind: str = ""
    """Of a further student, its kind; else the arm's name."""
    models: Count
    queries: Count
    headline: str
    """The attack behind `population`, `canary` and `canary_true_label`, chosen beforehand."""
    population: AttackFigures
    canary: AttackFigures
    canary_true_label: AttackFigures | None = None
    """The same attack asking for the canaries' true label; success shows
    generalisation, not memory of the given one."""
    canary_taken: TakenFigures | None = None
    """Where the method takes some training images for itself (see kr_ray.methods.taken)."""
    population_taken: TakenFigures | None = None
    true_label_share: dict[str, Fraction]
    """How often a canary's true label is predicted by models that were
    (`in`) and were not (`out`) trained on it."""
    given_label_share: dict[str, Fraction]
    attacks: dict[str, dict[str, AttackFigures]]
    canary_kind: str
    canaries: Count
    population_samples: Count
    reference_images: Count
    test_accuracy: Fraction
    test_accuracy_sd: Annotated[float, Field(ge=0)]
    """Mean and standard deviation over the runs."""
    seconds: Annotated[float, Field(ge=0)]
    sets: list[SetAttack] = []
    """Attacks on the images that the method hands on; none of methods without any."""
    exposed: Exposed | None = None
    """None of runs audited before there were such lists."""


class Histogram(Figures):
    """Shares of images by distance: `edges` [B + 1], `generated` and `test` [B]."""

    edges: list[float]
    generated: list[Fraction]
    test: list[Fraction]


class CopySpace(Figures):
    """Nearest training neighbours in one space (see kr_ray.audits.neighbours.copy_figures)."""

    threshold: float
    near_copies: Count
    near_copy_share: Fraction
    ci_low: Fraction
    ci_high: Fraction
    data_copying: float
    """Mann-Whitney z against the test images: below -2, generated images are
    nearer to the training images than test images are."""
    memorised_share: Fraction
    memorised_share_test: Fraction
    median_generated: float
    median_test: float
    histogram: Histogram


class Fidelity(Figures):
    """See kr_ray.audits.fidelity; null where refused."""

    n_real: Count
    n_generated: Count
    fid: float | None
    fid_refused: str = ""
    kid: float | None
    kid_sd: float | None
    precision: Fraction | None
    recall: Fraction | None
    density: float | None
    coverage: Fraction | None
    refused: str = ""


class Copies(Figures):
    """Generated images against the real ones; exact copies among the latter were set aside first."""

    images: Count
    train: Count
    test: Count
    quantile: Fraction
    encoder: str
    exact_copies: Count
    """Generated images that equal a training image pixel by pixel."""
    spaces: dict[Literal["pixels", "features"], CopySpace]
    fidelity: dict[Literal["generated", "test"], Fidelity]


class Tried(Figures):
    """One training of the search for equal accuracy."""

    value: float
    """Of the method's main key."""
    accuracy: Fraction
    """On validation images."""
    error: Annotated[float, Field(ge=0)]
    """Standard error of the accuracy, from the number of images."""

    def reaches(self, target: float) -> bool:
        return abs(self.accuracy - target) <= self.error


class Matched(Figures):
    """A method tuned to an accuracy on its main key (see kr_ray.audits.matching)."""

    key: str
    target: Fraction
    value: float
    accuracy: Fraction
    error: Annotated[float, Field(ge=0)]
    reached: bool
    """Whether the accuracy is the target within its standard error; else the value is the nearest of those
    tried."""
    tried: list[Tried]


class Leak(Figures):
    """What the worst-case audit found among a method's canaries, in the measure that all methods share."""

    attack: str
    chosen_before: bool
    """Whether the attack was; else it stands out among all (see kr_ray.report.verdict)."""
    false_positive_rate: Fraction | None
    """Null: too few pairs; `share` is then an AUC."""
    share: Fraction
    low: Fraction
    high: Fraction
    """95 % interval."""
    hits: Count | None
    pairs: Count | None
    ordinary: Fraction | None
    """The same rate among ordinary images."""
    epsilon: float | None
    """Lower bound at 95 %; null: not computable."""


class FrontierRow(Figures):
    """One method of the frontier; null: not measured yet."""

    name: str
    kind: str
    title: str
    note: str
    handed_on: bool
    """False of the teacher, which stays with the images: a comparison and never a recommendation."""
    accuracy: Fraction | None
    """On test images, trained once on the whole training split."""
    accuracy_low: Fraction | None
    accuracy_high: Fraction | None
    """95 % interval over the test images."""
    audited_accuracy: Fraction | None
    audited_sd: float | None
    """Mean and standard deviation over the audit's runs, which lack half of the canaries and have the others
    mislabeled."""
    leak: Leak | None
    runs: Count
    """Of the audit, of this method, that were attacked."""
    missing: list[int]
    """Numbers of the audit's runs that this method has not been trained in."""
    bound: Bound | None
    """What a private method proves."""
    alarm: str
    """Where the audit found more than the bound allows, what is wrong; else empty."""
    cpu_seconds: Annotated[float, Field(ge=0)] | None
    gpu_seconds: Annotated[float, Field(ge=0)] | None
    """Of making one such classifier with all that it builds on; a stage that counts no processor time, with
    its wall time."""
    folders: list[str]
    """Of the run, that hold what the method leaves: weights, sets, checkpoints."""
    matched: Matched | None
    unmatched: str
    """Where equal accuracy was asked for and the method stayed as it is, why; else empty."""
    dominated_by: list[str] = []
    """Methods at least as accurate that leak no more and prove no less, one of the three being better; by
    measured values."""


class Frontier(Figures):
    """Accuracy against leak of several methods, audited with the same canaries in the same runs."""

    rows: list[FrontierRow]
    models: Count
    """Runs that the audit is made of when it is whole."""
    asked_models: Count
    """Before a budget cut them."""
    leak_limit: Fraction | None
    false_positive_rate: Fraction | None
    """Of all rows' leaks: the finest that every row's counts bear."""
    match: str
    """Whose accuracy the methods were tuned to, in words; empty: they were not."""
    recommended: str
    """Name of the most accurate method whose leak lies below the limit; empty: none, or no limit."""
    settings: list[str]
    """What the frontier changed in the configuration, as arguments of --set."""

    @property
    def partial(self) -> bool:
        return any(row.missing or row.accuracy is None for row in self.rows)
