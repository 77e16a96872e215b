"""The membership inference attack of section 3.6 as Ray tasks: one per
shadow model, attacked class and attacked model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from kr_ray.audits.shadows import train_shadow
from kr_ray.audits.targets import target_logits
from kr_ray.cluster.tasks import run_tasks
from kr_ray.compute.seeding import derive_seed
from kr_ray.config import Config, ShadowConfig
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.privacy.shadow_attack import Attack, AttackResult, ClassAttack, attack_model, fit_class_attack
from kr_ray.runs.artifacts import READ_ERRORS, is_damage
from kr_ray.runs.figures import KrAudit
from kr_ray.runs.progress import report_progress
from kr_ray.runs.stages import WEIGHTS_FILE


def _scores_file(folder: Path, shadow: int) -> Path:
    return folder / f"scores_{shadow:02d}.npz"


def train_shadows(run: Path, folder: Path, config: Config) -> None:
    """Train the shadow models that have no scores yet."""
    missing = [(k,) for k in range(config.audit.shadow.models) if not _has_scores(_scores_file(folder, k))]
    work = partial(_train_one_shadow, run, folder, config)
    run_tasks("shadow model", work, missing, config.cluster.trial, config.cluster.max_retries)


def _has_scores(path: Path) -> bool:
    try:
        return bool(path.exists() and ShadowScores.load(path))
    except READ_ERRORS as error:
        if not is_damage(error, path):
            raise
        return False


def _train_one_shadow(run: Path, folder: Path, config: Config, shadow: int) -> None:
    path, epochs = _scores_file(folder, shadow), config.audit.shadow.epochs
    train_shadow(run, path, config.classifier, epochs=epochs, seed=config.seed, shadow=shadow)
    report_progress(folder, f"shadow_{shadow:02d}", 1.0, f"shadow model {shadow}")


def attack_models(run: Path, accuracies: Mapping[str, float], num_classes: int, config: Config) -> KrAudit:
    """Fit the attack on the shadows' logits and run it against teacher and student.

    Args:
        accuracies: test accuracy (or test CAS) of the models `teacher` and `student`, in [0, 1].
    """
    keys, cluster = config.audit.shadow, config.cluster
    shadows = [_scores_file(run / "shadows", k) for k in range(keys.models)]
    seed = derive_seed(config.seed, "attack") % 2**31
    classes = [(shadows, index, seed, keys) for index in range(num_classes)]
    fitted = run_tasks("attack on class", _fit_one_class, classes, cluster.trial, cluster.max_retries)
    attack = Attack({model.class_index: model for model in fitted})
    models = [(attack, run, run / name / WEIGHTS_FILE) for name in accuracies]
    attacked = run_tasks("attack", _attack_one_model, models, cluster.trial, cluster.max_retries)
    found = {
        name: result.figures(accuracies[name]) for name, result in zip(accuracies, attacked, strict=True)
    }
    return KrAudit(
        teacher=found.get("teacher"),
        student=found.get("student"),
        attack_models=[model.figures() for model in fitted],
        shadow_models=keys.models,
        members=attacked[0].members,
        non_members=attacked[0].non_members,
    )


def _fit_one_class(shadows: Sequence[Path], class_index: int, seed: int, keys: ShadowConfig) -> ClassAttack:
    scores = [ShadowScores.load(path) for path in shadows]
    return fit_class_attack(scores, class_index, seed, keys.attack_holdout, keys.max_svc_rows)


def _attack_one_model(attack: Attack, run: Path, weights: Path) -> AttackResult:
    target = target_logits(run, weights)
    return attack_model(
        attack, target.member_logits, target.member_labels, target.non_member_logits, target.non_member_labels
    )
