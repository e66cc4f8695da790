"""A grid of runs: a process for each, what is missing or failed.

What is done is read from the ledger of the folder: a run of the same identity (`ftkit.runs.identify`) without error.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftkit.lab import results
from ftkit.lab.runs.notebooks import check_parameters, identify

RANGE = re.compile(r"\s*(-?\d+)\.\.(-?\d+)\s*")


@dataclass(frozen=True)
class Job:
    """One run of the grid: its parameters, ``name`` (those that differ within the grid) and identity."""

    parameters: dict[str, Any]
    name: str
    identity: str


@dataclass
class _Running:
    """A job in its process, with what that prints."""

    job: Job
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def error(self) -> str | None:
        """One line, None if the run finished."""
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by signal {-code}"
        self.output.seek(0)
        with self.output:
            lines = self.output.read().decode(errors="replace").splitlines()
        return lines[-1].removeprefix("ftkit: ") if lines else f"exit code {code}"


def values_of(text: str) -> list[Any]:
    """The values of a parameter as the command line gives them.

    Commas part values, except within quotes and brackets and in the name of a file that exists; ``0..4`` of whole
    numbers is all five. A value is read as JSON or as a Python literal, else it is text.

    Raises:
        ValueError: a range that runs backwards.
    """
    try:
        return [json.loads(text)]
    except ValueError:
        if _names_a_file(text):
            return [text]
    pieces = text.split(",")
    if len(pieces) == 1:
        return _range(text) or [_value(text)]
    values = []
    while pieces:
        taken = 1
        if pieces[0].lstrip()[:1] in tuple("[({\"'"):  # up to where it closes; to the end if nowhere
            ends = range(1, len(pieces) + 1)
            taken = next((n for n in ends if _reads(",".join(pieces[:n]))), len(pieces))
        piece = ",".join(pieces[:taken]).strip()
        values += _range(piece) or [_value(piece)]
        del pieces[:taken]
    return values


def each_once(given: Sequence[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """Names and values as a dict.

    Raises:
        ValueError: a name is given twice.
    """
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times: give all of its values at once, {name}=A,B.")
    return dict(given)


def plan(notebook: Path, axes: Mapping[str, Sequence[Any]], *, tier: str) -> list[Job]:
    """The jobs of a grid, all of them checked; combinations that come to the same run are one job.

    Args:
        notebook: its path.
        axes: the values of each parameter.
        tier: smoke, cpu or gpu.

    Raises:
        ValueError: an unknown parameter, a value that can't be.
    """
    varied = [name for name, values in axes.items() if len(values) > 1]
    jobs = {}
    for combination in itertools.product(*axes.values()):
        parameters = dict(zip(axes, combination, strict=True))
        given = {"tier": tier, **parameters}
        check_parameters(notebook, given)
        identity = identify(notebook, given)[1]
        jobs[identity] = Job(parameters, ", ".join(f"{name}={parameters[name]}" for name in varied), identity)
    return list(jobs.values())


def run_grid(
    notebook: Path, planned: Sequence[Job], *, tier: str, out: str | Path, html: bool = False, jobs: int = 1
) -> int:
    """Run what is missing, a process for each run, with a bar over all on stderr; a failure is told when it happens.

    Args:
        notebook: its path.
        planned: what `plan` made of it.
        tier: smoke, cpu or gpu.
        out: folder of the runs and of their ledger.
        html: also write each run's ``report.html``.
        jobs: runs at a time; with several, each gets its share of the cores.

    Returns:
        The number of runs that failed.

    Raises:
        KeyboardInterrupt: the runs under way have been stopped, their reports written; the second time, killed.
    """
    from tqdm import tqdm

    out = Path(out)
    finished = [e for e in results.read_ledger(out / results.LEDGER) if "identity" in e and not e["error"]]
    wanted = "report.html" if html else ""
    done = {entry["identity"] for entry in finished if (out / entry["id"] / wanted).exists()}
    waiting = [job for job in planned if job.identity not in done]
    if len(waiting) < len(planned):
        print(f"{len(planned) - len(waiting)} of {len(planned)} runs are already there.", file=sys.stderr)
    command = [sys.executable, "-m", "ftkit.cli", "run", str(notebook), "--tier", tier, "--out", str(out)]
    command += ["--html"] if html else []
    jobs = min(jobs, len(waiting))
    env = _limited(jobs)
    running: list[_Running] = []
    failed = 0
    bar = tqdm(total=len(waiting), desc="runs", unit="run", dynamic_ncols=True, disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), command, env))
            time.sleep(0.1)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if error := run.error():
                    failed += 1
                    bar.write(f"{run.job.name} failed: {error}", file=sys.stderr)
                bar.update()
            if sys.stderr.isatty():
                bar.refresh()  # a run takes minutes: the clock goes on
    finally:
        bar.close()
        _stop(running)
    return failed


def _start(job: Job, command: Sequence[str], env: Mapping[str, str]) -> _Running:
    # as JSON, which reads back as one value whatever it holds
    given = [f"--parameter={name}={json.dumps(value)}" for name, value in job.parameters.items()]
    output = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads would fill up)
    # in a session of its own: Ctrl-C in the terminal is for this process to pass on, once
    process = subprocess.Popen(
        [*command, *given],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=output,
        start_new_session=True,
    )
    return _Running(job, process, output)


def _stop(running: Sequence[_Running]) -> None:
    """Let the runs write their reports and end; a second Ctrl-C kills them, their kernels too."""
    import psutil

    try:
        if running:
            print(f"stopping {len(running)} runs; Ctrl-C again kills them", file=sys.stderr)
        for run in running:
            if sys.platform != "win32":  # where the console has told them itself
                run.process.terminate()  # the same to `ftkit` as Ctrl-C, but never ignored in the background
        for run in running:
            run.process.wait()
    except KeyboardInterrupt:
        family = psutil.Process().children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)
        raise


def _limited(jobs: int) -> dict[str, str]:
    """This process's variables, with the threads of each of several jobs limited to its share of the cores."""
    if jobs <= 1:
        return dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // jobs))
    return {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads)}


def _range(text: str) -> list[int]:
    """All numbers of ``A..B``; none where the text is no range."""
    found = RANGE.fullmatch(text)
    if not found:
        return []
    first, last = map(int, found.groups())
    if first > last:
        raise ValueError(f"{text.strip()} runs backwards: write {last}..{first}")
    return list(range(first, last + 1))


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError):  # a set and the like are no values of ours: text
            continue
        return value
    return text


def _reads(text: str) -> bool:
    """Whether the text is a literal, brackets and quotes closed."""
    return _value(text) != text


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        return False
