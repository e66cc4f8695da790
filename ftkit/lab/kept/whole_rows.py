"""Rows of a CSV file, written as they come: what is written is whole rows, whatever happens."""

import csv
import io
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class WholeRows:
    """A CSV file in UTF-8, or stdout, that rows are written to one by one.

    A row that is written only in part, because the disk is full or someone pressed Ctrl-C, is removed again when the
    ``with`` block ends. From a pipe nothing can be removed; but there a row of up to 4 KiB goes through whole or not at
    all.

    Args:
        path: the file, which is overwritten; None for stdout.

    Attributes:
        name: the file, for messages.
        count: number of rows written whole, the header not included.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.name = "stdout" if path is None else str(path)
        if path is None:
            sys.stdout.flush()
            self._file = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
        else:
            self._file = path.open("wb", buffering=0)
        self._owned = path is not None
        self._regular = self._is_regular()
        start = os.fstat(self._file.fileno()).st_size if self._regular else 0
        self._whole = (-1, start)  # rows and bytes; one value, so that an interruption cannot part them
        self._line = io.StringIO(newline="")
        self._writer = csv.writer(self._line)  # ends lines with CR LF, so that both are quoted inside texts

    @property
    def count(self) -> int:
        return max(0, self._whole[0])

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write rows; the first of all is the header.

        Raises:
            OSError: the disk is full, or nobody reads stdout any more; the message says so.
        """
        for row in rows:
            self._line.seek(0)
            self._line.truncate()
            self._writer.writerow(row)
            content = self._line.getvalue().encode("utf-8", errors="backslashreplace")
            self._write(memoryview(content))
            count, size = self._whole
            self._whole = (count + 1, size + len(content))

    def _write(self, content: memoryview) -> None:
        try:
            while content:
                content = content[self._file.write(content) :]
        except BrokenPipeError:
            raise BrokenPipeError(f"Nobody reads {self.name} any more") from None
        except OSError as error:
            raise type(error)(
                f"{self.name} cannot be written ({error.strerror}): free some space, or give a file on another disk"
            ) from None

    def __enter__(self) -> "WholeRows":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is not None and self._regular:
                os.ftruncate(self._file.fileno(), self._whole[1])
        finally:
            if self._owned:
                self._file.close()
            else:
                self._file.flush()

    def _is_regular(self) -> bool:
        try:
            return stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except OSError:  # a stream of Python's own, without a file below it
            return False
