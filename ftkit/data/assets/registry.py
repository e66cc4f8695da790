"""The pinned models and data sets, and the cache that holds them on the disk.

An archive is downloaded once, verified, and unpacked to ``CACHE/<distribution>-<version>/<asset>/``. A cache
entry appears complete or not at all. Reading one takes no lock and writes nothing.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ftkit.data.assets.archives import Archive, contents, download
from ftkit.errors import AssetError, DataError, did_you_mean, first_line

_ASSETS_FILE = Path(__file__).with_name("assets.toml")

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")  # owner/name or, for a data set, owner/name:config

CHECK_FILES = "check its files with `ftkit assets --verify`, or set FTKIT_CACHE to a new folder and fetch it again"

_INTRO = """\
# Models and data

A card for each asset: what it is, where it comes from, and its known flaws. The files themselves are not in this
folder: `ftkit fetch NAME` downloads them. Assets from the same source are downloaded together.

Generated from `ftkit/data/assets/assets.toml`: edit that file, then run `ftkit assets --cards > data/README.md`.
"""


@dataclasses.dataclass(frozen=True)
class Asset:
    """A model or data set: some files of an archive, and the text of its card."""

    name: str
    kind: str
    title: str
    description: str
    archive: Archive
    root: str  # a folder in the archive
    members: tuple[str, ...]  # globs below that folder
    size: int  # bytes on the disk
    licence: str  # a word or two
    rights: str  # the source of the licence, and its limits
    flaws: str
    citation: str
    hub: str | None = None  # the same model or source on the Hugging Face hub
    language: str | None = None  # of its texts, by ISO 639-1


@functools.cache
def read_registry() -> dict[str, Asset]:
    """Return every asset by name, in the order of ``assets.toml``."""
    table = tomllib.loads(_ASSETS_FILE.read_text(encoding="utf-8"))
    archives = {name: Archive(distribution=name, **facts) for name, facts in table["archives"].items()}
    return {
        name: Asset(name=name, **{**facts, "archive": archives[facts["archive"]], "members": tuple(facts["members"])})
        for name, facts in table["assets"].items()
    }


def names(kind: str | None = None) -> list[str]:
    """Return the names of all assets, or of those of one kind."""
    return [asset.name for asset in read_registry().values() if kind in (None, asset.kind)]


def get(name: str) -> Asset:
    """Return the asset with this name.

    Raises:
        AssetError: there is no such asset; the message suggests the nearest name.
    """
    known = read_registry()
    if name not in known:
        raise AssetError(f"There is no asset {name!r}: {did_you_mean(name, known)} `ftkit assets` lists them all.")
    return known[name]


def cache_dir() -> Path:
    """Return the folder that holds the assets: FTKIT_CACHE, or else ``ftkit`` in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("FTKIT_CACHE") or platformdirs.user_cache_dir("ftkit")).expanduser().absolute()


def offline() -> bool:
    """Return whether FTKIT_OFFLINE forbids the use of the network."""
    return os.environ.get("FTKIT_OFFLINE", "").lower() in ("1", "true")


def is_cached(name: str) -> bool:
    """Return whether the asset is on the disk and every file has its full size."""
    return _problem(get(name)) is None


def fetch(name: str, progress: bool = True) -> Path:
    """Download an asset, unless it is already on the disk.

    Args:
        name: an asset of the registry.
        progress: whether to show progress bars on stderr.

    Returns:
        The folder with the asset's files.

    Raises:
        AssetError: unknown name, no network, FTKIT_OFFLINE is set, wrong hash, full disk, or read-only cache. No
            incomplete files are left behind.
    """
    asset = get(name)
    entry = _entry(asset.archive)
    if problem := _problem(asset):
        if offline():
            raise AssetError(
                f"The asset {name!r} {problem}, and FTKIT_OFFLINE is set: unset it and run `ftkit fetch {name}`, "
                "or set FTKIT_CACHE to a cache that contains it."
            )
        try:
            with _lock(entry):
                if _problem(asset):  # otherwise another process has just fetched it
                    _build(asset.archive, entry, progress)
        except OSError as error:
            raise AssetError(f"The asset {name!r} {problem}, and {_advice(error, asset.archive)}.") from None
    return entry / name


@contextmanager
def reading(name: str) -> Iterator[Path]:
    """Fetch an asset, and turn the errors of a library that reads its files into one that says how to check them.

    Args:
        name: an asset of the registry.

    Yields:
        The folder with the asset's files.

    Raises:
        AssetError: as for ``fetch``; or the files are read in the ``with`` block and cannot be.
    """
    folder = fetch(name)
    try:
        yield folder
    except (AssetError, DataError):
        raise
    except Exception as error:  # libraries raise errors of many types on damaged files
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> AssetError:
    """The error of an asset whose files are there, but are not as they should be."""
    return AssetError(f"The asset {name!r} cannot be read ({first_line(error).rstrip('.')}): {CHECK_FILES}.")


def verify(name: str) -> str | None:
    """Read every file of an asset and compare it with its hash at the time it was unpacked.

    Args:
        name: an asset of the registry.

    Returns:
        A sentence that names the damaged files and what to do; None if they are as they were, or not downloaded.
    """
    entry = _entry(get(name).archive)
    if not entry.exists():
        return None
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["assets"].get(name, {"files": {}})["files"]
        hashes = {entry / name / file: facts["sha256"] for file, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged = [entry / "manifest.json"]
    else:
        damaged = [path for path, sha256 in hashes.items() if not _is_intact(path, sha256)]
    if not damaged:
        return None
    paths = ", ".join(map(str, damaged))
    return f"The asset {name!r} is damaged ({paths}): delete the folder {entry} and run `ftkit fetch {name}`."


def _is_intact(file: Path, sha256: str) -> bool:
    try:
        return _digest(file) == sha256
    except OSError:
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _entry(archive: Archive) -> Path:
    return cache_dir() / f"{archive.distribution}-{archive.version}"


def _assets_in(archive: Archive) -> list[Asset]:
    return [asset for asset in read_registry().values() if asset.archive == archive]


def _problem(asset: Asset) -> str | None:
    """Return why the cached asset cannot be used, worded to follow its name in a sentence, or None if it can."""
    entry = _entry(asset.archive)
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        cached = manifest["assets"].get(asset.name)
        if manifest["sha256"] != asset.archive.sha256 or cached is None or cached["members"] != _patterns(asset):
            return "was cached by another version of ftkit"
        for file, facts in cached["files"].items():
            path = entry / asset.name / file
            if not path.is_file() or path.stat().st_size != facts["size"]:
                return f"is damaged ({path} is missing or has the wrong size; `ftkit assets --verify` checks all files)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # AttributeError: not a JSON object
        return "is not cached"
    return None


def _patterns(asset: Asset) -> list[str]:
    return [f"{asset.root}/{member}" for member in asset.members]


def _advice(error: OSError, archive: Archive) -> str:
    """Return what went wrong when the cache was written and what to do, without a full stop."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = archive.size + sum(asset.size for asset in _assets_in(archive))
        return (
            f"the disk of {cache_dir()} is full: free about {need / 1e6:.0f} MB, "
            "or set FTKIT_CACHE to a folder on another disk"
        )
    return f"{cache_dir()} cannot be written ({first_line(error)}): set FTKIT_CACHE to a folder that you can write to"


@contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Hold the lock of a cache entry. The operating system frees it if the process is killed."""
    from filelock import FileLock, Timeout

    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        print(f"waiting for another process that is fetching {entry.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(archive: Archive, entry: Path, progress: bool) -> None:
    """Download and unpack beside the entry, then move the result into place. The caller holds the lock."""
    partial, old = (entry.with_name(f"{entry.name}.{suffix}") for suffix in ("partial", "old"))
    _remove(partial, old)  # left by a process that was killed
    try:
        partial.mkdir()
        file = download(archive, partial, progress)
        _extract(archive, file, partial)
        file.unlink()
        for weights in list(partial.rglob("*.gguf")):
            from ftkit.data.assets import gguf

            gguf.convert(weights, weights.parent, progress)
            weights.unlink()
        (partial / "manifest.json").write_text(json.dumps(_manifest(archive, partial), indent=1), encoding="utf-8")
        if entry.exists():
            entry.replace(old)
        partial.replace(entry)
    finally:
        _remove(partial, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _manifest(archive: Archive, folder: Path) -> dict[str, object]:
    assets: dict[str, object] = {}
    for asset in _assets_in(archive):
        files = {}
        for path in sorted(p for p in (folder / asset.name).rglob("*") if p.is_file()):
            relative = path.relative_to(folder / asset.name).as_posix()
            files[relative] = {"size": path.stat().st_size, "sha256": _digest(path)}
        assets[asset.name] = {"members": _patterns(asset), "files": files}
    return {"sha256": archive.sha256, "assets": assets}


def _extract(archive: Archive, file: Path, folder: Path) -> None:
    """Copy only the members of the archive's assets, each to ``folder/<asset>/<path below root>``."""
    missing = {(asset, member) for asset in _assets_in(archive) for member in asset.members}
    for name, stream in contents(archive, file):
        for asset in _assets_in(archive):
            below = name.removeprefix(f"{asset.root}/")
            hits = [member for member in asset.members if below != name and fnmatchcase(below, member)]
            if not hits:
                continue
            if ".." in PurePosixPath(below).parts or below.startswith("/") or "\\" in below or ":" in below:
                raise AssetError(f"{archive.filename} has an unsafe member {name!r}: do not use this archive.")
            missing -= {(asset, member) for member in hits}
            target = folder / asset.name / below
            target.parent.mkdir(parents=True, exist_ok=True)
            stream.seek(0)
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out)
    for asset, member in missing:
        raise AssetError(f"{archive.filename} has no member {asset.root}/{member}: fix {asset.name} in assets.toml.")


def cards() -> str:
    """Return the text of ``data/README.md``, which has a card for each asset, in Markdown."""
    return "\n".join([_INTRO, *map(_card, read_registry().values())])


def _card(asset: Asset) -> str:
    archive = asset.archive
    facts = {
        "Kind": asset.kind,
        "Size": f"{_mb(archive.size)} to download, {_mb(asset.size)} on the disk",
        "Licence": f"{asset.licence}. {asset.rights}",
        "Known flaws": asset.flaws,
        "Cite": asset.citation,
        "Source": f"{archive.distribution} {archive.version}, `{archive.filename}`, sha256 `{archive.sha256}`",
    }
    if asset.hub:
        same = "" if asset.kind.endswith(("model", "encoder")) else " (same source; rows and cleaning may differ)"
        facts["On the Hugging Face hub"] = f"`{asset.hub}`{same}"
    lines = [f"- {label}: {' '.join(fact.split())}" for label, fact in facts.items()]
    return f"## {asset.name}: {asset.title}\n\n{asset.description.strip()}\n\n" + "\n".join(lines) + "\n"


def table() -> str:
    """Return a table with one line per asset: name, kind, download size, size on the disk, cached or not, licence."""
    rows = [("name", "kind", "download", "on disk", "cached", "licence")]
    for asset in read_registry().values():
        sizes = _mb(asset.archive.size), _mb(asset.size)
        cached = "yes" if is_cached(asset.name) else "no"
        rows.append((asset.name, asset.kind, *sizes, cached, asset.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (">" if "MB" in cell else "<" for cell in rows[1])
    formats = [f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True)]
    return "\n".join("  ".join(map(str.format, formats, row)).rstrip() for row in rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
