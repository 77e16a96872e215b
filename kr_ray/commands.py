"""What each command of `kr` does with its parsed arguments; each returns the exit
code. Imports torch and ray where they are needed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kr_ray.config import Config, ConfigError
from kr_ray.config.file import load_config
from kr_ray.display import Display, Grid
from kr_ray.interruption import Interruption
from kr_ray.masking import masked
from kr_ray.runs.storage import local_copy, storage_path

if TYPE_CHECKING:  # they import what a wrong configuration must not wait for
    from kr_ray.pipeline import Pipeline
    from kr_ray.runs.artifacts import RunDirectory

FAILURE = 1


@contextmanager
def _pipeline(parsed: argparse.Namespace, config: Config) -> Iterator[Pipeline]:
    """The pipeline of a configuration, its run locked and shown, for as long as the block runs."""
    from kr_ray.pipeline import Pipeline

    interruption: Interruption = parsed.interruption
    with Display() as display:
        pipeline = Pipeline(config, display)
        with interruption.last_words(partial(_say_interrupted, pipeline.run)), pipeline:
            yield pipeline


def _say_interrupted(run: RunDirectory) -> None:
    """In the run's status, if it is this process's; that of a run which another one works on is left
    alone."""
    from kr_ray.runs.artifacts import read_own_json

    status = read_own_json(run / "status.json")
    ours = (status.get("host"), status.get("pid")) == (socket.gethostname(), os.getpid())
    if ours and status.get("state") != "finished":
        run.set_status(state="interrupted", error="", note="")


def run(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    from kr_ray.report.printed import print_summary

    with _pipeline(parsed, config) as pipeline:
        result = pipeline.report() if parsed.reports_only else pipeline.run_until(parsed.stage)
        results = pipeline.results
    print_summary(config, parsed.stage, results, result)
    return 0


def _check_output(option: str, path: Path | None, others: Mapping[str, Path]) -> None:
    """Before any work: the result must not take the place of a folder or of another of the command's files.

    Raises:
        ConfigError: it would.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"`{option}` must name a file, but got the folder {path}; add a file name")
    for name, other in others.items():
        if path.absolute() == other.absolute() or (path.exists() and other.exists() and path.samefile(other)):
            raise ConfigError(
                f"`{option}` must be another file than {name}, but got {path} for both; give it another name"
            )


def audit(parsed: argparse.Namespace) -> int:
    """A run's own attack, with `--arms` the worst-case audit, with `--scores` somebody's own scores."""
    of_audit = [f"--{key}" for key in ("models", "budget") if getattr(parsed, key) is not None]
    of_run = [*(["--arms"] if parsed.arms is not None else []), *of_audit]
    if (parsed.config is None) == (parsed.scores is None):
        raise ConfigError("`kr audit` takes either a configuration or --scores FILE; give one of them")
    if parsed.scores is not None:
        if of_run:
            raise ConfigError(
                f"`{', '.join(of_run)}` belong to a run's audit, but got "
                f"--scores {parsed.scores}; remove them"
            )
        return _audit_scores(parsed)
    if parsed.json is not None:
        raise ConfigError("`--json` belongs to --scores; a run's figures are in its report.json")
    if parsed.arms is not None:
        return _audit_worst_case(parsed)
    if of_audit:
        raise ConfigError(
            f"`{', '.join(of_audit)}` belong to the worst-case audit; say "
            "what to audit, as in --arms teacher,kr"
        )
    return run(parsed)


def _audit_worst_case(parsed: argparse.Namespace) -> int:
    if parsed.budget is not None and not parsed.budget > 0:
        raise ConfigError(f"`--budget > 0` must hold, but got {parsed.budget}; give device hours")
    models = [] if parsed.models is None else [f"audit.worst_case.models={parsed.models}"]
    config = load_config(parsed.config, [*parsed.set, f"audit.worst_case.arms=[{parsed.arms}]", *models])
    if not config.audit.worst_case.arms:
        raise ConfigError("`--arms` must name at least one arm; use --arms teacher,kr")
    from kr_ray.report.printed import print_summary

    with _pipeline(parsed, config) as pipeline:
        result = pipeline.worst_case(parsed.budget)
        results = pipeline.results
    print_summary(config, "report", results, result)
    return 0


def frontier(parsed: argparse.Namespace) -> int:
    """Accuracy against leak of several methods."""
    if parsed.budget is not None and not parsed.budget > 0:
        raise ConfigError(f"`--budget > 0` must hold, but got {parsed.budget}; give device hours")
    asked = list(_asked_of_frontier(parsed))
    config = load_config(parsed.config, [*parsed.set, *asked])
    from kr_ray.config.file import with_overrides
    from kr_ray.frontier import frontier_settings, make_frontier
    from kr_ray.report.printed import print_summary

    settings = frontier_settings(config)
    with _pipeline(parsed, with_overrides(config, settings)) as pipeline:
        result = make_frontier(
            pipeline, [*asked, *settings], budget_hours=parsed.budget, so_far=parsed.so_far
        )
        results, config = pipeline.results, pipeline.config
    print_summary(config, "report", results, result)
    return 0


def _asked_of_frontier(parsed: argparse.Namespace) -> Iterator[str]:
    """The command's options as keys of the configuration."""
    if parsed.methods is not None:
        yield f"frontier.methods=[{parsed.methods}]"
    if parsed.models is not None:
        yield f"audit.worst_case.models={parsed.models}"
    if parsed.leak_limit is not None:
        yield f"frontier.leak_limit={parsed.leak_limit}"
    if (aim := parsed.match_accuracy) is not None:
        number = aim.replace(".", "", 1).isdigit()
        yield f"frontier.match_accuracy={aim if number else 'null'}"
        yield f"frontier.match_method={json.dumps('' if number else aim)}"


def _audit_scores(parsed: argparse.Namespace) -> int:
    from kr_ray.privacy.score_files import audit_score_file
    from kr_ray.privacy.scores import ScoreError
    from kr_ray.report.score_table import notes, score_table
    from kr_ray.runs.artifacts import write_json

    _check_output("--json", parsed.json, {"--scores": parsed.scores})
    try:
        found = audit_score_file(parsed.scores, seed=0)
    except ScoreError as error:
        raise ConfigError(str(error)) from error
    score_table(found).print()
    print(notes(found))
    if parsed.json is not None:
        write_json(parsed.json, found.model_dump(mode="json", by_alias=True, exclude_unset=True))
        print(f"written to {parsed.json}")
    return 0


def compare_labels(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.seeds < 1:
        raise ConfigError(f"`--seeds >= 1` must hold, but got {parsed.seeds}; use 3")
    if parsed.views is not None:
        return _compare_views(parsed, config)
    if parsed.checkpoints == "last":
        raise ConfigError("`--checkpoints last` belongs to --views, but there are none; use best or all")
    from kr_ray import studies

    with _pipeline(parsed, config) as pipeline:
        comparison = studies.compare_labels(
            pipeline, parsed.seeds, all_checkpoints=parsed.checkpoints == "all"
        )
        file = pipeline.run / "compare_labels" / "done.json"
    table = Grid(f"{config.name}: appendix D", ("labelling", "mean validation CAS", "spread (sd)", "n"))
    for row in comparison.summary():
        table.add(row.labelling, f"{row.mean:.4f}", f"{row.sd:.4f}", str(row.n))
    table.print()
    print(f"written to {file.resolve()}")
    return 0


def _compare_views(parsed: argparse.Namespace, config: Config) -> int:
    from kr_ray import studies

    if parsed.checkpoints == "all":
        raise ConfigError(
            "`--views` compares students of one checkpoint, but got --checkpoints all; use best or last"
        )
    with _pipeline(parsed, config) as pipeline:
        rows = studies.compare_views(pipeline, parsed.views, parsed.seeds, last=parsed.checkpoints == "last")
        file = pipeline.run / "compare_views" / "done.json"
    table = Grid(
        f"{config.name}: what the teacher answers to", ("labels", "test", "sd", "n", "gap", "95 %", "CPU s",
                                                        "asked"),
        note="gap: points to the teacher of as many steps; asked: images that the teacher answered",
    )  # fmt: skip
    for row in rows:
        half = "–" if row.gap_half_width is None else f"{100 * row.gap_half_width:.2f}"
        table.add(
            row.variant, f"{row.mean:.4f}", f"{row.sd:.4f}", str(row.n), f"{100 * row.gap:+.2f}",
            half, f"{row.cpu_seconds:.0f}", f"{row.teacher_queries:.0f}",
        )  # fmt: skip
    table.print()
    print(f"written to {file.resolve()}")
    return 0


def compare(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.seeds < 1:
        raise ConfigError(f"`--seeds >= 1` must hold, but got {parsed.seeds}; use 3")
    from kr_ray.config.compared import with_generator

    for name in parsed.generators:  # a wrong one is refused before the run is touched
        with_generator(config, name)
    from kr_ray import studies

    names, labels = dict.fromkeys(parsed.generators), dict.fromkeys(parsed.labels)
    with _pipeline(parsed, config) as pipeline:
        found = studies.compare_generators(
            pipeline, list(names), list(labels), parsed.seeds, last=parsed.checkpoints == "last"
        )
        folder = (pipeline.run / "compare").resolve()
    table = Grid(
        f"{config.name}: validation CAS per checkpoint",
        ("generator", "labels", "best epoch", "CAS", "sd", "gap", "last epoch", "CAS", "sd", "n"),
        note=f"teacher: {found.teacher:.4f}; gap: points from it to the best checkpoint's CAS",
    )
    for curve in found.curves():
        figures = [
            (curve.epochs[k], f"{curve.means[k]:.4f}", f"{curve.sds[k]:.4f}") for k in (curve.best, -1)
        ]
        (epoch, cas, sd), last = figures
        gap = f"{100 * (curve.means[curve.best] - found.teacher):+.2f}"
        table.add(curve.generator, curve.labelling, str(epoch), cas, sd, gap, *map(str, last), str(curve.n))
    table.print()
    print(f"every checkpoint: {folder / 'done.json'}\nfigure: {folder / studies.COMPARISON_FIGURE}")
    return 0


def scaling(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    from kr_ray.report.schema import Scaling

    with _pipeline(parsed, config) as pipeline:
        found = Scaling(rows=pipeline.scaling().rows)
        page = pipeline.run / "report" / "report.html"
    table = Grid(
        f"{config.name}: test accuracy by number of synthetic images",
        ("synthetic / real", "synthetic alone", "sd", "real + synthetic", "sd", "n"),
    )
    for size in found.sizes():
        cells = [
            "–" if value is None else f"{value:.4f}"
            for one in (size.alone, size.with_real)
            for value in (one.mean, one.sd)
        ]
        table.add(str(size.scale), *cells, str(size.alone.n))
    table.print()
    print(f"report: {page.resolve()}")
    return 0


def compare_search(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.seeds < 1:
        raise ConfigError(f"`--seeds >= 1` must hold, but got {parsed.seeds}; use 3")
    from kr_ray import studies

    with _pipeline(parsed, config) as pipeline:
        comparison = studies.compare_search(pipeline, parsed.seeds)
        file = pipeline.run / "compare_search" / "done.json"
    table = Grid(
        f"{config.name}: halving's share",
        (
            "exhaustive: epoch",
            "exhaustive: CAS",
            "halving: epoch",
            "halving: CAS",
            "lost",
            "images",
            "seconds",
        ),
    )
    for row in comparison.rows:
        winners = [
            f"{figure}"
            for found in (row.exhaustive, row.halving)
            for figure in (found.epoch, f"{found.val_cas:.4f}")
        ]
        table.add(*winners, f"{row.lost_cas:.4f}", f"{row.images_share:.2f}", f"{row.seconds_share:.2f}")
    table.print()
    print(f"written to {file.resolve()}")
    return 0


def export(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.images < 0:
        raise ConfigError(
            f"`--images >= 0` must hold, but got {parsed.images}; use 0 for the tuned cardinality"
        )
    from kr_ray import studies

    with _pipeline(parsed, config) as pipeline:
        if parsed.student:
            written = studies.export_further(pipeline, parsed.student)
        else:
            written = studies.export(pipeline, parsed.images)
    for name, text in written.items():
        print(f"{name}: {text}")
    return 0


def submit(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)  # a wrong one is refused here, not minutes later in a log
    from kr_ray.cluster.submit import DEFAULT_ADDRESS, Submission, check_address, entrypoint

    folder = Path(parsed.working_dir)
    command = entrypoint(parsed.job, parsed.config, parsed.set, folder)
    address = check_address(parsed.address or os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS))
    job = Submission(address, command, folder, {"run": config.name, "command": parsed.job})
    print(f"job {job.id}: {masked(command)}\ndashboard: {job.page}", flush=True)
    if parsed.detach:
        return 0
    print(
        "Ctrl-C stops the job (the next submission goes on from there); a second one leaves it alone",
        flush=True,
    )
    try:
        return job.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print("kr: asking the job to stop", file=sys.stderr)
        job.stop()
        return job.follow(lambda text: None)


def predict(parsed: argparse.Namespace) -> int:
    from kr_ray.classifiers.export import predict_files

    with local_copy(storage_path(parsed.model)) as model:
        for path, name, probability in predict_files(model, [Path(image) for image in parsed.images]):
            print(f"{path}\t{name}\t{probability:.4f}")
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    from kr_ray.doctor import examine

    rows = examine(Path(parsed.data_root))
    for state, what, found in rows:
        print(f"{state:<5} {what:<22} {found}")
    return 0 if all(state != "FAIL" for state, _, _ in rows) else FAILURE


def results(parsed: argparse.Namespace) -> int:
    from kr_ray.report.table import results_table

    def tell(path: Path) -> None:
        print(
            f"kr: {path} is no report of kr's, or damaged; `kr report` with "
            "that run's configuration writes it anew",
            file=sys.stderr,
        )

    print(results_table(storage_path(parsed.storage), tell))
    return 0


def bench(parsed: argparse.Namespace) -> int:
    for key in ("rounds", "threads"):
        if getattr(parsed, key) < 1:
            raise ConfigError(
                f"`--{key} >= 1` must hold, but got {getattr(parsed, key)}; use {5 if key == 'rounds' else 1}"
            )
    if parsed.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # before torch looks: students choose their device by what they see
        )
    import torch

    from kr_ray.bench.run import SUITES, run_bench
    from kr_ray.bench.table import markdown_table, print_table
    from kr_ray.runs.artifacts import atomic_write, write_json

    names = [suite.name for suite in SUITES]
    if parsed.list:
        print("\n".join(names))
        return 0
    if unknown := sorted(set(parsed.suite) - set(names)):
        raise ConfigError(
            f"`--suite` must be one of {', '.join(names)}, but got {', '.join(unknown)}; --list names them"
        )
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "`--device cuda` needs a GPU that torch can use, but there is none; use --device cpu"
        )
    _check_output("--out", parsed.out, {})
    _check_output("--markdown", parsed.markdown, {"--out": parsed.out})
    document = run_bench(
        parsed.suite,
        parsed.rounds,
        torch.device(parsed.device),
        parsed.threads,
        tell=lambda text: print(text, flush=True),
        keep=lambda so_far: write_json(parsed.out, asdict(so_far)),
    )
    if parsed.markdown is not None:
        with atomic_write(parsed.markdown) as temporary:
            temporary.write_text(markdown_table(document))
    print_table(document)
    print(f"written to {parsed.out}")
    return 0


def plan(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    from kr_ray.plan.show import print_plan

    print_plan(config, parsed.devices)
    return 0


def schema(parsed: argparse.Namespace) -> int:
    from kr_ray.config.schema import config_schema

    print(json.dumps(config_schema(parsed.plugin), indent=1))
    return 0


def runs(parsed: argparse.Namespace) -> int:
    from kr_ray.runs.artifacts import list_runs

    runs = list_runs(storage_path(parsed.storage))
    if not runs:
        print(f"no runs below {parsed.storage!r}")
        return 0
    table = Grid(f"runs below {parsed.storage}", ("run", "state", "stage", "done", "updated", "note"))
    for name, run in runs.items():
        age = "" if run.updated is None else f"{time.time() - run.updated:.0f} s ago"
        table.add(name, run.state, run.stage, f"{run.share:.0%}", age, run.error or run.note)
    table.print()
    return 0


def watch(parsed: argparse.Namespace) -> int:
    from kr_ray.watch import look

    folder = storage_path(parsed.run)
    if not (folder / "status.json").exists():
        folder = storage_path(parsed.storage) / parsed.run
    live, shown = sys.stdout.isatty(), ""
    while True:
        snapshot = look(folder)
        line = snapshot.describe()
        if live:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif line != shown:
            print(line, flush=True)
        shown = line
        if snapshot.exit_code is not None:
            print(end="\n" if live else "")
            return snapshot.exit_code
        time.sleep(max(0.1, parsed.every))
