"""Memory that is freed goes back to the system."""

import platform
import subprocess
import sys

import pytest

FREED = """
import sys
import numpy
from compresskit_cli.memory import return_large_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "yes":
    assert return_large_blocks()
numpy.ones(2**21)  # 16 MiB; freed at once: from here on glibc keeps blocks of this size
before, kept = resident(), []
for _ in range(8):
    block, pin = numpy.ones(2**21 - 2**10), numpy.ones(2**10)  # the small one, above, stays
    kept.append((block, pin))
kept = [pin for _, pin in kept]
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_large_blocks_are_returned_and_would_be_kept_without():
    def left(how):
        command = [sys.executable, "-c", FREED, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert left("yes") < 2**23 < 2**26 < left("no")
