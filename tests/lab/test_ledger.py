"""The ledger: several processes append at once without a loss, and an incomplete line does not damage others."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from ftkit.lab.results import LEDGER, append_to_ledger, read_ledger, write_whole

ENTRY = {"id": "a", "metrics": {"full": {"accuracy": np.float64(0.5)}}, "parameters": {"data": Path("Kästchen ✓.csv")}}
PLAIN = {"id": "a", "metrics": {"full": {"accuracy": 0.5}}, "parameters": {"data": "Kästchen ✓.csv"}}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / LEDGER
    assert read_ledger(path) == []
    assert not path.parent.exists()  # reading creates nothing
    for _ in range(2):
        append_to_ledger(path, ENTRY)
    assert read_ledger(path) == [PLAIN, PLAIN]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [PLAIN, PLAIN]


def test_any_text_is_read_back_unchanged(tmp_path: Path) -> None:
    entry = {"error": "two\nlines\u2028, a lone \ud800 surrogate, \x00, “quotes”, 😀"}
    append_to_ledger(tmp_path / LEDGER, entry)
    append_to_ledger(tmp_path / LEDGER, {"error": None})
    assert read_ledger(tmp_path / LEDGER) == [entry, {"error": None}]


def test_incomplete_lines_are_skipped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    append_to_ledger(path, PLAIN)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "error": "caf\xc3' + b"\n" + whole + whole[:20])
    append_to_ledger(path, {"id": "c"})  # starts a new line
    with pytest.warns(UserWarning) as seen:
        assert read_ledger(path) == [PLAIN, PLAIN, {"id": "c"}]
    assert [str(warning.message).split(" is incomplete")[0] for warning in seen] == [
        f"Line {n} of {path}" for n in (2, 4)
    ]


def test_a_last_line_without_a_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    path.write_text('{"id": "a"}', encoding="utf-8")
    append_to_ledger(path, {"id": "b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_ledger(path) == [{"id": "a"}, {"id": "b"}]


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_a_value_that_json_cannot_hold_is_refused_and_changes_nothing(tmp_path: Path, bad: object) -> None:
    path = tmp_path / LEDGER
    append_to_ledger(path, PLAIN)
    with pytest.raises((ValueError, TypeError), match=r"^entry\.seconds (is nan|has the type object)"):
        append_to_ledger(path, {"seconds": bad})
    assert read_ledger(path) == [PLAIN]


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from ftkit.lab.results import append_to_ledger\n"
        "for i in range(50):\n"
        "    entry = {'id': f'{sys.argv[2]}-{i}', 'x': 'y' * 5000}\n"
        "    append_to_ledger(pathlib.Path(sys.argv[1]), entry)"
    )
    path = tmp_path / LEDGER
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)]) for n in range(4)]
    while any(writer.poll() is None for writer in writers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reader never sees half a line
            read_ledger(path)
    assert [writer.returncode for writer in writers] == [0] * 4
    ids = [entry["id"] for entry in read_ledger(path)]
    assert sorted(ids) == sorted(f"{n}-{i}" for n in range(4) for i in range(50))
    for n in range(4):  # the entries of each writer are in order
        assert [i for i in ids if i.startswith(f"{n}-")] == [f"{n}-{i}" for i in range(50)]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    append_to_ledger(tmp_path / LEDGER, PLAIN)
    script = (
        "import pathlib, resource, sys; from ftkit.lab.results import append_to_ledger\n"
        "path = pathlib.Path(sys.argv[1]); size = path.stat().st_size + 100\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"  # the next 100 bytes are written, then an error
        "try: append_to_ledger(path, {'x': 'y' * 5000})\n"
        "except OSError as error: print(error)"
    )
    before = (tmp_path / LEDGER).read_bytes()
    command = [sys.executable, "-c", script, str(tmp_path / LEDGER)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == f"{tmp_path / LEDGER} cannot be written (File too large): give a folder that you can write to.\n"
    assert (tmp_path / LEDGER).read_bytes() == before


def test_a_ledger_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    append_to_ledger(tmp_path / LEDGER, PLAIN)
    (tmp_path / f".{LEDGER}.lock").unlink(missing_ok=True)
    (tmp_path / f".{LEDGER}.lock").mkdir()  # no lock can be made
    assert read_ledger(tmp_path / LEDGER) == [PLAIN]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    assert write_whole(path, "é\r\n") == path
    assert path.read_bytes() == "é\r\n".encode()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"rows\.csv cannot be written \(No space"):
        patch.setattr(Path, "replace", full)
        write_whole(path, "new")
    assert path.read_bytes() == "é\r\n".encode()
    assert list(tmp_path.iterdir()) == [path]
