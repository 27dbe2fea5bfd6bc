"""
The paper's tables and figures from one trained run or several (Sec. 3.3 and 4; Tables 2, 5 and 6; Figs. 5 to 8).

    python eval.py runs/1                        what the run was trained for, on the test split of its own data
    python eval.py runs/1 runs/2 --data shop     two runs of any models side by side, on the same candidate lists
    python eval.py runs/1 --full-gallery         the towers rank every picture and caption, ITM orders the best again
    python eval.py --draw-lists shop             write the candidate lists of a folder's test split
    torchrun --nproc_per_node=8 eval.py runs/1   the same numbers, sooner

It prints the tables and writes results.json (shares such as R@1 lie in [0, 1]), report.html and, where it drew lists,
candidates.json. The paper's numbers stand beside ours only on the paper's own data sets.

Letters: n rows of the split, Q queries, C candidates of a query (the truth and 100 others), B batch, E width of the
towers' vectors, H and W a picture's sides. Pictures and captions go by row numbers: a pair is (the row whose picture is
read, the row whose caption is read). Rows may share a picture or a caption; it is then read once.

A row whose class the run never saw counts as an error. Other departures are those of extras/metrics.py.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from extras import captions, figures, lists, readers, report, runtime, weights
from extras.lists import WAYS, candidates
from extras.metrics import (
    accuracy,
    best_ranks,
    macro_f,
    mean_and_sd,
    psnr,
    ranks,  # noqa: F401 (for those who import eval)
    recalls,
    ssim,
)
from extras.runtime import UserError, quoted
from mvlt import capped_scale

TASKS = {  # task -> (objectives, any of which trains a run for it; the method that does it)
    "retrieval": (("itm", "itc"), "score"),
    "recognition": (("cr",), "classify"),
    "generation": (("mir",), "rebuild"),
    "captioning": (("caption",), "caption"),
    "pretext": (("rr", "jps", "cp", "g2cm", "b2cm"), "pretext"),
    "full_gallery": (("itc", "itm"), "score"),
}
FIELDS = ("category", "subcategory")  # M-CR and S-CR
READS = {"both": "picture and caption", "image": "the picture alone", "text": "the caption alone"}


# ----------------------------------------------------------------------------------------------------------------------
# Reading a split with a model, shared out over the processes


def first_rows(ids):
    """(n,) int64: for every row, the first row with the same id."""
    _, first, same = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    return torch.from_numpy(first[same])


def share_out(batches, compute, width, device, what=None):
    """
    compute(batch) -> (len(batch), width) for every batch of numbers; each process computes some of the batches. Returns
    (all, width) float64, the same in every process and for any number of them. `what` names the progress bar.
    """
    result = torch.zeros(sum(map(len, batches)), width, dtype=torch.float64)
    index, world = runtime.process_index(), runtime.world()
    quiet = None if what and index == 0 else True  # None: a bar where there is a terminal
    for batch in tqdm(batches[index::world], desc=what, unit="batch", disable=quiet):
        result[batch] = compute(batch).double().cpu()
    return runtime.sum_over_processes(result.to(device)).cpu()


def by_length(tokens, batch_size):
    """Batches of numbers, short captions first, so that few captions carry padding."""
    return (tokens != 0).sum(dim=1).argsort(stable=True).split(batch_size)


def pair_scores(model, split, pairs, batch_size=256, what=None):
    """The fusion encoder's match - mismatch logits: pairs (..., 2) of rows -> (...) float64. Each is read once."""
    pictures, texts = first_rows(split.pictures.index), first_rows(split.captions)
    named = torch.stack([pictures[pairs[..., 0]], texts[pairs[..., 1]]], dim=-1).view(-1, 2)
    distinct, where = torch.unique(named, dim=0, return_inverse=True)
    tokens = split.tokens[distinct[:, 1]]
    reads_apart = hasattr(model, "score_features")  # as Kaleido-BERT does; MVLT and VLMo fuse from the first block

    def score(batch):
        pictures, which = torch.unique(distinct[batch, 0], return_inverse=True)
        images, words = split.images(pictures, device), data.trim(tokens[batch]).to(device)
        with runtime.precision_of(model):
            if reads_apart:
                return model.score_features(*(part[which] for part in model.look_at(images)), words)[:, None]
            return model.score(images[which], words)[:, None]

    in_order = torch.arange(len(distinct)).split(batch_size)  # the captions of a picture are neighbours
    batches = in_order if reads_apart else by_length(tokens, batch_size)
    with runtime.evaluating(model) as device:
        scores = share_out(batches, score, 1, device, what)
    return scores[where, 0].view(pairs.shape[:-1])


class Towers(NamedTuple):
    """The towers' unit vectors of the distinct pictures and captions, and the number of each row's own among them."""

    images: torch.Tensor  # (pictures, E)
    picture_of: torch.Tensor  # (n,)
    texts: torch.Tensor  # (captions, E)
    caption_of: torch.Tensor  # (n,)


def read_towers(model, split, batch_size=256, what=None, limit=None):
    """The Towers of the first `limit` rows (default: all). Each picture and each caption is read once, alone."""
    pictures, picture_of = torch.unique(first_rows(split.pictures.index[:limit]), return_inverse=True)
    texts, caption_of = torch.unique(first_rows(split.captions[:limit]), return_inverse=True)
    tokens = split.tokens[texts]

    def embed_pictures(batch):
        with runtime.precision_of(model):
            return model.embed_images(split.images(pictures[batch], device))

    def embed_captions(batch):
        with runtime.precision_of(model):
            return model.embed_texts(data.trim(tokens[batch]).to(device))

    width, in_order = model.config.embed_dim, torch.arange(len(pictures)).split(batch_size)
    with runtime.evaluating(model) as device:
        images = share_out(in_order, embed_pictures, width, device, what and f"{what}: pictures")
        words = share_out(by_length(tokens, batch_size), embed_captions, width, device, what and f"{what}: captions")
    return Towers(images, picture_of, words, caption_of)


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval, zero-shot (Tasks 1 and 2)


class Questions(NamedTuple):
    """
    Q queries and the C candidates of each, as rows. Text to picture ("tir"): the caption of a query's row asks for the
    pictures of the candidates' rows; picture to text ("itr"): the other way round.
    """

    way: str
    queries: torch.Tensor  # (Q,)
    candidates: torch.Tensor  # (Q, C)
    right: torch.Tensor  # (Q, C) bool

    def pairs(self):
        """(Q, C, 2): whose picture is read with whose caption."""
        queries = self.queries[:, None].expand_as(self.candidates)
        sides = (self.candidates, queries) if self.way == "tir" else (queries, self.candidates)
        return torch.stack(sides, dim=-1)

    def cut(self, columns):
        """The same queries with these candidates alone: columns (Q, c)."""
        return self._replace(candidates=self.candidates.gather(1, columns), right=self.right.gather(1, columns))


def from_lists(way, entries):
    """Candidate lists, in which the truth stands first -> Questions."""
    found = torch.tensor([entry["candidates"] for entry in entries])
    right = (torch.arange(found.shape[1]) == 0).expand(found.shape)
    return Questions(way, found[:, 0], found, right)


def from_gallery(split, way, queries=None, seed=0):
    """
    Every distinct caption asks for all distinct pictures, or the other way round; with `queries`, that many ask.
    Right is whatever belongs to a product of the query's, so any of a picture's captions counts (COCO 5K).
    """
    pictures, texts = first_rows(split.pictures.index), first_rows(split.captions)
    asking, answering = (texts, pictures) if way == "tir" else (pictures, texts)
    asked, gallery = asking.unique(), answering.unique()
    asked = asked[torch.randperm(len(asked), generator=data.generator(seed, "gallery", way))[:queries]]
    answers, line = defaultdict(list), {row: i for i, row in enumerate(asked.tolist())}
    for column, product in zip(torch.searchsorted(gallery, answering).tolist(), split.products.tolist()):
        answers[product].append(column)
    right = torch.zeros(len(asked), len(gallery), dtype=torch.bool)
    for query, product in zip(asking.tolist(), split.products.tolist()):
        if query in line:
            right[line[query], answers[product]] = True
    return Questions(way, asked, gallery.expand(len(asked), -1), right)


def shortlist(scores, right, best):
    """The columns of the `best` candidates, the best first, (Q, best); a tie or a NaN counts against the right ones."""
    scores = scores.double() - 1e-12 * right  # a tie is lost
    scores = torch.where(scores.isnan(), torch.where(right, -math.inf, math.inf), scores)
    return scores.topk(min(best, scores.shape[1]), dim=1).indices


def rank_by_towers(towers, questions, best, chunk=256):
    """The towers' ranks (Q,), the columns of their `best` candidates (Q, best), and the cosines of these."""
    asking, asking_of, answering, answering_of = towers
    if questions.way == "tir":
        asking, asking_of, answering, answering_of = answering, answering_of, asking, asking_of
    found = []
    for start in range(0, len(questions.queries), chunk):
        part = slice(start, start + chunk)
        right = questions.right[part]
        near = asking[asking_of[questions.queries[part]]] @ answering.T
        near = near.float().gather(1, answering_of[questions.candidates[part]])  # float: equal vectors must tie
        columns = shortlist(near, right, best)
        found.append((best_ranks(near, right), columns, near.gather(1, columns)))
    return [torch.cat(parts) for parts in zip(*found)]


def both(model, near, scores):
    """
    The towers' logits (cosines times the learnt scale) plus half of ITM's (match - mismatch): half, because the two are
    correlated (EXPERIMENTS.md).
    """
    return capped_scale(model.log_scale.detach().cpu()) * near + scores / 2


class Ranking(NamedTuple):
    """The answer to Questions: the rank of each query's truth by every method; for Fig. 5 the best candidates."""

    ranks: dict  # {"fusion": (Q,), "towers": (Q,), "reranked": (Q,)}, as far as the model can
    best: torch.Tensor  # (Q, 5 or fewer) columns, the best first
    scores: torch.Tensor  # the same shape: ITM's logits, or the cosines of a run without ITM


def rank(model, split, asked, towers=None, best=20, everything=True, batch_size=256, what=None):
    """
    One Ranking for each of the Questions in `asked`. "towers": by cosine. "reranked": the towers' `best` in the order
    of towers and ITM together; a truth that is not among them keeps the towers' rank. "fusion": by ITM, which then
    reads `everything`. towers: from `read_towers`, None for a run without. No pair is read twice.
    """
    nearest = [rank_by_towers(towers, questions, best) if towers else None for questions in asked]
    if "itm" not in weights.learnt(model):
        return [Ranking({"towers": ranked}, columns[:, :5], near[:, :5]) for ranked, columns, near in nearest]
    everything = everything or towers is None
    read = asked if everything else [questions.cut(found[1]) for questions, found in zip(asked, nearest)]
    pairs = torch.cat([questions.pairs().flatten(0, 1) for questions in read])
    scores = pair_scores(model, split, pairs, batch_size, what).split([one.right.numel() for one in read])
    rankings = []
    for questions, one, score, found in zip(asked, read, scores, nearest):
        score = score.view(one.right.shape)
        if not towers:
            ranking = rank_by_fusion(questions, score)
        elif everything:
            fusion = rank_by_fusion(questions, score)
            ranking = rerank(model, questions, found, score.gather(1, found[1]))
            ranking = ranking._replace(ranks=fusion.ranks | ranking.ranks)
        else:
            ranking = rerank(model, questions, found, score)
        rankings.append(ranking)
    return rankings


def rank_by_fusion(questions, scores):
    """By ITM alone, which has read every candidate: scores (Q, C)."""
    columns = shortlist(scores, questions.right, 5)
    return Ranking({"fusion": best_ranks(scores, questions.right)}, columns, scores.gather(1, columns))


def rerank(model, questions, nearest, scores):
    """The towers' `best`, as `rank_by_towers` found them, in the order of towers and ITM together: scores (Q, best)."""
    ranked, columns, near = nearest
    right = questions.right.gather(1, columns)
    together = both(model, near, scores)
    reranked = torch.where(right.any(dim=1), best_ranks(together, right), ranked)
    order = shortlist(together, right, 5)
    return Ranking({"towers": ranked, "reranked": reranked}, columns.gather(1, order), scores.gather(1, order))


def retrieval(model, split, draws, towers=None, best=20, batch_size=256, what=None):
    """
    Candidate lists, one {"tir": lists, "itr": lists} per draw -> {way: {method: recalls, mean and sd over the draws}},
    and the first draw as [(Questions, Ranking) for each way], for Fig. 5.
    """
    asked = [from_lists(way, draw[way]) for draw in draws for way in WAYS]
    rankings, results = rank(model, split, asked, towers, best, True, batch_size, what), {}
    for place, way in enumerate(WAYS):
        own = rankings[place :: len(WAYS)]
        results[way] = {}
        for method in own[0].ranks:
            results[way][method] = mean_and_sd([recalls(ranking.ranks[method]) for ranking in own])
    return results, list(zip(asked, rankings))[: len(WAYS)]


def full_gallery(model, split, towers, queries=None, best=20, seed=0, batch_size=256, what=None):
    """The whole split as gallery -> {way: {method: recalls}}, how many of ITM's scores both ways use, and all."""
    asked = [from_gallery(split, way, queries, seed) for way in WAYS]
    results = {"scores_used": 0, "scores_in_all": 0}
    for questions, ranking in zip(asked, rank(model, split, asked, towers, best, False, batch_size, what)):
        results[questions.way] = {method: recalls(ranked) for method, ranked in ranking.ranks.items()}
        size, gallery = questions.right.shape
        results["scores_in_all"] += size * gallery
        if "itm" in weights.learnt(model):
            results["scores_used"] += size * (min(best, gallery) if towers else gallery)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Recognition (Task 3), generation (Task 4) and captioning


def read_classes(model, split, modality="both", batch_size=256, what=None, limit=None):
    """
    The classes that the model gives to the first `limit` rows (default: all) -> (rows, 2) int64, main and sub-category.
    modality: what it reads, "both", "image" (with an empty caption) or "text".
    """
    pairs = torch.stack([first_rows(split.pictures.index[:limit]), first_rows(split.captions[:limit])], dim=1)
    pairs, where = torch.unique(pairs, dim=0, return_inverse=True)
    tokens = split.tokens[pairs[:, 1]]
    if modality == "image":
        tokens = torch.tensor(split.tokenizer.encode("")).expand(len(pairs), -1)

    def classify(batch):
        images = None if modality == "text" else split.images(pairs[batch, 0], device)
        with runtime.precision_of(model):
            logits = model.classify(images, data.trim(tokens[batch]).to(device))
        return torch.stack([part.float().argmax(dim=1) for part in logits], dim=1)

    with runtime.evaluating(model) as device:
        return share_out(by_length(tokens, batch_size), classify, 2, device, what)[where].long().numpy()


def modality_of(model):
    """What the recipe lets recognition read: "both", "image" or "text"."""
    return getattr(model.recipe, "modality", "both")


def true_classes(rows, field, names):
    """The rows' class ids, -1 for none; a class that the run never saw gets an id that no prediction can hit."""
    found = {row.get(field) or "" for row in rows} - {""}
    if not found:
        raise UserError(f"{field}: no row of this split has one, which recognition needs")
    unknown = sorted(found - set(names))
    if len(unknown) == len(found):
        raise UserError(f"{field}: the run knows none of this split's classes ({quoted(unknown[0])}, ...)")
    ids = {name: i for i, name in enumerate([*names, *unknown])}
    return np.array([ids.get(row.get(field), -1) for row in rows])


def recognition(rows, labels, predicted):
    """
    Accuracy, macro-F and SumC = 100 (accuracy + macro-F) of M-CR ("category") and S-CR ("subcategory"), over the rows
    that have a class; unseen: the rows whose class the run never saw. labels: the model's, predicted: `read_classes`.
    """
    results = {}
    for column, field in enumerate(FIELDS):
        true = true_classes(rows, field, labels[field])
        true, guessed = true[true >= 0], predicted[true >= 0, column]
        a, f = accuracy(true, guessed), macro_f(true, guessed)
        results[field] = {"accuracy": a, "macro_f": f, "SumC": 100 * (a + f), "rows": len(true),
                          "classes": len(np.unique(true)), "unseen": int((true >= len(labels[field])).sum())}
    return results


def generation(model, split, batch_size=256, what=None):
    """
    PSNR and SSIM of the rebuilt pictures, hidden as the recipe says: of the picture that the model makes, over hidden
    pixels alone, and "pasted" (visible pixels kept, as the mean-colour floor keeps them). A perfect picture has 100 dB.
    """
    names = ("psnr", "ssim", "psnr_hidden", "psnr_pasted", "ssim_pasted", "floor_psnr", "floor_ssim", "floor_hidden")
    rows = first_rows(split.pictures.index).unique()  # each picture's first row, whose caption it gets
    tokens, r = split.tokens[rows], model.recipe

    def measure(batch):
        images = split.images(rows[batch], device)
        masked, hidden = figures.hide(images, rows[batch], r.mask_style, r.mask_ratio, r.mask_unit)
        rebuilt = figures.rebuild(model, masked, data.trim(tokens[batch]).to(device))
        pasted, floor = torch.where(hidden, rebuilt, images), figures.fill_with_mean(images, hidden)
        values = [psnr(rebuilt, images), ssim(rebuilt, images), psnr(rebuilt, images, hidden), psnr(pasted, images),
                  ssim(pasted, images), psnr(floor, images), ssim(floor, images), psnr(floor, images, hidden)]
        return torch.stack(values, dim=1).clamp(max=100)

    with runtime.evaluating(model) as device:
        means = share_out(by_length(tokens, batch_size), measure, len(names), device, what).mean(dim=0)
    return {**dict(zip(names, means.tolist())), "style": r.mask_style, "ratio": r.mask_ratio, "unit": r.mask_unit}


def captioning(model, split, batch_size=256, what=None):
    """Caption each distinct picture -> BLEU-4, ROUGE-L, CIDEr-D against its first row's caption, and {row: text}."""
    rows, width = first_rows(split.pictures.index).unique(), model.config.text_len

    def caption(batch):
        with runtime.precision_of(model):
            ids = model.caption(split.images(rows[batch], device))
        return F.pad(ids, (0, width - ids.shape[1]), value=split.tokenizer.pad_id)

    with runtime.evaluating(model) as device:
        ids = share_out(torch.arange(len(rows)).split(batch_size), caption, width, device, what).long()
    texts = [up_to_sep(one, split.tokenizer) for one in ids.tolist()]
    right = [split.rows[row]["caption"] for row in rows.tolist()]
    results = {"bleu4": captions.bleu4(right, texts), "rouge_l": captions.rouge_l(right, texts),
               "cider_d": captions.cider_d(right, texts)}
    return results, dict(zip(rows.tolist(), texts))


def up_to_sep(ids, tokenizer):
    """The text of token ids up to the first [SEP]."""
    return tokenizer.decode(ids[: ids.index(tokenizer.sep_id)] if tokenizer.sep_id in ids else ids)


# ----------------------------------------------------------------------------------------------------------------------
# Validation, for train.py


def validate(model, split, seed, progress=1.0, batch_size=128, limit=512):
    """
    The losses of the objectives that are active at this `progress`, over the first `limit` rows: {objective: mean}. The
    plans and losses are those of training, with fixed draws, and the processes share the batches. Where the towers
    train also their R@1, "tir_towers" and "itr_towers", on candidate lists; where recognition does, "cr_accuracy".
    """
    names, active = list(model.recipe.weights), model.active(progress)
    rows = torch.arange(min(limit, len(split)))
    batches = rows.tensor_split(-(-len(rows) // batch_size))
    totals = torch.zeros(2, len(names), dtype=torch.float64)  # the sums, and how many items they count
    with runtime.evaluating(model) as device:
        for number in range(runtime.process_index(), len(batches), runtime.world()):
            draw = functools.partial(data.generator, seed, "validation", number)
            with runtime.precision_of(model):
                sums, counts = batch_losses(model, split, batches[number], draw, progress, device)
            for name, total in sums.items():
                totals[:, names.index(name)] += torch.tensor([float(total), counts[name]], dtype=torch.float64)
    totals = runtime.sum_over_processes(totals.to(device)).cpu()
    values = {name: (total / count).item() for name, total, count in zip(names, *totals) if count > 0}
    if "itc" in active:
        values.update(towers_recall(model, split, seed, batch_size, limit))
    if "cr" in active:
        with contextlib.suppress(UserError):  # a validation split without known classes has no accuracy
            predicted = read_classes(model, split, modality_of(model), batch_size, limit=len(rows))
            results = recognition(split.rows[: len(rows)], model.labels, predicted)
            values["cr_accuracy"] = statistics.fmean(results[field]["accuracy"] for field in FIELDS)
    return values


def batch_losses(model, split, rows, draw, progress, device):
    """{objective: summed loss} and {objective: items counted} of one batch, read whole."""
    sums, counts, vectors = {}, {}, None
    images = None if model.reads(progress) == "captions" else split.images(rows, device)
    if "itc" in model.active(progress):
        vectors = model.embed(images, data.trim(split.tokens[rows]).to(device))
        counts["itc"] = len(rows)
        sums["itc"] = len(rows) * model.contrast(vectors, split.same(rows).to(device))
    plan, planned = model.plan(split, rows, draw, vectors, progress)
    if plan:
        if "other" in plan:
            plan["other_images"] = split.images(rows[plan["other"].clamp(min=0)], device)
        sums.update(model.losses(images, {name: value.to(device) for name, value in plan.items()}))
    return sums, {**planned, **counts}


def towers_recall(model, split, seed, batch_size, limit):
    """R@1 of the towers on `limit` candidate lists drawn from the first 4 x limit rows; {} where there is no rival."""
    drawn = candidates(split.rows[: 4 * limit], limit, 101, seed, shorter=True)
    if not drawn or len(drawn[0]["candidates"]) < 2:
        return {}
    towers, values = read_towers(model, split, batch_size, limit=4 * limit), {}
    for way in WAYS:
        ranked, _, _ = rank_by_towers(towers, from_lists(way, drawn), 1)
        values[f"{way}_towers"] = recalls(ranked)["R@1"]
    return values


def goodness(model, values):
    """What best.pt is chosen by, of `validate`'s values: the towers' R@1, recognition's accuracy, or minus the loss."""
    weights_of = model.recipe.weights
    if "tir_towers" in values:
        return values["tir_towers"] + values["itr_towers"]
    if list(weights_of) == ["cr"] and "cr_accuracy" in values:
        return values["cr_accuracy"]
    return -sum(weight * values[name] for name, weight in weights_of.items() if name in values)


# ----------------------------------------------------------------------------------------------------------------------
# The command


class Run(NamedTuple):
    """A trained run, opened together with the split that it is measured on."""

    name: str  # as the command line names it
    home: Path  # its folder
    model: torch.nn.Module
    settings: dict
    split: data.Split
    tasks: list


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, count = parser.add_argument, runtime.at_least(1)
    flag("runs", metavar="RUN", nargs="*", help="a run's folder, or one checkpoint file; several stand side by side")
    flag("--draw-lists", metavar="DIR",
         help="only write the candidate lists of this data folder, to the file --out (default: candidates-SEED.json)")
    flag("--data", metavar="DIR", help="the data (default: the runs' own)")
    flag("--split", choices=("test", "val"), default="test", help="the rows to measure on (default: test)")
    flag("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)} (default: what each run was trained for)")
    flag("--queries", type=count, metavar="N", help="query products (default: 1000; full gallery: all)")
    flag("--draws", type=count, default=5, metavar="N",
         help="how often the lists are drawn, with seeds seed, seed + 1, ... (default: 5)")
    flag("--candidates", metavar="FILE", help="lists to read: a candidates.json, or the authors' folder of pickles")
    flag("--full-gallery", action="store_true",
         help="rank the whole split instead of candidate lists (a run without towers then reads every pair)")
    flag("--best", type=count, default=20, metavar="K",
         help="how many of the towers' best are ordered again by towers and ITM together (default: 20)")
    flag("--seed", type=runtime.at_least(0), default=0, metavar="N", help="the first draw's seed (default: 0)")
    flag("--batch-size", type=count, default=256, metavar="N", help="pairs read at once (default: 256)")
    flag("--skip-bad", action="store_true", help="leave out rows that cannot be read, and say which")
    flag("--out", metavar="DIR|FILE", help="where to write (default: the first run's folder)")
    runtime.add_device_flag(parser)
    args = parser.parse_args(arguments)
    args.tasks = list(dict.fromkeys(args.tasks.split(","))) if args.tasks else []
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown:
        parser.error(f"--tasks must name {', '.join(TASKS)}, got {quoted(unknown[0])}")
    if bool(args.runs) == bool(args.draw_lists):
        parser.error("name one RUN or more, or --draw-lists DIR")
    if args.draw_lists and args.candidates:
        parser.error("--draw-lists draws lists and --candidates reads them; give one of the two")
    if len(set(args.runs)) < len(args.runs):
        parser.error("RUN: the same run is named twice")
    return args


def fits(model, task):
    """Whether the model has what the task asks for, and has been trained for it."""
    objectives, method = TASKS[task]
    return hasattr(model, method) and not weights.learnt(model).isdisjoint(objectives)


def choose_tasks(args, models):
    """{run: its tasks}. Each run does what it was trained for; a task that none can do, and an idle run, are errors."""
    named = list(args.tasks)
    if args.full_gallery and "full_gallery" not in named:
        named.append("full_gallery")
    unusual = "retrieval" if args.full_gallery else "full_gallery"
    asked, chosen = named if args.tasks else [task for task in TASKS if task != unusual], {}
    for name, model in models.items():
        chosen[name] = [task for task in asked if fits(model, task)]
    trained = "; ".join(f"{name}: {','.join(sorted(weights.learnt(model)))}" for name, model in models.items())
    for task in named:
        if not any(task in tasks for tasks in chosen.values()):
            raise UserError(f"{task}: needs a run that was trained for {' or '.join(TASKS[task][0])} ({trained})")
    for name, tasks in chosen.items():
        if not tasks:
            raise UserError(f"{name}: was trained for nothing that is to be measured here ({trained}); leave it out")
    return chosen


def choose_data(args, settings):
    """The one folder that all runs are measured on."""
    if args.data:
        return args.data
    folders = {Path(one["data"]).resolve(): one["data"] for one in settings if one.get("data")}
    if len(folders) > 1:
        raise UserError(f"--data: must name the folder, for the runs were trained on {' and '.join(folders.values())}")
    if not folders:
        raise UserError("--data: must name the folder, for no run says which data it was trained on")
    folder, = folders.values()
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder, though a run was trained on it; name the data with --data")
    return folder


def open_runs(args, device):
    """Every run with the split, whose rows must be the same for all -> ([Run, ...], the data folder)."""
    opened = {path: weights.load_run(path, device) for path in args.runs}
    tasks = choose_tasks(args, {path: model for path, (model, _, _) in opened.items()})
    folder = choose_data(args, [settings for _, _, settings in opened.values()])
    runs = []
    for path, (model, tokenizer, settings) in opened.items():
        c, fit = model.config, settings.get("fit", "stretch")
        how = (c.image_size, c.text_len, fit, args.skip_bad, settings.get("decode", "auto"))
        split = data.open_split(folder, args.split, tokenizer, model.labels, *how)
        home = Path(path) if os.path.isdir(path) else Path(path).parent
        runs.append(Run(path, home, model, settings, split, tasks[path]))
        check_fit(runs[-1], runs[0])
    return runs, folder


def check_fit(run, first):
    """Fail before hours of reading: on rows that differ between runs, on words or classes that the run never saw."""
    split, t = run.split, run.split.tokenizer
    if split.digest != first.split.digest:
        raise UserError(f"{run.name}: reads other rows of the data than {first.name}; measure it alone")
    words = split.tokens[:]
    words = words[~torch.isin(words, torch.tensor([t.pad_id, t.cls_id, t.sep_id]))]
    unknown = (words == t.unk_id).double().mean().item()
    if unknown > 0.5:
        share = f"{100 * unknown:.0f}% of this split's words are unknown"
        raise UserError(f"{run.name}: {share} to the run's vocabulary, at most half may be; is this its language?")
    if "recognition" in run.tasks:
        for field in FIELDS:
            true_classes(split.rows, field, run.model.labels[field])


def draw_all(args, rows):
    """One {"tir": lists, "itr": lists} per draw, from --candidates or drawn."""
    if args.candidates:
        draws = lists.read_candidates(args.candidates, rows)
        return [{way: draw[way][: args.queries] for way in WAYS} for draw in draws]
    products, wanted = len({row["product_id"] for row in rows}), args.queries or 1000
    if products < wanted and runtime.process_index() == 0:
        print(f"--queries {wanted}: the split has only {products} products, so each of them is a query")
    drawn = [candidates(rows, wanted, 101, args.seed + draw) for draw in range(args.draws)]
    return [{"tir": one, "itr": one} for one in drawn]


def measure(args, run, draws):
    """All of one run's tasks -> its results, and its figures as HTML."""
    model, split, size, towers = run.model, run.split, args.batch_size, None
    results, html = {"about": about(run)}, []
    if "itc" in weights.learnt(model) and {"retrieval", "full_gallery"} & set(run.tasks):
        towers = read_towers(model, split, size, f"{run.name}, towers")
    for task in run.tasks:
        what = f"{run.name}, {task.replace('_', ' ')}"
        if task == "retrieval":
            results[task], shown = retrieval(model, split, draws, towers, args.best, size, what)
            html += report.retrieval_figure(split, shown)
        elif task == "recognition":
            results[task], predicted = measure_recognition(model, split, size, what)
            true = np.stack([true_classes(split.rows, field, model.labels[field]) for field in FIELDS], axis=1)
            html += report.recognition_figure(split, model.labels, true, predicted)
        elif task == "generation":
            results[task] = generation(model, split, size, what)
            html += figures.rebuilding(model, split)
        elif task == "captioning":
            results[task], texts = captioning(model, split, size, what)
            html += report.captioning_figure(split, texts)
        elif task == "pretext":
            with runtime.evaluating(model):
                results[task] = model.pretext(split, functools.partial(data.generator, args.seed, "pretext"))
            if "sat" in weights.learnt(model):
                html += report.alignment_figure(figures.aligned_words(model, split))
        else:
            results[task] = full_gallery(model, split, towers, args.queries, args.best, args.seed, size, what)
    return results, html


def measure_recognition(model, split, batch_size, what):
    """As the run was trained to read; when that is both, also from the picture alone -> {reads: results}, classes."""
    modality, results, predicted = modality_of(model), {}, {}
    for way in (modality, "image") if modality == "both" else (modality,):
        predicted[way] = read_classes(model, split, way, batch_size, f"{what} from {READS[way]}")
        results[READS[way]] = recognition(split.rows, model.labels, predicted[way])
    return results, predicted[modality]


def about(run):
    """What the run is, for results.json and the report."""
    c, s = run.model.config, run.settings
    return {"model": run.model.kind, "checkpoint": s["checkpoint"], "step": s["step"], "preset": s.get("preset"),
            "objectives": run.model.recipe.objectives, "trained_on": Path(str(s.get("data"))).name,
            "parameters": sum(p.numel() for p in run.model.parameters()), "image_size": c.image_size,
            "text_len": c.text_len, "vocab_size": c.vocab_size}


def measured_on(args, split, folder):
    """What the runs were measured on, for results.json and the report; "paper": the paper's test set, if it is one."""
    folder, paper = Path(folder), None
    if args.split == "test" and (any(folder.glob("fashiongen*.h5")) or (folder / "full_valid_info_PAI").exists()):
        paper = "Fashion-Gen"
    elif args.split == "test" and (folder / "dataset_coco.json").exists():
        paper = "COCO"
    return {"data": folder.resolve().name, "paper": paper, "split": args.split, "rows": len(split),
            "products": len(split.products.unique()), "pictures": len(first_rows(split.pictures.index).unique()),
            "captions": len(split.captions.unique()), "seed": args.seed, "best": args.best}


def without_nan(value):
    """For JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_lists(args):
    """Write the candidate lists of a folder's split."""
    rows = readers.read(args.draw_lists, args.split, args.skip_bad)
    draws = draw_all(args, rows)
    out = args.out or f"candidates-{args.seed}.json"
    lists.save_candidates(out, draws, rows)
    first = draws[0]["tir"]
    print(f"{len(draws)} draws of {len(first)} lists of {len(first[0]['candidates'])} candidates: {out}")


def open_out(path):
    """The folder of the results, refused before hours of reading if they could not be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be a folder ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"--out {path}: cannot be written")
    return Path(path)


def main(arguments=None):
    args = parse(arguments)
    if args.draw_lists:
        return draw_lists(args)
    runtime.keep_freed_memory()
    runs, folder = open_runs(args, runtime.join_processes(args.device))
    split, draws = runs[0].split, None
    out = runtime.from_first(lambda: open_out(args.out or runs[0].home))
    results, html = {"measured": measured_on(args, split, folder), "runs": {}}, {}
    if any("retrieval" in run.tasks for run in runs):
        draws = draw_all(args, split.rows)
        results["lists"] = lists.describe(split.rows, draws)
    for run in runs:
        results["runs"][run.name], html[run.name] = measure(args, run, draws)
    if runtime.process_index() > 0:
        return
    tables = report.tables(results)
    print("\n".join(report.as_text(table) for table in tables))
    if draws and not args.candidates:
        lists.save_candidates(out / "candidates.json", draws, split.rows)
    with runtime.whole_file(out / "results.json") as file:
        file.write(json.dumps(without_nan(results), indent=1, allow_nan=False).encode())
    logs = {run.name: report.read_log(run.home / "log.jsonl") for run in runs}
    with runtime.whole_file(out / "report.html") as file:
        file.write(report.page(results, tables, html, logs).encode(errors="backslashreplace"))
    print(f"\n{out / 'results.json'}\n{out / 'report.html'}")


if __name__ == "__main__":
    runtime.run(main)
