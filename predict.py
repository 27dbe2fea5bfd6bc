"""
A trained run and your own pictures and words.

    python predict.py runs/1 score coat.jpg "red wool coat"     do they belong together?
    python predict.py runs/1 rank "red wool coat" *.jpg         which picture, or folder of pictures, fits a text best?
    python predict.py runs/1 rank coat.jpg texts.txt            which text, one a line, fits the picture best?
    python predict.py runs/1 classify coat.jpg                  category and sub-category, from the photo or with a text
    python predict.py runs/1 rebuild coat.jpg --hide 0.5        a PNG: hidden | rebuilt | original
    python predict.py runs/1 fill coat.jpg "a [MASK] coat"      the likeliest words
    python predict.py runs/1 caption coat.jpg                   describe the picture
    python predict.py runs/1 align coat.jpg "red wool coat"     which part of the picture each word means, with a PNG
    python predict.py runs/1 index photos                       embed a folder of pictures or of data, for search
    python predict.py runs/1 search "red wool coat"             ask the index; without a text, one query a line of input
    python predict.py runs/1 search coat.jpg --out found.png    pictures like this one, drawn as a PNG

A command works with every model that can do it and whose run trained it; otherwise one line says what is missing.
Each command is also a function: predict.score(predict.load("runs/1"), "coat.jpg", "a coat").

The cost of a search: the text tower embeds the query, N E multiply-adds find the nearest pictures, and the fusion
encoder reads the best of them with the query, which takes most of the time. --best 5 reads fewer, --best 0 none.

Letters: N pictures in an index, E width of the towers' vectors, H = W a picture's sides, L words, V vocabulary.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
from extras import figures, pictures, readers, report, runtime, weights
from extras import index as index_files
from extras.runtime import UserError, at_least, quoted

BATCH = 64  # pictures or pairs in a forward pass
PART = 1024  # pictures in memory at once, and in one part of an index
MATCHING = ("score", "itm", "matching head", "; search asks the towers of a run that has them")
TOWERS = ("embed_images", "itc", "towers", "; rank reads every picture")
NEEDS = {  # command -> the model's method, the objective that trains it, the part of the model, what to do without it
    "score": MATCHING,
    "rank": MATCHING,
    "classify": ("classify", "cr", "recognition heads", ""),
    "rebuild": ("rebuild", "mir", "picture decoder", ""),
    "fill": ("predict_words", "mlm", "word head", ""),
    "caption": ("caption", "caption", "caption writer", ""),
    "align": ("align", "sat", "alignment of words with patches", ""),
    "index": TOWERS,
    "search": TOWERS,
}


class Run(NamedTuple):
    """A trained model and what is needed to use it."""

    model: torch.nn.Module
    tokenizer: data.Tokenizer
    settings: dict
    folder: Path

    @property
    def shape(self):
        """How its pictures are made square: (size, fit)."""
        return self.model.config.image_size, self.settings.get("fit", "stretch")


def load(path, device="cpu"):
    """The run of a folder or of one checkpoint file."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    return Run(*weights.load_run(path, runtime.join_processes(device)), folder)


def needs(run, command):
    """UserError unless the model has what the command needs, trained by this run's step."""
    method, objective, part, instead = NEEDS[command]
    if not hasattr(run.model, method):
        raise UserError(f"{run.folder}: this model has no {part}, which {command} needs{instead}")
    objectives = list(run.model.recipe.weights)
    if objective not in objectives:
        reason = f"its objectives are {','.join(objectives)}, without {objective}"
    elif objective not in weights.learnt(run.model):
        step, steps, file = (run.settings.get(name) for name in ("step", "steps", "checkpoint"))
        reason = f"{objective} trains later in the run, and {file} is of step {step} of {steps}"
    else:
        return
    raise UserError(f"{run.folder}: {command} needs the {part}, untrained in this run: {reason}{instead}")


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


def is_picture(query):
    """A query is a picture, not a text, if it is a file or is named like a picture."""
    return os.path.isfile(readers.file_of(query)[0]) or query.lower().endswith(pictures.SUFFIXES)


def open_one(run, image):
    """(1, H, W, 3) uint8"""
    return torch.from_numpy(pictures.picture("", image, *run.shape))[None]


def open_many(run, folder, names):
    """The pictures that can be decoded, (n, H, W, 3) uint8, and {name: reason} for the others."""
    (size, _), good, bad = run.shape, [], {}
    for name, (pixels, reason) in zip(names, pictures.decode(folder, names, *run.shape)):
        if reason:
            bad[name] = reason
        else:
            good.append(pixels)
    return torch.from_numpy(np.array(good, np.uint8).reshape(-1, size, size, 3)), bad


def words(run, texts, warn=True):
    """Texts as tokens (n, L) int64. A text without a known word is an error; a long one is cut, with a warning."""
    tokenizer, longest = run.tokenizer, run.model.config.text_len
    for text in texts:
        ids = tokenizer.encode(text)
        if {tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id}.issuperset(ids):
            raise UserError(f"{quoted(text)}: the run knows none of its words" if text.strip() else "the text is empty")
        if warn and len(ids) > longest:
            kept = f"the first {longest - 2} of {len(ids) - 2} word pieces"
            print(f"{quoted(text, 40)}: the run reads {kept}", file=sys.stderr)
    return data.Words(data.tokenize(texts, tokenizer, longest))[:]


def words_or_empty(run, text):
    """The tokens of a text; without a text those of the empty caption, [CLS] [SEP]."""
    return words(run, [text]) if text else torch.tensor([run.tokenizer.encode("")])


@contextlib.contextmanager
def inference(run):
    """Forward passes without gradients or dropout, in the precision of the run's training. Yields the device."""
    with runtime.evaluating(run.model) as device, runtime.precision_of(run.model):
        yield device


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def score(run, image, text):
    """Match - mismatch logit of a picture and a text: above 0 they belong together."""
    needs(run, "score")
    return match(run, open_one(run, image), words(run, [text])).item()


def match(run, pixels, tokens, description=None):
    """Match - mismatch logits (n,): of n pictures (n, H, W, 3) with one text (1, L), or of one picture with n texts."""
    n, scores = max(len(pixels), len(tokens)), []
    with inference(run) as device:
        for start in tqdm(range(0, n, BATCH), description, unit=" batches", disable=None if n > BATCH else True):
            rows = slice(start, min(start + BATCH, n))
            b = rows.stop - rows.start
            images = data.to_floats(pixels[rows] if len(pixels) == n else pixels, device).expand(b, -1, -1, -1)
            captions = data.trim(tokens[rows] if len(tokens) == n else tokens).to(device).expand(b, -1)
            scores.append(run.model.score(images, captions).float().cpu())
    return torch.cat(scores)


def rank(run, query, answers, skip_bad=False):
    """
    Texts for a picture, or pictures for a text: [(answer, match - mismatch logit), ...], the best first.
    A picture that cannot be decoded is an error; with `skip_bad` it is left out with a warning.
    """
    needs(run, "rank")
    if not answers:
        raise UserError(f"{quoted(query)}: nothing to rank for it")
    if is_picture(query):
        scores = match(run, open_one(run, query), words(run, answers), "reading texts")
    else:
        answers, scores = match_pictures(run, answers, words(run, [query]), skip_bad)
    return [(answers[i], scores[i].item()) for i in scores.argsort(descending=True, stable=True).tolist()]


def match_pictures(run, images, tokens, skip_bad):
    """The images that can be decoded, and the logit of each with the text; PART of them are in memory at a time."""
    good, scores, reasons = [], [], []
    for start in range(0, len(images), PART):
        part = images[start : start + PART]
        pixels, bad = open_many(run, "", part)
        reasons += bad.values()
        if bad and not skip_bad:
            break
        for reason in bad.values():
            print(f"left out {reason}", file=sys.stderr)
        if len(pixels):
            good += [image for image in part if image not in bad]
            scores.append(match(run, pixels, tokens, f"pictures from {start + 1} of {len(images)}"))
    if reasons and (not good or not skip_bad):
        raise UserError(reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""))
    return good, torch.cat(scores)


def likeliest(logits, names, best=5):
    """The names with the highest logits: [(name, probability), ...]."""
    chances, numbers = logits.float().softmax(dim=0).topk(min(best, len(names)))
    return [(names[number], chance) for number, chance in zip(numbers.tolist(), chances.tolist())]


def classify(run, image, text=""):
    """{"category": [(name, probability), ...], "subcategory": ...}, the likeliest first, from what the run reads."""
    needs(run, "classify")
    labels, modality = run.model.labels, evaluation.modality_of(run.model)
    if not labels.get("category") or not labels.get("subcategory"):
        raise UserError(f"{run.folder}: this run knows the names of no classes")
    if modality == "text" and not text:
        raise UserError(f"{run.folder}: this run recognises by the text alone, and there is none")
    with inference(run) as device:
        images = None if modality == "text" else data.to_floats(open_one(run, image), device)
        tokens = words_or_empty(run, "" if modality == "image" else text)
        logits = run.model.classify(images, tokens.to(device))
    return {field: likeliest(one[0].cpu(), labels[field]) for field, one in zip(("category", "subcategory"), logits)}


def rebuild(run, image, text="", hide=0.5, seed=0):
    """
    Hide a share of the picture and rebuild it: {"hidden", "rebuilt", "original"}, each (H, W, 3) uint8, the "share"
    hidden, and over the hidden pixels the PSNR in dB, "psnr", and that of the mean colour, "floor".
    """
    needs(run, "rebuild")
    recipe, tokens = run.model.recipe, words_or_empty(run, text)
    with runtime.evaluating(run.model) as device:
        original = data.to_floats(open_one(run, image), device)
        masked, hidden = figures.hide(original, [0], recipe.mask_style, hide, recipe.mask_unit, seed)
        rebuilt = figures.rebuild(run.model, masked, tokens.to(device))
    sheet = figures.rebuilt_sheet(original, hidden, rebuilt)  # (3 H, W, 3)
    result = dict(zip(("hidden", "rebuilt", "original"), np.split(sheet, 3)))
    floor = figures.fill_with_mean(original, hidden)
    result["psnr"], result["floor"] = (evaluation.psnr(one, original, hidden).item() for one in (rebuilt, floor))
    return result | {"share": hidden.float().mean().item()}


def fill(run, image, text):
    """The likeliest words for each [MASK], [[(word, probability), ...], ...], and the text with the best ones in it."""
    needs(run, "fill")
    tokens, tokenizer = words(run, [text]), run.tokenizer
    where = tokens == tokenizer.mask_id
    if not where.any():
        longest = run.model.config.text_len - 2
        raise UserError(f"{quoted(text)}: must hold [MASK] in its first {longest} word pieces, all that the run reads")
    with inference(run) as device:
        _, encoded = run.model.encode(data.to_floats(open_one(run, image), device), tokens.to(device))
        logits = run.model.predict_words(encoded, where.to(device)).float().cpu()  # one row (V,) for each [MASK]
    logits[:, tokenizer.special_ids] = -torch.inf
    tokens[where] = logits.argmax(dim=1)
    return [likeliest(one, tokenizer.words) for one in logits], tokenizer.decode(tokens[0])


def caption(run, image):
    """A description of the picture."""
    needs(run, "caption")
    with inference(run) as device:
        ids = run.model.caption(data.to_floats(open_one(run, image), device))
    return run.tokenizer.decode(ids[0].tolist())


def align(run, image, text):
    """
    Where the model sees each word: [(word, its patches, its heat), ...], and the box (4,) that the heat (g, g) covers.
    Patches (n, 4) and the box are x1, x2, y1, y2 as shares of the picture's sides.
    """
    needs(run, "align")
    tokens = words(run, [text])
    with inference(run) as device:
        found, boxes = figures.alignment(run.model, data.to_floats(open_one(run, image), device), tokens.to(device))
    return found[0], boxes[0]


# ----------------------------------------------------------------------------------------------------------------------
# Index and search


def embed_pictures(run, pixels):
    """The image tower's vectors of pictures (n, H, W, 3) uint8: (n, E) float32."""
    vectors = [np.empty((0, run.model.config.embed_dim), np.float32)]
    with inference(run) as device:
        for start in range(0, len(pixels), BATCH):
            images = data.to_floats(pixels[start : start + BATCH], device)
            vectors.append(run.model.embed_images(images).float().cpu().numpy())
    return np.concatenate(vectors)


def fingerprint(run):
    """Changes with any weight, and with the shape of the pictures."""
    digest = hashlib.sha256(repr(run.shape).encode())
    for value in run.model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_rows(folder):
    """[image, caption, product_id] of a data folder's pictures, or of any other folder's files; and the bad rows."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    if not any(any(Path(folder).glob(name)) for _, name, _ in readers.SOURCES):
        return [[name, "", ""] for name in pictures.files_below(folder)], []
    rows, bad = {}, {}  # the same bad row may come with several splits
    for split in readers.splits_of(folder):
        lines = []
        for row in readers.good_rows(folder, split, lines):
            rows[row["image"]] = [row["image"], row["caption"], row["product_id"]]
        bad |= dict.fromkeys(lines)
    return [rows[image] for image in sorted(rows)], list(bad)


def index(run, folder, name=None):
    """
    Embed all pictures of a folder by the image tower into RUN/index-NAME (by default the folder's name).
    Returns that path, how many pictures it holds, and those left out, as lines.
    """
    needs(run, "index")
    source = str(Path(folder).resolve())
    path = index_files.index_path(run.folder, Path(source).name if name is None else name)
    if (path / "index.json").exists() and (other := index_files.read_head(path)[0]) != source:
        raise UserError(f"{path}: is the index of {quoted(other)}; give this one another --name")
    rows, left_out = find_rows(folder)
    path.mkdir(exist_ok=True)
    made_by, keys, count = fingerprint(run), [], 0
    for start in tqdm(range(0, len(rows), PART), f"indexing {folder}", unit=" parts", disable=None):
        part = rows[start : start + PART]
        files = pictures.cache_name(folder, [image for image, _, _ in part], *run.shape)
        keys.append(hashlib.sha256(json.dumps([made_by, files, part]).encode()).hexdigest()[:16])
        if not index_files.has_part(path, keys[-1]):
            pixels, bad = open_many(run, folder, [image for image, _, _ in part])
            good = [row for row in part if row[0] not in bad]
            index_files.write_part(path, keys[-1], good, bad, embed_pictures(run, pixels))
        good, reasons = index_files.read_rows(path, keys[-1])
        count, left_out = count + len(good), left_out + reasons
    if not count:
        raise UserError(f"{folder}: holds no picture that can be read" + "".join(f" ({line})" for line in left_out[:1]))
    index_files.write_head(path, source, made_by, keys)
    return path, count, left_out


def open_index(run, name=None):
    """The run's index of that name; without a name, its only one."""
    needs(run, "search")
    names = index_files.index_names(run.folder)
    if name is None and len(names) != 1:
        several = f"has several indexes, choose one by --name: {', '.join(names)}"
        raise UserError(f"{run.folder}: {several if names else 'has no index; make one with index DIR'}")
    path = index_files.index_path(run.folder, names[0] if name is None else name)
    if not (path / "index.json").exists():
        raise UserError(f"{run.folder}: has no index {quoted(name)}; make one with index DIR")
    opened = index_files.read_index(path)
    if opened.weights != fingerprint(run):
        raise UserError(f"{path}: was made by other weights than {run.settings['checkpoint']} has; run index again")
    return opened


def search(run, query, index, best=20, show=10):
    """
    The pictures of an index (from `open_index`) nearest to a text by the towers, the `best` of them put in order by
    towers and matching head together; or those nearest to a picture. Of a product's pictures only the nearest. Returns
    up to `show` dicts: image, caption, product_id, "near" (cosine), "match" (match - mismatch logit) and "both" (what
    puts them in order); the last two are None where the matching head was not asked, or not trained.
    """
    needs(run, "search")
    if is_picture(query) or "itm" not in weights.learnt(run.model):
        best = 0
    if is_picture(query):
        vector = embed_pictures(run, open_one(run, query))[0]
    else:
        tokens = words(run, [query], warn=not best)  # otherwise `rank` warns
        with inference(run) as device:
            vector = run.model.embed_texts(tokens.to(device))[0].float().cpu().numpy()
    found = nearest(index, vector, max(best, show))
    if not found:
        raise UserError(f"{index.folder}: none of the index's pictures is there any more")
    if best:
        found = rerank(run, query, index.folder, found[:best]) + found[best:]
    return found[:show]


def nearest(index, vector, count):
    """The nearest picture, as far as it is still there, of each of the `count` products nearest to a vector (E,)."""
    cosines, found, seen = index.cosines(vector), [], set()
    has_folder = os.path.isdir(index.folder)
    for number in (-cosines).argsort(kind="stable").tolist():
        image, caption, product = index.row(number)
        gone = has_folder and not os.path.isfile(os.path.join(index.folder, readers.file_of(image)[0]))
        if product in seen or gone:
            continue
        seen |= {product} - {""}  # "": unknown
        near = float(cosines[number])
        found.append(dict(image=image, caption=caption, product_id=product, near=near, match=None, both=None))
        if len(found) == count:
            break
    return found


def rerank(run, text, folder, found):
    """The answers in the order of towers and matching head together, without those whose picture cannot be read."""
    by_path, ranked = {os.path.join(folder, answer["image"]): answer for answer in found}, []
    for path, logit in rank(run, text, list(by_path), skip_bad=True):
        both = evaluation.both(run.model, by_path[path]["near"], logit)
        ranked.append(by_path[path] | {"match": logit, "both": both})
    return sorted(ranked, key=lambda answer: answer["both"], reverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def table(header, *rows):
    """Print rows of text below their header, in columns; line breaks and control characters of a caption as blanks."""
    rows = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def as_match(logit):
    """A logit with its probability."""
    return "" if logit is None else f"{logit:+.2f} ({100 * torch.tensor(logit).sigmoid():.0f}%)"


def warn_if_constant(scores):
    """Say so if a run gives every answer the same score."""
    if len(scores) > 1 and len(set(scores)) == 1:
        print("every score is the same: this run cannot tell these apart", file=sys.stderr)


def save_strip(tiles, out):
    """Write a PNG of pictures of one size, side by side."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * len(tiles), height))
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place * width, 0))
    with runtime.whole_file(out) as file:
        sheet.save(file, "PNG")


def show_score(run, args):
    """how well a picture and a text match"""
    table(("match", "picture", "text"), (as_match(score(run, args.image, args.text)), args.image, args.text))


def show_rank(run, args):
    """pictures for a text, or texts for a picture, the best first"""
    folders, answers = [path for path in args.answers if os.path.isdir(path)], []
    if folders and is_picture(args.query):
        raise UserError(f"{folders[0]}: is a folder, but a picture ranks texts; index and search find pictures like it")
    for answer in args.answers:
        if answer in folders:
            answers += [os.path.join(answer, name) for name in pictures.files_below(answer)]
        elif is_picture(args.query) and (os.path.isfile(answer) or answer.endswith(".txt")):
            answers += [line for _, line in readers.read_lines(answer)]
        else:
            answers.append(answer)
    ranked = rank(run, args.query, answers, skip_bad=bool(folders))
    rows = [(str(place), as_match(logit), answer) for place, (answer, logit) in enumerate(ranked, 1)]
    table(("rank", "match", "answer"), *rows)
    warn_if_constant([logit for _, logit in ranked])


def show_classify(run, args):
    """category and sub-category"""
    for field, found in classify(run, args.image, args.text).items():
        table((field, "probability"), *((name, f"{chance:.3f}") for name, chance in found))


def show_rebuild(run, args):
    """hide a share of the picture and rebuild it"""
    result = rebuild(run, args.image, args.text, args.hide, args.seed)
    if not result["share"]:
        unit = run.model.recipe.mask_unit
        raise UserError(f"--hide: must cover a square of {unit} px or more, got {args.hide:g}", status=2)
    size = pictures.open_picture("", args.image).size if run.shape[1] == "stretch" else (1, 1)
    size = [max(1, round(384 * side / max(size))) for side in size]  # as the picture was before it was made square
    out = args.out or f"{Path(args.image).stem}-rebuilt.png"
    save_strip([Image.fromarray(result[name]).resize(size) for name in ("hidden", "rebuilt", "original")], out)
    quality = (f"{100 * result['share']:.0f}%", f"{result['psnr']:.2f} dB", f"{result['floor']:.2f} dB")
    table(("hidden", "PSNR there", "of the mean colour"), quality)
    print(f"hidden | rebuilt | original: {out}")


def show_fill(run, args):
    """the likeliest words for each [MASK]"""
    found, text = fill(run, args.image, args.text)
    rows = [(str(place), word, f"{chance:.3f}") for place, one in enumerate(found, 1) for word, chance in one]
    table(("[MASK]", "word", "probability"), *rows)
    print(text)


def show_caption(run, args):
    """describe the picture"""
    print(caption(run, args.image))


def show_align(run, args):
    """which part of the picture each word means"""
    found, box = align(run, args.image, args.text)
    if not found:
        raise UserError(f"{quoted(args.text)}: the model sees none of its words in the picture")
    rows = []
    for word, patches, heat in found:
        percent = ["x {:.0f}-{:.0f}%, y {:.0f}-{:.0f}%".format(*100 * patch) for patch in patches]
        rows.append((word, f"{heat.max() / heat.mean():.1f}", "; ".join(percent)))
    table(("word", "peak heat over mean", "patches"), *rows)
    original = Image.fromarray(open_one(run, args.image)[0].numpy()).resize((240, 240))
    out = args.out or f"{Path(args.image).stem}-aligned.png"
    save_strip([original, *(report.draw_word(original.copy(), box, *of_word) for of_word in found)], out)
    print(f"the picture, then each word's heat and patches: {out}")


def show_index(run, args):
    """embed a folder of pictures, or of data, for search; when stopped, the same command goes on"""
    start = time.perf_counter()
    path, count, left_out = index(run, args.folder, args.name)
    print("\n  left out ".join([f"{count} pictures in {time.perf_counter() - start:.1f} s: {path}", *left_out]))


def show_search(run, args):
    """the indexed pictures that fit a text, or are like a picture"""
    opened = open_index(run, args.name)
    for query in [args.query] if args.query is not None else filter(None, map(str.strip, sys.stdin)):
        try:
            answer_query(run, args, opened, query)
        except UserError as error:
            if args.query is not None:
                raise
            print(error, file=sys.stderr)  # and wait for the next query


def answer_query(run, args, opened, query):
    """Print what a query finds, and draw it for --out."""
    start, rows = time.perf_counter(), []
    found = search(run, query, opened, args.best, args.show)
    seconds = time.perf_counter() - start
    for place, answer in enumerate(found, 1):
        both = "" if answer["both"] is None else f"{answer['both']:.2f}"
        scores = (as_match(answer["match"]), f"{answer['near']:.3f}", both)
        rows.append((str(place), *scores, answer["image"], answer["caption"]))
    table(("rank", "match", "cosine", "both", "picture", "caption"), *rows)
    print(f"{seconds:.2f} s among {opened.size} pictures", flush=True)
    warn_if_constant([answer["near"] for answer in found])
    if args.out:
        data.contact_sheet(opened.folder, found, args.out, len(found), columns=min(5, len(found)))


def share(text):
    """An argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {quoted(text)}")
    return value


def parse(arguments=None):
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, formatter_class=raw)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one checkpoint file")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(NEEDS))
    for name in NEEDS:
        show = globals()[f"show_{name}"]
        options = commands.add_parser(name, help=show.__doc__, description=show.__doc__)
        options.set_defaults(command=show)
        runtime.add_device_flag(options)
        add = options.add_argument
        if name in ("score", "classify", "rebuild", "fill", "caption", "align"):
            add("image", metavar="IMAGE")
        if name in ("score", "fill", "align"):
            add("text", metavar="TEXT")
        if name in ("classify", "rebuild"):
            add("text", metavar="TEXT", nargs="?", default="")
        if name == "rank":
            add("query", metavar="TEXT|IMAGE")
            add("answers", metavar="IMAGE|DIR|FILE", nargs="+", help="pictures, folders; or texts, files of one a line")
        if name == "rebuild":
            add("--hide", type=share, default=0.5, help="share of the picture to hide (default: %(default)s)")
            add("--seed", type=int, default=0, help="chooses what is hidden (default: %(default)s)")
        if name == "index":
            add("folder", metavar="DIR")
        if name == "search":
            add("query", metavar="TEXT|IMAGE", nargs="?", help="without it: one query a line from the standard input")
            add("--best", type=at_least(0), default=20, metavar="K",
                help="how many ITM re-ranks (default: 20; none where it was not trained)")
            add("--show", type=at_least(1), default=10, metavar="N", help="how many to print (default: 10)")
        if name in ("index", "search"):
            add("--name", help="of the index (default: the folder's; search: the only index)")
        if name in ("rebuild", "align", "search"):
            add("--out", metavar="PNG", help="the drawing (default: named after IMAGE, here; search: none)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    args.command(load(args.run, args.device), args)


if __name__ == "__main__":
    runtime.run(main)
