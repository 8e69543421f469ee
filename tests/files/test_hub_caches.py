"""A cache of Hugging Face's libraries that cannot be written is named, and is no fault of a data set or a model."""

import os
import resource
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.data.loading import export_parquet, load_anomaly_dataset
from diffusionad_pipe.files.output_error import OutputError
from diffusionad_pipe.images.sources import find_rows
from diffusionad_pipe.training.images import read_good_images
from tests.helpers.script_processes import run_script
from tests.helpers.small_data import write_small_data


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows") / "exported"
    export_parquet(load_anomaly_dataset(write_small_data(folder.parent / "pictures")), folder)
    return str(folder)


@pytest.fixture(params=["a file in its place", "no folder can be made there"])
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that no user can make."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache" if request.param.startswith("a file") else Path("/proc/nowhere/cache")


READERS = [
    lambda folder: find_rows(folder),
    lambda folder: find_rows(f"{folder}/data/test-00000-of-00001.parquet"),
    lambda folder: read_good_images(None, 32, dataset_name=folder),
    lambda folder: load_anomaly_dataset(folder),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_the_cache_of_datasets(parquet, nowhere, monkeypatch, reader, variable):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", nowhere)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(nowhere))
    with pytest.raises(OutputError, match=f"^{nowhere}: .*set the variable {variable} to another folder"):
        reader(parquet)


def test_a_cache_without_room(parquet, tmp_path):
    script = tmp_path / "rows.py"
    script.write_text("import sys\nfrom diffusionad_pipe.images.sources import find_rows\nfind_rows(sys.argv[1])\n")
    environment = {key: value for key, value in os.environ.items() if key != "HF_DATASETS_CACHE"}
    environment["HF_HOME"] = str(tmp_path / "home")
    done = run_script([script, parquet], environment, limits={resource.RLIMIT_FSIZE: 10_000})
    assert done.returncode == 1
    assert "OutputError: " in done.stderr and "room, or set the variable HF_HOME to another folder" in done.stderr


def test_the_cache_of_the_hub(saved, hub_server, nowhere, monkeypatch):
    hub_server.publish("user/model", saved)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(nowhere))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(OutputError, match=f"^{nowhere}: .*set the variable HF_HOME"):
        DiffusionADPipeline.from_pretrained("user/model")


def test_a_data_set_that_is_broken_is_still_at_fault(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 10)
    with pytest.raises(ValueError, match="broken.parquet cannot be read as a dataset"):
        find_rows(str(tmp_path / "broken.parquet"))
    with pytest.raises(ValueError, match="missing.parquet: there is no such file"):
        read_good_images(None, 32, dataset_name=str(tmp_path / "missing.parquet"))
    with pytest.raises(ValueError, match="nothing cannot be read as a dataset"):
        read_good_images(None, 32, dataset_name=str(tmp_path / "nothing"))


def test_images_need_no_cache(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", nowhere)
    images = read_good_images(str(write_small_data(tmp_path / "pictures")), 32)
    assert len(images.names) == 1
