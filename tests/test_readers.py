"""
Laws of extras/readers.py: files of each format are written as their owners write them, and read back. Broken and
hostile files are listed with the message that each one gets.
"""

import csv
import json
import os
import pickle
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import limits, message, noise, row_of, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from extras import readers
from extras.runtime import UserError

law = settings(deadline=None, max_examples=25)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def good_rows(folder, split):
    """The rows of a split that may be empty."""
    return readers.read_all(folder, split)[0]


# --- Manifests ---


def test_a_manifest_reads_back_as_it_was_written(folder):
    rows = readers.read(folder, "train") + good_rows(folder, "val")
    expected = [row_of(number) for number in range(6)]
    assert sorted(without(rows, "where"), key=lambda row: row["image"]) == expected
    assert {row["where"] for row in rows} == {f"train.jsonl:{line}" for line in range(1, 7)}


def test_csv_as_spreadsheets_write_it_reads_as_jsonl_does(folder):
    rows = [row_of(number, caption=f'A "big", long\ncoat; {number} — été') for number in range(6)]
    write_rows(folder / "train.jsonl", rows)
    expected = without(readers.read(folder, "train"), "where")
    (folder / "train.jsonl").unlink()
    with open(folder / "train.csv", "w", newline="", encoding="utf-8-sig") as file:  # Excel writes a byte-order mark
        writer = csv.DictWriter(file, [*rows[0], "price"])
        writer.writeheader()
        writer.writerows(row | {"price": "9,90"} for row in rows)
    assert without(readers.read(folder, "train"), "where") == expected
    assert readers.read(folder, "train")[0]["where"] == "train.csv:3"  # its quoted caption ends on the third line


def test_missing_categories_are_empty_and_whole_numbers_count_as_text(folder):
    record = {"image": " images/0.png ", "caption": " x ", "product_id": 7, "category": None, "subcategory": 3}
    write_rows(folder / "test.jsonl", [record])
    (row,) = readers.read(folder, "test")
    expected = {"image": "images/0.png", "caption": "x", "product_id": "7", "category": "", "subcategory": "3"}
    assert row == expected | {"where": "test.jsonl:1"}


LONG = "x" * 100
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
    (
        b'{"image": "images/0.png", "caption": "%s", "product_id": "1"}' % (b"x" * 100_001),
        "caption may have 100000 characters at most, got 100001",
    ),
    (b'{"image": "images/99.png", "caption": "x", "product_id": "1"}', "missing picture images/99.png"),
    (b'{"image": "images", "caption": "x", "product_id": "1"}', "missing picture images"),
    (b'{"image": "a\\u0000b", "caption": "x", "product_id": "1"}', "missing picture 'a\\x00b'"),
    (b'{"image": "%s", "caption": "x", "product_id": "1"}' % LONG.encode(), f"missing picture '{LONG[:76]}..."),
    (b'{"image": "empty.png", "caption": "x", "product_id": "1"}', "empty.png: empty file (0 bytes)"),
    (
        b'{"image": "../a.png", "caption": "x", "product_id": "1"}',
        "path ../a.png must be relative to the folder and stay in it",
    ),
    (
        b'{"image": "images/../../a.png", "caption": "x", "product_id": "1"}',
        "path images/../../a.png must be relative to the folder and stay in it",
    ),
    (
        b'{"image": "/etc/passwd", "caption": "x", "product_id": "1"}',
        "path /etc/passwd must be relative to the folder and stay in it",
    ),
    (
        b'{"image": "../x.h5#3", "caption": "x", "product_id": "1"}',
        "path ../x.h5 must be relative to the folder and stay in it",
    ),
]


def test_every_bad_line_is_reported_by_file_and_line_with_its_reason(folder, capsys):
    (folder / "empty.png").touch()
    good = json.dumps(row_of(0)).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", *(line for line, _ in BAD_LINES), good]
    (folder / "test.jsonl").write_bytes(b"\n".join(lines))
    expected = [f"  test.jsonl:{number}: {reason}" for number, (_, reason) in enumerate(BAD_LINES, start=3)]
    first, *told = message(readers.read, folder, "test").split("\n")
    assert first == f"{folder}: {len(BAD_LINES)} bad rows in test (--skip-bad leaves them out)" and told == expected
    rows = readers.read(folder, "test", skip_bad=True)
    assert [row["where"] for row in rows] == ["test.jsonl:1", f"test.jsonl:{len(BAD_LINES) + 3}"]
    first, *told = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first == f"{folder}: left out {len(BAD_LINES)} bad rows of test" and told == expected


def test_of_very_many_bad_rows_a_hundred_are_listed(folder):
    write_rows(folder / "test.jsonl", [{}] * 150)
    lines = message(readers.read, folder, "test").split("\n")
    assert len(lines) == 102 and lines[-1] == "  ... and 50 more; `data.py check` lists all"


def test_bad_csv_lines_are_reported_too(folder):
    good = "images/0.png,x,1\n"
    header = "image,caption,product_id\n"
    lines = [header, good, "images/0.png,x\n", "\n", 'images/0.png,"x"y,1\n', good, 'images/0.png,"x,1\n']
    (folder / "test.csv").write_text("".join(lines))
    assert message(readers.read, folder, "test").split("\n")[1:] == [
        "  test.csv:3: bad CSV (2 fields under a header of 3)",
        "  test.csv:5: bad CSV (',' expected after '\"')",
        "  test.csv:7: bad CSV (unexpected end of data)",
    ]
    assert len(readers.read(folder, "test", skip_bad=True)) == 2


BAD_HEADERS = [
    ('"image"x,caption,product_id\n', "bad CSV (',' expected after '\"')"),
    (
        "image;caption;product_id\n",
        "the header lacks image, caption, product_id (it is 'image;caption;product_id')",
    ),
    ("image,caption,product_id,caption\n", "the header names caption twice"),
    ("y" * 1000, f"the header lacks image, caption, product_id (it is '{'y' * 76}...)"),
]


@pytest.mark.parametrize("header, reason", BAD_HEADERS)
def test_a_bad_csv_header_is_one_error(tmp_path, header, reason):
    (tmp_path / "test.csv").write_text(header)
    assert message(readers.read, tmp_path, "test") == f"{tmp_path}/test.csv:1: {reason}"


@law
@given(opened=st.integers(0, 9), closed=st.integers(0, 9))
def test_a_quote_left_open_costs_its_own_line_and_no_other(opened, closed):
    """Wherever the next quote is, also within a caption that is quoted correctly."""
    lines = [f"{number}.png,coat {number},{number}\n" for number in range(10)]
    lines[closed] = f'{closed}.png,"coat {closed}, ""big""",{closed}\n'
    lines[opened] = f'{opened}.png,"coat {opened},{opened}\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.csv"
        path.write_text("image,caption,product_id\n" + "".join(lines))
        found = list(readers.manifest_csv(path))
    assert [where for where, _ in found] == [f"test.csv:{number + 2}" for number in range(10)]
    for number, (_, record) in enumerate(found):
        assert record.startswith("bad CSV") if number == opened else record["product_id"] == str(number)


def test_a_whole_folder_that_cannot_be_read_is_one_error(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert message(readers.read, empty / "none", "train") == f"{empty}/none: no such folder"
    told = message(readers.read, empty, "train")
    assert told.startswith(f"{empty}: holds none of train.jsonl, val.jsonl, test.jsonl, items.jsonl, train.csv,")
    told = message(readers.read, folder, "test")
    assert told == f"{folder}: holds nothing for the split 'test', only for train"
    assert message(readers.read, folder, "valid") == "split must be one of train, val, test, got 'valid'"
    (folder / "test.jsonl").touch()
    assert message(readers.read, folder, "test") == f"{folder}: the split 'test' has no rows"
    (folder / "items.csv").touch()
    told = message(readers.read, folder, "train")
    assert told == f"{folder}: more than one source for a split (items.csv, test.jsonl, train.jsonl); keep one"


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv", "dataset_coco.json", "fashiongen_256_256_validation.h5"])
def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path, name):
    if name.endswith(".h5"):
        pytest.importorskip("h5py")
    os.mkfifo(tmp_path / name)
    with limits(seconds=5):
        assert message(readers.read, tmp_path, "test") == f"{tmp_path / name}: not a regular file"


# --- Splits ---


@law
@given(products=st.lists(WORDS, min_size=1, max_size=60))
def test_one_file_is_split_by_product_and_nothing_is_lost(products):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise(0).save(folder / "0.png")
        rows = [{"image": "0.png", "caption": "x", "product_id": product} for product in products]
        write_rows(folder / "items.jsonl", rows)
        three = {split: good_rows(folder, split) for split in readers.SPLITS}
        (folder / "items.jsonl").rename(folder / "train.jsonl")
        two = {split: good_rows(folder, split) for split in ("train", "val")}
    for splits in (three, two):
        owners = [{row["product_id"] for row in rows} for rows in splits.values()]
        assert sum(map(len, owners)) == len(set().union(*owners))
        found = Counter(row["product_id"] for rows in splits.values() for row in rows)
        assert found == Counter(product.strip() for product in products)


def test_the_split_is_80_10_10_and_never_changes():
    sides = Counter(readers.side_of_items(str(product)) for product in range(20000))
    assert sides["train"] == pytest.approx(16000, abs=250) and sides["val"] == pytest.approx(2000, abs=200)
    first = [readers.side_of_items(str(product)) for product in range(8)]
    assert first == ["train", "train", "val", "train", "train", "test", "test", "train"]


def test_a_product_that_is_also_in_a_later_split_is_a_bad_row(folder):
    write_rows(folder / "val.jsonl", [row_of(2), row_of(4)])
    write_rows(folder / "test.jsonl", [row_of(4)])
    assert message(readers.read, folder, "train").splitlines()[1:] == [
        "  train.jsonl:3: product 1 is in the split 'val' too",
        "  train.jsonl:4: product 1 is in the split 'val' too",
        "  train.jsonl:5: product 2 is in the split 'test' too",
        "  train.jsonl:6: product 2 is in the split 'test' too",
    ]
    assert message(readers.read, folder, "val").endswith("val.jsonl:2: product 2 is in the split 'test' too")
    assert {row["product_id"] for row in readers.read(folder, "train", skip_bad=True)} == {"0"}


# --- Fashion-Gen's HDF5 ---

H5_TEXT = {
    "input_name": "Café coat",
    "input_description": "Long wool coat in brown.",
    "input_concat_description": "Café coat. Long wool coat in brown.",
    "input_category": "COATS",
    "input_subcategory": "WOOL COATS",
    "input_gender": "Women",
}
TEST_H5 = "fashiongen_256_256_validation.h5"


def write_fashion_gen(path, count, first=0, side=32):
    """As Fashion-Gen's owners write it: (N, 1) byte strings in latin-1, (N, H, W, 3) pixels. Returns h5py."""
    h5py = pytest.importorskip("h5py", reason="Fashion-Gen's HDF5 needs h5py")
    with h5py.File(path, "w") as file:
        for key, value in H5_TEXT.items():
            file[key] = np.array([[value.encode("latin-1")]] * count)
        file["input_productID"] = np.arange(first, first + count).reshape(-1, 1) // 2
        pictures = [np.asarray(noise(first + number, (side, side))) for number in range(count)]
        file["input_image"] = np.stack(pictures)
        file["index"] = np.arange(count).reshape(-1, 1)
    return h5py


def test_fashion_gen_hdf5(tmp_path):
    write_fashion_gen(tmp_path / "fashiongen_256_256_train.h5", 40)
    write_fashion_gen(tmp_path / TEST_H5, 2, first=40)
    opened, pictures = data.load(tmp_path, "test", 32)
    (row, other) = opened.rows
    assert row == {
        "image": f"{TEST_H5}#0",
        "caption": "Café coat. Long wool coat in brown.",
        "product_id": "20",
        "category": "COATS",
        "subcategory": "WOOL COATS",
        "where": f"{TEST_H5}#0",
    }
    assert (pictures[1] == np.asarray(noise(41, (32, 32)))).all() and other["product_id"] == "20"
    train, val = readers.read(tmp_path, "train"), readers.read(tmp_path, "val")
    assert len(train) + len(val) == 40 and not {row["product_id"] for row in train} & {row["product_id"] for row in val}


def test_fashion_gen_without_the_joined_text_takes_title_and_description(tmp_path):
    h5py = write_fashion_gen(tmp_path / TEST_H5, 1)
    with h5py.File(tmp_path / TEST_H5, "a") as file:
        del file["input_concat_description"]
    assert readers.read(tmp_path, "test")[0]["caption"] == "Café coat. Long wool coat in brown."


def change(key, value=None, **options):
    """A change of the open file: the data set `key` replaced (`value`), made anew (`options`) or removed."""

    def apply(file):
        del file[key]
        if value is not None:
            file[key] = value
        elif options:
            file.create_dataset(key, **options)

    return apply


def link(key, kind, *target):
    """A change of the open file: `key` replaced by a link of h5py's class `kind`."""

    def apply(file):
        import h5py

        del file[key]
        file[key] = getattr(h5py, kind)(*target)

    return apply


def virtual(file):
    import h5py

    layout = h5py.VirtualLayout(shape=(2, 8, 8, 3), dtype="u1")
    layout[:] = h5py.VirtualSource("other.h5", "input_image", shape=(2, 8, 8, 3))
    del file["input_image"]
    file.create_virtual_dataset("input_image", layout)


IN_THE_FILE = "must be a data set in the file itself, not a link or a group"
FAT = {"shape": (2, 7000, 7000, 3), "dtype": "u1", "chunks": (1, 100, 100, 3)}
HIGH = {"shape": (2, 40_000, 1, 3), "dtype": "u1", "chunks": (1, 4000, 1, 3)}
OUTSIDE = {"shape": (2,), "dtype": "S4", "external": [("/etc/passwd", 0, 8)]}
BROKEN_H5 = {
    "no product": (change("input_productID"), "lacks input_productID"),
    "no pictures": (change("input_image"), "lacks input_image"),
    "lengths": (change("input_productID", np.arange(3)), "its data sets differ in length (2, 3)"),
    "scalar": (change("input_name", 5), "input_name has an unexpected form, int64 ()"),
    "floats": (change("input_name", np.zeros(2)), "input_name has an unexpected form, float64 (2,)"),
    "strings of any length": (change("input_name", ["a", "b"]), "input_name has an unexpected form, object (2,)"),
    "two columns": (change("input_name", np.zeros((2, 2), int)), "its data sets differ in length (2, 4)"),
    "grey": (
        change("input_image", np.zeros((2, 8, 8), np.uint8)),
        "input_image must be uint8 (N, H, W, 3), got uint8 (2, 8, 8)",
    ),
    "16 bits": (
        change("input_image", np.zeros((2, 8, 8, 3), np.uint16)),
        "input_image must be uint8 (N, H, W, 3), got uint16 (2, 8, 8, 3)",
    ),
    "fat": (change("input_image", **FAT), "input_image is uint8 (2, 7000, 7000, 3), more than the file can hold"),
    "long": (
        change("input_name", shape=(10**9,), dtype="S9", chunks=(10,)),
        "input_name is |S9 (1000000000,), more than the file can hold",
    ),
    "fat chunk": (
        change("input_image", shape=(2, 8, 8, 3), maxshape=(None, None, None, 3), dtype="u1", chunks=(99, 999, 999, 3)),
        "input_image is uint8 (2, 8, 8, 3), more than the file can hold",
    ),
    "dangling": (link("input_name", "SoftLink", "/nothing"), f"input_name {IN_THE_FILE}"),
    "external": (link("input_name", "ExternalLink", "other.h5", "/input_name"), f"input_name {IN_THE_FILE}"),
    "external pictures": (link("input_image", "ExternalLink", "other.h5", "/x"), f"input_image {IN_THE_FILE}"),
    "external bytes": (change("input_name", **OUTSIDE), f"input_name {IN_THE_FILE}"),
    "virtual": (virtual, f"input_image {IN_THE_FILE}"),
    "group": (lambda file: (change("input_name")(file), file.create_group("input_name")), f"input_name {IN_THE_FILE}"),
}


@pytest.mark.parametrize("case", BROKEN_H5)
def test_a_broken_or_hostile_hdf5_is_one_error_that_names_the_file(tmp_path, case):
    path = tmp_path / TEST_H5
    h5py = write_fashion_gen(tmp_path / "other.h5", 2, side=8)
    write_fashion_gen(path, 2, side=8)
    apply, reason = BROKEN_H5[case]
    with h5py.File(path, "a") as file:
        apply(file)
    with limits():
        assert message(readers.read, tmp_path, "test") == f"{path}: {reason}"


def test_pictures_of_an_absurd_size_in_hdf5_are_refused(tmp_path):
    h5py = write_fashion_gen(tmp_path / TEST_H5, 2, side=300)
    with h5py.File(tmp_path / TEST_H5, "a") as file:
        change("input_image", **HIGH)(file)
    told = message(data.load, tmp_path, "test", 8)
    size = "absurd size, 1 x 40000 (at most 50000000 pixels, 30000 on a side, are read)"
    assert told.endswith(f"{TEST_H5}#1: {TEST_H5}#1: {size}")
    assert message(data.open_picture, tmp_path, f"{TEST_H5}#2").startswith(f"{TEST_H5}#2: absurd size")


@law
@given(cut=st.integers(0, 20_000), flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=8))
def test_a_damaged_hdf5_is_read_or_one_error_that_names_the_file(tmp_path_factory, cut, flips):
    whole = tmp_path_factory.getbasetemp() / "whole.h5"
    if not whole.exists():
        write_fashion_gen(whole, 2, side=8)
    with tempfile.TemporaryDirectory() as folder:
        content = bytearray(whole.read_bytes())
        for place, value in flips:
            content[place % len(content)] = value
        path = Path(folder) / TEST_H5
        path.write_bytes(content[: len(content) - cut % len(content)])
        try:
            opened, _ = data.load(folder, "test", 8, skip_bad=True)
            rows = opened.rows
            assert len(rows) <= 2
        except UserError as error:
            assert TEST_H5 in str(error) or "has no rows" in str(error)


def test_hdf5_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = tmp_path / TEST_H5
    path.touch()
    assert message(readers.read, tmp_path, "test") == f"{path}: reading it needs the package h5py (pip install h5py)"


# --- The authors' pickles ---


def write_processed(folder, end, numbers):
    """As the authors' loader expects it: a picture and a pickled dict under the same name."""
    images, info = folder / f"extracted_{end}_images", folder / f"full_{end}_info_PAI"
    images.mkdir()
    info.mkdir()
    for number in numbers:
        name = f"{number // 2}_{number % 2}"
        noise(number).save(images / f"{name}.png")
        value = {
            "product_id": number // 2,
            "img_name": f"{name}.png",
            "super_cls_name": "COATS",
            "super_cls_id": 3,
            "sub_cls_name": "WOOL COATS",
            "sub_cls_id": 7,
            "captions": "Long wool coat.",
            "input_ids": [101, 2146, 102],
            "attention_mask": (1, 1, 1),
        }
        (info / f"{name}.pkl").write_bytes(pickle.dumps(value, protocol=number % 6))


def test_the_authors_processed_folder(tmp_path):
    write_processed(tmp_path, "train", range(40))
    write_processed(tmp_path, "valid", range(40, 44))
    opened, pictures = data.load(tmp_path, "test", 16)
    rows = opened.rows
    assert rows[1] == {
        "image": "extracted_valid_images/20_1.png",
        "caption": "Long wool coat.",
        "product_id": "20",
        "category": "COATS",
        "subcategory": "WOOL COATS",
        "where": "full_valid_info_PAI/20_1.pkl",
    }
    assert (pictures[1] == data.picture(tmp_path, rows[1]["image"], 16)).all()
    assert len(readers.read(tmp_path, "train")) + len(readers.read(tmp_path, "val")) == 40


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
)


@law
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_a_plain_value_is_unpickled_with_its_tuples_as_lists(tmp_path_factory, value, protocol):
    def lists(value):
        if isinstance(value, (list, tuple)):
            return [lists(each) for each in value]
        return {key: lists(each) for key, each in value.items()} if isinstance(value, dict) else value

    path = tmp_path_factory.getbasetemp() / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert readers.read_pickle(path) == lists(value)


class Evil:
    """What a pickle must not be able to do."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def doubled(times, key="img_name"):
    """A dict whose value is a list of two lists of two lists ...: tiny as a pickle, endless as text."""
    value = ["x"]
    for _ in range(times):
        value = [value, value]
    return pickle.dumps({"captions": "x", "product_id": 1, "img_name": "x", key: value})


NESTED_TUPLES = pickle.PROTO + b"\x02}X\x01\0\0\0x" + (b"2" + pickle.TUPLE2) * 60 + b"K\x01s."  # a key of 2**60 leaves
PLAIN_ONLY = "only plain Python values are read"
NOT_PLAIN = "bad pickle (more than numbers, text, lists and dicts)"
BAD_PICKLES = {
    "code": (pickle.dumps(Evil()), f"bad pickle (it asks for {os.mkdir.__module__}.mkdir; {PLAIN_ONLY})"),
    "numpy": (
        pickle.dumps({"product_id": np.int64(1)}),
        f"bad pickle (it asks for {np._core.multiarray.__name__}.scalar; {PLAIN_ONLY})",
    ),
    "cut": (pickle.dumps({"captions": "x"})[:20], "bad pickle (pickle exhausted before end of frame)"),
    "list": (pickle.dumps([1]), "bad pickle (not a dict with img_name, captions and product_id)"),
    "empty": (b"", "bad pickle (truncated)"),
    "memo": (b"\x80\x02]r\x00\x84\xd7\x17.", "bad pickle (not a dict with img_name, captions and product_id)"),
    "bytearray": (pickle.PROTO + b"\x05\x96" + (10**12).to_bytes(8, "little") + b"x.", NOT_PLAIN),
    "bytes": (pickle.PROTO + b"\x04\x8e" + (10**12).to_bytes(8, "little") + b"x.", "bad pickle (truncated)"),
    "set": (pickle.dumps({1, 2}), NOT_PLAIN),
    "nested tuples": (NESTED_TUPLES, "bad pickle (unhashable type: 'list')"),
    "doubled name": (doubled(60), "img_name must be text, got list"),
    "doubled product": (doubled(60, "product_id"), "product_id must be text, got list"),
    "huge number": (pickle.dumps({"captions": "x", "img_name": 10**5000, "product_id": 1}), None),
    "large": (pickle.dumps("x" * 4_000_001), "bad pickle (larger than 4 MB)"),
    "many marks": (pickle.MARK * 300_000, "bad pickle (truncated)"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_hostile_pickle_runs_nothing_and_takes_little_memory(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    write_processed(tmp_path, "valid", range(1))
    content, reason = BAD_PICKLES[case]
    (tmp_path / "full_valid_info_PAI/a.pkl").write_bytes(content)
    with limits():
        told = message(readers.read, tmp_path, "test").split("\n")[1:]
    assert len(told) == 1 and told[0].startswith("  full_valid_info_PAI/a.pkl: ") and len(told[0]) < 300
    assert reason is None or told[0] == f"  full_valid_info_PAI/a.pkl: {reason}"
    assert not (tmp_path / "evil").exists()


@law
@given(content=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x04", b"\x80\x05\x95"]))
def test_any_bytes_are_a_plain_value_or_one_error(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / "bytes.pkl"
    path.write_bytes(start + content)
    try:
        readers.read_pickle(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: bad pickle (") and len(str(error)) < len(str(path)) + 110


# --- COCO ---


def write_coco(folder):
    """As Karpathy writes it: five sentences a picture, the split by its name, "restval" belongs to training."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        place = folder / ("train2014" if split == "train" else "val2014")
        place.mkdir(exist_ok=True)
        noise(number).save(place / f"COCO_{number}.jpg")
        sentences = [{"raw": f"A coat, the {n}th time.", "imgid": number, "sentid": 5 * number + n} for n in range(5)]
        name = f"COCO_{number}.jpg"
        image = {"filepath": place.name, "filename": name, "imgid": number, "cocoid": 900 + number}
        images.append(image | {"split": split, "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def test_karpathys_coco_gives_five_rows_a_picture(tmp_path):
    write_coco(tmp_path)
    assert [row["product_id"] for row in readers.read(tmp_path, "train")] == ["900"] * 5 + ["901"] * 5
    assert {row["product_id"] for row in readers.read(tmp_path, "val")} == {"902"}
    opened, pictures = data.load(tmp_path, "test", 8)
    rows = opened.rows
    assert rows[4] == {
        "image": "val2014/COCO_3.jpg",
        "caption": "A coat, the 4th time.",
        "product_id": "903",
        "category": "",
        "subcategory": "",
        "where": "dataset_coco.json:images[3]",
    }
    assert pictures[:].shape == (5, 8, 8, 3) and len(pictures.pixels[0]) == 1  # stored once


OTHER_JSON = [
    (b'{"images": [{"id": 1}]}', "KeyError: 'split'"),
    (b"[]", "TypeError: list indices must be integers or slices, not str"),
    (b"[" * 100_000, "RecursionError: "),
    (b'{"images": [{"split": "test", "sentences": [5]}]}', "KeyError: 'filepath'"),
    (b"\xff", "UnicodeDecodeError: "),
]


@pytest.mark.parametrize("content, reason", OTHER_JSON)
def test_another_json_is_not_karpathys(tmp_path, content, reason):
    (tmp_path / "dataset_coco.json").write_bytes(content)
    told = message(readers.read, tmp_path, "test")
    assert told.startswith(f"{tmp_path}/dataset_coco.json: not Karpathy's layout (") and reason in told
