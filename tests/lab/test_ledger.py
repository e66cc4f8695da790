"""The ledger: nothing is lost when several processes append at once, and a line cut short spoils no other."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from ftkit.lab import results

ENTRY = {"id": "a", "metrics": {"full": {"accuracy": np.float64(0.5)}}, "parameters": {"data": Path("Kästchen ✓.csv")}}
PLAIN = {"id": "a", "metrics": {"full": {"accuracy": 0.5}}, "parameters": {"data": "Kästchen ✓.csv"}}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / results.LEDGER
    assert results.read_ledger(path) == []
    assert not path.parent.exists()  # reading makes nothing
    for _ in range(2):
        results.append_to_ledger(path, ENTRY)
    assert results.read_ledger(path) == [PLAIN, PLAIN]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [PLAIN, PLAIN]


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    entry = {"error": "two\nlines\u2028, a lone \ud800 surrogate, \x00, “quotes”, 😀"}
    results.append_to_ledger(tmp_path / results.LEDGER, entry)
    results.append_to_ledger(tmp_path / results.LEDGER, {"error": None})
    assert results.read_ledger(tmp_path / results.LEDGER) == [entry, {"error": None}]


def test_lines_cut_short_are_skipped_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / results.LEDGER
    results.append_to_ledger(path, PLAIN)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "b", "error": "caf\xc3' + b"\n" + whole + whole[:20])
    results.append_to_ledger(path, {"id": "c"})  # starts on a line of its own
    with pytest.warns(UserWarning) as seen:
        assert results.read_ledger(path) == [PLAIN, PLAIN, {"id": "c"}]
    assert [str(warning.message).split(" is cut")[0] for warning in seen] == [f"Line {n} of {path}" for n in (2, 4)]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / results.LEDGER
    path.write_text('{"id": "a"}', encoding="utf-8")
    results.append_to_ledger(path, {"id": "b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert results.read_ledger(path) == [{"id": "a"}, {"id": "b"}]


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_what_has_no_json_form_is_refused_and_changes_nothing(tmp_path: Path, bad: object) -> None:
    path = tmp_path / results.LEDGER
    results.append_to_ledger(path, PLAIN)
    with pytest.raises((ValueError, TypeError), match=r"^entry\.seconds is"):
        results.append_to_ledger(path, {"seconds": bad})
    assert results.read_ledger(path) == [PLAIN]


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from ftkit.lab import results\n"
        "for i in range(50):\n"
        "    entry = {'id': f'{sys.argv[2]}-{i}', 'x': 'y' * 5000}\n"
        "    results.append_to_ledger(pathlib.Path(sys.argv[1]), entry)"
    )
    path = tmp_path / results.LEDGER
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)]) for n in range(4)]
    while any(writer.poll() is None for writer in writers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no reader sees half a line
            results.read_ledger(path)
    assert [writer.returncode for writer in writers] == [0] * 4
    ids = [entry["id"] for entry in results.read_ledger(path)]
    assert sorted(ids) == sorted(f"{n}-{i}" for n in range(4) for i in range(50))
    for n in range(4):  # each writer's in its order
        assert [i for i in ids if i.startswith(f"{n}-")] == [f"{n}-{i}" for i in range(50)]
