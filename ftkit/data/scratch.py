"""Files for what would not fit into memory, which last as long as the process that writes them."""

import atexit
import functools
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ftkit.data.assets import registry


def scratch_folder() -> Path:
    """A folder of this process for large files that are read memory-mapped.

    It is in ``scratch`` in the cache (``FTKIT_CACHE``), or, where the cache cannot be written, in the system's folder
    for temporary files. It is removed when this process ends. A process that is killed leaves its folder behind; it is
    removed when the next process makes one.

    Raises:
        OSError: neither place can be written.
    """
    return _make_folder(registry.cache_dir() / "scratch", os.getpid())


@functools.cache
def _make_folder(parent: Path, process: int) -> Path:
    from filelock import FileLock

    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / "lock"):  # or another process could take a new folder for one left behind
            _remove_abandoned(parent)
            folder = Path(tempfile.mkdtemp(prefix="process-", dir=parent))
            lock = FileLock(folder / "lock")  # held to the end of this process, also if it is killed
            lock.acquire()
    except OSError:  # a shared cache, for example, may be read-only
        folder, lock = Path(tempfile.mkdtemp(prefix="ftkit-")), None
    atexit.register(_remove, folder, process, lock)
    return folder


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that have ended."""
    from filelock import FileLock, Timeout

    for folder in parent.glob("process-*"):
        with suppress(Timeout, OSError), FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, process: int, lock: object) -> None:
    """Remove the folder of this process; ``lock`` is named here to be held until then."""
    if os.getpid() == process:  # not a child process, which inherits what is registered
        shutil.rmtree(folder, ignore_errors=True)
