"""
The rows of a split as arrays, built once and kept beside its decoded pictures.

A million rows as dicts take gigabytes in every process; as arrays they are opened at once, and processes share them. A
table is a folder of .npy files in `.cache`, which are memory-mapped. Its name changes with the files that the rows come
from, and it gets that name when it is whole, so a build that is killed leaves none. Rows that are not all good are not
kept: they may be mended.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extras import readers
from extras.pictures import cache_folder, is_folder
from extras.runtime import UserError

NUMBERED = ("product_id", "caption", "group", "category", "subcategory", "image")  # equal texts get equal numbers


class Texts(Sequence):
    """n texts in two arrays: their bytes, end to end, and where each of them ends."""

    def __init__(self, letters, ends):
        self.letters, self.ends = letters, ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return self.letters[start : self.ends[i]].tobytes().decode(errors="surrogateescape")

    @classmethod
    def of(cls, texts):
        """Any number of texts, of which only one is in memory at a time."""
        letters, ends = bytearray(), array("q")
        for text in texts:
            letters += text.encode(errors="surrogateescape")  # names of files may not be UTF-8
            ends.append(len(letters))
        return cls(np.frombuffer(letters, np.uint8), np.frombuffer(ends, np.int64))


class Rows(Sequence):
    """n rows, each read when it is asked for: rows[i] is a dict, rows[a:b] a list of dicts."""

    def __init__(self, lines, chosen=None):
        self.lines = lines  # Texts: rows in JSON
        self.chosen = np.arange(len(lines)) if chosen is None else chosen  # (n,): which of the lines

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[place] for place in range(len(self))[i]]
        return json.loads(self.lines[self.chosen[i]])


class Captions(Sequence):
    """The captions of rows."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]["caption"]


@dataclass(eq=False)
class Table:
    """The rows of a split, and their numbers."""

    rows: Rows  # n
    numbers: dict  # {name in NUMBERED: (n,) int64, -1 for an empty text}
    names: dict  # {"category" or "subcategory": [the name of number 0, of number 1, ...]}
    references: Texts  # the distinct pictures, sorted: numbers["image"] are places in it
    digest: int  # changes with any row, but not with the files that hold them
    key: str = ""  # the table's name in the cache; "" if it is not kept

    def __len__(self):
        return len(self.rows)

    def select(self, chosen):
        """These rows alone."""
        chosen = np.asarray(chosen, np.int64)
        return replace(
            self,
            rows=Rows(self.rows.lines, self.rows.chosen[chosen]),
            numbers={name: number[chosen] for name, number in self.numbers.items()},
            digest=zlib.crc32(chosen.tobytes(), self.digest),
            key="",
        )

    def class_names(self, field):
        """The names that "category" or "subcategory" takes in these rows, sorted: the place of a name is its class."""
        seen = np.unique(self.numbers[field])
        return sorted(self.names[field][number] for number in seen if number >= 0)

    def classes(self, field, names):
        """Each row's class, (n,) int64: -1 if its name is missing or not among these."""
        place = {name: number for number, name in enumerate(names)}
        class_of = np.array([place.get(name, -1) for name in self.names[field]] + [-1], np.int64)
        return torch.from_numpy(class_of[self.numbers[field]])  # number -1 finds the last entry

    def ids(self, name):
        """One of the numbers as a tensor."""
        return torch.from_numpy(self.numbers[name])


# --- Building ---


def build(rows):
    """The table of any number of rows, of which only one is in memory at a time."""
    number = {name: {} for name in NUMBERED}
    column = {name: array("q") for name in NUMBERED}
    digest = 0

    def lines():
        nonlocal digest
        for row in rows:
            for name, text in texts_of(row).items():
                known = number[name]
                column[name].append(known.setdefault(text, len(known)) if text else -1)
            digest = zlib.crc32(json.dumps({**row, "where": ""}, sort_keys=True).encode(), digest)
            yield json.dumps(row)

    rows_kept = Rows(Texts.of(lines()))
    numbers = {name: np.frombuffer(values, np.int64) for name, values in column.items()}
    references = sorted(number["image"])
    place = {reference: i for i, reference in enumerate(references)}
    sorted_place = np.array([place[reference] for reference in number["image"]] + [-1], np.int64)
    numbers["image"] = sorted_place[numbers["image"]]
    names = {field: list(number[field]) for field in ("category", "subcategory")}
    return Table(rows_kept, numbers, names, Texts.of(references), digest)


def texts_of(row):
    """What is numbered. Captions that differ in case and spaces alone are equal; a group is a sub-category."""
    group = row["subcategory"] and f"{row['category']}/{row['subcategory']}"
    computed = dict(caption=readers.plain_caption(row["caption"]), group=group)
    return {name: row.get(name, "") for name in NUMBERED} | computed


# --- Keeping ---

TEMPORARY = re.compile(r"(rows|words)-.*\.[0-9a-f]{32}\.tmp(\.old)?")


def open_table(folder, split):
    """The table of a split's good rows, and its bad rows as "file:line: reason"."""
    key = f"rows-{split}-{fingerprint(readers.files_of(folder, split))}"
    arrays, note = find(folder, key) or (None, None)
    if arrays is not None:
        lines, references = (Texts(arrays[name], arrays[f"{name}_ends"]) for name in ("lines", "references"))
        numbers = {name: arrays[name] for name in NUMBERED}
        return Table(Rows(lines), numbers, note["names"], references, note["digest"], key), []
    bad = []
    table = build(row for row in readers.good_rows(folder, split, bad))
    if not bad and len(table):
        lines, references = table.rows.lines, table.references
        arrays = dict(lines=lines.letters, lines_ends=lines.ends)
        arrays |= dict(references=references.letters, references_ends=references.ends, **table.numbers)
        keep(folder, key, arrays, dict(names=table.names, digest=table.digest))
        table.key = key
    return table, bad


def fingerprint(paths):
    """16 letters that change with these files: their names, sizes and the times of their changes."""
    digest = hashlib.sha256(b"1")  # the version of the tables' form
    for path in paths:
        status = os.stat(path)
        seen = [os.path.basename(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        digest.update(json.dumps(seen).encode())
    return digest.hexdigest()[:16]


def find(folder, key):
    """({name: memory-mapped array}, note) as `keep` has written them; None if they are missing or damaged."""
    places = [Path(folder) / ".cache" / key, cache_folder(folder) / key]
    for place in places:
        with contextlib.suppress(OSError, ValueError, EOFError, KeyError, RecursionError):
            if is_folder(place.parent) and is_folder(place):
                note = json.loads((place / "note.json").read_bytes())
                files = {name: place / f"{name}.npy" for name in note["shapes"]}
                arrays = {name: np.load(file, mmap_mode="c", allow_pickle=False) for name, file in files.items()}
                if {name: list(one.shape) for name, one in arrays.items()} == note["shapes"]:
                    return arrays, note
                print(f"{place}: damaged, so the rows are read again", flush=True)
    return None


def keep(folder, key, arrays, note):
    """Write the arrays and the note into the cache, as a folder that gets its name when it is whole."""
    place = cache_folder(folder) / key
    for path in place.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            if TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > 3600:  # its build was killed
                shutil.rmtree(path, ignore_errors=True)
    temporary = place.with_name(f"{key}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        for name, one in arrays.items():
            np.save(temporary / f"{name}.npy", one)
        shapes = {name: one.shape for name, one in arrays.items()}
        (temporary / "note.json").write_text(json.dumps({**note, "shapes": shapes}))
        with locked(place.parent):
            if place.exists():  # damaged, or made by another process just now
                os.rename(place, f"{temporary}.old")
            os.rename(temporary, place)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(f"{temporary}.old", ignore_errors=True)


@contextlib.contextmanager
def locked(folder):
    """Wait for other processes that hold this folder's lock; not every network disk has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- Words ---


class Words:
    """The words of n captions, (n, L), in 16 bits where the vocabulary allows it: words[rows] is an int64 tensor."""

    def __init__(self, array):
        self.array = torch.from_numpy(array)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return self.array[rows].long()

    @property
    def shape(self):
        return self.array.shape


def tokenize(captions, tokenizer, length):
    """n captions as words, (n, L) int16 or int32, 0 = padding; L is that of the longest of them, at most `length`."""
    tokens = np.zeros((len(captions), length), np.int16 if len(tokenizer) <= 1 << 15 else np.int32)
    longest = 0
    for number, caption in enumerate(tqdm(captions, "reading captions", delay=1, disable=None)):
        ids = tokenizer.encode(caption)
        if len(ids) > length:
            ids[length - 1 :] = [tokenizer.sep_id]
        tokens[number, : len(ids)] = ids
        longest = max(longest, len(ids))
    return tokens[:, :longest]


def open_words(folder, table, tokenizer, length):
    """The captions of a table as `Words`; those of a table that is kept are kept beside it."""
    vocabulary = hashlib.sha256("\n".join(tokenizer.words).encode()).hexdigest()[:16]
    key = table.key and f"words-{table.key}-{vocabulary}-{length}"
    found = find(folder, key) if key else None
    if found:
        return Words(found[0]["tokens"])
    tokens = tokenize(Captions(table.rows), tokenizer, length)
    if key:
        keep(folder, key, dict(tokens=tokens), {})
    return Words(tokens)
