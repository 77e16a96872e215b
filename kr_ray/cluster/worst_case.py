"""The worst-case audit on Ray: whole pipelines trained again, one
task per run, and attacked by what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from kr_ray.audits.design import check_batches, design_audit
from kr_ray.audits.exposed import exposed_images, write_exposed
from kr_ray.audits.handed_on import ARTEFACTS, STATISTICS
from kr_ray.audits.outliers import held_out_losses
from kr_ray.audits.runs import AuditPlan, RunScores
from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError
from kr_ray.config.run import OWN_ARMS
from kr_ray.data.store import SOURCES_FILE, SPLITS_FILE, load_sources, load_stored_splits
from kr_ray.methods.registry import method_of
from kr_ray.privacy.arrays import BoolArray, FloatArray
from kr_ray.privacy.attacks import ByAttack, audit_arm, statistic_figures, taken_figures
from kr_ray.privacy.scores import ReferenceScores, SampleScores
from kr_ray.runs.artifacts import ArtifactError, read_json, read_own_json, write_json
from kr_ray.runs.figures import (
    AuditedKeys,
    Exposed,
    LiraArm,
    SetArtefact,
    SetAttack,
    SetAttackName,
    TakenFigures,
)
from kr_ray.runs.progress import report_progress
from kr_ray.runs.results import ClassifierResult, Result, Results, WorstCaseResult
from kr_ray.synthesis.student_set import StudentSpec

HELD_OUT_REPEATS = 2
FEWEST_MODELS = 4


def plan_audit(run: Path, folder: Path, config: Config, student: StudentSpec, digest: str) -> AuditPlan:
    """Choose who is audited. For outliers this trains models, whose losses are kept in `folder`.

    Raises:
        kr_ray.data.checks.DataError: the set cannot bear as many audit samples.
    """
    splits, keys = load_stored_splits(run / SPLITS_FILE), config.audit.worst_case
    losses = _held_out(run, folder, config, digest) if keys.canary_kind == "outlier" else None
    design = design_audit(splits, keys, derive_seed(config.seed, "audit design"), losses)
    check_batches(config, len(splits.train), len(design.samples))
    return AuditPlan(run=run, folder=folder, config=config, student=student, design=design, digest=digest)


def _held_out(run: Path, folder: Path, config: Config, digest: str) -> NDArray[np.float64]:
    path = folder / "held_out_losses.json"
    stamp = [digest, config.seed, config.classifier.stamp(), config.teacher.stamp()]
    if read_own_json(path).get("stamp") != stamp:
        work = [(run, config, repeat) for repeat in range(HELD_OUT_REPEATS)]
        losses = run_tasks(
            "held-out losses", held_out_losses, work, config.cluster.trial, config.cluster.max_retries
        )
        write_json(path, {"stamp": stamp, "losses": np.mean(losses, axis=0).tolist()})
    return np.array(read_json(path)["losses"])


def train_runs(plan: AuditPlan, numbers: Sequence[int]) -> None:
    """Train the runs that have no scores yet, as many at a time as the cluster has room for."""
    cluster = plan.config.cluster

    def work(number: int) -> None:
        _train_one_run(plan, number)

    missing = [(number,) for number in numbers if plan.missing(number)]
    for number in set(numbers) - {number for (number,) in missing}:
        report_progress(plan.folder, f"run_{number:03d}", 1.0)
    run_tasks("audit run", work, missing, cluster.trial, cluster.max_retries)


def _train_one_run(plan: AuditPlan, number: int) -> None:
    def tell(share: float, what: str) -> None:
        report_progress(plan.folder, f"run_{number:03d}", share, f"run {number}: {what}")

    plan.train(number, tell)
    tell(1.0, "done")


# --- cost ---------------------------------------------------------------------------------------------------


def stage_seconds(plan: AuditPlan, results: Results) -> float | None:
    """Seconds of one run, from what the stages of the audited run took; None where one that is needed has not
    finished. A part of unknown cost takes as long as the stage of its name."""
    parts = {
        (part.name, *(part.costs or (part.name, 1.0))): part
        for arm in plan.arms
        for part in plan.parts(0, arm)
    }
    stages, seconds = dict(results.items()), 0.0
    for _, stage, share in parts:
        if stage not in stages:
            return None
        seconds += share * _training_s(stages[stage])
    return seconds


def _training_s(result: Result) -> float:
    """Without the start of Ray's workers, which the runs of an audit share, where the stage tells it."""
    return (result.seconds if isinstance(result, ClassifierResult) else 0.0) or result.wall_s


def run_seconds(plan: AuditPlan, results: Results) -> tuple[float, str]:
    """Seconds of one run and how they are known: from the audited run's stages, or
    else from the first two runs, which this trains."""
    if seconds := stage_seconds(plan, results):
        return seconds, "from this run's stages"
    train_runs(plan, (0, 1))
    measured = [_scores(plan, number, arm).seconds for number in (0, 1) for arm in plan.arms]
    return sum(measured) / 2, "measured on the first two"


def describe_cost(config: Config, seconds: float, source: str) -> str:
    """What the audit takes, for the person who starts it."""
    keys, trial = config.audit.worst_case, config.cluster.trial
    models = keys.models
    available = ray.cluster_resources()
    slots = [
        available.get(kind.upper(), 0.0) / amount for kind, amount in trial.model_dump().items() if amount
    ]
    at_once = max(1, min(models, *(int(slot) for slot in slots))) if slots else models
    device, amount = ("GPU", trial.gpu) if trial.gpu else ("core", trial.cpu)
    return (
        f"worst-case audit: {models} runs of {', '.join(keys.arms)} take about "
        f"{models * seconds * amount / 3600:.2f} {device} hours ({source}: {seconds:.0f} s a run), some "
        f"{-(-models // at_once) * seconds / 60:.0f} min with {at_once} at a time"
    )


def models_within(budget_hours: float, seconds: float, config: Config) -> int:
    """The even number of runs, at most `audit.worst_case.models`, that fit into so many device hours.

    Raises:
        ConfigError: not even four fit.
    """
    amount = config.cluster.trial.gpu or config.cluster.trial.cpu
    run_hours = seconds * amount / 3600
    fitting = int(budget_hours / run_hours) // 2 * 2
    if fitting < FEWEST_MODELS:
        raise ConfigError(
            f"`--budget >= {FEWEST_MODELS * run_hours:.3g}` device hours ({FEWEST_MODELS} runs of "
            f"{seconds:.0f} s) must hold, but got {budget_hours:g}; raise it, or shorten what is trained"
        )
    return min(fitting, config.audit.worst_case.models)


# --- attack -------------------------------------------------------------------------------------------------


def audit_worst_case(plan: AuditPlan, results: Results, notice: Callable[[str], None]) -> WorstCaseResult:
    """Train all runs and attack every arm. What it will take is told before."""
    keys = plan.config.audit.worst_case
    notice(describe_cost(plan.config, *run_seconds(plan, results)))
    train_runs(plan, range(keys.models))
    lira = attack_arms(plan, dict.fromkeys(keys.arms, keys.models))
    return WorstCaseResult(
        audit=AuditedKeys.model_validate(keys.stamp()), excluded_copies=plan.design.excluded, lira=lira
    )


def attack_arms(plan: AuditPlan, models: Mapping[str, int]) -> dict[str, LiraArm]:
    """Attack each arm's first so many runs, an even number of them."""
    work, cluster = [(plan, arm, count) for arm, count in models.items()], plan.config.cluster
    attacked = (
        run_tasks("worst-case attack", _attack, work, cluster.trial, cluster.max_retries) if work else []
    )
    return dict(zip(models, attacked, strict=True))


def missing_runs(plan: AuditPlan) -> dict[str, list[int]]:
    """For each arm the numbers of the runs that it has not been trained in."""
    every = range(plan.config.audit.worst_case.models)
    absent = {number: plan.missing(number) for number in every}
    return {arm: [number for number in every if arm in absent[number]] for arm in plan.arms}


def whole_pairs(missing: Sequence[int], models: int) -> int:
    """How many of the first runs can be attacked before any of the missing ones: an even number, 0 where they
    are fewer than an audit needs. (The first m runs are a design of their own for every even m.)"""
    first = min(missing, default=models) // 2 * 2
    return first if first >= FEWEST_MODELS else 0


def _attack(plan: AuditPlan, arm: str, models: int) -> LiraArm:
    """Figures of one arm: what the attack finds, beside what the models are worth."""
    config, design = plan.config, plan.design
    runs = [_scores(plan, number, arm) for number in range(models)]
    canary, population, reference = collect_scores(plan, runs)
    accuracies, method = [run.test_accuracy for run in runs], method_of(arm, config)
    seed = derive_seed(config.seed, "worst case") % 2**32
    found = audit_arm(canary, population, reference, seed)
    canary_taken, population_taken = _of_taken(runs, canary, population, seed)
    return LiraArm(
        **vars(found) | {"attacks": _without_curves(found.attacks)},
        canary_taken=canary_taken,
        population_taken=population_taken,
        title=method.title if arm in OWN_ARMS else f"{method.title}: {arm}",
        note=method.note,
        kind=arm if arm in OWN_ARMS else config.students[arm].kind,
        canary_kind=config.audit.worst_case.canary_kind,
        canaries=len(design.canaries),
        population_samples=len(design.population),
        reference_images=len(design.reference),
        test_accuracy=float(np.mean(accuracies)),
        test_accuracy_sd=float(np.std(accuracies, ddof=1)),
        seconds=float(sum(run.seconds for run in runs)),
        sets=_attack_sets(plan, arm, models),
        exposed=_list_exposed(plan, arm, {"canary": canary, "population": population}),
    )


def _without_curves(attacks: ByAttack) -> ByAttack:
    """A curve is drawn of the headline attack alone: twelve attacks' curves
    would make report.json ten times as long."""
    return {
        name: {group: found.model_copy(update={"roc": None}) for group, found in groups.items()}
        for name, groups in attacks.items()
    }


def _of_taken(
    runs: Sequence[RunScores], canary: SampleScores, population: SampleScores, seed: int
) -> tuple[TakenFigures | None, TakenFigures | None]:
    """What is found of canaries and of population samples that the method took for itself and of those that
    it left; None of methods that use all images alike."""
    masks = [run.taken for run in runs if run.taken is not None]
    if len(masks) < len(runs):
        return None, None
    taken, first = np.stack(masks), canary.logits.shape[1]
    return (
        taken_figures(canary, taken[:, :first], seed),
        taken_figures(population, taken[:, first:], seed),
    )


def _attack_sets(plan: AuditPlan, arm: str, models: int) -> list[SetAttack]:
    """The images that the arm hands on, attacked; nothing where not every run has scores of them."""
    runs = [scores for number in range(models) if (scores := plan.set_scores(number, arm)) is not None]
    if not runs or len(runs) < models or len({len(run.images) for run in runs}) > 1:
        return []
    values, member = np.stack([run.statistics for run in runs]), plan.design.member(models)
    found = [
        _attack_set(plan, values[:, index, k], member, artefact, name, int(runs[0].images[index]))
        for index, artefact in enumerate(ARTEFACTS[: values.shape[1]])
        for k, name in enumerate(STATISTICS)
    ]
    if all(len(run.known) for run in runs):
        known = np.stack([run.known for run in runs])
        found.append(_attack_set(plan, known, member, "generator", "denoising", 0))
    return found


def _attack_set(
    plan: AuditPlan,
    statistic: FloatArray,
    member: BoolArray,
    artefact: SetArtefact,
    attack: SetAttackName,
    images: int,
) -> SetAttack:
    """One statistic [models, samples], of canaries and then of the population."""
    first, seed = len(plan.design.canaries), derive_seed(plan.config.seed, "set attack") % 2**32
    return SetAttack(
        artefact=artefact,
        attack=attack,
        images=images,
        canary=statistic_figures(statistic[:, :first], member[:, :first], seed),
        population=statistic_figures(statistic[:, first:], member[:, first:], seed),
    )


def _list_exposed(plan: AuditPlan, arm: str, groups: dict[str, SampleScores]) -> Exposed:
    """Write the list of the arm's most exposed images beside its
    runs; returns what the report may say of it."""
    class_names = load_stored_splits(plan.run / SPLITS_FILE).class_names
    images = exposed_images(groups, plan.design.samples, load_sources(plan.run / SOURCES_FILE), class_names)
    return write_exposed(plan.folder / f"most_exposed_{arm}.csv", images)


def collect_scores(
    plan: AuditPlan, runs: Sequence[RunScores]
) -> tuple[SampleScores, SampleScores, ReferenceScores]:
    """The runs' answers as the attacks read them: canaries, population, reference."""
    design, splits = plan.design, load_stored_splits(plan.run / SPLITS_FILE)
    logits, member, first = (
        np.stack([run.samples for run in runs]),
        design.member(len(runs)),
        len(design.canaries),
    )
    true = splits.train.labels.numpy()[design.samples]
    canary = SampleScores(logits[:, :first], design.given_labels, true[:first], member[:, :first])
    population = SampleScores(logits[:, first:], true[first:], true[first:], member[:, first:])
    labels = splits.test.labels.numpy()[design.reference]
    return canary, population, ReferenceScores(np.stack([run.reference for run in runs]), labels)


def _scores(plan: AuditPlan, number: int, arm: str) -> RunScores:
    scores = plan.scores(number, arm)
    if scores is None:
        raise ArtifactError(
            f"{plan.scores_file(number, arm)} is missing or of another audit; run the same command again"
        )
    return scores
