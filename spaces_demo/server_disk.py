"""Files that the server writes for its visitors, while its disk may be full, and deletes after a while."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)


@contextmanager
def written_for_visitor() -> Iterator[None]:
    """Where a file is written; the operator finds in the log which one, and why it cannot be.

    Raises:
        ValueError: in place of an OSError; one sentence for the visitor, who must see no path.
    """
    try:
        yield
    except OSError as error:
        logger.error("a file for a visitor cannot be written: %s", error)
        raise ValueError("the server has no room for files just now; try again later, or tell who runs it") from error


def delete_old_files(demo: "gr.Blocks", keep_seconds: int) -> None:
    """Delete uploads and results that are older than so many seconds, again and again.

    Gradio would, but its task ends when a file comes in while it looks (6.31: "Set changed size").
    """
    examples = {file for block in demo.blocks.values() for file in getattr(block, "keep_in_cache", ())}
    while True:
        time.sleep(max(keep_seconds // 6, 1))
        for files_of_block in demo.temp_file_sets:
            for file in files_of_block.copy() - examples:
                with suppress(OSError):  # what cannot be deleted now is tried again
                    path = Path(file)
                    if not path.exists():
                        files_of_block.discard(file)
                    elif time.time() - path.lstat().st_ctime > keep_seconds:
                        path.unlink()
                        files_of_block.discard(file)
