"""
Small data folders for the tests: `make_shop` writes one, the fixture `shop` is one that all tests share, and the
fixture `folder` is a new one for each test, which may be changed.
"""

import contextlib
import json
import resource
import signal

import numpy as np
import pytest
from PIL import Image

from extras.runtime import UserError

KINDS = {  # sub-category: (category, colour)
    "WOOL COATS": ("COATS", (120, 70, 30)),
    "TRENCH COATS": ("COATS", (200, 180, 130)),
    "T-SHIRTS": ("TOPS", (230, 230, 230)),
    "BLOUSES": ("TOPS", (240, 150, 170)),
    "JEANS": ("PANTS", (40, 60, 120)),
    "SHORTS": ("PANTS", (90, 140, 60)),
    "SNEAKERS": ("SHOES", (200, 40, 40)),
    "BOOTS": ("SHOES", (30, 30, 30)),
}
NUMBERS = "zero one two three four five six seven eight nine".split()


def make_shop(folder, products=40, size=32, views=1, seed=0):
    """
    Write train.jsonl, val.jsonl and test.jsonl (3 : 1 : 1) of `products` products with `views` pictures each: noise
    around the colour of the sub-category and a stripe. No two products have the same caption.
    """
    (folder / "images").mkdir(parents=True)
    rows = {"train": [], "val": [], "test": []}
    for product in range(products):
        split = ("train", "train", "train", "val", "test")[product % 5]
        subcategory = list(KINDS)[product // 5 % len(KINDS)]
        category, colour = KINDS[subcategory]
        digits = " ".join(NUMBERS[int(digit)] for digit in str(product))
        for view in range(views):
            name = f"images/{product}_{view}.png"
            draw_product(colour, size, np.random.default_rng([seed, product, view])).save(folder / name)
            rows[split].append({
                "image": name,
                "caption": f"{subcategory.lower()} in our {category.lower()}, style {digits}.",
                "product_id": f"p{product}",
                "category": category,
                "subcategory": subcategory,
            })
    for split, lines in rows.items():
        write_rows(folder / f"{split}.jsonl", lines)
    return folder


def draw_product(colour, size, random):
    """A square picture of noise around the colour, with a stripe of another colour."""
    pixels = np.array(colour) + random.integers(-20, 21, (size, size, 3))
    first = random.integers(0, size * 3 // 4)
    pixels[first : first + max(1, size // 4)] = random.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder of 40 products that all tests share: do not write in it."""
    return make_shop(tmp_path_factory.mktemp("shops") / "shop")


# --- For the tests of data.py and its readers ---


def noise(number, size=(12, 16)):
    """A picture of noise, another one for each number. `size` is (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def row_of(number, **changes):
    """Row number 0 to 5 of the fixture `folder`."""
    product = number // 2
    row = {
        "image": f"images/{number}.png",
        "caption": f"Coat no. {product} in café brown.",
        "product_id": str(product),
        "category": "COATS",
        "subcategory": f"kind {product % 2}",
    }
    return row | changes


@pytest.fixture
def folder(tmp_path):
    """train.jsonl with six rows and their pictures: the products 0, 1 and 2 with two views each."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        noise(number).save(tmp_path / f"images/{number}.png")
    write_rows(tmp_path / "train.jsonl", [row_of(number) for number in range(6)])
    return tmp_path


def message(call, *arguments, **options):
    """The message of the UserError that the call ends in."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@contextlib.contextmanager
def limits(megabytes=300, seconds=20):
    """Bounds on further memory (beyond it: MemoryError) and on time (beyond it: the test fails)."""

    def too_late(*_):
        pytest.fail(f"not done after {seconds} seconds")  # no Exception, so that nothing takes it for a broken file

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
