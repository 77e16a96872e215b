"""`kr`: the commands. Imports neither torch nor ray before they are needed."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kr_ray.config import ConfigError
from kr_ray.config_file import load_config
from kr_ray.display import Display, print_summary
from kr_ray.storage import LocationError, local_copy, storage_path

STAGE_COMMANDS = {
    "run": ("report", "the whole pipeline, from real images to the report"),
    "teacher": ("teacher", "train the teacher on the real images"),
    "generator": ("generator", "train the generator and keep its checkpoints"),
    "checkpoints": ("checkpoints", "find the checkpoint whose images teach best"),
    "tune": ("tuning", "tune latent std, regeneration rate and cardinality scale"),
    "student": ("student", "train the final student on synthetic images"),
    "audit": ("audit", "attack teacher and student with shadow models"),
    "report": ("report", "report.json and report.html of what has finished so far"),
}
SCORE_FORMATS = """score files: higher = more likely a member
  .npz, one model     member_scores [M], non_member_scores [N]
  .npz, many models   scores [models, samples], member [models, samples] (bool); adds LiRA on these scores
  .npz, all attacks   logits [models, samples, classes] or [models, samples, queries, classes], labels [samples],
                      member [models, samples]; optional true_labels [samples] where the given label was wrong;
                      for RMIA also reference_logits [models, reference, classes], reference_labels [reference]
                      of images that no model saw
  many models         every sample in at least two and out of at least two; optional canary [samples] (bool)
                      gives canaries and population their own figures
  .parquet            one row per model and sample: model, sample, score, member, optionally canary"""
USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `kr`; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` and a batch system's grace period end like Ctrl-C
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except (ConfigError, LocationError) as error:
        return _fail(str(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", INTERRUPTED)
    except Exception as error:
        if parsed.debug:
            raise
        return _fail(_message(error), USAGE_ERROR if _is_input_error(error) else FAILURE)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"kr: {message}", file=sys.stderr)
    return code


def _is_input_error(error: BaseException) -> bool:
    from kr_ray.data.checks import DataError

    return isinstance(error, DataError)


def _message(error: BaseException) -> str:
    """What a person can act on (`--debug` shows the rest): our own errors as they are, else the innermost cause's last line."""
    from kr_ray.artifacts import ArtifactError

    if _is_input_error(error) or isinstance(error, ArtifactError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
    return f"{type(error).__name__}: {lines[-1] if 'Traceback' in str(error) else str(error)} (--debug shows the traceback)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kr", description=__doc__ and "Knowledge Recycling on Ray.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str, command: Callable[[argparse.Namespace], int], config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if config:
            optional = "?" if name == "audit" else None
            sub.add_argument("config", nargs=optional, help="a YAML file, such as configs/quickstart.yaml")
            sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
        return sub

    for name, (stage, text) in STAGE_COMMANDS.items():
        sub = add(name, text, _audit if name == "audit" else _run)
        sub.set_defaults(stage=stage, reports_only=name == "report")
        if name == "audit":
            _worst_case_options(sub)
    compare = add("compare-labels", "appendix D: gkd, gap_filler, filter and hard labels from one generator", _compare_labels)
    compare.add_argument("--seeds", type=int, default=3, help="students per strategy (default 3)")
    compare.add_argument("--checkpoints", choices=["best", "all"], default="best")
    searches = add(
        "compare-search", "halving over the checkpoints against the exhaustive sweep: cost and loss", _compare_search
    )
    searches.add_argument("--seeds", type=int, default=3, help="seeds of the students (default 3)")
    export = add("export", "the student as ONNX and the synthetic set as Parquet", _export)
    export.add_argument("--images", type=int, default=0, help="synthetic images to write (default: the tuned cardinality)")
    submit = add("submit", "run a command as a job of a Ray cluster, follow it, end with its exit code", _submit)
    submit.add_argument(
        "--command", dest="job", choices=[*STAGE_COMMANDS, "compare-labels", "compare-search", "export"], default="run"
    )
    submit.add_argument(
        "--address", default="", help="dashboard URL of the cluster (default: RAY_API_SERVER_ADDRESS, else this machine's)"
    )
    submit.add_argument("--working-dir", default=".", help="what is uploaded: a checkout of the project (default: here)")
    submit.add_argument("--detach", action="store_true", help="do not wait for the job")
    predict = add("predict", "classes of image files by an exported student", _predict, config=False)
    predict.add_argument("images", nargs="+", help="image files")
    predict.add_argument("--model", required=True, help="student.onnx as written by `kr export`")
    doctor = add("doctor", "versions, devices, disk, Ray and data found", _doctor, config=False)
    doctor.add_argument("--data-root", default="data", help="where data sets are looked for")
    results = add("results", "Table 2's row of every finished run, as Markdown", _results, config=False)
    results.add_argument("--storage", default="runs")
    watch = add("watch", "follow a run from another terminal until it ends, and end like it", _watch, config=False)
    watch.add_argument("run", help="its name, or its folder")
    watch.add_argument("--storage", default="runs")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)")
    plan = add("plan", "what a run will cost: FLOPs, hours per stage, memory, storage, and what would save time", _plan)
    plan.add_argument(
        "--devices",
        default="here",
        metavar="here|NxKIND",
        help="such as 4xRTX6000 or 1xH200 (default: here, measured in seconds)",
    )
    _bench_options(add("bench", "measure the product beside the plain way of computing", _bench, config=False))
    runs = add("runs", "list the runs and their state", _runs, config=False)
    runs.add_argument("--storage", default="runs")
    _accept_score_file(commands.choices["audit"])
    return parser


def _worst_case_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--arms",
        metavar="ARM,ARM",
        help="worst-case audit of teacher, kr, student_only: many trainings with and without canaries",
    )
    sub.add_argument("--models", type=int, help="runs of the worst-case audit, even (default: audit.models)")
    sub.add_argument("--budget", type=float, metavar="HOURS", help="device hours it may take; cuts the number of runs")


def _bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="only this one (may be repeated; --list names them)"
    )
    sub.add_argument("--list", action="store_true", help="name the suites and end")
    sub.add_argument("--rounds", type=int, default=5, help="of every comparison (default 5)")
    sub.add_argument("--threads", type=int, default=1, help="of torch in one process (default 1)")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--out", type=Path, default=Path("bench.json"), help="all figures as JSON (default bench.json)")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")


# --- commands --------------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    from kr_ray.pipeline import Pipeline

    with Display() as display, Pipeline(config, display) as pipeline:
        result = pipeline.report() if parsed.reports_only else pipeline.run_until(parsed.stage)
        results = pipeline.results
    print_summary(config, parsed.stage, results, result)
    return 0


def _audit(parsed: argparse.Namespace) -> int:
    if parsed.arms is None:
        if parsed.models is not None or parsed.budget is not None:
            raise ConfigError(
                "`--models` and `--budget` belong to the worst-case audit; say what to audit, as in --arms teacher,kr"
            )
        return _run(parsed)
    if parsed.budget is not None and not parsed.budget > 0:
        raise ConfigError(f"`--budget > 0` must hold, but got {parsed.budget}; give device hours")
    models = [] if parsed.models is None else [f"audit.models={parsed.models}"]
    config = load_config(parsed.config, [*parsed.set, f"audit.arms=[{parsed.arms}]", *models])
    if not config.audit.arms:
        raise ConfigError("`--arms` must name at least one arm; use --arms teacher,kr")
    from kr_ray.pipeline import Pipeline

    with Display() as display, Pipeline(config, display) as pipeline:
        result = pipeline.worst_case(parsed.budget)
        results = pipeline.results
    print_summary(config, "report", results, result)
    return 0


def _accept_score_file(audit: argparse.ArgumentParser) -> None:
    """`kr audit --scores FILE` beside whatever `kr audit CONFIG` does."""
    audit.add_argument(
        "--scores", metavar="FILE", type=Path, help="attack somebody's own scores instead of a run (formats below)"
    )
    audit.add_argument("--json", metavar="OUT", type=Path, help="with --scores: write all figures to this file")
    audit.epilog, audit.formatter_class = SCORE_FORMATS, argparse.RawDescriptionHelpFormatter
    audit.set_defaults(command=partial(_audit_run_or_scores, audit.get_default("command")))


def _audit_run_or_scores(audit_run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace) -> int:
    if (parsed.config is None) == (parsed.scores is None):
        raise ConfigError("`kr audit` takes either a configuration or --scores FILE; give one of them")
    if parsed.scores is not None:
        if of_runs := [f"--{key}" for key in ("arms", "models", "budget") if getattr(parsed, key) is not None]:
            raise ConfigError(f"`{', '.join(of_runs)}` belong to a run's audit, but got --scores {parsed.scores}; remove them")
        return _audit_scores(parsed)
    if parsed.json is not None:
        raise ConfigError("`--json` belongs to --scores; a run's figures are in its report.json")
    return audit_run(parsed)


def _audit_scores(parsed: argparse.Namespace) -> int:
    from rich import print as rich_print

    from kr_ray.artifacts import write_json
    from kr_ray.privacy.audit_scores import ScoreError
    from kr_ray.privacy.score_files import audit_score_file
    from kr_ray.report.score_table import NOTES, score_table

    try:
        result = audit_score_file(parsed.scores, seed=0)
    except ScoreError as error:
        raise ConfigError(str(error)) from error
    rich_print(score_table(result))
    print(NOTES)
    if parsed.json is not None:
        write_json(parsed.json, result)
        print(f"written to {parsed.json}")
    return 0


def _compare_labels(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.seeds < 1:
        raise ConfigError(f"`--seeds >= 1` must hold, but got {parsed.seeds}; use 3")
    from rich.console import Console
    from rich.table import Table

    from kr_ray.pipeline import Pipeline

    with Display() as display, Pipeline(config, display) as pipeline:
        comparison = pipeline.compare_labels(parsed.seeds, all_checkpoints=parsed.checkpoints == "all")
    table = Table("labelling", "mean validation CAS", "spread (sd)", "n", title=f"{config.name}: appendix D")
    for row in comparison["summary"]:
        table.add_row(row["labelling"], f"{row['mean']:.4f}", f"{row['sd']:.4f}", str(row["n"]))
    console = Console()
    console.print(table)
    console.print(f"written to {comparison['file']}", soft_wrap=True)
    return 0


def _compare_search(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.seeds < 1:
        raise ConfigError(f"`--seeds >= 1` must hold, but got {parsed.seeds}; use 3")
    from rich.console import Console
    from rich.table import Table

    from kr_ray.pipeline import Pipeline

    with Display() as display, Pipeline(config, display) as pipeline:
        comparison = pipeline.compare_search(parsed.seeds)
    table = Table(
        "exhaustive: epoch",
        "CAS",
        "halving: epoch",
        "CAS",
        "lost",
        "images",
        "seconds",
        title=f"{config.name}: halving's share",
    )
    for row in comparison["rows"]:
        whole, short = row["exhaustive"], row["halving"]
        winners = [f"{figure}" for found in (whole, short) for figure in (found["epoch"], f"{found['val_cas']:.4f}")]
        table.add_row(*winners, f"{row['lost_cas']:.4f}", f"{row['images_share']:.2f}", f"{row['seconds_share']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"written to {comparison['file']}", soft_wrap=True)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.images < 0:
        raise ConfigError(f"`--images >= 0` must hold, but got {parsed.images}; use 0 for the tuned cardinality")
    from kr_ray.pipeline import Pipeline

    with Display() as display, Pipeline(config, display) as pipeline:
        written = pipeline.export(parsed.images)
    for name, text in written.items():
        print(f"{name}: {text}")
    return 0


def _submit(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)  # a wrong one is refused here, not minutes later in a log
    from kr_ray.cluster.submit import DEFAULT_ADDRESS, Submission, entrypoint

    folder = Path(parsed.working_dir)
    command = entrypoint(parsed.job, parsed.config, parsed.set, folder)
    address = parsed.address or os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    job = Submission(address, command, folder, {"run": config.name, "command": parsed.job})
    print(f"job {job.id}: {command}\ndashboard: {job.page}", flush=True)
    if parsed.detach:
        return 0
    print("Ctrl-C stops the job (the next submission goes on from there); a second one leaves it alone", flush=True)
    try:
        return job.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print("kr: asking the job to stop", file=sys.stderr)
        job.stop()
        return job.follow(lambda text: None)


def _predict(parsed: argparse.Namespace) -> int:
    from kr_ray.training.export import predict_files

    with local_copy(storage_path(parsed.model)) as model:
        for path, name, probability in predict_files(model, [Path(image) for image in parsed.images]):
            print(f"{path}\t{name}\t{probability:.4f}")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from kr_ray.doctor import examine

    rows = examine(Path(parsed.data_root))
    for state, what, found in rows:
        print(f"{state:<5} {what:<22} {found}")
    return 0 if all(state != "FAIL" for state, _, _ in rows) else FAILURE


def _results(parsed: argparse.Namespace) -> int:
    from kr_ray.report.table import results_table

    print(results_table(storage_path(parsed.storage)))
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    for key in ("rounds", "threads"):
        if getattr(parsed, key) < 1:
            raise ConfigError(f"`--{key} >= 1` must hold, but got {getattr(parsed, key)}; use {5 if key == 'rounds' else 1}")
    if parsed.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: students choose their device by what they see
    import torch

    from kr_ray.artifacts import atomic_write, write_json
    from kr_ray.bench.run import SUITES, run_bench
    from kr_ray.bench.table import markdown_table, print_table

    names = [suite.name for suite in SUITES]
    if parsed.list:
        print("\n".join(names))
        return 0
    if unknown := sorted(set(parsed.suite) - set(names)):
        raise ConfigError(f"`--suite` must be one of {', '.join(names)}, but got {', '.join(unknown)}; --list names them")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`--device cuda` needs a GPU that torch can use, but there is none; use --device cpu")
    document = run_bench(
        parsed.suite,
        parsed.rounds,
        torch.device(parsed.device),
        parsed.threads,
        tell=lambda text: print(text, flush=True),
        keep=lambda so_far: write_json(parsed.out, so_far),
    )
    if parsed.markdown is not None:
        with atomic_write(parsed.markdown) as temporary:
            temporary.write_text(markdown_table(document))
    print_table(document)
    print(f"written to {parsed.out}")
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    from kr_ray.plan.show import print_plan

    print_plan(config, parsed.devices)
    return 0


def _runs(parsed: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from kr_ray.artifacts import list_runs

    runs = list_runs(storage_path(parsed.storage))
    if not runs:
        print(f"no runs below {parsed.storage!r}")
        return 0
    table = Table("run", "state", "stage", "done", "updated", "note")
    for run in runs:
        age = f"{time.time() - run['updated']:.0f} s ago"
        table.add_row(
            run["name"], run["state"], run.get("stage", ""), f"{run.get('share', 0):.0%}", age,
            run.get("error") or run.get("note", ""),
        )  # fmt: skip
    Console().print(table)
    return 0


def _watch(parsed: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
