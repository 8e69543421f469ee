"""Runs what `diffusionad export` wrote: the pipeline's call and outputs with NumPy, Pillow and one runtime, no torch.

    from diffusionad_pipe.exported import ExportedDetector

    detector = ExportedDetector("hazelnut.onnx")
    output = detector(open_image("nut.png"))

Where torch is not wanted, install `diffusionad_pipe` with pip's `--no-deps`, and numpy, pillow and onnxruntime or
openvino.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..images.pixels import (
    MAX_ASPECT_RATIO,
    check_kind,
    check_size,
    check_unit_range,
    over_background,
    read_pil,
    to_unit_range,
)
from ..runtime.config_values import is_finite
from ..runtime.prefetch import prefetched
from ..scoring import score_pixels
from .tiles import can_be_cut, detect_in_tiles, mean_of_largest

if TYPE_CHECKING:
    import openvino

ImageInput: TypeAlias = Image.Image | NDArray[Any]
# Pictures [B, H, W, 3] uint8 -> maps [B, H, W], scores [B] and, if wanted, reconstructions [B, H, W, 3], all float32.
# A graph of tiles takes their corners too, see [`TileGraph`].
Graph: TypeAlias = Callable[..., Sequence[NDArray[np.float32]]]
# Of one picture: map [H, W, 1], score [] and, if wanted, reconstruction [H, W, 3].
Found: TypeAlias = tuple[NDArray[np.float32], ...]

FORMAT_VERSION = 1  # raised when this module could no longer run an older file, or an older module a newer file
TILES_FORMAT_VERSION = 2  # of a file whose graph takes tiles
METADATA_KEY = "diffusionad"
OUTPUTS = ("anomaly_map", "score", "reconstruction")
LARGEST_BATCH = 16
STREAM_BATCH = 8
SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}


class ExportedFileError(ValueError):
    """A file that cannot be run; the message names it, the cause and the cure."""


@dataclass
class ExportedDetectorOutput:
    """What [`ExportedDetector`] returns, as the pipeline does. Everything has the size of each input picture.

    Args:
        anomaly_maps: in [0, 1]. `"np"`: float32 `[B, H, W, 1]`, `"pil"`: pictures of mode L (1 is 255). Inputs of
            different sizes give a list.
        anomaly_scores: float32 `[B]`, in [0, 1].
        reconstructions: the anomaly-free pictures, in [0, 1]. `"np"`: `[B, H, W, 3]`. None where they are not wanted.
        predicted_masks: booleans (`"pil"`: mode L, 0 or 255) where the map is above the threshold. None without one.
        is_anomalous: `[B]`, where the score is above the threshold. None without one.
    """

    anomaly_maps: Any
    anomaly_scores: NDArray[np.float32]
    reconstructions: Any
    predicted_masks: Any
    is_anomalous: NDArray[np.bool_] | None


class ExportedDetector:
    """An exported detector, called like [`DiffusionADPipeline`].

    One that was exported with tiling cuts pictures larger than a tile, as the pipeline does; both of their sides must
    then be at least a tile's.

    Args:
        path: the `.onnx` file (runs in ONNX Runtime), the `.xml` file beside its `.bin` (OpenVINO), or the `.pt2` file
            (torch, the only one that needs it).
        threads: CPU threads; None leaves it to the runtime.
        image_threshold: in place of the one in the file.
        pixel_threshold: likewise.
        reconstructions: False leaves them out of the output; OpenVINO then does not resize them either, up to a tenth
            of a small model's time.
        options: of the runtime, by name: attributes of ONNX Runtime's `SessionOptions`, and `providers`; or OpenVINO's
            properties, and `DEVICE`. OpenVINO computes in float32 unless `INFERENCE_PRECISION_HINT` says otherwise.

    Attributes:
        metadata: what the file says of itself: sizes, thresholds, timesteps, licence, precision.
        path: the file.

    Raises:
        ExportedFileError: for a file that is missing, damaged, of another kind or of another version, or a runtime that
            is not installed.
        ValueError: for a threshold that is no finite number.

    Example:
        ```python
        from diffusionad_pipe import open_image
        from diffusionad_pipe.exported import ExportedDetector

        detector = ExportedDetector("detector.onnx")
        print(detector(open_image("photo.jpg")).anomaly_scores)
        ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        reconstructions: bool = True,
        options: dict[str, Any] | None = None,
    ):
        path = Path(path)
        runtime = SUFFIXES.get(path.suffix)
        if runtime is None:
            raise ExportedFileError(f"{path}: the name of an exported detector ends in {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise ExportedFileError(f"{path}: there is no such file; write it with `diffusionad export`")
        loader = {"onnxruntime": _load_onnx, "openvino": _load_openvino, "torch": _load_torch}[runtime]
        self.loading = {"threads": threads, "reconstructions": reconstructions, "options": options}
        try:
            outputs = OUTPUTS if reconstructions else OUTPUTS[:2]
            text, self.graph = loader(path, outputs, threads, dict(options or {}))
        except ModuleNotFoundError as error:
            raise ExportedFileError(f"{path} needs {runtime}, which is not installed: pip install {runtime}") from error
        except ExportedFileError:
            raise
        except Exception as error:  # the runtimes share no class of errors
            raise ExportedFileError(f"{path} cannot be loaded ({error}): export it again") from error
        self.metadata: dict[str, Any] = _read_metadata(path, text)
        self.image_threshold = self.metadata["image_threshold"] if image_threshold is None else image_threshold
        self.pixel_threshold = self.metadata["pixel_threshold"] if pixel_threshold is None else pixel_threshold
        for name in ("image_threshold", "pixel_threshold"):
            threshold = getattr(self, name)
            if threshold is not None and not is_finite(threshold):
                raise ValueError(
                    f"{path}: {name}={threshold!r} must be a finite number, or None for the one in the file"
                )
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a runtime nothing can be pickled: another process loads the file again, with the same settings."""
        return _unpickled, (self.path, self.loading, self.image_threshold, self.pixel_threshold)

    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Detect anomalies.

        Args:
            image: a picture, or a list of pictures of any sizes: PIL, or arrays `[H, W]` or `[H, W, 1|3|4]` (bool,
                uint8, uint16, or floats in [0, 1]; the graph takes 8 bits a channel, so finer values are rounded), or a
                batched array `[B, H, W, C]`.
            batch_size: pictures of one size, or tiles, in one run of the graph, at most 16; None is 1.
            output_type: `"pil"` or `"np"`.
            return_dict: False returns a tuple in the order of the output's fields.

        Returns:
            [`ExportedDetectorOutput`].

        Raises:
            TypeError: for something that is not a picture.
            ValueError: for pictures or arguments that cannot be used, and a file that gives NaN.
        """
        batch_size = _check_arguments(1 if batch_size is None else batch_size, output_type)
        images = [self._read(image) for image in _split(image)]
        output = self._to_output(list(self._detect(images, batch_size)), output_type)
        return output if return_dict else tuple(getattr(output, name) for name in output.__dataclass_fields__)

    def stream(
        self, images: Iterable[ImageInput], *, batch_size: int | None = None, output_type: str = "pil"
    ) -> Iterator[ExportedDetectorOutput]:
        """Detect anomalies in any number of pictures, while a thread decodes the next.

        Args:
            images: single pictures of any kind and size; an iterator is read in the background, as results are asked
                for, and at most a batch ahead.
            batch_size: pictures of one size, or tiles, in one run of the graph, at most 16; None is 8.
            output_type: `"pil"` or `"np"`.

        Yields:
            [`ExportedDetectorOutput`] of one picture, B = 1, in the order of `images`.

        Raises:
            TypeError, ValueError: as `__call__` does, and whatever `images` raises, after the outputs of all batches
                before.
        """
        batch_size = _check_arguments(STREAM_BATCH if batch_size is None else batch_size, output_type)
        return self._stream(images, batch_size, output_type)

    def _stream(
        self, images: Iterable[ImageInput], batch_size: int, output_type: str
    ) -> Iterator[ExportedDetectorOutput]:
        arrays, done = prefetched(map(self._read, images), batch_size), 0
        while batch := list(islice(arrays, batch_size)):
            for found in self._detect(batch, batch_size, done):
                yield self._to_output([found], output_type)
            done += len(batch)

    def _detect(self, images: list[NDArray[np.uint8]], batch_size: int, done: int = 0) -> Iterator[Found]:
        """Run the graph on pictures `[H, W, 3]`, those of one size that follow each other together. `done` is how many
        pictures came before."""
        start = 0
        while start < len(images):
            batch = images[start : start + batch_size]
            count = next((i for i, image in enumerate(batch) if image.shape != batch[0].shape), len(batch))
            if self._is_cut(batch[0]):
                count = 1
            for index, found in enumerate(self._run(batch[:count], batch_size)):
                # NaN is above no threshold, so the picture would pass as good.
                if not all(np.isfinite(part).all() for part in found):
                    raise ValueError(
                        f"{self.path} gave NaN for picture {done + start + index}: its weights are broken, or half "
                        "precision overflowed; export it again, or run it in float32"
                    )
                yield found
            start += count

    def _read(self, image: ImageInput) -> NDArray[np.uint8]:
        """A picture as the graph takes it."""
        if self.metadata["tiling"] is None:
            return to_rgb_uint8(image)
        array = to_rgb_uint8(image, max_aspect_ratio=inf)
        (height, width), tile = array.shape[:2], self.metadata["tiling"][0]
        if not can_be_cut(array, tile):
            raise ValueError(
                f"a picture of {height} x {width} pixels, which {self.path} cuts into tiles of {tile}: resize it so "
                "that both sides have as many pixels, or none has more"
            )
        if not self._is_cut(array):
            check_size(height, width)
        return array

    def _is_cut(self, image: NDArray[np.uint8]) -> bool:
        """Whether a picture is larger than a tile."""
        return self.metadata["tiling"] is not None and max(image.shape[:2]) > self.metadata["tiling"][0]

    def _run(self, images: list[NDArray[np.uint8]], batch_size: int) -> Iterator[Found]:
        """Run the graph on pictures of one size, or on the tiles of one picture."""
        if self.metadata["tiling"] is None:
            maps, *others = self.graph(np.stack(images))
            yield from zip(maps[..., None], *others)
        elif self._is_cut(images[0]):
            tile, overlap = self.metadata["tiling"]
            whole, *reconstructions = detect_in_tiles(images[0], tile, overlap, batch_size, self.graph)
            pixels = score_pixels(self.metadata["score_top_k"], whole.size, tile**2)
            yield whole.clip(0, 1), mean_of_largest(whole, pixels), *reconstructions
        else:
            maps, *others = self.graph(np.stack(images), np.zeros((len(images), 2), dtype=np.int64))
            yield from zip(maps[..., None], *others)

    def _to_output(self, found: list[Found], output_type: str) -> ExportedDetectorOutput:
        maps, scores, *reconstructions = (list(parts) for parts in zip(*found))
        all_scores = np.array(scores, dtype=np.float32)
        masks = None if self.pixel_threshold is None else [m > self.pixel_threshold for m in maps]
        return ExportedDetectorOutput(
            _collect(maps, output_type),
            all_scores,
            _collect(reconstructions[0], output_type) if reconstructions else None,
            None if masks is None else _collect(masks, output_type),
            None if self.image_threshold is None else all_scores > self.image_threshold,
        )


def _unpickled(
    path: Path, loading: dict[str, Any], image_threshold: float | None, pixel_threshold: float | None
) -> ExportedDetector:
    detector = ExportedDetector(path, **loading)
    detector.image_threshold, detector.pixel_threshold = image_threshold, pixel_threshold
    return detector


def _check_arguments(batch_size: int, output_type: str) -> int:
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise ValueError(f"batch_size={batch_size} must be 1 ... {LARGEST_BATCH}")
    if output_type not in ("pil", "np"):
        raise ValueError(f"output_type must be 'pil' or 'np', not {output_type!r}")
    return batch_size


def to_rgb_uint8(image: ImageInput, *, max_aspect_ratio: float = MAX_ASPECT_RATIO) -> NDArray[np.uint8]:
    """Turn one picture into uint8 RGB `[H, W, 3]`; transparent pixels are put on white, as the pipeline does.

    Args:
        image: PIL, or an array `[H, W]` or `[H, W, 1|3|4]`.
        max_aspect_ratio: longer pictures are refused; infinity where they are cut into tiles.

    Raises:
        TypeError: for something that is not a picture.
        ValueError: for a picture whose shape or values cannot be used.
    """
    if not isinstance(image, Image.Image | np.ndarray):
        raise TypeError(
            f"a picture must be a PIL image or a NumPy array, not {type(image).__name__}; open files with open_image"
        )
    array = read_pil(image, max_aspect_ratio=max_aspect_ratio) if isinstance(image, Image.Image) else image
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"array of shape {array.shape}; make it [H, W] or [H, W, C] with C = 1, 3 or 4")
    check_size(*array.shape[:2], max_aspect_ratio=max_aspect_ratio)
    floating = np.issubdtype(array.dtype, np.floating)
    check_kind(array.dtype.name, floating)
    if floating:
        check_unit_range(array.min(), array.max())
    if array.dtype != np.uint8 or array.shape[2] == 4:
        rgb = over_background(to_unit_range(array.transpose(2, 0, 1), array.dtype.name))
        array = np.rint(rgb * 255).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _split(image: Any) -> list[Any]:
    items = list(image) if isinstance(image, list | tuple) else [image]
    images = [p for item in items for p in (item if isinstance(item, np.ndarray) and item.ndim == 4 else [item])]
    if not images:
        raise ValueError("there are no pictures; give at least one")
    return images


def _collect(arrays: list[NDArray[Any]], output_type: str) -> Any:
    """`[h, w, 1|3]` floats in [0, 1] or booleans as one array, a list of arrays, or PIL images."""
    if output_type == "np":
        return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays
    pixels = [np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8) for array in arrays]
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def _read_metadata(path: Path, text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text or "")
        version = int(metadata["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportedFileError(f"{path} was not written by `diffusionad export`: it lacks its metadata") from error
    if version not in (FORMAT_VERSION, TILES_FORMAT_VERSION):
        written = f"{path} has format {version}, written by diffusionad_pipe {metadata.get('library_version')}"
        raise ExportedFileError(f"{written}; this version runs format {FORMAT_VERSION}: export the model again with it")
    return {"tiling": None, **metadata}


def _load_onnx(
    path: Path, outputs: Sequence[str], threads: int | None, options: dict[str, Any]
) -> tuple[str | None, Graph]:
    import onnxruntime

    providers = options.pop("providers", ["CPUExecutionProvider"])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or 0
    for name, value in options.items():
        setattr(settings, name, value)
    session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    names = [one.name for one in session.get_inputs()]
    return text, lambda *arrays: session.run(outputs, dict(zip(names, arrays)))


@cache
def _openvino_core() -> "openvino.Core":
    """One for all detectors, and never freed.

    The CPU's plugin of each gives the thread that loads it another stack for signal handlers. Where several are freed
    in any order but the reverse, or in another thread, that stack is gone and still in use: the next Ctrl-C ends the
    process with a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _load_openvino(
    path: Path, outputs: Sequence[str], threads: int | None, options: dict[str, Any]
) -> tuple[str | None, Graph]:
    core = _openvino_core()
    if not path.with_suffix(".bin").is_file():
        raise ExportedFileError(f"{path}: its weights, {path.with_suffix('.bin').name}, are not beside it")
    model = core.read_model(path)
    text = model.get_rt_info(METADATA_KEY).astype(str) if model.has_rt_info(METADATA_KEY) else None
    for result in model.get_results():
        if not result.input_value(0).names & set(outputs):
            model.remove_result(result)
    # Left alone, OpenVINO computes in bfloat16 where the CPU can.
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        properties["INFERENCE_NUM_THREADS"] = str(threads)
    device = options.pop("DEVICE", "CPU")
    compiled = core.compile_model(model, device, {**properties, **options})

    def run(*arrays: NDArray[Any]) -> list[NDArray[np.float32]]:
        request = compiled.create_infer_request()  # one for each call: threads may share a detector
        return [result.copy() for result in request.infer(list(arrays)).values()]

    return text, run


def _load_torch(
    path: Path, outputs: Sequence[str], threads: int | None, options: dict[str, Any]
) -> tuple[str | None, Graph]:
    import torch

    if threads or options:
        raise ExportedFileError(f"{path}: threads and options are torch's own in this format: torch.set_num_threads()")
    extra = {METADATA_KEY: ""}
    module = torch.export.load(path, extra_files=extra).module()

    def run(*arrays: NDArray[Any]) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            found = module(*map(torch.from_numpy, arrays))
        return [result.numpy() for result in found[: len(outputs)]]

    return extra[METADATA_KEY], run
