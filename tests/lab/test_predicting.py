"""`ftkit predict`: a row for each row of the file, the probabilities of plain transformers, and whole rows always."""

import copy
import csv
import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from tiny_kept import MAX_LENGTH, NAMES, make_checkpoint, make_settings, make_trained, write_kept
from tiny_models import CONFIGS, disturb, make_word_tokenizer
from tiny_texts import csv_of, write
from tiny_towers import make_pairs, make_towers
from transformers import AutoModelForCausalLM, pipeline

from ftkit.adapters.lora import add_lora
from ftkit.cli import main
from ftkit.data.chunks import open_rows
from ftkit.errors import ModelError
from ftkit.lab.kept import predicting
from ftkit.lab.kept.keeping import write_model
from ftkit.lab.kept.loading import KeptClassifier, load_kept
from ftkit.lab.kept.whole_rows import WholeRows
from ftkit.models.loading import load_language_model, save
from ftkit.prompting.classifier import PromptClassifier
from ftkit.prompting.templates import Template, Verbalizer, encode_prompts

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TEXTS = [" ".join(f"w{3 + (7 * i + 5 * j) % 50}" for j in range(1 + (i * 4) % 17)) for i in range(30)]
TEXTS[3] = TEXTS[2]  # a repeated text is not dropped
LABELS = [NAMES[i % 3] for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    classifier, tokenizer = make_trained("full", make_checkpoint(folder / "checkpoint"))
    return write_kept(classifier, folder / "model", tokenizer=tokenizer)


def predict(folder: Path, source: Path | str, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Exit code and rows of the result."""
    out = folder.parent / "predictions.csv"
    out.unlink(missing_ok=True)
    code = main(["predict", str(folder), str(source), "-o", str(out), *options])
    return code, read(out) if out.exists() else []


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def numbers(rows: Sequence[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[f"p({name})"]) for name in NAMES] for row in rows])


def table(labels: Sequence[str | None] = LABELS) -> pd.DataFrame:
    return pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS, "label": labels})


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "a.csv": lambda frame, path: frame.to_csv(path, index=False),
    "a.csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    "a.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "a.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "a.json": lambda frame, path: frame.to_json(path, orient="records"),
    "a.parquet": lambda frame, path: frame.to_parquet(path),
    "a.xlsx": lambda frame, path: frame.to_excel(path, index=False),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_a_row_for_each_row_in_order(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "_CHUNK", 7)
    WRITERS[name](table(), tmp_path / name)
    code, rows = predict(model, tmp_path / name)
    assert code == 0
    assert list(rows[0]) == ["text", "label", "predicted", *(f"p({name})" for name in NAMES)]
    assert [(row["text"], row["label"]) for row in rows] == list(zip(TEXTS, LABELS, strict=True))
    expected = load_kept(model).probabilities(TEXTS)
    np.testing.assert_allclose(numbers(rows), expected, atol=1e-6)
    assert [row["predicted"] for row in rows] == [NAMES[i] for i in expected.argmax(axis=1)]


def test_probabilities_are_those_of_a_plain_pipeline(model: Path, tmp_path: Path) -> None:
    _, rows = predict(model, write(tmp_path, csv_of([(text,) for text in TEXTS], "text")))
    classify = pipeline("text-classification", model=str(model), device=load_kept(model).model.device)
    found = classify(TEXTS, batch_size=32, truncation=True, max_length=MAX_LENGTH, top_k=None)
    expected = [[{each["label"]: each["score"] for each in scores}[name] for name in NAMES] for scores in found]
    np.testing.assert_allclose(numbers(rows), expected, atol=1e-5)
    assert "label" not in rows[0]


@pytest.mark.parametrize("method", ["lora", "pfeiffer"])
def test_kept_adapters_predict(method: str, tmp_path: Path) -> None:
    classifier, tokenizer = make_trained(method, make_checkpoint(tmp_path / "checkpoint"))
    folder = write_kept(classifier, tmp_path / "model", tokenizer=tokenizer)
    code, rows = predict(folder, write(tmp_path, csv_of([(text,) for text in TEXTS], "text")))
    assert code == 0
    np.testing.assert_allclose(numbers(rows), load_kept(folder).probabilities(TEXTS), atol=1e-6)


def test_a_kept_prompt_predicts(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path / "lm")
    make_word_tokenizer().save_pretrained(tmp_path / "lm")
    lm, tokenizer = load_language_model(tmp_path / "lm")
    template, verbalizer = Template("{text} w50"), Verbalizer({name: f" w{52 + i}" for i, name in enumerate(NAMES)})
    _, words = encode_prompts([{"text": "w3", "label": 0}], template, verbalizer, tokenizer)
    prompt = PromptClassifier(disturb(add_lora(lm, rank=2)), words, NAMES)
    folder = write_kept(prompt, tmp_path / "model", template=template, verbalizer=verbalizer)
    code, rows = predict(folder, write(tmp_path, csv_of([(text,) for text in TEXTS], "text")))
    assert code == 0
    np.testing.assert_allclose(numbers(rows), load_kept(folder).probabilities(TEXTS), atol=1e-6)


def test_texts_stay_as_they_are_and_rows_without_text_get_no_prediction(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [' w3 "w4", w5 ', "", "w6\nw7", "w8\rw9", "=w3", "é \U0001f600", "   "]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    code, rows = predict(model, path)
    assert code == 0
    assert [row["text"] for row in rows] == texts
    assert [i for i, row in enumerate(rows) if not row["predicted"]] == [1, 6]
    assert {value for i in (1, 6) for name, value in rows[i].items() if name != "text"} == {""}
    assert "no prediction for 2 of 7 rows, which have no text" in capsys.readouterr().err


def test_texts_on_stdin_go_to_stdout_and_all_else_to_stderr(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w3, w4\r\n\nw5")))
        assert main(["predict", str(model), *arguments]) == 0
        out, err = capfd.readouterr()
        rows = list(csv.DictReader(io.StringIO(out, newline=""), strict=True))
        assert [(row["text"], bool(row["predicted"])) for row in rows] == [("w3, w4", True), ("", False), ("w5", True)]
        assert "no prediction for 1 of 3 rows" in err
        assert "rows/s" in err
    for content, options, said in ((b"\n \n", [], "no text on stdin"), (b"w3", ["--text", "a"], "have no columns")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["predict", str(model), "-", *options]) == 1
        out, err = capfd.readouterr()
        assert (out, said in err) == ("", True)


def test_labels_give_scores_with_intervals_and_the_worst_mistakes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predicting, "_CHUNK", 7)
    table().to_csv(tmp_path / "a.csv", index=False)
    predict(model, tmp_path / "a.csv")
    out, err = capsys.readouterr()
    assert out == ""
    found = load_kept(model).probabilities(TEXTS)
    labels, guesses = [NAMES.index(label) for label in LABELS], found.argmax(axis=1)
    scores = {
        "accuracy": accuracy_score(labels, guesses),
        "macro-F1": f1_score(labels, guesses, average="macro"),
        "balanced accuracy": balanced_accuracy_score(labels, guesses),
    }
    for name, score in scores.items():
        line = next(line for line in err.splitlines() if line.strip().startswith(name))
        shown, low, high = map(float, line.strip().removeprefix(name).translate(str.maketrans("[],", "   ")).split())
        assert shown == pytest.approx(score, abs=6e-4)
        assert low < score < high
    assert "majority class     0.333" in err
    loss = -np.log(found[np.arange(len(labels)), labels])
    wrong = sorted(np.flatnonzero(guesses != labels), key=lambda i: -loss[i])[:10]
    assert [line.split(":")[0].split()[1] for line in err.splitlines() if line.startswith("  row ")] == [
        str(i + 1) for i in wrong
    ]


@pytest.mark.parametrize(
    ("column", "labels", "options", "said"),
    [
        ("label", [NAMES[0].upper(), f" {NAMES[1]} "], (), "whatever their case and blanks: 'SO SO' is 'so so'"),
        ("label", [NAMES[0], "other"], (), "left out of the scores are 15 of 30 rows, whose labels .* 'other'"),
        ("label", [NAMES[0], ""], (), "left out of the scores are 15 of 30 rows, which have no label"),
        ("label", ["0", "2"], (), "matched by number, because .*: 0 is 'so so', 2 is 'good_one'"),
        ("sentiment", [NAMES[0], NAMES[2]], (), "labels from column 'sentiment' .guessed: name another with --label"),
        ("column_x", [NAMES[0], NAMES[2]], (), "labels from column 'column_x' .guessed"),
        ("column_x", [NAMES[0], "other"], ("--label", "column_x"), "left out of the scores are 15 of 30"),
    ],
)
def test_labels_are_matched_by_name_and_what_is_not_certain_is_said(
    column: str,
    labels: list[str],
    options: tuple[str, ...],
    said: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [labels[i % 2] for i in range(len(TEXTS))]
    pd.DataFrame({"text": TEXTS, column: given}).to_csv(tmp_path / "a.csv", index=False)
    code, rows = predict(model, tmp_path / "a.csv", *options)
    err = capsys.readouterr().err
    assert code == 0
    assert [row["label"] for row in rows] == given
    assert pd.Series([err]).str.contains(said).all(), err
    assert "accuracy" in err


def test_a_column_that_may_have_been_labels_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame({"review": TEXTS, "category": ["books", "films"] * 15}).to_csv(tmp_path / "a.csv", index=False)
    code, rows = predict(model, tmp_path / "a.csv")
    err = capsys.readouterr().err
    assert code == 0
    assert "label" not in rows[0]
    assert "texts from column 'review' (guessed" in err
    assert "column 'category' ('books', 'films') is not read as labels" in err


BAD_FILES = {
    "none.csv": (None, (), "There is no file"),
    "empty.csv": ("", (), "is empty"),
    "header.csv": ("text,label\n", (), "is empty"),
    "named.csv": (
        "text,label\nw3,x\n",
        ("--text", "review"),
        "has no column 'review': did you mean .* It has 'text', ",
    ),
    "classes.csv": (
        "text,label\nw3,x\nw4,y\n",
        (),
        "labels .* are 'x', 'y', and none is a class of the model, 'so so'",
    ),
    "blank.csv": ("text,id\n ,1\n,2\n", (), "None of the 2 rows .* has a text"),
    "same.csv": ("text,label\nw3,x\n", ("--label", "text", "--text", "text"), "cannot be both text and label"),
    "numbers.csv": ("a,b\n1,2\n3,4\n", (), "has no column of texts: name one with --text, out of 'a', 'b'"),
    "headless.csv": ("w3 w4,so so\nw5 w6,good_one\n", (), "seems to have no header line"),
    "ragged.csv": ("text\nw3\nw4,w5\n", (), "Line 3 .* has 2 fields"),
    "towers.csv": ("text\nw3\n", ("--among", "x"), "searches nothing"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_nothing_is_written(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, options, said = BAD_FILES[name]
    if content is not None:
        write(tmp_path, content, name)
    out = write(tmp_path, "older", "out.csv")
    assert main(["predict", str(model), str(tmp_path / name), "-o", str(out), *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert pd.Series([shown.err]).str.contains(said).all(), shown.err
    assert sum(line.startswith("ftkit: ") for line in shown.err.splitlines()) == 1
    assert out.read_text() == "older"


def test_what_is_no_kept_classifier_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, tokenizer = make_trained("lora", make_checkpoint(tmp_path / "checkpoint"))
    adapter = write_kept(classifier, tmp_path / "adapter", tokenizer=tokenizer)
    (adapter / "base").rename(tmp_path / "elsewhere")
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    save(lm, make_word_tokenizer(), tmp_path / "lm")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    source, out = write(tmp_path, "text\nw3\n"), tmp_path / "out.csv"
    for name, said in {
        "nothing": "no kept model",
        "empty": "no kept model",
        "adapter": "lacks its base model",
        "lm": "no classification head",
        "checkpoint": "no classification head",
    }.items():
        assert main(["predict", str(tmp_path / name), str(source), "-o", str(out)]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert not out.exists()


def test_the_output_is_not_the_input_nor_a_folder_nor_in_a_missing_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, "text\nw3\n")
    for out, said in ((source, "is the file to read"), (tmp_path, "is a folder"), (tmp_path / "no" / "a", "no folder")):
        assert main(["predict", str(model), str(source), "-o", str(out)]) == 1
        assert said in capsys.readouterr().err
    assert source.read_text() == "text\nw3\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_disk_is_one_sentence(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, csv_of([(text,) for text in TEXTS], "text"))
    assert main(["predict", str(model), str(source), "-o", "/dev/full"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ftkit: /dev/full cannot be written (No space left on device): free some space")
    assert last.endswith("/dev/full has no row.")


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_disk_that_fills_up_holds_whole_rows(model: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path, csv_of([(text,) for text in TEXTS], "text")), tmp_path / "out.csv"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ftkit.cli import main\n"
        "from ftkit.lab.kept import predicting\n"  # imports write files of their own
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "predict", str(model), str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = read(out)
    assert done.returncode == 1
    assert 0 < len(rows) < len(TEXTS)
    assert [row["text"] for row in rows] == TEXTS[: len(rows)]
    assert out.read_bytes().endswith(b"\r\n")
    assert "out.csv cannot be written (File too large)" in done.stderr
    assert f"has {len(rows)} whole rows" in done.stderr


def test_ctrl_c_in_the_middle_leaves_whole_rows_and_says_how_many(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predicting, "_CHUNK", 7)
    classify, calls = KeptClassifier.probabilities, []

    def interrupted(self: KeptClassifier, texts: Sequence[str]) -> np.ndarray:
        calls.append(texts)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return classify(self, texts)

    monkeypatch.setattr(KeptClassifier, "probabilities", interrupted)
    code, rows = predict(model, write(tmp_path, csv_of([(text,) for text in TEXTS], "text")))
    assert code == 1
    assert [row["text"] for row in rows] == TEXTS[:14]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ftkit: interrupted; ")
    assert last.endswith("predictions.csv has 14 whole rows, and 14 of 30 texts were read.")


def test_a_row_that_was_interrupted_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), WholeRows(tmp_path / "a.csv") as rows:
        rows.write([["text"], ["one"]])

        def half(content: memoryview) -> None:
            rows._file.write(content[:3])
            raise KeyboardInterrupt

        monkeypatch.setattr(rows, "_write", half)
        rows.write([["two and more"]])
    assert (tmp_path / "a.csv").read_bytes() == b"text\r\none\r\n"
    assert rows.count == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_a_reader_that_goes_away_is_one_sentence(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path, csv_of([(text,) for text in TEXTS * 200], "text"))
    command = [sys.executable, "-m", "ftkit.cli", "predict", str(model), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "ftkit: Nobody reads stdout any more; stdout has " in err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept towers in `model`, and beside it `images`, a folder of ten images with a file of captions."""
    folder = tmp_path_factory.mktemp("towers")
    pairs = make_pairs(10)
    (folder / "images").mkdir()
    for i, image in enumerate(pairs.images):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    captions = [(f"{i}.png", caption) for i, caption in enumerate(pairs.captions)]
    write(folder / "images", csv_of(captions, "file,caption"), "captions.csv")
    return write_kept(make_towers(), folder / "model", names=None)


def test_towers_find_the_nearest_images_and_captions(
    towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, images = write(tmp_path, "text,id\nw3 w13 w23,1\n,2\nw9,3\n"), towers.parent / "images"
    code, rows = predict(towers, source, "--among", str(images))
    assert code == 0
    assert list(rows[0]) == ["text", "rank", "file", "cosine"]
    assert [(row["text"], row["rank"]) for row in rows] == [
        *(("w3 w13 w23", str(rank)) for rank in range(1, 6)), ("", ""), *(("w9", str(rank)) for rank in range(1, 6)),
    ]  # fmt: skip
    model, pairs = load_kept(towers).model, make_pairs(10)
    cosines = torch.nn.functional.cosine_similarity(model.encode_texts(["w9"]), model.encode_images(pairs.images))
    best = cosines.argsort(descending=True)[:5].tolist()
    assert [row["file"] for row in rows[6:]] == [f"{i}.png" for i in best]
    np.testing.assert_allclose([float(row["cosine"]) for row in rows[6:]], cosines[best], atol=1e-4)
    assert "nothing was searched for 1 of 3 rows" in capsys.readouterr().err

    code, rows = predict(towers, source, "--among", str(images / "captions.csv"))
    assert code == 0
    assert list(rows[0]) == ["text", "rank", "nearest", "cosine"]
    assert {row["nearest"] for row in rows if row["rank"]} <= {*pairs.captions}


def test_a_folder_without_usable_images_is_refused(
    towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    write(tmp_path / "photos", "no image", "a.png")
    source = write(tmp_path, "text\nw3\n")
    assert main(["predict", str(towers), str(source), "--among", str(tmp_path / "photos")]) == 1
    assert "has no image that can be used (1 unreadable files left out: a.png)" in capsys.readouterr().err


def test_towers_of_a_network_that_takes_any_size_keep_the_size_of_their_images(towers: Path, tmp_path: Path) -> None:
    model = make_towers()
    model.image.size = None
    with pytest.raises(ModelError, match="give settings with the `size`"):
        write_kept(model, tmp_path / "model", names=None)
    folder = write_model(model, tmp_path / "model", make_settings(size=8), method="both", seed=3)
    assert load_kept(folder).model.image.size == 8
    code, rows = predict(folder, write(tmp_path, "text\nw3\n"), "--among", str(towers.parent / "images"))
    assert code == 0 and len(rows) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --among FOLDER"),
        (("--among", "nowhere.csv"), "There is no file"),
        (("--among", "images", "--label", "text"), "leave --label out"),
    ],
)
def test_towers_without_anything_to_search_in_are_refused(
    options: tuple[str, ...], said: str, towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert main(["predict", str(towers), str(write(tmp_path, "text\nw3\n")), "-o", str(out), *options]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_no_more_rows_are_held_than_a_chunk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "_CHUNK", 7)
    source, asked, written = write(tmp_path, csv_of([(text,) for text in TEXTS], "text")), [], []
    write_rows, rows = WholeRows.write, open_rows(source)

    def counted(columns: list[str]) -> Iterator[tuple[object, ...]]:
        asked.clear()  # an earlier reading only counts and checks
        for row in rows.read(*columns):
            asked.append(row)
            yield row

    monkeypatch.setattr(predicting, "open_rows", lambda path: replace(rows, _read=counted))
    monkeypatch.setattr(WholeRows, "write", lambda self, lines: written.append(len(asked)) or write_rows(self, lines))
    predicting.predict_file(model, source, tmp_path / "out.csv")
    assert written[1:] == [7, 14, 21, 28, 30]
