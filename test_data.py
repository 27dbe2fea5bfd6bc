"""
Laws of data.py, the words apart (test_tokenizer.py): rows, pictures, the cache, negatives and batches. `pytest -q test_data.py`

Files of each format are written here as their owners write them, and read back; the broken ones are listed with the message each one gets.
"""

import csv
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import DataError

LAW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**32)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@pytest.fixture
def folder(tmp_path):
    """A folder of six good rows and their pictures: products 0, 1, 2 with two views each."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        picture_of(number).save(tmp_path / f"images/{number}.png")
    write_jsonl(tmp_path / "train.jsonl", [row_of(number) for number in range(6)])
    return tmp_path


def picture_of(number, size=(12, 16)):
    """Noise that no other number gives."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8))


def row_of(number, **changes):
    product = number // 2
    return {
        "image": f"images/{number}.png", "caption": f"Coat no. {product} in café brown.", "product_id": str(product),
        "category": "COATS", "subcategory": f"kind {product % 2}",
    } | changes


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def message(call, *arguments, **options):
    """The message of the DataError that the call ends in."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# --- Rows ---


def test_a_manifest_reads_back_as_it_was_written(folder):
    rows = data.read(folder, "train") + rows_or_none(folder, "val")
    assert sorted(without(rows, "where"), key=lambda row: row["image"]) == [row_of(number) for number in range(6)]
    assert {row["where"] for row in rows} == {f"train.jsonl:{line}" for line in range(1, 7)}


def rows_or_none(folder, split):
    """The rows of a split that may be empty."""
    return data.read_all(folder, split)[0]


def test_csv_as_spreadsheets_write_it_reads_as_jsonl_does(folder):
    rows = [row_of(number, caption=f'A "big", long\ncoat; {number} — été') for number in range(6)]
    write_jsonl(folder / "train.jsonl", rows)
    expected = without(data.read(folder, "train"), "where")
    (folder / "train.jsonl").unlink()
    with open(folder / "train.csv", "w", newline="", encoding="utf-8-sig") as file:  # Excel begins with a byte-order mark
        writer = csv.DictWriter(file, [*rows[0], "price"])
        writer.writeheader()
        writer.writerows(row | {"price": "9,90"} for row in rows)
    assert without(data.read(folder, "train"), "where") == expected
    assert data.read(folder, "train")[0]["where"] == "train.csv:3"  # its quoted caption ends on the file's third line


def test_missing_categories_are_empty_and_whole_numbers_will_do_as_text(folder):
    write_jsonl(folder / "test.jsonl", [{"image": " images/0.png ", "caption": " x ", "product_id": 7, "category": None, "subcategory": 3}])
    (row,) = data.read(folder, "test")
    assert row == {"image": "images/0.png", "caption": "x", "product_id": "7", "category": "", "subcategory": "3", "where": "test.jsonl:1"}


@LAW
@given(products=st.lists(WORDS, min_size=1, max_size=60))
def test_one_file_is_split_by_product_and_nothing_is_lost(products):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture_of(0).save(folder / "0.png")
        write_jsonl(folder / "items.jsonl", [{"image": "0.png", "caption": "x", "product_id": product} for product in products])
        sides = {split: rows_or_none(folder, split) for split in data.SPLITS}
        (folder / "items.jsonl").rename(folder / "train.jsonl")
        cut = {split: rows_or_none(folder, split) for split in ("train", "val")}
    for splits in (sides, cut):
        owners = [{row["product_id"] for row in rows} for rows in splits.values()]
        assert sum(map(len, owners)) == len(set().union(*owners))
        assert Counter(row["product_id"] for rows in splits.values() for row in rows) == Counter(product.strip() for product in products)


def test_the_split_is_80_10_10_and_never_moves():
    sides = Counter(data.side_of_items(str(product)) for product in range(20000))
    assert sides["train"] == pytest.approx(16000, abs=250) and sides["val"] == pytest.approx(2000, abs=200)
    assert [data.side_of_items(str(product)) for product in range(8)] == ["train", "train", "val", "train", "train", "test", "test", "train"]


def test_a_product_of_a_later_split_is_a_bad_row(folder):
    write_jsonl(folder / "val.jsonl", [row_of(2), row_of(4)])
    write_jsonl(folder / "test.jsonl", [row_of(4)])
    assert message(data.read, folder, "train").splitlines()[1:] == [
        "  train.jsonl:3: product 1 is in the split 'val' too", "  train.jsonl:4: product 1 is in the split 'val' too",
        "  train.jsonl:5: product 2 is in the split 'test' too", "  train.jsonl:6: product 2 is in the split 'test' too"]
    assert message(data.read, folder, "val").endswith("val.jsonl:2: product 2 is in the split 'test' too")
    assert {row["product_id"] for row in data.read(folder, "train", skip_bad=True)} == {"0"}


BAD_LINES = [
    (b'{"image": ', "bad JSON (Expecting value at column 10)"),
    (b"[" * 100_000, "bad JSON (nested too deeply)"),
    (b"[1, 2]", "bad JSON (not an object)"),
    (b'{"image": "images/0.png", "caption": "x"}', "no product_id"),
    (b'{"image": "images/0.png", "caption": " \\t", "product_id": "1"}', "empty caption"),
    (b'{"image": null, "caption": "x", "product_id": "1"}', "empty image"),
    (b'{"image": "images/0.png", "caption": ["x"], "product_id": "1"}', "caption must be text, got list"),
    (b'{"image": "images/0.png", "caption": "x", "product_id": true}', "product_id must be text, got bool"),
    (b'{"image": "images/0.png", "caption": "caf\xe9", "product_id": "1"}', "caption is not valid UTF-8"),
    (b'{"image": "images/0.png", "caption": "\\ud800", "product_id": "1"}', "caption is not valid UTF-8"),
    (b'{"image": "images/99.png", "caption": "x", "product_id": "1"}', "missing picture images/99.png"),
    (b'{"image": "images", "caption": "x", "product_id": "1"}', "missing picture images"),
    (b'{"image": "a\\u0000b", "caption": "x", "product_id": "1"}', "missing picture a\0b"),
    (b'{"image": "empty.png", "caption": "x", "product_id": "1"}', "empty.png: empty file (0 bytes)"),
    (b'{"image": "../secret.png", "caption": "x", "product_id": "1"}', "path ../secret.png must be relative to the folder and stay in it"),
    (b'{"image": "images/../../secret.png", "caption": "x", "product_id": "1"}', "path images/../../secret.png must be relative to the folder and stay in it"),
    (b'{"image": "/etc/passwd", "caption": "x", "product_id": "1"}', "path /etc/passwd must be relative to the folder and stay in it"),
    (b'{"image": "../x.h5#3", "caption": "x", "product_id": "1"}', "path ../x.h5 must be relative to the folder and stay in it"),
]


def test_every_bad_line_is_told_by_file_and_line_with_its_reason(folder, capsys):
    (folder / "empty.png").touch()
    good = json.dumps(row_of(0)).encode()
    (folder / "test.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"", *(line for line, _ in BAD_LINES), good]))
    lines = [f"  test.jsonl:{number}: {reason}" for number, (_, reason) in enumerate(BAD_LINES, start=3)]
    expected = [f"{folder}: {len(lines)} bad rows in test (--skip-bad leaves them out)", *lines]
    assert message(data.read, folder, "test").split("\n") == expected
    assert [row["where"] for row in data.read(folder, "test", skip_bad=True)] == ["test.jsonl:1", f"test.jsonl:{len(lines) + 3}"]
    assert capsys.readouterr().out.rstrip("\n").split("\n") == [f"{folder}: left out {len(lines)} bad rows of test", *lines]


def test_bad_csv_lines_are_told_too(folder):
    good = "images/0.png,x,1\n"
    lines = ["image,caption,product_id\n", good, "images/0.png,x\n", "\n", 'images/0.png,"x"y,1\n', good, 'images/0.png,"x,1\n']
    (folder / "test.csv").write_text("".join(lines))
    assert message(data.read, folder, "test").split("\n")[1:] == [
        "  test.csv:3: bad CSV (2 fields under a header of 3)",
        "  test.csv:5: bad CSV (',' expected after '\"')",
        "  test.csv:7: bad CSV (unexpected end of data)",
    ]
    assert len(data.read(folder, "test", skip_bad=True)) == 2
    (folder / "test.csv").write_text('"image"x,caption,product_id\n')
    assert message(data.read, folder, "test") == f"{folder}/test.csv:1: bad CSV (',' expected after '\"')"
    (folder / "test.csv").write_text("image;caption;product_id\n")
    told = f"{folder}/test.csv:1: the header lacks image, caption, product_id (it says 'image;caption;product_id')"
    assert message(data.read, folder, "test") == told
    (folder / "test.csv").write_text("image,caption,product_id,caption\n")
    told = f"{folder}/test.csv:1: the header names caption twice (it says 'image,caption,product_id,caption')"
    assert message(data.read, folder, "test") == told


@LAW
@given(opened=st.integers(0, 9), closed=st.integers(0, 9))
def test_a_quote_left_open_costs_its_own_line_and_no_other(opened, closed):
    """Wherever the next quote stands, also as part of a caption that is quoted well."""
    lines = [f"{number}.png,coat {number},{number}\n" for number in range(10)]
    lines[closed] = f'{closed}.png,"coat {closed}, ""big""",{closed}\n'
    lines[opened] = f'{opened}.png,"coat {opened},{opened}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.csv"
        path.write_text("image,caption,product_id\n" + "".join(lines))
        found = list(data.manifest_csv(path))
    assert [where for where, _ in found] == [f"test.csv:{number + 2}" for number in range(10)]
    for number, (_, record) in enumerate(found):
        assert record.startswith("bad CSV") if number == opened else record["product_id"] == str(number)


def test_what_is_wrong_with_a_whole_folder_is_told(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert message(data.read, empty / "none", "train") == f"{empty}/none: no such folder"
    assert message(data.read, empty, "train").startswith(f"{empty}: holds none of train.jsonl, val.jsonl, test.jsonl, items.jsonl, train.csv,")
    assert message(data.read, folder, "test") == f"{folder}: holds nothing for the split 'test', only for train"
    assert message(data.read, folder, "valid") == "split must be one of train, val, test, got 'valid'"
    (folder / "test.jsonl").touch()
    assert message(data.read, folder, "test") == f"{folder}: the split 'test' has no rows"
    (folder / "items.csv").touch()
    assert message(data.read, folder, "train") == f"{folder}: more than one source for a split (items.csv, test.jsonl, train.jsonl)"


# --- Other people's formats ---


def write_fashion_gen(path, count, first=0):
    """As Fashion-Gen's owners write it: (N, 1) byte strings in latin-1, (N, 256, 256, 3) pixels."""
    h5py = pytest.importorskip("h5py", reason="Fashion-Gen's HDF5 needs h5py")
    fields = {
        "input_name": "Café coat",
        "input_description": "Long wool coat in brown.",
        "input_concat_description": "Café coat. Long wool coat in brown.",
        "input_category": "COATS",
        "input_subcategory": "WOOL COATS",
        "input_gender": "Women",
    }
    with h5py.File(path, "w") as file:
        for key, value in fields.items():
            file[key] = np.array([[value.encode("latin-1")]] * count)
        file["input_productID"] = np.arange(first, first + count).reshape(-1, 1) // 2
        file["input_image"] = np.stack([np.asarray(picture_of(first + number, (256, 256))) for number in range(count)])
        file["index"] = np.arange(count).reshape(-1, 1)


def test_fashion_gen_hdf5(tmp_path):
    write_fashion_gen(tmp_path / "fashiongen_256_256_train.h5", 40)
    write_fashion_gen(tmp_path / "fashiongen_256_256_validation.h5", 2, first=40)
    (row, other), pictures = data.load(tmp_path, "test", 256)
    name = "fashiongen_256_256_validation.h5#0"
    assert row == {"image": name, "caption": "Café coat. Long wool coat in brown.", "product_id": "20", "category": "COATS",
                   "subcategory": "WOOL COATS", "where": name}
    assert (pictures[1] == np.asarray(picture_of(41, (256, 256)))).all() and other["product_id"] == "20"
    train, val = data.read(tmp_path, "train"), data.read(tmp_path, "val")
    assert len(train) + len(val) == 40 and not {row["product_id"] for row in train} & {row["product_id"] for row in val}


def test_fashion_gen_without_the_joined_text_takes_title_and_description(tmp_path):
    path = tmp_path / "fashiongen_256_256_validation.h5"
    write_fashion_gen(path, 1)
    import h5py
    with h5py.File(path, "a") as file:
        del file["input_concat_description"]
    assert data.read(tmp_path, "test")[0]["caption"] == "Café coat. Long wool coat in brown."


def test_a_broken_hdf5_is_told(tmp_path):
    path = tmp_path / "fashiongen_256_256_validation.h5"
    write_fashion_gen(path, 2)
    import h5py
    with h5py.File(path, "a") as file:
        del file["input_productID"]
    assert message(data.read, tmp_path, "test") == f"{path}: lacks input_productID"
    with h5py.File(path, "a") as file:
        file["input_productID"] = np.arange(3)
    assert message(data.read, tmp_path, "test") == f"{path}: its datasets differ in length (2, 3)"
    path.write_bytes(path.read_bytes()[:5000])
    assert message(data.read, tmp_path, "test").startswith(f"{path}: not a whole HDF5 file (")


def test_hdf5_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = tmp_path / "fashiongen_256_256_train.h5"
    path.touch()
    assert message(data.read, tmp_path, "train") == f"{path}: reading it needs the package h5py (pip install h5py)"


def write_processed(folder, end, numbers):
    """As the authors' loader expects it: a picture and a pickled dict under the same name."""
    images, info = folder / f"extracted_{end}_images", folder / f"full_{end}_info_PAI"
    images.mkdir()
    info.mkdir()
    for number in numbers:
        picture_of(number).save(images / f"{number // 2}_{number % 2}.png")
        value = {
            "product_id": number // 2, "img_name": f"{number // 2}_{number % 2}.png", "super_cls_name": "COATS", "super_cls_id": 3,
            "sub_cls_name": "WOOL COATS", "sub_cls_id": 7, "captions": "Long wool coat.",
            "input_ids": [101, 2146, 102], "attention_mask": [1, 1, 1],
        }
        (info / f"{number // 2}_{number % 2}.pkl").write_bytes(pickle.dumps(value))


def test_the_authors_processed_folder(tmp_path):
    write_processed(tmp_path, "train", range(40))
    write_processed(tmp_path, "valid", range(40, 44))
    rows, pictures = data.load(tmp_path, "test", 16)
    assert rows[1] == {"image": "extracted_valid_images/20_1.png", "caption": "Long wool coat.", "product_id": "20", "category": "COATS",
                       "subcategory": "WOOL COATS", "where": "full_valid_info_PAI/20_1.pkl"}
    assert (pictures[1] == data.make_square(picture_of(41), 16, "stretch")).all()
    assert len(data.read(tmp_path, "train")) + len(data.read(tmp_path, "val")) == 40


class Evil:
    """What a pickle must not be able to do."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_asks_for_more_than_plain_values_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_processed(tmp_path, "valid", range(2))
    whole = (tmp_path / "full_valid_info_PAI/0_0.pkl").read_bytes()
    broken = {"a": pickle.dumps(Evil()), "b": pickle.dumps({"product_id": np.int64(1)}), "c": whole[:40], "d": pickle.dumps([1]), "e": b""}
    for name, content in broken.items():
        (tmp_path / f"full_valid_info_PAI/{name}.pkl").write_bytes(content)
    assert message(data.read, tmp_path, "test").split("\n")[1:] == [
        f"  full_valid_info_PAI/a.pkl: bad pickle (it asks for {os.mkdir.__module__}.mkdir; only plain Python values are read)",
        f"  full_valid_info_PAI/b.pkl: bad pickle (it asks for {np._core.multiarray.__name__}.scalar; only plain Python values are read)",
        "  full_valid_info_PAI/c.pkl: bad pickle (pickle data was truncated)",
        "  full_valid_info_PAI/d.pkl: bad pickle (not a dict with img_name, captions and product_id)",
        "  full_valid_info_PAI/e.pkl: bad pickle (Ran out of input)"]
    assert not (tmp_path / "evil").exists()


def write_coco(folder):
    """As Karpathy writes it: five sentences a picture, the splits by name, "restval" to be trained on."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        place = folder / ("train2014" if split == "train" else "val2014")
        place.mkdir(exist_ok=True)
        picture_of(number).save(place / f"COCO_{number}.jpg")
        sentences = [{"tokens": ["a", "coat"], "raw": f"A coat, the {n}th time.", "imgid": number, "sentid": 5 * number + n} for n in range(5)]
        images.append({"filepath": place.name, "sentids": list(range(5)), "filename": f"COCO_{number}.jpg", "imgid": number,
                       "split": split, "sentences": sentences, "cocoid": 900 + number})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def test_karpathys_coco_gives_five_rows_a_picture(tmp_path):
    write_coco(tmp_path)
    assert [row["product_id"] for row in data.read(tmp_path, "train")] == ["900"] * 5 + ["901"] * 5
    assert {row["product_id"] for row in data.read(tmp_path, "val")} == {"902"}
    rows, pictures = data.load(tmp_path, "test", 8)
    assert rows[4] == {"image": "val2014/COCO_3.jpg", "caption": "A coat, the 4th time.", "product_id": "903", "category": "", "subcategory": "",
                       "where": "dataset_coco.json:images[3]"}
    assert pictures[:].shape == (5, 8, 8, 3) and len(pictures.pixels) == 1  # stored once


def test_another_json_is_not_karpathys(tmp_path):
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"id": 1}]}')
    assert message(data.read, tmp_path, "test") == f"{tmp_path}/dataset_coco.json: not Karpathy's layout (KeyError: 'split')"


# --- Pictures ---


def test_grey_palette_16_bit_cmyk_and_one_bit_pictures_come_out_in_their_colours(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.asarray(picture_of(0, (16, 16))) // 128 * 255  # few enough for a palette
    for name, picture, expected in [
        ("grey.png", Image.fromarray(ramp), ramp),
        ("16-bit.png", Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        ("16-bit.tif", Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        ("32-bit.tif", Image.fromarray(ramp.astype(np.int32) * 257), ramp),
        ("palette.gif", Image.fromarray(colours).quantize(8), colours),
        ("one-bit.png", Image.fromarray(ramp).point(lambda level: level > 99, "1"), (ramp > 99) * 255),
        ("cmyk.tif", Image.fromarray(colours).convert("CMYK"), colours),
        ("white.jpg", Image.new("RGB", (16, 16), "white"), ramp * 0 + 255),
    ]:
        picture.save(tmp_path / name)
        expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, (16, 16, 3))
        assert (data.picture(tmp_path, name, 16) == expected).all(), name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (0, 0, 0, 255)  # black on the right, invisible black on the left
    Image.fromarray(rgba).convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    if mode == "P":
        Image.fromarray(rgba).quantize(2).save(tmp_path / "a.png")
    pixels = data.picture(tmp_path, "a.png", 8)
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    upright, exif = picture_of(orientation, (12, 16)), Image.Exif()
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[back[orientation]]) if orientation > 1 else upright
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (data.picture(tmp_path, "a.png", 16) == data.make_square(upright, 16, "stretch")).all()


@pytest.mark.parametrize("tag, wrong", [(0x011A, (2, 4, b"lot\0")), (0x0100, (9, 1, struct.pack(">i", -1)))])  # a resolution in words, a width below 0
def test_a_malformed_tag_beside_the_orientation_spoils_no_picture(tmp_path, tag, wrong):
    tags = {0x0112: (3, 1, struct.pack(">HH", 6, 0)), tag: wrong}  # tag: (type, count, value)
    block = b"".join(struct.pack(">HHI", number, kind, count) + value for number, (kind, count, value) in sorted(tags.items()))
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(tags)) + block + bytes(4)
    upright = picture_of(1, (12, 16))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert (data.picture(tmp_path, "a.png", 16) == data.make_square(upright, 16, "stretch")).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_shows_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert (data.picture(tmp_path, name, 8) == (255, 0, 0)).all()


@LAW
@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 24), seed=SEEDS)
def test_pad_keeps_the_shape_and_fills_with_the_colour_of_the_border(width, height, size, seed):
    generator = np.random.default_rng(seed)
    border, inside = generator.integers(0, 256, (2, 3), np.uint8)
    pixels = np.full((height, width, 3), border, np.uint8)
    pixels[1:-1, 1:-1] = inside
    square = data.make_square(Image.fromarray(pixels), size, "pad")
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    inner = (max(1, round(width * size / max(width, height))), max(1, round(height * size / max(width, height))))
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    middle = np.asarray(Image.fromarray(pixels).resize(inner, Image.BILINEAR))
    assert (square[top:top + inner[1], left:left + inner[0]] == middle).all()
    outside = np.ones((size, size), bool)
    outside[top:top + inner[1], left:left + inner[0]] = False
    if min(inner) == size or not outside.any():
        assert not outside.any()
    elif max(width, height) <= size:  # no pixel of the border is blended with the inside when nothing shrinks
        assert np.abs(square[outside].astype(int) - np.median(frame_of(middle), axis=0).round()).max() == 0


def frame_of(pixels):
    """The outermost pixels, edge by edge."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def test_a_garment_on_a_plain_ground_is_padded_with_that_ground(tmp_path):
    pixels = np.full((40, 20, 3), (240, 230, 220), np.uint8)
    pixels[5:35, 5:15] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (data.picture(tmp_path, "a.png", 40, "pad")[:, [0, 9, 30, 39]] == (240, 230, 220)).all()


def test_a_big_jpeg_decoded_at_a_fraction_is_the_same_picture(tmp_path):
    picture_of(0, (400, 300)).resize((1600, 1200), Image.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = data.make_square(data.open_picture(tmp_path, "a.jpg"), 256, "stretch").astype(int)
    assert np.abs(whole - data.picture(tmp_path, "a.jpg", 256)).mean() < 2
    assert data.open_picture(tmp_path, "a.jpg", at_least=128).size == (200, 150)


def truncated(save_as, share):
    """The first part of a picture file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"a.{save_as}"
        picture_of(0, (64, 64)).save(path)
        content = path.read_bytes()
    return content[:int(len(content) * share)]


def huge_png(width, height):
    """A PNG of a few bytes that says it is enormous."""
    small = Image.new("L", (1, 1))
    with tempfile.TemporaryDirectory() as name:
        small.save(Path(name) / "a.png")
        content = bytearray((Path(name) / "a.png").read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BAD_PICTURES = {
    "empty.jpg": (b"", "empty.jpg: empty file (0 bytes)"),
    "text.jpg": (b"not found", "text.jpg: not a picture"),
    "page.png": (b"<!DOCTYPE html><html></html>", "page.png: not a picture"),
    "head.jpg": (truncated("jpg", 0.02), "head.jpg: truncated picture (Truncated File Read)"),
    "half.jpg": (truncated("jpg", 0.5), "half.jpg: truncated picture (image file is truncated (N bytes not processed))"),
    "half.png": (truncated("png", 0.5), "half.png: truncated picture (image file is truncated)"),
    "large.png": (huge_png(12_000, 10_000), "large.png: absurd size, over 89478485 pixels"),
    "absurd.png": (huge_png(2**30, 2**30), "absurd.png: absurd size, over 89478485 pixels"),
    "float.tif": (None, "float.tif: undecodable picture (nothing says which number is white among its floating-point pixels)"),
}


def write_bad_pictures(folder):
    for name, (content, _) in BAD_PICTURES.items():
        if content is None:
            Image.new("F", (4, 4)).save(folder / name)
        else:
            (folder / name).write_bytes(content)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_every_broken_picture_gets_its_message(tmp_path, name):
    write_bad_pictures(tmp_path)
    assert re.sub(r"\d+ bytes not", "N bytes not", message(data.picture, tmp_path, name, 16)) == BAD_PICTURES[name][1]


@LAW
@given(
    cut=st.integers(0, 2000),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5),
    kind=st.sampled_from(["jpg", "png", "gif", "webp", "tiff"]),
)
@pytest.mark.filterwarnings("ignore")  # Pillow wonders aloud at what it finds
def test_whatever_happened_to_a_file_it_is_a_picture_or_a_data_error(cut, flips, kind):
    content = bytearray(truncated(kind, 1)[:len(truncated(kind, 1)) - cut])
    for place, value in flips:
        if place < len(content):
            content[place] = value
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a").write_bytes(content)
        try:
            assert data.picture(name, "a", 8).shape == (8, 8, 3)
        except DataError as error:
            assert str(error).startswith("a: ")


def test_sizes_and_fits_that_cannot_be_are_told(folder):
    assert message(data.picture, folder, "images/0.png", 0) == "size must be at least 1 pixel, got 0"
    assert message(data.load, folder, "train", 8, "crop") == "fit must be stretch or pad, got 'crop'"
    assert message(data.picture, folder, "images/none.png", 8) == "missing picture images/none.png"


# --- The cache ---


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cache_holds_what_picture_gives_whoever_builds_it(folder, fit, threads, monkeypatch):
    monkeypatch.setattr(data.os, "cpu_count", lambda: threads)
    rows, pictures = data.load(folder, "train", 10, fit)
    assert pictures[:].shape == (len(rows), 10, 10, 3) and pictures[:].dtype == np.uint8 and len(pictures) == len(rows)
    for number, row in enumerate(rows):
        assert (pictures[number] == data.picture(folder, row["image"], 10, fit)).all()
    assert (pictures[np.array([3, 0])] == np.stack([pictures[3], pictures[0]])).all()


def cached(folder):
    return sorted(path.name for path in (folder / ".cache").glob("*.npy"))


def test_the_cache_is_used_again_and_made_anew_when_a_picture_size_or_fit_changes(folder, monkeypatch):
    rows = data.read(folder, "train")
    before, _ = data.open_pictures(folder, rows, 8)
    with monkeypatch.context() as patch:
        patch.setattr(data, "picture", None)  # nothing is decoded again
        assert (data.open_pictures(folder, rows, 8)[0][:] == before[:]).all()
    assert len(cached(folder)) == 1
    data.open_pictures(folder, rows, 8, "pad")
    data.open_pictures(folder, rows, 9)
    assert len(cached(folder)) == 3
    kept = (folder / rows[0]["image"]).stat()
    time.sleep(0.02)
    other = Image.fromarray(255 - np.asarray(Image.open(folder / rows[0]["image"])))
    other.save(folder / rows[0]["image"])
    os.utime(folder / rows[0]["image"], ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as `cp -p` leaves it
    after, _ = data.open_pictures(folder, rows, 8)
    assert (after[0] == data.picture(folder, rows[0]["image"], 8)).all() and not (after[0] == before[0]).all()
    assert (after[1:] == before[1:]).all()


def test_a_bad_picture_is_told_each_time_and_left_out_with_skip_bad(folder, capsys):
    (folder / "images/2.png").write_bytes(truncated("png", 0.5))
    (folder / "images/9.png").write_bytes(b"nothing")
    write_jsonl(folder / "test.jsonl", [row_of(number) for number in (0, 2, 3, 9, 2)] + [{"image": "no.png"}])
    lines = [
        "  test.jsonl:6: no caption",
        "  test.jsonl:2: images/2.png: truncated picture (image file is truncated)",
        "  test.jsonl:4: images/9.png: not a picture",
        "  test.jsonl:5: images/2.png: truncated picture (image file is truncated)",
    ]
    for _ in range(2):  # the second time out of the cache
        assert message(data.load, folder, "test", 8).split("\n") == [f"{folder}: 4 bad rows in test (--skip-bad leaves them out)", *lines]
    rows, pictures = data.load(folder, "test", 8, skip_bad=True)
    assert [row["where"] for row in rows] == ["test.jsonl:1", "test.jsonl:3"]
    assert (pictures[1] == data.picture(folder, "images/3.png", 8)).all() and len(pictures) == 2
    assert capsys.readouterr().out.rstrip("\n").split("\n") == [f"{folder}: left out 4 bad rows of test", *lines]


def test_a_split_of_bad_pictures_only_has_no_rows(folder):
    (folder / "images/0.png").write_bytes(b"nothing")
    write_jsonl(folder / "test.jsonl", [row_of(0)])
    assert message(data.load, folder, "test", 8, skip_bad=True) == f"{folder}: the split 'test' has no rows"
    write_jsonl(folder / "test.jsonl", [{}])
    assert message(data.load, folder, "test", 8, skip_bad=True) == f"{folder}: the split 'test' has no rows"


def test_a_killed_build_is_never_read_and_is_swept_away(folder):
    program = (
        "import data, os, signal\n"
        "picture = data.picture\n"
        "def slow(folder, reference, size, fit):\n"
        "    if reference.endswith('5.png'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return picture(folder, reference, size, fit)\n"
        "data.picture = slow\n"
        f"data.open_pictures({str(folder)!r}, data.read_all({str(folder)!r}, 'train')[0] + data.read_all({str(folder)!r}, 'val')[0], 8)\n")
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL and cached(folder) == []
    (left,) = (folder / ".cache").glob("*.tmp")
    os.utime(left, (1, 1))
    rows = data.read(folder, "train")
    assert (data.open_pictures(folder, rows, 8)[0][0] == data.picture(folder, rows[0]["image"], 8)).all()
    assert list((folder / ".cache").glob("*.tmp")) == []


def test_an_interrupted_build_leaves_nothing_behind(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "picture", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(folder, "train", 8)
    assert list((folder / ".cache").iterdir()) == []


def test_data_that_cannot_be_written_is_cached_among_the_temporary_files(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(other))
    (folder / ".cache").touch()  # no folder can be made here; a mode would not stop root
    rows, pictures = data.load(folder, "train", 8)
    assert pictures.path.parent.parent == other and (pictures[0] == data.picture(folder, rows[0]["image"], 8)).all()


def test_a_cache_that_does_not_fit_on_the_disk_is_not_begun(folder, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: data.shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    assert message(data.load, folder, "train", 8).startswith(f"{folder}/.cache: the decoded pictures take 0.0 GB")


def test_pictures_sent_to_another_process_carry_no_pixels(folder):
    pictures = data.load(folder, "train", 64)[1]
    sent = pickle.dumps(pictures)
    assert len(sent) < 1000 and (pickle.loads(sent)[:] == pictures[:]).all()


# --- Numbers ---


def test_a_class_that_training_never_saw_stays_unknown():
    rows = [{"category": name} for name in ("b", "a", "", "b", "c")]
    names = data.class_names(rows[:4], "category")
    assert names == ["a", "b"] and data.class_ids(rows, "category", names).tolist() == [1, 0, -1, 1, -1]


@LAW
@given(names=st.lists(st.sampled_from(["", "a", "b", "c"])))
def test_equal_names_get_equal_numbers_and_no_name_gets_none(names):
    numbers = data.numbered(names).tolist()
    assert all((a == b) == (m == n) for a, m in zip(names, numbers) for b, n in zip(names, numbers))
    assert all((number == -1) == (name == "") for name, number in zip(names, numbers))


def test_captions_that_differ_in_case_and_spaces_are_one_and_groups_are_sub_categories():
    rows = [
        {"product_id": "1", "caption": "Wool  Coat", "category": "A", "subcategory": "x"},
        {"product_id": "2", "caption": "wool coat", "category": "B", "subcategory": "x"},
        {"product_id": "2", "caption": "Silk coat", "category": "A", "subcategory": ""},
        {"product_id": "3", "caption": "Hat", "category": "A", "subcategory": "x"},
    ]
    products, captions, groups = data.identities(rows)
    assert (products.tolist(), captions.tolist(), groups.tolist()) == ([0, 1, 1, 2], [0, 0, 1, 2], [0, 1, -1, 0])


@LAW
@given(
    captions=st.lists(st.lists(st.sampled_from(["coat", "wool", "zzz"]), min_size=1, max_size=9), min_size=1, max_size=8),
    length=st.integers(2, 12),
)
def test_captions_are_cut_to_the_longest_and_padded_with_zeros(captions, length):
    captions = [" ".join(words) for words in captions]
    tokenizer = data.Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "coat", "wool"])
    tokens = data.tokenize([{"caption": caption} for caption in captions], tokenizer, length)
    longest = max(len(caption.split()) + 2 for caption in captions)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(captions), min(length, longest))
    for caption, row in zip(captions, tokens):
        words = tokenizer.encode(caption, length)
        assert row.tolist() == words[:len(row)] and not any(words[len(row):])
    assert (data.trim(tokens) == tokens).all() and data.trim(tokens[:0]).shape == (0, 0)


# --- Negatives ---

CATALOGUE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-1, 2)), min_size=1, max_size=12)


@settings(LAW, max_examples=200)
@given(catalogue=CATALOGUE, seed=SEEDS, use_groups=st.booleans())
def test_a_negative_has_another_product_and_caption_and_is_of_the_group_if_any_is(catalogue, seed, use_groups):
    products, captions, groups = torch.tensor(catalogue).T.contiguous()
    rows = torch.arange(len(catalogue))
    will_do = (products[:, None] != products) & (captions[:, None] != captions)
    if not will_do.any(dim=1).all():
        first = int((~will_do.any(dim=1)).nonzero()[0])
        told = message(data.draw_negatives, rows, products, captions, data.generator(seed), groups if use_groups else None)
        assert told == f"row {first} of the catalogue can have no negative: every other row shares its product or its caption"
        return
    drawn = data.draw_negatives(rows, products, captions, data.generator(seed), groups if use_groups else None)
    assert will_do[rows, drawn].all()
    close = will_do & (groups[:, None] == groups) & (groups >= 0)
    if use_groups:
        assert (close[rows, drawn] == close.any(dim=1)).all()
    assert (drawn == data.draw_negatives(rows, products, captions, data.generator(seed), groups if use_groups else None)).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_that_will_do_is_equally_likely(grouped):
    products, captions = torch.arange(20) // 2, torch.arange(20) // 4
    groups = torch.arange(20) % 2
    draws = data.draw_negatives(torch.zeros(32000, dtype=torch.int64), products, captions, data.generator("uniform"), groups if grouped else None)
    expected = [number for number in range(4, 20) if not grouped or number % 2 == 0]  # not rows 0 to 3, which share the caption
    counts = torch.bincount(draws, minlength=20)[expected].double()
    assert counts.sum() == 32000
    mean = 32000 / len(expected)
    assert ((counts - mean) ** 2 / mean).sum() < 45  # chi-square of at most 15 degrees of freedom; 45 is passed once in 10,000


def test_the_rare_row_is_found_among_many():
    products = torch.zeros(100_000, dtype=torch.int64)
    products[77_777] = 1
    captions = torch.arange(100_000)
    assert data.draw_negatives(torch.arange(3), products, captions, data.generator(0)).tolist() == [77_777] * 3
    products[88_888], groups = 2, torch.full((100_000,), -1)
    groups[88_888] = 0
    drawn = data.draw_negatives(torch.arange(50), products, captions, data.generator(0), groups)
    assert set(drawn.tolist()) == {77_777, 88_888}  # a row without a group has no preference


# --- Batches ---


@LAW
@given(n=st.integers(1, 30), batch_size=st.integers(1, 40), steps=st.integers(1, 6), seed=SEEDS)
def test_batches_are_the_epochs_laid_end_to_end(n, batch_size, steps, seed):
    rows = torch.cat([data.batch_rows(step, batch_size, n, seed) for step in range(steps)])
    assert len(rows) == steps * batch_size
    for epoch, start in enumerate(range(0, len(rows), n)):
        part = rows[start:start + n]
        assert (part == data.epoch_order(n, seed, epoch)[:len(part)]).all() and len(part.unique()) == len(part)
        assert part.min() >= 0 and part.max() < n


@LAW
@given(n=st.integers(1, 30), batch_size=st.integers(1, 10), window=st.integers(1, 5), kinds=st.integers(1, 4), first=st.integers(0, 3), seed=SEEDS)
def test_a_window_of_alike_batches_holds_the_same_rows_kind_by_kind(n, batch_size, window, kinds, first, seed):
    groups = torch.randint(-1, kinds, (n,), generator=data.generator(seed))
    steps = range(first * window, (first + 1) * window)
    alike = [data.alike_rows(step, batch_size, groups, seed, window) for step in steps]
    usual = [data.batch_rows(step, batch_size, n, seed) for step in steps]
    assert all(len(rows) == batch_size for rows in alike)
    assert sorted(torch.cat(alike).tolist()) == sorted(torch.cat(usual).tolist())
    lowest_first = sorted(([int(group) for group in groups[rows]] for rows in alike), key=lambda kinds: (min(kinds), max(kinds)))
    assert sum(lowest_first, []) == sorted(groups[torch.cat(usual)].tolist())  # laid side by side in order, the batches are the sorted window


def test_alike_batches_come_in_a_random_order():
    groups = torch.arange(64) // 8
    orders = {tuple(int(groups[data.alike_rows(step, 8, groups, seed, 8)][0]) for step in range(8)) for seed in range(5)}
    assert len(orders) == 5 and all(sorted(order) == list(range(8)) for order in orders)


def test_epochs_and_seeds_differ_in_their_order():
    orders = {tuple(data.epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@LAW
@given(key=st.lists(st.integers() | st.text(), max_size=3), other=st.lists(st.integers() | st.text(), max_size=3))
def test_equal_keys_give_equal_randomness_and_other_keys_other(key, other):
    same = [str(part) for part in key] == [str(part) for part in other]
    draws = [torch.randint(2**62, (), generator=data.generator(*each)) for each in (key, key, other)]
    assert draws[0] == draws[1] and (draws[0] == draws[2]) == same


PIXELS = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)


def images_of(world, workers=0, start=0, stop=5, mirror=0.5, shift=0, zoom=0.0):
    """The images of each global batch, put together from the shares of `world` processes."""
    shares = [list(data.Batches(PIXELS, 7, 3, start, stop, rank, world, mirror=mirror, shift=shift, zoom=zoom, workers=workers)) for rank in range(world)]
    for step, batches in zip(range(start, stop), zip(*shares)):
        assert all(batch["step"] == step and (batch["rows"] == data.batch_rows(step, 7, 23, 3)).all() for batch in batches)
        bounds = [batch["slice"] for batch in batches]
        assert bounds[0][0] == 0 and bounds[-1][1] == 7 and all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    return torch.stack([torch.cat([batch["images"] for batch in batches]) for batches in zip(*shares)])


def test_any_number_of_processes_and_loaders_sees_the_same_batches():
    alone = images_of(1)
    assert alone.shape == (5, 7, 3, 4, 4) and alone.dtype == torch.uint8
    for world in (2, 3, 7):
        assert (images_of(world) == alone).all()
    assert (images_of(1, workers=2) == alone).all()


def test_batches_begun_in_the_middle_are_those_of_the_unbroken_run():
    assert (images_of(1, start=3) == images_of(1)[3:]).all()
    assert len(data.Batches(PIXELS, 7, 3, 5, 5)) == len(list(data.Batches(PIXELS, 7, 3, 5, 5))) == 0


def test_mirror_turns_that_share_of_the_pictures_and_nothing_else():
    plain, turned = (images_of(1, stop=60, mirror=mirror).flatten(0, 1) for mirror in (0.0, 0.3))
    rows = torch.cat([data.batch_rows(step, 7, 23, 3) for step in range(60)])
    assert (plain == torch.from_numpy(PIXELS).permute(0, 3, 1, 2)[rows]).all()
    kept, flipped = (turned == plain).flatten(1).all(1), (turned == plain.flip(-1)).flatten(1).all(1)
    assert (kept ^ flipped).all() and 0.2 < flipped.float().mean() < 0.4
    assert (images_of(1, mirror=1.0).flip(-1) == images_of(1, mirror=0.0)).all()


def test_batches_move_each_picture_by_its_own_amount_and_no_further_than_asked():
    """Every picture of a batch is one of the (2 shift + 1)^2 moved versions of its own row, each of which turns up."""
    for shift in (0, 1, 2):
        amounts = [(y, x) for y in range(-shift, shift + 1) for x in range(-shift, shift + 1)]
        same_size = np.ones((len(PIXELS), 2))
        versions = np.stack([data.through_windows(PIXELS, np.array([amount] * len(PIXELS)), same_size) for amount in amounts])  # (amounts, n, H, W, 3)
        found = set()
        for batch in data.Batches(PIXELS, 7, 3, 0, 60, shift=shift):
            for row, image in zip(batch["rows"].tolist(), batch["images"].permute(0, 2, 3, 1).numpy()):
                (which,) = np.nonzero((versions[:, row] == image).all(axis=(1, 2, 3)))[0].tolist()
                found.add(amounts[which])
        assert found == set(amounts)
    moved = dict(shift=2, zoom=0.5)
    assert (images_of(3, **moved) == images_of(1, **moved)).all() and (images_of(1, start=3, **moved) == images_of(1, **moved)[3:]).all()


def test_batches_zoom_each_picture_by_its_own_shares_both_in_and_out_and_no_further_than_asked():
    """A ramp shows the size of the window by its steepness."""
    ramp = np.broadcast_to(np.arange(40, 200, 4, dtype=np.uint8)[None, :, None, None], (23, 40, 40, 3))
    for pictures, axis in ((ramp, 1), (ramp.swapaxes(1, 2), 2)):
        images = torch.cat([batch["images"] for batch in data.Batches(np.ascontiguousarray(pictures), 7, 3, 0, 40, zoom=0.3)]).float()
        steep = (images.select(axis + 1, 25) - images.select(axis + 1, 15)).flatten(1).mean(1) / 40
        assert 0.66 < steep.min() < 0.75 and 1.25 < steep.max() < 1.34 and abs(steep.mean() - 1) < 0.05


def test_loading_leaves_the_global_randomness_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(data.Batches(PIXELS, 7, 3, 0, 2))
    assert (torch.rand(3) == expected).all()


def test_pixels_become_floats_between_0_and_1():
    assert data.images_to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])


# --- Moved pictures, and captions cut ---


@LAW
@given(shift=st.integers(0, 4), side=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_a_moved_picture_is_the_picture_seen_through_a_moved_window(shift, side, seed):
    draw = np.random.default_rng(seed)
    pictures, moves = draw.integers(0, 256, (3, side, side, 3), dtype=np.uint8), draw.integers(-shift, shift + 1, (3, 2))
    found = data.through_windows(pictures, moves, np.ones((3, 2)))
    inside = lambda place: min(max(place, 0), side - 1)  # beyond the border, the border's pixels
    for picture, (down, right), got in zip(pictures, moves.tolist(), found):
        for y in range(side):
            for x in range(side):
                assert (got[y, x] == picture[inside(y + down), inside(x + right)]).all()


def two(numbers):
    return st.tuples(numbers, numbers)


@LAW
@given(sides=two(st.floats(0.2, 1.8)), moves=two(st.integers(-4, 4)), slopes=two(st.integers(-5, 5)))
def test_through_a_smaller_or_larger_window_a_slope_is_a_slope_still(sides, moves, slopes):
    """A picture that grows evenly along both sides: what stands where the window looks, wherever that is well inside the picture."""
    H, W = 30, 20
    value = lambda y, x: 128 + slopes[0] * (y - H / 2) + slopes[1] * (x - W / 2)  # in [0, 255]
    picture = np.repeat(value(*np.mgrid[:H, :W]).astype(np.uint8)[..., None], 3, axis=2)
    (found,) = data.through_windows(picture[None], np.array([moves]), np.array([sides]))
    assert found.shape == picture.shape and found.dtype == np.uint8
    seen = [(np.arange(n) + 0.5 - n / 2) * side + n / 2 + move - 0.5 for n, side, move in zip((H, W), sides, moves)]
    inside = [(place >= 2) & (place <= n - 3) for place, n in zip(seen, (H, W))]
    expected = value(*np.meshgrid(*seen, indexing="ij"))[np.ix_(*inside)]
    quarter_of_a_pixel = max(map(abs, slopes)) / 4
    assert np.abs(found[np.ix_(*inside)] - expected[..., None]).max(initial=0) <= 1 + quarter_of_a_pixel  # 1: it is rounded twice


def test_trim_keeps_the_last_word_behind_a_padding_word_written_in_the_caption():
    tokens = torch.tensor([[2, 7, 0, 8, 3, 0, 0], [2, 9, 0, 3, 0, 0, 0]])
    assert data.trim(tokens).tolist() == tokens[:, :5].tolist()
    assert data.trim(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 0)


# --- Command line ---


def run(*arguments):
    """What data.py ends with: None, or the error that it prints on its way out with status 1."""
    try:
        data.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return stopped.code


def test_check_reports_a_good_folder_and_draws_it(folder, capsys):
    write_jsonl(folder / "train.jsonl", [row_of(number, image=f"images/{number % 5}.png") for number in range(6)])
    picture_of(0).save(folder / "images/copy.bmp")
    write_jsonl(folder / "val.jsonl", [row_of(20, image="images/4.png", category="HATS", caption="Coat no. 0 in café brown.")])
    write_jsonl(folder / "test.jsonl", [row_of(30, image="images/copy.bmp", caption="One, two, three", subcategory="")])
    assert run("check", folder, "--sheet", folder / "sheet.png") is None
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}",
        "rows        8: train 6, val 1, test 1",
        "products    5: train 3, val 1, test 1; val has too few to judge matching (2); test has too few to draw candidates (101)",
        "pictures    6: 12x16 (6); the smallest 12x16, the largest 12x16",
        "captions    of 10 words in the middle, 99% up to 10, the longest 10 (more where the vocabulary cuts words in pieces)",
        "category    2 names: COATS (7), HATS (1); missing in 0 rows; never in train: HATS",
        "subcategory 2 names: kind 0 (5), kind 1 (2); missing in 1 rows; never in train: none",
        "duplicates  1 captions tell of several products (as 'coat no. 0 in café brown.'); "
        "2 pictures show several (as images/0.png); 1 have several names (as images/0.png = images/copy.bmp)",
        "bad rows    0",
        f"pictures and captions to look at: {folder}/sheet.png",
    ]
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    shown = np.asarray(data.picture(folder, "images/0.png", 160, "pad"))
    assert (sheet[6:166, 6:166] == shown).all() and (sheet[170:200, 6:166] < 128).any()


def test_check_lists_each_bad_row_once_and_fails_unless_told_to_skip(folder, capsys):
    (folder / "images/2.png").write_bytes(b"nothing")
    with open(folder / "train.jsonl", "a") as file:
        file.write("{\n")
    assert run("check", folder) == f"data.py: {folder}: 2 bad rows, 5 good ones (--skip-bad leaves the bad ones out)"
    printed = capsys.readouterr().out.splitlines()
    assert printed.count("  train.jsonl:3: images/2.png: not a picture") == sum("train.jsonl:7: bad JSON" in line for line in printed) == 1
    assert "bad rows    2" in printed and run("check", folder, "--skip-bad") is None


def test_vocab_writes_a_vocabulary_and_never_over_another(folder):
    assert run("vocab", folder, "--size", 60) is None
    tokenizer = data.Tokenizer.load(folder / "vocab.txt")
    assert tokenizer.decode(tokenizer.encode("coat no. 0")) and len(tokenizer) <= 60
    assert run("vocab", folder) == f"data.py: {folder}/vocab.txt is there already: name the file to write with --out"
    assert run("vocab", folder, "--out", folder / "vocab.txt") is None


def test_candidates_are_written_for_the_test_split(folder):
    write_jsonl(folder / "test.jsonl", [row_of(0, product_id=f"t{number}", caption=f"Coat {number}") for number in range(120)])
    assert run("candidates", folder, "--seed", 3, "--out", folder / "lists.json") is None
    lists = json.loads((folder / "lists.json").read_text())
    assert len(lists) == 120 and all(len(entry["candidates"]) == 101 and entry["candidates"][0] == entry["query"] for entry in lists)


def test_exit_statuses_and_one_line_errors(folder):
    def shell(*arguments):
        command = [sys.executable, data.__file__, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stderr
    assert shell("check", folder / "none") == (1, f"data.py: {folder}/none: no such folder\n")
    code, told = shell("check", folder, "--size", 3)
    assert code == 2 and "unrecognized arguments: --size 3" in told
