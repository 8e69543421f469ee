"""Work ahead: an iterator that runs in a thread of its own."""

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from queue import Full, Queue
from typing import Any, TypeVar

Item = TypeVar("Item")
PATIENCE = 0.1  # seconds after which a thread that waits for room looks whether its items are still wanted


def prefetched(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items in the same order, computed in a thread while the consumer is busy with earlier ones.

    The thread starts when the first item is asked for. It ends with the items, with an error in them, or soon after the
    consumer has stopped (a generator is then closed, in the thread).

    Args:
        items: what to iterate over.
        ahead: how many items may wait, at least 1.

    Yields:
        The items. An error that was raised between them is raised here, after the items before it.
    """
    queue: Queue[tuple[str, Any]] = Queue(ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with suppress(Full):
                queue.put((kind, value), timeout=PATIENCE)
                return

    def work() -> None:
        try:
            iterator = iter(items)
            for item in iterator:
                put("item", item)
                if stopped.is_set():
                    if isinstance(iterator, Generator):
                        iterator.close()
                    return
            put("end", None)
        except BaseException as error:  # of any kind: the consumer gets it in place of an item that would never come
            put("error", error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
