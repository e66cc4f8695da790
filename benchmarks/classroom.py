"""What a class needs on one server: several students run lesson 01 at once on this machine, against one alone.

Each student is a process that executes the notebook in a kernel of its own, from imports to the last cell; all start
at the same time. Each computes on one core (``OMP_NUM_THREADS=1``), as the guide for instructors advises;
``all_threads`` is the same with torch's own choice, which is all cores for each. Measured is the kernel, twice a
second, from /proc (so on Linux only):

    private   memory that no other process uses; every further student adds as much
    shared    what the kernels use together, such as the code of torch; it is there once
    together  the sum of the proportional set sizes (PSS) of all kernels, at its peak: what they really take

Scaled from that to a class of 30: memory adds up, ``30 * (private + an idle JupyterLab server) + shared``, as if all
were at their peak at once. Time is that of the four here, times 30 / 4, times the cores of this machine divided by
those of the server; but never less than the time of one alone. ``--write`` records the figures of the tier in
data/measured.json, and puts the table of both tiers into docs/instructors.md.

Leave the machine idle.

    python benchmarks/classroom.py [--tier smoke] [--write]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import psutil

from ftkit.lab.course.guide import GUIDE, MEASURED, class_cores, class_memory_mib, class_seconds, filled

NOTEBOOK = "01_full_fine_tuning"
STUDENTS = 4
INTERVAL = 0.5  # seconds between two looks


def run_together(students: int, tier: str, threads: int | None) -> dict[str, float]:
    """Let so many students run the lesson at once, and return what that takes; None lets torch choose the threads."""
    peaks: list[dict[str, float]] = [{"private": 0.0, "cpu_seconds": 0.0} for _ in range(students)]
    together, shared = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(i) for i in range(students)]
        command = [sys.executable, "-m", "ftkit.cli", "run", NOTEBOOK, "--tier", tier, "--out"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        env |= {"FTKIT_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        runs = [subprocess.Popen([*command, str(out)], env=env, **quiet) for out in outs]
        try:
            while any(run.poll() is None for run in runs):
                private, pss = 0.0, 0.0
                for run, peak in zip(runs, peaks, strict=True):
                    now = look_at_kernel(run.pid)
                    private += now["private"]
                    pss += now["pss"]
                    for name in peak:
                        peak[name] = max(peak[name], now[name])
                if pss > together:
                    together, shared = pss, pss - private
                time.sleep(INTERVAL)
        finally:
            for run in runs:
                run.terminate()  # it ends its kernel
                run.wait()
        entries = [json.loads((out / "ledger.jsonl").read_text(encoding="utf-8")) for out in outs]
    if failed := [entry["error"] for entry in entries if entry["error"]]:
        raise SystemExit(f"{len(failed)} of {students} runs failed: {failed[0]}")
    return {
        "seconds": round(mean(entry["seconds"] for entry in entries), 1),
        "cpu_seconds": round(mean(peak["cpu_seconds"] for peak in peaks), 1),
        "private_mib": round(mean(peak["private"] for peak in peaks)),
        "shared_mib": round(shared),
        "together_mib": round(together),
    }


def look_at_kernel(pid: int) -> dict[str, float]:
    """Memory in MiB and processor seconds of what this process has started, which is the kernel and its children."""
    found = {"private": 0.0, "pss": 0.0, "cpu_seconds": 0.0}
    try:
        for process in psutil.Process(pid).children(recursive=True):
            times, (private, pss) = process.cpu_times(), memory_of(process.pid)
            found["cpu_seconds"] += times.user + times.system
            found["private"] += private
            found["pss"] += pss
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):  # it has just ended
        pass
    return found


def memory_of(pid: int) -> tuple[float, float]:
    """Private and proportional memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, kib["Pss"] / 1024


def server_mib() -> float:
    """Private memory of a JupyterLab server that has started and has no kernel yet."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-browser", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
        if os.geteuid() == 0:
            options.append("--allow-root")
        command = [sys.executable, "-m", "jupyterlab", *options]
        env = os.environ | {"JUPYTER_RUNTIME_DIR": folder}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=env, **quiet) as server:
            while not list(Path(folder).glob("jpserver-*.json")):
                if server.poll() is not None:
                    raise SystemExit("JupyterLab does not start: try `jupyter lab --no-browser` to see why.")
                time.sleep(INTERVAL)
            time.sleep(5)  # its extensions are loaded a moment later
            private, _ = memory_of(server.pid)
            server.terminate()
    return private


def write(tier: str, figures: dict[str, object]) -> None:
    """Record the figures of a tier, and put the table of both tiers into the guide."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    measured["classroom"] = {**measured.get("classroom", {}), tier: figures}
    MEASURED.write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=["smoke", "cpu"], default="smoke")
    parser.add_argument("--write", action="store_true", help="record the figures, and put them into the guide")
    arguments = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        raise SystemExit("This machine has no /proc/PID/smaps_rollup: run this on Linux.")
    if os.getloadavg()[0] > 0.5:
        print("The machine is not idle: these figures will be wrong.", file=sys.stderr)
    figures = {
        "cores": psutil.cpu_count(),
        "students": STUDENTS,
        "alone": run_together(1, arguments.tier, threads=1),
        "together": run_together(STUDENTS, arguments.tier, threads=1),
        "all_threads": run_together(STUDENTS, arguments.tier, threads=None),
        "server_mib": round(server_mib()),
    }
    if arguments.write:
        write(arguments.tier, figures)
    scaled = {
        "class_memory_mib": round(class_memory_mib(figures)),
        "class_minutes_on_16_cores": round(class_seconds(figures, 16) / 60, 1),
        "class_cores": round(class_cores(figures), 1),
    }
    print(json.dumps({"tier": arguments.tier, **figures, **scaled}))


if __name__ == "__main__":
    main()
