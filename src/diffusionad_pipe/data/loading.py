"""Pictures with labels and masks from a folder, as a `datasets.DatasetDict`."""

import difflib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.table import embed_table_storage

from ..files.hub_caches import explained_caches
from ..files.output_folder import OutputFolder
from ..images.dataset_rows import load_rows
from ..images.files import MAX_PIXELS, ImageFileError, PathLike, is_hidden, shown
from ..runtime.progress import tracked
from .layouts import LAYOUTS, Entry, split_of
from .masks import read_mask

logger = logging.getLogger(__name__)

IMAGES_PER_FILE = 200  # of an export: a few hundred megabytes, which are held in memory

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["good", "defective"]),
        "defect_type": datasets.Value("string"),
        "category": datasets.Value("string"),
        "split": datasets.Value("string"),
        "path": datasets.Value("string"),
    }
)


class Doubt(NamedTuple):
    """What is wrong with a picture's mask.

    Args:
        category: the picture's.
        split: the picture's; of one that is left out, as its publisher has it.
        sentence: names the files, the cause and the cure.
        left_out: whether the picture is.
    """

    category: str
    split: str
    sentence: str
    left_out: bool


def load_anomaly_dataset(
    path: PathLike,
    layout: str = "auto",
    category: str | None = None,
    max_pixels: int = MAX_PIXELS,
    doubts: list[Doubt] | None = None,
) -> datasets.DatasetDict:
    """Load the pictures of one category, or of all.

    Args:
        path: a folder in one of the layouts, or with one such folder for each category.
        layout: what was found is logged where it is `"auto"`; else one of

            - `"mvtec"`: `train/good`, `test/<defect type>`, `ground_truth/<defect type>` with masks paired by stem,
              with or without `_mask`: MVTec AD, MPDD, VisA as its authors' script reorganises it, your own pictures;
            - `"mvtec_ad_2"`: the same with `test_public` and its `ground_truth`; the private tests have no labels and
              are left out;
            - `"mvtec_3d"`: the RGB pictures of MVTec 3D-AD, in folders `rgb`, with masks in folders `gt`;
            - `"visa"`: VisA as published; `split_csv/1cls.csv` says what is for training;
            - `"btad"`: `train/ok`, `test/{ok,ko}`, `ground_truth/ko`;
            - `"dagm"`: a class of DAGM 2007, `{Train,Test}/*.PNG` with `Label/*_label.PNG` for the defective ones;
            - `"kolektor_sdd2"`: `{train,test}/*.png` with a mask `*_GT.png` each, of which the good ones' are empty;
            - `"magnetic_tile"`: `MT_Free/Imgs` and `MT_<Defect type>/Imgs` with JPEG pictures and PNG masks of the same
              stems beside them, as Magnetic-Tile-Defect (Huang et al.) comes;
            - `"folder"`: any folder of good pictures, all for training;
            - `"parquet"`: what [`export_parquet`] wrote.
        category: the sub-folder, where `path` holds several; `"all"` takes every one.
        max_pixels: masks of more are refused where they tell whether a picture is good.
        doubts: takes the warnings below, instead of the log.

    Returns:
        Splits `train` and, where there are such pictures, `validation` (good ones that the publisher sets aside),
        `train_defective` (the publisher's training folder holds them, they are no examples of normal) and `test`, with
        the columns image, mask (None for good pictures and where there is none), label (0 good, 1 defective),
        defect_type, category, split and path. Masks are opened only where nothing else tells whether a picture is
        good, so one may be empty: `diffusionad check-data` finds out. Where such a mask cannot be read, the picture is
        left out, with a warning. Where it is not clear which mask a picture has, it has none, with a warning. Files
        whose names are no UTF-8, which no column can hold, are there byte by byte, under an escaped name.

    Raises:
        ValueError: names the folder or every missing file, the cause and the cure.
    """
    if layout == "parquet" or (layout == "auto" and is_export(path)):
        return _load_parquet(path, category)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "train_defective": [], "test": []}
    missing: list[Path] = []
    for name, (folder, found_layout) in find_categories(path, layout, category).items():
        entries = LAYOUTS[found_layout].read(folder)
        absent = [file for entry in entries for file in (entry.image, entry.mask) if file and not os.path.lexists(file)]
        missing += absent
        if absent:
            continue
        entries = _decided(entries, max_pixels, name, doubts)
        if not any(entry.split == "train" for entry in entries):
            raise ValueError(f"{folder} has no pictures to train on; the layout {found_layout} was looked for")
        logger.info(describe(name, found_layout, entries))
        for entry in entries:
            rows[entry.split].append(_row(entry, name))
    if missing:
        listed = "\n  ".join(map(shown, missing))
        raise ValueError(
            f"{path} is incomplete, these {len(missing)} files are missing; download it again:\n  {listed}"
        )
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(entries, features=FEATURES) for split, entries in rows.items() if entries}
    )


def find_categories(path: PathLike, layout: str = "auto", category: str | None = None) -> dict[str, tuple[Path, str]]:
    """Find the categories in a folder and how each is laid out.

    Args:
        path: as in [`load_anomaly_dataset`].
        layout: likewise, without `"parquet"`.
        category: likewise.

    Returns:
        (folder, layout) of each chosen category by its name; one, unless `category` is `"all"`.

    Raises:
        ValueError: names the folder, the cause and the cure.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder that holds the pictures")
    names = ("auto", *LAYOUTS, "parquet")
    if layout not in names:
        raise ValueError(f"layout must be {', '.join(names[:-1])} or {names[-1]}, not {layout!r}")

    def layout_of(folder: Path) -> str | None:
        wanted = [name for name in LAYOUTS if name != "folder"] if layout == "auto" else [layout]
        return next((name for name in wanted if any(folder.glob(LAYOUTS[name].signature))), None)

    found: dict[str, tuple[Path, str]] = {}
    if own := layout_of(root):
        found = {name_of(root): (root, own)}
    else:
        folders = [folder for folder in sorted(root.glob("*/")) if not is_hidden(folder.name)]
        found = {shown(f.name): (f, kind) for f in folders if (kind := layout_of(f))}
    plain = root if category in (None, "all") else root / category
    known = bool(found) if plain == root else category in found
    if not known and plain.is_dir() and layout in ("auto", "folder"):
        if layout == "auto":
            _refuse_remains(plain)
        return {name_of(plain): (plain, "folder")}
    if category in (None, "all") and not found:
        raise ValueError(f"{root} is not laid out as {layout}, which has {LAYOUTS[layout].signature}")
    return {name: found[name] for name in _choose(root, list(found), category)}


def name_of(folder: PathLike) -> str:
    """A folder's own name, also where its path ends in `..`."""
    return shown(os.path.basename(os.path.abspath(folder)))


def _choose(root: PathLike, names: list[str], category: str | None) -> list[str]:
    """The chosen ones of all categories."""
    if category == "all" or (category is None and len(names) == 1):
        return names
    if category is None:
        raise ValueError(f"{root} holds several categories, choose one: {', '.join(names)}")
    if category not in names:
        folded = {name.casefold(): name for name in names}
        close = [folded[match] for match in difflib.get_close_matches(category.casefold(), folded)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{root} has no category {category!r}; it has: {', '.join(names) or 'none'}{hint}")
    return [category]


def _refuse_remains(folder: Path) -> None:
    """A plain folder's every picture is taken for a good one, which those of an incomplete dataset are not."""
    for name in ("test", "Test", "test_public", "ground_truth"):
        if any(folder.glob(name)) or any(folder.glob(f"*/{name}")):
            raise ValueError(
                f"{folder} holds {name} but no layout that is known: add its train/good, "
                "or give the folder of its good pictures instead"
            )


def decide(entry: Entry, max_pixels: int = MAX_PIXELS) -> Entry:
    """Tell whether a picture is good from its mask, where nothing else does."""
    if entry.defect_type is not None or entry.mask is None:
        return entry
    defect_type = "defect" if read_mask(entry.mask, max_pixels=max_pixels).any() else "good"
    return entry._replace(defect_type=defect_type, split=split_of(entry.split, defect_type))


def _decided(entries: list[Entry], max_pixels: int, category: str, doubts: list[Doubt] | None) -> list[Entry]:
    undecided = any(entry.defect_type is None for entry in entries)
    decided = []
    for entry in tracked(entries, "reading masks", unit="mask", shown=undecided):
        if entry.unclear:
            _doubt(doubts, Doubt(category, entry.split, unclear_masks(entry), left_out=False))
        try:
            decided.append(decide(entry, max_pixels))
        except ImageFileError as error:
            sentence = f"left out: {shown(entry.image)}, as its mask tells whether it is good: {error}"
            _doubt(doubts, Doubt(category, entry.split, sentence, left_out=True))
    return decided


def _doubt(doubts: list[Doubt] | None, doubt: Doubt) -> None:
    if doubts is None:
        logger.warning(doubt.sentence)
    else:
        doubts.append(doubt)


def unclear_masks(entry: Entry) -> str:
    """Why a picture has no mask although there are some that could be its."""
    return (
        f"{shown(entry.image)}: it is not clear whether {' or '.join(map(shown, entry.unclear))} is its mask or that "
        "of another picture, so it has none; put masks into sub-folders as their pictures are, under their names"
    )


def describe(category: str, layout: str, entries: Iterable[Entry]) -> str:
    """Say in one line what was found: the layout, and how many pictures of which defect type each split has."""
    counts = Counter((entry.split, entry.defect_type or "undecided") for entry in entries)
    splits = {split: None for split, _ in counts}  # in their order
    listed = (
        f"{split}: " + ", ".join(f"{count} {defect_type}" for (s, defect_type), count in counts.items() if s == split)
        for split in splits
    )
    return "; ".join((f"{category}: layout {layout}", *listed))


def _row(entry: Entry, category: str) -> dict[str, Any]:
    defective = entry.defect_type != "good"
    return {
        "image": _cell(entry.image),
        "mask": _cell(entry.mask) if entry.mask is not None and defective else None,
        "label": int(defective),
        "defect_type": shown(entry.defect_type or ""),
        "category": category,
        "split": entry.split,
        "path": shown(entry.image),
    }


def _cell(file: Path) -> dict[str, Any]:
    """A file by its path, or by its bytes where Arrow cannot hold the path."""
    name = shown(file)
    if name == str(file):
        return {"bytes": None, "path": name}
    try:
        return {"bytes": file.read_bytes(), "path": name}
    except OSError:  # is said when the file is needed
        return {"bytes": None, "path": name}


def export_parquet(dataset: datasets.DatasetDict, folder: PathLike) -> None:
    """Write a dataset as Parquet files that hold the pictures and masks themselves, byte by byte, as the Hub has them.

    `datasets.load_dataset` reads the folder, here or uploaded. Of the column `path` it keeps what lies below the folder
    that all pictures share, and not the folders above.

    Args:
        dataset: as [`load_anomaly_dataset`] gives it.
        folder: is made; must not hold an export, or a folder `data`, yet.

    Raises:
        ValueError: if it does.
    """
    data = Path(folder) / "data"
    if any(data.glob("*.parquet")):
        raise ValueError(f"{data} holds Parquet files already: choose another folder, or remove them")
    shared = os.path.commonpath([os.path.dirname(path) for rows in dataset.values() for path in rows["path"]])

    def write(place: Path) -> None:
        for split, rows in dataset.items():
            rows = rows.map(lambda path: {"path": Path(path).relative_to(shared).as_posix()}, input_columns="path")
            count = -(-len(rows) // IMAGES_PER_FILE)
            for index in tracked(range(count), f"exporting {split}", unit="file"):
                part = rows.shard(count, index).with_format("arrow")
                embedded = part.map(embed_table_storage, batched=True, keep_in_memory=True).with_format(None)
                embedded.to_parquet(place / f"{split}-{index:05d}-of-{count:05d}.parquet")

    OutputFolder(folder, "export_parquet", "folder").write_tree("data", write)


def is_export(path: PathLike) -> bool:
    """Whether a folder is laid out as [`export_parquet`] and the Hub do."""
    return any(Path(path).glob("data/*-of-*.parquet"))


def _load_parquet(path: PathLike, category: str | None) -> datasets.DatasetDict:
    if not is_export(path):
        raise ValueError(f"{path} has no Parquet files data/<split>-*-of-*.parquet: write them with export_parquet")
    splits = load_rows(str(path))
    if not all(set(FEATURES) <= set(rows.features) for rows in splits.values()):
        raise ValueError(
            f"{path} was not written by export_parquet: it lacks some of the columns {', '.join(FEATURES)}"
        )
    names = sorted({name for rows in splits.values() for name in rows.unique("category")})
    chosen = _choose(path, names, category)
    if chosen == names:
        return splits
    with explained_caches():
        some = splits.filter(lambda name: name in chosen, input_columns="category")
    return datasets.DatasetDict({split: rows for split, rows in some.items() if len(rows)})
