"""A launcher's process keeps freed memory: large tensors cause no new page faults."""

import os
import subprocess
import sys

import pytest

from distill.run import allocator

SCRIPT = """
import resource, sys
from distill.run.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12_000_000)
before = faults()
for _ in range(5):
    torch.ones(12_000_000)
print(*sys.argv[1:], faults() - before)
"""


def run(*arguments: str, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != allocator.NAME}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not allocator._is_glibc(), reason="the C library is not glibc")
def test_a_large_tensor_reuses_the_memory_of_the_one_before():
    *arguments, kept = run("keep", "a word more")
    assert arguments == ["keep", "a", "word", "more"]  # the command line is the same after the restart
    assert int(kept) < 500 < 5 * 10_000 < int(run("as it is")[-1])


def test_the_users_settings_are_kept():
    assert int(run("keep", **{allocator.NAME: "glibc.malloc.check=0"})[-1]) > 10_000
