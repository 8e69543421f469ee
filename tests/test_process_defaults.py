"""No result depends on what else this process has set: torch's defaults and seeds, NumPy's, warnings, threads."""

import locale
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.evaluation.calibration import split_held_out
from diffusionad_pipe.metrics.exact import evaluate_maps
from diffusionad_pipe.synthesis.augmenters import AUGMENTERS
from diffusionad_pipe.synthesis.config import SynthesisConfig
from diffusionad_pipe.synthesis.foregrounds import random_foregrounds, threshold_foreground
from diffusionad_pipe.synthesis.sampling import sample_generator
from diffusionad_pipe.training.dataset import SyntheticAnomalyDataset
from diffusionad_pipe.training.losses import training_losses
from tests.helpers.tiny_pipeline import build_tiny_pipeline

RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (h, w, 4), dtype=np.uint8)) for h, w in ((40, 48), (90, 64))]
PIXELS = torch.from_numpy(RANDOM.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
MAPS = RANDOM.random((4, 24, 24), dtype=np.float32)
MASKS = np.stack([np.zeros((24, 24), bool), *(RANDOM.random((3, 24, 24)) > 0.8)])


@contextmanager
def changed(get: Callable, change: Callable, value: object) -> Iterator[None]:
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def numpy_raises() -> Iterator[None]:
    with np.errstate(all="raise"):
        yield


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def seeded() -> Iterator[None]:
    torch.manual_seed(123)
    np.random.seed(123)
    yield


def default_dtype(dtype: torch.dtype):
    return lambda: changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


DEFAULTS = {
    "float64": default_dtype(torch.float64),
    "float16": default_dtype(torch.float16),
    "bfloat16": default_dtype(torch.bfloat16),
    "device meta": lambda: changed(lambda: None, torch.set_default_device, "meta"),
    "seeds": seeded,
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "NumPy raises": numpy_raises,
    "warnings are errors": warnings_are_errors,
    "locale": lambda: changed(
        lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name), "C"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder) -> DiffusionADPipeline:
    return load(folder)


def load(folder) -> DiffusionADPipeline:
    pipe = DiffusionADPipeline.from_pretrained(folder, image_threshold=0.5, pixel_threshold=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def results(pipe: DiffusionADPipeline) -> dict[str, object]:
    """All that a pipeline and its drawings give."""
    pipe._fixed_noise = None  # it is drawn once
    whole = pipe(IMAGES, output_type="np")
    drawn = pipe(IMAGES, output_type="pt", generator=torch.Generator("cpu").manual_seed(7), num_noise_samples=2)
    pipe.enable_tiling(32)
    tiled = pipe(IMAGES[1], output_type="np", generator=torch.Generator("cpu").manual_seed(7))
    wallpaper = pipe(IMAGES[1], output_type="pil")
    pipe.disable_tiling()
    pipe.scheduler.set_timesteps()
    processor, anomaly_map, mask = pipe.image_processor, whole.anomaly_maps[0], whole.predicted_masks[0]
    return {
        "whole": whole, "drawn": drawn, "tiled": tiled, "wallpaper": wallpaper,
        "streamed": [output.anomaly_scores for output in pipe.stream(IMAGES, output_type="np")],
        "timesteps": pipe.scheduler.timesteps, "betas": pipe.scheduler.betas,
        "heat": processor.visualize_anomaly_map(IMAGES[0], anomaly_map, mask),
        "contours": processor.visualize_mask(IMAGES[0], mask),
        "panel": processor.panel(IMAGES[0], whole.reconstructions[0], anomaly_map, mask, title="a"),
    }  # fmt: skip


def draw() -> dict[str, object]:
    """All that training draws, and what it makes of it."""
    dataset = SyntheticAnomalyDataset(
        PIXELS, PIXELS[..., :24, :24],
        SynthesisConfig(
            anomaly_probability=1.0, procedural_probability=0.5, thin_line_probability=0.5, soft_edge_probability=0.5
        ),
        length=8, seed=0, foregrounds="random", horizontal_flip=True, vertical_flip=True, rotation=20.0, crop_size=24,
    )  # fmt: skip
    generators = [sample_generator(0, number) for number in range(2)]
    unit = PIXELS[:2].float() / 255
    return {
        "samples": dataset.__getitems__(range(8)),
        "augmented": [augmenter(unit, generators) for augmenter in AUGMENTERS],
        "foregrounds": random_foregrounds(32, 32, generators),
        "foreground": threshold_foreground(unit[0]),
        "held out": split_held_out(20, 0.2),
    }


def measure() -> dict[str, object]:
    """Every metric."""
    methods = ("exact", "streaming", "reference")
    scores = MAPS.max((1, 2))
    return {method: evaluate_maps(MAPS, MASKS, scores, method=method) for method in methods}


def train(pipe: DiffusionADPipeline) -> dict[str, object]:
    """The losses, whose gradients are needed."""
    unit, labels = torch.from_numpy(np.float32(PIXELS[:2].numpy() / 255)), torch.from_numpy(np.array([0, 1]))
    masks = torch.from_numpy(np.float32(MASKS[1:3, None, :16, :16])).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise, timesteps = torch.stack([unit, unit.flip(0)]), torch.from_numpy(np.array([[10, 20], [400, 500]]))
    with torch.no_grad():
        return dict(
            training_losses(
                pipe.unet, pipe.segmentation, pipe.scheduler, unit, masks, labels, noise, timesteps
            )._asdict()
        )


def plain(value: object) -> object:
    """Bytes and dtypes of what is in it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    return repr(value)


@pytest.fixture(scope="module")
def expected(pipe) -> dict[str, object]:
    return {
        "results": plain(results(pipe)),
        "draw": plain(draw()),
        "measure": plain(measure()),
        "train": plain(train(pipe)),
    }


@pytest.mark.parametrize("default", DEFAULTS)
def test_results_are_the_same_under(default, pipe, folder, expected):
    with ExitStack() as stack:
        stack.enter_context(DEFAULTS[default]())
        found = {"results": plain(results(pipe)), "draw": plain(draw()), "measure": plain(measure())}
        found["train"] = plain(train(pipe))
        loaded = plain(load(folder)(IMAGES, output_type="np"))
    for part, values in found.items():
        for name in values:
            assert values[name] == expected[part][name], (part, name)
    assert loaded == expected["results"]["whole"]
