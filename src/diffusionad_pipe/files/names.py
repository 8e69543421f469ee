"""Names of files and folders that every file system takes, from texts of whatever origin."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

LONGEST_NAME = 200  # bytes of a file's; file systems take 255, and other programs add endings of their own
LONGEST_TEXT = 100  # of a name that came as text
UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\:*?"<>|]')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


def safe_name(text: str, longest: int = LONGEST_TEXT) -> str:
    """A name for a file or folder from a text of whatever origin: a category, a picture's name, a Hub id.

    Args:
        text: may hold slashes, `..`, control characters, half of a character, or nothing.
        longest: bytes that the name may have.

    Returns:
        The text itself where every file system takes it; else what is left of it, with a hash of all of it, so that
        different texts have different names.
    """
    name = UNSAFE.sub("_", text).strip(" ").lstrip(".").rstrip(". ")
    if RESERVED.fullmatch(name):
        name = f"_{name}"
    if name == text and name and len(name.encode()) <= longest:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    # The end of a name tells more than its beginning; half a character is left out.
    end = name.encode()[-(longest - len(digest) - 1) :].decode(errors="ignore")
    return f"{end}-{digest}" if end else digest


def folded(name: str) -> str:
    """The same for names that some file system takes for one: of other case, or otherwise composed."""
    return unicodedata.normalize("NFC", name).casefold()


def is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder, on every system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not any(part == ".." or UNSAFE.search(part) for part in parts)


def unique_names(names: Iterable[str], endings: Iterable[str], is_taken: Callable[[str], Any]) -> list[str]:
    """Names to begin files with, such that no file of one has the name of another's.

    Args:
        names: as they should be; may repeat.
        endings: what is appended to a name, each a file of its own.
        is_taken: whether a file's name cannot be had.

    Returns:
        The same names, in order, with a number where one of their files would have had a name that is taken.
    """
    endings, given, unique = list(endings), set[str](), []
    for name in names:
        candidate, number = name, 2
        while any(folded(candidate + ending) in given or is_taken(candidate + ending) for ending in endings):
            candidate, number = f"{name}-{number}", number + 1
        given |= {folded(candidate + ending) for ending in endings}
        unique.append(candidate)
    return unique
