"""
A trained run and your own pictures and words.

    python predict.py runs/1 score coat.jpg "red wool coat"         do they belong together?
    python predict.py runs/1 rank "red wool coat" *.jpg             which picture (or folder of pictures) fits the text best?
    python predict.py runs/1 rank coat.jpg texts.txt                which text, one a line, fits the picture best?
    python predict.py runs/1 classify coat.jpg                      category and sub-category, from the picture alone or with a text
    python predict.py runs/1 rebuild coat.jpg --hide 0.5            a PNG: hidden | rebuilt | original
    python predict.py runs/1 fill coat.jpg "a [MASK] coat"          the likeliest words
    python predict.py runs/1 index photos                           read a folder of pictures, or of data, once; when stopped, it goes on
    python predict.py runs/1 search "red wool coat"                 ask the index; without a text, one query a line from the keyboard
    python predict.py runs/1 search coat.jpg --out found.png        pictures like this one, drawn as a PNG

The same names are functions to import: score(load("runs/1"), "coat.jpg", "a coat"). Nothing but the run's folder is needed, and for search
the pictures that were indexed.

What a search costs: the caption tower reads the query once, N E multiply-adds find the nearest pictures, and the fusion encoder reads the
best k = 20 of them with the query, which is most of it. On one CPU core with N = 100,000 and E = 256: 0.03 s for the towers; with ITM 0.09 s
in all for nano at 64 px, 1.6 s for tiny at 256 px. --best 5 reads a quarter of the pairs, --best 0 none. Opening such an index takes 1 s, once.

Letters: N pictures in an index, E = embed_dim, H and W a picture's sides, L words.
"""

import argparse
import hashlib
import json
import math
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

BATCH = 64  # pictures or pairs read at once
PART = 1024  # pictures held at once; those of an index are written together, so a killed `index` has to read at most so many again
SKILLS = {"mir": "the decoder is", "itm": "matching is", "mlm": "the word head is", "itc": "the towers are", "cr": "recognition is"}


class Run(NamedTuple):
    """A trained model and all that is needed to ask it."""

    model: torch.nn.Module
    tokenizer: data.Tokenizer
    settings: dict
    home: Path  # the run's folder

    @property
    def shape(self):
        """What its pictures are brought to: (size, fit)."""
        return self.model.config.image_size, self.settings.get("fit", "stretch")


def load(path, device="cpu"):
    """A run's folder, or one checkpoint file."""
    if device == "cuda" and not torch.cuda.is_available():
        raise data.DataError("--device: cuda needs a GPU, this machine has none")
    return Run(*evaluation.load_run(path, device), Path(path) if os.path.isdir(path) else Path(path).parent)


def needs(run, objective):
    """DataError unless the run was trained for this; what a checkpoint does not say is taken to be so."""
    s = run.settings
    objectives = s.get("objectives", ",".join(SKILLS)).split(",")
    towers = " (search --best 0 asks the towers alone)" * (objective == "itm" and "itc" in objectives)
    untrained = f"{run.home}: {SKILLS[objective]} untrained in this run{towers}"
    if objective not in objectives:
        raise data.DataError(f"{untrained}: its objectives are {','.join(objectives)}, without {objective}")
    towers_alone = s.get("itm_from", 0) * s.get("steps", 0) if "itc" in objectives and not s.get("start") else 0
    if objective != "itc" and (s["step"] or math.inf) <= towers_alone:
        raise data.DataError(f"{untrained}: up to step {towers_alone:.0f} it trains the towers alone, and {s['checkpoint']} is of step {s['step']}")


# ---------------------------------------------------------------------------------------------------------------------------------------
# What goes in


def is_picture(query):
    """A query is a picture, and not a text, when it is a file or has the name of one."""
    return os.path.isfile(data.file_of(query)[0]) or Path(query).suffix.lower() in Image.registered_extensions()


def is_texts(answer):
    """A file of texts, and not a text itself."""
    return os.path.isfile(answer) or answer.endswith(".txt")


def open_one(run, image):
    """(1, H, W, 3) uint8"""
    return data.picture("", image, *run.shape)[None]


def open_many(run, folder, references):
    """Those that can be decoded, (n, H, W, 3) uint8, and {reference: reason} for the others."""
    (size, _), good, bad = run.shape, [], {}
    for name, (pixels, reason) in zip(references, data.decode(folder, references, *run.shape)):
        if reason:
            bad[name] = reason
        else:
            good.append(pixels)
    return np.array(good, np.uint8).reshape(-1, size, size, 3), bad


def files_below(folder):
    """Every file below a folder, relative to it, sorted; hidden ones (.name) are passed by, and linked folders are not entered."""
    found = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


def read_texts(path):
    """The lines of a file that hold anything."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise data.DataError(f"{path}: cannot read the texts ({error})") from None


def words(run, texts, tell=True):
    """The texts as (n, L) int64. A text of which the run knows no word is an error; the end of a long one is cut off, and with `tell` said to be."""
    tokenizer, longest = run.tokenizer, run.model.config.text_len
    for text in texts:
        ids = tokenizer.encode(text)
        if {tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id}.issuperset(ids):
            raise data.DataError(f"{text!r}: the run knows none of its words" if text.strip() else "the text is empty")
        if tell and len(ids) > longest:
            print(f"{text[:40]!r}...: of its {len(ids) - 2} pieces (words as the run's vocabulary cuts them) the run reads the first {longest - 2}", file=sys.stderr)
    return data.tokenize([{"caption": text} for text in texts], tokenizer, longest)


def no_words(run):
    """The empty caption, [CLS] [SEP]: (1, 2)."""
    return torch.tensor([run.tokenizer.encode("")])


def read(run, pictures, tokens):
    """The fusion encoder's T1..T4 for one picture with its text, in fp32."""
    with evaluation.at_rest(run.model) as device, evaluation.autocast(device):
        _, text = run.model.encode(None if pictures is None else evaluation.floats(pictures, [0], device), tokens.to(device))
    return [t.float() for t in text]


# ---------------------------------------------------------------------------------------------------------------------------------------
# What comes out


def score(run, image, text):
    """Match - mismatch logit of a picture and a text: above 0 they belong together."""
    needs(run, "itm")
    return evaluation.pair_scores(run.model, open_one(run, image), words(run, [text]), torch.tensor([[0, 0]])).item()


def rank(run, query, answers, skip_bad=False):
    """
    Texts for a picture, or pictures for a text: [(answer, match - mismatch logit), ...], the best first.
    A picture that cannot be decoded is an error, or with `skip_bad` it is left out and named.
    """
    needs(run, "itm")
    if not answers:
        raise data.DataError(f"{query}: nothing to rank for it")
    if is_picture(query):
        scores = match_all(run, open_one(run, query), words(run, answers), "reading texts")
    else:
        answers, scores = match_pictures(run, answers, words(run, [query]), skip_bad)
    return [(answers[i], scores[i].item()) for i in scores.argsort(descending=True, stable=True).tolist()]


def match_all(run, pictures, tokens, what):
    """Match - mismatch logits of one picture with every text, or of every picture with one text."""
    pairs = torch.cartesian_prod(torch.arange(len(pictures)), torch.arange(len(tokens)))
    return evaluation.pair_scores(run.model, pictures, tokens, pairs, BATCH, what if len(pairs) > BATCH else None)


def match_pictures(run, images, tokens, skip_bad):
    """The images that can be decoded, and the logit of each with the text; only a part of them is held in memory at a time."""
    good, scores, left_out = [], [], {}
    for start in range(0, len(images), PART):
        part = images[start : start + PART]
        pictures, bad = open_many(run, "", part)
        if bad and not skip_bad:
            raise data.DataError(next(iter(bad.values())) + f" (and {len(bad) - 1} more)" * (len(bad) > 1))
        for reason in bad.values():
            print(f"left out {reason}", file=sys.stderr)
        left_out |= bad
        good += [image for image in part if image not in bad]
        scores.append(match_all(run, pictures, tokens, f"pictures from {start + 1} of {len(images)}") if len(pictures) else torch.empty(0))
    if not good:
        raise data.DataError(f"no picture can be read: {next(iter(left_out.values()))}" + f" (and {len(images) - 1} more)" * (len(images) > 1))
    return good, torch.cat(scores)


def likeliest(logits, names, best=5):
    """The names with the highest logits: [(name, probability), ...]."""
    chances, numbers = logits.softmax(dim=0).topk(min(best, len(names)))
    return [(names[number], chance) for number, chance in zip(numbers.tolist(), chances.tolist())]


def classify(run, image, text=""):
    """{"category": [(name, probability), ...], "subcategory": ...}, the likeliest first; reads what the run was trained to read."""
    needs(run, "cr")
    if not all(run.model.labels.get(field) for field in ("category", "subcategory")):
        raise data.DataError(f"{run.home}: this run knows the names of no classes")
    modality = run.settings.get("modality", "both")
    if modality == "text" and not text:
        raise data.DataError(f"{run.home}: this run recognises by the text alone, and there is none")
    pictures = None if modality == "text" else open_one(run, image)
    encoded = read(run, pictures, words(run, [text]) if text and modality != "image" else no_words(run))
    with evaluation.at_rest(run.model):
        logits = run.model.recognise(encoded)
    return {field: likeliest(one[0], run.model.labels[field]) for field, one in zip(("category", "subcategory"), logits)}


def rebuild(run, image, text="", hide=0.5, seed=0):
    """
    Hide a share of the picture and paint the whole again: {"hidden", "rebuilt", "original"}, each (H, W, 3) uint8, the "share" that is
    hidden, and over the hidden pixels "psnr" and "floor" (that of the mean colour), in dB.
    """
    needs(run, "mir")
    tokens = words(run, [text]) if text else no_words(run)
    style, unit = run.settings.get("mask_style", "random"), run.settings.get("mask_unit", 16)
    with evaluation.at_rest(run.model) as device:
        original = evaluation.floats(open_one(run, image), [0], device)
        masked, hidden = evaluation.hide(original, [0], style, hide, unit, seed)
        rebuilt = evaluation.rebuild(run.model, masked, tokens.to(device))
    shown = {"hidden": original.masked_fill(hidden, 0.5), "rebuilt": rebuilt, "original": original}
    quality = {"psnr": rebuilt, "floor": evaluation.fill_with_mean(original, hidden)}
    return {**{name: (one[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy() for name, one in shown.items()},
            "share": hidden.float().mean().item(), **{name: evaluation.psnr(one, original, hidden).item() for name, one in quality.items()}}


def fill(run, image, text):
    """The likeliest words for each [MASK] of the text, [[(word, probability), ...], ...], and the text with the best ones in it."""
    needs(run, "mlm")
    tokens = words(run, [text])
    where = tokens == run.tokenizer.mask_id
    if not where.any():
        raise data.DataError(f"{text!r}: must hold [MASK] within its first {run.model.config.text_len - 2} pieces (words as the run's vocabulary cuts them): the run reads no more")
    encoded = read(run, open_one(run, image), tokens)
    with evaluation.at_rest(run.model) as device:
        logits = run.model.predict_words(encoded, where.to(device)).cpu()
    logits[:, run.tokenizer.special_ids] = -torch.inf  # [UNK] is no answer
    tokens[where] = logits.argmax(dim=1)
    return [likeliest(one, run.tokenizer.words) for one in logits], run.tokenizer.decode(tokens[0])


# ---------------------------------------------------------------------------------------------------------------------------------------
# RUN/index-NAME/ holds index.json, written last, and the parts that it names: the vectors of up to PART pictures each. A part is named after
# its weights and its pictures. So after a kill only the missing parts are read, and in a folder that has grown, those from the first new name on.


class Index(NamedTuple):
    folder: str
    items: list  # N of [image, caption, product_id], the last two may be ""
    vectors: torch.Tensor  # (N, E)


def find_items(folder):
    """[image, caption, product_id] of each picture: of a data folder's splits, or of any other folder's files. And the bad rows, as lines."""
    if not os.path.isdir(folder):
        raise data.DataError(f"{folder}: no such folder")
    if not any(list(Path(folder).glob(name)) for _, name, _ in data.SOURCES):
        return [[name, "", ""] for name in files_below(folder)], []
    read_splits = [data.read_all(folder, split) for split in data.splits_of(folder)]
    items = {row["image"]: [row["image"], row["caption"], row["product_id"]] for rows, _ in read_splits for row in rows}
    return [items[name] for name in sorted(items)], list(dict.fromkeys(line for _, bad in read_splits for line in bad))


def fingerprint(model):
    """Changes with any weight."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def index(run, folder, name=None):
    """
    Read all pictures of a folder with the picture tower into RUN/index-NAME (by default the folder's name).
    Returns that path, how many pictures it holds, and the bad ones, which are left out, as lines.
    """
    needs(run, "itc")
    source = str(Path(folder).resolve())
    home = run.home / f"index-{name or Path(source).name}"
    if (home / "index.json").exists() and (other := read_file(home / "index.json")["folder"]) != source:
        raise data.DataError(f"{home}: is the index of {other}; give this one another --name")
    items, lines = find_items(folder)
    home.mkdir(exist_ok=True)
    weights, parts, good = fingerprint(run.model), [], []
    with tqdm(total=len(items), desc=f"indexing {folder}", unit=" pictures", disable=None) as bar:
        for start in range(0, len(items), PART):
            part = items[start : start + PART]
            names = [image for image, _, _ in part]
            path = home / f"{weights}-{Path(data.cache_name(folder, names, *run.shape)).stem}.npz"
            if not path.exists():
                write_part(run, folder, names, path)
            bad = json.loads(str(read_file(path)["bad"]))
            parts.append(path.name)
            good += [item for item in part if item[0] not in bad]
            lines += bad.values()
            bar.update(len(part))
    if not good:
        raise data.DataError(f"{folder}: holds no picture that can be read" + "".join(f" ({line})" for line in lines[:1]))
    with data.whole_file(home / "index.json") as file:
        file.write(json.dumps({"folder": source, "weights": weights, "parts": parts, "items": good}).encode())
    for stale in {*home.glob("*.npz"), *home.glob("*.tmp")} - {home / part for part in parts}:
        stale.unlink()
    return home, len(good), lines


def write_part(run, folder, names, path):
    """The vectors of those pictures that can be decoded, and {name: reason} for the others."""
    pictures, bad = open_many(run, folder, names)
    vectors = torch.empty(0, run.model.config.embed_dim)
    if len(pictures):
        vectors, _ = evaluation.tower_vectors(run.model, pictures, no_words(run), BATCH)
    with data.whole_file(path) as file:
        np.savez(file, vectors=vectors.float().numpy(), bad=json.dumps(bad))


def read_file(path):
    """What index.json or a part holds."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as part:
            return dict(part)
    except Exception as error:  # damaged files raise almost anything
        raise data.DataError(f"{path}: damaged ({type(error).__name__}); remove it and run index again") from None


def open_index(run, name=None):
    """The run's index of that name; without one, its only index."""
    needs(run, "itc")
    homes = {path.parent.name.removeprefix("index-"): path.parent for path in sorted(run.home.glob("index-*/index.json"))}
    if not homes or name not in (None, *homes):
        raise data.DataError(f"{run.home}: has no index{f' {name!r}' if name else ''}; make one with index DIR")
    if len(homes) > 1 and not name:
        raise data.DataError(f"{run.home}: has several indexes, choose one by --name: {', '.join(homes)}")
    home = homes[name] if name else next(iter(homes.values()))
    contents = read_file(home / "index.json")
    if contents["weights"] != fingerprint(run.model):
        raise data.DataError(f"{home}: was made with other weights than {run.settings['checkpoint']} has; run index {contents['folder']} again")
    vectors = np.concatenate([read_file(home / part)["vectors"] for part in contents["parts"]])
    return Index(contents["folder"], contents["items"], torch.from_numpy(vectors))


def search(run, query, index, best=20, show=10):
    """
    The pictures of an index (from `open_index`) nearest to a text by the towers, the `best` of them put in order by towers and ITM together;
    or the nearest to a picture. Of a product's pictures only the nearest. Returns up to `show` dicts: image, caption, product_id, "near"
    (cosine), "match" (match - mismatch logit) and "both" (what puts them in order), the last two None where ITM has not read.
    """
    if is_picture(query):
        vector, best = evaluation.tower_vectors(run.model, open_one(run, query), no_words(run))[0][0].float(), 0
    else:
        tokens = words(run, [query], tell=not best)  # else `rank` tells
        with evaluation.at_rest(run.model) as device, evaluation.autocast(device):
            vector = run.model.embed_texts(tokens.to(device))[0].cpu()
    near, found, seen = index.vectors @ vector, [], set()
    for number in near.argsort(descending=True).tolist():
        image, caption, product = index.items[number]
        if product not in seen:
            found.append({"image": image, "caption": caption, "product_id": product, "near": near[number].item(), "match": None, "both": None})
            seen |= {product} - {""}  # "": it is not known
        if len(found) == max(best, show):
            break
    if best:
        answers, ranked = {os.path.join(index.folder, answer["image"]): answer for answer in found[:best]}, []
        for path, match in rank(run, query, list(answers), skip_bad=True):
            both = evaluation.both(run.model, answers[path]["near"], match).item()
            ranked.append(answers[path] | {"match": match, "both": both})
        found = sorted(ranked, key=lambda answer: -answer["both"]) + found[best:]
    return found[:show]


# ---------------------------------------------------------------------------------------------------------------------------------------
# The commands


def table(header, *rows):
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def as_match(logit):
    """A logit with its probability."""
    return "" if logit is None else f"{logit:+.2f} ({100 * torch.tensor(logit).sigmoid():.0f}%)"


def warn_if_alike(scores):
    if len(scores) > 1 and len(set(scores)) == 1:
        print("every score is the same: this run cannot tell these apart", file=sys.stderr)


def show_score(run, args):
    """how well a picture and a text match"""
    table(("match", "picture", "text"), (as_match(score(run, args.image, args.text)), args.image, args.text))


def show_rank(run, args):
    """pictures for a text, or texts for a picture, the best first"""
    folders = [path for path in args.answers if os.path.isdir(path)]
    if is_picture(args.query):
        if folders:
            raise data.DataError(f"{folders[0]}: is a folder, but a picture ranks texts; index and search find the pictures that are like it")
        answers = [text for answer in args.answers for text in (read_texts(answer) if is_texts(answer) else [answer])]
    else:
        answers = [os.path.join(path, name) for path in folders for name in files_below(path)]
        answers = [path for path in args.answers if path not in folders] + answers
    ranked = rank(run, args.query, answers, skip_bad=bool(folders))
    table(("rank", "match", "answer"), *((str(place), as_match(match), answer) for place, (answer, match) in enumerate(ranked, 1)))
    warn_if_alike([match for _, match in ranked])


def show_classify(run, args):
    """category and sub-category"""
    for field, found in classify(run, args.image, args.text).items():
        table((field, "probability"), *((name, f"{chance:.3f}") for name, chance in found))


def show_rebuild(run, args):
    """hide a share of the picture and paint it again"""
    result = rebuild(run, args.image, args.text, args.hide, args.seed)
    if not result["share"]:
        raise data.DataError(f"--hide must cover a square of {run.settings.get('mask_unit', 16)} px or more, got {args.hide:g}")
    size = data.open_picture("", args.image).size if run.shape[1] == "stretch" else (1, 1)
    width, height = (max(1, round(384 * side / max(size))) for side in size)  # as the picture was before it was made square
    sheet = Image.new("RGB", (3 * width, height))
    for place, name in enumerate(("hidden", "rebuilt", "original")):
        sheet.paste(Image.fromarray(result[name]).resize((width, height)), (place * width, 0))
    out = args.out or f"{Path(args.image).stem}-rebuilt.png"
    with data.whole_file(out) as file:
        sheet.save(file, "PNG")
    table(("hidden", "PSNR there", "mean colour's"), (f"{100 * result['share']:.0f}%", f"{result['psnr']:.2f} dB", f"{result['floor']:.2f} dB"))
    print(f"hidden | rebuilt | original: {out}")


def show_fill(run, args):
    """the likeliest words for each [MASK]"""
    found, text = fill(run, args.image, args.text)
    rows = ((str(place), word, f"{chance:.3f}") for place, one in enumerate(found, 1) for word, chance in one)
    table(("[MASK]", "word", "probability"), *rows)
    print(text)


def show_index(run, args):
    """read a folder of pictures, or of data, for search"""
    start = time.time()
    home, count, bad = index(run, args.folder, args.name)
    print("\n  ".join([f"{count} pictures in {time.time() - start:.1f} s: {home}", *(f"left out {line}" for line in bad)]))


def show_search(run, args):
    """the indexed pictures that fit a text, or are like a picture"""
    opened = open_index(run, args.name)
    for query in [args.query] if args.query is not None else filter(None, map(str.strip, sys.stdin)):
        start = time.time()
        try:
            found = search(run, query, opened, args.best, args.show)
            took = time.time() - start
            rows = ((str(place), as_match(a["match"]), f"{a['near']:.3f}", "" if a["both"] is None else f"{a['both']:.2f}", a["image"], a["caption"]) for place, a in enumerate(found, 1))
            table(("rank", "match", "near", "both", "picture", "caption"), *rows)
            print(f"{took:.2f} s among {len(opened.items)} pictures", flush=True)
            warn_if_alike([answer["near"] for answer in found])
            if args.out:
                data.contact_sheet(opened.folder, found, args.out, len(found), columns=min(5, len(found)))
        except data.DataError as error:
            if args.query is not None:
                raise
            print(error, file=sys.stderr)  # and wait for the next


def ratio(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one checkpoint file")
    commands = parser.add_subparsers(required=True, metavar="score | rank | classify | rebuild | fill | index | search")
    for show in (show_score, show_rank, show_classify, show_rebuild, show_fill, show_index, show_search):
        name = show.__name__.removeprefix("show_")
        options = commands.add_parser(name, help=show.__doc__, description=show.__doc__)
        options.set_defaults(show_answer=show)
        options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        if name in ("score", "classify", "rebuild", "fill"):
            options.add_argument("image", metavar="IMAGE")
        if name in ("score", "fill"):
            options.add_argument("text", metavar="TEXT")
        if name in ("classify", "rebuild"):
            options.add_argument("text", metavar="TEXT", nargs="?", default="")
        if name == "rank":
            options.add_argument("query", metavar="TEXT|IMAGE")
            options.add_argument("answers", metavar="IMAGE|DIR|FILE", nargs="+", help="pictures, folders of them; or texts, files of them, one a line")
        if name == "rebuild":
            options.add_argument("--hide", type=ratio, default=0.5, metavar="SHARE")
            options.add_argument("--seed", type=int, default=0)
        if name == "index":
            options.add_argument("folder", metavar="DIR")
        if name == "search":
            options.add_argument("query", metavar="TEXT|IMAGE", nargs="?", help="without it: one query a line from the standard input")
            options.add_argument("--best", type=evaluation.at_least(0), default=20, metavar="K", help="how many of the towers' best ITM reads too; 0: none")
            options.add_argument("--show", type=evaluation.at_least(1), default=10, metavar="N")
        if name in ("index", "search"):
            options.add_argument("--name", help="of the index (default: the folder's; to search: the only one)")
        if name in ("rebuild", "search"):
            options.add_argument("--out", metavar="PNG", help="where to draw the answer, to several queries the last one (rebuild: IMAGE-rebuilt.png in this folder, if not said)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    try:
        args.show_answer(load(args.run, args.device), args)
    except (data.DataError, ValueError, OSError) as error:
        sys.exit(f"predict.py: {' '.join(str(error).split())}")  # status 1
    except KeyboardInterrupt:
        sys.exit("predict.py: stopped" + "; the same command goes on from here" * (args.show_answer is show_index))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell must not cost the answer
    main()
