"""One synthetic set, whoever makes it: by the training itself, streamed
by Ray Data, written to Parquet and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_recipe
from ray.cloudpickle import register_pickle_by_value
from torch import Tensor

from kr_ray.classifiers.networks import load_classifier, save_classifier
from kr_ray.classifiers.resnet import ResNet14
from kr_ray.classifiers.ticks import TickedTraining, Ticks
from kr_ray.cluster.pools import draw_pools
from kr_ray.cluster.runtime import ray_session
from kr_ray.cluster.stream import Makers, export_parquet, student_images
from kr_ray.cluster.train import train_on_cluster
from kr_ray.cluster.trials import StudentWork, train_students
from kr_ray.config import BigGanConfig, BigGanSampling, ClusterConfig, Resources, SynthesisConfig
from kr_ray.config.file import parse_config
from kr_ray.data.checks import DataError
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, load_stored_splits, save_splits
from kr_ray.generators.biggan.networks import Generator
from kr_ray.generators.interface import Checkpoint, checkpoint_file, save_checkpoint
from kr_ray.methods.knowledge_recycling import start_student, student_training, train_student
from kr_ray.methods.parquet import parquet_training
from kr_ray.synthesis.parquet_set import parquet_schema, read_parquet_set, to_table
from kr_ray.synthesis.pool import load_pool
from kr_ray.synthesis.stream import CollapsedGenerator
from kr_ray.synthesis.student_set import OpenSet, StudentSpec, on_device, pools_of

SIZE, NAMES, EPOCHS = 16, ("cat", "dog", "Größe ≥ 2"), 6
CPU = torch.device("cpu")
RECIPE = tiny_recipe()
TICKS = Ticks(3)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator() -> BigGanConfig:
    raw = {
        "name": "t",
        "data": {"name": "digits", "image_size": SIZE},
        "generator": {"architecture": "tiny16"},
    }
    section = parse_config(raw).generator
    assert isinstance(section, BigGanConfig)
    return section


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with 40 real images, a teacher and one checkpoint, all random."""
    folder = tmp_path_factory.mktemp("run")
    parts = [
        LabelledImages(
            torch.randint(256, (40, 1, SIZE, SIZE), generator=random(k)).to(torch.uint8),
            torch.arange(40) % len(NAMES),
        )
        for k in range(3)
    ]
    save_splits(folder / SPLITS_FILE, Splits("test", NAMES, *parts))
    save_classifier(folder / "teacher" / "weights.safetensors", ResNet14(len(NAMES), 1, 4, random(0)))
    config = generator()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = Generator(config, len(NAMES), 1).folded_weights()
    checkpoint = Checkpoint(epoch=5, images_seen=0, weights=weights, figures={})
    save_checkpoint(folder / checkpoint_file(5), checkpoint, config, len(NAMES), 1)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(ClusterConfig(address="local")):
        register_pickle_by_value(__import__(__name__))
        yield


def spec(labelling: str = "gkd", scale: int = 4, **keys: Any) -> StudentSpec:
    synthesis = SynthesisConfig(
        labelling=labelling,
        cardinality_scale=scale,
        batch_size=16,
        sampling=BigGanSampling(latent_std=1.5, standing_batches=2),
        regeneration_rate=2,
        **keys,
    )
    return StudentSpec(generator(), checkpoint_epoch=5, synthesis=synthesis, epochs=EPOCHS, seed=11)


def streamed(makers: int = 1, **keys: Any) -> ClusterConfig:
    return ClusterConfig(stream="ray_data", makers=makers, **keys)


def opened(run: Path, which: OpenSet, of: StudentSpec) -> Any:
    return which(run, of, RECIPE, load_stored_splits(run / SPLITS_FILE), CPU, EPOCHS)


def epochs_seen(data: Any, epochs: range) -> list[tuple[Tensor, Tensor]]:
    seen = [data.epoch(index) for index in epochs]
    data.close()
    return seen


def equal(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


# --- the stream ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labelling", "makers"), [("gkd", 1), ("gkd", 2), ("gap_filler", 2), ("hard", 1)])
def test_a_stream_brings_what_the_device_makes(
    cluster: None, run: Path, labelling: str, makers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 1,200 images: three parts of 512 where nothing is filtered.
    # Rejected ones are drawn again, in one part.
    what = spec(labelling, scale=4 if labelling == "gap_filler" else 30, confidence_threshold=0.0)
    here = epochs_seen(opened(run, on_device, what), range(EPOCHS))
    assert len(here[0][0]) == 40 * what.synthesis.cardinality_scale
    assert equal(
        epochs_seen(opened(run, student_images(streamed(makers), "test"), what), range(EPOCHS)), here
    )


def test_a_stream_brings_images_without_labels_where_the_teacher_answers_what_is_seen(
    cluster: None, run: Path
) -> None:
    what = spec(scale=30, view="seen")
    here, clean = (epochs_seen(opened(run, on_device, of), range(EPOCHS)) for of in (what, spec(scale=30)))
    assert all(targets.shape == (1200, 0) for _, targets in here)
    assert all(torch.equal(own[0], other[0]) for own, other in zip(here, clean, strict=True))
    assert equal(epochs_seen(opened(run, student_images(streamed(2), "test"), what), range(EPOCHS)), here)


def test_makers_draw_the_pool_that_students_share(cluster: None, run: Path, tmp_path: Path) -> None:
    """Students of two seeds and of another temperature need one pool; the stream deals from it too."""
    splits = load_stored_splits(run / SPLITS_FILE)
    one = replace(spec(scale=2, pool_scale=3), epochs=4)
    others = [
        replace(one, seed=12),
        replace(one, synthesis=one.synthesis.model_copy(update={"temperature": 2.0})),
    ]
    alone = [images for images, _ in epochs_seen(opened(run, on_device, one), range(EPOCHS))]
    (_, pool), *_ = pools_of(run, one, splits)
    drawn_alone = pool.path.read_bytes()
    pool.path.unlink()
    draw_pools(run, [one, *others], tmp_path, ClusterConfig())
    made = load_pool(pool.path, pool.fingerprint)
    assert [path.name for path in (run / "pools").iterdir()] == [pool.path.name]
    assert len(made) == 3 * 40 and len(drawn_alone) > made.images.numel()
    for which in (on_device, student_images(streamed(), "pooled")):
        seen = [images for images, _ in epochs_seen(opened(run, which, one), range(EPOCHS))]
        assert all(map(torch.equal, alone, seen))
    known = {tuple(image.flatten().tolist()) for image in made.images}
    for other in others:
        images, targets = epochs_seen(opened(run, on_device, other), range(1))[0]
        assert len(images) == len(targets) == 80
        assert {tuple(image.flatten().tolist()) for image in images} <= known
    assert not torch.equal(epochs_seen(opened(run, on_device, others[0]), range(1))[0][0], alone[0])
    before = pool.path.stat().st_mtime_ns
    draw_pools(run, [one], tmp_path, ClusterConfig())  # it is there
    assert pool.path.stat().st_mtime_ns == before


def test_a_resumed_student_starts_the_stream_where_it_is(cluster: None, run: Path) -> None:
    late = range(3, EPOCHS)
    here = epochs_seen(opened(run, on_device, spec()), late)
    assert equal(epochs_seen(opened(run, student_images(streamed(), "test"), spec()), late), here)


def test_a_generator_without_an_accepted_image_is_named_through_the_stream(cluster: None, run: Path) -> None:
    data = opened(
        run, student_images(streamed(), "test"), spec("gap_filler", confidence_threshold=0.9999, max_draws=1)
    )
    with pytest.raises(CollapsedGenerator):
        data.epoch(0)


@pytest.mark.parametrize("view", ["clean", "seen"])
def test_trials_on_all_cpus_train_the_same_students(
    cluster: None, run: Path, tmp_path: Path, view: str
) -> None:
    """Two trials hold both CPUs; their makers must not wait for one."""
    histories, what = [], spec(view=view)
    for name, where in (("here", ClusterConfig()), ("stream", streamed())):
        folders = [tmp_path / name / "trials" / str(seed) for seed in range(2)]
        works = [
            StudentWork(run, folder, replace(what, seed=seed), RECIPE, TICKS, where)
            for seed, folder in enumerate(folders)
        ]
        train_students(works, tmp_path / name, where)
        histories.append(
            [[(row["train_loss"], row["val_accuracy"]) for row in work.history()] for work in works]
        )
    assert histories[0] == histories[1]
    alone = start_student(run, replace(what, seed=0), RECIPE, TICKS, None)
    alone.finish(lambda state, row: None)
    assert histories[0][0] == [(row["train_loss"], row["val_accuracy"]) for row in alone.history]


@pytest.mark.parametrize("view", ["clean", "seen"])
def test_a_students_work_is_counted_whoever_makes_its_images(cluster: None, run: Path, view: str) -> None:
    """Images and queries exactly; seconds by what must hold of them."""
    found = {}
    for name, where in (("here", on_device), ("stream", student_images(streamed(), "test"))):
        training, splits = student_training(run, spec(view=view), RECIPE, where)
        student = TickedTraining(training, splits.validation, TICKS)
        student.finish(lambda state, row: None)
        found[name] = student.result(splits.test).work
        student.close()
        assert found[name].cpu_seconds == pytest.approx(sum(row["cpu_seconds"] for row in student.history))
    schedule = training.schedule
    trained, generated = schedule.steps * schedule.batch_size, 3 * 160  # regenerated every second of 6 epochs
    asked = trained if view == "seen" else generated
    for work in found.values():
        assert (work.images_trained, work.images_generated, work.teacher_queries) == (
            trained,
            generated,
            asked,
        )
        assert work.cpu_seconds > 0 and work.gpu_seconds == 0
    data = opened(run, student_images(streamed(), "test"), spec(view=view))
    assert data.take_makers_s() == 0
    data.epoch(0)
    assert 0 < data.take_makers_s() < 60
    assert data.take_makers_s() == 0
    data.close()


@pytest.mark.slow
@pytest.mark.parametrize("view", ["clean", "seen"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_final_student_is_the_same(
    cluster: None, run: Path, tmp_path: Path, workers: int, view: str
) -> None:
    weights, what = [], spec(view=view)
    for name, where in (("here", ClusterConfig()), ("stream", streamed())):
        images = student_images(where, "test")

        def work(state: Any, save: Any, images: OpenSet = images, folder: Path = tmp_path / name) -> None:
            train_student(folder, *student_training(run, what, RECIPE, images), state, save)

        train_on_cluster(work, tmp_path / name, Resources(cpu=1), 0, (workers, workers))
        weights.append(load_classifier(tmp_path / name / "weights.safetensors", CPU).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# --- Parquet ------------------------------------------------------------------------------------------------


def made(count: int, channels: int) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (count, channels, 5, 6), generator=random(0)).to(torch.uint8)
    return images, torch.rand(count, len(NAMES), generator=random(1)).softmax(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_table_holds_exactly_what_was_given(tmp_path: Path, channels: int) -> None:
    images, targets = made(21, channels)
    schema = parquet_schema(images.shape[1:], len(NAMES), {"class_names": NAMES, "seed": 7})
    # As some generators leave them: not contiguous.
    pq.write_table(
        to_table(images.to(memory_format=torch.channels_last), targets, schema), tmp_path / "set.parquet"
    )
    table = pq.read_table(tmp_path / "set.parquet")
    assert table.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), [channels, 5, 6])
    assert table.schema.field("soft_label").type == pa.list_(pa.float32(), len(NAMES))
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), images.numpy())
    np.testing.assert_array_equal(np.array(table["soft_label"].to_pylist(), np.float32), targets.numpy())
    np.testing.assert_array_equal(table["label"].to_numpy(), targets.argmax(1).numpy())
    metadata = json.loads(table.schema.metadata[b"kr_ray"])
    assert metadata["class_names"] == list(NAMES) and metadata["seed"] == 7 and metadata["versions"]["torch"]


@pytest.fixture(scope="module")
def exported(cluster: None, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 images in three files, written by two makers."""
    folder = tmp_path_factory.mktemp("exported") / "synthetic"
    schema = parquet_schema((1, SIZE, SIZE), len(NAMES), {"class_names": NAMES, "images": 1200})
    export_parquet(Makers(run, spec(scale=30), RECIPE, 1200, 1, streamed(2)), folder, schema)
    return folder


def test_the_exported_set_is_the_one_the_student_saw(run: Path, exported: Path) -> None:
    images, targets = opened(run, on_device, spec(scale=30)).epoch(0)
    read_images, read_targets = read_parquet_set(exported, load_stored_splits(run / SPLITS_FILE))
    assert torch.equal(read_images, images) and torch.equal(read_targets, targets)
    assert len(list(exported.glob("*.parquet"))) == 3


def test_pyarrow_and_hugging_face_read_it_without_kr_ray(run: Path, exported: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images, targets = opened(run, on_device, spec(scale=30)).epoch(0)
    table = pq.read_table(exported)
    assert json.loads(table.schema.metadata[b"kr_ray"])["class_names"] == list(NAMES)
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray(), images.numpy())
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Value("uint8"), length=SIZE * SIZE),
            "soft_label": datasets.List(datasets.Value("float32"), length=len(NAMES)),
            "label": datasets.Value("int64"),
        }
    )
    files = sorted(str(path) for path in exported.glob("*.parquet"))
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", features=features, cache_dir=str(tmp_path)
    )
    found = loaded.with_format("numpy")
    np.testing.assert_array_equal(np.stack(found["image"][:]).reshape(images.shape), images.numpy())
    np.testing.assert_array_equal(np.stack(found["soft_label"][:]), targets.numpy())
    np.testing.assert_array_equal(found["label"][:], targets.argmax(1).numpy())


def test_a_student_of_an_exported_set_alone_needs_neither_generator_nor_teacher(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    splits = load_stored_splits(run / SPLITS_FILE)
    save_splits(tmp_path / SPLITS_FILE, splits)  # a run's folder with nothing else in it
    training, _ = parquet_training(tmp_path, exported, 2, RECIPE, seed=3)
    images, targets = training.data.epoch(0)
    assert len(images) == 1200 and len(targets) == 1200
    first = training.train_until(4)
    assert training.train_until(10**9) < first
    again, _ = parquet_training(tmp_path, exported, 2, RECIPE, seed=3)
    again.train_until(10**9)
    assert all(
        torch.equal(a, b) for a, b in zip(training.model.parameters(), again.model.parameters(), strict=True)
    )


def test_sets_that_cannot_be_trained_on_are_refused(run: Path, exported: Path, tmp_path: Path) -> None:
    splits = load_stored_splits(run / SPLITS_FILE)
    images, targets = torch.zeros(5, 1, SIZE, SIZE, dtype=torch.uint8), torch.full((5, 3), 1 / 3)
    whole = {"images": 5}

    def write(name: str, images: Tensor, targets: Tensor, metadata: dict[str, Any]) -> Path:
        pq.write_table(
            to_table(images, targets, parquet_schema(images.shape[1:], targets.shape[1], metadata)),
            tmp_path / name,
        )
        return tmp_path / name

    nan = torch.cat([targets[:4], torch.full((1, 3), torch.nan)])
    for path, said in (
        (tmp_path / "absent", "does not exist"),
        (write("small", images[:, :, :8], targets, whole), "same size"),
        (write("classes", images, torch.full((5, 4), 0.25), whole), "numbers in every soft_label"),
        (write("nan", images, nan, whole), "sum to 1"),
        (write("sums", images, targets * 2, whole), "sum to 1"),
        (write("cut", images[:3], targets[:3], whole), "not whole"),
    ):
        with pytest.raises(DataError, match=said):
            read_parquet_set(path, splits)
    pq.write_table(pq.read_table(exported).drop(["soft_label"]), tmp_path / "columns.parquet")
    with pytest.raises(DataError, match="soft_label is not among"):
        read_parquet_set(tmp_path / "columns.parquet", splits)
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(
        DataError, match="must be a complete Parquet file, but got text; copy or export it again"
    ):
        read_parquet_set(tmp_path / "text.parquet", splits)
