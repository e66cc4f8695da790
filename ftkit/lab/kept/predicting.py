"""Classify, or search for, the texts of a file with a kept model: ``ftkit predict``."""

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ftkit.data.chunks import RowsOfFile, cell_text, in_chunks, open_rows, text_lines
from ftkit.data.image_readers import read_image_files
from ftkit.data.text import folded, sort_names
from ftkit.data.text_readers import LABEL_NAMES, TEXT_NAMES, most_letters, usual_column
from ftkit.errors import DataError, ModelError, in_brief
from ftkit.lab.kept.keeping import prediction_header, prediction_lines
from ftkit.lab.kept.loading import KeptClassifier, KeptTowers, load_kept
from ftkit.lab.kept.whole_rows import WholeRows
from ftkit.metrics import balanced_accuracy, counts_interval, macro_f1
from ftkit.training.checks import numbers_by_name, unnamed

STDIN = "-"

_CHUNK = 2048  # rows classified, sorted by length, before they are written

_SAMPLE = 1000  # rows that show which column holds the texts

_SHOWN, _WIDTH = 10, 100  # rows shown as mistakes, and characters of each

_NEAREST = 5


def predict_file(
    folder: str | Path,
    source: str | Path = STDIN,
    out: str | Path | None = None,
    *,
    text: str | None = None,
    label: str | None = None,
    among: str | Path | None = None,
) -> int:
    """Classify the texts of a file, and write a row for each row of the file, in its order.

    The columns are text, label (if the file has labels), predicted and the probability of each class, p(class). A row
    without text has no prediction. With labels, the scores and the worst mistakes are printed on stderr, as are the
    progress and all that was guessed. Two towers search instead: each text gets a row for each of the 5 nearest
    candidates. Rows are written as they come, so a file of any size fits into memory.

    Args:
        folder: a kept model, as for ``load_kept``.
        source: any file that ``read_table`` reads, or "-" for one text a line on stdin.
        out: the CSV file to write; None for stdout.
        text, label: names of the columns; None to guess them.
        among: for two towers, what to search in: a folder of images, or a file with a caption a row.

    Returns:
        The number of rows of the source that are in the result.

    Raises:
        ModelError: there is no kept model in the folder, or it does not suit the arguments.
        DataError: the file cannot be read, or its texts or labels cannot be used.
        OSError: the result cannot be written; what is written is whole rows.
        RuntimeError: someone interrupted it; what is written is whole rows.
    """
    out = None if out is None else Path(out)
    _check_out(out, source)
    rows = None if str(source) == STDIN else open_rows(Path(source))
    if rows is None and (text or label):
        raise DataError("Texts on stdin have no columns: leave --text and --label out, or give a file.")
    model = load_kept(folder)
    if isinstance(model, KeptTowers):
        return _search(model, rows, out, text, label, among)
    if among is not None:
        raise ModelError(
            f"The model in {str(folder)!r} is a classifier of texts, which searches nothing: leave --among out."
        )
    return _classify(model, rows, out, text, label)


def _check_out(out: Path | None, source: str | Path) -> None:
    """Refuse an output that cannot be written, or would overwrite the source."""
    if out is None:
        return
    if out.is_dir():
        raise DataError(f"{out} is a folder: give a name for the CSV file in it, such as {out / 'predictions.csv'}.")
    if not out.absolute().parent.is_dir():
        raise DataError(f"There is no folder {out.absolute().parent} to write {out.name} in: make it first.")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise DataError(f"{out} is the file to read: give the predictions another name.")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


@dataclass(frozen=True)
class _Columns:
    text: str
    label: str | None
    label_is_guessed: bool


def _choose_columns(rows: RowsOfFile, text: str | None, label: str | None, classes: Sequence[str]) -> _Columns:
    """Find the columns of texts and labels; unlike training data, a file need not have labels."""
    rows.read(*(name for name in (text, label) if name is not None))  # raises for a column that is missing
    head = rows.head(_SAMPLE)
    free = [name for name in head.columns if name not in (text, label, "split")]
    certain = text is not None or label is not None
    guessed = False
    if label is None:
        label = usual_column(LABEL_NAMES, free)
        certain |= label is not None
        guessed = label is not None and label.lower() not in ("label", "labels")
    if text is None:
        free = [name for name in free if usual_column(LABEL_NAMES, [name]) is None]
        usual = usual_column(TEXT_NAMES, free)
        certain |= usual is not None
        text = usual or most_letters(head[free])
        if text is None:
            raise DataError(
                f"{rows.name} has no column of texts: name one with --text, out of {_quoted(rows.columns)}."
            )
        if usual is None or text.lower() != "text":
            _say(f"{rows.name}: texts from column '{text}' (guessed: name another with --text)")
    if text == label:
        raise DataError(f"Column '{text}' of {rows.name} cannot be both text and label: name two columns.")
    if not certain and (found := [name for name in head.columns if name in classes]):
        raise DataError(
            f"{rows.name} seems to have no header line, because {found[0]!r}, a class of the model, is the name of a "
            "column: add one."
        )
    if label is None:
        known = {folded(name) for name in classes}
        label = next((name for name in head.columns if name != text and _all_known(head[name], known)), None)
        guessed = label is not None
    return _Columns(text, label, guessed)


def _all_known(column: Iterable[Any], known: set[str]) -> bool:
    values = {folded(str(value).strip()) for value in column if value is not None and value == value}
    return bool(values) and values <= known


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _match_labels(counts: Counter[str], columns: _Columns, classes: Sequence[str], name: str) -> dict[str, int] | None:
    """The model's number of each label that it knows; None if a guessed column turns out to hold no labels.

    Labels are matched as ``match_rows`` does: by name, else by name whatever case and blanks, else by number if one
    side has no names.

    Raises:
        DataError: the model knows none of the labels.
    """
    matches = numbers_by_name(counts, classes)
    found = {label: numbers[0] for label, numbers in matches.items() if len(numbers) == 1}
    if not found and (found := _match_by_number(counts, classes)):
        said = in_brief([f"{label} is {classes[number]!r}" for label, number in found.items()], 8)
        _say(
            f"{name}: labels from column '{columns.label}' are matched by number, because one side has no names: {said}"
        )
        return found
    theirs = in_brief([f"{label!r}" for label, _ in counts.most_common()])
    ours = in_brief([f"{known!r}" for known in classes], 8)
    if not found:
        if columns.label_is_guessed:
            _say(f"{name}: column '{columns.label}' ({theirs}) is not read as labels, which would be {ours}")
            return None
        raise DataError(
            f"The labels of {name} in column '{columns.label}' are {theirs}, and none is a class of the model, {ours}: "
            "name another column with --label, write the labels as the model does, or leave the column out."
        )
    if columns.label_is_guessed:
        _say(f"{name}: labels from column '{columns.label}' (guessed: name another with --label)")
    written = [f"{label!r} is {classes[number]!r}" for label, number in found.items() if label != classes[number]]
    if written:
        _say(
            f"{name}: labels are matched to the model's classes whatever their case and blanks: {in_brief(written, 8)}"
        )
    if unknown := [label for label in counts if label not in found]:
        left = sum(counts[label] for label in unknown)
        _say(
            f"{name}: left out of the scores are {left:,} of {counts.total():,} rows, whose labels the model does not "
            f"know: {in_brief([repr(label) for label in unknown])}"
        )
    return found


def _match_by_number(labels: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """The number that each label is, or, for a model without names, its place among the labels; empty if neither."""
    numbers = {name: number for number in range(len(classes)) for name in _numbered(number)}
    if all(label in numbers for label in labels):
        return {label: numbers[label] for label in labels}
    ordered = sort_names({*labels})
    return {label: i for i, label in enumerate(ordered)} if unnamed(classes) and len(ordered) == len(classes) else {}


def _numbered(number: int) -> tuple[str, ...]:
    return str(number), f"LABEL_{number}", f"class {number}"


def _classify(
    model: KeptClassifier, rows: RowsOfFile | None, out: Path | None, text: str | None, label: str | None
) -> int:
    if rows is None:
        lines, total, code_of = ((line,) for line in _stdin()), None, None
        name = "stdin"
    else:
        name, total = rows.name, rows.count
        for note in rows.notes:
            _say(f"{name}: {note}")
        remembered = model.info.get("text_column")
        text = text or (remembered if remembered in rows.columns else None)
        columns = _choose_columns(rows, text, label, model.names)
        code_of = _survey(rows, columns, model.names)
        read = (columns.text,) if code_of is None else (columns.text, columns.label)
        lines = rows.read(*read)
    scores = None if code_of is None else _Scores(model.names)
    without, seen = 0, 0
    with _writing(out, total, prediction_header(model.names, labelled=scores is not None)) as (written, bar):
        for chunk in in_chunks(lines, _CHUNK):
            texts = [cell_text(cells[0], seen + i, "text", name) for i, cells in enumerate(chunk, start=1)]
            filled = [i for i, shown in enumerate(texts) if shown]
            found = model.probabilities([texts[i] for i in filled])
            labels = None if scores is None else [_shown(cells[1]) for cells in chunk]
            written.write(_lines([_shown(cells[0]) for cells in chunk], labels, filled, found, model.names))
            if scores is not None:
                codes = [code_of.get(cell_text(cells[1], 0, "label", name), -1) for cells in chunk]
                scores.add(codes, filled, found, texts, seen)
            without += len(texts) - len(filled)
            seen += len(texts)
            bar.update(len(texts))
    if without:
        _say(f"{name}: no prediction for {without:,} of {seen:,} rows, which have no text")
    if scores is not None:
        _say(scores.report())
    return seen


def _stdin() -> Iterator[str]:
    """The texts on stdin, of which there must be one."""
    if sys.stdin.isatty():
        _say("Type one text a line; Ctrl-D ends.")
    lines = text_lines(sys.stdin.buffer, "stdin")
    first = []
    for line in lines:
        first.append(line)
        if line.strip():
            return itertools.chain(first, lines)
    raise DataError("There is no text on stdin: give one text a line, or name a file.")


def _survey(rows: RowsOfFile, columns: _Columns, classes: Sequence[str]) -> dict[str, int] | None:
    """Read the file once before anything is predicted; give the number of each label, or None without labels."""
    counts, texts = Counter(), 0
    read = (columns.text,) if columns.label is None else (columns.text, columns.label)
    for number, cells in enumerate(rows.read(*read), start=1):
        texts += bool(cell_text(cells[0], number, "text", rows.name))
        if columns.label is not None:
            counts[cell_text(cells[1], number, "label", rows.name)] += 1
    if not texts:
        raise DataError(
            f"None of the {rows.count:,} rows of {rows.name} has a text in column '{columns.text}': name another "
            f"column with --text, out of {_quoted(rows.columns)}."
        )
    unlabelled = counts.pop("", 0)
    if not counts:
        return None
    found = _match_labels(counts, columns, classes, rows.name)
    if unlabelled and found is not None:
        _say(f"{rows.name}: left out of the scores are {unlabelled:,} of {rows.count:,} rows, which have no label")
    return found


def _shown(value: Any) -> str:
    """A cell as it is in the file."""
    return value if isinstance(value, str) else cell_text(value, 0, "text", "the file")


def _lines(
    texts: Sequence[str],
    labels: Sequence[str] | None,
    filled: Sequence[int],
    found: NDArray[np.float32],
    names: Sequence[str],
) -> Iterator[list[str]]:
    chosen = None if labels is None else [labels[i] for i in filled]
    predicted = prediction_lines([texts[i] for i in filled], chosen, found, names)
    has_text = {*filled}
    for i, text in enumerate(texts):
        given = [] if labels is None else [labels[i]]
        yield next(predicted) if i in has_text else [text, *given, *[""] * (1 + len(names))]


class _Scores:
    """Counts that all scores follow from, and the worst mistakes: nothing that grows with the number of rows."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        self._worst: list[tuple[float, int, str, int, int, float]] = []

    def add(
        self,
        codes: Sequence[int],
        filled: Sequence[int],
        found: NDArray[np.float32],
        texts: Sequence[str],
        before: int,
    ) -> None:
        """Count rows, numbered from ``before``; a label of -1 does not count."""
        labels = np.array([codes[i] for i in filled], dtype=np.int64)
        known = np.flatnonzero(labels >= 0)
        predicted = found[known].argmax(axis=1)
        np.add.at(self.confusion, (labels[known], predicted), 1)
        for k, guess in zip(known.tolist(), predicted.tolist(), strict=True):
            if guess != labels[k]:
                right = float(found[k, labels[k]])  # the lower, the higher the loss, -log(right)
                row = before + filled[k] + 1
                mistake = (-right, -row, texts[filled[k]][: _WIDTH + 1], int(labels[k]), guess, float(found[k, guess]))
                (heapq.heappush if len(self._worst) < _SHOWN else heapq.heappushpop)(self._worst, mistake)

    def report(self) -> str:
        """The scores with their intervals, and the rows that the model is most wrong about."""
        rows = int(self.confusion.sum())
        if not rows:
            return "No row has both a text and a label that the model knows: there is nothing to score."
        lines = [f"Scores on {rows:,} rows; in brackets, 95 % intervals over rows"]
        scored = {"accuracy": _accuracy, "macro-F1": macro_f1, "balanced accuracy": balanced_accuracy}
        for name, score in scored.items():
            low, high = counts_interval(self.confusion, score)
            lines.append(f"  {name:<18} {score(self.confusion):.3f}  [{low:.3f}, {high:.3f}]")
        most = self.confusion.sum(axis=1)
        lines.append(f"  {'majority class':<18} {most.max() / rows:.3f}  (always {self.names[most.argmax()]!r})")
        if not self._worst:
            return "\n".join([*lines, "All predictions are the labels."])
        lines.append("Most wrong about, by the loss:")
        for _, row, text, label, guess, sure in sorted(self._worst, reverse=True):
            shown = " ".join(text.split())
            shown = shown if len(text) <= _WIDTH else shown[: _WIDTH - 1] + "…"
            lines.append(
                f"  row {-row:,}: {self.names[label]!r}, predicted {self.names[guess]!r} ({sure:.3f}): {shown}"
            )
        return "\n".join(lines)


def _accuracy(confusion: NDArray[np.int64]) -> float:
    return float(confusion.trace() / confusion.sum())


def _search(
    model: KeptTowers, rows: RowsOfFile | None, out: Path | None, text: str | None, label: str | None, among: Any
) -> int:
    """Write the nearest candidates of each text."""
    if label is not None:
        raise ModelError("Two towers find what is nearest and read no labels: leave --label out.")
    if among is None:
        raise ModelError("Two towers search: give --among FOLDER, of images, or --among FILE, of captions.")
    if rows is None:
        lines, total, name = ((line,) for line in _stdin()), None, "stdin"
    else:
        columns = _choose_columns(rows, text, None, [])
        _survey(rows, _Columns(columns.text, None, False), [])
        lines, total, name = rows.read(columns.text), rows.count, rows.name
    header, candidates, embedded = _candidates(model, Path(among))
    seen = without = 0
    with _writing(out, total, ["text", "rank", *header, "cosine"]) as (written, bar):
        for chunk in in_chunks(lines, 256):
            texts = [cell_text(cells[0], seen + i, "text", name) for i, cells in enumerate(chunk, start=1)]
            filled = [i for i, shown in enumerate(texts) if shown]
            queries = _of_length_1(model.model.encode_texts([texts[i] for i in filled]))
            nearest, cosines = model.nearest(queries, embedded, _NEAREST)
            hits = dict(zip(filled, zip(nearest.tolist(), cosines.tolist(), strict=True), strict=True))
            for i, cells in enumerate(chunk):
                if i not in hits:
                    written.write([[_shown(cells[0]), "", *[""] * len(header), ""]])
                    continue
                found = enumerate(zip(*hits[i], strict=True), start=1)
                written.write(
                    [_shown(cells[0]), rank, *candidates[place], f"{cosine:.6g}"] for rank, (place, cosine) in found
                )
            without += len(texts) - len(filled)
            seen += len(texts)
            bar.update(len(texts))
    if without:
        _say(f"{name}: nothing was searched for {without:,} of {seen:,} rows, which have no text")
    return seen


def _candidates(model: KeptTowers, among: Path) -> tuple[list[str], list[list[str]], Tensor]:
    """Header and cells of what is searched, and its embeddings, each of length 1."""
    if among.is_dir():
        images, files, notes = read_image_files(among, size=model.model.image.size)
        for note in notes:
            _say(f"{among}: {note}")
        return ["file"], [[file] for file in files], _of_length_1(model.model.encode_images(images))
    rows = open_rows(among)
    column = _choose_columns(rows, None, None, []).text
    captions = [cell_text(cell, i, "text", rows.name) for i, (cell,) in enumerate(rows.read(column), start=1)]
    captions = [caption for caption in dict.fromkeys(captions) if caption]
    if not captions:
        raise DataError(f"None of the {rows.count:,} rows of {among} has a caption in column '{column}': give others.")
    return ["nearest"], [[caption] for caption in captions], _of_length_1(model.model.encode_texts(captions))


def _of_length_1(embedded: Tensor) -> Tensor:
    """Embeddings whose similarities are cosines, also of towers that were trained without normalising."""
    return F.normalize(embedded, dim=-1)


@contextmanager
def _writing(out: Path | None, total: int | None, header: Sequence[str]) -> Iterator[tuple[WholeRows, tqdm]]:
    """Open the result and a bar of progress; word what stops the work as a sentence that says how far it came."""
    try:
        rows = WholeRows(out)
    except OSError as error:
        raise type(error)(f"{out} cannot be written ({error.strerror}): give another file.") from None
    try:
        with rows, tqdm(total=total, unit=" rows", file=sys.stderr) as bar:
            rows.write([header])
            yield rows, bar
    except KeyboardInterrupt:
        raise RuntimeError(f"interrupted; {_so_far(rows, bar)}.") from None
    except (ValueError, OSError, RuntimeError) as error:
        raise type(error)(f"{str(error).rstrip('.')}; {_so_far(rows, bar)}.") from None


def _so_far(rows: WholeRows, bar: tqdm) -> str:
    if not rows.count:
        return f"{rows.name} has no row"
    of = "" if bar.total is None else f" of {bar.total:,}"
    return f"{rows.name} has {rows.count:,} whole rows, and {bar.n:,}{of} texts were read"
