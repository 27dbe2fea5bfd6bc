"""
Ours against the usual way of computing the same MVLT: the same weights, pairs, losses and gradients.

    python -m extras.bench                    the paper's recipe: tiny, 256 px, captions of 30 to 50 words
    python -m extras.bench --quick            everything once on a very small model: does it run?
    python -m extras.bench --scale 1000000    instead: what a catalogue of so many rows costs

The usual way (`Usual`) is the authors' code's: captions padded to text_len, attention written out in fp32, vocabulary
logits at every position, the decoder on every picture, an unfused optimiser, memory as the C library handles it. Both
ways must first give the same losses and gradients. Then each runs in a process of its own, they are timed in turn, so
that other load on the machine slows all of them, and the medians are compared.
"""

import argparse
import contextlib
import copy
import json
import random
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image

import data
import mvlt
from extras import runtime
from extras.table import Captions, open_table, open_words
from extras.tokenizer import SPECIAL, Tokenizer

FIRST = "usual, fp32"  # what speed-ups and shares refer to
TOLERANCE = 1e-3  # the largest relative difference between the two ways
RECIPE = {name: value for name, value in mvlt.RECIPES["paper"].items() if hasattr(mvlt.Recipe, name)}

# --- One batch for both ways ---


class RandomSplit:
    """n random captions without categories: as much of a `data.Split` as `MVLT.plan` reads."""

    def __init__(self, config, n, words=(30, 50)):
        generator = torch.Generator().manual_seed(0)
        shortest, longest = (min(length, config.text_len) for length in words)
        lengths = torch.linspace(shortest, longest, n).round()  # Fashion-Gen's captions have about 40 words
        self.tokens = torch.randint(len(SPECIAL), config.vocab_size, (n, config.text_len), generator=generator)
        self.tokens[torch.arange(config.text_len) >= lengths[:, None]] = 0
        self.tokens[:, 0] = SPECIAL.index("[CLS]")
        self.tokenizer = Tokenizer(SPECIAL + [f"word{i}" for i in range(len(SPECIAL), config.vocab_size)])
        self.categories = self.subcategories = torch.full((n,), -1)

    def negatives(self, rows, generator):
        return rows.roll(1)


def make_batch(model, size, words=(30, 50)):
    """Random pictures, and what the paper's recipe plans for their pairs: images (G, 3, H, W), plan, count."""
    side, device = model.config.image_size, model.log_scale.device
    images = torch.rand(size, 3, side, side, generator=data.generator(0, "pictures"))
    draw = lambda what: data.generator(0, 0, what)
    plan, count = model.plan(RandomSplit(model.config, size, words), torch.arange(size), draw, None, progress=0.5)
    return images.to(device), {name: value.to(device) for name, value in plan.items()}, count


def make_model(config, device):
    torch.manual_seed(0)
    return mvlt.MVLT(config, mvlt.Recipe(**RECIPE)).to(device)


def total_loss(model, sums, count):
    """Eq. 8 from the sums over a batch."""
    return sum(model.recipe.weights[name] * sums[name] / max(1, count[name]) for name in sums)


# --- The two ways ---


class Ours:
    """`mvlt.py` as train.py and eval.py call it."""

    optimizer = dict(fused=True)

    def losses(self, model, images, plan):
        return model.losses(images, plan)

    def score(self, model, images, tokens):
        return model.score(images, data.trim(tokens))


class Usual:
    """The same weights, used as the authors' code uses theirs."""

    optimizer = dict(foreach=False, fused=False)

    def losses(self, model, images, plan):
        masked, _ = mvlt.hide(images, plan["units"])
        longest = (0, model.config.text_len - plan["tokens"].shape[1])
        tokens, words, predict = (F.pad(plan[name], longest) for name in ("tokens", "words", "predict"))
        visual, text = self.encode(model, masked, tokens)
        error = F.smooth_l1_loss(model.reconstruct(visual), images, reduction="none").mean(dim=(1, 2, 3))
        judged = F.cross_entropy(model.match(text).float(), plan["matched"].long(), reduction="none")
        logits = model.word_head(text[3], model.words.word.weight).flatten(0, 1).float()  # (B text_len, vocabulary)
        right = words.masked_fill(~predict, -100).flatten()  # -100: not counted
        return dict(
            mir=(error * plan["rebuild"]).sum(),
            itm=(judged * plan["judge"]).sum(),
            mlm=F.cross_entropy(logits, right, reduction="sum"),
        )

    def score(self, model, images, tokens):
        logits = model.match(self.encode(model, images, tokens)[1])
        return logits[:, 1] - logits[:, 0]

    def encode(self, model, images, tokens):
        image, text, visual, texts = images, model.words(tokens), [], []
        for stage in model.stages:
            image, text = self.stage(stage, image, text, tokens != 0)
            visual.append(image)
            texts.append(text)
        return visual, texts

    def stage(self, stage, image, text, seen):
        words = text.shape[1]
        m = stage.norm_text(stage.embed_text(text)) + stage.position_text[:words]
        patches = stage.embed_image(image)
        side = patches.shape[2]
        n = stage.norm_image(patches.flatten(2).transpose(1, 2)) + stage.position_image
        z = torch.cat([m, n], dim=1)
        for block in stage.blocks:
            z = z + block.drop_path(self.attention(block.attn, block.norm1(z), words, side, seen))
            hidden = F.gelu(block.mlp.fc1(block.norm2(z)))  # kept for the backward pass
            z = z + block.drop_path(block.mlp.fc2(hidden))
        return z[:, words:].transpose(1, 2).reshape(len(z), -1, side, side).contiguous(), z[:, :words]

    def attention(self, attention, z, words, side, seen):
        keys = z
        if attention.sr is not None:
            keys = torch.cat([z[:, :words], attention.reduce(z[:, words:], side)], dim=1)
        q = attention.q(z).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        k, v = attention.kv(keys).unflatten(2, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5  # (B, heads, L + N, keys) in fp32
        padding = ~F.pad(seen, (0, keys.shape[1] - words), value=True)[:, None, None]
        weights = scores.masked_fill(padding, float("-inf")).softmax(dim=-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2))


WAYS = {"usual": Usual(), "ours": Ours()}


def differences(model, batch):
    """{loss, or parameter whose gradient exceeds rounding: relative difference of the two ways}, without dropout."""
    images, plan, count = batch
    results = {}
    for name, way in WAYS.items():
        twin = copy.deepcopy(model).eval()
        sums = way.losses(twin, images, plan)
        total_loss(twin, sums, count).backward()
        values = {loss: value.detach() for loss, value in sums.items()}
        values |= {p: value.grad for p, value in twin.named_parameters() if value.grad is not None}
        results[name] = values
    usual, ours = results["usual"], results["ours"]
    mvlt.require(ours.keys() == usual.keys(), "bench", "needs two ways that train the same", ours.keys() ^ usual.keys())
    rounding = 1e-6 * max(value.norm() for value in usual.values())
    kept = [name for name, value in usual.items() if value.norm() > rounding]
    return {name: ((ours[name] - usual[name]).norm() / usual[name].norm()).item() for name in kept}


def check_agreement(config, device):
    """Both ways must compute the same, or there is nothing to compare."""
    model = make_model(config, device)
    found = differences(model, make_batch(model, 8))
    losses = {name: found.pop(name) for name in ("mir", "itm", "mlm")}
    found = losses | {"gradients": max(found.values())}
    print("relative differences of the two ways: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    mvlt.require(max(found.values()) < TOLERANCE, "the two ways", f"must agree to {TOLERANCE}", found)


# --- One way in a process of its own, and so with its own peak of memory and its own allocator ---


class Runner:
    """One way in one precision: its model, its optimiser, its pairs."""

    def __init__(self, way, precision, device, config, size):
        torch.backends.cudnn.allow_tf32 = False  # otherwise fp32 convolutions would use TF32, matrix products not
        self.way, self.device, self.bf16 = WAYS[way], torch.device(device), precision == "bf16"
        self.model = make_model(config, self.device).train()
        self.images, self.plan, self.count = make_batch(self.model, size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **self.way.optimizer)
        if way == "ours":
            runtime.keep_freed_memory(100 << 20)  # as train.py

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def step(self):
        with self.autocast():
            sums = self.way.losses(self.model, self.images, self.plan)
            loss = total_loss(self.model, sums, self.count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def candidates(self, n):
        """Score one caption against n pictures, as retrieval by ITM does."""
        images = self.images.repeat(-(-n // len(self.images)), 1, 1, 1)[:n]
        longest = (0, self.model.config.text_len - self.plan["words"].shape[1])
        tokens = F.pad(self.plan["words"][len(self.images) // 2], longest).expand(n, -1)
        with runtime.evaluating(self.model), self.autocast():
            self.way.score(self.model, images, tokens)

    def seconds(self, task, *arguments):
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        getattr(self, task)(*arguments)
        wait()
        return time.perf_counter() - start

    def memory(self):
        """GB at the peak of two steps; the second one also holds the optimiser's state."""
        self.step()
        self.step()
        return peak_memory(self.device)


def peak_memory(device):
    """The peak of this process in GB. getrusage, which `runtime.memory_gb` reads, would count the parent's too."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return runtime.memory_gb(device)
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e9


RUNNER = None  # of a child process


def start(*arguments):
    global RUNNER
    RUNNER = Runner(*arguments)


def ask_runner(what, *arguments):
    return getattr(RUNNER, what)(*arguments)


def race(children, rounds, *task):
    """{name: median seconds} of one task, asked of each child in turn, after one turn to warm up."""
    turns = {name: [] for name in children}
    for _ in range(rounds + 1):
        for name, child in children.items():
            turns[name].append(child.submit(ask_runner, "seconds", *task).result())
    return {name: statistics.median(times[1:]) for name, times in turns.items()}


def start_children(args, config, size):
    """{name: a process} for each way in each precision that the device is good at."""
    precisions = ["fp32", "bf16"] if runtime.has_fast_bf16(torch.device(args.device)) else ["fp32"]
    children = {}
    for precision in precisions:
        for way in WAYS:
            arguments = (way, precision, args.device, config, size)
            children[f"{way}, {precision}"] = ProcessPoolExecutor(1, mp.get_context("spawn"), start, arguments)
    return children


def compare(args):
    """Print how fast, and in how much memory, each way takes a training step and scores one query's candidates."""
    size, rounds, candidates = args.batch_size or (16 if args.device == "cpu" else 128), 5, 101
    config = mvlt.Config.preset("tiny")
    if args.quick:
        size, rounds, candidates = args.batch_size or 8, 1, 8
        config = mvlt.Config.preset("nano", vocab_size=500, depths=(1, 1, 1, 1), dims=(16, 32, 40, 64))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}: ", end="")
    print(f"{config.image_size} px, {config.vocab_size} words, batches of {size} pairs")
    check_agreement(config, torch.device(args.device))

    children = start_children(args, config, size)
    memory = {name: child.submit(ask_runner, "memory").result() for name, child in children.items()}
    step = race(children, rounds, "step")
    score = race(children, max(1, rounds // 2), "candidates", candidates)
    for child in children.values():
        child.shutdown()

    header = ("", "ms/step", "pictures/s", "speed-up", "GB", "share", f"{candidates} candidates, s", "speed-up")
    print("\n{:14}{:>9}{:>12}{:>10}{:>7}{:>7}{:>19}{:>10}".format(*header))
    for name in children:
        row = [1e3 * step[name], size / step[name], step[FIRST] / step[name]]
        row += [memory[name], memory[name] / memory[FIRST], score[name], score[FIRST] / score[name]]
        print("{:14}{:9.1f}{:12.2f}{:10.2f}{:7.2f}{:7.2f}{:19.3f}{:10.2f}".format(name, *row))


# --- What a catalogue costs ---


def write_catalogue(folder, rows, pictures=1000, size=64):
    """A manifest of training rows with captions of 38 words that share a thousand pictures of noise."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(3000)]
    for i in range(pictures):
        Image.frombytes("RGB", (size, size), draw.randbytes(3 * size * size)).save(folder / f"{i}.png")
    with open(folder / "train.jsonl", "w") as file:
        for i in range(rows):
            row = dict(image=f"{i % pictures}.png", caption=" ".join(draw.choices(vocabulary, k=38)))
            row |= dict(product_id=str(i // 2), category=f"main {i % 5}", subcategory=f"sub {i % 50}")
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def timed(results, what):
    """Put the seconds that the block takes into results[what]."""
    start = time.perf_counter()
    yield
    results[what] = time.perf_counter() - start


def prepare_catalogue(folder):
    """What the first process of the first run does: {what: seconds}."""
    results = {}
    with timed(results, "read the manifest"):
        table, _ = open_table(folder, "train")
    with timed(results, "learn a vocabulary"):
        tokenizer = Tokenizer.train(Captions(table.rows), size=8000)
    tokenizer.save(folder / "vocab.txt")
    with timed(results, "tokenise"):
        open_words(folder, table, tokenizer, 48)
    return results


def open_catalogue(folder):
    """What every process of every later run does, and what it pays for a batch: {what: seconds}."""
    results, tokenizer = {}, Tokenizer.load(folder / "vocab.txt")
    labels = {"category": [f"main {i}" for i in range(5)], "subcategory": sorted(f"sub {i}" for i in range(50))}
    with timed(results, "open the split"):
        split = data.open_split(folder, "train", tokenizer, labels, image_size=64, text_len=48)
    with timed(results, "read 100 batches of 256"):
        for step in range(100):
            rows = data.batch_rows(step, min(256, len(split)), len(split), seed=0)
            split.tokens[rows], split.images(rows), split.same(rows)
    return results


def with_memory(work, folder):
    """The results of work(folder), and by how many GB it lifted the peak of this process."""
    before = peak_memory(torch.device("cpu"))
    return work(folder), peak_memory(torch.device("cpu")) - before


def scale(rows):
    """Print what a catalogue of so many rows costs: to prepare it, to decode its pictures, and to open it again."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_catalogue(folder, rows)
        print(f"{f'{rows} rows':40}{'s':>10}{'more GB':>10}")
        for work, note in (prepare_catalogue, ""), (open_catalogue, ", first time"), (open_catalogue, ", second time"):
            with ProcessPoolExecutor(1, mp.get_context("spawn")) as child:
                results, more = child.submit(with_memory, work, folder).result()
            for what, seconds in results.items():
                print(f"{what + note:40}{seconds:10.2f}{more:10.2f}")


def parse(arguments=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    runtime.add_device_flag(parser)
    whole = runtime.at_least(1)
    parser.add_argument("--batch-size", type=whole, help="pairs in a step (default: 16 on a CPU, 128 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="everything once, on a very small model")
    parser.add_argument("--scale", type=whole, metavar="N", help="measure a catalogue of N rows instead")
    return parser.parse_args(arguments)


def main():
    args = parse()
    try:
        scale(args.scale) if args.scale else compare(args)
    except BrokenProcessPool:
        text = "a measuring process has ended (out of memory?); what it printed stands above"
        raise runtime.UserError(text) from None


if __name__ == "__main__":
    runtime.run(main)
