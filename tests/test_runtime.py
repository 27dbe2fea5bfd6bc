"""Laws of extras/runtime.py: errors in one line, processes that meet, files that are written whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import runtime

ROOT = Path(runtime.__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@given(value=st.one_of(st.text(), st.binary(), st.integers(), st.lists(st.text())))
def test_a_quoted_value_is_short_and_short_values_stand_as_they_are(value):
    text = runtime.quoted(value)
    assert len(text) <= 80
    assert text == repr(value) if len(repr(value)) <= 80 else text.endswith("...")


def script(body, processes=1, after=""):
    """Run `body` as the main function of a script, under torchrun when there are several processes, then `after`."""
    head = "import sys\nfrom extras import runtime\ndef main():"
    code = f"{head}\n    {body}\nsys.argv[0] = 'tool.py'\nruntime.run(main)\n{after}\n"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"script-{os.getpid()}-{processes}.py"
    file.write_text(code)
    try:
        return subprocess.run([*launcher, str(file)], env=ENV, capture_output=True, text=True, timeout=120)
    finally:
        file.unlink()


@pytest.mark.parametrize(
    "error, status, line",
    [
        (runtime.UserError("a.png: not a picture"), 1, "tool.py: a.png: not a picture"),
        (runtime.UserError("--lr must be above 0", status=2), 2, "tool.py: --lr must be above 0"),
        (FileNotFoundError(2, "No such file", "x"), 1, "tool.py: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 1, "tool.py: interrupted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "tool.py: the memory is full; "
         "train.py --micro-batch N or --recompute, or eval.py --batch-size N, may help"),
        (RuntimeError("DataLoader worker (pid 3) died"), 1, "tool.py: DataLoader worker (pid 3) died"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_a_status(error, status, line, capfd, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/tool.py"])
    monkeypatch.setattr(sys, "stdout", open(os.dup(1), "w"))
    monkeypatch.setattr(sys, "stderr", open(os.dup(2), "w"))
    with pytest.raises(SystemExit) as left:
        runtime.run(main)
    sys.stderr.flush()
    assert left.value.code == status and capfd.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize("error", ["RuntimeError('a mistake')", "ValueError('a mistake')"])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    done = script(f"raise {error}")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a mistake" in done.stderr.splitlines()[-1]


def test_under_torchrun_each_process_says_its_own_line():
    done = script("runtime.join_processes('cpu'); raise runtime.UserError('no')", processes=2)
    said = {line for line in done.stderr.splitlines() if line.startswith("tool.py")}
    assert done.returncode != 0 and said and said <= {f"tool.py, process {index}: no" for index in (0, 1)}


def test_processes_that_have_met_do_not_meet_again_and_their_sums_are_the_same():
    body = (
        "runtime.join_processes('cpu'); runtime.join_processes('cpu'); import torch; "
        "total = runtime.sum_over_processes(torch.tensor([1.0 + runtime.process_index()])); "
        "order = runtime.first_then_others(runtime.process_index); "
        "print(f'{runtime.world()} {total.item()} {order == runtime.process_index()} ')"
    )
    done = script(body, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "3.0", "True"] * 2


def test_no_thread_of_the_process_group_is_left_when_a_script_ends():
    body = (
        "runtime.join_processes('cpu'); import torch; runtime.sum_over_processes(torch.ones(3)); "
        "torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])"  # loads parts of PyTorch that could hold the group
    )
    after = "import pathlib; print(*[f.read_text() for f in pathlib.Path('/proc/self/task').glob('*/comm')])"
    done = script(body, processes=2, after=after)
    assert done.returncode == 0 and "gloo" not in done.stdout, (done.stdout, done.stderr)


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(runtime.UserError, match="--device: cuda needs a GPU for each process"):
        runtime.join_processes("cuda" if not torch.cuda.is_available() else "cuda-but-not-here")


@settings(max_examples=20)
@given(old=st.binary(max_size=20), new=st.binary(max_size=20), fails=st.booleans())
def test_a_file_is_written_whole_or_not_at_all(tmp_path_factory, old, new, fails):
    path = tmp_path_factory.mktemp("files") / "file"
    path.write_bytes(old)
    try:
        with runtime.whole_file(path) as file:
            file.write(new)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert path.read_bytes() == (old if fails else new) and os.listdir(path.parent) == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(runtime.UserError, match=r"/absent/file: cannot be written \(No such file or directory\)"):
        with runtime.whole_file(tmp_path / "absent" / "file"):
            pass


def test_reading_with_a_model_leaves_its_mode_as_it_was():
    model = torch.nn.Dropout()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    for training in (True, False):
        model.train(training)
        with runtime.evaluating(model) as device:
            assert not model.training and not torch.is_grad_enabled() and device.type == "cpu"
        assert model.training == training and torch.is_grad_enabled()


def test_bf16_is_off_where_it_is_not_wanted_and_a_peak_of_memory_is_counted_in_gb():
    with runtime.autocast(torch.device("cpu"), enabled=False):
        assert not torch.is_autocast_enabled("cpu")
    before = runtime.memory_gb(torch.device("cpu"))
    held = torch.ones(60_000_000)  # 0.24 GB
    assert 0.05 < before < 100 and runtime.memory_gb(torch.device("cpu")) - before < 0.5 and len(held)


@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(1, 9), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=60)
def test_linear_is_pytorchs_linear_with_its_gradients(shape, wide, classes, data):
    """Whatever the number of rows, 0 and odd ones included, the layout of the input, the bias and the precision."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(*shape, wide, dtype=dtype)
    if x.ndim > 2 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    weight = torch.randn(classes, wide, dtype=dtype)
    bias = torch.randn(classes, dtype=dtype) if data.draw(st.booleans()) else None
    results = []
    for function in (runtime.linear, torch.nn.functional.linear):
        inputs = [one.clone().requires_grad_() for one in (x, weight, bias) if one is not None]
        y = function(*inputs)
        results.append([y, *torch.autograd.grad((y * y).sum(), inputs)])
    for found, wanted in zip(*results):
        assert found.shape == wanted.shape and found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


FREED = """import numpy as np
from extras import runtime
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024  # MiB
{keep}
before = resident()
for size in (20, 60):
    block = np.ones(size << 20, np.uint8)
    block = None
    print(round(resident() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize("largest, kept", [(None, [0, 0]), (40, [20, 20]), (100, [20, 60])])
def test_freed_memory_is_kept_up_to_the_largest_size_that_is_asked_for(largest, kept):
    """Blocks of 20 and of 60 MiB, one after the other: what is still resident after each was freed."""
    keep = f"runtime.keep_freed_memory({largest} << 20)" if largest else ""
    code = FREED.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert [int(line) for line in done.stdout.split()] == pytest.approx(kept, abs=2), done.stderr


def test_a_script_reads_input_that_is_not_utf_8():
    """One such query must not end a search that answers line by line."""
    script = "import sys; from extras import runtime; runtime.run(lambda: print(ascii(sys.stdin.read())))"
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(Path(runtime.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], input=b"caf\xe9\n", capture_output=True, env=strict)
    assert (done.returncode, done.stdout.decode().strip()) == (0, r"'caf\ufffd\n'")
