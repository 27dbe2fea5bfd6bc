"""
MVLT, the Masked Vision-Language Transformer in Fashion (Ji et al., Machine Intelligence Research, 2023), in one file.

Read it beside the paper: Table 1 is `Config`, Eq. 1 and 2 are `Stage`, Eq. 3 and 4 (Fig. 4) are `draw_units` and `hide`, Eq. 5 to 8 are the losses.

       picture (B, 3, H, W)                                   caption (B, L) word ids
              |  hide units of (alpha P)^2 pixels                    |  hide 15% of the words
              v                                                      v  WordInput: (B, L, 768)
    stage 1   n  (B, HW/4^2,  D1)   --- z = <m; n>, M1 blocks ---    m  (B, L, D1)    ->  V1, T1
    stage 2   n  (B, HW/8^2,  D2)   --- z = <m; n>, M2 blocks ---    m  (B, L, D2)    ->  V2, T2
    stage 3   n  (B, HW/16^2, D3)   --- z = <m; n>, M3 blocks ---    m  (B, L, D3)    ->  V3, T3
    stage 4   n  (B, HW/32^2, D4)   --- z = <m; n>, M4 blocks ---    m  (B, L, D4)    ->  V4, T4
              |                                                      |
    V1..V4 -> U-Net decoder -> MIR: the whole picture (Eq. 5)        |-- T4 at [CLS]       -> ITM: do they match? (Eq. 6); M-CR, S-CR: categories
    V4 -> picture tower --- ITC (not in the paper) ---               |-- T4 where hidden   -> MLM: which word was it? (Eq. 7)
                                                                     '-- mean of T4        -> caption tower

Letters: B batch, L words, H and W the picture's sides, P patch side, N = HW/P^2 patches, k the stage 1..4, D_k its width, M_k its depth,
R PVT's reduction of keys and values (Table 1's R_k, 4 to 32, is another: the picture's side over the map's), alpha P the side of a masking
unit, Q the number of units, r_v and r_l the ratios hidden. The code counts stages from 0.
Departures from the paper and from the authors' code are said on the line where they happen; the README lists them.
"""
import argparse
import math
import os
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ---------------------------------------------------------------------------------------------------------------------------------------
# Table 1


@dataclass(frozen=True)
class Config:
    """Everything that decides the model's shape. The defaults are the paper's ("tiny"): Table 1, and PVT-Tiny where Table 1 is silent."""

    image_size: int = 256
    patch_size: int = 4  # P; stage 1 divides the picture by P, each later stage by 2
    text_len: int = 128  # the longest caption; [CLS] and [SEP] included, so 2 or more
    vocab_size: int = 30522
    token_dim: int = 768  # width of the word input and of the text heads
    dims: tuple = (64, 128, 320, 512)  # D_k
    depths: tuple = (2, 2, 2, 2)  # M_k
    heads: tuple = (1, 2, 5, 8)
    mlp_ratios: tuple = (8, 8, 4, 4)
    sr_ratios: tuple = (8, 4, 2, 1)  # R, PVT's: keys and values see R x R patches as one
    drop_path: float = 0.1  # of the last block; the first has 0, those between a share in proportion
    dropout: float = 0.1  # of the word input
    attend_padding: bool = False  # True: as the authors' code does, see `load_official`
    n_category: int = 0  # M-CR, the main categories (0: no such head)
    n_subcategory: int = 0  # S-CR
    embed_dim: int = 256  # the space in which the two towers meet

    def __post_init__(self):
        for name in ("dims", "depths", "heads", "mlp_ratios", "sr_ratios"):
            value = getattr(self, name)
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, name, value := tuple(value))
            good = isinstance(value, tuple) and len(value) == 4 and all(type(v) is int and v > 0 for v in value)
            require(good, name, "must be four positive whole numbers", value)
        least = dict(image_size=1, patch_size=1, vocab_size=1, token_dim=1, embed_dim=1, text_len=2, n_category=0, n_subcategory=0)
        for name, bound in least.items():
            value = getattr(self, name)
            require(type(value) is int and value >= bound, name, f"must be a whole number, {bound} or more", value)
        for name in ("drop_path", "dropout"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and 0 <= value < 1, name, "must lie in [0, 1)", value)
        require(type(self.attend_padding) is bool, "attend_padding", "must be True or False", self.attend_padding)
        coarsest = 8 * self.patch_size  # what one position of V4 covers
        require(self.image_size % coarsest == 0, "image_size", f"must be a multiple of 8 patch_size = {coarsest}", self.image_size)
        for k, (dim, heads, reduction) in enumerate(zip(self.dims, self.heads, self.sr_ratios)):
            require(dim % heads == 0, f"dims[{k}]", f"must be a multiple of heads[{k}] = {heads}", dim)
            require(self.side(k) % reduction == 0, f"sr_ratios[{k}]", f"must divide the side {self.side(k)} of that stage's map", reduction)

    def side(self, k):
        """The side of the map of stage k + 1, in patches."""
        return self.image_size // (self.patch_size << k)

    @classmethod
    def preset(cls, name, **changes):
        require(name in PRESETS, "preset", f"must be one of {', '.join(PRESETS)}", name)
        return cls(**PRESETS[name] | changes)


PRESETS = {
    "nano": dict(dims=(32, 64, 160, 256), sr_ratios=(4, 2, 1, 1), token_dim=256, image_size=64, text_len=48),  # ours, for a
    # laptop: PVT's reductions halved, which at 64 px leaves sixteen patches as keys in stages 1 to 3, and not four, among up to 48 words
    "tiny": dict(),
    "small": dict(depths=(3, 4, 6, 3)),
    "medium": dict(depths=(3, 4, 18, 3)),
    "large": dict(depths=(3, 8, 27, 3)),
}


def require(condition, setting, rule, value):
    if not condition:
        raise ValueError(f"{setting} {rule}, got {value!r}")


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sec. 3.1, the multi-modal encoder


class WordInput(nn.Module):
    """BERT's input layer: word + position + segment 0, LayerNorm, dropout."""

    def __init__(self, c):
        super().__init__()
        self.word = nn.Embedding(c.vocab_size, c.token_dim)
        self.position = nn.Parameter(torch.zeros(c.text_len, c.token_dim))
        self.segment = nn.Parameter(torch.zeros(c.token_dim))
        self.norm = nn.LayerNorm(c.token_dim, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, tokens):
        x = self.word(tokens) + self.position[: tokens.shape[1]] + self.segment
        return self.dropout(self.norm(x))  # (B, L, token_dim)


def attend(q, k, v, seen):
    """softmax(q k^T / sqrt(d)) v over the keys that `seen` lets through."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # written out: the keys are few, and on a CPU a bf16 training step is up to 7 times as fast so
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head attention with spatial reduction: every token asks; all words and the R x R reduced patches answer."""

    def __init__(self, dim, heads, reduction):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def reduce(self, patches, side):
        """SR(n) = Norm(Reshape(n, R) W), PVT: (B, N, D) -> (B, N/R^2, D)."""
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return self.norm(self.sr(grid).flatten(2).transpose(1, 2))

    def forward(self, z, words, side, seen):
        """z (B, words + side^2, D); seen (B, 1, 1, keys) bool, True lets a key be seen, or None when all are."""
        keys = z
        if self.sr is not None and side:
            keys = torch.cat([z[:, :words], self.reduce(z[:, words:], side)], dim=1)  # (B, L + N/R^2, D)
        q = self.q(z).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L + N, D/heads)
        k, v = self.kv(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # two of (B, heads, L + N/R^2, D/heads)
        out = attend(q, k, v, seen)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, L + N, D)


class MLP(nn.Module):
    """Linear, GELU, Linear. The hidden layer, 4 or 8 times as wide, is not kept for the backward pass but computed again, which saves two fifths of a step's memory."""

    AT_ONCE = 1 << 22  # numbers of the hidden layer, on a CPU: what stays in its cache takes up to a tenth less time, and less memory

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, z):
        both = lambda z: self.fc2(F.gelu(self.fc1(z)))
        few = len(z) if z.is_cuda else max(1, self.AT_ONCE // (z.shape[1] * self.fc1.out_features))  # samples at once
        return torch.cat([checkpoint(both, some, use_reentrant=False, preserve_rng_state=False) for some in z.split(few)])


class DropPath(nn.Module):
    """Skip a residual branch for whole samples, and scale up the rest, so that the expectation stays."""

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

    def forward(self, z, words, side, seen):
        z = z + self.drop_path(self.attn(self.norm1(z), words, side, seen))
        return z + self.drop_path(self.mlp(self.norm2(z)))


class Stage(nn.Module):
    """One level of the pyramid: bring picture and caption to width D_k, let them attend to each other, part again."""

    def __init__(self, c, k, drop_path):
        super().__init__()
        wide = c.dims[k]
        stride = 2 if k else c.patch_size  # S_k = K_k in Table 1
        self.embed_image = nn.Conv2d(c.dims[k - 1] if k else 3, wide, stride, stride=stride)  # W_v
        self.norm_image = nn.LayerNorm(wide)
        self.position_image = nn.Parameter(torch.zeros(c.side(k) ** 2, wide))  # P_v
        self.embed_text = nn.Linear(c.dims[k - 1] if k else c.token_dim, wide)  # W_t
        self.norm_text = nn.LayerNorm(wide)
        self.position_text = nn.Parameter(torch.zeros(c.text_len, wide))  # P_t
        self.reduction = c.sr_ratios[k]
        self.blocks = nn.ModuleList(Block(wide, c.heads[k], c.mlp_ratios[k], c.sr_ratios[k], rate) for rate in drop_path)

    def forward(self, image, text, seen, recompute=False):
        """image (B, D_{k-1}, H, W) and text (B, L, D_{k-1}) at the previous width, either None; seen (B, L) bool or None."""
        z, words, side = [], 0, 0
        if text is not None:
            words = text.shape[1]
            z.append(self.norm_text(self.embed_text(text)) + self.position_text[:words])  # Eq. 1 (its LayerNorm is in the authors' code only)
        if image is not None:
            n = self.embed_image(image)  # (B, D_k, side, side)
            side = n.shape[2]
            z.append(self.norm_image(n.flatten(2).transpose(1, 2)) + self.position_image)  # Eq. 2, likewise
        z = torch.cat(z, dim=1)  # z = <m; n> (B, L + N, D_k)
        if seen is not None:
            seen = F.pad(seen, (0, (side // self.reduction) ** 2), value=True)[:, None, None]  # patches are always seen

        for block in self.blocks:
            z = checkpoint(block, z, words, side, seen, use_reentrant=False) if recompute else block(z, words, side, seen)

        text = z[:, :words] if words else None
        image = z[:, words:].transpose(1, 2).unflatten(2, (side, side)) if side else None  # a map again, for the next stage and the decoder
        return image, text


# ---------------------------------------------------------------------------------------------------------------------------------------
# Sec. 3.2 and 3.3, the heads


class Up(nn.Module):
    """One level of the U-Net's way up: double the map, join the skip, convolve twice."""

    def __init__(self, below, skip):
        super().__init__()
        self.grow = nn.ConvTranspose2d(below, skip, 2, stride=2)
        self.join = nn.Conv2d(2 * skip, skip, 3, padding=1)
        self.refine = nn.Conv2d(skip, skip, 3, padding=1)
        groups = math.gcd(8, skip)  # GroupNorm: a picture's result must not depend on its neighbours in the batch
        self.norm1, self.norm2 = nn.GroupNorm(groups, skip), nn.GroupNorm(groups, skip)

    def forward(self, x, skip):
        x = torch.cat([self.grow(x), skip], dim=1)
        x = F.gelu(self.norm1(self.join(x)))
        return F.gelu(self.norm2(self.refine(x)))


class Decoder(nn.Module):
    """F_MIR, a four-level U-Net decoder: it sees the pixels through V1..V4 alone."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.ModuleList(Up(c.dims[k + 1], c.dims[k]) for k in (2, 1, 0))  # 1/32 -> 1/16 -> 1/8 -> 1/4
        self.pixels = nn.Conv2d(c.dims[0], 3 * c.patch_size**2, 3, padding=1)  # each 1/4 position paints its own P x P pixels
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
    """MLM: the same beginning, BERT's transform, then the word embedding read backwards (tied) plus a bias."""

    def __init__(self, c):
        super().__init__()
        self.embed = nn.Linear(c.dims[3], c.token_dim)
        self.norm = nn.LayerNorm(c.token_dim)
        self.dense = nn.Linear(c.token_dim, c.token_dim)
        self.dense_norm = nn.LayerNorm(c.token_dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, t, word_weight):
        t = self.dense_norm(F.gelu(self.dense(self.norm(self.embed(t)))))
        return F.linear(t, word_weight, self.bias)


class Tower(nn.Module):
    """LayerNorm and a projection to the unit sphere on which pictures and captions meet (not in the paper; its Sec. 2 names twin towers)."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, x):
        return F.normalize(self.project(self.norm(x)).float(), dim=-1)


class MVLT(nn.Module):
    """The whole model. `vocabulary` and `labels` (the words and the class names, in id order) travel with it from `save` to `load`."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vocabulary, self.labels = [], {}
        self.recompute = False  # True: forget activations and compute them again in the backward pass (less memory, a third more work)
        rates = iter(c.drop_path * i / max(1, sum(c.depths) - 1) for i in range(sum(c.depths)))  # growing from block to block
        self.words = WordInput(c)
        self.stages = nn.ModuleList(Stage(c, k, [next(rates) for _ in range(c.depths[k])]) for k in range(4))
        self.decoder = Decoder(c)
        self.match_head = TextHead(c, 2)
        self.word_head = WordHead(c)
        self.category_head = TextHead(c, c.n_category) if c.n_category else None
        self.subcategory_head = TextHead(c, c.n_subcategory) if c.n_subcategory else None
        self.grid = min(4, c.side(3))  # the picture tower sees V4 as grid x grid places
        self.image_tower, self.text_tower = Tower(self.grid**2 * c.dims[3], c.embed_dim), Tower(c.dims[3], c.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the contrast's learnt temperature, as CLIP
        self.apply(initialise)
        centre_pixels(self.stages[0].embed_image)

    def encode(self, images, tokens):
        """
        Read a picture, a caption, or both: images (B, 3, H, W) floats in [0, 1]; tokens (B, L) int64, 0 = padding; either may be None.
        Returns visual [V1..V4], maps (B, D_k, H_k, W_k), and text [T1..T4], (B, L, D_k); [] for an absent side.
        """
        c, seen, text = self.config, None, None
        require(images is not None or tokens is not None, "encode", "needs images or tokens", None)
        if images is not None:
            require(images.shape[1:] == (3, c.image_size, c.image_size), "images", f"must be (B, 3, {c.image_size}, {c.image_size})", tuple(images.shape))
        if tokens is not None:
            require(tokens.ndim == 2 and 0 < tokens.shape[1] <= c.text_len, "tokens", f"must be (B, L) with L in 1..{c.text_len}", tuple(tokens.shape))
            text = self.words(tokens)
            if not c.attend_padding:  # the authors attend to padding: there, more of it changes the result
                seen = tokens != 0
                seen[:, 0] = True  # [CLS] stands there, so that even an empty caption leaves a key to see
        image, visual, texts = images, [], []
        for stage in self.stages:
            image, text = stage(image, text, seen, self.recompute)
            visual.append(image)
            texts.append(text)
        return (visual if images is not None else []), (texts if tokens is not None else [])

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
        """M-CR and S-CR, two independent heads on [CLS] of T4. A photo without text is read with the empty caption [CLS] [SEP]."""
        classes = (self.config.n_category, self.config.n_subcategory)
        require(all(classes), "recognise", "needs n_category and n_subcategory above 0", classes)
        return self.category_head(text[3][:, 0]), self.subcategory_head(text[3][:, 0])

    def embed_images(self, images):
        """The picture tower: unit vectors (B, embed_dim), from V4 with its places side by side: a mean over them learns slower at first."""
        visual, _ = self.encode(images, None)
        return self.image_tower(F.adaptive_avg_pool2d(visual[3], self.grid).flatten(1))

    def embed_texts(self, tokens):
        """The caption tower: unit vectors (B, embed_dim), from the mean of T4 over the words that are no padding."""
        _, text = self.encode(None, tokens)
        real = (tokens != 0).unsqueeze(2)  # (B, L, 1)
        return self.text_tower((text[3] * real).sum(1) / real.sum(1).clamp(min=1))


def initialise(module):
    """PVT's normal of 0.02, here cut at two sigma, for Linear, embeddings and positions, 0 for biases; convolutions keep PyTorch's default."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight" or name.startswith(("position", "segment")):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(parameter)


@torch.no_grad()
def centre_pixels(embed_image):
    """Let fresh weights see a pixel x as 4 (x - 1/2): otherwise the LayerNorm after Eq. 2 at first hides how bright a patch is."""
    embed_image.weight *= 4
    embed_image.bias -= embed_image.weight.sum((1, 2, 3)) / 2


# ---------------------------------------------------------------------------------------------------------------------------------------
# Masking: Eq. 3 and 4, Fig. 4 (the unit), Fig. 8 (the styles), and the words

ZERO = 1e-6  # what hidden pixels are filled with (the paper's footnote 2)
MASK_STYLES = ("random", "grid", "stroke", "center")


def draw_units(batch, size, style="random", ratio=0.5, unit=16, generator=None):
    """
    Phi of Eq. 4: which parts of each picture of size (H, W) to hide. Returns (batch, 1, h, w) bool, True = hidden: one entry per unit of
    unit x unit pixels (alpha P; h = H/unit) for "random" and "grid", one per pixel for "stroke" (a brush `unit` wide) and "center".
    """
    require(style in MASK_STYLES, "mask style", f"must be one of {', '.join(MASK_STYLES)}", style)
    require(0 <= ratio <= 1, "mask ratio", "must lie in [0, 1]", ratio)
    H, W = size
    require(unit >= 1 and H % unit == 0 and W % unit == 0, "mask unit", f"must divide the picture's sides {H} and {W}", unit)
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
    """In each row n of every m units, shifted by one from row to row (a chessboard at 1/2): the n/m that comes nearest to the ratio."""
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
    """Straight strokes of a round brush, each begun on a pixel still bare, until the ratio is reached. (H, W) bool."""
    y, x = torch.arange(H)[:, None].float(), torch.arange(W).float()
    hidden = torch.zeros(H, W, dtype=torch.bool)
    while hidden.sum() < round(ratio * H * W):
        bare = (~hidden).flatten().nonzero().flatten()
        start = bare[torch.randint(len(bare), (), generator=generator)]
        angle, length = torch.rand(2, generator=generator) * torch.tensor([2 * math.pi, max(H, W) / 2])
        dy, dx = y - start // W, x - start % W  # from the stroke's start to each pixel
        along = (dy * angle.sin() + dx * angle.cos()).clamp(min=0).minimum(length)
        hidden |= (dy - along * angle.sin()) ** 2 + (dx - along * angle.cos()) ** 2 <= (width / 2) ** 2
    return hidden


def hide(images, units):
    """Eq. 3: fill what `units` (B, 1, h, w) names. Returns the masked pictures and hidden (B, 1, H, W) bool, True = hidden."""
    rows, columns = images.shape[2] // units.shape[2], images.shape[3] // units.shape[3]
    hidden = units.to(images.device).repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)
    return images.masked_fill(hidden, ZERO), hidden


def mask_images(images, style="random", ratio=0.5, unit=16, generator=None):
    """Hide parts of each picture (B, 3, H, W). Returns the masked pictures and hidden (B, 1, H, W) bool, True = hidden."""
    return hide(images, draw_units(len(images), images.shape[2:], style, ratio, unit, generator))


def mask_tokens(tokens, vocab_size, mask_id, special_ids, ratio=0.15, generator=None):
    """
    Choose each real word with probability `ratio`, at least one per caption that has any (none at ratio 0); of those 80% become [MASK],
    10% a random ordinary word, 10% stay. Special ids are neither chosen nor drawn.
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
    fate = torch.rand(tokens.shape, generator=generator)  # a second draw, so that the one word that had to be chosen is treated as any other
    drawn = ordinary[torch.randint(len(ordinary), tokens.shape, generator=generator)]

    where, fate, drawn = where.to(tokens.device), fate.to(tokens.device), drawn.to(tokens.device)
    masked = tokens.masked_fill(where & (fate < 0.8), mask_id)
    return torch.where(where & (fate >= 0.8) & (fate < 0.9), drawn, masked), where


# ---------------------------------------------------------------------------------------------------------------------------------------
# Losses: Eq. 5 to 8, each a mean over what is there to predict (and 0, with gradient 0, where nothing is)


def mir_loss(rebuilt, images):
    """Eq. 5, smooth L1 over the whole picture (with the |.| that the paper's condition leaves out)."""
    error = (rebuilt.float() - images.float()).abs()
    return mean_or_zero(torch.where(error < 1, 0.5 * error**2, error - 0.5))


def itm_loss(logits, matched):
    """Eq. 6: logits (B, 2), matched (B,) bool or 0/1."""
    return cross_entropy(logits, matched.long())


def mlm_loss(logits, words):
    """Eq. 7: logits (n, vocabulary) at the n hidden positions, words (n,) what stood there."""
    return cross_entropy(logits, words)


def itc_loss(image_vectors, text_vectors, log_scale, same):
    """
    Image-text contrast (not in the paper): InfoNCE both ways between unit vectors (B, embed_dim).
    same (B, B) bool: True where two entries are one product or have one caption; off the diagonal these are no negatives.
    """
    scale = log_scale.float().clamp(max=math.log(100)).exp()
    with torch.autocast(image_vectors.device.type, enabled=False):  # fp32: in bf16 one step near 14 is 0.06
        logits = scale * image_vectors.float() @ text_vectors.float().T
    own = torch.arange(len(logits), device=logits.device)
    logits = logits.masked_fill(same & (own[:, None] != own), float("-inf"))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def hard_negatives(logits, same, generator=None):
    """
    For each picture another's caption, drawn in proportion to exp(logits), (B, B) pictures x captions; never one that is the same (B, B).
    Returns (B,) int64, the caption's place in the batch, or -1 where every other is the same.
    """
    none = same.all(dim=1)
    chances = logits.float().nan_to_num().masked_fill(same & ~none[:, None], float("-inf")).softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].masked_fill(none, -1)


def recognition_loss(logits, classes):
    """Cross-entropy over the pictures whose class is known: classes (B,), -1 = unknown."""
    return cross_entropy(logits[classes >= 0], classes[classes >= 0])


def total_loss(parts, weights={"mir": 10, "itm": 1, "mlm": 1}):
    """Eq. 8: the weighted sum of the parts that are there."""
    return sum(weights[name] * part for name, part in parts.items())


def cross_entropy(logits, right):
    """logits (n, classes), right (n,) class ids."""
    return mean_or_zero(F.cross_entropy(logits.float(), right, reduction="none"))


def mean_or_zero(losses):
    return losses.mean() if losses.numel() else losses.sum()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Our own checkpoints


def save(path, model, **rest):
    """Write one self-contained file, whole or not at all: config, weights, vocabulary, label names, and whatever else is given."""
    contents = dict(model=model.state_dict(), config=asdict(model.config), vocabulary=list(model.vocabulary), labels=dict(model.labels), **rest)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def read(path):
    """What a checkpoint file holds. Only tensors and plain values are ever built from it; no code in it is run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the PVT family's training code keeps its arguments in the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # a broken file may raise almost anything
        asked = re.search(r"GLOBAL (\S+)", str(error))  # a pickle asks for the function that it would run
        reason = f"it asks for {asked[1]}" if asked else type(error).__name__
        raise ValueError(f"{path}: not a whole file of plain tensors ({reason})") from None


def load(path):
    """The model saved at `path`, in eval mode on the CPU."""
    contents = read(path)
    try:
        model = MVLT(Config(**contents["config"]))
        model.load_state_dict(contents["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a model that mvlt.save wrote ({' '.join(str(error).split())})") from None
    model.vocabulary, model.labels = contents.get("vocabulary", []), contents.get("labels", {})
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Other people's weights: PVT's (ImageNet) and the MVLT authors', whose visual half has the same names

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
for ours, theirs in (("match_head", "itm_head"), ("category_head", "sup_cls_head"), ("subcategory_head", "sub_cls_head")):
    TEXT_PARTS |= {f"{ours}.embed": f"{theirs}_embed.0", f"{ours}.norm": f"{theirs}_embed.1", f"{ours}.classify": f"{theirs}.linear"}

IMAGENET = {r"cls_token|norm\.(weight|bias)|head\.(weight|bias)": "ignored: ImageNet's class token and classifier"}  # pattern -> fate
IGNORED = IMAGENET | {
    r"t2i_head\..+": "ignored: the authors' decoder is another network",
    r"\w+_head\.linear_bias": "added to linear.bias",
    r"mlm_head\.mlm_decoder\.weight": "tied: equal to the word embedding",
    r"text_embeddings\.position_ids": "ignored: counts 0, 1, 2, ...",
}


def load_pvt(model, checkpoint):
    """
    Put the PVT authors' ImageNet weights (a state dict or its file) into the visual half, position tables resized to the model's pictures.
    Returns a report, {their key: what became of it}; a missing, ill-shaped or unknown key is an error that names it.
    """
    return adopt(model, open_state_dict(checkpoint), VISUAL_PARTS, IMAGENET)


def load_official(checkpoint, image_size=256, **changes):
    """
    The MVLT authors' checkpoint (a state dict, {"model": state dict}, or its file) as an MVLT that computes what theirs computes; what
    became of each key is in `model.report`. The decoder and the towers are not in it and stay as initialised.
    The configuration is "tiny", as theirs, with the recognition heads that are there; `changes` overrides it.
    """
    weights = dict(open_state_dict(checkpoint))
    classes = lambda head: len(weights.get(f"{head}.linear.bias", ()))
    found = dict(image_size=image_size, attend_padding=True, n_category=classes("sup_cls_head"), n_subcategory=classes("sub_cls_head"))
    model = MVLT(Config(**found | changes))
    for second in [name for name in weights if name.endswith("_head.linear_bias")]:  # their heads carry two biases, which add up to one
        first = second.replace("linear_bias", "linear.bias")
        same = first in weights and weights[first].shape == weights[second].shape
        require(same, second, f"must have the shape of {first}", tuple(weights[second].shape))
        weights[first] = weights[first] + weights[second]
    model.report = adopt(model, weights, VISUAL_PARTS | TEXT_PARTS, IGNORED)
    words, tied = weights["text_embeddings.word_embeddings.weight"], "mlm_head.mlm_decoder.weight"
    require(torch.equal(weights.get(tied, words), words), tied, "must equal the word embedding, to which it is tied", "another tensor")
    return model.eval()


def open_state_dict(checkpoint):
    """A state dict from a dict, from {"model": dict}, or from the file of either."""
    weights = checkpoint if isinstance(checkpoint, dict) else read(checkpoint)
    weights = weights["model"] if isinstance(weights, dict) and isinstance(weights.get("model"), dict) else weights
    good = isinstance(weights, dict) and weights and all(isinstance(value, torch.Tensor) for value in weights.values())
    require(good, "checkpoint", "must be a state dict, names to tensors, or {'model': state dict}", type(weights).__name__)
    return weights


def their_name(ours, parts):
    """What the authors call our parameter, or None when `parts` has no such part."""
    k = 0
    if ours.startswith("stages."):
        _, k, rest = ours.split(".", 2)
        ours = f"stage.{rest}"
    part = next((part for part in parts if f"{ours}.".startswith(f"{part}.")), None)
    return part and parts[part].format(k=int(k) + 1) + ours[len(part) :]


@torch.no_grad()
def adopt(model, weights, parts, ignored):
    """Copy their weights into those parts of the model, all or none. Returns {their key: what became of it}, every key accounted for."""
    parameters = {theirs: (name, parameter) for name, parameter in model.named_parameters() if (theirs := their_name(name, parts))}
    report = {name: fate for name in weights for pattern, fate in ignored.items() if re.fullmatch(pattern, name)}
    missing, unknown = parameters.keys() - weights.keys(), weights.keys() - parameters.keys() - report.keys()
    require(not missing, "checkpoint", "must leave no weight of the model unfilled", sorted(missing))
    require(not unknown, "checkpoint", "must hold no weight that is unknown", sorted(unknown))
    fitted = {theirs: fit(theirs, weights[theirs], name, parameter.shape) for theirs, (name, parameter) in parameters.items()}
    for theirs, (value, fate) in fitted.items():
        parameters[theirs][1].copy_(value)
        report[theirs] = fate
    return report


def fit(theirs, value, ours, shape):
    """Their tensor in the shape of our parameter, and how: position tables are resized or cut, everything else must fit as it is."""
    fate, table = "used", torch.atleast_2d(value).flatten(0, -2)  # (rows, D): their tables of positions begin with a 1
    if ours.endswith("position_image"):
        slots = ours.startswith("stages.3")  # a class slot in front, in stage 4
        old, new = math.isqrt(len(table) - slots), math.isqrt(shape[0])
        require(old > 0 and len(table) == old * old + slots, theirs, f"must have a square number of rows{', and one' * slots}", tuple(value.shape))
        grid = table[slots:].T.unflatten(1, (old, old))[None]  # (1, D, old, old)
        value = F.interpolate(grid.float(), size=(new, new), mode="bilinear")[0].flatten(1).T
        fate = fate if old == new else f"resized from {old} x {old} to {new} x {new}"
    elif ours.endswith(("position_text", "words.position")):
        value = table[: shape[0]]
        fate = fate if len(table) <= shape[0] else f"used: the first {shape[0]} of {len(table)} rows"
    elif ours == "words.segment":
        value, fate = table[0], "used: segment 0"
    require(value.shape == shape, theirs, f"must fit {ours} of shape {tuple(shape)}", tuple(value.shape))
    return value, fate


# ---------------------------------------------------------------------------------------------------------------------------------------
# python mvlt.py: the model as a table. Nothing is computed: tensors on the "meta" device have shapes only.


def count(part, *inputs):
    """What a part of the model returns, and its millions of multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        outputs = part(*inputs)
    return outputs, counter.get_total_flops() / 2e6


def millions(part):
    return sum(parameter.numel() for parameter in part.parameters()) / 1e6


def table(name):
    """One preset, part by part: (part, its map, its words, blocks, M parameters, M multiply-adds for one picture with its caption)."""
    c = Config.preset(name)
    with torch.device("meta"):
        model, image = MVLT(c).eval(), torch.empty(1, 3, c.image_size, c.image_size)
        text, work = count(model.words, torch.ones(1, c.text_len, dtype=torch.long))
        shape = lambda x: " x ".join(map(str, x.shape[1:]))
        rows, visual = [("word input", "", shape(text), "", millions(model.words), work)], []
        for k, stage in enumerate(model.stages):
            (image, text), work = count(stage, image, text, None)
            visual.append(image)
            rows.append((f"stage {k + 1}", shape(image), shape(text), c.depths[k], millions(stage), work))
        hidden = text[:, : round(0.15 * c.text_len)]
        for label, part, *inputs in [
            ("MIR decoder", model.decoder, visual), ("ITM head", model.match_head, text[:, 0]),
            ("MLM head", model.word_head, hidden, model.words.word.weight),
            ("image tower", model.image_tower, F.adaptive_avg_pool2d(image, model.grid).flatten(1)), ("text tower", model.text_tower, text[:, 0]),
        ]:
            rows.append((label, "", "", "", millions(part), count(part, *inputs)[1]))
    return rows + [("in all", "", "", "", millions(model), sum(row[-1] for row in rows))]


def pvt_tiny():
    """The visual half of "tiny" on its own, as PVT-Tiny's size is published: 224 px, with a classifier. M parameters, M multiply-adds."""
    with torch.device("meta"):
        model = MVLT(Config.preset("tiny", image_size=224)).eval()
        work = count(model.encode, torch.empty(1, 3, 224, 224), None)[1]
    visual = sum(p.numel() for name, p in model.named_parameters() if their_name(name, VISUAL_PARTS))
    return (visual + 2 * 512 + 513_000) / 1e6, work + 0.512  # and its last LayerNorm and its classifier of 1000 classes


if __name__ == "__main__":
    for preset in PRESETS:
        print(f"\n{preset:12} {'map (D, H, W)':>16} {'words (L, D)':>14} {'blocks':>7} {'M parameters':>13} {'M multiply-adds':>16}")
        for row in table(preset):
            print("{:12} {:>16} {:>14} {:>7} {:13.2f} {:16.0f}".format(*row))
    print("\nThe visual half of tiny at 224 px, with a classifier: {:.1f} M parameters, {:.0f} M multiply-adds.".format(*pvt_tiny()))
    print("PVT-Tiny as published: 13.2 M parameters, 1.9 G multiply-adds.")
