"""
Pre-training and fine-tuning of MVLT, Kaleido-BERT and VLMo, on one process or many, on a CPU or GPUs.

    python train.py                                              the toy demo: draw a shop, train, evaluate, report
    torchrun --nproc_per_node=8 train.py --preset paper --data DIR --init pvt_tiny.pth        the paper's run
    python train.py --preset recognise --from runs/1 --data DIR  fine-tune for recognition
    python train.py --out runs/1 --resume                        go on where runs/1 stopped, exactly
    python train.py --model vlmo --help                          the settings of another model

One step: draw everything random for the global batch of G pairs (`model.plan`), sum each objective over this process's
slice in micro-batches (`model.losses`), divide by the number of items in the whole batch. So any number of processes,
any micro-batch size and a resumed run compute the same step, up to dropout and rounding (a resumed run bit by bit).
"""

import argparse
import copy
import fcntl
import itertools
import json
import math
import os
import signal
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
from extras import figures, readers, report, runtime, toy, weights
from extras.muon import Muon
from extras.pictures import DECODE
from extras.runtime import UserError, quoted
from extras.table import Captions, open_table
from extras.teachers import Teachers
from extras.tokenizer import Tokenizer
from mvlt import require, require_range, require_whole, setting

TOY = "toy"  # where the demo's shop is drawn
TEACHERS, IMAGES, TEXTS = "weights of the teachers", "pictures in --images", "lines of --texts"  # what a digest is of
LARGE_TENSOR = 100 << 20  # bytes; larger tensors go back to the system, because long-lived ones would leave holes

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """One run. A recipe (--preset) of the model's file replaces some of these defaults."""

    model: str = setting("mvlt", "Model: mvlt, kaleido or vlmo.")
    size: str = setting("nano", "Size of the model; the authors' own checkpoint (--init) brings its size with it.")
    preset: str = setting("demo", "Recipe of the model.")
    data: str = setting("", "Folder with the data set; without it the toy shop is drawn into ./toy.")
    images: str = setting("", "VLMo: folder of photos, none of them of a test split, for its stage on pictures alone.")
    texts: str = setting("", "VLMo: file of captions, one a line, for its stage on captions alone.")
    fit: str = setting("stretch", "How a picture becomes square: stretch (the paper) or pad.")
    decode: str = setting("auto", "Decoded pictures: kept on the disk, live (decoded when needed), or auto.")
    vocab: str = setting("", "A vocab.txt in BERT's format; default: the data folder's, or learnt from its captions.")
    vocab_size: int = setting(8000, "Size of a learnt vocabulary.")
    init: str = setting(
        "", "Other people's weights to start from, a file or several (a,b): PVT, BERT, ResNet-50, BEiT, the authors'."
    )
    start: str = setting("", "Fine-tuning: start from this run's weights; --data and --fit are its own by default.")
    teachers: str = setting("", "Earlier runs (a,b) whose similarities the towers of this run imitate; needs itc.")
    steps: int = setting(300, "Number of steps.")
    epochs: float = setting(0.0, "Number of passes over the training split's pairs, instead of --steps.")
    batch_size: int = setting(128, "Global batch size G, over all processes.")
    micro_batch: int = setting(0, "Gradient accumulation: pairs per forward pass and process (0: all). Saves memory.")
    optimizer: str = setting("muon", "muon (for the hidden matrices, with AdamW for all other weights) or adamw.")
    lr: float = setting(4e-3, "Peak learning rate.")
    final_lr: float = setting(1e-4, "Learning rate at the end of the cosine.")
    warmup: float = setting(0.05, "Share of the steps over which the learning rate rises.")
    weight_decay: float = setting(1e-4, "Weight decay of matrices; norms and biases have none.")
    beta2: float = setting(0.999, "AdamW's second beta.")
    clip: float = setting(1.0, "Clip the norm of the gradient at this value.")
    average: bool = setting(False, "Validate and save the mean of the weights over the last tenth of the steps so far.")
    mirror: float = setting(0.0, "Augmentation: probability of mirroring a picture.")
    shift: int = setting(0, "Augmentation: move pictures by up to this many pixels.")
    zoom: float = setting(0.0, "Augmentation: width and height of the crop each vary by up to this fraction.")
    seed: int = setting(0, "Seed of everything random.")
    bf16: bool = setting(True, "Mixed precision where the device gains from it.")
    recompute: bool = setting(False, "Recompute activations in the backward pass: less memory, a third more work.")
    workers: int = setting(0, "Loader processes.")
    log_every: int = setting(20, "Log every so many steps.")
    save_every: int = setting(100, "Validate and save a checkpoint every so many steps.")

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            require(type(value) is field.type, flag(field.name), f"must be {field.type.__name__}", value)
            require(field.type is not float or math.isfinite(value), flag(field.name), "must be a finite number", value)
        require(self.model in weights.FILES, "--model", f"must be one of {', '.join(weights.FILES)}", self.model)
        file = weights.FILES[self.model]
        require(self.size in file.PRESETS, "--size", f"must be one of {', '.join(file.PRESETS)}", self.size)
        rule = f"must be one of {', '.join(file.RECIPES)} for --model {self.model}"
        require(self.preset in file.RECIPES, "--preset", rule, self.preset)
        require(self.fit in ("stretch", "pad"), "--fit", "must be stretch or pad", self.fit)
        require(self.decode in DECODE, "--decode", f"must be one of {', '.join(DECODE)}", self.decode)
        require(self.optimizer in ("muon", "adamw"), "--optimizer", "must be muon or adamw", self.optimizer)
        require_whole(self, dict(batch_size=1, log_every=1, save_every=1, vocab_size=6, seed=0, shift=0, workers=0))
        require_whole(self, dict(micro_batch=0, steps=0))
        require_range(self, ("mirror", "warmup"), 0, 1)
        require_range(self, ("zoom", "beta2"), 0, 1, high_included=False)
        for name in ("lr", "clip"):
            require(getattr(self, name) > 0, flag(name), "must be above 0", getattr(self, name))
        for name in ("final_lr", "weight_decay", "epochs"):
            require(getattr(self, name) >= 0, flag(name), "must be 0 or more", getattr(self, name))
        require(self.seed < 2**63, "--seed", "must be below 2^63", self.seed)
        require(self.epochs > 0 or self.steps > 0, "--steps", "must be above 0 (or give --epochs)", self.steps)
        require(not (self.start and self.init), "--from and --init", "exclude each other", (self.start, self.init))


FROM_THE_DATA = {"vocab_size", "n_category", "n_subcategory"}  # fields of a Config that the data decides
# What --resume may change: results depend on it by dropout and rounding at most, or its contents are compared instead
MAY_CHANGE = {"micro_batch", "workers", "decode", "recompute", "log_every", "save_every"}
MAY_CHANGE |= {"data", "images", "texts", "init", "start", "vocab", "teachers"}


def flag(name):
    """The flag of a field."""
    return "--from" if name == "start" else "--" + name.replace("_", "-")


def parse(arguments=None):
    """
    The command line -> (args, given): given has the fields of "settings", "config" and "recipe" that flags name. Which
    fields there are depends on --model, or on the model of the run that --resume or --from names.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default="")
    first.add_argument("--out", default="")
    first.add_argument("--from", dest="start", default="")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    resumed = known.resume and (Path(known.out) / "config.json").is_file()
    run = known.out if resumed else known.start
    model = known.model or (model_of(run) if run else "mvlt")
    if model not in weights.FILES:
        raise UserError(f"--model must be one of {', '.join(weights.FILES)}, got {quoted(model)}", status=2)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat, allow_abbrev=False)
    parser.add_argument("--out", help="Folder of the run (default: a new numbered one under runs/).")
    parser.add_argument("--resume", action="store_true", help="Go on from the last.pt of --out if there is one.")
    parser.add_argument("--skip-bad", action="store_true", help="Leave out rows that cannot be read, and say which.")
    runtime.add_device_flag(parser)
    file = weights.FILES[model]
    parts = {"settings": Settings, "config": file.Config, "recipe": file.Recipe}
    demo = file.RECIPES["demo"]
    defaults = {**file.PRESETS[demo["size"]], **demo}  # of a run without flags
    choices = {"size": file.PRESETS, "preset": file.RECIPES}
    for part, kind in parts.items():
        title = f"{part} of {model}" if part != "settings" else "settings"
        named = "--size" if part == "config" else "--preset"
        group = parser.add_argument_group(f"{title} (defaults: the demo's; another {named} has its own)")
        for field in fields(kind):
            if part != "config" or field.name not in FROM_THE_DATA:
                default = defaults.get(field.name, field.default)
                add_flag(group, part, field, default, ",".join(choices.get(field.name, ())))
    args = parser.parse_args(arguments)
    if args.resume and not args.out:
        parser.error("--resume needs --out, the run to go on with")
    given = {}
    for part in parts:
        named = {key.partition(".")[2]: value for key, value in vars(args).items() if key.startswith(part + ".")}
        given[part] = {name: value for name, value in named.items() if value is not None}
    given["settings"].setdefault("model", model)
    return args, given


class HelpFormat(argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the flags beside their sentences."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=120)


def add_flag(group, part, field, default, choices):
    """One field as a flag: its sentence, the demo's value and the choices, where it has any."""
    shown = "" if default == "" else f" Default: {default!r}."
    help = f"{field.metadata['help']}{shown}".replace("%", "%%")
    options = dict(dest=f"{part}.{field.name}", default=None, help=help)
    if field.type is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **options)
    else:
        kind = whole_numbers if field.type is tuple else field.type
        metavar = f"{{{choices}}}" if choices else METAVARS[field.type]
        group.add_argument(flag(field.name), type=kind, metavar=metavar, **options)


METAVARS = {str: "TEXT", int: "N", float: "X", tuple: "N,N,..."}


def whole_numbers(text):
    """An argparse type: "64,128" -> (64, 128)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, as 64,128, got {quoted(text)}") from None


def model_of(run):
    """The name of the model in a run's folder, as its config.json says; mvlt if there is none."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / "config.json"
    if not path.is_file():
        return "mvlt"
    try:
        name = json.loads(path.read_text())["settings"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    if name not in list(weights.FILES):
        raise UserError(f"{path}: damaged; name the model of the run with --model")
    return name


def resolve(given, saved=None):
    """
    The preset's values, then the flags, which beat them. On --resume the saved run stands in the preset's place, or its
    beginning, if it has no checkpoint yet.
    Returns Settings, and the fields that differ from the defaults of the model's Config and of its Recipe.
    """
    with runtime.usage_errors():
        settings = Settings(**given["settings"])  # refuses an impossible flag before anything is read
        file = weights.FILES[settings.model]
        if settings.start:
            rule = "must be left out with --from, whose run has its own"
            require("size" not in given["settings"], "--size", rule, settings.size)
            require(not settings.vocab, "--vocab", rule, settings.vocab)
        if saved:
            require(settings.model == saved["kind"], "--model", f"must be {saved['kind']}, the run's", settings.model)
            base, config, recipe = saved["run"], saved["config"], saved["recipe"]
        else:
            preset, names = file.RECIPES[settings.preset], {field.name for field in fields(Settings)}
            base = {name: value for name, value in preset.items() if name in names}
            config = {}
            recipe = {name: value for name, value in preset.items() if name not in names}
            if settings.start:  # the size, the data and the shape of its pictures are the run's, too
                old, _, run = weights.load_run(settings.start)
                if old.kind != settings.model:
                    raise UserError(f"--from {settings.start}: holds the model {old.kind}, not {settings.model}")
                base |= {name: run[name] for name in ("size", "data", "fit") if name in run}
        if given["settings"].get("steps") and not given["settings"].get("epochs"):
            base = {**base, "epochs": 0.0}
        both = given["settings"].get("steps") and given["settings"].get("epochs")
        require(not both, "--steps and --epochs", "exclude each other", both)
        settings = Settings(**{**base, **given["settings"]})
        G, processes = settings.batch_size, runtime.world()
        require(G >= processes, "--batch-size", f"must be at least the number of processes, {processes}", G)
        config, recipe = {**config, **given["config"]}, {**recipe, **given["recipe"]}
        file.Recipe(**recipe)
        if saved:
            file.Config(**config)
        elif not (settings.start or settings.init):
            file.Config.preset(settings.size, **config)
    return settings, config, recipe


# ---------------------------------------------------------------------------------------------------------------------
# One step


def step_gradients(model, batch, seed, micro_batch, progress, teachers=None):
    """
    This process's share of one batch's losses and gradients; summed over the processes they are those of all G pairs
    read at once. The contrastive loss over all pairs is differentiated in two steps, loss -> vectors -> weights
    (GradCache, Gao et al. 2021), so that its G x G logits are computed once, whatever the micro-batches.
    """
    device = next(model.parameters()).device
    parts, losses, vectors = batch.parts(micro_batch), {}, None
    weight, split, rows = model.recipe.weights, batch.split, batch.rows

    def draw(what):
        return data.generator(seed, batch.step, what)

    def embed(part):
        reseed(seed, batch.step, part.start, "towers")  # dropout: the second forward pass repeats the first
        with runtime.precision_of(model):
            return model.embed(batch.images(part, device), tokens[part].to(device))

    if "itc" in model.active(progress):
        tokens = data.trim(split.tokens[rows])  # (G, L)
        one_part = len(parts) == 1  # then the first forward pass can keep its graph
        with torch.set_grad_enabled(one_part):
            own = [embed(part) for part in parts]
        vectors = gather(torch.cat(own, dim=1), batch.share, len(rows)).requires_grad_()  # (n, G, E), in every process
        taught = teachers(rows).to(device) if teachers else None
        loss = model.contrast(vectors, split.same(rows).to(device), taught) / runtime.world()
        (weight["itc"] * loss).backward()
        losses["itc"] = loss.detach()
        for i, part in enumerate(parts):
            again = own[i] if one_part else embed(part)
            again.backward(runtime.world() * vectors.grad[:, part])
        vectors = vectors.detach()

    plan, count = model.plan(split, rows, draw, vectors, progress)
    for part in parts if count else ():
        reseed(seed, batch.step, part.start, "fusion")
        sliced = {name: value[part].to(device) for name, value in plan.items()}
        if "other" in plan:
            sliced["other_images"] = batch.images_at(plan["other"][part].clamp(min=0), device)
        with runtime.precision_of(model):
            sums = model.losses(batch.images(part, device), sliced)
        shares = {name: total / max(1, count[name]) for name, total in sums.items()}  # of the mean over the whole batch
        if shares:
            sum(weight[name] * share for name, share in shares.items()).backward()
        for name, share in shares.items():
            losses[name] = losses.get(name, 0) + share.detach()
    return losses


def reseed(*key):
    """Seed the global generator, which dropout draws from."""
    torch.manual_seed(data.generator(*key).initial_seed())


def gather(own, share, G):
    """Every process's vectors (n, b, E) in the places of its share: (n, G, E), the same everywhere, detached."""
    if not dist.is_initialized():
        return own.detach().clone()
    whole = own.new_zeros(own.shape[0], G, own.shape[2])
    whole[:, share[0] : share[1]] = own.detach()
    dist.all_reduce(whole)
    return whole


def sum_gradients(model, losses, names, stop):
    """
    Add up gradients and losses over the processes, in one message. Returns {name: loss}, and whether some process was
    asked to stop.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # nothing to count in this process's slice
    numbers = torch.tensor([float(losses.get(name, 0)) for name in names] + [float(stop)])
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


def freeze_all_but(model, names):
    """
    Only the named parameters get gradients. Otherwise weight decay would shrink the others, and AdamW's bias correction
    would count their steps without gradient.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in names


@torch.no_grad()
def follow(average, model, step):
    """
    Move the averaged weights towards the model's after step number `step`: polynomial-decay averaging (Shamir and Zhang
    2013) with eta = 8, which reaches back over about the last tenth of the steps so far.
    """
    for mean, weight in zip(average.parameters(), model.parameters()):
        mean.lerp_(weight, 9 / (8 + step))


def make_optimizer(model, s):
    """
    AdamW; with --optimizer muon, Muon for the hidden matrices: the weights of linear layers and convolutions, except
    the model's `ends`. Vectors (norms and biases) are not decayed, and parameters without gradient get no step.
    """
    hidden = set()
    for name, module in model.named_modules():
        is_end = any(part in f"{name}." for part in model.ends)
        if s.optimizer == "muon" and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not is_end:
            hidden.add(module.weight)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        dict(params=[p for p in matrices if p in hidden], weight_decay=s.weight_decay, orthogonal=True),
        dict(params=[p for p in matrices if p not in hidden], weight_decay=s.weight_decay, orthogonal=False),
        dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0, orthogonal=False),
    ]
    return Muon(groups, lr=s.lr, betas=(0.9, s.beta2), fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def find_data(s):
    """The data folder; without one the toy shop, drawn once."""
    if s.data:
        folder = os.path.abspath(s.data)
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; name the data with --data")
        return folder
    if runtime.process_index() == 0:
        toy.make(TOY)
    runtime.barrier()
    return os.path.abspath(TOY)


def find_tokenizer(s, folder, rows):
    """The vocabulary: a file, the data folder's own, or learnt from the training captions (and --texts)."""
    path = Path(s.vocab) if s.vocab else Path(folder) / "vocab.txt"
    if s.vocab or path.is_file():
        return Tokenizer.load(path)
    lines = readers.read_lines(s.texts) if s.texts else ()
    captions = itertools.chain(Captions(rows), (line for _, line in lines))
    return Tokenizer(runtime.from_first(lambda: Tokenizer.train(captions, s.vocab_size).words))


def make_model(s, config, recipe, tokenizer, labels):
    """A model for this data (fresh, from --init's weights, or from a run), and a line on where it came from."""
    torch.manual_seed(s.seed)
    file, kind = weights.FILES[s.model], weights.MODELS[s.model]
    sizes = dict(vocab_size=len(tokenizer))
    sizes |= dict(n_category=len(labels["category"]), n_subcategory=len(labels["subcategory"]))
    base, old, origin = asdict(file.Config.preset(s.size)), None, "fresh weights"
    whole, part = weights.open_init(s.model, s.init) if s.init else ({}, {})
    if s.start:
        old, origin = weights.load_run(s.start)[0], f"from {s.start}"
    elif whole:
        changes = {"image_size": base["image_size"], "vocab_size": len(tokenizer), **config}
        with runtime.usage_errors():
            old, origin = weights.load_whole(s.model, whole, changes), f"the authors' weights in {s.init}"
    if old:
        base = asdict(old.config)
    with runtime.usage_errors():
        model = kind(file.Config(**{**base, **sizes, **config}), file.Recipe(**recipe))
    model.learnt = set()
    if old:
        transplant(old, model, heads_too=old.labels == labels)
    if s.start:
        model.learnt = weights.learnt(old) & set(model.recipe.weights)
        if old.labels != labels:
            model.learnt -= {"cr"}  # its heads are fresh
    if part:
        weights.load_part(s.model, model, part)
        origin = f"the weights in {s.init}"
    model.vocabulary, model.labels, model.recompute = tokenizer.words, labels, s.recompute
    return model, origin


@torch.no_grad()
def transplant(old, model, heads_too):
    """Copy all weights; the recognition heads only where they know the same classes."""
    found = old.state_dict()
    for name, value in model.state_dict().items():
        if heads_too or not name.startswith(("category_head", "subcategory_head")):
            shape = tuple(found[name].shape) if name in found else None
            if shape != tuple(value.shape):
                rule = f"the weights to start from must have the shape {tuple(value.shape)}"
                raise UserError(f"{name}: {rule}, got {shape}")
            value.copy_(found[name])


def check_negatives(model, splits):
    """Fail at start-up, not mid-run, if some pair has no possible negative."""
    if "itm" not in model.recipe.weights:
        return
    for name, split in splits.items():
        try:
            if name == "train" or len(split) > 1:
                split.negatives(torch.arange(len(split)), data.generator("check"))
        except UserError as error:
            hint = "matching needs two products with different captions and pictures; or leave itm out of --objectives"
            raise UserError(f"{name}: {error}; {hint}") from None


def open_pools(s, train, order, skip_bad):
    """{what a step reads: its Split}, for those that the steps of `order` read."""
    read = set(order)
    for name, given in (("pictures", s.images), ("captions", s.texts)):
        if given and name not in read:
            what = "--images" if name == "pictures" else "--texts"
            raise UserError(f"{what}: this run has no stage that reads {name} alone", status=2)
    pools = {"pairs": train}
    if "pictures" in read:
        pools["pictures"] = data.picture_pool(train, s.images, skip_bad, s.decode)
    if "captions" in read:
        pools["captions"] = data.caption_pool(train, s.texts)
    return pools


def open_teachers(s, model, split, device, skip_bad):
    """The runs of --teachers, which have read the training split."""
    if not hasattr(model, "contrast"):
        raise UserError(f"--teachers: the towers imitate, and the model {model.kind} has none", status=2)
    if "itc" not in model.recipe.weights:
        raise UserError("--teachers: the towers imitate, so itc must be among the --objectives", status=2)
    return Teachers(s.teachers.split(","), s.data, split, device, skip_bad, s.decode)


def check_plans(model, pools, order):
    """
    Fail at start-up, not mid-run, if a stage of the run cannot be planned, as with a mask unit that does not fit.
    Returns the objectives that no step trains.
    """
    checked = set()
    for step, name in enumerate(order):
        progress = step / len(order)
        stage = model.active(progress)
        if stage not in checked:
            checked.add(stage)
            rows = torch.arange(min(2, len(pools[name])))
            with runtime.usage_errors():
                model.plan(pools[name], rows, data.generator, None, progress)
    return [name for name in model.recipe.weights if not any(name in stage for stage in checked)]


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def choose_folder(args):
    """The run's folder, and the checkpoint in it to go on from, if there is one."""
    if args.out:
        out = Path(args.out)
    else:
        taken = [int(path.name) for path in Path("runs").glob("*") if path.name.isdigit()]
        out = Path("runs") / str(max(taken, default=0) + 1)
    found = [path for path in (out / "last.pt", out / "best.pt") if path.exists()]  # best.pt is written first
    path = found[0] if found else None
    if path and not args.resume:
        raise UserError(f"--out {out} already holds a run; add --resume to go on with it, or choose another folder")
    return out, path


def read_beginning(out):
    """The settings of a run that was stopped before its first checkpoint, as `resolve` takes them; None without any."""
    path = out / "config.json"
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text())
        s, file = Settings(**contents["settings"]), weights.FILES[contents["settings"]["model"]]
        config, recipe = asdict(file.Config(**contents["config"])), asdict(file.Recipe(**contents["recipe"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"--resume: {path} is damaged ({quoted(str(error))}); give the run another --out") from None
    for name in FROM_THE_DATA:
        del config[name]
    return dict(kind=s.model, run=asdict(s), config=config, recipe=recipe)


def open_folder(out):
    """Make the run's folder and lock it for as long as the returned file is open."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process alone, not by its loaders
    except OSError:
        raise UserError(f"--out {out}: another run is writing there") from None
    return lock


def read_last(path):
    """The checkpoint to go on from, and its model."""
    saved = weights.read(path)
    model = weights.build(path, saved)
    weights.check_training_state(path, saved, {field.name for field in fields(Settings)})
    try:
        s = Settings(**saved["run"])
        require(s.model == model.kind, "--model", f"must be {model.kind}", s.model)
        require(saved["step"] <= s.steps, "step", f"must not exceed {s.steps}", saved["step"])
    except (ValueError, OverflowError) as error:
        raise UserError(f"--resume: {path} is damaged ({error})") from None
    return saved, model


def fingerprint(folder, split, samples=2000):
    """
    A number that changes with any row or the size of any picture file, and with the pixels of pictures from all over
    the split (of every picture, if there are few). It does not change when the folder is moved.
    """
    files = {readers.file_of(split.references[number])[0] for number in np.unique(split.pictures.index)}
    sizes = [os.path.getsize(os.path.join(folder, file)) for file in sorted(files)]
    return crc_of_pixels(split.pictures, zlib.crc32(json.dumps(sizes).encode(), split.digest), samples)


def crc_of_pixels(pictures, number, samples=2000):
    """A checksum that goes on from `number`, of some of the pictures (of all, if there are few)."""
    for row in range(0, len(pictures), math.ceil(len(pictures) / samples)):
        number = zlib.crc32(pictures[[row]].tobytes(), number)
    return number


def check_resume(path, saved, now):
    """A resumed run must be the same run."""
    old = {**saved["run"], **saved["config"], **saved["recipe"], **saved["labels"], **saved["data"]}
    differ = []
    for name, value in now.items():
        same = repr(plain(old.get(name))) == repr(plain(value))  # a damaged file may hold anything, as a tensor
        if name not in MAY_CHANGE and not same:
            differ.append(f"{name} (was {quoted(old.get(name))}, now {quoted(value)})")
    if differ:
        raise UserError(f"--resume: {path} is another run: {', '.join(differ)}; start a new one with --from")


def plain(value):
    return list(value) if isinstance(value, tuple) else value


class Log:
    """log.jsonl and the progress bar (lines, where there is no terminal)."""

    def __init__(self, out, step, s):
        self.path, self.s = out / "log.jsonl", s
        kept = [line for line in report.read_log(self.path) if line["step"] <= step]
        with runtime.whole_file(self.path) as file:  # later steps will be logged again
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        self.bar = tqdm(total=s.steps, initial=step, unit="step", disable=None)
        self.restart_clock()

    def restart_clock(self):
        self.since, self.seen = time.perf_counter(), 0

    def write(self, line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def count(self, step):
        self.seen += self.s.batch_size
        self.bar.update(step - self.bar.n)

    def losses(self, step, line):
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        line = {"step": step, **line, "images_per_s": self.seen / elapsed}
        self.write(line)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in line.items() if name != "step")
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            left = (self.s.steps - step) * self.s.batch_size / max(line["images_per_s"], 1e-9)
            print(f"step {step}/{self.s.steps}, {left / 60:.1f} min left  {shown}", flush=True)
        self.restart_clock()

    def validation(self, step, values):
        self.write({"step": step, "val": values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"step {step}  validation: {shown}")
        self.restart_clock()


@contextmanager
def asked_to_stop():
    """A list that SIGTERM and Ctrl-C fill, instead of ending the process mid-step."""
    asked = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(step, values, rows, last):
    """A loss that is not finite ends the run before it reaches the weights or a checkpoint."""
    for name, value in values.items():
        if not math.isfinite(value):
            kept = f"{last} is from before it" if last.exists() else "nothing was saved yet"
            read = f" (rows {', '.join(map(str, rows))}, ...)" if rows else ""
            hint = "A lower --lr, or --no-bf16, may help"
            raise UserError(f"step {step}: the {name} is {value}{read}; {kept}. {hint}")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(args, given):
    """Train as the flags say. Returns the run's folder and its settings."""
    # who am I
    runtime.keep_freed_memory(LARGE_TENSOR)
    device = runtime.join_processes(args.device)
    first = runtime.process_index() == 0
    out, path = runtime.from_first(lambda: choose_folder(args))
    saved, model = read_last(path) if path else (None, None)
    beginning = read_beginning(out) if args.resume and not saved else None
    s, config, recipe = resolve(given, saved or beginning)
    folder = find_data(s)
    lock = open_folder(out) if first else None  # noqa: F841 (held until the run ends)

    # data
    table, bad = runtime.first_then_others(lambda: open_table(folder, "train"))
    if not len(table):
        readers.settle(folder, "train", table.rows, bad, args.skip_bad)
    labels = {field: table.class_names(field) for field in ("category", "subcategory")}
    if saved:
        tokenizer = Tokenizer(saved["vocabulary"], source=str(path))
    else:
        tokenizer = weights.load_run(s.start)[1] if s.start else find_tokenizer(s, folder, table.rows)
        model, origin = make_model(s, config, recipe, tokenizer, labels)
    if "cr" in model.recipe.weights and not all(labels.values()):
        raise UserError(f"recognition needs category and subcategory in {folder}; or leave cr out of --objectives")
    how = (tokenizer, labels, model.config.image_size, model.config.text_len, s.fit, args.skip_bad, s.decode)
    splits = {name: data.open_split(folder, name, *how) for name in ("train", "val")}
    check_negatives(model, splits)
    if s.epochs:
        s = replace(s, steps=math.ceil(s.epochs * len(splits["train"]) / s.batch_size))
    teacher_runs = ",".join(os.path.abspath(path) for path in s.teachers.split(",") if path)
    images, texts = (path and os.path.abspath(path) for path in (s.images, s.texts))
    s = replace(s, data=folder, images=images, texts=texts, teachers=teacher_runs)

    # model and optimiser
    if hasattr(model, "prepare") and not saved:
        with runtime.usage_errors():
            model.prepare(splits["train"])
    teachers = open_teachers(s, model, splits["train"], device, args.skip_bad) if s.teachers else None
    model.to(device)
    model.bf16 = s.bf16
    optimizer = make_optimizer(model, s)
    order = [model.reads(step / s.steps) for step in range(s.steps)]
    pools = open_pools(s, splits["train"], order, args.skip_bad)
    untrained = check_plans(model, pools, order)
    result = copy.deepcopy(model).eval() if s.average else model  # what is validated and saved
    result.learnt = model.learnt  # one set for both, which grows with the run

    # resume
    step, best = 0, -math.inf
    digests = runtime.from_first(lambda: {f"{name} split": fingerprint(folder, one) for name, one in splits.items()})
    if teachers:
        digests[TEACHERS] = teachers.digest
    if s.images:
        photos = pools["pictures"]
        digests[IMAGES] = crc_of_pixels(photos.pictures, photos.digest)
    if s.texts:
        digests[TEXTS] = pools["captions"].digest
    if saved:
        without = dict.fromkeys((TEACHERS, IMAGES, TEXTS))  # differs from the digests of a run that had some
        check_resume(path, saved, {**asdict(s), **config, **recipe, **labels, **without, **digests})
        weights.load_optimizer(path, optimizer, saved["optimizer"])
        step, best, origin = saved["step"], saved["best"], f"{path}, step {saved['step']}"
        model.recompute = s.recompute
        if s.average:
            model.load_state_dict(weights.check_unaveraged(path, saved, model))
    if first:
        describe(model, s, splits, tokenizer, origin, device)
        if untrained:
            print(f"note: no step of this run trains {', '.join(untrained)}")
        write_config(out, model, s)
        tokenizer.save(out / "vocab.txt")
        log = Log(out, step, s)

    def save(path):
        rest = dict(optimizer=optimizer.state_dict(), step=step, run=asdict(s), best=best, data=digests)
        if s.average:
            rest["unaveraged"] = model.state_dict()  # what a resumed run goes on with
        try:
            weights.save(path, result, **rest)
        except (UserError, RuntimeError, OSError) as error:  # torch hides a full disk behind an error of its own
            cause = error.__context__ or error
            hint = "what was saved before is intact"
            raise UserError(f"step {step}: {path} cannot be written ({cause}); {hint}") from None

    @contextmanager
    def saved_if_full():
        """If the log cannot be written (a full disk), try to save the run, then name the step and the file."""
        try:
            yield
        except (OSError, UserError) as error:
            try:
                save(out / "last.pt")
            finally:
                cause = getattr(error, "strerror", None) or error
                raise UserError(f"step {step}: {log.path} cannot be written ({cause})") from None

    # loop
    augmentation = (s.mirror, s.shift, s.zoom)
    index, world = runtime.process_index(), runtime.world()
    batches = data.Batches(pools, order, s.batch_size, s.seed, step, s.steps, index, world, *augmentation, s.workers)
    model.train()
    with asked_to_stop() as asked:
        for batch in batches:
            progress = step / s.steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            freeze_all_but(model, model.trained(progress))
            losses = step_gradients(model, batch, s.seed, s.micro_batch, progress, teachers)
            losses, stop = sum_gradients(model, losses, model.active(progress), bool(asked))
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip).item()
            numbers = {**{f"loss {name}": loss for name, loss in losses.items()}, "gradient's norm": norm}
            check_finite(step + 1, numbers, batch.rows[:4].tolist(), out / "last.pt")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.learnt |= {name for name in model.active(progress) if model.recipe.weights[name] > 0}
            step += 1
            if s.average:
                follow(result, model, step)

            if first:
                log.count(step)
            if first and (step % s.log_every == 0 or step == s.steps):
                total = sum(model.recipe.weights[name] * loss for name, loss in losses.items())
                epoch = round(step * s.batch_size / len(splits["train"]), 3)
                line = dict(epoch=epoch, loss=total, **losses, lr=learning_rate(step - 1, s), grad_norm=norm)
                with saved_if_full():
                    log.losses(step, {**line, "memory_gb": runtime.memory_gb(device)})
            if step % s.save_every == 0 or step == s.steps:
                values = evaluation.validate(result, splits["val"], s.seed, progress)
                if first:
                    check_finite(step, {f"validation's {n}": v for n, v in values.items()}, [], out / "last.pt")
                    with saved_if_full():  # logged before it is saved: a killed run logs it again
                        log.validation(step, values)
                    goodness = evaluation.goodness(result, values)
                    if set(model.active(progress)) == set(model.active(1.0)) and goodness > best:
                        best = goodness
                        save(out / "best.pt")
                    save(out / "last.pt")
                    draw_samples(result, splits["val"], out, step, s.seed)
            if stop and step < s.steps:
                if first:
                    save(out / "last.pt")
                runtime.barrier()  # the others must not leave, and so end this run, before it is saved
                again = f"python train.py --out {out} --resume{' --skip-bad' * args.skip_bad}"
                raise UserError(f"stopped at step {step}; go on with: {again}")

    runtime.barrier()
    if first:
        log.bar.close()
        chosen = "best.pt (chosen on the validation split), " if (out / "best.pt").exists() else ""
        print(f"done. {out}: {chosen}last.pt, log.jsonl, samples/")
        print(f"evaluate it: python eval.py {out}", flush=True)
    return out, s


def draw_samples(model, split, out, step, seed):
    """A PNG with hidden, rebuilt and original pictures, for a model that rebuilds."""
    if hasattr(model, "rebuild") and "mir" in model.recipe.weights:
        figures.draw_samples(model, split, out / "samples" / f"{step:06d}.png", seed)


def describe(model, s, splits, tokenizer, origin, device):
    """Print every setting, the data and the model."""
    for name, value in {**asdict(s), **asdict(model.recipe), **asdict(model.config)}.items():
        print(f"{name:16} {value}")
    train, val, labels = splits["train"], splits["val"], model.labels
    print(
        f"{len(train)} training and {len(val)} validation pairs of {s.data}, {len(tokenizer)} words, captions of up to "
        f"{train.tokens.shape[1]}, {len(labels['category'])} categories, {len(labels['subcategory'])} sub-categories"
    )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    work = f"{s.steps} steps of {s.batch_size} pairs on {runtime.world()} x {device.type}"
    print(f"{s.model}: {millions:.1f} M parameters, {origin}; {work}", flush=True)


def write_config(out, model, s):
    """config.json: the settings, the model's configuration and its recipe."""
    contents = {"settings": asdict(s), "config": asdict(model.config), "recipe": asdict(model.recipe)}
    with runtime.whole_file(out / "config.json") as file:
        file.write(json.dumps(contents, indent=1).encode())


def main(arguments=None):
    args, given = parse(arguments)
    out, s = train(args, given)
    if s.data == os.path.abspath(TOY) and not given["settings"].get("data"):
        model = weights.load_run(out)[0]
        if any(evaluation.fits(model, task) for task in evaluation.TASKS):  # VLMo's early stages have nothing yet
            evaluation.main([str(out), "--device", args.device, "--queries", "100", "--draws", "2"])


if __name__ == "__main__":
    runtime.run(main)
