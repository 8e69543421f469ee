"""The files of one picture: a drawing, and the map and the mask where they are wanted."""

from functools import partial

import numpy as np
from PIL import Image

from ..files.output_folder import OutputFolder
from ..image_processor import DiffusionADImageProcessor
from ..pipeline_output import DiffusionADPipelineOutput
from ..scoring import to_16_bits
from .settings import MapFormat, PredictionSettings


def write_files(
    image: Image.Image,
    output: DiffusionADPipelineOutput,
    folder: OutputFolder,
    name: str,
    settings: PredictionSettings,
    title: str,
) -> None:
    """Write the files of one picture, the drawing last.

    Args:
        image: as it was decoded.
        output: of it alone, of type `"np"`, at its own size.
        folder: where they go.
        name: that theirs begin with.
        settings: which they are.
        title: of a panel.

    Raises:
        OutputError: when one cannot be written.
    """
    anomaly_map = output.anomaly_maps[0, ..., 0]  # [h, w]
    mask = None if output.predicted_masks is None else output.predicted_masks[0, ..., 0]
    if settings.maps is MapFormat.png16:
        folder.write(f"{name}_map.png", to_16_bits(anomaly_map).save)
    elif settings.maps is MapFormat.npy:
        folder.write(f"{name}_map.npy", partial(np.save, arr=anomaly_map))
    if settings.masks and mask is not None:
        folder.write(f"{name}_mask.png", Image.fromarray(mask.astype(np.uint8) * 255).save)
    processor = DiffusionADImageProcessor(max_aspect_ratio=settings.max_aspect_ratio)
    if settings.panels:
        drawing = processor.panel(image, output.reconstructions[0], anomaly_map, mask, title=title)
    else:
        drawing = processor.visualize_anomaly_map(image, anomaly_map, mask)
    folder.write(f"{name}.png", drawing.save)
