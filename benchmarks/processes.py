"""Run a script of this folder in a process of its own, so that its time and its memory are its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def in_a_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script with these arguments in its own process and return the result that it prints.

    Args:
        script: path of the script, its ``__file__``.
        arguments: of the command line.

    Returns:
        The JSON object in the last line of its stdout.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])
