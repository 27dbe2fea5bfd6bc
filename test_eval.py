"""The laws of eval.py and report.py: metrics against slow plain references, candidate lists, and whole runs of a tiny random model."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import eval as evaluation
import mvlt
import report

settings.register_profile("laws", deadline=None, max_examples=30)
settings.load_profile("laws")
SEEDS = st.integers(0, 2**31 - 1)
HERE = os.path.dirname(os.path.abspath(evaluation.__file__))


# --- Ranks and recalls ---


@st.composite
def scored_lists(draw):
    """Scores with many ties and some NaN and infinities, and the column of the truth."""
    queries, size = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf, math.nan])
    scores = draw(st.lists(st.lists(value, min_size=size, max_size=size), min_size=queries, max_size=queries))
    return torch.tensor(scores), torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=queries, max_size=queries)))


def slow_rank(scores, truth):
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


def reranked(near, scores, best):
    return evaluation.ranks(evaluation.in_two_steps(near, scores, best), torch.zeros(len(near)))


@given(st.integers(2, 12), st.integers(1, 12), SEEDS, st.booleans())
def test_reranking_agrees_with_sorting_in_plain_python(size, best, seed, blind):
    random = np.random.default_rng(seed)
    near, itm = random.permutation(size).tolist(), random.integers(0, 4, size).tolist()
    near[0] = math.nan if blind else near[random.integers(size)]  # the truth may tie with one rival; the rivals differ
    order = sorted(range(size), key=lambda i: (-near[i], i == 0)) if not blind else [*range(1, size), 0]
    short = order[:best]
    wanted = 1 + sum(itm[i] >= itm[0] for i in short if i != 0) if 0 in short else slow_rank(near, 0)
    found = reranked(torch.tensor([near], dtype=torch.float32), torch.tensor([itm], dtype=torch.float64), best)
    assert found.tolist() == [wanted]


def test_reranking_all_of_them_is_the_fusion_encoders_rank():
    near, scores = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0))
    assert reranked(near, scores, 30).equal(evaluation.ranks(scores, torch.zeros(20)))
    assert reranked(near, scores, 1).equal(evaluation.ranks(near, torch.zeros(20)))


def test_towers_that_cannot_tell_keep_the_truth_off_the_shortlist():
    assert (reranked(torch.zeros(3, 101), torch.eye(3, 101), 20) == 101).all()


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
                var_u, var_v, both = mean(lambda s, t: (s - u) ** 2), mean(lambda s, t: (t - v) ** 2), mean(lambda s, t: (s - u) * (t - v))
                values.append((2 * u * v + 1e-4) * (2 * both + 9e-4) / ((u * u + v * v + 1e-4) * (var_u + var_v + 9e-4)))
    return sum(values) / len(values)


@settings(max_examples=5)
@given(SEEDS, st.integers(11, 14), st.integers(11, 14))
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


# --- Candidate lists ---


@st.composite
def catalogues(draw):
    """Rows of 12 to 40 products in few classes, some without one, with one to three views and now and then a caption in common."""
    rows = []
    for product in range(draw(st.integers(12, 40))):
        place = draw(st.sampled_from([("top", "coat"), ("top", "shirt"), ("foot", "boot"), ("foot", ""), ("", "")]))
        caption = draw(st.sampled_from([f"thing {product}"] * 4 + ["a plain thing", "A  plain Thing"] * (product > 0)))  # two captions at the least
        row = {"product_id": f"p{product}", "caption": caption, "category": place[0], "subcategory": place[1]}
        rows += [{**row, "image": f"{product}-{view}.png"} for view in range(draw(st.integers(1, 3)))]
    return draw(st.permutations(rows))


def distinct(rows):
    """How many products a list can hold at most: no two of one caption."""
    return len({plain(row) for row in rows})


def plain(row):
    return " ".join(row["caption"].lower().split())


@given(catalogues(), st.integers(1, 50), SEEDS)
def test_a_list_is_the_truth_and_other_products_with_other_captions(rows, queries, seed):
    size = min(8, distinct(rows))
    lists = evaluation.candidates(rows, queries, size, seed)
    assert lists == evaluation.candidates(rows, queries, size, seed)
    asked = [rows[entry["query"]]["product_id"] for entry in lists]
    assert len(asked) == len(set(asked)) == min(queries, len({row["product_id"] for row in rows}))
    for entry in lists:
        found = [rows[row] for row in entry["candidates"]]
        assert entry["candidates"][0] == entry["query"] and len(found) == size
        assert len({row["product_id"] for row in found}) == len({plain(row) for row in found}) == size


@given(catalogues(), SEEDS)
def test_rivals_come_from_the_nearest_shelf_while_it_has_any(rows, seed):
    size = min(8, distinct(rows))
    for entry in evaluation.candidates(rows, 50, size, seed):
        query, rivals = rows[entry["query"]], [rows[row] for row in entry["candidates"][1:]]

        def left(*fields):  # captions of the query's own shelf which the list could still take
            shelf = [row for row in rows if query[fields[-1]] and all(row[field] == query[field] for field in fields)]
            return {plain(row) for row in shelf} - {plain(row) for row in [query, *rivals]}

        main = [row for row in rivals if query["category"] and row["category"] == query["category"]]
        sub = [row for row in main if query["subcategory"] and row["subcategory"] == query["subcategory"]]
        if len(sub) < len(rivals):
            assert not left("category", "subcategory")
        if len(main) < len(rivals):
            assert not left("category")


@given(catalogues(), SEEDS)
def test_filled_counts_the_lists_with_a_rival_from_elsewhere(rows, seed):
    lists = evaluation.candidates(rows, 50, min(6, distinct(rows)), seed)
    home = [Counter((rows[row]["category"], rows[row]["subcategory"]) for row in entry["candidates"]) for entry in lists]
    assert evaluation.filled(rows, lists) == sum(len(places) > 1 or not next(iter(places))[1] for places in home)


def plain_rows(n):
    return [{"image": f"{i}.png", "caption": f"thing {i}", "product_id": str(i)} for i in range(n)]


def test_rows_without_classes_are_drawn_from_all():
    lists = evaluation.candidates(plain_rows(120), 3)
    assert [len(entry["candidates"]) for entry in lists] == [101] * 3 and evaluation.filled(plain_rows(120), lists) == 3


def test_another_seed_draws_other_lists():
    assert evaluation.candidates(plain_rows(120), 3, seed=0) != evaluation.candidates(plain_rows(120), 3, seed=1)


@pytest.mark.parametrize("changes, said", [
    ({}, "101 products with different captions, this split has 100"),
    ({"queries": 0}, "queries of at least 1"),
    ({"size": 1}, "size of at least 2"),
])
def test_lists_that_cannot_be_drawn_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        evaluation.candidates(plain_rows(100), **changes)


def test_saved_lists_come_back(tmp_path):
    rows = plain_rows(30)
    draws = [evaluation.candidates(rows, 4, 10, seed) for seed in (0, 1)]
    evaluation.save_candidates(tmp_path / "lists.json", [{"tir": lists, "itr": lists} for lists in draws], rows)
    for found, lists in zip(evaluation.read_candidates(tmp_path / "lists.json", rows), draws, strict=True):
        assert found["tir"] is found["itr"] and [{name: entry[name] for name in ("query", "candidates")} for entry in found["tir"]] == lists
        assert all(entry["product_id"] == rows[entry["query"]]["product_id"] for entry in found["tir"])
    with pytest.raises(data.DataError, match="list 1 was drawn from other rows: its query was product '.*', that row is now '.*'"):
        evaluation.read_candidates(tmp_path / "lists.json", rows[1:] + rows[:1])
    (tmp_path / "one.json").write_text(json.dumps(draws[0]))  # lists made by hand need not name products
    assert evaluation.read_candidates(tmp_path / "one.json", rows) == [{"tir": draws[0], "itr": draws[0]}]


@pytest.mark.parametrize("entries, said", [
    ([], "no candidate list"),
    ("nonsense", "not a file of candidate lists"),
    ([{"query": 0}], "not a file of candidate lists"),
    ([{"query": 0, "candidates": [0, 30]}], "list 1 must hold row numbers from 0 to 29"),
    ([{"query": 0, "candidates": [0, -1]}], "list 1 must hold row numbers"),
    ([{"query": 0, "candidates": [0, 1]}, {"query": 1, "candidates": [1, 2, 3]}], "list 2 must hold as many rows"),
    ([{"query": 0, "candidates": [0, 1, 1]}], "none twice"),
    ([{"query": 1, "candidates": [0, 1]}], "begin with the query"),
])
def test_lists_that_do_not_fit_are_named(tmp_path, entries, said):
    (tmp_path / "lists.json").write_text(json.dumps(entries))
    with pytest.raises(data.DataError, match=said):
        evaluation.read_candidates(tmp_path / "lists.json", plain_rows(30))


def test_the_authors_pickles_are_read_and_may_build_nothing_but_plain_values(tmp_path):
    rows = plain_rows(30)
    for folder, order in (("retrieve_TIR", [3, 1, 2]), ("retrieve_ITR", [5, 6, 7])):
        (tmp_path / folder).mkdir()
        entries = {i: {"img_name": f"{row}.png", "captions": rows[row]["caption"]} for i, row in enumerate(order)}
        (tmp_path / folder / "0.pkl").write_bytes(pickle.dumps(entries))
    draw = {"tir": [{"query": 3, "candidates": [3, 1, 2]}], "itr": [{"query": 5, "candidates": [5, 6, 7]}]}
    assert evaluation.read_candidates(tmp_path, rows) == [draw]
    assert evaluation.read_candidates(tmp_path / "retrieve_TIR", rows) == [{"tir": draw["tir"], "itr": draw["tir"]}]
    (tmp_path / "retrieve_TIR" / "1.pkl").write_bytes(pickle.dumps({0: {"img_name": "nowhere.png"}}))
    with pytest.raises(data.DataError, match="1.pkl: 'nowhere.png' is no picture of this split"):
        evaluation.read_candidates(tmp_path, rows)
    for wrong, said in (([1], "must be a dict of dicts with img_name"), ({0: "a.png"}, "must be a dict of dicts"), ({0: {}}, "must be a dict of dicts"),
                        ({}, "names no picture")):
        (tmp_path / "retrieve_TIR" / "1.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(data.DataError, match=f"1.pkl: {said}"):
            evaluation.read_candidates(tmp_path, rows)
    (tmp_path / "retrieve_TIR" / "1.pkl").write_bytes(pickle.dumps({0: os.system}))
    with pytest.raises(data.DataError, match="1.pkl: bad pickle"):
        evaluation.read_candidates(tmp_path, rows)


# --- A tiny run and a tiny shop ---

LABELS = {"category": ["foot", "top"], "subcategory": ["boot", "coat", "shirt"]}
CONFIG = mvlt.Config(image_size=32, text_len=16, vocab_size=5, token_dim=16, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2),
                     mlp_ratios=(2, 2, 2, 2), embed_dim=8, n_category=2, n_subcategory=3)


def write_shop(folder, products=110):
    """A test split of as many products: coloured squares, each with a caption of its own."""
    random, colours = np.random.default_rng(0), {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200)}
    rows = []
    for i in range(products):
        colour, kind = list(colours)[i % 3], LABELS["subcategory"][i % 4 % 3]
        pixels = random.integers(200, 256, (32, 32, 3), dtype=np.uint8)
        pixels[4:-4, 4 + i % 9 : -4] = colours[colour]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "caption": f"{colour} {kind} {'x' * (i % 5)} number {i}", "product_id": str(i)}
        rows.append({**row, "category": "foot" if kind == "boot" else "top", "subcategory": kind})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_run(folder, model, shop, **run):
    folder.mkdir(exist_ok=True)
    mvlt.save(folder / "last.pt", model, step=7, run={"task": "pretrain", "preset": "tiny", "data": str(shop), "mask_unit": 8, **run})
    lines = [{"step": i, "loss": 5 / (i + 1), "mir": 1 / (i + 1), "lr": 0.1} for i in range(9)]
    lines += [{"step": 8, "val": {"R@1": 0.1}}, {"step": 9, "val": {"R@1": 0.2}}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
    return folder


def make_model(words, seed=0, **changes):
    torch.manual_seed(seed)
    model = mvlt.MVLT(replace(CONFIG, vocab_size=len(words), **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.vocabulary, model.labels = words, LABELS
    return model


class Shop:
    """The folder, a model for it, and the split as eval.py opens it."""

    def __init__(self, folder):
        self.folder = folder
        write_shop(folder)
        rows, pictures = data.load(folder, "test", 32)
        self.tokenizer = data.Tokenizer.train([row["caption"] for row in rows], size=90)
        self.model = make_model(self.tokenizer.words)
        self.catalogue = evaluation.Catalogue.of(rows, pictures, self.tokenizer, self.model.config)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    return Shop(tmp_path_factory.mktemp("shop"))


def one_by_one(model, catalogue, picture, caption):
    """The score of one pair as the paper says it, without batch, trimming or bf16."""
    with torch.no_grad():
        image = torch.from_numpy(catalogue.pictures[[picture]]).permute(0, 3, 1, 2) / 255
        logits = model.match(model.encode(image, catalogue.tokens[[caption]])[1])
    return (logits[0, 1] - logits[0, 0]).item()


def in_float32(monkeypatch):
    monkeypatch.setattr(evaluation, "autocast", lambda device: torch.autocast(device.type, enabled=False))


def test_pairs_score_as_each_would_alone_whatever_the_batch(shop, monkeypatch):
    in_float32(monkeypatch)
    pairs = torch.tensor([[0, 0], [5, 2], [0, 0], [17, 40], [5, 3], [109, 109]])
    wanted = [one_by_one(shop.model, shop.catalogue, *pair) for pair in pairs.tolist()]
    for batch_size in (1, 4, 100):
        found = evaluation.pair_scores(shop.model, shop.catalogue.pictures, shop.catalogue.tokens, pairs, batch_size)
        assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == 5  # the model tells the pairs apart


def test_a_pair_is_read_once_however_often_it_is_asked(shop, monkeypatch):
    read, encode = [], shop.model.encode
    monkeypatch.setattr(shop.model, "encode", lambda images, tokens: read.append(len(images)) or encode(images, tokens))
    lists = evaluation.candidates(shop.catalogue.rows, 5, 20)
    evaluation.retrieval(shop.model, shop.catalogue, [{"tir": lists, "itr": lists}] * 3, towers=False)
    asked = {(entry["query"], row) for entry in lists for row in entry["candidates"]}
    assert sum(read) == len(asked | {(row, query) for query, row in asked})


def test_reading_leaves_the_model_as_it_was(shop):
    shop.model.train()
    evaluation.pair_scores(shop.model, shop.catalogue.pictures, shop.catalogue.tokens, torch.tensor([[0, 0]]))
    assert shop.model.training
    shop.model.eval()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in shop.model.parameters())


def test_retrieval_agrees_with_scoring_pair_by_pair(shop, monkeypatch):
    in_float32(monkeypatch)
    lists = evaluation.candidates(shop.catalogue.rows, 3, 12)
    results, scores, order = evaluation.retrieval(shop.model, shop.catalogue, [{"tir": lists, "itr": lists}])
    wanted = {"tir": [[one_by_one(shop.model, shop.catalogue, row, e["query"]) for row in e["candidates"]] for e in lists],
              "itr": [[one_by_one(shop.model, shop.catalogue, e["query"], row) for row in e["candidates"]] for e in lists]}
    for way in ("tir", "itr"):
        assert torch.allclose(scores[way][0], torch.tensor(wanted[way], dtype=torch.float64), atol=1e-5)
        expected = evaluation.recalls([slow_rank(row, 0) for row in wanted[way]])
        assert {name: results[way][name] for name in expected} == expected
    with torch.no_grad():
        images = shop.model.embed_images(torch.from_numpy(shop.catalogue.pictures[np.arange(110)]).permute(0, 3, 1, 2) / 255)
        texts = shop.model.embed_texts(shop.catalogue.tokens)
    near, scale = [[(images[row] @ texts[e["query"]]).item() for row in e["candidates"]] for e in lists], shop.model.log_scale.exp().item()
    assert [slow_rank(row, 0) for row in order["tir"][0].tolist()] == [slow_rank([s / 2 + scale * n for s, n in zip(*rows)], 0) for rows in zip(wanted["tir"], near)]
    assert results["tir_towers"]["median_rank"] == evaluation.recalls([slow_rank(row, 0) for row in near])["median_rank"]


@given(near=st.lists(st.floats(-1, 1), min_size=2, max_size=2), match=st.lists(st.floats(-20, 20), min_size=2, max_size=2), scale=st.floats(0.1, 300))
def test_both_is_the_towers_logit_and_half_of_itms(shop, near, match, scale):
    model = make_model(shop.tokenizer.words)
    model.log_scale.data.fill_(math.log(scale))
    found = evaluation.both(model, torch.tensor(near), torch.tensor(match, dtype=torch.float64))
    assert found.tolist() == pytest.approx([min(100, scale) * n + m / 2 for n, m in zip(near, match)], rel=1e-5, abs=1e-5)


def test_a_model_that_says_the_same_of_all_is_last_in_all(shop):
    model = make_model(shop.tokenizer.words)
    for head in (model.match_head, model.image_tower.project):
        for parameter in head.parameters():
            parameter.data.zero_()
    lists = evaluation.candidates(shop.catalogue.rows, 6)
    listed, _, _ = evaluation.retrieval(model, shop.catalogue, [{"tir": lists, "itr": lists}])
    gallery = evaluation.full_gallery(model, shop.catalogue)
    for results, names, last in ((listed, ("tir", "itr", "tir_towers", "itr_reranked"), 101), (gallery, ("tir", "itr_towers"), 110)):
        for name in names:
            assert (results[name]["R@1"], results[name]["R@10"], results[name]["median_rank"]) == (0, 0, last)


def test_full_gallery_agrees_with_every_pair_when_any_of_a_products_captions_counts(shop, monkeypatch):
    in_float32(monkeypatch)
    rows = [{**row, "product_id": str(i // 3), "image": f"{i // 3}.png"} for i, row in enumerate(shop.catalogue.rows[:24])]  # as COCO's
    catalogue = evaluation.Catalogue.of(rows, data.open_pictures(shop.folder, rows, 32)[0], shop.tokenizer, shop.model.config)
    assert (len(catalogue.pictures), len(catalogue.tokens)) == (8, 24)
    results = evaluation.full_gallery(shop.model, catalogue, best=100)
    images, texts = evaluation.tower_vectors(shop.model, catalogue.pictures, catalogue.tokens)
    near = shop.model.log_scale.exp().item() * (images @ texts.T)
    scores = [[one_by_one(shop.model, catalogue, picture, caption) / 2 + near[picture, caption].item() for caption in range(24)] for picture in range(8)]
    itr = [1 + sum(score >= max(row[3 * p : 3 * p + 3]) for c, score in enumerate(row) if c // 3 != p) for p, row in enumerate(scores)]
    tir = [slow_rank([row[c] for row in scores], c // 3) for c in range(24)]
    assert results["itr"] == evaluation.recalls(itr) and results["tir"] == evaluation.recalls(tir)
    assert results["pairs_read"] == results["pairs_whole"] == 2 * 8 * 24 and results["towers_read"] == 32
    few = evaluation.full_gallery(shop.model, catalogue, best=2)
    assert few["pairs_read"] == 8 * 2 + 24 * 2 and few["itr_towers"] == results["itr_towers"]
    alone = evaluation.full_gallery(shop.model, catalogue, best=0)
    assert alone == {name: value for name, value in results.items() if name not in ("tir", "itr")} | {"best": 0, "pairs_read": 0}


def test_the_towers_alone_rank_the_gallery_of_a_run_that_was_never_taught_to_match(shop, tmp_path, capsys):
    run = write_run(tmp_path / "run", shop.model, shop.folder, objectives="itc")
    evaluation.main(evaluation.parse([str(run), "--full-gallery", "--device", "cpu"]))
    found = json.loads((run / "results.json").read_text())["full_gallery"]
    assert found["pairs_read"] == 0 and {"tir_towers", "itr_towers"} <= found.keys() and not {"tir", "itr"} & found.keys()
    assert "towers alone" in (said := capsys.readouterr().out) and "both" not in said


# --- Recognition and generation ---


def test_a_class_the_run_never_saw_is_an_error_of_its_own():
    rows = [{"category": "foot", "subcategory": "boot"}] * 3 + [{"category": "hat", "subcategory": "cap"}]
    results = evaluation.recognition(rows, LABELS, np.zeros((4, 2), dtype=int))
    assert results["main"]["accuracy"] == 0.75 and results["main"]["unseen"] == 1
    assert results["main"]["macro_f"] == pytest.approx((6 / 7 + 0) / 2)
    assert results["main"]["SumC"] == pytest.approx(75 + 100 * 3 / 7)


@pytest.mark.parametrize("category, said", [("hat", "knows none of this split's classes .*'hat'"), ("", "category: no row of this split has one")])
def test_recognition_refuses_rows_it_cannot_judge(category, said):
    with pytest.raises(data.DataError, match=said):
        evaluation.recognition([{"category": category, "subcategory": "cap", "where": "test.jsonl:1"}], LABELS, np.zeros((1, 2), dtype=int))


def test_rows_without_a_class_are_not_judged():
    classes = [("foot", "boot"), ("foot", ""), ("", "coat"), ("top", "coat"), ("foot", "boot")]
    rows = [{"category": category, "subcategory": subcategory, "caption": ""} for category, subcategory in classes]
    predicted = np.array([[0, 0], [1, 1], [1, 1], [1, 1], [1, 0]])
    results = evaluation.recognition(rows, LABELS, predicted)
    assert (results["main"]["rows"], results["main"]["accuracy"]) == (4, 0.5) and (results["sub"]["rows"], results["sub"]["accuracy"]) == (4, 1)
    catalogue = evaluation.Catalogue(rows, np.zeros((5, 8, 8, 3), np.uint8), None, torch.arange(5), torch.arange(5))
    figure = evaluation.recognition_figure(catalogue, LABELS, predicted)
    assert [len(figure[name]) for name in ("right", "wrong")] == [2, 1]
    assert sum(map(sum, figure["confusion"]["category"][1])) == 4


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_classes_are_read_as_row_by_row(shop, modality, monkeypatch):
    in_float32(monkeypatch)
    empty, rows = shop.tokenizer.encode(""), range(0, 110, 9)
    found = evaluation.read_classes(shop.model, shop.catalogue, empty, modality, batch_size=7)
    for row in rows:
        image = None if modality == "text" else torch.from_numpy(shop.catalogue.pictures[[row]]).permute(0, 3, 1, 2) / 255
        tokens = torch.tensor([empty if modality == "image" else shop.tokenizer.encode(shop.catalogue.rows[row]["caption"])])
        with torch.no_grad():
            logits = shop.model.recognise(shop.model.encode(image, tokens)[1])
        assert found[row].tolist() == [part.argmax().item() for part in logits]


@given(SEEDS)
def test_a_confusion_counts_every_row_of_its_classes(seed):
    random = np.random.default_rng(seed)
    true, predicted = random.integers(0, 7, 40), random.integers(0, 5, 40)  # classes 5 and 6 are unknown to the run
    names, counts = evaluation.confusion(true, predicted, list("abcde"), largest=3)
    sizes = sorted(((true == c).sum() for c in range(5)), reverse=True)[:3]
    assert [sum(row) for row in counts] == [size for size in sizes if size]
    for name, row in zip(names, counts):
        for other, count in zip(names, row):
            assert count == sum((t, p) == ("abcde".index(name), "abcde".index(other)) for t, p in zip(true, predicted))


def test_what_is_hidden_of_a_picture_depends_on_the_picture_alone(shop):
    images = evaluation.floats(shop.catalogue.pictures, np.arange(6), torch.device("cpu"))
    for style in mvlt.MASK_STYLES:
        masked, hidden = evaluation.hide(images, range(6), style, 0.5, 8)
        assert evaluation.hide(images[3:], range(3, 6), style, 0.5, 8)[1].equal(hidden[3:])
        assert masked.equal(images.masked_fill(hidden, mvlt.ZERO))
    assert not evaluation.hide(images, range(6), "random", 0.5, 8)[1].equal(evaluation.hide(images, range(6, 12), "random", 0.5, 8)[1])


def test_the_floor_keeps_what_is_seen_and_fills_the_rest_with_its_mean():
    image, hidden = two_pictures(0, 6, 6)[0], torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[:, :, :3, 1:] = True
    filled = evaluation.fill_with_mean(image, hidden)
    for i in range(2):
        for c in range(3):
            seen = [image[i, c, y, x].item() for y in range(6) for x in range(6) if not hidden[i, 0, y, x]]
            for y in range(6):
                for x in range(6):
                    wanted = sum(seen) / len(seen) if hidden[i, 0, y, x] else image[i, c, y, x].item()
                    assert filled[i, c, y, x].item() == pytest.approx(wanted, abs=1e-6)


def test_generation_is_perfect_for_a_decoder_that_knows_the_picture(shop, monkeypatch):
    def knows(model, masked, tokens):
        found = [i for picture in masked for i, other in enumerate(whole) if ((picture == other) | (picture == mvlt.ZERO)).all()]
        return whole[found]

    whole = evaluation.floats(shop.catalogue.pictures, np.arange(110), torch.device("cpu"))
    monkeypatch.setattr(evaluation, "rebuild", knows)
    results = evaluation.generation(shop.model, shop.catalogue, unit=8)
    assert (results["psnr"], results["psnr_hidden"]) == (100, 100) and results["ssim"] == pytest.approx(1)
    assert results["floor_psnr_hidden"] < results["floor_psnr"] < 40


# --- The command ---


def command(*arguments, processes=None):
    start = [sys.executable] if processes is None else ["torchrun", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, os.path.join(HERE, "eval.py"), *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def measured(shop, tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "tiny & <small>", shop.model, shop.folder)
    tasks = ("--tasks", "retrieval,recognition,generation", "--queries", 9, "--draws", 2, "--full-gallery")
    done = command(run, *tasks)
    assert done.returncode == 0, done.stderr
    return run, done, tasks


def test_one_command_measures_everything(measured):
    run, done, _ = measured
    results = json.loads((run / "results.json").read_text())
    for way in ("tir", "itr", "tir_towers", "itr_reranked"):
        assert results["retrieval"][way].keys() == {"R@1", "R@5", "R@10", "SumR", "median_rank", "sd"}
        assert 0 <= results["retrieval"][way]["sd"]["R@1"] < 1
    wanted = {"queries": 9, "size": 101, "draws": 2, "lists": 18, "filled": 18, "best": 20}
    assert results["candidates"] == {"tir": wanted, "itr": wanted}
    assert results["recognition"]["main"].keys() >= {"accuracy", "macro_f", "SumC"} <= results["recognition"]["sub"].keys()
    assert results["generation"].keys() >= {"psnr", "ssim", "psnr_hidden", "floor_psnr"}
    assert results["full_gallery"]["pairs_read"] == 2 * 9 * 20
    for said in ("Retrieval, text to picture (TIR)", "34.60", "98.26", "187.86", "paper: MVLT (Fashion-Gen)", "towers, then both", "floor: mean"):
        assert said in done.stdout


def test_the_report_is_one_whole_page_that_loads_nothing(measured):
    run, _, _ = measured
    text = (run / "report.html").read_text()
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    tags = {element.tag for element in page.iter()}
    assert tags >= {"title", "style", "table", "svg", "img"} and not tags & {"script", "link", "iframe", "object", "base"}
    for element in page.iter():
        assert not {name for name in element.attrib if name in ("href", "srcset", "data") or name.startswith("on")}
        if element.tag == "img":
            assert re.match(r"data:image/(png|jpeg);base64,", element.attrib["src"]) and element.attrib["alt"]
    assert "url(" not in text and "@import" not in text and "http" not in text
    headings = [element.text for element in page.iter("h2")]
    assert headings[:3] == ["Results", "Loss curves", "Retrieval (Fig. 5)"] and len(headings) == 6
    assert [element.text for element in page.iter("figcaption")][:3] == ["loss", "mir", "validation: R@1"]
    assert "tiny & <small>" in page.find("head/title").text


def test_processes_that_have_met_do_not_meet_again(tmp_path):
    (tmp_path / "meet.py").write_text(
        "import torch, torch.distributed as dist\nimport eval as evaluation\n"
        "for _ in range(2):  # for training, and for the demo's evaluation\n"
        "    evaluation.join_processes('cpu')\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "dist.destroy_process_group()\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    done = subprocess.run(["torchrun", "--standalone", "--nproc_per_node=2", tmp_path / "meet.py"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_refusal_under_torchrun_is_one_line_of_each_process(measured):
    done = command(measured[0], "--data", "nowhere", processes=2)
    assert done.returncode != 0 and "eval.py: nowhere" in done.stderr and 'eval.py", line' not in done.stderr, done.stderr


def test_two_processes_measure_what_one_measures(measured, tmp_path):
    run, _, tasks = measured
    done = command(run, *tasks, "--out", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "report.html", "candidates.json"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_saved_lists_give_the_same_numbers_again(measured, tmp_path, shop):
    run, _, _ = measured
    model, tokenizer, settings_of_run = evaluation.load_run(run)
    arguments = evaluation.parse([str(run), "--tasks", "retrieval", "--candidates", str(run / "candidates.json")])
    results, _ = evaluation.evaluate(arguments, model, tokenizer, settings_of_run, shop.catalogue)
    assert results["retrieval"] == json.loads((run / "results.json").read_text())["retrieval"]


def test_best_is_read_before_last_and_a_file_is_a_run_too(shop, tmp_path):
    run = write_run(tmp_path / "run", make_model(shop.tokenizer.words, seed=1), shop.folder)
    mvlt.save(run / "best.pt", make_model(shop.tokenizer.words, seed=2))
    for path, seed in ((run, 2), (run / "last.pt", 1)):
        model, tokenizer, _ = evaluation.load_run(path)
        wanted = make_model(shop.tokenizer.words, seed=seed)
        assert tokenizer.words == shop.tokenizer.words and model.words.position.equal(wanted.words.position) and not model.training


def fails_with(said, *arguments):
    done = command(*arguments)
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr
    assert done.stderr.startswith("eval.py: ") and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_class_field_that_is_missing_ends_the_command_before_it_reads_a_picture(shop, monkeypatch):
    monkeypatch.setattr(evaluation, "deal_out", lambda *rest: pytest.fail("read a picture first"))
    arguments = evaluation.parse(["run", "--tasks", "retrieval,recognition"])
    catalogue = shop.catalogue._replace(rows=[{**row, "category": ""} for row in shop.catalogue.rows])
    with pytest.raises(data.DataError, match="category: no row of this split has one, which recognition needs"):
        evaluation.evaluate(arguments, shop.model, shop.tokenizer, {}, catalogue)


@pytest.mark.parametrize("objectives, flags, measured", [
    ("mir,itm,mlm", [], "retrieval generation"),
    ("mir,itm,mlm,itc,cr", [], "retrieval recognition generation"),
    ("cr", [], "recognition"),
    ("mir,itm,mlm,itc", ["--full-gallery"], "gallery generation"),
    ("mir,itm,mlm,itc", ["--full-gallery", "--tasks", "retrieval"], "retrieval gallery"),
    ("itc", ["--full-gallery"], "gallery"),
    ("mir,itm,mlm", ["--tasks", "generation"], "generation"),
])
def test_a_run_is_measured_for_what_it_was_trained_for_unless_told_other(shop, monkeypatch, objectives, flags, measured):
    done = []
    for name in ("retrieval", "recognition"):
        monkeypatch.setattr(evaluation, f"measure_{name}", lambda *rest, name=name: done.append(name))
    for name, short in (("full_gallery", "gallery"), ("generation", "generation"), ("generation_figures", None)):
        monkeypatch.setattr(evaluation, name, lambda *rest, short=short, **more: done.extend([short] if short else []))
    evaluation.evaluate(evaluation.parse(["run", *flags]), shop.model, shop.tokenizer, {"objectives": objectives}, shop.catalogue)
    assert done == measured.split()


@pytest.mark.parametrize("objectives, flags, said", [
    ("itc", [], "--tasks: of retrieval, recognition, generation this run was trained for none"),
    ("mir,itm,mlm", ["--full-gallery"], "--full-gallery: needs the towers, this run's objectives are mir,itm,mlm"),
])
def test_a_run_that_was_not_trained_for_what_is_asked_says_so(shop, objectives, flags, said):
    with pytest.raises(data.DataError, match=said):
        evaluation.evaluate(evaluation.parse(["run", *flags]), shop.model, shop.tokenizer, {"objectives": objectives}, shop.catalogue)


def test_what_stands_around_a_caption_does_not_count_as_its_words(shop):
    t = shop.tokenizer
    two_of_three = torch.tensor([[t.cls_id, t.unk_id, t.unk_id, len(t) - 1, t.sep_id, t.pad_id]])
    with pytest.raises(data.DataError, match="vocabulary: 67% of this split's words are unknown"):
        evaluation.check_fit(shop.catalogue._replace(tokens=two_of_three), t)


def test_what_does_not_fit_is_one_line(shop, tmp_path):
    fails_with("no run here", tmp_path)
    run = write_run(tmp_path / "run", make_model(shop.tokenizer.words, n_category=0, n_subcategory=0), shop.folder)
    fails_with("recognition: this run has no class heads", run, "--tasks", "recognition")
    foreign = write_run(tmp_path / "foreign", make_model([*data.Tokenizer.train(["zzz"], size=6).words]), shop.folder)
    fails_with("vocabulary: .* of this split's words are unknown", foreign)
    (tmp_path / "few").mkdir()
    write_shop(tmp_path / "few", products=40)
    fails_with("needs 101 products with different captions, this split has 40", run, "--tasks", "retrieval", "--data", tmp_path / "few")


@pytest.mark.parametrize("arguments", [["--tasks", "cooking"], ["--queries", "0"], ["--split", "train"], ["--draws", "few"]])
def test_a_wrong_flag_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as left:
        evaluation.parse(["run", *arguments])
    assert left.value.code == 2


RESIDENT = """
import ctypes, sys
import numpy as np
import eval as evaluation
resident = lambda: int(open("/proc/self/statm").read().split()[1]) / 256  # MiB, of pages of 4 KiB
for largest in map(int, sys.argv[1:]):
    evaluation.keep_freed_memory(largest << 20)
before = resident()
for size in (20, 60):
    block = np.ones(size << 20, np.uint8)
    block = None
    print(round(resident() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.sysconf("SC_PAGESIZE") != 4096, reason="reads Linux's own count of pages of 4 KiB")
@pytest.mark.parametrize("largest, kept", [([], (0, 0)), ([40], (20, 20)), ([100], (20, 60)), ([100, 40], (20, 20))])
def test_freed_memory_is_kept_up_to_the_largest_size_that_is_asked_for(largest, kept):
    """Blocks of 20 and of 60 MiB, one after the other: what is still resident after each was freed."""
    found = subprocess.run([sys.executable, "-c", RESIDENT, *map(str, largest)], cwd=HERE, capture_output=True, text=True, check=True)
    assert list(map(int, found.stdout.split())) == pytest.approx(kept, abs=5)


# --- The page ---


def test_a_log_is_drawn_as_its_means_and_a_cut_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4}\n{"step": 2, "loss": 2, "lr": 1}\n{"st')
    assert report.curves(report.read_log(tmp_path / "log.jsonl")) == {"loss": [(1, 4), (2, 2)]}
    assert report.read_log(tmp_path / "none.jsonl") == []
    drawn = report.curve([(step, step % 2) for step in range(1000)], bins=10)
    assert drawn.count("L") == 9 and ElementTree.fromstring(drawn).tag == "svg"


def test_what_the_data_says_cannot_become_markup():
    entry = {"way": "text to picture (TIR)", "query": "<script>alert(1)</script> & co", "rank": 1,
             "answers": [{"item": np.zeros((8, 8, 3), np.uint8), "score": 0.5, "match": True}]}
    shown = "".join(report.retrieval_section([entry]))
    assert "<script>" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in shown
    assert shown.count('class="match"') == 1


def test_generation_agrees_with_measuring_each_picture_alone(shop, monkeypatch):
    in_float32(monkeypatch)
    found, wanted = evaluation.generation(shop.model, shop.catalogue, unit=8, batch_size=7), []
    for n in range(110):
        image = torch.from_numpy(shop.catalogue.pictures[[n]]).permute(0, 3, 1, 2) / 255
        masked, hidden = mvlt.mask_images(image, "random", 0.5, 8, data.generator(0, "hide", n))
        with torch.no_grad():
            whole = shop.model.reconstruct(shop.model.encode(masked, shop.catalogue.tokens[[n]])[0]).clamp(0, 1)
        kept, floor = image.clone(), image.clone()
        for c in range(3):
            kept[:, c][hidden[:, 0]], floor[:, c][hidden[:, 0]] = whole[:, c][hidden[:, 0]], image[:, c][~hidden[:, 0]].mean()
        wanted.append([f(a, image).item() for a in (whole, kept, floor) for f in (evaluation.psnr, evaluation.ssim)])
    names = ("psnr", "ssim", "psnr_pasted", "ssim_pasted", "floor_psnr", "floor_ssim")
    assert [found[name] for name in names] == pytest.approx(np.mean(wanted, axis=0).tolist(), abs=1e-4)


def test_the_command_reads_as_the_run_was_trained_and_as_it_is_asked(shop, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", shop.model, shop.folder, fit="pad", objectives="mir,itm,mlm", mask_style="grid", mask_ratio=0.25)
    asked, load = [], data.load
    monkeypatch.setattr(data, "load", lambda folder, split, *rest: asked.append((split, *rest)) or load(folder, "test", *rest))
    evaluation.main(evaluation.parse([str(run), "--split", "val", "--queries", "3", "--draws", "1", "--device", "cpu"]))
    results = json.loads((run / "results.json").read_text())
    assert asked == [("val", 32, "pad", False)]
    assert set(results["retrieval"]) == {"tir", "itr"}  # the towers are untrained
    assert [results["generation"][name] for name in ("style", "ratio", "unit")] == ["grid", 0.25, 8]


def test_every_cell_of_the_tables_is_the_number_of_its_row():
    number = iter(range(1, 1000))
    recall = lambda: {**{f"R@{k}": next(number) / 1000 for k in (1, 5, 10)}, "SumR": float(next(number)), "median_rank": float(next(number))}
    part = lambda: {"accuracy": next(number) / 1000, "macro_f": next(number) / 1000, "classes": 2, "unseen": 0}
    kinds, methods = {"main": part(), "sub": part(), "reads": "both"}, ("", "_towers", "_reranked")
    mir = {name: float(next(number)) for name in "psnr ssim psnr_hidden psnr_pasted ssim_pasted floor_psnr floor_ssim floor_psnr_hidden".split()}
    lists = {way: dict(queries=next(number), size=next(number), draws=next(number), lists=next(number), filled=next(number), best=5) for way in ("tir", "itr")}
    results = {"candidates": lists, "retrieval": {way + m: recall() for way in ("tir", "itr") for m in methods},
               "recognition": {**kinds, "also": {"the picture alone": {"main": part(), "sub": part()}}}, "generation": {**mir, "pictures": 1, "ratio": 0.5, "style": "grid", "unit": 8}}
    shown = [[[float(cell.removesuffix(" dB")) for cell in cells if cell] for _, cells, _ in table["rows"]] for table in report.tables(results)]
    for way, table in zip(("tir", "itr"), report.tables(results)):
        assert [int(n) for n in re.findall(r"\d+", table["note"])][:5] == [lists[way][name] for name in ("queries", "size", "draws", "filled", "lists")]
    for way, rows in zip(("tir", "itr"), shown):
        for m, row in zip(methods, rows):
            r = results["retrieval"][way + m]
            assert row == pytest.approx([100 * r["R@1"], 100 * r["R@5"], 100 * r["R@10"], r["SumR"], r["median_rank"]])
    for name, rows in zip(("main", "sub"), shown[2:4]):
        for r, row in zip((kinds[name], results["recognition"]["also"]["the picture alone"][name]), rows):
            assert row == pytest.approx([100 * r["accuracy"], r["macro_f"], 100 * (r["accuracy"] + r["macro_f"])])
    for names, row in zip(("psnr ssim psnr_hidden", "psnr_pasted ssim_pasted psnr_hidden", "floor_psnr floor_ssim floor_psnr_hidden"), shown[4]):
        assert row == [mir[name] for name in names.split()]


def test_the_command_reads_the_classes_from_what_it_says(measured, shop):
    found = json.loads((measured[0] / "results.json").read_text())["recognition"]
    for shown, modality in ((found, "both"), (found["also"]["the picture alone"], "image")):
        predicted = evaluation.read_classes(shop.model, shop.catalogue, shop.tokenizer.encode(""), modality).numpy()
        assert {part: shown[part] for part in ("main", "sub")} == evaluation.recognition(shop.catalogue.rows, LABELS, predicted)


@pytest.mark.parametrize("best", [1, 5, 40])
def test_only_the_towers_best_are_put_in_order_anew(shop, best):
    lists = evaluation.candidates(shop.catalogue.rows, 3, 12)
    _, _, order = evaluation.retrieval(shop.model, shop.catalogue, [{"tir": lists, "itr": lists}], best=best)
    for (scores,) in order.values():
        assert ((scores > -1e5).sum(dim=1) == min(best, 12)).all()
