"""The report's figures, each a self-contained image as a data URI: SVG for plots, PNG for generated images.

One colour per model throughout: the teacher grey, the student blue, as in Figure 2 of Knowledge Recycling;
red marks what tuning found. Same input, same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr_ray.report.schema import Scaling, Teacher, Tuning
from kr_ray.runs.figures import (
    Attacked,
    ClassifierPoint,
    CollapsePoint,
    Copies,
    Frontier,
    FrontierRow,
    GeneratorPoint,
    LiraArm,
    SweptCheckpoint,
    Trial,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEACHER, STUDENT, TUNED, ALARM = "#6b7280", "#1d5fa8", "#c2371f", "#c2371f"
HALF, WIDE, SQUARE = (4.7, 2.9), (10.4, 3.8), (4.7, 4.2)
"""Width and height in inches, in the proportion of the page's columns,
so that text has the same size in all figures."""
NAMED_CLASSES = 24
"""More classes than this are not labelled in a confusion figure."""

_STYLE = {
    "text.parse_math": False,  # a class may be called "$"
    "svg.fonttype": "none",
    "svg.hashsalt": "kr_ray",
    "font.family": ["sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#e7e9ed",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "text.color": "#1f2933",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def _canvas(
    size: tuple[float, float], columns: int = 1, **axes: Any
) -> Iterator[tuple[list[Axes], list[str]]]:
    """Axes to draw on; the finished figure's data URI is appended to the yielded list."""
    with _figure(size, columns, **axes) as (panels, done):
        uri: list[str] = []
        yield panels, uri
    uri.append("data:image/svg+xml;base64," + base64.b64encode(done[0]).decode())


@contextmanager
def _figure(
    size: tuple[float, float], columns: int = 1, *, dots_per_inch: int = 0, **axes: Any
) -> Iterator[tuple[list[Axes], list[bytes]]]:
    """Axes to draw on; the finished figure's bytes are appended to the yielded list, as SVG and, at so many
    dots per inch, as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    done: list[bytes] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)  # without pyplot: no global list of figures, no display
        yield list(figure.subplots(1, columns, squeeze=False, **axes)[0]), done
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        done.append(stream.getvalue())
        if dots_per_inch:
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=dots_per_inch, metadata={"Software": None})
            done.append(stream.getvalue())


@contextmanager
def saved_png(path: Path) -> Iterator[Axes]:
    """Axes to draw on; the finished figure is written to `path` as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=WIDE)
        yield figure.subplots()
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _series(points: Sequence[Any], name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one field, without the points that have none."""
    pairs = [(point.epoch, value) for point in points if (value := getattr(point, name)) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _draw(ax: Axes, points: Sequence[Any], name: str, **style: Any) -> None:
    """A line; with a marker where one point is all there is."""
    x, y = _series(points, name)
    ax.plot(x, y, marker="o" if len(x) == 1 else "", markersize=4, **style)


def _star(ax: Axes, x: float, y: float, color: str, label: str | None = None) -> None:
    ax.scatter(x, y, marker="*", s=180, color=color, edgecolor="white", linewidth=0.7, zorder=5, label=label)


def checkpoints_figure(
    checkpoints: Sequence[SweptCheckpoint], teacher: Teacher | None, tuning: Tuning | None
) -> str:
    """Figure 2 of Knowledge Recycling: validation CAS per
    checkpoint, the best one and the tuned one starred."""
    epochs, cas = _series(checkpoints, "val_cas")
    with _canvas(WIDE) as ((ax,), uri):
        ax.plot(
            epochs,
            cas,
            color=STUDENT,
            marker="o",
            markersize=2.5 if len(cas) > 40 else 4,
            label="student, default parameters",
        )
        if teacher:
            ax.axhline(teacher.val_accuracy, color=TEACHER, linestyle="--", label="teacher")
        if checkpoints:
            best = best_checkpoint(checkpoints)
            _star(ax, best.epoch, best.val_cas, STUDENT, "best checkpoint")
            if tuning:
                _star(ax, best.epoch, tuning.best.val_cas, TUNED, "best checkpoint, tuned")
        ax.set_xlabel("generator epoch")
        ax.set_ylabel("validation CAS (%)")
        _percent_axis(ax.yaxis)
        ax.margins(y=0.12)
        ax.figure.legend(loc="outside upper left", ncols=4)
    return uri[0]


def best_checkpoint(checkpoints: Sequence[SweptCheckpoint]) -> SweptCheckpoint:
    """Under `halving` the shorter schedules are other measurements: only the longest can be best."""
    return max(checkpoints, key=lambda point: (point.epochs, point.val_cas))


def scaling_figure(scaling: Scaling, teacher: Teacher | None) -> str:
    """Test accuracy against the number of synthetic images, without and with the real ones; bars: one
    standard deviation over seeds."""
    sizes = scaling.sizes()
    with _canvas(HALF) as ((ax,), uri):
        for name, color, label in (("alone", STUDENT, "synthetic"), ("with_real", TUNED, "real + synthetic")):
            found = [getattr(size, name) for size in sizes]
            ax.errorbar(
                [size.scale for size in sizes],
                [one.mean for one in found],
                yerr=[one.sd or 0.0 for one in found],
                color=color,
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
        if teacher:
            ax.axhline(teacher.test_accuracy, color=TEACHER, linestyle="--", label="teacher")
        ax.set_xlabel("synthetic over real images")
        ax.set_ylabel("test accuracy (%)")
        _percent_axis(ax.yaxis)
        _whole_numbers(ax)
        ax.margins(y=0.12)
        ax.figure.legend(loc="outside upper left", ncols=3)
    return uri[0]


def tuning_figure(tuning: Tuning) -> str:
    """Validation CAS per trial, the best so far, and the default parameters' CAS."""
    done, cut = _by_state(tuning.history)
    with _canvas(HALF) as ((ax,), uri):
        ax.scatter([t.trial for t in done], _cas(done), s=20, color=STUDENT, label="complete")
        if cut:
            ax.scatter(
                [t.trial for t in cut], _cas(cut), s=16, facecolor="none", edgecolor=TEACHER, label="pruned"
            )
        if done:
            ax.step(
                [t.trial for t in done],
                np.maximum.accumulate(_cas(done)),
                where="post",
                color=STUDENT,
                linewidth=1,
            )
        if tuning.default_cas is not None:
            ax.axhline(
                tuning.default_cas, color=TEACHER, linestyle="--", linewidth=1, label="default parameters"
            )
        _star(ax, tuning.best.trial, tuning.best.val_cas, TUNED, "best")
        ax.set_xlabel("trial")
        ax.set_ylabel("validation CAS (%)")
        ax.margins(y=0.1)
        _percent_axis(ax.yaxis)
        _whole_numbers(ax)
        ax.figure.legend(loc="outside upper left", ncols=4, fontsize=8.5, columnspacing=1, handletextpad=0.3)
    return uri[0]


def _by_state(history: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    """Trials that ran to their end, and those that were stopped early (whose CAS is of less training)."""
    scored = [trial for trial in history if trial.val_cas is not None]
    done = [trial for trial in scored if trial.state.lower().startswith(("complete", "terminated"))]
    return done, [trial for trial in scored if trial not in done]


def _cas(trials: Sequence[Trial]) -> list[float]:
    return [trial.val_cas for trial in trials if trial.val_cas is not None]


def parameters_figure(tuning: Tuning) -> str:
    """Validation CAS against each of the generation parameters."""
    done, cut = _by_state(tuning.history)
    best = tuning.best.params
    with _canvas((10.4, 3.0), columns=len(best), sharey=True) as (axes, uri):
        for ax, name in zip(axes, best, strict=True):
            for trials, color, fill in ((cut, TEACHER, "none"), (done, STUDENT, STUDENT)):
                ax.scatter(
                    [t.params[name] for t in trials], _cas(trials), s=16, facecolor=fill, edgecolor=color
                )
            _star(ax, best[name], tuning.best.val_cas, TUNED)
            ax.set_xlabel(name.replace("_", " "))
        axes[0].margins(y=0.1)
        _percent_axis(axes[0].yaxis)
        axes[0].set_ylabel("validation CAS (%)")
    return uri[0]


def importance_figure(importance: dict[str, float]) -> str:
    """Bars, the longest on top."""
    names = sorted(importance, key=lambda name: importance[name])
    with _canvas(HALF) as ((ax,), uri):
        bars = ax.barh(
            [name.replace("_", " ") for name in names],
            [importance[name] for name in names],
            color=STUDENT,
            height=0.5,
        )
        ax.bar_label(bars, fmt="%.2f", padding=4)
        ax.set_xlabel("share of the variance of CAS explained")
        ax.set_xlim(0, max([*importance.values(), 0.01]) * 1.15)
        ax.grid(axis="y", visible=False)
    return uri[0]


def roc_figure(teacher: Attacked | None, student: Attacked | None) -> str:
    """Attack ROC of both models with the diagonal of guessing."""
    with _canvas(SQUARE) as ((ax,), uri):
        ax.plot([0, 1], [0, 1], color="#9aa1ab", linewidth=1, linestyle=":", label="guessing")
        for name, attacked, color in (("teacher", teacher, TEACHER), ("student", student, STUDENT)):
            if attacked and attacked.roc:
                ax.plot(
                    attacked.roc.fpr,
                    attacked.roc.tpr,
                    color=color,
                    label=f"{name} (AUC {100 * attacked.auc_raw:.1f} %)",
                )
        ax.set_aspect("equal")
        ax.set_xlim(-0.01, 1.01)
        ax.set_ylim(-0.01, 1.01)
        ax.set_xlabel("other images called members (%)")
        ax.set_ylabel("training images called members (%)")
        _percent_axis(ax.xaxis)
        _percent_axis(ax.yaxis)
        ax.legend(loc="lower right")
    return uri[0]


def worst_case_figure(arms: Mapping[str, LiraArm], names: Mapping[str, str]) -> str:
    """ROC of the headline attack per arm in log-log axes: solid on the
    canaries, dashed on the population; dots at 0.1 % FPR."""
    colors = {"teacher": TEACHER, "kr": STUDENT, "fixed_generator": "#0f8a6d"}
    finest = min(group.finest_fpr for arm in arms.values() for group in (arm.canary, arm.population))
    with _canvas((4.7, 4.6)) as ((ax,), uri):
        ax.plot([finest, 1], [finest, 1], color="#9aa1ab", linewidth=1, linestyle=":", label="guessing")
        for name, arm in arms.items():
            for group, figures, line in (("canaries", arm.canary, "-"), ("population", arm.population, "--")):
                if figures.roc is None:
                    continue
                color = colors.get(name, TUNED)
                fpr, tpr = (np.maximum(values, finest / 2) for values in (figures.roc.fpr, figures.roc.tpr))
                ax.step(
                    fpr,
                    tpr,
                    where="post",
                    color=color,
                    linestyle=line,
                    label=f"{names.get(name, name)}, {group}",
                )
                if figures.tpr_at_01:
                    ax.plot([1e-3], [figures.tpr_at_01], marker="o", markersize=5, color=color)
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda share, _: f"{100 * share:g}")
            axis.set_minor_formatter("")
        ax.set_xlim(finest * 0.9, 1.05)
        ax.set_ylim(finest * 0.9, 1.15)
        ax.set_xlabel("other images called training images (%, log)")
        ax.set_ylabel("training images recognised (%, log)")
        ax.figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, columnspacing=1)
    return uri[0]


def frontier_figure(frontier: Frontier) -> str:
    """See `draw_frontier`."""
    return draw_frontier(frontier).uri


def draw_frontier(frontier: Frontier) -> Drawing:
    """Accuracy against the share of canaries recognised (log axis), with 95 % intervals on both; a point per
    method, its area the processor time that it takes, its label what it proves; beaten ones are faded."""
    rows = [row for row in frontier.rows if row.accuracy is not None and row.leak]
    leaks = [row.leak for row in rows if row.leak]
    with _figure((10.4, 5.2), dots_per_inch=160) as ((ax,), done):
        floor = min([0.5 / (leak.pairs or 1000) for leak in leaks], default=5e-4)
        ax.set_yscale("log")
        for number, row in enumerate(rows):
            _frontier_point(ax, row, rows, _frontier_color(row, number), floor)
        rate, limit = frontier.false_positive_rate, frontier.leak_limit
        if rate:
            ax.axhline(rate, color="#9aa1ab", linewidth=1, linestyle=":", label="guessing")
        if limit is not None:
            ax.axhline(limit, color=ALARM, linewidth=1, linestyle="--", label="limit named by the reader")
        highs = [max(leak.high, leak.share) for leak in leaks]
        ax.set_ylim(floor * 0.8, max([*highs, limit or 0, rate or 0, 0.02]) * 1.6)
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        ax.yaxis.set_minor_formatter("")
        ax.margins(x=0.14)
        if not rows:
            ax.text(
                0.5, 0.5, "no method has been trained and audited yet", ha="center", transform=ax.transAxes
            )
        _percent_axis(ax.xaxis)
        ax.set_xlabel("accuracy on test images (%)")
        at = f"at {100 * rate:g} % false accusations" if rate else "AUC of the attack"
        ax.set_ylabel(f"canaries recognised (%, log), {at}")
        if rate or limit is not None:
            ax.legend(loc="best", fontsize=8.5)
        _label_points(ax, rows, floor)
    return Drawing(*done)


@dataclass(frozen=True)
class Drawing:
    """A figure as files."""

    svg: bytes
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


FRONTIER_COLORS = ("#c2371f", "#0f8a6d", "#8a5a00", "#7a3e9d", "#b5478c", "#3b7a9e", "#5c6b1e", "#a0522d")


def _frontier_color(row: FrontierRow, number: int) -> str:
    own = {"teacher": TEACHER, "kr": STUDENT}
    return own.get(row.name, FRONTIER_COLORS[number % len(FRONTIER_COLORS)])


def _frontier_point(
    ax: Axes, row: FrontierRow, rows: Sequence[FrontierRow], color: str, floor: float
) -> None:
    if row.leak is None or row.accuracy is None:
        return
    alpha = 0.35 if row.dominated_by else 1.0
    y = max(row.leak.share, floor)
    low, high = max(row.leak.low, floor), max(row.leak.high, floor)
    ax.plot([row.accuracy] * 2, [low, high], color=color, alpha=alpha, linewidth=1.4)
    if row.accuracy_low is not None and row.accuracy_high is not None:
        ax.plot([row.accuracy_low, row.accuracy_high], [y, y], color=color, alpha=alpha, linewidth=1.4)
    most = max((one.cpu_seconds or 0.0) + (one.gpu_seconds or 0.0) for one in rows)
    cost = (row.cpu_seconds or 0.0) + (row.gpu_seconds or 0.0)
    area = 30 + 220 * (cost / most if most else 0.0)
    nothing = row.leak.share < floor
    ax.scatter([row.accuracy], [y], s=area, facecolor="white" if nothing else color, edgecolor=color,
               alpha=alpha, linewidth=1.4, zorder=4)  # fmt: skip


def frontier_label(row: FrontierRow) -> str:
    """What stands beside a point: its name and what it proves, shown or promised."""
    bound = row.bound
    if bound is None:
        proved = ""
    elif bound.epsilon is None:
        proved = "ε infinite"
    else:
        proved = f"ε ≤ {bound.epsilon:.3g}" if bound.guarantee else f"ε {bound.epsilon:.3g}, no guarantee"
    shown = f"ε ≥ {row.leak.epsilon:.2f} shown" if row.leak and row.leak.epsilon else ""
    name = _short(row.title if drawable(row.title) else row.name, 34)
    return "\n".join([name, ", ".join(part for part in (proved, shown) if part)]).strip()


LABEL_PLACES = ((9, 7), (9, -21), (-9, 7), (-9, -21), (9, 26), (-9, 26), (9, -40), (-9, -40))
"""Where a label is tried, in points from its point; left of it where the first is negative."""


def _label_points(ax: Axes, rows: Sequence[FrontierRow], floor: float) -> None:
    """Beside its point each, where it covers least of what is there."""
    figure = ax.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # so that the axes have their final place
    scale = figure.dpi / 72
    frame = ax.get_window_extent()
    points = [
        ax.transData.transform((row.accuracy or 0.0, max(row.leak.share, floor))) for row in rows if row.leak
    ]
    taken = [(x - 7 * scale, y - 7 * scale, x + 7 * scale, y + 7 * scale) for x, y in points]
    for row, (x, y) in zip(rows, points, strict=True):
        if row.leak and row.accuracy_low is not None and row.accuracy_high is not None:
            (left, bottom), (right, top) = (
                ax.transData.transform((accuracy, max(share, floor)))
                for accuracy, share in (
                    (row.accuracy_low, row.leak.low),
                    (row.accuracy_high, row.leak.high),
                )
            )
            taken += [(left, y - scale, right, y + scale), (x - scale, bottom, x + scale, top)]
    for row, (x, y) in zip(rows, points, strict=True):
        lines = frontier_label(row).split("\n")
        width, height = 4.6 * scale * max(map(len, lines)), 10.5 * scale * len(lines)

        def box(
            place: tuple[int, int], x: float = x, y: float = y, w: float = width, h: float = height
        ) -> Box:
            left = x + place[0] * scale - (w if place[0] < 0 else 0)
            bottom = y + place[1] * scale
            return left, bottom, left + w, bottom + h

        inside = (frame.x0, frame.y0, frame.x1, frame.y1)
        best = min(LABEL_PLACES, key=lambda place: _covered(box(place), taken) + _outside(box(place), inside))
        taken.append(box(best))
        ax.annotate(
            "\n".join(lines), (row.accuracy or 0.0, max(row.leak.share if row.leak else 0.0, floor)),
            xytext=best, textcoords="offset points", fontsize=8.5,
            color="#6b7280" if row.dominated_by else "#1f2933",
            ha="left" if best[0] > 0 else "right", va="bottom", annotation_clip=False,
        )  # fmt: skip


Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of `box` that lies in others."""
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def _outside(box: Box, frame: Box) -> float:
    """Area of `box` that lies outside the frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _covered(box, [frame])


def copies_figure(copies: Copies) -> str:
    """Distances to the nearest training image, generated against
    real test images, in pixels and in features."""
    with _canvas((9.6, 2.9), columns=len(copies.spaces)) as (panels, uri):
        for ax, (name, space) in zip(panels, copies.spaces.items(), strict=True):
            edges = space.histogram.edges
            ax.stairs(space.histogram.test, edges, color=TEACHER, label="real test images")
            ax.stairs(
                space.histogram.generated,
                edges,
                color=STUDENT,
                fill=True,
                alpha=0.35,
                label="generated images",
            )
            ax.axvline(space.threshold, color=ALARM, linewidth=1, linestyle="--", label="near-copy")
            ax.set_xlabel(f"distance to the nearest training image, {name}")
            _percent_axis(ax.yaxis)
        panels[0].set_ylabel("share of images (%)")
        panels[0].legend(fontsize=8.5)
    return uri[0]


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Shares of each true class (row) by predicted class (column); shares are written in up to 12 classes."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    k = len(shares)
    with _canvas((4.7, 3.5)) as ((ax,), uri):
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        ax.grid(visible=False)
        ax.set_xlabel("predicted class")
        if k <= NAMED_CLASSES:
            ax.set_xticks(range(k), [str(index) for index in range(k)])
            ax.set_yticks(range(k), [_tick(name, index) for index, name in enumerate(class_names)])
        if k <= 12:
            for (row, column), share in np.ndenumerate(shares):
                color = "white" if share > 0.55 else "#4b5563"
                if round(100 * share) >= 1:
                    ax.text(
                        column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color
                    )
    return uri[0]


def needs_legend(class_names: Sequence[str]) -> bool:
    """Whether the confusion figure cannot show every class by its
    whole name, so that the page must, by number."""
    return len(class_names) <= NAMED_CLASSES and any(
        _short(name) != name or not drawable(name) for name in class_names
    )


def drawable(text: str) -> bool:
    """Whether the font that measures the figures' text has every character of
    it; it has no Chinese, Japanese or Korean ones."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=["sans-serif"])))
    return text.isprintable() and all(font.get_char_index(ord(character)) for character in text)


def _tick(name: str, index: int) -> str:
    """`name  3`, or the number alone where that is the name or the font lacks it."""
    return str(index) if name == str(index) or not drawable(name) else f"{_short(name)}  {index}"


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def classifier_figure(curve: Sequence[ClassifierPoint], color: str, measure: str) -> str:
    """Training loss and validation accuracy (or CAS) over the epochs, in two panels."""
    with _canvas(HALF, columns=2) as ((left, right), uri):
        _draw(left, curve, "train_loss", color=color)
        left.set_title("training loss")
        _draw(right, curve, "val_accuracy", color=color)
        right.set_title(f"validation {measure} (%)")
        _percent_axis(right.yaxis)
        for ax in (left, right):
            ax.set_xlabel("epoch")
            _whole_numbers(ax)
    return uri[0]


def loss_name(key: str) -> str:
    """`loss_d` -> `discriminator`; a loss of another name keeps it."""
    return {"loss_d": "discriminator", "loss_g": "generator"}.get(key, key.replace("_", " "))


def generator_figure(curve: Sequence[GeneratorPoint]) -> str:
    """The losses of a generator's training, whatever its kind calls them."""
    losses = [name for name in curve[0].model_extra or {} if name.startswith("loss")]
    with _canvas(HALF) as ((ax,), uri):
        for name, color in zip(losses, (TEACHER, STUDENT, TUNED), strict=False):
            _draw(ax, curve, name, color=color, label=loss_name(name))
        ax.set_xlabel("epoch")
        ax.set_ylabel("loss")
        ax.figure.legend(loc="outside upper left", ncols=2)
    return uri[0]


def collapse_figure(points: Sequence[CollapsePoint]) -> str:
    """Agreement and diversity per checkpoint; alarmed checkpoints are shaded."""
    with _canvas(HALF) as ((ax,), uri):
        for index, (first, last) in enumerate(_alarmed_spans(points)):
            ax.axvspan(first, last, color=ALARM, alpha=0.15, linewidth=0, label=None if index else "alarm")
        _draw(ax, points, "agreement", color=STUDENT, label="agreement")
        _draw(ax, points, "diversity", color=TEACHER, label="diversity")
        ax.set_xlabel("generator epoch")
        ax.set_ylabel("share")
        ax.set_ylim(bottom=0)
        ax.figure.legend(loc="outside upper left", ncols=3)
    return uri[0]


def _alarmed_spans(points: Sequence[CollapsePoint]) -> list[tuple[float, float]]:
    """Epochs between which all checkpoints are alarmed, half a step beyond the first and the last."""
    epochs = [point.epoch for point in points]
    half = min(np.diff(epochs), default=1.0) / 2
    spans: list[tuple[float, float]] = []
    for index, point in enumerate(points):
        if point.alarm and index and points[index - 1].alarm:
            spans[-1] = (spans[-1][0], point.epoch + half)
        elif point.alarm:
            spans.append((point.epoch - half, point.epoch + half))
    return spans


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def png_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def strip_uri(images: NDArray[np.uint8], gap_px: int = 2) -> str:
    """Images side by side.

    Args:
        images: uint8 [n, C, H, W], C in {1, 3}, n >= 1.
    """
    from PIL import Image

    n, channels, height, width = images.shape
    strip = np.full((height, n * (width + gap_px) - gap_px, channels), 255, np.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap_px)
        strip[:, left : left + width] = image.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(strip[:, :, 0] if channels == 1 else strip).save(stream, format="PNG", optimize=True)
    return png_uri(stream.getvalue())
