"""extras/bench.py compares two ways of computing one model: they must compute the same. No law here is about time."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import mvlt
from extras import bench
from extras.runtime import UserError

HOUSE = Path(__file__).resolve().parent.parent
CONFIG = mvlt.Config.preset("nano", vocab_size=60, depths=(1, 1, 1, 1))


def model():
    """A model whose biases are not zero and whose norms are not the identity."""
    result = bench.make_model(CONFIG, "cpu")
    for parameter in result.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1) * 0.5, std=0.05)
    return result


@pytest.mark.parametrize("words", [(30, 48), (3, 9), (48, 48)])
def test_the_usual_way_computes_the_same_losses_and_gradients(words):
    found = bench.differences(model(), bench.make_batch(model(), 8, words))
    assert max(found.values()) < 1e-3, max(found, key=found.get)
    assert max(found[name] for name in ("mir", "itm", "mlm")) < 1e-5
    everywhere = {"stages.0.blocks.0.attn.kv.weight", "words.word.weight", "decoder.pixels.weight", "word_head.bias"}
    assert everywhere <= found.keys()


def test_the_usual_way_scores_candidates_the_same():
    judge = model().eval()
    images, plan, _ = bench.make_batch(judge, 6)
    ours, usual = (way.score(judge, images, plan["words"]) for way in (bench.WAYS["ours"], bench.WAYS["usual"]))
    assert ours.std() > 0
    torch.testing.assert_close(ours, usual)


def test_the_check_refuses_two_ways_that_compute_different_things(monkeypatch):
    attention = bench.Usual.attention
    monkeypatch.setattr(bench.Usual, "attention", lambda self, *given: 1.1 * attention(self, *given))
    with pytest.raises(ValueError, match="the two ways must agree"):
        bench.check_agreement(CONFIG, "cpu")


def test_a_batch_is_what_the_paper_s_recipe_plans():
    images, plan, count = bench.make_batch(model(), 64)
    lengths = (bench.RandomSplit(CONFIG, 64).tokens != 0).sum(dim=1)
    assert lengths.min() == 30 and lengths.max() == 48 and (lengths[1:] >= lengths[:-1]).all()
    assert plan["matched"].sum() == 32
    assert count == dict(mir=plan["rebuild"].sum(), itm=64, mlm=plan["predict"].sum())
    assert 4 < count["mir"] < 28  # half of the matched half
    assert images.shape == (64, 3, 64, 64)


def test_a_quick_run_prints_every_way_with_positive_numbers():
    command = [sys.executable, "-m", "extras.bench", "--quick", "--device", "cpu"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for way in bench.WAYS:
        numbers = re.search(rf"^{way}, fp32 +(.*)$", done.stdout, re.MULTILINE)[1].split()
        assert len(numbers) == 7 and all(float(number) > 0 for number in numbers[:5])


def test_scale_prints_every_stage_of_opening_a_catalogue(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ProcessPoolExecutor", ThreadPoolExecutor)  # sooner; the quick run above has processes
    bench.scale(300)
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    stages = ["read the manifest", "learn a vocabulary", "tokenise"]
    for time in ("first", "second"):
        stages += [f"open the split, {time} time", f"read 100 batches of 256, {time} time"]
    assert [line[0] for line in lines] == stages
    assert all(float(seconds) >= 0 and float(more) >= 0 for _, seconds, more in lines)


def test_a_process_that_dies_ends_the_benchmark_with_one_line(monkeypatch):
    def die(args):
        raise bench.BrokenProcessPool("gone")

    monkeypatch.setattr(bench, "compare", die)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(UserError, match="a measuring process has ended"):
        bench.main()
