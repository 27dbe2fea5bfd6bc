"""
Words and pictures: everything between a folder of data and a batch of tensors. Knows nothing of the model.

    python data.py check DIR                 read everything once, report it, list every bad row, draw a contact sheet
    python data.py vocab DIR --size 8000     learn a vocabulary from the training captions
    python data.py candidates DIR --seed 0   write the retrieval lists of the test split

A folder holds one of these:

    train.jsonl, val.jsonl, test.jsonl       a manifest (or .csv): image, caption, product_id, category, subcategory
    items.jsonl                              the same in one file (or .csv), split 80/10/10 by a hash of the product id
    fashiongen_256_256_{train,validation}.h5 Fashion-Gen as its owners give it (needs the package h5py)
    extracted_{train,valid}_images/          Fashion-Gen as the MVLT authors processed it, with full_{train,valid}_info_PAI/*.pkl
    dataset_coco.json                        COCO as Karpathy split it, beside train2014/ and val2014/

Every reader gives the same kind of row, a plain dict:

    {"image": "images/7.jpg", "caption": "...", "product_id": "7", "category": "...", "subcategory": "...", "where": "train.jsonl:17"}

Whatever is wrong with a row is said once, before training, by file and line: a DataError lists all of them, `skip_bad` leaves them out.
Randomness is keyed: the order by (seed, epoch), all else by (seed, step) over the global batch, of which each process takes its slice.

Letters in shapes: G rows in the global batch, g of them on this process, L words, H = W = size pixels.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import heapq
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import unicodedata
import uuid
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

SPLITS = ("train", "val", "test")


class DataError(Exception):
    """What is wrong with the data and where, in words for the person who can mend it."""


# --- Words ---

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST_WORD = 100  # letters; BERT makes [UNK] of anything longer
SPACES = re.compile(r"[^\S\x0b\x0c\x1c-\x1f\x85]+")  # BERT drops these control characters, Python calls them spaces
SPECIAL_IN_TEXT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
CHINESE = [  # these stand alone; the block of 2B920 begins at 2B820 in Unicode and in Google's code, but not in the `tokenizers` package
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
]


class Letters(dict):
    """A table for str.translate, filled by `rule` with each character when it is first met."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __missing__(self, code):
        self[code] = self.rule(chr(code))
        return self[code]


def clean_letter(c):
    """BERT's first look at a character: controls go, any space is a space, Chinese stands alone."""
    if SPACES.fullmatch(c):
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {c} " if any(first <= ord(c) <= last for first, last in CHINESE) else c


def plain_letter(c):
    """BERT's second look, accents being parted from their letters: accents go, punctuation stands alone, the rest is lower-case."""
    category = unicodedata.category(c)
    if category == "Mn":
        return ""
    return f" {c} " if category[0] == "P" or c in "$+<=>^`|~" else c.lower()


CLEAN, PLAIN = Letters(clean_letter), Letters(plain_letter)


def split_words(text):
    """
    BERT's words of a text, before they are cut into pieces: "Émile's [MASK]" -> ["emile", "'", "s", "[MASK]"].
    What is an accent or punctuation, this Python's Unicode says; the `tokenizers` package asks Unicode 8: some 500 rare signs differ.
    """
    words = []
    for part in SPECIAL_IN_TEXT.split(text):
        words += [part] if part in SPECIAL else unicodedata.normalize("NFD", part.translate(CLEAN)).translate(PLAIN).split()
    return words


class Tokenizer:
    """BERT's uncased WordPiece: words are cut into the longest pieces that the vocabulary holds, "##" marks a piece inside a word."""

    def __init__(self, words, source="vocabulary"):
        self.words = list(words)
        check_vocabulary(self.words, source)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[word] for word in SPECIAL)
        self.special_ids = [i for i, word in enumerate(self.words) if word in SPECIAL or re.fullmatch(r"\[unused\d+\]", word)]
        self.cache = {}  # what stands between two spaces -> its ids

    @classmethod
    def load(cls, path):
        """Read a vocab.txt as BERT's: one word per line, the line number is the id."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: a vocabulary must be UTF-8 text, but its byte {error.start} is not") from None
        except OSError as error:
            raise DataError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
        return cls([line.rstrip() for line in text.rstrip().split("\n")] if text.strip() else [], source=path)

    def save(self, path):
        """Write the vocabulary as BERT's vocab.txt."""
        with whole_file(path) as file:
            file.write("".join(f"{word}\n" for word in self.words).encode())

    @classmethod
    def train(cls, captions, size=8000):
        """
        Learn a vocabulary of at most `size` words: the special tokens, the letters seen, then again and again the two pieces most often
        side by side, joined (Sennrich et al. 2016, in BERT's spelling). Ties go by the alphabet: the order of the captions changes nothing.
        """
        if size <= len(SPECIAL):
            raise ValueError(f"size must be above {len(SPECIAL)}, the number of special tokens, got {size}")
        chunks = Counter()
        for caption in captions:
            chunks.update(SPACES.split(caption))
        counts = Counter()
        for chunk, times in chunks.items():
            for word in split_words(chunk):
                if word not in SPECIAL and len(word) <= LONGEST_WORD:
                    counts[word] += times
        if not counts:
            raise DataError("the captions hold no words: there is nothing to learn a vocabulary from")
        letters = alphabet(counts, size - len(SPECIAL))
        return cls(SPECIAL + letters + join_pieces(counts, letters, size - len(SPECIAL) - len(letters)))

    def __len__(self):
        return len(self.words)

    def encode(self, text, length=None):
        """[CLS], the pieces of the text, [SEP]; with a length, cut to it (before [SEP]) and padded to it."""
        if length is not None and length < 2:
            raise ValueError(f"length must be at least 2, for [CLS] and [SEP], got {length}")
        ids = [self.cls_id]
        for chunk in SPACES.split(text):
            ids += self.cache[chunk] if chunk in self.cache else self.encode_chunk(chunk)
        if length is None:
            return ids + [self.sep_id]
        ids = ids[:length - 1] + [self.sep_id]
        return ids + [self.pad_id] * (length - len(ids))

    def encode_chunk(self, chunk):
        """The ids of what stands between two spaces, remembered for the next time."""
        ids = [i for word in split_words(chunk) for i in self.encode_word(word)]
        if len(self.cache) < 1_000_000:  # enough for any catalogue, and a bound on the memory of a server
            self.cache[chunk] = ids
        return ids

    def encode_word(self, word):
        """Cut off the longest piece that the vocabulary holds, then the longest of the rest, ...; stuck, the whole word is [UNK]."""
        if len(word) > LONGEST_WORD:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(len(word), start, -1):
                if mark + word[start:end] in self.ids:
                    break
            else:
                return [self.unk_id]
            ids.append(self.ids[mark + word[start:end]])
            start = end
        return ids

    def decode(self, ids):
        """Readable text, as BERT's decoder: pieces joined, no space before . , ? and !, without [PAD], [CLS] and [SEP]."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"an id must lie in [0, {len(self)}), the size of the vocabulary, got {i}")
        text = " ".join(self.words[i] for i in ids if i not in (self.pad_id, self.cls_id, self.sep_id))
        return re.sub(r" ([.,?!])", r"\1", text.replace(" ##", ""))


def check_vocabulary(words, source):
    """Raise a DataError unless these can be the words of a BERT vocabulary."""
    if not words:
        raise DataError(f"{source}: a vocabulary must hold words, one per line, but this is empty")
    line_of = {}
    for line, word in enumerate(words, 1):
        if word.split() != [word]:
            raise DataError(f"{source}: line {line} must hold one word, got {word[:40]!r}")
        if word in line_of:
            raise DataError(f"{source}: a word may stand only once, but line {line} repeats {word[:40]!r} of line {line_of[word]}")
        line_of[word] = line
    missing = [word for word in SPECIAL if word not in line_of]
    if missing:
        raise DataError(f"{source}: a vocabulary must hold {' '.join(SPECIAL)}, but {' '.join(missing)} is missing")
    if words[0] != "[PAD]":
        raise DataError(f"{source}: [PAD] must be on line 1 (id 0), but it is on line {line_of['[PAD]']}")


def alphabet(counts, room):
    """The letters of these words, and their ## forms where they may stand inside a word: the most frequent ones that `room` allows."""
    letters = Counter()
    for word, times in counts.items():
        for c in word:
            letters[c] += times
    pieces = []
    for c in sorted(letters, key=lambda c: (-letters[c], c)):
        forms = [c, "##" + c] if split_words("a" + c) == ["a" + c] else [c]
        if len(pieces) + len(forms) > room:
            break
        pieces += forms
    return sorted(pieces)


def join_pieces(counts, letters, room):
    """Up to `room` pieces of several letters, in the order found: each time, the two neighbours met most often are joined."""
    letters, words = set(letters), []
    for word, times in counts.items():
        pieces = [word[0], *("##" + c for c in word[1:])]
        if letters.issuperset(pieces):  # the other words will be [UNK]
            words.append((pieces, times))
    pairs, places = count_pairs(words)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    found = {}  # a dict and not a list: two different pairs may join into the same piece
    while heap and len(found) < room:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # an old count; the new one is in the heap as well
            continue
        if count > -2:  # a pair met once says nothing about the language
            break
        joined = pair[0] + pair[1].removeprefix("##")
        found[joined] = True
        for changed, difference in join_everywhere(pair, joined, words, places).items():
            if difference:
                pairs[changed] += difference
                heapq.heappush(heap, (-pairs[changed], changed))
    return list(found)


def count_pairs(words):
    """How often two pieces are neighbours, and in which of the words, from [(pieces, how often)]."""
    pairs, places = Counter(), defaultdict(set)
    for place, (pieces, times) in enumerate(words):
        for pair in zip(pieces, pieces[1:]):
            pairs[pair] += times
            places[pair].add(place)
    return pairs, places


def join_everywhere(pair, joined, words, places):
    """Put the joined piece for the pair in all words (edited in place, as are `places`); return the change in the count of each pair."""
    change = Counter()
    for place in places.pop(pair):
        old, times = words[place]
        new = join_pair(old, pair, joined)
        words[place] = new, times
        for neighbours in zip(old, old[1:]):
            change[neighbours] -= times
        for neighbours in zip(new, new[1:]):
            change[neighbours] += times
            places[neighbours].add(place)
    return change


def join_pair(pieces, pair, joined):
    """The pieces of one word with every such pair of neighbours replaced by one piece."""
    new, i = [], 0
    while i < len(pieces):
        together = tuple(pieces[i:i + 2]) == pair
        new.append(joined if together else pieces[i])
        i += 2 if together else 1
    return new


# --- Rows: every reader yields (where, record), or (where, the reason why there is no record) ---


def manifest_jsonl(path):
    """One JSON object a line."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", json_object(line.strip())


def json_object(line):
    """The object that the line spells, or the reason why it spells none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"bad JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "bad JSON (nested too deeply)"
    except ValueError as error:
        return f"bad JSON ({error})"
    return record if isinstance(record, dict) else "bad JSON (not an object)"


def manifest_csv(path):
    """One record a line (more where a quoted field goes on), under a header that names the fields."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        written = list(file)
    lines = csv.reader(written, strict=True)
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise DataError(f"{path}:1: bad CSV ({error})") from None
    lacking = [name for name in ("image", "caption", "product_id") if name not in header]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if lacking or twice:
        wrong = f"lacks {', '.join(lacking)}" if lacking else f"names {', '.join(twice)} twice"
        raise DataError(f"{path}:1: the header {wrong} (it says {','.join(header)!r})")
    start, done = 0, lines.line_num  # the lines before this reader's first, and those that are dealt with
    while done < len(written):
        try:
            for fields in lines:
                done = start + lines.line_num
                if fields:  # [] is a blank line
                    wrong = f"bad CSV ({len(fields)} fields under a header of {len(header)})" * (len(fields) != len(header))
                    yield f"{path.name}:{done}", wrong or dict(zip(header, fields))
        except csv.Error as error:  # a quote left open may have swallowed good lines: go on with the next one
            start = done = done + 1
            yield f"{path.name}:{done}", f"bad CSV ({error})"
            lines = csv.reader(written[done:], strict=True)


def open_h5(path):
    """Open a HDF5 file with the package h5py, which nothing else needs."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path}: reading it needs the package h5py (pip install h5py)") from None
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a whole HDF5 file ({error})") from None


def fashion_gen(path):
    """Fashion-Gen's own file: one dataset a field, of shape (N,) or (N, 1), its bytes in latin-1."""
    wanted = ("productID", "concat_description", "name", "description", "category", "subcategory")
    with open_h5(path) as file:
        lacking = [key for key in ("input_image", "input_productID") if key not in file]
        if lacking:
            raise DataError(f"{path}: lacks {', '.join(lacking)}")
        fields = {key: file[f"input_{key}"][:].reshape(-1) for key in wanted if f"input_{key}" in file}
        lengths = {len(file["input_image"]), *map(len, fields.values())}
    if len(lengths) > 1:
        raise DataError(f"{path}: its datasets differ in length ({', '.join(map(str, sorted(lengths)))})")
    for number in range(max(lengths)):
        record = {key: values[number] for key, values in fields.items()}
        record = {key: value.decode("latin-1") if isinstance(value, bytes) else str(value) for key, value in record.items()}
        title_and_text = [record.get(key, "").strip() for key in ("name", "description")]
        record["caption"] = record.get("concat_description", "").strip() or ". ".join(filter(None, title_and_text))
        record["product_id"] = record["productID"]
        record["image"] = f"{path.name}#{number}"
        yield record["image"], record


class PlainUnpickler(pickle.Unpickler):
    """Builds numbers, text, bytes and containers of them. What needs a class or a function is refused, so no code of the file's is run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only plain Python values are read")


def read_pickle(path):
    """The plain Python value that a pickle holds."""
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle may raise nearly anything
        raise DataError(f"{path}: bad pickle ({error})") from None


def fashion_gen_processed(path):
    """The authors' folder: one pickled dict a picture, which names its picture (their own loader pairs two sorted listings)."""
    images = path.name.replace("full_", "extracted_").replace("_info_PAI", "_images")
    for file in sorted(path.glob("*.pkl")):
        try:
            value = read_pickle(file)
            record = {
                "image": f"{images}/{value['img_name']}",
                "caption": value["captions"],
                "product_id": value["product_id"],
                "category": value.get("super_cls_name"),
                "subcategory": value.get("sub_cls_name"),
            }
        except DataError as error:
            record = str(error).removeprefix(f"{file}: ")
        except (KeyError, TypeError, AttributeError):
            record = "bad pickle (not a dict with img_name, captions and product_id)"
        yield f"{path.name}/{file.name}", record


def coco(path, splits):
    """Karpathy's JSON: a picture comes with some five captions, which become as many rows of one product."""
    try:
        for number, image in enumerate(json.loads(path.read_bytes())["images"]):
            if image["split"] not in splits:
                continue
            for sentence in image["sentences"]:
                yield f"{path.name}:images[{number}]", {
                    "image": os.path.join(image["filepath"], image["filename"]),
                    "caption": sentence["raw"],
                    "product_id": image["cocoid"],
                }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not Karpathy's layout ({type(error).__name__}: {error})") from None


SOURCES = [  # what a folder may hold: a split, the name of its file or folder, the reader
    *((split, f"{split}.jsonl", manifest_jsonl) for split in (*SPLITS, "items")),
    *((split, f"{split}.csv", manifest_csv) for split in (*SPLITS, "items")),
    ("train", "fashiongen*_train.h5", fashion_gen),
    ("test", "fashiongen*_validation.h5", fashion_gen),  # the paper tests on it
    ("train", "full_train_info_PAI", fashion_gen_processed),
    ("test", "full_valid_info_PAI", fashion_gen_processed),
    ("train", "dataset_coco.json", functools.partial(coco, splits=("train", "restval"))),
    ("val", "dataset_coco.json", functools.partial(coco, splits=("val",))),
    ("test", "dataset_coco.json", functools.partial(coco, splits=("test",))),
]


def find_sources(folder):
    """What the folder holds: {split: a function that yields its records}, with "items" for one file of all splits."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    found = [(split, path, reader) for split, name, reader in SOURCES for path in sorted(Path(folder).glob(name))]
    sources = {split: functools.partial(reader, path) for split, path, reader in found}
    if not sources:
        raise DataError(f"{folder}: holds none of {', '.join(dict.fromkeys(name for _, name, _ in SOURCES))}")
    if len(sources) < len(found) or ("items" in sources and len(sources) > 1):
        raise DataError(f"{folder}: more than one source for a split ({', '.join(sorted({path.name for _, path, _ in found}))})")
    return sources


def splits_of(folder):
    """The splits that can be read from the folder."""
    sources = find_sources(folder)
    return [split for split in SPLITS if split in sources or "items" in sources or (split == "val" and "train" in sources)]


def fraction(product_id):
    """A number in [0, 1) that depends on the product alone, and so is the same on every machine."""
    return int.from_bytes(hashlib.sha256(product_id.encode()).digest()[:6], "big") / 2**48


def side_of_items(product_id):
    """The split of a product where one file holds them all: 80/10/10."""
    return SPLITS[(fraction(product_id) >= 0.8) + (fraction(product_id) >= 0.9)]


def side_of_train(product_id):
    """The split of a training product where no validation split is given: 90/10."""
    return "val" if fraction(product_id) < 0.1 else "train"


def text(record, name):
    """The field as text without blanks around it, "" where it is missing; a whole number will do. ValueError for anything else."""
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    value = str(value).strip()
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is not valid UTF-8")
    return value


def file_of(reference):
    """A row's "image" as (file, place in it): "a.h5#17" -> ("a.h5", 17), "images/7.jpg" -> ("images/7.jpg", None)."""
    file, _, place = reference.rpartition("#")
    return (file, int(place)) if file.endswith(".h5") and place.isdecimal() else (reference, None)


def make_row(folder, where, record):
    """The row that a record spells, its picture looked for but not yet opened. ValueError with the reason where it spells none."""
    if isinstance(record, str):
        raise ValueError(record)
    row = {name: text(record, name) for name in ("image", "caption", "product_id", "category", "subcategory")}
    for name in ("image", "caption", "product_id"):
        if not row[name]:
            raise ValueError(f"empty {name}" if name in record else f"no {name}")
    file, _ = file_of(row["image"])
    inside = os.path.normpath(file)
    if os.path.isabs(file) or inside.split(os.sep)[0] == "..":
        raise ValueError(f"path {file} must be relative to the folder and stay in it")
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        raise ValueError(f"missing picture {file}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{file}: empty file (0 bytes)")
    return row | {"where": where}


def products_of(source):
    """The products that a source names."""
    found = set()
    for _, record in source():
        with contextlib.suppress(ValueError):  # a bad row, which is reported when its own split is read
            found.add(text(record, "product_id") if isinstance(record, dict) else "")
    return found - {""}


def read_all(folder, split):
    """
    Read one split: its good rows, and its bad ones as "file:line: reason".
    A row whose product a later split holds too is a bad one, so that no product is ever on two sides.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    sources, source, side = find_sources(folder), split, lambda product: split
    if "items" in sources:
        source, side = "items", side_of_items
    elif split != "test" and "val" not in sources:
        source, side = "train", side_of_train
    if source not in sources:
        raise DataError(f"{folder}: holds nothing for the split {split!r}, only for {', '.join(sorted(sources))}")

    later = [name for name in SPLITS[SPLITS.index(split) + 1:] if name in sources and name != source]
    taken = {product: name for name in later for product in products_of(sources[name])}
    rows, bad = [], []
    for where, record in tqdm(sources[source](), f"reading {split}", unit=" rows", delay=1, disable=None):
        try:
            row = make_row(folder, where, record)
            if row["product_id"] in taken:
                raise ValueError(f"product {row['product_id']} is in the split {taken[row['product_id']]!r} too")
            if side(row["product_id"]) == split:
                rows.append(row)
        except (ValueError, OSError) as error:
            bad.append(f"{where}: {error}")
    return rows, bad


def settle(folder, split, rows, bad, skip_bad):
    """The one rule for bad rows: they end the run, unless skip_bad leaves them out and says which."""
    if bad and not skip_bad:
        raise DataError("\n  ".join([f"{folder}: {len(bad)} bad rows in {split} (--skip-bad leaves them out)", *bad]))
    if bad:
        print("\n  ".join([f"{folder}: left out {len(bad)} bad rows of {split}", *bad]), flush=True)
    if not rows:
        raise DataError(f"{folder}: the split {split!r} has no rows")
    return rows


def read(folder, split, skip_bad=False):
    """The rows of a split ("train", "val" or "test"). Their pictures are looked for; `load` opens them."""
    rows, bad = read_all(folder, split)
    return settle(folder, split, rows, bad, skip_bad)


# --- Pictures: opened safely, made square, and kept decoded in one memory-mapped file ---


def open_picture(folder, reference, at_least=None):
    """
    Decode one picture to RGB: its first frame, upright, in 8 bits, over white where it is transparent.
    With `at_least`, a JPEG that is much bigger is decoded at a fraction of its size, never below `at_least` on a side.
    """
    file, place = file_of(str(reference))
    path = os.path.join(folder, file)
    try:
        if place is not None:
            with open_h5(path) as archive:
                return upright_rgb(Image.fromarray(archive["input_image"][place]))
        if os.path.getsize(path) == 0:
            raise DataError(f"{reference}: empty file (0 bytes)")
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow warns here and refuses at twice as many
                raise Image.DecompressionBombError
            if at_least:
                image.draft(None, (at_least, at_least))
            return upright_rgb(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"missing picture {reference}") from None
    except UnidentifiedImageError:
        raise DataError(f"{reference}: not a picture") from None
    except Image.DecompressionBombError:
        raise DataError(f"{reference}: absurd size, over {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # decoders meet broken bytes with nearly any exception
        reason = "truncated picture" if "truncated" in str(error).lower() else "undecodable picture"
        raise DataError(f"{reference}: {reason} ({error})") from None


def upright_rgb(image):
    """Bring a picture of any mode to RGB, turned as its EXIF says."""
    image.getexif()  # Pillow remembers which way is up; without the bytes it does not trip over another tag that is malformed
    image.info.pop("exif", None)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("nothing says which number is white among its floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def make_square(image, size, fit):
    """Bring a picture to (size, size, 3) uint8: `stretch` it as the paper does, or keep its shape and `pad` with the colour of its border."""
    if fit == "stretch":
        return np.array(image.resize((size, size), Image.BILINEAR))
    longest = max(image.size)
    image = np.asarray(image.resize([max(1, round(side * size / longest)) for side in image.size], Image.BILINEAR))
    height, width, _ = image.shape
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = np.median(border, axis=0).round()
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = image
    return canvas


def check_shape(size, fit):
    """DataError for a size or a fit that no picture can be brought to."""
    if fit not in ("stretch", "pad"):
        raise DataError(f"fit must be stretch or pad, got {fit!r}")
    if size < 1:
        raise DataError(f"size must be at least 1 pixel, got {size}")


def picture(folder, reference, size, fit="stretch"):
    """Open one picture as (size, size, 3) uint8. DataError where it cannot be decoded."""
    check_shape(size, fit)
    return make_square(open_picture(folder, reference, at_least=2 * size), size, fit)


class Pictures:
    """The rows' decoded pictures: an index into a memory-mapped file, in which rows that share a picture share its pixels."""

    def __init__(self, path, index):
        self.path, self.index = path, index
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, rows):
        return self.pixels[self.index[rows]]

    def __reduce__(self):
        return Pictures, (self.path, self.index)  # another process maps the file anew; no pixels are sent


@contextlib.contextmanager
def whole_file(path):
    """Write a file under another name and rename it when it is whole, so that nobody ever reads a part of it."""
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # of the same cause, or no longer there
            temporary.unlink()


def cache_folders(folder):
    """Where derived files may lie: `.cache` inside the data, or, where that cannot be written, our own folder among the temporary ones."""
    return Path(folder) / ".cache", Path(tempfile.gettempdir()) / f"mvlt-cache-{os.getuid()}"


def writable(places):
    """The first of the folders that can be written, made where it is missing."""
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise DataError(f"cannot write in {' nor in '.join(map(str, places))}")


def cache_name(folder, references, size, fit):
    """A name that changes with the wanted shape and with every picture: its path, its bytes and the times of its last change."""
    digest = hashlib.sha256()
    for reference in references:
        seen = [reference]
        with contextlib.suppress(OSError):  # a missing picture is reported when it is opened
            stat = os.stat(os.path.join(folder, file_of(reference)[0]))
            seen += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        digest.update(json.dumps(seen).encode())
    return f"{size}-{fit}-{digest.hexdigest()[:16]}.npy"


def decode(folder, references, size, fit):
    """Yield the pixels and None for each reference, or black and the reason where it cannot be decoded."""
    def attempt(reference):
        try:
            return picture(folder, reference, size, fit), None
        except DataError as error:
            return np.zeros((size, size, 3), np.uint8), str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads will do: Pillow frees them while it decodes
        for start in range(0, len(references), 1024):  # so many are in memory at once
            yield from pool.map(attempt, references[start:start + 1024])


def build_cache(path, folder, references, size, fit):
    """Decode all pictures into `path`, and put the reasons why some cannot be decoded beside it, as JSON."""
    needed, free = len(references) * size * size * 3, shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(f"{path.parent}: the decoded pictures take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    for stale in path.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3600:  # a living build writes all the time
                stale.unlink()
    bad, header = {}, {"descr": "|u1", "fortran_order": False, "shape": (len(references), size, size, 3)}
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        pixels_and_reasons = decode(folder, references, size, fit)
        for reference in tqdm(references, "decoding pictures", delay=1, disable=None):
            pixels, reason = next(pixels_and_reasons)
            file.write(pixels)
            if reason:
                bad[reference] = reason
        with whole_file(path.with_suffix(".json")) as reasons:  # first: where the pixels are, the reasons are
            reasons.write(json.dumps(bad).encode())


def open_pictures(folder, rows, size, fit="stretch"):
    """The rows' pictures out of the cache, built if need be, and {row number: reason} for those that cannot be decoded."""
    check_shape(size, fit)
    references = sorted({row["image"] for row in rows})
    places, name = cache_folders(folder), cache_name(folder, references, size, fit)
    path = next((place / name for place in places if (place / name).exists()), None)
    if path is None:
        path = writable(places) / name
        build_cache(path, folder, references, size, fit)
    bad = json.loads(path.with_suffix(".json").read_text())
    number = {reference: number for number, reference in enumerate(references)}
    pictures = Pictures(path, np.array([number[row["image"]] for row in rows], np.int64))
    return pictures, {number: bad[row["image"]] for number, row in enumerate(rows) if row["image"] in bad}


def load(folder, split, size, fit="stretch", skip_bad=False):
    """Read a split and decode its pictures: (rows, pictures). A bad row or picture ends the run, or is left out of both with skip_bad."""
    rows, bad = read_all(folder, split)
    pictures, undecoded = open_pictures(folder, rows, size, fit)
    bad += [f"{rows[number]['where']}: {reason}" for number, reason in undecoded.items()]
    good = [number for number in range(len(rows)) if number not in undecoded]
    rows = settle(folder, split, [rows[number] for number in good], bad, skip_bad)
    return rows, Pictures(pictures.path, pictures.index[good])


# --- Numbers: classes, products and captions ---


def class_names(rows, field):
    """The names that the field takes in these rows, sorted: a name's place is its class."""
    return sorted({row[field] for row in rows} - {""})


def class_ids(rows, field, names):
    """Each row's class, (len(rows),) int64: -1 where its name is missing, or was never seen in training."""
    number = {name: number for number, name in enumerate(names)}
    return torch.tensor([number.get(row[field], -1) for row in rows], dtype=torch.int64)


def numbered(names):
    """(len(names),) int64: equal names get equal numbers, the empty name -1."""
    number = {}
    return torch.tensor([number.setdefault(name, len(number)) if name else -1 for name in names], dtype=torch.int64)


def plain_caption(row):
    """Case and spaces tell no captions apart."""
    return " ".join(row["caption"].lower().split())


def identities(rows):
    """What `draw_negatives` asks of a catalogue: (products, captions, groups), each (len(rows),) int64. A group is a sub-category, -1 is none."""
    products = numbered([row["product_id"] for row in rows])
    captions = numbered(list(map(plain_caption, rows)))
    groups = numbered([row["subcategory"] and f"{row['category']}/{row['subcategory']}" for row in rows])
    return products, captions, groups


def tokenize(rows, tokenizer, length):
    """The captions as words, (len(rows), L) int64, 0 = padding, where L is the longest of them, at most `length`."""
    known, tokens = {}, torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(tqdm(rows, "reading captions", delay=1, disable=None)):
        caption = row["caption"]
        if caption not in known:  # the views of a product share theirs
            known[caption] = torch.tensor(tokenizer.encode(caption, length))
        tokens[number] = known[caption]
    return trim(tokens)


def trim(tokens):
    """Cut off the last columns, those that are padding in every row. (A [PAD] written in a caption is a 0 with words behind it.)"""
    used = (tokens != 0).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1 if len(used) else 0]


# --- Batches: the same for any number of processes and loaders, and after any interruption ---


def generator(*key):
    """Randomness that depends on the key alone, such as (seed, step, "words")."""
    digest = hashlib.sha256(json.dumps([str(part) for part in key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


@functools.lru_cache(maxsize=4)
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits the n rows. It is remembered: do not write in it."""
    return torch.randperm(n, generator=generator(seed, epoch, "order"))


def batch_rows(step, batch_size, n, seed):
    """
    The rows of global batch `step`, (batch_size,) int64: the epochs' orders laid end to end, cut every batch_size rows.
    So every epoch sees every row once, and a batch may end one epoch and begin the next.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    return torch.cat([epoch_order(n, seed, epoch)[max(start - epoch * n, 0):stop - epoch * n] for epoch in epochs])


def alike_rows(step, batch_size, groups, seed, window):
    """
    The rows of global batch `step` when batches are filled group by group, (batch_size,) int64: what `batch_rows` gives for `window` steps
    in a row, sorted by group and dealt out in batches, which come in a random order. So a window reads the same rows, among their like.
    """
    first = step // window * window
    rows = torch.cat([batch_rows(first + i, batch_size, len(groups), seed) for i in range(window)])
    rows = rows[groups[rows].argsort(stable=True)]
    order = torch.randperm(window, generator=generator(seed, first, "alike"))
    return rows.split(batch_size)[order[step - first]]


def draw_negatives(rows, products, captions, generator, groups=None):
    """
    Draw for each row another one of the catalogue, whose product and caption both differ, each such row equally likely.
    With groups, one of the row's own group if any of them will do (-1 is no group). Returns (len(rows),) int64.
    """
    n, drawn = len(products), torch.full((len(rows),), -1)
    pool, first, count = torch.arange(n), torch.zeros(len(rows), dtype=torch.int64), torch.full((len(rows),), n)
    if groups is not None:
        pool = torch.from_numpy(np.argsort(groups.numpy(), kind="stable"))  # the members of a group stand side by side
        sizes = torch.bincount(groups + 1)
        group, grouped = groups[rows] + 1, groups[rows] >= 0
        first[grouped], count[grouped] = (sizes.cumsum(0) - sizes)[group[grouped]], sizes[group[grouped]]

    for _ in range(16):  # draw for all, then again for those whose draw will not do
        places = (drawn < 0).nonzero().squeeze(1)
        chance = torch.rand(len(places), dtype=torch.float64, generator=generator)
        other, ours = pool[first[places] + (chance * count[places]).long()], rows[places]
        will_do = (products[other] != products[ours]) & (captions[other] != captions[ours])
        drawn[places[will_do]] = other[will_do]
    for place in (drawn < 0).nonzero().squeeze(1).tolist():  # few rows will do for these, or none: look at every one
        row = rows[place]
        will_do = (products != products[row]) & (captions != captions[row])
        if groups is not None and groups[row] >= 0 and (will_do & (groups == groups[row])).any():
            will_do &= groups == groups[row]
        choice = will_do.nonzero().squeeze(1)
        if len(choice) == 0:
            raise DataError(f"row {int(row)} of the catalogue can have no negative: every other row shares its product or its caption")
        drawn[place] = choice[torch.randint(len(choice), (1,), generator=generator)]
    return drawn


class Batches:
    """
    The pictures of the global batches from `start` up to `stop`, in order, loaded by `workers` processes. Yields dicts of
    "step", "rows" (G,) int64 (the whole global batch), "slice" (lo, hi) (this process's share of it) and
    "images" (g, 3, H, W) uint8 of rows[lo:hi], each mirrored with probability `mirror`, moved by up to `shift` pixels either way, and
    seen through a window whose width and height each differ from the picture's by up to the share `zoom`.
    rows_of: step -> the rows of its global batch; the epochs laid end to end, `batch_rows`, unless told other.
    """

    def __init__(self, pictures, batch_size, seed, start, stop, rank=0, world=1, mirror=0.0, shift=0, zoom=0.0, workers=0, rows_of=None):
        self.pictures, self.batch_size, self.seed, self.mirror, self.shift, self.zoom = pictures, batch_size, seed, mirror, shift, zoom
        self.steps, self.workers = range(start, stop), workers
        self.rows_of = rows_of or functools.partial(batch_rows, batch_size=batch_size, n=len(pictures), seed=seed)
        self.slice = (batch_size * rank // world, batch_size * (rank + 1) // world)

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, step):
        rows, (lo, hi) = self.rows_of(step), self.slice
        draw = lambda what: generator(self.seed, step, what)
        pictures = self.pictures[rows[lo:hi].numpy()]  # (g, H, W, 3)
        if self.shift or self.zoom:
            moves = torch.randint(-self.shift, self.shift + 1, (len(rows), 2), generator=draw("shift"))
            sides = 1 + self.zoom * (2 * torch.rand(len(rows), 2, generator=draw("zoom")) - 1)
            pictures = through_windows(pictures, moves[lo:hi].numpy(), sides[lo:hi].double().numpy())
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # (g, 3, H, W); in memory still (g, H, W, 3)
        flip = torch.rand(len(rows), generator=draw("mirror"))[lo:hi] < self.mirror
        images[flip] = images[flip].flip(-1)
        return {"step": step, "rows": rows, "slice": (lo, hi), "images": images}

    def __iter__(self):
        own = torch.Generator()  # otherwise the DataLoader would draw from the global one
        return iter(DataLoader(self, None, sampler=self.steps, num_workers=self.workers, collate_fn=dict,  # dict: the sample as it is
                               worker_init_fn=deaf_to_signals, generator=own))


def deaf_to_signals(worker):
    """torchrun and schedulers tell loaders to stop, too: they must work until the process that they serve has saved, and then end with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def through_windows(pictures, moves, sides):
    """
    Pictures (g, H, W, 3), each seen through a window of its own: `sides` (g, 2) times its height and width, and its middle `moves` (g, 2)
    pixels down and right of the picture's. Where a window reaches beyond the border, the border's pixels go on.
    """
    size = np.array(pictures.shape[1:3])
    border = int((np.abs(moves) + np.maximum(sides - 1, 0) * size / 2).max()) + 1
    wide = np.pad(pictures, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")
    first = border + size / 2 + moves - sides * size / 2  # (g, 2): where the window begins
    boxes = np.concatenate([first, first + sides * size], axis=1)[:, [1, 0, 3, 2]]  # left, upper, right, lower
    return np.stack([Image.fromarray(one).resize(tuple(size[::-1]), Image.Resampling.BILINEAR, tuple(box)) for one, box in zip(wide, boxes)])


def images_to_float(images):
    """uint8 pixels to floats in [0, 1], laid out in memory as their shape says (a quick thing on a GPU, which the loader leaves to it)."""
    return images.contiguous().float() / 255


# --- Command line ---


def open_all(folder, references):
    """Decode every picture once, whole: {reference: (its size, a digest of its pixels)}, and {reference: reason} for the bad ones."""
    def attempt(reference):
        try:
            image = open_picture(folder, reference)
            return image.size, hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        except DataError as error:
            return str(error)

    good, bad = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for reference, found in zip(references, tqdm(pool.map(attempt, references), "opening pictures", len(references), disable=None)):
            (bad if isinstance(found, str) else good)[reference] = found
    return good, bad


def folder_report(folder):
    """Read all that a folder holds. Returns the lines of the report, the bad rows as "file:line: reason", and the good rows."""
    splits, bad = {}, {}  # the same bad row may come with two splits cut from one file
    for split in splits_of(folder):
        splits[split], lines = read_all(folder, split)
        bad |= dict.fromkeys(lines)
    good, undecoded = open_all(folder, sorted({row["image"] for rows in splits.values() for row in rows}))
    for split, rows in splits.items():
        bad |= dict.fromkeys(f"{row['where']}: {undecoded[row['image']]}" for row in rows if row["image"] in undecoded)
        splits[split] = [row for row in rows if row["image"] in good]
    rows = sum(splits.values(), [])
    products = {split: len({row["product_id"] for row in rows}) for split, rows in splits.items()}
    report = [f"rows        {len(rows)}: " + ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())]
    if rows:
        report += [
            report_products(rows, products),
            report_pictures(good),
            report_captions(rows),
            report_categories(splits, "category"),
            report_categories(splits, "subcategory"),
            report_duplicates(rows, good),
        ]
    return report + [f"bad rows    {len(bad)}"], list(bad), rows


def report_products(rows, products):
    """How many products, and what a split with few of them cannot do."""
    few = [f"{split} has too few to {what} ({least})" for split, least, what in (("train", 2, "learn matching"), ("val", 2, "judge matching"), ("test", 101, "draw candidates"))
           if split in products and products[split] < least]
    return f"products    {len({row['product_id'] for row in rows})}: " + ", ".join(f"{split} {count}" for split, count in products.items()) + "".join(f"; {line}" for line in few)


def report_pictures(good):
    """How many pictures, and of which sizes."""
    sizes = Counter(size for size, _ in good.values())
    small, large = (f"{width}x{height}" for width, height in (min(sizes, key=math.prod), max(sizes, key=math.prod)))
    common = ", ".join(f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(3)) + ", ..." * (len(sizes) > 3)
    return f"pictures    {len(good)}: {common}; the smallest {small}, the largest {large}"


def report_captions(rows):
    """How long captions are in BERT's words, [CLS] and [SEP] included, so that text_len can be chosen."""
    lengths = [len(split_words(row["caption"])) + 2 for row in rows]
    half, most, longest = np.quantile(lengths, (0.5, 0.99, 1)).round().astype(int)
    return f"captions    of {half} words in the middle, 99% up to {most}, the longest {longest} (more where the vocabulary cuts words in pieces)"


def report_categories(splits, field):
    """How many names the field takes, and which of them training never sees."""
    counts = Counter(row[field] for rows in splits.values() for row in rows)
    missing = counts.pop("", 0)
    if not counts:
        return f"{field:11} missing in all rows"
    common = ", ".join(f"{name} ({count})" for name, count in counts.most_common(3)) + ", ..." * (len(counts) > 3)
    unseen = sorted(set(counts).difference(class_names(splits.get("train", []), field)))
    return f"{field:11} {len(counts)} names: {common}; missing in {missing} rows; never in train: {', '.join(unseen) or 'none'}"


def report_duplicates(rows, good):
    """How many captions tell of several products, how many pictures show several, and how many occur under several names."""
    told, shown, names = defaultdict(set), defaultdict(set), defaultdict(set)
    for row in rows:
        _, digest = good[row["image"]]
        told[plain_caption(row)].add(row["product_id"])
        shown[digest].add(row["product_id"])
        names[digest].add(row["image"])
    shared = [repr(caption) for caption, products in told.items() if len(products) > 1]
    placeholders = [min(names[digest]) for digest, products in shown.items() if len(products) > 1]
    same = [" = ".join(sorted(references)[:3]) for references in names.values() if len(references) > 1]
    example = lambda found: f" (as {found[0]})" if found else ""
    return (f"duplicates  {len(shared)} captions tell of several products{example(shared)}; {len(placeholders)} pictures show several{example(placeholders)}; "
            f"{len(same)} have several names{example(same)}")


def contact_sheet(folder, rows, path, count=40, columns=8, side=160):
    """Draw `count` rows from all over the catalogue into one PNG, each picture with its caption below it."""
    rows = [rows[place * len(rows) // count] for place in range(count)] if len(rows) > count else rows
    font, cell = ImageFont.load_default(12), (side + 12, side + 80)
    sheet = Image.new("RGB", (columns * cell[0], -(-len(rows) // columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        x, y = place % columns * cell[0] + 6, place // columns * cell[1] + 6
        sheet.paste(Image.fromarray(picture(folder, row["image"], side, "pad")), (x, y))
        caption = row["caption"].encode("latin-1", "replace").decode("latin-1")  # Pillow's own font has no others
        draw.text((x, y + side + 4), "\n".join(textwrap.wrap(caption, side // 6)[:4]), "black", font)
    with whole_file(path) as file:
        sheet.save(file, "PNG")


def check(arguments):
    """Report a folder, list its bad rows, draw its contact sheet."""
    report, bad, rows = folder_report(arguments.folder)
    print(f"{arguments.folder}\n" + "\n".join(report + [f"  {line}" for line in bad]))
    if rows:
        sheet = arguments.sheet or writable(cache_folders(arguments.folder)) / "contact_sheet.png"
        contact_sheet(arguments.folder, rows, sheet)
        print(f"pictures and captions to look at: {sheet}")
    if not rows or (bad and not arguments.skip_bad):
        raise DataError(f"{arguments.folder}: {len(bad)} bad rows, {len(rows)} good ones" + " (--skip-bad leaves the bad ones out)" * bool(rows))


def vocab(arguments):
    """Learn a vocabulary from the training captions."""
    out = arguments.out or Path(arguments.folder) / "vocab.txt"
    if out.exists() and not arguments.out:
        raise DataError(f"{out} is there already: name the file to write with --out")
    rows = read(arguments.folder, "train", arguments.skip_bad)
    tokenizer = Tokenizer.train([row["caption"] for row in rows], arguments.size)
    tokenizer.save(out)
    print(f"{len(tokenizer)} words from {len(rows)} captions: {out}")


def candidates(arguments):
    """Write the retrieval lists of the test split."""
    import eval  # for this command alone: eval imports this file
    rows = read(arguments.folder, "test", arguments.skip_bad)
    lists = eval.candidates(rows, seed=arguments.seed)
    out = arguments.out or Path(f"candidates-{arguments.seed}.json")
    eval.save_candidates(out, [{"tir": lists, "itr": lists}], rows)
    print(f"{len(lists)} lists of {len(lists[0]['candidates'])} candidates: {out}")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Look into a folder of pictures and captions.")
    commands = parser.add_subparsers(required=True, metavar="check | vocab | candidates")
    for command in (check, vocab, candidates):
        options = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("folder", metavar="DIR")
        options.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of ending on them")
        if command is check:
            options.add_argument("--sheet", type=Path, metavar="FILE", help="where to write the contact sheet, a PNG")
        else:
            options.add_argument("--out", type=Path, metavar="FILE", help="where to write")
        if command is vocab:
            options.add_argument("--size", type=int, default=8000, help="words in the vocabulary, at most")
        if command is candidates:
            options.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(arguments)
    try:
        arguments.command(arguments)
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")  # status 1
    except KeyboardInterrupt:
        sys.exit("data.py: stopped")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell must not cost the answer
    main()
