"""Nothing leaves the machine but what a person asked for: the switches of all libraries that would report on
their own.

A library reads its switch when it is imported or first used, so `stay_silent` is called before: by `kr` and
the jobs at their very start, and by whoever imports such a library outside of them. Workers of a local Ray
inherit the environment, those of a joined cluster get it with their job, and `docker/Dockerfile` sets the
same for all that runs in a container (`tests/test_silence.py` compares).
"""

from __future__ import annotations

import os

SWITCHES = {
    # From 1.29 on onnxruntime keeps a device id and queued events for its vendor's server in HOME, at every
    # session.
    "ORT_DISABLE_TELEMETRY": "1",
    # Ray's usage statistics. (It asks clouds about the machine all the same: see kr_ray.cluster.runtime.)
    "RAY_USAGE_STATS_ENABLED": "0",
    # Hugging Face's hub, which torchmetrics, datasets and others reach.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # MLflow counts calls since 3.2, also those of its client.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # What several others look at; spelt as MLflow wants it, Hugging Face takes it in any spelling.
    "DO_NOT_TRACK": "true",
}
"""Environment variable to the value that switches reports off."""


def stay_silent() -> None:
    """Switch them all off for this process and those it starts, whatever the environment said before."""
    os.environ.update(SWITCHES)
