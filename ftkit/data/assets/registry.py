"""Which models and data are pinned, and their place on the disk.

An archive is downloaded once, verified, and unpacked to ``CACHE/<distribution>-<version>/<asset>/``. A cache
entry appears complete or not at all; reading one takes no lock and writes nothing.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ftkit.data.assets.archives import Archive, contents, download
from ftkit.errors import AssetError, nearest

REGISTRY = Path(__file__).with_name("assets.toml")


@dataclasses.dataclass(frozen=True)
class Asset:
    """One model or data set: ``members`` (globs below the folder ``root``) of an archive, and what is known of it."""

    name: str
    kind: str
    title: str
    description: str
    archive: Archive
    root: str
    members: tuple[str, ...]
    size: int  # bytes on the disk
    licence: str  # in a word or two
    rights: str  # what that means, who says so
    flaws: str
    citation: str
    hub: str | None = None


@functools.cache
def registry() -> dict[str, Asset]:
    """Every asset by name, in the order of ``assets.toml``."""
    table = tomllib.loads(REGISTRY.read_text(encoding="utf-8"))
    archives = {name: Archive(distribution=name, **facts) for name, facts in table["archives"].items()}
    return {
        name: Asset(name=name, **{**facts, "archive": archives[facts["archive"]], "members": tuple(facts["members"])})
        for name, facts in table["assets"].items()
    }


def names(kind: str | None = None) -> list[str]:
    """Names of all assets, or of those of one kind."""
    return [asset.name for asset in registry().values() if kind in (None, asset.kind)]


def get(name: str) -> Asset:
    """The asset of that name; raises AssetError, with the nearest name, if there is none."""
    if name in registry():
        return registry()[name]
    raise AssetError(
        f"there is no asset {name!r}: did you mean {nearest(name, registry())!r}? `ftkit assets` lists them all"
    )


def cache_dir() -> Path:
    """Where assets are kept: FTKIT_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("FTKIT_CACHE") or platformdirs.user_cache_dir("ftkit")).expanduser().absolute()


def offline() -> bool:
    """Whether FTKIT_OFFLINE forbids the network."""
    return os.environ.get("FTKIT_OFFLINE", "").lower() in ("1", "true")


def is_cached(name: str) -> bool:
    """Whether the asset is on the disk, with every file at its full size."""
    return _problem(get(name)) is None


def fetch(name: str, progress: bool = True) -> Path:
    """Get an asset onto the disk, unless it is there.

    Args:
        name: an asset of the registry.
        progress: whether to show progress bars on stderr.

    Returns:
        The folder with the asset's files.

    Raises:
        AssetError: unknown name, no network, FTKIT_OFFLINE, wrong hash, full disk, read-only cache: one line
            that says what to do. Nothing half-written is left.
    """
    asset = get(name)
    entry = _entry(asset.archive)
    if problem := _problem(asset):
        if offline():
            raise AssetError(
                f"{name} {problem}, and FTKIT_OFFLINE is set: unset it and run `ftkit fetch {name}`, "
                "or set FTKIT_CACHE to a cache that holds it"
            )
        try:
            with _lock(entry):
                if _problem(asset):  # else another process has just made it
                    _build(asset.archive, entry, progress)
        except OSError as error:
            raise AssetError(f"{name} {problem}, and {_advice(error, asset.archive)}") from None
    return entry / name


def _entry(archive: Archive) -> Path:
    return cache_dir() / f"{archive.distribution}-{archive.version}"


def _assets_in(archive: Archive) -> list[Asset]:
    return [asset for asset in registry().values() if asset.archive == archive]


def _problem(asset: Asset) -> str | None:
    """What keeps the cached asset from being used, to follow its name in a sentence; None if nothing does."""
    entry = _entry(asset.archive)
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "is not cached"
    made = manifest["assets"].get(asset.name)
    if manifest["sha256"] != asset.archive.sha256 or made is None or made["members"] != _recipe(asset):
        return "is cached by another version of ftkit"
    for file, facts in made["files"].items():
        path = entry / asset.name / file
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return f"is damaged ({path} is missing or not of its size)"
    return None


def _recipe(asset: Asset) -> list[str]:
    return [f"{asset.root}/{member}" for member in asset.members]


def _advice(error: OSError, archive: Archive) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = archive.size + sum(asset.size for asset in _assets_in(archive))
        return (
            f"the disk of {cache_dir()} is full: free about {need / 1e6:.0f} MB, "
            "or set FTKIT_CACHE to a folder on another disk"
        )
    return f"{cache_dir()} cannot be written ({_line(str(error))}): set FTKIT_CACHE to a folder that you can write"


@contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Hold the one lock of a cache entry; the system frees it when a process is killed."""
    from filelock import FileLock, Timeout

    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        print(f"waiting for another process that fetches {entry.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(archive: Archive, entry: Path, progress: bool) -> None:
    """Download and unpack beside the entry, then put the whole in its place. Needs the lock."""
    partial, old = (entry.with_name(f"{entry.name}.{suffix}") for suffix in ("partial", "old"))
    _remove(partial, old)  # what a killed process left
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
    made: dict[str, object] = {}
    for asset in _assets_in(archive):
        files = {}
        for path in sorted(p for p in (folder / asset.name).rglob("*") if p.is_file()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            relative = path.relative_to(folder / asset.name).as_posix()
            files[relative] = {"size": path.stat().st_size, "sha256": digest}
        made[asset.name] = {"members": _recipe(asset), "files": files}
    return {"sha256": archive.sha256, "assets": made}


def _extract(archive: Archive, file: Path, folder: Path) -> None:
    """Copy the members of every asset of the archive to ``folder/<asset>/<path below root>``, and nothing else."""
    missing = {(asset, member) for asset in _assets_in(archive) for member in asset.members}
    for name, stream in contents(archive, file):
        for asset in _assets_in(archive):
            below = name.removeprefix(f"{asset.root}/")
            hits = [member for member in asset.members if below != name and fnmatchcase(below, member)]
            if not hits:
                continue
            if ".." in PurePosixPath(below).parts or below.startswith("/") or "\\" in below or ":" in below:
                raise AssetError(f"{archive.filename} has an unsafe member {name!r}: do not use this archive")
            missing -= {(asset, member) for member in hits}
            target = folder / asset.name / below
            target.parent.mkdir(parents=True, exist_ok=True)
            stream.seek(0)
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out)
    for asset, member in missing:
        raise AssetError(f"{archive.filename} has no member {asset.root}/{member}: correct {asset.name} in assets.toml")


def cards() -> str:
    """The text of ``data/README.md``: a card for each asset, in Markdown."""
    intro = (
        "# Models and data\n\n"
        "A card for each asset: what it is, where it comes from, what is wrong with it. The files themselves are not\n"
        "in this folder; `ftkit fetch NAME` gets them. Generated from `ftkit/assets.toml` by `ftkit assets --cards`:\n"
        "edit that, not this. Assets of one source are downloaded together.\n"
    )
    return "\n".join([intro, *map(_card, registry().values())])


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
    lines = [f"- {label}: {_line(fact)}" for label, fact in facts.items()]
    return f"## {asset.name}: {asset.title}\n\n{asset.description.strip()}\n\n" + "\n".join(lines) + "\n"


def table() -> str:
    """All assets, one a line: name, kind, size to download, size on the disk, whether it is cached, licence."""
    rows = [("name", "kind", "download", "on disk", "cached", "licence")]
    for asset in registry().values():
        sizes = _mb(asset.archive.size), _mb(asset.size)
        cached = "yes" if is_cached(asset.name) else "no"
        rows.append((asset.name, asset.kind, *sizes, cached, asset.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = (">" if "MB" in cell else "<" for cell in rows[1])
    formats = [f"{{:{side}{width}}}" for side, width in zip(aligned, widths, strict=True)]
    return "\n".join("  ".join(map(str.format, formats, row)).rstrip() for row in rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _line(text: str) -> str:
    return " ".join(text.split())
