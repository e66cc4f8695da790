"""Run a grid of parameters, one process per run.

A run that the folder's ledger already lists with the same identity and without an error is not repeated.
"""

import _thread
import ast
import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftkit.lab.results import LEDGER, read_ledger
from ftkit.lab.runs.notebooks import check_parameters, identify

MOST_RUNS = 10_000  # of a grid

_RANGE = re.compile(r"\s*(-?\d{1,18})\.\.(-?\d{1,18})\s*")

COMMAND = "from ftkit.cli import main; sys.exit(main(sys.argv[1:]))"  # the script of a child that is a run


@dataclass(frozen=True)
class Job:
    """One run of the grid.

    Attributes:
        parameters: values by name, without the tier.
        name: the parameters that vary within the grid, as text.
        identity: digest that tells it from other runs.
    """

    parameters: dict[str, Any]
    name: str
    identity: str


@dataclass
class Child:
    """A process of Python that ends, as after Ctrl-C, when the process that started it is gone.

    Attributes:
        name: what it does, as text.
        process: the process; its standard input ends with the process that started it.
        output: a file that receives its stderr.
    """

    name: str
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def error(self) -> str | None:
        """Error message of the ended process in one line, None if it succeeded."""
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
    """Parse the values that the command line gives for a parameter.

    Commas separate values, except inside quotes or brackets or when the text is the name of an existing file. ``0..4``
    stands for 0, 1, 2, 3, 4. Each value is read as JSON, else as a Python literal, else it is text.

    Raises:
        ValueError: a range has its larger number first, or there are more values than a grid may have runs.
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
        if pieces[0].lstrip()[:1] in tuple("[({\"'"):  # up to the closing bracket or quote, else to the end
            ends = range(1, len(pieces) + 1)
            taken = next((n for n in ends if _is_literal(",".join(pieces[:n]))), len(pieces))
        piece = ",".join(pieces[:taken]).strip()
        values += _range(piece) or [_value(piece)]
        check_size(len(values))
        del pieces[:taken]
    return values


def check_size(runs: int) -> None:
    """Refuse a grid of too many runs before anything is built for them.

    Raises:
        ValueError: there are more than ``MOST_RUNS``.
    """
    if runs > MOST_RUNS:
        raise ValueError(f"That is {runs:,} runs, and a grid may have {MOST_RUNS:,}: give fewer values.")


def each_once(given: Sequence[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """Turn pairs of name and values into a dictionary.

    Raises:
        ValueError: a name is given more than once.
    """
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times: give all its values at once, {name}=A,B.")
    return dict(given)


def plan(notebook: Path, axes: Mapping[str, Sequence[Any]], *, tier: str) -> list[Job]:
    """List and check the jobs of a grid; combinations that mean the same run become one job.

    Args:
        notebook: path of the notebook.
        axes: values by name of the parameter.
        tier: smoke, cpu or gpu.

    Raises:
        ValueError: a parameter is unknown, a value is not allowed, or these are too many runs.
    """
    check_size(math.prod(len(values) for values in axes.values()))
    varied = [name for name, values in axes.items() if len(values) > 1]
    jobs = {}
    for combination in itertools.product(*axes.values()):
        parameters = dict(zip(axes, combination, strict=True))
        given = {"tier": tier, **parameters}
        check_parameters(notebook, given)
        identity = identify(notebook, given)[1]
        jobs[identity] = Job(parameters, ", ".join(f"{name}={parameters[name]}" for name in varied), identity)
    return list(jobs.values())


def missing_jobs(planned: Sequence[Job], out: Path, *, html: bool) -> list[Job]:
    """Leave out the jobs that a folder's ledger lists as finished, and say how many these are.

    Args:
        planned: jobs from `plan`.
        out: folder of the runs and their ledger.
        html: a run without its ``report.html`` is missing, too.
    """
    finished = [e for e in read_ledger(out / LEDGER) if "identity" in e and not e["error"]]
    wanted = "report.html" if html else ""
    done = {entry["identity"] for entry in finished if (out / entry["id"] / wanted).exists()}
    waiting = [job for job in planned if job.identity not in done]
    if len(waiting) < len(planned):
        print(f"{len(planned) - len(waiting)} of {len(planned)} runs are already done.", file=sys.stderr)
    return waiting


def run_grid(
    notebook: Path,
    planned: Sequence[Job],
    *,
    tier: str,
    out: str | Path,
    html: bool = False,
    jobs: int = 1,
    track: str | None = None,
) -> int:
    """Run the jobs that are not in the ledger yet, one process per run, with a progress bar on stderr.

    A failed run is reported on stderr as soon as it ends.

    Args:
        notebook: path of the notebook.
        planned: jobs from `plan`.
        tier: smoke, cpu or gpu.
        out: folder of the runs and their ledger.
        html: also write ``report.html`` for each run.
        jobs: number of runs at the same time; if there are several, they share the cores equally.
        track: as for ``run_notebook``; a run that is done is not repeated for it.

    Returns:
        Number of failed runs.

    Raises:
        KeyboardInterrupt: after the first Ctrl-C the current runs end and write their reports; after the second they
            are killed.
    """
    from tqdm import tqdm

    waiting = missing_jobs(planned, Path(out), html=html)
    command = ["run", str(notebook), "--tier", tier, "--out", str(out), *(["--html"] if html else [])]
    command += ["--track", track] if track else []
    jobs = min(jobs, len(waiting))
    env = {**os.environ, **(threads_each(jobs) if jobs > 1 else {})}
    running: list[Child] = []
    failed = 0
    bar = tqdm(total=len(waiting), desc="runs", unit="run", dynamic_ncols=True, disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                running.append(start_child(job.name, COMMAND, [*command, *parameter_options(job.parameters)], env=env))
            time.sleep(0.1)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                run.process.stdin.close()
                if error := run.error():
                    failed += 1
                    bar.write(f"{run.name} failed: {error}", file=sys.stderr)
                bar.update()
            if sys.stderr.isatty():
                bar.refresh()  # keep the clock running during a long run
    finally:
        bar.close()
        _stop(running)
    return failed


def parameter_options(parameters: Mapping[str, Any]) -> list[str]:
    """Options of ``ftkit run`` that give these parameters, as JSON, which `values_of` always reads as one value."""
    return [f"--parameter={name}={json.dumps(value)}" for name, value in parameters.items()]


def start_child(
    name: str, script: str, arguments: Sequence[str], *, env: Mapping[str, str], folder: Path | None = None
) -> Child:
    """Start a process of this Python.

    Args:
        name: what it does, as text.
        script: its code, in which ``sys`` is imported.
        arguments: its command line.
        env: its environment variables.
        folder: its current folder; by default that of this process.
    """
    first = "import sys; from ftkit.lab.runs.grid import end_with_parent; end_with_parent(); "
    output = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe would fill up, since nobody reads it)
    # a session of its own: Ctrl-C in the terminal then reaches only this process, which passes it on once
    process = subprocess.Popen(
        [sys.executable, "-c", first + script, *arguments],
        env=env,
        cwd=folder,
        stdin=subprocess.PIPE,  # the operating system closes it when this process is gone
        stdout=subprocess.DEVNULL,
        stderr=output,
        start_new_session=True,
    )
    return Child(name, process, output)


def _stop(running: Sequence[Child]) -> None:
    """Ask the runs to write their reports and end; a second Ctrl-C kills them and their kernels."""
    try:
        for run in running:
            if sys.platform != "win32":  # on Windows the console sends Ctrl-C to them, too
                run.process.terminate()  # `ftkit` treats SIGTERM as Ctrl-C; background processes may ignore SIGINT
        if running:  # said afterwards: the terminal may be gone
            print(f"stopping {len(running)} runs; Ctrl-C again kills them", file=sys.stderr)
        for run in running:
            run.process.wait()
    except KeyboardInterrupt:
        kill_family(os.getpid(), itself=False)
        raise


def kill_family(pid: int, *, itself: bool = True) -> None:
    """Kill a process, if it still runs, and those that it has started, and wait until they are gone.

    Args:
        pid: number of the process.
        itself: False kills only those that it has started.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        family = process.children(recursive=True) + [process] * itself
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=5)


def end_with_parent() -> None:
    """End this process as after Ctrl-C as soon as its standard input ends, in a thread."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        else:
            _thread.interrupt_main()

    threading.Thread(target=watch, daemon=True).start()


def threads_each(jobs: int) -> dict[str, str]:
    """Environment variables that limit each of several runs at the same time to its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // jobs))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads)


def _range(text: str) -> list[int]:
    """All numbers of a range ``A..B``; an empty list if the text is not a range."""
    found = _RANGE.fullmatch(text)
    if not found:
        return []
    first, last = map(int, found.groups())
    if first > last:
        raise ValueError(f"The range {text.strip()} has its larger number first: write {last}..{first}.")
    check_size(last - first + 1)
    return list(range(first, last + 1))


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError):  # what JSON cannot hold, such as a set, is text
            continue
        return value
    return text


def _is_literal(text: str) -> bool:
    """Whether the text is a complete literal, with all brackets and quotes closed."""
    return _value(text) != text


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # for example too long for a file name
        return False
