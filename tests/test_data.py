"""Folders of pictures in every layout."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionad_pipe.data import load_anomaly_dataset

ROOT = Path(__file__).parents[1]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"
MAGNETIC_TILE = ROOT.parent / "shared" / "data" / "magnetic_tile"  # may not be shipped: tests make a tree of their own


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Magnetic-Tile-Defect in small: 10 good tiles, 3 with a blowhole and 2 uneven ones, of which one has an empty mask
    and one has none."""
    root = tmp_path / "tiles"
    for name, count in (("MT_Free", 10), ("MT_Blowhole", 3), ("MT_Uneven", 2)):
        folder = root / name / "Imgs"
        folder.mkdir(parents=True)
        for index in range(count):
            stem = f"exp{index % 3}_num_{97 * index % 10}"
            Image.new("L", (24, 32), 120).save(folder / f"{stem}.{'JPG' if index == 1 else 'jpg'}")
            mask = np.zeros((32, 24), dtype=np.uint8)
            mask[8:16, 8:16] = 255 if name == "MT_Blowhole" else 0
            Image.fromarray(mask).save(folder / f"{stem}.png")
    (root / "MT_Uneven" / "Imgs" / "exp1_num_7.png").unlink()
    (root / "README.txt").touch()
    return root


def test_magnetic_tile(tiles: Path) -> None:
    splits = load_anomaly_dataset(tiles)
    names = {split: [Path(path).name for path in rows["path"]] for split, rows in splits.items()}
    good = sorted(path.name for path in (tiles / "MT_Free" / "Imgs").iterdir() if path.suffix in (".jpg", ".JPG"))
    random.Random(0).shuffle(good)
    assert names["train"] == sorted(good[:8]) and names["test"][:2] == sorted(good[8:])
    assert splits["test"]["defect_type"] == ["good"] * 2 + ["blowhole"] * 3 + ["uneven"] * 2
    assert splits["test"]["label"] == [0] * 2 + [1] * 5 and set(splits["train"]["label"]) == {0}
    # The empty masks of good tiles are not read; those of defective ones are told apart by who reads them.
    assert [mask is None for mask in splits["test"]["mask"]] == [True] * 2 + [False] * 4 + [True]
    assert splits["train"]["mask"] == [None] * 8
    assert [np.asarray(mask).sum() for mask in splits["test"]["mask"][2:6]] == [64 * 255] * 3 + [0]
    assert set(splits["test"]["category"]) == {"tiles"} and set(splits["test"]["split"]) == {"test"}
    for image, path in zip(splits["test"]["image"], splits["test"]["path"]):
        assert image.size == (24, 32) and Path(path).suffix.lower() == ".jpg"


def test_magnetic_tile_as_one_of_several_categories(tiles: Path) -> None:
    whole = load_anomaly_dataset(tiles)
    for found in (load_anomaly_dataset(tiles.parent), load_anomaly_dataset(tiles.parent, category="tiles")):
        assert found["train"]["path"] == whole["train"]["path"]
    assert load_anomaly_dataset(tiles, layout="magnetic_tile")["test"]["path"] == whole["test"]["path"]
    (tiles.parent / "nuts" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="choose one: nuts, tiles"):
        load_anomaly_dataset(tiles.parent)


def test_magnetic_tile_without_jpeg_pictures(tiles: Path) -> None:
    for picture in (tiles / "MT_Blowhole" / "Imgs").glob("*.[jJ]*"):
        picture.unlink()
    with pytest.raises(ValueError, match=r"MT_Blowhole/Imgs has no pictures that end in \.jpg"):
        load_anomaly_dataset(tiles)


@pytest.mark.skipif(not MAGNETIC_TILE.is_dir(), reason="Magnetic-Tile-Defect is not in ../shared/data/magnetic_tile")
def test_the_real_magnetic_tiles() -> None:
    splits = load_anomaly_dataset(MAGNETIC_TILE)
    assert len(splits["train"]) == 761
    types = {"good": 191, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert Counter(splits["test"]["defect_type"]) == types
    paths = [*splits["train"]["path"], *splits["test"]["path"]]
    assert len(set(paths)) == len(paths) and all(path.endswith(".jpg") for path in paths)
    masks = splits["test"].cast_column("mask", splits["test"].features["mask"].__class__(decode=False))["mask"]
    assert [mask is None for mask in masks] == [True] * 191 + [False] * 392


def test_mvtec() -> None:
    splits = load_anomaly_dataset(HAZELNUT)
    assert len(splits["train"]) == 28 and Counter(splits["test"]["defect_type"]) == {"good": 6, "colour": 17}
    for mask, label in zip(splits["test"]["mask"], splits["test"]["label"]):
        assert (mask is not None) == bool(label)
    assert load_anomaly_dataset(HAZELNUT.parent)["train"]["path"] == splits["train"]["path"]


def test_a_folder_of_good_pictures() -> None:
    splits = load_anomaly_dataset(HAZELNUT / "train" / "good")
    assert list(splits) == ["train"] and len(splits["train"]) == 28 and set(splits["train"]["label"]) == {0}


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_anomaly_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no category 'nut'; it has: hazelnut"):
        load_anomaly_dataset(HAZELNUT.parent, category="nut")
    with pytest.raises(ValueError, match="auto, mvtec, magnetic_tile or folder, not 'visa'"):
        load_anomaly_dataset(HAZELNUT, layout="visa")
    with pytest.raises(ValueError, match="has no pictures"):
        load_anomaly_dataset(tmp_path)
