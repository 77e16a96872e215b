"""Generators and labellings side by side: names, curves, the figure, and the whole through the product."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_config
from PIL import Image

from kr_ray.config import BigGanConfig, ConfigError, EdmConfig
from kr_ray.config.compared import with_generator
from kr_ray.config.generators import ARCHITECTURES, TRAINING_PRESETS
from kr_ray.report.comparison import save_comparison
from kr_ray.runs.comparisons import CheckpointRow, GeneratorComparison


def test_a_preset_changes_what_it_fills_and_leaves_the_runs_own_keys() -> None:
    config = tiny_config()
    vanilla = with_generator(config, "vanilla").generator
    assert isinstance(vanilla, BigGanConfig) and isinstance(config.generator, BigGanConfig)
    assert (vanilla.preset, vanilla.loss, vanilla.d_optimizer) == ("vanilla", "hinge", "adam")
    # The run has said d_steps: 2, but it cannot be told from what its preset filled in.
    assert vanilla.d_steps == TRAINING_PRESETS["vanilla"]["d_steps"]
    own = {"architecture", "channels", "epochs", "checkpoint_every", "batch_size", "latent_dim"}
    assert all(getattr(vanilla, key) == getattr(config.generator, key) for key in own)
    assert with_generator(config, "run") == config
    larger = with_generator(config, "run,architecture=small16,epochs=8").generator
    assert isinstance(larger, BigGanConfig)
    assert (larger.channels, larger.epochs, larger.loss) == (
        ARCHITECTURES["small16"]["channels"],
        8,
        "logistic",
    )


def test_another_kind_has_the_runs_length_and_its_own_way_of_drawing() -> None:
    config = tiny_config()
    edm = with_generator(config, "edm,channels=[8, 16],checkpoint_every=1")
    assert isinstance(edm.generator, EdmConfig)
    assert (edm.generator.epochs, edm.generator.checkpoint_every) == (4, 1)
    assert edm.generator.channels == (8, 16) and edm.synthesis.pool_scale == 3
    assert (edm.synthesis.regeneration_rate, edm.teacher) == (2, config.teacher)
    back = with_generator(edm, "ours,architecture=tiny16")
    assert isinstance(back.generator, BigGanConfig) and back.synthesis.pool_scale == 0
    both = with_generator(config, "several,members=[{kind: edm, epochs: 4}, {kind: edm, epochs: 2}]")
    assert (both.generator.kind, both.generator.epochs) == ("several", 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vanila", r"must begin with one of run, ours, vanilla, .*got vanila"),
        ("edm,stps=3", r"--generators edm,stps=3.*generator.stps: unknown key"),
        ("edm,epochs=[", r"must hold values in YAML, but got edm,epochs=\["),
        ("vanilla,architecture=small32", r"data.image_size == 4"),
    ],
)
def test_wrong_names_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + said):
        with_generator(tiny_config(), name)


def row(generator: str, epoch: int, cas: float, seed: int = 0) -> CheckpointRow:
    return CheckpointRow(generator=generator, labelling="hard", epoch=epoch, seed=seed, val_cas=cas)


COMPARISON = GeneratorComparison(
    teacher=0.9,
    rows=[
        row("ours", 5, 0.6),
        row("ours", 10, 0.8),
        row("ours", 5, 0.7, seed=1),
        row("ours", 10, 0.8, seed=1),
        row("vanilla", 10, 0.5),
        row("vanilla", 5, 0.5),
    ],
)


def test_curves_are_means_over_seeds_in_the_order_of_epochs() -> None:
    ours, vanilla = COMPARISON.curves()
    assert (ours.generator, ours.labelling, ours.epochs, ours.n) == ("ours", "hard", [5, 10], 2)
    assert ours.means == pytest.approx([0.65, 0.8]) and ours.sds == pytest.approx([0.0707107, 0.0])
    assert (ours.best, vanilla.epochs, vanilla.best, vanilla.n) == (1, [5, 10], 0, 1)


def test_the_figure_is_a_picture_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_comparison(COMPARISON, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 1000
