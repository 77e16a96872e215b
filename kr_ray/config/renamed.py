"""Keys that have another name since version 0.1: the old ones are refused with the new one."""

RENAMED = {
    "audit.shadow_models": "audit.shadow.models",
    "audit.epochs": "audit.shadow.epochs",
    "audit.attack_holdout": "audit.shadow.attack_holdout",
    "audit.max_svc_rows": "audit.shadow.max_svc_rows",
    **{
        f"audit.{key}": f"audit.worst_case.{key}"
        for key in (
            "arms", "models", "canary_kind", "canaries", "population", "max_canary_share", "reference",
            "queries", "keep_models"
        )
    },
    **{f"synthesis.{key}": f"synthesis.sampling.{key}" for key in ("latent_std", "standing_batches")},
    **{f"tuning.{key}": f"tuning.space.{key}" for key in ("latent_std", "regeneration_rate",
                                                          "cardinality_scale")},
}  # fmt: skip
