"""Twenty small texts of two classes, and files of them, that several test files share."""

from collections.abc import Iterable
from pathlib import Path

ROWS = [(f"{word} film {i}", label) for i in range(10) for word, label in (("good", "pos"), ("bad", "neg"))]


def csv_of(rows: Iterable[tuple], header: str = "text,label", delimiter: str = ",") -> str:
    return "\n".join([header.replace(",", delimiter), *(delimiter.join(map(str, row)) for row in rows), ""])


def write(folder: Path, content: str | bytes, name: str = "reviews.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
