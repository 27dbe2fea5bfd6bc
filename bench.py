"""
How fast, and in how much memory, against the usual way of computing the same model with the same weights and the same inputs.

    python bench.py                                  on what there is: tiny, 256 px, 30,522 words, captions of 30 to 50 words
    python bench.py --device cuda --batch-size 256
    python bench.py --quick                          everything once on a very small model: does it run?

The usual way (`Usual`) is what the authors' code does: captions padded to 128 words, scores and softmax written out in full in fp32, the
vocabulary's logits at every position, the decoder on every picture, an unfused optimiser, no compilation, memory as the C library
handles it. Both ways must first give the same losses and gradients. Then each runs in a process of its own, they are timed in turn, so
that whatever else the machine does slows all alike, and the medians are compared. It prints tables and writes bench.json.
"""
import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import mvlt
import toy
import train

# ---------------------------------------------------------------------------------------------------------------------------------------
# What both ways compute


class Batch(NamedTuple):
    """One step's pairs. Half of them match, and half of the pictures have something hidden, as in `train.py --preset paper`."""

    images: torch.Tensor  # (B, 3, H, W)
    masked: torch.Tensor  # the same with units hidden
    tokens: torch.Tensor  # (B, text_len) with words hidden, padded in full
    words: torch.Tensor  # (B, text_len) what stood there
    where: torch.Tensor  # (B, text_len) True = a word to predict, in matched pairs only
    matched: torch.Tensor  # (B,)
    rebuild: torch.Tensor  # (B,) pictures that MIR counts: matched, and with something hidden

    def part(self, chosen):
        return Batch(*(value[chosen] for value in self))


def make_batch(config, size, words=(30, 50)):
    """Pairs with captions of between so many words, evenly spread: Fashion-Gen's have about 40."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, config.image_size, config.image_size, generator=draw)
    shortest, longest = (min(n, config.text_len) for n in words)
    captions = torch.randint(5, config.vocab_size, (size, config.text_len), generator=draw)
    captions[torch.arange(config.text_len) >= torch.linspace(shortest, longest, size).round()[:, None]] = 0
    captions[:, 0] = 2
    tokens, where = mvlt.mask_tokens(captions, config.vocab_size, mask_id=4, special_ids=range(5), generator=draw)
    matched, hide = torch.arange(size) % 2 == 0, torch.arange(size) % 4 < 2
    units = mvlt.draw_units(size, images.shape[2:], unit=4 * config.patch_size, generator=draw) & hide[:, None, None, None]
    return Batch(images, mvlt.hide(images, units)[0], tokens, captions, where & matched[:, None], matched, matched & hide)


class Ours:
    """`mvlt.py`, called as `train.py` and `eval.py` call it."""

    optimizer = dict(fused=True)

    def caption(self, tokens):
        return data.trim(tokens)  # padding up to the longest caption of the batch

    def encode(self, model, images, tokens):
        return model.encode(images, tokens)

    def stage(self, stage, image, text, seen):
        return stage(image, text, seen)

    def rebuild(self, model, visual, batch):
        """MIR's loss. Only the pictures that it counts are decoded."""
        return mvlt.mir_loss(model.reconstruct([v[batch.rebuild] for v in visual]), batch.images[batch.rebuild])

    def guess(self, model, text, batch):
        """MLM's loss. Logits only where a word is hidden."""
        where, words = batch.where[:, : text[3].shape[1]], batch.words[:, : text[3].shape[1]]
        return mvlt.mlm_loss(model.predict_words(text, where), words[where])


class Usual:
    """The same weights, used as the authors' code uses theirs."""

    optimizer = dict(foreach=False, fused=False)

    def caption(self, tokens):
        return tokens  # padded in full

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
        n = stage.embed_image(image)
        side = n.shape[2]
        z = torch.cat([m, stage.norm_image(n.flatten(2).transpose(1, 2)) + stage.position_image], dim=1)
        for block in stage.blocks:
            z = z + block.drop_path(self.attention(block.attn, block.norm1(z), words, side, seen))
            z = z + block.drop_path(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(z)))))  # the hidden layer is kept
        return z[:, words:].transpose(1, 2).reshape(len(z), -1, side, side).contiguous(), z[:, :words]

    def attention(self, attention, z, words, side, seen):
        keys = z if attention.sr is None else torch.cat([z[:, :words], attention.reduce(z[:, words:], side)], dim=1)
        q = attention.q(z).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        k, v = attention.kv(keys).unflatten(2, (2, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5  # (B, heads, L + N, keys), all of them, in fp32
        padding = ~F.pad(seen, (0, keys.shape[1] - words), value=True)[:, None, None]
        weights = scores.masked_fill(padding, float("-inf")).softmax(dim=-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2))

    def rebuild(self, model, visual, batch):
        """Every picture is decoded; then MIR's mean is taken over those that count."""
        error = F.smooth_l1_loss(model.reconstruct(visual), batch.images, reduction="none").mean(dim=(1, 2, 3))
        return (error * batch.rebuild).sum() / batch.rebuild.sum()

    def guess(self, model, text, batch):
        """Logits at every position of every caption; the loss ignores most."""
        logits = model.word_head(text[3], model.words.word.weight)  # (B, text_len, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.words.masked_fill(~batch.where, -100).flatten())


OURS, USUAL = Ours(), Usual()
TOLERANCE = 1e-3  # to which both must agree, relatively


def losses(way, model, batch):
    """MIR, ITM and MLM, Eq. 5 to 7."""
    visual, text = way.encode(model, batch.masked, way.caption(batch.tokens))
    return dict(mir=way.rebuild(model, visual, batch), itm=mvlt.itm_loss(model.match(text), batch.matched), mlm=way.guess(model, text, batch))


def differences(model, batch):
    """How far the two ways are apart, dropout aside: {loss or parameter whose gradient is more than rounding: relative difference}."""
    results = []
    for way in (OURS, USUAL):
        twin = copy.deepcopy(model).eval()
        parts = losses(way, twin, batch)
        mvlt.total_loss(parts).backward()
        results.append({**{name: loss.detach() for name, loss in parts.items()}, **{name: p.grad for name, p in twin.named_parameters() if p.grad is not None}})
    ours, usual = results
    mvlt.require(ours.keys() == usual.keys(), "the two ways", "must train the same parameters", sorted(ours.keys() ^ usual.keys()))
    least = 1e-6 * max(value.norm() for value in usual.values())
    return {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in usual.items() if value.norm() > least}


# ---------------------------------------------------------------------------------------------------------------------------------------
# One way, measured in a process of its own: its peak of memory, its allocator and its compiled code are its own


def seconds(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: what memory would carry if nothing were fused and nothing stayed in a cache."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if not operation.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((arguments, keywords, result)) if isinstance(t, torch.Tensor))
        return result


def cost(call):
    """(multiply-adds, bytes) of a call."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        call()
    return counter.get_total_flops() / 2, traffic.bytes


class Runner:
    """One way in one precision: its model, its optimiser, its pairs."""

    def __init__(self, way, precision, device):
        self.way, self.precision, self.device = way, precision, torch.device(device)
        self.ours = isinstance(way, Ours)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def prepare(self, config, size, words=(30, 50)):
        if self.ours:
            evaluation.keep_freed_memory(train.LARGE_TENSOR)  # as train.py, until it reads
        torch.manual_seed(0)
        self.batch = Batch(*(value.to(self.device) for value in make_batch(config, size, words)))
        self.model = mvlt.MVLT(config).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **self.way.optimizer)
        for stage in self.model.stages if self.ours and self.device.type == "cuda" else ():
            stage.compile(dynamic=True)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def step(self, micro_batches=1):
        for part in torch.arange(len(self.batch.images), device=self.device).chunk(micro_batches):
            with self.autocast():
                loss = mvlt.total_loss(losses(self.way, self.model, self.batch.part(part) if micro_batches > 1 else self.batch))
            (loss / micro_batches).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self):
        if dist.is_initialized():
            train.sum_over_processes(self.model, {}, [], False)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def join(self, folder, rank, world):
        """Become one of the processes that share a step."""
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)

    @torch.no_grad()
    def read(self, what, candidates=0):
        """"candidates": one caption against so many pictures, as retrieval by ITM reads them; or the batch's "pictures" or "captions" alone."""
        model, images, tokens = self.model.eval(), self.batch.images, data.trim(self.batch.words)
        if self.ours:
            evaluation.keep_freed_memory()  # as eval.py
        with self.autocast():
            if what == "candidates":
                images = images.repeat(-(-candidates // len(images)), 1, 1, 1)[:candidates]
                model.match(self.way.encode(model, images, self.way.caption(self.batch.words[len(self.batch.words) // 2].expand(candidates, -1)))[1])
            else:
                model.embed_images(images) if what == "pictures" else model.embed_texts(tokens)
        model.train()

    def time(self, what, *arguments):
        return seconds(lambda: getattr(self, what)(*arguments), self.device)

    def memory(self, micro_batches=1):
        """Bytes at the peak of two steps: allocated on the GPU, or resident in this process. (The second step has the optimiser's state.)"""
        self.step(micro_batches), self.step(micro_batches)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if not status.exists():  # no Linux
            return int(1e9 * train.memory(self.device))
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])  # getrusage would count the parent's too

    def largest_batch(self, config, size=64):
        """(pairs, seconds): the largest power of two of pairs whose step a GPU holds, and how long it takes."""
        found = None
        while True:
            try:
                self.prepare(config, size)
                self.step()
                found, size = (size, self.time("step")), 2 * size
            except torch.OutOfMemoryError:
                self.model = self.optimizer = self.batch = None
                return found

    def parts(self, rounds):
        """A step in pieces, each forward and back: {name: (median seconds, multiply-adds, bytes)}."""
        results = {}
        for name, call in self.pieces().items():
            call()  # to warm up
            results[name] = (statistics.median(seconds(call, self.device) for _ in range(rounds)), *cost(call))
        return results

    def pieces(self):
        model, way, batch = self.model, self.way, self.batch
        leaf = lambda x: x.detach().requires_grad_()
        tokens = way.caption(batch.tokens)
        image, text, visual, texts, pieces = batch.masked, model.words(tokens), [], [], {"word input": lambda: [model.words(tokens)]}
        for k, stage in enumerate(model.stages):
            inputs = (leaf(image) if k else image, leaf(text))
            pieces[f"stage {k + 1}"] = lambda stage=stage, inputs=inputs: way.stage(stage, *inputs, tokens != 0)
            with torch.no_grad(), self.autocast():
                image, text = way.stage(stage, *inputs, tokens != 0)
            visual.append(leaf(image))
            texts.append(leaf(text))
        pieces["decoder"] = lambda: [way.rebuild(model, visual, batch)]
        pieces["vocabulary"] = lambda: [way.guess(model, texts, batch)]
        pieces["matching"] = lambda: [model.match(texts)]

        def there_and_back(forward):
            with self.autocast():
                outputs = forward()
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

        return {name: lambda forward=forward: there_and_back(forward) for name, forward in pieces.items()} | {"clip, optimiser": self.update}


RUNNER = None  # of this process


def strict_fp32():
    """On a GPU, convolutions in fp32 would else be of TF32, and products not."""
    torch.backends.cudnn.allow_tf32 = False


def start(*arguments):
    global RUNNER
    strict_fp32()
    RUNNER = Runner(*arguments)
    torch._dynamo.config.recompile_limit = 64  # four stages, with and without a gradient, a picture, a caption


def request(what, *arguments):
    result = getattr(RUNNER, what)(*arguments)
    torch.cuda.empty_cache()  # the others need it
    return result


def child(*arguments):
    return ProcessPoolExecutor(1, mp.get_context("spawn"), start, arguments)


def ask(runner, what, *arguments):
    return runner.submit(request, what, *arguments).result()


# ---------------------------------------------------------------------------------------------------------------------------------------
# What is measured


def race(runners, rounds, *task):
    """Median seconds of one task, {name: seconds}: asked of each in turn, after one turn to warm up."""
    turns = [{name: ask(runner, "time", *task) for name, runner in runners.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in runners}


def product_peak(device, precision, n):
    """
    Multiply-adds per second where nothing stands in the way: a product of two n x n matrices, or the same as a 1 x 1 convolution, if that
    is faster (on a CPU these are two libraries).
    """
    a, b = torch.randn(2, n, n, device=device, dtype=dict(fp32=torch.float32, bf16=torch.bfloat16)[precision])
    pixels = a.view(16, n // 16, 1, n).permute(0, 3, 2, 1)  # channels last
    return n**3 / min(seconds(call, device) for call in 6 * [lambda: a @ b, lambda: F.conv2d(pixels, b[:, :, None, None])])


def copy_rate(device, megabytes):
    """Bytes per second read and written while a large tensor is copied."""
    a, b = torch.zeros(2, megabytes * 2**18, device=device)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(6))


def steps_and_scores(runners, config, size, candidates, rounds, few):
    """Training steps, their memory, and the candidates of one query: {way: {...}}."""
    memory = {}
    for name, runner in runners.items():
        ask(runner, "prepare", config, size)
        memory[name] = ask(runner, "memory")
    steps, scores = race(runners, rounds, "step"), race(runners, few, "read", "candidates", candidates)
    return {name: dict(step_s=steps[name], pictures_per_s=size / steps[name], memory_bytes=memory[name], candidates_s=scores[name]) for name in runners}


def growth(runners, config, size, rounds):
    """Seconds for one pair of a training step as pictures, and then captions, grow."""
    rows = []
    cases = [(side * config.image_size // 2, (30, 50)) for side in (1, 2, 3)] + [(config.image_size, (words, words)) for words in (16, config.text_len)]
    for side, words in cases:
        for runner in runners.values():
            ask(runner, "prepare", replace(config, image_size=side), size, words)
        times = race(runners, rounds, "step")
        rows.append(dict(image_size=side, words=sum(words) // 2, **{name: time / size for name, time in times.items()}))
    return rows


def accumulation(precision, device, config, size, rounds):
    """Our step in 4 micro-batches."""
    with child(OURS, precision, device) as runner:
        ask(runner, "prepare", config, size)
        return dict(memory_bytes=ask(runner, "memory", 4), step_s=race({4: runner}, rounds, "step", 4)[4])


def two_processes(precision, device, config, size, rounds):
    """Seconds of our step when two processes have half of the pairs and half of the cores, or a GPU each. None without a second GPU."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        return None
    members = [child(OURS, precision, f"cuda:{rank}" if device == "cuda" else device) for rank in (0, 1)]
    both = lambda *task: [job.result() for job in [member.submit(request, *task) for member in members]]
    with tempfile.TemporaryDirectory() as folder:
        for job in [member.submit(request, "join", folder, rank, 2) for rank, member in enumerate(members)]:
            job.result()
        both("prepare", config, size // 2)
        times = [max(both("time", "step")) for _ in range(rounds + 1)][1:]
    for member in members:
        member.shutdown()
    return statistics.median(times)


def loader(config, size, products, steps):
    """Pictures per second that the loader alone delivers, and that are decoded when a folder is first opened."""
    with tempfile.TemporaryDirectory() as folder:
        toy.make(folder, products=products, size=config.image_size)
        start = time.perf_counter()
        _, pictures = data.load(folder, "train", config.image_size)
        opened = time.perf_counter()
        for batch in data.Batches(pictures, size, seed=0, start=0, stop=steps, mirror=0.5, shift=3, zoom=0.2):  # as --preset plus
            data.images_to_float(batch["images"])
        return dict(pictures_per_s=steps * size / (time.perf_counter() - opened), decoded_per_s=len(pictures) / (opened - start))


# ---------------------------------------------------------------------------------------------------------------------------------------
# The report


def machine(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def show_ways(ways, candidates):
    first = ways["usual fp32"]
    print(f"\n{'':12}{'ms/step':>8}{'pictures/s':>12}{'times as fast':>15}{'GB':>7}{'share':>7}{f'{candidates} candidates, s':>19}{'times as fast':>15}")
    for name, way in ways.items():
        print(f"{name:12}{1e3 * way['step_s']:8.0f}{way['pictures_per_s']:12.2f}{first['step_s'] / way['step_s']:15.2f}{way['memory_bytes'] / 1e9:7.2f}"
              f"{way['memory_bytes'] / first['memory_bytes']:7.2f}{way['candidates_s']:19.2f}{first['candidates_s'] / way['candidates_s']:15.2f}")


def show_parts(name, parts, size, peak, rate):
    print(f"\n{name + ', one pair':24}{'ms':>8}{'G mult-adds':>13}{'per second':>12}{'MB moved':>10}{'ms at the peak':>16}{'ms at the copy rate':>21}")
    parts = parts | {"in all": [sum(column) for column in zip(*parts.values())]}
    for part, (took, work, moved) in parts.items():
        print(f"  {part:22}{1e3 * took / size:8.2f}{work / size / 1e9:13.3f}{work / took / 1e9:12.1f}{moved / size / 1e6:10.1f}"
              f"{1e3 * work / size / peak:16.2f}{1e3 * moved / size / rate:21.2f}")
    return parts["in all"]


def show_speed(ways, work, peak):
    print()
    for p in peak:
        saved, faster = work[f"usual {p}"] / work[f"ours {p}"], ways[f"usual {p}"]["step_s"] / ways[f"ours {p}"]["step_s"]
        reached = work[f"ours {p}"] / ways[f"ours {p}"]["step_s"] / peak[p]
        print(f"{p}: {faster:.2f} times as fast = {saved:.2f} by less arithmetic x {faster / saved:.2f} by doing it faster; "
              f"{100 * reached:.0f}% of the device's peak")


def show_growth(rows, ways):
    print(f"\nms for one pair in batches of 4{'':4}" + "".join(f"{name:>12}" for name in ways))
    for row in rows:
        print(f"  {row['image_size']:4} px, {row['words']:3} words{'':14}" + "".join(f"{1e3 * row[name]:12.1f}" for name in ways))


def show_rest(results, best, candidates):
    usual, ours, towers, loaded = results["ways"]["usual fp32"], results["ways"][best], results["towers"], results["loader"]
    slow, fast = 1000 * usual["candidates_s"] / candidates, towers["captions"] + 20 * ours["candidates_s"] / candidates
    print(f"\nthe rest is of {best}\nretrieval of one caption among 1000 pictures: {slow:.1f} s the usual way; {fast:.2f} s when the towers choose 20 to read "
          f"({slow / fast:.0f} times as fast, by another computation), after {1e3 * towers['pictures']:.1f} ms for each picture, once")
    if results["largest_batch"]:
        print("the largest batch that fits: {} pairs, {:.3f} s a step".format(*results["largest_batch"]))
    accumulated, shared = results["accumulation"], results["two_processes_s"]
    print(f"at once {1e3 * ours['step_s']:.0f} ms a step, {ours['memory_bytes'] / 1e9:.2f} GB; in 4 micro-batches {1e3 * accumulated['step_s']:.0f} ms, "
          f"{accumulated['memory_bytes'] / 1e9:.2f} GB" + (f"; by two processes {1e3 * shared:.0f} ms" if shared else ""))
    print(f"the loader alone: {loaded['pictures_per_s']:.0f} pictures/s, {loaded['pictures_per_s'] / ours['pictures_per_s']:.1f} times what the model consumes; "
          f"{loaded['decoded_per_s']:.0f} pictures/s when a folder is first opened")


def check(config, device):
    """Both ways compute the same, or there is nothing to compare."""
    torch.manual_seed(0)
    apart = differences(mvlt.MVLT(config).to(device), Batch(*(value.to(device) for value in make_batch(config, 4))))
    apart = {name: apart.pop(name) for name in ("mir", "itm", "mlm")} | {"gradients": max(apart.values())}
    print("both ways agree: relative differences " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    mvlt.require(max(apart.values()) < TOLERANCE, "the two ways", f"must agree to {TOLERANCE}", apart)
    return apart


def main(args):
    strict_fp32()
    device, small = torch.device(args.device), dict(vocab_size=500, depths=(1, 1, 1, 1), dims=(16, 32, 40, 64))
    size, rounds, few, candidates = args.batch_size or 16, 5, 2, 101
    if args.quick:
        rounds, few, candidates = 1, 1, 8
    elif args.device == "cuda":
        size = args.batch_size or 128
    mvlt.require(size > 0 and size % 16 == 0, "--batch-size", "must be a multiple of 16 (parts of it must be alike)", size)
    config = mvlt.Config.preset("nano", **small) if args.quick else mvlt.Config.preset(args.preset)
    with evaluation.autocast(device):
        precisions = ["fp32"] + ["bf16"] * torch.is_autocast_enabled(device.type)
    best = f"ours {precisions[-1]}"
    results = dict(machine=machine(device), date=str(date.today()), batch_size=size, quick=args.quick, config=asdict(config))
    print(f"{results['machine']}, {results['date']}: {config.image_size} px, {config.vocab_size} words, batches of {size} pairs, captions of 30 to 50 words")

    results["differences"] = check(config, device)
    results["peak"] = peak = {p: product_peak(device, p, 256 if args.quick else 2048 if args.device == "cpu" else 8192) for p in precisions}
    results["copy_rate"] = rate = copy_rate(device, 8 if args.quick else 256)
    print(f"the device: {', '.join(f'{peak[p] / 1e9:.0f} G multiply-adds/s in {p}' for p in precisions)}; {rate / 1e9:.1f} GB/s copied")

    runners = {f"{name} {p}": child(way, p, args.device) for p in precisions for name, way in (("usual", USUAL), ("ours", OURS))}
    results["ways"] = steps_and_scores(runners, config, size, candidates, rounds, few)
    show_ways(results["ways"], candidates)
    results["parts"] = {name: ask(runner, "parts", few) for name, runner in runners.items()}
    work = {name: show_parts(name, parts, size, peak[name.split()[1]], rate)[1] for name, parts in results["parts"].items()}
    show_speed(results["ways"], work, peak)
    two = {name: runners[name] for name in ("usual fp32", best)}
    results["growth"] = growth(two, config, 4, few)
    show_growth(results["growth"], two)

    ask(runners[best], "prepare", config, size)
    results["towers"] = {side: race({side: runners[best]}, few, "read", side)[side] / size for side in ("pictures", "captions")}
    results["largest_batch"] = ask(runners[best], "largest_batch", config) if args.device == "cuda" else None
    for runner in runners.values():
        runner.shutdown()
    results["accumulation"] = accumulation(precisions[-1], args.device, config, size, few)
    results["two_processes_s"] = two_processes(precisions[-1], args.device, config, size, few)
    results["loader"] = loader(config, size, 32 if args.quick else 100, 4 if args.quick else 20)
    show_rest(results, best, candidates)
    Path(args.out).write_text(json.dumps(results, indent=1))
    print(f"all of it is in {args.out}")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=tuple(mvlt.PRESETS), default="tiny")
    parser.add_argument("--batch-size", type=evaluation.at_least(1), help="pairs in a step, a multiple of 16 (default: 16 on a CPU, 128 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="everything once, on a very small model")
    parser.add_argument("--out", default="bench.json", metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
    except BrokenProcessPool:
        sys.exit("bench.py: a measuring process has died (out of memory?); what it said stands above")
