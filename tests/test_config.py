"""The configuration: every checked-in file loads, every mistake is named, at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, tiny_settings

from kr_ray.config import ConfigError
from kr_ray.config.file import load_config, parse_config

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
PAPER_SETS = {
    "cifar10", "cifar100", "fashionmnist", "bloodmnist", "dermamnist", "organcmnist", "organsmnist",
    "pneumoniamnist", "retinamnist",
}  # fmt: skip


def write(tmp_path: Path, raw: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_checked_in_config_loads(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_there_is_a_config_for_every_data_set_of_the_paper_and_the_small_ones() -> None:
    assert {path.stem for path in CONFIGS} == PAPER_SETS | {
        "quickstart", "pneumoniamnist_small", "breastmnist_small", "fashionmnist_small", "fashionmnist_audit",
        "fashionmnist_private",
        "frontier_quickstart",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAPER_SETS))
def test_paper_scale_is_tables_1_3_and_4(name: str) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    recipe, gan = config.classifier, config.generator
    assert (recipe.width, recipe.batch_size, recipe.learning_rate, recipe.warmup_epochs) == (64, 256, 0.5, 10)
    assert (recipe.warmup_learning_rate, recipe.momentum, recipe.weight_decay, recipe.clip_norm) == (
        1e-5,
        0.9,
        5e-4,
        1.0,
    )
    assert (recipe.label_smoothing, recipe.mixup_alpha, recipe.crop_padding) == (0.1, 0.2, 2)
    assert (gan.loss, gan.output, gan.d_steps, gan.d_label_smoothing, gan.d_weight_decay) == (
        "logistic",
        "sigmoid",
        4,
        0.1,
        0.004,
    )
    assert (gan.batch_size, gan.latent_dim, gan.shared_dim, gan.checkpoint_every, gan.epochs) == (
        64,
        128,
        128,
        5,
        500,
    )
    assert (
        config.teacher.epochs,
        config.student.epochs,
        config.checkpoints.epochs,
        config.tuning.epochs,
    ) == (
        500,
        500,
        100,
        100,
    )
    assert (config.tuning.trials, config.audit.shadow.models) == (50, 10)
    assert (
        config.synthesis.sampling.latent_std,
        config.synthesis.regeneration_rate,
        config.synthesis.cardinality_scale,
    ) == (
        1.0,
        10,
        1,
    )
    assert config.synthesis.epoch_unit == "synthetic"
    # The first rung of Hyperband lies past the learning-rate warm-up.
    assert config.tuning.epochs / config.tuning.rungs > recipe.warmup_epochs


def test_the_paper_scale_configs_differ_in_the_data_set_only() -> None:
    raws = [load_config(REPOSITORY / "configs" / f"{name}.yaml").model_dump() for name in sorted(PAPER_SETS)]
    for raw in raws:
        assert raw.pop("name") == raw["data"].pop("name")
    assert all(raw == raws[0] for raw in raws)


def test_all_mistakes_are_reported_at_once_with_key_value_and_remedy(tmp_path: Path) -> None:
    raw = tiny_settings(
        teacher={"epochs": "many", "epoch": 3},
        synthesis={"sampling": {"latent_std": -1.0}},
        tuning={"space": {"latent_std": [2.5, 1.0]}},
        data={"image_size": 32},
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, raw))
    text = str(caught.value)
    assert "5 mistake(s)" in text
    for part in (
        "teacher.epochs",
        "'many'",
        "teacher.epoch: unknown key",
        "did you mean 'epochs'",
        "synthesis.sampling.latent_std",
        "-1.0",
    ):
        assert part in text
    assert "latent_std=[2.5, 1.0]; swap" in text
    assert (
        "`data.image_size == 4 * 2**len(generator.g_in)`" in text
    )  # a rule between two sections that are sound in themselves


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"data": {"image_size": 32}}, "data.image_size == 4 * 2**len(generator.g_in)"),
        ({"generator": {"checkpoint_every": 9}}, "generator.checkpoint_every <= generator.epochs"),
        ({"generator": {"g_in": [2, 2, 2]}}, "len(g_in) == len(g_out)"),
        ({"generator": {"attention_resolution": 5}}, "generator.attention_resolution"),
        ({"tuning": {"rungs": 9, "reduction_factor": 3}}, "tuning.rungs <= tuning.epochs"),
        ({"tuning": {"rungs": 27, "epochs": 50, "reduction_factor": 3}}, "past the warm-up"),
        ({"generator": {"d_in": [1, 2, 4]}}, "d_in[k + 1] == d_out[k]"),
        ({"data": {"name": "npz"}}, "path"),
        ({"synthesis": {"regeneration_rate": 2.5}}, "synthesis.regeneration_rate"),
        ({"classifier": {"trivial_augment": "yes"}}, "classifier.trivial_augment"),
        ({"name": "../elsewhere"}, "name"),
    ],
)
def test_impossible_combinations_and_types_are_refused(sections: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tiny_settings(**sections))
    assert named in str(caught.value)


def test_presets_fill_and_own_keys_win() -> None:
    ours = parse_config(tiny_settings()).generator
    vanilla = parse_config(tiny_settings(generator={"preset": "vanilla", "d_steps": 3})).generator
    assert (ours.loss, ours.d_optimizer) == ("logistic", "adamw")
    assert (vanilla.loss, vanilla.output, vanilla.precision, vanilla.d_optimizer, vanilla.d_steps) == (
        "hinge", "tanh", "full", "adam", 3,
    )  # fmt: skip


def test_the_resolved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = parse_config(tiny_settings(generator={"preset": "vanilla"}))
    assert load_config(write(tmp_path, config.model_dump(mode="json"))) == config


def test_overrides_and_yaml_traps(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_settings())
    config = load_config(
        path,
        [
            "classifier.warmup_learning_rate=1e-4",
            "tuning.space.latent_std=[1.0, 2.0]",
            "cluster.trial.cpu=0.5",
        ],
    )
    assert config.classifier.warmup_learning_rate == 1e-4
    assert config.tuning.space["latent_std"] == (1.0, 2.0)
    assert config.cluster.trial.cpu == 0.5
    for bad in ("teacher.epochs", "=3", "name.deeper=1", "teacher.epochs=[1"):
        with pytest.raises(ConfigError):
            load_config(path, [bad])


@pytest.mark.parametrize(
    ("text", "named"),
    [("- a\n- b\n", "mappings"),
     ("a: [1", "not valid YAML"),
     ("name: a\nname: b\n", "written twice"),
     ("data: 2020-01-01\nname: x\n", "data: .*'2020-01-01' .text.; correct")],
)  # fmt: skip
def test_broken_files(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_config(path)


def test_a_missing_file_names_the_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="configs/"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_wrong_config_exits_with_2_before_ray_or_torch_are_imported(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_settings(teacher={"epochs": 0}))
    code = (
        f"import sys; from kr_ray.cli import main; c = main(['run', {str(path)!r}]); print(c, 'ray' in "
        "sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "teacher.epochs" in done.stderr
    assert "Traceback" not in done.stderr
