"""The largest number that a key may hold: far above any use, and below
what overflows, runs for ever or fills a disk.

A mistyped number is refused before any work and not after the stages that precede the one that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping

LARGEST_COUNT = 10**9
LARGEST_REAL = 1e9
LARGEST: dict[str, float] = {
    **dict.fromkeys(("seed", "split_seed"), 2**63 - 1),
    # passes over a data set, and what is counted in them
    **dict.fromkeys(("epochs", "teacher_epochs", "selection_epochs", "warmup_epochs", "checkpoint_every",
                     "regeneration_rate", "rungs", "patience"), 10**6),
    # trainings
    **dict.fromkeys(("models", "confirm", "seeds"), 10**4),
    **dict.fromkeys(("match_trainings", "labellers"), 10**3),
    **dict.fromkeys(("trials", "startup_trials", "brackets_in_flight", "reduction_factor", "shortening",
                     "finalists"), 10**5),
    **dict.fromkeys(("teachers", "rounds", "warmup_rounds"), 10**5),
    **dict.fromkeys(("start_epochs", "matched_epochs", "inner_epochs"), 10**6),
    "experts": 10**5,
    # of networks
    "network_width": 2**16,
    **dict.fromkeys(("width", "channels", "latent_dim", "shared_dim", "embedding"), 2**16),
    **dict.fromkeys(("g_in", "g_out", "d_in", "d_out", "bottleneck_ratio", "depth", "blocks", "crop_padding"),
                    2**10),
    **dict.fromkeys(("encoder_size", "attention_resolution"), 2**12),
    "unshuffle": 2**6,
    "random_features": 2**24,
    # of steps
    **dict.fromkeys(("batch_size", "expected_batch_size", "max_physical_batch_size", "standing_batches",
                     "max_draws", "synthesis_batch", "synthesis_steps", "kd_steps"), 10**6),
    **dict.fromkeys(("d_steps", "cardinality_scale", "pool_scale", "scales", "augmentation_multiplicity"),
                    10**4),
    **dict.fromkeys(
        (
            "learning_rate", "learning_rate_g", "learning_rate_d", "warmup_learning_rate",
            "student_learning_rate",
            "generator_learning_rate", "latent_learning_rate",
        ),
        1e3,
    ),
    **dict.fromkeys(("network_learning_rate", "rate_learning_rate", "label_learning_rate"), 1e3),
    "image_learning_rate": 1e6,
    **dict.fromkeys(("real_batch", "network_batch", "images_per_class"), 10**6),
    **dict.fromkeys(("outer_steps", "student_steps"), 10**4),
    **dict.fromkeys(("weight_decay", "d_weight_decay", "mixup_alpha", "latent_std", "temperature", "churn",
                     "rho"), 1e3),
    **dict.fromkeys(("bn_weight", "onehot_weight", "adversarial_weight", "balance_weight",
                     "activation_weight"), 1e6),
    **dict.fromkeys(("sigma_min", "sigma_max"), 1e6),
    # of ln sigma, whose exponential must be a number in float32
    **dict.fromkeys(("noise_mean", "noise_std"), 20),
    # of a cluster
    **dict.fromkeys(("cpu", "gpu", "workers", "min_workers", "trial_workers", "makers", "max_retries"),
                    10**4),
}  # fmt: skip
"""By the key's own name, which means the same in every section; counts and
real numbers that are not here have one limit each."""


def too_large(name: str, value: object) -> str:
    """A message about what no run could use of a key's value, or of the numbers
    in its lists and mappings; empty if all is well."""
    if isinstance(value, Mapping):
        return next(
            filter(None, (too_large(str(key).rpartition(".")[2], part) for key, part in value.items())), ""
        )
    if isinstance(value, (list, tuple)):
        return next(filter(None, (too_large(name, part) for part in value)), "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    largest = LARGEST.get(name, LARGEST_COUNT if isinstance(value, int) else LARGEST_REAL)
    if abs(value) <= largest:
        return ""
    return f"`{name} <= {largest:,.15g}` must hold, but got {name}={str(value)[:40]}; use a smaller number"
