"""
VLMo, Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts (Bao et al., NeurIPS 2022), in one file.

Read it beside the paper: the input representations are `image_input` and `text_input`, the MoME Transformer is `Block`
(with `Attention`, `Expert` and `Positions`), the dual encoder is `VLMo.embed`, the fusion encoder is `VLMo.encode` of a
pair, the pre-training tasks are `VLMo.plan` and `VLMo.losses`, and stagewise pre-training is `active` and `trained`.

   picture (B, 3, H, H)                         caption (B, L) word pieces
      |  W x W patches, [CLS] in front             |  word embedding, LayerNorm
   (B, N, D)                                    (B, L, D)
      '----------------------.---------------------'
                             |
             M blocks:   z = z + attention(z)     one attention, shared by all modalities
                         z = z + expert(z)        a feed-forward network for each modality
                             |
   a picture or a caption alone: image or text experts in all blocks                        = dual encoder
   a pair: text experts for words, image experts for patches in blocks 0..M-F-1, then
           vision-language experts ("both") for all tokens in blocks M-F..M-1               = fusion encoder
                             |
   alone, [CLS]                    -> ITC: picture and caption meet in a common space
   pair, [CLS] of the caption      -> ITM: do they match?  CR: which category?
   pair, where words are hidden    -> MLM: which word?
   picture alone, hidden patches   -> MIM: which pixels?       (stage 1)
   caption alone, hidden words     -> textmlm: which word?     (stage 2)

Letters: B pairs of a slice, G pairs of the global batch, L words ([CLS] first), H side of the picture, P side of a
patch, W patches in a row, N = 1 + W^2 image tokens (the image's class token first), T tokens of a sequence (L, N or
L + N), D width, M blocks, A heads, F top blocks with a vision-language expert, V vocabulary, R longest text that the
position table knows, E width of the common space of the towers. Blocks are counted from 0.
Departures from the paper and from the authors' code are named on the line where they happen; PAPER.md lists them.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from extras import vlmo_weights
from extras.runtime import Linear, linear
from mvlt import (
    DropPath,
    capped_scale,
    draw_units,
    hard_negatives,
    itc_loss,
    parse_objectives,
    recognition_loss,
    require,
    require_range,
    require_whole,
    setting,
    share_known,
    trim,
)

# ---------------------------------------------------------------------------------------------------------------------
# The shape of the network


@dataclass(frozen=True)
class Config:
    """The shape of the network. The defaults are the paper's base model."""

    image_size: int = setting(224, "H, side of the (square) picture in pixels.")
    patch_size: int = setting(16, "P, side of a patch in pixels.")
    text_len: int = setting(40, "Longest caption in word pieces, [CLS] and [SEP] included.")
    text_reach: int = setting(196, "R, longest text that the table of relative positions knows; text_len or more.")
    vocab_size: int = setting(30522, "V, number of word pieces.")
    width: int = setting(768, "D, width of the transformer.")
    depth: int = setting(12, "M, number of blocks.")
    heads: int = setting(12, "A, attention heads of each block.")
    mlp_ratio: int = setting(4, "Width of an expert's hidden layer over D.")
    fused: int = setting(2, "F, number of top blocks with a vision-language expert.")
    positions: str = setting("relative", "Positions: relative (attention biases) or absolute (added to the input).")
    layer_scale: float = setting(0.1, "Initial factor of each residual branch (LayerScale); 0 leaves it out.")
    init_std: float = setting(0.02, "Standard deviation of fresh weights; a narrow model needs more than 0.02.")
    embed_dim: int = setting(768, "E, width of the common space of the towers.")
    tie_words: bool = setting(False, "Predict words by the word embedding itself, as BERT (the paper: no).")
    drop_path: float = setting(0.1, "Stochastic depth: rises linearly from 0 in the first block to this rate.")
    dropout: float = setting(0.1, "Dropout of the word input.")
    n_category: int = setting(0, "Number of main categories; 0 leaves the head out.")
    n_subcategory: int = setting(0, "Number of sub-categories; 0 leaves the head out.")

    def __post_init__(self):
        positive = ("image_size", "patch_size", "vocab_size", "width", "depth", "heads", "mlp_ratio", "fused")
        require_whole(self, dict.fromkeys(positive, 1) | dict(text_len=2, embed_dim=1, n_category=0, n_subcategory=0))
        require_whole(self, dict(text_reach=self.text_len))
        require_range(self, ("drop_path", "dropout"), 0, 1, high_included=False)
        require_range(self, ("layer_scale", "init_std"), 0, 1)
        require(self.init_std > 0, "init_std", "must be above 0", self.init_std)
        require(self.depth <= 1000, "depth", "must not exceed 1000 blocks", self.depth)
        require(self.fused <= self.depth, "fused", f"must not exceed depth = {self.depth}", self.fused)
        require(self.width % self.heads == 0, "width", f"must be a multiple of heads = {self.heads}", self.width)
        rule = f"must be a multiple of patch_size = {self.patch_size}"
        require(self.image_size % self.patch_size == 0, "image_size", rule, self.image_size)
        known = self.positions in ("relative", "absolute")
        require(known, "positions", "must be relative or absolute", self.positions)
        require(type(self.tie_words) is bool, "tie_words", "must be True or False", self.tie_words)

    @property
    def side(self):
        """W, the number of patches in a row."""
        return self.image_size // self.patch_size

    @classmethod
    def preset(cls, size, **changes):
        """The configuration of a named size, with changes."""
        require(size in PRESETS, "size", f"must be one of {', '.join(PRESETS)}", size)
        return cls(**PRESETS[size] | changes)


PRESETS = {
    # nano is ours, for a laptop. With LayerScale and weights of 0.02 a narrow block adds so little to [CLS] that the
    # contrast needs hundreds of steps to begin; with weights of about 1/sqrt(D) it begins at once
    "nano": dict(
        image_size=64, patch_size=8, text_len=48, text_reach=48, width=128, depth=6, heads=4, embed_dim=128,
        tie_words=True, layer_scale=0.0, init_std=0.1,
    ),
    "base": dict(),
    "large": dict(width=1024, depth=24, heads=16, fused=3, embed_dim=1024),
    "base_plus": dict(
        width=544, depth=24, heads=16, fused=3, embed_dim=544, positions="absolute", layer_scale=0.0
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# How it is trained

OBJECTIVES = {"mim": 1, "textmlm": 1, "itc": 1, "itm": 1, "mlm": 0.25, "cr": 1}  # with the authors' weights


@dataclass(frozen=True)
class Recipe:
    """Objectives, stages, masking and negatives. The defaults are the demo's: all stages in one run."""

    objectives: str = setting(
        "mim,textmlm,itc,itm,mlm,cr",
        "Objectives, as name or name:weight, separated by commas: mim, textmlm, itc, itm, mlm, cr (recognition)."
    )
    image_until: float = setting(0.1, "Stage 1 (mim on pictures alone) lasts until this share of the steps.")
    text_until: float = setting(0.2, "Stage 2 (textmlm on captions alone) lasts until this share of the steps.")
    itm_from: float = setting(0.35, "Stage 3, pairs: train the towers alone (itc) until this share of the steps.")
    mask_ratio: float = setting(0.6, "mim: the hidden share of a picture.")
    mask_words: float = setting(0.15, "textmlm and mlm: the share of the words that are hidden.")
    hard: float = setting(0.5, "itm: share of negatives that the towers choose (the paper: 1); the rest are uniform.")
    second_contrast: bool = setting(True, "itc: contrast the towers' vision-language ends, too, as the paper does.")

    def __post_init__(self):
        chosen = self.weights
        require_range(self, ("image_until", "text_until", "itm_from", "mask_ratio", "mask_words", "hard"), 0, 1)
        rule = f"must not be below image_until = {self.image_until}"
        good = self.text_until >= self.image_until or not {"mim", "textmlm"} <= set(chosen)
        require(good, "text_until", rule, self.text_until)
        require(type(self.second_contrast) is bool, "second_contrast", "must be True or False", self.second_contrast)
        good = chosen.get("itc") or "itm" not in chosen or self.hard == 0  # a weight of 0 trains no towers
        require(good, "hard", "must be 0 for itm without itc: the towers choose the hard negatives", self.hard)

    @property
    def weights(self):
        """{objective: its weight in the loss}."""
        return parse_objectives(self.objectives, OBJECTIVES)


PAIRS = dict(  # stage 3, the authors' command for base
    size="base", objectives="itc,itm,mlm", image_until=0.0, text_until=0.0, itm_from=0.0, hard=1.0, steps=200_000,
    batch_size=1024, optimizer="adamw", lr=2e-4, final_lr=0.0, warmup=2_500 / 200_000, weight_decay=0.01, beta2=0.98,
    clip=1.0, mirror=0.5, shift=3, zoom=0.2, vocab_size=30522, workers=4, save_every=1000,
)
RECIPES = {
    "demo": dict(
        size="nano", steps=600, batch_size=64, lr=4e-3, final_lr=5e-5, warmup=0.05, weight_decay=1e-4, clip=1.0
    ),
    # the paper's three runs, each started with --from the one before
    "image": PAIRS | dict(objectives="mim", epochs=150.0, lr=1e-3, warmup=0.01),
    "text": PAIRS | dict(objectives="textmlm"),  # the authors: --text-len 196 here, and --text-len 40 again for "paper"
    "paper": PAIRS,
    # fine-tuning: retrieval by the first contrast alone; categories from the fused [CLS]
    "retrieve": PAIRS | dict(
        objectives="itc", second_contrast=False, steps=3_000, batch_size=3072, lr=3e-5, warmup=0.1
    ),
    "recognise": PAIRS | dict(objectives="cr", steps=3_000, batch_size=128, lr=3e-5, warmup=0.1),
}

# ---------------------------------------------------------------------------------------------------------------------
# The MoME Transformer


def image_rows(side):
    """
    The row of the table `Positions.image` for each pair of image tokens, (N, N): patches by their offset, query minus
    key, down and right; then one row each for class token -> patch, patch -> class token, class token -> itself.
    """
    place = torch.arange(side * side)
    y, x = place // side, place % side
    span = 2 * side - 1  # offsets -(W-1)..W-1
    down = y[:, None] - y + side - 1
    right = x[:, None] - x + side - 1
    return with_class_token(span * down + right, span * span)


def text_rows(length, reach):
    """
    The row of the table `Positions.text` for each pair of words, (L, L): words after [CLS] by their offset, key minus
    query (the sign is opposite to the image's, as in the authors' code); then three rows for [CLS], as in image_rows.
    """
    place = torch.arange(length - 1)
    return with_class_token(place - place[:, None] + reach - 2, 2 * reach - 3)


def with_class_token(rows, free):
    """Put the class token before a table of rows (n, n): the rows free, free + 1 and free + 2 are its own."""
    table = F.pad(rows, (1, 0, 1, 0))
    table[0, 1:] = free
    table[1:, 0] = free + 1
    table[0, 0] = free + 2
    return table


class Positions(nn.Module):
    """
    Relative positions: learnt numbers that are added to the attention scores. Each table has one row for each kind of
    relation and one column for each head of each block: column i A + h for head h of block i.
    """

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        columns = c.depth * c.heads
        self.image = nn.Parameter(torch.zeros((2 * c.side - 1) ** 2 + 3, columns))
        self.cross = nn.Parameter(torch.zeros(2, columns))  # a word asks an image token; an image token asks a word
        self.text = nn.Parameter(torch.zeros(2 * c.text_reach, columns))
        self.register_buffer("image_rows", image_rows(c.side), persistent=False)
        self.register_buffer("text_rows", text_rows(c.text_len, c.text_reach), persistent=False)

    def forward(self, block, words, image_tokens):
        """The bias (A, T, T) of a block for `words` words, then `image_tokens` image tokens (0: absent)."""
        own = slice(block * self.heads, (block + 1) * self.heads)
        text = F.embedding(self.text_rows[:words, :words], self.text[:, own])  # (L, L, A)
        image = F.embedding(self.image_rows[:image_tokens, :image_tokens], self.image[:, own])  # (N, N, A)
        to_image = self.cross[0, own].expand(words, image_tokens, -1)
        to_text = self.cross[1, own].expand(image_tokens, words, -1)
        top = torch.cat([text, to_image], dim=1)
        bottom = torch.cat([to_text, image], dim=1)
        return torch.cat([top, bottom]).permute(2, 0, 1)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d) + mask) v; mask, which broadcasts to (B, A, T, T), is -inf where a key is padding."""
    if q.is_cuda:  # the fused call accumulates in fp32
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # explicit on the CPU, where it is faster for few keys
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention, shared by all modalities. Queries and values have a bias, keys have none."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(c.width))
        self.v_bias = nn.Parameter(torch.zeros(c.width))
        self.proj = Linear(c.width, c.width)

    def forward(self, z, mask):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(z, self.qkv.weight, bias)  # (B, T, 3 D)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # three of (B, A, T, D/A)
        out = attend(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class Expert(nn.Module):
    """The feed-forward network of one modality, with its own LayerNorm."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.fc1 = Linear(c.width, c.mlp_ratio * c.width)
        self.fc2 = Linear(c.mlp_ratio * c.width, c.width)

    def forward(self, z):
        return self.fc2(F.gelu(self.fc1(self.norm(z))))


class Block(nn.Module):
    """Shared self-attention, then each token's expert; both branches are scaled by vectors that the experts share."""

    def __init__(self, c, expert_names, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = Attention(c)
        self.experts = nn.ModuleDict({name: Expert(c) for name in expert_names})
        self.gamma_1 = self.gamma_2 = None
        if c.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((c.width,), float(c.layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((c.width,), float(c.layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, z, mask, words, joint):
        """z (B, T, D): `words` words, then image tokens. joint: prefer the vision-language expert, if there is one."""
        z = z + self.drop_path(scaled(self.attn(self.norm1(z), mask), self.gamma_1))
        return z + self.drop_path(scaled(self.consult(z, words, joint), self.gamma_2))

    def consult(self, z, words, joint):
        """Each token through its expert."""
        if joint and "both" in self.experts:
            return self.experts["both"](z)
        answers = []
        if words > 0:
            answers.append(self.experts["text"](z[:, :words]))
        if words < z.shape[1]:
            answers.append(self.experts["image"](z[:, words:]))
        return torch.cat(answers, dim=1)


def scaled(branch, gamma):
    """LayerScale, or nothing in a model without it."""
    return branch if gamma is None else gamma * branch


class WordHead(nn.Module):
    """BERT's head: Linear, GELU, LayerNorm, then a decoder to the vocabulary. The authors' decoder is not tied."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c.width, c.width)
        self.norm = nn.LayerNorm(c.width, eps=1e-12)
        self.decoder = None if c.tie_words else nn.Linear(c.width, c.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, z, word_weight):
        z = self.norm(F.gelu(self.dense(z)))
        weight = word_weight if self.decoder is None else self.decoder.weight
        return F.linear(z, weight, self.bias)


class ClassHead(nn.Sequential):
    """Recognition, not in the paper: the form of the authors' head for visual question answering."""

    def __init__(self, c, classes):
        wide = 2 * c.width
        super().__init__(nn.Linear(c.width, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, classes))


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

PARTS = {  # part of the network -> its parameters; the blocks' are named by `part_of`
    "picture": ("patches", "image_cls", "image_mark", "image_position", "positions.image"),
    "caption": ("word", "word_norm", "segment", "text_mark", "text_position", "positions.text"),
    "cross": ("positions.cross",),
    "norm": ("norm",),
    "pixels": ("mask_token", "pixel_head"),
    "words": ("word_head",),
    "pooler": ("pooler",),
    "match": ("match_head",),
    "classes": ("category_head", "subcategory_head"),
    "towers": ("image_tower", "text_tower", "log_scale"),
    "towers_vl": ("image_tower_vl", "text_tower_vl", "log_scale_vl"),
}
FUSED = {"picture", "caption", "cross", "attention", "image", "text", "top_both", "norm"}  # what reads a pair
TRAINS = {  # objective -> the parts that it trains
    "mim": {"picture", "attention", "image", "top_image", "norm", "pixels"},
    "textmlm": {"caption", "text", "top_text", "norm", "words"},  # the attention stays as the pictures left it
    "itc": {"picture", "caption", "attention", "image", "top_image", "text", "top_text", "norm", "towers"},
    "itm": FUSED | {"pooler", "match"},
    "mlm": FUSED | {"words"},
    "cr": FUSED | {"pooler", "classes"},
}


class VLMo(nn.Module):
    """`vocabulary` (words in id order) and `labels` (class names in id order) travel with the weights."""

    kind = "vlmo"
    ends = ("patches.", "pixel_head", "match_head", "category_head.3", "decoder")  # read pixels or give an answer
    heads = {}  # `trained` is written out by stages

    def __init__(self, config, recipe=None):
        super().__init__()
        self.config = c = config
        self.recipe = recipe or Recipe()
        self.vocabulary, self.labels = [], {}
        self.recompute = False  # True: recompute activations in the backward pass (less memory, a third more work)
        self.patches = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)
        self.image_cls = nn.Parameter(torch.zeros(c.width))
        self.image_mark = nn.Parameter(torch.zeros(c.width))  # the modality vector of every image token
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.word = nn.Embedding(c.vocab_size, c.width)
        self.segment = nn.Parameter(torch.zeros(c.width))
        self.word_norm = nn.LayerNorm(c.width, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)
        self.text_mark = nn.Parameter(torch.zeros(c.width))  # the modality vector of every word
        self.positions = self.image_position = self.text_position = None
        if c.positions == "relative":
            self.positions = Positions(c)
        else:
            self.image_position = nn.Parameter(torch.zeros(1 + c.side**2, c.width))
            self.text_position = nn.Parameter(torch.zeros(c.text_len, c.width))

        self.blocks = nn.ModuleList()
        for i in range(c.depth):
            expert_names = ("image", "text", "both") if i >= c.depth - c.fused else ("image", "text")
            self.blocks.append(Block(c, expert_names, c.drop_path * i / max(1, c.depth - 1)))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)  # one for every mode

        self.pooler = nn.Linear(c.width, c.width)
        self.match_head = nn.Linear(c.width, 2)
        self.word_head = WordHead(c)
        self.category_head = ClassHead(c, c.n_category) if c.n_category else None
        self.subcategory_head = ClassHead(c, c.n_subcategory) if c.n_subcategory else None
        self.pixel_head = nn.Linear(c.width, 3 * c.patch_size**2)
        for name in ("image_tower", "text_tower", "image_tower_vl", "text_tower_vl"):
            setattr(self, name, nn.Linear(c.width, c.embed_dim, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the learnt temperatures
        self.log_scale_vl = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("word_start", torch.ones(c.vocab_size, dtype=torch.bool))  # False: a piece inside a word
        self.apply(functools.partial(initialise, c.init_std))

    # --- Input representations ---

    def image_input(self, images, hidden=None):
        """images (B, 3, H, H) in [0, 1], hidden (B, 1, W, W) bool or None -> (B, N, D)."""
        size = self.config.image_size
        right = images.shape[1:] == (3, size, size)
        require(right, "images", f"must be (B, 3, {size}, {size})", tuple(images.shape))
        z = self.patches(2 * images - 1).flatten(2).transpose(1, 2)  # (B, W^2, D), row by row
        if hidden is not None:
            z = torch.where(hidden.flatten(1)[:, :, None], self.mask_token.to(z.dtype), z)
        z = torch.cat([self.image_cls.to(z.dtype).expand(len(z), 1, -1), z], dim=1)
        if self.image_position is not None:
            z = z + self.image_position
        return z + self.image_mark

    def text_input(self, tokens):
        """tokens (B, L) int64, 0 = padding -> (B, L, D). Relative positions are seen by the attention alone."""
        longest = self.config.text_len
        right = tokens.ndim == 2 and 0 < tokens.shape[1] <= longest
        require(right, "tokens", f"must be (B, L) with L in 1..{longest}", tuple(tokens.shape))
        z = self.word(tokens) + self.segment
        if self.text_position is not None:
            z = z + self.text_position[: tokens.shape[1]]
        return self.dropout(self.word_norm(z)) + self.text_mark

    # --- The network ---

    def run(self, blocks, z, tokens, joint):
        """
        Some blocks (their numbers) over z (B, T, D): the words of `tokens` (B, L), or None, then image tokens.
        joint: with the vision-language experts where there are any.
        """
        words = 0 if tokens is None else tokens.shape[1]
        padding = self.padding(z, tokens)
        for i in blocks:
            mask = padding
            if self.positions is not None:
                bias = self.positions(i, words, z.shape[1] - words)  # (A, T, T)
                mask = bias if padding is None else bias + padding
            if self.recompute:
                z = checkpoint(self.blocks[i], z, mask, words, joint, use_reentrant=False)
            else:
                z = self.blocks[i](z, mask, words, joint)
        return z

    def padding(self, z, tokens):
        """-inf for keys that are padding, 0 for others: (B, 1, 1, T), or None without text."""
        if tokens is None:
            return None
        unseen = tokens == 0
        unseen[:, 0] = False  # [CLS], so that even a row of padding leaves a key
        unseen = F.pad(unseen, (0, z.shape[1] - tokens.shape[1]))
        zeros = torch.zeros(unseen.shape, dtype=self.norm.weight.dtype, device=z.device)
        return zeros.masked_fill(unseen, float("-inf"))[:, None, None]

    def encode(self, images, tokens):
        """
        images (B, 3, H, H) floats in [0, 1]; tokens (B, L) int64, 0 = padding; either may be None. A pair is read by
        the fusion encoder, a picture or a caption alone by its own experts.
        Returns [(B, N, D)] and [(B, L, D)] after the last LayerNorm; [] for an absent side.
        """
        require(images is not None or tokens is not None, "encode", "needs images or tokens", None)
        parts = []
        if tokens is not None:
            parts.append(self.text_input(tokens))  # words first
        if images is not None:
            parts.append(self.image_input(images))
        z = self.run(range(self.config.depth), torch.cat(parts, dim=1), tokens, joint=len(parts) == 2)
        z = self.norm(z)
        words = 0 if tokens is None else tokens.shape[1]
        return ([] if images is None else [z[:, words:]]), ([] if tokens is None else [z[:, :words]])

    def pool(self, text):
        return torch.tanh(self.pooler(text[0][:, 0]))  # the fused [CLS] is the caption's

    def match(self, text):
        """ITM: (B, 2) logits from the fused [CLS]; 0 = mismatch, 1 = match."""
        return self.match_head(self.pool(text))

    def predict_words(self, text, where):
        """MLM: where (B, L) bool -> (where.sum(), V) logits, computed only there."""
        return self.word_head(text[0][where], self.word.weight)

    def recognise(self, text):
        """Logits of main and sub-category from the fused [CLS]."""
        classes = (self.config.n_category, self.config.n_subcategory)
        require(all(classes), "recognise", "needs n_category and n_subcategory above 0", classes)
        pooled = self.pool(text)
        return self.category_head(pooled), self.subcategory_head(pooled)

    def encode_masked(self, images, hidden):
        """The states (B, W^2, D) of all patches of images (B, 3, H, H), of which hidden (B, 1, W, W) are masked."""
        z = self.run(range(self.config.depth), self.image_input(images, hidden), None, joint=False)
        return self.norm(z)[:, 1:]

    def restore(self, images, hidden):
        """MIM: images (B, 3, H, H) with the patches hidden (B, 1, W, W) predicted, the others as they are."""
        P = self.config.patch_size
        pixels = self.pixel_head(self.encode_masked(images, hidden)).float()  # (B, W^2, 3 P^2) in [-1, 1]
        pixels = (pixels + 1) / 2
        predicted = F.fold(pixels.transpose(1, 2), images.shape[2:], kernel_size=P, stride=P)
        shown = ~hidden.repeat_interleave(P, dim=2).repeat_interleave(P, dim=3)
        return torch.where(shown, images, predicted)

    # --- The dual encoder ---

    def tower(self, z, tokens, with_joint_end):
        """
        The states (B, T, D) of a picture or a caption alone after the last LayerNorm and, if asked for, those of its
        joint end, which passes through the vision-language experts.
        """
        lower = range(self.config.depth - self.config.fused)
        upper = range(self.config.depth - self.config.fused, self.config.depth)
        z = self.run(lower, z, tokens, joint=False)
        ends = [self.norm(self.run(upper, z, tokens, joint=False))]
        if with_joint_end:
            ends.append(self.norm(self.run(upper, z, tokens, joint=True)))
        return ends

    def embed(self, images, tokens):
        """
        Unit vectors (4, B, E): image and text by their own experts, image and text by the vision-language experts.
        Without the second contrast only the first two.
        """
        second = self.recipe.second_contrast
        image = self.tower(self.image_input(images), None, second)
        text = self.tower(self.text_input(tokens), tokens, second)
        vectors = [project(self.image_tower, image[0]), project(self.text_tower, text[0])]
        if second:
            vectors += [project(self.image_tower_vl, image[1]), project(self.text_tower_vl, text[1])]
        return torch.stack(vectors)

    def embed_images(self, images):
        """Unit vectors (B, E) for retrieval: the first row of `embed`."""
        return project(self.image_tower, self.encode(images, None)[0][0])

    def embed_texts(self, tokens):
        """Unit vectors (B, E) for retrieval: the second row of `embed`."""
        return project(self.text_tower, self.encode(None, tokens)[1][0])

    def contrast(self, vectors, same, taught=None):
        """
        ITC over all G pairs: vectors (2 or 4, G, E), same (G, G) -> the mean of the one or two contrasts.
        taught (G, G): similarities to imitate.
        """
        loss = itc_loss(vectors[0], vectors[1], self.log_scale, same, taught=taught)
        if len(vectors) == 2:
            return loss
        return (loss + itc_loss(vectors[2], vectors[3], self.log_scale_vl, same, taught=taught)) / 2

    # --- What the scripts ask of a model ---

    def score(self, images, tokens):
        """Match - mismatch logit, (B,) in fp32: above 0 picture and caption belong together."""
        _, text = self.encode(images, tokens)
        with torch.autocast(images.device.type, enabled=False):  # in bf16 close scores would tie
            logits = self.match(text)
        return logits[:, 1] - logits[:, 0]

    def classify(self, images, tokens):
        """Logits of main and sub-category, (B, n_category) and (B, n_subcategory)."""
        _, text = self.encode(images, tokens)
        with torch.autocast(images.device.type, enabled=False):
            return self.recognise(text)

    def prepare(self, split):
        """Take from the tokenizer which pieces begin a word, for masking whole words."""
        starts = [not word.startswith("##") for word in split.tokenizer.words]
        self.word_start[: len(starts)] = torch.tensor(starts, device=self.word_start.device)

    # --- Stagewise pre-training ---

    def active(self, progress):
        """The objectives of the present stage: pictures, captions, the towers alone, pairs. The last one never ends."""
        r = self.recipe
        stages = (
            (r.image_until, ("mim",)),
            (r.text_until, ("textmlm",)),
            (r.itm_from, ("itc",)),
            (math.inf, ("itc", "itm", "mlm", "cr")),
        )
        last = ()
        for until, members in stages:
            chosen = tuple(name for name in r.weights if name in members)
            if chosen and progress < until:
                return chosen
            last = chosen or last
        return last

    def trained(self, progress):
        """The names of the parameters that the present stage trains; all others are frozen."""
        parts = set()
        for objective in self.active(progress):
            parts |= TRAINS[objective]
        if "itc" in self.active(progress) and self.recipe.second_contrast:
            parts |= {"top_both", "towers_vl"}
        return {name for name, _ in self.named_parameters() if self.part_of(name) in parts}

    def part_of(self, name):
        """The part of the network, as TRAINS calls it, that a parameter belongs to."""
        if name.startswith("blocks."):
            _, i, module, *rest = name.split(".")
            if module != "experts":
                return "attention"  # with its LayerNorm and both LayerScales
            top = int(i) >= self.config.depth - self.config.fused
            return f"top_{rest[0]}" if top else rest[0]
        for part, owners in PARTS.items():
            if any(f"{name}.".startswith(f"{owner}.") for owner in owners):
                return part

    def reads(self, progress):
        """Stage 1 reads pictures alone, stage 2 captions alone, then pairs."""
        return {"mim": "pictures", "textmlm": "captions"}.get(self.active(progress)[0], "pairs")

    # --- Pre-training tasks ---

    def plan(self, split, rows, draw, vectors, progress):
        """
        Everything random about the G rows: hidden patches, hidden words, hard negatives.
        Returns ({name: (G, ...)}, {objective: number of items}).
        """
        objectives, G = self.active(progress), len(rows)
        if objectives == ("mim",):
            return self.plan_pixels(G, draw)
        plan, count = dict(words=trim(split.tokens[rows])), {}
        if "itm" in objectives:
            plan["other"], plan["wrong"] = self.draw_negatives(split.same(rows), vectors, draw)
            plan["wrong_words"] = plan["words"][plan["wrong"].clamp(min=0)]
            count["itm"] = G + int((plan["other"] >= 0).sum()) + int((plan["wrong"] >= 0).sum())
        for objective in {"mlm", "textmlm"}.intersection(objectives):
            t, start, V = split.tokenizer, self.word_start.cpu(), self.config.vocab_size
            ratio = self.recipe.mask_words
            tokens, where = mask_words(plan["words"], start, V, t.mask_id, t.special_ids, ratio, draw("words"))
            plan[f"{objective}_tokens"], plan[f"{objective}_where"] = tokens, where
            count[objective] = int(where.sum())
        if "cr" in objectives:
            every = torch.ones(G, dtype=torch.bool)
            plan["category"], plan["share_category"] = share_known(split.categories[rows], every)
            plan["subcategory"], plan["share_subcategory"] = share_known(split.subcategories[rows], every)
            count["cr"] = 1  # the shares add up to the mean
        return (plan, count) if count else ({}, {})

    def plan_pixels(self, G, draw):
        """MIM: hide units of 2 x 2 patches (one, if W is odd): as SimMIM found, raw pixels need coarse units."""
        c = self.config
        size, n = (c.image_size, c.image_size), 2 - c.side % 2
        units = draw_units(G, size, "random", self.recipe.mask_ratio, n * c.patch_size, draw("units"))
        hidden = units.repeat_interleave(n, dim=2).repeat_interleave(n, dim=3)  # (G, 1, W, W)
        return dict(hidden=hidden), dict(mim=3 * c.patch_size**2 * int(hidden.sum()))

    def draw_negatives(self, same, vectors, draw):
        """For each pair the places in the batch of a wrong picture and of a wrong caption, (G,) each, -1 for none."""
        logits = torch.zeros(same.shape)
        if vectors is not None:  # both directions by the first contrast
            image, text = vectors[:2].detach().cpu().float()
            logits = capped_scale(self.log_scale.detach().cpu()) * image @ text.T
        hard = self.recipe.hard
        other = hard_negatives(logits.T, same, hard, draw("negative pictures"))
        wrong = hard_negatives(logits, same, hard, draw("negative captions"))
        return other, wrong

    def losses(self, images, plan):
        """{objective: sum over the items of this slice}; images (B, 3, H, H), plan: this slice of `plan`'s tensors."""
        if "hidden" in plan:
            return {"mim": self.pixel_loss(images, plan["hidden"])}
        losses, text = {}, None
        if "textmlm_where" in plan:
            losses["textmlm"] = self.word_loss(None, plan["textmlm_tokens"], plan["textmlm_where"], plan["words"])
        if "mlm_where" in plan:
            losses["mlm"] = self.word_loss(images, plan["mlm_tokens"], plan["mlm_where"], plan["words"])
        if "other" in plan:
            losses["itm"], text = self.match_loss(images, plan)
        if "category" in plan:
            if text is None:
                text = self.encode(images, plan["words"])[1]
            category, subcategory = self.recognise(text)
            main = recognition_loss(category, plan["category"], plan["share_category"])
            sub = recognition_loss(subcategory, plan["subcategory"], plan["share_subcategory"])
            losses["cr"] = main + sub
        return losses

    def pixel_loss(self, images, hidden):
        """
        MIM, a departure: L1 between pixels of hidden patches in [-1, 1], as SimMIM. BEiT predicts the patch's code in
        DALL-E's codebook, which is a download.
        """
        P, chosen = self.config.patch_size, hidden.flatten(1)  # (B, W^2)
        pixels = F.unfold(2 * images.float() - 1, kernel_size=P, stride=P).transpose(1, 2)  # (B, W^2, 3 P^2)
        predicted = self.pixel_head(self.encode_masked(images, hidden)[chosen])
        return (predicted.float() - pixels[chosen]).abs().sum()

    def word_loss(self, images, tokens, where, words):
        """MLM: which of the words (B, L) stood where they are hidden; textmlm: the same without a picture."""
        _, text = self.encode(images, tokens)
        logits = self.predict_words(text, where).float()
        return F.cross_entropy(logits, words[where], reduction="sum")

    def match_loss(self, images, plan):
        """
        ITM: each pair, its caption with a wrong picture and its picture with a wrong caption, read as one batch of 3 B.
        Returns the loss and the true pairs' [text].
        """
        B = len(images)
        pictures = torch.cat([images, plan["other_images"], images])
        captions = torch.cat([plan["words"], plan["words"], plan["wrong_words"]])
        exists = torch.cat([torch.ones_like(plan["other"], dtype=torch.bool), plan["other"] >= 0, plan["wrong"] >= 0])
        matched = torch.arange(3 * B, device=images.device) < B
        text = self.encode(pictures, captions)[1]
        losses = F.cross_entropy(self.match(text).float(), matched.long(), reduction="none")
        return losses[exists].sum(), [text[0][:B]]


def project(linear, z):
    """The [CLS] of z (B, T, D) on the unit sphere of the common space, (B, E) in fp32."""
    return F.normalize(linear(z[:, 0]).float(), dim=-1)


def initialise(std, module):
    """Normal, truncated at two sigma, for matrices and input vectors; biases 0; convolution: PyTorch's default."""
    added = ("image_cls", "image_mark", "mask_token", "segment", "text_mark", "image_position", "text_position")
    for name, parameter in module.named_parameters(recurse=False):
        is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight"
        if is_matrix or name in added:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(parameter)


# ---------------------------------------------------------------------------------------------------------------------
# Masked words and hard negatives


def mask_words(tokens, word_start, vocab_size, mask_id, special_ids, ratio=0.15, generator=None):
    """
    Choose each word with probability `ratio`, at least one per caption that has any (none at ratio 0), with all its
    pieces; 80% of the words become [MASK], 10% random ordinary pieces, 10% stay. Special ids are neither chosen nor
    drawn. word_start (V,) bool: False for a piece ("##..") that continues a word. (The authors also choose among
    padding, and draw the fate of each piece by itself.)
    Returns the masked tokens and where (B, L) bool, True = to be predicted.
    """
    require(0 <= ratio <= 1, "mask ratio of words", "must lie in [0, 1]", ratio)
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[list(special_ids)] = True
    ordinary = (~special).nonzero().flatten()
    require(len(ordinary) > 0, "vocab_size", "must leave an ordinary word beside special_ids", vocab_size)

    begins = (word_start | special)[tokens]  # (B, L)
    begins[:, 0] = True
    word = begins.cumsum(dim=1) - 1  # the number of the word that a piece belongs to
    chance = torch.rand(tokens.shape, generator=generator).gather(1, word).masked_fill(special[tokens], 2)
    least = chance.amin(dim=1, keepdim=True)
    where = ((chance < ratio) | (chance == least)) & (chance < 2) & (ratio > 0)
    fate = torch.rand(tokens.shape, generator=generator).gather(1, word)
    drawn = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]
    masked = tokens.masked_fill(where & (fate < 0.8), mask_id)
    return torch.where(where & (fate >= 0.8) & (fate < 0.9), drawn, masked), where


# ---------------------------------------------------------------------------------------------------------------------
# The authors' checkpoint, and BEiT's (extras/vlmo_weights.py)

load_beit = vlmo_weights.load_beit  # (model, state dict or file) -> {their key: what became of it}


def load_official(checkpoint, **changes):
    """
    The VLMo authors' checkpoint (a state dict or its file) as a VLMo that computes what theirs computes, in eval mode;
    `model.report` says what became of each key. Every size is read from the shapes; `changes` to the configuration
    may set another image_size. What the file lacks (heads, experts of a later stage) stays fresh and is reported so.
    """
    weights = vlmo_weights.open_weights(checkpoint)
    found = vlmo_weights.read_sizes(weights, changes.get("text_reach", Config.text_reach))
    square = image_rows(found["image_size"] // found["patch_size"])
    vlmo_weights.check_index_tables(weights, square, lambda words: text_rows(words, found["text_reach"]))
    model = VLMo(Config(**found | changes))
    model.report = vlmo_weights.load_official(model, weights, found)
    return model.eval()
