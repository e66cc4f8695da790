"""What a result was measured on: machine, versions, git revision. No path, no host name, no user name."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ftkit", "torch", "transformers", "accelerate", "datasets", "peft")


def describe_machine() -> dict[str, str]:
    """Texts under ``machine``, ``GPU``, ``system``, ``versions`` and ``revision``.

    The revision is that of the checkout that ftkit runs from, with "(modified)" where files differ from it,
    and "none" where ftkit is an installed package.
    """
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} logical cores, {memory:.0f} GiB of memory",
        "GPU": _gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "revision": _revision(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple (MPS)" if torch.backends.mps.is_available() else "none"


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
