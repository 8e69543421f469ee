"""Small trees in each published layout, made of shipped pictures: true in naming, case, bit depth and mask values.

A mask marks 5 rows of `width(stem)` pixels, so that a test sees which picture it belongs to.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

HAZELNUT = Path(__file__).parents[2] / "training" / "data" / "hazelnut_toy" / "hazelnut"
SIZE = (40, 32)


def width(name: str) -> int:
    return 3 + sum(map(int, re.findall(r"\d", Path(name).stem))) % 20


def images(root: Path, names: Iterable[str], mode: str = "RGB") -> None:
    """Write shipped pictures under these names, each another one."""
    sources = sorted(HAZELNUT.rglob("*.jpg"))
    for name in names:
        index = len(list(root.parent.rglob("*.*")))  # files so far
        source = Image.open(sources[index % len(sources)]).rotate(7 * index).resize(SIZE)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source.convert(mode).save(path)


def masks(root: Path, names: Iterable[str], value: int = 255, marked: bool = True) -> None:
    """Write 8-bit masks of 0 and `value`."""
    for name in names:
        values = np.zeros(SIZE[::-1], dtype=np.uint8)
        values[4:9, 10 : 10 + width(name)] = value * marked
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def numbered(folder: str, numbers: Iterable[int], end: str = ".png", digits: int = 3) -> list[str]:
    return [f"{folder}/{number:0{digits}}{end}" for number in numbers]


def mvtec_ad(root: Path) -> None:
    for category, mode in (("bottle", "RGB"), ("screw", "L")):
        folder = root / category
        images(folder, numbered("train/good", range(4)) + numbered("test/good", range(2)), mode)
        images(folder, numbered("test/broken_large", (0, 1, 5)) + numbered("test/contamination", (0,)), mode)
        masks(folder, numbered("ground_truth/broken_large", (0, 1, 5), "_mask.png"))
        masks(folder, numbered("ground_truth/contamination", (0,), "_mask.png"))
        for name in ("license.txt", "readme.txt"):
            (folder / name).touch()


def mpdd(root: Path) -> None:
    folder = root / "bracket_black"
    images(folder, numbered("train/good", range(4)) + numbered("test/good", range(2)))
    images(folder, numbered("test/hole", (3, 4)))
    masks(folder, numbered("ground_truth/hole", (3, 4), "_mask.png"))


def mvtec_ad_2(root: Path) -> None:
    folder = root / "can"
    for part in ("train/good", "validation/good", "test_public/good", "test_public/bad", "test_private"):
        images(folder, numbered(part, (0, 2), "_regular.png"))
    images(folder, numbered("test_private_mixed", (0,), "_mixed.png"))
    masks(folder, numbered("test_public/ground_truth/bad", (0, 2), "_regular_mask.png"))


def mvtec_3d(root: Path) -> None:
    folder = root / "bagel"
    for part in ("train/good", "validation/good", "test/good", "test/crack"):
        images(folder, numbered(f"{part}/rgb", (0, 2)))
        (folder / part / "xyz").mkdir()
        for number in (0, 2):
            Image.fromarray(np.zeros(SIZE[::-1], dtype=np.float32)).save(folder / part / "xyz" / f"{number:03}.tiff")
    masks(folder, numbered("test/crack/gt", (0, 2)))
    masks(folder, numbered("test/good/gt", (0, 2)), marked=False)
    (folder / "calibration").mkdir()
    (folder / "calibration" / "camera_parameters.json").write_text("{}")


def visa(root: Path) -> None:
    """As published: normal pictures have 4 digits and defective ones 3, masks hold numbers of defects."""
    rows = []
    for category, value in (("candle", 1), ("pcb1", 7)):
        normal = numbered(f"{category}/Data/Images/Normal", (3, 0, 2, 1, 7), ".JPG", 4)
        anomaly = numbered(f"{category}/Data/Images/Anomaly", (0, 12), ".JPG")
        marks = numbered(f"{category}/Data/Masks/Anomaly", (0, 12))
        images(root, normal + anomaly)
        masks(root, marks, value)
        rows += [(category, "train" if i < 3 else "test", "normal", name, "") for i, name in enumerate(normal)]
        rows += [(category, "test", "anomaly", name, mask) for name, mask in zip(anomaly, marks)]
        (root / category / "image_anno.csv").write_text("image,label,mask\n")
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def visa_reorganised(root: Path) -> None:
    folder = root / "candle"
    images(folder, numbered("train/good", range(3), ".JPG", 4) + numbered("test/good", (3, 4), ".JPG", 4))
    images(folder, numbered("test/bad", (0, 12), ".JPG"))
    masks(folder, numbered("ground_truth/bad", (0, 12)))


def btad(root: Path) -> None:
    for category, image, mask in (("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")):
        for part in ("train/ok", "test/ok", "test/ko"):
            images(root / category, numbered(part, (0, 4), image, 4))
        masks(root / category, numbered("ground_truth/ko", (0, 4), mask, 4))


def dagm(root: Path) -> None:
    for category in ("Class1", "Class10"):
        for part, first in (("Train", 576), ("Test", 1)):
            images(root / category, numbered(part, range(first, first + 4), ".PNG", 4), "L")
            masks(root / category, numbered(f"{part}/Label", (first + 1,), "_label.PNG", 4))
            lines = [f"{i}\t{i == 1:d}\t{first + i:04}.PNG\t0\t0" for i in (0, 2, 3)]
            lines.insert(1, f"1\t1\t{first + 1:04}.PNG\t0\t{first + 1:04}_label.PNG")
            (root / category / part / "Label" / "Labels.txt").write_text("1\n" + "\n".join(lines) + "\n")


def kolektor_sdd2(root: Path) -> None:
    for part, first in (("train", 10000), ("test", 20000)):
        images(root, numbered(part, range(first, first + 4), digits=5))
        masks(root, numbered(part, (first, first + 1, first + 3), "_GT.png", 5), marked=False)
        masks(root, numbered(part, (first + 2,), "_GT.png", 5))


def magnetic_tile(root: Path) -> None:
    for name, count in (("Free", 5), ("Blowhole", 2), ("Uneven", 1)):
        stems = [f"exp{index + 1}_num_{97 * index + 8}" for index in range(count)]
        images(root, [f"MT_{name}/Imgs/{stem}.jpg" for stem in stems], "L")
        masks(root, [f"MT_{name}/Imgs/{stem}.png" for stem in stems], marked=name != "Free")


def plain(root: Path) -> None:
    """What a user makes: other suffixes, spaces, letters beyond ASCII, a palette, masks with and without `_mask`."""
    images(root, ["train/good/gute Teile 1.png", "train/good/größe_2.jpg", "test/good/ok 3.png"])
    images(root, ["test/Riß/stück 4.jpg", "test/Riß/stück 5.png"])
    masks(root, ["ground_truth/Riß/stück 4.png", "ground_truth/Riß/stück 5_mask.png"], value=3)
    mask = Image.open(root / "ground_truth" / "Riß" / "stück 5_mask.png")
    mask.putpalette([0, 0, 0] + [90, 0, 0] * 255)  # every colour but the first marks, however dark
    mask.save(root / "ground_truth" / "Riß" / "stück 5_mask.png")
