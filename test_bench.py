"""`bench.py` compares two ways of computing one model: they must compute the same. Nothing here depends on the time that anything takes."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bench
import mvlt

CONFIG = mvlt.Config.preset("nano", vocab_size=60)


def model():
    torch.manual_seed(0)
    result = mvlt.MVLT(CONFIG)
    for parameter in result.parameters():  # so that no bias is zero and no norm the identity
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1) * 0.5, std=0.05)
    return result


@pytest.mark.parametrize("words", [(30, 48), (3, 9), (48, 48)])
def test_the_usual_way_computes_the_same_losses_and_gradients(words):
    apart = bench.differences(model(), bench.make_batch(CONFIG, 8, words))
    assert max(apart.values()) < 1e-3, max(apart, key=apart.get)
    assert max(apart[name] for name in ("mir", "itm", "mlm")) < 1e-5
    assert {"stages.0.blocks.0.attn.kv.weight", "words.word.weight", "decoder.pixels.weight", "word_head.bias"} <= apart.keys()


def test_the_check_notices_a_way_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(bench.Usual, "caption", lambda self, tokens: tokens[:, :20])
    monkeypatch.setattr(bench.Usual, "guess", bench.Ours.guess)
    assert max(bench.differences(model(), bench.make_batch(CONFIG, 8)).values()) > bench.TOLERANCE


def test_the_usual_way_does_all_the_work_that_ours_leaves_out():
    pairs, work = bench.make_batch(CONFIG, 8), {}
    for way in (bench.OURS, bench.USUAL):
        visual, text = way.encode(model(), pairs.masked, way.caption(pairs.tokens))
        work[way] = bench.cost(lambda: way.guess(model(), text, pairs))[0], bench.cost(lambda: way.rebuild(model(), visual, pairs))[0]
    assert work[bench.USUAL][0] / work[bench.OURS][0] == pytest.approx(8 * CONFIG.text_len / pairs.where.sum().item())
    assert work[bench.USUAL][1] / work[bench.OURS][1] == pytest.approx(8 / pairs.rebuild.sum().item())


def test_a_batch_is_what_a_step_of_training_reads():
    pairs = bench.make_batch(CONFIG, 16)
    lengths = (pairs.words != 0).sum(dim=1)
    assert lengths.min() == 30 and lengths.max() == 48 and (lengths[1:] >= lengths[:-1]).all()
    assert pairs.matched.sum() == 8 and pairs.rebuild.sum() == 4 and not (pairs.where & ~pairs.matched[:, None]).any()
    assert (pairs.masked != pairs.images).flatten(1).any(dim=1).tolist() == [True, True, False, False] * 4
    assert (pairs.tokens[pairs.words == 0] == 0).all()


def test_cost_counts_multiply_adds_and_bytes():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert bench.cost(lambda: a @ b) == (3 * 5 * 7, 4 * (15 + 35 + 21))
    assert bench.cost(lambda: a.t()[1:]) == (0, 0)  # a view moves nothing


def test_a_quick_run_writes_everything(tmp_path):
    command = [sys.executable, "bench.py", "--quick", "--device", "cpu", "--out", str(tmp_path / "bench.json")]
    done = subprocess.run(command, cwd=Path(bench.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert {"machine", "date", "differences", "peak", "copy_rate", "ways", "parts", "growth", "towers", "accumulation", "two_processes_s", "loader"} <= results.keys()
    ways = results["ways"]
    assert {"usual fp32", "ours fp32"} <= ways.keys()
    assert all(math.isfinite(value) and value > 0 for way in ways.values() for value in way.values())
    assert results["parts"].keys() == ways.keys() and len(results["growth"]) == 5
    work = {name: sum(part[1] for part in parts.values()) for name, parts in results["parts"].items()}
    assert work["ours fp32"] < work["usual fp32"]


def test_a_wrong_batch_size_is_refused_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, bench.__file__, "--batch-size", "10"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "bench.py: --batch-size must be a multiple of 16 (parts of it must be alike), got 10"
