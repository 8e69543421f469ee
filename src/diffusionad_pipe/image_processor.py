"""Pictures in, pictures out: everything between PIL, NumPy or torch pictures and the tensors of the pipeline.

Nothing here knows of files; `image_files.open_image` turns a path into a picture.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .images.panels import draw_contours, inner_border, lay_out_panel, overlay_map, panel_size, to_pil
from .images.pixels import (
    MAX_ASPECT_RATIO,
    MIN_SIDE,
    check_kind,
    check_size,
    check_unit_range,
    over_background,
    read_pil,
    to_unit_range,
)
from .runtime.acceleration import explained_out_of_memory

ImageInput: TypeAlias = Image.Image | NDArray[Any] | torch.Tensor
ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput]

CHANNELS = (1, 3, 4)  # grey, RGB and RGBA
OUTPUT_TYPES = ("pil", "np", "pt")

STRIP_HEIGHT = 256  # rows of a picture that are floats at once


class DiffusionADImageProcessor:
    """Prepares pictures for the pipeline, converts its tensors back and draws anomaly maps.

    Args:
        background: RGB colour, 0 to 255, that transparent pixels are composited on.
        min_side: pictures with a side of fewer pixels are refused.
        max_aspect_ratio: pictures whose longer side is more than this many times the shorter are refused.

    Example:
        ```python
        from diffusionad_pipe import DiffusionADImageProcessor, open_image

        processor = DiffusionADImageProcessor()
        pixels, sizes = processor.preprocess([open_image("photo.jpg")], 256, 256)  # [1, 3, 256, 256]
        images = processor.postprocess(pixels, "pil", sizes)
        ```
    """

    def __init__(
        self,
        *,
        background: tuple[int, int, int] = (255, 255, 255),
        min_side: int = MIN_SIDE,
        max_aspect_ratio: float = MAX_ASPECT_RATIO,
    ):
        self.background = background
        self.min_side = min_side
        self.max_aspect_ratio = max_aspect_ratio

    def preprocess(self, images: ImageInputs, height: int, width: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Turn pictures of any kind and size into one batch.

        Args:
            images: one picture, or a list of pictures that may differ in kind and size. A PIL image of any
                common mode; a NumPy array `[H, W]`, `[H, W, 1|3|4]` or `[B, H, W, 1|3|4]`; a tensor `[H, W]`,
                `[1|3|4, H, W]` or `[B, 1|3|4, H, W]`. Arrays and tensors are bool, uint8, uint16 or floats
                in [0, 1].
            height: height of the batch in pixels.
            width: width of the batch in pixels.

        Returns:
            The batch, float32 RGB `[B, 3, height, width]` in [0, 1] on the CPU, and the size (height, width)
            of each picture after its EXIF orientation was applied.

        Raises:
            TypeError: for something that is not a picture, such as a path.
            ValueError: for a picture whose shape, size or values cannot be used; says which one and the cure.
            MemoryError: names the cure.
        """
        used = f"all pictures of one call at {height} x {width} pixels"
        with explained_out_of_memory(used, "fewer of them, as the pipeline's stream() does, or a smaller size"):
            singles, resized, sizes = self.split(images), [], []
            for index, single in enumerate(singles):
                with self.named(index, len(singles)):
                    array = self.decode(single)
                resized.append(self._resized(array, (height, width)))
                sizes.append(self.size(array))
            return torch.stack(resized).clamp(0, 1), sizes

    def postprocess(
        self, tensor: torch.Tensor, output_type: str, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Any:
        """Turn a batch of the pipeline into pictures or maps of the caller's kind and sizes.

        Args:
            tensor: floats `[B, 1|3, H, W]` on any device; clamped to [0, 1].
            output_type: `"pil"`, `"np"` or `"pt"`.
            sizes: the size (height, width) of each result; by default that of the batch.

        Returns:
            `"pil"`: a list of PIL images, mode L or RGB. `"np"`: float32 `[B, h, w, C]`. `"pt"`: float32
            `[B, C, h, w]` on the CPU. Where the sizes differ, the last two are lists without the B.

        Raises:
            ValueError: for another `output_type`, a tensor of another shape, or a wrong number of sizes.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, not {output_type!r}")
        if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
            raise ValueError(f"the tensor must be [B, 1, H, W] or [B, 3, H, W], not {list(tensor.shape)}")
        sizes = [_size(tensor)] * len(tensor) if sizes is None else sizes
        # Clamped first: a cast of -0.1 to uint8 would wrap round to 231.
        return self.convert([image.clamp(0, 1) for image in self.resize_to(tensor, sizes)], output_type)

    def convert(self, images: Sequence[torch.Tensor], output_type: str) -> Any:
        """Turn tensors into the caller's kind, as [`postprocess`] does, at the sizes that they have.

        Args:
            images: floats in [0, 1], or bools, `[1|3, h, w]` on the CPU.
            output_type: `"pil"`, `"np"` or `"pt"`. Bools stay bools, but for `"pil"`, where True is 255.
        """
        if output_type == "pil":
            return [to_pil(image) for image in images]
        if output_type == "np":
            images = [image.permute(1, 2, 0) for image in images]
        if len({image.shape for image in images}) == 1:
            batch = torch.stack(list(images))
            return batch if output_type == "pt" else batch.numpy()
        each = [image.contiguous() for image in images]
        return each if output_type == "pt" else [image.numpy() for image in each]

    def resize_to(self, tensor: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Resize each item of a batch to a size of its own, with antialiasing where it shrinks.

        Args:
            tensor: floats `[B, C, H, W]` on any device.
            sizes: B sizes (height, width).

        Returns:
            B tensors `[C, h, w]`, float32 on the CPU. Items that have their size already are not copied.

        Raises:
            ValueError: if there is not one size for each item.
        """
        if len(sizes) != len(tensor):
            raise ValueError(f"{len(sizes)} sizes for {len(tensor)} pictures; give one size for each")
        items = tensor.detach().to("cpu", torch.float32)
        shrinks = [height < tensor.shape[-2] or width < tensor.shape[-1] for height, width in sizes]
        return [_resize(*item) for item in zip(items, sizes, shrinks, strict=True)]

    def visualize_anomaly_map(
        self,
        image: ImageInput,
        anomaly_map: ImageInput,
        mask: ImageInput | None = None,
        *,
        opacity: float = 0.5,
        vmin: float = 0.0,
        vmax: float = 1.0,
    ) -> Image.Image:
        """Blend an anomaly map over its picture, on a fixed colour scale, with the contours of a mask.

        Args:
            image: one picture, as for [`preprocess`].
            anomaly_map: map in [0, 1] of the picture's size: PIL L or F, an array `[h, w]` or `[h, w, 1]`, or
                a tensor `[h, w]` or `[1, h, w]`.
            mask: mask of the same size and kinds, not zero where anomalous.
            opacity: weight of the colours in [0, 1] where the map reaches `vmax`; it falls to 0 at `vmin`.
            vmin: value of the scale's first colour; the picture stays as it is there and below.
            vmax: value of the scale's last colour.

        Returns:
            An RGB image of the picture's size.

        Raises:
            TypeError: for something that is not a picture.
            ValueError: if sizes disagree, values are out of range, or the scale is empty.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be in [0, 1], not {opacity}")
        array = self.decode(image)
        level = _read_map(anomaly_map, self.size(array))  # [h, w]
        border = None if mask is None else inner_border(_read_mask(mask, self.size(array)))

        def paint(pixels: torch.Tensor, rows: slice) -> torch.Tensor:
            painted = overlay_map(pixels, level[rows], opacity, vmin, vmax)
            return painted if border is None else draw_contours(painted, border[rows])

        return self._painted(array, paint)

    def visualize_mask(self, image: ImageInput, mask: ImageInput) -> Image.Image:
        """Draw the contours of a mask on its picture.

        Args:
            image: one picture, as for [`preprocess`].
            mask: mask of the picture's size, not zero where anomalous.

        Returns:
            An RGB image of the picture's size.

        Raises:
            TypeError: for something that is not a picture.
            ValueError: if the sizes disagree.
        """
        array = self.decode(image)
        border = inner_border(_read_mask(mask, self.size(array)))
        return self._painted(array, lambda pixels, rows: draw_contours(pixels, border[rows]))

    def panel(
        self,
        image: ImageInput,
        reconstruction: ImageInput,
        anomaly_map: ImageInput,
        mask: ImageInput | None = None,
        *,
        title: str | None = None,
        vmin: float = 0.0,
        vmax: float = 1.0,
    ) -> Image.Image:
        """Lay out picture, reconstruction and anomaly map side by side, with captions and the colour scale.

        Args:
            image: one picture, as for [`preprocess`].
            reconstruction: its anomaly-free reconstruction, of any size.
            anomaly_map: map in [0, 1] of the picture's size.
            mask: mask of the picture's size, not zero where anomalous.
            title: one line above; shortened where it is too long.
            vmin: value of the scale's first colour.
            vmax: value of the scale's last colour.

        Returns:
            An RGB image; each picture's longest side has 256 to 512 pixels in it.

        Raises:
            TypeError: for something that is not a picture.
            ValueError: as for [`visualize_anomaly_map`].
        """
        array = self.decode(image)
        level = _read_map(anomaly_map, self.size(array))  # [h, w]
        size = panel_size(*self.size(array))
        shown = self._resized(array, size)  # [3, h, w], as all that is drawn
        # Stronger colours than by default: the bare picture stands beside them.
        drawn = overlay_map(shown, _resize(level[None], size)[0], 0.75, vmin, vmax)
        if mask is not None:
            # A maximum, so that a small region does not vanish when the picture is shrunk.
            region = F.adaptive_max_pool2d(_read_mask(mask, self.size(array)).float()[None], size)[0].bool()
            drawn = draw_contours(drawn, inner_border(region))
        rebuilt = self._resized(self.decode(reconstruction), size)
        return lay_out_panel({"picture": shown, "reconstruction": rebuilt, "anomaly map": drawn}, title, vmin, vmax)

    def split(self, images: ImageInputs) -> list[ImageInput]:
        """The single pictures of what [`preprocess`] takes.

        Raises:
            ValueError: if there are none.
        """
        items: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        singles: list[ImageInput] = []
        for item in items:
            batched = isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4
            singles.extend(item if batched else [item])
        if not singles:
            raise ValueError("there are no pictures; give at least one")
        return singles

    def decode(self, image: ImageInput, max_aspect_ratio: float | None = None) -> NDArray[Any] | torch.Tensor:
        """Decode, orient and check one picture.

        Args:
            image: as for [`preprocess`].
            max_aspect_ratio: in place of the processor's; infinity where the picture is cut into tiles.

        Returns:
            An array `[h, w, 1|3|4]` or a tensor `[1|3|4, h, w]` with the values that it has.

        Raises:
            TypeError: for something that is not a picture.
            ValueError: for a picture whose shape, size or values cannot be used.
        """
        ratio = self.max_aspect_ratio if max_aspect_ratio is None else max_aspect_ratio
        if isinstance(image, Image.Image):
            decoded = read_pil(image, min_side=self.min_side, max_aspect_ratio=ratio)
            return decoded[..., None] if decoded.ndim == 2 else decoded
        array = _check_type(image)
        if array.ndim == 2:
            array = array[..., None] if isinstance(array, np.ndarray) else array[None]
        _check_layout(array)
        check_size(*self.size(array), min_side=self.min_side, max_aspect_ratio=ratio)
        _check_values(array)
        return array

    def size(self, array: NDArray[Any] | torch.Tensor) -> tuple[int, int]:
        """Height and width of what [`decode`] returned."""
        height, width = array.shape[:2] if isinstance(array, np.ndarray) else array.shape[1:]
        return height, width

    def to_rgb(
        self, array: NDArray[Any] | torch.Tensor, window: tuple[int, int, int, int] | None = None
    ) -> torch.Tensor:
        """Turn what [`decode`] returned, or a window (top, left, height, width) of it, into float32 RGB `[3, h, w]` in
        [0, 1] on the CPU.

        Raises:
            ValueError: for values that cannot be used.
        """
        if window is not None:
            top, left, height, width = window
            rows, columns = slice(top, top + height), slice(left, left + width)
            array = array[rows, columns] if isinstance(array, np.ndarray) else array[:, rows, columns]
        # Channels first while pixels are bytes: four times less to move than floats. [1|3|4, h, w]
        values = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else _as_numpy(array)
        rgb = over_background(to_unit_range(values, _dtype_name(array)), self.background)
        return torch.from_numpy(rgb).expand(3, -1, -1).contiguous()

    @contextmanager
    def named(self, index: int, count: int) -> Iterator[None]:
        """Let errors say which of several pictures they are about."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if count == 1:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"picture {index}: {error}") from error

    def _resized(self, array: NDArray[Any] | torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What [`decode`] returned as RGB floats `[3, *size]`.

        The picture becomes floats strip by strip: along the width strips can be resized one by one, and the result is
        the same bit for bit, since torch resizes along one side after the other too.
        """
        (height, width), (new_height, new_width) = self.size(array), size
        strips = []
        for top in range(0, height, STRIP_HEIGHT):
            strip = self.to_rgb(array, (top, 0, STRIP_HEIGHT, width))  # [3, up to STRIP_HEIGHT, width]
            strips.append(_resize(strip, (strip.shape[1], new_width)))
        return _resize(torch.cat(strips, dim=1), (new_height, new_width))

    def _painted(
        self, array: NDArray[Any] | torch.Tensor, paint: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> Image.Image:
        """What [`decode`] returned as a PIL image, once `paint` was given each strip `[3, h, w]` of it and its rows."""
        height, width = self.size(array)
        canvas = Image.new("RGB", (width, height))
        for top in range(0, height, STRIP_HEIGHT):
            pixels = self.to_rgb(array, (top, 0, STRIP_HEIGHT, width))
            canvas.paste(to_pil(paint(pixels, slice(top, top + STRIP_HEIGHT))), (0, top))
        return canvas


def _check_type(image: Any) -> NDArray[Any] | torch.Tensor:
    if isinstance(image, np.ndarray | torch.Tensor):
        return image
    if isinstance(image, str | PathLike):
        raise TypeError(f"{str(image)!r} is a path; open it with diffusionad_pipe.open_image(path) first")
    kind = type(image).__name__
    raise TypeError(f"a picture must be a PIL image, a NumPy array or a torch tensor, not {kind}")


def _check_layout(array: NDArray[Any] | torch.Tensor) -> None:
    shape = tuple(array.shape)
    if isinstance(array, np.ndarray):
        kind, order, own, other, cure = "array", "[H, W, C]", -1, 0, "array.transpose(1, 2, 0)"
    else:
        kind, order, own, other, cure = "tensor", "[C, H, W]", 0, -1, "tensor.permute(2, 0, 1)"
    if len(shape) != 3 or (shape[own] not in CHANNELS and shape[other] not in CHANNELS):
        raise ValueError(f"{kind} of shape {shape}; make it [H, W] or {order} with C = 1, 3 or 4")
    if shape[own] not in CHANNELS:
        raise ValueError(f"{kind} of shape {shape} has its channels elsewhere; make it {order} by {cure}")


def _check_values(array: NDArray[Any] | torch.Tensor) -> None:
    name = _dtype_name(array)
    floating = "float" in name
    check_kind(name, floating)
    if floating:
        check_unit_range(array.min().item(), array.max().item())


def _dtype_name(array: NDArray[Any] | torch.Tensor) -> str:
    return array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype).removeprefix("torch.")


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """On the CPU; bfloat16, which NumPy has not, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _read_plane(values: ImageInput, name: str, size: tuple[int, int]) -> NDArray[Any] | torch.Tensor:
    # Palette masks are read as indices: their colours say nothing.
    array = _check_type(np.asarray(values) if isinstance(values, Image.Image) else values)
    shape = tuple(array.shape)
    if shape not in (size, (*size, 1) if isinstance(array, np.ndarray) else (1, *size)):
        raise ValueError(f"the {name} has shape {shape} but the picture {size}; resize it to that")
    return array.reshape(size)


def _read_map(anomaly_map: ImageInput, size: tuple[int, int]) -> torch.Tensor:
    """Turn a map into float32 `[h, w]` in [0, 1] on the CPU."""
    plane = _read_plane(anomaly_map, "anomaly map", size)
    try:
        _check_values(plane)
        values = plane if isinstance(plane, np.ndarray) else _as_numpy(plane)
        return torch.from_numpy(to_unit_range(values, _dtype_name(plane)))
    except ValueError as error:
        raise ValueError(f"anomaly map: {error}") from error


def _read_mask(mask: ImageInput, size: tuple[int, int]) -> torch.Tensor:
    """Turn a mask into bool `[h, w]` on the CPU."""
    marked = _read_plane(mask, "mask", size) != 0
    return torch.from_numpy(marked) if isinstance(marked, np.ndarray) else marked.cpu()


def _size(image: torch.Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _resize(image: torch.Tensor, size: tuple[int, int], antialias: bool = True) -> torch.Tensor:
    if _size(image) == tuple(size):
        return image
    # Planes as a batch of their own: three channels of one picture take twice as long.
    return F.interpolate(image[:, None], size=size, mode="bilinear", antialias=antialias)[:, 0]
