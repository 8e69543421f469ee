"""Exported detectors that cut large pictures, against the pipeline with the same tiles."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.export.detector import ExportedDetector, ExportedFileError
from diffusionad_pipe.export.export import export_detector, write_onnx, write_openvino
from diffusionad_pipe.export.tiles import can_be_cut, tiles_of
from tests.helpers.tiny_pipeline import build_tiny_pipeline

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install diffusionad_pipe[export]")

pytestmark = pytest.mark.slow  # a minute, most of it torch.onnx

RANDOM = np.random.default_rng(0)
# As large as a tile, smaller, four tiles, eight, a strip that is refused as a whole.
SIZES = [(32, 32), (20, 30), (40, 48), (50, 100), (1100, 33)]
IMAGES = [RANDOM.integers(0, 200 + 10 * index, (*size, 3), dtype=np.uint8) for index, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def pipe() -> DiffusionADPipeline:
    pipe = build_tiny_pipeline()
    pipe.register_to_config(image_threshold=0.5, pixel_threshold=0.5, score_top_k=0.1)  # a share of a tile
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe: DiffusionADPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector as d.onnx, by the command, and as d.xml of the same trace."""
    folder = tmp_path_factory.mktemp("exported")
    pipe.save_pretrained(folder / "model")
    command = ["export", str(folder / "model"), "--output", str(folder / "d.onnx"), "--tile-overlap", "0.5"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "--tile-overlap is for pictures in tiles" in refused.output
    result = CliRunner().invoke(app, [*command, "--tile-size", "32"])
    assert result.exit_code == 0 and "its map differs from the pipeline's by at most" in result.output, result.output
    pipe.enable_tiling(32, 0.5)
    shutil.copy(folder / "d.onnx", folder / "source.onnx")
    metadata = json.dumps(ExportedDetector(folder / "d.onnx").metadata)
    write_openvino(folder / "source.onnx", folder / "d.xml", metadata, [])
    return folder


@pytest.mark.parametrize("name", ["d.onnx", "d.xml"])
def test_tiles_give_the_scores_of_the_pipelines(pipe: DiffusionADPipeline, folder: Path, name: str) -> None:
    detector = ExportedDetector(folder / name)
    assert detector.metadata["tiling"] == [32, 0.5] and detector.metadata["format_version"] == 2
    expected, output = pipe(IMAGES, output_type="np"), detector(IMAGES, output_type="np", batch_size=3)
    np.testing.assert_allclose(output.anomaly_scores, expected.anomaly_scores, rtol=0, atol=1e-5)
    assert np.ptp(expected.anomaly_scores) > 1e-3  # so that not every score is right
    for index in range(len(IMAGES)):
        for field in ("anomaly_maps", "reconstructions"):
            ours, theirs = getattr(output, field)[index], getattr(expected, field)[index]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=f"{field} {index}")
        assert (output.predicted_masks[index] != expected.predicted_masks[index]).mean() < 0.01
    streamed = list(ExportedDetector(folder / name, reconstructions=False).stream(IMAGES, output_type="np"))
    assert [one.reconstructions for one in streamed] == [None] * len(IMAGES)
    np.testing.assert_allclose([one.anomaly_scores[0] for one in streamed], expected.anomaly_scores, rtol=0, atol=1e-5)


def test_every_tile_sees_its_part_of_the_noise(folder: Path) -> None:
    detector = ExportedDetector(folder / "d.onnx")
    first, shifted = (detector.graph(IMAGES[0][None], np.array([corner]))[0] for corner in ((0, 0), (5, 3)))
    assert np.abs(first - shifted).max() > 1e-3
    repeated = detector.graph(IMAGES[0][None], np.array([(32, 64)]))[0]
    np.testing.assert_array_equal(first, repeated)


def test_pictures_that_cannot_be_cut(folder: Path, tmp_path: Path) -> None:
    detector = ExportedDetector(folder / "d.onnx")
    with pytest.raises(ValueError, match="20 x 40 pixels, which .*d.onnx cuts into tiles of 32: resize it"):
        detector(IMAGES[2][:20, :40])
    metadata = detector.metadata | {"format_version": 3}
    shutil.copy(folder / "d.onnx", tmp_path / "source.onnx")
    write_onnx(tmp_path / "source.onnx", tmp_path / "new.onnx", json.dumps(metadata), [])
    with pytest.raises(ExportedFileError, match="has format 3"):
        ExportedDetector(tmp_path / "new.onnx")


def test_int8_takes_its_ranges_from_tiles(pipe: DiffusionADPipeline, folder: Path, tmp_path: Path) -> None:
    tiles = tiles_of(IMAGES, 32, 0.5)
    assert len(tiles) <= len(IMAGES) and all(max(tile.shape[:2]) <= 32 for tile in tiles)
    assert not can_be_cut(IMAGES[2][:20], 32)
    shutil.copy(folder / "d.onnx", tmp_path / "source.onnx")
    metadata = json.dumps(ExportedDetector(folder / "d.onnx").metadata)
    write_onnx(tmp_path / "source.onnx", tmp_path / "q.onnx", metadata, tiles)
    output, expected = ExportedDetector(tmp_path / "q.onnx")(IMAGES, output_type="np"), pipe(IMAGES, output_type="np")
    assert 0 < np.abs(output.anomaly_scores - expected.anomaly_scores).max() < 0.1
    with pytest.raises(ValueError, match="both of whose sides have at least 32 pixels"):
        export_detector(pipe, tmp_path / "other.onnx", int8=True, calibration=[IMAGES[2][:20]])
