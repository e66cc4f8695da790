"""Pinned assets, and every way in which fetching one can fail: with made-up archives first, then with the real ones."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ftkit.data import emoji
from ftkit.data.assets import archives, registry
from ftkit.data.text import load_text
from ftkit.errors import AssetError, ModelError
from ftkit.models.efficientnet import EfficientNet
from ftkit.models.loading import load_classifier, load_language_model

REPOSITORY = Path(__file__).parents[2]
WHEEL, SDIST, NESTED = "toy_wheel-1.0-py3-none-any.whl", "toy-sdist-1.0.tar.gz", "toy-nested-1.0.tar.gz"
TEXT = b"good\tbad\n" * 5_000
CODE = b"from pathlib import Path\nPath(__file__).with_name('was-run').write_text('run')\nraise SystemExit\n"


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sdist(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def entry(name: str, archive: str, root: str, members: list[str]) -> str:
    known = "".join(f'{field} = "{field} of {name}"\n' for field in ("title", "description", "flaws", "citation"))
    return (
        f'[assets.{name}]\nkind = "text-classification"\narchive = "{archive}"\nroot = "{root}"\n'
        f'members = {json.dumps(members)}\nsize = {len(TEXT)}\nlicence = "MIT"\nrights = "ours"\n{known}'
    )


class Toys:
    """A wheelhouse of made-up archives, a registry that pins them, and a cache, all in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.house, self.cache, self.registry = folder / "house", folder / "cache", folder / "assets.toml"
        self.house.mkdir()
        self.add(
            WHEEL, wheel({"toy/__init__.py": CODE, "toy/data/a.txt": TEXT, "toy/data/b/c.txt": b"c", "toy/d": b"d"})
        )
        self.add(SDIST, sdist({"toy-sdist-1.0/setup.py": CODE, "toy-sdist-1.0/data/a.txt": TEXT}))
        inner = sdist({"deep/a.txt": TEXT, "deep/other.txt": b"other"})
        self.add(NESTED, sdist({"toy-nested-1.0/setup.py": CODE, "toy-nested-1.0/inner.tar.gz": inner}))
        self.pin()

    def add(self, filename: str, content: bytes) -> None:
        (self.house / filename).write_bytes(content)

    def pin(self) -> None:
        """Write the registry with the hashes of the files that are in the wheelhouse now."""
        lines = []
        for filename in (WHEEL, SDIST, NESTED):
            content = (self.house / filename).read_bytes()
            distribution = filename.split("-1.0")[0].replace("_", "-")
            lines += [f"[archives.{distribution}]", 'version = "1.0"', f'filename = "{filename}"']
            lines += [f'sha256 = "{hashlib.sha256(content).hexdigest()}"', f"size = {len(content)}"]
            if filename == NESTED:
                lines.append('inner = "toy-nested-1.0/inner.tar.gz"')
        lines.append(entry("whole", "toy-wheel", "toy/data", ["*"]))
        lines.append(entry("part", "toy-wheel", "toy/data", ["b/*.txt"]))
        lines.append(entry("sdist", "toy-sdist", "toy-sdist-1.0/data", ["a.txt"]))
        lines.append(entry("nested", "toy-nested", "deep", ["a.*"]))
        self.registry.write_text("\n".join(lines))
        registry.read_registry.cache_clear()

    def process(self, name: str) -> subprocess.Popen:
        """Start a process that fetches ``name`` and prints the folder."""
        code = (
            "import sys; from pathlib import Path; from ftkit.data.assets import registry;"
            "registry._ASSETS_FILE = Path(sys.argv[1]);"
            "print(registry.fetch(sys.argv[2], progress=False))"
        )
        command = [sys.executable, "-c", code, str(self.registry), name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def left(self) -> list[str]:
        """Return the names of everything in the cache except locks."""
        if not self.cache.is_dir():
            return []
        return sorted(path.name for path in self.cache.iterdir() if path.suffix != ".lock")


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toys]:
    toys = Toys(tmp_path)
    for variable in [name for name in os.environ if name.startswith("PIP_")] + ["FTKIT_OFFLINE"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(toys.house))
    monkeypatch.setenv("FTKIT_CACHE", str(toys.cache))
    monkeypatch.setattr(registry, "_ASSETS_FILE", toys.registry)
    monkeypatch.setattr(archives, "_PAUSE", 0.0)
    yield toys
    registry.read_registry.cache_clear()


class Index:
    """A package index over HTTP that counts downloads, and can break off or hang in the middle of a file."""

    def __init__(self, house: Path) -> None:
        self.served: Counter[str] = Counter()
        self.break_off = 0  # how many of the next downloads end in the middle
        self.hang = threading.Event()  # cleared: downloads stop in the middle until it is set
        self.hang.set()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                filename = self.path.rsplit("/", 1)[-1]
                if not filename:
                    links = "".join(f'<a href="/{path.name}">{path.name}</a>' for path in house.iterdir())
                    content, kind = f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html"
                else:
                    content, kind = (house / filename).read_bytes(), "application/octet-stream"
                    index.served[filename] += 1
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                half = len(content) // 2 if filename else len(content)
                self.wfile.write(content[:half])
                self.wfile.flush()
                if filename and index.break_off:
                    index.break_off -= 1
                    return
                index.hang.wait(60)
                with contextlib.suppress(OSError):  # the client was killed
                    self.wfile.write(content[half:])

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def index(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(toys.house)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    yield index
    index.hang.set()
    index.server.shutdown()
    index.server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails(name: str) -> str:
    """Return the message of a fetch that fails. It must be one sentence that says what is wrong and what to do."""
    with pytest.raises(AssetError) as caught:
        registry.fetch(name, progress=False)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ": " in message
    return message


# ------------------------------------------------------------------------------------------------ what is fetched


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whole", {"a.txt": TEXT, "b/c.txt": b"c"}),
        ("part", {"b/c.txt": b"c"}),
        ("sdist", {"a.txt": TEXT}),
        ("nested", {"a.txt": TEXT}),
    ],
)
def test_only_named_members_are_unpacked_and_no_code_is_run(toys: Toys, name: str, expected: dict) -> None:
    assert not registry.is_cached(name)
    folder = registry.fetch(name, progress=False)
    assert files_of(folder) == expected
    assert registry.is_cached(name)
    everything = [path.name for path in toys.cache.parent.rglob("*")]
    assert not {"was-run", "setup.py", "__init__.py", "d", "other.txt"} & set(everything)
    assert not [path for path in toys.cache.rglob("*") if path.suffix in (".whl", ".gz")]  # the archive is gone


def test_a_manifest_records_size_and_hash_of_each_file(toys: Toys) -> None:
    folder = registry.fetch("whole", progress=False)
    recorded = json.loads((folder.parent / "manifest.json").read_text())["assets"]["whole"]["files"]
    assert recorded["a.txt"] == {"size": len(TEXT), "sha256": hashlib.sha256(TEXT).hexdigest()}


def test_assets_of_one_archive_are_downloaded_once(toys: Toys) -> None:
    registry.fetch("whole", progress=False)
    shutil.rmtree(toys.house)
    assert files_of(registry.fetch("part", progress=False)) == {"b/c.txt": b"c"}


def test_a_complete_entry_is_read_without_a_lock_or_a_write(toys: Toys) -> None:
    registry.fetch("whole", progress=False)
    for lock in toys.cache.glob("*.lock"):
        lock.unlink()
    before = {path: path.stat().st_mtime_ns for path in [toys.cache, *toys.cache.rglob("*")]}
    registry.fetch("whole", progress=False)
    assert {path: path.stat().st_mtime_ns for path in [toys.cache, *toys.cache.rglob("*")]} == before


def test_an_asset_added_to_a_cached_archive_replaces_the_old_entry(toys: Toys) -> None:
    registry.fetch("whole", progress=False)
    toys.registry.write_text(toys.registry.read_text() + entry("new", "toy-wheel", "toy", ["d"]))
    registry.read_registry.cache_clear()
    assert files_of(registry.fetch("new", progress=False)) == {"d": b"d"}
    assert registry.is_cached("whole")
    assert toys.left() == ["toy-wheel-1.0"]


def test_the_progress_bar_goes_to_stderr_and_can_be_turned_off(toys: Toys, capsys: pytest.CaptureFixture) -> None:
    registry.fetch("sdist", progress=False)
    assert capsys.readouterr() == ("", "")
    registry.fetch("whole")
    out, err = capsys.readouterr()
    assert out == ""
    assert "toy-wheel" in err
    assert "100%" in err


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_an_unknown_name_suggests_the_nearest(toys: Toys) -> None:
    assert "did you mean 'nested'?" in fails("nestd")


def test_an_archive_with_a_wrong_hash_is_never_opened(toys: Toys) -> None:
    content = bytearray((toys.house / WHEEL).read_bytes())
    content[100] ^= 1
    toys.add(WHEEL, bytes(content))
    assert "is not the pinned file" in fails("whole")
    assert toys.left() == []


@pytest.mark.parametrize("kept", [0, 1000])
def test_truncated_archive(toys: Toys, kept: int) -> None:
    toys.add(SDIST, (toys.house / SDIST).read_bytes()[:-1][:kept])
    assert f"of {registry.get('sdist').archive.size} bytes" in fails("sdist")
    assert toys.left() == []


def test_archive_on_no_index(toys: Toys) -> None:
    (toys.house / SDIST).unlink()
    message = fails("sdist")
    assert "find-links" in message
    assert str(toys.house) in message
    assert toys.left() == []


def test_no_network(toys: Toys, index: Index) -> None:
    index.server.shutdown()
    index.server.server_close()
    assert "check the network" in fails("whole")
    assert toys.left() == []


def test_offline_uses_no_network_and_leaves_nothing(toys: Toys, index: Index, monkeypatch) -> None:
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    assert "FTKIT_OFFLINE" in fails("whole")
    assert not index.served
    assert not toys.cache.exists()
    monkeypatch.setenv("FTKIT_OFFLINE", "0")
    registry.fetch("whole", progress=False)
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    assert (registry.fetch("whole", progress=False) / "a.txt").read_bytes() == TEXT


def test_a_broken_connection_is_tried_again(toys: Toys, index: Index) -> None:
    index.break_off = 2
    assert (registry.fetch("sdist", progress=False) / "a.txt").read_bytes() == TEXT  # not decompressed on the way
    assert index.served[SDIST] == 3


def test_repeated_connection_errors_end_the_download(toys: Toys, index: Index) -> None:
    index.break_off = 100
    assert "could not be downloaded" in fails("sdist")
    assert toys.left() == []


def test_an_index_that_is_down_does_not_hide_another(toys: Toys, index: Index, monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index.url)
    assert (registry.fetch("whole", progress=False) / "a.txt").read_bytes() == TEXT


def test_read_only_cache(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.cache.write_text("a file, so that no folder can be made below it")
    monkeypatch.setenv("FTKIT_CACHE", str(toys.cache / "below"))
    assert "set FTKIT_CACHE" in fails("whole")


@pytest.mark.parametrize(
    ("archives_that_fit", "members_that_fit", "fails_at"),
    [(0.5, 0, NESTED), (1, 0.5, "a.txt"), (1, 1, "manifest.json")],
)
def test_full_disk(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, archives_that_fit: float, members_that_fit: float, fails_at: str
) -> None:
    room = archives_that_fit * registry.get("nested").archive.size + members_that_fit * len(TEXT)
    real_open, written, opened = Path.open, 0, []

    def open_on_small_disk(path: Path, mode: str = "r", *args: object, **options: object):
        file = real_open(path, mode, *args, **options)
        if "w" in mode:
            opened.append(path.name)
            real_write = file.write

            def write(content: bytes) -> int:
                nonlocal written
                written += len(content)
                if written > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real_write(content)

            file.write = write
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_small_disk)
        message = fails("nested")
    assert opened[-1] == fails_at
    assert "is full" in message
    assert "set FTKIT_CACHE" in message
    assert toys.left() == []
    assert registry.fetch("nested", progress=False).is_dir()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(TEXT[:-1]), Path.unlink])
def test_a_damaged_entry_is_repaired_or_reported(toys: Toys, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    file = registry.fetch("whole", progress=False) / "a.txt"
    damage(file)
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    message = fails("whole")
    assert "damaged" in message
    assert str(file) in message
    monkeypatch.delenv("FTKIT_OFFLINE")
    assert files_of(registry.fetch("whole", progress=False))["a.txt"] == TEXT
    assert toys.left() == ["toy-wheel-1.0"]


def test_verify_finds_a_flipped_byte(toys: Toys) -> None:
    assert registry.verify("whole") is None  # not downloaded
    folder = registry.fetch("whole", progress=False)
    assert (registry.verify("whole"), registry.verify("part")) == (None, None)
    flipped = bytearray(TEXT)
    flipped[-2] ^= 1
    (folder / "a.txt").write_bytes(flipped)
    assert registry.is_cached("whole")  # the size is the same
    told = registry.verify("whole")
    assert re.fullmatch(
        r"The asset 'whole' is damaged \([^\n]+\): delete the folder \S+ and run `ftkit fetch whole`\.", told
    )
    assert str(folder / "a.txt") in told
    assert "c.txt" not in told
    assert registry.verify("part") is None
    shutil.rmtree(folder.parent)
    assert registry.verify(registry.fetch("whole", progress=False).name) is None


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"sha256": "", "assets": []}'])
def test_a_damaged_manifest_is_found(toys: Toys, manifest: str) -> None:
    path = registry.fetch("whole", progress=False).parent / "manifest.json"
    path.write_text(manifest)
    assert str(path) in registry.verify("whole")
    assert not registry.is_cached("whole")
    assert files_of(registry.fetch("whole", progress=False))["a.txt"] == TEXT
    assert registry.verify("whole") is None


def test_an_asset_that_a_cached_archive_lacks_is_not_damaged(toys: Toys) -> None:
    registry.fetch("whole", progress=False)
    toys.registry.write_text(toys.registry.read_text() + entry("new", "toy-wheel", "toy", ["d"]))
    registry.read_registry.cache_clear()
    assert registry.verify("new") is None


@pytest.mark.parametrize("name", ["toy/data/../../../../escaped.txt", "toy/data//tmp/escaped.txt", "toy/data/..\\x"])
def test_a_member_never_leaves_its_folder(toys: Toys, name: str) -> None:
    toys.add(WHEEL, wheel({"toy/data/b/c.txt": b"c", name: b"escaped"}))
    toys.pin()
    assert "unsafe member" in fails("whole")
    assert toys.left() == []
    assert not list(toys.cache.parent.rglob("escaped.txt"))
    assert not Path("/tmp/escaped.txt").exists()


def test_links_in_a_tar_are_not_followed(toys: Toys) -> None:
    secret = toys.cache.parent / "secret"
    secret.write_text("secret")
    toys.add(SDIST, sdist({}, {"toy-sdist-1.0/data/a.txt": str(secret)}))
    toys.pin()
    assert "has no member toy-sdist-1.0/data/a.txt" in fails("sdist")
    assert toys.left() == []


# -------------------------------------------------------------------------------------------------- many processes


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_processes_download_an_archive_once(toys: Toys, index: Index) -> None:
    index.hang.clear()
    first = toys.process("whole")
    wait_for(toys.cache / "toy-wheel-1.0.partial" / WHEEL, first)
    others = [toys.process("part") for _ in range(4)]
    for process in others:
        assert "waiting for another process" in process.stderr.readline()
    index.hang.set()
    for process, name in [(first, "whole"), *((process, "part") for process in others)]:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, str(toys.cache / "toy-wheel-1.0" / name)), err
    assert index.served[WHEEL] == 1
    assert files_of(toys.cache / "toy-wheel-1.0" / "whole") == {"a.txt": TEXT, "b/c.txt": b"c"}


def test_a_fetch_after_a_killed_one_starts_clean(toys: Toys, index: Index) -> None:
    index.hang.clear()
    process = toys.process("whole")
    partial = toys.cache / "toy-wheel-1.0.partial"
    wait_for(partial / WHEEL, process)
    process.kill()
    process.communicate()
    assert toys.left() == [partial.name]
    assert not registry.is_cached("whole")
    (partial / "litter").write_text("left by a killed process")
    index.hang.set()
    assert files_of(registry.fetch("whole", progress=False)) == {"a.txt": TEXT, "b/c.txt": b"c"}
    assert toys.left() == ["toy-wheel-1.0"]


# --------------------------------------------------------------------------------------------------- the registry


def test_every_asset_is_described() -> None:
    optional = {"hub", "language"}
    for asset in registry.read_registry().values():
        for field in dataclasses.fields(asset):
            assert field.name in optional or getattr(asset, field.name), (asset.name, field.name)
        assert asset.kind in {
            "text-encoder", "language-model", "image-encoder",
            "text-classification", "language-modelling", "tagging", "images", "font",
        }  # fmt: skip
        assert 2 <= len(re.findall(r"\.(?:\s|$)", asset.description)) <= 5, asset.name
        archive = asset.archive
        assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
        assert archive.filename.endswith((".whl", ".tar.gz"))
        assert archive.version in archive.filename
        assert archive.size > 0


def test_names_by_kind() -> None:
    assert registry.names("text-encoder") == ["minilm"]
    assert registry.names("language-model") == ["smollm2"]
    assert len(registry.names()) == len(set(registry.names())) == 19
    assert registry.names("no such kind") == []


def test_data_readme_is_generated() -> None:
    written = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    assert written == registry.cards(), "run `ftkit assets --cards`"
    for asset in registry.read_registry().values():
        assert f"## {asset.name}: " in written
        assert asset.archive.sha256 in written


def test_the_table_shows_what_is_cached(toys: Toys) -> None:
    registry.fetch("sdist", progress=False)
    header, *rows = registry.table().splitlines()
    column = header.index("cached")
    cached = {row.split()[0]: row[column:].split()[0] for row in rows}
    assert cached == {"whole": "no", "part": "no", "sdist": "yes", "nested": "no"}


def test_importing_the_registry_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'unearth', 'httpx2', 'tqdm', 'truststore'}"
    use = "from ftkit.data.assets import registry; registry.names(); registry.cache_dir()"
    code = f"import sys; {use}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------- real models and data


def real(name: str) -> Path:
    if registry.offline() and not registry.is_cached(name):
        pytest.skip(f"FTKIT_OFFLINE is set and {name} is not cached")
    return registry.fetch(name, progress=False)


def test_minilm_equals_the_hub_model_and_loads_from_its_folder() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = real("minilm")
    files = files_of(folder)
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sum(map(len, files.values())) == registry.get("minilm").size
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 6
    assert tokenizer.tokenize("Fine-tuning") == ["fine", "-", "tuning"]


def test_movie_sentiment_has_all_its_rows() -> None:
    folder = real("movie-sentiment")
    rows = (folder / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
    ratings = [float(row.split("\t")[1]) for row in rows]
    assert len(ratings) == 10_605
    assert sum(abs(rating) >= 0.5 for rating in ratings) == 10_072


def test_smollm2_is_the_dequantised_model() -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real("smollm2")
    assert not list(folder.glob("*.gguf"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118  tied to the embeddings, so saved once
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    top = logits.topk(5)
    # Recorded from the GGUF file itself, loaded by transformers 5.23.
    assert tokenizer.convert_ids_to_tokens(top.indices.tolist()) == ["ĠParis", "Ġthe", "ĠLondon", "ĠLe", "ĠNew"]
    assert top.values.tolist() == pytest.approx([17.371, 14.889, 13.245, 13.009, 12.952], abs=2e-3)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")


NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # others are not always read

DAMAGED = {
    "movie-sentiment": lambda: load_text("movie-sentiment"),
    "newsgroups": lambda: load_text("newsgroups"),
    "airline-tweets": lambda: load_text("airline-tweets"),
    "chinese-reviews": lambda: load_text("chinese-reviews"),
    "emoji": lambda: emoji.draw(["\N{GRINNING CAT FACE WITH SMILING EYES}"]),
    "efficientnet-lite0": EfficientNet,
    "minilm": lambda: load_classifier("minilm", 2),
    "smollm2": lambda: load_language_model("smollm2"),
}


@pytest.mark.parametrize("byte", [b"\xff", b"\0", b"{"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_asset_is_refused_with_what_to_do(
    name: str, byte: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library says of such a file, the reader learns how to check the files of all assets."""
    for path in (file for file in real(name).rglob("*") if file.is_file()):
        damaged = tmp_path / path.relative_to(real(name))
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.write_bytes(byte * 1000)
    monkeypatch.setattr(registry, "fetch", lambda name, progress=True: tmp_path)
    emoji._charmap.cache_clear()
    try:
        with pytest.raises(
            (AssetError, ModelError), match="check its files with `ftkit assets --verify`, or s"
        ) as told:
            DAMAGED[name]()
    finally:
        emoji._charmap.cache_clear()
    assert name in str(told.value)
    assert re.fullmatch(r"[^\n]+\.", str(told.value))


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_each_damaged_file_of_a_model_is_refused_with_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [path for path in real(name).iterdir() if path.suffix in (".json", ".safetensors", ".txt")]
    for path in files:
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(registry, "fetch", lambda name, progress=True: tmp_path)
    for path in files:
        (tmp_path / path.name).unlink()
        (tmp_path / path.name).write_bytes(b"\xff" * 1000)
        try:
            DAMAGED[name]()
        except (AssetError, ModelError) as error:
            assert "check its files with `ftkit assets --verify`" in str(error), path.name
            assert re.fullmatch(r"[^\n]+\.", str(error)), path.name
        else:
            assert path.name not in NEEDED, path.name
        (tmp_path / path.name).unlink()
        (tmp_path / path.name).symlink_to(path)
