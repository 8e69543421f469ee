"""Docstrings refer to classes as diffusers' do, [`ClassName`]: what has a place in the API reference becomes a link."""

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parent / "api"
DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in PAGES.glob("*.md")
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def linked(match: re.Match[str]) -> str:
    """The Markdown of one reference: a link, or the name alone where there is nothing to link to."""
    name = match[1]
    path = DOCUMENTED.get(name.partition(".")[0])
    return f"[`{name}`][{path}]" if path else f"`{name}`"


class DocstringLinks(griffe.Extension):
    """Rewrites the references in every docstring that is read, and calls the fields of a tuple what they are."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"\[`([\w.]+)`\](?![\[(])", linked, obj.docstring.value)
        if isinstance(obj, griffe.Class) and any(str(base) == "NamedTuple" for base in obj.bases):
            text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)  # griffe knows no __init__ of theirs
        obj.docstring.value = text
