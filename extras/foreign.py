"""
Other people's weights: a checked reader of checkpoint files, and an account of every key.

`adopt` copies a state dict with foreign names into a model. Every key is accounted for: used, resized, or ignored with
the reason; a missing, ill-shaped or unknown one is an error that names it. Files are opened with
`torch.load(weights_only=True)` only: nothing but tensors and plain values is ever built from them.
"""

import argparse
import math
import os
import re
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

from extras.runtime import UserError, quoted

# --- Checkpoint files ---


def read(path):
    """The dict that a checkpoint file holds."""
    check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the PVT family keeps its flags in the file
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise almost anything
        asked = re.search(r"GLOBAL (\S+)", str(error))  # a pickle names the function that it would run
        reason = f"it asks for {asked[1][:60]}" if asked else type(error).__name__
        raise UserError(f"{path}: not a whole file of plain tensors ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: must hold a dict, got {type(contents).__name__}")
    return contents


def check_archive(path):
    """Refuse what is no regular file, is compressed (a few bytes could become gigabytes), or has a flipped bit."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file")
    try:
        if not zipfile.is_zipfile(path):
            return  # PyTorch's format before 2020, which has neither sizes nor checksums
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
            if declared > os.path.getsize(path):
                raise UserError(f"{path}: not a checkpoint of PyTorch (its records are compressed)")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({type(error).__name__})") from None
    if damaged:
        raise UserError(f"{path}: damaged (the checksum of {quoted(damaged)} does not fit)")


def open_state_dict(checkpoint):
    """A state dict from a dict, from {"model" | "state_dict" | "module": dict}, or from the file of any of these."""
    weights = checkpoint if isinstance(checkpoint, dict) else read(checkpoint)
    for name in ("model", "state_dict", "module"):
        if isinstance(weights.get(name), dict):
            weights = weights[name]
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        where = "checkpoint" if isinstance(checkpoint, dict) else checkpoint
        raise UserError(f"{where}: must be a state dict, names to tensors, or {{'model': state dict}}")
    return weights


def open_arrays(checkpoint):
    """{name: tensor} from a dict, a PyTorch file, or an .npz file."""
    if isinstance(checkpoint, dict):
        return {name: torch.as_tensor(value) for name, value in checkpoint.items()}
    if not str(checkpoint).endswith(".npz"):
        return open_state_dict(checkpoint)
    try:
        with np.load(checkpoint, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{checkpoint}: not a whole .npz of numbers ({type(error).__name__})") from None


# --- An account of every key ---


def must(condition, key, rule, value):
    """UserError with the key, the rule and the value unless the condition holds."""
    if not condition:
        raise UserError(f"{key} {rule}, got {quoted(value)}")


@torch.no_grad()
def adopt(model, weights, names, ignored=(), fit=None):
    """
    Copy foreign weights into a model, all or none.

    names: {our parameter or buffer: their key}. ignored: {pattern of their keys: the reason}.
    fit(theirs, value, ours, shape) -> (value, fate) brings a tensor to our shape; without it shapes must be equal.
    Returns {their key: what became of it}.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    report = {}
    for key in weights:
        for pattern, reason in dict(ignored).items():
            if re.fullmatch(pattern, key):
                report[key] = reason
    missing = sorted(set(names.values()) - weights.keys())
    unknown = sorted(weights.keys() - set(names.values()) - report.keys())
    must(not missing, "checkpoint", "must leave no weight of the model unfilled", missing)
    must(not unknown, "checkpoint", "must hold no weight that is unknown", unknown)

    fitted = {}
    for ours, theirs in names.items():
        shape = tensors[ours].shape
        must(weights[theirs].isfinite().all(), theirs, "must hold finite numbers", "others")
        value, fate = (fit or same_shape)(theirs, weights[theirs], ours, shape)
        must(value.shape == shape, theirs, f"must fit {ours} of shape {tuple(shape)}", tuple(value.shape))
        fitted[ours] = value
        report[theirs] = fate
    for ours, value in fitted.items():
        tensors[ours].copy_(value)
    return report


def same_shape(theirs, value, ours, shape):
    return value, "used"


def resize_grid(table, new):
    """A table of (old^2, D) positions on a square grid, resized bilinearly to (new^2, D)."""
    old = math.isqrt(len(table))
    grid = table.T.unflatten(1, (old, old))[None]  # (1, D, old, old)
    return F.interpolate(grid.float(), size=(new, new), mode="bilinear")[0].flatten(1).T


# --- PVT's weights (ImageNet) and the MVLT authors', whose visual half has the same names ---

VISUAL_PARTS = {  # our part -> theirs; {k} is the stage, which they count from 1
    "stage.position_image": "pos_embed{k}",
    "stage.embed_image": "patch_embed{k}.proj",
    "stage.norm_image": "patch_embed{k}.norm",
    "stage.blocks": "block{k}",
}
TEXT_PARTS = {
    "stage.position_text": "text_pos_embed{k}",
    "stage.embed_text": "text_embed{k}.0",
    "stage.norm_text": "text_embed{k}.1",
    "words.word": "text_embeddings.word_embeddings",
    "words.position": "text_embeddings.position_embeddings.weight",
    "words.segment": "text_embeddings.token_type_embeddings.weight",
    "words.norm": "text_embeddings.LayerNorm",
    "word_head.embed": "mlm_head_embed.0",
    "word_head.norm": "mlm_head_embed.1",
    "word_head.dense": "mlm_head.transform.dense",
    "word_head.dense_norm": "mlm_head.transform.LayerNorm",
    "word_head.bias": "mlm_head.bias",
}
for _ours, _theirs in (
    ("match_head", "itm_head"),
    ("category_head", "sup_cls_head"),
    ("subcategory_head", "sub_cls_head"),
):
    TEXT_PARTS[f"{_ours}.embed"] = f"{_theirs}_embed.0"
    TEXT_PARTS[f"{_ours}.norm"] = f"{_theirs}_embed.1"
    TEXT_PARTS[f"{_ours}.classify"] = f"{_theirs}.linear"

IMAGENET = {r"cls_token|norm\.(weight|bias)|head\.(weight|bias)": "ignored: ImageNet's class token and classifier"}
IGNORED = IMAGENET | {
    r"t2i_head\..+": "ignored: the authors' decoder is another network",
    r"\w+_head\.linear_bias": "added to linear.bias",
    r"mlm_head\.mlm_decoder\.weight": "tied: equal to the word embedding",
    r"text_embeddings\.position_ids": "ignored: counts 0, 1, 2, ...",
}


def load_pvt(model, checkpoint):
    """
    Put the PVT authors' ImageNet weights (a state dict or its file) into the visual half of an MVLT; position tables
    are resized to the model's pictures. Returns {their key: what became of it}.
    """
    return adopt(model, open_state_dict(checkpoint), their_names(model, VISUAL_PARTS), IMAGENET, fit_positions)


def load_mvlt(model, weights):
    """Put the MVLT authors' weights (a state dict) into an MVLT. Returns {their key: what became of it}."""
    weights = dict(weights)
    for second in [name for name in weights if name.endswith("_head.linear_bias")]:
        first = second.replace("linear_bias", "linear.bias")  # their heads carry two biases, which add up to one
        same = first in weights and weights[first].shape == weights[second].shape
        must(same, second, f"must have the shape of {first}", tuple(weights[second].shape))
        weights[first] = weights[first] + weights[second]
    report = adopt(model, weights, their_names(model, VISUAL_PARTS | TEXT_PARTS), IGNORED, fit_positions)
    words, tied = weights["text_embeddings.word_embeddings.weight"], "mlm_head.mlm_decoder.weight"
    untied = not torch.equal(weights.get(tied, words), words)
    must(not untied, tied, "must equal the word embedding, to which it is tied", "another tensor")
    return report


def their_names(model, parts):
    """{our parameter: their key}, for the parameters that belong to one of the parts."""
    names = {}
    for ours, _ in model.named_parameters():
        part_name, k = ours, 0
        if ours.startswith("stages."):
            _, k, rest = ours.split(".", 2)
            part_name = f"stage.{rest}"
        for part, theirs in parts.items():
            if f"{part_name}.".startswith(f"{part}."):
                names[ours] = theirs.format(k=int(k) + 1) + part_name[len(part) :]
    return names


def fit_positions(theirs, value, ours, shape):
    """Resize or cut position tables; everything else must fit as it is."""
    table = torch.atleast_2d(value).flatten(0, -2)  # (rows, D): their tables begin with a dimension of 1
    if ours.endswith("position_image"):
        slots = int(ours.startswith("stages.3"))  # stage 4 carries a class slot in front
        old, new = math.isqrt(max(0, len(table) - slots)), math.isqrt(shape[0])
        rule = "must have a square number of rows" + (", and one" if slots else "")
        must(old > 0 and len(table) == old * old + slots, theirs, rule, tuple(value.shape))
        fate = "used" if old == new else f"resized from {old} x {old} to {new} x {new}"
        return resize_grid(table[slots:], new), fate
    if ours.endswith(("position_text", "words.position")):
        fate = "used" if len(table) <= shape[0] else f"used: the first {shape[0]} of {len(table)} rows"
        return table[: shape[0]], fate
    if ours == "words.segment":
        return table[0], "used: segment 0"
    return value, "used"
