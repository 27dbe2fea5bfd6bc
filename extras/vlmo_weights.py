"""
What VLMo takes from others: the authors' checkpoints (by stage or task), and BEiT's weights in place of stage 1.

Letters: W x W patches, L words, D the width, A heads, M blocks.
"""

import functools
import math
import re

import torch
import torch.nn.functional as F

from extras import foreign

NAMES = {  # ours -> theirs
    "patches": "transformer.patch_embed.proj",
    "image_cls": "transformer.cls_token",
    "image_position": "transformer.pos_embed",
    "norm": "transformer.norm",
    "blocks": "transformer.blocks",
    "word": "text_embeddings.word_embeddings",
    "word_norm": "text_embeddings.LayerNorm",
    "segment": "text_embeddings.token_type_embeddings.weight",
    "text_position": "text_embeddings.position_embeddings.weight",
    "text_mark": "token_type_embeddings.weight",
    "image_mark": "token_type_embeddings.weight",
    "positions.image": "relative_position_bias_table",
    "positions.cross": "relative_position_bias_table",
    "positions.text": "relative_position_bias_table",
    "pooler": "pooler.dense",
    "match_head": "itm_score.fc",
    "word_head.dense": "mlm_score.transform.dense",
    "word_head.norm": "mlm_score.transform.LayerNorm",
    "word_head.decoder": "mlm_score.decoder",
    "word_head.bias": "mlm_score.bias",
    "image_tower": "itc_image_proj.fc",
    "text_tower": "itc_text_proj.fc",
    "image_tower_vl": "itc_vl_image_proj.fc",
    "text_tower_vl": "itc_vl_text_proj.fc",
    "log_scale": "logit_scale",
    "log_scale_vl": "logit_vl_scale",
}
OPTIONAL = (  # groups of their keys that the file of a stage or a task may lack altogether
    r".*\.(norm2_vl|mlp_vl)\..*",
    r"pooler\..*",
    r"itm_score\..*",
    r"mlm_score\..*",
    r"itc_(image|text)_proj\..*|logit_scale",
    r"itc_vl_(image|text)_proj\..*|logit_vl_scale",
)
DIMENSIONS = {  # what `read_sizes` and `fit_official` take apart
    "text_embeddings.word_embeddings.weight": 2,
    "text_embeddings.position_embeddings.weight": 2,
    "text_embeddings.token_type_embeddings.weight": 2,
    "token_type_embeddings.weight": 2,
    "relative_position_bias_table": 2,
    "transformer.patch_embed.proj.weight": 4,
    "transformer.pos_embed": 3,
    "transformer.blocks.0.mlp_imag.fc1.weight": 2,
    "itc_image_proj.fc.weight": 2,
    "itc_text_proj.fc.weight": 2,
    "itc_vl_image_proj.fc.weight": 2,
    "itc_vl_text_proj.fc.weight": 2,
}
INDEX_TABLES = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
IGNORED = {
    r"text_embeddings\.position_ids": "ignored: counts 0, 1, 2, ...",
    "|".join(INDEX_TABLES): "ignored: a constant, equal to ours",
    r"(vqa|nlvr2)_classifier\..*": "ignored: the head of a task that is not offered",
}
BEIT_IGNORED = {
    r"(fc_norm|head|lm_head)\..*|mask_token": "ignored: BEiT's own heads",
    r".*relative_position_index": "ignored: a constant",
}
NEVER_READ = {r"text_embeddings\.position_embeddings\.weight": "ignored: never read with relative positions"}


def open_weights(checkpoint):
    """The authors' state dict, of a dict or a file, without the prefix that DeepSpeed adds."""
    weights = foreign.open_state_dict(checkpoint)
    return {key.removeprefix("module."): value for key, value in weights.items()}


def load_official(model, weights, found):
    """Fill a VLMo with the authors' weights, whose sizes `read_sizes` found -> {their key: what became of it}."""
    names = {}
    for ours, _ in model.named_parameters():
        if theirs := their_name(ours):
            names[ours] = theirs
    fresh = {}
    for group in OPTIONAL:
        keys = {theirs for theirs in names.values() if re.fullmatch(group, theirs)}
        if not keys & weights.keys():
            fresh |= dict.fromkeys(keys, "fresh: not in this file")
    names = {ours: theirs for ours, theirs in names.items() if theirs not in fresh}
    ignored = IGNORED | (NEVER_READ if found["positions"] == "relative" else {})
    return foreign.adopt(model, weights, names, ignored, functools.partial(fit_official, found["text_reach"])) | fresh


def read_sizes(weights, reach):
    """The fields of Config that the shapes of their weights tell."""

    def shape(key):
        foreign.must(key in weights, "checkpoint", "must leave no weight of the model unfilled", [key])
        return weights[key].shape

    for key, dimensions in DIMENSIONS.items():
        if key in weights:
            foreign.must(weights[key].ndim == dimensions, key, f"must have {dimensions} dimensions", tuple(shape(key)))
    V, D = shape("text_embeddings.word_embeddings.weight")
    P = shape("transformer.patch_embed.proj.weight")[2]
    numbers = {int(match[1]) for key in weights if (match := re.match(r"transformer\.blocks\.(\d+)\.", key))}
    depth = 1 + max(numbers, default=0)
    with_vl = {match[1] for key in weights if (match := re.match(r"transformer\.blocks\.(\d+)\.(norm2|mlp)_vl", key))}
    if "relative_position_bias_table" in weights:
        rows, columns = shape("relative_position_bias_table")
        square, heads, positions = rows - 5 - 2 * reach, columns // depth, "relative"
        side = (math.isqrt(max(0, square)) + 1) // 2
        rule = f"must have (2 W - 1)^2 + 5 + 2 text_reach rows, text_reach = {reach}"
        foreign.must(side > 0 and square == (2 * side - 1) ** 2, "relative_position_bias_table", rule, rows)
    else:
        side, heads, positions = math.isqrt(shape("transformer.pos_embed")[1] - 1), 16, "absolute"
    towers = [value for key, value in weights.items() if re.match(r"itc_.*_proj\.fc\.weight", key)]
    return dict(
        image_size=side * P, patch_size=P, text_len=shape("text_embeddings.position_embeddings.weight")[0],
        text_reach=reach, vocab_size=V, width=D, depth=depth, heads=heads,
        mlp_ratio=shape("transformer.blocks.0.mlp_imag.fc1.weight")[0] // D,
        fused=len(with_vl) or (2 if depth <= 12 else 3), positions=positions,
        layer_scale=0.1 if any(key.endswith("gamma_1") for key in weights) else 0.0,
        embed_dim=towers[0].shape[0] if towers else D,
    )


def their_name(ours):
    """What the authors call our parameter, or None for what they do not have."""
    for part, theirs in NAMES.items():
        if f"{ours}.".startswith(f"{part}."):
            name = theirs + ours[len(part) :]
            for expert, short in (("image", "imag"), ("text", "text"), ("both", "vl")):
                name = name.replace(f"experts.{expert}.norm", f"norm2_{short}")
                name = name.replace(f"experts.{expert}", f"mlp_{short}")
            return name


def check_index_tables(weights, image_rows, text_rows):
    """
    Refuse a file whose constant tables of positions are not ours: image_rows (1 + W^2, 1 + W^2) for the picture, and
    text_rows(words) (words, words).
    """
    for key in INDEX_TABLES:
        if key not in weights:
            continue
        theirs = weights[key].long()
        patches = 0 if key.startswith("text_rel") else len(image_rows)
        words = 0 if key.startswith("rel") else len(theirs) - patches
        rows = (2 * math.isqrt(len(image_rows) - 1) - 1) ** 2 + 3  # of the image; then 2 for cross, then the text's
        ours = torch.zeros(words + patches, words + patches, dtype=torch.long)
        if words:
            ours[:words, :words] = text_rows(words) + rows + 2
        ours[:words, words:], ours[words:, :words] = rows, rows + 1
        if patches:
            ours[words:, words:] = image_rows
        foreign.must(torch.equal(ours, theirs), key, "must be the table that relative positions define", "another")


def fit_official(reach, theirs, value, ours, shape):
    """Bring a tensor of theirs to the shape of ours, and say how."""
    if ours == "positions.text":
        return value[-2 * reach :], "used: split into image, cross and text"
    if ours == "positions.cross":
        return value[-2 * reach - 2 : -2 * reach], "used: split into image, cross and text"
    if ours == "positions.image":
        fate = "used: split into image, cross and text"
        table = value[: -2 * reach - 2]
        return fit_offsets(table, shape), fate if len(table) == shape[0] else f"{fate}; image: resized"
    if ours == "image_position":
        foreign.must(len(value) == 1, theirs, "must have a first dimension of 1", tuple(value.shape))
        return fit_grid(value[0], shape), "used" if value.shape[1] == shape[0] else "resized"
    if ours == "text_position":
        return value[: shape[0]], "used" if len(value) == shape[0] else f"used: the first {shape[0]} rows"
    if ours in ("segment", "text_mark"):
        return value[0], "used: row 0"
    if ours == "image_mark":
        return value[1], "used: rows 0 and 1"
    if ours == "image_cls":
        return value.flatten(), "used"
    return value, "used"


def fit_offsets(table, shape):
    """A table of offsets ((2W-1)^2 + 3, columns) for another W: cut around the centre, or interpolated (bicubic)."""
    old, new = math.isqrt(len(table) - 3), math.isqrt(shape[0] - 3)
    grid = table[:-3].T.unflatten(1, (old, old))  # (columns, old, old)
    if new <= old:
        cut = slice((old - new) // 2, (old + new) // 2)
        grid = grid[:, cut, cut]
    else:  # the authors stretch the offsets along a geometric series
        grid = F.interpolate(grid[None].float(), size=(new, new), mode="bicubic")[0]
    return torch.cat([grid.flatten(1).T, table[-3:]])


def fit_grid(table, shape):
    """A table (N, D) of absolute positions for another W (bicubic); the class token keeps its row."""
    old, new = math.isqrt(len(table) - 1), math.isqrt(shape[0] - 1)
    if old == new:
        return table
    grid = table[1:].T.unflatten(1, (old, old))[None]
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic")[0]
    return torch.cat([table[:1], grid.flatten(1).T])


def load_beit(model, checkpoint):
    """
    Put BEiT's weights (a state dict or its file) into patches, positions, attention and image experts, in place of
    stage 1. The authors take the BEiT that was fine-tuned with labels. Returns {their key: what became of it}.
    """
    weights, depth = dict(foreign.open_state_dict(checkpoint)), model.config.depth
    relative = model.config.positions == "relative"
    foreign.must(relative, "checkpoint", "BEiT's positions are relative: --positions must be, too", "absolute")
    shared = "rel_pos_bias.relative_position_bias_table"  # a self-supervised file has one table for all blocks
    keys = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(depth)]
    keys = [shared] * depth if shared in weights else keys
    missing = [key for key in [*keys, "cls_token"] if key not in weights]
    foreign.must(not missing, "checkpoint", "must leave no weight of the model unfilled", missing)
    for key in keys:
        like = weights[keys[0]].shape
        foreign.must(weights[key].ndim == 2, key, "must have 2 dimensions", tuple(weights[key].shape))
        foreign.must(weights[key].shape == like, key, f"must have the shape of {keys[0]}", tuple(weights[key].shape))
    tables = torch.cat([weights[key] for key in keys], dim=1)  # (rows, M A)
    for key in set(keys):
        del weights[key]
    weights["positions"] = fit_offsets(tables, model.positions.image.shape)
    weights["cls_token"] = weights["cls_token"].flatten()

    names = {"positions.image": "positions"}
    for ours, _ in model.named_parameters():
        theirs = their_name(ours) or ""
        if theirs.startswith("transformer.") and not re.search(r"_(text|vl)\b", theirs):
            names[ours] = theirs.removeprefix("transformer.").replace("_imag", "")
    if "norm.weight" not in weights:  # a fine-tuned file: the last LayerNorm stays fresh
        names = {ours: theirs for ours, theirs in names.items() if not theirs.startswith("norm.")}
    report = foreign.adopt(model, weights, names, BEIT_IGNORED)
    del report["positions"]
    return report | dict.fromkeys(keys, "used" if len(tables) == len(weights["positions"]) else "resized")
