"""The laws of eval.py and extras/metrics.py: metrics against slow references, and whole runs of tiny random models."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS, make_shop
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import data
import eval as evaluation
import kaleido
import mvlt
import vlmo
from extras import figures, report, runtime, weights
from extras.runtime import UserError

settings.register_profile("eval", deadline=None, max_examples=25)
settings.load_profile("eval")
SEEDS = st.integers(0, 2**31 - 1)
WAYS = ("tir", "itr")


# --- Ranks and recalls ---


@st.composite
def scored_lists(draw):
    """Scores with many ties and some NaN and infinities, and the column of the truth."""
    queries, size = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf, math.nan])
    scores = draw(st.lists(st.lists(value, min_size=size, max_size=size), min_size=queries, max_size=queries))
    truth = draw(st.lists(st.integers(0, size - 1), min_size=queries, max_size=queries))
    return torch.tensor(scores), torch.tensor(truth)


def slow_rank(scores, truth=0):
    if math.isnan(scores[truth]):
        return len(scores)
    return 1 + sum(1 for i, score in enumerate(scores) if i != truth and (math.isnan(score) or score >= scores[truth]))


@given(scored_lists())
def test_ranks_agree_with_counting(lists):
    scores, truth = lists
    found = evaluation.ranks(scores, truth)
    assert found.dtype == torch.int64
    assert found.tolist() == [slow_rank(row, column) for row, column in zip(scores.tolist(), truth.tolist())]


@given(scored_lists(), SEEDS)
def test_the_order_of_the_candidates_changes_no_rank(lists, seed):
    scores, truth = lists
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = order.argsort()[truth]
    assert evaluation.ranks(scores[:, order], moved).equal(evaluation.ranks(scores, truth))


@given(st.lists(st.integers(1, 101), min_size=1, max_size=40))
def test_recalls_are_shares_that_grow_with_k(ranks):
    result = evaluation.recalls(torch.tensor(ranks))
    assert 0 <= result["R@1"] <= result["R@5"] <= result["R@10"] <= 1
    assert result["R@5"] == sum(rank <= 5 for rank in ranks) / len(ranks)
    assert result["SumR"] == pytest.approx(100 * (result["R@1"] + result["R@5"] + result["R@10"]))
    assert min(ranks) <= result["median_rank"] <= max(ranks)
    assert sum(rank <= result["median_rank"] for rank in ranks) >= len(ranks) / 2


def test_a_constant_model_is_last():
    found = evaluation.ranks(torch.zeros(7, 101), torch.arange(7))
    assert (found == 101).all() and evaluation.recalls(found)["R@10"] == 0


def test_mean_and_sd_of_the_draws():
    result = evaluation.mean_and_sd([{"R@1": 0.2}, {"R@1": 0.4}])
    assert result["R@1"] == pytest.approx(0.3) and result["sd"]["R@1"] == pytest.approx(math.sqrt(0.02))
    assert evaluation.mean_and_sd([{"R@1": 0.2}])["sd"] == {"R@1": None}


# --- Macro-F, PSNR and SSIM ---


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=40))
def test_macro_f_agrees_with_precision_and_recall_class_by_class(pairs):
    true, predicted = zip(*pairs)
    f = []
    for c in set(true) | set(predicted):
        hit = sum(t == p == c for t, p in pairs)
        precision, recall = hit / max(1, predicted.count(c)), hit / max(1, true.count(c))
        f.append(2 * precision * recall / (precision + recall) if hit else 0)
    assert evaluation.macro_f(true, predicted) == pytest.approx(sum(f) / len(f))
    assert evaluation.macro_f(torch.tensor(true), torch.tensor(predicted)) == evaluation.macro_f(true, predicted)


@pytest.mark.parametrize("true, predicted", [([], []), ([1, 2], [1]), ([[1]], [[1]])])
def test_macro_f_refuses_sequences_that_do_not_pair(true, predicted):
    with pytest.raises(ValueError, match="macro_f"):
        evaluation.macro_f(true, predicted)


def two_pictures(seed, H, W, batch=2):
    return torch.rand(2, batch, 3, H, W, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_psnr_agrees_with_a_loop_over_the_pixels(seed, H, W):
    a, b = two_pictures(seed, H, W)
    where = torch.rand(2, 1, H, W, generator=torch.Generator().manual_seed(seed)) < 0.6
    whole, part = evaluation.psnr(a, b), evaluation.psnr(a, b, where)
    for i in range(2):
        pixels = [(c, y, x) for c in range(3) for y in range(H) for x in range(W)]
        for found, chosen in ((whole, pixels), (part, [p for p in pixels if where[i, 0, p[1], p[2]]])):
            errors = [(a[i][p].item() - b[i][p].item()) ** 2 for p in chosen]
            wanted = 10 * math.log10(1 / (sum(errors) / len(errors))) if errors else math.nan
            assert found[i].item() == pytest.approx(wanted, nan_ok=True)


def slow_ssim(a, b):
    """One picture (3, H, W), window by window, each covariance as the mean of products of deviations."""
    weight = {(y, x): math.exp(-(y * y + x * x) / (2 * 1.5**2)) for y in range(-5, 6) for x in range(-5, 6)}
    total, values = sum(weight.values()), []
    for p, q in zip(a.tolist(), b.tolist()):
        for y in range(5, len(p) - 5):
            for x in range(5, len(p[0]) - 5):
                def mean(f):
                    return sum(w / total * f(p[y + i][x + j], q[y + i][x + j]) for (i, j), w in weight.items())

                u, v = mean(lambda s, t: s), mean(lambda s, t: t)
                var_u, var_v = mean(lambda s, t: (s - u) ** 2), mean(lambda s, t: (t - v) ** 2)
                both = mean(lambda s, t: (s - u) * (t - v))
                upper = (2 * u * v + 1e-4) * (2 * both + 9e-4)
                values.append(upper / ((u * u + v * v + 1e-4) * (var_u + var_v + 9e-4)))
    return sum(values) / len(values)


@settings(max_examples=4)
@given(SEEDS, st.integers(11, 13), st.integers(11, 13))
def test_ssim_agrees_with_a_loop_over_the_windows(seed, H, W):
    a, b = two_pictures(seed, H, W)
    b = (a + 0.3 * b) / 1.3
    assert evaluation.ssim(a, b).tolist() == pytest.approx([slow_ssim(p, q) for p, q in zip(a, b)], abs=1e-9)


@given(SEEDS)
def test_ssim_is_one_for_a_picture_and_itself_and_the_same_both_ways(seed):
    a, b = two_pictures(seed, 12, 15)
    assert evaluation.ssim(a, a).tolist() == pytest.approx([1, 1])
    assert evaluation.ssim(a, b).tolist() == pytest.approx(evaluation.ssim(b, a).tolist())


def test_ssim_refuses_a_picture_smaller_than_its_window():
    with pytest.raises(ValueError, match="11 x 11"):
        evaluation.ssim(*torch.zeros(2, 1, 3, 10, 20))


# --- Two steps: the towers choose, towers and ITM put in order ---


def ranked(monkeypatch, near, itm, best, everything=True):
    """`rank` with given cosines and ITM logits (Q, C), the truth first: {method: ranks}. The towers' scale is 1."""
    near, itm = torch.as_tensor(near).double(), torch.as_tensor(itm).double()
    queries, size = near.shape
    model = SimpleNamespace(recipe=SimpleNamespace(weights={"itm": 1, "itc": 1}), log_scale=torch.zeros(()))
    candidates = torch.arange(queries * size).view(queries, size)
    right = (torch.arange(size) == 0).expand(queries, size)
    questions = evaluation.Questions("tir", candidates[:, 0], candidates, right)
    one_text = torch.zeros(queries * size, dtype=torch.int64)
    towers = evaluation.Towers(near.view(-1, 1), candidates.flatten(), torch.ones(1, 1).double(), one_text)
    monkeypatch.setattr(evaluation, "pair_scores", lambda model, split, pairs, *rest: itm.flatten()[pairs[..., 0]])
    ranking, = evaluation.rank(model, None, [questions], towers, best, everything)
    return {method: found.tolist() for method, found in ranking.ranks.items()}


@given(st.integers(2, 12), st.integers(1, 14), SEEDS, st.booleans())
def test_reranking_agrees_with_sorting_in_plain_python(size, best, seed, blind):
    random = np.random.default_rng(seed)
    near, itm = (random.permutation(size) / 16).tolist(), random.integers(-3, 4, size).tolist()
    near[0] = math.nan if blind else near[random.integers(size)]  # the truth may tie with one rival; the rivals differ
    order = sorted(range(size), key=lambda i: (-near[i], i == 0)) if not blind else [*range(1, size), 0]
    short = order[:best]
    wanted = slow_rank(near)
    if 0 in short:
        wanted = slow_rank([near[i] + itm[i] / 2 for i in sorted(short)])
    with pytest.MonkeyPatch.context() as patch:
        everything, cut = (ranked(patch, [near], [itm], best, flag) for flag in (True, False))
    assert everything == {"fusion": [slow_rank(itm)], "towers": [slow_rank(near)], "reranked": [wanted]}
    assert cut == {"towers": [slow_rank(near)], "reranked": [wanted]}  # reading the shortlist alone changes nothing


def test_towers_that_cannot_tell_keep_the_truth_off_the_shortlist(monkeypatch):
    found = ranked(monkeypatch, torch.zeros(3, 101), 9 * torch.eye(101)[:1].expand(3, 101), 20)
    assert found == {"fusion": [1] * 3, "towers": [101] * 3, "reranked": [101] * 3}


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-20, 20)), min_size=1, max_size=5), st.floats(0.1, 300))
def test_both_is_the_towers_logit_and_half_of_itms(pairs, scale):
    model = SimpleNamespace(log_scale=torch.tensor(math.log(scale)))
    near, match = torch.tensor(pairs, dtype=torch.float64).T
    wanted = [min(100, scale) * n + m / 2 for n, m in pairs]
    assert evaluation.both(model, near, match).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


# --- A tiny run and a shop with 104 products to test on ---

LABELS = {"category": sorted({category for category, _ in KINDS.values()}), "subcategory": sorted(KINDS)}
CONFIG = mvlt.Config(
    image_size=32, text_len=16, vocab_size=5, token_dim=16, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1),
    heads=(1, 1, 2, 2), mlp_ratios=(2, 2, 2, 2), embed_dim=8, n_category=4, n_subcategory=8)


class Store:
    """A data folder, a model for it and the test split as the model reads it."""

    def __init__(self, folder):
        self.folder = make_shop(folder, products=520)
        captions = [row["caption"] for row in data.read(folder, "train")]
        self.tokenizer = data.Tokenizer.train(captions, size=90)
        self.model = self.make_model()
        self.split, self.val = self.open("test"), self.open("val")

    def open(self, name):
        return data.open_split(self.folder, name, self.tokenizer, LABELS, 32, 16)

    def make_model(self, objectives="mir,itm,mlm,itc,cr", seed=0, **recipe):
        config = replace(CONFIG, vocab_size=len(self.tokenizer))
        return self.finish(mvlt.MVLT, config, mvlt.Recipe(objectives=objectives, mask_unit=8, **recipe), seed)

    def finish(self, make, config, recipe, seed=0):
        """A model with random weights that tell pairs apart."""
        torch.manual_seed(seed)
        model = make(config, recipe).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        model.vocabulary, model.labels = self.tokenizer.words, LABELS
        return model

    def write_run(self, folder, model=None, **run):
        folder.mkdir(parents=True, exist_ok=True)
        settings_of_run = {"preset": "demo", "data": str(self.folder), **run}
        weights.save(folder / "last.pt", model or self.model, step=7, run=settings_of_run)
        lines = [{"step": i, "loss": 5 / (i + 1), "mir": 1 / (i + 1), "lr": 0.1} for i in range(9)]
        lines += [{"step": 8, "val": {"R@1": 0.1}}, {"step": 9, "val": {"R@1": 0.2}}]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
        return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store") / "shop")


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: False)


def score_alone(model, split, picture, caption):
    """The score of one pair as the paper has it, without batch, trimming or bf16."""
    with torch.no_grad():
        tokens = split.tokens[[caption]]
        visual, text = model.encode(split.images([picture]), tokens)
        joined = hasattr(model, "match_pair")  # MVLT's towers join in
        logits = model.match_pair(visual, text, tokens) if joined else model.match(text)
    return (logits[0, 1] - logits[0, 0]).item()


def two_draws(split, queries=5, size=20):
    drawn = [evaluation.candidates(split.rows, queries, size, seed) for seed in (0, 1)]
    return [{"tir": lists, "itr": lists} for lists in drawn]


def test_pairs_score_as_each_would_alone_whatever_the_batch(store, in_float32):
    pairs = torch.tensor([[0, 0], [5, 2], [0, 0], [17, 40], [5, 3], [103, 103]])
    wanted = [score_alone(store.model, store.split, *pair) for pair in pairs.tolist()]
    for batch_size in (1, 4, 100):
        found = evaluation.pair_scores(store.model, store.split, pairs.view(2, 3, 2), batch_size)
        assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == 5  # the model tells the pairs apart


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_is_scored_in_the_precision_that_it_was_trained_in(store, tmp_path, bf16, monkeypatch):
    """The machine is taken for one that has bf16, so that the law holds on any."""
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: True)
    model, _, _ = weights.load_run(store.write_run(tmp_path / "run", bf16=bf16))
    pairs = torch.tensor([[0, 0], [5, 2], [17, 40]])
    found = evaluation.pair_scores(model, store.split, pairs).tolist()
    wanted = [score_alone(store.model, store.split, *pair) for pair in pairs.tolist()]
    assert (found == pytest.approx(wanted, abs=1e-5)) != bf16


def test_a_pair_and_a_picture_and_a_caption_are_read_once_however_often_they_are_asked(store, monkeypatch):
    read = {"score": [], "embed_images": [], "embed_texts": []}
    for name, seen in read.items():
        def count(*inputs, method=getattr(store.model, name), seen=seen):
            seen.append(len(inputs[0]))
            return method(*inputs)

        monkeypatch.setattr(store.model, name, count)
    rows = [5, 5, 6, 6, 7]  # two pictures of row 5's product, of row 6's product, ...
    split = replace(store.split, rows=[store.split.rows[row] for row in rows], tokens=store.split.tokens[rows],
                    pictures=data.Pictures(store.split.pictures.files, store.split.pictures.index[rows]),
                    products=torch.tensor(rows), captions=torch.tensor(rows))
    towers = evaluation.read_towers(store.model, split, 2)
    assert sum(read["embed_images"]) == sum(read["embed_texts"]) == 3 and towers.picture_of.tolist() == [0, 0, 1, 1, 2]
    evaluation.pair_scores(store.model, split, torch.cartesian_prod(torch.arange(5), torch.arange(5)))
    assert sum(read["score"]) == 9
    draws = two_draws(store.split) * 2
    evaluation.retrieval(store.model, store.split, draws)
    asked = {(entry["query"], row) for draw in draws for entry in draw["tir"] for row in entry["candidates"]}
    assert sum(read["score"]) == 9 + len(asked | {(row, query) for query, row in asked})


def test_reading_leaves_the_model_as_it_was(store):
    store.model.train()
    evaluation.pair_scores(store.model, store.split, torch.tensor([[0, 0]]))
    assert store.model.training
    store.model.eval()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in store.model.parameters())


def test_retrieval_agrees_with_scoring_pair_by_pair(store, in_float32):
    model, split = store.model, store.split
    lists = evaluation.candidates(split.rows, 3, 12)
    towers = evaluation.read_towers(model, split)
    results, shown = evaluation.retrieval(model, split, [{"tir": lists, "itr": lists}], towers, 5)
    with torch.no_grad():
        images, texts = model.embed_images(split.images(range(len(split)))), model.embed_texts(split.tokens[:])
    cosine, scale = (images @ texts.T).double(), model.log_scale.exp().item()
    for way, (questions, ranking) in zip(WAYS, shown):
        wanted = {"fusion": [], "towers": [], "reranked": []}
        for entry in lists:
            query, rows = entry["query"], entry["candidates"]
            pairs = [(row, query) if way == "tir" else (query, row) for row in rows]
            itm = [score_alone(model, split, *pair) for pair in pairs]
            near = [cosine[pair].item() for pair in pairs]
            wanted["fusion"].append(slow_rank(itm))
            wanted["towers"].append(slow_rank(near))
            short = sorted(range(12), key=lambda i: -near[i])[:5]
            together = [scale * near[i] + itm[i] / 2 for i in sorted(short)]
            wanted["reranked"].append(slow_rank(together) if 0 in short else slow_rank(near))
        assert {method: found.tolist() for method, found in ranking.ranks.items()} == wanted
        for method, found in wanted.items():
            assert {**evaluation.recalls(found), "sd": results[way][method]["sd"]} == results[way][method]


@pytest.mark.parametrize("objectives, methods", [
    ("itm,mlm", {"fusion"}), ("itc", {"towers"}), ("itm,itc", {"fusion", "towers", "reranked"})])
def test_a_run_is_ranked_by_what_it_was_trained_for(store, objectives, methods):
    model = store.make_model(objectives)
    towers = evaluation.read_towers(model, store.split) if "itc" in objectives else None
    results, shown = evaluation.retrieval(model, store.split, two_draws(store.split, 3, 7), towers)
    for way, (questions, ranking) in zip(WAYS, shown):
        assert set(results[way]) == set(ranking.ranks) == methods
        assert ranking.best.shape == ranking.scores.shape == (3, 5)


def test_a_model_that_says_the_same_of_all_is_last_in_all(store):
    model = store.make_model()
    for head in (model.match_head, model.image_tower.project):
        for parameter in head.parameters():
            parameter.data.zero_()
    towers = evaluation.read_towers(model, store.split)
    listed, _ = evaluation.retrieval(model, store.split, two_draws(store.split, 6, 101), towers)
    gallery = evaluation.full_gallery(model, store.split, towers)
    for results, last in ((listed, 101), (gallery, 104)):
        for way in WAYS:
            for result in results[way].values():
                assert (result["R@1"], result["R@10"], result["median_rank"]) == (0, 0, last)


def test_full_gallery_agrees_with_every_pair_when_any_of_a_products_captions_counts(store, in_float32):
    model, n = store.model, 24
    rows = [row // 3 * 3 for row in range(n)]  # as COCO's: three rows, and so three captions, share a picture
    split = replace(store.split, rows=store.split.rows[:n], tokens=store.split.tokens[:n],
                    pictures=data.Pictures(store.split.pictures.files, store.split.pictures.index[rows]),
                    products=torch.tensor(rows), captions=torch.arange(n))
    towers = evaluation.read_towers(model, split)
    results = evaluation.full_gallery(model, split, towers, best=100)
    near = model.log_scale.exp().item() * (towers.images @ towers.texts.T)  # (8, 24)
    scores = []
    for picture in range(8):
        itm = [score_alone(model, split, 3 * picture, caption) for caption in range(n)]
        scores.append([score / 2 + near[picture, caption].item() for caption, score in enumerate(itm)])
    itr = []
    for p, row in enumerate(scores):
        best = max(row[3 * p : 3 * p + 3])
        itr.append(1 + sum(score >= best for caption, score in enumerate(row) if caption // 3 != p))
    tir = [slow_rank([row[c] for row in scores], c // 3) for c in range(n)]
    assert results["itr"]["reranked"] == evaluation.recalls(itr)
    assert results["tir"]["reranked"] == evaluation.recalls(tir)
    assert results["scores_used"] == results["scores_in_all"] == 2 * 8 * n
    few = evaluation.full_gallery(model, split, towers, best=2)
    assert few["scores_used"] == 8 * 2 + n * 2 and few["itr"]["towers"] == results["itr"]["towers"]
    some = evaluation.from_gallery(split, "tir", queries=5)
    assert len(set(some.queries.tolist())) == 5 and some.right.sum().item() == 5 and some.right.shape == (5, 8)


def test_without_towers_matching_reads_the_whole_gallery(store, in_float32):
    model = store.make_model("mir,itm")
    results = evaluation.full_gallery(model, store.split, None)
    asked = [evaluation.from_gallery(store.split, way, None) for way in WAYS]
    for way, questions in zip(WAYS, asked):
        scores = evaluation.pair_scores(model, store.split, questions.pairs())
        wrong = scores.masked_fill(questions.right, -math.inf).max(dim=1).values
        found = scores.masked_fill(~questions.right, -math.inf).max(dim=1).values > wrong
        assert results[way].keys() == {"fusion"} and results[way]["fusion"]["R@1"] == found.double().mean().item()
    assert results["scores_used"] == results["scores_in_all"] == sum(questions.right.numel() for questions in asked)


# --- Recognition and generation ---

CLASSES = {"category": ["foot", "top"], "subcategory": ["boot", "coat", "shirt"]}


def rows_of(*classes):
    return [{"category": category, "subcategory": subcategory} for category, subcategory in classes]


def test_a_class_the_run_never_saw_is_an_error_of_its_own():
    rows = rows_of(("foot", "boot"), ("foot", "boot"), ("foot", "boot"), ("hat", "cap"))
    results = evaluation.recognition(rows, CLASSES, np.zeros((4, 2), dtype=int))
    assert results["category"]["accuracy"] == 0.75 and results["category"]["unseen"] == 1
    assert results["category"]["macro_f"] == pytest.approx((6 / 7 + 0) / 2)
    assert results["category"]["SumC"] == pytest.approx(75 + 100 * 3 / 7)


@pytest.mark.parametrize("category, said", [
    ("hat", "knows none of this split's classes .*'hat'"), ("", "category: no row of this split has one")])
def test_recognition_refuses_rows_it_cannot_judge(category, said):
    with pytest.raises(UserError, match=said):
        evaluation.recognition(rows_of((category, "cap")), CLASSES, np.zeros((1, 2), dtype=int))


def test_rows_without_a_class_are_not_judged():
    rows = rows_of(("foot", "boot"), ("foot", ""), ("", "coat"), ("top", "coat"), ("foot", "boot"))
    results = evaluation.recognition(rows, CLASSES, np.array([[0, 0], [1, 1], [1, 1], [1, 1], [1, 0]]))
    assert (results["category"]["rows"], results["category"]["accuracy"]) == (4, 0.5)
    assert (results["subcategory"]["rows"], results["subcategory"]["accuracy"]) == (4, 1)


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_classes_are_read_as_row_by_row(store, modality, in_float32):
    empty = store.tokenizer.encode("")
    found = evaluation.read_classes(store.model, store.split, modality, batch_size=7)
    for row in range(0, 104, 9):
        image = None if modality == "text" else store.split.images([row])
        caption = store.tokenizer.encode(store.split.rows[row]["caption"], 16)
        with torch.no_grad():
            tokens = torch.tensor([empty if modality == "image" else caption])
            logits = store.model.recognise(store.model.encode(image, tokens)[1])
        assert found[row].tolist() == [part.argmax().item() for part in logits]
    assert evaluation.read_classes(store.model, store.split, modality, limit=5).tolist() == found[:5].tolist()


def test_what_is_hidden_of_a_picture_depends_on_its_key_alone(store):
    images = store.split.images(range(6))
    for style in mvlt.MASK_STYLES:
        masked, hidden = figures.hide(images, range(6), style, 0.5, 8)
        assert figures.hide(images[3:], range(3, 6), style, 0.5, 8)[1].equal(hidden[3:])
        assert masked.equal(images.masked_fill(hidden, mvlt.ZERO))
    same, other = (figures.hide(images, range(first, first + 6), "random", 0.5, 8)[1] for first in (0, 6))
    assert not same.equal(other)


def test_the_floor_keeps_what_is_seen_and_fills_the_rest_with_its_mean():
    image, hidden = two_pictures(0, 6, 6)[0], torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[:, :, :3, 1:] = True
    filled = figures.fill_with_mean(image, hidden)
    for i in range(2):
        for c in range(3):
            seen = [image[i, c, y, x].item() for y in range(6) for x in range(6) if not hidden[i, 0, y, x]]
            for y in range(6):
                for x in range(6):
                    wanted = sum(seen) / len(seen) if hidden[i, 0, y, x] else image[i, c, y, x].item()
                    assert filled[i, c, y, x].item() == pytest.approx(wanted, abs=1e-6)


def test_generation_is_perfect_for_a_decoder_that_knows_the_picture(store, monkeypatch):
    def knows(masked, tokens):
        matches = ((masked[:, None] == whole) | (masked[:, None] == mvlt.ZERO)).flatten(2).all(dim=2)
        return whole[matches.int().argmax(dim=1)]

    whole = store.split.images(range(104))
    monkeypatch.setattr(store.model, "rebuild", knows)
    results = evaluation.generation(store.model, store.split)
    assert (results["psnr"], results["psnr_hidden"]) == (100, 100) and results["ssim"] == pytest.approx(1)
    assert results["floor_hidden"] < results["floor_psnr"] < 40


def test_generation_agrees_with_measuring_each_picture_alone(store, in_float32):
    found, wanted = evaluation.generation(store.model, store.split, batch_size=7), []
    for row in range(104):
        image = store.split.images([row])
        masked, hidden = mvlt.mask_images(image, "random", 0.5, 8, data.generator(0, "hide", row))
        with torch.no_grad():
            visual, _ = store.model.encode(masked, store.split.tokens[[row]])
            whole = store.model.reconstruct(visual).clamp(0, 1)
        kept, floor = image.clone(), image.clone()
        for c in range(3):
            kept[:, c][hidden[:, 0]] = whole[:, c][hidden[:, 0]]
            floor[:, c][hidden[:, 0]] = image[:, c][~hidden[:, 0]].mean()
        pictures = (whole, kept, floor)
        everywhere = [f(a, image).item() for a in pictures for f in (evaluation.psnr, evaluation.ssim)]
        wanted.append(everywhere + [evaluation.psnr(a, image, hidden).item() for a in (whole, floor)])
    names = ("psnr", "ssim", "psnr_pasted", "ssim_pasted", "floor_psnr", "floor_ssim", "psnr_hidden", "floor_hidden")
    assert [found[name] for name in names] == pytest.approx(np.mean(wanted, axis=0).tolist(), abs=1e-4)


def test_samples_are_hidden_by_their_seed(store):
    one, again, other = (figures.samples(store.model, store.split, [0], seed=seed) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


def test_a_sheet_shows_hidden_rebuilt_and_original_in_columns():
    images, rebuilt = two_pictures(0, 4, 4)
    hidden = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    hidden[1, 0, 2, 3] = True
    sheet = figures.rebuilt_sheet(images, hidden, rebuilt)
    assert sheet.shape == (12, 8, 3) and sheet[2, 7].tolist() == [128, 128, 128]
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (sheet[8:, 4:] == pixels[1]).all() and (sheet[:4, :4] == pixels[0]).all()
    assert (sheet[4:8, :4] == (rebuilt[0] * 255).round().byte().permute(1, 2, 0).numpy()).all()


def test_a_caption_ends_at_its_first_sep(store):
    t = store.tokenizer
    ids = t.encode("wool coats", 8)
    assert evaluation.up_to_sep(ids + t.encode("boots"), t) == "wool coats"
    assert evaluation.up_to_sep(ids[1 : ids.index(t.sep_id)], t) == "wool coats"


def test_a_model_that_says_every_caption_is_perfect_and_each_picture_is_captioned_once(store, monkeypatch):
    def says(images):
        matches = (images[:, None] == whole).flatten(2).all(dim=2)
        return store.split.tokens[matches.int().argmax(dim=1)]

    whole = store.split.images(range(104))
    texts = [store.tokenizer.decode(tokens) for tokens in store.split.tokens]
    split = replace(store.split, rows=[{**row, "caption": text} for row, text in zip(store.split.rows, texts)])
    monkeypatch.setattr(store.model, "caption", says, raising=False)
    scores, said = evaluation.captioning(store.model, split, batch_size=50)
    assert [scores[name] for name in ("bleu4", "rouge_l", "cider_d")] == pytest.approx([1, 1, 10])
    assert said == dict(enumerate(texts))


# --- Validation ---


class Recorder(nn.Module):
    """A model whose losses are known: of each batch it counts the rows above 2, and sums their numbers."""

    def __init__(self, active=("mir",), reads="pairs"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.recipe = SimpleNamespace(weights={"mir": 1.0, "mlm": 2.0, "itc": 1.0, "cr": 1.0})
        self.active, self.reads, self.seen = lambda progress: active, lambda progress: reads, []

    def plan(self, split, rows, draw, vectors, progress):
        self.seen.append((rows.tolist(), draw("x").initial_seed(), progress))
        counted, other = rows > 2, torch.where(rows % 2 == 0, torch.arange(len(rows)).flip(0), -1)
        return {"counted": counted, "rows": rows, "other": other}, {"mir": int(counted.sum()), "mlm": 0}

    def losses(self, images, plan):
        self.images, self.plan_of_slice = images, plan
        return {"mir": (plan["rows"] * plan["counted"]).sum().float()}


def test_validation_is_the_sum_of_all_batches_over_what_they_count(store):
    model = Recorder().train()
    values = evaluation.validate(model, store.val, 5, progress=0.25, batch_size=4, limit=11)
    assert values == {"mir": pytest.approx(sum(range(3, 11)) / 8)} and model.training
    assert [rows for rows, _, _ in model.seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    keys = [data.generator(5, "validation", number, "x").initial_seed() for number in range(3)]
    assert [key for _, key, _ in model.seen] == keys
    assert {progress for _, _, progress in model.seen} == {0.25}
    plan, rows = model.plan_of_slice, torch.tensor([8, 9, 10])
    assert model.images.equal(store.val.images(rows))
    assert plan["other_images"][[0, 2]].equal(store.val.images([10, 8]))  # where another picture is asked for


def test_validation_of_captions_alone_reads_no_picture(store):
    model = Recorder(reads="captions")
    evaluation.validate(model, store.val, 0, limit=4)
    assert model.images is None


def test_any_number_of_processes_validates_alike(store, monkeypatch):
    model, sums, plans = store.make_model("mir,itm,mlm"), [], []
    wanted = evaluation.validate(model, store.val, 0, batch_size=5, limit=20)
    monkeypatch.setattr(model, "plan", lambda *given, plan=model.plan: plans.append(given[1].tolist()) or plan(*given))
    monkeypatch.setattr(runtime, "world", lambda: 3)
    monkeypatch.setattr(runtime, "sum_over_processes", lambda own: sums.append(own) or own)
    for index in range(3):
        monkeypatch.setattr(runtime, "process_index", lambda index=index: index)
        evaluation.validate(model, store.val, 0, batch_size=5, limit=20)
    total, count = sum(sums)
    assert sorted(sum(plans, [])) == list(range(20))  # no batch is read twice
    assert list(wanted) == ["mir", "itm", "mlm"]
    assert (total / count).tolist() == pytest.approx(list(wanted.values()))


def test_validations_contrast_is_the_mean_over_pairs_each_within_its_batch(store, in_float32):
    model, total = store.make_model("itc"), 0
    for rows in (torch.arange(4), torch.arange(4, 7)):
        with torch.no_grad():
            vectors = model.embed(store.val.images(rows), store.val.tokens[rows])
            total += len(rows) * model.contrast(vectors, store.val.same(rows)).item()
    assert evaluation.validate(model, store.val, 0, batch_size=4, limit=7)["itc"] == pytest.approx(total / 7, rel=1e-5)


def test_validations_towers_and_recognition_are_those_of_the_command(store):
    model, rows = store.model, store.val.rows
    values = evaluation.validate(model, store.val, 3, batch_size=50, limit=26)
    lists = evaluation.candidates(rows[:104], 26, 101, 3)
    towers = evaluation.read_towers(model, store.val)
    results, _ = evaluation.retrieval(model, store.val, [{"tir": lists, "itr": lists}], towers)
    for way in WAYS:
        assert values[f"{way}_towers"] == results[way]["towers"]["R@1"]
    found = evaluation.recognition(rows[:26], LABELS, evaluation.read_classes(model, store.val)[:26])
    assert values["cr_accuracy"] == (found["category"]["accuracy"] + found["subcategory"]["accuracy"]) / 2


def test_validation_measures_what_is_active_alone(store):
    model = store.make_model(itm_from=0.5)
    early = evaluation.validate(model, store.val, 0, progress=0.4, limit=8)
    assert early.keys() == {"itc", "tir_towers", "itr_towers"}
    one = replace(store.val, rows=[{**row, "category": "", "subcategory": ""} for row in store.val.rows[:1]])
    assert "itc" in evaluation.validate(store.make_model("itc,cr"), one, 0)  # without a rival, without a class


@pytest.mark.parametrize("objectives, values, wanted", [
    ("mir,itc,cr", {"mir": 1, "itc": 1, "tir_towers": 0.2, "itr_towers": 0.3, "cr_accuracy": 0.9}, 0.5),
    ("cr", {"cr": 2, "cr_accuracy": 0.9}, 0.9),
    ("cr:3", {"cr": 2}, -6),
    ("mir:10,itm:2,cr", {"mir": 1, "itm": 3, "cr_accuracy": 0.9}, -16),
])
def test_the_best_checkpoint_is_chosen_by_what_the_run_is_for(store, objectives, values, wanted):
    assert evaluation.goodness(store.make_model(objectives, mask_pictures=0.3), values) == pytest.approx(wanted)


# --- The command ---

TASKS = ("--tasks", "retrieval,recognition,generation", "--full-gallery", "--queries", "9", "--draws", "2")


def run_main(*arguments):
    evaluation.main([*map(str, arguments), "--device", "cpu"])


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def measured(store, tmp_path_factory):
    """A run measured on everything."""
    run = store.write_run(tmp_path_factory.mktemp("runs") / "tiny & <small>")
    run_main(run, *TASKS)
    return run


def test_one_command_measures_everything(store, measured):
    results = read_results(measured)
    run = results["runs"][str(measured)]
    for way in WAYS:
        for method in ("fusion", "towers", "reranked"):
            assert run["retrieval"][way][method].keys() == {"R@1", "R@5", "R@10", "SumR", "median_rank", "sd"}
        lists = {"queries": 9, "size": 101, "draws": 2, "lists": 18, "filled": 18}
        assert results["lists"][way] == lists
    for part in LABELS:
        assert run["recognition"]["picture and caption"][part].keys() >= {"accuracy", "macro_f", "SumC"}
    assert run["generation"].keys() >= {"psnr", "ssim", "psnr_hidden", "floor_psnr"}
    assert run["full_gallery"]["scores_used"] == 2 * 9 * 20
    saved = json.loads((measured / "candidates.json").read_text())
    for seed in (0, 1):
        drawn = [entry["candidates"] for entry in saved if entry["draw"] == seed]
        assert drawn == [entry["candidates"] for entry in evaluation.candidates(store.split.rows, 9, seed=seed)]
    assert results["measured"]["rows"] == 104 and results["measured"]["paper"] is None
    for reads, modality in (("picture and caption", "both"), ("the picture alone", "image")):
        predicted = evaluation.read_classes(store.model, store.split, modality)
        assert run["recognition"][reads] == evaluation.recognition(store.split.rows, LABELS, predicted)


def test_seed_best_and_queries_reach_both_ways_to_retrieve(store, monkeypatch, tmp_path):
    asked, usual = [], evaluation.rank

    def spy(model, split, questions, towers, best, *rest):
        asked.append((questions[0].queries.tolist(), best))
        return usual(model, split, questions, towers, best, *rest)

    monkeypatch.setattr(evaluation, "rank", spy)
    flags = "--tasks retrieval --full-gallery --queries 5 --draws 1 --seed 4 --best 3".split()
    run_main(store.write_run(tmp_path / "run", store.make_model("itm,itc")), *flags)
    queries = [evaluation.from_gallery(store.split, "tir", 5, seed).queries.tolist() for seed in (4, 0)]
    assert [best for _, best in asked] == [3, 3] and asked[1][0] == queries[0] != queries[1]


def test_a_runs_numbers_are_the_same_beside_another_run_and_on_saved_lists(store, measured, tmp_path, capsys):
    other = store.write_run(tmp_path / "other", store.make_model("itm,mlm", seed=1))
    run_main(measured, other, *TASKS, "--out", tmp_path / "two")
    said, two, alone = capsys.readouterr().out, read_results(tmp_path / "two"), read_results(measured)
    assert two["runs"][str(measured)] == alone["runs"][str(measured)] and two["lists"] == alone["lists"]
    lists = (tmp_path / "two" / "candidates.json").read_bytes()
    assert lists == (measured / "candidates.json").read_bytes()
    assert two["runs"][str(other)].keys() == {"about", "retrieval", "full_gallery"}
    assert f"{other}: fusion encoder" in said and f"{measured}: towers, then both" in said and "paper" not in said
    assert not (other / "results.json").exists()
    run_main(other, "--tasks", "retrieval", "--candidates", measured / "candidates.json")
    assert read_results(other)["runs"][str(other)]["retrieval"] == two["runs"][str(other)]["retrieval"]
    assert not (other / "candidates.json").exists()


def test_all_three_models_stand_in_one_table(store, tmp_path, capsys):
    sizes = dict(image_size=32, text_len=16, vocab_size=len(store.tokenizer), width=16, depth=1, heads=2)
    classes = dict(n_category=4, n_subcategory=8)
    small = kaleido.Config(**sizes, **classes, patch_side=8, encoder="conv", feature_dim=8, sat_dim=8, sat_grid=4)
    models = {
        "a": store.model,
        "b": store.finish(kaleido.Kaleido, small, kaleido.Recipe()),
        "c": store.finish(vlmo.VLMo, vlmo.Config(**sizes, **classes, fused=1, embed_dim=8), vlmo.Recipe()),
    }
    runs = [store.write_run(tmp_path / name, model) for name, model in models.items()]
    run_main(*runs, "--tasks", "retrieval,recognition", "--queries", 2, "--draws", 1)
    results, said = read_results(runs[0])["runs"], capsys.readouterr().out
    assert [results[str(run)]["about"]["model"] for run in runs] == ["mvlt", "kaleido", "vlmo"]
    for run, methods in zip(runs, ({"fusion", "towers", "reranked"}, {"fusion"}, {"fusion", "towers", "reranked"})):
        assert results[str(run)]["retrieval"]["tir"].keys() == methods
        assert f"{run}: fusion encoder" in said


def test_kaleido_encodes_a_picture_once_for_all_its_captions_and_scores_as_pair_by_pair(store, in_float32, monkeypatch):
    sizes = dict(image_size=32, text_len=16, vocab_size=len(store.tokenizer), width=16, depth=1, heads=2)
    config = kaleido.Config(**sizes, patch_side=8, encoder="conv", feature_dim=8, sat_dim=8, sat_grid=4)
    model = store.finish(kaleido.Kaleido, config, kaleido.Recipe(objectives="itm"))
    split, seen, usual = store.split, [], model.look_at
    monkeypatch.setattr(model, "look_at", lambda images: seen.append(len(images)) or usual(images))
    pairs = torch.cartesian_prod(torch.tensor([3, 0, 5]), torch.arange(7))  # 21 pairs of at most 3 pictures
    scores = evaluation.pair_scores(model, split, pairs, batch_size=4)
    assert len(seen) == 6 and sum(seen) <= 3 + 6  # once, and once more where a batch ends among its captions
    for pair, score in zip(pairs.tolist(), scores.tolist()):
        assert score == pytest.approx(score_alone(model, split, *pair), abs=1e-4)


def test_captions_and_the_tasks_of_pre_training_are_measured_where_a_model_has_them(store, tmp_path, monkeypatch):
    sizes = dict(image_size=32, text_len=16, vocab_size=len(store.tokenizer), width=16, depth=1, heads=2)
    config = kaleido.Config(**sizes, patch_side=8, encoder="conv", feature_dim=8, sat_dim=8, sat_grid=4)
    monkeypatch.setattr(kaleido.Kaleido, "pretext", lambda model, split, draw: {"rr": draw("x").initial_seed()}, False)
    results = {}
    for objectives in ("caption", "rr,jps"):
        model = store.finish(kaleido.Kaleido, config, kaleido.Recipe(objectives=objectives, align="none"))
        model.labels = {"category": [], "subcategory": []}
        run = store.write_run(tmp_path / objectives, model)
        run_main(run)
        results[objectives] = read_results(run)["runs"][str(run)]
    assert results["caption"].keys() == {"about", "captioning"}
    assert results["rr,jps"]["pretext"] == {"rr": data.generator(0, "pretext", "x").initial_seed()}


def test_the_report_shows_each_aligned_word_once_in_a_picture_of_its_own(store, tmp_path):
    sizes = dict(image_size=32, text_len=16, vocab_size=len(store.tokenizer), width=16, depth=1, heads=2)
    config = kaleido.Config(**sizes, patch_side=8, encoder="conv", feature_dim=8, sat_dim=8, sat_grid=4)
    model = store.finish(kaleido.Kaleido, config, kaleido.Recipe(objectives="sat,rr", align="forced"))
    model.alignable.fill_(True)
    said = store.split.tokens[0, 3].item()  # the captioner says nothing else
    model.captioner.out.bias.data[said] = 1e4
    word = store.tokenizer.words[said]
    drawn = figures.aligned_words(model, store.split)
    assert drawn.keys() == {word} and drawn[word].shape == (240, 240, 3)
    with torch.no_grad():
        [found], [box] = figures.alignment(model, store.split.images([0]), store.split.tokens[:1])
    first = Image.fromarray(store.split.pictures[0]).resize((240, 240))
    assert np.array_equal(drawn[word], report.draw_word(first, box, *found[0]))  # the first picture, not a later one
    assert len(figures.aligned_words(model, store.split, shown=0)) == 0
    model.labels = {"category": [], "subcategory": []}
    run = store.write_run(tmp_path / "run", model)
    run_main(run)
    assert f'alt="{word}"' in (run / "report.html").read_text()


def test_lists_are_drawn_for_a_folder_without_any_run(store, tmp_path, capsys):
    run_main("--draw-lists", store.folder, "--seed", 1, "--queries", 9, "--draws", 1, "--out", tmp_path / "lists.json")
    wanted = evaluation.candidates(store.split.rows, 9, seed=1)
    found = json.loads((tmp_path / "lists.json").read_text())
    assert [{name: entry[name] for name in ("query", "candidates")} for entry in found] == wanted
    assert f"9 lists of 101 candidates: {tmp_path / 'lists.json'}" in capsys.readouterr().out


def test_lists_are_drawn_several_times_and_a_file_is_read_as_far_as_is_asked(store, tmp_path):
    path = tmp_path / "lists.json"
    run_main("--draw-lists", store.folder, "--seed", 1, "--queries", 9, "--draws", 3, "--out", path)
    args = evaluation.parse(["run", "--candidates", str(path), "--queries", "4"])
    draws = evaluation.draw_all(args, store.split.rows)
    for seed, draw in zip((1, 2, 3), draws, strict=True):
        wanted = [entry["candidates"] for entry in evaluation.candidates(store.split.rows, 9, seed=seed)[:4]]
        assert all([entry["candidates"] for entry in draw[way]] == wanted for way in WAYS)


def test_the_command_reads_as_the_run_was_trained_and_as_it_is_asked(store, tmp_path, monkeypatch):
    model = store.make_model("mir,itm,mlm", mask_style="grid", mask_ratio=0.25)
    run, asked = store.write_run(tmp_path / "run", model, fit="pad"), []
    monkeypatch.setattr(data, "open_split", lambda *given, **more: asked.append((*given[1:], more)) or store.val)
    run_main(run, "--split", "val", "--queries", 3, "--draws", 1, "--skip-bad")
    assert [asked[0][i] for i in (0, 3, 4, 5, 6, 7)] == ["val", 32, 16, "pad", True, "auto"]
    found = read_results(run)["runs"][str(run)]
    assert set(found["retrieval"]["tir"]) == {"fusion"}  # the towers are untrained
    assert [found["generation"][name] for name in ("style", "ratio", "unit")] == ["grid", 0.25, 8]


def test_a_folder_whose_name_is_no_text_gets_a_report(store, tmp_path):
    folder = make_shop(tmp_path / os.fsdecode(b"sh\xffop"), products=20)
    run = store.write_run(tmp_path / "run", store.make_model("itc"))
    run_main(run, "--data", folder, "--full-gallery")
    assert "sh\\udcffop" in (run / "report.html").read_text()
    assert read_results(run)["measured"]["data"] == "sh\udcffop"


def test_two_processes_measure_what_one_measures(store, measured, tmp_path):
    script = """
import json, sys, data, eval as evaluation
from extras import runtime, weights

def main():
    evaluation.main(sys.argv[2:])
    model, tokenizer, _ = weights.load_run(sys.argv[2])
    split = data.open_split(sys.argv[1], "val", tokenizer, model.labels, 32, 16)
    values = evaluation.validate(model, split, 0, batch_size=5, limit=20)
    if runtime.process_index() == 0:
        print("values", json.dumps(values))

runtime.run(main)  # which also leaves the process group: without that a process may abort as it ends
"""
    (tmp_path / "both.py").write_text(script)
    home = os.path.dirname(os.path.abspath(evaluation.__file__))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": home}
    command = ["torchrun", "--standalone", "--nproc_per_node=2", tmp_path / "both.py", store.folder, measured, *TASKS]
    command += ["--device", "cpu", "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "report.html", "candidates.json"):
        assert (tmp_path / "out" / name).read_bytes() == (measured / name).read_bytes()
    found = json.loads(re.search("values (.*)", done.stdout)[1])
    assert found == pytest.approx(evaluation.validate(store.model, store.val, 0, batch_size=5, limit=20))


# --- What is refused ---


@pytest.mark.parametrize("objectives, flags, wanted", [
    (["mir,itm,mlm"], "", [["retrieval", "generation"]]),
    (["mir,itm,mlm,itc,cr"], "", [["retrieval", "recognition", "generation"]]),
    (["cr"], "", [["recognition"]]),
    (["itc"], "", [["retrieval"]]),
    (["mir,itm,mlm,itc"], "--full-gallery", [["generation", "full_gallery"]]),
    (["mir,itm,mlm,itc"], "--full-gallery --tasks retrieval", [["retrieval", "full_gallery"]]),
    (["mir,itm,mlm"], "--tasks generation", [["generation"]]),
    (["mir,itm", "itm,cr"], "--tasks recognition,retrieval", [["retrieval"], ["recognition", "retrieval"]]),
    (["cr"], "--tasks retrieval", "retrieval: needs a run that was trained for itm or itc .0: cr."),
    (["mlm"], "", "0: was trained for nothing that is to be measured here"),
    (["mir,itm"], "--full-gallery", [["generation", "full_gallery"]]),
    (["mir"], "--full-gallery", "full_gallery: needs a run that was trained for itc or itm .0: mir."),
    (["mir,itm", "cr"], "--tasks retrieval", "1: was trained for nothing that is to be measured here"),
])
def test_a_run_is_measured_on_what_it_was_trained_for(store, objectives, flags, wanted):
    names = list(map(str, range(len(objectives))))
    args = evaluation.parse([*names, *flags.split()])
    models = {name: store.make_model(chosen) for name, chosen in zip(names, objectives)}
    if isinstance(wanted, list):
        assert list(evaluation.choose_tasks(args, models).values()) == wanted
    else:
        with pytest.raises(UserError, match=wanted):
            evaluation.choose_tasks(args, models)


def test_a_run_is_measured_on_what_has_been_trained_so_far(store):
    model = store.make_model("itm,itc,mir,cr")
    for learnt, tasks in (({"itc"}, ["retrieval"]), ({"itm", "cr"}, ["retrieval", "recognition"])):
        model.learnt = learnt
        assert evaluation.choose_tasks(evaluation.parse(["early"]), {"early": model}) == {"early": tasks}
    towers = evaluation.read_towers(model, store.split)
    asked = [evaluation.from_lists("tir", two_draws(store.split)[0]["tir"])]
    for learnt, methods in (({"itc"}, {"towers"}), ({"itm", "itc"}, {"towers", "reranked", "fusion"})):
        model.learnt = learnt
        assert evaluation.rank(model, store.split, asked, towers)[0].ranks.keys() == methods
    model.learnt = set()
    with pytest.raises(UserError, match="early: was trained for nothing that is to be measured here"):
        evaluation.choose_tasks(evaluation.parse(["early"]), {"early": model})


def refuses(said, *arguments):
    with pytest.raises(UserError, match=said) as error:
        run_main(*arguments)
    assert "\n" not in str(error.value) and error.value.status == 1


def test_a_run_that_decoded_its_pictures_live_is_measured_so(store, tmp_path):
    folder = shutil.copytree(store.folder, tmp_path / "shop", ignore=shutil.ignore_patterns(".cache"))
    run = store.write_run(tmp_path / "run", data=str(folder), decode="live")
    run_main(run, "--tasks", "generation")
    assert not list((folder / ".cache").glob("*-stretch-*.npy"))


def test_what_does_not_fit_is_one_line(store, tmp_path, monkeypatch):
    refuses("no run here", tmp_path)
    run = store.write_run(tmp_path / "run")
    monkeypatch.setattr(evaluation, "share_out", lambda *rest: pytest.fail("read a picture first"))
    few = make_shop(tmp_path / "few", products=40)
    rule = "needs 101 products with different captions and pictures, this split has 8"
    refuses(rule, run, "--tasks", "retrieval", "--data", few)
    refuses("nowhere: no such folder", run, "--data", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refuses("--out .*file: cannot be a folder", run, "--full-gallery", "--out", tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.os, "access", lambda path, mode: mode != os.W_OK)  # which root always has
        refuses("--out .*sealed: cannot be written", run, "--full-gallery", "--out", tmp_path / "sealed")
    gone = store.write_run(tmp_path / "gone", data=str(tmp_path / "moved"))
    refuses("moved: no such folder, though a run was trained on it; name the data with --data", gone)
    refuses("--data: must name the folder, for the runs were trained on .*shop and .*moved", run, gone)
    nameless = store.write_run(tmp_path / "nameless", data="")
    refuses("--data: must name the folder, for no run says", nameless)
    foreign = store.make_model()
    foreign.vocabulary = [word if word.startswith("[") else f"z{i}" for i, word in enumerate(foreign.vocabulary)]
    refuses("foreign: .*of this split's words are unknown", store.write_run(tmp_path / "foreign", foreign))


def test_a_class_field_that_is_missing_ends_the_command_before_it_reads_a_picture(store, tmp_path, monkeypatch):
    run = store.write_run(tmp_path / "run")
    split = replace(store.split, rows=[{**row, "category": ""} for row in store.split.rows])
    monkeypatch.setattr(evaluation, "share_out", lambda *rest: pytest.fail("read a picture first"))
    monkeypatch.setattr(data, "open_split", lambda *given, **more: split)
    refuses("category: no row of this split has one, which recognition needs", run)


def test_runs_that_read_other_rows_are_not_compared(store, tmp_path, monkeypatch):
    runs = [store.write_run(tmp_path / name) for name in ("one", "two")]
    splits = iter([store.split, store.val])
    monkeypatch.setattr(data, "open_split", lambda *given, **more: next(splits))
    refuses("two: reads other rows of the data than .*one; measure it alone", *runs)


def test_what_stands_around_a_caption_does_not_count_as_its_words(store):
    t = store.tokenizer
    coat = len(t) - 1
    for words, refused in (([t.unk_id] * 4 + [coat] * 3, True), ([t.unk_id, coat], False)):  # at most half
        tokens = torch.tensor([[t.cls_id, *words, t.sep_id, t.pad_id]])
        run = evaluation.Run("r", None, store.model, {}, replace(store.split, tokens=tokens), [])
        with pytest.raises(UserError, match="r: 57% of this split's words are unknown") if refused else nullcontext():
            evaluation.check_fit(run, run)


@pytest.mark.parametrize("arguments", [
    "run --tasks cooking", "run --queries 0", "run --split train", "run --draws few", "run run", "",
    "run --draw-lists x", "run --seed -1"])
def test_a_wrong_flag_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as left:
        evaluation.parse(arguments.split())
    assert left.value.code == 2


def test_the_script_ends_with_one_line_and_status_1(tmp_path):
    done = subprocess.run([sys.executable, evaluation.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("eval.py: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name, paper", [
    ("fashiongen_256_256_validation.h5", "Fashion-Gen"), ("full_valid_info_PAI", "Fashion-Gen"),
    ("dataset_coco.json", "COCO"), ("test.jsonl", None)])
def test_the_papers_data_sets_are_known_by_their_files(store, tmp_path, name, paper):
    (tmp_path / name).touch()
    args = evaluation.parse(["run"])
    assert evaluation.measured_on(args, store.split, tmp_path)["paper"] == paper
    args = evaluation.parse(["run", "--split", "val"])
    assert evaluation.measured_on(args, store.split, tmp_path)["paper"] is None  # its numbers are of the test split
