"""
Candidate lists for retrieval, as the paper tests it (Sec. 4.2): drawn, written to a file, read back and checked.

A list is {"query": row number, "candidates": [row numbers, the truth (which is the query) first]}. Lists mean the same
rows for every model, so that runs can be compared.
"""

import json
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from extras import readers, runtime
from extras.runtime import UserError, quoted

WAYS = ("tir", "itr")  # text to image retrieval and image to text retrieval


def candidates(rows, queries=1000, size=101, seed=0, shorter=False):
    """
    Draw the query products and for each the truth and size - 1 other products of its sub-category; where these are too
    few, of its main category, then of any. No two candidates share a product or a caption (case and spaces apart).
    The same rows, queries, size and seed give the same lists. `shorter`: where a small split cannot fill all lists, cut
    them to the shortest.
    """
    if queries < 1 or size < 2:
        raise ValueError(f"candidates: needs queries of at least 1 and size of at least 2, got {queries} and {size}")
    random = np.random.default_rng(seed)
    shelves = defaultdict(lambda: defaultdict(list))  # shelf -> product -> its row numbers
    for number, row in enumerate(rows):
        for shelf in shelves_of(row):
            shelves[shelf][row["product_id"]].append(number)
    shelves = {shelf: list(products.values()) for shelf, products in shelves.items()}
    products = shelves.get((), [])
    chosen = [products[i] for i in random.permutation(len(products))[:queries]]
    chosen = [views[random.integers(len(views))] for views in chosen]
    marks = [marks_of(row, number) for number, row in enumerate(rows)]
    lists = []
    for query in chosen:
        found = draw_list(rows, marks, query, shelves, size, random)
        if len(found) < size and not shorter:
            raise UserError(f"candidates: a list needs {size} products with different captions and pictures, this "
                            f"split has {len(found)} for row {query}; --full-gallery ranks a small split whole")
        lists.append({"query": query, "candidates": found})
    shortest = min((len(entry["candidates"]) for entry in lists), default=0)
    return [{"query": entry["query"], "candidates": entry["candidates"][:shortest]} for entry in lists]


def shelves_of(row):
    """Where to look for a row's rivals, nearest first; () holds every product."""
    category, subcategory = row.get("category"), row.get("subcategory")
    shelves = [()]
    if category:
        shelves.insert(0, (category,))
    if subcategory:
        shelves.insert(0, (category, subcategory))
    return shelves


def marks_of(row, number):
    """What no two rows of a list may share: a product, a caption, or a picture, which would tie with itself."""
    picture = row.get("image", number)
    return {("product", row["product_id"]), ("caption", readers.plain_caption(row["caption"])), ("picture", picture)}


def draw_list(rows, marks, query, shelves, size, random):
    """The rows of one list, the query first: up to `size`, and fewer only where the split has no more."""
    found, taken = [query], set(marks[query])
    for shelf in shelves_of(rows[query]):
        for i in random.permutation(len(shelves[shelf])):
            if len(found) == size:
                return found
            views = [row for row in shelves[shelf][i] if not taken & marks[row]]
            if views:
                row = views[random.integers(len(views))]
                found.append(row)
                taken |= marks[row]
    return found


def count_filled(rows, lists):
    """How many lists hold a product from outside the query's sub-category."""
    filled = 0
    for entry in lists:
        home = shelves_of(rows[entry["query"]])[0]
        filled += len(home) < 2 or any(shelves_of(rows[row])[0] != home for row in entry["candidates"])
    return filled


def describe(rows, draws):
    """What the tables say of the lists: {way: {"queries", "size", "draws", "lists", "filled"}}."""
    described = {}
    for way in WAYS:
        lists = [entry for draw in draws for entry in draw[way]]
        described[way] = {"queries": len(draws[0][way]), "size": len(lists[0]["candidates"]), "draws": len(draws),
                          "lists": len(lists), "filled": count_filled(rows, lists)}
    return described


# --- Files ---


def save_candidates(path, draws, rows):
    """
    draws: one {"tir": lists, "itr": lists} per draw, both the same lists -> a JSON list of {"query", "candidates",
    "draw", "product_id", "products"}. The query's product and the checksum of all the candidates' products tell later
    whether the row numbers still mean the same rows.
    """
    entries = []
    for number, draw in enumerate(draws):
        for entry in draw["tir"]:
            product, products = rows[entry["query"]]["product_id"], products_of(entry["candidates"], rows)
            entries.append({**entry, "draw": number, "product_id": product, "products": products})
    with runtime.whole_file(path) as file:
        file.write(json.dumps(entries).encode())


def products_of(candidates, rows):
    """A checksum of the candidates' products, in order."""
    return zlib.crc32(json.dumps([rows[row]["product_id"] for row in candidates]).encode())


def read_candidates(path, rows):
    """
    The lists that `save_candidates` wrote, or the authors' pickles: a folder of them, or the folder that holds
    retrieve_TIR and retrieve_ITR. -> one {"tir": lists, "itr": lists} per draw.
    """
    path, draw = Path(path), {}
    if path.is_dir():
        for way in WAYS:
            folder = path / f"retrieve_{way.upper()}"
            draw[way] = check_lists(read_pickles(folder if folder.is_dir() else path, rows), rows, path)
        return [draw]
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a file of candidate lists ({type(error).__name__})") from None
    draws = defaultdict(list)
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not {"query", "candidates"} <= entry.keys():
            raise UserError(f"{path}: not a file of candidate lists (each must be an object with query and candidates)")
        if type(entry.get("draw", 0)) is not int:
            raise UserError(f"{path}: draw must be a whole number, got {quoted(entry['draw'])}")
        draws[entry.get("draw", 0)].append(entry)
    checked = [check_lists(draws[number], rows, path) for number in sorted(draws) or [0]]
    return [{"tir": lists, "itr": lists} for lists in checked]


def read_pickles(folder, rows):
    """The authors' form: for each query a pickled dict of 101 entries with "img_name", the truth first."""
    number = {Path(row["image"]).name: i for i, row in enumerate(rows)}
    lists = []
    for file in sorted(folder.glob("*.pkl")):
        value = readers.read_pickle(file)
        entries = list(value.values()) if isinstance(value, dict) else [value]
        if not all(isinstance(entry, dict) and isinstance(entry.get("img_name"), str) for entry in entries):
            raise UserError(f"{file}: must be a dict of dicts with img_name, a text")
        found = [number.get(entry["img_name"], -1) for entry in entries]
        if -1 in found:
            raise UserError(f"{file}: {quoted(entries[found.index(-1)]['img_name'])} is no picture of this split")
        if not found:
            raise UserError(f"{file}: names no picture")
        lists.append({"query": found[0], "candidates": found})
    return lists


def check_lists(lists, rows, path):
    """Return the lists; one that cannot be ranked is an error that names the list and the rule."""
    if not lists:
        raise UserError(f"{path}: holds no candidate list")
    for number, entry in enumerate(lists, 1):
        broken = broken_rule(entry, lists[0], rows)
        if broken:
            raise UserError(f"{path}: list {number} {broken}")
    return lists


def broken_rule(entry, first, rows):
    """The rule that a candidate list breaks, "" if none. All lists are as long as the first."""
    found = entry["candidates"]
    if not isinstance(found, list) or not all(type(row) is int and 0 <= row < len(rows) for row in found):
        return f"must hold row numbers from 0 to {len(rows) - 1}"
    if len(found) != len(first["candidates"]) or len(found) < 2 or len(set(found)) < len(found):
        return "must hold as many rows as the others, at least 2, none twice"
    now = rows[found[0]]["product_id"]
    then = entry.get("product_id", now)
    if then != now:
        return f"was drawn from other rows: its query was product {quoted(then)}, that row is now {quoted(now)}"
    if "products" in entry and entry["products"] != products_of(found, rows):
        return "was drawn from other rows: some of its row numbers are now other products'"
    return "" if type(entry["query"]) is int and entry["query"] == found[0] else "must begin with the query"
