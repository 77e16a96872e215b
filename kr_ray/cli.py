"""`kr`: its arguments and exit codes. Imports neither torch nor ray before they are needed."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from kr_ray import commands
from kr_ray.config import ConfigError
from kr_ray.interruption import INTERRUPTED, PATIENCE_S, Interruption
from kr_ray.masking import masked
from kr_ray.runs.storage import LocationError
from kr_ray.silence import stay_silent

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
  .npz, all attacks   logits [models, samples, classes] or [models, samples, queries, classes],
                      labels [samples], member [models, samples]; optional true_labels [samples]
                      where the given label was wrong; for RMIA also reference_labels [reference]
                      and reference_logits [models, reference, classes] of images that no model saw
  many models         every sample in at least two and out of at least two; optional canary [samples] (bool)
                      gives canaries and population their own figures
  .parquet            one row per model and sample: model, sample, score, member, optionally canary"""
USAGE_ERROR, BROKEN_PIPE = 2, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `kr`.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted by SIGINT, SIGTERM or SIGHUP, 141 when
        nobody reads the output any more (`kr runs | head -3`), all as a shell would say it.
    """
    stay_silent()  # before any library is imported that would not
    parsed = _parser().parse_args(arguments)
    with Interruption(parsed.patience_s) as interruption, warnings.catch_warnings():
        if not parsed.debug and not sys.warnoptions:
            warnings.simplefilter("ignore")  # lines of libraries' sources, which nobody can act on
        parsed.interruption = interruption
        try:
            code = _run(parsed)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException as error:
            if interruption.heard():
                code = INTERRUPTED  # what a library has made of it
            elif isinstance(error, Exception):
                code = _explain(error, parsed.debug)
            else:
                raise
    if code == INTERRUPTED or (interruption.heard() and parsed.patience_s is not None):
        interruption.say()
        return INTERRUPTED
    return code


def _run(parsed: argparse.Namespace) -> int:
    """The command's exit code, once all that it printed has been taken."""
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        code = command(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():  # but a store or a worker
            raise
        # What is still in the buffer would make Python complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _reader_has_left() -> bool:
    """Whether nobody can get what is written to stdout: an error that poll tells unasked."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return bool(poll.poll(0))


def _explain(error: Exception, debug: bool) -> int:
    """Turn what a command raised into one message and an exit code."""
    if isinstance(error, ConfigError | LocationError):
        return _fail(str(error), USAGE_ERROR)
    if debug:
        print(masked("".join(traceback.format_exception(error))), file=sys.stderr)
    return _fail(_message(error), USAGE_ERROR if _is_input_error(error) else commands.FAILURE)


def _fail(message: str, code: int) -> int:
    print(f"kr: {masked(message)}", file=sys.stderr)
    return code


def _is_input_error(error: BaseException) -> bool:
    from kr_ray.data.checks import DataError

    return isinstance(error, DataError)


def _message(error: BaseException) -> str:
    """What a person can act on (`--debug` shows the rest): our own errors as
    they are, else the innermost cause's last line."""
    from kr_ray.runs.artifacts import ArtifactError

    if _is_input_error(error) or isinstance(error, ArtifactError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
    return (
        f"{type(error).__name__}: {lines[-1] if 'Traceback' in str(error) else str(error)} (--debug shows "
        "the traceback)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kr", description="Knowledge Recycling on Ray.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, text: str, command: Callable[[argparse.Namespace], int], config: bool = True
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, patience_s=PATIENCE_S)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if config:
            optional = "?" if name == "audit" else None
            sub.add_argument("config", nargs=optional, help="a YAML file, such as configs/quickstart.yaml")
            sub.add_argument(
                "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key"
            )
        return sub

    for name, (stage, text) in STAGE_COMMANDS.items():
        sub = add(name, text, commands.audit if name == "audit" else commands.run)
        sub.set_defaults(stage=stage, reports_only=name == "report")
        if name == "audit":
            _audit_options(sub)
    _frontier_options(
        add(
            "frontier",
            "accuracy against leak of several methods: each trained, tuned to equal accuracy if asked, "
            "audited "
            "on the same canaries",
            commands.frontier,
        )
    )
    compare = add(
        "compare-labels",
        "appendix D: gkd, gap_filler, filter and hard labels from one generator",
        commands.compare_labels,
    )
    compare.add_argument("--seeds", type=int, default=3, help="students per strategy (default 3)")
    compare.add_argument("--checkpoints", choices=["best", "all", "last"], default="best")
    compare.add_argument(
        "--views",
        nargs="*",
        metavar="KEY=VALUE,...",
        help="compare what the teacher answers to instead: final students with these keys "
        "of the section synthesis, such as view=seen,temperature=2, beside teachers "
        "of as many steps (default: every lever alone)",
    )
    generators = add(
        "compare",
        "figure 3: CAS of every checkpoint, for any generators and labellings from one teacher",
        commands.compare,
    )
    generators.add_argument(
        "--generators",
        nargs="+",
        default=["run"],
        metavar="NAME[,KEY=VALUE...]",
        help="run (the run's own, default), or a preset or kind such as vanilla, ours, edm, with its keys",
    )
    generators.add_argument(
        "--labels",
        nargs="+",
        default=["hard", "gkd"],
        choices=["gkd", "gap_filler", "filter", "hard"],
        help="labelling strategies (default hard gkd)",
    )
    generators.add_argument("--seeds", type=int, default=1, help="students per checkpoint (default 1)")
    generators.add_argument("--checkpoints", choices=["all", "last"], default="all")
    add(
        "scaling",
        "test accuracy of students of more and more synthetic images, without and with the real ones",
        commands.scaling,
    )
    searches = add(
        "compare-search",
        "halving over the checkpoints against the exhaustive sweep: cost and loss",
        commands.compare_search,
    )
    searches.add_argument("--seeds", type=int, default=3, help="seeds of the students (default 3)")
    export = add("export", "the student as ONNX and the synthetic set as Parquet", commands.export)
    export.add_argument(
        "--images", type=int, default=0, help="synthetic images to write (default: the tuned cardinality)"
    )
    export.add_argument(
        "--student", metavar="NAME", default="", help="one of `students` in place of the run's own student"
    )
    submit = add(
        "submit",
        "run a command as a job of a Ray cluster, follow it, end with its exit code",
        commands.submit,
    )
    submit.add_argument(
        "--command",
        dest="job",
        choices=[
            *STAGE_COMMANDS,
            "frontier",
            "compare",
            "scaling",
            "compare-labels",
            "compare-search",
            "export",
        ],
        default="run",
    )
    submit.add_argument(
        "--address",
        default="",
        help="dashboard URL of the cluster (default: RAY_API_SERVER_ADDRESS, else this machine's)",
    )
    submit.add_argument(
        "--working-dir", default=".", help="what is uploaded: a checkout of the project (default: here)"
    )
    submit.add_argument("--detach", action="store_true", help="do not wait for the job")
    submit.set_defaults(
        patience_s=None
    )  # the first Ctrl-C stops the job, which may take long, the second leaves it alone
    predict = add("predict", "classes of image files by an exported student", commands.predict, config=False)
    predict.add_argument("images", nargs="+", help="image files")
    predict.add_argument("--model", required=True, help="student.onnx as written by `kr export`")
    doctor = add("doctor", "versions, devices, disk, Ray and data found", commands.doctor, config=False)
    doctor.add_argument("--data-root", default="data", help="where data sets are looked for")
    results = add(
        "results", "Table 2's row of every finished run, as Markdown", commands.results, config=False
    )
    results.add_argument("--storage", default="runs")
    watch = add(
        "watch",
        "follow a run from another terminal until it ends, and end like it",
        commands.watch,
        config=False,
    )
    watch.add_argument("run", help="its name, or its folder")
    watch.add_argument("--storage", default="runs")
    watch.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)"
    )
    plan = add(
        "plan",
        "what a run will cost: FLOPs, hours per stage, memory, storage, and what would save time",
        commands.plan,
    )
    plan.add_argument(
        "--devices",
        default="here",
        metavar="here|NxKIND",
        help="such as 4xRTX6000 or 1xH200 (default: here, measured in seconds)",
    )
    _bench_options(
        add("bench", "measure the product beside the plain way of computing", commands.bench, config=False)
    )
    schema = add(
        "schema",
        "the JSON schema of a configuration, with every key's meaning: for editors",
        commands.schema,
        config=False,
    )
    schema.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="allow its kinds too, as a configuration's `plugins` does (may be repeated)",
    )
    runs = add("runs", "list the runs and their state", commands.runs, config=False)
    runs.add_argument("--storage", default="runs")
    return parser


def _audit_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--arms",
        metavar="ARM,ARM",
        help="worst-case audit of teacher, kr, fixed_generator or a student: "
        "many trainings with and without canaries",
    )
    sub.add_argument(
        "--models", type=int, help="runs of the worst-case audit, even (default: audit.worst_case.models)"
    )
    sub.add_argument(
        "--budget", type=float, metavar="HOURS", help="device hours it may take; cuts the number of runs"
    )
    sub.add_argument(
        "--scores",
        metavar="FILE",
        type=Path,
        help="attack somebody's own scores instead of a run (formats below)",
    )
    sub.add_argument("--json", metavar="OUT", type=Path, help="with --scores: write all figures to this file")
    sub.epilog, sub.formatter_class = SCORE_FORMATS, argparse.RawDescriptionHelpFormatter


def _frontier_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--methods",
        metavar="METHOD,METHOD",
        help="teacher, kr, fixed_generator, names from `students`, or kinds whose defaults do (default: "
        "frontier.methods, else teacher, kr and all students)",
    )
    sub.add_argument(
        "--models", type=int, help="runs of the worst-case audit, even (default: audit.worst_case.models)"
    )
    sub.add_argument(
        "--match-accuracy",
        metavar="A",
        help="tune the methods that have a main key (dp_sgd: its noise) to this validation accuracy, 0 to "
        "1, or "
        "to that of this method",
    )
    sub.add_argument(
        "--budget", type=float, metavar="HOURS", help="device hours of the audit's runs; cuts their number"
    )
    sub.add_argument(
        "--leak-limit",
        type=float,
        metavar="SHARE",
        help="largest share of canaries recognised that is accepted, 0 to 1: recommends the most accurate "
        "method "
        "below it",
    )
    sub.add_argument(
        "--so-far", action="store_true", help="train nothing: what the runs that there are show, as a part"
    )


def _bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one (may be repeated; --list names them)",
    )
    sub.add_argument("--list", action="store_true", help="name the suites and end")
    sub.add_argument("--rounds", type=int, default=5, help="of every comparison (default 5)")
    sub.add_argument("--threads", type=int, default=1, help="of torch in one process (default 1)")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="all figures as JSON (default bench.json)"
    )
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")


if __name__ == "__main__":
    sys.exit(main())
