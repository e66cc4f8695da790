"""Run a grid on the machines of a dask.distributed cluster.

A worker runs each call in a process of its own, in a temporary folder to which the files that it needs were sent, and
sends back what the process wrote. Workers need ftkit, but no common disk.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import socket
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import ftkit
from ftkit.errors import ClusterError, first_line
from ftkit.lab.results import LEDGER, append_to_ledger, read_ledger, write_whole, writing
from ftkit.lab.runs.grid import COMMAND, Job, kill_family, missing_jobs, parameter_options, start_child, threads_each
from ftkit.lab.runs.notebooks import settings_text

if TYPE_CHECKING:
    from distributed import Client, Future

MOST_BYTES = 2**30  # of the files that are sent to a run

_ADDRESS = re.compile(r"(tcp|tls)://([^/\s]+):(\d{1,5})")

_ANSWER = 10.0  # seconds within which a scheduler must answer
_PATIENCE = 60.0  # seconds without any worker until the runs are given up

_NOTEBOOK, _HERE, _OUT = "notebook", "here", "out"  # folders of a run on a worker; `here` is its current folder

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """A call of Python on a worker.

    Attributes:
        item: what it is for; comes back with the result.
        name: the same as text.
        script, arguments: see `start_child`; the current folder is ``here``, and results are written to ``../out``.
        files: what is unpacked beside it, from `Cluster.send`.
    """

    item: T
    name: str
    script: str
    arguments: Sequence[str]
    files: "Sequence[Future]"


class Returned(NamedTuple):
    """What comes back from a call.

    Attributes:
        error: error message in one line, None if it succeeded.
        packed: the folder ``out`` as an archive; empty if the worker died.
    """

    error: str | None
    packed: bytes


def run_grid_on_cluster(
    notebook: Path, planned: Sequence[Job], *, tier: str, out: str | Path, scheduler: str, html: bool = False
) -> int:
    """Run the jobs that are not in the ledger yet on the workers of a cluster, as `run_grid` does on this machine.

    The notebook is sent to the workers, and so are the files and folders that parameters name. Each run's folder comes
    back into ``out``, and this process adds its line to the ledger, with the parameters and the identity that it has
    here. A run whose worker dies is started again on another one, as often as the scheduler allows
    (``distributed.scheduler.allowed-failures``), and then counts as failed.

    Args:
        notebook: path of the notebook.
        planned: jobs from `plan`.
        tier: smoke, cpu or gpu.
        out: folder of the runs and their ledger.
        scheduler: address of the scheduler, ``tcp://host:port``.
        html: also write ``report.html`` for each run.

    Returns:
        Number of failed runs.

    Raises:
        ClusterError: see `connect` and `Cluster.send`, or the scheduler or all workers have gone. The runs that have
            ended are kept.
        OSError: ``out`` cannot be written.
        KeyboardInterrupt: after Ctrl-C; the workers end the current runs, of which nothing is kept.
    """
    from tqdm import tqdm

    out = Path(out)
    waiting = missing_jobs(planned, out, html=html)
    if not waiting:
        return 0
    failed = 0
    with connect(scheduler) as cluster:
        name = f"{_NOTEBOOK}/{notebook.name}"
        itself = cluster.send({name: notebook})
        sent: dict[str, Future] = {}
        calls = []
        for job in waiting:
            given, files = as_sent(job.parameters)
            for place in files.keys() - sent.keys():
                sent[place] = cluster.send({f"{_HERE}/{place}": files[place]})
            command = ["run", f"../{name}", "--tier", tier, "--out", f"../{_OUT}", *(["--html"] if html else [])]
            command += parameter_options(given)
            calls.append(Call((job, given), job.name, COMMAND, command, [itself, *map(sent.get, files)]))
        with tqdm(total=len(waiting), desc="runs", unit="run", dynamic_ncols=True) as bar:
            for call, returned in cluster.run(calls, bar):
                job, given = call.item
                if error := _receive(notebook, job, given, returned, out=out, tier=tier):
                    failed += 1
                    bar.write(f"{call.name} failed: {error}", file=sys.stderr)
                bar.update()
    return failed


def as_sent(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Parameters as a worker gets them, and the files and folders that they name, by their place there."""
    files: dict[str, Path] = {}

    def placed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [placed(item) for item in value]
        path = _existing(value)
        if path is None:
            return value
        place = PurePath(value)
        if place.is_absolute() or ".." in place.parts or "\\" in value:  # a worker may have no such folder
            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]
            place = PurePath("sent", digest, path.resolve().name)
            value = place.as_posix()
        files[place.as_posix()] = path
        return value

    return {name: placed(value) for name, value in parameters.items()}, files


def _existing(value: Any) -> Path | None:
    try:
        return Path(value) if isinstance(value, str) and value and Path(value).exists() else None
    except (OSError, ValueError):  # not a path, for example a long text
        return None


def _receive(
    notebook: Path, job: Job, given: Mapping[str, Any], returned: Returned, *, out: Path, tier: str
) -> str | None:
    """Put a run that came back beside the others and into the ledger; return its error."""
    if not returned.packed:
        return returned.error
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as temporary:
        with writing(out):
            unpack(returned.packed, Path(temporary))
        arrived = Path(temporary) / _OUT
        entry = next(iter(read_ledger(arrived / LEDGER)), None)
        folder = next((path for path in arrived.iterdir() if path.is_dir()), None)
        if folder is None:
            return returned.error or "it left no folder"
        parameters = {"tier": tier, **job.parameters}
        write_whole(folder / "settings.yaml", settings_text(notebook, parameters))
        moved = {name: value for name, value in job.parameters.items() if value != given[name]}
        if entry and moved:
            _with_values(entry["settings"], moved, given)
            if entry["settings"]:
                record = {"settings": entry["settings"], "metrics": entry["metrics"]}
                write_whole(folder / "metrics.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        run_id = _move(folder, out, folder.name[:-6] + job.identity[:6])
        if entry:
            append_to_ledger(out / LEDGER, entry | {"id": run_id, "parameters": parameters, "identity": job.identity})
    return returned.error or (None if entry else "it left no line for the ledger")


def _with_values(settings: dict[str, Any] | None, here: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Give the settings that a worker used the values that they have on this machine."""
    for name, value in here.items():
        if settings and settings.get(name) == given[name]:
            settings[name] = value


def _move(folder: Path, out: Path, first: str) -> str:
    """Move a run into ``out`` under a name that nothing has there yet; return the name."""
    run_id, attempt = first, 1
    while (out / run_id).exists():
        attempt += 1
        run_id = f"{first}-{attempt}"
    with writing(out / run_id):
        folder.rename(out / run_id)
    return run_id


class Cluster:
    """A dask.distributed cluster whose workers have the same ftkit and Python as this process; see `connect`."""

    def __init__(self, client: "Client", address: str) -> None:
        self._client, self._address = client, address
        self._running: dict[Future, Call] = {}
        self._checked: set[str] = set()
        self._sent = 0

    def send(self, files: Mapping[str, Path | bytes]) -> "Future":
        """Send files or whole folders to all workers.

        Args:
            files: a path here, or a content, by the path relative to the folder of each `Call` that gets them.

        Raises:
            ClusterError: all that is sent is more than ``MOST_BYTES``.
            OSError: a file cannot be read.
        """
        for place, source in files.items():
            for size in _sizes(source):
                self._sent += size
                if self._sent > MOST_BYTES:
                    raise ClusterError(
                        f"{source if isinstance(source, Path) else place} is too large, with what else is sent to the "
                        f"workers more than {MOST_BYTES / 2**30:g} GiB: give less data, or run it with --jobs."
                    )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")
            # a task: where the worker that holds its result dies, the scheduler makes it again on another one
            sent = self._client.submit(bytes, pack(files), pure=False)
        with contextlib.suppress(Exception):  # dask would otherwise prefer the worker that holds it
            self._client.replicate([sent])
        return sent

    def run(self, calls: Iterable[Call[T]], bar: Any = None) -> Iterator[tuple[Call[T], Returned]]:
        """Run calls, as many at a time as the workers have threads, and yield each with what it returned when it ends.

        Args:
            calls: the calls; each is asked for when a worker is free to run it.
            bar: a bar of tqdm, whose clock is kept running.

        Raises:
            ClusterError: the scheduler or all workers have gone, or a new worker has another version.
        """
        calls = iter(calls)
        slots, looked, seen = {}, -math.inf, time.monotonic()
        while True:
            now = time.monotonic()
            if now - looked > 1:
                slots, looked = self._slots(), now
                seen = now if slots else seen
                if now - seen > _PATIENCE:
                    raise ClusterError(
                        f"All workers of {self._address} have gone: start some, and give the same command again."
                    )
            while len(self._running) < sum(slots.values()) and (call := next(calls, None)) is not None:
                self._submit(call, slots)
            if slots and not self._running:
                return
            for future in [future for future in self._running if future.done()]:
                returned = self._returned(future)
                yield self._running.pop(future), returned
            time.sleep(0.1)
            if bar is not None and sys.stderr.isatty():
                bar.refresh()

    def check(self) -> None:
        """Compare the versions of the workers that are new with those of this process.

        Raises:
            ClusterError: a worker has no ftkit, or another ftkit or Python, or the scheduler does not answer.
        """
        new = self.workers().keys() - self._checked
        found = self._client.run(versions_here, workers=list(new), on_error="return") if new else {}
        ours = versions_here()
        for address, theirs in found.items():
            if isinstance(theirs, OSError):  # it has just gone
                continue
            if isinstance(theirs, Exception):
                raise ClusterError(
                    f"The worker {address} cannot run this version of ftkit ({first_line(theirs)}): install "
                    f"ftkit {ftkit.__version__} for it, as on this machine."
                )
            for name in ours:
                if theirs[name] != ours[name]:
                    raise ClusterError(
                        f"The worker {address} has {name} {theirs[name]} and this machine has {ours[name]}: install "
                        "the same on all machines."
                    )
            self._checked.add(address)

    def stop(self) -> None:
        """Have the workers end the calls that still run; without a scheduler they do so by themselves."""
        if self._running and self._client.status == "running":
            print(f"stopping {len(self._running)} runs", file=sys.stderr)
            with contextlib.suppress(Exception):  # the scheduler has just gone
                self._client.cancel(list(self._running))

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the scheduler knows of its workers, by address."""
        try:
            if self._client.status == "running":
                return dict(self._client.scheduler_info()["workers"])
        except Exception:  # of several kinds
            pass
        raise self._gone()

    def _gone(self) -> ClusterError:
        return ClusterError(f"The scheduler {self._address} has gone: start it, and give the same command again.")

    def _slots(self) -> dict[str, int]:
        """Number of threads of all workers of each host; new workers are checked."""
        workers = self.workers()
        if workers.keys() - self._checked:
            self.check()
        slots: dict[str, int] = {}
        for worker in workers.values():
            slots[worker["host"]] = slots.get(worker["host"], 0) + worker["nthreads"]
        return slots

    def _submit(self, call: Call, slots: Mapping[str, int]) -> None:
        arguments = (call.script, list(call.arguments), dict(slots), list(call.files))
        future = self._client.submit(run_here, *arguments, pure=False)
        self._running[future] = call

    def _returned(self, future: "Future") -> Returned:
        from concurrent.futures import CancelledError

        from distributed import KilledWorker

        try:
            return Returned(*future.result())
        except KilledWorker as error:
            times = error.allowed_failures + 1
            tried = "the worker that ran it died" if times == 1 else f"the {times} workers that tried it died"
            return Returned(f"{tried}, perhaps out of memory: give workers more memory or fewer threads", b"")
        except CancelledError:
            raise self._gone() from None
        except Exception as error:  # of the worker, for example a full disk
            return Returned(f"{type(error).__name__} on the worker: {first_line(error)}", b"")


@contextlib.contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Connect to the scheduler of a dask.distributed cluster; in the end, the calls that still run are stopped.

    Args:
        address: ``tcp://host:port``.

    Raises:
        ClusterError: distributed is not installed, there is no scheduler at this address, it has no workers, or one of
            them has no ftkit, or another version of ftkit or Python.
    """
    _knock(address)
    try:
        from distributed import Client
    except ImportError:
        cure = 'install it here and on the workers, by pip install "distributed>=2026.8"'
        raise ClusterError(f"A cluster needs the package distributed: {cure}.") from None
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what matters is in the errors
    client = Client.__new__(Client)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `check` compares the versions
            client.__init__(address, timeout=_ANSWER, set_as_default=False)
    except Exception as error:  # of several kinds
        client.status = "closed"  # else it would wait for an answer once more, and print a traceback
        raise _no_scheduler(address, error) from None
    cluster = Cluster(client, address)
    try:
        if not cluster.workers():
            raise ClusterError(f"The scheduler {address} has no workers: start some, by dask worker {address}.")
        cluster.check()
        yield cluster
    finally:
        cluster.stop()
        with contextlib.suppress(Exception):
            client.close()


def _knock(address: str) -> None:
    """Refuse an address at which no scheduler listens; dask itself would wait long, or for ever."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise ClusterError(f"{address!r} is not the address of a scheduler: give tcp://host:port.")
    protocol, host, port = found.groups()
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
            # a scheduler speaks first: how many bytes follow, in 8 bytes, and these are few
            if protocol == "tcp" and not 0 < int.from_bytes(connection.recv(8), "little") < 2**20:
                raise ConnectionError("something else answers")
    except (OSError, OverflowError) as error:
        raise _no_scheduler(address, error) from None


def _no_scheduler(address: str, error: Exception) -> ClusterError:
    why = getattr(error, "strerror", None) or first_line(error).rstrip(".")
    return ClusterError(
        f"No scheduler answers at {address} ({why}): give the address that `dask scheduler` prints, tcp://host:port."
    )


def versions_here() -> dict[str, str]:
    """Versions of Python and ftkit in this process, with a digest of the source of ftkit."""
    folder = Path(ftkit.__file__).parent
    source = hashlib.sha256()
    for path in sorted(path for ending in ("py", "toml", "j2") for path in folder.rglob(f"*.{ending}")):
        source.update(path.relative_to(folder).as_posix().encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "ftkit": f"{ftkit.__version__} (source {source.hexdigest()[:8]})"}


def run_here(script: str, arguments: Sequence[str], slots: Mapping[str, int], files: Sequence[bytes]) -> tuple:
    """Run a call on this worker, in one of its threads, and return the two parts of `Returned`.

    Args:
        script, arguments: see `Call`.
        slots: number of threads of all workers by host; the runs of a host share its cores.
        files: what is unpacked first.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    env = {**os.environ, **threads_each(slots.get(urlsplit(worker.address).hostname, worker.state.nthreads))}
    # in the worker's own folder, which dask clears after a worker that was killed
    with tempfile.TemporaryDirectory(dir=worker.local_directory, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        for packed in files:
            unpack(packed, folder)
        for name in (_HERE, _OUT):
            (folder / name).mkdir(exist_ok=True)
        child = start_child("", script, arguments, env=env, folder=folder / _HERE)
        try:
            while child.process.poll() is None:
                task = worker.state.tasks.get(key)
                if task is None or task.state not in ("executing", "long-running") or worker.status.name == "closing":
                    return "cancelled", b""  # which nobody reads
                time.sleep(0.1)
        finally:
            child.process.stdin.close()
            if child.process.poll() is None:
                kill_family(child.process.pid)
                child.process.wait()
        return child.error(), pack({_OUT: folder / _OUT})


def pack(files: Mapping[str, Path | bytes]) -> bytes:
    """Pack files, folders or contents, by their path in the archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as archive:
        for place, source in files.items():
            if isinstance(source, bytes):
                member = tarfile.TarInfo(place)
                member.size = len(source)
                archive.addfile(member, io.BytesIO(source))
            else:
                archive.add(source, place)
    return packed.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Unpack what `pack` has packed."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        # from Python 3.11.4 on; nothing is then written outside the folder
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)


def read_packed(packed: bytes, place: str) -> bytes:
    """Content of one file of what `pack` has packed."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return archive.extractfile(place).read()


def _sizes(source: Path | bytes) -> Iterator[int]:
    """Sizes of the files of a source, in bytes."""
    if isinstance(source, bytes):
        yield len(source)
    elif source.is_dir():
        yield from (path.stat().st_size for path in source.rglob("*") if path.is_file())
    else:
        yield source.stat().st_size
