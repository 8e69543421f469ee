"""Folders of pictures in every layout."""

import csv
import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusionad_pipe.data.loading import export_parquet, load_anomaly_dataset
from diffusionad_pipe.data.masks import read_mask
from tests.helpers import layouts

ROOT = Path(__file__).parents[2]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"
MAGNETIC_TILE = ROOT.parent / "shared" / "data" / "magnetic_tile"  # may not be shipped: tests make a tree of their own
SCREW = ROOT.parent / "shared" / "data" / "mvtec_screw"


def counts(splits: datasets.DatasetDict) -> dict[str, dict[str, int]]:
    return {split: dict(Counter(rows["defect_type"])) for split, rows in splits.items()}


LAYOUTS = [
    (
        layouts.mvtec_ad,
        "mvtec",
        "screw",
        {"train": {"good": 4}, "test": {"good": 2, "broken_large": 3, "contamination": 1}},
    ),
    (layouts.mpdd, "mvtec", "bracket_black", {"train": {"good": 4}, "test": {"good": 2, "hole": 2}}),
    (
        layouts.mvtec_ad_2,
        "mvtec_ad_2",
        "can",
        {"train": {"good": 2}, "validation": {"good": 2}, "test": {"good": 2, "bad": 2}},
    ),
    (
        layouts.mvtec_3d,
        "mvtec_3d",
        "bagel",
        {"train": {"good": 2}, "validation": {"good": 2}, "test": {"good": 2, "crack": 2}},
    ),
    (layouts.visa, "visa", "pcb1", {"train": {"good": 3}, "test": {"good": 2, "bad": 2}}),
    (layouts.visa_reorganised, "mvtec", "candle", {"train": {"good": 3}, "test": {"good": 2, "bad": 2}}),
    (layouts.btad, "btad", "03", {"train": {"good": 2}, "test": {"good": 2, "ko": 2}}),
    (
        layouts.dagm,
        "dagm",
        "Class10",
        {"train": {"good": 3}, "train_defective": {"defect": 1}, "test": {"good": 3, "defect": 1}},
    ),
    (
        layouts.kolektor_sdd2,
        "kolektor_sdd2",
        None,
        {"train": {"good": 3}, "train_defective": {"defect": 1}, "test": {"good": 3, "defect": 1}},
    ),
    (
        layouts.magnetic_tile,
        "magnetic_tile",
        None,
        {"train": {"good": 4}, "test": {"good": 1, "blowhole": 2, "uneven": 1}},
    ),
    (layouts.plain, "mvtec", None, {"train": {"good": 2}, "test": {"good": 1, "Riß": 2}}),
]


@pytest.mark.parametrize(("make", "layout", "category", "expected"), LAYOUTS)
def test_published_layouts(make, layout: str, category: str | None, expected, tmp_path: Path, caplog) -> None:
    root = tmp_path / "Prüf daten"
    make(root)
    caplog.set_level(logging.INFO)
    splits = load_anomaly_dataset(root, category=category)
    assert f"{category or root.name}: layout {layout}; train: " in caplog.text
    assert counts(splits) == expected
    for split, rows in splits.items():
        assert set(rows["category"]) == {category or root.name} and set(rows["split"]) == {split}
        for image, mask, label, path in zip(rows["image"], rows["mask"], rows["label"], rows["path"]):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))
            assert (label == 1) == (mask is not None) == (split in ("test", "train_defective") and mask is not None)
            if mask is not None:  # it is the mask of this picture
                assert read_mask(mask).sum() == 5 * layouts.width(path)
    named = load_anomaly_dataset(root, layout=layout, category=category)
    assert {split: rows["path"][:] for split, rows in named.items()} == {s: r["path"][:] for s, r in splits.items()}

    every = load_anomaly_dataset(root, category="all")
    paths = [path for rows in every.values() for path in rows["path"]]
    assert len(set(paths)) == len(paths) and {p for rows in splits.values() for p in rows["path"]} <= set(paths)
    if category is not None and len(set(every["train"]["category"])) > 1:
        with pytest.raises(ValueError, match="holds several categories, choose one"):
            load_anomaly_dataset(root)
    elif category is not None:  # also without its name, and from within
        assert counts(load_anomaly_dataset(root)) == expected
    if category is not None:
        assert counts(load_anomaly_dataset(root / category)) == expected


@pytest.mark.parametrize(
    ("values", "mode", "marked"),
    [
        ([0, 1, 254, 255], "1", [0, 0, 1, 1]),
        ([0, 1, 2, 200], "P", [0, 1, 1, 1]),
        ([0, 1, 7, 10], "L", [0, 1, 1, 1]),  # numbers of defects
        ([0, 1, 30, 31], "L", [0, 1, 1, 1]),
        ([0, 1, 31, 32], "L", [0, 0, 0, 0]),  # nothing reaches half of white
        ([0, 0, 0, 0], "L", [0, 0, 0, 0]),
        ([0, 0, 255, 255], "L", [0, 0, 1, 1]),
        ([1, 127, 128, 255], "L", [0, 0, 1, 1]),  # anti-aliased
        ([1, 127, 128, 176], "L", [0, 0, 1, 1]),
        ([0, 255, 32767, 32768], "I;16", [0, 0, 0, 1]),
        ([0, 1, 127, 255], "I;16", [0, 0, 0, 1]),
        ([0, 1, 2, 3], "I;16", [0, 1, 1, 1]),
    ],
)
def test_read_mask(values: list[int], mode: str, marked: list[int], tmp_path: Path) -> None:
    array = np.array([values], dtype=np.uint16 if mode == "I;16" else np.uint8)
    mask = Image.fromarray(array > 200 if mode == "1" else array)
    if mode == "P":
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 64, 0] + [0, 0, 7] * 253)  # classes: the index counts, not the colour
    assert mask.mode == mode
    mask.save(tmp_path / "mask.png")
    for source in (mask, tmp_path / "mask.png", str(tmp_path / "mask.png")):
        region = read_mask(source)
        assert region.dtype == bool and region.shape == (1, 4) and region[0].tolist() == [bool(m) for m in marked]


def test_read_mask_in_color() -> None:
    red = np.zeros((2, 3, 4), dtype=np.uint8)
    red[0, 0] = (255, 0, 0, 255)
    red[1, 2] = (0, 0, 128, 255)
    for mask in (Image.fromarray(red), Image.fromarray(red[..., :3])):
        assert read_mask(mask).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("make", [layouts.mvtec_ad, layouts.visa, layouts.kolektor_sdd2, layouts.plain])
def test_parquet_gives_the_same_back(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffusionad_pipe.data.loading.IMAGES_PER_FILE", 3)
    root = tmp_path / "data"
    make(root)
    splits = load_anomaly_dataset(root, category="all")
    export_parquet(splits, tmp_path / "export")
    with pytest.raises(ValueError, match="holds Parquet files already"):
        export_parquet(splits, tmp_path / "export")
    pixels = {
        (split, column): [image and (image.mode, np.asarray(image)) for image in rows[column]]
        for split, rows in splits.items()
        for column in ("image", "mask")
    }
    shutil.rmtree(root)  # what follows comes from the Parquet files alone
    for loaded in (
        load_anomaly_dataset(tmp_path / "export", category="all"),
        datasets.load_dataset(str(tmp_path / "export")),
    ):
        assert set(loaded) == set(splits)
        for split, rows in splits.items():
            assert loaded[split].features == rows.features
            for column in ("label", "defect_type", "category", "split"):
                assert loaded[split][column][:] == rows[column][:]
            for name, path in zip(loaded[split]["path"], rows["path"]):
                assert str(tmp_path) not in name and path.endswith(name)
            for column in ("image", "mask"):
                for there, here in zip(loaded[split][column], pixels[split, column]):
                    if here is None:
                        assert there is None
                    else:
                        assert there.mode == here[0] and np.array_equal(np.asarray(there), here[1])


def test_categories_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    layouts.visa(tmp_path / "visa")
    export_parquet(load_anomaly_dataset(tmp_path / "visa", category="all"), tmp_path / "export")
    one = load_anomaly_dataset(tmp_path / "export", category="pcb1")
    assert set(one["test"]["category"]) == {"pcb1"} and counts(one) == counts(
        load_anomaly_dataset(tmp_path / "visa", category="pcb1")
    )
    with pytest.raises(ValueError, match="choose one: candle, pcb1"):
        load_anomaly_dataset(tmp_path / "export")
    with pytest.raises(ValueError, match=r"no category 'PCB'; it has: candle, pcb1; did you mean pcb1\?"):
        load_anomaly_dataset(tmp_path / "export", category="PCB")
    with pytest.raises(ValueError, match="write them with export_parquet"):
        load_anomaly_dataset(tmp_path / "visa", layout="parquet")


def test_visa_and_dagm_have_as_many_images_as_their_publishers_list(tmp_path: Path) -> None:
    layouts.visa(tmp_path / "visa")
    with open(tmp_path / "visa" / "split_csv" / "1cls.csv", newline="") as file:
        listed = Counter(
            (row["object"], row["split"], int(row["label"] == "anomaly"), bool(row["mask"]))
            for row in csv.DictReader(file)
        )
    assert loaded_counts(tmp_path / "visa") == listed and len(listed) == 2 * 3

    layouts.dagm(tmp_path / "dagm")
    listed = Counter()
    for table in (tmp_path / "dagm").rglob("Labels.txt"):
        for line in table.read_text().splitlines()[1:]:
            _, defective, name, _, mask = line.split("\t")
            split = table.parts[-3].lower() + ("_defective" if table.parts[-3] == "Train" and defective == "1" else "")
            listed[table.parts[-4], split, int(defective), mask != "0"] += 1
            assert (table.parents[1] / name).is_file()
    assert loaded_counts(tmp_path / "dagm") == listed and len(listed) == 2 * 4


def loaded_counts(root: Path) -> Counter[tuple[str, str, int, bool]]:
    """Pictures of each category, split and label, with and without a mask."""
    return Counter(
        (category, split, label, mask is not None)
        for split, rows in load_anomaly_dataset(root, category="all").items()
        for category, label, mask in zip(rows["category"], rows["label"], rows["mask"])
    )


def test_dagm_in_other_cases_of_its_suffix(tmp_path: Path) -> None:
    """As some copies of it are: small letters on the disk, capitals in the list."""
    layouts.dagm(tmp_path / "dagm")
    expected = loaded_counts(tmp_path / "dagm")
    for file in list((tmp_path / "dagm").rglob("*.PNG")):
        file.rename(file.with_suffix(".png"))
    assert loaded_counts(tmp_path / "dagm") == expected


def test_a_copy_of_a_mask_is_no_image(tmp_path: Path) -> None:
    layouts.kolektor_sdd2(tmp_path / "KolektorSDD2")
    expected = loaded_counts(tmp_path / "KolektorSDD2")
    layouts.masks(tmp_path / "KolektorSDD2", ["train/10002_GT (copy).png"])
    assert loaded_counts(tmp_path / "KolektorSDD2") == expected


def test_a_partial_download_names_every_missing_file(tmp_path: Path) -> None:
    layouts.visa(tmp_path / "visa")
    gone = [
        "candle/Data/Images/Normal/0002.JPG",
        "candle/Data/Masks/Anomaly/012.png",
        "pcb1/Data/Images/Anomaly/000.JPG",
    ]
    for name in gone:
        (tmp_path / "visa" / name).unlink()
    with pytest.raises(ValueError, match="these 3 files are missing; download it again") as error:
        load_anomaly_dataset(tmp_path / "visa", category="all")
    assert all(name in str(error.value) for name in gone)
    (tmp_path / "visa" / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(ValueError, match=r"1cls\.csv: there is no such file"):
        load_anomaly_dataset(tmp_path / "visa", category="candle")

    layouts.dagm(tmp_path / "dagm")
    for name in ("Train/Label/0577_label.PNG", "Train/0578.PNG", "Test/0004.PNG"):
        (tmp_path / "dagm" / "Class1" / name).unlink()
    with pytest.raises(ValueError, match="these 3 files are missing") as error:
        load_anomaly_dataset(tmp_path / "dagm", category="Class1")
    assert all(name in str(error.value) for name in ("0577_label.PNG", "0578.PNG", "0004.PNG"))

    layouts.mpdd(tmp_path / "mpdd")
    shutil.rmtree(tmp_path / "mpdd" / "bracket_black" / "train")  # what is left is not taken for good pictures
    for folder in (tmp_path / "mpdd", tmp_path / "mpdd" / "bracket_black"):
        with pytest.raises(ValueError, match="add its train/good"):
            load_anomaly_dataset(folder)


def test_datasets_that_lack_something_load(tmp_path: Path) -> None:
    root = tmp_path / "data"
    layouts.plain(root)
    shutil.rmtree(root / "ground_truth")
    assert load_anomaly_dataset(root)["test"]["mask"][:] == [None] * 3
    shutil.rmtree(root / "test" / "good")
    assert counts(load_anomaly_dataset(root))["test"] == {"Riß": 2}
    shutil.rmtree(root / "test" / "Riß")
    assert list(load_anomaly_dataset(root)) == ["train"]
    shutil.rmtree(root / "train" / "good")
    (root / "train" / "good").mkdir()
    with pytest.raises(ValueError, match="has no pictures to train on"):
        load_anomaly_dataset(root)


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


def test_magnetic_tile_without_jpeg_images(tiles: Path) -> None:
    for image in (tiles / "MT_Blowhole" / "Imgs").glob("*.[jJ]*"):
        image.unlink()
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


@pytest.mark.skipif(not SCREW.is_dir(), reason="MVTec AD's screw is not in ../shared/data/mvtec_screw")
def test_the_real_screws() -> None:
    splits = load_anomaly_dataset(SCREW)
    published = {"manipulated_front": 24, "scratch_head": 24, "scratch_neck": 25, "thread_side": 23, "thread_top": 23}
    assert counts(splits) == {"train": {"good": 320}, "test": {"good": 41} | published}
    masks = splits["test"].cast_column("mask", datasets.Image(decode=False))["mask"]
    assert sum(splits["test"]["label"]) == sum(mask is not None for mask in masks) == 119


def test_mvtec() -> None:
    splits = load_anomaly_dataset(HAZELNUT)
    assert len(splits["train"]) == 28 and Counter(splits["test"]["defect_type"]) == {"good": 6, "colour": 17}
    for mask, label in zip(splits["test"]["mask"], splits["test"]["label"]):
        assert (mask is not None) == bool(label)
    assert load_anomaly_dataset(HAZELNUT.parent)["train"]["path"] == splits["train"]["path"]


def test_a_folder_of_good_images() -> None:
    splits = load_anomaly_dataset(HAZELNUT / "train" / "good")
    assert list(splits) == ["train"] and len(splits["train"]) == 28 and set(splits["train"]["label"]) == {0}


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_anomaly_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no category 'nut'; it has: hazelnut"):
        load_anomaly_dataset(HAZELNUT.parent, category="nut")
    with pytest.raises(ValueError, match="did you mean hazelnut"):
        load_anomaly_dataset(HAZELNUT.parent, category="hazlenut")
    with pytest.raises(ValueError, match="magnetic_tile, folder or parquet, not 'mvtc'"):
        load_anomaly_dataset(HAZELNUT, layout="mvtc")
    with pytest.raises(ValueError, match="is not laid out as visa, which has Data/Images"):
        load_anomaly_dataset(HAZELNUT, layout="visa")
    with pytest.raises(ValueError, match="is not a folder"):
        load_anomaly_dataset(HAZELNUT / "test" / "good" / "04.jpg")
    with pytest.raises(ValueError, match="has no pictures"):
        load_anomaly_dataset(tmp_path)
