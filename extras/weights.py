"""
Our own checkpoints: one self-contained file with the weights, the model's configuration and recipe, its vocabulary and
its class names.

    weights.save("last.pt", model, step=7)
    model = weights.load("last.pt")                          any of the three models
    model, tokenizer, run = weights.load_run("runs/1")       a run's folder (best.pt, else last.pt) or a file

Other people's weights: `load_pvt` and `load_official` for MVLT; `kaleido.load_official`, `vlmo.load_official`.
"""

import math
from dataclasses import asdict
from pathlib import Path

import torch

import kaleido
import mvlt
import vlmo
from extras import runtime
from extras.foreign import load_pvt, open_arrays, read
from extras.runtime import UserError, quoted
from extras.tokenizer import Tokenizer
from mvlt import load_official

__all__ = ["FILES", "MODELS", "load", "load_official", "load_pvt", "load_run", "read", "save"]

FILES = {"mvlt": mvlt, "kaleido": kaleido, "vlmo": vlmo}  # --model -> its file
MODELS = {"mvlt": mvlt.MVLT, "kaleido": kaleido.Kaleido, "vlmo": vlmo.VLMo}
TYPES = {"kind": str, "config": dict, "recipe": dict, "model": dict, "vocabulary": list, "labels": dict}


def save(path, model, **rest):
    """Write the model, and whatever else is given, whole or not at all."""
    contents = dict(
        kind=model.kind,
        config=asdict(model.config),
        recipe=asdict(model.recipe),
        model=model.state_dict(),
        vocabulary=list(model.vocabulary),
        labels=dict(model.labels),
        learnt=sorted(learnt(model)),
        **rest,
    )
    with runtime.whole_file(path) as file:
        torch.save(contents, file)


def learnt(model):
    """The objectives trained so far, in this run or the one that it started from; all of them if nobody kept count."""
    return getattr(model, "learnt", set(model.recipe.weights))


def load(path):
    """The model saved at `path`, in eval mode on the CPU."""
    return build(path, read(path))


def build(path, contents):
    """The model that a checkpoint's contents describe, checked before anything is allocated by what the file claims."""
    check_contents(path, contents)
    kind, tensors = contents["kind"], contents["model"]
    try:
        config = FILES[kind].Config(**contents["config"])
        recipe = FILES[kind].Recipe(**contents["recipe"])
        with torch.device("meta"):
            expected = {name: value.shape for name, value in MODELS[kind](config, recipe).state_dict().items()}
    except (TypeError, ValueError, RuntimeError, OverflowError, ArithmeticError) as error:
        raise UserError(f"{path}: not a model of this version ({quoted(str(error))})") from None
    found = {name: value.shape for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            shapes = [tuple(shapes[name]) if name in shapes else "nothing" for shapes in (expected, found)]
            raise UserError(f"{path}: {quoted(name)} must be {shapes[0]}, the file holds {shapes[1]}")
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: the weight {name} holds numbers that are not finite; use an earlier checkpoint")
    model = MODELS[kind](config, recipe)
    model.load_state_dict(tensors)
    model.vocabulary, model.labels = contents["vocabulary"], contents["labels"]
    model.learnt = set(contents.get("learnt", recipe.weights))
    return model.eval()


def is_plain(value):
    """Whether it is a tensor that `save` writes: dense, on the CPU, with all of its numbers in the file."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_quantized and value.untyped_storage().nbytes() >= value.nbytes


def are_settings(values):
    """Whether a dict maps names to what a setting may be: a number, text, a truth value, or several whole numbers."""
    for name, value in values.items():
        numbers = type(value) in (tuple, list) and all(type(number) is int for number in value)
        if type(name) is not str or not (numbers or type(value) in (bool, int, float, str)):
            return False
    return True


def check_contents(path, contents):
    """The types of everything that `save` writes, down to the single words and tensors."""
    if "kind" not in contents and isinstance(contents.get("run"), dict) and "config" in contents:
        raise UserError(f"{path}: written by an earlier version of this project; train again, or use commit 3d1d768")
    for name, kind in TYPES.items():
        if not isinstance(contents.get(name), kind):
            raise UserError(f"{path}: not a checkpoint that train.py wrote ({name} is missing or no {kind.__name__})")
    if contents["kind"] not in FILES:
        raise UserError(f"{path}: holds a model {quoted(contents['kind'])}, known are {', '.join(FILES)}")
    if not all(type(name) is str and is_plain(value) for name, value in contents["model"].items()):
        raise UserError(f"{path}: damaged (model must map names to tensors)")
    for name in ("config", "recipe"):
        if not are_settings(contents[name]):
            raise UserError(f"{path}: damaged ({name} must map names to plain values)")
    words, vocab_size = contents["vocabulary"], contents["config"].get("vocab_size")
    names = contents.get("learnt", [])
    if type(names) is not list or not all(type(name) is str for name in names):
        raise UserError(f"{path}: damaged (learnt must be names of objectives)")
    if not all(type(word) is str for word in words) or (words and len(words) != vocab_size):
        raise UserError(f"{path}: damaged (vocabulary must be {quoted(vocab_size)} words)")
    check_labels(path, contents["labels"], contents["config"])


def check_labels(path, labels, config):
    """Class names are lists of text, as many as the recognition heads have classes."""
    for field, size in (("category", "n_category"), ("subcategory", "n_subcategory")):
        names = labels.get(field, [])
        good = isinstance(names, list) and all(type(name) is str for name in names)
        if not good or (labels and len(names) != config.get(size)):
            raise UserError(f"{path}: damaged (labels of {field} must be {quoted(config.get(size))} names)")


def load_run(path, device="cpu"):
    """
    A run's folder (best.pt, else last.pt) or one checkpoint file -> (model in eval mode, tokenizer, run): `run` is the
    dict of the settings that it was trained with, plus "step" and the file's name as "checkpoint".
    """
    path = Path(path)
    files = [path] if path.is_file() else [file for file in (path / "best.pt", path / "last.pt") if file.is_file()]
    if not files:
        raise UserError(f"{path}: no run here (neither best.pt nor last.pt)")
    contents = read(files[0])
    model = build(files[0], contents)
    run, step = contents.get("run", {}), contents.get("step")
    good = isinstance(run, dict) and are_settings(run) and (step is None or type(step) is int)
    good = good and isinstance(run.get("steps", 0), int)
    for name in ("data", "fit", "decode", "preset", "size", "start"):
        good = good and isinstance(run.get(name, ""), str)
    if not good:
        raise UserError(f"{files[0]}: damaged (run must be a dict of settings, step a whole number)")
    model.bf16 = bool(run.get("bf16", True))  # a run trained in fp32 answers in fp32 (runtime.precision_of)
    tokenizer = Tokenizer(model.vocabulary, source=str(files[0]))
    return model.to(device), tokenizer, {**run, "step": step, "checkpoint": files[0].name}


def check_training_state(path, contents, settings):
    """What `train.py --resume` needs besides the model; `settings` names the fields of its Settings."""
    for name, kind in (("optimizer", dict), ("step", int), ("run", dict), ("data", dict)):
        if type(contents.get(name)) is not kind:
            raise UserError(f"--resume: {path} is damaged ({name} is missing or no {kind.__name__})")
    best = contents.get("best")
    if type(best) not in (int, float) or not best < math.inf or contents["step"] < 0:  # NaN is not below either
        raise UserError(f"--resume: {path} is damaged (best must be a number, step 0 or more)")
    if not are_settings(contents["run"]):
        raise UserError(f"--resume: {path} is damaged (run must map names to plain values)")
    if not all(type(name) is str and type(number) is int for name, number in contents["data"].items()):
        raise UserError(f"--resume: {path} is damaged (data must map the splits to numbers)")
    if not contents["vocabulary"] or contents["labels"].keys() != {"category", "subcategory"}:
        raise UserError(f"--resume: {path} is damaged (the vocabulary is empty, or names of classes are missing)")
    unknown, missing = contents["run"].keys() - settings, settings - contents["run"].keys()
    if unknown or missing:
        differ = sorted(map(str, unknown | missing))
        raise UserError(f"--resume: {path} is a run of another version of train.py (settings {quoted(differ)})")


def check_unaveraged(path, contents, model):
    """The weights that `train.py --resume` goes on with where the file's model is a moving average, checked."""
    tensors, own = contents.get("unaveraged"), model.state_dict()
    good = isinstance(tensors, dict) and tensors.keys() == own.keys() and all(is_plain(t) for t in tensors.values())
    good = good and all(t.shape == own[name].shape and t.isfinite().all() for name, t in tensors.items())
    if not good:
        raise UserError(f"--resume: {path} is damaged (unaveraged must be finite weights of the model)")
    return tensors


def load_optimizer(path, optimizer, state):
    """Restore the optimiser's moments and counts of steps, checked; its settings are those of the run."""
    own = optimizer.state_dict()["param_groups"]
    parameters = [(p, group["orthogonal"]) for group in optimizer.param_groups for p in group["params"]]
    try:
        good = [group["params"] for group in state["param_groups"]] == [group["params"] for group in own]
        for number, moments in state["state"].items():
            good = good and type(number) is int and fit_moments(moments, *parameters[number])
    except (AttributeError, IndexError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"--resume: {path} is damaged (its optimizer does not fit the model)")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def fit_moments(moments, parameter, orthogonal):
    """Whether these are the moments of a parameter, one of Muon or two of AdamW, and its count of steps."""
    shapes = {"step": torch.Size(), "exp_avg": parameter.shape}
    if not orthogonal:
        shapes["exp_avg_sq"] = parameter.shape
    if moments.keys() != shapes.keys():
        return False
    for name, value in moments.items():
        good = is_plain(value) and value.shape == shapes[name] and value.is_floating_point()
        if not good or not value.isfinite().all():
            return False
    squares = moments.get("exp_avg_sq", moments["step"])
    return bool(moments["step"] >= 0 and (squares >= 0).all())


# --- --init: other people's weights. A whole checkpoint brings its configuration, a part fills a fresh model. ---

WHOLE = {  # model -> (how a key ends that only its authors' checkpoint has, the function that builds the model)
    "mvlt": ("text_embeddings.word_embeddings.weight", mvlt.load_official),
    "kaleido": ("bert/position_dense", kaleido.load_official),
    "vlmo": ("transformer.cls_token", vlmo.load_official),
}
PART = {"mvlt": load_pvt, "kaleido": kaleido.load_parts, "vlmo": vlmo.load_beit}


def open_init(kind, paths):
    """One file or several, with commas between -> {key: tensor} of the authors' checkpoint, and of the other files."""
    whole, part = {}, {}
    for path in paths.split(","):
        found = open_arrays(path)
        is_whole = any(name.endswith(WHOLE[kind][0]) for name in found)
        (whole if is_whole else part).update(found)
    return whole, part


def load_whole(kind, whole, changes):
    """The authors' checkpoint as a model."""
    return WHOLE[kind][1](whole, **changes)


def load_part(kind, model, part):
    """Put PVT's, BERT's, ResNet-50's or BEiT's weights into a model. Returns {their key: what became of it}."""
    return PART[kind](model, part)
