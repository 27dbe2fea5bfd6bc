"""
Errors, processes, devices and files: what every script needs and no paper mentions.

A script ends with `runtime.run(main)`: whatever a user can put right becomes one line on the screen and an exit status.
Under torchrun a script calls `join_processes` once; `process_index` and `world` then say who this process is and how
many there are.
"""

import argparse
import contextlib
import ctypes
import math
import os
import resource
import sys
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401 - before there is a process group: see `run`
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# --- Errors ---


class UserError(ValueError):
    """Something that the user can put right, said in one line. Exit status 2 means that a flag was wrong."""

    def __init__(self, text, status=1):
        super().__init__(text)
        self.status = status


def quoted(value, longest=80):
    """The value as an error message may quote it: `repr`, cut to `longest` characters."""
    if isinstance(value, (str, bytes)):
        value = value[: longest + 1]  # the repr of a huge value would itself be huge
    text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


@contextlib.contextmanager
def usage_errors():
    """A ValueError in here was caused by a flag: exit status 2."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(error, status=2) from None


def run(main):
    """
    Call main() as a script. An error with an outside cause ends it with one line, a bug with its traceback.

    The process group has threads, which must end before Python does, or they abort it now and then. They end with the
    last reference to the group. The functions of torch.distributed.nn would hold one, as default arguments, if PyTorch
    (its optimizers load that module) imported them while there is a group: so this file imports them first.
    """
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError) as error:
        leave(script, error, getattr(error, "status", 1))
    except KeyboardInterrupt:
        leave(script, "interrupted", 1)
    except RuntimeError as error:
        cause = outside_cause(error)
        if not cause:
            raise
        leave(script, cause, 1)


def leave(script, error, status):
    """Print the one line and end this process with `status`. Under torchrun the line also names the process."""
    who = f"{script}, process {process_index()}" if world() > 1 else script
    tqdm.write(f"{who}: {error}\n", file=sys.stderr, end="")  # one write: processes share the terminal
    sys.exit(status)


def outside_cause(error):
    """Translate a RuntimeError with an outside cause (memory, dead peer or loader) into one line; "" if it is a bug."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "the memory is full; train.py --micro-batch N or --recompute, or eval.py --batch-size N, may help"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "another process of this run has ended, so this one ends too; the other's own message says why"
    return str(error) if "DataLoader worker" in str(error) else ""


# --- Flags ---


def at_least(least):
    """An argparse type: a whole number, `least` or more."""

    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {quoted(text)}")
        return value

    return number


def add_device_flag(parser):
    """--device, with the default that fits this machine."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    help = "Where to compute (default here: %(default)s)."
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=help)


# --- Processes ---


def process_index():
    """The number of this process, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device):
    """Under torchrun, meet the other processes. Returns this process's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"--device: cuda needs a GPU for each process, this machine has {found}")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # long: the others wait while the first decodes
    return torch.device(device)


def barrier():
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def first_then_others(work):
    """The first process calls work(), the others call it afterwards, when its files are on the disk."""
    result = work() if process_index() == 0 else None
    barrier()
    return work() if process_index() > 0 else result


def from_first(work):
    """The first process calls work(), every process gets what it returns. A refusal ends all of them."""
    outcome = [None, None]
    if process_index() == 0:
        try:
            outcome = [work(), None]
        except UserError as error:
            outcome = [None, error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, refusal = outcome
    if refusal:
        raise refusal
    return result


def sum_over_processes(tensor):
    """The sum of every process's tensor, the same in all of them."""
    if world() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


# --- Devices and memory ---


def has_fast_bf16(device):
    """Whether the device gains from bf16: a GPU that has it, or a CPU with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(device, enabled=True):
    """bf16 where the device gains from it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and has_fast_bf16(device))


def precision_of(model):
    """The autocast for a model's forward passes: none if its run was trained with --no-bf16."""
    return autocast(next(model.parameters()).device, getattr(model, "bf16", True))


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode without gradients; afterwards the model is as it was. Yields the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def linear(x, weight, bias=None):
    """
    x (..., D) -> (..., E), as F.linear. On a CPU in fp32 oneDNN computes it, as a 1 x 1 convolution over a picture of
    the rows, 8 pixels wide: up to twice as fast as PyTorch's matrix products on an AMD processor with AVX-512.
    """
    in_fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (x.device.type == "cpu" and in_fp32 and x.numel() and torch.backends.mkldnn.is_available()):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    width = math.gcd(rows, 8)
    picture = x.reshape(1, rows // width, width, -1).permute(0, 3, 1, 2)  # (1, D, H, W), but laid out as x is
    y = F.conv2d(picture, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def keep_freed_memory(largest=1 << 30):
    """
    Keep freed tensors up to `largest` bytes in glibc's heap: returning them costs page faults on the next allocation,
    a fifth of a training step on a CPU. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-3, largest)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free memory that may stay at its end


def memory_gb(device):
    """The peak so far in GB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# --- Files ---


@contextlib.contextmanager
def whole_file(path):
    """Write a binary file under a temporary name and rename it once it is complete: nobody ever reads half of it."""
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never made
            temporary.unlink()
