"""Files that the server writes for its visitors, while its disk may be full."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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
