"""The threads that OpenMP leaves waiting, counted in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch

from ftkit.lab.machine import release_threads

pytestmark = pytest.mark.alone

COUNT = """
import psutil, torch
from ftkit.lab.machine import release_threads
torch.set_num_threads(2)
many = torch.rand(2000, 2000)
threads = []
for release in (False, True, False):
    many.exp()
    if release:
        release_threads()
    threads.append(psutil.Process().num_threads())
print(*threads)
"""


@pytest.mark.skipif(os.cpu_count() < 2, reason="a single thread leaves none waiting")
def test_idle_threads_end_and_come_back_with_the_next_operation() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    used, released, used_again = map(int, done.stdout.split())
    assert released < used == used_again


def test_results_are_the_same_afterwards() -> None:
    many = torch.arange(100_000.0)
    before = many.exp().sum()
    release_threads()
    assert torch.equal(many.exp().sum(), before)
