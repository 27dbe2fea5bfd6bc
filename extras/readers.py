"""
Data sets as other people write them: a folder in, rows out. `SOURCES` lists what a folder may hold.

Every reader yields pairs (where, record): `where` names the file and the line; the record is a dict of fields, or text
that says why there is none. `read` checks the records and returns rows, plain dicts:

    {"image": "images/7.jpg", "caption": "...", "product_id": "7", "category": "...", "subcategory": "...",
     "where": "train.jsonl:17"}

A data folder is not trusted: no code in a pickle runs, and no small file takes much memory.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from extras.runtime import UserError, quoted

SPLITS = ("train", "val", "test")
FIELDS = ("image", "caption", "product_id", "category", "subcategory")
REQUIRED = ("image", "caption", "product_id")
LONGEST_FIELD = 100_000  # characters


def shown(name):
    """A file name, or another short text, as a message shows it."""
    return name if name.isprintable() and len(name) <= 80 else quoted(name)


def regular_file(path):
    """The path, if a regular file is there: reading a named pipe would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file")
    return path


def read_lines(path):
    """Yield "file:line" and the text of each line of a UTF-8 file that is not blank."""
    try:
        with open(regular_file(path), encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


# --- Manifests ---


def manifest_jsonl(path):
    """One JSON object a line."""
    with open(regular_file(path), encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", json_object(line.strip())


def json_object(line):
    """The object in the line, or the reason why there is none."""
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
    """One record a line (a quoted field may go on over several lines), under a header that names the fields."""
    with open(regular_file(path), newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        written = list(file)
    lines = csv.reader(written, strict=True)
    header = csv_header(path, lines)
    start, done = 0, lines.line_num  # the lines before this reader's first one, and the lines that are dealt with
    while done < len(written):
        try:
            for fields in lines:
                done = start + lines.line_num
                if len(fields) == len(header):
                    yield f"{path.name}:{done}", dict(zip(header, fields))
                elif fields:  # [] is a blank line
                    yield f"{path.name}:{done}", f"bad CSV ({len(fields)} fields under a header of {len(header)})"
        except csv.Error as error:  # a quote that was left open may have swallowed good lines: go on with the next one
            start = done = done + 1
            yield f"{path.name}:{done}", f"bad CSV ({error})"
            lines = csv.reader(written[done:], strict=True)


def csv_header(path, lines):
    """The names of the fields, from the first line."""
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise UserError(f"{path}:1: bad CSV ({error})") from None
    missing = [name for name in REQUIRED if name not in header]
    repeated = [name for name, count in Counter(header).items() if name and count > 1]
    if missing:
        raise UserError(f"{path}:1: the header lacks {', '.join(missing)} (it is {quoted(','.join(header))})")
    if repeated:
        raise UserError(f"{path}:1: the header names {shown(', '.join(repeated))} twice")
    return header


# --- Fashion-Gen's HDF5 ---

HIGHEST_COMPRESSION = 1100  # deflate reaches 1032: data that would be larger is not in the file


@contextlib.contextmanager
def open_h5(path):
    """Open a HDF5 file with the package h5py, which nothing else needs. Any error in here becomes a UserError."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading it needs the package h5py (pip install h5py)") from None
    try:
        with h5py.File(regular_file(path), "r") as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # damaged bytes make h5py raise nearly anything
        raise UserError(f"{path}: not a whole HDF5 file ({shown(str(error))})") from None


def h5_values(file, key, kinds):
    """A data set with numbers or text of these NumPy kinds, or None. What it points to outside the file is not read."""
    from h5py import Dataset, h5l

    links = file.id.links
    if not links.exists(key.encode()):
        return None
    values = file[key] if links.get_info(key.encode()).type == h5l.TYPE_HARD else None
    if not isinstance(values, Dataset) or values.external or values.is_virtual:
        raise UserError(f"{file.filename}: {key} must be a data set in the file itself, not a link or a group")
    form = f"{values.dtype} {values.shape}"
    if values.dtype.kind not in kinds or not values.shape:
        raise UserError(f"{file.filename}: {key} has an unexpected form, {form}")
    chunk = math.prod(values.chunks or ()) * values.dtype.itemsize  # is read as one
    if max(chunk, values.nbytes) > HIGHEST_COMPRESSION * os.path.getsize(file.filename):
        raise UserError(f"{file.filename}: {key} is {form}, more than the file can hold")
    return values


def h5_pictures(file):
    """Fashion-Gen's pictures, (N, H, W, 3) uint8."""
    pictures = h5_values(file, "input_image", "u")
    if pictures is None:
        raise UserError(f"{file.filename}: lacks input_image")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        form = f"{pictures.dtype} {pictures.shape}"
        raise UserError(f"{file.filename}: input_image must be uint8 (N, H, W, 3), got {form}")
    return pictures


def fashion_gen(path):
    """Fashion-Gen's own file: one data set a field, of shape (N,) or (N, 1), its text in latin-1."""
    with open_h5(path) as file:
        fields, lengths = {}, {len(h5_pictures(file))}
        for name in ("productID", "concat_description", "name", "description", "category", "subcategory"):
            values = h5_values(file, f"input_{name}", "Siu")
            if values is not None:
                fields[name] = values
                lengths |= {len(values), values.size}
        if "productID" not in fields:
            raise UserError(f"{path}: lacks input_productID")
        if len(lengths) > 1:
            raise UserError(f"{path}: its data sets differ in length ({', '.join(map(str, sorted(lengths)))})")
        for first in range(0, max(lengths), 1024):
            block = {name: values[first : first + 1024].reshape(-1) for name, values in fields.items()}
            for place in range(len(block["productID"])):
                where = f"{path.name}#{first + place}"
                yield where, fashion_gen_record(where, {name: values[place] for name, values in block.items()})


def fashion_gen_record(image, values):
    """The record of one picture. If the joined description is missing, the title and the description are joined."""
    texts = dict.fromkeys(("concat_description", "name", "description"), "")
    for name, value in values.items():
        texts[name] = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    parts = [texts[name].strip() for name in ("name", "description")]
    joined = ". ".join(part for part in parts if part)
    return {
        "image": image,
        "caption": texts["concat_description"].strip() or joined,
        "product_id": texts["productID"],
        "category": texts.get("category"),
        "subcategory": texts.get("subcategory"),
    }


# --- The MVLT authors' pickles ---

LARGEST_PICKLE = 4_000_000  # bytes


class PlainUnpickler(pickle._Unpickler):
    """
    Builds numbers, text, lists and dicts, in pure Python, so that memory stays in proportion to the file. Classes and
    functions are refused, so no code runs. Tuples become lists: the hash of nested tuples would take for ever.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {shown(f'{module}.{name}')}; only plain Python values are read")

    def load_short_tuple(self, length):
        self.stack[-length:] = [self.stack[-length:]]

    dispatch[pickle.EMPTY_TUPLE[0]] = pickle._Unpickler.load_empty_list
    dispatch[pickle.TUPLE[0]] = pickle._Unpickler.load_list
    for length, code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), start=1):
        dispatch[code[0]] = functools.partial(load_short_tuple, length=length)
    for code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.REDUCE, pickle.BUILD):
        del dispatch[code[0]]


def read_pickle(path):
    """The plain Python value in a pickle."""
    try:
        if os.path.getsize(regular_file(path)) > LARGEST_PICKLE:
            raise pickle.UnpicklingError(f"larger than {LARGEST_PICKLE // 10**6} MB")
        return PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except UserError:
        raise
    except EOFError:
        raise UserError(f"{path}: bad pickle (truncated)") from None
    except KeyError:  # an instruction that has no place in `dispatch`
        raise UserError(f"{path}: bad pickle (more than numbers, text, lists and dicts)") from None
    except Exception as error:  # damaged bytes make it raise nearly anything
        raise UserError(f"{path}: bad pickle ({shown(str(error))})") from None


def fashion_gen_processed(path):
    """The authors' folder: one pickled dict a picture, which names it (their own loader pairs two listings)."""
    images = path.name.replace("full_", "extracted_").replace("_info_PAI", "_images")
    for file in sorted(path.glob("*.pkl")):
        try:
            record = processed_record(read_pickle(file), images)
        except ValueError as error:
            record = str(error).removeprefix(f"{file}: ")
        yield f"{path.name}/{file.name}", record


def processed_record(value, images):
    """The record in an authors' pickle, ValueError if there is none."""
    if not isinstance(value, dict) or not {"img_name", "captions", "product_id"} <= value.keys():
        raise ValueError("bad pickle (not a dict with img_name, captions and product_id)")
    return {
        "image": f"{images}/{text(value, 'img_name')}",
        "caption": text(value, "captions"),
        "product_id": text(value, "product_id"),
        "category": text(value, "super_cls_name"),
        "subcategory": text(value, "sub_cls_name"),
    }


# --- COCO ---


def coco(path, splits):
    """Karpathy's JSON: a picture comes with about five captions, which become as many rows of one product."""
    try:
        images = json.loads(regular_file(path).read_bytes())["images"]
        for number, image in enumerate(images):
            for sentence in image["sentences"] if image["split"] in splits else ():
                yield f"{path.name}:images[{number}]", {
                    "image": os.path.join(image["filepath"], image["filename"]),
                    "caption": sentence["raw"],
                    "product_id": image["cocoid"],
                }
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: not Karpathy's layout ({reason})") from None


# --- Splits ---

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
        raise UserError(f"{folder}: no such folder")
    sources, files, count = {}, set(), 0
    for split, name, reader in SOURCES:
        for path in sorted(Path(folder).glob(name)):
            sources[split] = functools.partial(reader, path)
            files.add(path.name)
            count += 1
    if not sources:
        names = dict.fromkeys(name for _, name, _ in SOURCES)
        raise UserError(f"{folder}: holds none of {', '.join(names)}")
    if len(sources) < count or ("items" in sources and len(sources) > 1):
        raise UserError(f"{folder}: more than one source for a split ({', '.join(sorted(files))}); keep one")
    return sources


def splits_of(folder):
    """The splits that can be read from the folder."""
    sources = find_sources(folder)
    derived = {*SPLITS} if "items" in sources else {"val"} if "train" in sources else set()
    return [split for split in SPLITS if split in derived.union(sources)]


def fraction(product_id):
    """A number in [0, 1) that depends on the product alone, and so is the same on every machine."""
    return int.from_bytes(hashlib.sha256(product_id.encode()).digest()[:6], "big") / 2**48


def side_of_items(product_id):
    """The split of a product when one file holds all splits: 80/10/10."""
    share = fraction(product_id)
    if share < 0.8:
        return "train"
    return "val" if share < 0.9 else "test"


def side_of_train(product_id):
    """The split of a training product when no validation split is given: 90/10."""
    return "val" if fraction(product_id) < 0.1 else "train"


# --- Rows ---


def text(record, name):
    """The field as text without blanks around it, "" if it is missing; a whole number will do. Otherwise ValueError."""
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    value = str(value).strip()
    if len(value) > LONGEST_FIELD:
        raise ValueError(f"{name} may have {LONGEST_FIELD} characters at most, got {len(value)}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is not valid UTF-8")
    return value


def plain_caption(caption):
    """The caption without its case and spaces, which make no difference."""
    return " ".join(caption.lower().split())


def file_of(reference):
    """A row's "image" as (file, place in it): "a.h5#17" -> ("a.h5", 17), "images/7.jpg" -> ("images/7.jpg", None)."""
    file, _, place = reference.rpartition("#")
    if file.endswith(".h5") and place.isdecimal() and place.isascii() and len(place) < 16:
        return file, int(place)
    return reference, None


def absence(path, name):
    """Why there is nothing to decode at a path, "" if there is something."""
    if not os.path.isfile(path):
        return f"missing picture {name}"
    return f"{name}: empty file (0 bytes)" if os.path.getsize(path) == 0 else ""


def make_row(folder, where, record):
    """The row of a record; its picture must exist but is not opened. ValueError with the reason if there is no row."""
    if isinstance(record, str):
        raise ValueError(record)
    row = {name: text(record, name) for name in FIELDS}
    for name in REQUIRED:
        if not row[name]:
            raise ValueError(f"empty {name}" if name in record else f"no {name}")
    file, _ = file_of(row["image"])
    if os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == "..":
        raise ValueError(f"path {shown(file)} must be relative to the folder and stay in it")
    path = os.path.join(folder, file)
    if reason := absence(path, shown(file)):
        raise ValueError(reason)
    return row | {"where": where}


def products_of(source):
    """The products that a source names."""
    found = set()
    for _, record in source():
        with contextlib.suppress(ValueError):  # a bad row, which is reported when its own split is read
            found.add(text(record, "product_id") if isinstance(record, dict) else "")
    return found - {""}


def good_rows(folder, split, bad):
    """
    Yield the good rows of a split; the bad ones are added to the list `bad` as "file:line: reason".
    A row whose product is also in a later split is bad, so that no product is ever in two splits.
    """
    sources = find_sources(folder)
    source, side = choose_source(folder, split, sources)
    taken = {product: name for name in later_splits(split, source, sources) for product in products_of(sources[name])}
    for where, record in tqdm(sources[source](), f"reading {split}", unit=" rows", delay=1, disable=None):
        try:
            row = make_row(folder, where, record)
            product = row["product_id"]
            if product in taken:
                raise ValueError(f"product {shown(product)} is in the split {taken[product]!r} too")
            if side(product) == split:
                yield row
        except (ValueError, OSError) as error:
            bad.append(f"{where}: {error}")


def later_splits(split, source, sources):
    """The splits after this one that have a source of their own."""
    return [name for name in SPLITS[SPLITS.index(split) + 1 :] if name in sources and name != source]


def read_all(folder, split):
    """Read one split: its good rows, and its bad ones as "file:line: reason"."""
    bad = []
    return list(good_rows(folder, split, bad)), bad


def files_of(folder, split):
    """The files that decide which rows a split has: its own source, and those of later splits."""
    sources = find_sources(folder)
    source, _ = choose_source(folder, split, sources)
    files = []
    for name in (source, *later_splits(split, source, sources)):
        (path,) = sources[name].args
        files += sorted(path.glob("*.pkl")) if path.is_dir() else [path]
    return files


def choose_source(folder, split, sources):
    """The source that the split is read from, and the function that says in which split of it a product is."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {quoted(split)}")
    if "items" in sources:
        return "items", side_of_items
    if split != "test" and "train" in sources and "val" not in sources:
        return "train", side_of_train
    if split not in sources:
        raise UserError(f"{folder}: holds nothing for the split {split!r}, only for {', '.join(sorted(sources))}")
    return split, lambda product: split


def settle(folder, split, rows, bad, skip_bad):
    """The one rule for bad rows: they end the run, unless skip_bad leaves them out and lists them."""
    listed = "".join(f"\n  {line}" for line in bad[:100])
    if len(bad) > 100:
        listed += f"\n  ... and {len(bad) - 100} more; `data.py check` lists all"
    if bad and not skip_bad:
        raise UserError(f"{folder}: {len(bad)} bad rows in {split} (--skip-bad leaves them out){listed}")
    if bad:
        print(f"{folder}: left out {len(bad)} bad rows of {split}{listed}", flush=True)
    if not rows:
        raise UserError(f"{folder}: the split {split!r} has no rows")
    return rows


def read(folder, split, skip_bad=False):
    """The rows of a split, "train", "val" or "test". Their pictures exist, but may still be impossible to decode."""
    rows, bad = read_all(folder, split)
    return settle(folder, split, rows, bad, skip_bad)
