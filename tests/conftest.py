"""Fixtures shared by all tests: a tiny pipeline, and a Hugging Face Hub on this machine."""

import os

os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("HF_ENDPOINT", None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # tests look for no credentials and send none
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two workers have a core each

import shutil  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from diffusionad_pipe import DiffusionADImageProcessor, DiffusionADPipeline  # noqa: E402
from tests.helpers.hub_server import HubServer  # noqa: E402
from tests.helpers.tiny_pipeline import build_tiny_pipeline, randomize  # noqa: E402

pytest_plugins = ["tests.helpers.run_guard"]

# Two workers take file after file: begun last, one of these would keep a single worker busy at the end.
LONG_FILES = [
    "test_wheel", "test_train", "test_run_folder", "test_space", "test_space_browser", "test_export",
    "test_distillation", "test_readme",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


@pytest.fixture
def tiny_pipeline() -> DiffusionADPipeline:
    """A pipeline of a few thousand parameters that works at 32 pixels."""
    return build_tiny_pipeline()


@pytest.fixture
def tiny_segformer() -> nn.Module:
    """transformers' SegFormer as a segmentation network."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_channels=6,
        num_labels=1,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[1, 1],
        decoder_hidden_size=8,
        initializer_range=0.3,
    )
    segformer = transformers.SegformerForSemanticSegmentation(config)
    randomize(segformer)
    return segformer.eval()


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine with which huggingface_hub, and all that stands on it, speaks during a test."""
    hub = HubServer(tmp_path / "hub")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_home" / "hub"))
    # create_repo and upload_folder are methods of one object that read the endpoint when it was imported.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def processor() -> DiffusionADImageProcessor:
    return DiffusionADImageProcessor()


@pytest.fixture
def saved(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> Path:
    """The folder of the saved tiny pipeline."""
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def saved_segformer(tiny_pipeline: DiffusionADPipeline, tiny_segformer: nn.Module, tmp_path: Path) -> Path:
    """The folder of the tiny pipeline with a SegFormer, saved."""
    tiny_pipeline.register_modules(segmentation=tiny_segformer)
    tiny_pipeline.save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


@pytest.fixture
def assert_same() -> Callable[[DiffusionADPipeline, DiffusionADPipeline], None]:
    """Checks that two pipelines have the same weights, bit by bit, the same config and the same outputs."""

    def check(first: DiffusionADPipeline, second: DiffusionADPipeline) -> None:
        for name in ("unet", "segmentation"):
            one, other = getattr(first, name).state_dict(), getattr(second, name).state_dict()
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
        for one, other in ((first, second), (first.scheduler, second.scheduler)):
            one, other = ({k: v for k, v in c.config.items() if not k.startswith("_")} for c in (one, other))
            assert one == other
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        one, other = first(images, output_type="pt"), second(images, output_type="pt")
        assert one.anomaly_maps.std() > 1e-3  # a constant map would compare equal whatever was loaded
        for field in ("anomaly_maps", "anomaly_scores", "reconstructions"):
            assert torch.equal(one[field], other[field]), field

    return check


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
