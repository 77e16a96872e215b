"""What the tests share: real data where it lies, tiny configurations, one Ray per module."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kr_ray.config import BigGanConfig, ClassifierConfig, Config
from kr_ray.config.file import parse_config

# Two spinning OpenMP threads on shared cores cost twice the wall time of one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, what `nohup` starts ignores SIGHUP, and so does what they start;
# the commands under test must hear both.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def tiny_settings(**sections: Any) -> dict[str, Any]:
    """A raw configuration that runs every stage in seconds; `sections` are merged over it."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "data": {"name": "digits", "image_size": 16, "max_train_images": 160, "max_test_images": 80},
        "classifier": {"width": 4, "min_steps": 20, "batch_size": 64, "horizontal_flip": False},
        "teacher": {"epochs": 4},
        "generator": {
            "architecture": "tiny16",
            "epochs": 4,
            "batch_size": 32,
            "checkpoint_every": 2,
            "d_steps": 2,
        },
        "synthesis": {"epoch_unit": "real", "regeneration_rate": 2, "sampling": {"standing_batches": 2}},
        "checkpoints": {"epochs": 5},
        "tuning": {
            "trials": 4,
            "epochs": 4,
            "rungs": 2,
            "reduction_factor": 2,
            "startup_trials": 2,
            "space": {"latent_std": [1.0, 2.5], "regeneration_rate": [1, 10], "cardinality_scale": [1, 2]},
        },
        "student": {"epochs": 6},
        "audit": {"shadow": {"models": 3, "epochs": 4}},
        "cluster": {"train": {"cpu": 1.0}},
    }
    return merged(raw, sections)


def merged(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`raw` with `changes` merged into it, section by section."""
    both = {
        key: merged(raw[key], changes[key])
        for key in raw.keys() & changes.keys()
        if isinstance(changes[key], dict)
    }
    return raw | changes | both


def tiny_config(**sections: Any) -> Config:
    return parse_config(tiny_settings(**sections))


def tiny_generator(**keys: Any) -> BigGanConfig:
    return tiny_config(generator=keys).generator


def tiny_recipe(**keys: Any) -> ClassifierConfig:
    return tiny_config(classifier=keys).classifier


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not beside the project")
    return SHARED_DATA
