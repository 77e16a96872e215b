"""`kr frontier`: every method trained once, tuned to equal accuracy where asked, audited with the same
canaries in the same runs, and put into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kr_ray.audit_stages import FrontierWork
from kr_ray.config import Config, ConfigError, MainKey
from kr_ray.config.file import with_overrides
from kr_ray.config.kinds import METHODS
from kr_ray.config.plugins import plugin_sections
from kr_ray.config.run import OWN_ARMS
from kr_ray.pipeline import Pipeline
from kr_ray.runs.figures import Matched
from kr_ray.runs.results import MATCHING, ClassifierResult, MatchingResult, Result
from kr_ray.stages import Stage

if TYPE_CHECKING:
    from pathlib import Path


def frontier_settings(config: Config) -> list[str]:
    """What the frontier changes in the configuration, as arguments of --set: methods that `students` does not
    name, with their kind's defaults, and the arms of the audit.

    Raises:
        ConfigError: a method that is neither known nor a kind, or a `match_method` that is none of them.
    """
    methods = config.frontier.methods or ("teacher", "kr", *config.students)
    kinds = METHODS | plugin_sections(config.plugins).methods
    known = (*OWN_ARMS, *config.students)
    if unknown := [name for name in methods if name not in (*known, *kinds)]:
        raise ConfigError(
            f"`--methods` must be among {', '.join(dict.fromkeys((*known, *kinds)))}, but got "
            f"{', '.join(unknown)}; correct it, or add it to `students`"
        )
    if (named := config.frontier.match_method) and named not in methods:
        raise ConfigError(
            f"`--match-accuracy` must be a number or one of the methods ({', '.join(methods)}), but got "
            f"{named!r}; correct it"
        )
    if config.privacy and (config.frontier.match_accuracy or config.frontier.match_method):
        raise ConfigError(
            "`--match-accuracy` must be left out of a run with `privacy`, for this search looks at scores "
            "of validation images without noise; remove one of the two"
        )
    added = [f"students.{name}.kind={name}" for name in methods if name not in known]
    named = f"[{', '.join(methods)}]"
    return [*added, f"audit.worst_case.arms={named}", f"frontier.methods={named}"]


def make_frontier(
    pipeline: Pipeline, settings: Sequence[str], *, budget_hours: float | None, so_far: bool
) -> Result:
    """All of the frontier that is not there yet, and the report.

    Args:
        pipeline: of a configuration with `settings` in it.
        settings: see `frontier_settings`, and what the person asked for beside.
        budget_hours: device hours that the audit's runs may take; their number is cut to fit.
        so_far: train nothing and attack what there is.
    """
    asked = pipeline.config.audit.worst_case.models
    pipeline.run_stage(pipeline.stages["data"])
    pipeline.run_missing(())
    if not so_far:
        pipeline.watcher.notice(_what_follows(pipeline.config))
    matched, unmatched, match = _match(pipeline, so_far)
    tuned = [text for name, found in matched.items() for text in _tuned(pipeline.config, name, found)]
    pipeline.change_config(with_overrides(pipeline.config, tuned))
    missing: dict[str, list[int]] = {}
    if so_far:
        from kr_ray.cluster.worst_case import missing_runs

        missing = missing_runs(pipeline.begin_worst_case())
    else:
        _train_and_audit(pipeline, budget_hours)
    models = pipeline.config.audit.worst_case.models
    pipeline.making = FrontierWork(
        settings=[*settings, *tuned, f"audit.worst_case.models={models}"],
        asked_models=asked,
        match=match,
        matched=matched,
        unmatched=unmatched,
        missing=missing if any(missing.values()) else {},
    )
    pipeline.run_stage(pipeline.stages["frontier"])
    return pipeline.run_stage(pipeline.stages["report"])


def _what_follows(config: Config) -> str:
    keys = config.audit.worst_case
    aim = config.frontier.match_accuracy or config.frontier.match_method
    searched = ", ".join(_searched(config)[0]) if aim else ""
    tuned = (
        f"up to {config.frontier.match_trainings} times to find {aim} ({searched}), then " if searched else ""
    )
    return (
        f"frontier of {', '.join(keys.arms)}: each is trained {tuned}once on the whole set, then again in "
        f"{keys.models} runs of the audit; what those cost is told before they start"
    )


def _train_and_audit(pipeline: Pipeline, budget_hours: float | None) -> None:
    """Every method on the whole set, then all runs."""
    arms = pipeline.config.audit.worst_case.arms
    promise = ["guarantee"] if "kr" in arms and pipeline.config.privacy else []
    pipeline.run_missing([*dict.fromkeys(pipeline.method_stage(arm) for arm in arms), *promise])
    if budget_hours is not None:
        pipeline.cut_to(budget_hours)
    pipeline.run_stage(pipeline.stages["worst_case"])


# --- equal accuracy -----------------------------------------------------------------------------------------


def _match(pipeline: Pipeline, so_far: bool) -> tuple[dict[str, Matched], dict[str, str], str]:
    """Methods that were tuned, why others were not, and to whose accuracy."""
    keys = pipeline.config.frontier
    if keys.match_accuracy is None and not keys.match_method:
        return {}, {}, ""
    searched, unmatched = _searched(pipeline.config)
    match = keys.match_method or f"{keys.match_accuracy:g}"
    if keys.match_method and not so_far:
        pipeline.run_missing([pipeline.method_stage(keys.match_method)])
    if not searched:
        return {}, unmatched, match
    stage = matching_stage(pipeline, searched)
    if so_far:
        found = pipeline.results[MATCHING] if pipeline.take_over(stage) else None
        return (found.matched if found else {}), unmatched, match
    return pipeline.run_stage(stage).matched, unmatched, match


def _searched(config: Config) -> tuple[dict[str, MainKey], dict[str, str]]:
    """The methods with a main key, by name, and why the others stay as they are."""
    searched: dict[str, MainKey] = {}
    unmatched: dict[str, str] = {}
    for name in config.audit.worst_case.arms:
        key = config.students[name].main_key() if name in config.students else None
        if name == config.frontier.match_method:
            unmatched[name] = "the others were tuned to its accuracy"
        elif key is None:
            unmatched[name] = "has no key that trades accuracy, so it stays as it is"
        else:
            searched[name] = key
    return searched, unmatched


def _tuned(config: Config, name: str, found: Matched) -> list[str]:
    from kr_ray.cluster.matching import main_key_settings

    key = config.students[name].main_key()
    return [] if key is None else main_key_settings(name, key, found.value)


def matching_stage(pipeline: Pipeline, searched: Mapping[str, MainKey]) -> Stage[MatchingResult]:
    """The search for equal accuracy of all methods; trainings of an earlier search are found again."""
    c, keys = pipeline.config, pipeline.config.frontier

    def target() -> float:
        if keys.match_accuracy is not None:
            return keys.match_accuracy
        result = dict(pipeline.results.items())[pipeline.method_stage(keys.match_method)]
        assert isinstance(result, ClassifierResult)
        return result.val_accuracy

    def work(folder: Path) -> MatchingResult:
        from kr_ray.cluster.matching import Matching, match_methods

        matching = Matching(
            run=pipeline.run.path,
            folder=folder,
            config=c,
            student=pipeline.final_spec(),
            target=target(),
            digest=pipeline.prints["data"],
        )
        return MatchingResult(matched=match_methods(matching, searched))

    sections = [c.students[name] for name in searched]
    named = [pipeline.method_stage(keys.match_method)] if keys.match_method else []
    aim = [keys.match_accuracy, keys.match_method, keys.match_trainings]
    return Stage(
        key=MATCHING,
        after=["data", *named],
        inputs=lambda: [c.seed, c.classifier, c.teacher, c.generator, sorted(searched), *sections, *aim],
        work=work,
        units=lambda: len(searched),
        resumes=True,
    )
