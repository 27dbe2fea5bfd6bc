"""
The vectors of a folder's pictures on disk, for `predict.py index` and `search`.

An index is a folder RUN/index-NAME. For each part, of up to 1024 files, it holds

    KEY.npy       the vectors (n, E) float32 of the pictures that can be decoded
    KEY.json      their rows [image, caption, product_id], and {file: reason} of the others

KEY is a hash of all that a part depends on: the weights, the rows and the files. index.json names the parts and is
written last. So a stopped `index` goes on with the first missing part, and a folder that has grown costs what follows
its first new name. Vectors are memory-mapped, and rows are read when they are asked for.
Letters: N pictures in the index, n in a part, E width of the vectors.
"""

import bisect
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras.readers import regular_file
from extras.runtime import UserError, quoted, whole_file

HEAD = {"folder": str, "weights": str, "parts": list}  # of index.json
ROWS = {"rows": list, "bad": dict}  # of KEY.json
KEY = re.compile("[0-9a-f]{16}")
OURS = re.compile(rf"(index|{KEY.pattern})\.(npy|json)(\.[0-9a-f]{{32}}\.tmp)?")  # .tmp: whole_file's


class Index(NamedTuple):
    """A complete index whose vectors are memory-mapped."""

    path: Path
    folder: str  # where the pictures are
    weights: str  # a hash of the weights that made the vectors
    parts: dict  # {key: (n, E) float32}

    @property
    def size(self):
        """N"""
        return sum(map(len, self.parts.values()))

    def cosines(self, vector):
        """The cosine of a unit vector (E,) with each picture's, (N,), part by part."""
        found = [np.empty(0, np.float32)]
        for key, vectors in self.parts.items():
            with np.errstate(all="ignore"):
                found.append(vectors @ vector if vectors.shape[1] == len(vector) else np.full(1, np.nan))
            if not (np.abs(found[-1]) < 1.1).all():  # no unit vectors, or not even finite; bf16 rounds to 1.01
                raise damaged(self.path / f"{key}.npy")
        return np.concatenate(found)

    def row(self, number):
        """[image, caption, product_id] of a picture; the last two may be empty."""
        ends = list(itertools.accumulate(map(len, self.parts.values())))
        part = bisect.bisect_right(ends, number)
        key = list(self.parts)[part]
        rows, _ = read_rows(self.path, key)
        if len(rows) != len(self.parts[key]):
            raise damaged(self.path / f"{key}.json")
        return rows[number - ends[part]]


def damaged(path):
    """The one error for a file that is not as `index` wrote it."""
    return UserError(f"{path}: damaged; remove it and run index again")


def index_path(home, name):
    """The folder of the index of that name. A name becomes part of a path, so it must be a plain one."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise UserError(f"--name: must not be empty, start with a dot or hold a slash, got {quoted(name)}", status=2)
    path = Path(home) / f"index-{name}"
    if path.is_symlink():
        raise UserError(f"{path}: is a link; choose another --name")
    return path


def index_names(home):
    """The names of the complete indexes in a run's folder."""
    return sorted(path.parent.name.removeprefix("index-") for path in Path(home).glob("index-*/index.json"))


def read_json(file, form):
    """The values of the JSON object in a file, whose fields must have the types of `form`."""
    try:
        contents = json.loads(Path(regular_file(file)).read_bytes())
        if {name: type(value) for name, value in contents.items()} == form:
            return [contents[name] for name in form]
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise damaged(file)


def read_head(path):
    """What index.json says: the folder, the hash of the weights, the keys of the parts."""
    folder, weights, keys = read_json(path / "index.json", HEAD)
    good = keys and all(type(key) is str and KEY.fullmatch(key) for key in keys)
    if not good or not is_path(folder):
        raise damaged(path / "index.json")
    return folder, weights, keys


def read_rows(path, key):
    """The rows of a part's pictures, and the reasons for those left out."""
    rows, bad = read_json(path / f"{key}.json", ROWS)
    if not all(map(is_row, rows)) or not all(type(reason) is str for reason in bad.values()):
        raise damaged(path / f"{key}.json")
    return rows, list(bad.values())


def is_row(row):
    """Whether it is three texts, the first of them a file that lies below the index's folder."""
    if type(row) is not list or [type(value) for value in row] != [str, str, str]:
        return False
    below = not os.path.isabs(row[0]) and os.path.normpath(row[0]).split(os.sep)[0] != ".."
    return is_path(row[0]) and below


def is_path(text):
    """Whether a file may have this name."""
    try:
        return bool(os.fsencode(text)) and "\0" not in text
    except UnicodeEncodeError:
        return False


def read_vectors(path, key):
    """The vectors of a part, memory-mapped."""
    try:
        vectors = np.load(regular_file(path / f"{key}.npy"), mmap_mode="r", allow_pickle=False)
        if vectors.dtype == np.float32 and vectors.ndim == 2:
            return vectors
    except Exception:  # numpy meets damaged bytes with nearly any exception
        pass
    raise damaged(path / f"{key}.npy")


def has_part(path, key):
    """Whether both files of a part are there."""
    return (path / f"{key}.json").exists() and (path / f"{key}.npy").exists()


def read_index(path):
    """The index in a folder; everything that its files say is checked, here or when it is read."""
    folder, weights, keys = read_head(path)
    return Index(path, folder, weights, {key: read_vectors(path, key) for key in keys})


def write_part(path, key, rows, bad, vectors):
    """Write the files of a part."""
    with whole_file(path / f"{key}.json") as file:
        file.write(json.dumps({"rows": rows, "bad": bad}).encode())
    with whole_file(path / f"{key}.npy") as file:
        np.save(file, vectors.astype(np.float32))


def write_head(path, folder, weights, keys):
    """Complete the index, and remove files that an earlier `index` left here."""
    with whole_file(path / "index.json") as file:
        file.write(json.dumps(dict(zip(HEAD, (folder, weights, keys)))).encode())
    for file in path.iterdir():
        stale = file.suffix == ".tmp" or file.stem not in ("index", *keys)
        if stale and OURS.fullmatch(file.name):
            file.unlink()
