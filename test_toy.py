"""The laws of toy.py: the same seed gives the same bytes, every product has its own words, and what the words say can be seen."""

import functools
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toy

SEEDS = st.integers(0, 2**31)


def contents(folder):
    """Every file of a folder: path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder):
    """Every row of the manifests: split -> list of dicts."""
    return {split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "val", "test")}


@functools.lru_cache(maxsize=8)
def pixels(product, size):
    return np.asarray(toy.draw(product, 0, size), dtype=int)


def seen(one, other, size=64):
    """How many pixels tell two products apart at a glance, in the same pose."""
    return int((np.abs(pixels(one, size) - pixels(other, size)).max(axis=2) > 16).sum())


@pytest.fixture(scope="module")
def shop():
    return toy.catalogue(4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A catalogue of 120 products with one to three views, large enough to be drawn by several processes."""
    out = tmp_path_factory.mktemp("toy") / "made"
    toy.make(out, products=120, size=32, seed=7, views=(1, 3))
    return out


# ---------------------------------------------------------------- what there is

def test_there_are_many_categories_with_more_than_a_hundred_distinct_captions_each(shop):
    captions = {}
    for product in shop:
        captions.setdefault((product.category, product.subcategory), set()).add(toy.caption(product))
    assert len({category for category, _ in captions}) >= 8 and len(captions) >= 24
    assert min(map(len, captions.values())) > 100


def test_no_two_products_say_the_same_not_even_in_other_words(shop):
    assert len({toy.caption(product) for product in shop}) == len(shop)
    assert len({toy.caption(product._replace(phrasing=0)) for product in shop}) == len(shop)


def test_the_noun_alone_does_not_give_the_sub_category_away(shop):
    kinds_of = Counter(noun for kind in toy.KINDS for noun in set(kind.nouns))
    assert sum(kinds_of[noun] > 1 for noun in kinds_of) >= 8
    shared = [product for product in shop if any(kinds_of[noun] > 1 and f" {noun} " in toy.caption(product).replace(".", " ").lower()
                                                 for noun in toy.KIND_OF[product[:2]].nouns)]
    assert len(shared) > len(shop) / 4


def test_every_attribute_of_every_sub_category_is_drawn_by_some_product_and_worded_two_ways(shop):
    for kind in toy.KINDS:
        mine = [product for product in shop if product[:2] == kind[:2]]
        for name, values in kind.options.items():
            assert {getattr(product, name) for product in mine} == set(values), (kind.subcategory, name)
            assert all(len(set(toy.SENTENCES[value])) == 2 for value in values if value and name in toy.SAID)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, few=st.integers(1, 40), more=st.integers(0, 40))
def test_a_longer_catalogue_begins_with_the_shorter_one(seed, few, more):
    assert toy.catalogue(few + more, seed)[:few] == toy.catalogue(few, seed)


# ---------------------------------------------------------------- what is said is seen

def variations(product):
    """(attribute, product with another value of it), for all that the shop could also sell."""
    options = toy.KIND_OF[product[:2]].options
    for name, value in ((name, value) for name in options for value in options[name] if value != getattr(product, name)):
        other = product._replace(**{name: value})
        crowded = {product.pattern, other.pattern} & set(toy.GRAPHICS) and any("" in options[n] for n in ("pocket", "closure") if n in options)
        if not crowded:  # a graphic leaves no room for what may be absent
            yield name, other


@pytest.mark.parametrize("kind", toy.KINDS, ids=lambda kind: kind.subcategory)
def test_changing_one_attribute_changes_both_the_caption_and_the_picture(kind, shop):
    first, second = [product for product in shop if product[:2] == kind[:2]][:2]
    for product in (first._replace(pattern="", colour="blue", second="yellow"), second):
        for name, other in variations(product):
            assert toy.caption(other) != toy.caption(product), (name, getattr(other, name))
            assert seen(product, other) >= 16, (name, getattr(product, name), getattr(other, name))


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, number=st.integers(0, 89), colour=st.sampled_from(sorted(toy.COLOURS)))
def test_colours_are_said_and_seen(seed, number, colour):
    product = toy.catalogue(number + 1, seed)[-1]
    for name in ("colour", "second"):
        other = product._replace(**{name: colour})
        pair = sorted({other.colour, other.second})
        if toy.caption(other) != toy.caption(product) and len(pair) == 2:
            assert seen(product, other) >= 16
        else:
            assert seen(product, other) == 0 or len(pair) == 1


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, number=st.integers(0, 89), phrasing=st.integers(0, 2**16))
def test_the_picture_does_not_depend_on_the_phrasing(seed, number, phrasing):
    product = toy.catalogue(number + 1, seed)[-1]
    assert seen(product, product._replace(phrasing=phrasing), size=32) == 0


# ---------------------------------------------------------------- pictures

@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, number=st.integers(0, 89), view=st.integers(0, 5), size=st.integers(32, 80))  # in smaller ones a line is as wide as the margin
def test_a_garment_is_whole_and_large_on_a_light_backdrop(seed, number, view, size):
    product = toy.catalogue(number + 1, seed)[-1]
    picture = toy.draw(product, view, size)
    assert picture.size == (size, size) and picture.mode == "RGB"
    assert np.asarray(picture)[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 150  # the corners are backdrop
    canvas = toy.Canvas(size, toy.pose_of(product.seed, product.number, view))
    toy.KIND_OF[product[:2]].paint(canvas, product)
    covered = np.asarray(canvas.covered) > 0
    assert not (covered[0].any() or covered[-1].any() or covered[:, 0].any() or covered[:, -1].any())
    assert 0.05 < covered.mean() < 0.8


def test_views_of_a_product_differ_in_pose(shop):
    for product in shop[:60]:
        pictures = [np.asarray(toy.draw(product, view, 32), dtype=int) for view in range(3)]
        assert all(np.abs(a - b).mean() > 2 for a, b in itertools.combinations(pictures, 2))


# ---------------------------------------------------------------- on disk

def test_the_same_seed_makes_the_same_bytes_in_one_process_or_several(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw_all", lambda jobs: [toy.save(job) for job in jobs])
    toy.make(tmp_path / "again", products=120, size=32, seed=7, views=(1, 3))
    assert contents(tmp_path / "again") == contents(folder)
    toy.make(tmp_path / "other", products=120, size=32, seed=8, views=(1, 3))
    assert contents(tmp_path / "other")["images/00000_0.png"] != contents(folder)["images/00000_0.png"]


def test_products_are_split_80_10_10_and_never_across(folder):
    ids = {split: {row["product_id"] for row in lines} for split, lines in rows(folder).items()}
    assert {split: len(members) for split, members in ids.items()} == {"train": 96, "val": 12, "test": 12}
    assert not (ids["train"] & ids["val"] or ids["train"] & ids["test"] or ids["val"] & ids["test"])


@settings(deadline=None)
@given(tens=st.integers(1, 600))
def test_every_ten_products_fill_every_split(tens):
    counts = Counter(toy.split_of(number) for number in range(10 * tens))
    assert min(counts["val"], counts["test"]) >= max(1, tens - len(toy.KINDS)) and abs(counts["train"] - 8 * tens) <= len(toy.KINDS)


def test_views_of_a_product_share_its_id_caption_and_categories(folder):
    by_product = {}
    for row in itertools.chain(*rows(folder).values()):
        assert (folder / row["image"]).is_file()
        by_product.setdefault(row["product_id"], []).append(row)
    assert {len(views) for views in by_product.values()} == {1, 2, 3}
    for views in by_product.values():
        assert len({(row["caption"], row["category"], row["subcategory"]) for row in views}) == 1
        assert len({row["image"] for row in views}) == len(views)


def test_the_number_of_views_does_not_follow_from_what_a_product_is_made_of(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "draw_all", list)
    toy.make(tmp_path, products=3000, views=(1, 3))
    shown = Counter(row["product_id"] for row in itertools.chain(*rows(tmp_path).values()))
    numbers = {}
    for product in toy.catalogue(3000):
        numbers.setdefault((product.subcategory, product.fabric), []).append(shown[f"toy-{product.number:05d}"])
    large = [found for found in numbers.values() if len(found) >= 20]
    assert len(large) > 20 and all(set(found) == {1, 2, 3} for found in large)


def test_a_finished_catalogue_is_reused_and_a_broken_one_is_mended(folder, tmp_path, capsys):
    out = tmp_path / "toy"
    toy.make(out, products=10, size=16, views=1)
    whole = contents(out)
    (out / "images" / "00003_0.png").write_bytes(b"touched")
    toy.make(out, products=10, size=16, views=1)
    assert "reused" in capsys.readouterr().out and (out / "images" / "00003_0.png").read_bytes() == b"touched"
    (out / "test.jsonl").unlink()  # as if the first run had been killed before its last file
    toy.make(out, products=10, size=16, views=1)
    assert contents(out) == whole


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("change, message", [
    ({"products": 9}, "products must be at least 10, to fill train, val and test, got 9"),
    ({"size": 8}, r"size must lie in \[16, 1024\], got 8"),
    ({"views": 0}, "views must be 1 or more, or the least and the most, got 0 0"),
    ({"views": (3, 1)}, "views must be 1 or more, or the least and the most, got 3 1"),
])
def test_a_setting_out_of_range_is_named_with_its_rule_and_value(tmp_path, change, message):
    with pytest.raises(toy.ToyError, match=message):
        toy.make(tmp_path / "toy", **{"products": 10, "size": 16, "views": 1, **change})
    assert not (tmp_path / "toy").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(toy.ToyError, match="holds something else"):
        toy.make(tmp_path, products=10, size=16)
    with pytest.raises(toy.ToyError, match="is a file, not a folder"):
        toy.make(tmp_path / "thesis.txt", products=10, size=16)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_the_command_makes_a_catalogue_and_says_an_error_in_one_line(tmp_path):
    command = [sys.executable, str(Path(toy.__file__)), "--out", str(tmp_path / "toy"), "--products", "12", "--size", "16", "--views", "1", "2"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert sum(map(len, rows(tmp_path / "toy").values())) >= 12
    other = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True)
    assert other.returncode == 1 and "holds another toy catalogue" in other.stderr and other.stderr.count("\n") == 1
