"""The laws of extras/lists.py: how candidate lists are drawn, and what may stand in a file of them."""

import json
import os
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import lists
from extras.runtime import UserError

settings.register_profile("lists", deadline=None, max_examples=25)
settings.load_profile("lists")
SEEDS = st.integers(0, 2**31 - 1)


# --- Drawing ---


@st.composite
def catalogues(draw):
    """Rows of 12 to 40 products in few classes, some without one, of one to three views; some captions are shared."""
    rows = []
    for product in range(draw(st.integers(12, 40))):
        place = draw(st.sampled_from([("top", "coat"), ("top", "shirt"), ("foot", "boot"), ("foot", ""), ("", "")]))
        shared = ["a plain thing", "A  plain Thing"] * (product > 0)  # so that there are two captions at least
        caption = draw(st.sampled_from([f"thing {product}"] * 4 + shared))
        row = {"product_id": f"p{product}", "caption": caption, "category": place[0], "subcategory": place[1]}
        rows += [{**row, "image": f"{product}-{view}.png"} for view in range(draw(st.integers(1, 3)))]
    return draw(st.permutations(rows))


def plain(row):
    return " ".join(row["caption"].lower().split())


def distinct(rows):
    """How many products a list can hold at most: no two of one caption."""
    return len({plain(row) for row in rows})


@given(catalogues(), st.integers(1, 50), SEEDS)
def test_a_list_is_the_truth_and_other_products_with_other_captions(rows, queries, seed):
    size = min(8, distinct(rows))
    drawn = lists.candidates(rows, queries, size, seed)
    assert drawn == lists.candidates(rows, queries, size, seed)
    asked = [rows[entry["query"]]["product_id"] for entry in drawn]
    assert len(asked) == len(set(asked)) == min(queries, len({row["product_id"] for row in rows}))
    for entry in drawn:
        found = [rows[row] for row in entry["candidates"]]
        assert entry["candidates"][0] == entry["query"] and len(found) == size
        assert len({row["product_id"] for row in found}) == len({plain(row) for row in found}) == size


@given(catalogues(), SEEDS)
def test_rivals_come_from_the_nearest_shelf_while_it_has_any(rows, seed):
    size = min(8, distinct(rows))
    for entry in lists.candidates(rows, 50, size, seed):
        query, rivals = rows[entry["query"]], [rows[row] for row in entry["candidates"][1:]]

        def left(*fields):  # captions of the query's own shelf which the list could still take
            shelf = [row for row in rows if query[fields[-1]] and all(row[field] == query[field] for field in fields)]
            return {plain(row) for row in shelf} - {plain(row) for row in [query, *rivals]}

        main = [row for row in rivals if query["category"] and row["category"] == query["category"]]
        sub = [row for row in main if query["subcategory"] and row["subcategory"] == query["subcategory"]]
        if len(sub) < len(rivals):
            assert not left("category", "subcategory")
        if len(main) < len(rivals):
            assert not left("category")


@given(catalogues(), SEEDS)
def test_filled_counts_the_lists_with_a_rival_from_elsewhere(rows, seed):
    drawn = lists.candidates(rows, 50, min(6, distinct(rows)), seed)
    filled = 0
    for entry in drawn:
        places = Counter((rows[row]["category"], rows[row]["subcategory"]) for row in entry["candidates"])
        filled += len(places) > 1 or not next(iter(places))[1]
    assert lists.count_filled(rows, drawn) == filled
    described = lists.describe(rows, [{"tir": drawn, "itr": drawn}] * 2)["tir"]
    wanted = {"queries": len(drawn), "size": len(drawn[0]["candidates"]), "draws": 2, "lists": 2 * len(drawn)}
    assert described == {**wanted, "filled": 2 * filled}


@given(catalogues(), SEEDS)
def test_shorter_lists_are_the_usual_ones_where_those_exist_and_else_all_of_one_length(rows, seed):
    size = min(8, distinct(rows))
    assert lists.candidates(rows, 9, size, seed, shorter=True) == lists.candidates(rows, 9, size, seed)
    sizes = [len(entry["candidates"]) for entry in lists.candidates(rows, 9, 101, seed, shorter=True)]
    assert len(set(sizes)) == 1 and size <= sizes[0] <= distinct(rows)


def test_one_list_that_cannot_be_long_shortens_the_others():
    rows = [{"product_id": product, "caption": caption} for product, caption in ("ax", "ay", "bx", "cz")]
    found = set()
    for seed in range(20):  # the first view of a leaves c alone as rival, for b says the same
        drawn = lists.candidates(rows, 3, 101, seed, shorter=True)
        sizes = {len(entry["candidates"]) for entry in drawn}
        assert len(drawn) == 3 and sizes == {2 if 0 in [entry["query"] for entry in drawn] else min(sizes)}
        found |= sizes
    assert found == {2, 3}


def plain_rows(n):
    return [{"image": f"{i}.png", "caption": f"thing {i}", "product_id": str(i)} for i in range(n)]


@given(catalogues(), st.integers(2, 9), SEEDS)
def test_no_list_shows_a_picture_twice(rows, pictures, seed):
    """Otherwise the truth ties with a rival that looks the same, and no model can answer."""
    rows = [{**row, "image": f"{number % pictures}.png"} for number, row in enumerate(rows)]  # one sells many products
    for entry in lists.candidates(rows, 50, 101, seed, shorter=True):
        shown = [rows[row]["image"] for row in entry["candidates"]]
        assert len(set(shown)) == len(shown) <= pictures


def test_rows_without_classes_are_drawn_from_all():
    drawn = lists.candidates(plain_rows(120), 3)
    assert [len(entry["candidates"]) for entry in drawn] == [101] * 3
    assert lists.count_filled(plain_rows(120), drawn) == 3


def test_another_seed_draws_other_lists():
    assert lists.candidates(plain_rows(120), 3, seed=0) != lists.candidates(plain_rows(120), 3, seed=1)


@pytest.mark.parametrize("changes, said", [
    ({}, "101 products with different captions and pictures, this split has 100"),
    ({"queries": 0}, "queries of at least 1"),
    ({"size": 1}, "size of at least 2"),
])
def test_lists_that_cannot_be_drawn_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        lists.candidates(plain_rows(100), **changes)


# --- Files ---


def test_saved_lists_come_back(tmp_path):
    rows, path = plain_rows(30), tmp_path / "lists.json"
    draws = [lists.candidates(rows, 4, 10, seed) for seed in (0, 1)]
    lists.save_candidates(path, [{"tir": drawn, "itr": drawn} for drawn in draws], rows)
    for found, drawn in zip(lists.read_candidates(path, rows), draws, strict=True):
        assert found["tir"] is found["itr"]
        assert [{name: entry[name] for name in ("query", "candidates")} for entry in found["tir"]] == drawn
    said = "list 1 was drawn from other rows: its query was product '.*', that row is now '.*'"
    with pytest.raises(UserError, match=said):
        lists.read_candidates(path, rows[1:] + rows[:1])
    rival = next(row for row in draws[0][0]["candidates"] if row not in [entry["query"] for entry in sum(draws, [])])
    others = [{**row, "product_id": f"new {number}"} if number == rival else row for number, row in enumerate(rows)]
    with pytest.raises(UserError, match="was drawn from other rows: some of its row numbers are now other products'"):
        lists.read_candidates(path, others)
    path.write_text(json.dumps(draws[0]))  # lists made by hand need not name products
    assert lists.read_candidates(path, rows) == [{"tir": draws[0], "itr": draws[0]}]


@pytest.mark.parametrize("entries, said", [
    ("[]", "no candidate list"),
    ("5", "not a file of candidate lists"),
    ('"text"', "not a file of candidate lists"),
    ("[5]", "not a file of candidate lists"),
    ('[{"query": 0}]', "not a file of candidate lists"),
    ("[" * 100_000, "not a file of candidate lists .RecursionError"),
    ('[{"query": 0, "candidates": [0, 30]}]', "list 1 must hold row numbers from 0 to 29"),
    ('[{"query": 0, "candidates": [0, -1]}]', "list 1 must hold row numbers"),
    ('[{"query": 0, "candidates": [0, true]}]', "list 1 must hold row numbers"),
    ('[{"query": 0, "candidates": 7}]', "list 1 must hold row numbers"),
    ('[{"query": 0, "candidates": [0, 1]}, {"query": 1, "candidates": [1, 2, 3]}]', "list 2 must hold as many rows"),
    ('[{"query": 0, "candidates": [0, 1, 1]}]', "none twice"),
    ('[{"query": 1, "candidates": [0, 1]}]', "begin with the query"),
    ('[{"query": 0, "candidates": [0, 1], "draw": 0}, {"query": 0, "candidates": [0, 1], "draw": "a"}]', "draw .* 'a'"),
    ('[{"query": 0, "candidates": [0, 1], "draw": null}]', "draw must be a whole number, got None"),
    ('[{"query": 0, "candidates": [0, 1], "product_id": "' + "x" * 10**6 + '"}]', "was drawn from other rows"),
])
def test_lists_that_do_not_fit_are_one_short_line(tmp_path, entries, said):
    (tmp_path / "lists.json").write_text(entries)
    with pytest.raises(UserError, match=said) as error:
        lists.read_candidates(tmp_path / "lists.json", plain_rows(30))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@st.composite
def damaged(draw, text):
    """A JSON text with some value in it replaced, or with some bytes replaced, removed or doubled."""
    if draw(st.booleans()):
        entries = json.loads(text)
        holder = draw(st.sampled_from([entries, *entries]))
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        holder[key] = draw(JSON)
        return json.dumps(entries).encode()
    content = text.encode()
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 20))
    return content[:start] + draw(st.binary(max_size=9) | st.just(content[start:][:length])) + content[start + length :]


ROWS = plain_rows(12)
SOUND = json.dumps([{**entry, "draw": 0, "product_id": ROWS[entry["query"]]["product_id"]}
                    for entry in lists.candidates(ROWS, 3, 4)])


@pytest.fixture(scope="module")
def damaged_file(tmp_path_factory):
    return tmp_path_factory.mktemp("lists") / "lists.json"


@settings(max_examples=150)
@given(content=damaged(SOUND))
def test_a_damaged_file_is_refused_in_one_line_or_still_holds_lists(damaged_file, content):
    damaged_file.write_bytes(content)
    try:
        draws = lists.read_candidates(damaged_file, ROWS)
    except UserError as error:
        assert str(error).startswith(str(damaged_file)) and len(str(error)) < 400 and "\n" not in str(error)
    else:
        for entry in (entry for draw in draws for entry in draw["tir"]):
            assert entry["candidates"][0] == entry["query"] and set(entry["candidates"]) <= set(range(12))


def write_pickle(folder, name, value):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(value))


def test_the_authors_pickles_are_read(tmp_path):
    rows = plain_rows(30)
    for folder, order in (("retrieve_TIR", [3, 1, 2]), ("retrieve_ITR", [5, 6, 7])):
        entries = {i: {"img_name": f"{row}.png", "captions": "a text"} for i, row in enumerate(order)}
        write_pickle(tmp_path / folder, "0.pkl", entries)
    draw = {"tir": [{"query": 3, "candidates": [3, 1, 2]}], "itr": [{"query": 5, "candidates": [5, 6, 7]}]}
    assert lists.read_candidates(tmp_path, rows) == [draw]
    assert lists.read_candidates(tmp_path / "retrieve_TIR", rows) == [{"tir": draw["tir"], "itr": draw["tir"]}]


def nested(doublings):
    value = "x"
    for _ in range(doublings):
        value = [value, value]
    return value


@pytest.mark.parametrize("value, said", [
    ({0: {"img_name": "nowhere.png"}}, "1.pkl: 'nowhere.png' is no picture of this split"),
    ({0: {"img_name": "x" * 10**6}}, "1.pkl: 'xxx.* is no picture of this split"),
    ({0: {"img_name": nested(40)}}, "1.pkl: must be a dict of dicts with img_name"),
    ([1], "1.pkl: must be a dict of dicts with img_name"),
    ({0: "a.png"}, "1.pkl: must be a dict of dicts with img_name"),
    ({0: {}}, "1.pkl: must be a dict of dicts with img_name"),
    ({}, "1.pkl: names no picture"),
    ({0: os.system}, "1.pkl: bad pickle"),
])
def test_a_pickle_that_is_none_of_the_authors_is_one_short_line(tmp_path, value, said):
    write_pickle(tmp_path / "lists", "1.pkl", value)
    with pytest.raises(UserError, match=said) as error:
        lists.read_candidates(tmp_path / "lists", plain_rows(30))
    assert len(str(error.value)) < 400
