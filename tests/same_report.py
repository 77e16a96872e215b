"""Whether two runs found the same: `python tests/same_report.py OLD/report.json NEW/report.json`.

Every number that both reports hold must be equal to the last bit, times and rates apart. Keys that were
renamed since version 0.1 are compared under their new names; what only one of the two has is named, and is no
difference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RENAMED = {
    "generator.parameters_g": "generator.parameters.generator",
    "generator.parameters_d": "generator.parameters.discriminator",
}
ARMS = {"student_only": "fixed_generator"}
TIMES = ("seconds", "second", "_s", "created")
APART = ("config.", "versions.", "stages.", "device")
"""The configuration is what was asked for, not what was found."""


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}.{ARMS.get(key, key)}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}.{index}")
    else:
        yield RENAMED.get(path, path), value


def found(path: Path) -> dict[str, Any]:
    leaves = dict(numbers(json.loads(path.read_text())))
    return {key: value for key, value in leaves.items() if not (key.endswith(TIMES) or key.startswith(APART))}


def compare(old: Path, new: Path) -> tuple[int, list[str], list[str]]:
    """Number of equal leaves, differences, and what only one of the two holds."""
    one, other = found(old), found(new)
    differ = [
        f"{key}: {one[key]!r} / {other[key]!r}" for key in one.keys() & other.keys() if one[key] != other[key]
    ]
    alone = sorted(f"old: {key}" for key in one.keys() - other.keys() if one[key] is not None)
    alone += sorted(f"new: {key}" for key in other.keys() - one.keys() if other[key] is not None)
    return len(one.keys() & other.keys()) - len(differ), sorted(differ), alone


if __name__ == "__main__":
    equal, differ, alone = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join([f"only {line}" for line in alone] + differ))
    print(f"{equal} values equal to the last bit, {len(differ)} differ, {len(alone)} in one report only")
    sys.exit(bool(differ))
