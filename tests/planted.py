"""Secrets planted in a driver's environment, and where they turn up."""

from __future__ import annotations

import os
from pathlib import Path

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN",
           "HF_TOKEN",
           "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY")  # fmt: skip
PLANTED = {name: f"planted-{index}-of-these-tests" for index, name in enumerate(SECRETS)}


def found_in(secrets: dict[str, str], *folders: Path) -> list[tuple[str, Path]]:
    """Name and file of every secret that stands in a file below the folders, or in its name."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20, files  # there was something to look at
    contents = {path: path.read_bytes() + os.fsencode(path) for path in files}
    return [
        (name, path)
        for name, value in secrets.items()
        for path, data in contents.items()
        if value.encode() in data
    ]
