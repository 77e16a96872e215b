"""Secret noise and DP-SGD: against one image at a time, a second identical run, and what they must refuse."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from kr_ray.classifiers.networks import load_classifier, new_classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.config import ClassifierConfig, ConfigError
from kr_ray.config.dp import DpSgdSection
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.dp.noise import KEY_FILE, forget_key, insecure_key, noise_key
from kr_ray.methods.dp_sgd import DpSgdTraining, plan_dp_sgd, train_dp_sgd
from kr_ray.privacy.accountants import epsilon_of, event_of_record
from kr_ray.runs.artifacts import ArtifactError, load_state, load_tensors
from kr_ray.runs.storage import storage_path

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:grad and param")
RECIPE = ClassifierConfig(width=4, norm="group", precision="full", crop_padding=1)
SECTION = DpSgdSection(noise_multiplier=1.0, epochs=2, expected_batch_size=16, learning_rate=0.5)


def random_images(count: int, classes: int = 3, size: int = 8) -> LabelledImages:
    random = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, size, size), generator=random, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % classes)


def training(section: DpSgdSection, recipe: ClassifierConfig = RECIPE, images: int = 80) -> DpSgdTraining:
    plan = plan_dp_sgd(section, recipe, images)
    model = new_classifier(3, 1, recipe, 0)
    key = insecure_key("test")
    return DpSgdTraining(model, random_images(images), recipe, section, plan, key, 1, torch.device("cpu"))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- the key
# -----------------------------------------------------------------------------------------------------------


def test_the_key_is_secret_kept_and_forgotten(tmp_path: Path) -> None:
    key = noise_key(tmp_path)
    mode = stat.S_IMODE(os.stat(tmp_path / KEY_FILE).st_mode)
    assert mode == 0o600 and noise_key(tmp_path).secret == key.secret and not key.insecure
    assert key.secret.hex() not in repr(key) and str(key.secret) not in repr(key)
    assert noise_key(tmp_path / "other").secret != key.secret
    forget_key(tmp_path)
    forget_key(tmp_path)
    assert not (tmp_path / KEY_FILE).exists()


def test_a_lost_or_damaged_key_and_an_object_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"must exist to go on .* second release"):
        noise_key(tmp_path, started=True)
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(ArtifactError, match="must hold 32 bytes, but has 5"):
        noise_key(tmp_path)
    with pytest.raises(ArtifactError, match="must lie on a file system"):
        noise_key(storage_path("s3://bucket/run/part"))


def test_noise_is_normal_repeatable_and_independent_between_contexts() -> None:
    key = insecure_key("a")
    noise = key.gaussian((200, 500), 3, 1)
    assert noise.dtype == torch.float64 and torch.equal(noise, key.gaussian((200, 500), 3, 1))
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    for other in (
        key.gaussian((200, 500), 3, 2),
        key.gaussian((200, 500), 31),
        insecure_key("b").gaussian((200, 500), 3, 1),
    ):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / 100_000**0.5


def test_poisson_batches_have_binomial_sizes_and_hold_every_image_equally_often() -> None:
    key, records, probability, steps = insecure_key("a"), 400, 0.1, 600
    samples = [key.poisson_sample(records, probability, step) for step in range(steps)]
    sizes = torch.tensor([float(len(sample)) for sample in samples])
    assert sizes.mean() == pytest.approx(40, abs=5 * 6 / steps**0.5)
    assert sizes.var() == pytest.approx(36, rel=0.3)  # of a binomial; a shuffled batch has 0
    counts = torch.bincount(torch.cat(samples), minlength=records).double()
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert len(key.poisson_sample(records, 1.0, 0)) == records


def test_a_shard_depends_on_the_record_alone_and_shards_are_even() -> None:
    key = insecure_key("a")
    shards = torch.tensor([key.shard(number.to_bytes(8, "big"), 7) for number in range(7000)])
    assert stats.chisquare(torch.bincount(shards, minlength=7).numpy()).pvalue > 1e-3
    assert key.shard(b"x", 7) == key.shard(b"x", 7)


# --- the steps
# ---------------------------------------------------------------------------------------------------------


def naive_step(step: DpSgdTraining, section: DpSgdSection) -> Tensor:
    """One step of algorithm 1 of Abadi et al. with one image at a time: the weights after it."""
    model, key = step.model, step.key
    images, targets = (
        torch.cat([piece[0] for piece in step._pieces()]),
        torch.cat([piece[1] for piece in step._pieces()]),
    )
    parameters, copies = list(model.parameters()), section.augmentation_multiplicity
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for record, target in enumerate(targets):
        loss = (
            sum(
                F.cross_entropy(model(image[None]), target[None])
                for image in images[record * copies :][:copies]
            )
            / copies
        )
        gradients = torch.autograd.grad(loss, parameters)  # type: ignore[arg-type]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for whole, gradient in zip(total, gradients, strict=True):
            whole += gradient * min(1.0, section.max_grad_norm / float(norm))
    noise_std = (section.noise_multiplier or 0) * section.max_grad_norm
    after = [
        parameter.detach()
        - step.schedule.rate(0) * (whole + noise_std * key.gaussian(parameter.shape, 0, index)).float() / 16
        for index, (parameter, whole) in enumerate(zip(parameters, total, strict=True))
    ]
    return torch.cat([parameter.flatten() for parameter in after])


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_step_equals_clipping_one_image_at_a_time(mode: Any, copies: int) -> None:
    if mode == "ghost" and copies > 1:
        pytest.skip("refused, see below")
    section = SECTION.model_copy(
        update={
            "grad_sample_mode": mode,
            "augmentation_multiplicity": copies,
            "max_grad_norm": 0.3,
            "max_physical_batch_size": 9,
        }
    )
    one = training(section, RECIPE.model_copy(update={"warmup_epochs": 0}))
    expected = naive_step(one, section)
    start = weights(one.model)
    one.train_until(1)
    assert torch.allclose(weights(one.model), expected, atol=1e-6)
    assert (expected - start).norm() > 100 * (weights(one.model) - expected).norm()


def test_the_noise_is_of_the_size_that_is_accounted_for() -> None:
    """With images that give no gradient (an empty batch) a step is noise alone: std noise_multiplier *
    max_grad_norm / batch."""
    section = SECTION.model_copy(update={"max_grad_norm": 0.5, "noise_multiplier": 3.0})
    still = training(section, RECIPE.model_copy(update={"warmup_epochs": 0}))
    still._pieces = lambda: []  # type: ignore[method-assign]
    before = weights(still.model)
    still.train_until(1)
    noise = (weights(still.model) - before) / still.schedule.rate(0) * 16
    assert noise.std() == pytest.approx(3.0 * 0.5, rel=0.05) and abs(noise.mean()) < 0.1


def test_no_image_moves_the_sum_by_more_than_the_bound() -> None:
    """Two data sets that differ in one image, noise equal: the sums differ by at most twice max_grad_norm
    (zero-out: once)."""
    moved = []
    for pixel in (0, 255):
        step = training(
            SECTION.model_copy(update={"max_grad_norm": 0.2}), RECIPE.model_copy(update={"warmup_epochs": 0})
        )
        chosen = int(step.key.poisson_sample(80, step.plan.sampling_probability, 0)[0])
        step.data.epoch(0)[0][chosen] = pixel
        step.train_until(1)
        moved.append(weights(step.model))
    distance = (moved[0] - moved[1]).norm() / step.schedule.rate(0) * 16
    assert 0.01 < distance <= 2 * 0.2 * (1 + 1e-4)


def test_neither_gradients_of_images_nor_losses_outlive_a_step() -> None:
    one = training(SECTION)
    assert one.train_until(2) != one.train_until(2)  # nan
    for parameter in one.model.parameters():
        assert parameter.grad_sample is None and parameter.summed_grad is None  # type: ignore[attr-defined]
    assert "loss" not in json.dumps(sorted(one.state_dict()))


# --- the part
# ----------------------------------------------------------------------------------------------------------


def stored(run: Path, images: int = 80) -> Path:
    parts = [random_images(images), random_images(30), random_images(33)]
    save_splits(run / SPLITS_FILE, Splits("random", ("a", "b", "c"), *parts))
    return run


class Killed(Exception):
    """Ends a training in the place of a kill."""


KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
from kr_ray.runs.artifacts import save_state
from kr_ray.methods.dp_sgd import train_dp_sgd
from test_dp_sgd import RECIPE, SECTION
run, folder, saves = Path(sys.argv[1]), Path(sys.argv[2]), []
def save(state, row):
    save_state(folder / "state.pt", state)
    saves.append(row)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train_dp_sgd(run, folder, SECTION, RECIPE, 0, None, save)
"""


def test_a_killed_training_goes_on_with_the_same_noise_to_the_same_weights(tmp_path: Path) -> None:
    """Kill -9 after the third tick; the second run must find the key in the folder, and one epsilon stands in
    the end."""
    run, secret = stored(tmp_path / "run"), os.urandom(32)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / KEY_FILE).write_bytes(secret)
    first = train_dp_sgd(run, whole, SECTION, RECIPE, 0, None, lambda state, row: None)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.run(
        [sys.executable, "-c", KILLED_CHILD, str(run), str(killed)], env=environment, capture_output=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert (killed / KEY_FILE).read_bytes() == secret and not (killed / "weights.safetensors").exists()
    state = load_state(killed / "state.pt")
    assert state is not None and len(state["history"]) == 3
    second = train_dp_sgd(run, killed, SECTION, RECIPE, 0, state, lambda state, row: None)
    assert not (killed / KEY_FILE).exists()
    one, other = (load_tensors(folder / "weights.safetensors")[0] for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.event == second.event and first.result.privacy == second.result.privacy


def test_a_resumed_training_without_its_key_is_refused(tmp_path: Path) -> None:
    run, states = stored(tmp_path / "run"), []

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        states.append(state)
        raise Killed

    with pytest.raises(Killed):
        train_dp_sgd(run, tmp_path / "part", SECTION, RECIPE, 0, None, save)
    forget_key(tmp_path / "part")
    with pytest.raises(ArtifactError, match="second release"):
        train_dp_sgd(run, tmp_path / "part", SECTION, RECIPE, 0, states[0], save)


def test_the_result_carries_event_and_guarantee_and_never_the_key(tmp_path: Path) -> None:
    run, secrets = stored(tmp_path / "run"), []

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        secrets.append((tmp_path / "part" / KEY_FILE).read_bytes())
        assert "train_loss" not in row

    released = train_dp_sgd(run, tmp_path / "part", SECTION, RECIPE, 0, None, save)
    text = (tmp_path / "part" / "result.json").read_text()
    assert secrets[0].hex() not in text and not any(
        secrets[0] in path.read_bytes() for path in (tmp_path / "part").iterdir()
    )
    privacy = json.loads(text)["privacy"]
    assert event_of_record(privacy["release"]) == released.event
    assert privacy["guarantee"]["epsilon"] == pytest.approx(
        epsilon_of([released.event], 80**-1.1 if 80**-1.1 < 1e-5 else 1e-5)[0]
    )
    assert privacy["sampling_probability"] == 16 / 80 and released.result.steps == 10
    model = load_classifier(tmp_path / "part" / "weights.safetensors", torch.device("cpu"))
    assert model.norm_kind == "group"


def test_a_known_key_is_marked_as_no_guarantee(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"insecure_noise_key": "tests"})
    released = train_dp_sgd(
        stored(tmp_path / "run"), tmp_path / "part", section, RECIPE, 0, None, lambda state, row: None
    )
    assert released.result.privacy.guarantee.guarantee is False
    assert released.result.privacy.words.startswith("not a guarantee")


def test_it_learns_what_is_easy_to_see(tmp_path: Path) -> None:
    """Three kinds of flat images: nearly everything is learnt at a noise that a single image cannot be seen
    through."""

    def easy(count: int) -> LabelledImages:
        base = random_images(count)
        return LabelledImages(
            (base.images // 8 + 100 * base.labels[:, None, None, None]).to(torch.uint8), base.labels
        )

    splits = Splits("easy", ("a", "b", "c"), easy(600), easy(90), easy(90))
    save_splits(tmp_path / SPLITS_FILE, splits)
    section = DpSgdSection(
        target_epsilon=8, epochs=8, expected_batch_size=100, learning_rate=1.0, insecure_noise_key="t"
    )
    released = train_dp_sgd(tmp_path, tmp_path / "part", section, RECIPE, 0, None, lambda state, row: None)
    assert released.result.test_accuracy > 0.8
    assert released.result.privacy.guarantee.epsilon <= 8


# --- bad input
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "recipe", "said"),
    [
        (
            {"expected_batch_size": 100},
            {},
            "`expected_batch_size <= images` must hold, but got 100 for 80 training images; use 20",
        ),
        ({"delta": 0.1}, {}, "`delta < 1/N` must hold, but got delta=0.1 for 80 images; use"),
        (
            {},
            {"norm": "batch"},
            "`norm: group` must hold for dp_sgd, but got norm: batch; set classifier.norm",
        ),
        (
            {"noise_multiplier": None, "target_epsilon": 1e-7},
            {},
            "dp_sgd: `target_epsilon` must be reachable, but got 1e-07",
        ),
    ],
)
def test_what_cannot_be_private_is_refused_before_any_work(
    section: dict[str, Any], recipe: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_dp_sgd(SECTION.model_copy(update=section), RECIPE.model_copy(update=recipe), 80)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "exactly one of `noise_multiplier` and `target_epsilon`"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, "exactly one of"),
        ({"target_epsilon": 51.0}, "less than or equal to 50"),
        ({"target_epsilon": 0.0}, "greater than 0"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "less than 1"),
        ({"noise_multiplier": 1.0, "grad_sample_mode": "ghost", "augmentation_multiplicity": 2}, "use hooks"),
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DpSgdSection.model_validate(keys)


def test_the_sections_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys, kr_ray.config.dp; print(sorted({'torch', 'ray', "
        "'opacus', 'dp_accounting'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# --- the network
# -------------------------------------------------------------------------------------------------------


def test_group_norm_looks_at_one_image_alone_and_batch_norm_does_not() -> None:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for norm, alone in (("group", True), ("batch", False)):
        model = ResNet14(3, 1, 4, torch.Generator().manual_seed(0), norm=norm).train()  # type: ignore[arg-type]
        same = torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)
        assert same is alone


def test_both_norms_have_equally_many_weights_and_start_alike() -> None:
    batch, group = (
        ResNet14(3, 1, 12, torch.Generator().manual_seed(0), norm=norm) for norm in ("batch", "group")
    )  # type: ignore[arg-type]
    assert weights(batch).equal(weights(group))
    assert [name for name, _ in batch.named_parameters()] == [name for name, _ in group.named_parameters()]
