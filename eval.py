"""
The paper's tables and figures from a trained run (Sec. 3.3 and 4; Tables 2, 5 and 6; Figs. 5 to 8).

    python eval.py runs/1                                      what the run can do, on the test split of its own data
    python eval.py runs/1 --data shop --tasks retrieval        zero-shot TIR and ITR on a folder of your own
    python eval.py runs/1 --full-gallery                       every product ranked by the towers, the best again by towers and ITM
    torchrun --nproc_per_node=8 eval.py runs/1                 the same numbers, sooner

It prints the tables beside the paper's and writes RUN/results.json (shares such as R@1 lie in [0, 1]), RUN/candidates.json and
RUN/report.html. Letters: Q queries, C candidates of a query (the truth and 100 others), B batch, H and W a picture's sides.

Departures: a tie or a NaN counts against us (the authors list the truth first and stop at ties); recalls are divided by the number of
queries, not by 1000; PSNR is that of pixels in [0, 1] (the authors' is 48 dB higher); a row whose class the run never saw counts as read wrong.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import mvlt
import report
from report import DIRECTIONS

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the shares hidden in Fig. 7; Table 3 (a)
TASKS = {"retrieval": "itm", "recognition": "cr", "generation": "mir"}  # each with the objective that trains a run for it
FIELDS = {"main": "category", "sub": "subcategory"}  # M-CR and S-CR


# ---------------------------------------------------------------------------------------------------------------------------------------
# Metrics


def ranks(scores, truth):
    """
    scores (Q, C), truth (Q,) the column of the right candidate. Returns (Q,) int64: 1 + the number of others that score as high or higher.
    A NaN truth is last, a NaN rival is ahead.
    """
    scores, truth = torch.as_tensor(scores).double(), torch.as_tensor(truth).long()
    return best_ranks(scores, F.one_hot(truth, scores.shape[1]).bool())


def best_ranks(scores, right):
    """As `ranks`, when several candidates may be right: right (Q, C) bool. The rank of the best right one among the wrong ones."""
    best = scores.masked_fill(~right | scores.isnan(), -math.inf).amax(dim=1, keepdim=True)
    ahead = ~right & ((scores >= best) | scores.isnan())
    return 1 + ahead.sum(dim=1)


def recalls(ranks):
    """R@k as shares of the queries, SumR = 100 (R@1 + R@5 + R@10), and the median rank (of an even number, the mean of the middle two)."""
    ranks = np.asarray(ranks)
    result = {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return {**result, "SumR": 100 * sum(result.values()), "median_rank": float(np.median(ranks))}


def mean_and_sd(draws):
    """[{name: value}, ...], one per draw -> {name: mean, ..., "sd": {name: standard deviation, None when there is one draw only}}."""
    names = draws[0].keys()
    sd = {name: statistics.stdev(draw[name] for draw in draws) if len(draws) > 1 else None for name in names}
    return {**{name: statistics.fmean(draw[name] for draw in draws) for name in names}, "sd": sd}


def accuracy(true, predicted):
    return float(np.mean(np.asarray(true) == np.asarray(predicted)))


def macro_f(true, predicted):
    """The mean of the classes' F-measures, 2 TP / (2 TP + FP + FN), over the true and the predicted classes together (as the authors)."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.shape != predicted.shape or true.ndim != 1 or len(true) == 0:
        raise ValueError(f"macro_f: needs two sequences of one length above 0, got shapes {true.shape} and {predicted.shape}")
    classes, ids = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = ids[: len(true)], ids[len(true) :]
    hits = np.bincount(true[true == predicted], minlength=len(classes))
    both = np.bincount(true, minlength=len(classes)) + np.bincount(predicted, minlength=len(classes))  # 2 TP + FP + FN
    return float((2 * hits / both).mean())


def psnr(a, b, where=None):
    """a, b (B, 3, H, W) in [0, 1] -> (B,) dB; where (B, 1, H, W) bool restricts it to those pixels (NaN where it holds none)."""
    error = (a.double() - b.double()) ** 2
    if where is None:
        mse = error.mean(dim=(1, 2, 3))
    else:
        mse = (error * where).sum(dim=(1, 2, 3)) / (error.shape[1] * where.sum(dim=(1, 2, 3)))
    return -10 * mse.log10()


def ssim(a, b):
    """
    a, b (B, 3, H, W) in [0, 1] -> (B,): Wang et al. 2004, Gaussian window of 11 x 11 with sigma 1.5, K 0.01 and 0.03, range 1, population
    covariance, windows that lie wholly within the picture, mean over channels.
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"ssim: pictures must be at least 11 x 11, got {tuple(a.shape[2:])}")
    x = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image):  # (B, 3, H, W) -> (B, 3, H - 10, W - 10), along the columns and then along the rows
        blurred = F.conv2d(F.conv2d(image.flatten(0, 1)[:, None], window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return blurred.view(*image.shape[:2], *blurred.shape[2:])

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean(dim=(1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------------------------
# Candidate lists


def candidates(rows, queries=1000, size=101, seed=0):
    """
    Draw the query products and for each the truth and size - 1 other products of its sub-category; where these are too few, of its main
    category, then of any. No two candidates share a product or a caption (case and spaces apart). Lists depend on (rows, seed) only.
    rows: manifest rows as dicts. Returns [{"query": row number, "candidates": [row numbers, the truth (the query itself) first]}, ...].
    """
    if queries < 1 or size < 2:
        raise ValueError(f"candidates: needs queries of at least 1 and size of at least 2, got {queries} and {size}")
    random = np.random.default_rng(seed)
    shelves = defaultdict(lambda: defaultdict(list))  # shelf -> product -> its row numbers
    for number, row in enumerate(rows):
        for shelf in shelves_of(row):
            shelves[shelf][row["product_id"]].append(number)
    shelves = {shelf: list(products.values()) for shelf, products in shelves.items()}
    products = shelves.get((), [])
    chosen = [products[i] for i in random.permutation(len(products))[:queries]]
    queries = [views[random.integers(len(views))] for views in chosen]
    captions = list(map(data.plain_caption, rows))
    return [{"query": query, "candidates": draw_list(rows, captions, query, shelves, size, random)} for query in queries]


def shelves_of(row):
    """Where to look for a row's rivals, nearest first; () holds every product."""
    category, subcategory = row.get("category"), row.get("subcategory")
    return [(category, subcategory)] * bool(subcategory) + [(category,)] * bool(category) + [()]


def draw_list(rows, captions, query, shelves, size, random):
    found, taken_products, taken_captions = [query], {rows[query]["product_id"]}, {captions[query]}
    for shelf in shelves_of(rows[query]):
        for i in random.permutation(len(shelves[shelf])):
            if len(found) == size:
                return found
            views = [row for row in shelves[shelf][i] if rows[row]["product_id"] not in taken_products and captions[row] not in taken_captions]
            if views:
                row = views[random.integers(len(views))]
                found.append(row)
                taken_products.add(rows[row]["product_id"])
                taken_captions.add(captions[row])
    if len(found) < size:
        raise ValueError(f"candidates: a list needs {size} products with different captions, this split has {len(found)} for row {query}; "
                         "--full-gallery ranks a small split whole")
    return found


def filled(rows, lists):
    """How many lists hold a product from outside the query's sub-category."""
    def outside(entry):
        home = shelves_of(rows[entry["query"]])[0]
        return len(home) < 2 or any(shelves_of(rows[row])[0] != home for row in entry["candidates"])

    return sum(map(outside, lists))


def counts(rows, draws):
    """What the tables say of one way's lists, [lists of a draw, ...]."""
    lists = [entry for draw in draws for entry in draw]
    return {"queries": len(draws[0]), "size": len(lists[0]["candidates"]), "draws": len(draws), "lists": len(lists), "filled": filled(rows, lists)}


def save_candidates(path, draws, rows):
    """
    draws: one {"tir": lists, "itr": lists} per draw, both the same lists -> a JSON list of {"query", "candidates", "draw", "product_id"},
    the last to tell when row numbers have come to mean other products.
    """
    entries = [{**entry, "draw": i, "product_id": rows[entry["query"]]["product_id"]} for i, draw in enumerate(draws) for entry in draw["tir"]]
    with data.whole_file(path) as file:
        file.write(json.dumps(entries).encode())


def read_candidates(path, rows):
    """
    The lists that `save_candidates` or `data.py candidates` wrote, or the authors' pickles: a folder of them, or the folder that holds
    retrieve_TIR and retrieve_ITR. Returns one {"tir": lists, "itr": lists} per draw.
    """
    path = Path(path)
    if path.is_dir():
        two = [path / "retrieve_TIR", path / "retrieve_ITR"]
        tir, itr = [read_pickles(folder if folder.is_dir() else path, rows) for folder in two]
        return [{"tir": check_lists(tir, rows, path), "itr": check_lists(itr, rows, path)}]
    try:
        entries = json.loads(path.read_text())
        draws = defaultdict(list)
        for entry in entries:
            draws[entry.pop("draw", 0)].append({"query": entry.pop("query"), "candidates": entry.pop("candidates"), **entry})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise data.DataError(f"{path}: not a file of candidate lists ({type(error).__name__}: {error})") from None
    return [{"tir": lists, "itr": lists} for lists in (check_lists(draws[draw], rows, path) for draw in sorted(draws) or [0])]


def read_pickles(folder, rows):
    """The authors' form: per query a pickled dict of 101 entries with "img_name", the truth first."""
    number = {Path(row["image"]).name: i for i, row in enumerate(rows)}
    lists = []
    for file in sorted(folder.glob("*.pkl")):
        try:
            names = [str(entry["img_name"]) for entry in data.read_pickle(file).values()]
        except (KeyError, TypeError, AttributeError):
            raise data.DataError(f"{file}: must be a dict of dicts with img_name") from None
        unknown = [name for name in names if name not in number]
        if unknown or not names:
            raise data.DataError(f"{file}: {repr(unknown[0]) + ' is no picture of this split' if unknown else 'names no picture'}")
        found = [number[name] for name in names]
        lists.append({"query": found[0], "candidates": found})
    return lists


def check_lists(lists, rows, path):
    """Lists that cannot be ranked by `retrieval` are an error that names the list and the rule."""
    def rule(entry):
        found = entry["candidates"]
        if not isinstance(found, list) or not all(type(row) is int and 0 <= row < len(rows) for row in found):
            return f"must hold row numbers from 0 to {len(rows) - 1}"
        if len(found) != len(lists[0]["candidates"]) or len(found) < 2 or len(set(found)) < len(found):
            return "must hold as many rows as the others, at least 2, none twice"
        product = rows[found[0]]["product_id"]
        if entry.get("product_id", product) != product:
            return f"was drawn from other rows: its query was product {entry['product_id']!r}, that row is now {product!r}"
        return "must begin with the query" * (found[0] != entry["query"])

    if not lists:
        raise data.DataError(f"{path}: holds no candidate list")
    for number, entry in enumerate(lists):
        if rule(entry):
            raise data.DataError(f"{path}: list {number + 1} {rule(entry)}")
    return lists


# ---------------------------------------------------------------------------------------------------------------------------------------
# Reading a split with a run


class Catalogue(NamedTuple):
    """A split, opened and tokenised once: each distinct picture and caption stands once, however many rows, lists or draws name it."""

    rows: list
    pictures: data.Pictures  # (P, H, W, 3) uint8, on the disk
    tokens: torch.Tensor  # (T, L) int64
    picture_of: torch.Tensor  # (rows,) int64, the row's picture
    caption_of: torch.Tensor  # (rows,) int64, the row's caption

    @classmethod
    def of(cls, rows, pictures, tokenizer, config):
        """From what `data.load` returns."""
        picture_of, caption_of = data.numbered([row["image"] for row in rows]), data.numbered([row["caption"] for row in rows])
        first = [np.unique(of, return_index=True)[1] for of in (picture_of, caption_of)]  # the first row of each
        tokens = data.tokenize([rows[row] for row in first[1]], tokenizer, config.text_len)
        return cls(rows, data.Pictures(pictures.path, pictures.index[first[0]]), tokens, picture_of, caption_of)

    def pairs(self, way, lists):
        """What `pair_scores` reads for Q candidate lists: the (picture, caption) numbers, (Q, C, 2)."""
        found = torch.tensor([entry["candidates"] for entry in lists])
        queries = found[:, :1].expand_as(found)
        pictures, captions = (found, queries) if way == "tir" else (queries, found)
        return torch.stack([self.picture_of[pictures], self.caption_of[captions]], dim=-1)


def load_run(path, device="cpu"):
    """A run folder (best.pt, else last.pt) or a checkpoint file -> (model in eval mode, tokenizer, the run's settings as a dict)."""
    path = Path(path)
    files = [path] if path.is_file() else [file for file in (path / "best.pt", path / "last.pt") if file.is_file()]
    if not files:
        raise data.DataError(f"{path}: no run here (neither best.pt nor last.pt)")
    model, checkpoint = mvlt.load(files[0]), mvlt.read(files[0])
    if len(model.vocabulary) != model.config.vocab_size:
        raise data.DataError(f"{files[0]}: carries {len(model.vocabulary)} words, its vocab_size is {model.config.vocab_size}")
    run = {**checkpoint.get("run", {}), "step": checkpoint.get("step"), "checkpoint": files[0].name}
    return model.to(device), data.Tokenizer(model.vocabulary), run


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def autocast(device):
    """bf16 where the device gains from it: a GPU that has it, or a CPU with instructions for it."""
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()
        gains = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    else:
        gains = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=gains)


@contextmanager
def at_rest(model):
    """Read with the model: no dropout, no gradients; afterwards it is as it was. Yields its device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def floats(pictures, numbers, device):
    """Pictures by number -> (B, 3, H, W) floats in [0, 1] on the device."""
    chosen = torch.from_numpy(np.ascontiguousarray(pictures[np.asarray(numbers)]))
    return data.images_to_float(chosen.to(device).permute(0, 3, 1, 2))


def deal_out(batches, compute, width, device, what=None):
    """
    compute(batch) -> (len(batch), width) for every batch of numbers, the batches dealt out over the processes. Returns (all, width)
    float64, the same in every process and for any number of them. `what` names the progress bar.
    """
    result = torch.zeros(sum(map(len, batches)), width, dtype=torch.float64)
    for batch in tqdm(batches[rank() :: world()], desc=what, unit="batch", disable=None if what and rank() == 0 else True):
        result[batch] = compute(batch).double().cpu()
    if world() > 1:
        result = result.to(device)
        dist.all_reduce(result)
        result = result.cpu()
    return result


def by_length(tokens, batch_size, captions=slice(None)):
    """Batches of numbers (of captions, or of pairs by the captions they name), short ones first, so that few carry padding."""
    return (tokens != 0).sum(dim=1)[captions].argsort(stable=True).split(batch_size)


def pair_scores(model, pictures, tokens, pairs, batch_size=256, what=None):
    """
    The fusion encoder's verdict: pairs (n, 2) of (picture number, caption number) -> (n,) float64, match - mismatch logit.
    A pair that occurs twice is read once. Under torchrun every process must call it; the work is shared.
    """
    pairs, where = torch.unique(pairs, dim=0, return_inverse=True)

    def compute(batch):
        images, words = floats(pictures, pairs[batch, 0], device), data.trim(tokens[pairs[batch, 1]]).to(device)
        with autocast(device):
            _, text = model.encode(images, words)
        logits = model.match([t.float() for t in text])  # in bf16 close scores would tie
        return (logits[:, 1] - logits[:, 0])[:, None]

    with at_rest(model) as device:
        return deal_out(by_length(tokens, batch_size, pairs[:, 1]), compute, 1, device, what)[where, 0]


def tower_vectors(model, pictures, tokens, batch_size=256, what=None):
    """Each picture and each caption read once, alone: unit vectors (P, embed_dim) and (T, embed_dim)."""
    def picture_vectors(batch):
        with autocast(device):
            return model.embed_images(floats(pictures, batch, device))

    def caption_vectors(batch):
        with autocast(device):
            return model.embed_texts(data.trim(tokens[batch]).to(device))

    width, numbers = model.config.embed_dim, torch.arange(len(pictures))
    with at_rest(model) as device:
        images = deal_out(numbers.split(batch_size), picture_vectors, width, device, what and f"{what}: pictures")
        return images, deal_out(by_length(tokens, batch_size), caption_vectors, width, device, what and f"{what}: captions")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Retrieval, zero-shot (Task 1 and 2)


def retrieval(model, catalogue, draws, batch_size=256, best=20, towers=True, what=None):
    """
    TIR and ITR over candidate lists: draws is one {"tir": lists, "itr": lists} per draw. By the fusion encoder ("tir", "itr") and, with
    `towers`, by the towers alone ("tir_towers", ...) and by both together among the towers' `best` ("tir_reranked", ...).
    Returns the results, the fusion encoder's scores, {"tir": [(Q, C) per draw], "itr": [...]}, and in the same form the scores that put
    answers in order: towers and ITM together, or without towers ITM's.
    """
    pairs = {way: [catalogue.pairs(way, draw[way]) for draw in draws] for way in DIRECTIONS}
    every = [pair for way in DIRECTIONS for pair in pairs[way]]  # (Q, C, 2) each; read at once, so that no pair is read twice
    flat = pair_scores(model, catalogue.pictures, catalogue.tokens, torch.cat([pair.flatten(0, 1) for pair in every]), batch_size, what)
    parts = iter(flat.split([pair[..., 0].numel() for pair in every]))
    scores = {way: [next(parts).view(pair.shape[:2]) for pair in pairs[way]] for way in DIRECTIONS}
    measured = lambda draws: mean_and_sd([recalls(best_ranks(s, first_is_right(s))) for s in draws])
    results, order = {way: measured(scores[way]) for way in DIRECTIONS}, scores
    if towers:
        images, texts = tower_vectors(model, catalogue.pictures, catalogue.tokens, batch_size, what and f"{what}, towers")
        for way in DIRECTIONS:
            near = [(images[pair[..., 0]] * texts[pair[..., 1]]).sum(dim=-1).float() for pair in pairs[way]]
            results[f"{way}_towers"] = measured(near)
            order = {**order, way: [in_two_steps(n, both(model, n, s), best) for n, s in zip(near, scores[way])]}
            results[f"{way}_reranked"] = measured(order[way])
    return results, scores, order


def as_logit(model, near):
    """A cosine of the towers times the learnt scale, as the contrast reads it."""
    return near * model.log_scale.detach().clamp(max=math.log(100)).exp().cpu()


def both(model, near, scores):
    """What towers (cosines) and ITM (match - mismatch logits) say together. Half of ITM, for both read the same things: see EXPERIMENTS.md."""
    return as_logit(model, near) + scores / 2


def first_is_right(scores):
    """Candidate lists begin with the truth: (Q, C) bool."""
    return (torch.arange(scores.shape[1]) == 0).expand(scores.shape)


def shortlist(near, right, best):
    """The columns of the `best` nearest candidates, (Q, best); a tie or a NaN counts against the right ones."""
    near = near.double() - 1e-12 * right  # a tie is lost
    near = torch.where(near.isnan(), torch.where(right, -math.inf, math.inf), near)
    return near.topk(min(best, near.shape[1]), dim=1).indices


def in_two_steps(near, scores, best):
    """
    One score for both steps, (Q, C), the truth first: the towers (near) choose the `best`, `scores` puts those in order, the rest stay
    behind as the towers have them.
    """
    chosen = torch.zeros(near.shape, dtype=torch.bool).scatter(1, shortlist(near, first_is_right(near), best), True)
    return torch.where(chosen, scores.double(), near.double() - 1e6)


def ranks_in_two_steps(first, scores, right):
    """The rank within the shortlist, scores and right (Q, best), where that holds a right one; else the first rank, which is beyond it."""
    return torch.where(right.any(dim=1), best_ranks(scores, right), first)


def full_gallery(model, catalogue, queries=None, best=20, seed=0, batch_size=256, what=None):
    """
    Rank every distinct picture for a caption, and every distinct caption for a picture, by the towers, and the `best` of them again by towers and ITM
    together. Right is whatever belongs to a product of the query's, so any of a picture's captions counts (COCO 5K). `queries`: that many, else all. With
    `best` 0 the towers answer alone.
    """
    images, texts = tower_vectors(model, catalogue.pictures, catalogue.tokens, batch_size, what and f"{what}, towers")
    owner = data.numbered([row["product_id"] for row in catalogue.rows])
    picture_owner = torch.unique(torch.stack([catalogue.picture_of, owner], dim=1), dim=0)
    caption_owner = torch.unique(torch.stack([catalogue.caption_of, owner], dim=1), dim=0)
    sides = {"tir": (texts, images, caption_owner, picture_owner), "itr": (images, texts, picture_owner, caption_owner)}
    results = {"pictures": len(images), "captions": len(texts), "best": best}
    results.update(towers_read=len(images) + len(texts), pairs_read=0, pairs_whole=0)  # the cost; pairs_whole: without the towers
    for way, (asking, answering, asking_owner, answering_owner) in sides.items():
        order = torch.randperm(len(asking), generator=data.generator(seed, "gallery", way))[:queries]
        first, short, near, right = nearest(asking[order], answering, order, asking_owner, answering_owner, best)
        results[f"{way}_towers"] = recalls(first)
        results["pairs_whole"] += len(order) * len(answering)
        if not best:
            continue
        asked = order[:, None].expand_as(short)
        pairs = torch.stack([short, asked] if way == "tir" else [asked, short], dim=-1).flatten(0, 1)
        scores = pair_scores(model, catalogue.pictures, catalogue.tokens, pairs, batch_size, what and f"{what}, {way}").view(short.shape)
        results[way] = recalls(ranks_in_two_steps(first, both(model, near, scores), right))
        results["pairs_read"] += len(torch.unique(pairs, dim=0))
    return results


def nearest(vectors, gallery, numbers, asking_owner, answering_owner, best, chunk=256):
    """
    The towers' ranks (Q,), shortlists (Q, best), their cosines and which of those are right. Owners are (n, 2) pairs of (number, product): an answer is
    right when it shares a product with the query of that number.
    """
    products, answers = defaultdict(list), defaultdict(list)
    for number, product in asking_owner.tolist():
        products[number].append(product)
    for number, product in answering_owner.tolist():
        answers[product].append(number)
    results = []
    for part, asked in zip(vectors.split(chunk), numbers.split(chunk)):
        near = (part @ gallery.T).float()  # equal vectors stay tied, whatever the order of the sum
        right = torch.zeros(near.shape, dtype=torch.bool)
        for i, number in enumerate(asked.tolist()):
            right[i, [answer for product in products[number] for answer in answers[product]]] = True
        short = shortlist(near, right, best)
        results.append((best_ranks(near, right), short, near.gather(1, short), right.gather(1, short)))
    return [torch.cat(parts) for parts in zip(*results)]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Recognition (Task 3) and generation (Task 4)


def read_classes(model, catalogue, empty, modality="both", batch_size=256, what=None):
    """
    The classes the run gives each row: (rows, 2) int64, main and sub-category.
    modality: what it reads, "both", "image" (with the `empty` caption) or "text".
    """
    pairs, where = torch.unique(torch.stack([catalogue.picture_of, catalogue.caption_of], dim=1), dim=0, return_inverse=True)
    tokens = torch.tensor(empty).expand(len(pairs), -1) if modality == "image" else catalogue.tokens[pairs[:, 1]]

    def compute(batch):
        images = None if modality == "text" else floats(catalogue.pictures, pairs[batch, 0], device)
        with autocast(device):
            _, text = model.encode(images, data.trim(tokens[batch]).to(device))
        return torch.stack([logits.argmax(dim=1) for logits in model.recognise([t.float() for t in text])], dim=1)

    with at_rest(model) as device:
        return deal_out(by_length(tokens, batch_size), compute, 2, device, what)[where].long()


def true_classes(rows, field, names):
    """The rows' class ids, -1 for a row without one; a class unknown to the run gets an id of its own, which no prediction can hit."""
    found = {row.get(field) or "" for row in rows} - {""}
    if not found:
        raise data.DataError(f"{field}: no row of this split has one, which recognition needs")
    unknown = sorted(found - set(names))
    if len(unknown) == len(found):
        raise data.DataError(f"{field}: the run knows none of this split's classes ({unknown[0]!r}, ...; the run knows {names[0]!r}, ...)")
    ids = {name: i for i, name in enumerate([*names, *unknown])}
    return np.array([ids.get(row.get(field), -1) for row in rows])


def recognition(rows, labels, predicted):
    """
    Accuracy, macro-F and SumC = 100 (accuracy + macro-F) of M-CR ("main") and S-CR ("sub"), over the rows that have a class; unseen: those
    of classes the run never saw.
    """
    results = {}
    for column, (part, field) in enumerate(FIELDS.items()):
        true = true_classes(rows, field, labels[field])
        true, guessed = true[true >= 0], predicted[true >= 0, column]
        a, f = accuracy(true, guessed), macro_f(true, guessed)
        unseen = int((true >= len(labels[field])).sum())
        results[part] = {"accuracy": a, "macro_f": f, "SumC": 100 * (a + f), "rows": len(true), "classes": len(np.unique(true)), "unseen": unseen}
    return results


def confusion(true, predicted, names, largest=8):
    """(names of the largest classes, counts): counts[t][p] rows of the t-th class read as the p-th, the last column as any other."""
    size = np.bincount(true[true >= 0], minlength=len(names))[: len(names)]
    classes = [c for c in np.argsort(-size, kind="stable")[:largest] if size[c]]
    counts = [[int(((true == t) & (predicted == p)).sum()) for p in classes] for t in classes]
    return [names[c] for c in classes], [row + [int(size[t]) - sum(row)] for row, t in zip(counts, classes)]


def hide(images, numbers, style, ratio, unit, seed=0):
    """Mask each picture by a draw that depends on its number alone. Returns the masked pictures and hidden (B, 1, H, W) bool."""
    drawn = [mvlt.mask_images(image[None], style, ratio, unit, data.generator(seed, "hide", int(n))) for image, n in zip(images, numbers)]
    return [torch.cat(parts) for parts in zip(*drawn)]


def rebuild(model, masked, tokens):
    """The whole pictures again, (B, 3, H, W) in [0, 1], from what is left of them and their captions."""
    with autocast(masked.device):
        visual, _ = model.encode(masked, tokens)
        return model.reconstruct(visual).float().clamp(0, 1)


def fill_with_mean(images, hidden):
    """The floor: every hidden pixel takes the mean colour of the picture's visible ones."""
    seen = ~hidden
    mean = (images * seen).sum(dim=(2, 3), keepdim=True) / seen.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(hidden, mean, images)


def generation(model, catalogue, style="random", ratio=0.5, unit=16, batch_size=256, what=None):
    """
    PSNR and SSIM of the rebuilt pictures, each hidden by the same draw every time: of the picture as the model makes it, over the hidden
    pixels alone, and "pasted" (the visible pixels kept, as the mean-colour floor keeps them). A perfect picture counts 100 dB.
    """
    names = ("psnr", "ssim", "psnr_hidden", "psnr_pasted", "ssim_pasted", "floor_psnr", "floor_ssim", "floor_psnr_hidden")
    first = np.unique(catalogue.picture_of, return_index=True)[1]  # each picture's first row, whose caption it gets
    tokens = catalogue.tokens[catalogue.caption_of[first]]

    def compute(batch):
        images = floats(catalogue.pictures, batch, device)
        masked, hidden = hide(images, batch, style, ratio, unit)
        rebuilt = rebuild(model, masked, data.trim(tokens[batch]).to(device))
        pasted, floor = torch.where(hidden, rebuilt, images), fill_with_mean(images, hidden)
        values = [psnr(rebuilt, images), ssim(rebuilt, images), psnr(rebuilt, images, hidden), psnr(pasted, images), ssim(pasted, images),
                  psnr(floor, images), ssim(floor, images), psnr(floor, images, hidden)]
        return torch.stack(values, dim=1).clamp(max=100)

    with at_rest(model) as device:
        means = deal_out(by_length(tokens, batch_size), compute, len(names), device, what).mean(dim=0)
    return {**dict(zip(names, means.tolist())), "style": style, "ratio": ratio, "unit": unit, "pictures": len(tokens)}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Figures 5 to 8


def retrieval_figure(catalogue, draw, scores, order, shown=4, answers=5):
    """
    Fig. 5: the first queries of a draw with their best answers by `order`, and ITM's scores of these. A tie with the truth is shown as it is
    counted, against us.
    """
    def item(row, way):
        return catalogue.rows[row]["caption"] if way == "text" else catalogue.pictures[int(catalogue.picture_of[row])]

    figure = []
    for way, (asked, answered) in {"tir": ("text", "picture"), "itr": ("picture", "text")}.items():
        key = order[way][:shown]
        right = first_is_right(key)
        for entry, columns, s, place in zip(draw[way], shortlist(key, right, answers).tolist(), scores[way], best_ranks(key, right).tolist()):
            best = [{"item": item(entry["candidates"][c], answered), "score": s[c].sigmoid().item(), "match": c == 0} for c in columns]
            figure.append({"way": DIRECTIONS[way], "query": item(entry["query"], asked), "rank": place, "answers": best})
    return figure


def recognition_figure(catalogue, labels, predicted, shown=8):
    """Fig. 6: rows read right and rows with a class read wrong, evenly spread, and the confusion among the largest classes."""
    rows = catalogue.rows
    true = np.stack([true_classes(rows, field, labels[field]) for field in FIELDS.values()], axis=1)
    right, known = (true == predicted).all(axis=1), (true >= 0).all(axis=1)

    def example(i):
        guess = [labels[field][predicted[i, column]] for column, field in enumerate(FIELDS.values())]
        truth = [rows[i][field] for field in FIELDS.values()]
        return {"picture": catalogue.pictures[int(catalogue.picture_of[i])], "caption": rows[i]["caption"], "truth": truth, "guess": guess}

    def examples(which):
        numbers = np.flatnonzero(which)
        return [example(i) for i in numbers[:: -(-len(numbers) // shown) or 1]]

    tables = {field: confusion(true[:, column], predicted[:, column], labels[field]) for column, field in enumerate(FIELDS.values())}
    return {"right": examples(right), "wrong": examples(~right & known), "confusion": tables}


def generation_figures(model, catalogue, style, ratio, unit, shown=6):
    """Fig. 7 and Fig. 8: the original pictures, and (hidden, rebuilt) at several "ratios" and in the four "styles"."""
    rows = torch.linspace(0, len(catalogue.rows) - 1, min(shown, len(catalogue.rows))).long()
    numbers, tokens = catalogue.picture_of[rows], data.trim(catalogue.tokens[catalogue.caption_of[rows]])

    def bytes_of(images):
        return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()

    def shown_with(style, ratio):
        masked, hidden = hide(images, numbers, style, ratio, unit)
        return bytes_of(images.masked_fill(hidden, 0.5)), bytes_of(rebuild(model, masked, tokens.to(device)))

    with at_rest(model) as device:
        images = floats(catalogue.pictures, numbers, device)
        ratios = {f"{100 * r:g}% hidden": shown_with(style, r) for r in RATIOS}
        styles = {name: shown_with(name, ratio) for name in mvlt.MASK_STYLES}
    return {"original": bytes_of(images), "ratios": ratios, "styles": styles}


# ---------------------------------------------------------------------------------------------------------------------------------------
# The command


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one checkpoint file")
    parser.add_argument("--data", metavar="DIR", help="the data (default: the run's own)")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)} (default: what the run was trained for; with --full-gallery, without the lists of retrieval)")
    parser.add_argument("--queries", type=at_least(1), metavar="N", help="query products (default: 1000; with --full-gallery, all)")
    parser.add_argument("--draws", type=at_least(1), default=5, metavar="N", help="draws of the candidate lists, of seeds seed, seed + 1, ...")
    parser.add_argument("--candidates", metavar="FILE", help="lists to read: a candidates.json, or the authors' folder of pickles")
    parser.add_argument("--full-gallery", action="store_true", help="rank the whole split by the towers, and the best again by towers and ITM together")
    parser.add_argument("--best", type=at_least(1), default=20, metavar="N", help="how many of the towers' best are ranked again, by towers and ITM together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be read, and say which")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: RUN)")
    args = parser.parse_args(arguments)
    args.tasks = args.tasks and args.tasks.split(",")
    for task in args.tasks or []:
        if task not in TASKS:
            parser.error(f"--tasks must name {', '.join(TASKS)}, got {task!r}")
    return args


def at_least(least):
    """What argparse makes of a flag's text: a whole number, `least` or more."""

    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return value

    return number


def keep_freed_memory(largest=1 << 30):
    """
    Let glibc keep the tensors up to so many bytes that are freed, instead of giving them back and having every page of the next ones cleared
    by the kernel: a fifth off a training step on a CPU, two fifths off reading. Elsewhere there is nothing to do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-3, largest)  # M_MMAP_THRESHOLD: below this, memory comes from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: what may lie free at its end


def join_processes(device):
    """Under torchrun, meet the other processes. Returns this process's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise data.DataError(f"--device: cuda needs a GPU for each process, this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # train.py's demo has met them already
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while the first decodes the pictures
    return torch.device(device)


def outside_cause(error, remedy):
    """What a RuntimeError of torch means to a person, "" where it can only be a mistake in this program."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full; {remedy} may help"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process of this run has ended, so this one ends too; the other's own message says why"
    return str(error) if "DataLoader worker" in str(error) else ""


def first_then_others(work):
    """The first process does it, the others after it, when what it leaves on the disk is there."""
    result = work() if rank() == 0 else None
    if world() > 1:
        dist.barrier()
    return work() if rank() > 0 else result


def check_fit(catalogue, tokenizer):
    """A run reads only captions written in its words."""
    words = catalogue.tokens[~torch.isin(catalogue.tokens, torch.tensor([tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id]))]
    unknown = (words == tokenizer.unk_id).double().mean().item()
    if unknown > 0.5:
        raise data.DataError(f"vocabulary: {100 * unknown:.0f}% of this split's words are unknown to the run, at most half may be")


def draw_all(args, rows):
    """One {"tir": lists, "itr": lists} per draw, from --candidates or drawn."""
    if args.candidates:
        return read_candidates(args.candidates, rows)
    products = len({row["product_id"] for row in rows})
    wanted = args.queries or 1000
    if products < wanted and rank() == 0:
        print(f"queries: {wanted} asked for, the split has {products} products; each is a query")
    lists = [candidates(rows, wanted, 101, args.seed + draw) for draw in range(args.draws)]
    return [{"tir": drawn, "itr": drawn} for drawn in lists]


def evaluate(args, model, tokenizer, run, catalogue):
    """Every task asked for -> (results, figures)."""
    objectives = run.get("objectives", "mir,itm,mlm,itc").split(",")  # what a checkpoint does not say is taken to be so
    if args.full_gallery and "itc" not in objectives:
        raise data.DataError(f"--full-gallery: needs the towers, this run's objectives are {','.join(objectives)}")
    lists = not args.full_gallery
    tasks = args.tasks or [task for task, needed in TASKS.items() if needed in objectives and (lists or task != "retrieval")]
    if not (tasks or args.full_gallery):
        raise data.DataError(f"--tasks: of {', '.join(TASKS)} this run was trained for none, its objectives are {','.join(objectives)}; --full-gallery asks its towers")
    if "recognition" in tasks:
        check_classes(model, catalogue.rows)  # before hours of reading
    results, figures = {}, {}
    if "retrieval" in tasks:
        measure_retrieval(args, model, run, catalogue, results, figures)
    if args.full_gallery:
        best = args.best if "itm" in objectives else 0
        results["full_gallery"] = full_gallery(model, catalogue, args.queries, best, args.seed, args.batch_size, "full gallery")
    if "recognition" in tasks:
        measure_recognition(args, model, tokenizer.encode(""), run.get("modality", "both"), catalogue, results, figures)
    if "generation" in tasks:
        mask = {"style": run.get("mask_style", "random"), "ratio": run.get("mask_ratio", 0.5), "unit": run.get("mask_unit", 16)}
        results["generation"] = generation(model, catalogue, **mask, batch_size=args.batch_size, what="generation")
        figures["generation"] = generation_figures(model, catalogue, **mask)
    return results, figures


def check_classes(model, rows):
    if not (model.labels and model.config.n_category and model.config.n_subcategory):
        raise data.DataError("recognition: this run has no class heads; train them with train.py --task recognise --from RUN")
    for field in FIELDS.values():
        true_classes(rows, field, model.labels[field])


def measure_retrieval(args, model, run, catalogue, results, figures):
    towers = "itc" in run.get("objectives", "itc").split(",")  # without the contrast the towers are untrained
    draws = draw_all(args, catalogue.rows)
    results["retrieval"], scores, order = retrieval(model, catalogue, draws, args.batch_size, args.best, towers, what="retrieval")
    results["candidates"] = {way: {**counts(catalogue.rows, [draw[way] for draw in draws]), "best": args.best} for way in DIRECTIONS}
    first = lambda draws: {way: s[0] for way, s in draws.items()}
    figures["draws"], figures["retrieval"] = draws, retrieval_figure(catalogue, draws[0], first(scores), first(order))


def measure_recognition(args, model, empty, modality, catalogue, results, figures):
    """As the run was trained to read, and when that is both, also from the picture alone."""
    names = {"both": "picture and caption", "image": "the picture alone", "text": "the caption alone"}
    read = {way: read_classes(model, catalogue, empty, way, args.batch_size, f"recognition, {names[way]}").numpy()
            for way in ((modality, "image") if modality == "both" else (modality,))}
    scored = {names[way]: recognition(catalogue.rows, model.labels, predicted) for way, predicted in read.items()}
    results["recognition"] = {**scored.pop(names[modality]), "reads": names[modality], "also": scored}
    figures["recognition"] = recognition_figure(catalogue, model.labels, read[modality])


def about(args, model, run, catalogue, folder):
    """What was measured on what, for results.json and the report's first paragraph."""
    c, rows = model.config, catalogue.rows
    trained = {"run": str(args.run), "checkpoint": run["checkpoint"], "step": run["step"], "task": run.get("task"), "preset": run.get("preset"),
               "trained_on": Path(str(run.get("data"))).name, "parameters": sum(p.numel() for p in model.parameters()),
               "image_size": c.image_size, "text_len": c.text_len, "vocab_size": c.vocab_size}
    measured = {"data": Path(folder).resolve().name, "split": args.split, "seed": args.seed, "rows": len(rows),
                "products": len({row["product_id"] for row in rows}), "pictures": len(catalogue.pictures), "captions": len(catalogue.tokens)}
    return {**trained, **measured}


def plain(value):
    """For JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args):
    keep_freed_memory()
    device = join_processes(args.device)
    model, tokenizer, run = load_run(args.run, device)
    folder = args.data or run.get("data")
    if not folder:
        raise data.DataError("--data: this run does not say which data it was trained on")
    opened = first_then_others(lambda: data.load(folder, args.split, model.config.image_size, run.get("fit", "stretch"), args.skip_bad))
    catalogue = Catalogue.of(*opened, tokenizer, model.config)
    check_fit(catalogue, tokenizer)
    home = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    out = Path(args.out or home)
    out.mkdir(parents=True, exist_ok=True)
    results, figures = evaluate(args, model, tokenizer, run, catalogue)
    if rank() == 0:
        results = {**results, "about": about(args, model, run, catalogue, folder)}
        found = report.tables(results)
        print("\n".join(map(report.as_text, found)))
        if "draws" in figures and not args.candidates:
            save_candidates(out / "candidates.json", figures["draws"], catalogue.rows)
        with data.whole_file(out / "results.json") as file:
            file.write(json.dumps(plain(results), indent=1, allow_nan=False).encode())
        with data.whole_file(out / "report.html") as file:
            file.write(report.page(results["about"], found, figures, report.read_log(home / "log.jsonl")).encode())
        print(f"\n{out / 'results.json'}\n{out / 'report.html'}")


if __name__ == "__main__":
    arguments = parse()
    try:
        main(arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (data.DataError, ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted")
    except RuntimeError as error:
        if not (cause := outside_cause(error, f"a --batch-size below {arguments.batch_size}")):
            raise
        sys.exit(f"eval.py: {cause}")
