"""The machine, package versions and git revision with which a result was measured."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("ftkit", "torch", "transformers", "accelerate", "datasets", "peft")


def describe_machine() -> dict[str, str]:
    """Describe the machine, the operating system, the package versions and the git revision of ftkit.

    Returns:
        Texts under ``machine``, ``system``, ``versions`` and ``revision``. The revision ends in "(modified)" if files
        differ from it, and is "none" if ftkit does not run from a git checkout.
    """
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} logical cores, {memory:.0f} GiB of memory",
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)]
        ),
        "revision": _revision(),
    }


def gpu_name() -> str | None:
    """Name of the GPU, or None if there is none. Unlike `describe_machine` this imports torch, which takes seconds."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple (MPS)" if torch.backends.mps.is_available() else None


def release_threads() -> None:
    """End the idle OpenMP threads of the calling thread; its next operation starts new ones.

    While they exist, OpenMP counts more threads than cores, and its threads sleep between operations instead of
    spinning. That slows down training in another thread (measured on 2 cores: 10 s instead of 6 s).
    """
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        pause = getattr(library.dynlib, "omp_pause_resource_all", None)  # new in OpenMP 5, missing in Microsoft's
        if pause is not None:
            pause(1)  # omp_pause_soft


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _revision() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # fails if ftkit is installed in an environment that lies inside some other repository
        git("ls-files", "--error-unmatch", "__init__.py")
        # rows that a study adds to its CSV do not change the code that produces them
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)data/studies/*.csv*")
        modified = " (modified)" if changed else ""
        return git("rev-parse", "--short=10", "HEAD") + modified
    except (OSError, subprocess.CalledProcessError):
        return "none"
