"""
The laws of train.py. What must be exact: any number of processes, loaders and micro-batches, and any interruption, give the same weights.
What must go wrong well: every fault here is really made, with real processes and signals, on a model of a few thousand weights.
"""

import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import eval as evaluation
import mvlt
import toy
import train

settings.register_profile("laws", deadline=None, max_examples=30)
settings.load_profile("laws")
SEEDS = st.integers(0, 2**31 - 1)
HERE = Path(train.__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)  # as in the other processes: the number of threads changes the last bits of a sum

TINY = """--device cpu --image-size 32 --mask-unit 8 --sr-ratios 4,2,1,1 --dims 8,16,24,32 --heads 1,2,3,4 --mlp-ratios 2,2,2,2 --depths 1,1,1,1
          --token-dim 32 --embed-dim 16 --text-len 24 --vocab-words 200""".split()
RUN = """--steps 8 --batch-size 12 --log-every 1 --save-every 3
    --itm-from 0.25 --hard-from 0.5 --itm-negatives hard --alike 2 --mirror 0.5 --shift 1 --zoom 0.2""".split()  # all five objectives, dropout, hard negatives
EXACT = "--no-bf16 --dropout 0 --drop-path 0".split()  # where only the order of a sum may differ


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shop"
    toy.make(folder, products=40, size=32, views=(1, 1))
    return folder


@pytest.fixture(scope="session")
def unbroken(shop, tmp_path_factory):
    """A run that nothing disturbed, dropout on: what every broken one must end like, bit by bit."""
    return in_process(tmp_path_factory.mktemp("runs") / "unbroken", *TINY, *RUN, "--data", shop)


@pytest.fixture(scope="session")
def stopped(shop, tmp_path_factory):
    """The same, told to stop in its sixth step. Copy it before use."""
    return stop_in_step(5, tmp_path_factory.mktemp("runs") / "stopped", *TINY, *RUN, "--data", shop)


@pytest.fixture(scope="session")
def plain(shop, tmp_path_factory):
    """One process, fp32, no dropout: what several processes must agree with, but for rounding."""
    return in_process(tmp_path_factory.mktemp("runs") / "plain", *TINY, *RUN, *EXACT, "--data", shop)


def flags(out, *more):
    return [*map(str, more), "--out", str(out)]


def in_process(out, *more):
    train.main(*train.parse(flags(out, *more)))
    return out


def stop_in_step(step, out, *more):
    """Send this process a SIGTERM in the middle of that step (counted from 0)."""
    usual = train.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda now, s: (signal.raise_signal(signal.SIGTERM) if now == step else None, usual(now, s))[1])
        with pytest.raises(train.RunError, match=f"stopped at step {step + 1}; go on with: python train.py --out {out} --resume"):
            in_process(out, *more)
    return out


def copy_of(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


# A script that behaves as train.py does but waits at the start of each step, so that a signal has something to hit, and says who it is.
SLOW = f"""
import os, runpy, sys, time
import data
quick = data.batch_rows
def slow(*arguments):
    path = os.environ["PIDS"] + "/" + os.environ.get("RANK", "0")
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.replace(path + ".new", path)  # a test may read it at any moment
    time.sleep(0.3)
    return quick(*arguments)
data.batch_rows = slow
runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")
"""


def script(out, *more, processes=1, slow=None):
    """Start train.py as a person does, under torchrun when there are several processes. `slow`: a folder for the process ids."""
    path = HERE / "train.py"
    if slow:
        path = slow / "slow.py"
        path.write_text(SLOW)
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**ENV, "PIDS": str(slow)}
    return subprocess.Popen([*launcher, str(path), *flags(out, *more)], env=env, cwd=Path(out).parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    """(exit status, everything on the screen)."""
    screen, _ = process.communicate(timeout=120)
    return process.returncode, screen


def lines_of(run):
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def steps_of(run):
    return [line["step"] for line in lines_of(run) if "val" not in line]


def wait_for(condition, process, seconds=60):
    """Look every few milliseconds until the condition holds; the process must still be at work then."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)


def state(run):
    """Every tensor and number that the next step would depend on."""
    saved = mvlt.read(run / "last.pt")
    moments = {f"{number} {name}": value for number, entry in saved["optimizer"]["state"].items() for name, value in entry.items()}
    return {**saved["model"], **moments, "step": torch.tensor(saved["step"]), "best": torch.tensor(saved["best"], dtype=torch.float64)}


def assert_bitwise(run, other):
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(run, other):
    ours, theirs = mvlt.read(run / "last.pt"), mvlt.read(other / "last.pt")
    assert ours["step"] == theirs["step"]
    fresh = max(float(value.abs().max()) for value in ours["model"].values())
    assert fresh < 100  # so that the tolerance below means something
    for name, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][name], rtol=1e-3, atol=2e-5, msg=lambda text: f"{name}: {text}")


def losses_of(run):
    """What the log says about the losses, without the clock."""
    clock = ("images_per_s", "memory_gb")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines_of(run)]


# --- Exactness ---


def test_a_run_says_what_it_did(unbroken, shop):
    assert steps_of(unbroken) == list(range(1, 9))
    assert [line["step"] for line in lines_of(unbroken) if "val" in line] == [3, 6, 8]
    towers, *_, fused = (line for line in lines_of(unbroken) if "val" not in line)
    assert towers.keys() == {"step", "epoch", "loss", "itc", "lr", "grad_norm", "images_per_s", "memory_gb"}
    assert fused.keys() == towers.keys() | {"mir", "itm", "mlm", "cr"}
    assert fused["loss"] == pytest.approx(10 * fused["mir"] + 3 * fused["itm"] + fused["mlm"] + fused["itc"] + fused["cr"], rel=1e-5)
    run = json.loads((unbroken / "config.json").read_text())
    assert run["run"]["data"] == str(shop) and run["run"]["steps"] == 8 and run["config"]["dims"] == [8, 16, 24, 32]
    assert sorted(path.name for path in (unbroken / "samples").iterdir()) == ["000003.png", "000006.png", "000008.png"]
    assert Image.open(unbroken / "samples" / "000008.png").size == (4 * 32, 3 * 32)  # one column for each of the four validation pictures
    model = mvlt.load(unbroken / "best.pt")
    assert model.vocabulary == (unbroken / "vocab.txt").read_text().split() and len(model.labels["category"]) == model.config.n_category


def test_a_run_repeats_itself_bit_by_bit(unbroken, shop, tmp_path):
    assert_bitwise(in_process(tmp_path / "again", *TINY, *RUN, "--data", shop), unbroken)


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(unbroken, shop, tmp_path):
    out, reached = tmp_path / "killed", 0
    for already in (1, 3, 5):  # before the first checkpoint, and twice after one
        process = script(out, *TINY, *RUN, "--data", shop, "--resume", slow=tmp_path)
        wait_for(lambda: max(steps_of(out), default=0) >= already and process.poll() is None, process)
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
        reached = max(steps_of(out))
        assert already <= reached < 8
    in_process(out, *TINY, *RUN, "--data", shop, "--resume")
    assert_bitwise(out, unbroken)
    assert losses_of(out) == losses_of(unbroken)  # no step is logged twice


def test_a_stopped_run_is_resumed_with_the_same_bits_by_any_number_of_loaders(stopped, unbroken, tmp_path):
    assert steps_of(stopped) == [1, 2, 3, 4, 5, 6] and mvlt.read(stopped / "last.pt")["step"] == 6
    run = copy_of(stopped, tmp_path)
    in_process(run, "--resume", "--workers", 2, "--device", "cpu")  # everything else is known from the run
    assert_bitwise(run, unbroken)
    assert losses_of(run) == losses_of(unbroken)
    assert_bitwise(in_process(run, "--resume", "--device", "cpu"), unbroken)  # a run that is finished stays as it is


def test_a_run_stopped_while_its_towers_train_alone_ends_with_the_same_bits(unbroken, shop, tmp_path):
    run = stop_in_step(0, tmp_path / "early", *TINY, *RUN, "--data", shop)
    assert mvlt.read(run / "last.pt")["step"] == 1
    assert_bitwise(in_process(run, "--resume", "--device", "cpu"), unbroken)


def test_two_processes_give_the_weights_of_one(plain, shop, tmp_path):
    out = tmp_path / "two"
    status, screen = finish(script(out, *TINY, *RUN, *EXACT, "--data", shop, processes=2))
    assert status == 0, screen
    assert "8 steps of 12 pairs on 2 x cpu" in screen
    assert_close(out, plain)
    ours, theirs = losses_of(out), losses_of(plain)
    assert [line["loss"] for line in ours if "loss" in line] == pytest.approx([line["loss"] for line in theirs if "loss" in line], rel=1e-4)


def test_a_run_of_one_process_is_resumed_by_two(plain, shop, tmp_path):
    out = stop_in_step(2, tmp_path / "one", *TINY, *RUN, *EXACT, "--data", shop)
    status, screen = finish(script(out, "--resume", "--device", "cpu", processes=2))
    assert status == 0, screen
    assert_close(out, plain)


def test_sigterm_to_two_processes_saves_and_one_goes_on(plain, shop, tmp_path):
    out = tmp_path / "two"
    process = script(out, *TINY, *RUN, *EXACT, "--data", shop, "--workers", 1, processes=2, slow=tmp_path)
    wait_for(lambda: 3 in steps_of(out), process)
    process.terminate()  # torchrun tells the loaders, too
    status, screen = finish(process)
    assert status != 0 and "stopped at step" in screen and 'train.py", line' not in screen, screen
    assert 3 < mvlt.read(out / "last.pt")["step"] < 8
    assert_close(in_process(out, "--resume", "--device", "cpu"), plain)


@pytest.mark.parametrize("micro_batch", [3, 5])
def test_accumulation_equals_one_large_batch(plain, shop, tmp_path, micro_batch):
    out = in_process(tmp_path / "parts", *TINY, *RUN, *EXACT, "--data", shop, "--micro-batch", micro_batch)
    assert_close(out, plain)


def test_a_step_in_which_nothing_is_hidden_teaches_mir_nothing(shop, tmp_path):
    still = "--objectives mir --mask-image-prob 1e-9 --steps 1 --weight-decay 0".split()
    one, other = (weights_of(in_process(tmp_path / lr, *TINY, *still, "--data", shop, "--lr", lr)) for lr in ("1e-3", "1e-1"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changed", [["--seed", 1], ["--lr", 1.01e-3], ["--objectives", "mir,itm,mlm,itc"]])
def test_another_setting_gives_other_weights(plain, shop, tmp_path, changed):
    """So that the tolerance of the laws above is one that a difference would break."""
    out = in_process(tmp_path / "other", *TINY, *RUN, *EXACT, "--data", shop, *changed)
    with pytest.raises(AssertionError):
        assert_close(out, plain)


def test_recomputed_activations_give_the_same_weights(plain, shop, tmp_path):
    assert_close(in_process(tmp_path / "recompute", *TINY, *RUN, *EXACT, "--data", shop, "--recompute"), plain)


def test_a_head_that_joins_late_counts_its_steps_from_then(unbroken):
    """AdamW's first steps are the right size for a parameter that has seen no zeros before."""
    model, saved = mvlt.load(unbroken / "last.pt"), mvlt.read(unbroken / "last.pt")
    vectors_last = sorted(model.named_parameters(), key=lambda named: named[1].ndim <= 1)  # as the optimiser's groups
    for number, (name, _) in enumerate(vectors_last):
        late = name.startswith(("decoder", "match_head", "word_head", "category_head", "subcategory_head"))
        assert saved["optimizer"]["state"][number]["step"] == (6 if late else 8), name  # --itm-from 0.25 of 8


def test_norms_and_biases_are_not_decayed(pairs):
    groups = train.make_optimizer(tiny_model(pairs), train.Settings(weight_decay=0.3)).param_groups
    assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.3) for group in groups for parameter in group["params"])


def test_the_best_checkpoint_is_the_one_that_validates_best():
    s, recognise = train.Settings(), train.resolve(dict(task="recognise"))
    better = lambda good, bad, s: train.goodness(good, s) > train.goodness(bad, s)
    assert better(dict(tir_towers=0.6, itr_towers=0.5, mir=9.0), dict(tir_towers=0.5, itr_towers=0.5, mir=0.0), s)
    assert better(dict(tir_towers=0.5, itr_towers=0.6, mir=9.0), dict(tir_towers=0.5, itr_towers=0.5, mir=0.0), s)
    assert better(dict(mir=0.1, itm=0.5), dict(mir=0.2, itm=0.5), s) and better(dict(mir=0.1, itm=0.5), dict(mir=0.1, itm=0.6), s)
    assert better(dict(cr_accuracy=0.9, cr=5.0), dict(cr_accuracy=0.8, cr=0.0), recognise)


def test_validation_does_not_depend_on_the_batch_size(pairs):
    model = tiny_model(pairs).float()
    found = [train.validate(model, pairs, train.Settings(mask_unit=8, batch_size=size), pairs.tokenizer, contextlib.nullcontext) for size in (1, 2, 5, 32)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4) and other.keys() >= {"mir", "itm", "mlm", "cr", "tir_towers", "itr_towers", "cr_accuracy"}


# --- Gradients of one step, against the loss written out in one piece ---


class Slice:
    """What train.py asks of an open split."""

    def __init__(self, folder):
        self.rows, self.pictures = data.load(folder, "train", 32)
        self.tokenizer = data.Tokenizer.train([row["caption"] for row in self.rows], 200)
        self.tokens = data.tokenize(self.rows, self.tokenizer, 24)
        self.products, self.captions, self.groups = data.identities(self.rows)
        self.names = {field: data.class_names(self.rows, field) for field in ("category", "subcategory")}
        self.categories, self.subcategories = (data.class_ids(self.rows, field, self.names[field]) for field in ("category", "subcategory"))


@pytest.fixture(scope="module")
def pairs(shop):
    return Slice(shop)


def tiny_model(pairs):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(pairs.tokenizer), n_category=len(pairs.names["category"]), n_subcategory=len(pairs.names["subcategory"]))
    shape = dict(image_size=32, dims=(8, 16, 24, 32), heads=(1, 2, 3, 4), depths=(1, 1, 1, 1), sr_ratios=(4, 2, 1, 1), mlp_ratios=(2, 2, 2, 2), token_dim=32, embed_dim=16, text_len=24)
    return mvlt.MVLT(mvlt.Config(**sizes, **shape, dropout=0.0, drop_path=0.0)).double()


@pytest.mark.parametrize("micro_batch", [0, 1, 4])
def test_the_gradients_of_a_step_are_those_of_the_loss_in_one_piece(pairs, monkeypatch, micro_batch):
    monkeypatch.setattr(data, "images_to_float", lambda images: images.contiguous().double() / 255)
    s = train.resolve(dict(batch_size=10, mask_unit=8, micro_batch=micro_batch, bf16=False, itm_negatives="hard"))
    batch = next(iter(data.Batches(pairs.pictures, 10, s.seed, 4, 5)))
    model, whole = tiny_model(pairs), tiny_model(pairs)
    totals = train.step_backward(model, batch, pairs, s, pairs.tokenizer, contextlib.nullcontext, False, True)

    rows, images = batch["rows"], data.images_to_float(batch["images"])
    same = train.same_product(pairs, rows)
    image, text = whole.embed_images(images), whole.embed_texts(data.trim(pairs.tokens[rows]))
    similar = mvlt.hard_negatives(image @ text.T * whole.log_scale.exp(), same, data.generator(s.seed, 4, "hard"))
    similar[torch.rand(10, generator=data.generator(s.seed, 4, "easy")) < 0.5] = -1
    plan = train.plan_step(4, rows, pairs, s, whole.config, pairs.tokenizer, similar=similar)
    masked, _ = mvlt.hide(images, plan.units)
    visual, texts = whole.encode(masked, plan.tokens)
    chosen, matched = plan.count_mir, plan.matched & plan.count_itm
    known = pairs.categories[rows].masked_fill(~plan.count_cr, -1), pairs.subcategories[rows].masked_fill(~plan.count_cr, -1)
    losses = {
        "mir": mvlt.mir_loss(whole.reconstruct(visual)[chosen], images[chosen]),
        "itm": mvlt.itm_loss(whole.match(texts)[plan.count_itm], plan.matched[plan.count_itm]),
        "mlm": mvlt.mlm_loss(whole.predict_words(texts, plan.where), plan.words[plan.where]),
        "itc": mvlt.itc_loss(image, text, whole.log_scale, same),
        "cr": sum(mvlt.recognition_loss(logits, classes) for logits, classes in zip(whole.recognise(texts), known)),
    }
    assert chosen.any() and matched.any() and plan.where.any() and plan.count_cr.any() and not plan.matched.all()
    mvlt.total_loss(losses, dict(mir=10, itm=3, mlm=1, itc=1, cr=1)).backward()
    for name, loss in losses.items():
        assert float(totals[name]) == pytest.approx(loss.item(), rel=1e-5), name
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")


def test_the_temperature_by_which_hard_negatives_are_drawn_is_bounded_at_100(pairs, monkeypatch):
    seen, usual = [], mvlt.hard_negatives
    monkeypatch.setattr(mvlt, "hard_negatives", lambda logits, *rest: (seen.append(logits), usual(logits, *rest))[1])
    monkeypatch.setattr(data, "images_to_float", lambda images: images.contiguous().double() / 255)
    s, model = train.resolve(dict(batch_size=10, mask_unit=8, bf16=False, itm_negatives="hard")), tiny_model(pairs)
    model.log_scale.data.fill_(10.0)
    train.step_backward(model, next(iter(data.Batches(pairs.pictures, 10, s.seed, 4, 5))), pairs, s, pairs.tokenizer, contextlib.nullcontext, False, True)
    assert 1 < seen[0].abs().max() <= 100.001


def test_the_towers_recall_is_as_exact_under_autocast(pairs, monkeypatch):
    n = len(pairs.rows)
    vectors = torch.nn.functional.normalize(1 + 0.05 * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0)), dim=-1)  # all alike
    vectors[1] = torch.nn.functional.normalize(vectors[0] + 0.2 * (vectors[1] - vectors[0]), dim=-1)
    monkeypatch.setattr(train, "read_towers", lambda model, images, tokens, key: vectors[:, key[1] : key[1] + len(images)])
    exact = train.towers_recall(tiny_model(pairs), pairs, train.Settings(), n)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert train.towers_recall(tiny_model(pairs), pairs, train.Settings(), n) == exact
    assert min(exact.values()) > 0.5


def test_bad_rows_and_bad_pictures_are_told_together_and_once(shop, tmp_path, capsys):
    shutil.copytree(shop, tmp_path / "shop")
    rows = (tmp_path / "shop" / "train.jsonl").read_text().splitlines()
    (tmp_path / "shop" / "train.jsonl").write_text("\n".join([*rows, "nonsense", json.dumps({**json.loads(rows[0]), "image": "none.png"})]))
    told = [f"train.jsonl:{len(rows) + 1}: bad JSON", f"train.jsonl:{len(rows) + 2}: missing picture none.png"]
    with pytest.raises(data.DataError) as refused:
        in_process(tmp_path / "one", *TINY, "--steps", 1, "--data", tmp_path / "shop")
    assert all(str(refused.value).count(line) == 1 for line in told)
    in_process(tmp_path / "two", *TINY, "--steps", 1, "--data", tmp_path / "shop", "--skip-bad")
    screen = capsys.readouterr().out
    assert all(screen.count(line) == 1 for line in told)


def test_the_papers_preset_is_section_4_1_whatever_the_demo_does():
    s = train.resolve(dict(preset="paper"))
    assert {name: s.weights[name] for name in s.chosen} == {"mir": 10, "itm": 1, "mlm": 1}
    assert (s.lr, s.weight_decay, s.batch_size, s.epochs) == (2.5e-3, 1e-4, 1200, 150) and mvlt.Config.preset(s.model) == mvlt.Config()
    assert (s.mask_ratio, s.mask_words, s.mask_unit, s.mask_style) == (0.5, 0.15, 16, "random")
    assert (s.itm_negatives, s.alike, s.itm_from, s.match_whole, s.fit) == ("uniform", 1, 0, False, "stretch")
    assert (s.mirror, s.shift, s.zoom, s.drop_caption) == (0, 0, 0, 0)


def test_the_papers_recognition_reads_every_caption():
    assert train.resolve(dict(preset="paper", task="recognise")).drop_caption == 0


def test_recognition_reads_no_batches_of_alike_products():
    assert train.resolve(dict(preset="plus", task="recognise")).alike == 1 < train.resolve(dict(preset="plus")).alike


# --- Faults ---


def test_sigkill_in_the_middle_of_writing_a_checkpoint_leaves_the_old_one(unbroken, shop, tmp_path):
    out = tmp_path / "torn"
    tearing = """
import io, os, signal, sys, torch, train
write = torch.save
def torn(contents, file):
    whole = io.BytesIO()
    write(contents, whole)
    last = contents["step"] == 6
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2] if last else whole.getvalue())
    if last:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
train.main(*train.parse(sys.argv[1:]))
"""
    done = subprocess.run([sys.executable, "-c", tearing, *flags(out, *TINY, *RUN, "--data", shop)], env=ENV, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob("*.tmp"))) == 1  # it really was cut in two
    assert mvlt.read(out / "last.pt")["step"] == 3
    in_process(out, "--resume", "--device", "cpu")
    assert_bitwise(out, unbroken)
    assert not list(out.glob("*.tmp"))


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_old_checkpoint(stopped, unbroken, tmp_path):
    run = copy_of(stopped, tmp_path)
    before = (run / "last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(train.RunError, match=r"step 8: .*/(best|last)\.pt cannot be written, is the disk full\? \(.*\); what was saved before is intact"):
            in_process(run, "--resume", "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (run / "last.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert_bitwise(in_process(run, "--resume", "--device", "cpu"), unbroken)


def test_sigterm_saves_and_leaves_within_one_step(unbroken, shop, tmp_path):
    out = tmp_path / "asked"
    process = script(out, *TINY, *RUN, "--data", shop, slow=tmp_path)
    wait_for(lambda: 4 in steps_of(out), process)
    process.terminate()
    logged = max(steps_of(out))
    status, screen = finish(process)
    step = mvlt.read(out / "last.pt")["step"]
    assert status == 1 and screen.splitlines()[-1] == f"train.py: stopped at step {step}; go on with: python train.py --out {out} --resume"
    assert logged <= step <= logged + 2 and step < 8  # it was asked in the step after the logged one, or while that one was ending
    assert_bitwise(in_process(out, "--resume", "--device", "cpu"), unbroken)


def test_one_of_two_processes_killed_takes_the_other_with_it(shop, tmp_path):
    out = tmp_path / "two"
    process = script(out, *TINY, *RUN, "--data", shop, processes=2, slow=tmp_path)
    wait_for(lambda: 4 in steps_of(out), process)
    began = time.time()
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    status, screen = finish(process)
    assert status != 0 and time.time() - began < 30
    assert "train.py, process 0: another process of this run has ended" in screen or "Signal 15" in screen  # torchrun may be quicker
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID", screen) and 'train.py", line' not in screen
    assert not os.path.exists(f"/proc/{(tmp_path / '0').read_text()}")  # nobody is left
    assert mvlt.read(out / "last.pt")["step"] in (3, 6)


def test_a_refusal_under_torchrun_is_one_line_of_each_process(unbroken, tmp_path):
    run = copy_of(unbroken, tmp_path)
    status, screen = finish(script(run, *TINY, processes=2))
    said = [line for line in screen.splitlines() if line.startswith("train.py")]
    assert status != 0 and said and 'train.py", line' not in screen
    assert all(re.match(r"train.py, process [01]: --out .* already holds a run; add --resume", line) for line in said)


@pytest.mark.parametrize("what", ["weights", "lr"])
def test_a_loss_that_is_no_number_names_itself_and_keeps_the_last_good_checkpoint(stopped, shop, tmp_path, what, monkeypatch):
    if what == "lr":
        with pytest.raises(train.RunError, match=r"step \d+: the (loss \w+|gradient's norm|validation's \w+) is (nan|inf)"):
            in_process(tmp_path / "run", *TINY, *RUN, "--no-bf16", "--data", shop, "--lr", 1e30, "--warmup", 0.8)
        assert not (tmp_path / "run" / "last.pt").exists() or all(value.isfinite().all() for value in mvlt.read(tmp_path / "run" / "last.pt")["model"].values())
        return
    run, usual = copy_of(stopped, tmp_path), train.learning_rate
    before = (run / "last.pt").read_bytes()
    poison = lambda rebuilt, images: rebuilt.sum() * math.nan
    monkeypatch.setattr(mvlt, "mir_loss", poison)
    with pytest.raises(train.RunError, match=rf"step 7: the loss mir is nan \(rows \d+, \d+, \d+, \d+, ...\); {run}/last.pt is from before it"):
        in_process(run, "--resume", "--device", "cpu")
    assert (run / "last.pt").read_bytes() == before


def test_weights_that_broke_in_the_last_step_never_reach_a_checkpoint(stopped, tmp_path, monkeypatch):
    """The losses were finite and the step still ruined the weights: the validation sees it."""
    run = copy_of(stopped, tmp_path)
    before = (run / "last.pt").read_bytes()
    step = torch.optim.AdamW.step

    def ruin(optimizer, *arguments):
        step(optimizer, *arguments)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    monkeypatch.setattr(train, "step_backward", lambda model, *rest, **more: {"itc": sum(p.sum() for p in model.parameters() if p.requires_grad).backward() or torch.tensor(0.0)})
    with pytest.raises(train.RunError, match=r"step 7: the (gradient's norm|loss \w+) is nan|the validation's \w+ is nan"):
        in_process(run, "--resume", "--device", "cpu")
    assert (run / "last.pt").read_bytes() == before


def test_a_changed_configuration_is_refused_by_name(stopped, tmp_path):
    run = copy_of(stopped, tmp_path)
    refused = r"--resume: this is another run: mirror \(was 0.5, now 0.25\), lr \(was 0.0005, now 0.5\), depths \(was .*, now .*\); start a new one with --from"
    with pytest.raises(train.RunError, match=refused):
        in_process(run, "--resume", "--device", "cpu", "--lr", 0.5, "--mirror", 0.25, "--depths", "1,1,1,2")


def test_changed_data_are_refused(stopped, shop, tmp_path):
    run, folder = copy_of(stopped, tmp_path), shutil.copytree(shop, tmp_path / "shop")
    assert_resumes = lambda: in_process(run, "--resume", "--device", "cpu", "--data", folder)
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[::-1]))
    with pytest.raises(train.RunError, match=r"this is another run: training rows"):
        assert_resumes()
    (folder / "train.jsonl").write_text("\n".join(rows))
    assert_resumes()  # the same data may lie elsewhere


def test_a_folder_that_another_run_is_writing_to_is_refused(stopped, shop, tmp_path):
    run = copy_of(stopped, tmp_path)
    other = script(run, "--resume", "--device", "cpu", slow=tmp_path)
    wait_for((tmp_path / "0").exists, other)  # it is in its first step
    with pytest.raises(train.RunError, match=f"--out {run}: another run is writing there"):
        in_process(run, "--resume", "--device", "cpu")
    assert finish(other)[0] == 0  # and was not disturbed
    in_process(run, "--resume", "--device", "cpu")  # the lock ends with its process


def test_without_permission_to_write_the_run_ends_in_one_line(shop, tmp_path):
    """Root may write anywhere but here: /proc belongs to the kernel, and a file is no folder."""
    (tmp_path / "file").write_text("")
    for out in ("/proc/run", tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(OSError, match=str(out)):
            in_process(out, *TINY, *RUN, "--data", shop)


def test_a_run_is_never_written_over(unbroken, shop, tmp_path):
    run = copy_of(unbroken, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(train.RunError, match=f"--out {run} already holds a run; add --resume"):
        in_process(run, *TINY, *RUN, "--data", shop)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_without_out_each_run_gets_a_new_number(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "7").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    shorter = [*TINY, "--steps", "1", "--batch-size", "4", "--objectives", "itc", "--data", str(shop)]
    assert [train.main(*train.parse(shorter))[0] for _ in range(2)] == [Path("runs/8"), Path("runs/9")]


def test_a_checkpoint_that_is_no_run_is_refused(unbroken, tmp_path):
    run = copy_of(unbroken, tmp_path)
    saved = mvlt.read(run / "last.pt")
    model = mvlt.load(run / "last.pt")
    mvlt.save(run / "last.pt", model, run={**saved["run"], "colour": "blue"})
    with pytest.raises(train.RunError, match=r"not a run of this version of train.py: it lacks \['best', .*\['colour'\]"):
        in_process(run, "--resume", "--device", "cpu")
    (run / "last.pt").write_bytes((unbroken / "last.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="last.pt: not a whole file"):
        in_process(run, "--resume", "--device", "cpu")


def test_resume_without_a_run_begins_one(shop, tmp_path):
    out = in_process(tmp_path / "new", *TINY, "--steps", 1, "--batch-size", 4, "--data", shop, "--resume")
    assert mvlt.read(out / "last.pt")["step"] == 1


def test_epochs_are_counted_in_the_data(shop, tmp_path):
    out = in_process(tmp_path / "new", *TINY, "--epochs", 0.5, "--batch-size", 4, "--objectives", "itc", "--data", shop, "--log-every", 1)
    assert steps_of(out) == [1, 2, 3, 4]  # half of 32 pairs, 4 at a time
    in_process(out, "--resume", "--device", "cpu", "--epochs", 0.5)
    with pytest.raises(train.RunError, match=r"epochs \(was 0.5, now 1.0\), steps|steps \(was 4, now 8\)"):
        in_process(out, "--resume", "--device", "cpu", "--epochs", 1)


def test_a_log_cut_by_a_kill_is_mended(tmp_path):
    path = tmp_path / "log.jsonl"
    train.cut_log(path, 0)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val": {}}\n{"step": 3}\n{"step": 4, "lo')
    train.cut_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "val": {}}\n'


# --- Flags ---


@pytest.mark.parametrize("wrong", ["--colour 3", "--resume", "--dims a", "--attend-padding maybe", "--preset huge", "--lr", "--mask-style dots", "--device tpu"])
def test_a_flag_that_means_nothing_is_a_usage_error(wrong):
    with pytest.raises(SystemExit) as left:
        train.parse(wrong.split())
    assert left.value.code == 2


IMPOSSIBLE = {
    "--mask-ratio 1.5": "--mask-ratio must lie in [0, 1], got 1.5",
    "--mirror -1": "--mirror must lie in [0, 1], got -1.0",
    "--lr nan": "--lr must be a finite number, got nan",
    "--lr 0": "--lr must be above 0, got 0.0",
    "--clip inf": "--clip must be a finite number, got inf",
    "--w-mir -1": "--w-mir must not be below 0",
    "--batch-size 0": "--batch-size must be above 0, got 0",
    "--micro-batch -4": "--micro-batch must not be below 0",
    "--shift -1": "--shift must not be below 0",
    "--zoom 1": "--zoom must lie in [0, 1)",
    "--itm-from 1": "--itm-from must lie in [0, 1)",
    "--mask-image-prob 0": "--mask-image-prob must be above 0, for mir and mlm to read any pair, got 0.0",
    "--mask-image-prob 0 --objectives mir,itm --no-match-whole": "--mask-image-prob must be above 0, for mir to read any pair, got 0.0",
    "--mask-image-prob 1 --objectives mir,itm": "--mask-image-prob must be below 1, for itm to read any pair, got 1.0",
    "--mask-image-prob 1 --no-match-whole": "--mask-image-prob must be below 1, for cr to read any pair, got 1.0",
    "--workers -1": "--workers must not be below 0",
    "--seed -1": "--seed must not be below 0",
    "--seed 99999999999999999999": "--seed must not be below 0 nor absurdly large",
    "--steps 0": "--steps must be above 0",
    "--epochs -1": "--epochs must not be below 0",
    "--steps 5 --epochs 2": "--steps and --epochs exclude each other",
    "--save-every 0": "--save-every must be above 0",
    "--objectives mir,colour": "--objectives must name some of mir,itm,mlm,itc,cr",
    "--objectives mir,mir": "--objectives must name some of",
    "--objectives mir,itm --itm-negatives hard": "--itm-negatives hard needs the towers: add itc to --objectives",
    "--modality image": "--modality must be both, unless --task recognise",
    "--task recognise --objectives mir,cr": "--objectives must be cr alone with --task recognise",
    "--from a --init b": "--from and --init exclude each other",
    "--from a --vocab b": "--from brings its own words",
    "--from a --model tiny": "--from brings its own shape",
}


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_an_impossible_setting_is_refused_by_name(wrong):
    with pytest.raises(ValueError) as refused:
        train.resolve(train.parse(wrong.split())[1])
    assert str(refused.value).startswith(IMPOSSIBLE[wrong])


@pytest.mark.parametrize("wrong, said", [
    ("--image-size 40", "image_size must be a multiple of 8 patch_size = 32, got 40"),
    ("--mask-unit 7", "mask unit must divide the picture's sides 32 and 32, got 7"),
    ("--dims 1,2", "dims must be four positive whole numbers, got (1, 2)"),
    ("--dropout 2", "dropout must lie in [0, 1), got 2.0"),
])
def test_an_impossible_shape_is_refused_by_name(shop, tmp_path, wrong, said):
    with pytest.raises(train.UsageError) as refused:
        in_process(tmp_path / "run", *TINY, *RUN, "--data", shop, *wrong.split())
    assert str(refused.value) == said


def test_what_the_data_cannot_give_is_refused(shop, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(shop / "images", folder / "images")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (shop / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({name: row[name] for name in ("image", "caption", "product_id")}) + "\n" for row in rows))
    base = [*TINY, *RUN, "--data", folder]
    with pytest.raises(train.RunError, match="recognition needs category and subcategory"):
        in_process(tmp_path / "run", *base)
    with pytest.raises(train.RunError, match="--itm-negatives subcategory needs the field subcategory"):
        in_process(tmp_path / "run", *base, "--objectives", "mir,itm", "--itm-negatives", "subcategory")
    in_process(tmp_path / "plus", *TINY, "--preset", "plus", "--data", folder, "--steps", "3", "--batch-size", "12", "--workers", "0")  # wants them, and does without
    lines = (folder / "val.jsonl").read_text().splitlines()
    (folder / "val.jsonl").write_text((lines[0] + "\n") * 2)
    with pytest.raises(train.RunError, match="val: row 0 of the catalogue can have no negative.*leave itm out of --objectives"):
        in_process(tmp_path / "run", *base, "--objectives", "mir,itm", "--itm-negatives", "uniform")


def test_the_script_ends_with_the_status_and_one_line_that_fit(unbroken, tmp_path):
    """The same from outside: 2 for a wrong flag, 1 for the rest, the reason in one line, no traceback."""
    for wrong, status, said in [
        (["--colour", "3"], 2, "train.py: error: unrecognized arguments: --colour 3"),
        (["--mask-ratio", "2"], 2, "train.py: --mask-ratio must lie in [0, 1], got 2.0"),
        (["--device", "cuda"], 1, "train.py: --device: cuda needs a GPU for each process, this machine has 0"),
        (["--data", "nowhere"], 1, "train.py: nowhere"),
    ]:
        done = subprocess.run([sys.executable, str(HERE / "train.py"), *wrong, "--out", str(tmp_path / "run")], env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


GIVEN = st.fixed_dictionaries({}, optional={
    "preset": st.sampled_from(["demo", "paper", "plus"]), "task": st.sampled_from(["pretrain", "recognise"]), "lr": st.floats(1e-3, 1), "seed": SEEDS,
    "batch_size": st.integers(1, 99), "steps": st.integers(1, 99), "mirror": st.floats(0, 1), "mask_image_prob": st.floats(0.01, 0.99), "warmup": st.floats(0, 1),
})


@given(GIVEN)
def test_a_flag_beats_the_task_and_the_task_beats_the_preset(given_flags):
    s = train.resolve(given_flags)
    task = train.RECOGNISE if given_flags.get("task") == "recognise" else {}
    preset = train.PRESETS[given_flags.get("preset", "demo")]
    for name, value in asdict(s).items():
        expected = next((source[name] for source in (given_flags, task, preset) if name in source), getattr(train.Settings(), name))
        if name == "epochs" and "steps" in given_flags:
            expected = 0.0  # a number of steps beats the preset's epochs
        assert value == expected, name


def test_every_field_is_a_flag_of_its_name(capsys):
    with pytest.raises(SystemExit) as left:
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for name in [*(asdict(train.Settings()).keys() - {"start"}), *(asdict(mvlt.Config()).keys() - train.OF_THE_DATA), "from", "out", "resume", "device", "skip_bad"]:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
    assert train.parse("--no-bf16 --from x --sr-ratios 8,4,2,1 --attend-padding yes --dropout 0.2".split())[1:] == (
        {"bf16": False, "start": "x"}, {"sr_ratios": (8, 4, 2, 1), "attend_padding": True, "dropout": 0.2})


# --- Learning ---


def test_eight_pairs_are_learnt_by_heart(tmp_path):
    """All three losses fall to near zero, and every one of the 8 x 8 pairings is judged rightly."""
    garments = "red coat,green dress,blue jeans,black boots,white shirt,pink skirt,orange hat,purple bag".split(",")
    (tmp_path / "images").mkdir()
    rows = []
    for number, caption in enumerate(garments):
        picture = Image.new("RGB", (32, 32), "grey")
        picture.paste(caption.split()[0], (4 + number, 4, 28, 28))
        picture.save(tmp_path / "images" / f"{number}.png")
        rows.append(dict(image=f"images/{number}.png", caption=caption, product_id=str(number)))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({**row, "product_id": "again " + row["product_id"]}) + "\n" for row in rows))
    still = "--mirror 0 --shift 0 --zoom 0 --dropout 0 --drop-path 0 --no-bf16 --objectives mir,itm,mlm --w-itm 1 --itm-negatives uniform --itm-from 0".split()
    larger = "--dims 16,32,48,64 --token-dim 64 --text-len 8 --steps 500 --batch-size 64 --lr 2e-3 --final-lr 1e-5 --save-every 1000 --log-every 5".split()
    run = in_process(tmp_path / "run", *TINY, *still, *larger, "--data", tmp_path)

    last = [line for line in lines_of(run) if "val" not in line][-5:]
    mean = {name: sum(line[name] for line in last) / len(last) for name in ("mir", "itm", "mlm")}
    assert mean["mir"] < 0.002 and mean["itm"] < 0.02 and mean["mlm"] < 0.2, mean  # from 0.1, ln 2 and 4
    model = mvlt.load(run / "last.pt")
    tokens = data.tokenize(rows, data.Tokenizer(model.vocabulary), 8)
    images = data.images_to_float(torch.from_numpy(data.open_pictures(tmp_path, rows, 32)[0][:]).permute(0, 3, 1, 2))
    with torch.no_grad():
        _, text = model.encode(images.repeat_interleave(8, dim=0), tokens.repeat(8, 1))
        judged = model.match(text).argmax(dim=1).view(8, 8)
    assert torch.equal(judged, torch.eye(8, dtype=torch.int64))


# --- Settings do what they say ---

OF_THE_RECIPE = """--w-mir 1 | --w-itm 2 | --w-mlm 2 | --w-itc 2 | --w-cr 2 | --mask-ratio 0.2 | --mask-unit 16 | --mask-style grid | --mask-image-prob 0.9 | --mask-words 0.9
    | --no-match-whole | --itm-negatives uniform | --itm-negatives subcategory | --itm-from 0 | --hard-from 1 | --alike 1 | --drop-caption 1 | --mirror 0 | --shift 0 | --zoom 0 | --lr 1e-3
    | --final-lr 4e-4 | --warmup 1 | --weight-decay 1 | --clip 0.01 | --seed 1 | --batch-size 13 | --objectives mir,itm,mlm,itc | --dropout 0.5 | --drop-path 0.5
    | --steps 5 | --vocab-words 300 | --fit pad"""
OF_THE_MACHINE = "--log-every 3 | --save-every 2 | --workers 1"
SHORT = "--steps 4 --itm-from 0.25 --hard-from 0.5 --log-every 1 --save-every 100 --mask-image-prob 0.5".split()


def each(flags):
    return [flag.split() for flag in flags.split("|")]


@pytest.fixture(scope="module")
def oblong(shop, tmp_path_factory):
    """The shop with pictures that are not square, so that --fit has a say."""
    folder = tmp_path_factory.mktemp("data") / "oblong"
    shutil.copytree(shop, folder)
    for path in (folder / "images").iterdir():
        with Image.open(path) as picture:
            wide = picture.resize((40, 32))
        wide.save(path)
    return folder


@pytest.fixture(scope="module")
def short(oblong, tmp_path_factory):
    return in_process(tmp_path_factory.mktemp("runs") / "short", *TINY, *RUN, *SHORT, "--data", oblong)


def weights_of(run):
    return mvlt.read(run / "last.pt")["model"]


@pytest.mark.parametrize("flag", each(OF_THE_RECIPE), ids="".join)
def test_every_setting_of_the_recipe_changes_what_is_learnt(short, oblong, tmp_path, flag):
    before, after = weights_of(short), weights_of(in_process(tmp_path / "run", *TINY, *RUN, *SHORT, *flag, "--data", oblong))
    assert any(after[name].shape != value.shape or not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.skipif(not evaluation.autocast(torch.device("cpu"))._enabled, reason="this CPU gains nothing from bf16, so that it is off")
def test_bf16_changes_what_is_learnt(short, oblong, tmp_path):
    test_every_setting_of_the_recipe_changes_what_is_learnt(short, oblong, tmp_path, ["--no-bf16"])


@pytest.mark.parametrize("flag", each(OF_THE_MACHINE), ids="".join)
def test_no_setting_of_the_machine_does(short, oblong, tmp_path, flag):
    before, after = weights_of(short), weights_of(in_process(tmp_path / "run", *TINY, *RUN, *SHORT, *flag, "--data", oblong))
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- Small laws ---


@given(steps=st.integers(1, 300), lr=st.floats(1e-4, 1), final=st.floats(0, 1e-4), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_to_lr_and_falls_to_final_lr(steps, lr, final, warmup):
    s = train.Settings(steps=steps, lr=lr, final_lr=final, warmup=warmup)
    rates = [train.learning_rate(step, s) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in rates)
    assert all(a < b for a, b in zip(rates[:warm], rates[1:warm]))  # up, by equal steps,
    assert warm == 0 or rates[warm - 1] == pytest.approx(lr)
    assert all(a >= b for a, b in zip(rates[warm:], rates[warm + 1 :]))  # and down
    assert warmup * steps > steps - 1 or train.learning_rate(steps, s) == pytest.approx(final)


@st.composite
def steps_to_plan(draw):
    s = train.Settings(seed=draw(SEEDS), match_whole=draw(st.booleans()), mask_image_prob=draw(st.floats(0, 1)), mask_unit=8, mask_ratio=draw(st.floats(0, 1)),
                       mask_style=draw(st.sampled_from(mvlt.MASK_STYLES)), mask_words=draw(st.sampled_from([0.0, 0.15, 1.0])),
                       objectives=draw(st.sampled_from(["mir,itm,mlm,itc,cr", "mir,mlm", "itm,itc", "cr"])), drop_caption=draw(st.sampled_from([0.0, 0.2, 1.0])))
    return s, draw(st.integers(0, 1000)), draw(st.integers(1, 40)), draw(st.booleans())


@given(steps_to_plan())
def test_a_plan_keeps_its_promises(pairs, planned):
    s, step, G, grouped = planned
    groups = pairs.groups if grouped else None
    rows = data.batch_rows(step, G, len(pairs.rows), s.seed)
    config = SimpleNamespace(image_size=32, vocab_size=len(pairs.tokenizer))
    torch.manual_seed(random.randrange(2**31))  # what a process has drawn before changes nothing
    plan = train.plan_step(step, rows, pairs, s, config, pairs.tokenizer, groups)
    torch.manual_seed(random.randrange(2**31))
    again = train.plan_step(step, rows, pairs, s, config, pairs.tokenizer, groups)
    assert all(torch.equal(a, b) for a, b in zip(plan, again))

    objectives = s.objectives.split(",")
    hidden = plan.units.flatten(1).any(dim=1)
    true_words = data.trim(pairs.tokens[rows])
    own = [bool((plan.words[i] == torch.nn.functional.pad(true_words, (0, 99))[i, : plan.words.shape[1]]).all()) for i in range(G)]
    bare = (plan.words != 0).sum(dim=1) == 2  # [CLS] [SEP]
    assert own == (plan.matched & ~bare).tolist()  # a matched pair has its own caption, or none; no other has it, nor one that says the same
    assert not (bare & (~plan.count_cr | plan.count_itm)).any()  # a pair without its caption is for recognition alone
    assert not bare.any() if s.drop_caption == 0 or "cr" not in objectives else torch.equal(bare, plan.count_cr) or s.drop_caption < 1
    if "itm" not in objectives:
        assert plan.matched.all()
    elif not s.match_whole:
        assert int(plan.matched.sum()) == (G + 1) // 2
    if "mlm" not in objectives or s.mask_words == 0:
        assert not plan.where.any() and torch.equal(plan.tokens, plan.words)
    assert torch.equal(plan.tokens[~plan.where.any(dim=1) & plan.matched], plan.words[~plan.where.any(dim=1) & plan.matched])
    assert not (plan.where & ~plan.matched[:, None]).any() and not (plan.count_mir & ~plan.matched).any() and not (plan.count_cr & ~plan.matched).any()
    assert not torch.isin(plan.words[plan.where], torch.tensor(pairs.tokenizer.special_ids)).any()
    if s.match_whole:
        assert not hidden[plan.count_itm].any() and torch.equal(plan.tokens[plan.count_itm], plan.words[plan.count_itm])
    else:
        assert torch.equal(plan.count_itm, ~bare)
    assert not hidden[plan.count_cr].any()


@given(seed=SEEDS, G=st.integers(1, 30), step=st.integers(0, 100))
def test_a_mismatched_pair_shares_neither_product_nor_caption(pairs, seed, G, step):
    """Half of the catalogue is one product, and most of the rest says the same, so that a careless draw would soon be caught."""
    n = len(pairs.rows)
    few = SimpleNamespace(rows=pairs.rows, tokens=pairs.tokens, products=torch.arange(n).clamp(min=n // 2), captions=torch.arange(n).clamp(max=n // 2 + 4), groups=pairs.groups)
    few.tokens = torch.where(torch.arange(n)[:, None] > n // 2 + 4, pairs.tokens[n // 2 + 4], pairs.tokens)
    few.tokens[:, 1] = torch.arange(n) + 100  # the second word tells which row a caption came from
    s = train.Settings(seed=seed, match_whole=False, objectives="mir,itm")
    rows = data.batch_rows(step, G, n, seed)
    plan = train.plan_step(step, rows, few, replace(s, mask_unit=8), SimpleNamespace(image_size=32, vocab_size=len(pairs.tokenizer)), pairs.tokenizer)
    other = plan.words[:, 1] - 100
    wrong = ~plan.matched
    assert torch.equal(other[plan.matched], rows[plan.matched])
    assert not (few.products[other] == few.products[rows])[wrong].any() and not (few.captions[other] == few.captions[rows])[wrong].any()


def test_the_towers_are_judged_among_the_products_of_a_sub_category(pairs):
    model, n = tiny_model(pairs).float().eval(), len(pairs.rows)
    with torch.no_grad():
        found = train.towers_recall(model, pairs, train.Settings(batch_size=7), n)
        images = data.images_to_float(torch.from_numpy(pairs.pictures[np.arange(n)]).permute(0, 3, 1, 2))
        image, text = model.embed_images(images), model.embed_texts(pairs.tokens)
    right = {"tir_towers": 0, "itr_towers": 0}
    for i, row in enumerate(pairs.rows):
        rivals = [j for j, other in enumerate(pairs.rows) if other["subcategory"] == row["subcategory"] and other["product_id"] != row["product_id"] and other["caption"] != row["caption"]]
        right["tir_towers"] += all(text[i] @ image[j] < text[i] @ image[i] for j in rivals)
        right["itr_towers"] += all(image[i] @ text[j] < image[i] @ text[i] for j in rivals)
    assert 0 < right["tir_towers"] < n and found == {way: pytest.approx(count / n) for way, count in right.items()}


def test_batches_of_alike_products_come_when_hard_negatives_come(pairs):
    s, n = train.Settings(alike=3, steps=12, hard_from=0.5, batch_size=7), len(pairs.rows)
    for step in range(12):
        rows = train.rows_of_step(step, pairs, s)
        assert torch.equal(rows, data.alike_rows(step, 7, pairs.groups, s.seed, 3) if step >= 6 else data.batch_rows(step, 7, n, s.seed))
        assert torch.equal(train.rows_of_step(step, pairs, replace(s, alike=1)), data.batch_rows(step, 7, n, s.seed))


@pytest.mark.parametrize("negatives", ["uniform", "subcategory", "hard"])
def test_negatives_are_uniform_before_they_are_hard(pairs, monkeypatch, negatives):
    drawn, similar, usual, alike = [], [], data.draw_negatives, mvlt.hard_negatives
    monkeypatch.setattr(data, "draw_negatives", lambda *given: (drawn.append(given[4]), usual(*given))[1])
    monkeypatch.setattr(mvlt, "hard_negatives", lambda *given: (similar.append(True), alike(*given))[1])
    monkeypatch.setattr(data, "images_to_float", lambda images: images.contiguous().double() / 255)
    s, model = train.resolve(dict(batch_size=10, mask_unit=8, bf16=False, itm_negatives=negatives)), tiny_model(pairs)
    for hard in (False, True):
        train.step_backward(model, next(iter(data.Batches(pairs.pictures, 10, s.seed, 4, 5))), pairs, s, pairs.tokenizer, contextlib.nullcontext, False, hard)
    assert drawn[0] is None and len(drawn) == 2
    assert (drawn[1] is pairs.groups) == (negatives == "subcategory") and (drawn[1] is None) == (negatives != "subcategory")
    assert similar == [True] * (negatives == "hard")


def test_a_hard_negative_takes_the_place_of_the_drawn_one(pairs):
    s = train.Settings(match_whole=False, objectives="itm,itc", mask_unit=8)
    rows, config = data.batch_rows(3, 10, len(pairs.rows), 0), SimpleNamespace(image_size=32, vocab_size=len(pairs.tokenizer))
    easy = train.plan_step(3, rows, pairs, s, config, pairs.tokenizer)
    hard = train.plan_step(3, rows, pairs, s, config, pairs.tokenizer, similar=torch.arange(10).roll(1).index_fill(0, torch.arange(5), -1))
    said = lambda plan, i: plan.words[i][plan.words[i] != 0].tolist()
    caption = lambda row: pairs.tokens[row][pairs.tokens[row] != 0].tolist()
    assert torch.equal(easy.matched, hard.matched) and not easy.matched.all()
    for i in range(10):
        if easy.matched[i]:
            assert said(hard, i) == caption(rows[i])
        else:
            assert said(hard, i) == (said(easy, i) if i < 5 else caption(rows[i - 1]))  # -1: the towers know none


@given(B=st.integers(1, 12), kinds=st.integers(1, 4), fill=st.sampled_from(["random", "zero", "nan", "inf", "huge"]), seed=SEEDS)
def test_a_hard_negative_is_never_the_same_and_exists_wherever_one_can(B, kinds, fill, seed):
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(kinds, (B,), generator=g)
    same = kind[:, None] == kind
    logits = {"random": torch.randn(B, B, generator=g), "zero": torch.zeros(B, B), "huge": 1e30 * torch.randn(B, B, generator=g)}.get(fill)
    logits = torch.full((B, B), float(fill)) if logits is None else logits
    drawn = mvlt.hard_negatives(logits, same, g)
    for i in range(B):
        assert drawn[i] == -1 if same[i].all() else not same[i, drawn[i]]


# --- Starting from other weights, and fine-tuning ---


def test_recognition_is_fine_tuned_from_a_run_by_every_modality(unbroken, shop, tmp_path):
    start = mvlt.load(unbroken / "best.pt")
    for modality in ("both", "image", "text"):
        more = ["--task", "recognise", "--from", unbroken, "--modality", modality, "--steps", 2, "--batch-size", 8, "--warmup", 0, "--log-every", 1]
        out = in_process(tmp_path / modality, "--device", "cpu", "--data", shop, *more)
        model = mvlt.load(out / "last.pt")
        assert model.config == start.config and model.vocabulary == start.vocabulary
        changed = {name for name, value in start.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
        assert not any(name.startswith(("decoder", "match_head", "word_head", "image_tower", "text_tower", "log_scale")) for name in changed)  # not even decayed
        assert any(name.startswith("category_head") for name in changed) and any(name.startswith("subcategory_head") for name in changed)
        assert any("embed_image" in name for name in changed) == (modality != "text")
        assert lines_of(out)[0].keys() == {"step", "epoch", "loss", "cr", "lr", "grad_norm", "images_per_s", "memory_gb"}
        assert 0 <= lines_of(out)[-1]["val"]["cr_accuracy"] <= 1


def test_recognition_from_nothing_but_categories_learns(shop, tmp_path):
    out = in_process(tmp_path / "run", *TINY, "--task", "recognise", "--steps", 60, "--batch-size", 32, "--lr", 5e-3, "--data", shop, "--log-every", 1, "--mirror", 0)
    first, last = lines_of(out)[0]["cr"], lines_of(out)[-2]["cr"]
    assert last < 0.9 * first


def pvt_names(model):
    """The model's visual half as the PVT authors would have saved it, filled with new numbers."""
    return {theirs: torch.randn(parameter.shape if "pos_embed" not in theirs else (1, len(parameter) + ("4" in theirs), parameter.shape[1]))
            for name, parameter in model.named_parameters() if (theirs := mvlt.their_name(name, mvlt.VISUAL_PARTS))}


def test_a_run_starts_from_pvt_weights(pairs, shop, tmp_path):
    weights = pvt_names(tiny_model(pairs))
    torch.save(weights, tmp_path / "pvt.pth")
    out = in_process(tmp_path / "run", *TINY, "--steps", 1, "--batch-size", 4, "--lr", 1e-30, "--final-lr", 0, "--init", tmp_path / "pvt.pth", "--data", shop)
    model = mvlt.load(out / "last.pt")
    assert torch.allclose(model.stages[2].blocks[0].mlp.fc1.weight, weights["block3.0.mlp.fc1.weight"])
    assert torch.allclose(model.stages[3].position_image, weights["pos_embed4"][0, 1:])
    os.remove(tmp_path / "pvt.pth")
    in_process(out, "--resume", "--device", "cpu")  # which needs the weights no more
    torch.save({name: value for name, value in weights.items() if name != "pos_embed2"}, tmp_path / "pvt.pth")
    with pytest.raises(ValueError, match="'pos_embed2'"):
        in_process(tmp_path / "run2", *TINY, "--steps", 1, "--batch-size", 4, "--init", tmp_path / "pvt.pth", "--data", shop)


def test_a_run_starts_from_the_authors_weights(pairs, shop, tmp_path):
    model = tiny_model(pairs).float()
    text = {theirs: torch.randn(parameter.shape) for name, parameter in model.named_parameters() if (theirs := mvlt.their_name(name, mvlt.TEXT_PARTS))}
    weights = {**pvt_names(model), **text, "text_embeddings.token_type_embeddings.weight": torch.randn(2, 32)}
    torch.save({"model": weights}, tmp_path / "official.pth")
    pairs.tokenizer.save(tmp_path / "vocab.txt")
    more = ["--steps", 1, "--batch-size", 4, "--lr", 1e-30, "--final-lr", 0, "--init", tmp_path / "official.pth", "--vocab", tmp_path / "vocab.txt", "--data", shop]
    model = mvlt.load(in_process(tmp_path / "run", *TINY, *more) / "last.pt")
    assert model.config.attend_padding
    assert torch.allclose(model.words.word.weight, weights["text_embeddings.word_embeddings.weight"])
    assert torch.allclose(model.match_head.classify.weight, weights["itm_head.linear.weight"])
    assert torch.allclose(model.stages[0].position_text, weights["text_pos_embed1"].view(24, 8))


def test_a_run_of_another_shape_is_refused_by_the_name_of_the_weight(unbroken, shop, tmp_path):
    with pytest.raises(ValueError, match=r"words.position of the weights to start from must have this configuration's shape \(20, 32\), got \(24, 32\)"):
        in_process(tmp_path / "run", "--device", "cpu", "--from", unbroken, "--text-len", 20, "--data", shop, *RUN)
