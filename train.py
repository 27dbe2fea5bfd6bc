"""
Pre-training (Sec. 3.2, 4.1) and fine-tuning (Sec. 3.3), on one process or many, on a CPU or GPUs.

    python train.py                                                         the toy demo: draw a boutique, train, evaluate, write a report
    torchrun --nproc_per_node=8 train.py --preset paper --data DIR --init pvt_tiny.pth        the paper's run
    torchrun --nproc_per_node=8 train.py --preset plus --data DIR           the same with twin towers and harder negatives (not in the paper)
    python train.py --task recognise --from runs/1 --data DIR               fine-tune for recognition, M-CR and S-CR
    python train.py --out runs/1 --resume                                   go on where runs/1 stopped, exactly

Batches, masks and negatives depend on (seed, step) alone (hard negatives on the weights, too) and are drawn for the global batch of G pairs,
of which each process takes its slice; dropout depends on where the slice begins, too. So a resumed run repeats the unbroken one (on a CPU
bit by bit), and any number of processes, loaders and micro-batches computes the same steps but for dropout and rounding.
Every field of `Settings` and of `mvlt.Config` is a flag of its own name.
"""
import argparse
import fcntl
import functools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
import mvlt
import toy

OBJECTIVES = ("mir", "itm", "mlm", "itc", "cr")
TOY = "toy"  # where the toy boutique is drawn
LARGE_TENSOR = 100 << 20  # bytes: what is larger goes back to the system, for among activations that are kept for long it would leave holes


class RunError(Exception):
    """Something a user can put right, in one line."""


class UsageError(ValueError):
    """A flag, or several together, that can mean nothing: exit status 2."""


@contextmanager
def usage():
    """What is refused in here was asked for by a flag."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from None


# ---------------------------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the demo's: a nano model, the toy boutique, a laptop."""

    task: str = "pretrain"  # or recognise: fine-tune everything for M-CR and S-CR alone
    preset: str = "demo"
    model: str = "nano"  # a preset of mvlt.Config
    data: str = ""  # a folder that data.py reads; empty: the toy boutique, drawn into ./toy
    fit: str = "stretch"  # how a picture becomes square: stretch (the paper) or pad
    vocab: str = ""  # a vocab.txt in BERT's format; empty: vocab.txt in the data folder, or learnt from its captions
    vocab_words: int = 8000  # how many words to learn then
    init: str = ""  # PVT's or the MVLT authors' weights
    start: str = ""  # --from: a run to start from
    objectives: str = "mir,itm,mlm,itc,cr"
    w_mir: float = 10.0  # the weights of Eq. 8
    w_itm: float = 3.0  # the paper: 1, with which matching has hardly begun after so few steps
    w_mlm: float = 1.0
    w_itc: float = 1.0
    w_cr: float = 1.0
    mask_ratio: float = 0.5  # r_v
    mask_unit: int = 16  # alpha P, in pixels
    mask_style: str = "random"
    mask_image_prob: float = 0.3  # how many of the pictures have anything hidden
    mask_words: float = 0.15  # r_l
    match_whole: bool = True  # matching reads only pairs with nothing hidden; False: every caption has hidden words, as the paper
    itm_negatives: str = "uniform"  # as the paper; from hard_from on also subcategory: of the same, or hard: half of them alike to the towers
    itm_from: float = 0.1  # share of the steps before matching and the rest join the contrast: towers first
    hard_from: float = 0.7  # share of the steps before which all negatives are uniform: easy before hard
    alike: int = 1  # from hard_from on, so many batches in a row are filled sub-category by sub-category: the contrast's negatives are hard, too
    modality: str = "both"  # what recognition reads: both, image or text
    drop_caption: float = 0.2  # how many of the whole, matched pairs recognition reads without their caption, to know photos that have none
    mirror: float = 0.0  # how many pictures are flipped left to right
    shift: int = 0  # pixels by which each picture is moved at most
    zoom: float = 0.0  # share by which the part of a picture that is seen is narrower or wider, lower or higher, at most
    epochs: float = 0.0
    steps: int = 640  # used when epochs is 0
    batch_size: int = 128  # G, over all processes
    micro_batch: int = 0  # the most pairs that one process holds at once; 0: its whole slice
    lr: float = 5e-4
    final_lr: float = 1e-4
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True  # autocast where the device gains from it
    compile: bool = True  # on a GPU
    recompute: bool = False  # activation checkpointing
    workers: int = 0  # loader processes
    log_every: int = 20
    save_every: int = 160  # also validates and draws samples
    tensorboard: bool = False

    @property
    def chosen(self):
        return self.objectives.split(",")

    @property
    def weights(self):
        return {name: getattr(self, f"w_{name}") for name in OBJECTIVES}


PAPER = dict(
    model="tiny", objectives="mir,itm,mlm", w_itm=1.0, mask_image_prob=0.5, match_whole=False, itm_negatives="uniform", itm_from=0.0, drop_caption=0.0,
    mirror=0.0, shift=0, zoom=0.0, vocab_words=30522, epochs=150.0, batch_size=1200, lr=2.5e-3, final_lr=1e-5, warmup=5 / 150, workers=4, save_every=1000,
)  # Sec. 4.1; epochs, warm-up and final learning rate from the authors' code
PLUS = dict(
    PAPER, objectives="mir,itm,mlm,itc", mask_image_prob=0.25, match_whole=True, itm_negatives="subcategory", itm_from=0.4, hard_from=0.6, alike=8,
    drop_caption=0.2, mirror=0.5, shift=3, zoom=0.2, lr=1e-3,
)  # twin towers, negatives that are hard, and pictures never twice the same
PRESETS = {"demo": {}, "paper": PAPER, "plus": PLUS}
RECOGNISE = dict(objectives="cr", mask_image_prob=0.0, alike=1, lr=5e-4)
MAY_CHANGE = {"micro_batch", "workers", "compile", "recompute", "log_every", "save_every", "tensorboard", "data", "init", "start", "vocab"}  # on --resume
CHOICES = {"task": ("pretrain", "recognise"), "preset": tuple(PRESETS), "model": tuple(mvlt.PRESETS), "fit": ("stretch", "pad"), "mask_style": mvlt.MASK_STYLES,
           "itm_negatives": ("uniform", "subcategory", "hard"), "modality": ("both", "image", "text")}
OF_THE_DATA = {"vocab_size", "n_category", "n_subcategory"}  # fields of the configuration that the data decides


def flag(name):
    return "--from" if name == "start" else "--" + name.replace("_", "-")


def parse(arguments=None):
    """Flags -> (args, the settings that were given, the fields of the model's configuration that were given)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", help="the run's folder (default: a new numbered one under runs/)")
    parser.add_argument("--resume", action="store_true", help="go on from --out's last.pt if there is one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and say which")
    for field in fields(Settings):
        if field.type is bool:
            parser.add_argument(flag(field.name), dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=f"default in the demo: {field.default}")
        else:
            parser.add_argument(flag(field.name), dest=field.name, type=field.type, choices=CHOICES.get(field.name), help=f"default in the demo: {field.default!r}")
    for field in fields(mvlt.Config):
        if field.name not in OF_THE_DATA:
            kind = {tuple: whole_numbers, bool: yes_or_no}.get(field.type, field.type)
            parser.add_argument(flag(field.name), dest=f"config_{field.name}", type=kind, help="of the model's configuration")
    args = parser.parse_args(arguments)
    if args.resume and not args.out:
        parser.error("--resume needs --out, the run to go on with")
    given = {name: value for name, value in vars(args).items() if value is not None}
    settings = {field.name: given[field.name] for field in fields(Settings) if field.name in given}
    return args, settings, {name.removeprefix("config_"): value for name, value in given.items() if name.startswith("config_")}


def whole_numbers(text):
    return tuple(int(part) for part in text.split(","))


def yes_or_no(text):
    if text.lower() not in ("yes", "true", "no", "false"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return text.lower() in ("yes", "true")


def resolve(given, base=None):
    """
    Preset, then task, then flags: what comes later beats what came before. On --resume `base` is the run that goes on, and flags beat it.
    An impossible setting is refused by name.
    """
    if base is None:
        base = {**PRESETS[given.get("preset", "demo")], **(RECOGNISE if given.get("task") == "recognise" else {})}
    if "steps" in given and "epochs" not in given:
        base = {**base, "epochs": 0.0}  # the flag beats the preset's epochs
    s = Settings(**{**base, **given})
    for field in fields(s):
        value = getattr(s, field.name)
        mvlt.require(field.type is not float or math.isfinite(value), flag(field.name), "must be a finite number", value)
    for name in ("mask_ratio", "mask_words", "mask_image_prob", "hard_from", "drop_caption", "mirror", "warmup"):
        mvlt.require(0 <= getattr(s, name) <= 1, flag(name), "must lie in [0, 1]", getattr(s, name))
    for name in ("itm_from", "zoom"):
        mvlt.require(0 <= getattr(s, name) < 1, flag(name), "must lie in [0, 1)", getattr(s, name))
    for name in ("batch_size", "alike", "lr", "clip", "log_every", "save_every", "vocab_words"):
        mvlt.require(getattr(s, name) > 0, flag(name), "must be above 0", getattr(s, name))
    for name in ("w_mir", "w_itm", "w_mlm", "w_itc", "w_cr", "epochs", "shift", "micro_batch", "final_lr", "weight_decay", "workers", "seed"):
        mvlt.require(0 <= getattr(s, name) < 2**63, flag(name), "must not be below 0 nor absurdly large", getattr(s, name))
    mvlt.require(s.epochs > 0 or s.steps > 0, "--steps", "must be above 0 (or give --epochs)", s.steps)
    mvlt.require(not ("steps" in given and given.get("epochs")), "--steps and --epochs", "exclude each other", (s.steps, s.epochs))
    mvlt.require(not (s.start and s.init), "--from and --init", "exclude each other", (s.start, s.init))
    mvlt.require(not (s.start and "model" in given), "--from", "brings its own shape, --model", s.model)
    mvlt.require(not (s.start and s.vocab), "--from", "brings its own words, --vocab", s.vocab)
    known = len(set(s.chosen)) == len(s.chosen) and set(s.chosen) <= set(OBJECTIVES)
    mvlt.require(known, "--objectives", f"must name some of {','.join(OBJECTIVES)}, each once", s.objectives)
    if s.itm_negatives == "hard" and "itm" in s.chosen:
        mvlt.require("itc" in s.chosen, "--itm-negatives hard", "needs the towers: add itc to --objectives", s.objectives)
    mvlt.require(s.modality == "both" or s.chosen == ["cr"], "--modality", "must be both, unless --task recognise", s.modality)
    mvlt.require(s.task == "pretrain" or s.chosen == ["cr"], "--objectives", "must be cr alone with --task recognise", s.objectives)
    hidden, whole = ({"mir", "mlm"}, {"itm", "cr"}) if s.match_whole else ({"mir"}, {"cr"})  # what reads pairs with something, with nothing hidden
    some, none = hidden & set(s.chosen), whole & set(s.chosen)
    mvlt.require(s.mask_image_prob > 0 or not some, "--mask-image-prob", f"must be above 0, for {' and '.join(sorted(some))} to read any pair", s.mask_image_prob)
    mvlt.require(s.mask_image_prob < 1 or not none, "--mask-image-prob", f"must be below 1, for {' and '.join(sorted(none))} to read any pair", s.mask_image_prob)
    if dist.is_initialized():
        mvlt.require(s.batch_size >= dist.get_world_size(), "--batch-size", f"must be at least the number of processes, {dist.get_world_size()}", s.batch_size)
    return s


# ---------------------------------------------------------------------------------------------------------------------------------------
# A global batch, drawn alike in every process


class Pairs(NamedTuple):
    """A split in memory: its pictures on the disk, its captions as words, and who is the same as whom."""

    rows: list
    pictures: data.Pictures
    tokens: torch.Tensor  # (n, L)
    products: torch.Tensor  # (n,) ids, and so on
    captions: torch.Tensor
    groups: torch.Tensor
    categories: torch.Tensor  # (n,) class ids, -1 unknown
    subcategories: torch.Tensor


class Plan(NamedTuple):
    """What one step does with its G pairs."""

    tokens: torch.Tensor  # (G, L) the captions to read: mismatched ones swapped, words hidden
    words: torch.Tensor  # (G, L) the same captions with nothing hidden
    where: torch.Tensor  # (G, L) True = a word to predict
    units: torch.Tensor  # (G, 1, h, w) True = hidden
    matched: torch.Tensor  # (G,)
    count_mir: torch.Tensor  # (G,) which pairs each loss counts
    count_itm: torch.Tensor
    count_cr: torch.Tensor


def rows_of_step(step, pairs, s):
    """The rows of a global batch: among their like where that is asked for, else as the epochs bring them."""
    if s.alike > 1 and step >= s.hard_from * s.steps:
        return data.alike_rows(step, s.batch_size, pairs.groups, s.seed, s.alike)
    return data.batch_rows(step, s.batch_size, len(pairs.rows), s.seed)


def same_product(pairs, rows):
    """(G, G) bool: one product, or one caption. Such pairs are never each other's negatives."""
    products, captions = pairs.products[rows], pairs.captions[rows]
    return (products[:, None] == products) | (captions[:, None] == captions)


def plan_step(step, rows, pairs, s, config, tokenizer, groups=None, similar=None):
    """
    Half of the pairs get another's caption (with match_whole: of those with nothing hidden); pictures and words are hidden; some captions
    are left away, for recognition. The other's is drawn among all, or in the row's own group where there are `groups`; `similar` (G,) holds,
    for each pair, the place in the batch of a caption that the towers find alike and that is taken instead, -1 for none. MIR and MLM count
    matched pairs only, and MIR only pictures with something hidden.
    """
    G, objectives, draw = len(rows), s.chosen, lambda what: data.generator(s.seed, step, what)
    hide_image = torch.rand(G, generator=draw("hide")) < s.mask_image_prob
    matched = torch.randperm(G, generator=draw("match")) % 2 == 0 if "itm" in objectives else torch.ones(G, dtype=torch.bool)
    if s.match_whole:
        matched = matched | hide_image  # a pair is either for rebuilding or for matching

    caption_rows = rows.clone()
    if not matched.all():
        other = data.draw_negatives(rows, pairs.products, pairs.captions, draw("negatives"), groups)
        if similar is not None:
            other = torch.where(similar >= 0, rows[similar], other)
        caption_rows = torch.where(matched, rows, other)
    words = pairs.tokens[caption_rows]
    whole = matched & ~hide_image
    bare = torch.full((G,), s.modality == "image")
    if "cr" in objectives and s.modality == "both":
        bare = whole & (torch.rand(G, generator=draw("bare")) < s.drop_caption)
    empty = torch.zeros_like(words[0])
    empty[:2] = torch.tensor(tokenizer.encode(""))
    words = data.trim(torch.where(bare[:, None], empty, words))

    ratio = s.mask_words if "mlm" in objectives else 0.0
    tokens, where = mvlt.mask_tokens(words, config.vocab_size, tokenizer.mask_id, tokenizer.special_ids, ratio, draw("words"))
    hide_words = (hide_image if s.match_whole else torch.ones(G, dtype=torch.bool))[:, None]
    size = (config.image_size, config.image_size)
    units = mvlt.draw_units(G, size, s.mask_style, s.mask_ratio, s.mask_unit, draw("units")) & hide_image[:, None, None, None]
    return Plan(tokens=torch.where(hide_words, tokens, words), words=words, where=where & hide_words & matched[:, None], units=units, matched=matched,
                count_mir=hide_image & matched, count_itm=~bare & ~(hide_image & s.match_whole), count_cr=whole)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The losses of one step. Each is a mean over the global batch, so a part of it counts by its share: shares of all parts add up to 1.


def share(counted, part):
    return counted[part].sum().item() / max(1, counted.sum().item())


def fused_losses(model, images, plan, part, rows, pairs, s):
    """MIR, ITM, MLM and recognition of the pairs `part` (a slice of the global batch), read together once."""
    device, objectives, losses = images.device, s.chosen, {}
    tokens, where = plan.tokens[part].to(device), plan.where[part].to(device)
    masked, _ = mvlt.hide(images, plan.units[part])
    visual, text = model.encode(None if s.modality == "text" else masked, tokens)
    if "mir" in objectives and plan.count_mir[part].any():  # for no picture, pixel_shuffle has no gradient
        chosen = plan.count_mir[part].to(device)
        losses["mir"] = share(plan.count_mir, part) * mvlt.mir_loss(model.reconstruct([v[chosen] for v in visual]), images[chosen])
    if "itm" in objectives:
        chosen = plan.count_itm[part].to(device)
        losses["itm"] = share(plan.count_itm, part) * mvlt.itm_loss(model.match(text)[chosen], plan.matched[part].to(device)[chosen])
    if "mlm" in objectives:
        losses["mlm"] = share(plan.where, part) * mvlt.mlm_loss(model.predict_words(text, where), plan.words[part].to(device)[where])
    if "cr" in objectives:
        losses["cr"] = 0
        for logits, classes in zip(model.recognise(text), (pairs.categories[rows], pairs.subcategories[rows])):
            classes = classes.masked_fill(~plan.count_cr, -1)  # -1 is not counted
            losses["cr"] = losses["cr"] + share(classes >= 0, part) * mvlt.recognition_loss(logits, classes[part].to(device))
    return losses


def read_towers(model, images, tokens, key):
    """Both towers' vectors of some pairs. Dropout is keyed, so that reading the pairs again gives the same."""
    reseed(*key, "towers")
    return torch.stack([model.embed_images(images), model.embed_texts(tokens.to(images.device))])  # (2, b, embed_dim)


def reseed(*key):
    torch.manual_seed(data.generator(*key).initial_seed())


def gather(vectors, bounds):
    """Every process's (2, b, E) laid end to end: (2, G, E), the same everywhere, without gradient."""
    vectors = vectors.detach()
    if not dist.is_initialized():
        return vectors
    whole = vectors.new_zeros(2, bounds[-1], vectors.shape[2])
    whole[:, bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]] = vectors
    dist.all_reduce(whole)
    return whole


def step_backward(model, batch, pairs, s, tokenizer, autocast, towers_only, hard):
    """
    Losses and gradients of one global batch: this process's share of each, so that a sum over processes makes them whole. The slice goes
    through the model in micro-batches. Every part computes the contrast of the whole batch with only its own vectors attached; the
    gradients of all parts then add up to the gradient of the one loss.
    """
    rows, (lo, hi), device = batch["rows"], batch["slice"], next(model.parameters()).device
    size = s.micro_batch or hi - lo
    parts = [slice(start, min(start + size, hi)) for start in range(lo, hi, size)]
    images = [data.images_to_float(batch["images"][part.start - lo : part.stop - lo].to(device)) for part in parts]
    keys = [(s.seed, batch["step"], part.start) for part in parts]
    totals, similar = {}, None
    contrast, words, same = "itc" in s.chosen, data.trim(pairs.tokens[rows]), same_product(pairs, rows)

    if contrast:
        with torch.set_grad_enabled(len(parts) == 1), autocast():  # several parts are read again below, one at a time, with gradients
            vectors = [read_towers(model, images[i], words[part], keys[i]) for i, part in enumerate(parts)]
        world = evaluation.world()
        everyone = gather(torch.cat(vectors, dim=1), [s.batch_size * r // world for r in range(world + 1)])
        if hard and s.itm_negatives == "hard":
            logits = evaluation.as_logit(model, everyone[0] @ everyone[1].T)
            similar = mvlt.hard_negatives(logits.cpu(), same, data.generator(s.seed, batch["step"], "hard"))
            easy = torch.rand(len(rows), generator=data.generator(s.seed, batch["step"], "easy")) < 0.5
            similar[easy] = -1  # half stay uniform: with hard ones alone, ITM forgets the easy

    groups = pairs.groups if hard and s.itm_negatives == "subcategory" else None
    plan = None if towers_only else plan_step(batch["step"], rows, pairs, s, model.config, tokenizer, groups, similar)
    for i, part in enumerate(parts):
        losses = {}
        with autocast():
            if contrast:
                own = vectors[i] if len(parts) == 1 else read_towers(model, images[i], words[part], keys[i])
                image, text = torch.cat([everyone[:, : part.start], own, everyone[:, part.stop :]], dim=1)
                scale = model.log_scale if part.start == 0 else model.log_scale.detach()  # one temperature: its gradient counts once
                itc = mvlt.itc_loss(image, text, scale, same.to(device))
                losses["itc"] = itc
            if plan:
                reseed(*keys[i], "fusion")
                losses.update(fused_losses(model, images[i], plan, part, rows, pairs, s))
        if losses:  # there is none where MIR alone is trained and nothing is hidden
            mvlt.total_loss(losses, s.weights).backward()
        if contrast and part.start > 0:
            del losses["itc"]  # already the whole batch's: reported once
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
    return totals


def sum_over_processes(model, totals, names, stop):
    """Add up gradients and losses over the processes, in one message. Returns ({name: loss}, whether any process was asked to stop)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a head with nothing to count in this step
    numbers = torch.tensor([float(totals.get(name, 0)) for name in names] + [float(stop)])
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in trained] + [numbers.to(trained[0].device)])
        dist.all_reduce(flat)
        for p, summed in zip(trained, flat.split([p.numel() for p in trained] + [len(numbers)])):
            p.grad.copy_(summed.view_as(p))
        numbers = flat[-len(numbers) :].cpu()
    return dict(zip(names, numbers.tolist())), numbers[-1].item() > 0


def learning_rate(step, s):
    """Linear warm-up, then a cosine from lr to final_lr (or to lr, where that is less)."""
    warm = s.warmup * s.steps
    if step < warm:
        return s.lr * (step + 1) / math.ceil(warm)
    progress = (step - warm) / max(1, s.steps - warm)
    last = min(s.final_lr, s.lr)
    return last + (s.lr - last) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Data and model


def open_data(folder, s, split, tokenizer, config, labels, skip_bad):
    rows, pictures = evaluation.first_then_others(lambda: data.load(folder, split, config.image_size, s.fit, skip_bad))
    classes = [data.class_ids(rows, field, labels[field]) for field in ("category", "subcategory")]
    return Pairs(rows, pictures, data.tokenize(rows, tokenizer, config.text_len), *data.identities(rows), *classes)


def find_data(s):
    """The data folder; without one the toy boutique, drawn once."""
    if s.data:
        return s.data
    evaluation.first_then_others(lambda: toy.make(TOY) if evaluation.rank() == 0 else None)
    return TOY


def check_negatives(s, train, val):
    """Matching needs another product for every pair: say now where there is none, and not in the middle of the night."""
    if "itm" not in s.chosen:
        return
    for split, pairs in (("train", train), ("val", val)):
        try:
            if split == "train" or len(pairs.rows) > 1:  # a single pair is never mismatched
                data.draw_negatives(torch.arange(len(pairs.rows)), pairs.products, pairs.captions, data.generator("check"))
        except data.DataError as error:
            raise RunError(f"{split}: {error}; matching needs two products with different captions, or leave itm out of --objectives") from None


def find_words(s, folder, rows):
    """The vocabulary: a file, the data folder's own, or learnt from the training captions."""
    path = Path(s.vocab) if s.vocab else Path(folder) / "vocab.txt"
    if s.vocab or path.is_file():
        return data.Tokenizer.load(path)
    return data.Tokenizer.train([row["caption"] for row in rows], s.vocab_words)


def make_model(s, changes, tokenizer, labels):
    """A model for this data: fresh, from --init's weights, or from the run that --from names. Returns it with a line on where it came from."""
    torch.manual_seed(s.seed)
    sizes = dict(vocab_size=len(tokenizer), n_category=len(labels["category"]), n_subcategory=len(labels["subcategory"]))
    if s.start:
        old, _, _ = evaluation.load_run(s.start)
        said, base = f"from {s.start}", asdict(old.config)
    else:
        old, said, base = None, "fresh weights", asdict(mvlt.Config.preset(s.model))
    weights = mvlt.open_state_dict(s.init) if s.init else {}
    if "text_embeddings.word_embeddings.weight" in weights:
        old = mvlt.load_official(weights, **{"image_size": base["image_size"], "vocab_size": len(tokenizer), **changes})
        said, base = f"the MVLT authors' weights in {s.init}", asdict(old.config)
    with usage():
        config = mvlt.Config(**{**base, **sizes, **changes})
        square = (config.image_size, config.image_size)
        mvlt.draw_units(1, square, s.mask_style, s.mask_ratio, s.mask_unit, data.generator("check"))  # refuses a unit that does not fit
    model = mvlt.MVLT(config)
    if old:
        transplant(old, model, heads_too=old.labels == labels)
    elif weights:
        mvlt.load_pvt(model, weights)
        said = f"PVT's weights in {s.init}"
    model.vocabulary, model.labels, model.recompute = tokenizer.words, labels, s.recompute
    return model, said


def transplant(old, model, heads_too):
    """Copy all weights; the recognition heads only where they know the same classes."""
    wanted, found = model.state_dict(), old.state_dict()
    for name, value in wanted.items():
        if heads_too or not name.startswith(("category_head", "subcategory_head")):
            shape = tuple(found[name].shape) if name in found else None
            mvlt.require(shape == tuple(value.shape), name, f"of the weights to start from must have this configuration's shape {tuple(value.shape)}", shape)
            value.copy_(found[name])


HEADS = {"mir": "decoder", "itm": "match_head", "mlm": "word_head", "itc": "(image_tower|text_tower|log_scale)", "cr": "(category_head|subcategory_head)"}


def choose_trained(model, s, objectives):
    """
    Freeze what none of these objectives reaches: weight decay does not wear it away, and AdamW counts its steps from when it is first
    reached (with zeros until then, its first real steps would be several times too large).
    """
    unused = [pattern for name, pattern in HEADS.items() if name not in objectives]
    if s.modality == "text":
        unused.append(r"stages\.\d\.(embed_image|norm_image|position_image|blocks\.\d+\.attn\.(sr|norm))")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(re.match(pattern, name) for pattern in unused)


def make_optimizer(model, s):
    """AdamW; vectors (norms and biases) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=s.weight_decay), dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), fused=True)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The run's folder


def choose_folder(args):
    """RUN, and whether there is a run in it to go on with. The first process decides for all, also for those on other machines."""
    if args.out:
        out = Path(args.out)
    else:
        taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
        out = Path("runs") / str(max(taken, default=0) + 1)
    chosen = [out, (out / "last.pt").exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    out, holds_a_run = chosen
    if holds_a_run and not args.resume:
        raise RunError(f"--out {out} already holds a run; add --resume to go on with it, or choose another folder")
    return out, holds_a_run


def open_folder(out):
    """Make the run's folder and lock it for as long as the returned file is open."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples").mkdir(exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: loaders that outlive it do not hold it
    except OSError:
        raise RunError(f"--out {out}: another run is writing there") from None
    return lock


def read_last(path):
    """The checkpoint to go on from, as this version of the script writes it."""
    saved = mvlt.read(path)
    absent = {"model", "optimizer", "step", "run", "best", "rows", "vocabulary", "labels", "config"} - saved.keys()
    unknown = saved.get("run", {}).keys() - {field.name for field in fields(Settings)}
    if absent or unknown:
        raise RunError(f"--resume: {path} is not a run of this version of train.py: it lacks {sorted(absent)} and has the unknown settings {sorted(unknown)}")
    return saved


def fingerprint(rows):
    """A number that changes with the training rows."""
    return zlib.crc32(json.dumps([{**row, "where": ""} for row in rows], sort_keys=True).encode())


def check_resume(saved, now, config, rows):
    """A resumed run must be the same run."""
    old, new = {**saved["run"], **saved["config"], "training rows": saved["rows"]}, {**asdict(now), **asdict(config), "training rows": rows}
    differ = [f"{name} (was {old.get(name)!r}, now {new[name]!r})" for name in new if name not in MAY_CHANGE and plain(old.get(name)) != plain(new[name])]
    if differ:
        raise RunError(f"--resume: this is another run: {', '.join(differ)}; start a new one with --from")


def cut_log(path, step):
    """Forget what was logged after `step`, and a line that a killed run left unfinished: these steps come again."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:
            break
    with data.whole_file(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


class Log:
    """What a run tells while it goes on: log.jsonl, a progress bar (lines, where there is no terminal), and TensorBoard where it is asked for."""

    def __init__(self, out, step, s):
        cut_log(out / "log.jsonl", step)
        self.file = open(out / "log.jsonl", "a", buffering=1)
        self.board = tensorboard(out, step) if s.tensorboard else None
        self.bar = tqdm(total=s.steps, initial=step, unit="step", disable=None)
        self.s = s
        self.start_clock()

    def start_clock(self):
        self.since, self.seen = time.time(), 0

    def count(self, step):
        self.seen += self.s.batch_size
        self.bar.update(step - self.bar.n)

    def losses(self, step, epoch, losses, **more):
        total = mvlt.total_loss(losses, self.s.weights)
        line = dict(step=step, epoch=round(epoch, 3), loss=total, **losses, **more, images_per_s=self.seen / (time.time() - self.since))
        self.file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "step")
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            print(f"step {step}/{self.s.steps}  {shown}", flush=True)
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        self.start_clock()

    def validation(self, step, held):
        self.file.write(json.dumps({"step": step, "val": held}) + "\n")
        tqdm.write(f"step {step}  validation: " + "  ".join(f"{name} {value:.4g}" for name, value in held.items()))


def tensorboard(out, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(out, purge_step=step + 1)


@contextmanager
def asked_to_stop():
    """A list that SIGTERM and Ctrl-C fill, instead of ending the process in the middle of something."""
    asked = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(step, losses, rows, last):
    """A loss that is no number ends the run before it reaches the weights or a checkpoint."""
    for name, value in losses.items():
        if not math.isfinite(value):
            kept = f"{last} is from before it" if last.exists() else "nothing was saved yet"
            read = f" (rows {', '.join(map(str, rows))}, ...)" if rows else ""
            raise RunError(f"step {step}: the {name} is {value}{read}; {kept}. A lower --lr, or --no-bf16, may help")


def plain(value):
    return list(value) if isinstance(value, tuple) else value


def validate(model, pairs, s, tokenizer, autocast, limit=512):
    """The losses on fixed batches of the validation split, how the towers rank within it, and how often recognition is right."""
    n, losses, right = min(limit, len(pairs.rows)), {}, []
    device, everyone = next(model.parameters()).device, torch.arange(n)
    plan = plan_step("validation", everyone, pairs, s, model.config, tokenizer)  # one plan for all: each part counts by its share, as in a step
    with evaluation.at_rest(model), autocast():
        for rows, images in whole_pictures(pairs, n, s, device):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            for name, loss in fused_losses(model, images, plan, part, everyone, pairs, s).items():
                losses[name] = losses.get(name, 0) + float(loss)
            if "cr" in s.chosen:
                tokens = torch.tensor(tokenizer.encode("")).expand(len(rows), -1) if s.modality == "image" else data.trim(pairs.tokens[rows])
                _, text = model.encode(None if s.modality == "text" else images, tokens.to(device))
                right += [(logits.argmax(1).cpu() == classes[rows]) for logits, classes in zip(model.recognise(text), (pairs.categories, pairs.subcategories))]
        if "itc" in s.chosen:
            losses |= towers_recall(model, pairs, s, min(4 * limit, len(pairs.rows)))
    if right:
        losses["cr_accuracy"] = torch.cat(right).double().mean().item()
    return losses


def whole_pictures(pairs, n, s, device):
    """The first n rows of a split in batches: (row numbers, their pictures)."""
    for rows in torch.arange(n).split(min(s.batch_size, 128)):
        yield rows, evaluation.floats(pairs.pictures, rows, device)


def towers_recall(model, pairs, s, n):
    """R@1 of the towers over the first n rows, each among the other products of its sub-category, as `eval.py` draws candidates."""
    device, rows = next(model.parameters()).device, torch.arange(n)
    read = [read_towers(model, images, data.trim(pairs.tokens[some]), (s.seed, int(some[0]))) for some, images in whole_pictures(pairs, n, s, device)]
    image, text = torch.cat(read, dim=1).double().cpu()  # exact: in bf16 close ones would tie
    groups, own = pairs.groups[:n], torch.eye(n, dtype=torch.bool)
    similar = (text @ image.T).masked_fill((same_product(pairs, rows) | (groups[:, None] != groups)) & ~own, -2)
    return {f"{way}_towers": (torch.as_tensor(evaluation.ranks(scores, rows)) == 1).double().mean().item() for way, scores in (("tir", similar), ("itr", similar.T))}


def goodness(val, s):
    """What best.pt is chosen by: the towers' recall, or else recognition, or else the total loss."""
    if "tir_towers" in val:
        return val["tir_towers"] + val["itr_towers"]
    if s.task == "recognise":
        return val["cr_accuracy"]
    return -mvlt.total_loss({name: val[name] for name in s.chosen if name in val}, s.weights)


def draw_samples(model, pairs, s, path, shown=8):
    """A PNG: hidden, rebuilt, original, one column per picture."""
    rows = torch.arange(min(shown, len(pairs.rows)))
    originals = evaluation.floats(pairs.pictures, rows, "cpu")
    masked, _ = mvlt.mask_images(originals, s.mask_style, s.mask_ratio, s.mask_unit, data.generator(s.seed, "samples"))
    with evaluation.at_rest(model) as device:
        visual, _ = model.encode(masked.to(device), pairs.tokens[rows].to(device))
        rebuilt = model.reconstruct(visual).cpu()
    grid = torch.cat([torch.cat(list(row), dim=2) for row in (masked, rebuilt, originals)], dim=1)  # (3, 3 H, shown W)
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The run


def main(args, given, changes):
    # who am I
    evaluation.keep_freed_memory(LARGE_TENSOR)
    device = evaluation.join_processes(args.device)
    first = evaluation.rank() == 0
    say = (lambda words: print(words, flush=True)) if first else lambda words: None
    out, resumes = choose_folder(args)
    saved = read_last(out / "last.pt") if resumes else None
    with usage():
        s = resolve(given, saved and saved["run"])
        if not (saved or s.start or s.init):
            mvlt.Config.preset(s.model, **changes)  # refuses an impossible one now, not after the data are read
    if saved:
        changes = {**{name: value for name, value in saved["config"].items() if name not in OF_THE_DATA}, **changes}
    lock = open_folder(out) if first else None

    # data
    folder = find_data(s)
    rows = data.read_all(folder, "train")[0] or data.read(folder, "train", args.skip_bad)  # bad rows are told below, with the bad pictures
    tokenizer = data.Tokenizer(saved["vocabulary"]) if saved else (evaluation.load_run(s.start)[1] if s.start else find_words(s, folder, rows))
    labels = {field: data.class_names(rows, field) for field in ("category", "subcategory")}
    if "cr" in s.chosen and not all(labels.values()):
        raise RunError(f"--objectives {s.objectives}: recognition needs category and subcategory in {folder}, or leave cr out of --objectives")

    # model and optimiser
    model, said = make_model(replace(s, start="", init="") if saved else s, changes, tokenizer, labels)
    config = model.config
    train = open_data(folder, s, "train", tokenizer, config, labels, args.skip_bad)
    val = open_data(folder, s, "val", tokenizer, config, labels, args.skip_bad)
    if given.get("itm_negatives") == "subcategory" and (train.groups < 0).all():  # a preset that wants it does without
        raise RunError(f"--itm-negatives subcategory needs the field subcategory in {folder}")
    check_negatives(s, train, val)
    s = replace(s, data=str(folder), steps=math.ceil(s.epochs * len(train.rows) / s.batch_size) if s.epochs else s.steps)
    model.to(device)
    choose_trained(model, s, s.chosen)
    optimizer = make_optimizer(model, s)
    autocast = (lambda: evaluation.autocast(device)) if s.bf16 else nullcontext

    # resume
    step, best, read_rows = 0, -math.inf, fingerprint(train.rows)
    if saved:
        check_resume(saved, s, config, read_rows)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best = saved["step"], saved["best"]
        said = f"{out / 'last.pt'}, step {step}"
    if s.compile and device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # the stages share it: four widths, one or two modalities, training and validation
        for stage in model.stages:
            stage.compile(dynamic=True)

    say("\n".join(f"{name:16} {value}" for name, value in {**asdict(s), **asdict(config)}.items()))
    say(f"{len(train.rows)} training and {len(val.rows)} validation pairs of {folder}, {len(tokenizer)} words, captions of up to {train.tokens.shape[1]}, "
        f"{len(labels['category'])} categories, {len(labels['subcategory'])} sub-categories")
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {said}; "
        f"{s.steps} steps of {s.batch_size} pairs on {evaluation.world()} x {device.type}")
    if first:
        (out / "config.json").write_text(json.dumps({"run": asdict(s), "config": asdict(config)}, indent=1))
        tokenizer.save(out / "vocab.txt")
        log = Log(out, step, s)

    def save(path):
        try:
            mvlt.save(path, model, optimizer=optimizer.state_dict(), step=step, random={"seed": s.seed, "step": step}, run=asdict(s), best=best, rows=read_rows)
        except (OSError, RuntimeError) as error:  # torch hides a full disk behind an error of its own
            raise RunError(f"step {step}: {path} cannot be written, is the disk full? ({error.__context__ or error}); what was saved before is intact") from None

    # loop
    names, rows_of = s.chosen, functools.partial(rows_of_step, pairs=train, s=s)
    batches = data.Batches(train.pictures, s.batch_size, s.seed, step, s.steps, evaluation.rank(), evaluation.world(), s.mirror, s.shift, s.zoom, s.workers, rows_of)
    model.train()
    with asked_to_stop() as asked:
        for batch in batches:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            towers_only = names == ["itc"] or "itc" in names and step < s.itm_from * s.steps
            choose_trained(model, s, ["itc"] if towers_only else names)
            totals = step_backward(model, batch, train, s, tokenizer, autocast, towers_only, hard=step >= s.hard_from * s.steps)
            losses, stop = sum_over_processes(model, totals, names, bool(asked))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip).item()
            numbers = {**{f"loss {name}": loss for name, loss in losses.items()}, "gradient's norm": norm}
            check_finite(step + 1, numbers, batch["rows"][:4].tolist(), out / "last.pt")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            if first:
                log.count(step)
            if first and (step % s.log_every == 0 or step == s.steps):
                log.losses(step, step * s.batch_size / len(train.rows), {n: losses[n] for n in names if not towers_only or n == "itc"},
                           lr=optimizer.param_groups[0]["lr"], grad_norm=norm, memory_gb=memory(device))
            if first and (step % s.save_every == 0 or step == s.steps):
                held = validate(model, val, s, tokenizer, autocast)
                check_finite(step, {f"validation's {name}": value for name, value in held.items()}, [], out / "last.pt")
                log.validation(step, held)
                if "mir" in names:
                    draw_samples(model, val, s, out / "samples" / f"{step:06d}.png")
                if step > s.itm_from * s.steps * ("itc" in names) and goodness(held, s) > best:  # from when every objective has been trained
                    best = goodness(held, s)
                    save(out / "best.pt")
                save(out / "last.pt")
                log.start_clock()
            if stop and step < s.steps:
                if first:
                    save(out / "last.pt")
                together()  # the others must not leave, and so end this run, before it is saved
                raise RunError(f"stopped at step {step}; go on with: python train.py --out {out} --resume{' --skip-bad' * args.skip_bad}")

    together()
    say(f"done. {out}: best.pt (chosen on the validation split), last.pt, log.jsonl, samples/\nevaluate it: python eval.py {out}")
    return out, s


def memory(device):
    """GB: the most that a GPU had allocated, or what this process has had resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def together():
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def leave(error, status=1):
    """End with one line that says what and where, and under torchrun also who."""
    tqdm.write(f"train.py{f', process {evaluation.rank()}' if evaluation.world() > 1 else ''}: {error}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    arguments, given, changes = parse()
    try:
        run, settings = main(arguments, given, changes)
        if settings.data == TOY:
            evaluation.main(evaluation.parse([str(run), "--device", arguments.device, "--queries", "100", "--draws", "2"]))
        if dist.is_initialized():  # once, at the very end: torchrun's store still holds the old addresses, and a second meeting may hang on them
            dist.destroy_process_group()
    except UsageError as error:
        leave(error, 2)
    except (RunError, data.DataError, ValueError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        leave("interrupted")
    except RuntimeError as error:
        cause = evaluation.outside_cause(error, "--micro-batch N, for so many pairs at once, or --recompute,")
        if not cause:
            raise
        leave(cause)
