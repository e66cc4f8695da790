"""Find, download, verify and read a pinned archive of the package index.

An archive is opened only after its hash has been verified, and none of its code is ever run. This is why pip does not
download it: for a source archive, pip would run the ``setup.py`` inside, only to learn the metadata.
"""

import ast
import hashlib
import logging
import ssl
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ftkit.errors import AssetError, first_line

if TYPE_CHECKING:
    from unearth import Link
    from unearth.fetchers import PyPIClient

_ATTEMPTS = 3
_PAUSE = 1.0  # seconds between two attempts


@dataclass(frozen=True)
class Archive:
    """A wheel or source archive of the package index."""

    distribution: str
    version: str
    filename: str
    sha256: str
    size: int  # bytes
    inner: str | None = None  # path of a tar inside the archive, if that holds the files


def download(archive: Archive, folder: Path, progress: bool) -> Path:
    """Download an archive from the indexes and folders in pip's configuration.

    Args:
        archive: the archive.
        folder: an existing folder for the file.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The path of the verified file.

    Raises:
        AssetError: no index has the file, every attempt failed, or the hash is wrong.
        OSError: the file cannot be written.
    """
    import httpx2

    config = _pip_config()
    sources = _sources(config)
    error = ""
    with _client(config, [url for kind, url in sources if kind == "index_urls"]) as client:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            links, refusals, failures = _find(client, sources, archive)
            if not links and not failures:
                reason = "; ".join(refusals) or "none is set"
                raise AssetError(
                    f"{archive.filename} is on none of pip's indexes and folders ({reason}): check "
                    "index-url, extra-index-url, find-links and no-index in `pip config list`."
                )
            if not links:
                error = failures[0]
                continue
            link = links[attempt % len(links)]
            path = folder / archive.filename
            try:
                _stream(client, link, archive, path, progress)
                return path
            except (httpx2.HTTPError, ConnectionError) as failure:
                error = f"{link.redacted}: {first_line(failure)}"
    raise AssetError(
        f"{archive.filename} could not be downloaded ({error}): "
        "check the network, and index-url, proxy and cert in `pip config list`."
    )


def contents(archive: Archive, path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and the content of each regular file in a downloaded archive, or in its ``inner`` tar."""
    with path.open("rb") as stream:
        for name, content in _zip_files(stream) if path.suffix == ".whl" else _tar_files(stream):
            if archive.inner is None:
                yield name, content
            elif name == archive.inner:
                yield from _tar_files(content)


def _zip_files(stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as content:
                    yield info.filename, content


def _tar_files(stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=stream) as archive:
        for info in archive:
            if info.isfile():
                yield info.name, archive.extractfile(info)


def _pip_config() -> dict[str, str]:
    """Return the options that ``pip download`` would use, from pip's files and the variables PIP_*, without dashes."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        reason = (listed.stderr.strip() or "no message").splitlines()[-1]
        raise AssetError(f"pip's configuration cannot be read ({reason}): fix what `pip config list` reports.")
    lines = [line.partition("=") for line in listed.stdout.splitlines()]
    config: dict[str, str] = {}
    for section in ("global.", "download.", ":env:."):  # a later section wins, as in pip
        for key, _, value in lines:
            if key.startswith(section):
                config[key.removeprefix(section)] = ast.literal_eval(value)
    return config


def _sources(config: dict[str, str]) -> list[tuple[str, str]]:
    """Return all places to look, in pip's order, as pairs (``"find_links"`` or ``"index_urls"``, folder or URL)."""
    found = [("find_links", str(Path(x).expanduser()) if "://" not in x else x) for x in _words(config, "find-links")]
    if config.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        indexes = [config.get("index-url") or _default_index(), *_words(config, "extra-index-url")]
        found += [("index_urls", url) for url in indexes]
    return found


def _default_index() -> str:
    from pip._internal.models.index import PyPI  # pip has no public name for this

    return PyPI.simple_url


def _words(config: dict[str, str], key: str) -> list[str]:
    return config.get(key, "").split()


def _client(config: dict[str, str], index_urls: list[str]) -> "PyPIClient":
    """Return an HTTP client with pip's certificates, proxy, timeout and credentials (index URL, netrc, keyring)."""
    import httpx2
    import truststore
    from unearth.auth import MultiDomainBasicAuth
    from unearth.fetchers import PyPIClient

    verify: ssl.SSLContext
    if cert := config.get("cert"):
        where: dict[str, Any] = {"capath": cert} if Path(cert).is_dir() else {"cafile": cert}
        try:
            verify = ssl.create_default_context(**where)
        except OSError as error:
            raise AssetError(
                f"pip's cert {cert} cannot be read ({error.strerror}): fix it with `pip config`."
            ) from None
    else:
        verify = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    proxy = config.get("proxy")
    return PyPIClient(
        trusted_hosts=_words(config, "trusted-host"),
        verify=verify,
        proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy,
        timeout=httpx2.Timeout(float(config.get("timeout", config.get("default-timeout", 60))), connect=15),
        follow_redirects=True,
        auth=MultiDomainBasicAuth(prompting=False, index_urls=index_urls),
    )


def _find(
    client: "PyPIClient", sources: list[tuple[str, str]], archive: Archive
) -> tuple[list["Link"], list[str], list[str]]:
    """Look for the file in every source.

    Returns:
        The links to the file, a reason from each source that does not have it, and the errors of failed connections.
    """
    import httpx2
    from unearth import Link, PackageFinder

    links: list[Link] = []
    refusals: list[str] = []
    failures: list[str] = []
    handler = logging.Handler()  # unearth logs what an index answers (not found, forbidden, not trusted)
    handler.emit = lambda record: refusals.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("unearth.collector")
    logger.addHandler(handler)
    try:
        for kind, url in sources:
            finder = PackageFinder(client, ignore_compatibility=True, **{kind: [url]})
            before = len(refusals)
            try:
                packages = finder.find_all_packages(archive.distribution, allow_yanked=True)
                found = [package.link for package in packages if package.link.filename == archive.filename]
            except (ValueError, OSError):  # a folder of find-links that does not exist, or cannot be read
                found = []
            except httpx2.HTTPError as error:
                failures.append(f"{Link(url).redacted}: {first_line(error)}")
                found = []
            links += found
            if not found and len(refusals) == before:
                refusals.append(f"not in {Link(url).redacted}")
    finally:
        logger.removeHandler(handler)
    return links, refusals, failures


def _stream(client: "PyPIClient", link: "Link", archive: Archive, path: Path, progress: bool) -> None:
    """Download the link to ``path``, and raise an error unless the result is the pinned file."""
    from tqdm import tqdm

    digest, received = hashlib.sha256(), 0
    bar = tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.distribution, disable=not progress)
    # The bytes as stored on the server: a .tar.gz must not be decompressed on the way.
    request = client.stream("GET", link.normalized, headers={"Accept-Encoding": "identity"})
    with bar, request as response, path.open("wb") as file:
        response.raise_for_status()
        for chunk in response.iter_raw():
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            if received > archive.size:
                break
    if received < archive.size:
        raise ConnectionError(f"ended after {received} of {archive.size} bytes")
    if digest.hexdigest() != archive.sha256:
        raise AssetError(
            f"{path.name} from {link.redacted} is not the pinned file (sha256 {digest.hexdigest()[:12]}…, expected "
            f"{archive.sha256[:12]}…) and was not opened: remove it there, or choose another index for pip."
        )
