"""Pictures in, pictures out: everything between PIL, NumPy or torch pictures and the tensors of the pipeline.

Nothing here knows of files; `image_files.open_image` turns a path into a picture.
"""

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .images.colors import COLOR_SCALE
from .images.pixels import (
    FULL_SCALE,
    MAX_ASPECT_RATIO,
    MIN_SIDE,
    check_kind,
    check_size,
    check_unit_range,
    read_pil,
)
from .runtime.acceleration import explained_out_of_memory

ImageInput: TypeAlias = Image.Image | NDArray[Any] | torch.Tensor
ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput]

CHANNELS = (1, 3, 4)  # grey, RGB and RGBA
OUTPUT_TYPES = ("pil", "np", "pt")

CONTOUR_COLOR = (0, 229, 255)  # not a colour of the scale, and rare on surfaces
PANEL_SIDES = (256, 512)  # the longest side of a picture in a panel
PANEL_INK = (32, 32, 32)


class DiffusionADImageProcessor:
    """Prepares pictures for the pipeline, converts its tensors back and draws anomaly maps.

    Args:
        background: RGB colour, 0 to 255, that transparent pixels are composited on.
        min_side: pictures with a side of fewer pixels are refused.
        max_aspect_ratio: pictures whose longer side is more than this many times the shorter are refused.
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
            for index, single in enumerate(singles):  # one by one: floats of their own size need the most memory
                with self.named(index, len(singles)):
                    tensor = self._to_tensor(single)  # [3, h, w]
                resized.append(_resize(tensor, (height, width)))
                sizes.append(_size(tensor))
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
            return [_to_pil(image) for image in images]
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
        pixels = self._to_tensor(image)  # [3, h, w]
        level = _read_map(anomaly_map, _size(pixels))  # [h, w]
        drawn = _overlay(pixels, level, opacity, vmin, vmax)
        return _to_pil(drawn if mask is None else _draw_contours(drawn, _read_mask(mask, _size(pixels))))

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
        pixels = self._to_tensor(image)  # [3, h, w]
        return _to_pil(_draw_contours(pixels, _read_mask(mask, _size(pixels))))

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
        pixels = self._to_tensor(image)  # [3, h, w]
        level = _read_map(anomaly_map, _size(pixels))  # [h, w]
        scale = min(max(max(_size(pixels)), PANEL_SIDES[0]), PANEL_SIDES[1]) / max(_size(pixels))
        height, width = size = round(pixels.shape[1] * scale), round(pixels.shape[2] * scale)
        shown = _resize(pixels, size)
        # Stronger colours than by default: the bare picture stands beside them.
        drawn = _overlay(shown, _resize(level[None], size)[0], 0.75, vmin, vmax)
        if mask is not None:
            # A maximum, so that a small region does not vanish when the picture is shrunk.
            region = F.adaptive_max_pool2d(_read_mask(mask, _size(pixels)).float()[None], size)[0].bool()
            drawn = _draw_contours(drawn, region)
        rebuilt = _resize(self._to_tensor(reconstruction), size)
        columns = {"picture": shown, "reconstruction": rebuilt, "anomaly map": drawn}

        text_size = max(13, max(size) // 30)
        font, title_font = ImageFont.load_default(text_size), ImageFont.load_default(round(text_size * 1.25))
        line, gap, margin = round(text_size * 1.7), 6, 16
        column = max(width, *(round(font.getlength(caption)) for caption in columns))
        row = max(height, 5 * text_size)  # beside a strip of a picture there is still room for the legend
        top = margin + line + (round(line * 1.3) if title else 0)
        right = margin + 3 * (column + gap) + gap
        ends = (f"{vmax:.3g}", top, "lt"), (f"{vmin:.3g}", top + row, "lb")
        full_width = right + text_size + gap + max(round(font.getlength(end)) for end, *_ in ends) + margin
        canvas = Image.new("RGB", (full_width, top + row + margin), (255, 255, 255))
        draw = ImageDraw.Draw(canvas)
        if title:
            text, room = " ".join(title.split()), full_width - 2 * margin  # one line
            if title_font.getlength(text) > room:
                fits = bisect(range(len(text)), room, key=lambda n: round(title_font.getlength(text[:n] + "...")))
                text = text[: fits - 1] + "..."
            draw.text((margin, margin), text, PANEL_INK, title_font)
        for index, (caption, tensor) in enumerate(columns.items()):
            left = margin + index * (column + gap)
            draw.text((left + column / 2, top - gap), caption, PANEL_INK, font, anchor="md")
            canvas.paste(_to_pil(tensor), (left + (column - width) // 2, top + (row - height) // 2))
        bar = _colorize(
            torch.linspace(1, 0, row, dtype=torch.float32, device="cpu")[:, None].expand(row, text_size)
        )  # [3, row, text_size]
        canvas.paste(_to_pil(bar), (right, top))
        for end, y, anchor in ends:
            draw.text((right + text_size + gap, y), end, PANEL_INK, font, anchor=anchor)
        return canvas

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
        channels_last = isinstance(array, np.ndarray)
        if window is not None:
            top, left, height, width = window
            rows, columns = slice(top, top + height), slice(left, left + width)
            array = array[rows, columns] if channels_last else array[:, rows, columns]
        # Channels first while pixels are bytes: four times less to move than floats. [1|3|4, h, w]
        values = _to_unit_range(array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array)
        if len(values) == 4:
            background = torch.tensor(self.background, dtype=torch.float32, device="cpu").div(255)[:, None, None]
            values = values[:3] * values[3:] + background * (1 - values[3:])
        return values.expand(3, -1, -1).contiguous()

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

    def _to_tensor(self, image: ImageInput) -> torch.Tensor:
        """Turn one picture into float32 RGB `[3, h, w]` in [0, 1] on the CPU."""
        return self.to_rgb(self.decode(image))


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
    if isinstance(array, np.ndarray):
        name, floating = array.dtype.name, np.issubdtype(array.dtype, np.floating)
    else:
        name, floating = str(array.dtype).removeprefix("torch."), array.is_floating_point()
    check_kind(name, floating)
    if floating:
        check_unit_range(array.min().item(), array.max().item())


def _to_unit_range(array: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """Scale integers by their dtype: float32 of the same shape in [0, 1] on the CPU."""
    name = array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype).removeprefix("torch.")
    tensor = torch.from_numpy(array.astype(np.float32, order="C")) if isinstance(array, np.ndarray) else array
    values: torch.Tensor = tensor.detach().to("cpu", torch.float32)
    if name in FULL_SCALE:  # so these are not the caller's own
        return values.div_(FULL_SCALE[name])
    return values.clamp(0, 1)


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
        return _to_unit_range(plane)
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


def _to_pil(image: torch.Tensor) -> Image.Image:
    """Turn `[1|3, h, w]` in [0, 1] into a PIL image, to the nearest of 256 values."""
    pixels = image.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _colorize(level: torch.Tensor) -> torch.Tensor:
    """Look `[h, w]` in [0, 1] up in the colour scale: RGB `[3, h, w]` in [0, 1]."""
    colors = torch.frombuffer(bytearray.fromhex(COLOR_SCALE), dtype=torch.uint8).view(-1, 3).float().div(255)
    position = level * (len(colors) - 1)
    below = position.long().clamp(max=len(colors) - 2)
    return torch.lerp(colors[below], colors[below + 1], (position - below)[..., None]).permute(2, 0, 1)


def _overlay(image: torch.Tensor, level: torch.Tensor, opacity: float, vmin: float, vmax: float) -> torch.Tensor:
    """Blend a map `[h, w]` over RGB `[3, h, w]`, the more the higher its value."""
    if not vmin < vmax:
        raise ValueError(f"vmin must be below vmax, not {vmin} and {vmax}")
    level = (level - vmin).div(vmax - vmin).clamp(0, 1)
    weight = opacity * level
    return image * (1 - weight) + _colorize(level) * weight


def _draw_contours(image: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Draw the inner border of regions, bool `[h, w]`, on RGB `[3, h, w]`, 1 to 3 pixels wide."""
    width = min(3, 1 + min(_size(image)) // 384)
    # Eroded as if all beyond the picture were normal, so that a region at its edge is closed there.
    outside = F.pad((~region).float()[None], [width] * 4, value=1.0)
    border = region & F.max_pool2d(outside, 2 * width + 1, stride=1)[0].bool()
    color = torch.tensor(CONTOUR_COLOR, dtype=torch.float32, device="cpu").div(255)[:, None, None]
    return torch.where(border, color, image)
