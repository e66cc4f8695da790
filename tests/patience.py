"""Work that must grow no faster than its input, tested without asserting a time."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

_LONGEST = 120  # seconds, for what takes a few; with time that grows as the square of the input it takes an hour


def run_to_the_end(code: str) -> str:
    """Run code in a process of its own, and return what it prints; fail if it does not end in a very long time."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        pytest.fail(f"This has not ended after {_LONGEST} seconds:\n{code}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def count_calls(function: Callable[[], Any]) -> int:
    """The number of calls of Python and C functions that a call makes: a measure of its work that is always the same.

    It does not see what happens inside of a C function, such as the steps of a regular expression.
    """
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event.endswith("call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls
