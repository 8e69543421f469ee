"""Keep the memory that a program frees: the large buffers of networks on a CPU come and go with every layer."""

import ctypes
from contextlib import suppress

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
# Larger buffers, those of pictures of many megapixels, are still given back. Before 2.35 glibc took no more than 32 MB.
KEPT = 2**28, 2**25


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next buffers. Linux with glibc only.

    By itself glibc maps each buffer above 32 MB anew and gives it back as soon as it is free, so that the kernel
    clears the same pages at every layer of a network; up to half of the time went there (`benchmarks/inference.py`
    measures it). The price is that the process stays as large as it once was. For programs to call when they start:
    it is a setting of the process, which no library should change when it is imported.

    Returns:
        Whether there was something to set.
    """
    with suppress(OSError, TypeError, AttributeError):  # Windows has no such handle, other C libraries no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # In this order: never to trim alone would fix glibc's own, much lower threshold for what it maps anew.
        return any(mallopt(M_MMAP_THRESHOLD, size) for size in KEPT) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
    return False
