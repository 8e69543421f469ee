"""Exports the whole detector as one graph: a uint8 picture of any size in, map, score and reconstruction out.

The noise at inference is a fixed function of the pipeline, so nothing of it need stay outside the graph: resizing,
noise, both networks, norm guidance, score and resizing back are all in it. [`exported`] runs the files.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from numpy.typing import NDArray
from torch import nn

from .. import __version__
from ..files.output_folder import OutputFolder
from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.prefetch import prefetched
from ..runtime.progress import libraries_bars
from ..scoring import score_pixels
from .detector import FORMAT_VERSION, LARGEST_BATCH, METADATA_KEY, OUTPUTS, TILES_FORMAT_VERSION, ExportedDetector
from .tiles import can_be_cut, tiles_of

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
INPUTS = ["picture", "corners"]  # corners where it takes tiles
LARGEST_SIDE = 16384  # of a picture, in pixels
# OpenVINO's int8 rounds what goes into convolutions and matrix products alone. NNCF would round the noised picture,
# normalization, residual sums and attention too, and faint defects with them.
NOT_QUANTIZED = [
    "Add", "AvgPool", "Divide", "Interpolate", "MVN", "Maximum", "Multiply", "ReduceMean", "ScaledDotProductAttention",
    "Subtract", "TopK",
]  # fmt: skip
# Of the segmentation network's first convolution, which alone takes a picture and its reconstruction. What little they
# differ by is lost in 8 bits: that layer stays in float32, as `SegmentationUNet2DModel.cast` leaves it in bfloat16.
COMPARED_CHANNELS = 6


class ExportResult(NamedTuple):
    """What was written, and how far it is from the pipeline.

    Args:
        path: the file; OpenVINO's weights lie beside it, with the suffix `.bin`.
        metadata: as it is in the file.
        map_difference: largest difference of a pixel of the map, on the picture it was tried on.
        score_difference: difference of the score.
    """

    path: Path
    metadata: dict[str, Any]
    map_difference: float
    score_difference: float


class WholeDetector(nn.Module):
    """From the picture, or a tile of it, to map and score, as one module.

    Args:
        pipe: a float32 pipeline; it is not changed.
        height: at which the networks work, in pixels.
        width: likewise.
    """

    pipe: DiffusionADPipeline
    timesteps: torch.Tensor
    noise: torch.Tensor

    def __init__(self, pipe: DiffusionADPipeline, height: int, width: int):
        super().__init__()
        self.pipe = copy(pipe)
        self.pipe.fold_batch_norm()
        self.unet, self.segmentation = self.pipe.unet, self.pipe.segmentation  # so that their weights are exported
        scheduler = pipe.scheduler.config
        self.register_buffer(
            "timesteps",
            torch.tensor([scheduler.small_timestep, scheduler.large_timestep], dtype=torch.int64, device="cpu"),
        )
        self.register_buffer("noise", pipe.fixed_noise(1, height, width).clone())  # [1, 2, 1, 3, height, width]
        self.score_pixels = score_pixels(pipe.config.score_top_k, height * width)

    def forward(
        self, image: torch.Tensor, corners: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Detect anomalies.

        Args:
            image: RGB `[B, H, W, 3]` uint8, of any size.
            corners: of tiles, (top, left) in the picture in pixels, `[B, 2]` int64.

        Returns:
            The map `[B, H, W]` in [0, 1], the score `[B]` and the reconstruction `[B, H, W, 3]` in [0, 1].
        """
        batch, own_height, own_width, _ = image.shape
        height, width = self.noise.shape[-2:]
        images = resize(image.permute(0, 3, 1, 2).float() / 255, height, width).clamp(0, 1)
        noises = self.noise.expand(-1, -1, batch, -1, -1, -1) if corners is None else self._shifted_noise(corners)
        maps, reconstructions = self.pipe.detect(images, noises, self.timesteps)
        scores = maps.flatten(1).topk(self.score_pixels).values.mean(1)
        own_maps = resize(maps, own_height, own_width).clamp(0, 1)
        own_reconstructions = resize(reconstructions, own_height, own_width).clamp(0, 1)
        return own_maps[:, 0], scores, own_reconstructions.permute(0, 2, 3, 1)

    def _shifted_noise(self, corners: torch.Tensor) -> torch.Tensor:
        """Each tile's window of the noise that is repeated over the picture: `[1, 2, B, 3, height, width]`."""
        height, width = self.noise.shape[-2:]
        rows = (corners[:, :1] + torch.arange(height, device="cpu")) % height  # [B, height]
        columns = (corners[:, 1:] + torch.arange(width, device="cpu")) % width  # [B, width]
        places = rows[:, :, None] * width + columns[:, None, :]  # [B, height, width], in a flat noise
        shifted = self.noise.flatten(-2).index_select(-1, places.flatten())  # [1, 2, 1, 3, B * height * width]
        return shifted.reshape(1, 2, 3, corners.shape[0], height, width).permute(0, 1, 3, 2, 4, 5)


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """As the pipeline resizes: where a side grows, antialiasing changes nothing."""
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def export_detector(
    pipe: DiffusionADPipeline,
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    int8: bool = False,
    calibration: Sequence[NDArray[np.uint8]] = (),
    license: str | None = None,
    name: str | None = None,
) -> ExportResult:
    """Write a pipeline as one file, and run it once to see that it says what the pipeline says.

    Args:
        pipe: in float32; it is moved to the CPU. With tiling the networks work at the size of a tile: the detector cuts
            pictures that are larger, and enlarges those that are smaller.
        path: where to; its suffix is that of the format: `.onnx`, `.xml` (OpenVINO, which also writes a `.bin`) or
            `.pt2`.
        format: `"onnx"`, `"openvino"` or `"torch"` (torch.export).
        int8: quantize convolutions and matrix products to 8 bits, statically, by ONNX Runtime's or OpenVINO's own tools
            (OpenVINO's is NNCF).
        calibration: good pictures, uint8 `[H, W, 3]` each, from which the ranges of the activations are taken. Needed
            for `int8`; 30 to 300 are usual.
        license: of the weights, for the metadata.
        name: of the model, for the metadata.

    Returns:
        [`ExportResult`]: look at the differences, above all with `int8`.

    Raises:
        ValueError: for arguments that do not go together, and a network that cannot be exported.
        ModuleNotFoundError: for a missing package of `pip install "diffusionad_pipe[export]"`.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"{path}: the name of a file of format {format} ends in {FORMATS[format]}")
    if int8 and format == "torch":
        raise ValueError("int8 is quantized by ONNX Runtime or OpenVINO: choose the format onnx or openvino")
    tiling = pipe.tiling
    if tiling is not None:
        calibration = [image for image in calibration if can_be_cut(image, tiling.tile_size)]
    if int8 and not len(calibration):
        cut = "" if tiling is None else f", both of whose sides have at least {tiling.tile_size} pixels"
        raise ValueError(f"int8 needs calibration pictures: good ones, of the kind that the model was trained on{cut}")
    if {pipe.unet.dtype, pipe.segmentation.dtype} != {torch.float32}:
        raise ValueError(
            "export the model in float32: load it without dtype; a runtime may choose another when it runs"
        )

    folder = OutputFolder(path.parent, "export")
    folder.require_free(path.name, *([path.with_suffix(".bin").name] if format == "openvino" else []))
    pipe.to("cpu")
    side = pipe.config.image_size if tiling is None else tiling.tile_size
    height, width = (pipe.round_size(side, name) for name in ("height", "width"))
    metadata = _metadata(pipe, height, width) | {
        "model": name, "license": license, "precision": "int8" if int8 else "float32"
    }  # fmt: skip
    text = json.dumps(metadata)
    program = export_program(WholeDetector(pipe, height, width).eval(), height, width, in_tiles=tiling is not None)

    with folder.temporary() as temporary:
        written = temporary / "written"
        written.mkdir()
        if format == "torch":
            torch.export.save(program, written / path.name, extra_files={METADATA_KEY: text})
        else:
            onnx_path = temporary / "detector.onnx"
            torch.onnx.export(
                program,
                (),
                onnx_path,
                input_names=INPUTS[:1] if tiling is None else INPUTS,
                output_names=OUTPUTS,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            write = write_onnx if format == "onnx" else write_openvino
            ranges_from = list(calibration) if tiling is None or not int8 else tiles_of(calibration, *tiling)
            write(onnx_path, written / path.name, text, ranges_from if int8 else [])
        # OpenVINO's weights, .bin, come first: an old .xml then meets new weights, and refuses them.
        folder.move_in(written)

    return _compare(pipe, path, metadata, calibration)


def _metadata(pipe: DiffusionADPipeline, height: int, width: int) -> dict[str, Any]:
    """What a file says of the pipeline, whose networks work at this size."""
    scheduler = pipe.scheduler.config
    return {
        "format_version": FORMAT_VERSION if pipe.tiling is None else TILES_FORMAT_VERSION,
        "library_version": __version__,
        "height": height,
        "width": width,
        "tiling": None if pipe.tiling is None else list(pipe.tiling),
        "score_top_k": pipe.config.score_top_k,
        "image_threshold": pipe.config.image_threshold,
        "pixel_threshold": pipe.config.pixel_threshold,
        "noise_seed": pipe.config.noise_seed,
        "small_timestep": scheduler.small_timestep,
        "large_timestep": scheduler.large_timestep,
        "guidance_scale": scheduler.guidance_scale,
    }


def _compare(
    pipe: DiffusionADPipeline, path: Path, metadata: dict[str, Any], images: Sequence[NDArray[np.uint8]]
) -> ExportResult:
    """How far a file is from the pipeline, on the first of some pictures; with tiling, on the largest, which is cut."""
    if pipe.tiling is not None:
        images = sorted(images, key=np.size, reverse=True)
    image = images[0] if len(images) else _image_to_try(metadata["height"], metadata["width"])
    ours = pipe(image, output_type="np", batch_size=1)
    theirs = ExportedDetector(path)(image, output_type="np")
    result = ExportResult(
        path,
        metadata,
        float(np.abs(ours.anomaly_maps - theirs.anomaly_maps).max()),
        float(np.abs(ours.anomaly_scores - theirs.anomaly_scores).max()),
    )
    if metadata["precision"] != "int8" and max(result.map_difference, result.score_difference) > 1e-3:
        logger.warning(
            f"{path}: on a picture that it was tried on the map differs by up to {result.map_difference:.2g} and the "
            f"score by {result.score_difference:.2g} from the pipeline's; measure the file before you rely on it"
        )
    return result


def export_program(
    detector: WholeDetector, height: int, width: int, in_tiles: bool = False
) -> torch.export.ExportedProgram:
    """Trace the detector for any number of pictures up to `LARGEST_BATCH`, of any size up to `LARGEST_SIDE`.

    Args:
        detector: what is traced.
        height: at which the networks work, in pixels.
        width: likewise.
        in_tiles: whether it takes the corners of tiles.

    Raises:
        ValueError: for a network that torch.export cannot trace.
    """
    # A batch of 2, and sides that are neither equal nor the networks': what is equal here might be taken for constant.
    example = torch.zeros(2, height + 5, width + 13, 3, dtype=torch.uint8, device="cpu")
    sides = {"min": 8, "max": LARGEST_SIDE}
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    dimensions = {0: batch, 1: torch.export.Dim("height", **sides), 2: torch.export.Dim("width", **sides)}
    examples: tuple[torch.Tensor, ...] = (example,)
    all_dimensions = (dimensions, {0: batch})
    if in_tiles:
        examples += (torch.tensor([[3, 5], [2, 1]], dtype=torch.int64, device="cpu"),)
    try:
        with torch.no_grad():
            return torch.export.export(detector, examples, dynamic_shapes=all_dimensions[: len(examples)])
    except Exception as error:  # torch.export has no class of errors of its own
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.export cannot trace these networks: {cause}") from error


def graph_inputs(image: NDArray[np.uint8], in_tiles: bool) -> list[NDArray[Any]]:
    """One picture as a graph takes it, with the corner of a tile if it takes tiles."""
    return [image[None], np.zeros((1, 2), dtype=np.int64)] if in_tiles else [image[None]]


def write_onnx(source: Path, path: Path, metadata: str, calibration: list[NDArray[np.uint8]]) -> None:
    """Put the metadata into an ONNX file, after quantizing it if there are calibration pictures."""
    import onnx

    if calibration:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.images = iter(calibration)

            def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
                image = next(self.images, None)
                return None if image is None else dict(zip(INPUTS, graph_inputs(image, in_tiles)))

        in_tiles = len(onnx.load(str(source)).graph.input) > 1
        prepared, quantized = source.with_name("prepared.onnx"), source.with_name("quantized.onnx")
        # ONNX Runtime's own optimizer folds constants here; its symbolic shape inference does not know every operator.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        shapes = {weights.name: weights.dims for weights in graph.initializer}
        quantize_static(
            str(prepared),
            str(quantized),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=[
                node.name
                for node in graph.node
                if node.op_type == "Conv" and shapes[node.input[1]][1] == COMPARED_CHANNELS
            ],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        source = quantized
    model = onnx.load(str(source))
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.save(model, str(path))


def write_openvino(source: Path, path: Path, metadata: str, calibration: list[NDArray[np.uint8]]) -> None:
    """Convert an ONNX file into OpenVINO's format, quantized if there are calibration pictures."""
    import openvino

    model = openvino.convert_model(source)
    in_tiles = len(model.inputs) > 1
    antialias(model)
    if calibration:
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        nncf.set_log_level(logging.WARNING)  # below it lists every node, on the standard output

        def quantize() -> Iterator["openvino.Model"]:
            yield nncf.quantize(
                model,
                nncf.Dataset(calibration, lambda image: graph_inputs(image, in_tiles)),
                preset=nncf.QuantizationPreset.MIXED,  # symmetric weights, asymmetric activations: SiLU's need it
                subset_size=len(calibration),
                ignored_scope=nncf.IgnoredScope(
                    types=NOT_QUANTIZED,
                    names=[
                        node.get_friendly_name()
                        for node in model.get_ops()
                        if node.get_type_name() == "Convolution" and node.input_value(1).shape[1] == COMPARED_CHANNELS
                    ],
                    validate=False,
                ),
                # The widest range that any picture shows. NNCF's mean of all cuts off what few good pictures have, and
                # defects are made of that.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
                ),
            )

        # NNCF makes OpenVINO's cores and frees them in any order, which may only be in a thread that then ends: see
        # `exported._openvino_core`.
        with libraries_bars():
            (model,) = prefetched(quantize())
    resize_by_products(model)  # after quantization, which would round the pictures' pixels to 8 bits once more
    model.set_rt_info(metadata, METADATA_KEY)
    openvino.save_model(model, path, compress_to_fp16=False)


def antialias(model: "openvino.Model") -> None:
    """Replace the antialiased resizing of an ONNX graph, which OpenVINO reads but computes without antialiasing, by its
    `bilinear_pillow`, which is the same as torch's."""
    from openvino import opset11

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Interpolate" or not node.get_attributes().get("antialias"):
            continue
        size = opset11.gather(node.input_value(1), np.array([2, 3]), np.array(0))  # of [B, C, H, W]
        replacement = opset11.interpolate(
            node.input_value(0),
            size,
            mode="bilinear_pillow",
            shape_calculation_mode="sizes",
            pads_begin=[0, 0, 0, 0],
            pads_end=[0, 0, 0, 0],
            axes=np.array([2, 3]),
        )
        node.output(0).replace(replacement.output(0))
    model.validate_nodes_and_infer_types()


def resize_by_products(model: "openvino.Model") -> None:
    """Replace `bilinear_pillow`, which computes one channel on one core, by the products of matrices that it is, along
    the width and along the height: the same to float32's rounding, and several times as fast."""
    from openvino import opset13

    def weights(before: "openvino.Node", after: "openvino.Node") -> "openvino.Node":
        """Of each pixel before, in each pixel after: a triangle around it, `[before, after]` for two scalar sides."""
        before, after = (opset13.convert(side, "f32") for side in (before, after))
        zero, half, one = (np.float32(value) for value in (0, 0.5, 1))
        scale = opset13.divide(before, after)
        sources, targets = (
            opset13.add(opset13.range(zero, side, one, output_type="f32"), half) for side in (before, after)
        )
        offsets = opset13.subtract(opset13.unsqueeze(sources, np.array(1)), opset13.multiply(targets, scale))
        distances = opset13.abs(opset13.divide(offsets, opset13.maximum(scale, one)))  # as wide as a pixel after
        triangles = opset13.maximum(opset13.subtract(one, distances), zero)
        return opset13.divide(triangles, opset13.reduce_sum(triangles, np.array([0]), keep_dims=True))

    def item(sides: "openvino.Node", index: int) -> "openvino.Node":
        return opset13.gather(sides, np.array(index), np.array(0))

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Interpolate" or node.get_attributes().get("mode") != "bilinear_pillow":
            continue
        images, after = node.input_value(0), node.input_value(1)  # [B, C, H, W]; height and width to be
        before = opset13.shape_of(images)
        wide = opset13.matmul(images, weights(item(before, 3), item(after, 1)), False, False)
        resized = opset13.matmul(weights(item(before, 2), item(after, 0)), wide, True, False)
        node.output(0).replace(resized.output(0))
    model.validate_nodes_and_infer_types()


def _image_to_try(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth random picture, larger than the networks' size."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    smooth = F.interpolate(coarse, size=(height + height // 4, width + width // 2), mode="bicubic").clamp(0, 1)
    return smooth.mul(255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


def stated_license(model: str | os.PathLike[str]) -> str | None:
    """The licence that the model card in a pipeline's folder states, as the Hub writes it (`cc-by-4.0`), or None."""
    card = Path(model, "README.md")
    if not card.is_file():
        return None
    license = ModelCard.load(card).data.to_dict().get("license")
    return None if license is None else str(license)
