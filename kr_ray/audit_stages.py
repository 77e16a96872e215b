"""The worst-case audit and the frontier as stages: whole methods trained again with and without canaries, and
attacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ConfigError
from kr_ray.config.file import with_overrides
from kr_ray.config.run import OWN_ARMS
from kr_ray.runs.artifacts import ArtifactError
from kr_ray.runs.figures import AuditedKeys, LiraArm, Matched
from kr_ray.runs.results import (
    CHECKPOINTS,
    DATA,
    GENERATOR,
    GUARANTEE,
    TUNING,
    WORST_CASE,
    ClassifierResult,
    FrontierResult,
    Result,
    WorstCaseResult,
)
from kr_ray.stages import StageRunner

if TYPE_CHECKING:
    from kr_ray.audits.runs import AuditPlan
    from kr_ray.methods.interface import Site
    from kr_ray.report.frontier import Trained
    from kr_ray.synthesis.student_set import StudentSpec


@dataclass(frozen=True, kw_only=True)
class FrontierWork:
    """What a frontier that is being made is told beside the configuration.

    Attributes:
        settings: what it has changed there, as arguments of --set.
        asked_models: runs of the audit before a budget cut them.
        match: whose accuracy the methods were tuned to, in words.
        matched: methods that were tuned; unmatched: those that were not, and why.
        missing: numbers of the runs that a method lacks; {} where the audit is whole.
    """

    settings: list[str]
    asked_models: int
    match: str = ""
    matched: dict[str, Matched] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[int]] = field(default_factory=dict)


class AuditStages(StageRunner):
    """A run as a place where methods are trained, and their audit."""

    making: FrontierWork | None = None

    def site(self) -> Site:
        """This run as a place where parts are trained."""
        from kr_ray.cluster.stream import student_images
        from kr_ray.methods.interface import Site

        c = self.config
        images = student_images(c.cluster, f"{c.name}_student")
        return Site(path=self.run.path, config=c, seed=c.seed, student=self.final_spec(), open_set=images)

    def final_spec(self) -> StudentSpec:
        """Best checkpoint, tuned generation parameters, the whole schedule; what
        is not known yet is the last and the default."""
        from kr_ray.synthesis.student_set import StudentSpec

        c, generator = self.config, self.results.get(GENERATOR)
        sweep, tuned = self.results.get(CHECKPOINTS), self.results.get(TUNING)
        last = generator.checkpoints[-1] if generator else c.generator.epochs
        synthesis = c.synthesis.with_values(tuned.chosen) if tuned else c.synthesis
        best = sweep.best_epoch if sweep else last
        return StudentSpec(
            c.generator, best, synthesis, c.student.epochs, derive_seed(c.seed, "final student")
        )

    # --- the worst case ---

    def worst_case(self, budget_hours: float | None = None) -> Result:
        """The worst-case audit of `audit.worst_case.arms`, after or without the
        other stages, and the report of what there is then.

        Args:
            budget_hours: device hours (GPU, or CPU cores where runs get no GPU) that all runs
                may take; the number of runs is cut to fit.

        Raises:
            ConfigError: the budget is too small for any audit.
            ArtifactError: an arm needs a checkpoint that is not there.
        """
        self.run_stage(self.stages["data"])
        self.find_finished()
        missing = [name for name in self.stages["worst_case"].after if name not in self.results]
        if missing:
            raise ArtifactError(
                f"an arm of {', '.join(self._audited().arms)} needs this run's {missing[0]}, which has "
                f"not been trained; run `kr {missing[0]}` first"
            )
        if budget_hours is not None:
            self.cut_to(budget_hours)
        self.run_stage(self.stages["worst_case"])
        return self.run_stage(self.stages["report"])

    def _worst_case(self, folder: Path) -> WorstCaseResult:
        """Zhao & Zhang 2025: whole pipelines trained again with and without canaries, and attacked."""
        from kr_ray.cluster.worst_case import audit_worst_case

        return audit_worst_case(self._audit_plan(folder), self.results, self.watcher.notice)

    def _worst_case_after(self) -> Sequence[str]:
        from kr_ray.methods.registry import method_of

        taken = [stage for arm in self._audited().arms for stage in method_of(arm, self.config).takes_over]
        return ("data", *dict.fromkeys(taken))

    def _audited(self) -> AuditedKeys:
        """The keys of the worst-case audit.

        `kr audit --arms` is not in the file: without arms in the
        configuration, those of the audit that was made are meant.
        """
        keys, done = self.config.audit.worst_case, self.run.latest("worst_case")
        if not done or keys.arms or set(done["audit"]["arms"]) - {*OWN_ARMS, *self.config.students}:
            return AuditedKeys.model_validate(keys.stamp())
        return AuditedKeys.model_validate(done["audit"])

    def _worst_case_inputs(self) -> list[Any]:
        """What decides the arms' numbers beside the stages they build on."""
        from kr_ray.privacy.scores import ATTACKS_VERSION

        c, keys = self.config, self._audited()
        sections: list[Any] = [c.seed, c.classifier, c.teacher, keys.model_dump(mode="json"), ATTACKS_VERSION]
        if set(keys.arms) - {"teacher"}:
            spec = self.final_spec()
            sections += [spec.checkpoint_epoch, spec.synthesis, spec.epochs]
        if "kr" in keys.arms:
            sections += [c.generator, *([c.privacy] if c.privacy else [])]
        return sections + [c.students[arm] for arm in keys.arms if arm in c.students]

    def _audit_plan(self, folder: Path) -> AuditPlan:
        from kr_ray.cluster.worst_case import plan_audit

        return plan_audit(self.run.path, folder, self.config, self.final_spec(), self.results[DATA].digest)

    def cut_to(self, budget_hours: float) -> None:
        """Lower `audit.worst_case.models` to what the budget bears."""
        from kr_ray.cluster.worst_case import models_within, run_seconds

        stage = self.stages["worst_case"]
        folder = self.run.begin(stage.name, stage.name)
        self.connect()
        with self.watched(stage, folder):
            seconds, _ = run_seconds(self._audit_plan(folder), self.results)
        keys = self.config.audit.worst_case
        models = models_within(budget_hours, seconds, self.config)
        if models < keys.models:
            self.watcher.notice(f"--budget {budget_hours:g}: {models} runs instead of {keys.models}")
        audit = self.config.audit.model_copy(
            update={"worst_case": keys.model_copy(update={"models": models})}
        )
        self.config = self.config.model_copy(update={"audit": audit})

    # --- the frontier ---

    def method_stage(self, method: str) -> str:
        """The stage that trains a method, named as an arm of the audit, on the whole training split."""
        own = {"teacher": "teacher", "kr": "student", "fixed_generator": "student"}
        return own.get(method, f"student_{method}")

    def begin_worst_case(self) -> AuditPlan:
        """The audit with the scores that its runs have left, whatever has become of it since."""
        self.connect()
        return self._audit_plan(self.run.begin("worst_case", "worst_case"))

    def _frontier_config(self) -> Config | None:
        """With all that the frontier has changed: the one that is being made, or the one that was made last;
        None where there is none, or none that fits the configuration any more."""
        if self.making is not None:
            return self.config
        kept = self.run.latest("frontier")
        try:
            return with_overrides(self.config, kept["frontier"]["settings"]) if kept else None
        except ConfigError:
            return None

    def _frontier_inputs(self) -> list[Any]:
        """All that decides its numbers; of a part of one also which runs there are."""
        from kr_ray.privacy.scores import ATTACKS_VERSION

        c = self._frontier_config()
        if c is None:
            return ["none"]
        arms = c.audit.worst_case.arms
        kept = self.run.latest("frontier")
        rows = kept["frontier"]["rows"] if kept else []
        state = {row["name"]: [row["missing"], row["accuracy"] is not None] for row in rows}
        if (making := self.making) is not None:
            state = {
                arm: [making.missing.get(arm, []), self.method_stage(arm) in self.results] for arm in arms
            }
        base = [c.seed, c.classifier, c.teacher, c.generator, c.synthesis, c.checkpoints, c.tuning, c.student]
        students = [c.students[arm] for arm in arms if arm in c.students]
        return [*base, *students, c.audit.worst_case, c.frontier, state, ATTACKS_VERSION]

    def _frontier(self, folder: Path) -> FrontierResult:
        """Every method's accuracy, cost and guarantee beside what the worst-case audit found."""
        from kr_ray.report.frontier import frontier_of

        making, keys = self.making, self.config.audit.worst_case
        if making is None:
            raise ConfigError("`kr frontier` must make the frontier; give it the configuration")
        return FrontierResult(
            frontier=frontier_of(
                trained=[self._trained(arm) for arm in keys.arms],
                lira=self._attacked(making.missing),
                missing=making.missing,
                matched=making.matched,
                unmatched=making.unmatched,
                test_images=self.results[DATA].test,
                models=keys.models,
                asked_models=making.asked_models,
                leak_limit=self.config.frontier.leak_limit,
                match=making.match,
                settings=making.settings,
            )
        )

    def _attacked(self, missing: Mapping[str, Sequence[int]]) -> dict[str, LiraArm]:
        """The whole audit, or what can be attacked of a part of one."""
        from kr_ray.cluster.worst_case import attack_arms, whole_pairs

        if not missing and (whole := self.results.get(WORST_CASE)):
            return whole.lira
        plan, keys = self.begin_worst_case(), self.config.audit.worst_case
        models = {arm: whole_pairs(missing.get(arm, []), keys.models) for arm in keys.arms}
        return attack_arms(plan, {arm: count for arm, count in models.items() if count})

    def _trained(self, arm: str) -> Trained:
        from kr_ray.methods.registry import method_of
        from kr_ray.report.frontier import Trained

        method, stage, found = method_of(arm, self.config), self.method_stage(arm), dict(self.results.items())
        result = found.get(stage)
        parts = method.parts(self.site(), stage) if arm not in OWN_ARMS else ()
        own = [stage, "generator"] if stage == "student" else [stage]
        promise = self.results.get(GUARANTEE)
        return Trained(
            name=arm,
            kind=arm if arm in OWN_ARMS else self.config.students[arm].kind,
            title=method.title if arm in OWN_ARMS else f"{method.title}: {arm}",
            note=method.note,
            result=result if isinstance(result, ClassifierResult) else None,
            stages=[found[name] for name in sorted(self.ancestors(stage) - {"data"}) if name in found],
            folders=[part.name for part in parts] or own,
            on_gpu=self.config.cluster.train.gpu > 0,
            promised=promise.bounds.get("training") if promise and arm == "kr" else None,
        )
