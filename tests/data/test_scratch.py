"""The folder of a process for large files: where it is, and that nothing of it stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = "from ftkit.data.scratch import scratch_folder; f = scratch_folder(); (f / 'rows').write_text('x'); print(f)"


def run(cache: Path, code: str) -> Path:
    env = os.environ | {"FTKIT_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return Path(done.stdout.split()[0])


def folders(cache: Path) -> list[Path]:
    return list((cache / "scratch").glob("process-*"))


def test_the_folder_is_in_the_cache_and_ends_with_the_process(tmp_path: Path) -> None:
    folder = run(tmp_path, f"{FOLDER}; assert scratch_folder() == f")
    assert folder.parent == tmp_path / "scratch"
    assert folders(tmp_path) == []


def test_a_process_that_fails_leaves_nothing(tmp_path: Path) -> None:
    run(tmp_path, f"{FOLDER}; raise SystemExit(1)")
    assert folders(tmp_path) == []


def test_what_a_killed_process_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    left = run(tmp_path, f"{FOLDER}; import os; print(flush=True); os.kill(os.getpid(), 9)")
    assert folders(tmp_path) == [left]
    # while another process lives, its folder stays
    code = f"import subprocess, sys; {FOLDER}; subprocess.run([sys.executable, '-c', {FOLDER!r}]); assert f.exists()"
    run(tmp_path, code)
    assert folders(tmp_path) == []


def test_a_child_process_does_not_remove_the_folder_of_its_parent(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    code = f"{FOLDER}; import os, sys; sys.stdout.flush(); child = os.fork(); child or sys.exit(); "
    run(tmp_path, f"{code} os.waitpid(child, 0); assert (f / 'rows').exists()")


def test_a_cache_that_cannot_be_written_is_replaced_by_the_folder_for_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    folder = run(tmp_path / "cache", FOLDER)
    assert folder.name.startswith("ftkit-")
    assert not folder.exists()
