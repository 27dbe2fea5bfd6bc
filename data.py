"""
A split of a data set, its pictures and its batches. Knows no model.

    python data.py check DIR                 open everything once, report it, list the bad rows, draw a contact sheet
    python data.py vocab DIR --size 8000     learn a vocabulary from the training captions

A folder holds one of these (extras/readers.py reads them):

    train.jsonl, val.jsonl, test.jsonl       a manifest (or .csv): image, caption, product_id, category, subcategory
    items.jsonl                              the same in one file (or .csv), split 80/10/10 by a hash of the product id
    fashiongen_256_256_{train,validation}.h5 Fashion-Gen as its owners give it (needs the package h5py)
    extracted_{train,valid}_images/          Fashion-Gen as the MVLT authors processed it, with full_*_info_PAI/
    dataset_coco.json                        COCO as Karpathy split it, beside train2014/ and val2014/

`open_split` reads a split; its decoded pictures are memory-mapped (extras/pictures.py). `Batches` deals out its rows.
Everything random has a key: (seed, epoch) for the order of the rows, (seed, step) for the augmentation, which is drawn
for the whole batch before each process takes its slice. So any number of processes sees the same batches, and a resumed
run goes on with those that the interrupted one would have seen.

Letters in shapes: n rows of a split, G pairs of a global batch, b some of them, L words, H = W pixels.
"""

import argparse
import functools
import hashlib
import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from extras import runtime
from extras.check import contact_sheet, folder_report
from extras.pictures import (
    Pictures,
    cache_folder,
    join_pictures,
    list_pictures,
    open_distinct,
    open_picture,  # noqa: F401 (for those who import data)
    open_pictures,
    picture,  # noqa: F401
)
from extras.readers import plain_caption, read, read_lines, settle
from extras.runtime import UserError
from extras.table import Captions, Rows, Texts, Words, build, open_table, open_words, tokenize
from extras.tokenizer import SPECIAL, Tokenizer, trim  # noqa: F401 (trim for those who import data)

# --- A split ---


@dataclass(eq=False)
class Split:
    """One split. A pool of unpaired data is a split as well: pictures without captions, or the reverse."""

    rows: Rows  # n dicts, each read when it is asked for: image caption product_id category subcategory where
    pictures: Pictures | None  # (n, H, W, 3) uint8, memory-mapped
    tokens: Words  # tokens[rows] is (b, L) int64, 0 = padding
    products: torch.Tensor  # (n,) int64: rows of the same product have the same number
    captions: torch.Tensor  # (n,) int64: captions that are equal up to case and spaces have the same number
    groups: torch.Tensor  # (n,) int64: the number of the sub-category, -1 for none
    categories: torch.Tensor  # (n,) int64: the class, a place in labels["category"], -1 for unknown
    subcategories: torch.Tensor
    tokenizer: Tokenizer
    labels: dict  # {"category": [...], "subcategory": [...]}: the names of the model's classes
    text_len: int  # captions are cut to this many words
    fit: str  # how pictures were made square: "stretch" or "pad"
    references: Texts = ()  # the pictures that pictures.index numbers, as the rows name them
    digest: int = 0  # changes with any row

    def __len__(self):
        return len(self.rows)

    @functools.cached_property
    def marks(self):
        """(3, n) int64, the numbers of each row's product, caption and picture; (2, n) for captions alone."""
        marks = [self.products, self.captions]
        if self.pictures is not None:
            marks.append(torch.from_numpy(self.pictures.index))
        return torch.stack(marks)

    def same(self, rows):
        """(G,) rows -> (G, G) bool: the same product, caption or picture. Such pairs are never used as negatives."""
        marks = self.marks[:, rows]
        return (marks[:, :, None] == marks[:, None]).any(dim=0)

    def images(self, rows, device="cpu"):
        """(b,) rows -> (b, 3, H, W) float in [0, 1], without augmentation."""
        return to_floats(torch.from_numpy(self.pictures[np.asarray(rows)]), device)

    def negatives(self, rows, generator):
        """(G,) rows -> (G,) rows of another product, caption and picture."""
        return draw_negatives(rows, self.marks, generator)


def open_split(folder, name, tokenizer, labels, image_size, text_len, fit="stretch", skip_bad=False, decode="auto"):
    """
    Open the split "train", "val" or "test" of a folder; the first time its rows become a table (extras/table.py) and
    its pictures are decoded (extras/pictures.py says what `decode` chooses). A bad row or picture ends the run, or is
    left out with skip_bad. Under torchrun every process must call this; the first one does the work.
    """

    def work():
        table, pictures = load(folder, name, image_size, fit, skip_bad, decode)
        tokens = open_words(folder, table, tokenizer, text_len)
        return as_split(table, tokens, pictures, tokenizer, labels, text_len, fit)

    return runtime.first_then_others(work)


def load(folder, name, size, fit="stretch", skip_bad=False, decode="auto"):
    """The table of a split's good rows, and their pictures."""
    table, bad = open_table(folder, name)
    pictures, undecoded = open_distinct(folder, list(table.references), table.numbers["image"], size, fit, decode)
    bad += [f"{table.rows[number]['where']}: {reason}" for number, reason in undecoded.items()]
    if undecoded:
        good = np.setdiff1d(np.arange(len(table)), list(undecoded))
        table, pictures = table.select(good), pictures.select(good)
    settle(folder, name, table.rows, bad, skip_bad)
    return table, pictures


def as_split(table, tokens, pictures, tokenizer, labels, text_len, fit):
    """The split of a table."""
    return Split(
        rows=table.rows,
        pictures=pictures,
        tokens=tokens,
        products=table.ids("product_id"),
        captions=table.ids("caption"),
        groups=table.ids("group"),
        categories=table.classes("category", labels["category"]),
        subcategories=table.classes("subcategory", labels["subcategory"]),
        tokenizer=tokenizer,
        labels=labels,
        text_len=text_len,
        fit=fit,
        references=table.references,
        digest=table.digest,
    )


def make_split(rows, pictures, tokenizer, labels, text_len, fit):
    """The split of these rows."""
    table = build(rows)
    tokens = Words(tokenize(Captions(table.rows), tokenizer, text_len))
    return as_split(table, tokens, pictures, tokenizer, labels, text_len, fit)


def picture_pool(split, folder="", skip_bad=False, decode="auto"):
    """Unpaired pictures: the distinct ones of the split, then all below a folder ("" for none), with empty captions."""
    _, first_rows = np.unique(split.pictures.index, return_index=True)
    rows = [split.rows[row] | {"caption": ""} for row in first_rows]
    pictures = split.pictures.select(first_rows)
    if folder:
        work = lambda: load_pictures(folder, pictures.size, split.fit, skip_bad, decode)
        names, more = runtime.first_then_others(work)
        rows += [unpaired_row(f"{folder}/{name}", image=name) for name in names]
        pictures = join_pictures(pictures, more)
    return make_split(rows, pictures, split.tokenizer, split.labels, split.text_len, split.fit)


def load_pictures(folder, size, fit, skip_bad, decode="auto"):
    """The names of the pictures below a folder, as far as they can be decoded, and the pictures."""
    names = list_pictures(folder)
    pictures, undecoded = open_pictures(folder, names, size, fit, decode)
    good = [number for number in range(len(names)) if number not in undecoded]
    names = settle(folder, "pictures", [names[number] for number in good], list(undecoded.values()), skip_bad)
    return names, pictures.select(good)


def caption_pool(split, texts_file=""):
    """Unpaired captions: the distinct ones of the split, then the lines of a text file ("" for none). No pictures."""
    rows = {}
    for row in split.rows:
        rows.setdefault(plain_caption(row["caption"]), row)
    for where, line in read_lines(texts_file) if texts_file else ():
        rows.setdefault(plain_caption(line), unpaired_row(where, caption=line))
    return make_split(list(rows.values()), None, split.tokenizer, split.labels, split.text_len, split.fit)


def unpaired_row(where, **fields):
    """A row of nothing but a picture or a caption: a product of its own."""
    empty = {"image": "", "caption": "", "category": "", "subcategory": ""}
    product, = fields.values()
    return empty | {"product_id": product, "where": where} | fields


# --- The rows of a batch ---


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
    The rows of global batch `step`, (batch_size,) int64: the epochs' orders end to end, cut every batch_size rows.
    So every epoch visits every row once, and a batch may end one epoch and begin the next.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = epoch_order(n, seed, epoch)
        parts.append(order[max(start - epoch * n, 0) : stop - epoch * n])
    return torch.cat(parts)


def draw_negatives(rows, marks, generator):
    """
    Draw for each row another row that differs from it in each of its marks (k, n), as product, caption and picture, all
    such rows equally likely. Returns (len(rows),) int64.
    """
    drawn = torch.full((len(rows),), -1)
    for _ in range(16):  # draw for all, then again for those whose draw was not allowed
        places = (drawn < 0).nonzero().squeeze(1)
        chance = torch.rand(len(places), dtype=torch.float64, generator=generator)
        other = (chance * marks.shape[1]).long()
        allowed = (marks[:, other] != marks[:, rows[places]]).all(dim=0)
        drawn[places[allowed]] = other[allowed]
    for place in (drawn < 0).nonzero().squeeze(1).tolist():  # few rows are allowed for these, or none
        drawn[place] = search_negative(rows[place], marks, generator)
    return drawn


def search_negative(row, marks, generator):
    """One negative of one row, drawn from a list of all allowed rows."""
    choice = (marks != marks[:, row, None]).all(dim=0).nonzero().squeeze(1)
    if len(choice) == 0:
        raise UserError(f"row {int(row)} can have no negative: each other row shares its product, caption or picture")
    return choice[torch.randint(len(choice), (1,), generator=generator)]


# --- Augmentation ---


class Views(NamedTuple):
    """The augmentation of G pictures."""

    mirror: torch.Tensor  # (G,) bool: swap left and right
    move: torch.Tensor  # (G, 2) int64: the window is moved down and right by this many pixels
    side: torch.Tensor  # (G, 2) float: height and width of the window, as factors of the picture's

    def at(self, places):
        """The augmentation of some of the pictures."""
        return Views(self.mirror[places], self.move[places], self.side[places])

    def border(self, size):
        """How many pixels the windows reach beyond the picture; 0 only if every window is the whole picture."""
        if not self.move.any() and (self.side == 1).all():
            return 0
        reach = self.move.abs() + (self.side.double() - 1).clamp(min=0) * size / 2
        return int(reach.max()) + 1


def augment(pixels, views, border):
    """(b, H, W, 3) uint8 pictures, each augmented by its own view, as a tensor."""
    if border:
        pixels = through_windows(pixels, views.move.numpy(), views.side.double().numpy(), border)
    mirror = views.mirror.numpy()
    pixels[mirror] = pixels[mirror, :, ::-1]
    return torch.from_numpy(pixels)


def through_windows(pixels, moves, sides, border):
    """
    Pictures (b, H, W, 3), each seen through its own window: `sides` (b, 2) times its height and width, its middle
    `moves` (b, 2) pixels down and right of the picture's. The edge of the picture is repeated for `border` pixels.
    """
    size = np.array(pixels.shape[1:3])
    wide = np.pad(pixels, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge")
    first = border + size / 2 + moves - sides * size / 2  # (b, 2): where the window begins
    boxes = np.concatenate([first, first + sides * size], axis=1)[:, [1, 0, 3, 2]]  # left, upper, right, lower
    seen = np.empty_like(pixels)
    for number, box in enumerate(boxes):
        image = Image.fromarray(wide[number])
        seen[number] = image.resize(tuple(size[::-1]), Image.Resampling.BILINEAR, tuple(box))
    return seen


def to_floats(pixels, device="cpu"):
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float in [0, 1] on the device, laid out in memory as the shape says."""
    return pixels.to(device).permute(0, 3, 1, 2).contiguous().float() / 255


# --- Batches ---


@dataclass(eq=False)
class Batch:
    """One process's share of a global batch."""

    step: int
    rows: torch.Tensor  # (G,) int64: the whole batch
    share: tuple  # (lo, hi): the share is rows[lo:hi]
    split: Split
    views: Views  # of the whole batch
    border: int  # of the whole batch
    pixels: torch.Tensor | None = None  # (hi - lo, H, W, 3) uint8: the augmented pictures of the share

    def parts(self, micro_batch=0):
        """The share in micro-batches: slices of range(G), each at most `micro_batch` long (0: one slice)."""
        lo, hi = self.share
        length = micro_batch or max(1, hi - lo)
        return [slice(first, min(first + length, hi)) for first in range(lo, hi, length)]

    def images(self, part, device="cpu"):
        """The augmented pictures of a slice of the share, (b, 3, H, W) float in [0, 1]; None for a pool of captions."""
        if self.pixels is None:
            return None
        lo, _ = self.share
        return to_floats(self.pixels[part.start - lo : part.stop - lo], device)

    def images_at(self, places, device="cpu"):
        """The pictures of any places (b,) of the whole batch, each with the augmentation of its own place."""
        pixels = self.split.pictures[self.rows[places].numpy()]
        return to_floats(augment(pixels, self.views.at(places), self.border), device)


@dataclass(eq=False)
class Batches:
    """
    Iterates over the global batches from step `start` up to `stop`, in order: process `index` of `world` gets its share
    of each as a `Batch`. The number of loading processes changes nothing.
    """

    pools: dict  # {name: Split}
    order: list  # order[step]: the name of the pool to read
    batch_size: int  # G
    seed: int
    start: int
    stop: int
    index: int = 0
    world: int = 1
    mirror: float = 0.0  # the probability that a picture is mirrored
    shift: int = 0  # each picture is moved by up to this many pixels either way
    zoom: float = 0.0  # height and width of each window vary by up to this fraction
    workers: int = 0  # processes that load pictures; 0: this one does

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        steps = range(self.start, self.stop)
        loader = DataLoader(
            Loader(self.pools),
            batch_size=None,
            sampler=map(self.task, steps),
            num_workers=self.workers,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # otherwise the DataLoader would draw from the global one
        )
        for step, pixels in zip(steps, loader):
            if isinstance(pixels, UserError):
                raise pixels
            yield replace(self.batch(step), pixels=pixels)

    def batch(self, step):
        """The batch of a step, the pictures of the share not yet loaded."""
        split, G = self.pools[self.order[step]], self.batch_size
        rows = batch_rows(step, G, len(split), self.seed)
        views = self.views(step)
        border = 0 if split.pictures is None else views.border(split.pictures.size)
        share = (G * self.index // self.world, G * (self.index + 1) // self.world)
        return Batch(step, rows, share, split, views, border)

    def views(self, step):
        """The augmentation of the whole batch."""
        G = self.batch_size
        mirror = torch.rand(G, generator=generator(self.seed, step, "mirror")) < self.mirror
        move = torch.randint(-self.shift, self.shift + 1, (G, 2), generator=generator(self.seed, step, "shift"))
        side = 1 + self.zoom * (2 * torch.rand(G, 2, generator=generator(self.seed, step, "zoom")) - 1)
        return Views(mirror, move, side)

    def task(self, step):
        """What a loading process has to know of a step."""
        batch = self.batch(step)
        own = slice(*batch.share)
        return self.order[step], batch.rows[own], batch.views.at(own), batch.border


class Loader:
    """The DataLoader's data set: what a loading process needs, the files of the pictures and nothing more."""

    def __init__(self, pools):
        self.pictures = {name: split.pictures for name, split in pools.items()}

    def __getitem__(self, task):
        name, rows, views, border = task
        if self.pictures[name] is None:
            return None
        try:
            return augment(self.pictures[name][rows.numpy()], views, border)
        except UserError as error:  # a broken picture that is decoded live; a loader's error would end in a traceback
            return error


def ignore_signals(worker):
    """Loading processes outlive the signals of torchrun and of schedulers: the run still has to save its state."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# --- Command line ---


def check(arguments):
    """Report a folder, list its bad rows, draw a contact sheet."""
    report, bad, rows = folder_report(arguments.folder)
    print(arguments.folder, *report, *(f"  {line}" for line in bad), sep="\n")
    if rows:
        sheet = arguments.sheet or cache_folder(arguments.folder) / "contact_sheet.png"
        contact_sheet(arguments.folder, rows, sheet)
        print(f"pictures and captions to look at: {sheet}")
    if not rows or (bad and not arguments.skip_bad):
        advice = " (--skip-bad leaves the bad ones out)" if rows else ""
        raise UserError(f"{arguments.folder}: {len(bad)} bad rows, {len(rows)} good ones{advice}")


def vocab(arguments):
    """Learn a vocabulary from the training captions."""
    out = arguments.out or Path(arguments.folder) / "vocab.txt"
    if out.exists() and not arguments.out:
        raise UserError(f"{out}: exists already; name the file to write with --out")
    rows = read(arguments.folder, "train", arguments.skip_bad)
    tokenizer = Tokenizer.train([row["caption"] for row in rows], arguments.size)
    tokenizer.save(out)
    print(f"{len(tokenizer)} words from {len(rows)} captions: {out}")


def main(arguments=None):
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=kind)
    commands = parser.add_subparsers(required=True, metavar="check | vocab")
    for command in (check, vocab):
        options = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("folder", metavar="DIR")
        options.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of ending on them")
        if command is check:
            options.add_argument("--sheet", type=Path, metavar="FILE", help="the contact sheet to write, a PNG")
        else:
            options.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: DIR/vocab.txt)")
            size = runtime.at_least(len(SPECIAL) + 1)
            options.add_argument("--size", type=size, default=8000, help="words, at most (default: %(default)s)")
    arguments = parser.parse_args(arguments)
    arguments.command(arguments)


if __name__ == "__main__":
    runtime.run(main)
