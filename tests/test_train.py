"""
The laws of train.py. What must be exact: any number of processes, loaders and micro-batches, and any interruption, give
the same weights. What must go wrong well: every fault here is really made, with real processes and signals, on a model
of a few thousand weights.
"""

import contextlib
import copy
import errno
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from conftest import limits, make_shop, message, write_rows
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import eval as evaluation
import mvlt
import train
from extras import foreign, runtime, table, weights
from extras.runtime import UserError
from extras.teachers import Teachers
from extras.tokenizer import SPECIAL, Tokenizer

laws = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31 - 1)
HERE = Path(train.__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)  # the number of threads changes the last bits of a sum

SHAPES = {  # model -> a configuration of a few thousand weights
    "mvlt": dict(
        image_size=32, dims=(4, 8, 8, 16), heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1),
        sr_ratios=(4, 2, 1, 1), token_dim=8, embed_dim=8, text_len=16,
    ),
    "kaleido": dict(
        image_size=32, patch_side=8, sat_grid=8, sat_dim=32, width=8, heads=2, depth=1, mlp_ratio=1, encoder="conv",
        feature_dim=32, text_len=16,
    ),
    "vlmo": dict(
        image_size=32, patch_size=8, width=8, heads=2, depth=2, fused=1, mlp_ratio=1, embed_dim=8, text_len=16,
        text_reach=16,
    ),
}


def flags_of(name):
    """The shape as flags."""
    flags = ["--device", "cpu", "--vocab-size", "80"]
    for field, value in SHAPES[name].items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += [train.flag(field), text]
    return flags


TINY = [*flags_of("mvlt"), "--mask-unit", "8"]
RUN = """--steps 8 --batch-size 6 --lr 5e-4 --log-every 1 --save-every 3 --itm-from 0.25 --hard-from 0.25
    --objectives mir,itm:3,mlm,itc,distil,cr --mirror 0.5 --shift 1 --zoom 0.2 --average""".split()  # everything
EXACT = "--no-bf16 --dropout 0 --drop-path 0".split()  # where only the order of a sum may differ
ONE_STEP = [*TINY, "--steps", "1", "--batch-size", "4"]
RESUME = ["--resume", "--device", "cpu"]


@pytest.fixture(scope="session")
def unbroken(shop, tmp_path_factory):
    """A run that nothing disturbed, dropout on: what every broken one must end like, bit by bit."""
    return in_process(tmp_path_factory.mktemp("runs") / "unbroken", *TINY, *RUN, "--data", shop)


@pytest.fixture(scope="session")
def stopped(shop, tmp_path_factory):
    """The same, stopped in its sixth step. Copy it before use."""
    return stop_in_step(5, tmp_path_factory.mktemp("runs") / "stopped", *TINY, *RUN, "--data", shop)


@pytest.fixture(scope="session")
def plain(shop, tmp_path_factory):
    """One process, fp32, no dropout: what several processes must agree with, but for rounding."""
    return in_process(tmp_path_factory.mktemp("runs") / "plain", *TINY, *RUN, *EXACT, "--data", shop)


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run."""
    return copy_of(stopped, tmp_path)


# --- Runs in this process and in others ---


def flags(out, *more):
    return [*map(str, more), "--out", str(out)]


def in_process(out, *more):
    train.main(flags(out, *more))
    return out


def in_step(step, act):
    """A learning_rate that calls act() when that step (counted from 0) begins."""
    usual = train.learning_rate

    def learning_rate(now, s):
        if now == step:
            act()
        return usual(now, s)

    return learning_rate


def stop_in_step(step, out, *more):
    """Send this process a SIGTERM in the middle of that step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", in_step(step, lambda: signal.raise_signal(signal.SIGTERM)))
        said = message(in_process, out, *more)
    gc.collect()  # the lock of the run's folder is still held by the error's frames
    assert said == f"stopped at step {step + 1}; go on with: python train.py --out {out} --resume"
    return out


def copy_of(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


class Child:
    """
    A forked process that runs train.py as a script does. It may wait `slow` seconds before each step, so that a signal
    has something to hit.
    """

    def __init__(self, out, *more, slow=0, environment=(), prepare=None):
        self.screen = Path(f"{out}.{random.randrange(10**9)}.screen")
        self.pid = os.fork()
        if self.pid == 0:
            self.work(flags(out, *more), slow, environment, prepare)

    def work(self, arguments, slow, environment, prepare):
        """In the child: never returns."""
        status = 70
        try:
            with open(self.screen, "w", buffering=1) as screen:
                sys.stdout = sys.stderr = screen
                sys.argv = ["train.py"]
                os.environ.update(environment)
                if slow:
                    usual = train.freeze_all_but
                    train.freeze_all_but = lambda *given: (time.sleep(slow), usual(*given))
                if prepare:
                    prepare()
                runtime.run(lambda: train.main(arguments))
            status = 0
        except SystemExit as left:
            status = left.code
        except BaseException:
            self.screen.write_text(traceback.format_exc())
        finally:
            os._exit(status)

    def ended(self):
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self):
        """(exit status, everything on the screen)."""
        end = time.monotonic() + 120
        while not self.ended():
            assert time.monotonic() < end, "not done after two minutes"
            time.sleep(0.01)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.screen.read_text()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)


def start_processes(world, out, *more, **options):
    """Several processes that work on one run, as torchrun starts them."""
    out.parent.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for index in range(world):
        place = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
        environment = {name: str(value) for name, value in place.items()}
        children.append(Child(out, *more, environment=environment, **options))
    return children


def processes(world, out, *more):
    """A run by several processes, which must go well."""
    for child in start_processes(world, out, *more):
        status, screen = child.finish()
        assert status == 0, screen
    return out


def torchrun(out, *more):
    """train.py as a person starts it on two devices."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*launcher, HERE / "train.py", *flags(out, *more)], env=ENV, cwd=out.parent, **pipes)


def lines_of(run):
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def steps_of(run):
    return [line["step"] for line in lines_of(run) if "val" not in line]


def wait_for(condition, seconds=60):
    """Look every few milliseconds until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def state(run):
    """Every tensor and number that the next step would depend on."""
    saved = weights.read(run / "last.pt")
    found = dict(saved["model"])
    found |= {f"unaveraged {name}": value for name, value in saved.get("unaveraged", {}).items()}
    for number, moments in saved["optimizer"]["state"].items():
        found |= {f"{number} {name}": value for name, value in moments.items()}
    for name in ("step", "best"):
        found[name] = torch.tensor(saved[name], dtype=torch.float64)
    return found


def assert_bitwise(run, other):
    ours, theirs = state(run), state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(run, other):
    ours, theirs = weights.read(run / "last.pt"), weights.read(other / "last.pt")
    assert ours["step"] == theirs["step"]
    for name, value in ours["model"].items():
        assert value.float().abs().max() < 100  # so that the tolerance below means something
        right = theirs["model"][name]
        torch.testing.assert_close(value, right, rtol=1e-3, atol=2e-5, msg=lambda text: f"{name}: {text}")


def losses_of(run):
    """What the log says about the losses, without the clock."""
    clock = ("images_per_s", "memory_gb")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines_of(run)]


def weights_of(run):
    return weights.read(run / "last.pt")["model"]


def files_of(run):
    """Every file of the run but its lock."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@contextlib.contextmanager
def small_disk(size):
    """A write beyond `size` bytes fails as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# --- Exactness ---


def test_a_run_says_what_it_did(unbroken, shop):
    assert steps_of(unbroken) == list(range(1, 9))
    assert [line["step"] for line in lines_of(unbroken) if "val" in line] == [3, 6, 8]
    towers, *_, fused = (line for line in lines_of(unbroken) if "val" not in line)
    assert towers.keys() == {"step", "epoch", "loss", "itc", "lr", "grad_norm", "images_per_s", "memory_gb"}
    assert fused.keys() == towers.keys() | {"mir", "itm", "mlm", "distil", "cr"}
    weight = dict(mir=10, itm=3, mlm=1, itc=10, distil=20, cr=1)
    total = sum(weight[name] * fused[name] for name in weight)
    assert fused["loss"] == pytest.approx(total, rel=1e-5)
    written = json.loads((unbroken / "config.json").read_text())
    for line in lines_of(unbroken):
        if "val" not in line:
            assert line["lr"] == train.learning_rate(line["step"] - 1, train.Settings(**written["settings"]))
            assert line["epoch"] == round(line["step"] * 6 / 24, 3)
    assert written["settings"]["data"] == str(shop) and written["settings"]["steps"] == 8
    assert written["config"]["dims"] == [4, 8, 8, 16] and written["recipe"]["hard_from"] == 0.25
    samples = sorted(path.name for path in (unbroken / "samples").iterdir())
    assert samples == ["000003.png", "000006.png", "000008.png"]
    assert Image.open(unbroken / "samples" / "000008.png").size == (8 * 32, 3 * 32)  # a column for each picture
    model = weights.load(unbroken / "best.pt")
    assert model.vocabulary == (unbroken / "vocab.txt").read_text().split()
    assert len(model.labels["category"]) == model.config.n_category


def test_a_run_repeats_itself_bit_by_bit(unbroken, shop, tmp_path):
    assert_bitwise(in_process(tmp_path / "again", *TINY, *RUN, "--data", shop), unbroken)


def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(unbroken, shop, tmp_path):
    out = tmp_path / "killed"
    for already in (1, 3, 5):  # before the first checkpoint, and twice after one
        child = Child(out, *TINY, *RUN, "--data", shop, "--resume", slow=0.2)
        wait_for(lambda: child.ended() or max(steps_of(out), default=0) >= already)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        assert child.finish()[0] == -signal.SIGKILL
        assert already <= max(steps_of(out)) < 8
    in_process(out, *TINY, *RUN, "--data", shop, "--resume")
    assert_bitwise(out, unbroken)
    assert losses_of(out) == losses_of(unbroken)  # no step is logged twice


def test_a_stopped_run_is_resumed_with_the_same_bits_by_any_number_of_loaders(run, unbroken):
    assert steps_of(run) == [1, 2, 3, 4, 5, 6] and weights.read(run / "last.pt")["step"] == 6
    in_process(run, *RESUME, "--workers", 2)  # everything but the device is known from the run
    assert_bitwise(run, unbroken)
    assert losses_of(run) == losses_of(unbroken)
    assert_bitwise(in_process(run, *RESUME), unbroken)  # a run that is finished stays as it is


def test_live_pictures_make_the_same_run_and_a_stopped_one_may_go_on_with_them(run, unbroken, shop, tmp_path):
    live = in_process(tmp_path / "live", *TINY, *RUN, "--data", shop, "--decode", "live")
    assert losses_of(live) == losses_of(unbroken)
    in_process(run, *RESUME, "--decode", "live", "--workers", 2)
    assert_bitwise(run, unbroken)


def test_a_run_stopped_while_its_towers_train_alone_ends_with_the_same_bits(unbroken, shop, tmp_path):
    run = stop_in_step(0, tmp_path / "early", *TINY, *RUN, "--data", shop)
    assert weights.read(run / "last.pt")["step"] == 1
    assert_bitwise(in_process(run, *RESUME), unbroken)


def test_a_run_goes_on_from_best_pt_where_last_pt_is_missing(unbroken, shop, tmp_path):
    """As after a kill between the two, which are written in this order."""
    out = tmp_path / "killed"

    def die(path, *given, **rest):
        if Path(path).name == "last.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, *given, **rest)

    save = weights.save
    child = Child(out, *TINY, *RUN, "--data", shop, prepare=lambda: setattr(weights, "save", die))
    assert child.finish()[0] == -signal.SIGKILL and not (out / "last.pt").exists()
    assert "already holds a run" in message(in_process, out, *TINY, *RUN, "--data", shop)
    assert_bitwise(in_process(out, *RESUME), unbroken)
    assert losses_of(out) == losses_of(unbroken)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_give_the_weights_of_one(plain, shop, tmp_path, world):
    out = processes(world, tmp_path / "run", *TINY, *RUN, *EXACT, "--data", shop)
    assert_close(out, plain)
    ours, theirs = ([line["loss"] for line in losses_of(one) if "loss" in line] for one in (out, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_eight_processes_with_a_pair_each_give_the_weights_of_one(shop, tmp_path):
    more = [*TINY, *EXACT, "--steps", 2, "--batch-size", 8, "--itm-from", 0.5, "--data", shop]
    assert_close(processes(8, tmp_path / "eight", *more), in_process(tmp_path / "one", *more))


def test_a_run_of_one_process_is_resumed_by_two(plain, shop, tmp_path):
    out = stop_in_step(2, tmp_path / "one", *TINY, *RUN, *EXACT, "--data", shop)
    assert_close(processes(2, out, *RESUME), plain)


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(shop, tmp_path):
    """The run has more steps than it can do before the signal."""
    long = [*TINY, *RUN, *EXACT, "--data", shop, "--steps", 5000, "--warmup", 0]
    out = tmp_path / "two"
    process = torchrun(out, *long, "--workers", 1)  # torchrun sends its signal to the loaders, too
    wait_for(lambda: 2 in steps_of(out) or process.poll() is not None)
    process.terminate()
    screen, _ = process.communicate(timeout=60)
    step = weights.read(out / "last.pt")["step"]
    assert process.returncode != 0 and f"stopped at step {step}" in screen and 'train.py", line' not in screen, screen
    assert 2 <= step < 5000
    stop_in_step(step, out, *RESUME, "--workers", 0)  # one process goes on


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulation_equals_one_large_batch(plain, shop, tmp_path, micro_batch):
    out = in_process(tmp_path / "parts", *TINY, *RUN, *EXACT, "--data", shop, "--micro-batch", micro_batch)
    assert_close(out, plain)


def test_a_step_in_which_nothing_is_hidden_teaches_mir_nothing(shop, tmp_path):
    still = "--objectives mir --mask-pictures 1e-9 --weight-decay 0".split()
    found = []
    for lr in ("1e-3", "1e-1"):
        found.append(weights_of(in_process(tmp_path / lr, *ONE_STEP, *still, "--data", shop, "--lr", lr)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("changed", [["--seed", 1], ["--lr", 6e-4], ["--objectives", "mir,itm:3,mlm,itc"]])
def test_another_setting_gives_other_weights(plain, shop, tmp_path, changed):
    """So that the tolerance of the laws above is one that a difference would break."""
    out = in_process(tmp_path / "other", *TINY, *RUN, *EXACT, "--data", shop, *changed)
    with pytest.raises(AssertionError):
        assert_close(out, plain)


@pytest.mark.parametrize("name", ["mvlt", "vlmo"])
def test_recomputed_activations_give_the_same_weights(shop, tmp_path, name):
    more = ["--model", name, *flags_of(name), *EXACT, "--steps", 4, "--batch-size", 6, "--data", shop]
    one, other = (in_process(tmp_path / str(len(flag)), *more, *flag) for flag in ([], ["--recompute"]))
    assert_close(one, other)


def test_a_head_that_joins_late_counts_its_steps_from_then(unbroken):
    """AdamW's first steps have the right size for a parameter that has seen no zeros before."""
    model, state = weights.load(unbroken / "last.pt"), weights.read(unbroken / "last.pt")["optimizer"]["state"]
    groups = train.make_optimizer(model, train.Settings()).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [parameter for group in groups for parameter in group["params"]]
    for number, name in enumerate(map(names.get, grouped)):
        late = name.startswith(("decoder", "match_head", "word_head", "category_head", "subcategory_head"))
        assert state[number]["step"] == (6 if late else 8), name  # --itm-from 0.25 of 8


def test_norms_and_biases_are_not_decayed_and_the_second_beta_is_the_settings(unbroken):
    model = weights.load(unbroken / "last.pt")
    optimizer = train.make_optimizer(model, train.Settings(weight_decay=0.3, beta2=0.98))
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (parameter.ndim > 1) == (group["weight_decay"] == 0.3)


@laws
@given(st.integers(1, 200), SEEDS)
def test_the_average_forgets_the_fresh_weights_and_weighs_step_t_in_proportion_to_t_to_t_plus_7(steps, seed):
    fresh, *seen = torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(seed)).double()
    model, average = torch.nn.Linear(3, 1, bias=False).double(), torch.nn.Linear(3, 1, bias=False).double()
    average.weight.data[0] = fresh
    for step, weight in enumerate(seen, 1):
        model.weight.data[0] = weight
        train.follow(average, model, step)
    shares = [math.prod(range(step, step + 8)) for step in range(1, steps + 1)]  # t (t + 1) ... (t + 7)
    expected = sum(share / sum(shares) * weight for share, weight in zip(shares, seen))
    torch.testing.assert_close(average.weight.detach()[0], expected, atol=1e-12, rtol=1e-9)


def test_what_is_saved_is_the_average_of_the_weights_after_every_step(shop, tmp_path, monkeypatch):
    averages, seen, save = [], [], weights.save

    def spy(path, model, **rest):
        if path.name == "last.pt":
            averages.append(copy.deepcopy(model.state_dict()))
            seen.append(copy.deepcopy(rest["unaveraged"]))
        save(path, model, **rest)

    monkeypatch.setattr(weights, "save", spy)
    out = in_process(tmp_path / "run", *TINY, *RUN, "--data", shop, "--save-every", 1)
    weight = "stages.0.embed_text.weight"
    for step in range(2, 9):
        expected = ((step - 1) * averages[step - 2][weight] + 9 * seen[step - 1][weight]) / (8 + step)
        torch.testing.assert_close(averages[step - 1][weight], expected)
        assert not torch.allclose(averages[step - 1][weight], seen[step - 1][weight], atol=1e-5)
    assert torch.equal(weights_of(out)[weight], averages[-1][weight])
    assert weights.load(out / "last.pt").learnt == {"mir", "itm", "mlm", "itc", "distil", "cr"}


def test_what_is_validated_is_what_is_saved(unbroken):
    model, tokenizer, run = weights.load_run(unbroken / "last.pt")
    split = data.open_split(run["data"], "val", tokenizer, model.labels, 32, 16)
    values = [line["val"] for line in lines_of(unbroken) if "val" in line][-1]
    assert evaluation.validate(model, split, run["seed"], 7 / 8) == pytest.approx(values)


def test_best_pt_is_the_best_of_the_last_phase_and_a_resumed_run_remembers_it(shop, tmp_path, monkeypatch):
    falling = iter([9, 8, 2, 1])  # the towers train alone in the first two steps
    monkeypatch.setattr(evaluation, "goodness", lambda model, values: next(falling))
    short = ["--steps", 4, "--save-every", 1, "--itm-from", 0.5]
    run = stop_in_step(2, tmp_path / "run", *TINY, *RUN, "--data", shop, *short)
    assert weights.read(run / "best.pt")["step"] == 3
    in_process(run, *RESUME)
    assert weights.read(run / "best.pt")["step"] == 3


def test_validation_is_that_of_the_seed_and_of_the_stage(shop, tmp_path, monkeypatch):
    asked, usual = [], evaluation.validate
    spy = lambda model, split, *given: asked.append(given) or usual(model, split, *given)
    monkeypatch.setattr(evaluation, "validate", spy)
    in_process(tmp_path / "run", *TINY, *RUN, "--data", shop, "--steps", 4, "--save-every", 2, "--seed", 7)
    assert asked == [(7, 0.25), (7, 0.75)]


# --- Faults ---


def test_sigkill_in_the_middle_of_writing_a_checkpoint_leaves_the_old_one(unbroken, shop, tmp_path):
    out, write = tmp_path / "torn", torch.save

    def torn(contents, file):
        write(contents, file)
        if contents["step"] == 6:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    child = Child(out, *TINY, *RUN, "--data", shop, prepare=lambda: setattr(torch, "save", torn))
    assert child.finish()[0] == -signal.SIGKILL
    assert len(list(out.glob("*.tmp"))) == 1  # it really was cut in two
    assert weights.read(out / "last.pt")["step"] == 3
    assert_bitwise(in_process(out, *RESUME), unbroken)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_old_checkpoint(run, unbroken):
    before = (run / "last.pt").read_bytes()
    with small_disk(len(before) // 2):
        said = message(in_process, run, *RESUME)
    said_so = r"step 8: .*/(best|last)\.pt cannot be written \(.*File too large.*\); what was saved before is intact"
    assert re.fullmatch(said_so, said)
    assert (run / "last.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert_bitwise(in_process(run, *RESUME), unbroken)


@pytest.mark.parametrize("kind", ["losses", "validation"])
def test_a_full_disk_under_the_log_names_step_and_file_and_saves_the_run_first(run, unbroken, monkeypatch, kind):
    def write(log, line):
        if ("val" in line) == (kind == "validation"):
            with open(log.path, "a") as file:
                file.write(json.dumps(line)[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(log, line)

    usual = train.Log.write
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", write)
        said = message(in_process, run, *RESUME)
    step = 7 if kind == "losses" else 8
    assert said == f"step {step}: {run / 'log.jsonl'} cannot be written (No space left on device)"
    assert weights.read(run / "last.pt")["step"] == step
    in_process(run, *RESUME)
    ours, theirs = weights_of(run), weights_of(unbroken)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert steps_of(run) == [step for step in range(1, 9) if (step, kind) != (7, "losses")]


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "log.jsonl", "best.pt", "samples/000001.png"])
def test_a_file_that_cannot_be_written_is_named_in_one_line(shop, tmp_path, name):
    (tmp_path / "run" / name / "folder").mkdir(parents=True)
    said = message(in_process, tmp_path / "run", *ONE_STEP, "--data", shop, "--resume")
    assert str(tmp_path / "run" / name) in said and ("cannot be written" in said or "not a regular file" in said)


def test_sigterm_saves_and_leaves_within_one_step(unbroken, shop, tmp_path):
    out = tmp_path / "asked"
    child = Child(out, *TINY, *RUN, "--data", shop, slow=0.2)
    wait_for(lambda: child.ended() or 4 in steps_of(out))
    child.kill(signal.SIGTERM)
    logged = max(steps_of(out))
    status, screen = child.finish()
    step = weights.read(out / "last.pt")["step"]
    last = f"train.py: stopped at step {step}; go on with: python train.py --out {out} --resume"
    assert (status, screen.splitlines()[-1]) == (1, last)
    assert logged <= step <= logged + 2 and step < 8
    assert_bitwise(in_process(out, *RESUME), unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_of_two_processes_that_is_stopped_or_killed_takes_the_other_with_it(shop, tmp_path, number):
    out = tmp_path / "two"
    first, second = start_processes(2, out, *TINY, *RUN, "--data", shop, slow=0.2)
    wait_for(lambda: first.ended() or second.ended() or 4 in steps_of(out))
    second.kill(number)
    status, screen = first.finish()
    other, _ = second.finish()
    assert status == 1 and "Traceback" not in screen
    step = weights.read(out / "last.pt")["step"]
    if number == signal.SIGKILL:
        assert other == -signal.SIGKILL and step in (3, 6)
        assert "train.py, process 0: another process of this run has ended" in screen
    else:
        assert other == 1 and 4 <= step < 8 and f"train.py, process 0: stopped at step {step}" in screen


def test_a_refusal_is_one_line_of_each_process(stopped):
    for index, child in enumerate(start_processes(2, stopped, *TINY)):
        status, screen = child.finish()
        said = [line for line in screen.splitlines() if line.startswith("train.py")]
        assert status == 1 and "Traceback" not in screen and len(said) == 1
        assert said[0].startswith(f"train.py, process {index}: --out {stopped} already holds a run; add --resume")


def test_a_loss_that_is_no_number_names_itself_and_keeps_the_last_good_checkpoint(run, shop, tmp_path, monkeypatch):
    wild = [*TINY, *RUN, "--no-bf16", "--data", shop, "--lr", 1e30, "--warmup", 0.8]
    said = message(in_process, tmp_path / "wild", *wild)
    assert re.match(r"step \d+: the (loss \w+|gradient's norm|validation's \w+) is (nan|inf)", said)
    assert not (tmp_path / "wild" / "last.pt").exists()
    before = (run / "last.pt").read_bytes()
    monkeypatch.setattr(mvlt, "mir_loss", lambda rebuilt, images: rebuilt.sum() * math.nan)
    said = message(in_process, run, *RESUME)
    rule = rf"step [78]: the loss mir is nan \(rows \d+, \d+, \d+, \d+, ...\); {run}/last.pt is from before it.*"
    assert re.fullmatch(rule, said) and (run / "last.pt").read_bytes() == before


def test_weights_that_broke_in_the_last_step_never_reach_a_checkpoint(shop, tmp_path, monkeypatch):
    """The losses were finite and the step still ruined the weights: the validation sees it."""
    step = torch.optim.AdamW.step

    def ruin(optimizer, *arguments):
        step(optimizer, *arguments)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    said = message(in_process, tmp_path / "run", *ONE_STEP, "--data", shop)
    assert re.match(r"step 1: the validation's \w+ is nan; nothing was saved yet", said)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_clock_that_stands_still_disturbs_nothing(unbroken, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 7.0)
    out = in_process(tmp_path / "run", *TINY, *RUN, "--data", shop)
    assert_bitwise(out, unbroken)
    assert all(0 < line["images_per_s"] < math.inf for line in lines_of(out) if "val" not in line)


def test_a_folder_that_another_run_is_writing_to_is_refused(run):
    other = Child(run, *RESUME, slow=2)
    wait_for(lambda: other.ended() or 7 in steps_of(run))
    assert message(in_process, run, *RESUME) == f"--out {run}: another run is writing there"
    assert other.finish()[0] == 0  # and was not disturbed
    in_process(run, *RESUME)  # the lock ends with its process


def test_without_permission_to_write_the_run_ends_in_one_line(shop, tmp_path):
    """Root may write anywhere but here: /proc belongs to the kernel, and a file is no folder."""
    (tmp_path / "file").write_text("")
    for out in ("/proc/run", tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(OSError, match=str(out)):
            in_process(out, *ONE_STEP, "--data", shop)


def test_a_run_is_never_written_over(run, shop):
    before = files_of(run)
    (run / "last.pt").rename(run / "kept")
    said = [message(in_process, run, *TINY, *RUN, "--data", shop)]  # best.pt is there
    (run / "kept").rename(run / "last.pt")
    said.append(message(in_process, run, *TINY, *RUN, "--data", shop))
    rule = f"--out {run} already holds a run; add --resume to go on with it, or choose another folder"
    assert said == [rule, rule] and files_of(run) == before


def test_without_out_each_run_gets_a_new_number(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "7").mkdir(parents=True)
    (tmp_path / "runs" / "notes").mkdir()
    for number in ("8", "9"):
        train.main([*ONE_STEP, "--objectives", "itc", "--data", str(shop)])
        assert (tmp_path / "runs" / number / "last.pt").is_file()


def test_resume_without_a_run_begins_one(shop, tmp_path):
    out = in_process(tmp_path / "new", *ONE_STEP, "--data", shop, "--resume")
    assert weights.read(out / "last.pt")["step"] == 1


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_own_settings(run, unbroken):
    (run / "last.pt").unlink()
    (run / "best.pt").unlink(missing_ok=True)
    assert_bitwise(in_process(run, *RESUME), unbroken)
    for damaged in ("", "[]", "{}", '{"settings": {"model": "mvlt"}, "config": [1], "recipe": {}}'):
        for path in run.glob("*.pt"):
            path.unlink()
        (run / "config.json").write_text(damaged)
        with pytest.raises(UserError, match="config.json: damaged|config.json is damaged"):
            in_process(run, *RESUME, "--model", "mvlt")


def test_objectives_that_no_step_trains_are_named_and_one_of_weight_0_is_not_learnt(shop, tmp_path, capsys):
    out = in_process(tmp_path / "short", *ONE_STEP, "--data", shop)  # one step: the towers alone
    printed = capsys.readouterr().out
    assert "note: no step of this run trains mir, itm, mlm, cr\n" in printed
    assert f"done. {out}: last.pt, log.jsonl" in printed and not (out / "best.pt").exists()
    more = ["--itm-from", 0, "--objectives", "itm:0,itc,mlm"]
    out = in_process(tmp_path / "whole", *ONE_STEP, "--data", shop, *more)
    printed = capsys.readouterr().out
    assert "note:" not in printed and f"done. {out}: best.pt (chosen" in printed
    assert weights.learnt(weights.load_run(out)[0]) == {"itc", "mlm"}


def test_epochs_are_counted_in_the_data(shop, tmp_path):
    part = [*TINY, "--epochs", 0.55, "--batch-size", 4, "--objectives", "itc", "--data", shop, "--log-every", 1]
    out = in_process(tmp_path / "new", *part)
    assert steps_of(out) == [1, 2, 3, 4]  # 13.2 of 24 pairs, 4 at a time
    in_process(out, *RESUME, "--epochs", 0.55)
    said = message(in_process, out, *RESUME, "--epochs", 1)
    assert "is another run: steps (was 4, now 6), epochs (was 0.55, now 1.0); start a new one" in said


def test_data_are_found_again_from_another_working_directory(unbroken, shop, tmp_path, monkeypatch):
    monkeypatch.chdir(shop.parent)
    out = stop_in_step(5, tmp_path / "run", *TINY, *RUN, "--data", shop.name)
    monkeypatch.chdir(tmp_path)
    assert weights.load_run(out)[2]["data"] == str(shop)
    assert_bitwise(in_process(out, *RESUME), unbroken)


# --- What a resumed run must have in common with the run before ---


def test_every_setting_that_changes_what_is_learnt_or_saved_is_refused_on_resume(run):
    for flag in [["--no-average"], *each(OF_THE_RECIPE)]:
        if "--vocab-size" not in flag:
            assert "is another run" in message(in_process, run, *RESUME, *flag), flag


def test_settings_of_the_machine_may_change_on_resume(run, monkeypatch):
    seen, usual = [], train.freeze_all_but
    spy = lambda model, names: seen.append(model.recompute) or usual(model, names)
    monkeypatch.setattr(train, "freeze_all_but", spy)
    more = ["--log-every", 2, "--save-every", 4, "--micro-batch", 2, "--workers", 1, "--recompute"]
    in_process(run, *RESUME, *more)
    assert seen == [True, True]


def test_any_picture_file_of_another_size_is_noticed(tmp_path):
    folder = make_shop(tmp_path / "shop")
    rows = table.build(data.read(folder, "train"))
    labels = {field: rows.class_names(field) for field in ("category", "subcategory")}
    split = data.open_split(folder, "train", Tokenizer(SPECIAL), labels, 32, 16)
    before, path = train.fingerprint(folder, split, samples=1), folder / split.rows[5]["image"]
    path.write_bytes(path.read_bytes() + b"\0")
    assert train.fingerprint(folder, split, samples=1) != before


def test_a_changed_setting_is_refused_by_name(run):
    said = message(in_process, run, *RESUME, "--lr", 0.5, "--mirror", 0.25, "--depths", "1,1,1,2", "--mask-ratio", 0.6)
    rule = r".*last.pt is another run: lr \(was 0.0005, now 0.5\), mirror \(was 0.5, now 0.25\), depths \(was .*, now "
    assert re.match(rule + r".*\), mask_ratio \(was 0.5, now 0.6\); start a new one with --from", said)
    assert "--model must be mvlt, the run's, got 'vlmo'" in message(in_process, run, *RESUME, "--model", "vlmo")


def repaint(folder, split):
    """Paint over a picture of the split; its name and the size of its file stay the same."""
    path = folder / json.loads((folder / f"{split}.jsonl").read_text().splitlines()[2])["image"]
    size = path.stat().st_size
    picture = Image.open(path)
    picture.paste("black", (8, 8, 24, 24))
    picture.save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert path.stat().st_size == size


def turn_around(folder, split):
    """Put the rows of the split into another order."""
    path = folder / f"{split}.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def cut_short(folder, split):
    """Leave out the last row of the split."""
    path = folder / f"{split}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", [repaint, turn_around, cut_short])
def test_changed_data_are_refused_by_the_name_of_the_split(run, shop, tmp_path, change, split):
    folder = shutil.copytree(shop, tmp_path / "shop", ignore=shutil.ignore_patterns(".cache"))
    before = files_of(run)
    change(folder, split)
    said = message(in_process, run, *RESUME, "--data", folder)
    assert re.match(rf"--resume: .*last.pt is another run: {split} split \(was \d+, now \d+\); start", said)
    assert files_of(run) == before


def test_changed_pictures_and_lines_without_a_pair_are_refused(shop, tmp_path):
    photos, lines = tmp_path / "photos", tmp_path / "lines.txt"
    shutil.copytree(shop / "images", photos)
    lines.write_text("a red coat\na blue hat\n")
    stages = "--image-until 0.3 --text-until 0.6 --steps 4 --batch-size 4".split()
    more = ["--model", "vlmo", *flags_of("vlmo"), *stages, "--data", shop, "--images", photos, "--texts", lines]
    run = stop_in_step(0, tmp_path / "run", *more)
    lines.write_text("a red coat\na green hat\n")
    (photos / "b.png").write_bytes((photos / sorted(os.listdir(photos))[-1]).read_bytes())
    said = message(in_process, run, *RESUME)
    assert re.search(r"run: pictures in --images \(was .*\), lines of --texts \(was \d+, now \d+\); start", said)
    lines.write_text("a red coat\na blue hat\n")
    (photos / "b.png").unlink()
    first, *_, last = sorted(photos.glob("*.png"))
    before = first.read_bytes()
    first.write_bytes(last.read_bytes())  # another picture by the same name
    said = message(in_process, run, *RESUME)
    assert re.search(r"another run: pictures in --images \(was \d+, now \d+\); start", said)
    first.write_bytes(before)
    said = message(in_process, run, *RESUME, "--images", "")
    assert re.search(r"run: pictures in --images \(was \d+, now None\); start", said)
    in_process(run, *RESUME)


def test_pictures_and_lines_without_a_pair_are_found_again_from_elsewhere_and_where_they_moved(
    shop, tmp_path, monkeypatch
):
    photos, lines = shutil.copytree(shop / "images", tmp_path / "photos"), tmp_path / "lines.txt"
    lines.write_text("a red coat\na blue hat\n")
    stages = "--image-until 0.3 --text-until 0.6 --steps 4 --batch-size 4".split()
    more = ["--model", "vlmo", *flags_of("vlmo"), *stages, "--data", shop]
    monkeypatch.chdir(tmp_path)
    run = stop_in_step(0, tmp_path / "run", *more, "--images", "photos", "--texts", "lines.txt")
    monkeypatch.chdir(shop)
    one = in_process(shutil.copytree(run, tmp_path / "one"), *RESUME)
    photos.rename(tmp_path / "moved")
    assert_bitwise(in_process(run, *RESUME, "--images", tmp_path / "moved"), one)


def test_the_same_data_may_lie_in_another_folder(run, unbroken, shop, tmp_path):
    folder = shutil.copytree(shop, tmp_path / "shop", ignore=shutil.ignore_patterns(".cache"))
    assert_bitwise(in_process(run, *RESUME, "--data", folder), unbroken)


def test_bad_rows_and_bad_pictures_are_named_together_and_once(shop, tmp_path, capsys):
    folder = shutil.copytree(shop, tmp_path / "shop")
    rows = (folder / "train.jsonl").read_text().splitlines()
    lost = json.dumps({**json.loads(rows[0]), "image": "none.png"})
    (folder / "train.jsonl").write_text("\n".join([*rows, "nonsense", lost]))
    lines = [f"train.jsonl:{len(rows) + 1}: bad JSON", f"train.jsonl:{len(rows) + 2}: missing picture"]
    said = message(in_process, tmp_path / "one", *ONE_STEP, "--data", folder)
    assert all(said.count(line) == 1 for line in lines)
    in_process(tmp_path / "two", *ONE_STEP, "--data", folder, "--skip-bad")
    screen = capsys.readouterr()
    assert all((screen.out + screen.err).count(line) == 1 for line in lines)


# --- What is read back is checked: last.pt, config.json, log.jsonl ---


@pytest.fixture(scope="session")
def brief(shop, tmp_path_factory):
    """A run with one step left. Copy it before use."""
    more = [*TINY, "--steps", 3, "--batch-size", 4, "--log-every", 1, "--average", "--data", shop]
    return stop_in_step(1, tmp_path_factory.mktemp("runs") / "brief", *more)


@pytest.fixture(scope="session")
def ended(brief, tmp_path_factory):
    """What becomes of it undisturbed."""
    return in_process(copy_of(brief, tmp_path_factory.mktemp("runs")), *RESUME)


def resume(run):
    """
    Go on; the message of the refusal, or None. A refusal is one line and leaves the run's folder as it is; a run that
    diverges in a later step leaves last.pt.
    """
    before = files_of(run)
    try:
        in_process(run, *RESUME)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        after, last = files_of(run), run / "last.pt"
        assert after == before or (str(error).startswith("step ") and after[last] == before[last])
        return str(error)
    return None


def open_again(run):
    """Open the run as eval.py and predict.py do; the message of the refusal, or None."""
    try:
        weights.load_run(run / "last.pt")
    except UserError as error:
        assert "\n" not in str(error) and str(run / "last.pt") in str(error)
        return str(error)
    return None


JUNK = [
    None, True, 0, -1, 3, 0.5, 1e30, math.nan, math.inf, "x", "", b"x", [], {}, (1, 2), [7], [None], {3: 4}, {"x": []},
    torch.zeros(()), torch.zeros(2, 3), torch.full((2,), math.nan), torch.zeros(3, dtype=torch.int64),
    torch.zeros(1).expand(10**9), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"),
]


@st.composite
def damages(draw):
    """(the keys that lead to a place in a checkpoint, what is done there): chosen level by level."""
    steps = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
    return steps, draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"])), draw(st.sampled_from(JUNK))


def damage(contents, steps, what, junk):
    """Damage one place of a checkpoint's contents. Returns the names of the keys on the way."""
    at, names = contents, []
    for number, step in enumerate(steps):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[step % len(keys)]
        names.append(str(key))
        below = at[key]
        if number == len(steps) - 1 or not isinstance(below, (dict, list)) or not below:
            break
        at = below
    if what == "remove":
        del at[key]
    elif isinstance(at, list) or what == "replace":
        at[key] = junk
    elif what == "rename":
        at[f"{key}x"] = at.pop(key)
    else:
        at[f"{key}x"] = junk
    return names


@settings(deadline=None, max_examples=30, phases=[Phase.generate])
@given(damages())
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it_or_does_no_harm(brief, tmp_path_factory, damaged):
    run = copy_of(brief, tmp_path_factory.mktemp("damaged"))
    contents = weights.read(run / "last.pt")
    names = damage(contents, *copy.deepcopy(damaged))
    torch.save(contents, run / "last.pt")
    open_again(run)
    said = resume(run)
    if said and str(run / "last.pt") not in said:  # a setting that is possible, and impossible together with the others
        assert names[0] in ("run", "recipe") and names[-1].replace("_", " ") in re.sub("[-_]", " ", said), said
    if said is None:
        assert all(value.isfinite().all() for value in weights_of(run).values())
    shutil.rmtree(run.parent)


def test_a_checkpoint_with_an_absurd_learning_rate_diverges_and_stays_as_it_is(brief, tmp_path):
    run = copy_of(brief, tmp_path)
    contents = weights.read(run / "last.pt")
    contents["run"]["lr"] = 1e30
    torch.save(contents, run / "last.pt")
    said = resume(run)
    assert said.startswith("step 3: ") and str(run / "last.pt") in said


@settings(deadline=None, max_examples=25)
@example(0.9999, "flip", 0)  # makes it one disk of several
@given(st.floats(0, 0.9999), st.sampled_from(["flip", "cut", "insert", "zero"]), st.integers(0, 7))
def test_damaged_bytes_of_a_checkpoint_are_refused_or_make_no_difference(brief, ended, tmp_path_factory, at, what, bit):
    run = copy_of(brief, tmp_path_factory.mktemp("damaged"))
    content = bytearray((run / "last.pt").read_bytes())
    place = int(at * len(content))
    if what == "flip":
        content[place] ^= 1 << bit
    elif what == "cut":
        del content[place:]
    elif what == "insert":
        content.insert(place, 1 << bit)
    else:
        content[place : place + 500] = bytes(len(content[place : place + 500]))
    (run / "last.pt").write_bytes(content)
    said, opened = resume(run), open_again(run)
    assert said is None or opened is not None  # what cannot be resumed cannot be opened
    if said is None:
        assert_bitwise(run, ended)
    else:
        assert str(run / "last.pt") in said
    shutil.rmtree(run.parent)


def put(*keys, value):
    """A function that puts the value there."""

    def change(contents):
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = value

    return change


def make_a_moment_negative(contents):
    state = contents["optimizer"]["state"]
    state[max(state)]["exp_avg_sq"].fill_(-1)  # the last parameter is a vector, which AdamW trains


FIRST = "words.segment"  # some weight
NAMED = {
    "a weight is missing": lambda contents: contents["model"].pop(FIRST),
    "a weight has another shape": put("model", FIRST, value=torch.zeros(3)),
    "a weight has another name": lambda contents: contents["model"].update(x=contents["model"].pop(FIRST)),
    "a weight is no number": put("model", FIRST, value=torch.full((8,), math.nan)),
    "a weight is expanded": put("model", FIRST, value=torch.zeros(1).expand(8)),
    "run is None": put("run", value=None),
    "config is a tuple": put("config", value=()),
    "config has a number for a name": put("config", value={3: 4}),
    "step is a list": put("step", value=[1]),
    "step is below 0": put("step", value=-1),
    "step is beyond the end": put("step", value=10**9),
    "mask_unit is None": put("recipe", "mask_unit", value=None),
    "depths is huge": put("config", "depths", value=(200000, 2, 2, 2)),
    "mlp_ratios is huge": put("config", "mlp_ratios", value=(10**9, 8, 8, 8)),
    "dims is huge": put("config", "dims", value=(1, 1, 1, 100000)),
    "vocab_size is huge": put("config", "vocab_size", value=3 * 10**8),
    "vocabulary is numbers": lambda contents: contents.update(vocabulary=[7] * len(contents["vocabulary"])),
    "vocabulary is empty": put("vocabulary", value=[]),
    "run is bytes": put("run", value=b"x"),
    "run lacks a setting": lambda contents: contents["run"].pop("lr"),
    "run has an unknown setting": put("run", "colour", value="blue"),
    "run has a setting of another type": put("run", "batch_size", value="6"),
    "run has another model": put("run", "model", value="vlmo"),
    "the kind is unknown": put("kind", value="clip"),
    "the kind is another": put("kind", value="vlmo"),
    "labels are missing": put("labels", value={}),
    "labels are numbers": put("labels", "category", value=[1, 2, 3, 4]),
    "labels are others": put("labels", "category", value=["a", "b", "c", "d"]),
    "best is NaN": put("best", value=math.nan),
    "the unaveraged weights are missing": lambda contents: contents.pop("unaveraged"),
    "an unaveraged weight is missing": lambda contents: contents["unaveraged"].pop(FIRST),
    "an unaveraged weight has another shape": put("unaveraged", FIRST, value=torch.zeros(3)),
    "an unaveraged weight is no number": put("unaveraged", FIRST, value=torch.full((8,), math.nan)),
    "the optimizer is empty": put("optimizer", value={}),
    "a moment is missing": lambda contents: contents["optimizer"]["state"][0].pop("exp_avg"),
    "a moment has another shape": put("optimizer", "state", 0, "exp_avg", value=torch.zeros(7)),
    "a moment is below 0": make_a_moment_negative,
    "a count of steps is text": put("optimizer", "state", 0, "step", value="3"),
    "the optimizer has other parameters": lambda contents: contents["optimizer"]["param_groups"].pop(),
    "digests are text": put("data", value={"train split": "x", "val split": "y"}),
}


def test_an_absurd_size_takes_no_memory(brief, tmp_path):
    """Even where the words, which are compared first, are no hindrance."""
    contents = weights.read(brief / "last.pt")
    contents["vocabulary"], contents["config"]["vocab_size"] = [], 3 * 10**8
    torch.save(contents, tmp_path / "huge.pt")
    with limits():
        said = message(weights.load, tmp_path / "huge.pt")
    assert said.startswith(f"{tmp_path / 'huge.pt'}: 'word_head.bias' must be (300000000,)")


@pytest.mark.parametrize("what", NAMED)
def test_a_checkpoint_is_refused_by_its_name_if(brief, tmp_path, what):
    run = copy_of(brief, tmp_path)
    contents = weights.read(run / "last.pt")
    NAMED[what](contents)
    torch.save(contents, run / "last.pt")
    with limits():
        said = resume(run)
    assert str(run / "last.pt") in said and not said.startswith("step ")  # before anything is computed with it


@pytest.mark.parametrize("what", [[], 5, {}, {"model": {}}])
def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(brief, tmp_path, what):
    run = copy_of(brief, tmp_path)
    torch.save(what, run / "last.pt")
    assert str(run / "last.pt") in resume(run) and open_again(run)


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(brief, tmp_path):
    run = copy_of(brief, tmp_path)
    contents = weights.read(run / "last.pt")
    old = {name: contents[name] for name in ("config", "model", "vocabulary", "labels", "optimizer", "step", "best")}
    torch.save(old | {"run": {"model": "nano", "task": "pretrain"}}, run / "last.pt")
    said = f"{run / 'last.pt'}: written by an earlier version of this project"
    assert said in resume(run) and said in open_again(run)


@pytest.mark.parametrize("damaged", [put("run", value=5), put("step", value=b"x"), put("vocabulary", value=[7] * 80),
                                     put("model", FIRST, value=torch.full((8,), math.inf)), put("labels", value=[])])
def test_no_tool_opens_a_damaged_run(brief, tmp_path, damaged):
    run = copy_of(brief, tmp_path)
    contents = weights.read(run / "last.pt")
    damaged(contents)
    torch.save(contents, run / "last.pt")
    assert open_again(run)


LOG_LINES = st.sampled_from([
    b"[]", b"5", b"null", b"{}", b'{"step": [1]}', b'{"step": -1}', b'{"step": true}', b"[" * 100000, b"\xff\xfe",
    b'{"step": 1, "a": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"step": 99, "loss": 1}', b'{"step": 4, "lo',
    b'{"step": 1' + b"0" * 5000 + b"}", b"",
])


@laws
@given(st.lists(LOG_LINES, max_size=4), st.integers(0, 3))
def test_a_log_with_broken_lines_is_mended(brief, tmp_path_factory, broken, before):
    run = copy_of(brief, tmp_path_factory.mktemp("log"))
    lines = (run / "log.jsonl").read_bytes().splitlines()
    (run / "log.jsonl").write_bytes(b"\n".join(lines[:before] + broken + lines[before:]))
    log = train.Log(run, 2, train.Settings())
    log.write({"step": 3})
    kept = [line for line in lines_of(run) if line.get("loss") or line["step"] == 3]
    assert kept == [json.loads(line) for line in lines] + [{"step": 3}]
    assert all(0 <= line["step"] <= 3 for line in lines_of(run))
    shutil.rmtree(run.parent)


def test_a_run_with_a_broken_log_goes_on(brief, ended, tmp_path):
    run = copy_of(brief, tmp_path)
    with open(run / "log.jsonl", "ab") as file:
        file.write(b"[]\n5\n\xff\xfe\n" + b"[" * 100000)
    assert resume(run) is None
    assert_bitwise(run, ended)
    assert losses_of(run) == losses_of(ended)


BROKEN = [b"", b"5", b"[" * 100000, b"\xff", b'{"settings": 3}', b'{"settings": {"model": []}}']


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_config_json_is_named_and_the_models_name_helps(brief, ended, tmp_path, content):
    run = copy_of(brief, tmp_path)
    (run / "config.json").write_bytes(content)
    assert resume(run) == f"{run / 'config.json'}: damaged; name the model of the run with --model"
    in_process(run, *RESUME, "--model", "mvlt")
    assert_bitwise(run, ended)
    assert (run / "config.json").read_bytes() == (ended / "config.json").read_bytes()


# --- Flags ---


WRONG = ["--colour 3", "--resume", "--dims a", "--attend-padding maybe", "--lr", "--device tpu", "--bat 3"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_flag_that_means_nothing_is_a_usage_error(wrong):
    with pytest.raises(SystemExit) as left:
        train.parse(wrong.split())
    assert left.value.code == 2


IMPOSSIBLE = {
    "--mask-ratio 1.5": "mask_ratio must lie in [0, 1], got 1.5",
    "--mirror -1": "mirror must lie in [0, 1], got -1.0",
    "--lr nan": "--lr must be a finite number, got nan",
    "--lr 0": "--lr must be above 0, got 0.0",
    "--clip inf": "--clip must be a finite number, got inf",
    "--clip 0": "--clip must be above 0, got 0.0",
    "--batch-size 0": "batch_size must be a whole number, 1 or more, got 0",
    "--micro-batch -4": "micro_batch must be a whole number, 0 or more, got -4",
    "--shift -1": "shift must be a whole number, 0 or more, got -1",
    "--zoom 1": "zoom must lie in [0, 1), got 1.0",
    "--beta2 1": "beta2 must lie in [0, 1), got 1.0",
    "--itm-from 1": "itm_from must lie in [0, 1), got 1.0",
    "--mask-pictures 0": "mask_pictures must be above 0",
    "--mask-pictures 1 --objectives mir,itm": "mask_pictures must be below 1",
    "--decode both": "--decode must be one of auto, kept, live",
    "--workers -1": "workers must be a whole number",
    "--seed -1": "seed must be a whole number",
    "--seed 99999999999999999999": "--seed must be below 2^63",
    "--steps 0": "--steps must be above 0 (or give --epochs), got 0",
    "--epochs -1": "--epochs must be 0 or more, got -1.0",
    "--steps 5 --epochs 2": "--steps and --epochs exclude each other",
    "--save-every 0": "save_every must be a whole number",
    "--objectives mir,colour": "objectives must name some of mir,itm,mlm,itc,distil,cr, each once",
    "--objectives mir,mir": "objectives must name some of",
    "--objectives mir:-1": "objectives must give mir a weight of 0 or more",
    "--objectives mir:x": "objectives must give mir a weight of 0 or more",
    "--modality image": "modality must be both, unless cr is the only objective",
    "--mask-style dots": "mask_style must be one of",
    "--model resnet": "--model must be one of mvlt, kaleido, vlmo, got 'resnet'",
    "--preset huge": "--preset must be one of demo, paper",
    "--size huge": "--size must be one of pico, nano, tiny",
    "--fit crop": "--fit must be stretch or pad, got 'crop'",
    "--from a --init b": "--from and --init exclude each other",
    "--from a --vocab b": "--vocab must be left out with --from, whose run has its own, got 'b'",
    "--from a --size tiny": "--size must be left out with --from, whose run has its own, got 'tiny'",
    "--image-size 40": "image_size must be a multiple of 8 patch_size = 32, got 40",
    "--dims 1,2": "dims must be four positive whole numbers, got (1, 2)",
    "--dropout 2": "dropout must lie in [0, 1), got 2.0",
}


def refusal(*given):
    """The refusal of some flags before anything is read."""
    with pytest.raises(UserError) as refused:
        train.resolve(train.parse(list(given))[1])
    return refused.value


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_an_impossible_setting_is_refused_by_name(wrong):
    error = refusal(*wrong.split())
    assert str(error).startswith(IMPOSSIBLE[wrong]) and error.status == 2


def test_more_processes_than_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(runtime, "world", lambda: 9)
    assert str(refusal("--batch-size", "8")) == "--batch-size must be at least the number of processes, 9, got 8"


@pytest.mark.parametrize("flag, value, rule", [
    ("--mask-unit", "7", "mask unit must divide the picture's sides 32 and 32, got 7"),
    ("--images", "images", "--images: this run has no stage that reads pictures alone"),
    ("--texts", "train.jsonl", "--texts: this run has no stage that reads captions alone"),
])
def test_what_cannot_be_is_refused_before_the_first_step(shop, tmp_path, monkeypatch, flag, value, rule):
    monkeypatch.chdir(shop)
    with pytest.raises(UserError) as refused:
        in_process(tmp_path / "run", *TINY, *RUN, "--data", shop, flag, value)
    assert (str(refused.value), refused.value.status) == (rule, 2) and not list(tmp_path.rglob("log.jsonl"))


def test_what_the_data_cannot_give_is_refused(shop, tmp_path):
    folder = make_shop(tmp_path / "plain", products=10)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        write_rows(folder / f"{split}.jsonl", [row | {"category": "", "subcategory": ""} for row in rows])
    base = [*TINY, *RUN, "--data", folder]
    assert "recognition needs category and subcategory" in message(in_process, tmp_path / "run", *base)
    in_process(tmp_path / "plus", *base, "--objectives", "mir,itm,itc")  # needs no categories
    (folder / "val.jsonl").write_text((folder / "val.jsonl").read_text().splitlines(keepends=True)[0] * 2)
    said = message(in_process, tmp_path / "run", *base, "--objectives", "mir,itm,itc")
    assert re.match("val: row 0 can have no negative.*leave itm out of --objectives", said)


def test_the_script_ends_with_the_status_and_one_line_that_fit(tmp_path):
    """The same from outside: 2 for a wrong flag, 1 for the rest, the reason in one line, no traceback."""
    for wrong, status, said in [
        (["--mask-ratio", "2"], 2, "train.py: mask_ratio must lie in [0, 1], got 2.0"),
        (["--data", "nowhere"], 1, f"train.py: {tmp_path / 'nowhere'}: no such folder"),
    ]:
        command = [sys.executable, HERE / "train.py", "--device", "cpu", *wrong, "--out", tmp_path / "run"]
        done = subprocess.run(command, env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stderr.splitlines()[-1].startswith(said), done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


GIVEN = st.fixed_dictionaries({"model": st.sampled_from(list(weights.FILES))}, optional={
    "preset": st.sampled_from(["demo", "paper", "recognise"]), "lr": st.floats(1e-3, 1), "seed": SEEDS,
    "batch_size": st.integers(1, 99), "steps": st.integers(1, 99), "mirror": st.floats(0, 1), "warmup": st.floats(0, 1),
})  # fmt: skip


@laws
@given(GIVEN)
def test_a_flag_beats_the_preset_and_the_preset_beats_the_default(given_flags):
    s, _, recipe = train.resolve({"settings": given_flags, "config": {}, "recipe": {"mask_words": 0.3}})
    file = weights.FILES[given_flags["model"]]
    preset = file.RECIPES[given_flags.get("preset", "demo")]
    for name, value in asdict(s).items():
        expected = given_flags.get(name, preset.get(name, getattr(train.Settings(), name)))
        if name == "epochs" and "steps" in given_flags:
            expected = 0.0  # a number of steps beats the preset's epochs
        assert value == expected, name
    for name, value in asdict(file.Recipe(**recipe)).items():
        default = getattr(file.Recipe(), name)
        assert value == (0.3 if name == "mask_words" else preset.get(name, default)), name


def test_the_papers_preset_is_section_4_1_whatever_the_demo_does():
    given_flags = {"settings": {"model": "mvlt", "preset": "paper"}, "config": {}, "recipe": {}}
    s, config, recipe = train.resolve(given_flags)
    r = mvlt.Recipe(**recipe)
    assert r.weights == {"mir": 10, "itm": 1, "mlm": 1} and mvlt.Config.preset(s.size, **config) == mvlt.Config()
    assert (s.lr, s.weight_decay, s.batch_size, s.epochs) == (2.5e-3, 1e-4, 1200, 150)
    assert (r.mask_ratio, r.mask_words, r.mask_unit, r.mask_style) == (0.5, 0.15, 16, "random")
    assert (r.hard_from, r.itm_from, r.unmasked_itm, r.drop_caption) == (1, 0, False, 0)
    assert (s.mirror, s.shift, s.zoom, s.fit, s.optimizer) == (0, 0, 0, "stretch", "adamw")


@pytest.mark.parametrize("name", list(weights.FILES))
def test_every_preset_of_every_model_is_possible(name):
    for preset in weights.FILES[name].RECIPES:
        settings_of, config, recipe = train.resolve(train.parse(["--model", name, "--preset", preset])[1])
        weights.FILES[name].Recipe(**recipe)


@pytest.mark.parametrize("name", list(weights.FILES))
def test_every_field_is_a_flag_of_its_name_beside_its_sentence(name, capsys):
    with pytest.raises(SystemExit) as left:
        train.parse(["--model", name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    file = weights.FILES[name]
    shape = [field for field in fields(file.Config) if field.name not in train.FROM_THE_DATA]
    for field in (*fields(train.Settings), *shape, *fields(file.Recipe)):
        assert f"{train.flag(field.name)} " in text and field.metadata["help"] in text, field.name
    for flag in ("--from", "--out", "--resume", "--device", "--skip-bad"):
        assert f"{flag} " in text


def test_flags_become_values_of_their_types():
    args, given_flags = train.parse("--no-bf16 --from x --sr-ratios 8,4,2,1 --attend-padding --mask-ratio 0.2".split())
    assert given_flags == {
        "settings": {"model": "mvlt", "bf16": False, "start": "x"},
        "config": {"sr_ratios": (8, 4, 2, 1), "attend_padding": True},
        "recipe": {"mask_ratio": 0.2},
    }


# --- Teachers ---


@pytest.fixture(scope="module")
def taught(unbroken, plain, shop, tmp_path_factory):
    """A run with two teachers."""
    out = tmp_path_factory.mktemp("runs") / "taught"
    return in_process(out, *TINY, *RUN, "--data", shop, "--teachers", f"{unbroken},{plain}")


def test_teachers_find_the_mean_of_the_similarities_of_their_towers(unbroken, plain, shop):
    splits, wanted, rows = [], 0, torch.tensor([5, 0, 9, 3])
    for path in (unbroken, plain):
        model, tokenizer, _ = weights.load_run(path)
        splits.append(data.open_split(shop, "train", tokenizer, model.labels, 32, 16))
        with torch.no_grad(), runtime.precision_of(model):
            images, texts = model.embed(splits[-1].images(rows), splits[-1].tokens[rows]).float()
        wanted = wanted + model.log_scale.exp() * images @ texts.T / 2
    teachers = Teachers([unbroken, plain], shop, splits[0])
    torch.testing.assert_close(teachers(rows).float(), wanted.detach(), atol=0.1, rtol=0.02)  # bf16
    assert Teachers([plain, unbroken], shop, splits[0]).digest != teachers.digest


def test_a_teacher_reads_pictures_in_the_shape_that_it_was_trained_on(shop, tmp_path, monkeypatch):
    out = in_process(tmp_path / "pad", *ONE_STEP, "--data", shop, "--fit", "pad", "--objectives", "itc")
    model, tokenizer, _ = weights.load_run(out)
    split, asked, usual = data.open_split(shop, "train", tokenizer, model.labels, 32, 16), [], data.open_split
    monkeypatch.setattr(data, "open_split", lambda *given: asked.append(given[4:7]) or usual(*given))
    Teachers([out], shop, split)
    assert asked == [(32, 16, "pad")]


def test_a_run_learns_from_its_teachers_and_a_stopped_one_goes_on_bit_by_bit(taught, unbroken, plain, shop, tmp_path):
    assert any(not torch.equal(value, weights_of(unbroken)[name]) for name, value in weights_of(taught).items())
    run = tmp_path / "stopped"
    stop_in_step(4, run, *TINY, *RUN, "--data", shop, "--teachers", f"{unbroken},{plain}")
    assert_bitwise(in_process(run, *RESUME), taught)


def test_two_processes_learn_from_teachers_what_one_learns(plain, shop, tmp_path):
    base = [*TINY, *RUN, *EXACT, "--data", shop, "--teachers", plain]
    assert_close(processes(2, tmp_path / "two", *base), in_process(tmp_path / "one", *base))


def test_teachers_that_cannot_teach_are_refused(unbroken, shop, tmp_path):
    base, other = [*TINY, *RUN, "--data", shop], make_shop(tmp_path / "other", products=30)
    blind = in_process(tmp_path / "blind", *base, "--objectives", "mlm", "--hard-from", 1)
    with pytest.raises(UserError, match=f"--teachers: {blind} was not trained for itc, so it has no towers"):
        in_process(tmp_path / "run", *base, "--teachers", blind)
    small = ["--data", shop, "--batch-size", 4]
    early = stop_in_step(0, tmp_path / "early", "--model", "vlmo", *flags_of("vlmo"), *small)  # in its first stage
    with pytest.raises(UserError, match=f"--teachers: {early} was not trained for itc, so it has no towers"):
        in_process(tmp_path / "run", *base, "--teachers", early)
    with pytest.raises(UserError, match="--teachers: the towers imitate, and the model kaleido has none"):
        in_process(tmp_path / "run", "--model", "kaleido", *flags_of("kaleido"), *small, "--teachers", unbroken)
    with pytest.raises(UserError, match="nowhere: no run here"):
        in_process(tmp_path / "run", *base, "--teachers", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--teachers: .* itc must be among the --objectives"):
        in_process(tmp_path / "run", *base, "--objectives", "mlm", "--hard-from", 1, "--teachers", unbroken)
    in_process(tmp_path / "elsewhere", *base, "--data", other, "--teachers", unbroken)  # another shop's run may teach


def test_a_run_knows_what_it_and_the_run_before_it_have_learnt(shop, tmp_path):
    base = [*TINY, *RUN, "--data", shop, "--objectives", "itm,itc,mlm,cr"]
    towers = in_process(tmp_path / "towers", *TINY, *RUN, "--data", shop, "--objectives", "itc,cr", "--hard-from", 1)
    whole = in_process(tmp_path / "whole", *base, "--itm-from", 0.5)
    early = stop_in_step(0, tmp_path / "early", *base, "--itm-from", 0.5)
    later = stop_in_step(0, tmp_path / "later", *base, "--itm-from", 0.5, "--from", towers)
    learnt = [weights.learnt(weights.load_run(path)[0]) for path in (towers, whole, early, later)]
    assert learnt == [{"itc", "cr"}, {"itm", "itc", "mlm", "cr"}, {"itc"}, {"itc", "cr"}]
    in_process(later, *RESUME)
    assert weights.learnt(weights.load(later / "last.pt")) == {"itm", "itc", "mlm", "cr"}
    other = shutil.copytree(shop, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    for file in other.glob("*.jsonl"):  # other classes: the recognition heads begin anew
        file.write_text(file.read_text().replace('"subcategory": "', '"subcategory": "new '))
    anew = stop_in_step(0, tmp_path / "anew", *base, "--itm-from", 0.5, "--from", towers, "--data", other)
    assert weights.learnt(weights.load(anew / "last.pt")) == {"itc"}


def test_a_stage_that_has_nothing_to_measure_yet_ends_without_an_evaluation(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TOY", str(shop))  # as if the toy shop had been drawn there
    monkeypatch.setattr(train.toy, "make", lambda folder: None)
    asked = []
    monkeypatch.setattr(train.evaluation, "main", lambda arguments: asked.append(arguments[0]))
    stage = ["--model", "vlmo", *flags_of("vlmo"), "--steps", 1, "--batch-size", 4, "--workers", 0]
    in_process("image", *stage, "--preset", "image")
    in_process("text", *stage, "--preset", "text", "--from", "image")
    in_process("demo", *ONE_STEP, "--from", in_process("first", *ONE_STEP))
    assert asked == ["first", "demo"]


def test_a_stopped_run_goes_on_with_the_same_teachers_only(unbroken, plain, shop, tmp_path, monkeypatch):
    teacher = shutil.copytree(unbroken, tmp_path / "teacher")
    named = os.path.relpath(teacher)
    run = stop_in_step(0, tmp_path / "run", *TINY, *RUN, "--data", shop, "--teachers", named)
    for other, now in ((plain, r"\d+"), ("", "None")):
        rule = rf".* is another run: weights of the teachers \(was \d+, now {now}\); start"
        assert re.match(rule, message(in_process, run, *RESUME, "--teachers", other))
    monkeypatch.chdir(tmp_path)  # another folder than the run was begun in
    in_process(shutil.copytree(run, tmp_path / "copy"), *RESUME)
    moved = teacher.rename(tmp_path / "moved")
    in_process(run, *RESUME, "--teachers", moved)


# --- Settings do what they say ---

OF_THE_RECIPE = """--objectives mir:1,itm:3,mlm,itc,distil,cr | --objectives mir,itm,mlm,itc,distil,cr
    | --objectives mir,itm:3,mlm:2,itc,distil,cr | --objectives mir,itm:3,mlm,itc:2,distil,cr
    | --objectives mir,itm:3,mlm,itc,distil:1,cr | --objectives mir,itm:3,mlm,itc,distil,cr:2
    | --objectives mir,itm:3,mlm,itc,distil | --smoothing 0.5
    | --mask-ratio 0.2 | --mask-unit 16 | --mask-style grid | --mask-pictures 0.9 | --mask-words 0.9 | --no-unmasked-itm
    | --itm-from 0 | --hard-from 0.9 | --drop-caption 0.9 | --mirror 0 | --shift 0 | --zoom 0 | --lr 1e-3
    | --final-lr 4e-4 | --warmup 1 | --weight-decay 1 | --beta2 0.9 | --clip 0.01 | --seed 1 | --batch-size 13
    | --dropout 0.5 | --drop-path 0.5 | --steps 5 | --vocab-size 90 | --fit pad | --attend-padding"""
OF_THE_MACHINE = "--log-every 3 | --save-every 2 | --workers 1 | --decode live"
SHORT = "--steps 4 --batch-size 12 --hard-from 0.5 --log-every 1 --save-every 100 --mask-pictures 0.5".split()


def each(flags):
    return [flag.split() for flag in flags.split("|")]


@pytest.fixture(scope="module")
def oblong(shop, tmp_path_factory):
    """The shop with pictures that are not square, so that --fit makes a difference."""
    folder = shutil.copytree(shop, tmp_path_factory.mktemp("data") / "oblong", ignore=shutil.ignore_patterns(".cache"))
    for path in (folder / "images").iterdir():
        with Image.open(path) as picture:
            wide = picture.resize((40, 32))
        wide.save(path)
    return folder


@pytest.fixture(scope="module")
def short(oblong, tmp_path_factory):
    return in_process(tmp_path_factory.mktemp("runs") / "short", *TINY, *RUN, *SHORT, "--data", oblong)


def changes_what_is_learnt(short, oblong, out, flag):
    before, after = weights_of(short), weights_of(in_process(out, *TINY, *RUN, *SHORT, *flag, "--data", oblong))
    return any(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("flag", each(OF_THE_RECIPE), ids="".join)
def test_every_setting_of_the_recipe_changes_what_is_learnt(short, oblong, tmp_path, flag):
    assert changes_what_is_learnt(short, oblong, tmp_path / "run", flag)


def test_a_run_without_bf16_trains_and_validates_in_fp32(oblong, tmp_path, monkeypatch):
    wanted = []

    def autocast(device, enabled=True):
        wanted.append(enabled)
        return torch.autocast(device.type, enabled=False)

    monkeypatch.setattr(runtime, "autocast", autocast)
    in_process(tmp_path / "run", *TINY, *RUN, *SHORT, "--no-bf16", "--data", oblong)
    assert len(wanted) > 3 and not any(wanted)


@pytest.mark.skipif(not runtime.has_fast_bf16(torch.device("cpu")), reason="this CPU gains nothing from bf16")
def test_bf16_changes_what_is_learnt(short, oblong, tmp_path):
    assert changes_what_is_learnt(short, oblong, tmp_path / "run", ["--no-bf16"])


@pytest.mark.parametrize("flag", each(OF_THE_MACHINE), ids="".join)
def test_no_setting_of_the_machine_does(short, oblong, tmp_path, flag):
    assert not changes_what_is_learnt(short, oblong, tmp_path / "run", flag)


@laws
@given(steps=st.integers(1, 300), lr=st.floats(1e-4, 1), final=st.floats(0, 1e-4), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_to_lr_and_falls_to_final_lr(steps, lr, final, warmup):
    s = train.Settings(steps=steps, lr=lr, final_lr=final, warmup=warmup)
    rates = [train.learning_rate(step, s) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in rates)
    assert all(a < b for a, b in zip(rates[:warm], rates[1:warm]))
    assert warm == 0 or rates[warm - 1] == pytest.approx(lr)
    assert all(a >= b for a, b in zip(rates[warm:], rates[warm + 1 :]))
    assert warmup * steps > steps - 1 or train.learning_rate(steps, s) == pytest.approx(final)


# --- Starting from other weights, fine-tuning, learning ---


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_recognition_is_fine_tuned_from_a_run_by_every_modality(unbroken, shop, tmp_path, modality):
    start = weights.load(unbroken / "best.pt")
    more = ["--preset", "recognise", "--from", unbroken, "--modality", modality, "--steps", 2, "--batch-size", 8]
    more += ["--warmup", 0, "--log-every", 1, "--device", "cpu", "--data", shop]
    out = in_process(tmp_path / modality, *more)
    model, before = weights.load(out / "last.pt"), start.state_dict()
    assert model.config == start.config and model.vocabulary == start.vocabulary
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    unused = ("decoder", "match_head", "word_head", "image_tower", "text_tower", "log_scale")
    assert not [name for name in changed if name.startswith(unused)]  # not even decayed
    for head in ("category_head", "subcategory_head"):
        assert any(name.startswith(head) for name in changed)
    assert any("embed_image" in name for name in changed) == (modality != "text")
    clock = {"step", "epoch", "lr", "grad_norm", "images_per_s", "memory_gb"}
    assert lines_of(out)[0].keys() == clock | {"loss", "cr"}
    assert 0 <= lines_of(out)[-1]["val"]["cr_accuracy"] <= 1


def test_a_run_that_starts_from_another_reads_its_data_in_its_shape_and_its_model(unbroken, shop, tmp_path):
    old = in_process(tmp_path / "old", *ONE_STEP, "--data", shop, "--fit", "pad")
    few = ["--device", "cpu", "--from", old, "--steps", 1, "--batch-size", 4, "--mask-unit", 8]
    run = json.loads((in_process(tmp_path / "new", *few) / "config.json").read_text())["settings"]
    assert (run["data"], run["fit"]) == (str(shop), "pad")
    run = json.loads((in_process(tmp_path / "other", *few, "--fit", "stretch") / "config.json").read_text())["settings"]
    assert (run["data"], run["fit"]) == (str(shop), "stretch")
    tuned = in_process(tmp_path / "tuned", *few[:-2], "--preset", "recognise")
    assert json.loads((tuned / "config.json").read_text())["settings"]["size"] == "pico"  # the old run's
    with pytest.raises(UserError, match="nowhere: no run here"):
        in_process(tmp_path / "none", "--device", "cpu", "--from", tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()
    config = json.loads((old / "config.json").read_text())
    config["settings"]["model"] = "kaleido"
    (old / "config.json").write_text(json.dumps(config))
    args = ["--from", str(old), "--out", str(tmp_path / "first"), "--resume"]  # a job that may be started again
    assert train.parse(args)[1]["settings"]["model"] == "kaleido"


def test_a_run_of_another_model_or_shape_is_refused_by_name(unbroken, shop, tmp_path):
    base = ["--device", "cpu", "--from", unbroken, "--data", shop]
    rule = r"words.position: the weights to start from must have the shape \(14, 8\), got \(16, 8\)"
    assert re.fullmatch(rule, message(in_process, tmp_path / "run", *base, *RUN, "--text-len", 14))
    said = message(in_process, tmp_path / "run", *base, "--model", "vlmo")
    assert said == f"--from {unbroken}: holds the model mvlt, not vlmo"


def test_the_seed_decides_fresh_weights_and_heads_move_with_their_classes_only(tmp_path):
    def make(seed, start="", category=("a", "b")):
        labels = {"category": list(category), "subcategory": ["c"]}
        s = train.Settings(size="pico", seed=seed, start=start)
        return train.make_model(s, {}, {}, Tokenizer([*SPECIAL, "coat"]), labels)[0]

    old, again, other = make(5), make(5), make(6)
    assert torch.equal(old.words.word.weight, again.words.word.weight)
    assert not torch.equal(old.words.word.weight, other.words.word.weight)
    weights.save(tmp_path / "last.pt", old, step=1, run=asdict(train.Settings(size="pico")))
    for category in (("a", "b"), ("b", "x")):
        new = make(0, str(tmp_path), category)
        assert torch.equal(new.words.word.weight, old.words.word.weight)
        moved = torch.equal(new.category_head.classify.weight, old.category_head.classify.weight)
        assert moved == (category == ("a", "b"))


def theirs_of(model, parts):
    """Random weights under the authors' names."""
    found = {}
    for ours, theirs in foreign.their_names(model, parts).items():
        shape = model.get_parameter(ours).shape
        if "pos_embed" in theirs and "text" not in theirs:
            shape = (1, shape[0] + ("4" in theirs), shape[1])  # stage 4 has a class slot
        found[theirs] = torch.randn(shape)
    return found


def test_a_run_starts_from_pvts_weights(unbroken, shop, tmp_path):
    found = theirs_of(weights.load(unbroken / "last.pt"), foreign.VISUAL_PARTS)
    still = [*ONE_STEP, "--lr", 1e-30, "--final-lr", 0, "--init", tmp_path / "pvt.pth", "--data", shop]
    torch.save(found, tmp_path / "pvt.pth")
    out = in_process(tmp_path / "run", *still)
    model = weights.load(out / "last.pt")
    assert torch.allclose(model.stages[2].blocks[0].mlp.fc1.weight, found["block3.0.mlp.fc1.weight"])
    assert torch.allclose(model.stages[3].position_image, found["pos_embed4"][0, 1:])
    os.remove(tmp_path / "pvt.pth")
    in_process(out, *RESUME)  # which needs the weights no more
    torch.save({name: value for name, value in found.items() if name != "pos_embed2"}, tmp_path / "pvt.pth")
    assert "'pos_embed2'" in message(in_process, tmp_path / "other", *still)


def test_a_run_starts_from_the_authors_weights(unbroken, shop, tmp_path):
    found = theirs_of(weights.load(unbroken / "last.pt"), foreign.VISUAL_PARTS | foreign.TEXT_PARTS)
    found["text_embeddings.token_type_embeddings.weight"] = torch.randn(2, 8)
    torch.save({"model": found}, tmp_path / "official.pth")
    more = ["--init", tmp_path / "official.pth", "--vocab", unbroken / "vocab.txt", "--data", shop]
    model = weights.load(in_process(tmp_path / "run", *ONE_STEP, "--lr", 1e-30, "--final-lr", 0, *more) / "last.pt")
    assert model.config.attend_padding
    assert torch.allclose(model.words.word.weight, found["text_embeddings.word_embeddings.weight"])
    assert torch.allclose(model.match_head.classify.weight, found["itm_head.linear.weight"])
    assert torch.allclose(model.stages[0].position_text, found["text_pos_embed1"].view(16, 4))
    said = message(in_process, tmp_path / "other", *ONE_STEP, *more, "--image-size", 33)
    assert said == "image_size must be a multiple of 8 patch_size = 32, got 33"


def test_four_pairs_are_learnt_by_heart(tmp_path):
    """All three losses fall far, and every one of the 4 x 4 pairings is judged rightly."""
    garments = ("red coat", "green dress", "blue jeans", "black boots")
    (tmp_path / "images").mkdir()
    rows = []
    for number, caption in enumerate(garments):
        picture = Image.new("RGB", (32, 32), "grey")
        picture.paste(caption.split()[0], (4 + number, 4, 28, 28))
        picture.save(tmp_path / "images" / f"{number}.png")
        rows.append(dict(image=f"images/{number}.png", caption=caption, product_id=str(number)))
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "val.jsonl", [row | {"product_id": f"again {row['product_id']}"} for row in rows])
    still = [*EXACT, "--objectives", "itm,mlm,mir", "--itm-from", 0, "--save-every", 1000, "--log-every", 5]
    larger = ["--dims", "8,16,32,64", "--heads", "1,2,4,8", "--token-dim", 64, "--text-len", 8]
    larger += ["--mlp-ratios", "2,2,2,2"]
    longer = ["--steps", 300, "--batch-size", 64, "--lr", 1e-2, "--final-lr", 1e-4]
    run = in_process(tmp_path / "run", *TINY, *still, *larger, *longer, "--data", tmp_path)

    last = [line for line in lines_of(run) if "val" not in line][-5:]
    mean = {name: sum(line[name] for line in last) / len(last) for name in ("mir", "itm", "mlm")}
    assert mean["mir"] < 0.03 and mean["itm"] < 0.1 and mean["mlm"] < 0.8, mean  # from 0.1, ln 2 and 4
    model, tokenizer, _ = weights.load_run(run)
    split = data.open_split(tmp_path, "train", tokenizer, model.labels, 32, 8)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    scores = evaluation.pair_scores(model, split, pairs).view(4, 4)
    assert torch.equal(scores > 0, torch.eye(4, dtype=torch.bool))
