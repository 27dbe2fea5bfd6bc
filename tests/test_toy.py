"""The laws of extras/toy.py: a seed gives the same bytes, no two products say the same, what is said can be seen."""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import toy
from extras.runtime import UserError

SEEDS, NUMBERS = st.integers(0, 2**31), st.integers(0, 80)
NAMES = [kind.subcategory for kind in toy.KINDS]


def contents(folder):
    """Every file of a folder: path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_rows(folder):
    """Every row of the manifests: split -> list of dicts."""
    manifests = {split: folder / f"{split}.jsonl" for split in ("train", "val", "test")}
    return {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in manifests.items()}


def difference(one, other):
    """The number of pixels at 64 px that tell two products apart at a glance, in the same pose."""
    pixels = [np.asarray(toy.draw(product), dtype=int) for product in (one, other)]
    return int((np.abs(pixels[0] - pixels[1]).max(axis=2) > 16).sum())


@functools.cache
def shop():
    return toy.catalogue(4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A catalogue of 120 products with one to three views each."""
    out = tmp_path_factory.mktemp("toy") / "made"
    toy.make(out, products=120, size=32, seed=7)
    return out


# --- What there is ---


def test_there_are_many_sub_categories_with_more_than_a_hundred_distinct_captions_each():
    captions = defaultdict(set)
    for product in shop():
        captions[product.kind.category, product.kind.subcategory].add(toy.caption(product))
    assert len({category for category, _ in captions}) >= 8 and len(captions) >= 24
    assert min(map(len, captions.values())) > 100


def test_no_two_products_say_the_same_not_even_in_other_words():
    for wording in (None, 0):
        products = [product if wording is None else product._replace(wording=wording) for product in shop()]
        assert len({toy.caption(product) for product in products}) == len(products)


def test_a_caption_has_12_to_30_words_and_is_worded_in_several_ways():
    assert all(12 <= len(toy.caption(product).split()) <= 30 for product in shop())
    assert len({toy.caption(shop()[0]._replace(wording=wording)) for wording in range(12)}) > 5


def test_the_noun_often_leaves_the_sub_category_open():
    kinds_of = Counter(noun for kind in toy.KINDS for noun in kind.nouns.split(", "))
    shared = {noun for noun in kinds_of if kinds_of[noun] > 1}
    open_captions = 0
    for product in shop():
        nouns = product.kind.nouns.split(", ")
        open_captions += nouns[product.wording % len(nouns)] in shared
    assert len(shared) >= 8 and open_captions > len(shop()) / 4


def test_every_row_of_the_tables_is_used_and_every_value_is_in_the_tables():
    values = {value for kind in toy.KINDS for values in kind.lists for value in values} - {"-", "sleeveless"}
    assert values == set(toy.STROKES) | set(toy.LENGTHS)
    assert {product.shape for product in shop()} == set(toy.SHAPES)
    for kind in toy.KINDS:
        mine = [product for product in shop() if product.kind == kind]
        for place, values in enumerate(kind.lists):
            assert {product.values[place] for product in mine} == set(values)
        assert {product.pattern for product in mine} == set(toy.PATTERNS)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, few=st.integers(1, 40), more=st.integers(0, 40))
def test_a_longer_catalogue_begins_with_the_shorter_one(seed, few, more):
    assert toy.catalogue(few + more, seed)[:few] == toy.catalogue(few, seed)


# --- What is said is seen ---


def variations(product):
    """All products of the same kind that differ from this one in its shape, its pattern or one value."""
    for shape in toy.SHAPES:
        if shape.endswith(product.kind.ending) and shape != product.shape:
            yield product._replace(shape=shape)
    for pattern in toy.PATTERNS:
        if pattern != product.pattern:
            yield product._replace(pattern=pattern)
    for place, values in enumerate(product.kind.lists):
        for value in values:
            if value != product.values[place]:
                yield product._replace(values=[*product.values[:place], value, *product.values[place + 1 :]])


@pytest.mark.parametrize("kind", toy.KINDS, ids=NAMES)
def test_changing_one_attribute_changes_the_caption_and_the_picture(kind):
    first, second = [product for product in shop() if product.kind == kind][:2]
    for product in (first._replace(pattern="Solid color, with no pattern.", colour="blue", second="yellow"), second):
        for other in variations(product):
            assert toy.caption(other) != toy.caption(product)
            assert difference(product, other) >= 16, (toy.caption(product), toy.caption(other))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, number=NUMBERS, colours=st.permutations(sorted(toy.COLOURS)))
def test_a_colour_is_said_if_and_only_if_it_is_seen(seed, number, colours):
    product = toy.catalogue(number + 1, seed)[-1]._replace(colour=colours[0], second=colours[1])
    for other in (product._replace(colour=colours[2]), product._replace(second=colours[2])):
        if toy.caption(other) == toy.caption(product):
            assert difference(product, other) == 0
        else:
            assert difference(product, other) >= 16


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, number=NUMBERS, wording=st.integers(0, 11))
def test_the_picture_does_not_depend_on_the_wording(seed, number, wording):
    product = toy.catalogue(number + 1, seed)[-1]
    assert difference(product, product._replace(wording=wording)) == 0


# --- Pictures ---


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, number=NUMBERS, view=st.integers(0, 5), size=st.integers(32, 96))
def test_a_product_is_whole_and_large_on_a_light_backdrop(seed, number, view, size):
    product = toy.catalogue(number + 1, seed)[-1]
    picture = toy.draw(product, view, size)
    assert picture.size == (size, size) and picture.mode == "RGB"
    assert np.asarray(picture)[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 200  # the corners are backdrop
    seen = []
    for level in (0, 255):
        with mock.patch.object(toy, "BACKDROPS", [(level, level, level)]):
            seen.append(np.asarray(toy.draw(product, view, size), dtype=int))
    covered = (seen[1] - seen[0]).max(axis=2) < 100  # where the backdrop does not shine through
    assert not (covered[0].any() or covered[-1].any() or covered[:, 0].any() or covered[:, -1].any())
    down, across = covered.any(axis=1).sum(), covered.any(axis=0).sum()
    assert max(down, across) > 0.65 * size and covered.mean() > 0.05


def test_views_of_a_product_differ_in_pose():
    for product in shop()[:27]:
        pictures = [np.asarray(toy.draw(product, view, 32), dtype=int) for view in range(3)]
        assert all(np.abs(a - b).mean() > 2 for a, b in itertools.combinations(pictures, 2))


# --- The catalogue on disk ---


def test_a_seed_makes_the_same_bytes_in_one_process_or_several(folder, tmp_path, monkeypatch):
    for processes in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda count=processes: count)
        toy.make(tmp_path / f"{processes}", products=120, size=32, seed=7)
        assert contents(tmp_path / f"{processes}") == contents(folder)
    toy.make(tmp_path / "other", products=10, size=32, seed=8)
    assert contents(tmp_path / "other")["images/00000_0.png"] != contents(folder)["images/00000_0.png"]


def test_products_are_split_80_10_10_and_never_across(folder):
    ids = {split: {row["product_id"] for row in rows} for split, rows in read_rows(folder).items()}
    assert {split: len(members) for split, members in ids.items()} == {"train": 96, "val": 12, "test": 12}
    assert len(set.union(*ids.values())) == 120


def test_ten_products_fill_every_split_and_so_do_ten_of_one_kind(tmp_path):
    toy.make(tmp_path, products=10 * len(toy.KINDS), size=16, views=(1, 1))
    rows = read_rows(tmp_path)
    counts = {split: Counter(row["subcategory"] for row in rows[split]) for split in rows}
    assert counts == {split: dict.fromkeys(NAMES, n) for split, n in (("train", 8), ("val", 1), ("test", 1))}
    first_ten = {f"toy-{number:05d}" for number in range(10)}
    assert [sum(row["product_id"] in first_ten for row in rows[split]) for split in rows] == [8, 1, 1]


def test_views_of_a_product_share_its_id_caption_and_categories(folder):
    views = defaultdict(list)
    for row in itertools.chain(*read_rows(folder).values()):
        assert (folder / row["image"]).is_file()
        views[row["product_id"]].append(row)
    assert {len(rows) for rows in views.values()} == {1, 2, 3}
    for rows in views.values():
        assert len({(row["caption"], row["category"], row["subcategory"]) for row in rows}) == 1
        assert len({row["image"] for row in rows}) == len(rows)


def test_the_number_of_views_does_not_follow_from_what_a_product_looks_like(folder):
    views = Counter(row["product_id"] for row in itertools.chain(*read_rows(folder).values()))
    numbers = defaultdict(list)
    for product in toy.catalogue(120, seed=7):
        numbers[product.pattern].append(views[f"toy-{product.number:05d}"])
    assert all(set(found) == {1, 2, 3} for found in numbers.values() if len(found) >= 12)


def test_a_finished_catalogue_is_reused_and_a_broken_or_unfinished_one_is_mended(tmp_path, capsys):
    out = tmp_path / "toy"
    toy.make(out, products=10, size=16)
    whole = contents(out)
    (out / "images/00003_0.png").write_bytes(b"touched")
    toy.make(out, products=10, size=16)
    assert "reused" in capsys.readouterr().out and (out / "images/00003_0.png").read_bytes() == b"touched"
    for broken in ("test.jsonl", "images/00002_0.png", "toy.json"):
        if broken == "toy.json":
            (out / "toy.json").rename(out / "toy.unfinished")  # as if the process had been killed before its last file
        else:
            (out / broken).unlink()
        toy.make(out, products=10, size=16)
        assert contents(out) == whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_with_the_file_and_the_catalogue_stays_unfinished(tmp_path):
    toy.make(tmp_path / "toy", products=10, size=16)
    image = tmp_path / "toy/images/00004_0.png"
    image.unlink()
    image.symlink_to("/dev/full")
    (tmp_path / "toy/val.jsonl").unlink()
    with pytest.raises(UserError, match="00004_0.png: cannot be written .No space left"):
        toy.make(tmp_path / "toy", products=10, size=16)
    assert not (tmp_path / "toy/toy.json").exists() and (tmp_path / "toy/toy.unfinished").exists()


# --- Errors ---


@pytest.mark.parametrize("change, message", [
    ({"products": 9}, r"--products: must lie in \[10, 100000\], got 9"),
    ({"size": 8}, r"--size: must lie in \[16, 1024\], got 8"),
    ({"views": (0, 2)}, r"--views: must lie in \[1, 2\], got 0"),
    ({"views": (3, 1)}, r"--views: must lie in \[1, 1\], got 3"),
])
def test_a_setting_out_of_range_is_named_with_its_rule_and_value(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        toy.make(tmp_path / "toy", **{"products": 10, "size": 16, **change})
    assert caught.value.status == 2 and not (tmp_path / "toy").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="holds something else"):
            toy.make(path, products=10, size=16)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_the_command_makes_a_catalogue_and_reports_an_error_in_one_line(tmp_path):
    flags = ["--out", str(tmp_path / "toy"), "--products", "12", "--size", "16", "--views", "1", "2"]
    command = [sys.executable, "-m", "extras.toy", *flags]
    root = Path(toy.__file__).parents[1]
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 0
    made = contents(tmp_path / "toy")
    other = subprocess.run([*command, "--seed", "1"], cwd=root, capture_output=True, text=True)
    assert other.returncode == 1 and "holds another toy catalogue" in other.stderr and other.stderr.count("\n") == 1
    assert contents(tmp_path / "toy") == made
