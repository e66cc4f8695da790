"""The machine, versions and revision that a result was measured with."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ftkit", "torch", "transformers", "accelerate", "datasets", "peft")


def describe_machine() -> dict[str, str]:
    """Texts under ``machine``, ``system``, ``versions`` and ``revision``.

    The revision is that of the checkout that ftkit runs from, with "(modified)" where files differ from it,
    and "none" where ftkit is an installed package.
    """
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} logical cores, {memory:.0f} GiB of memory",
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "revision": _revision(),
    }


def gpu_name() -> str | None:
    """The name of the GPU, None where there is none. Apart, for it takes torch, whose import takes seconds."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple (MPS)" if torch.backends.mps.is_available() else None


def release_threads() -> None:
    """Let go of the OpenMP threads that the calling thread's operations left waiting; its next one starts new ones.

    As long as they are there, an OpenMP library counts more threads than cores and lets none of them wait busily,
    which slows the steps of a training in another thread (on 2 cores measured: 10 s instead of 6).
    """
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        pause = getattr(library.dynlib, "omp_pause_resource_all", None)  # of OpenMP 5; Microsoft's has none
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
        git("ls-files", "--error-unmatch", "__init__.py")  # not some repository that a .venv happens to lie in
        # a study that grows row by row does not change what it is made with
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)data/studies/*.csv")
        modified = " (modified)" if changed else ""
        return git("rev-parse", "--short=10", "HEAD") + modified
    except (OSError, subprocess.CalledProcessError):
        return "none"
