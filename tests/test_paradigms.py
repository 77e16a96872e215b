"""Ways of not handing on the images, beside each other on real ones: what each is worth and what it takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_settings
from test_pipeline import kr, write_config

from kr_ray.audits.design import design_audit
from kr_ray.config import Config
from kr_ray.config.coreset import CoresetSection
from kr_ray.config.file import load_config
from kr_ray.data.datasets import load_splits
from kr_ray.data.images import Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.methods.coreset.rules import SelectionScores, select
from kr_ray.methods.coreset.selection import SCORES_FILE, selection_part
from kr_ray.methods.data_free.training import BANK_FILE
from kr_ray.methods.interface import Site, train_here
from kr_ray.methods.registry import method_of
from kr_ray.report.schema import validate_report
from kr_ray.runs.artifacts import read_json
from kr_ray.synthesis.student_set import StudentSpec

CORESETS = ("random", "forgetting", "herding")
STUDENTS = {
    f"coreset_{rule}": f"{{kind: coreset, selection: {rule}, fraction: 0.5, epochs: 80}}" for rule in CORESETS
} | {
    "data_free": (
        "{kind: data_free, rounds: 100, warmup_rounds: 10, synthesis_steps: 5, synthesis_batch: 64, "
        "kd_steps: 20, batch_size: 64, onehot_weight: 1.0}"
    )
}


def folder_of(tmp_path: Path) -> Path:
    """PARADIGMS_FOLDER keeps what is trained, so that a run that was ended goes on."""
    return Path(os.environ.get("PARADIGMS_FOLDER", tmp_path))


def audited(shared_data: Path, *overrides: str) -> Config:
    path = REPOSITORY / "configs" / "fashionmnist_audit.yaml"
    return load_config(path, [f"data.root={shared_data}", *overrides])


def site(folder: Path, config: Config, splits: Splits) -> Site:
    save_splits(folder / SPLITS_FILE, splits)
    spec = StudentSpec(config.generator, 1, config.synthesis, 1, 0)
    return Site(path=folder, config=config, seed=config.seed, student=spec)


def quietly(text: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_accuracies_on_fashion_mnist(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed of `configs/fashionmnist_audit.yaml`."""
    folder = folder_of(tmp_path)
    config = audited(shared_data, *(f"students.{name}={section}" for name, section in STUDENTS.items()))
    splits = load_splits(config.data, min_images=1)
    place = site(folder, config, splits)
    found: dict[str, dict[str, Any]] = {}
    for name in ("teacher", *STUDENTS):
        last = name if name == "teacher" else f"student_{name}"
        parts = method_of(name, config).parts(place, last)
        trained = train_here(place, parts, splits.digest(), quietly)
        found[name] = read_json(trained / "done.json")["result"]
    selection = read_json(folder / "selection_40" / "done.json")["result"]
    with capsys.disabled():
        print(f"\nselection training: {selection['never_learned']} of {selection['images']} never learned, ")
        print(f"{selection['mean_forgotten']:.2f} events an image, {selection['seconds']:.0f} s")
        for name, row in found.items():
            more = f", {row['selected']} images" if "selected" in row else ""
            more += f", bank as drawn {row['bank_agreement']:.2f}" if "bank" in row else ""
            print(
                f"{name}: test accuracy {row['test_accuracy']:.4f}, {row['steps']} steps, "
                f"{row['work']['cpu_seconds']:.0f} CPU s{more}"
            )
    chance = 1 / splits.num_classes
    assert all(row["test_accuracy"] > 2 * chance for row in found.values())
    assert all(row["test_accuracy"] < found["teacher"]["test_accuracy"] + 0.03 for row in found.values())


SETTINGS = {
    "80 epochs, not augmented": (80, ("classifier.crop_padding=0", "classifier.horizontal_flip=false")),
    "10 epochs, augmented": (10, ()),
}
SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_which_rules_select_mislabeled_canaries(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two fifths of every class of a run of the audit, in which half of 168 canaries bear a wrong label."""
    rules: dict[str, dict[str, str]] = {
        "random": {},
        "forgetting": {},
        "forgetting, zero": {"never_learned": "zero"},
        "herding": {},
        "k_center": {},
        "el2n": {},
        "el2n, end": {"scored": "end"},
        "grand": {},
        "entropy": {},
    }
    lines = []
    for setting, (epochs, overrides) in SETTINGS.items():
        shares: dict[str, list[float]] = {rule: [] for rule in rules}
        learned = []
        for seed in SEEDS:
            config = audited(shared_data, f"seed={seed}", *overrides)
            design = design_audit(load_splits(config.data, min_images=1), config.audit.worst_case, seed)
            splits = design.splits_of_run(load_splits(config.data, min_images=1), 0)
            place = site(folder_of(tmp_path) / f"{epochs}-{seed}", config, splits)
            folder = train_here(place, [selection_part(place, epochs)], splits.digest(), quietly)
            scores = SelectionScores.load(folder / SCORES_FILE)
            kept = np.setdiff1d(
                np.arange(config.data.max_train_images), design.samples[~design.members_of(0)]
            )
            canaries = np.flatnonzero(np.isin(kept, design.canaries))
            learned.append(float(scores.learned.numpy()[canaries].mean()))
            for rule, keys in rules.items():
                section = CoresetSection.model_validate(
                    {"selection": rule.partition(",")[0], "fraction": 0.4} | keys
                )
                taken = select(section, splits.train.labels, splits.num_classes, scores, seed)
                shares[rule].append(float(np.isin(canaries, taken.numpy()).mean()))
        assert all(abs(share - 0.4) < 0.2 for share in shares["random"])
        assert np.greater_equal(shares["forgetting"], shares["forgetting, zero"]).all()
        lines.append(f"{setting}: {np.mean(learned):.0%} of the canaries learned at least once")
        lines += [
            f"  {rule}: {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for rule, values in shares.items()
        ]
    with capsys.disabled():
        print(f"\nshare of the mislabeled canaries that is selected, mean and range of {len(SEEDS)} seeds")
        print("\n".join(lines))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_and_its_audit_show_them_beside_the_student(tmp_path: Path) -> None:
    """Two coresets share one selection stage; the report tells what was taken."""
    small = {"rounds": 4, "warmup_rounds": 1, "synthesis_steps": 2, "synthesis_batch": 16, "kd_steps": 4}
    raw = tiny_settings(
        students={
            "herd": {"kind": "coreset", "selection": "herding", "epochs": 4, "selection_epochs": 3},
            "forgotten": {"kind": "coreset", "selection": "forgetting", "epochs": 4, "selection_epochs": 3},
            "free": {"kind": "data_free", "batch_size": 16, "latent_dim": 8} | small,
        },
        audit={"worst_case": {"arms": ["herd", "free"], "models": 4, "queries": 2}},
    )
    config, run = write_config(tmp_path, raw), tmp_path / "runs" / "tiny"
    output = kr("run", config).stdout
    assert output.count("selection_3: done") == 1 and "forgetting events an image" in output
    report = validate_report(read_json(run / "report" / "report.json"))
    assert report.students["forgotten"].title == "Coreset, forgetting"
    assert "never learned counts as most forgotten" in report.students["forgotten"].note
    assert set(report.students) == {"herd", "forgotten", "free"} and report.audit is not None
    herd, free = report.audit.lira["herd"], report.audit.lira["free"]
    assert herd.canary_taken is not None and 0 < herd.canary_taken.share < 1 and free.canary_taken is None
    assert "Images that the method took" in (run / "report" / "report.html").read_text()
    assert (run / "student_herd" / "taken.npz").exists() and (run / "student_free" / BANK_FILE).exists()
