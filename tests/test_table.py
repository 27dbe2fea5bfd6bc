"""Laws of extras/table.py. The reference is a list of dicts and a loop over it."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import row_of, write_rows
from hypothesis import given
from hypothesis import strategies as st

from extras import readers, table
from extras.tokenizer import SPECIAL, Tokenizer

TEXT = st.text(max_size=6)
NAME = st.sampled_from(["", "a", "b", "C", "\udcff.png"])
ROWS = st.lists(
    st.fixed_dictionaries(dict(image=NAME, caption=TEXT, product_id=TEXT, category=NAME, subcategory=NAME, where=TEXT)),
    max_size=8,
)
VOCABULARY = Tokenizer(SPECIAL + "coat wool red no . 0 1 2 3".split())


def same_grouping(numbers, texts):
    """Whether equal texts have equal numbers, others other ones, and the empty text -1."""
    pairs = zip(numbers.tolist(), texts)
    return len(set(pairs)) == len(set(texts)) == len(set(numbers.tolist())) and all(
        (number == -1) == (text == "") for number, text in zip(numbers.tolist(), texts)
    )


def check(found, rows):
    """The table says what the rows say."""
    assert list(found.rows) == rows and len(found) == len(rows)
    plain = [readers.plain_caption(row["caption"]) for row in rows]
    group = [row["subcategory"] and f"{row['category']}/{row['subcategory']}" for row in rows]
    for name, texts in (("caption", plain), ("group", group)):
        assert same_grouping(found.numbers[name], texts)
    for name in ("product_id", "category", "subcategory"):
        assert same_grouping(found.numbers[name], [row[name] for row in rows])
    shown = [found.references[number] if number >= 0 else "" for number in found.numbers["image"]]
    assert shown == [row["image"] for row in rows] and list(found.references) == sorted(set(found.references))
    for field in ("category", "subcategory"):
        names = sorted({row[field] for row in rows} - {""})
        assert found.class_names(field) == names
        known = names[1:]  # the first is a class that training never saw
        expected = [known.index(row[field]) if row[field] in known else -1 for row in rows]
        assert found.classes(field, known).tolist() == expected


@given(rows=ROWS, chosen=st.lists(st.integers(0, 7), unique=True))
def test_a_table_and_any_choice_of_its_rows_say_what_the_rows_say(rows, chosen):
    built = table.build(iter(rows))
    check(built, rows)
    chosen = [number for number in chosen if number < len(rows)]
    selected = built.select(chosen)
    check(selected, [rows[number] for number in chosen])
    assert not chosen or selected.digest != built.digest
    assert len(chosen) < 2 or selected.digest != built.select(chosen[1:]).digest
    assert built.rows[1:] == rows[1:] and built.rows[::-1] == rows[::-1]


@given(rows=ROWS.filter(len), number=st.integers(0, 7), field=st.sampled_from(["caption", "product_id", "where"]))
def test_the_digest_changes_with_every_row_but_not_with_where_it_stands(rows, number, field):
    changed = [dict(row) for row in rows]
    changed[number % len(rows)][field] += "x"
    assert (table.build(rows).digest == table.build(changed).digest) == (field == "where")
    assert table.build(rows).digest != table.build(rows[1:]).digest


@pytest.fixture
def shop(folder):
    """Six training rows, and a validation split of another product."""
    write_rows(folder / "val.jsonl", [row_of(5, product_id="v")])
    return folder


def no_reading(*_):
    raise AssertionError("read again")


def test_a_split_is_read_once_and_again_when_its_rows_could_be_others(shop, monkeypatch):
    first, bad = table.open_table(shop, "train")
    assert not bad and first.key
    check(first, readers.read(shop, "train"))
    with monkeypatch.context() as patch:
        patch.setattr(readers, "good_rows", no_reading)
        again, bad = table.open_table(shop, "train")
        assert not bad and again.digest == first.digest
        assert isinstance(again.rows.lines.letters, np.memmap)
    check(again, list(first.rows))

    write_rows(shop / "val.jsonl", [row_of(5, product_id="2")])  # a later split takes a product from this one
    moved, bad = table.open_table(shop, "train")
    assert len(bad) == 2 and not moved.key and {row["product_id"] for row in moved.rows} == {"0", "1"}

    write_rows(shop / "val.jsonl", [row_of(5, product_id="v")])
    write_rows(shop / "train.jsonl", [row_of(number, caption="new") for number in range(4)])
    assert [row["caption"] for row in table.open_table(shop, "train")[0].rows] == ["new"] * 4


def test_a_split_with_a_bad_row_is_read_again_until_it_is_mended(shop):
    write_rows(shop / "train.jsonl", [row_of(0), row_of(1, image="late.png")])
    found, bad = table.open_table(shop, "train")
    assert len(found) == 1 and bad == ["train.jsonl:2: missing picture late.png"]
    os.link(shop / "images/1.png", shop / "late.png")
    found, bad = table.open_table(shop, "train")
    assert len(found) == 2 and not bad


@pytest.mark.parametrize("break_it", ["cut", "gone", "note"])
def test_a_damaged_table_is_built_again(shop, break_it):
    first, _ = table.open_table(shop, "train")
    file = shop / ".cache" / first.key / ("note.json" if break_it == "note" else "caption.npy")
    if break_it == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    again, bad = table.open_table(shop, "train")
    assert not bad and again.digest == first.digest
    check(again, readers.read(shop, "train"))
    assert table.find(shop, first.key) is not None  # whole again


def test_a_build_that_is_interrupted_leaves_nothing_that_is_opened(shop, monkeypatch):
    written = []

    def stop(path, array):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        usual(path, array)

    usual = np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            table.open_table(shop, "train")
    assert not list((shop / ".cache").iterdir())
    assert len(table.open_table(shop, "train")[0]) == len(readers.read(shop, "train"))


def test_what_a_killed_build_left_is_removed_by_a_later_one_but_no_other_file(shop):
    (shop / ".cache").mkdir()
    stale, fresh, other = (f"rows-test-0.{letter * 32}.tmp" for letter in "abc")
    for name in (stale, fresh, "mine.tmp"):
        (shop / ".cache" / name).mkdir()
    (shop / ".cache" / other).symlink_to(shop / "images")
    for name in (stale, "mine.tmp"):
        os.utime(shop / ".cache" / name, (0, 0))
    os.utime(shop / ".cache" / other, (0, 0), follow_symlinks=False)
    table.open_table(shop, "train")
    left = {path.name for path in (shop / ".cache").iterdir()}
    assert stale not in left and {fresh, "mine.tmp"} <= left and list((shop / "images").iterdir())


def test_processes_that_build_one_table_at_once_do_not_end_each_other(shop):
    arrays, note = {"numbers": np.arange(5)}, {"names": []}

    def build(_):
        for _ in range(20):
            table.keep(shop, "rows-test-0", arrays, note)

    with ThreadPoolExecutor(8) as builders:
        list(builders.map(build, range(8)))
    found, _ = table.find(shop, "rows-test-0")
    assert (found["numbers"] == arrays["numbers"]).all()
    assert [path.name for path in (shop / ".cache").iterdir()] == ["rows-test-0"]


def test_words_are_kept_for_a_vocabulary_and_a_length(shop, monkeypatch):
    found, _ = table.open_table(shop, "train")
    captions = [row["caption"] for row in found.rows]
    other = Tokenizer(SPECIAL + ["coat"])
    for _ in range(2):  # built, then found
        for tokenizer, length in ((VOCABULARY, 12), (VOCABULARY, 4), (other, 12)):
            words = table.open_words(shop, found, tokenizer, length)
            expected = torch.tensor([tokenizer.encode(caption, length) for caption in captions])
            assert (words[:] == expected[:, : words.shape[1]]).all() and not expected[:, words.shape[1] :].any()
            assert words[[0]].dtype == torch.int64 and words.array.dtype == torch.int16
        monkeypatch.setattr(table, "tokenize", no_reading)
    kept = Counter(path.name[:6] for path in (shop / ".cache").iterdir())
    assert kept == {"words-": 3, "rows-t": 1}


def test_a_large_vocabulary_is_kept_in_32_bits():
    large = Tokenizer(SPECIAL + [f"w{i}" for i in range(1 << 15)])
    words = table.Words(table.tokenize(["w32767 w0", "w1"], large, 9))
    assert words.array.dtype == torch.int32
    assert words[:].tolist() == [[2, 5 + 32767, 5, 3], [2, 6, 3, 0]]
