"""The membership inference attack of section 3.6 as Ray tasks: one per shadow model, attacked class and attacked model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kr_ray.audits.shadows import train_shadow
from kr_ray.audits.targets import target_logits
from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import AuditConfig, ClassifierConfig, Config
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.privacy.shadow_attack import Attack, AttackResult, ClassAttack, attack_model, fit_class_attack
from kr_ray.runs.progress import report_progress


def _scores_file(folder: Path, shadow: int) -> Path:
    return folder / f"scores_{shadow:02d}.npz"


def train_shadows(run: Path, folder: Path, config: Config) -> None:
    """Train the shadow models that have no scores yet."""

    def work(shadow: int) -> None:
        _train_one_shadow(run, folder, config.classifier, config.audit, config.seed, shadow)

    missing = [(k,) for k in range(config.audit.shadow_models) if not _scores_file(folder, k).exists()]
    run_tasks("shadow model", work, missing, config.cluster.trial, config.cluster.max_retries)


def _train_one_shadow(run: Path, folder: Path, recipe: ClassifierConfig, audit: AuditConfig, seed: int, shadow: int) -> None:
    train_shadow(run, _scores_file(folder, shadow), recipe, audit, seed, shadow)
    report_progress(folder, f"shadow_{shadow:02d}", 1.0, f"shadow model {shadow}")


def attack_teacher_and_student(run: Path, results: dict[str, Any], config: Config) -> dict[str, Any]:
    """Fit the attack on the shadows' logits and run it against both models; see report.schema.KrAudit."""
    audit, cluster = config.audit, config.cluster
    shadows = [_scores_file(run / "shadows", k) for k in range(audit.shadow_models)]
    classes = range(results["data"]["num_classes"])
    fitted = run_tasks(
        "attack on class",
        _fit_one_class,
        [(shadows, index, derive_seed(config.seed, "attack") % 2**31, audit) for index in classes],
        cluster.trial,
        cluster.max_retries,
    )
    attack = Attack({model.class_index: model for model in fitted})
    attacked = run_tasks(
        "attack",
        _attack_one_model,
        [(attack, run, run / name / "weights.safetensors") for name in ("teacher", "student")],
        cluster.trial,
        cluster.max_retries,
    )
    accuracies = {name: results[name]["test_accuracy"] for name in ("teacher", "student")}
    return {
        **{name: result.describe(accuracies[name]) for name, result in zip(accuracies, attacked, strict=True)},
        "attack_models": [model.describe() for model in fitted],
        "shadow_models": audit.shadow_models,
        "members": attacked[0].members,
        "non_members": attacked[0].non_members,
    }


def _fit_one_class(shadows: Sequence[Path], class_index: int, seed: int, audit: AuditConfig) -> ClassAttack:
    scores = [ShadowScores.load(path) for path in shadows]
    return fit_class_attack(scores, class_index, seed, audit.attack_holdout, audit.max_svc_rows)


def _attack_one_model(attack: Attack, run: Path, weights: Path) -> AttackResult:
    target = target_logits(run, weights)
    return attack_model(attack, target.member_logits, target.member_labels, target.non_member_logits, target.non_member_labels)
