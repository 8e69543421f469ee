"""Exported detectors: every format against the pipeline, int8, metadata, a Python without torch, bad input."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe import DiffusionADPipeline
from diffusionad_pipe.cli import app
from diffusionad_pipe.export.detector import METADATA_KEY, ExportedDetector, ExportedFileError
from diffusionad_pipe.export.export import export_detector, write_onnx, write_openvino
from tests.helpers.script_processes import run_script
from tests.helpers.tiny_pipeline import build_tiny_pipeline

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install diffusionad_pipe[export]")


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with a little noise, uint8 `[height, width, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
    noise = 0.1 * torch.rand(height, width, 3, generator=generator)
    return (0.9 * large + noise).mul(255).round().to(torch.uint8).numpy()


IMAGES = [image(32, 32), image(50, 40), image(50, 40, seed=1), image(20, 70)]
CALIBRATION = [image(40, 40 + seed, seed) for seed in range(8)]


@pytest.fixture(scope="module")
def pipe() -> DiffusionADPipeline:
    pipe = build_tiny_pipeline()
    pipe.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe: DiffusionADPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector in float32: as d.onnx, and as d.xml of the same trace, which takes most of the time."""
    folder = tmp_path_factory.mktemp("exported")
    result = export_detector(pipe, folder / "d.onnx", license="cc0-1.0", name="tiny")
    assert result.map_difference < 1e-4 and result.score_difference < 1e-4, result
    shutil.copy(folder / "d.onnx", folder / "source.onnx")
    write_openvino(folder / "source.onnx", folder / "d.xml", json.dumps(result.metadata), [])
    return folder


@pytest.fixture(scope="module")
def file(request: pytest.FixtureRequest, pipe: DiffusionADPipeline, folder: Path) -> Path:
    """One of the detector's files."""
    path = folder / request.param
    if path.suffix == ".pt2":
        export_detector(pipe, path, "torch", license="cc0-1.0", name="tiny")
    return path


FILES = ["d.onnx", "d.xml", pytest.param("d.pt2", marks=pytest.mark.slow)]


@pytest.mark.slow
def test_openvino_from_the_pipeline(pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    result = export_detector(pipe, tmp_path / "d.xml", "openvino", license="cc0-1.0", name="tiny")
    assert result.map_difference < 1e-4 and result.score_difference < 1e-4, result
    assert sorted(path.name for path in tmp_path.glob("d*")) == ["d.bin", "d.xml"]


@pytest.mark.parametrize("file", FILES, indirect=True)
def test_a_file_says_what_the_pipeline_says(pipe: DiffusionADPipeline, file: Path) -> None:
    detector = ExportedDetector(file)
    expected, output = pipe(IMAGES, output_type="np"), detector(IMAGES, output_type="np", batch_size=2)
    np.testing.assert_allclose(output.anomaly_scores, expected.anomaly_scores, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(output.is_anomalous, expected.is_anomalous)
    for index in range(len(IMAGES)):
        for field in ("anomaly_maps", "reconstructions"):
            ours, theirs = getattr(output, field)[index], getattr(expected, field)[index]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4, err_msg=f"{field} {index}")
        assert output.predicted_masks[index].shape == expected.predicted_masks[index].shape
    one = detector(Image.fromarray(IMAGES[1]))
    assert one.anomaly_maps[0].mode == "L" and one.anomaly_maps[0].size == one.reconstructions[0].size == (40, 50)
    as_tuple = detector(IMAGES[0], output_type="np", return_dict=False)
    assert len(as_tuple) == 5 and as_tuple[0].shape == (1, 32, 32, 1)
    assert detector.metadata["license"] == "cc0-1.0" and detector.metadata["image_threshold"] == 0.5


@pytest.mark.parametrize("file", FILES, indirect=True)
def test_reconstructions_may_be_left_out(file: Path) -> None:
    whole, without = ExportedDetector(file), ExportedDetector(file, reconstructions=False)
    expected, output = (detector(IMAGES, output_type="np", batch_size=2) for detector in (whole, without))
    np.testing.assert_array_equal(output.anomaly_scores, expected.anomaly_scores)
    for ours, theirs in zip(output.anomaly_maps, expected.anomaly_maps, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert output.reconstructions is None
    streamed = list(without.stream(IMAGES))
    assert [one.reconstructions for one in streamed] == [None] * len(IMAGES)
    assert streamed[1].anomaly_maps[0].size == IMAGES[1].shape[1::-1]


def test_export_leaves_the_pipeline_alone(pipe: DiffusionADPipeline, folder: Path) -> None:
    assert pipe.segmentation.config.norm_type == "batch"
    assert torch.equal(pipe(IMAGES[0], output_type="pt").anomaly_maps, build_tiny_pipeline()(
        IMAGES[0], output_type="pt").anomaly_maps)  # fmt: skip


def check_int8(pipe: DiffusionADPipeline, path: Path) -> None:
    output, expected = ExportedDetector(path)(IMAGES, output_type="np"), pipe(IMAGES, output_type="np")
    assert 0 < np.abs(output.anomaly_scores - expected.anomaly_scores).max() < 0.1
    graph = path.read_bytes()
    assert b"QuantizeLinear" in graph or b"FakeQuantize" in graph


def test_int8(pipe: DiffusionADPipeline, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "d.onnx", tmp_path / "source.onnx")
    metadata = json.dumps(ExportedDetector(folder / "d.onnx").metadata)
    write_onnx(tmp_path / "source.onnx", tmp_path / "q.onnx", metadata, CALIBRATION)
    check_int8(pipe, tmp_path / "q.onnx")


# A Ctrl-C as it comes later in the program: OpenVINO takes part in where its handler finds a stack.
CTRL_C = """
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_int8_of_openvino(pipe: DiffusionADPipeline, folder: Path, tmp_path: Path) -> None:
    """In a process of its own, for the Ctrl-C."""
    shutil.copy(folder / "d.onnx", tmp_path / "source.onnx")
    np.savez(tmp_path / "calibration.npz", *CALIBRATION)
    script = tmp_path / "quantize.py"
    script.write_text(
        f"""
import json, signal
from pathlib import Path
import numpy as np
from diffusionad_pipe.export.export import write_openvino
from diffusionad_pipe.export.detector import ExportedDetector
folder = Path({str(tmp_path)!r})
metadata = json.dumps(ExportedDetector({str(folder / "d.onnx")!r}).metadata)
calibration = list(np.load(folder / "calibration.npz").values())
write_openvino(folder / "source.onnx", folder / "q.xml", metadata, calibration)
{CTRL_C}"""
    )
    done = run_script([script])
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr  # and no word of NNCF's
    check_int8(pipe, tmp_path / "q.xml")


def test_ctrl_c_after_two_detectors_were_freed(folder: Path) -> None:
    """It ended the process with a segmentation fault."""
    script = f"""
import signal, sys
from diffusionad_pipe.export.detector import ExportedDetector
first = ExportedDetector(sys.argv[1])
second = ExportedDetector(sys.argv[1])
del first
del second
{CTRL_C}"""
    command = [sys.executable, "-c", script, str(folder / "d.xml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "interrupted\n", (done.returncode, done.stderr)


def test_kinds_of_images_and_thresholds(pipe: DiffusionADPipeline, folder: Path) -> None:
    detector = ExportedDetector(folder / "d.onnx", threads=1, image_threshold=0.0, pixel_threshold=1.0)
    rgba = np.dstack([IMAGES[1], np.full((50, 40), 200, np.uint8)])
    for kind in (rgba, IMAGES[1].astype(np.float32) / 255, IMAGES[1][..., :1], IMAGES[1][..., 0] > 100,
                 IMAGES[1].astype(np.uint16) * 257):  # fmt: skip
        expected = pipe(kind, output_type="np").anomaly_scores
        output = detector(kind, output_type="np")
        np.testing.assert_allclose(output.anomaly_scores, expected, rtol=0, atol=2e-3)
        assert output.is_anomalous.all() and not output.predicted_masks.any()
    assert detector(np.stack([IMAGES[1]] * 3), batch_size=3, output_type="np").anomaly_maps.shape == (3, 50, 40, 1)


def test_stream(folder: Path) -> None:
    detector = ExportedDetector(folder / "d.onnx")
    kinds = [*IMAGES[:2], IMAGES[1], IMAGES[1][..., 0]]  # three of one size in turn
    outputs = list(detector.stream(iter(kinds), batch_size=3, output_type="np"))
    for image, output in zip(kinds, outputs, strict=True):
        alone = detector(image, output_type="np")
        np.testing.assert_allclose(output.anomaly_scores, alone.anomaly_scores, rtol=0, atol=1e-6)
        np.testing.assert_allclose(output.anomaly_maps, alone.anomaly_maps, rtol=0, atol=1e-5)
        np.testing.assert_allclose(output.reconstructions, alone.reconstructions, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(output.predicted_masks, alone.predicted_masks)

    def damaged() -> Iterator[np.ndarray]:
        yield IMAGES[0]
        raise OSError("the next file is damaged")

    outputs = detector.stream(damaged(), batch_size=1)
    assert next(outputs).anomaly_maps[0].size == IMAGES[0].shape[1::-1]
    with pytest.raises(OSError, match="damaged"):
        next(outputs)
    with pytest.raises(ValueError, match=r"1 \.\.\. 16"):  # at once, not with the first output
        detector.stream([], batch_size=0)


def test_without_torch(pipe: DiffusionADPipeline, folder: Path) -> None:
    Image.fromarray(IMAGES[1]).save(folder / "picture.png")
    script = """
import sys
for name in ("torch", "diffusers", "transformers", "huggingface_hub"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
from diffusionad_pipe import open_image
from diffusionad_pipe.export.detector import ExportedDetector
folder = sys.argv[1]
for name in ("d.onnx", "d.xml"):
    output, = ExportedDetector(f"{folder}/{name}").stream([open_image(f"{folder}/picture.png")])
    print(output.anomaly_scores[0], output.anomaly_maps[0].size)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = pipe(IMAGES[1]).anomaly_scores[0]
    for line in done.stdout.splitlines():
        assert float(line.split()[0]) == pytest.approx(expected, abs=1e-4) and line.endswith("(40, 50)")


@pytest.mark.parametrize(
    "change, cause",
    [
        ({METADATA_KEY: json.dumps({"format_version": 99, "library_version": "9.9"})}, "format 99.*9.9.*export"),
        ({}, "lacks its metadata"),
        ({METADATA_KEY: "{"}, "lacks its metadata"),
    ],
)
def test_files_of_other_versions(folder: Path, tmp_path: Path, change: dict, cause: str) -> None:
    import onnx

    model = onnx.load(str(folder / "d.onnx"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, change)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ExportedFileError, match=cause):
        ExportedDetector(tmp_path / "other.onnx")


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    for name, content, cause in (
        ("missing.onnx", None, "no such file"),
        ("model.safetensors", b"", "ends in .onnx, .xml, .pt2"),
        ("broken.onnx", b"not a graph", "cannot be loaded.*export it again"),
        ("alone.xml", (folder / "d.xml").read_bytes(), "alone.bin, are not beside it"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportedFileError, match=cause):
            ExportedDetector(tmp_path / name)


def test_broken_weights_do_not_call_an_image_good(folder: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(folder / "d.onnx"))
    for tensor in model.graph.initializer:
        if "conv_out" in tensor.name and tensor.name.startswith("segmentation"):
            values = np.full_like(onnx.numpy_helper.to_array(tensor), np.nan)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(tmp_path / "broken.onnx"))
    detector = ExportedDetector(tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"broken\.onnx gave NaN for picture 0: its weights are broken"):
        detector(IMAGES[1:3], batch_size=2)


def test_bad_thresholds(folder: Path) -> None:
    for name in ("image_threshold", "pixel_threshold"):
        for value in (float("nan"), float("inf"), "0.5"):
            with pytest.raises(ValueError, match=rf"d\.onnx: {name}={value!r} must be a finite number"):
                ExportedDetector(folder / "d.onnx", **{name: value})


@pytest.mark.parametrize(
    "images, arguments, cause",
    [
        ([], {}, "at least one"),
        ("picture.png", {}, "open_image"),
        (torch.zeros(3, 32, 32), {}, "not Tensor"),
        (np.full((32, 32, 3), 7.0), {}, "divide 0..255"),
        (np.zeros((3, 32, 32), np.uint8), {}, "make it"),
        (np.zeros((32, 32), np.int64), {}, "int64"),
        (np.zeros((8, 300), np.uint8), {}, "aspect ratio of at most 32"),
        (IMAGES[0], {"batch_size": 17}, "1 ... 16"),
        (IMAGES[0], {"output_type": "pt"}, "'pil' or 'np'"),
    ],
)
def test_bad_calls(folder: Path, images, arguments: dict, cause: str) -> None:
    detector = ExportedDetector(folder / "d.onnx")
    with pytest.raises((TypeError, ValueError), match=cause):
        detector(images, **arguments)


def test_bad_exports(pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    for name, arguments, cause in (
        ("d.onnx", {"format": "tflite"}, "onnx, openvino, torch"),
        ("d.onnx", {"format": "openvino"}, "ends in .xml"),
        ("d.pt2", {"format": "torch", "int8": True}, "onnx or openvino"),
        ("d.onnx", {"int8": True}, "calibration pictures"),
    ):
        with pytest.raises(ValueError, match=cause):
            export_detector(pipe, tmp_path / name, **arguments)
    with pytest.raises(ValueError, match="in float32"):
        export_detector(build_tiny_pipeline().to(torch.bfloat16), tmp_path / "d.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command(pipe: DiffusionADPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    arguments = ["export", str(tmp_path / "model"), "--output", str(tmp_path / "new" / "model.pt2"), "--format"]
    result = CliRunner().invoke(app, [*arguments, "onnx", "--int8"])
    assert result.exit_code == 2 and "--calibration" in result.output
    result = CliRunner().invoke(app, [*arguments, "openvino"])
    assert result.exit_code == 2 and ".xml" in result.output
    result = CliRunner().invoke(app, [*arguments, "torch"])
    assert result.exit_code == 0 and "differs from the pipeline's" in result.output, result.output
    metadata = ExportedDetector(tmp_path / "new" / "model.pt2").metadata
    assert metadata["license"] == "cc-by-4.0" and metadata["model"] == "model" and metadata["image_threshold"] == 0.5
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model.pt2", ".diffusionad"}


@pytest.mark.parametrize("file", FILES, indirect=True)
def test_a_pickled_detector_loads_its_file_again(file: Path) -> None:
    detector = ExportedDetector(file, image_threshold=0.25, pixel_threshold=0.75)
    detector.pixel_threshold = None
    other = pickle.loads(pickle.dumps(detector))
    assert (other.image_threshold, other.pixel_threshold) == (0.25, None)
    expected, output = detector(IMAGES[:1], output_type="np"), other(IMAGES[:1], output_type="np")
    np.testing.assert_allclose(output.anomaly_maps, expected.anomaly_maps, rtol=0, atol=1e-6)
    assert output.predicted_masks is None
