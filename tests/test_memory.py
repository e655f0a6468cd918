"""Freed memory is kept where somebody asks for it, and only there."""

import subprocess
import sys

import pytest

import compresskit

HELD = """
import sys, pathlib, torch, compresskit
def held():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
if sys.argv[1] == "keep":
    assert compresskit.keep_freed_memory()
for _ in range(3):  # glibc learns from what is freed
    x = torch.ones(2**24)
    before = held()
    del x
print((before - held()) / 2**26)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize(("how", "given_back"), [("keep", 0.0), ("leave", 1.0)])
def test_what_is_freed_is_kept(how, given_back):
    done = subprocess.run([sys.executable, "-c", HELD, how], check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(given_back, abs=0.1)


def test_elsewhere_it_says_that_it_cannot(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compresskit.keep_freed_memory() is False
