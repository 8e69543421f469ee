"""Large pictures tile by tile: positions, weights, seams, scores, memory, bad input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.tile_grid import blend_weights, tile_starts


def smooth_image(height: int, width: int) -> np.ndarray:
    """uint8 `[height, width, 3]`, without any edge."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    return large[0].permute(1, 2, 0).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(0, 300), st.floats(0, 0.99))
def test_tiles_cover_the_side_and_weights_add_up(tile: int, extra: int, overlap: float) -> None:
    length = tile + extra
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == length - tile
    gaps = np.diff(starts)
    assert all(gaps >= 0) and all(tile - gaps >= min(round(tile * overlap), tile - 1))
    weights = blend_weights(starts, tile)
    total = np.zeros(length, dtype=np.float32)
    for start, weight in zip(starts, weights):
        total[start : start + tile] += weight
    assert weights.shape == (len(starts), tile) and weights.min() >= 0
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)


def test_weights_are_ramps() -> None:
    first, last = blend_weights([0, 6], 8)
    assert first[:6].tolist() == last[2:].tolist() == [1.0] * 6
    assert first[6:].tolist() == pytest.approx([0.75, 0.25])


def test_one_tile_is_the_untiled_image(tiny_pipeline: DiffusionADPipeline) -> None:
    image = smooth_image(32, 32)
    expected = tiny_pipeline(image, output_type="np")
    tiny_pipeline.enable_tiling()
    for size in (16, 32):  # not larger than a tile: as without tiling
        small = smooth_image(size, 32)
        tiled = tiny_pipeline([small], output_type="np")
        tiny_pipeline.disable_tiling()
        untiled = tiny_pipeline([small], output_type="np")
        tiny_pipeline.enable_tiling()
        np.testing.assert_array_equal(tiled.anomaly_maps, untiled.anomaly_maps)
        assert tiled.anomaly_scores == untiled.anomaly_scores
    tiny_pipeline.disable_tiling()
    np.testing.assert_array_equal(tiny_pipeline(image, output_type="np").anomaly_maps, expected.anomaly_maps)


def seam_ratio(anomaly_map: np.ndarray, starts: list[int]) -> float:
    """The mean step of a map `[H, W]` across the left edges of tiles, in multiples of that across all columns."""
    steps = np.abs(np.diff(anomaly_map, axis=1)).mean(0)
    return float(steps[[start - 1 for start in starts[1:]]].mean() / steps.mean())


def test_no_step_at_the_seams(tiny_pipeline: DiffusionADPipeline) -> None:
    image = smooth_image(32, 32 + 24 * 8)
    ratios = {}
    for overlap in (0.0, 0.25, 0.5):
        tiny_pipeline.enable_tiling(32, overlap)
        # Hardly any noise: the maps of these untrained networks would be little else.
        output = tiny_pipeline(image, small_timestep=0, large_timestep=1, output_type="np")
        anomaly_map = output.anomaly_maps[0, ..., 0]
        ratios[overlap] = seam_ratio(anomaly_map, tile_starts(image.shape[1], 32, overlap))
    # Side by side the tiles show; blended, an edge of a tile is no more of a step than any other column.
    assert ratios[0.0] > 1.5, ratios
    assert ratios[0.25] < 1.15 and ratios[0.5] < 1.15, ratios


def test_tiles_share_their_noise_where_they_overlap(tiny_pipeline: DiffusionADPipeline) -> None:
    """With a UNet that does nothing, the reconstruction shows the noise: it must be one field, repeated."""
    for parameter in tiny_pipeline.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    image = np.full((32, 100, 3), 128, dtype=np.uint8)
    tiny_pipeline.enable_tiling(32, 0.25)
    tiny_pipeline.scheduler.register_to_config(clip_sample=False)
    rebuilt = tiny_pipeline(image, output_type="np").reconstructions[0]  # [32, 100, 3]
    tiny_pipeline.disable_tiling()
    tile = tiny_pipeline(image[:, :32], output_type="np").reconstructions[0]
    np.testing.assert_allclose(rebuilt, np.tile(tile, (1, 4, 1))[:, :100], rtol=0, atol=1e-5)


def test_the_score_is_that_of_the_blended_map(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.enable_tiling(32)
    image = smooth_image(70, 90)
    for top_k, pixels in ((50, 50), (0.01, round(0.01 * 32 * 32))):
        tiny_pipeline.register_to_config(score_top_k=top_k)
        output = tiny_pipeline(image, output_type="pt")
        assert output.anomaly_maps.shape == (1, 1, 70, 90)
        expected = output.anomaly_maps.flatten().topk(pixels).values.mean()
        assert output.anomaly_scores.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_mosaic_scores_as_its_tiles_do_alone(tiny_pipeline: DiffusionADPipeline) -> None:
    """Without overlap even bit by bit: the noise repeats with the tiles, and a share counts the pixels of one tile."""
    tiny_pipeline.register_to_config(score_top_k=0.05)
    parts = [smooth_image(96, 128)[top : top + 32, left : left + 32] for top in (0, 64) for left in (0, 32, 96)]
    alone = tiny_pipeline(parts, batch_size=6, output_type="pt")
    tiny_pipeline.enable_tiling(32, overlap=0)
    mosaic = np.concatenate([np.concatenate(parts[:3], axis=1), np.concatenate(parts[3:], axis=1)])
    tiled = tiny_pipeline(mosaic, batch_size=6, output_type="pt")
    maps = torch.cat(
        [torch.cat(list(alone.anomaly_maps[:3]), dim=-1), torch.cat(list(alone.anomaly_maps[3:]), dim=-1)], 1
    )
    torch.testing.assert_close(tiled.anomaly_maps[0], maps, rtol=0, atol=1e-6)
    assert alone.anomaly_scores.max() <= tiled.anomaly_scores[0]
    # A mosaic of one tile alone is as anomalous as this tile: its largest pixels come more often, not larger.
    worst = parts[alone.anomaly_scores.argmax()]
    repeated = tiny_pipeline(np.tile(worst, (3, 3, 1)), output_type="pt").anomaly_scores[0]
    assert alone.anomaly_scores.max() <= repeated <= alone.anomaly_maps[alone.anomaly_scores.argmax()].max()


def test_networks_see_a_batch_of_tiles_whatever_the_size(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.enable_tiling(32, 0.25)
    seen: list[torch.Size] = []
    for network in (tiny_pipeline.unet, tiny_pipeline.segmentation):
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    for height, width in ((40, 60), (200, 300)):
        tiny_pipeline(smooth_image(height, width), batch_size=4)
    assert set(seen[:2]) == {(8, 3, 32, 32), (4, 6, 32, 32)}
    assert {shape[1:] for shape in seen} == {(3, 32, 32), (6, 32, 32)} and max(shape[0] for shape in seen) == 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_large_image_is_that_of_its_results(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    script = """
import ctypes, sys
import numpy as np
from pathlib import Path
from diffusionad_pipe import DiffusionADPipeline

def resident(field):
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field)))

pipe = DiffusionADPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.enable_tiling(64, overlap=0)
picture = np.random.RandomState(0).randint(0, 256, (1024, 1024, 3), dtype=np.uint8)
needed = []
for height in (64, 64, 1024):  # the first call sets up the kernels
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    pipe(picture[:height], batch_size=4)
    needed.append(resident("VmHWM") - before)
print(*needed)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, small, large = map(int, done.stdout.split())
    # A pixel's map and reconstruction in float32, as they are, clamped, and scaled to 8 bits: 16 + 16 + 24 + 4 bytes.
    assert (large - small) / (960 * 1024) < 80, (small, large)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_out_of_memory_names_batch_and_tile_size(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    script = """
import resource, sys
import numpy as np
from diffusionad_pipe import DiffusionADPipeline
pipe = DiffusionADPipeline.from_pretrained(sys.argv[1])
pipe.enable_tiling(4096, overlap=0)
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
pipe(np.zeros((5000, 5000, 3), np.uint8), batch_size=16)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    last = done.stderr.splitlines()[-1]
    expected = (
        "batch_size=16 and tile_size=4096 for a picture of 5000 x 5000 pixels: use a smaller batch_size, fewer noise"
    )
    assert done.returncode == 1 and last.startswith("MemoryError: out of memory with ") and expected in last, (
        done.stderr
    )


def test_tiled_outputs_do_not_depend_on_the_batch(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    tiny_pipeline.enable_tiling(32, 0.5)
    images = [Image.fromarray(smooth_image(48, 80)), smooth_image(20, 70), smooth_image(30, 30)]
    together = tiny_pipeline(images, batch_size=5, output_type="np")
    assert [m.shape for m in together.anomaly_maps] == [(48, 80, 1), (20, 70, 1), (30, 30, 1)]
    streamed = list(tiny_pipeline.stream(images, batch_size=1, output_type="np"))
    for index, output in enumerate(streamed):
        np.testing.assert_allclose(output.anomaly_scores[0], together.anomaly_scores[index], rtol=0, atol=1e-5)
        np.testing.assert_allclose(output.anomaly_maps[0], together.anomaly_maps[index], rtol=0, atol=1e-5)
        assert output.predicted_masks.shape[1:] == together.predicted_masks[index].shape
    pil = tiny_pipeline(images)
    assert [m.size for m in pil.anomaly_maps] == [(80, 48), (70, 20), (30, 30)] and len(pil.is_anomalous) == 3
    as_tuple = tiny_pipeline(images[0], output_type="np", return_dict=False)
    np.testing.assert_allclose(as_tuple[1], together.anomaly_scores[:1], rtol=0, atol=1e-5)


def test_kinds_of_images_agree(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.enable_tiling(32)
    array = smooth_image(40, 60)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = tiny_pipeline(array, output_type="np").anomaly_scores
    for other in (Image.fromarray(array), tensor, tensor[None], tensor.float() / 255):
        np.testing.assert_allclose(tiny_pipeline(other, output_type="np").anomaly_scores, expected, rtol=0, atol=1e-6)
    resized = tiny_pipeline(array, height=64, width=96, output_type="np")
    assert resized.anomaly_maps.shape == (1, 40, 60, 1)
    assert tiny_pipeline(array, num_noise_samples=2, output_type="np").anomaly_scores != expected
    seeded = [tiny_pipeline(array, generator=torch.Generator().manual_seed(1)).anomaly_scores[0] for _ in range(2)]
    assert seeded[0] == seeded[1] != expected[0]


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"overlap": 1.0}, "overlap=1.0 must be in"),
        ({"overlap": -0.1}, "overlap=-0.1 must be in"),
        ({"tile_size": -8}, "tile_size=-8 is outside"),
        ({"tile_size": 10**6}, "outside 1 ... 8192"),
    ],
)
def test_bad_tilings(tiny_pipeline: DiffusionADPipeline, arguments: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        tiny_pipeline.enable_tiling(**arguments)
    assert tiny_pipeline.tiling is None


@pytest.mark.parametrize(
    "images, arguments, cause",
    [
        (np.zeros((64, 64, 3), np.uint8), {"noise": torch.zeros(2, 1, 3, 64, 64)}, "disable_tiling"),
        (np.zeros((64, 64, 3), np.uint8), {"batch_size": 0}, "at least 1"),
        (np.zeros((64, 64, 3), np.uint8), {"output_type": "latent"}, "'pil', 'np' or 'pt'"),
        (np.zeros((64, 64, 3), np.uint8), {"small_timestep": 500}, "in order"),
        ([np.zeros((64, 64, 3)), np.full((64, 64, 3), np.nan)], {}, "picture 1.*NaN"),
        ([np.zeros((64, 64, 3)), "path.png"], {}, "picture 1.*open_image"),
        ([np.zeros((16, 16, 3)), np.full((16, 16, 3), 7.0)], {}, "picture 1.*divide 0..255"),
        ([], {}, "at least one"),
    ],
)
def test_bad_calls(tiny_pipeline: DiffusionADPipeline, images, arguments: dict, cause: str) -> None:
    tiny_pipeline.enable_tiling(32)
    with pytest.raises((TypeError, ValueError), match=cause):
        tiny_pipeline(images, **arguments)
