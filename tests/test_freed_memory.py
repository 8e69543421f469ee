"""Large buffers that are freed and taken again cost no new pages."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from diffusionad_pipe.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
for _ in range(20):  # aligned blocks fit into freed ones after some tries
    torch.ones(25_000_000)  # 100 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


LIBRARY, VERSION = platform.libc_ver()


@pytest.mark.skipif(LIBRARY != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif(VERSION.split(".") < ["2", "35"], reason="glibc before 2.35 maps buffers above 32 MB anew")
def test_freed_memory_is_used_again() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    )
    assert kept < returned / 10
