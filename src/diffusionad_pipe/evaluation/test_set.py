"""The test pictures of a dataset, category by category, and the masks of their defects."""

import hashlib
import os
import stat
import warnings
from collections.abc import Sequence
from functools import cached_property

import datasets
import numpy as np
from PIL import Image

from ..data.loading import Doubt, load_anomaly_dataset
from ..data.masks import check_mask_size, read_mask
from ..files.record import sha256_of
from ..images.files import MAX_PIXELS, open_cell, shown
from ..images.pixels import MAX_ASPECT_RATIO


class TestImages:
    """The test pictures of one category, opened when they are asked for.

    Args:
        split: the split `test` of [`load_anomaly_dataset`].
        category: whose pictures.
        max_pixels: pictures and masks of more are refused before they are decoded.
        doubts: about masks of this category.
        max_aspect_ratio: longer pictures are refused too; infinity where they are cut into tiles.
    """

    __test__ = False  # pytest takes it for a test

    def __init__(
        self,
        split: datasets.Dataset,
        category: str,
        max_pixels: int = MAX_PIXELS,
        doubts: Sequence[Doubt] = (),
        max_aspect_ratio: float = MAX_ASPECT_RATIO,
    ) -> None:
        self.category = category
        self.max_pixels = max_pixels
        self.max_aspect_ratio = max_aspect_ratio
        self.left_out = [doubt.sentence for doubt in doubts if doubt.left_out]
        self.unclear_masks = [doubt.sentence for doubt in doubts if not doubt.left_out]
        rows = split.select([index for index, name in enumerate(split["category"]) if name == category])
        self.paths, self.labels, self.defect_types = rows["path"], rows["label"], rows["defect_type"]
        self.cells = rows.cast_column("image", datasets.Image(decode=False)).cast_column(
            "mask", datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def contents(self) -> list[str | None]:
        """The sha256 of each picture's bytes, wherever they lie; None where they cannot be read."""
        return [self.content(index) for index in range(len(self))]

    def content(self, index: int) -> str | None:
        """The sha256 of a picture's bytes as they are now."""
        cell = self.cells[index]["image"]
        try:
            if cell["bytes"] is not None:
                return hashlib.sha256(cell["bytes"]).hexdigest()
            if stat.S_ISREG(os.stat(cell["path"]).st_mode):  # reading a pipe might never end
                return sha256_of(cell["path"])
        except (OSError, TypeError, ValueError):  # [`image`] says why
            pass
        return None

    def image(self, index: int) -> Image.Image:
        """Decoded; raises ImageFileError."""
        cell = self.cells[index]["image"]
        return open_cell(cell, self.paths[index], max_pixels=self.max_pixels, max_aspect_ratio=self.max_aspect_ratio)

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray | None:
        """Booleans `[h, w]`: nothing for a good picture; None where nobody marked the defect of a defective one, so
        that nothing is known of its pixels and calling them all good would be wrong.

        Args:
            index: of the picture.
            size: its height and width in pixels, as it is shown.

        Raises:
            ValueError: when the mask cannot be read, or has another size.
        """
        cell = self.cells[index]["mask"]
        if cell is None:
            return None if self.labels[index] else np.zeros(size, dtype=bool)
        name = f"the mask of {self.paths[index]}"
        mask = read_mask(cell, name, max_pixels=self.max_pixels)
        check_mask_size(mask, name if cell["path"] is None else shown(cell["path"]), size, self.paths[index])
        return None if self.labels[index] and not mask.any() else mask


def load_test_images(
    data: str | os.PathLike[str],
    category: str | None,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
) -> list[TestImages]:
    """The test pictures of each category that has some.

    Args:
        data: any layout of [`load_anomaly_dataset`].
        category: one category, `"all"`, or None where `data` holds only one.
        max_pixels, max_aspect_ratio: as of [`TestImages`].

    Raises:
        ValueError: names what is missing.
    """
    doubts: list[Doubt] = []
    splits = load_anomaly_dataset(data, category=category, max_pixels=max_pixels, doubts=doubts)
    if "test" not in splits:
        raise ValueError(f"{data} has no test pictures, only good ones to train on: add test/good and test/<defect>")
    tested = set(splits["test"]["category"])
    untested = sorted({name for rows in splits.values() for name in rows.unique("category")} - tested)
    if untested:
        warnings.warn(f"without test pictures, and so not measured: {', '.join(untested)}", stacklevel=1)
    doubted = {name: [doubt for doubt in doubts if doubt.category == name and doubt.split == "test"] for name in tested}
    return [TestImages(splits["test"], name, max_pixels, doubted[name], max_aspect_ratio) for name in sorted(tested)]
