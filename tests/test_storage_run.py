"""Whole runs in an object store: the numbers of a local run, resumed after a kill;
and clusters whose nodes do not all see the storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tiny_settings
from store import BUCKET, running_store
from test_pipeline import final_numbers, kill_in, kr

from kr_ray.config import ConfigError
from kr_ray.runs.storage import RemotePath, list_files, local_copy, storage_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def remote() -> Iterator[RemotePath]:
    with running_store():
        yield RemotePath(f"s3://{BUCKET}/runs")


def write_config(folder: Path, storage: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tiny_settings(name=name, storage=str(storage))))
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    kr("run", write_config(folder, folder / "runs", "tiny"))
    return folder / "runs" / "tiny"


def test_a_run_in_a_store_has_the_local_numbers_and_is_not_done_twice(
    remote: RemotePath, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, remote, "tiny")
    monkeypatch.chdir(tmp_path)
    done = kr("run", config)
    assert f"report: {remote}/tiny/report/report.html" in done.stdout
    assert final_numbers(remote / "tiny") == final_numbers(local_run)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]  # nothing beside the program
    again = kr("run", config)
    assert again.stdout.count("finished before") == 11
    # Every artefact of the local run is in the store too, Ray's own and the
    # curves (which name times and hosts) apart.
    ours = {f.path.relative_to(local_run) for f in list_files(local_run)}
    there = {Path(str(f.path.relative_to(remote / "tiny"))) for f in list_files(remote / "tiny")}
    rays = {"ray_tune", "tune", "tensorboard"}
    assert {
        p for p in ours if not rays & set(p.parts) and p.parts[1:2] != (f"tiny_{p.parts[0]}",)
    } - there <= {Path(".lock")}
    assert any("tensorboard" in path.parts for path in there)
    assert "finished" in kr("runs", "--storage", str(remote)).stdout
    assert kr("watch", "tiny", "--storage", str(remote)).stdout == "finished: report 100%\n"
    assert "| tiny |" in kr("results", "--storage", str(remote)).stdout
    kr("export", config, "--images", "32")
    kr("report", config)
    with local_copy(remote / "tiny" / "export") as folder:
        onnx.checker.check_model(str(folder / "student.onnx"))
        assert pq.read_table(folder / "synthetic.parquet").num_rows == 32


def test_a_run_killed_twice_in_a_store_ends_with_the_local_numbers(
    remote: RemotePath, local_run: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, remote, "killed")
    kills = [kill_in(stage, config, remote / "killed") for stage in ("teacher", "tuning")]
    assert any(kills)
    kr("run", config)
    killed, undisturbed = final_numbers(remote / "killed"), final_numbers(local_run)
    for numbers in (killed, undisturbed):
        del numbers["run"], numbers["config"]["name"]
    assert killed == undisturbed


def test_a_node_that_does_not_see_the_storage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from kr_ray.cluster import runtime

    with running_store() as closed:
        elsewhere = os.environ["AWS_ENDPOINT_URL"]
        with running_store():
            closed.failures, closed.status = 10**6, "403 Forbidden"
            cluster = Cluster(
                initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
            )
            try:
                cluster.add_node(num_cpus=1, env_vars={"AWS_ENDPOINT_URL": elsewhere})
                ray.init(address=cluster.address, logging_level="ERROR")
                cluster.wait_for_nodes()
                runtime.check_storage_shared(tmp_path)  # two raylets of one machine
                assert list(tmp_path.iterdir()) == []
                with pytest.raises(
                    ConfigError, match=r"`storage` must be seen by all 2 nodes.*ACCESS_DENIED.*credentials"
                ):
                    runtime.check_storage_shared(storage_path(f"s3://{BUCKET}/runs"))
                monkeypatch.setattr(runtime, "_look_for", blind_but(ray.get_runtime_context().get_node_id()))
                with pytest.raises(
                    ConfigError, match=rf"{tmp_path} is not by .*not there.*--set storage=s3://bucket/runs"
                ):
                    runtime.check_storage_shared(tmp_path)
            finally:
                ray.shutdown()
                cluster.shutdown()


def blind_but(seeing: str) -> object:
    """A look at the storage that succeeds on one node only, as at a folder of that node."""

    def look(marker: Path) -> str:
        import ray

        return "" if ray.get_runtime_context().get_node_id() == seeing else "not there"

    return look
