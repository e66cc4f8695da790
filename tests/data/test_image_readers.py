"""Images read from a folder and from the hub, and a file for each fault that is reported."""

import io
import struct
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from ftkit.data import image_readers
from ftkit.data.image_readers import read_folder, read_hub_images
from ftkit.errors import DataError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

Hub = tuple[datasets.DatasetDict, list[tuple]]


def save(
    folder: Path,
    name: str,
    colour: int | tuple[int, ...] = RED,
    size: tuple[int, int] = (20, 20),
    mode: str = "RGB",
) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, colour).save(path)


def write(folder: Path, *rows: str, name: str = "captions.csv", header: str = "file,caption") -> None:
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images and a caption for each."""
    save(tmp_path, "a.png", RED)
    save(tmp_path, "b.png", BLUE)
    write(tmp_path, "a.png,a red square", "b.png,a blue square")
    return tmp_path


def add(folder: Path, *rows: str) -> None:
    with (folder / "captions.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in rows)


def test_pairs_are_in_the_order_of_the_rows(folder: Path) -> None:
    save(folder, "deep/c.png", (0, 255, 0))
    add(folder, "deep/c.png,green", 'a.png,"red, again"')
    pairs, notes = read_folder(folder, size=16)
    assert notes == []
    assert pairs.captions == ["a red square", "a blue square", "green", "red, again"]
    assert list(pairs.facts["file"]) == ["a.png", "b.png", "deep/c.png", "a.png"]
    assert pairs.images.shape == (4, 16, 16, 3) and pairs.images.dtype == np.uint8
    assert pairs.images[:, 8, 8].tolist() == [list(RED), list(BLUE), [0, 255, 0], list(RED)]


@pytest.mark.parametrize("header", ["filename,text", "Image,Title", "image,description", "file_name,text"])
def test_usual_columns_are_guessed_at_any_position(folder: Path, header: str) -> None:
    write(folder, "x,a.png,one", "y,b.png,two", header=f"id,{header}")
    assert read_folder(folder)[0].captions == ["one", "two"]


def test_columns_and_file_can_be_named(folder: Path) -> None:
    write(folder, "one;a.png;eins", "two;b.png;zwei", header="caption;bild;satz", name="deutsch.csv")
    with pytest.raises(DataError, match=r"2 \.csv files \(captions.csv, deutsch.csv\): keep only"):
        read_folder(folder)
    with pytest.raises(DataError, match="no column 'file', only 'caption', 'bild', 'satz'"):
        read_folder(folder, "deutsch.csv")
    pairs, _ = read_folder(folder, "deutsch.csv", image="bild", caption="satz")
    assert pairs.captions == ["eins", "zwei"]
    assert len(read_folder(folder, folder / "captions.csv")[0]) == 2


def test_every_fault_is_reported_with_count_and_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_readers, "MAX_PIXELS", 10_000)
    (folder / "text.png").write_text("no image")
    save(folder, "whole.png", size=(90, 90))
    cut = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(cut[: len(cut) // 2])
    save(folder, "huge.png", size=(101, 100))
    save(folder, "again.bmp", RED)
    save(folder.parent, f"{folder.name}-outside.png", (1, 2, 3))
    for i in range(4):
        save(folder, f"spare{i}.jpg", (i, i, i))
    add(folder, "text.png,text", "cut.png,cut", "huge.png,huge", "again.bmp,red again", "gone.png,gone", "whole.png,")
    add(folder, f"../{folder.name}-outside.png,outside", f"{'x' * 999}.png,long", "a.png,a red square")
    pairs, notes = read_folder(folder)
    assert pairs.captions == ["a red square", "a blue square"]
    outside = f"../{folder.name}-outside.png"
    assert notes == [
        f"3 missing files left out: gone.png, {outside}, {'x' * 999}.png",
        "2 unreadable files left out: text.png, cut.png",
        "1 files of more than 50 megapixels left out: huge.png",
        "1 duplicate images (same pixels as an earlier file) left out: again.bmp",
        "4 images of the folder without a caption left out: spare0.jpg, spare1.jpg, spare2.jpg and 1 more",
        "1 rows without a caption left out: whole.png",
        "1 repeated rows left out: a.png",
    ]


def test_oversized_image_is_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_readers.MAX_PIXELS == 50_000_000
    save(folder, "huge.png", 0, (10_000, 5_001), mode="1")
    save(folder, "bomb.png", 0, (20_000, 10_000), mode="1")  # Pillow itself refuses this one
    add(folder, "huge.png,huge", "bomb.png,bomb")
    loaded, load = [], Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self.size) or load(self))
    assert "2 files of more than 50 megapixels left out: huge.png, bomb.png" in read_folder(folder)[1]
    assert max(width for width, _ in loaded) <= 128


def test_too_few_pairs_are_refused_with_the_reasons(folder: Path) -> None:
    write(folder, "a.png,a red square", "gone.png,gone", "b.png,")
    with pytest.raises(DataError, match=r"1 usable pairs .* \(1 missing files left out: gone.png; 1 rows without"):
        read_folder(folder)


def test_a_missing_folder_or_file_of_captions_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        read_folder(folder / "nowhere")
    with pytest.raises(DataError, match=r"There is no file other\.csv"):
        read_folder(folder, "other.csv")
    with pytest.raises(DataError, match=r"a\.png has an unsupported file type: save it as one of \.csv"):
        read_folder(folder, "a.png")
    (folder / "captions.csv").unlink()
    with pytest.raises(DataError, match=r"no \.csv file: add one with the columns file and caption"):
        read_folder(folder)


def read_one(folder: Path, name: str) -> np.ndarray:
    write(folder, f"{name},this", "b.png,blue")
    return read_folder(folder, size=40)[0].images[0].astype(int)


def test_image_is_centred_on_white_without_distortion(folder: Path) -> None:
    save(folder, "wide.png", RED, (80, 40))
    image = read_one(folder, "wide.png")
    assert (image[:10] == 255).all() and (image[30:] == 255).all()
    assert (image[10:30] == RED).all()


def test_exif_orientation_is_applied(folder: Path) -> None:
    image = Image.new("RGB", (80, 40), BLUE)
    image.paste(RED, (0, 0, 40, 40))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees: the left becomes the top
    image.save(folder / "turned.png", exif=exif)
    image = read_one(folder, "turned.png")
    assert (image[5, 20] == RED).all() and (image[35, 20] == BLUE).all() and (image[20, 2] == WHITE).all()


def test_transparency_becomes_white(folder: Path) -> None:
    save(folder, "clear.png", (255, 0, 0, 128), mode="RGBA")
    np.testing.assert_allclose(read_one(folder, "clear.png")[20, 20], [255, 127, 127], atol=1)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([*BLUE, *RED])
    palette.save(folder / "palette.gif", transparency=0)
    assert (read_one(folder, "palette.gif") == 255).all()


def test_grey_becomes_rgb(folder: Path) -> None:
    save(folder, "grey.png", 77, mode="L")
    assert (read_one(folder, "grey.png") == 77).all()
    Image.fromarray(np.full((20, 20), 77 * 257, dtype=np.uint16)).save(folder / "deep.png")
    assert (read_one(folder, "deep.png") == 77).all()


def test_grey_of_more_than_8_bits_is_neither_clipped_nor_black(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.6, dtype=np.float32)).save(folder / "a.tif")
    Image.fromarray(np.full((8, 8), 200, dtype=np.int32)).save(folder / "dim.tif")
    Image.fromarray(np.full((8, 8), 25700, dtype=np.int32)).save(folder / "wide.tif")
    write(folder, "a.tif,floating", "dim.tif,eight bits", "wide.tif,sixteen bits")
    pairs, notes = read_folder(folder)
    assert "1 unreadable files left out: a.tif" in notes  # nothing says which of its values is white
    assert pairs.captions == ["eight bits", "sixteen bits"]
    assert (pairs.images[0] == 200).all() and (pairs.images[1] == 100).all()


def test_an_image_whose_first_row_has_no_caption_is_still_read(folder: Path) -> None:
    save(folder, "c.png", RED)
    write(folder, "a.png,", "c.png,a red square", "b.png,a blue square", "b.png,")
    pairs, notes = read_folder(folder)
    assert pairs.captions == ["a red square", "a blue square"]
    assert notes == ["2 rows without a caption left out: a.png, b.png"]


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("deep/c.png", "deep\\c.png"),
        ("deep/c.png", ".\\deep\\c.png"),
        ("deep/c.png", "./deep//c.png"),
        ("deep/c.png", "deep/../deep/c.png"),
        ("deep/C.PNG", "Deep/c.png"),
        (unicodedata.normalize("NFD", "é/über.png"), unicodedata.normalize("NFC", "é/über.png")),
        (unicodedata.normalize("NFC", "é/über.png"), unicodedata.normalize("NFD", "é/über.png")),
        (unicodedata.normalize("NFC", "é/") + unicodedata.normalize("NFD", "ü.png"), "é\\ü.png"),
        (unicodedata.normalize("NFD", "가/が.png"), unicodedata.normalize("NFC", "가/が.png")),
    ],
)
def test_a_file_is_found_under_the_name_that_another_system_writes(folder: Path, there: str, written: str) -> None:
    save(folder, there, (0, 255, 0))
    add(folder, f"{written},green")
    pairs, notes = read_folder(folder)
    assert notes == []  # neither missing nor an image without a caption
    assert list(pairs.facts["file"]) == ["a.png", "b.png", there]


def test_a_name_as_it_stands_goes_before_a_similar_one(folder: Path) -> None:
    save(folder, "A.png", (0, 255, 0))
    save(folder, "deep\\c.png", (1, 2, 3))
    save(folder, "deep/c.png", (4, 5, 6))
    add(folder, "A.png,green", "deep\\c.png,dark", "deep/c.png,darker", "DEEP/C.png,darker again")
    pairs, notes = read_folder(folder)
    assert notes == [] and pairs.images[:, 0, 0].tolist()[2:] == [[0, 255, 0], [1, 2, 3], [4, 5, 6], [4, 5, 6]]
    add(folder, "A.PNG,of two files")  # a.png or A.png?
    assert "1 missing files left out: A.PNG" in read_folder(folder)[1]


def test_links_and_absolute_names_are_followed_but_nothing_above_the_folder(folder: Path) -> None:
    elsewhere = folder.parent / f"{folder.name}-blobs"
    elsewhere.mkdir()
    for number, name in enumerate(("0a1b", "sub", "secret.png")):
        save(elsewhere, f"{name}.png", (number, 9, 9))
    (folder / "linked.png").symlink_to(elsewhere / "0a1b.png")
    (elsewhere / "shelf").mkdir()
    (elsewhere / "sub.png").rename(elsewhere / "shelf" / "sub.png")
    (folder / "shelf").symlink_to(elsewhere / "shelf")
    (folder / "broken.png").symlink_to(elsewhere / "gone.png")
    save(folder, "absolute.png", (3, 9, 9))
    add(folder, "linked.png,linked", "shelf/sub.png,in a linked folder", f"{folder}/absolute.png,absolute")
    add(folder, "broken.png,broken", f"../{elsewhere.name}/secret.png.png,above", "linked/../../x.png,above")
    link = folder.parent / f"{folder.name}-link"
    link.symlink_to(folder)
    for path in (folder, link):
        pairs, notes = read_folder(path)
        assert list(pairs.facts["file"]) == ["a.png", "b.png", "linked.png", "shelf/sub.png", "absolute.png"]
        above = f"../{elsewhere.name}/secret.png.png"
        assert notes == [f"3 missing files left out: broken.png, {above}, linked/../../x.png"]


def test_hidden_files_of_other_systems_are_skipped(folder: Path) -> None:
    (folder / "._captions.csv").write_bytes(b"\x00\x05\x16\x07")
    (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._b.png").write_bytes(b"\x00\x05\x16\x07")
    save(folder, ".ipynb_checkpoints/a-checkpoint.png", RED)
    assert read_folder(folder)[1] == []


def test_advice_on_several_files_of_captions_can_be_followed_without_options(folder: Path) -> None:
    write(folder, "a.png,one", name="other.csv")
    with pytest.raises(DataError, match=r"\(captions.csv, other.csv\): keep only the one with the captions") as error:
        read_folder(folder)
    assert "`-p captions=FILE`" in str(error.value)


def test_captions_may_be_in_a_spreadsheet_or_lines_of_json(folder: Path) -> None:
    table = pd.DataFrame({"file": ["a.png", "b.png", None], "caption": ["red", 7, "of no file"]})
    table.to_excel(folder / "sheet.xlsx", index=False)
    table.to_json(folder / "lines.jsonl", orient="records", lines=True)
    for name in ("sheet.xlsx", "lines.jsonl"):
        pairs, notes = read_folder(folder, name)
        assert pairs.captions == ["red", "7"] and notes == ["1 missing files left out: (no name)"]


def test_what_was_guessed_about_the_captions_is_noted(folder: Path) -> None:
    write(folder, "x;a.png;one", "y;b.png;two", header="id;Image;Title")
    assert read_folder(folder)[1] == [
        "fields separated by ';'",
        "images from column 'Image', captions from column 'Title' (guessed)",
    ]


def with_exif(folder: Path, name: str, exif: bytes) -> None:
    """An image that is twice as wide as high, its left half red, with EXIF data as they are."""
    image = Image.new("RGB", (80, 40), BLUE)
    image.paste(RED, (0, 0, 40, 40))
    image.save(folder / name, exif=exif, quality=100, subsampling=0)


def exif_entries(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of entries (tag, type, count, value of 4 bytes)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "flawed",
    [
        (0x011A, 2, 4, b"300\0"),  # the resolution as text
        (0x0213, 2, 2, b"&\0\0\0"),
        (0x829A, 5, 1, b"\xff\xff\xff\x7f"),  # points behind the end
        (0x9999, 99, 1, b"\0\0\0\0"),  # of no type
    ],
)
def test_a_malformed_exif_entry_does_not_make_an_image_unreadable(folder: Path, flawed: tuple) -> None:
    with_exif(folder, "turned.jpg", exif_entries(TURNED, flawed))
    image = read_one(folder, "turned.jpg")
    assert abs(image[5, 20] - RED).max() < 9 and abs(image[35, 20] - BLUE).max() < 9  # turned, so red is above


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage that is no TIFF", exif_entries((0x0112, 2, 2, b"6\0\0\0"))])
def test_unusable_exif_data_leave_an_image_as_it_is(folder: Path, exif: bytes) -> None:
    with_exif(folder, "plain.jpg", exif)
    image = read_one(folder, "plain.jpg")
    assert abs(image[20, 5] - RED).max() < 9 and abs(image[20, 35] - BLUE).max() < 9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(folder: Path, orientation: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "turned.png", exif=exif)
    with Image.open(folder / "turned.png") as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved))
    write(folder, "turned.png,this", "b.png,blue")
    assert np.array_equal(read_folder(folder, size=32)[0].images[0], expected)


def test_an_image_of_which_nothing_is_left_is_named(folder: Path) -> None:
    save(folder, "line.png", size=(2000, 3))
    save(folder, "bar.png", size=(3, 2000))
    save(folder, "thin.png", (1, 2, 3), size=(60, 1))
    add(folder, "line.png,a line", "bar.png,a bar", "thin.png,thin")
    pairs, notes = read_folder(folder, size=64)
    assert notes == ["2 images too thin to be seen at 64 pixels left out: line.png, bar.png"]
    assert (pairs.images[2] < 200).any()  # a row of pixels is left
    assert "too thin" not in str(read_folder(folder, size=500)[1])


def test_captions_in_another_encoding_are_decoded_or_refused(folder: Path) -> None:
    rows = "file,caption\na.png,red\nb.png,café\n"
    (folder / "captions.csv").write_text(rows, encoding="utf-16")
    assert read_folder(folder)[1] == ["decoded from UTF-16"]
    (folder / "captions.csv").write_text(rows, encoding="cp1252")
    with pytest.raises(DataError, match=r"captions\.csv is not UTF-8 \(line 3, byte 0xe9\): save it as UTF-8"):
        read_folder(folder)


# The hub ----------------------------------------------------------------------------------------------------


def png(colour: tuple[int, int, int]) -> dict[str, bytes | None]:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def hub_split(images: list[dict | None], captions: list, text: datasets.List | None = None) -> datasets.Dataset:
    features = datasets.Features(id=datasets.Value("int64"), photo=datasets.Image())
    features["caption"] = text or datasets.Value("string")
    rows = {"id": range(len(images)), "photo": images, "caption": captions}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A dictionary of splits that load_dataset returns, and a list of its calls."""
    held = datasets.DatasetDict()
    calls = []
    monkeypatch.delenv("FTKIT_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or held)
    return held, calls


def test_hub_splits_become_pairs(hub: Hub) -> None:
    held, calls = hub
    broken = {"bytes": b"no image", "path": None}
    held["train"] = hub_split([png(RED), broken, png(BLUE), png(RED), None], ["red", "broken", " blue", "", "none"])
    held["test"] = hub_split([png(BLUE)], ["sea"])
    held["extra"] = hub_split([png(BLUE)], ["left out"])
    splits, notes = read_hub_images("owner/name:config", size=20)
    assert calls == [(("owner/name", "config"), {})]
    assert list(splits) == ["train", "test"]
    assert splits["train"].captions == ["red", "blue"] and splits["test"].captions == ["sea"]
    assert splits["train"].images[:, 10, 10].tolist() == [list(RED), list(BLUE)]
    assert (splits["train"].images[:, 0] == 255).all()
    assert len(splits["train"].facts) == 2
    assert notes == [
        "split 'extra' left out",
        "images from column 'photo', captions from column 'caption'",
        "2 unreadable rows of train left out",
        "1 captionless rows of train left out",
    ]


def test_a_thin_image_of_the_hub_is_counted(hub: Hub) -> None:
    line = io.BytesIO()
    Image.new("RGB", (999, 1)).save(line, "PNG")
    images = [png(RED), png(BLUE), {"bytes": line.getvalue(), "path": None}]
    hub[0]["train"] = hub_split(images, ["red", "sea", "line"])
    assert "1 too thin rows of train left out" in read_hub_images("owner/name", size=20)[1]


def test_hub_caption_may_be_a_list(hub: Hub) -> None:
    text = datasets.List(datasets.Value("string"))
    hub[0]["train"] = hub_split([png(RED), png(BLUE), png(BLUE)], [["first", "second"], ["sea"], []], text)
    assert read_hub_images("owner/name")[0]["train"].captions == ["first", "sea"]


def test_missing_hub_columns_are_refused(hub: Hub) -> None:
    hub[0]["train"] = hub_split([png(RED)], ["red"]).rename_column("caption", "satz")
    with pytest.raises(
        DataError, match="no usual column of texts, only id, photo, satz: take another data set, or name"
    ):
        read_hub_images("owner/name")
    assert read_hub_images("owner/name", caption="satz")[0]["train"].captions == ["red"]
    with pytest.raises(DataError, match="no column 'satz' of images"):
        read_hub_images("owner/name", image="satz", caption="satz")


def test_hub_without_standard_split_or_usable_row_is_refused(hub: Hub) -> None:
    hub[0]["dev"] = hub_split([png(RED)], ["red"])
    with pytest.raises(DataError, match="has the splits dev, but none of train, validation, test: take another"):
        read_hub_images("owner/name")
    hub[0]["train"] = hub_split([png(RED)], [""])
    with pytest.raises(DataError, match="None of the 1 train rows"):
        read_hub_images("owner/name")


def test_a_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("FTKIT_OFFLINE", raising=False)
    with pytest.raises(
        DataError,
        match=r"^The hub data set 'owner/name' could not be loaded \(no route\): check its name and the network",
    ):
        read_hub_images("owner/name")
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    with pytest.raises(DataError, match="unset FTKIT_OFFLINE"):
        read_hub_images("owner/name")
