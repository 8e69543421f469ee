"""Options that several commands have, and the pipeline that they ask for."""

from enum import StrEnum
from typing import Annotated

import torch
import typer

from ..pipeline_diffusionad import DiffusionADPipeline
from ..runtime.acceleration import explained_out_of_memory, fastest_dtype, find_device
from ..tiling import Tiling

Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in one pass of the networks.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse larger pictures before decoding.")]
TileSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Take larger pictures at their own size, in tiles with this side in pixels. Thresholds hold for the tiles "
        "that they were calibrated with.",
    ),
]
TileOverlap = Annotated[
    float | None, typer.Option(help="Share of a tile that the next one shares, below 1. Default: 0.25.")
]

DEFAULT_OVERLAP = 0.25  # as of `DiffusionADPipeline.enable_tiling`


class Dtype(StrEnum):
    """In which the networks compute; auto is bfloat16 where the device is faster with it, see `fastest_dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"

    def on(self, device: str | torch.device) -> torch.dtype:
        """torch's own for this device."""
        return fastest_dtype(device) if self is Dtype.auto else getattr(torch, self.value)


NetworksDtype = Annotated[
    Dtype,
    typer.Option(help="Of the networks. Thresholds are set in float32; auto is bfloat16 where that is faster."),
]


def chosen_tiling(tile_size: int | None, tile_overlap: float | None) -> Tiling | None:
    """How pictures are cut, as the options say; None for whole pictures.

    Raises:
        ValueError: for an overlap without tiles.
    """
    if tile_size is None:
        if tile_overlap is not None:
            raise ValueError("--tile-overlap is for pictures in tiles: give --tile-size too")
        return None
    return Tiling(tile_size, DEFAULT_OVERLAP if tile_overlap is None else tile_overlap)


def load_pipeline(model: str, device: str | None, dtype: Dtype = Dtype.float32) -> DiffusionADPipeline:
    """A pipeline as the options say, which prints no progress."""
    place = find_device(device)
    pipe = DiffusionADPipeline.from_pretrained(model, dtype=dtype.on(place))
    with explained_out_of_memory(f"the networks on {place}", "--device cpu"):
        pipe.to(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe
