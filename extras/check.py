"""
What is in a data folder: the report and the contact sheet of `python data.py check DIR`.
"""

import hashlib
import math
import os
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from extras.pictures import open_picture, picture
from extras.readers import plain_caption, read_all, shown, splits_of
from extras.runtime import UserError, whole_file
from extras.tokenizer import split_words


def open_all(folder, references):
    """Decode all pictures in full: {reference: (size, digest of the pixels)}, and {reference: reason} of bad ones."""

    def attempt(reference):
        try:
            image = open_picture(folder, reference)
        except UserError as error:
            return str(error)
        return image.size, hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()

    good, bad = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(attempt, references), "opening pictures", len(references), disable=None)
        for reference, result in zip(references, results):
            (bad if isinstance(result, str) else good)[reference] = result
    return good, bad


def folder_report(folder):
    """Read a whole folder. Returns the lines of the report, the bad rows as "file:line: reason", and the good rows."""
    splits, bad = {}, {}  # a dict, because two splits cut from one file report the same bad row
    for split in splits_of(folder):
        splits[split], reasons = read_all(folder, split)
        bad |= dict.fromkeys(reasons)
    good, undecoded = open_all(folder, sorted({row["image"] for rows in splits.values() for row in rows}))
    for split, rows in splits.items():
        bad |= dict.fromkeys(f"{row['where']}: {undecoded[row['image']]}" for row in rows if row["image"] in undecoded)
        splits[split] = [row for row in rows if row["image"] in good]
    rows = sum(splits.values(), [])
    report = [f"rows        {len(rows)}: " + ", ".join(f"{split} {len(part)}" for split, part in splits.items())]
    if rows:
        report += [report_products(splits), report_pictures(good), report_captions(rows)]
        report += [report_names(splits, "category"), report_names(splits, "subcategory")]
        report += [report_duplicates(rows, {reference: digest for reference, (_, digest) in good.items()})]
    return report + [f"bad rows    {len(bad)}"], list(bad), rows


def most_common(count):
    """The three most frequent keys of a Counter, with their counts."""
    names = [f"{shown(name)} ({times})" for name, times in count.most_common(3)]
    return ", ".join(names) + (", ..." if len(count) > 3 else "")


def report_products(splits):
    """The number of products in each split, and what too few of them do not allow."""
    uses = {"train": (2, "learn matching"), "val": (2, "judge matching"), "test": (101, "draw candidates")}
    counts, remarks, total = [], "", 0
    for split, rows in splits.items():
        products, (least, use) = len({row["product_id"] for row in rows}), uses[split]
        counts.append(f"{split} {products}")
        if products < least:
            remarks += f"; {split} has too few to {use} ({least})"
        total += products
    return f"products    {total}: {', '.join(counts)}{remarks}"


def report_pictures(good):
    """The number of pictures and their sizes."""
    sizes = sorted((size for size, _ in good.values()), key=math.prod)
    names = [f"{width}x{height}" for width, height in sizes]
    return f"pictures    {len(good)}: {most_common(Counter(names))}; smallest {names[0]}, largest {names[-1]}"


def report_captions(rows):
    """The lengths of the captions in BERT's words, [CLS] and [SEP] included: what text_len must hold."""
    lengths = [len(split_words(row["caption"])) + 2 for row in rows]
    half, most, longest = np.quantile(lengths, (0.5, 0.99, 1)).round().astype(int)
    return f"captions    median {half} words, 99% up to {most}, longest {longest}; more where words are cut into pieces"


def report_names(splits, field):
    """The categories or sub-categories, and which of them do not occur in training."""
    count = Counter(row[field] for rows in splits.values() for row in rows)
    missing = count.pop("", 0)
    if not count:
        return f"{field:11} missing in all rows"
    trained = {row[field] for row in splits.get("train", [])}
    unseen = [shown(name) for name in sorted(count.keys() - trained)]
    names = f"{len(count)} names: {most_common(count)}"
    return f"{field:11} {names}; missing in {missing} rows; never in train: {', '.join(unseen) or 'none'}"


def report_duplicates(rows, digests):
    """How many captions and pictures belong to several products, and how many pictures have several names."""
    by_caption, by_picture, names = defaultdict(set), defaultdict(set), defaultdict(set)
    for row in rows:
        digest = digests[row["image"]]
        by_caption[plain_caption(row["caption"])].add(row["product_id"])
        by_picture[digest].add(row["product_id"])
        names[digest].add(row["image"])
    captions = [caption for caption, products in by_caption.items() if len(products) > 1]
    pictures = [min(names[digest]) for digest, products in by_picture.items() if len(products) > 1]
    copies = [min(references) for references in names.values() if len(references) > 1]
    example = lambda found: f" (such as {shown(found[0])})" if found else ""
    return (
        f"duplicates  {len(captions)} captions belong to several products{example(captions)}; "
        f"{len(pictures)} pictures do{example(pictures)}; {len(copies)} pictures have several names{example(copies)}"
    )


def contact_sheet(folder, rows, path, count=40, columns=8, side=160):
    """Draw `count` rows from all over the catalogue into one PNG, each picture with its caption below it."""
    if len(rows) > count:
        rows = [rows[place * len(rows) // count] for place in range(count)]
    width, height = side + 12, side + 80
    sheet = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, row in enumerate(rows):
        x, y = place % columns * width + 6, place // columns * height + 6
        sheet.paste(Image.fromarray(picture(folder, row["image"], side, "pad")), (x, y))
        caption = row["caption"].encode("latin-1", "replace").decode("latin-1")  # Pillow's own font has no others
        draw.text((x, y + side + 4), "\n".join(textwrap.wrap(caption, side // 6)[:4]), "black", font)
    with whole_file(path) as file:
        sheet.save(file, "PNG")
