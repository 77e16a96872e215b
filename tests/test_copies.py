"""Near-copies and fidelity: planted copies are found, fresh samples
are not, libraries and naive versions agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_generator, tiny_recipe
from onnx import TensorProto, helper
from scipy import linalg, stats
from torch import Tensor, nn

from kr_ray.audits.copies import measure_copies
from kr_ray.audits.encoders import file_encoder, pixels
from kr_ray.audits.fidelity import FEWEST_IMAGES, fidelity
from kr_ray.audits.neighbours import copy_figures, mann_whitney_z, nearest
from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.config import BigGanSampling, CopiesConfig, SynthesisConfig
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import duplicate_indices, load_splits
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.generators.biggan.training import GanTraining
from kr_ray.generators.interface import checkpoint_file, save_checkpoint
from kr_ray.runs.stages import SAMPLES_FILE
from kr_ray.synthesis.student_set import StudentSpec


def normal(seed: int, rows: int, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("among_themselves", [False, True])
def test_nearest_agrees_with_brute_force(among_themselves: bool) -> None:
    among = normal(0, 2500)  # several blocks
    own = torch.arange(1300) if among_themselves else None
    queries = among[:1300] if among_themselves else normal(1, 1300)
    distance = torch.cdist(queries.double(), among.double())
    if among_themselves:
        distance[torch.arange(1300), torch.arange(1300)] = torch.inf
    found = nearest(queries, among, own)
    assert torch.equal(found.index, distance.argmin(1))
    torch.testing.assert_close(found.distance.double(), distance.min(1).values)


def test_planted_copies_are_counted_exactly() -> None:
    train, test, fresh = normal(0, 2000), normal(1, 1000), normal(2, 450)
    copies = train[:50] + 1e-3 * normal(3, 50)
    found = copy_figures(torch.cat([copies, fresh]), train, test, quantile=0.01)
    without = copy_figures(fresh, train, test, quantile=0.01)
    assert found.near_copies == 50 + without.near_copies
    assert found.memorised_share * 500 == pytest.approx(50 + without.memorised_share * 450)
    assert found.ci_low <= found.near_copy_share <= found.ci_high


def test_without_copying_z_is_standard_normal_and_near_copies_are_the_quantile() -> None:
    found = [
        copy_figures(normal(3 * k, 400), normal(3 * k + 1, 400), normal(3 * k + 2, 400), quantile=0.05)
        for k in range(60)
    ]
    z = np.array([figures.data_copying for figures in found])
    # Neighbours are shared, so distances of one set are not quite independent; the level is what matters.
    assert abs(z.mean()) < 0.4 and 0.7 < z.std() < 1.5
    assert np.mean([figures.near_copy_share for figures in found]) == pytest.approx(0.05, abs=0.012)


def test_z_is_below_zero_for_copies_and_above_for_strangers() -> None:
    train, test = normal(0, 1000), normal(1, 500)
    assert copy_figures(train[:500] + 0.1 * normal(2, 500), train, test, quantile=0.01).data_copying < -10
    assert copy_figures(3 * normal(3, 500), train, test, quantile=0.01).data_copying > 10


def test_mann_whitney_z_has_scipys_p_value() -> None:
    first, second = normal(0, 80).flatten().double().numpy(), normal(1, 90).flatten().double().numpy() + 0.1
    expected = stats.mannwhitneyu(first, second, method="asymptotic", use_continuity=False).pvalue
    assert 2 * stats.norm.sf(abs(mann_whitney_z(first, second))) == pytest.approx(expected)


def test_histograms_are_shares() -> None:
    histogram = copy_figures(normal(0, 300), normal(1, 300), normal(2, 300), quantile=0.01).histogram
    assert len(histogram.edges) == len(histogram.test) + 1
    assert sum(histogram.generated) == pytest.approx(1) and sum(histogram.test) == pytest.approx(1)


def test_fid_is_the_frechet_distance_of_the_fitted_gaussians() -> None:
    real, fake = normal(0, 900), 1.3 * normal(1, 800) + 0.2
    (a, b), (s, t) = (
        (x.double().mean(0).numpy() for x in (real, fake)),
        (np.cov(x.double().numpy().T) for x in (real, fake)),
    )
    expected = ((a - b) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
    assert fidelity(real, fake, seed=0).fid == pytest.approx(expected, rel=1e-3)


def test_fidelity_tells_the_same_from_another_distribution_and_repeats() -> None:
    real, same, other = normal(0, 600), normal(1, 600), normal(2, 600) + 2
    good, bad = fidelity(real, same, seed=0), fidelity(real, other, seed=0)
    assert abs(good.kid) < 3 * good.kid_sd and bad.kid > 10 * bad.kid_sd
    assert good.precision > 0.6 > bad.precision and good.coverage > 0.8 > bad.coverage
    assert fidelity(real, same, seed=0) == good


def test_too_few_images_are_refused_with_the_reason() -> None:
    few = fidelity(normal(0, FEWEST_IMAGES - 1), normal(1, 500), seed=0)
    assert few.kid is None and few.fid is None and str(FEWEST_IMAGES) in few.refused
    wide = fidelity(normal(0, 150, 100), normal(1, 150, 100), seed=0)
    assert wide.fid is None and "200" in wide.fid_refused and wide.kid is not None


def test_duplicates_of_pneumoniamnist(shared_data: Path) -> None:
    raw = {"name": "pneumoniamnist", "root": str(shared_data), "image_size": 28, "download": False}
    splits = load_splits(tiny_config().data.model_validate(raw), min_images=2)
    assert len(duplicate_indices(splits.train.images)) == 18
    assert len(duplicate_indices(splits.validation.images, splits.train.images)) == 8


# --- encoders -----------------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """Mean of the left and the right half per channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[..., :4].mean((2, 3)), x[..., 4:].mean((2, 3))], dim=2)


@pytest.fixture(scope="module")
def encoder_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    files = {"torchscript": folder / "encoder.pt", "onnx": folder / "encoder.onnx"}
    example = torch.zeros(2, 3, 8, 8)
    torch.jit.save(torch.jit.trace(Halves(), example), str(files["torchscript"]))
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        Halves().eval(),
        (example,),
        str(files["onnx"]),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    return files


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoders_from_files(encoder_files: dict[str, Path], kind: str, channels: int) -> None:
    images = torch.randint(256, (300, channels, 16, 16), dtype=torch.uint8)
    config = CopiesConfig(encoder=str(encoder_files[kind]), encoder_size=8)
    encoded = file_encoder(config, torch.device("cpu"))(images)
    small = torch.nn.functional.interpolate(
        images.float() / 255, size=[8, 8], mode="bilinear", antialias=True
    )
    torch.testing.assert_close(encoded, Halves()(small.expand(-1, 3, -1, -1)).flatten(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [("missing.pt", None), ("broken.pt", b"no zip"), ("broken.onnx", b"no protobuf"), ("x.txt", b"text")],
)
def test_wrong_encoder_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"audit\.copies\.encoder"):
        file_encoder(CopiesConfig(encoder=str(tmp_path / name)), torch.device("cpu"))


def test_an_encoder_for_another_size_is_named(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    torch.jit.save(torch.jit.trace(linear, torch.zeros(1, 3, 8, 8)), str(tmp_path / "linear.pt"))
    encode = file_encoder(CopiesConfig(encoder=str(tmp_path / "linear.pt")), torch.device("cpu"))
    with pytest.raises(DataError, match="encoder_size"):
        encode(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) / 0 * 0


@pytest.mark.parametrize(("network", "said"), [(Pair(), "one tensor"), (Undefined(), "finite features")])
def test_encoders_of_no_features_are_named(tmp_path: Path, network: nn.Module, said: str) -> None:
    torch.jit.script(network).save(str(tmp_path / "encoder.pt"))
    encode = file_encoder(CopiesConfig(encoder=str(tmp_path / "encoder.pt")), torch.device("cpu"))
    with pytest.raises(DataError, match=said):
        encode(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))


def test_an_onnx_encoder_that_fails_inside_is_named(tmp_path: Path) -> None:
    shape = helper.make_node(
        "Reshape", ["x", "shape"], ["y"]
    )  # free input sides, so only running it shows the wrong size
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    wanted = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 7])
    graph = helper.make_graph([shape], "encoder", [x], [y], [wanted])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "reshape.onnx").write_bytes(model.SerializeToString())
    encode = file_encoder(CopiesConfig(encoder=str(tmp_path / "reshape.onnx")), torch.device("cpu"))
    with pytest.raises(DataError, match="encoder_size"):
        encode(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


# --- the stage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits with known exact copies, an untrained teacher and an untrained generator."""
    folder = tmp_path_factory.mktemp("run")
    images = torch.randint(
        256, (400, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[10] = images[11]  # within the training images
    images[300] = images[12]  # a test image that is also a training image
    images[301] = images[302]  # within the test images
    labels = torch.arange(400) % 2
    parts = [LabelledImages(images[a:b], labels[a:b]) for a, b in ((0, 200), (200, 300), (300, 400))]
    save_splits(folder / SPLITS_FILE, Splits("noise", ("a", "b"), *parts))
    save_classifier(folder / "teacher" / "weights.safetensors", new_classifier(2, 1, tiny_recipe(), seed=0))
    gan = GanTraining(parts[0], 2, tiny_generator(), 0, torch.device("cpu"))
    save_checkpoint(folder / checkpoint_file(4), gan.checkpoint(), tiny_generator(), 2, 1)
    return folder


def test_the_stage_sets_exact_copies_aside_and_repeats(run: Path, tmp_path: Path) -> None:
    config = CopiesConfig(images=120)
    synthesis = SynthesisConfig(sampling=BigGanSampling(latent_std=1.5))
    spec = StudentSpec(tiny_generator(), checkpoint_epoch=4, synthesis=synthesis, epochs=1, seed=0)
    found = measure_copies(run, tmp_path, spec, config, seed=1)
    assert (found.train, found.test, found.images) == (199, 98, 120)
    assert found.exact_copies == 0 and found.encoder == "teacher"
    assert found.fidelity["test"].refused  # 98 images
    assert found.fidelity["generated"].kid is not None
    samples = np.load(tmp_path / SAMPLES_FILE)
    assert (samples.shape, samples.dtype) == ((2, 8, 1, 16, 16), np.uint8)
    assert measure_copies(run, tmp_path, spec, config, seed=1) == found
    assert (np.load(tmp_path / SAMPLES_FILE) == samples).all()


def test_pixel_distance_is_the_root_mean_square_of_intensities() -> None:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    images[1] = 51
    assert torch.dist(*pixels(images)).item() == pytest.approx(0.2)
