"""Anybody's own scores from a file: `kr audit --scores FILE`. Numpy, scipy and pyarrow only.

Higher scores mean "more likely a member". An npz file holds one of

* one model: `member_scores` [M] and `non_member_scores` [N];
* many models: `scores` [models, samples] and `member` [models, samples] (bool or 0/1); besides the scores as
  they are, LiRA is run on them, so that each should be roughly Gaussian over the models, such as log(p / (1 -
  p)) of the label's confidence;
* all attacks: `logits` [models, samples, classes] or [models, samples, queries, classes], `labels` [samples]
  (as given in training, 0, 1, ...) and `member` [models, samples]; optionally `true_labels` [samples], where
  the given label was wrong (what `SampleScores.save` writes is such a file); for RMIA also `reference_logits`
  [models, reference, classes] and `reference_labels` [reference] of images that no model saw.

With many models every sample must be a member of at least two and a non-member of at least two. An optional
`canary` [samples] (bool or 0/1) splits the samples into two groups, whose figures stand side by side.

A Parquet file is a long table, one row per model and sample: `model`, `sample` (numbers or names), `score`,
`member`, and optionally `canary`; with one model it is read as the first form, with more as the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kr_ray.foreign.files import contents_of, decoding, shown
from kr_ray.foreign.npz import listed, read_arrays
from kr_ray.foreign.parquet import read_table
from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray
from kr_ray.privacy.attacks import (
    HEADLINE,
    figures,
    group_scores,
    judged_pairs,
    lira_variants,
    true_label_scores,
)
from kr_ray.privacy.epsilon import DELTA, simultaneous_epsilon
from kr_ray.privacy.metrics import CHANCE_AUC
from kr_ray.privacy.rates import CONFIDENCE, auc_interval, pair_scores
from kr_ray.privacy.scores import (
    MIN_MODELS,
    ReferenceScores,
    SampleScores,
    ScoreError,
    check_finite,
    check_member,
)
from kr_ray.runs.figures import Proven, ScoreAudit

Arrays = Mapping[str, NDArray[Any]]
Form = Literal["one model", "many models", "logits"]

NPZ_FORMS: dict[Form, tuple[set[str], set[str]]] = {
    "one model": ({"member_scores", "non_member_scores"}, set()),
    "many models": ({"scores", "member"}, {"canary"}),
    "logits": (
        {"logits", "labels", "member"},
        {"true_labels", "canary", "reference_logits", "reference_labels"},
    ),
}
"""Form -> keys that must be there, keys that may be."""
DIRECTED = ("global_threshold", "lira_offline_fixed")
"""Attacks on plain scores that find nothing where the sign is wrong; a
likelihood ratio of both sides does not mind."""
SIGN_CONFIDENCE = 0.99
"""Of the interval that must lie below 0.5 before scores are said to have the wrong sign."""
COLUMNS = ("model", "sample", "score", "member")
MUST = "must be a score file (.npz or .parquet)"
TABLE_REMEDY = "save the table as Parquet: pandas.read_csv(FILE).to_parquet('scores.parquet')"


LARGEST = 1e100
"""Scores of several models are squared and summed by LiRA; larger ones leave double precision."""


@dataclass(frozen=True)
class Scored:
    """A file's scores under every attack.

    Attributes:
        headline: the attack that counts as chosen before its figures were seen.
        member: by group, bool [models, samples].
        scores: attack -> group -> float64 [models, samples], higher = member.
        negated: the same attacks on the file's scores with the other sign, where it holds plain scores.
    """

    headline: str
    member: Mapping[str, BoolArray]
    scores: Mapping[str, Mapping[str, FloatArray]]
    negated: Callable[[], Scored] | None = None


def audit_score_file(path: Path, seed: int) -> ScoreAudit:
    """Attack the models of a score file.

    Raises:
        ScoreError: no such file, unreadable, wrong keys, or scores that cannot be audited.
    """
    form, scored = _scored(path, seed)
    rows = [(name, group) for name, groups in scored.scores.items() for group in groups]
    judged = {group: judged_pairs(member) for group, member in scored.member.items()}
    return ScoreAudit(
        file=str(path),
        form=form,
        models=len(next(iter(scored.member.values()))),
        headline=scored.headline,
        attacks={
            name: {group: figures(values, scored.member[group], seed) for group, values in groups.items()}
            for name, groups in scored.scores.items()
        },
        proven=_proven(scored, rows, judged, seed),
        remarks=[*_equal_scores(scored), *_turned_scores(scored, seed), *_unjudged_pairs(judged)],
    )


def _proven(
    scored: Scored, rows: Sequence[tuple[str, str]], judged: Mapping[str, BoolArray], seed: int
) -> Proven:
    """The largest bound of all attacks and groups together."""
    attacks = [(scored.scores[name][group], scored.member[group], judged[group]) for name, group in rows]
    found = simultaneous_epsilon(attacks, seed)
    about = {"epsilon": found.epsilon, "rows": len(rows), "delta": DELTA, "confidence": CONFIDENCE}
    if found.attack is None:
        return Proven.model_validate(about | {"attack": None})
    name, group = rows[found.attack]
    return Proven.model_validate(about | {"attack": name, "group": group})


def _scored(path: Path, seed: int) -> tuple[Form, Scored]:
    """The file's form, and its scores under every attack; all refusals name the file."""
    try:
        form, arrays = _read_file(path)
        return form, FORMS[form](arrays, seed)
    except ScoreError as error:
        name = shown(path)
        raise error if name in str(error) else ScoreError(f"{name}: {error}") from error


# --- what a reader must know --------------------------------------------------------------------------------


def _equal_scores(scored: Scored) -> Iterator[str]:
    for name, groups in scored.scores.items():
        for group, values in groups.items():
            if values.min() == values.max():
                yield (
                    f"{name}, {group}: all {values.size} scores are equal, so this attack says nothing; "
                    "check the scores, or how many digits they were saved with"
                )


def _turned_scores(scored: Scored, seed: int) -> Iterator[str]:
    """Attacks that rank members lower, as they do on losses."""
    if scored.negated is None:
        return
    turned: Scored | None = None
    for name in (name for name in DIRECTED if name in scored.scores):
        for group, values in scored.scores[name].items():
            member = scored.member[group]
            area, _, high = auc_interval(pair_scores(values, member, judged_pairs(member)), SIGN_CONFIDENCE)
            if high >= CHANCE_AUC:
                continue
            turned = turned or scored.negated()
            found = figures(turned.scores[name][group], member, seed)
            bound = found.epsilon.clopper_pearson
            yield (
                f"{name}, {group}: AUC {area:.4f} lies below 0.5: members score lower than non-members, "
                'as they do where scores are losses. Higher must mean "more likely a member": '
                f"negated, these scores give AUC {found.auc:.4f}"
                f"{'' if bound is None else f', epsilon >= {bound:.2f}'}. Save them negated"
            )


def _unjudged_pairs(judged: Mapping[str, BoolArray]) -> Iterator[str]:
    for group, pairs in judged.items():
        if not pairs.all():
            yield (
                f"{group}: {int((~pairs).sum())} of {pairs.size} pairs of a model and a sample are left "
                f"out, for the other models' membership settles theirs (every sample is in >= {MIN_MODELS} "
                f"models and out of >= {MIN_MODELS})"
            )


# --- the three forms ----------------------------------------------------------------------------------------


def _one_model(arrays: Arrays, seed: int) -> Scored:
    parts = [_numbers(arrays, name, 1) for name in ("member_scores", "non_member_scores")]
    for name, values in zip(("member_scores", "non_member_scores"), parts, strict=True):
        if not values.size:
            raise ScoreError(
                f"`{name}` must hold at least one score, but is empty; both "
                "members and non-members are needed"
            )
    member = {"all": (np.arange(sum(map(len, parts))) < len(parts[0]))[None]}

    def scored(scores: FloatArray) -> Scored:
        return Scored("global_threshold", member, {"global_threshold": {"all": scores}})

    scores = np.concatenate(parts)[None]
    return replace(scored(scores), negated=lambda: scored(-scores))


def _many_models(arrays: Arrays, seed: int) -> Scored:
    scores = _numbers(arrays, "scores", 2)
    member = _flags(arrays, "member")
    check_member(member, *scores.shape)
    _check_size(scores)
    groups = _groups(arrays, scores.shape[1])
    inside = {group: member[:, rows] for group, rows in groups.items()}

    def scored(scores: FloatArray) -> Scored:
        attacks: dict[str, dict[str, FloatArray]] = {}
        for group, rows in groups.items():
            lira = lira_variants(_of_one_size(scores[:, rows])[..., None], inside[group])
            for name, values in {"global_threshold": scores[:, rows], **lira}.items():
                attacks.setdefault(name, {})[group] = values
        return Scored("lira_online_fixed", inside, attacks)

    return replace(scored(scores), negated=lambda: scored(-scores))


def _check_size(scores: FloatArray) -> None:
    model, sample = np.unravel_index(int(np.abs(scores).argmax()), scores.shape)
    if abs(scores[model, sample]) > LARGEST:
        raise ScoreError(
            f"`|scores| <= {LARGEST:g}` must hold with several models, but got "
            f"{scores[model, sample]:g} (model {model}, sample {sample}); divide all scores "
            "by one number, or replace what stands for infinity there"
        )


def _of_one_size(scores: FloatArray) -> FloatArray:
    """The scores at a standard deviation of 1, or as they are where all are
    equal: LiRA's floor of a variance is absolute."""
    largest = float(np.abs(scores).max())
    if largest == 0:
        return scores
    relative = scores / largest
    deviation = float(relative.std())
    return relative / deviation if deviation > 0 else relative


def _logits(arrays: Arrays, seed: int) -> Scored:
    everything, reference = _samples(arrays), _reference(arrays)
    labels, true_labels = everything.labels, everything.true_labels
    groups = {
        group: SampleScores(
            everything.logits[:, rows], labels[rows], true_labels[rows], everything.member[:, rows]
        )
        for group, rows in _groups(arrays, len(labels)).items()
    }
    scores: dict[str, dict[str, FloatArray]] = dict(group_scores(groups, reference, seed))
    true = {group: true_label_scores(samples) for group, samples in groups.items()}
    if mislabeled := {group: found for group, found in true.items() if found is not None}:
        scores[f"{HEADLINE}_true_label"] = mislabeled
    return Scored(HEADLINE, {group: samples.member for group, samples in groups.items()}, scores)


def _samples(arrays: Arrays) -> SampleScores:
    logits = arrays["logits"][:, :, None] if arrays["logits"].ndim == 3 else arrays["logits"]
    labels = _integers(arrays, "labels")
    true_labels = _integers(arrays, "true_labels") if "true_labels" in arrays else labels
    return SampleScores(_single(logits, "logits"), labels, true_labels, _flags(arrays, "member"))


def _reference(arrays: Arrays) -> ReferenceScores | None:
    there = [name in arrays for name in ("reference_logits", "reference_labels")]
    if any(there) != all(there):
        raise ScoreError(
            "`reference_logits` and `reference_labels` must come together, "
            "but one is missing; add it, or leave out both"
        )
    if not all(there):
        return None
    return ReferenceScores(
        _single(arrays["reference_logits"], "reference_logits"), _integers(arrays, "reference_labels")
    )


def _groups(arrays: Arrays, samples: int) -> dict[str, IndexArray]:
    """Indices of each group's samples."""
    if "canary" not in arrays:
        return {"all": np.arange(samples)}
    canary = _flags(arrays, "canary")
    if canary.shape != (samples,):
        raise ScoreError(
            f"`canary` must be [{samples}], one per sample, but got {canary.shape}; save matching arrays"
        )
    groups = {"population": np.flatnonzero(~canary), "canary": np.flatnonzero(canary)}
    return {name: rows for name, rows in groups.items() if rows.size}


def _numbers(arrays: Arrays, name: str, dimensions: int) -> FloatArray:
    values = arrays[name]
    if values.dtype.kind not in "fiu" or values.ndim != dimensions:
        shape = "[M]" if dimensions == 1 else "[models, samples]"
        raise ScoreError(
            f"`{name}` must be numbers, {shape}, but got {values.dtype} {values.shape}; reshape or convert it"
        )
    with np.errstate(over="ignore"):  # long doubles become infinite, and are refused as such
        double = values.astype(np.float64)
    check_finite(name, double)
    return double


def _single(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    if values.dtype.kind not in "fiu":
        raise ScoreError(f"`{name}` must be numbers, but got {values.dtype}; convert before")
    check_finite(name, values)
    largest = float(np.abs(values).max(initial=0))
    if largest > (most := float(np.finfo(np.float32).max)):
        raise ScoreError(
            f"`{name}` must be finite in single precision, at most {most:.2g} in size, but got "
            f"{largest:.2g}; divide all of them by one number"
        )
    return values.astype(np.float32)


def _integers(arrays: Arrays, name: str) -> IndexArray:
    values = arrays[name]
    if values.dtype.kind not in "iu":
        raise ScoreError(
            f"`{name}` must be integers, but got {values.dtype}; number the classes 0, 1, 2, ..."
        )
    return values.astype(np.int64)


def _flags(arrays: Arrays, name: str) -> BoolArray:
    values = arrays[name]
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise ScoreError(
            f"`{name}` must be bool or 0 and 1, but got {values.dtype} with other values; save it as bool"
        )
    return values.astype(np.bool_)


FORMS: dict[Form, Callable[[Arrays, int], Scored]] = {
    "one model": _one_model, "many models": _many_models, "logits": _logits,
}  # fmt: skip


# --- files --------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[Form, Arrays]:
    """By what the file holds; what it is called does not matter."""
    with decoding(path, MUST, (), ScoreError):
        contents = contents_of(path)
    if contents.kind == "parquet":
        return _read_parquet(path)
    if contents.kind not in ("zip", "npy"):
        remedy = (
            TABLE_REMEDY
            if contents.kind == "csv"
            else contents.remedy or "save the scores as .npz or .parquet"
        )
        raise ScoreError(f"`{shown(path)}` {MUST}, but got {contents.words}; {remedy}")
    return _read_npz(path)


def _read_npz(path: Path) -> tuple[Form, Arrays]:
    names, arrays = read_arrays(path, ScoreError)
    found = set(names)
    for form, (needed, optional) in NPZ_FORMS.items():
        if needed <= found <= needed | optional:
            return form, arrays
    forms = "; ".join(
        ", ".join([*sorted(needed), *(f"[{key}]" for key in sorted(more))])
        for needed, more in NPZ_FORMS.values()
    )
    raise ScoreError(
        f"`{path}` must hold one of these sets of arrays: {forms}; but got "
        f"{listed(sorted(found))}; rename or remove"
    )


def _read_parquet(path: Path) -> tuple[Form, Arrays]:
    table = read_table(path, ScoreError)
    missing, unknown = set(COLUMNS) - set(table.column_names), set(table.column_names) - {*COLUMNS, "canary"}
    if missing or unknown:
        raise ScoreError(
            f"`{shown(path)}` must hold the columns {', '.join(COLUMNS)} and may hold canary, but got "
            f"{listed(table.column_names)}; rename or remove columns"
        )
    if nulls := [name for name in table.column_names if table[name].null_count]:
        raise ScoreError(
            f"`{path}` must hold no empty cells, but columns {', '.join(nulls)} do; fill or drop those rows"
        )
    return _pivot(path, {name: _column(table, name) for name in table.column_names})


def _column(table: Any, name: str) -> NDArray[Any]:
    values: NDArray[Any] = table[name].to_numpy()
    if values.dtype.kind not in "biuf" and not (
        name in ("model", "sample") and all(isinstance(v, str) for v in values)
    ):
        raise ScoreError(
            f"`{name}` must be numbers{', or text' if name in ('model', 'sample') else ''}, but got "
            f"{table[name].type}; convert it"
        )
    return values


def _pivot(path: Path, values: Arrays) -> tuple[Form, Arrays]:
    """The table's rows as the arrays of the first form (one model) or the second."""
    models, model = np.unique(values["model"], return_inverse=True)
    samples, sample = np.unique(values["sample"], return_inverse=True)
    cell = model * len(samples) + sample
    if len(cell) != len(models) * len(samples) or len(np.unique(cell)) != len(cell):
        raise ScoreError(
            f"`{path}` must hold every sample under every model exactly once: "
            f"{len(models)} models x {len(samples)} samples, but got {len(cell)} rows, "
            f"{len(np.unique(cell))} of them different; add or drop rows"
        )
    order = np.argsort(cell)
    grid = {
        name: values[name][order].reshape(len(models), len(samples))
        for name in values
        if name not in ("model", "sample")
    }
    if len(models) == 1:
        if "canary" in grid:
            raise ScoreError(
                f"`{path}`: `canary` needs the scores of several models, but got one; remove the column"
            )
        member = _flags(grid, "member")
        return "one model", {
            "member_scores": grid["score"][member],
            "non_member_scores": grid["score"][~member],
        }
    arrays = {"scores": grid["score"], "member": grid["member"]}
    if "canary" in grid:
        if (grid["canary"] != grid["canary"][:1]).any():
            raise ScoreError(
                f"`{path}`: `canary` must be the same for a sample under all models; correct the column"
            )
        arrays["canary"] = grid["canary"][0]
    return "many models", arrays
