"""`diffusionad check-data`: trees in every layout with everything that goes wrong."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusionad_pipe.cli import app
from diffusionad_pipe.data.checks import Problem, check_data
from diffusionad_pipe.data.loading import load_anomaly_dataset
from tests.helpers import layouts

SHARED = Path(__file__).parents[3] / "shared" / "data"  # may not be there


def found(path: Path, severity: str, **options) -> dict[str, str]:
    """File or folder below `path` and what is said of it."""
    problems = [problem for problem in check_data(path, **options) if problem.severity == severity]
    assert all(str(problem.path) in problem.message or problem.severity == "note" for problem in problems)
    return {problem.path.relative_to(path).as_posix(): problem.message for problem in problems}


@pytest.mark.parametrize(
    "make",
    [layouts.mvtec_ad, layouts.mpdd, layouts.mvtec_ad_2, layouts.mvtec_3d, layouts.visa, layouts.visa_reorganised]
    + [layouts.btad, layouts.dagm, layouts.kolektor_sdd2, layouts.magnetic_tile, layouts.plain],
)
def test_nothing_is_wrong_with_a_sound_tree(make, tmp_path: Path) -> None:
    make(tmp_path / "data")
    problems = check_data(tmp_path / "data")
    assert [problem for problem in problems if problem.severity != "note"] == []
    assert problems and "; train: " in problems[0].message and "; test: " in problems[0].message


def test_all_problems_in_one_pass(tmp_path: Path) -> None:
    root = tmp_path / "ein Ordner" / "bottle"
    layouts.mvtec_ad(root.parent)
    shutil.rmtree(root.parent / "screw")
    broken, large = root / "test" / "broken_large", root / "ground_truth" / "broken_large"
    shutil.copy(root / "train" / "good" / "002.png", root / "test" / "good" / "000.png")
    Image.open(root / "train" / "good" / "003.png").save(broken / "007.bmp")  # other bytes, and no mask
    (root / "train" / "good" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (large / "000_mask.png").write_bytes(b"<html>")
    Image.new("L", (7, 5), 255).save(large / "001_mask.png")
    layouts.masks(root, ["ground_truth/broken_large/005_mask.png"], marked=False)
    layouts.masks(root, ["ground_truth/broken_large/099_mask.png"])
    layouts.masks(root, ["ground_truth/contamination/000_mask.png"], value=100)
    (root / "test" / "scratch").mkdir()
    errors, warnings = found(root, "error"), found(root, "warning")
    assert set(errors) == {
        "train/good/001.png",
        "test/good/000.png",
        "test/broken_large/007.bmp",
        "ground_truth/broken_large/000_mask.png",
        "ground_truth/broken_large/001_mask.png",
    }
    assert "truncated or damaged" in errors["train/good/001.png"]
    assert "train/good/002.png, one is in test and one in train" in errors["test/good/000.png"]
    assert "train/good/003.png" in errors["test/broken_large/007.bmp"]
    assert "7 x 5 pixels, and its picture" in errors["ground_truth/broken_large/001_mask.png"]
    problems = [problem for problem in check_data(root) if problem.severity == "warning"]
    contamination = [p.message for p in problems if p.path.parent.name == "contamination"]
    assert len(contamination) == 2 and "values end at 100" in contamination[0] and "marks nothing" in contamination[1]
    assert "marks every pixel" in warnings["ground_truth/broken_large/001_mask.png"]
    assert "marks nothing" in warnings["ground_truth/broken_large/005_mask.png"]
    assert "the layout mvtec has no use for it here" in warnings["ground_truth/broken_large/099_mask.png"]
    assert "defective without a mask" in warnings["test/broken_large/007.bmp"]
    assert "folder is empty" in warnings["test/scratch"]
    assert len(problems) == 7 and found(root, "note")


def test_what_a_dataset_lacks(tmp_path: Path) -> None:
    root = tmp_path / "data"
    layouts.plain(root)
    shutil.rmtree(root / "ground_truth")
    assert "none of the 2 defective pictures has a mask" in found(root, "warning")["."]
    shutil.rmtree(root / "test" / "good")
    assert any("no good test pictures" in problem.message for problem in check_data(root))
    shutil.rmtree(root / "test" / "Riß")
    layouts.images(root, ["test/good/1.png"])
    assert "no defective test pictures" in found(root, "warning")["."]
    shutil.rmtree(root / "test")
    assert "no test pictures" in found(root, "warning")["."]
    shutil.rmtree(root / "train" / "good")
    (root / "train" / "good").mkdir()
    assert "no good pictures to train on" in found(root, "error")["."]


def test_a_partial_download(tmp_path: Path) -> None:
    root = tmp_path / "visa"
    layouts.visa(root)
    gone = ["candle/Data/Images/Normal/0002.JPG", "candle/Data/Masks/Anomaly/012.png"]
    for name in gone:
        (root / name).unlink()
    layouts.images(root, ["candle/Data/Images/Normal/0009.JPG"])
    shutil.rmtree(root / "pcb1")
    errors = found(root, "error")
    assert set(errors) == {*gone, "pcb1"} and "names this category" in errors["pcb1"]
    assert set(found(root, "warning")) == {"candle/Data/Images/Normal/0009.JPG"}
    assert set(found(root, "error", category="candle")) == set(gone)


def test_images_that_are_easily_overlooked(tmp_path: Path) -> None:
    root = tmp_path / "bottle"
    layouts.mvtec_ad(tmp_path)
    layouts.images(root, ["test/000.png", "train/bad/000.png", "005.png"])
    shutil.copy(root / "test" / "good" / "001.png", root / "test" / "contamination" / "000.png")
    assert set(found(root, "warning")) == {"test/000.png", "train/bad/000.png", "005.png"}
    (message,) = found(root, "error").values()
    assert "test/good/001.png: the same picture as" in message and "one is good and one contamination" in message

    root = tmp_path / "KolektorSDD2"
    layouts.kolektor_sdd2(root)
    layouts.masks(root, ["train/10002_GT (copy).png"])
    assert set(found(root, "warning")) == {"train/10002_GT (copy).png"} and not found(root, "error")


def test_masks_decide_on_defects(tmp_path: Path) -> None:
    root = tmp_path / "KolektorSDD2"
    layouts.kolektor_sdd2(root)
    (root / "train" / "10000_GT.png").unlink()
    (root / "test" / "20000_GT.png").write_bytes(b"")
    assert set(found(root, "error")) == {"train/10000_GT.png", "test/20000_GT.png"}
    (note,) = found(root, "note").values()
    assert "train: 1 undecided, 2 good; train_defective: 1 defect; test: 1 undecided, 2 good, 1 defect" in note

    root = tmp_path / "tiles"
    layouts.magnetic_tile(root)
    layouts.masks(root, ["MT_Free/Imgs/exp1_num_8.png"])
    assert "marks a defect, but" in found(root, "error")["MT_Free/Imgs/exp1_num_8.png"]


def test_odd_mask_values(tmp_path: Path) -> None:
    root = tmp_path / "data"
    layouts.plain(root)
    folder = root / "ground_truth" / "Riß"
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (32, 1))
    Image.fromarray(ramp).save(folder / "stück 4.png")
    (folder / "stück 5_mask.png").unlink()
    Image.fromarray(np.where(ramp > 200, 255, 0).astype(np.uint8)).save(folder / "stück 5.jpg")
    warnings = found(root, "warning")
    assert "neither black nor white" in warnings["ground_truth/Riß/stück 4.png"]
    assert "JPEG" in warnings["ground_truth/Riß/stück 5.jpg"] and len(warnings) == 2


def test_command_line(tmp_path: Path) -> None:
    root = tmp_path / "data"
    layouts.mvtec_ad(root)

    def check(*arguments: object):
        return CliRunner().invoke(app, ["check-data", *map(str, arguments)])

    result = check(root)
    assert result.exit_code == 0 and "errors: 0, warnings: 0" in result.stdout, result.output
    assert "bottle: layout mvtec; train: 4 good; test: 3 broken_large, 1 contamination, 2 good" in result.stdout
    (root / "screw" / "ground_truth" / "contamination" / "000_mask.png").unlink()
    result = check(root)
    assert result.exit_code == 1 and "errors: 0, warnings: 2" in result.stdout  # its folder is empty now
    assert check(root, "--category", "bottle").exit_code == 0
    (root / "screw" / "train" / "good" / "000.png").write_bytes(b"")
    result = check(root)
    assert result.exit_code == 2 and "000.png: the file is empty" in result.stdout
    for path, arguments, said in (
        (root, ("--category", "scew"), "did you mean screw?"),
        (root / "bottle" / "readme.txt", (), "is not a folder"),
        (root, ("--layout", "visa"), "is not laid out as visa"),
    ):
        result = check(path, *arguments)
        assert result.exit_code == 2 and said in result.stderr and result.stdout == ""


@pytest.mark.skipif(not (SHARED / "magnetic_tile").is_dir(), reason="Magnetic-Tile-Defect is not in ../shared/data")
def test_the_real_magnetic_tiles() -> None:
    problems: list[Problem] = [p for p in check_data(SHARED / "magnetic_tile") if p.severity != "note"]
    assert {problem.path.name for problem in problems} == {
        f"exp{name}.png" for name in ("3_num_45042", "4_num_124690", "4_num_352527", "4_num_45057")
    }
    assert len(problems) == 4 and all("marks nothing" in problem.message for problem in problems)


def test_masks_follow_the_folders_of_their_images(tmp_path: Path) -> None:
    root = tmp_path / "part"
    layouts.images(root, [f"train/good/{index}.png" for index in range(3)] + ["test/good/9.png"])
    layouts.images(root, ["test/dent/cam1/000.png", "test/dent/cam2/000.png", "test/dent/cam2/001.png"])
    layouts.masks(root, ["ground_truth/dent/000_mask.png", "ground_truth/dent/001_mask.png"])
    errors = found(root, "error")
    assert set(errors) == {"test/dent/cam1/000.png", "test/dent/cam2/000.png"}
    assert all("000_mask.png is its mask or that of another" in message for message in errors.values())
    rows = load_anomaly_dataset(root)["test"]
    assert [Path(path).name for path, mask in zip(rows["path"], rows["mask"]) if mask is not None] == ["001.png"]

    (root / "ground_truth/dent/000_mask.png").unlink()
    layouts.masks(root, ["ground_truth/dent/cam1/000_mask.png", "ground_truth/dent/cam2/000.png"])
    assert found(root, "error") == {}
    assert sum(mask is not None for mask in load_anomaly_dataset(root)["test"]["mask"]) == 3


def test_names_that_mean_something_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "data" / "part"
    layouts.images(root, ["train/good/A.png", "train/good/a.png", "train/good/größe.png", "test/good/1.png"])
    layouts.images(root, ["train/good/gro\u0308ße.png", "test/dent/1.jfif", "test/good/2.ppm"])
    layouts.images(root, ["train/good/.hidden/1.png", "train/good/@eaDir/1.png"])
    layouts.images(root.parent, [".Trash-1000/train/good/1.png"])
    latin = os.fsdecode(b"train/good/M\xfcnchen.png")
    shutil.copy(root / "train/good/A.png", root / latin)
    (root / "train" / "good" / "b.heic").write_bytes(b"...")
    problems = check_data(root.parent)
    warnings = {problem.path.name: problem.message for problem in problems if problem.severity == "warning"}
    assert "only in case or in how its letters are composed" in warnings["a.png"]
    assert [name for name in warnings if "e.png" in name] and "rename the file" in warnings[Path(latin).name]
    assert [problem for problem in problems if problem.severity == "error"] == []
    assert "b.heic" in found(root, "note")["train/good/b.heic"]
    splits = load_anomaly_dataset(root.parent)
    assert len(splits["train"]) == 5 and len(splits["test"]) == 3
    assert r"M\xfcnchen.png" in "".join(splits["train"]["path"])
    assert all(np.asarray(image).ndim == 3 for image in splits["train"]["image"])


def test_mattes_and_masks_in_doubt(tmp_path: Path) -> None:
    root = tmp_path / "part"
    layouts.images(root, ["train/good/0.png", "train/good/1.png", "test/good/2.png", "test/dent/3.png"])
    layouts.masks(root, ["ground_truth/dent/3_mask.png", "DISthresh/good/0.png"])
    assert set(found(root, "warning")) == {"train/good/1.png"}  # it has no matte
    mask = Image.open(root / "ground_truth/dent/3_mask.png").convert("L").point(lambda value: min(value, 1))
    mask.putpalette([0, 0, 0, 0, 0, 0])
    mask.save(root / "ground_truth/dent/3_mask.png")
    (root / "DISthresh/good/0.png").write_bytes(b"no picture")
    errors = found(root, "error")
    assert "leaves open what it marks" in errors["ground_truth/dent/3_mask.png"]
    assert "this is not a picture" in errors["DISthresh/good/0.png"] and len(errors) == 2
    (root / "train/good/1.png").write_bytes(b"")
    assert "has 1 good picture to train on that can be read" in found(root, "error")["."]
