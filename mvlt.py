"""
MVLT, the Masked Vision-Language Transformer in Fashion (Ji et al., Machine Intelligence Research, 2023), in one file.

Read it beside the paper: Table 1 is `Config`, Eq. 1 and 2 are `Stage`, Eq. 3 and 4 (Fig. 4) are `draw_units` and
`hide`, Eq. 5 to 8 are the losses, and Sec. 3.2 (what one training step does) is `MVLT.plan` and `MVLT.losses`.

   picture (B, 3, H, W)                                   caption (B, L) word ids
          |  hide units of (alpha P)^2 pixels                    |  hide 15% of the words
          v                                                      v  WordInput: (B, L, 768)
stage 1   n  (B, HW/4^2,  D1)   --- z = <m; n>, M1 blocks ---    m  (B, L, D1)    ->  V1, T1
stage 2   n  (B, HW/8^2,  D2)   --- z = <m; n>, M2 blocks ---    m  (B, L, D2)    ->  V2, T2
stage 3   n  (B, HW/16^2, D3)   --- z = <m; n>, M3 blocks ---    m  (B, L, D3)    ->  V3, T3
stage 4   n  (B, HW/32^2, D4)   --- z = <m; n>, M4 blocks ---    m  (B, L, D4)    ->  V4, T4
          |                                                      |
V1..V4 -> U-Net decoder -> MIR: the picture (Eq. 5)              |-- T4 at [CLS]      -> ITM: do they match? (Eq. 6)
                                                                 |                       M-CR, S-CR: categories
                                                                 '-- T4 where hidden  -> MLM: which word? (Eq. 7)

Not in the paper: two towers, trained by a contrastive loss (ITC). The same stages read a picture alone (V3, V4 -> image
tower) and a caption alone (its word embeddings, T4 -> text tower). ITM also lets both towers read a fused pair
(`match_pair`).

Letters: B pairs of a slice (the part of a batch that one forward pass reads), G pairs of the global batch, L words
(BERT's word pieces), H and W the picture's sides, P patch side, k the stage 1..4, D_k its width, M_k its depth, N its
patches (HW/P^2 in stage 1, then a quarter of the number before), R PVT's spatial reduction of keys and values (Table
1's R_k, 4 to 32, is another number: the picture's side over the map's), alpha P the side of a masking unit, Q the
number of units, r_v and r_l the shares of pixels and words that are hidden. The code counts stages from 0.
Departures from the paper and from the authors' code are named on the line where they happen; PAPER.md lists them.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from extras import foreign
from extras.runtime import Linear, quoted
from extras.tokenizer import trim


def require(condition, name, rule, value):
    """Raise a ValueError that names the setting, the rule and the value unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} {rule}, got {quoted(value)}")


def setting(default, help):
    """A field of a Config or a Recipe. `help` is the sentence that `train.py --help` prints beside its flag."""
    return field(default=default, metadata={"help": help})


def require_range(settings, names, low, high, high_included=True):
    """Each of the named float fields must lie in [low, high], or in [low, high)."""
    for name in names:
        value = getattr(settings, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = number and low <= value and (value <= high if high_included else value < high)
        require(good, name, f"must lie in [{low:g}, {high:g}{']' if high_included else ')'}", value)


def require_whole(settings, least):
    """Each named field must be a whole number, `least[name]` or more."""
    for name, bound in least.items():
        value = getattr(settings, name)
        require(type(value) is int and value >= bound, name, f"must be a whole number, {bound} or more", value)


# ---------------------------------------------------------------------------------------------------------------------
# Table 1


@dataclass(frozen=True)
class Config:
    """The shape of the network. The defaults are the paper's ("tiny"): Table 1, and PVT-Tiny where it is silent."""

    image_size: int = setting(256, "Side of the (square) picture in pixels.")
    patch_size: int = setting(4, "P: stage 1 divides the picture by P, each later stage by 2.")
    text_len: int = setting(128, "Longest caption in word pieces, [CLS] and [SEP] included.")
    vocab_size: int = setting(30522, "Number of word pieces.")
    token_dim: int = setting(768, "Width of the word input and of the text heads.")
    dims: tuple = setting((64, 128, 320, 512), "D_k, the width of each stage.")
    depths: tuple = setting((2, 2, 2, 2), "M_k, the number of blocks of each stage.")
    heads: tuple = setting((1, 2, 5, 8), "Attention heads of each stage.")
    mlp_ratios: tuple = setting((8, 8, 4, 4), "Width of the MLP's hidden layer over D_k.")
    sr_ratios: tuple = setting((8, 4, 2, 1), "R, PVT's spatial reduction: R x R patches become one key.")
    drop_path: float = setting(0.1, "Stochastic depth: rises linearly from 0 in the first block to this rate.")
    dropout: float = setting(0.1, "Dropout of the word input.")
    attend_padding: bool = setting(False, "Pad all captions to text_len and attend to it, as the authors' code does.")
    n_category: int = setting(0, "Number of main categories (M-CR); 0 leaves the head out.")
    n_subcategory: int = setting(0, "Number of sub-categories (S-CR); 0 leaves the head out.")
    embed_dim: int = setting(256, "Width of the towers' vectors, the space in which pictures and captions meet.")

    def __post_init__(self):
        for name in ("dims", "depths", "heads", "mlp_ratios", "sr_ratios"):
            value = getattr(self, name)
            if isinstance(value, list):  # from a file
                value = tuple(value)
                object.__setattr__(self, name, value)
            good = isinstance(value, tuple) and len(value) == 4 and all(type(v) is int and v > 0 for v in value)
            require(good, name, "must be four positive whole numbers", value)
        require(max(self.depths) <= 1000, "depths", "must not exceed 1000 blocks a stage", self.depths)
        require_whole(self, dict(image_size=1, patch_size=1, vocab_size=1, token_dim=1, embed_dim=1, text_len=2))
        require_whole(self, dict(n_category=0, n_subcategory=0))
        require_range(self, ("drop_path", "dropout"), 0, 1, high_included=False)
        require(type(self.attend_padding) is bool, "attend_padding", "must be True or False", self.attend_padding)
        coarsest = 8 * self.patch_size  # the pixels that one position of V4 covers, along a side
        rule = f"must be a multiple of 8 patch_size = {coarsest}"
        require(self.image_size % coarsest == 0, "image_size", rule, self.image_size)
        for k, (dim, heads, reduction) in enumerate(zip(self.dims, self.heads, self.sr_ratios)):
            require(dim % heads == 0, f"dims[{k}]", f"must be a multiple of heads[{k}] = {heads}", dim)
            rule = f"must divide the side {self.side(k)} of that stage's map"
            require(self.side(k) % reduction == 0, f"sr_ratios[{k}]", rule, reduction)

    def side(self, k):
        """The side of the map of stage k + 1, in patches."""
        return self.image_size // (self.patch_size << k)

    @classmethod
    def preset(cls, size, **changes):
        """The configuration of a named size, with changes."""
        require(size in PRESETS, "size", f"must be one of {', '.join(PRESETS)}", size)
        return cls(**PRESETS[size] | changes)


PRESETS = {
    # pico and nano are ours, for a laptop: smaller reductions than PVT's, so that at 64 px stages 1 to 3 still have 16
    # image keys (stage 4: 4)
    "pico": dict(
        dims=(32, 64, 96, 128), heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 4, 4), sr_ratios=(4, 2, 1, 1), token_dim=128,
        image_size=64, text_len=48, embed_dim=128,
    ),
    "nano": dict(
        dims=(32, 64, 160, 256), sr_ratios=(4, 2, 1, 1), token_dim=256, image_size=64, text_len=48
    ),
    "tiny": dict(),
    "small": dict(depths=(3, 4, 6, 3)),
    "medium": dict(depths=(3, 4, 18, 3)),
    "large": dict(depths=(3, 8, 27, 3)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2 and 4.1, how it is trained

# The objectives and their weights. Eq. 8: mir, itm, mlm. Ours: itc, the contrast of two towers (a weight of 1 leaves it
# too little of the gradient: EXPERIMENTS.md, "A small shop"); distil, matching learns from the towers; cr, recognition.
OBJECTIVES = {"mir": 10, "itm": 1, "mlm": 1, "itc": 10, "distil": 20, "cr": 1}
TAUGHT = 0.8  # share of the contrast's target that is the teachers', where there are some (train.py --teachers)
MASK_STYLES = ("random", "grid", "stroke", "center")
MODALITIES = ("both", "image", "text")


def parse_objectives(text, defaults):
    """"mir,itm:3" -> {"mir": its default weight, "itm": 3.0}, in the order of the text."""
    weights = {}
    for part in str(text).split(","):
        name, _, number = part.strip().partition(":")
        known = name in defaults and name not in weights
        require(known, "objectives", f"must name some of {','.join(defaults)}, each once", text)
        try:
            weights[name] = float(number) if number else float(defaults[name])
        except ValueError:
            weights[name] = math.nan
        require(0 <= weights[name] < math.inf, "objectives", f"must give {name} a weight of 0 or more", text)
    return weights


@dataclass(frozen=True)
class Recipe:
    """Objectives, masking and curriculum. The defaults are the demo's."""

    objectives: str = setting(
        "mir,itm:3,mlm,itc,cr",
        "Objectives, as name or name:weight, separated by commas: mir, itm, mlm (the paper's), itc (the towers), "
        "distil (itm learns from them), cr (recognition).",
    )
    mask_style: str = setting("random", "Where pixels are hidden: random, grid, stroke or center (Fig. 8).")
    mask_ratio: float = setting(0.5, "r_v, the hidden share of a masked picture.")
    mask_unit: int = setting(16, "alpha P, the side of a masking unit in pixels.")
    mask_pictures: float = setting(0.3, "Probability of masking a picture.")
    mask_words: float = setting(0.15, "r_l, the share of the words that are hidden.")
    unmasked_itm: bool = setting(True, "ITM reads unmasked pairs only; no: every pair, as in the authors' code.")
    itm_from: float = setting(0.1, "Train the towers alone (itc) until this share of the steps.")
    smoothing: float = setting(0.0, "Label smoothing of the contrastive loss.")
    hard_from: float = setting(1.0, "From this share of the steps on, the towers choose ITM's negatives (1: never).")
    drop_caption: float = setting(
        0.2, "Probability of dropping an unmasked, matched pair's caption, so that recognition also learns from photos."
    )
    modality: str = setting("both", "What recognition reads: both, image or text.")

    def __post_init__(self):
        chosen = set(self.weights)
        for name, choices in (("mask_style", MASK_STYLES), ("modality", MODALITIES)):
            value = getattr(self, name)
            require(value in choices, name, f"must be one of {', '.join(choices)}", value)
        require(type(self.unmasked_itm) is bool, "unmasked_itm", "must be True or False", self.unmasked_itm)
        require_whole(self, dict(mask_unit=1))
        require_range(self, ("mask_ratio", "mask_pictures", "mask_words", "hard_from", "drop_caption"), 0, 1)
        require_range(self, ("itm_from", "smoothing"), 0, 1, high_included=False)
        rule = "must be 1 without itm and itc: the towers choose the wrong captions of matching"
        good = self.hard_from == 1 or all(self.weights.get(name) for name in ("itm", "itc"))
        require(good, "hard_from", rule, self.hard_from)
        require(self.hard_from < 1 or "distil" not in chosen, "hard_from", "must be below 1 for distil", self.hard_from)
        rule = "must be both, unless cr is the only objective"
        require(self.modality == "both" or chosen == {"cr"}, "modality", rule, self.modality)
        only_masked = {"mir", "mlm"} if self.unmasked_itm else {"mir"}
        if only_masked & chosen:
            rule = f"must be above 0, so that {' and '.join(sorted(only_masked & chosen))} can read pairs"
            require(self.mask_pictures > 0, "mask_pictures", rule, self.mask_pictures)
        rule = "must be below 1, so that itm reads pairs that match, too"
        require(self.drop_caption < 1 or not {"itm", "cr"} <= chosen, "drop_caption", rule, self.drop_caption)
        only_unmasked = {"itm", "cr"} if self.unmasked_itm else {"cr"}
        if only_unmasked & chosen:
            rule = f"must be below 1, so that {' and '.join(sorted(only_unmasked & chosen))} can read pairs"
            require(self.mask_pictures < 1, "mask_pictures", rule, self.mask_pictures)

    @property
    def weights(self):
        """{objective: its weight in Eq. 8}."""
        return parse_objectives(self.objectives, OBJECTIVES)


PAPER = dict(  # Sec. 4.1; epochs, warm-up and final learning rate from the authors' code
    size="tiny", vocab_size=30522, objectives="mir,itm,mlm", mask_pictures=0.5, unmasked_itm=False, itm_from=0.0,
    drop_caption=0.0, epochs=150.0, batch_size=1200, optimizer="adamw", lr=2.5e-3, final_lr=1e-5, warmup=5 / 150,
    mirror=0.0, shift=0, zoom=0.0, workers=4, save_every=1000,
)
# ours: the demo's recipe, longer, with augmentation, averaged weights and matching that learns from the towers
PLUS = dict(
    size="pico", objectives="mir,itm:3,mlm,itc,distil,cr", hard_from=0.5, smoothing=0.1, batch_size=256, steps=1800,
    weight_decay=1.0, average=True, mirror=0.5, shift=3, zoom=0.2, save_every=200,
)
TOWERS = {**PLUS, "objectives": "itc", "itm_from": 0.0, "hard_from": 1.0, "steps": 1200}  # plus, for search alone
RECOGNISE = dict(objectives="cr", optimizer="adamw", lr=5e-4)  # Sec. 3.3: fine-tune the encoder
RECIPES = {"demo": dict(size="pico"), "paper": PAPER, "plus": PLUS, "towers": TOWERS, "recognise": RECOGNISE}


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.1, the multi-modal encoder


class WordInput(nn.Module):
    """BERT's input layer: word + position + segment 0, LayerNorm, dropout."""

    def __init__(self, vocab_size, text_len, width, dropout):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.zeros(text_len, width))
        self.segment = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.word(tokens) + self.position[: tokens.shape[1]] + self.segment
        return self.dropout(self.norm(x))  # (B, L, width)


def attend(q, k, v, seen):
    """softmax(q k^T / sqrt(d)) v over the keys that `seen` allows."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    # Explicit on the CPU: there are few keys, and a bf16 training step is up to 7 times as fast as with the fused call.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if seen is not None:
        scores += scores.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))  # in place: scores are large
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head attention with spatial reduction: all tokens are queries, the words and the reduced patches keys."""

    def __init__(self, dim, heads, reduction):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def reduce(self, patches, side):
        """SR(n) = Norm(Reshape(n, R) W), PVT: (B, N, D) -> (B, N/R^2, D)."""
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return self.norm(self.sr(grid).flatten(2).transpose(1, 2))

    def forward(self, z, L, side, seen):
        """
        z (B, L + N, D): L words, then N = side^2 patches. seen (B, 1, 1, keys) bool: the keys that may be attended to,
        None: all.
        """
        keys = z
        if self.sr is not None and side:
            keys = torch.cat([z[:, :L], self.reduce(z[:, L:], side)], dim=1)  # (B, L + N/R^2, D)
        q = self.q(z).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L + N, D/heads)
        k, v = self.kv(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L + N/R^2, D/heads)
        out = attend(q, k, v, seen)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, L + N, D)


class MLP(nn.Module):
    """
    Linear, GELU, Linear. The backward pass needs the hidden layer, 4 or 8 times as wide, before and after GELU. Only
    the first is kept; GELU is computed again.
    """

    AT_ONCE = 1 << 22  # numbers of the hidden layer computed at once on a CPU, so that they stay in its cache

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, z):
        samples = len(z) if z.is_cuda else max(1, self.AT_ONCE // (z.shape[1] * self.fc1.out_features))
        pieces = []
        for piece in z.split(samples):
            hidden = self.fc1(piece)
            pieces.append(checkpoint(self.activate, hidden, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(pieces)

    def activate(self, hidden):
        return self.fc2(F.gelu(hidden))


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples and scale up the rest to keep the expectation."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, branch):
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (keep / (1 - self.rate)).to(branch.dtype)


class Block(nn.Module):
    """A transformer encoder, pre-norm: attention, then MLP."""

    def __init__(self, dim, heads, mlp_ratio, reduction, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, z, L, side, seen):
        z = z + self.drop_path(self.attn(self.norm1(z), L, side, seen))
        return z + self.drop_path(self.mlp(self.norm2(z)))


class Stage(nn.Module):
    """One level of the pyramid: bring picture and caption to width D_k, let them attend to each other, split again."""

    def __init__(self, c, k, drop_path):
        super().__init__()
        wide = c.dims[k]
        stride = 2 if k else c.patch_size  # S_k = K_k in Table 1
        self.embed_image = nn.Conv2d(c.dims[k - 1] if k else 3, wide, stride, stride=stride)  # W_v
        self.norm_image = nn.LayerNorm(wide)
        self.position_image = nn.Parameter(torch.zeros(c.side(k) ** 2, wide))  # P_v
        self.embed_text = Linear(c.dims[k - 1] if k else c.token_dim, wide)  # W_t
        self.norm_text = nn.LayerNorm(wide)
        self.position_text = nn.Parameter(torch.zeros(c.text_len, wide))  # P_t
        self.reduction = c.sr_ratios[k]
        blocks = [Block(wide, c.heads[k], c.mlp_ratios[k], c.sr_ratios[k], rate) for rate in drop_path]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image, text, seen, recompute=False):
        """
        V_{k-1} (in stage 1 the picture) and T_{k-1}, (B, L, D_{k-1}); either may be None. seen (B, L) bool: the words
        that are not padding, None: all. Returns V_k (B, D_k, side, side) and T_k (B, L, D_k).
        """
        z, L, side = [], 0, 0
        if text is not None:
            L = text.shape[1]
            m = self.norm_text(self.embed_text(text)) + self.position_text[:L]  # Eq. 1; LayerNorm: authors' code
            z.append(m)
        if image is not None:
            patches = self.embed_image(image)  # (B, D_k, side, side)
            side = patches.shape[2]
            n = self.norm_image(patches.flatten(2).transpose(1, 2)) + self.position_image  # Eq. 2, likewise
            z.append(n)
        z = torch.cat(z, dim=1)  # z = <m; n> (B, L + N, D_k)
        if seen is not None:
            seen = F.pad(seen, (0, (side // self.reduction) ** 2), value=True)[:, None, None]

        for block in self.blocks:
            if recompute:
                z = checkpoint(block, z, L, side, seen, use_reentrant=False)
            else:
                z = block(z, L, side, seen)

        text = z[:, :L] if L else None
        image = z[:, L:].transpose(1, 2).unflatten(2, (side, side)) if side else None  # (B, D_k, side, side)
        return image, text


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2 and 3.3, the heads


class Up(nn.Module):
    """One level of the U-Net's way up: double the map, concatenate the skip connection, convolve twice."""

    def __init__(self, below, skip):
        super().__init__()
        self.grow = nn.ConvTranspose2d(below, skip, 2, stride=2)
        self.join = nn.Conv2d(2 * skip, skip, 3, padding=1)
        self.refine = nn.Conv2d(skip, skip, 3, padding=1)
        groups = math.gcd(8, skip)  # GroupNorm: a picture does not depend on its batch
        self.norm1, self.norm2 = nn.GroupNorm(groups, skip), nn.GroupNorm(groups, skip)

    def forward(self, x, skip):
        x = torch.cat([self.grow(x), skip], dim=1)
        x = F.gelu(self.norm1(self.join(x)))
        return F.gelu(self.norm2(self.refine(x)))


class Decoder(nn.Module):
    """F_MIR, a four-level U-Net decoder from V1..V4 to pixels."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.ModuleList(Up(c.dims[k + 1], c.dims[k]) for k in (2, 1, 0))  # 1/32 -> 1/16 -> 1/8 -> 1/4
        self.pixels = nn.Conv2d(c.dims[0], 3 * c.patch_size**2, 3, padding=1)  # each position paints its P x P pixels
        self.patch_size = c.patch_size

    def forward(self, visual):
        x = visual[3]
        for up, skip in zip(self.up, (visual[2], visual[1], visual[0])):
            x = up(x, skip)
        return F.pixel_shuffle(self.pixels(x), self.patch_size).float().sigmoid()  # (B, 3, H, W) in [0, 1]


class TextHead(nn.Module):
    """The authors' head: Linear to the word width, LayerNorm, then a classifier."""

    def __init__(self, c, classes):
        super().__init__()
        self.embed = nn.Linear(c.dims[3], c.token_dim)
        self.norm = nn.LayerNorm(c.token_dim)
        self.classify = nn.Linear(c.token_dim, classes)

    def forward(self, t):
        return self.classify(self.norm(self.embed(t)))


class WordHead(nn.Module):
    """MLM: Linear and LayerNorm as in TextHead, BERT's transform, then the tied word embedding plus a bias."""

    def __init__(self, c):
        super().__init__()
        self.embed = nn.Linear(c.dims[3], c.token_dim)
        self.norm = nn.LayerNorm(c.token_dim)
        self.dense = nn.Linear(c.token_dim, c.token_dim)
        self.dense_norm = nn.LayerNorm(c.token_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, t, word_weight):
        t = self.dense_norm(F.gelu(self.dense(self.norm(self.embed(t)))))
        logits = word_weight @ t.mT  # (vocabulary, n); in this order both gradients of the tied table share a buffer
        return logits.mT + self.bias


class Tower(nn.Module):
    """LayerNorm and a projection to the unit sphere on which pictures and captions meet (not in the paper)."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, x):
        return F.normalize(self.project(self.norm(x)).float(), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole

# Parts of the names of the parameters that only a picture reaches: recognition of captions alone freezes them
READS_PICTURES = (".embed_image", ".norm_image", ".position_image", ".attn.sr", ".attn.norm")


class MVLT(nn.Module):
    """`vocabulary` (words in id order) and `labels` (class names in id order) travel with the weights."""

    kind = "mvlt"
    ends = ("stages.0.embed_image", "decoder.pixels", ".classify")  # layers that read pixels or give an answer
    heads = {  # objective -> prefixes of the parameters that train only with it
        "mir": ("decoder.",),
        "itm": ("match_head.",),
        "mlm": ("word_head.",),
        "itc": ("image_tower.", "text_tower.", "log_scale"),
        "cr": ("category_head.", "subcategory_head."),
    }

    def __init__(self, config, recipe=None):
        super().__init__()
        self.config = c = config
        self.recipe = recipe or Recipe()
        self.vocabulary, self.labels = [], {}
        self.recompute = False  # True: recompute activations in the backward pass (less memory, a third more work)
        blocks = sum(c.depths)
        rates = iter(c.drop_path * i / max(1, blocks - 1) for i in range(blocks))
        self.words = WordInput(c.vocab_size, c.text_len, c.token_dim, c.dropout)
        self.stages = nn.ModuleList(Stage(c, k, [next(rates) for _ in range(c.depths[k])]) for k in range(4))
        self.decoder = Decoder(c)
        self.match_head = TextHead(c, 2)
        self.word_head = WordHead(c)
        self.category_head = TextHead(c, c.n_category) if c.n_category else None
        self.subcategory_head = TextHead(c, c.n_subcategory) if c.n_subcategory else None
        self.image_tower = Tower(sum(min(4, c.side(k)) ** 2 * c.dims[k] for k in (2, 3)), c.embed_dim)
        self.text_tower = Tower(c.token_dim + c.dims[3], c.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the learnt temperature, as in CLIP
        self.apply(initialise)
        centre_pixels(self.stages[0].embed_image)

    # --- The network (Sec. 3.1 to 3.3) ---

    def encode(self, images, tokens):
        """
        images (B, 3, H, W) floats in [0, 1]; tokens (B, L) int64, 0 = padding; either may be None.
        Returns visual [V1..V4], maps (B, D_k, H_k, W_k), and text [T1..T4], (B, L, D_k); [] for an absent side.
        """
        c, seen, text = self.config, None, None
        require(images is not None or tokens is not None, "encode", "needs images or tokens", None)
        if images is not None:
            rule = f"must be (B, 3, {c.image_size}, {c.image_size})"
            require(images.shape[1:] == (3, c.image_size, c.image_size), "images", rule, tuple(images.shape))
        if tokens is not None:
            good = tokens.ndim == 2 and 0 < tokens.shape[1] <= c.text_len
            require(good, "tokens", f"must be (B, L) with L in 1..{c.text_len}", tuple(tokens.shape))
            length = tokens.shape[1]
            if c.attend_padding:  # the authors' code attends to padding, and always reads text_len words
                tokens = F.pad(tokens, (0, c.text_len - length))
            else:
                seen = tokens != 0
                seen[:, 0] = True  # [CLS], so that even an empty caption leaves a key
            text = self.words(tokens)
        image, visual, texts = images, [], []
        for stage in self.stages:
            image, text = stage(image, text, seen, self.recompute)
            visual.append(image)
            texts.append(text)
        visual = visual if images is not None else []
        texts = [text[:, :length] for text in texts] if tokens is not None else []
        return visual, texts

    def reconstruct(self, visual):
        """MIR: the picture from its four maps, (B, 3, H, W) in [0, 1]."""
        return self.decoder(visual)

    def match(self, text):
        """ITM: (B, 2) logits from [CLS] of T4; 0 = mismatch, 1 = match."""
        return self.match_head(text[3][:, 0])

    def predict_words(self, text, where):
        """MLM: where (B, L) bool -> (where.sum(), vocabulary) logits, computed only there."""
        return self.word_head(text[3][where], self.words.word.weight)

    def recognise(self, text):
        """M-CR and S-CR, two heads on [CLS] of T4. A photo without text is read with the empty caption [CLS] [SEP]."""
        classes = (self.config.n_category, self.config.n_subcategory)
        require(all(classes), "recognise", "needs n_category and n_subcategory above 0", classes)
        return self.category_head(text[3][:, 0]), self.subcategory_head(text[3][:, 0])

    # --- Two towers (not in the paper): the same encoder reads a picture alone and a caption alone ---

    def places(self, visual):
        """What the image tower reads: V3 and V4, each as at most 4 x 4 normalised places, in one vector a picture."""
        parts = []
        for v in visual[2:]:
            v = F.adaptive_avg_pool2d(v, min(4, v.shape[2])).permute(0, 2, 3, 1)  # (B, h, h, D_k)
            parts.append(F.layer_norm(v, v.shape[3:]).flatten(1))
        return torch.cat(parts, dim=1)

    def means(self, text, tokens):
        """What the text tower reads: the means of the word embeddings and of T4, each normalised, in one vector."""
        real = (tokens != 0).unsqueeze(2)  # (B, L, 1)
        parts = []
        for t in (self.words.word(tokens), text[3]):
            mean = (t * real).sum(1) / real.sum(1).clamp(min=1)  # without the padding
            parts.append(F.layer_norm(mean, mean.shape[1:]))
        return torch.cat(parts, dim=1)

    def image_vector(self, visual):
        """The image tower: unit vectors (B, embed_dim)."""
        return self.image_tower(self.places(visual))

    def text_vector(self, text, tokens):
        """The text tower: unit vectors (B, embed_dim)."""
        return self.text_tower(self.means(text, tokens))

    def embed_images(self, images):
        """The vectors (B, embed_dim) of pictures that are read alone."""
        visual, _ = self.encode(images, None)
        return self.image_vector(visual)

    def embed_texts(self, tokens):
        """The vectors (B, embed_dim) of captions that are read alone."""
        _, text = self.encode(None, tokens)
        return self.text_vector(text, tokens)

    def pair_vectors(self, visual, text, tokens):
        """The towers' vectors (2, B, embed_dim) of pairs that were read together."""
        return torch.stack([self.image_vector(visual), self.text_vector(text, tokens)])

    def match_pair(self, visual, text, tokens):
        """
        ITM of pairs that were read together, (B, 2) logits. With the objective itc the towers also read the fused maps
        and words, and their two vectors' similarity, scaled as in the contrast, is added to the logit of a match: ITM
        is better than a guess as soon as the towers are.
        """
        logits = self.match(text)
        if "itc" in self.recipe.weights:
            image, caption = self.pair_vectors(visual, text, tokens)
            similarity = capped_scale(self.log_scale.detach()) * (image * caption).sum(1, keepdim=True)  # (B, 1)
            logits = logits.float() + F.pad(similarity, (1, 0))
        return logits

    # --- What the scripts ask of a model ---

    def score(self, images, tokens):
        """Match - mismatch logit, (B,) in fp32: above 0 picture and caption belong together."""
        visual, text = self.encode(images, tokens)
        with torch.autocast(images.device.type, enabled=False):  # in bf16 close scores would tie
            logits = self.match_pair([v.float() for v in visual], [t.float() for t in text], tokens)
        return logits[:, 1] - logits[:, 0]

    def embed(self, images, tokens):
        """Both towers' unit vectors, (2, B, embed_dim)."""
        return torch.stack([self.embed_images(images), self.embed_texts(tokens)])

    def contrast(self, vectors, same, taught=None):
        """ITC over all G pairs: vectors (2, G, embed_dim), same (G, G); taught (G, G): similarities to imitate."""
        smoothing = self.recipe.smoothing if self.training else 0.0
        return itc_loss(vectors[0], vectors[1], self.log_scale, same, smoothing, taught)

    def classify(self, images, tokens):
        """Logits of main and sub-category, (B, n_category) and (B, n_subcategory)."""
        _, text = self.encode(images, tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.recognise([t.float() for t in text])

    def rebuild(self, images, tokens):
        """The pictures (B, 3, H, W) in [0, 1] from what is left of them and their captions."""
        visual, _ = self.encode(images, tokens)
        return self.reconstruct(visual)

    # --- One training step (Sec. 3.2) ---

    def active(self, progress):
        """The objectives that train at this share of the run: the towers alone first, then all, distil last."""
        objectives = tuple(self.recipe.weights)
        if "itc" in objectives and progress < self.recipe.itm_from:
            return ("itc",)
        return tuple(name for name in objectives if name != "distil" or progress >= self.recipe.hard_from)

    def trained(self, progress):
        """
        The names of the parameters that an active objective uses. The loop freezes the others.
        """
        unused = []
        for objective, prefixes in self.heads.items():
            if objective not in self.active(progress):
                unused += prefixes
        names = {name for name, _ in self.named_parameters() if not name.startswith(tuple(unused))}
        if self.recipe.modality == "text":
            names = {name for name in names if not any(part in name for part in READS_PICTURES)}
        return names

    def reads(self, progress):
        """Every objective reads pairs."""
        return "pairs"

    def plan(self, split, rows, draw, vectors, progress):
        """
        Everything random about the G pairs `rows` of a split: which captions are wrong, which pixels and words are
        hidden, and which pairs each objective counts. draw(what): the generator of one draw. vectors (2, G, embed_dim):
        the towers', None without itc. Returns ({name: (G, ...)}, {objective: number of items}).
        """
        r, G = self.recipe, len(rows)
        objectives = [name for name in self.active(progress) if name != "itc"]
        if not objectives:
            return {}, {}
        read_masked = {"mir", "mlm"} if r.unmasked_itm else {"mir", "mlm", "itm"}
        masked = torch.rand(G, generator=draw("hide")) < r.mask_pictures  # paper: always; authors: every other batch
        masked = masked & bool(read_masked & set(objectives))  # no pair is masked that no objective would read
        matched = torch.ones(G, dtype=torch.bool)
        if "itm" in objectives:
            matched = torch.randperm(G, generator=draw("match")) % 2 == 0  # half of the pairs get a wrong caption
        if r.unmasked_itm:
            matched = matched | masked  # a masked pair is for rebuilding, and so keeps its own caption
        log_lift = torch.zeros(G)
        hard = vectors is not None and r.hard_from < 1 and progress >= r.hard_from
        if hard:
            vectors = vectors.cpu().float()
            place, log_lift = self.choose_captions(vectors, split.same(rows), matched, draw)
            matched = place == torch.arange(G)
            captions = rows[place]
        elif matched.all():
            captions = rows
        else:
            captions = torch.where(matched, rows, split.negatives(rows, draw("negatives")))
        words = split.tokens[captions]  # (G, L)

        no_caption = torch.full((G,), r.modality == "image")
        if "cr" in objectives and r.modality == "both":
            no_caption = matched & ~masked & (torch.rand(G, generator=draw("bare")) < r.drop_caption)
        words = trim(torch.where(no_caption[:, None], empty_captions(split.tokenizer, words), words))

        ratio = r.mask_words if "mlm" in objectives else 0.0
        t, V = split.tokenizer, self.config.vocab_size
        tokens, where = mask_tokens(words, V, t.mask_id, t.special_ids, ratio, draw("words"))
        words_masked = masked if r.unmasked_itm else torch.ones(G, dtype=torch.bool)
        tokens = torch.where(words_masked[:, None], tokens, words)
        size = (self.config.image_size, self.config.image_size)
        units = draw_units(G, size, r.mask_style, r.mask_ratio, r.mask_unit, draw("units"))

        rebuild = matched & masked  # MIR: true pairs with hidden pixels (authors: wrong pairs, too)
        predict = where & (matched & words_masked)[:, None]  # MLM: hidden words of true pairs (authors: likewise)
        judge = ~no_caption & ~(masked & r.unmasked_itm)  # ITM: with unmasked_itm, pairs as they come at test time
        name = matched & ~masked  # recognition: true pairs whose picture is whole
        category, share_category = share_known(split.categories[rows], name)
        subcategory, share_subcategory = share_known(split.subcategories[rows], name)
        plan = dict(
            tokens=tokens, words=words, units=units & masked[:, None, None, None], matched=matched, rebuild=rebuild,
            predict=predict, judge=judge, log_lift=log_lift, category=category, share_category=share_category,
            subcategory=subcategory, share_subcategory=share_subcategory,
        )
        if "distil" in objectives and hard:
            plan["alone"] = torch.stack([vectors[0], vectors[1, place]], dim=1)  # (G, 2, embed_dim)
        count = dict(mir=rebuild.sum(), mlm=predict.sum(), itm=judge.sum(), distil=judge.sum(), cr=1)
        return plan, {objective: int(count[objective]) for objective in objectives}

    def choose_captions(self, vectors, same, matched, draw):
        """
        For each of G pairs the place in the batch of the caption that it reads: its own where it is matched (or the
        batch has no wrong one), else a wrong one, drawn in proportion to how likely the towers find it, as in ALBEF.
        Also log_lift (G,), the logarithm of how many times as likely as by chance such a draw takes that caption. ITM's
        loss reads the logit less log_lift (noise-contrastive estimation), so that the logit itself goes on to compare
        with captions drawn evenly.
        """
        images, texts = vectors
        logits = capped_scale(self.log_scale.detach().cpu()) * images @ texts.T
        wrong = hard_negatives(logits, same, 1.0, draw("negatives"))
        place = torch.where(matched | (wrong < 0), torch.arange(len(same)), wrong)
        by_chance = logits.masked_fill(same, float("-inf")).logsumexp(dim=1) - (~same).sum(dim=1).log()
        log_lift = logits.gather(1, place[:, None])[:, 0] - by_chance
        return place, log_lift.masked_fill(wrong < 0, 0.0)

    def losses(self, images, plan):
        """{objective: sum over the items of this slice}; images (B, 3, H, W), plan: this slice of `plan`'s tensors."""
        objectives, losses = self.recipe.weights, {}
        shown, _ = hide(images, plan["units"])
        visual, text = self.encode(None if self.recipe.modality == "text" else shown, plan["tokens"])
        rebuild, judge, predict = plan["rebuild"], plan["judge"], plan["predict"]
        # The losses of Eq. 5 to 7 are means; times the number of their items they are sums, as the loop needs them.
        if "mir" in objectives and rebuild.any():  # pixel_shuffle has no gradient for an empty batch
            rebuilt = self.reconstruct([v[rebuild] for v in visual])
            losses["mir"] = rebuild.sum() * mir_loss(rebuilt, images[rebuild])
        if "itm" in objectives:
            logits = self.match_pair(visual, text, plan["tokens"])
            logits = logits - F.pad(plan["log_lift"][:, None], (1, 0))  # what the draw of captions accounts for
            losses["itm"] = judge.sum() * itm_loss(logits[judge], plan["matched"][judge])
        if "alone" in plan:
            fused = self.pair_vectors(visual, text, plan["tokens"])
            losses["distil"] = distil_loss(fused[:, judge], plan["alone"][judge].transpose(0, 1))
        if "mlm" in objectives:
            losses["mlm"] = predict.sum() * mlm_loss(self.predict_words(text, predict), plan["words"][predict])
        if "cr" in objectives:
            category, subcategory = self.recognise(text)
            main = recognition_loss(category, plan["category"], plan["share_category"])  # M-CR
            sub = recognition_loss(subcategory, plan["subcategory"], plan["share_subcategory"])  # S-CR
            losses["cr"] = main + sub
        return losses


def hard_negatives(logits, same, hard, generator):
    """
    One negative for each row of logits (G, G): a column that same (G, G) does not mark, (G,) int64, or -1 if there is
    none. A share `hard` of the rows draws in proportion to exp(logits), the others uniformly.
    """
    easy = torch.rand(len(logits), generator=generator) >= hard
    none = same.all(dim=1)
    chances = logits.nan_to_num().masked_fill(easy[:, None], 0.0)
    chances = chances.masked_fill(same & ~none[:, None], float("-inf")).softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].masked_fill(none, -1)


def empty_captions(tokenizer, words):
    """[CLS] [SEP] and padding, for as many captions as `words` (G, L) holds."""
    empty = torch.zeros_like(words)
    empty[:, :2] = torch.tensor(tokenizer.encode(""))
    return empty


def initialise(module):
    """Normal of 0.02, cut at two sigma, for Linear, embeddings and positions; biases 0; convolutions as they are."""
    for name, parameter in module.named_parameters(recurse=False):
        is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight"
        if is_matrix or name.startswith(("position", "segment")):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(parameter)


@torch.no_grad()
def centre_pixels(embed_image):
    """Fresh weights see a pixel x as 4 (x - 1/2); otherwise the LayerNorm after Eq. 2 at first hides the brightness."""
    embed_image.weight *= 4
    embed_image.bias -= embed_image.weight.sum((1, 2, 3)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Masking: Eq. 3 and 4, Fig. 4 (the unit), Fig. 8 (the styles), and the words

ZERO = 1e-6  # what hidden pixels are filled with (the paper's footnote 2)


def draw_units(batch, size, style="random", ratio=0.5, unit=16, generator=None):
    """
    Phi of Eq. 4: which parts of each picture of size (H, W) to hide. Returns (batch, 1, h, w) bool, True = hidden: one
    entry per unit of unit x unit pixels (alpha P; h = H/unit) for "random" and "grid", one per pixel for "stroke" (a
    brush `unit` wide) and "center".
    """
    require(style in MASK_STYLES, "mask style", f"must be one of {', '.join(MASK_STYLES)}", style)
    require(0 <= ratio <= 1, "mask ratio", "must lie in [0, 1]", ratio)
    H, W = size
    divides = unit >= 1 and H % unit == 0 and W % unit == 0
    require(divides, "mask unit", f"must divide the picture's sides {H} and {W}", unit)
    if style == "random":
        return random_units(batch, H // unit, W // unit, ratio, generator)
    if style == "grid":
        return grid_units(H // unit, W // unit, ratio).expand(batch, 1, -1, -1)
    if style == "center":
        return center_square(H, W, ratio).expand(batch, 1, -1, -1)
    return torch.stack([brush_strokes(H, W, ratio, unit, generator) for _ in range(batch)])[:, None]


def random_units(batch, h, w, ratio, generator=None):
    """Exactly round(ratio * Q) of the Q = h w units of each picture, every choice equally likely."""
    Q = h * w
    order = torch.rand(batch, Q, generator=generator).argsort(dim=1)  # a random order per picture, as in MAE
    return (order < round(ratio * Q)).view(batch, 1, h, w)


def grid_units(h, w, ratio):
    """In each row n of every m units, shifted by one from row to row: the n/m nearest to the ratio."""
    diagonal = torch.arange(h)[:, None] + torch.arange(w)
    lattices = (diagonal % m < n for m in range(1, max(h, w) + 1) for n in range(m + 1))
    return min(lattices, key=lambda hidden: abs(hidden.float().mean().item() - ratio))


def center_square(H, W, ratio):
    """One centred rectangle of the picture's own shape with that share of its area."""
    h, w = round(H * ratio**0.5), round(W * ratio**0.5)
    hidden = torch.zeros(H, W, dtype=torch.bool)
    hidden[(H - h) // 2 : (H - h) // 2 + h, (W - w) // 2 : (W - w) // 2 + w] = True
    return hidden


def brush_strokes(H, W, ratio, width, generator=None):
    """
    Straight strokes of a round brush, each begun on a visible pixel; the last stroke ends where the ratio is reached,
    so that round(ratio H W) pixels are hidden. (H, W) bool.
    """
    y, x = torch.arange(H)[:, None].float(), torch.arange(W).float()
    hidden = torch.zeros(H, W, dtype=torch.bool)
    while (missing := round(ratio * H * W) - int(hidden.sum())) > 0:
        bare = (~hidden).flatten().nonzero().flatten()
        start = bare[torch.randint(len(bare), (), generator=generator)]
        angle, length = torch.rand(2, generator=generator) * torch.tensor([2 * math.pi, max(H, W) / 2])
        dy, dx = y - start // W, x - start % W  # from the stroke's start to each pixel
        along = (dy * angle.sin() + dx * angle.cos()).clamp(min=0).minimum(length)
        stroke = (dy - along * angle.sin()) ** 2 + (dx - along * angle.cos()) ** 2 <= (width / 2) ** 2
        order = along.masked_fill(~stroke | hidden, math.inf).flatten().argsort(stable=True)  # as the brush covers them
        hidden.view(-1)[order[: min(missing, int((stroke & ~hidden).sum()))]] = True
    return hidden


def hide(images, units):
    """Eq. 3: fill the units (B, 1, h, w). Returns the masked pictures and hidden (B, 1, H, W) bool, True = hidden."""
    rows, columns = images.shape[2] // units.shape[2], images.shape[3] // units.shape[3]
    hidden = units.to(images.device).repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)
    return images.masked_fill(hidden, ZERO), hidden


def mask_images(images, style="random", ratio=0.5, unit=16, generator=None):
    """Hide parts of pictures (B, 3, H, W). Returns the masked pictures and hidden (B, 1, H, W) bool, True = hidden."""
    return hide(images, draw_units(len(images), images.shape[2:], style, ratio, unit, generator))


def mask_tokens(tokens, vocab_size, mask_id, special_ids, ratio=0.15, generator=None):
    """
    Choose each ordinary word with probability `ratio`, at least one per caption that has any (none at ratio 0); of
    those 80% become [MASK], 10% a random ordinary word, 10% stay. Special ids are neither chosen nor drawn.
    Returns the masked tokens and where (B, L) bool, True = to be predicted.
    """
    require(0 <= ratio <= 1, "mask ratio of words", "must lie in [0, 1]", ratio)
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[list(special_ids)] = True
    ordinary = (~special).nonzero().flatten()
    require(len(ordinary) > 0, "vocab_size", "must leave an ordinary word beside special_ids", vocab_size)

    chance = torch.rand(tokens.shape, generator=generator).masked_fill(special[tokens.cpu()], 2)
    least = chance.amin(dim=1, keepdim=True)
    where = ((chance < ratio) | (chance == least)) & (chance < 2) & (ratio > 0)
    fate = torch.rand(tokens.shape, generator=generator)  # its own draw: the fate must not depend on the choice
    drawn = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]

    where, fate, drawn = where.to(tokens.device), fate.to(tokens.device), drawn.to(tokens.device)
    masked = tokens.masked_fill(where & (fate < 0.8), mask_id)
    return torch.where(where & (fate >= 0.8) & (fate < 0.9), drawn, masked), where


# ---------------------------------------------------------------------------------------------------------------------
# Losses: Eq. 5 to 7, each a mean over what is there to predict (and 0, with gradient 0, where nothing is); ours are
# sums. Eq. 8, their weighted sum, is `Recipe.weights` and the training loop.


def mir_loss(rebuilt, images):
    """Eq. 5, smooth L1 over the whole picture (with the absolute value that the paper's condition leaves out)."""
    error = (rebuilt.float() - images.float()).abs()
    return mean_or_zero(torch.where(error < 1, 0.5 * error**2, error - 0.5))


def itm_loss(logits, matched):
    """Eq. 6: logits (B, 2), matched (B,) bool or 0/1."""
    return cross_entropy(logits, matched.long())


def mlm_loss(logits, words):
    """Eq. 7: logits (n, vocabulary) at the n hidden positions, words (n,) what stood there."""
    return cross_entropy(logits, words)


def capped_scale(log_scale):
    """What the contrast multiplies similarities by: exp(log_scale), learnt, at most 100 as in CLIP."""
    return log_scale.float().clamp(max=math.log(100)).exp()


def itc_loss(image_vectors, text_vectors, log_scale, same, smoothing=0.0, taught=None):
    """
    Image-text contrastive loss (not in the paper): InfoNCE both ways between unit vectors (G, embed_dim).
    same (G, G) bool: True where two entries share their product, caption or picture; off the diagonal these are left
    out of the softmax. smoothing: the share of the target that is spread evenly over an entry's pair and its negatives.
    taught (G, G): the scaled similarities, picture x caption, of the teachers; their softmax is TAUGHT of the target.
    """
    scale = capped_scale(log_scale)
    with torch.autocast(image_vectors.device.type, enabled=False):  # fp32: near 14, bf16 has steps of 0.06
        logits = scale * image_vectors.float() @ text_vectors.float().T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    allowed = own | ~same
    target = (1 - smoothing) * own + smoothing * allowed / allowed.sum(dim=1, keepdim=True)  # rows add up to 1

    def log_shares(logits):
        return logits.masked_fill(~allowed, float("-inf")).log_softmax(dim=1)

    def one_way(logits, taught):
        wanted = target
        if taught is not None:
            wanted = (1 - TAUGHT) * target + TAUGHT * log_shares(taught).exp()
        return -(wanted * log_shares(logits).masked_fill(~allowed, 0)).sum(dim=1).mean()

    back = None if taught is None else taught.T
    return (one_way(logits, taught) + one_way(logits.T, back)) / 2


def distil_loss(fused, alone):
    """
    Distillation (not in the paper), a sum over n pairs of 1 - cosine(fused, alone), the mean of picture and caption:
    fused (2, n, embed_dim) are their vectors when they are read together, alone those of each read by itself.
    """
    return (1 - (fused * alone).sum(2)).mean(0).sum()


def share_known(classes, counted):
    """
    M-CR's and S-CR's losses are means over the pairs whose class is known; -1 = unknown. Returns classes (G,) and each
    pair's share (G,) of the mean, 0 where it does not count.
    """
    known = counted & (classes >= 0)
    return classes.clamp(min=0), known.float() / known.sum().clamp(min=1)


def recognition_loss(logits, classes, share):
    """M-CR or S-CR: the sum over a slice of share (B,) times cross-entropy."""
    return (share * F.cross_entropy(logits.float(), classes, reduction="none")).sum()


def cross_entropy(logits, right):
    """logits (n, classes), right (n,) class ids."""
    return mean_or_zero(F.cross_entropy(logits.float(), right, reduction="none"))


def mean_or_zero(losses):
    return losses.mean() if losses.numel() else losses.sum()


# ---------------------------------------------------------------------------------------------------------------------
# The authors' checkpoint


def load_official(checkpoint, image_size=256, **changes):
    """
    The MVLT authors' checkpoint (a state dict, {"model": state dict}, or its file) as an MVLT that computes what theirs
    computes; `model.report` says what became of each key. The decoder and the towers are not in it and stay as
    initialised. The configuration is "tiny", as theirs, with the recognition heads that are there; `changes` overrides.
    """
    weights = foreign.open_state_dict(checkpoint)
    found = dict(image_size=image_size, attend_padding=True)
    found["n_category"] = len(weights.get("sup_cls_head.linear.bias", ()))
    found["n_subcategory"] = len(weights.get("sub_cls_head.linear.bias", ()))
    model = MVLT(Config(**found | changes))
    model.report = foreign.load_mvlt(model, weights)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# python mvlt.py: the shapes as a table. Nothing is computed: tensors on the "meta" device have shapes only.


def multiply_adds(part, *inputs):
    """What a part of the model returns, and its millions of multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        outputs = part(*inputs)
    return outputs, counter.get_total_flops() / 2e6


def millions(part):
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in part.parameters()) / 1e6


def table(size):
    """One size, part by part: (part, its map, its words, blocks, M parameters, M multiply-adds for one pair)."""
    c = Config.preset(size)
    shape = lambda x: " x ".join(map(str, x.shape[1:]))
    with torch.device("meta"):
        model, image = MVLT(c).eval(), torch.empty(1, 3, c.image_size, c.image_size)
        tokens = torch.ones(1, c.text_len, dtype=torch.long)
        text, work = multiply_adds(model.words, tokens)
        rows, visual = [("word input", "", shape(text), "", millions(model.words), work)], []
        for k, stage in enumerate(model.stages):
            (image, text), work = multiply_adds(stage, image, text, None)
            visual.append(image)
            rows.append((f"stage {k + 1}", shape(image), shape(text), c.depths[k], millions(stage), work))
        hidden = text[:, : round(0.15 * c.text_len)]
        for name, part, *inputs in [
            ("MIR decoder", model.decoder, visual),
            ("ITM head", model.match_head, text[:, 0]),
            ("MLM head", model.word_head, hidden, model.words.word.weight),
            ("image tower", model.image_tower, model.places(visual)),
            ("text tower", model.text_tower, model.means([text] * 4, tokens)),
        ]:
            rows.append((name, "", "", "", millions(part), multiply_adds(part, *inputs)[1]))
    return rows + [("in all", "", "", "", millions(model), sum(row[-1] for row in rows))]


def print_tables():
    for size in PRESETS:
        header = (size, "map (D, H, W)", "words (L, D)", "blocks", "M parameters", "M multiply-adds")
        print("\n{:12} {:>16} {:>14} {:>7} {:>13} {:>16}".format(*header))
        for row in table(size):
            print("{:12} {:>16} {:>14} {:>7} {:13.2f} {:16.0f}".format(*row))


if __name__ == "__main__":
    print_tables()
