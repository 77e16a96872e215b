"""What each figure shows, in words, for those who do not see it: the finding, not the kind of chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kr_ray.report.figures import best_checkpoint, loss_name
from kr_ray.report.frontier import alt_text as frontier_in_words
from kr_ray.report.importance import parameter_words
from kr_ray.report.repetition import repetition
from kr_ray.report.schema import Report, Scaling, Tuning
from kr_ray.report.words import bind, count, percent
from kr_ray.runs.figures import Attacked, ClassifierPoint, GeneratorPoint


def alt_texts(report: Report) -> dict[str, str]:
    """A text for every figure that `build.draw_figures` can draw of this report, by the same names."""
    texts = _training(report) | _tuning(report.tuning) | _attacks(report)
    if report.frontier:
        texts["frontier"] = frontier_in_words(report.frontier)
    if checkpoints := _checkpoints(report):
        texts["checkpoints"] = checkpoints
    if report.scaling:
        texts["scaling"] = _scaling(report.scaling)
    for name in ("teacher", "student"):
        part = getattr(report, name)
        if part and part.confusion:
            texts[f"{name}_confusion"] = _confusion(name, part.confusion, report.data.class_names)
    return {name: bind(text) for name, text in texts.items()}


def _checkpoints(report: Report) -> str:
    if not report.checkpoints:
        return ""
    first, best, last = report.checkpoints[0], best_checkpoint(report.checkpoints), report.checkpoints[-1]
    text = (
        f"Validation CAS by generator epoch: {percent(first.val_cas, 1)} % at epoch "
        f"{first.epoch}, highest {percent(best.val_cas, 1)} % at epoch {best.epoch}, "
        f"{percent(last.val_cas, 1)} % at the last, {last.epoch}."
    )
    if report.teacher:
        text += f" The teacher’s validation accuracy is {percent(report.teacher.val_accuracy, 1)} %."
    if report.tuning:
        tuned = percent(report.tuning.best.val_cas, 1)
        text += f" With tuned parameters the chosen checkpoint reaches {tuned} %."
    return text


def _scaling(scaling: Scaling) -> str:
    said = [
        f"{size.scale} times: {percent(size.alone.mean, 1)} % alone, "
        f"{percent(size.with_real.mean, 1)} % with the real images"
        for size in scaling.sizes()
    ]
    return f"Test accuracy by number of synthetic images over real ones. {'; '.join(said)}."


def _tuning(tuning: Tuning | None) -> dict[str, str]:
    if tuning is None:
        return {}
    best = tuning.best
    by_trial = f"Validation CAS by trial: the best is trial {best.trial} with {percent(best.val_cas, 1)} %"
    by_trial += (
        f", the default parameters reach {percent(tuning.default_cas, 1)} %."
        if tuning.default_cas is not None
        else "."
    )
    texts = {
        "tuning": by_trial,
        "parameters": (f"Validation CAS against each parameter: the best trial has {_values(best.params)}."),
    }
    if tuning.importance:
        texts["importance"] = (
            "Share of the variance of CAS that each parameter explains: "
            f"{parameter_words(tuning.importance)}."
        )
    return texts


def _values(parameters: Mapping[str, float]) -> str:
    """`latent std 1.53 and regeneration rate 4`."""
    texts = [
        f"{name.replace('_', ' ')} {value if isinstance(value, int) else format(value, '.2f')}"
        for name, value in parameters.items()
    ]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _attacks(report: Report) -> dict[str, str]:
    texts, audit = {}, report.audit
    if audit and audit.kr:
        parts = [
            _curve(name, part)
            for name, part in (("teacher", audit.kr.teacher), ("student", audit.kr.student))
            if part
        ]
        texts["roc"] = (
            f"ROC curves of the average attack: {'; '.join(parts)}; guessing is the diagonal, 50 %."
        )
    if audit and audit.lira:
        rates = [
            f"{arm.title or name}, {percent(arm.canary.tpr_at_01, 1)} % of canaries and "
            f"{percent(arm.population.tpr_at_01, 1)} % of ordinary images"
            for name, arm in audit.lira.items()
            if arm.canary.tpr_at_01 is not None
        ]
        at = "; ".join(rates) or "too few pairs to say"
        texts["worst_case"] = (
            f"Log-log ROC curves of the worst-case attack. Recognised at 0.1 % false accusations: {at}."
        )
    if audit and audit.copies:
        texts["copies"] = (
            "Distances of generated and of real test images to the nearest training image. "
            f"{repetition(audit.copies).sentence}"
        )
    return texts  # fmt: skip


def _curve(name: str, attacked: Attacked) -> str:
    return f"AUC {percent(attacked.auc_raw, 1)} % against the {name}"


def _confusion(name: str, confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    right = sum(row[index] for index, row in enumerate(confusion))
    total = sum(sum(row) for row in confusion)
    wrong = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j and n]
    text = f"Confusion matrix of the {name}: {count(right)} of {count(total)} test images on the diagonal"
    if not wrong:
        return f"{text}, no mistake."
    n, true, predicted = max(wrong)
    mistake = f"“{class_names[true]}” taken for “{class_names[predicted]}”"
    return f"{text}; the most frequent mistake, {count(n)} times, is {mistake}."


def _training(report: Report) -> dict[str, str]:
    texts = {}
    for name, measure in (("teacher", "accuracy"), ("student", "CAS")):
        part = getattr(report, name)
        if part and part.curve:
            texts[f"{name}_curve"] = _classifier(name, measure, part.curve)
    if report.generator and report.generator.curve:
        texts["gan"] = _losses(report.generator.curve)
    if report.generator and report.generator.collapse:
        points = report.generator.collapse
        alarms, final = sum(point.alarm for point in points), points[-1]
        texts["collapse"] = (
            f"{alarms} of {len(points)} checkpoints raised the collapse alarm; at the last, agreement is "
            f"{percent(final.agreement, 0)} % "
            f"and diversity {percent(final.diversity, 0)} % of the real images’."
        )
    return texts


def _losses(curve: Sequence[GeneratorPoint]) -> str:
    last = curve[-1]
    values = {name: value for name, value in (last.model_extra or {}).items() if name.startswith("loss")}
    ends = [
        f"{loss_name(name)} {value:.2f}" if value is not None else f"{loss_name(name)} not finite"
        for name, value in values.items()
    ]
    return f"Losses by epoch; at the end, epoch {last.epoch:g}: {', '.join(ends) or 'none was recorded'}."


def _classifier(name: str, measure: str, curve: Sequence[ClassifierPoint]) -> str:
    losses = [point.train_loss for point in curve if point.train_loss is not None]
    scores = [point.val_accuracy for point in curve if point.val_accuracy is not None]
    parts = [f"training loss falls from {losses[0]:.2f} to {losses[-1]:.2f}"] if losses else []
    if losses and losses[-1] >= losses[0]:
        parts = [f"training loss goes from {losses[0]:.2f} to {losses[-1]:.2f}"]
    if scores:
        parts.append(
            f"validation {measure} ends at {percent(scores[-1], 1)} %, "
            f"its highest {percent(max(scores), 1)} %"
        )
    return f"The {name} by epoch: {' and '.join(parts) or 'nothing finite was recorded'}."
