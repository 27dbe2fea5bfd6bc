"""
Kaleido-BERT, vision-language pre-training on the fashion domain (Zhuge et al., CVPR 2021), in one file.

Read it beside the paper: KPG (Sec. 3.2) is `frame` to `patches`, AAG (3.3) is `Captioner` and `align`, AGM (3.4) is
`agm`, the transformer (3.5) is `Level` to `Block` (the words enter as MVLT's, by its `WordInput`), the changes of Fig.
5 are `turn` to `blank`, and Sec. 3.6 (what one training step does, Eq. 1 to 8) is `Kaleido.plan` and `Kaleido.answers`.

   picture (B, 3, H, H)                                           caption (B, L) word ids
      |  KPG: the box of the object, cut into                        |
      |  1x1, 2x2, .., 5x5 patches                                   |
   (B, 55, 3, p, p)  <-- AAG: a captioner's attention aligns words with patches -->
      |              <-- AGM: of an aligned pair, hide the word or the patch   -->
      |  K1 turned, K2 shuffled, K3 one swapped,                     |  hidden words become [MASK]
      |  K4 two grey, K5 three blank                                 |
      v  patch encoder (B, 55, F), Level (B, 55, D)                  v  WordInput (B, L, D)
   K  (B, 55, D)   -------- <T; K>, N blocks of BERT --------     T  (B, L, D)
      |                                                              |
   K1 -> RR:  by which angle was it turned? (Eq. 3)                  |-- T at [CLS]      -> ITM: do they match? (Eq. 2)
   K2 -> JPS: in which order are the four? (Eq. 4)                   |                      CR, SUB: categories
   K3 -> CP:  which is another product's? (Eq. 5)                    '-- T where hidden  -> AMLM: which word? (Eq. 1)
   K4 -> G2CM: what colours had the grey ones? (Eq. 6)
   K5 -> B2CM: what stood in the blank ones? (Eq. 7)

Letters: B pairs of a slice, G pairs of the global batch, L words, H the picture's side, k the level 1..5 with k^2
patches K_k, 55 patches in all, p a patch's side in pixels, F width of a patch's feature, D width, N blocks, A heads,
V vocabulary, g side of the captioner's grid of cells, S its width, M the number of words to hide in a caption.
AMLM is aligned masked language modelling. AKPM, aligned kaleido patch modelling, has five tasks: RR rotation, JPS
jigsaw puzzle, CP camouflage, G2CM grey to colour, B2CM blank to colour.
The authors' repository holds the transformer alone; what stands here for the rest says so on its line.
Departures from the paper and from the authors' code are named on the line where they happen; PAPER.md lists them.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from extras import foreign, kaleido_weights
from extras.runtime import Linear
from mvlt import (
    WordInput,
    empty_captions,
    parse_objectives,
    require,
    require_range,
    require_whole,
    setting,
    share_known,
    trim,
)

LEVELS = (1, 2, 3, 4, 5)
PATCHES = sum(k * k for k in LEVELS)  # 55
ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # JPS, (24, 4): in order n place j shows ORDERS[n, j]
HIDDEN = {3: 1, 4: 2, 5: 3}  # AGM: level -> number of patches to hide (Sec. 3.4)
OBJECTIVES = dict.fromkeys(("sat", "mlm", "itm", "rr", "jps", "cp", "g2cm", "b2cm", "cr", "caption"), 1)  # Eq. 8
CHANGES = {"mlm", "rr", "jps", "cp", "g2cm", "b2cm"}  # objectives that read changed pairs: AMLM and AKPM
WAYS = ("told", "forced", "none")


def level(k):
    """Where the k^2 patches of level k stand among the 55."""
    start = sum(j * j for j in range(1, k))
    return slice(start, start + k * k)


# ---------------------------------------------------------------------------------------------------------------------
# Settings (Sec. 4.1)


@dataclass(frozen=True)
class Config:
    """The shape of the network. The defaults are the paper's ("base"): BERT-base and ResNet-50."""

    image_size: int = setting(256, "H, side of the (square) picture in pixels.")
    patch_side: int = setting(64, "p, side in pixels to which each of the 55 patches is resized: 8, 16, 32, ...")
    text_len: int = setting(64, "Longest caption in word pieces, [CLS] and [SEP] included.")
    vocab_size: int = setting(30522, "Number of word pieces.")
    width: int = setting(768, "D, width of the transformer.")
    depth: int = setting(12, "N, number of transformer blocks.")
    heads: int = setting(12, "A, attention heads of each block.")
    mlp_ratio: int = setting(4, "Width of the MLP's hidden layer over D.")
    dropout: float = setting(0.1, "Dropout of features, inputs, attention and residual branches.")
    encoder: str = setting("resnet50", "Patch encoder: resnet50 (frozen, from a checkpoint) or conv (trained).")
    feature_dim: int = setting(2048, "F, width of a patch's feature; 2048 for resnet50.")
    sat_dim: int = setting(512, "S, width of the captioner.")
    sat_grid: int = setting(8, "g: the captioner attends to g x g cells; image_size over g must be a power of two.")
    n_category: int = setting(0, "Number of main categories (CR); 0 leaves the head out.")
    n_subcategory: int = setting(0, "Number of sub-categories (SUB); 0 leaves the head out.")

    def __post_init__(self):
        positive = ("image_size", "patch_side", "vocab_size", "width", "depth", "heads", "mlp_ratio", "feature_dim")
        require_whole(self, dict.fromkeys(positive + ("sat_dim", "sat_grid"), 1) | dict(text_len=2))
        require_whole(self, dict(n_category=0, n_subcategory=0))
        require_range(self, ("dropout",), 0, 1, high_included=False)
        require(self.width % self.heads == 0, "width", f"must be a multiple of heads = {self.heads}", self.width)
        require(self.depth <= 1000, "depth", "must not exceed 1000 blocks", self.depth)
        power = self.patch_side >= 8 and self.patch_side & (self.patch_side - 1) == 0
        require(power, "patch_side", "must be a power of two, 8 or more", self.patch_side)
        require(self.encoder in ("conv", "resnet50"), "encoder", "must be conv or resnet50", self.encoder)
        fits = self.encoder == "conv" or self.feature_dim == 2048
        require(fits, "feature_dim", "must be 2048 with encoder resnet50", self.feature_dim)
        ratio = self.image_size // self.sat_grid
        power = ratio * self.sat_grid == self.image_size and ratio > 1 and ratio & (ratio - 1) == 0
        require(power, "image_size", f"must be sat_grid = {self.sat_grid} times a power of two", self.image_size)

    @classmethod
    def preset(cls, size, **changes):
        """The configuration of a named size, with changes."""
        require(size in PRESETS, "size", f"must be one of {', '.join(PRESETS)}", size)
        return cls(**PRESETS[size] | changes)


PRESETS = {
    # nano and small are ours, for a laptop and for one GPU
    "nano": dict(
        image_size=64, patch_side=16, text_len=48, width=192, depth=4, heads=3,
        encoder="conv", feature_dim=128, sat_dim=128,
    ),
    "small": dict(patch_side=32, width=384, depth=6, heads=6, encoder="conv", feature_dim=256, sat_dim=256),
    "base": dict(),
}


@dataclass(frozen=True)
class Recipe:
    """How the network is trained. The defaults are the demo's."""

    objectives: str = setting(
        "sat,mlm,itm:3,rr,jps,cp,g2cm,b2cm,cr",
        "Objectives, as name or name:weight: sat (the captioner of AAG; leave it out only with --from a run that "
        "trained it), mlm, itm, rr, jps, cp, g2cm, b2cm, cr; or caption alone. The weight defaults to 1.",
    )
    align: str = setting(
        "forced", "AAG reads the attention maps of the captioner's own caption (told, as the paper) or of the true "
        "caption (forced); none: random masking."
    )
    align_from: float = setting(0.2, "Share of the steps that train the captioner alone; then it is frozen.")
    foreground: bool = setting(True, "KPG: cut the patches from the box of the object, not from the whole picture.")
    unmasked_itm: bool = setting(True, "ITM and recognition read unchanged pairs only; no: all pairs are changed.")
    change_pairs: float = setting(
        0.5, "With unmasked_itm: probability of changing a pair (words, patches), for mlm and rr, jps, cp, g2cm, b2cm."
    )
    mask_words: float = setting(0.15, "Share of a caption's words that are hidden, at least one.")
    max_masked: int = setting(10, "Most words that are hidden in a caption.")
    drop_caption: float = setting(
        0.2, "Probability of dropping an unchanged, matched pair's caption; recognition then also learns from photos."
    )

    def __post_init__(self):
        chosen = set(self.weights)
        require_range(self, ("change_pairs", "mask_words", "drop_caption"), 0, 1)
        require_range(self, ("align_from",), 0, 1, high_included=False)
        require_whole(self, dict(max_masked=1))
        require(self.align in WAYS, "align", f"must be one of {', '.join(WAYS)}", self.align)
        for name in ("foreground", "unmasked_itm"):
            require(type(getattr(self, name)) is bool, name, "must be True or False", getattr(self, name))
        alone = "caption" not in chosen or len(chosen) == 1
        require(alone, "objectives", "must name caption alone: it reads captions that are all [MASK]", self.objectives)
        serves = bool(chosen - {"sat"})
        require(serves, "objectives", "must name more than sat: the captioner serves others", self.objectives)
        rule = "must be below 1, so that itm reads pairs that match, too"
        require(self.drop_caption < 1 or not {"itm", "cr"} <= chosen, "drop_caption", rule, self.drop_caption)
        if self.unmasked_itm and CHANGES & chosen:
            rule = "must be above 0, so that mlm and rr to b2cm can read pairs"
            require(self.change_pairs > 0, "change_pairs", rule, self.change_pairs)
            starved = {"itm", "cr"} & chosen
            rule = f"must be below 1, so that {' and '.join(sorted(starved))} can read pairs"
            require(self.change_pairs < 1 or not starved, "change_pairs", rule, self.change_pairs)

    @property
    def weights(self):
        """{objective: its weight in Eq. 8}; without AAG there is no captioner to train."""
        weights = parse_objectives(self.objectives, OBJECTIVES)
        if self.align == "none":
            weights.pop("sat", None)
        return weights


DEMO = dict(size="nano", steps=1000, batch_size=64, lr=3e-3, final_lr=5e-5, warmup=0.1, weight_decay=1e-4, clip=1.0)
# Sec. 4.1; batch, Adam's second beta and clipping from the authors' scripts. 50 epochs of Fashion-Gen are the authors'
# number of steps: their 25 epochs had two rows for a pair, one of them with a wrong caption
PAPER = dict(
    size="base", vocab_size=30522, objectives="sat,mlm,itm,rr,jps,cp,g2cm,b2cm", align="told", unmasked_itm=False,
    drop_caption=0.0, epochs=50.0, batch_size=256, optimizer="adamw", lr=2e-5, final_lr=0.0, warmup=0.1,
    weight_decay=1e-4, beta2=0.98, clip=1.0, mirror=0.0, shift=0, zoom=0.0, workers=4, save_every=1000,
)
# both heads in one run; the authors fine-tune once for CR and once for SUB
RECOGNISE = dict(objectives="cr", optimizer="adamw", lr=1e-4)
CAPTION = dict(objectives="caption", optimizer="adamw", lr=1e-4)
RECIPES = {"demo": DEMO, "paper": PAPER, "recognise": RECOGNISE, "caption": CAPTION}


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2, KPG: the Kaleido patch generator


def object_pixels(images):
    """
    Which pixels show the object, (B, H, H) in {0, 1}: in place of the paper's saliency network, those that differ from
    a plain background. Also whether the background is plain, (B,) bool.
    """
    edges = (images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1])
    ring = torch.cat(edges, dim=2)  # the outermost pixels, (B, 3, 4H - 4)
    background = ring.median(dim=2, keepdim=True).values  # (B, 3, 1)
    plain = ((ring - background).abs().amax(1) > 0.08).float().mean(1) <= 0.25
    return ((images - background[..., None]).abs().amax(1) > 0.08).float(), plain


def frame(images):
    """
    The box of the object in each picture: (B, 3, H, H) -> (B, 4) int64 x0, y0, x1, y1, ends excluded. Where the
    background is not plain, or the object small, the box is the picture.
    """
    size = images.shape[2]
    inside, plain = object_pixels(images)
    x0, x1 = extent(inside.mean(1) > 0.01)  # columns of which more than 1% belongs to the object
    y0, y1 = extent(inside.mean(2) > 0.01)
    large = (x1 - x0) * (y1 - y0) * 16 >= size * size
    boxes = torch.stack([x0, y0, x1, y1], dim=1)
    return torch.where((plain & large)[:, None], boxes, whole(images))


def object_cells(images, boxes, g):
    """The object's share of each of the g x g cells of the framed pictures, (B, g, g); without a plain background 1."""
    inside, plain = object_pixels(images)
    inside = torch.where(plain[:, None, None], inside, 1)
    return F.adaptive_avg_pool2d(crop(inside[:, None], boxes), g)[:, 0]


def extent(used):
    """The first True of each row and the place after the last, (B, H) bool -> (B,), (B,); 0, 0 where there is none."""
    places = torch.arange(used.shape[1], device=used.device)
    first = used.int().argmax(1)
    return first, torch.where(used, places + 1, first[:, None]).amax(1)


def whole(images):
    """The box of the whole picture, (B, 4)."""
    size = images.shape[2]
    return torch.tensor([0, 0, size, size], device=images.device).expand(len(images), 4)


def resize(images, size):
    """(B, 3, h, w) -> (B, 3, size, size), bilinear as PIL does it; untouched if it has that size."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def crop(images, boxes):
    """The framed pictures: each box resized to the whole size, (B, 3, H, H)."""
    framed = []
    for image, (x0, y0, x1, y1) in zip(images, boxes.tolist()):
        framed.append(resize(image[None, :, y0:y1, x0:x1], images.shape[2]))
    return torch.cat(framed) if framed else images


def cut(framed, k, side):
    """Level k of framed pictures, row by row: (B, 3, H, H) -> (B, k^2, 3, p, p)."""
    grid = resize(framed, k * side).unflatten(3, (k, side)).unflatten(2, (k, side))  # (B, 3, k, p, k, p)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def cut_all(framed, side):
    """All five levels: (B, 3, H, H) -> (B, 55, 3, p, p)."""
    return torch.cat([cut(framed, k, side) for k in LEVELS], dim=1)


def places_of(boxes, images):
    """
    x1, x2, y1, y2 and area of each patch as shares of the picture, (B, 55, 5). (The authors' are whole numbers of an
    unknown unit.) They belong to the place: a turned, shuffled or swapped patch does not take them along.
    """
    x0, y0, x1, y1 = (boxes[:, None].to(images.dtype) / images.shape[2]).unbind(2)  # (B, 1) each
    places = []
    for k in LEVELS:
        number = torch.arange(k * k, device=boxes.device)
        row, column = number // k, number % k
        left, right = x0 + (x1 - x0) * column / k, x0 + (x1 - x0) * (column + 1) / k  # (B, k^2)
        top, bottom = y0 + (y1 - y0) * row / k, y0 + (y1 - y0) * (row + 1) / k
        places.append(torch.stack([left, right, top, bottom, (right - left) * (bottom - top)], dim=2))
    return torch.cat(places, dim=1)


def patches(images, boxes, side):
    """KPG: the patches (B, 55, 3, p, p) of the boxes and their places (B, 55, 5)."""
    return cut_all(crop(images, boxes), side), places_of(boxes, images)


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 5, what AKPM changes. Each returns new patches (B, 55, 3, p, p); a change that is the identity has number 0.


def turn(patches, quarters):
    """RR: the patch of level 1 by `quarters` (B,) quarter turns counter-clockwise."""
    turned = patches.clone()
    for row, number in enumerate(quarters.tolist()):
        turned[row, 0] = torch.rot90(patches[row, 0], number, dims=(1, 2))
    return turned


def shuffle(patches, order):
    """JPS: the four patches of level 2 in order number `order` (B,) of ORDERS."""
    source = ORDERS.to(patches.device)[order] + level(2).start  # (B, 4)
    rows = torch.arange(len(patches), device=patches.device)[:, None]
    shuffled = patches.clone()
    shuffled[:, level(2)] = patches[rows, source]
    return shuffled


def swap(patches, which, donors):
    """
    CP: put the patch of a donor, level 3 (B, 9, 3, p, p) of another product, where `which` (B, 9) is True. The donor
    gives the patch of the same place: one of another place would look out of place. (Fig. 5 does not settle this.)
    """
    swapped = patches.clone()
    swapped[:, level(3)] = torch.where(which[:, :, None, None, None], donors, patches[:, level(3)])
    return swapped


def grey(patches, which):
    """G2CM: luma in all three channels of those patches of level 4 where `which` (B, 16) is True."""
    luma = patches[:, level(4)] * patches.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    luma = luma.sum(2, keepdim=True).expand_as(luma)
    greyed = patches.clone()
    greyed[:, level(4)] = torch.where(which[:, :, None, None, None], luma, patches[:, level(4)])
    return greyed


def blank(features, which):
    """B2CM: zero the features (B, 55, F) of those patches of level 5 where `which` (B, 25) is True."""
    blanked = features.clone()
    blanked[:, level(5)] = features[:, level(5)].masked_fill(which[:, :, None], 0)
    return blanked


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.2, the patch encoder: what stands for a patch


def convolutions(steps, width):
    """`steps` 3x3 convolutions of stride 2, from 3 channels to `width`, which doubles from step to step."""
    layers, before = [], 3
    for step in reversed(range(steps)):
        after = max(8, width >> step) if step else width
        # GroupNorm: a picture's result must not depend on its neighbours in the batch
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(math.gcd(8, after), after), nn.GELU()]
        before = after
    return nn.Sequential(*layers)


class ConvEncoder(nn.Module):
    """Ours, trained with the rest, so that no ImageNet weights are needed: convolutions until 2 x 2, mean, Linear."""

    def __init__(self, c):
        super().__init__()
        self.layers = convolutions(c.patch_side.bit_length() - 2, c.feature_dim)
        self.project = nn.Linear(c.feature_dim, c.feature_dim)

    def forward(self, patches):
        """(n, 3, p, p) -> (n, F)"""
        return self.project(self.layers(4 * (patches - 0.5)).mean(dim=(2, 3)))

    def target(self, patches):
        """
        What G2CM and B2CM regress, (n, 192): the patch's 8 x 8 mean colours x as softmax(x / 0.1). Learnt features
        would be a moving target. A softmax forgets an additive constant, here the overall brightness.
        """
        colours = F.adaptive_avg_pool2d(patches.float(), 8).flatten(1)
        return (colours / 0.1).softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.5, the transformer


class Level(nn.Module):
    """The patches of one level enter: FC(feature) + FC(segment) + FC(place), LayerNorm. Segment: one vector a level."""

    def __init__(self, c):
        super().__init__()
        self.project = nn.Linear(c.feature_dim, c.width, bias=False)  # no bias: a blank patch is its segment and place
        self.segment = nn.Parameter(torch.zeros(c.width))
        self.norm = nn.LayerNorm(c.width, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, features, placed):
        """features (B, k^2, F), placed = FC(place) (B, k^2, D)"""
        return self.dropout(self.norm(self.project(self.dropout(features)) + self.segment + placed))  # (B, k^2, D)


class Block(nn.Module):
    """A block of BERT, post-norm: attention, then MLP, each followed by LayerNorm."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.query, self.key, self.value = (Linear(c.width, c.width) for _ in range(3))
        self.out = Linear(c.width, c.width)
        self.norm1 = nn.LayerNorm(c.width, eps=1e-12)
        self.fc1 = Linear(c.width, c.mlp_ratio * c.width)
        self.fc2 = Linear(c.mlp_ratio * c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def attend(self, h, seen):
        projected = (self.query(h), self.key(h), self.value(h))
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, A, L + 55, D/A)
        rate = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=rate)
        return self.out(out.transpose(1, 2).flatten(2))

    def forward(self, h, seen):
        """h (B, L + 55, D); seen (B, 1, 1, L + 55) bool, True lets a key be seen."""
        h = self.norm1(h + self.dropout(self.attend(h, seen)))
        branch = self.fc2(F.gelu(self.fc1(h), approximate="tanh"))
        return self.norm2(h + self.dropout(branch))


class WordHead(nn.Module):
    """AMLM: BERT's transform, then the word embedding as a classifier (tied) plus a bias."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c.width, c.width)
        self.norm = nn.LayerNorm(c.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, t, word_weight):
        t = self.norm(F.gelu(self.dense(t), approximate="tanh"))
        return F.linear(t, word_weight, self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.3, AAG: the attention-based alignment generator


def in_fp32(function):
    """Run the function outside autocast, on a CPU and on a GPU."""
    return torch.autocast("cuda", enabled=False)(torch.autocast("cpu", enabled=False)(function))


class Captioner(nn.Module):
    """
    Show, attend and tell (SAT, Xu et al. 2015), small: an LSTM that looks at g x g cells of the framed picture before
    each word. It starts from zero, not from the mean cell, and without SAT's coverage loss: so all that it sees passes
    the attention, whose maps otherwise stay flat. Always in fp32.
    """

    def __init__(self, c):
        super().__init__()
        S = c.sat_dim
        self.grid = c.sat_grid
        self.longest = c.text_len - 1
        self.look = convolutions((c.image_size // c.sat_grid).bit_length() - 1, S)
        self.word = nn.Embedding(c.vocab_size, S)  # E
        self.cell_key = nn.Linear(S, S, bias=False)  # W_a
        self.query = nn.Linear(S, S)  # W_h
        self.energy = nn.Linear(S, 1, bias=False)  # v
        self.gate = nn.Linear(S, 1)  # beta
        self.lstm = nn.LSTMCell(2 * S, S)
        self.from_state = nn.Linear(S, S, bias=False)  # L_h
        self.from_cells = nn.Linear(S, S, bias=False)  # L_z
        self.out = nn.Linear(S, c.vocab_size)  # W_o
        self.register_buffer("ends", torch.zeros(2, dtype=torch.int64))  # ids of [CLS] and [SEP], see Kaleido.prepare

    def read(self, framed):
        """The cells a (B, g^2, S) of framed pictures (B, 3, H, H), and W_a a."""
        cells = self.look(4 * (framed - 0.5)).flatten(2).transpose(1, 2)
        return cells, self.cell_key(cells)

    def step(self, cells, keys, state, words):
        """One word on: words (B,) before it -> the state, what W_o reads (B, S), the attention alpha (B, g^2)."""
        h, c = state
        alpha = self.energy(torch.tanh(keys + self.query(h)[:, None])).squeeze(2).softmax(dim=1)
        seen = torch.sigmoid(self.gate(h)) * (alpha[:, :, None] * cells).sum(1)  # z (B, S)
        word = self.word(words)
        h, c = self.lstm(torch.cat([word, seen], dim=1), (h, c))
        return (h, c), word + self.from_state(h) + self.from_cells(seen), alpha

    @in_fp32
    def forward(self, framed, tokens):
        """Read the true captions (B, L): logits (B, L - 1, V) and maps (B, L - 1, g^2) of the words after the first."""
        cells, keys = self.read(framed)
        state = (cells.new_zeros(len(cells), cells.shape[2]),) * 2
        outputs, maps = [], []
        for t in range(tokens.shape[1] - 1):
            state, output, alpha = self.step(cells, keys, state, tokens[:, t])
            outputs.append(output)
            maps.append(alpha)
        return self.out(torch.stack(outputs, dim=1)), torch.stack(maps, dim=1)

    @torch.no_grad()
    @in_fp32
    def tell(self, framed):
        """Caption greedily: ids (B, text_len - 1), 0 from [SEP] on, and maps (B, text_len - 1, g^2)."""
        cells, keys = self.read(framed)
        state = (cells.new_zeros(len(cells), cells.shape[2]),) * 2
        words = self.ends[0].expand(len(cells))
        ended = torch.zeros_like(words, dtype=torch.bool)
        ids, maps = [], []
        for _ in range(self.longest):
            state, output, alpha = self.step(cells, keys, state, words)
            words = self.out(output).argmax(1)
            ended = ended | (words == self.ends[1])
            ids.append(words.masked_fill(ended, 0))
            maps.append(alpha)
        return torch.stack(ids, dim=1), torch.stack(maps, dim=1)


@torch.no_grad()
@in_fp32
def word_maps(captioner, framed, tokens, way, cells):
    """
    Each word's attention map (B, L, g, g) and whether the captioner says that word (B, L). `told` is the paper's: the
    captioner writes its own caption, and a word of both captions takes its map. `forced` is ours: the captioner reads
    the true caption, a word is said where it is the first choice after the true words before it, and its map is
    `relative` to the other words' and lies on the object, of which each cell holds the share `cells` (B, g, g).
    """
    if way == "told":
        ids, maps = captioner.tell(framed)
        same = (tokens[:, :, None] == ids[:, None]) & (ids != 0)[:, None]  # (B, L, length)
        said = same.any(dim=2)
        weights = same.to(maps.dtype)
        maps = weights @ maps / weights.sum(2, keepdim=True).clamp(min=1)  # a word said twice has the mean of its maps
    else:
        logits, maps = captioner(framed, tokens)
        said = F.pad(logits.argmax(2) == tokens[:, 1:], (1, 0))
        maps = relative(F.pad(maps, (0, 0, 1, 0)), tokens, cells.flatten(1))  # [CLS] is not said
    return maps.unflatten(2, (captioner.grid, captioner.grid)), said


def relative(maps, tokens, cells):
    """
    The maps (B, L, g^2) of the words of captions (B, L), each over the caption's mean map, times the object's share of
    each cell (B, g^2), and scaled to a sum of 1: where on the object a word looks more than the others do. All of them
    look at the outline, which tells the kind of product.
    """
    words = (tokens != 0)[:, :, None]
    mean = (maps * words).sum(1, keepdim=True) / words.sum(1, keepdim=True).clamp(min=1)
    maps = maps / (mean + 1e-3) * (cells[:, None] + 1e-3)
    return maps / maps.sum(2, keepdim=True).clamp(min=1e-12)


def masses(maps, k):
    """How much of a map (.., g, g) lies in each of the k x k patches of level k: (.., k, k)."""
    g = maps.shape[-1]
    bands, cells = torch.arange(k, dtype=torch.float64)[:, None] / k, torch.arange(g, dtype=torch.float64) / g
    overlap = torch.minimum(bands + 1 / k, cells + 1 / g) - torch.maximum(bands, cells)
    overlap = (g * overlap.clamp(min=0)).to(maps)  # (k, g): the share of a cell's side that lies in a band
    return overlap @ maps @ overlap.T


def align(captioner, framed, tokens, alignable, way, cells):
    """
    AAG: for each row its pairs (position of a word, patch), three for each aligned word: on each of the levels 3, 4, 5
    the patch with the most of the word's attention (Fig. 4). Only words that are `alignable` (V,) are aligned.
    """
    maps, said = word_maps(captioner, framed, tokens, way, cells)
    return strongest(maps, said & alignable[tokens])


@in_fp32
def strongest(maps, aligned):
    """
    The pairs (position, patch) of each row, from the maps (B, L, g, g) of the words that are `aligned` (B, L). Of
    patches with the same attention, rounding aside (those of a plain backdrop), the first is taken.
    """
    best = []
    for k in HIDDEN:
        mass = masses(maps, k).flatten(2)  # (B, L, k^2)
        most = mass > mass.amax(2, keepdim=True) - 1e-6
        best.append(level(k).start + most.int().argmax(2))  # (B, L)
    best = torch.stack(best, dim=2).tolist()
    pairs = [[] for _ in best]
    for row, position in aligned.nonzero().tolist():
        for patch in best[row][position]:
            pairs[row].append((position, patch))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Sec. 3.4, AGM: alignment-guided masking


def agm(words, pairs, M, generator, budgets=HIDDEN):
    """
    What to hide of one pair of caption and picture: exactly M of the ordinary `words` (positions) and, of each level,
    as many patches as `budgets` says; `pairs` (position, patch) decide which. Returns (positions, patches).
    """
    left = {"word": M, **budgets}
    items = {"word": [("word", position) for position in words]}
    for k in budgets:
        items[k] = [(k, patch) for patch in range(level(k).start, level(k).stop)]
    level_of = {patch: k for k in HIDDEN for patch in range(level(k).start, level(k).stop)}
    aligned = [(("word", position), (level_of[patch], patch)) for position, patch in pairs]
    partners = {}
    for word, patch in aligned:
        partners.setdefault(word, set()).add(patch)
        partners.setdefault(patch, set()).add(word)
    hidden = set()

    def shuffled(things):
        return [things[i] for i in torch.randperm(len(things), generator=generator).tolist()]

    def alone(item):  # none of its partners is hidden
        return not partners.get(item, set()) & hidden

    def hide(item):
        hidden.add(item)
        left[item[0]] -= 1

    for pair in shuffled(aligned):  # of an aligned pair one side is hidden, by chance; the other is left to infer it
        if not hidden.isdisjoint(pair):
            continue
        able = [side for side in pair if left.get(side[0], 0) > 0 and alone(side)]
        if able:
            hide(shuffled(able)[0])
    for anything in (False, True):  # the rest at random, at first only what has no hidden partner
        for kind in items:
            for item in shuffled(items[kind]) if left[kind] else ():
                if left[kind] > 0 and item not in hidden and (anything or alone(item)):
                    hide(item)
    positions = sorted(number for kind, number in hidden if kind == "word")
    return positions, sorted(number for kind, number in hidden if kind != "word")


# ---------------------------------------------------------------------------------------------------------------------
# Losses: Eq. 1 to 7, each a sum over the items that count (and 0, with gradient 0, where nothing does)


def cross_entropy(logits, right):
    """Eq. 1 to 5: logits (n, classes), right (n,) class ids. Their sum."""
    return F.cross_entropy(logits.float(), right, reduction="sum")


def kld_loss(logits, target):
    """Eq. 6 and 7: sum of t (log t - log q), with q = softmax(logits) and the target t, both (n, F)."""
    return F.kl_div(logits.float().log_softmax(1), target.detach(), reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Kaleido(nn.Module):
    """Kaleido-BERT. `vocabulary` and `labels` (the words and the class names, in id order) travel with its weights."""

    kind = "kaleido"
    ends = (  # layers that read pixels or places, or give an answer
        "encoder.layers.0.", "place.", "match_head", "rotation_head", "jigsaw_head", "camouflage_head", "recolour_head",
        "repaint_head", "category_head", "captioner.look.0.", "captioner.energy", "captioner.gate", "captioner.out",
    )
    heads = {  # objective -> the parameters that it alone trains, or shares with one other objective
        "sat": ("captioner.",),
        "mlm": ("word_head.",),
        "caption": ("word_head.",),
        "itm": ("pooler.", "match_head."),
        "cr": ("pooler.", "category_head.", "subcategory_head."),
        "rr": ("rotation_head.",),
        "jps": ("jigsaw_head.",),
        "cp": ("camouflage_head.",),
        "g2cm": ("recolour_head.",),
        "b2cm": ("repaint_head.",),
    }

    def __init__(self, config, recipe=None):
        super().__init__()
        self.config = c = config
        self.recipe = recipe or Recipe()
        self.vocabulary, self.labels = [], {}
        self.recompute = False  # True: recompute activations in the backward pass (less memory, a third more work)
        self.words = WordInput(c.vocab_size, c.text_len, c.width, c.dropout)
        self.encoder = ConvEncoder(c) if c.encoder == "conv" else kaleido_weights.ResNet50()
        self.levels = nn.ModuleList(Level(c) for _ in LEVELS)
        self.place = nn.Linear(5, c.width, bias=False)  # shared by the levels
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.word_head = WordHead(c)
        self.pooler = nn.Linear(c.width, c.width)
        self.match_head = nn.Linear(c.width, 2)
        self.rotation_head = nn.Linear(c.width, 4)
        self.jigsaw_head = nn.Linear(4 * c.width, 24)
        self.camouflage_head = nn.Linear(9 * c.width, 9)
        wide = 192 if c.encoder == "conv" else c.feature_dim  # width of what G2CM and B2CM regress
        self.recolour_head = nn.Linear(c.width, wide, bias=False)
        self.repaint_head = nn.Linear(c.width, wide, bias=False)
        self.category_head = nn.Linear(c.width, c.n_category) if c.n_category else None
        self.subcategory_head = nn.Linear(c.width, c.n_subcategory) if c.n_subcategory else None
        self.captioner = Captioner(c)
        self.register_buffer("alignable", torch.zeros(c.vocab_size, dtype=torch.bool))  # see prepare
        self.register_buffer("mask_id", torch.zeros((), dtype=torch.int64))
        for name, module in self.named_modules():
            if not name.startswith(("encoder", "captioner")):
                initialise(module, 0.02 * (768 / c.width) ** 0.5)

    # --- Pictures and captions in ---

    def framed(self, images):
        """KPG's first half: the boxes (B, 4) and the pictures cropped to them (B, 3, H, H)."""
        c = self.config
        shape = (3, c.image_size, c.image_size)
        require(images.shape[1:] == shape, "images", f"must be (B, {', '.join(map(str, shape))})", tuple(images.shape))
        boxes = frame(images) if self.recipe.foreground else whole(images)
        return boxes, crop(images, boxes)

    def look(self, patches):
        """Patches (B, 55, 3, p, p) -> features (B, 55, F)."""
        return self.encoder(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    def look_at(self, images):
        """Pictures (B, 3, H, H) in [0, 1] -> features (B, 55, F) and places (B, 55, 5), for `fuse`."""
        boxes, framed = self.framed(images)
        places = places_of(boxes, images)
        return self.look(cut_all(framed, self.config.patch_side)), places

    def fuse(self, features, places, tokens):
        """
        Read patches and words together: features (B, 55, F), places (B, 55, 5), tokens (B, L); features or tokens may
        be None. Returns visual [K1..K5], (B, k^2, D) each, and text [T], (B, L, D); [] for an absent side.
        """
        h, seen = [], []
        if tokens is not None:
            longest, shape = self.config.text_len, tuple(tokens.shape)
            fits = tokens.ndim == 2 and 0 < tokens.shape[1] <= longest
            require(fits, "tokens", f"must be (B, L) with L in 1..{longest}", shape)
            h.append(self.words(tokens))
            seen.append(tokens != 0)
            seen[0][:, 0] = True  # [CLS], so that even an empty caption leaves a key
        if features is not None:
            placed = self.place(places)  # (B, 55, D)
            for k, part in zip(LEVELS, self.levels):
                h.append(part(features[:, level(k)], placed[:, level(k)]))
            seen.append(torch.ones(features.shape[:2], dtype=torch.bool, device=features.device))
        h, seen = torch.cat(h, dim=1), torch.cat(seen, dim=1)[:, None, None]
        for block in self.blocks:
            h = checkpoint(block, h, seen, use_reentrant=False) if self.recompute else block(h, seen)
        text = [] if tokens is None else [h[:, : tokens.shape[1]]]
        visual = [] if features is None else [h[:, -PATCHES:][:, level(k)] for k in LEVELS]
        return visual, text

    def encode(self, images, tokens):
        """Read a whole picture (B, 3, H, H), a caption (B, L), or both, as `fuse` does; either may be None."""
        require(images is not None or tokens is not None, "encode", "needs images or tokens", None)
        features, places = (None, None) if images is None else self.look_at(images)
        return self.fuse(features, places, tokens)

    # --- The heads (Sec. 3.6) ---

    def pool(self, text):
        return torch.tanh(self.pooler(text[0][:, 0]))  # (B, D); the tanh layer is the authors' code's

    def match(self, text):
        """ITM: (B, 2) logits from [CLS]; 0 = mismatch, 1 = match. (The paper: one score and a sigmoid.)"""
        return self.match_head(self.pool(text))

    def predict_words(self, text, where):
        """AMLM: where (B, L) bool -> (where.sum(), V) logits, computed only there."""
        return self.word_head(text[0][where], self.words.word.weight)

    def recognise(self, text):
        """CR and SUB: (B, n_category) and (B, n_subcategory) logits from [CLS]."""
        classes = (self.config.n_category, self.config.n_subcategory)
        require(all(classes), "recognise", "needs n_category and n_subcategory above 0", classes)
        pooled = self.pool(text)
        return self.category_head(pooled), self.subcategory_head(pooled)

    def rotation(self, visual):
        return self.rotation_head(visual[0][:, 0])  # RR (B, 4)

    def jigsaw(self, visual):
        return self.jigsaw_head(visual[1].flatten(1))  # JPS (B, 24)

    def camouflage(self, visual):
        return self.camouflage_head(visual[2].flatten(1))  # CP (B, 9)

    def recolour(self, visual, which):
        return self.recolour_head(visual[3][which])  # G2CM, which (B, 16) bool -> (n, 192 or 2048)

    def repaint(self, visual, which):
        return self.repaint_head(visual[4][which])  # B2CM, which (B, 25) bool -> (n, 192 or 2048)

    # --- What it is used for ---

    def score(self, images, tokens):
        """Match minus mismatch logit (B,). (The authors rank by the match logit alone: across pairs another order.)"""
        return self.score_features(*self.look_at(images), tokens)

    def score_features(self, features, places, tokens):
        """`score` of pictures that `look_at` has read already: the costly half, once for many captions."""
        _, text = self.fuse(features, places, tokens)
        logits = in_fp32(self.match)(text).float()  # in bf16 close scores would tie
        return logits[:, 1] - logits[:, 0]

    def classify(self, images, tokens):
        """Category and sub-category logits. A photo without a caption is read with the empty one, [CLS] [SEP]."""
        if tokens is None:
            tokens = self.captioner.ends.expand(len(images), 2)
        return self.recognise(self.encode(images, tokens)[1])

    def caption(self, images):
        """The caption of each picture, ids (B, L), 0 after its end: all words are [MASK] and predicted at once."""
        tokens = self.all_masked(len(images))
        _, text = self.encode(images, tokens)
        logits = self.predict_words(text, torch.ones_like(tokens, dtype=torch.bool))
        words = logits.argmax(1).view_as(tokens)[:, 1:]
        ended = (words == self.captioner.ends[1]).cumsum(1) > 0
        return words.masked_fill(ended, 0)

    def all_masked(self, batch):
        """[CLS] [MASK] [MASK] ..., (batch, text_len)."""
        tokens = self.mask_id.repeat(batch, self.config.text_len)
        tokens[:, 0] = self.captioner.ends[0]
        return tokens

    @torch.no_grad()
    def align(self, images, tokens):
        """
        What AAG finds: the places of the patches (B, 55, 5), of which the first is the box that the maps cover; for
        each row its pairs (position, patch); and each word's map (B, L, g, g).
        """
        boxes, framed = self.framed(images)
        cells = object_cells(images, boxes, self.captioner.grid)
        maps, said = word_maps(self.captioner, framed, tokens, self.recipe.align, cells)
        pairs = strongest(maps, said & self.alignable[tokens])
        return places_of(boxes, images), pairs, maps

    @torch.no_grad()
    def pretext(self, split, draw, batch=64):
        """
        Fig. 7: the accuracy of RR, JPS, CP, ITM and AMLM and the KLD of G2CM and B2CM over a split, as trained and with
        fixed draws: draw(number of the batch, what) -> generator.
        """
        device = self.place.weight.device
        values, items = {}, {}
        for number, rows in enumerate(torch.arange(len(split)).split(batch)):
            plan, _ = self.plan(split, rows, lambda what: draw(number, what), None, 1.0)
            if "other" in plan:
                plan["other_images"] = split.images(rows[plan["other"].clamp(min=0)])
            plan = {name: value.to(device) for name, value in plan.items()}
            for task, (logits, target) in self.answers(split.images(rows, device), plan).items():
                if task in ("g2cm", "b2cm"):
                    value = kld_loss(logits, target)
                else:
                    value = (logits.argmax(1) == target).sum()
                values[task] = values.get(task, 0) + float(value)
                items[task] = items.get(task, 0) + len(target)
        tasks = [task for task in ("rr", "jps", "cp", "g2cm", "b2cm", "itm", "mlm") if items.get(task)]
        return {task: values[task] / items[task] for task in tasks}

    # --- One training step ---

    def active(self, progress):
        """The objectives that train at this share of the run: the captioner alone first, then all others."""
        chosen = tuple(self.recipe.weights)
        if "sat" in chosen and progress < self.recipe.align_from:
            return ("sat",)
        return tuple(name for name in chosen if name != "sat")

    def trained(self, progress):
        """The names of the parameters that train: all but the heads that no active objective reads."""
        active = self.active(progress)
        if active == ("sat",):
            return {name for name, _ in self.named_parameters() if name.startswith("captioner.")}
        used = {prefix for name in active for prefix in self.heads[name]}
        unused = {prefix for prefixes in self.heads.values() for prefix in prefixes} - used
        if self.config.encoder == "resnet50":
            unused.add("encoder.")
        return {name for name, _ in self.named_parameters() if not name.startswith(tuple(unused))}

    def reads(self, progress):
        """Every objective reads pairs."""
        return "pairs"

    def prepare(self, split):
        """
        Take from the training split which words AAG may align: ordinary ones that are letters and stand in under half
        of the captions (so no "in", "at" or "."). Whether the paper takes all words or nouns is not known.
        """
        if self.config.encoder == "resnet50":
            loaded = bool(self.encoder.bn1.running_mean.any())
            rule = "resnet50 needs the weights of a ResNet-50: give them with --init, or choose conv"
            require(loaded, "encoder", rule, "none")
        tokenizer, V = split.tokenizer, self.config.vocab_size
        captions = torch.zeros(V, dtype=torch.int64)
        for rows in torch.arange(len(split.tokens)).split(10_000):
            words = split.tokens[rows].sort(dim=1).values
            first = F.pad(words[:, 1:] != words[:, :-1], (1, 0), value=True)  # a word counts once a caption
            captions += torch.bincount(words[first], minlength=V)
        letters = torch.zeros(V, dtype=torch.bool)
        for number, word in enumerate(tokenizer.words):
            letters[number] = word.removeprefix("##").isalpha()
        letters[list(tokenizer.special_ids)] = False
        self.alignable.copy_(letters & (2 * captions < len(split.tokens)))
        self.captioner.ends.copy_(torch.tensor([tokenizer.cls_id, tokenizer.sep_id]))
        self.mask_id.fill_(tokenizer.mask_id)

    def plan(self, split, rows, draw, vectors, progress):
        """
        Everything random about the G pairs `rows`: which captions are wrong, what is changed and how, how many words
        are hidden, and which pairs each objective counts. Returns ({name: (G, ...)}, {objective: number of items}).
        """
        active, r, G = self.active(progress), self.recipe, len(rows)
        if active in (("sat",), ("caption",)):
            tokens = trim(split.tokens[rows])
            return {active[0]: tokens}, {active[0]: int((tokens[:, 1:] != 0).sum())}

        every = torch.ones(G, dtype=torch.bool)
        changed = torch.rand(G, generator=draw("change")) < r.change_pairs if r.unmasked_itm else every
        changed = changed & bool(CHANGES & set(active))
        matched = torch.randperm(G, generator=draw("match")) % 2 == 0 if "itm" in active else every
        if r.unmasked_itm:
            matched = matched | changed  # a changed pair is for AMLM and AKPM, not for matching
        captions = rows if matched.all() else torch.where(matched, rows, split.negatives(rows, draw("negatives")))
        name = matched & ~(changed & r.unmasked_itm)  # CR, SUB: true pairs as they come at test time
        no_caption = name & ~changed & ("cr" in active) & (torch.rand(G, generator=draw("bare")) < r.drop_caption)
        tokens = split.tokens[captions]
        tokens = trim(torch.where(no_caption[:, None], empty_captions(split.tokenizer, tokens), tokens))

        change = matched & changed  # AMLM and AKPM: true pairs (the authors read this flag and drop it)
        judge = ~no_caption & ~(changed & r.unmasked_itm)  # ITM: pairs as they come at test time, or all
        plan = dict(tokens=tokens, matched=matched, changed=changed, change=change, judge=judge)
        plan |= self.plan_words(split.tokenizer, tokens, draw, changed & ("mlm" in active))
        plan["turn"] = torch.randint(4, (G,), generator=draw("turn")) * (changed & ("rr" in active))
        plan["order"] = torch.randint(24, (G,), generator=draw("order")) * (changed & ("jps" in active))
        if "cp" in active:
            plan["other"] = draw_donors(split.same(rows), draw("donor")).masked_fill(~changed, -1)
        if "cr" in active:
            plan["category"], plan["share_category"] = share_known(split.categories[rows], name)
            plan["subcategory"], plan["share_subcategory"] = share_known(split.subcategories[rows], name)
        return plan, self.count(plan, active)

    def plan_words(self, tokenizer, tokens, draw, hide):
        """For each row M, the number of words to hide (0 unless `hide`), and AGM's seed; what a hidden word becomes."""
        special = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        special[list(tokenizer.special_ids)] = True
        ordinary = ~special[tokens]  # (G, L)
        n, r = ordinary.sum(1), self.recipe
        M = (n * r.mask_words).round().long().clamp(1, r.max_masked).minimum(n)
        known = (~special).nonzero().flatten()
        drawn = known[torch.randint(len(known), tokens.shape, generator=draw("drawn"))]
        fate = torch.rand(tokens.shape, generator=draw("fate"))
        instead = torch.where(fate < 0.8, tokenizer.mask_id, torch.where(fate < 0.9, drawn, tokens))  # 80/10/10
        seed = torch.randint(2**62, (len(tokens),), generator=draw("agm"))  # one a row, so that slices draw the same
        return dict(ordinary=ordinary, M=M * hide * (r.mask_words > 0), instead=instead, seed=seed)

    def count(self, plan, active):
        """{objective: the number of items that it counts in the whole batch}; recognition's shares add up to 1."""
        pairs = int(plan["change"].sum())
        count = dict(rr=pairs, jps=pairs, cp=0, g2cm=HIDDEN[4] * pairs, b2cm=HIDDEN[5] * pairs, cr=1)
        count["mlm"] = int(plan["M"][plan["change"]].sum())
        count["itm"] = int(plan["judge"].sum())
        if "other" in plan:
            count["cp"] = int((plan["change"] & (plan["other"] >= 0)).sum())
        return {objective: count[objective] for objective in active}

    def losses(self, images, plan):
        """{objective: sum over the items of this slice}; images (B, 3, H, H), plan: this slice of `plan`'s tensors."""
        sums = {}
        for task, (logits, target) in self.answers(images, plan).items():
            if task in ("category", "subcategory"):
                loss = cross_entropy(logits, target) * plan[f"share_{task}"].max()  # one share for all known classes
                sums["cr"] = sums.get("cr", 0) + loss
            else:
                sums[task] = (kld_loss if task in ("g2cm", "b2cm") else cross_entropy)(logits, target)
        return sums

    def answers(self, images, plan):
        """{task: (logits (n, classes), target (n,) or (n, F))} of the items that count in this slice."""
        boxes, framed = self.framed(images)
        if "sat" in plan:
            logits, words = self.captioner(framed, plan["sat"])[0], plan["sat"][:, 1:]
            return {"sat": (logits[words != 0], words[words != 0])}
        clean = cut_all(framed, self.config.patch_side)
        places = places_of(boxes, images)
        if "caption" in plan:
            return {"caption": self.answer_captions(clean, places, plan["caption"])}

        objectives, change, judge = self.recipe.weights, plan["change"], plan["judge"]
        cells = object_cells(images, boxes, self.captioner.grid)
        hidden_words, hidden = self.choose(framed, cells, plan)
        tokens = torch.where(hidden_words, plan["instead"], plan["tokens"])
        shown, camouflaged = self.alter(clean, hidden, plan)
        features = blank(self.look(shown), hidden[:, level(5)])
        visual, text = self.fuse(features, places, tokens)
        answers = {}
        if "mlm" in objectives:
            where = hidden_words & change[:, None]
            answers["mlm"] = self.predict_words(text, where), plan["tokens"][where]  # Eq. 1
        if "itm" in objectives:
            answers["itm"] = self.match(text)[judge], plan["matched"][judge].long()  # Eq. 2
        if "rr" in objectives:
            answers["rr"] = self.rotation(visual)[change], plan["turn"][change]  # Eq. 3
        if "jps" in objectives:
            answers["jps"] = self.jigsaw(visual)[change], plan["order"][change]  # Eq. 4
        if "cp" in objectives:
            counted = change & (plan["other"] >= 0)
            answers["cp"] = self.camouflage(visual)[counted], camouflaged[counted].int().argmax(1)  # Eq. 5
        if "g2cm" in objectives:
            which = hidden[:, level(4)] & change[:, None]
            answers["g2cm"] = self.recolour(visual, which), self.target(clean[:, level(4)][which])  # Eq. 6
        if "b2cm" in objectives:
            which = hidden[:, level(5)] & change[:, None]
            answers["b2cm"] = self.repaint(visual, which), self.target(clean[:, level(5)][which])  # Eq. 7
        if "cr" in objectives:
            for task, logits in zip(("category", "subcategory"), self.recognise(text)):
                known = plan[f"share_{task}"] > 0
                answers[task] = logits[known], plan[task][known]
        return answers

    def choose(self, framed, cells, plan):
        """AAG and AGM: what to hide, words (b, L) and patches (b, 55) bool. A wrong caption has no aligned pairs."""
        aligned, rows = {}, plan["change"].nonzero().flatten()
        if self.recipe.align != "none" and len(rows):
            seen = framed[rows], plan["tokens"][rows]
            pairs = align(self.captioner, *seen, self.alignable, self.recipe.align, cells[rows])
            aligned = dict(zip(rows.tolist(), pairs))
        budgets = {}
        for k, objective in ((3, "cp"), (4, "g2cm"), (5, "b2cm")):
            budgets[k] = HIDDEN[k] if objective in self.recipe.weights else 0
        words = torch.zeros(plan["tokens"].shape, dtype=torch.bool)
        hidden = torch.zeros(len(words), PATCHES, dtype=torch.bool)
        ordinary, M, seed = plan["ordinary"].cpu(), plan["M"].tolist(), plan["seed"].tolist()
        for row in plan["changed"].nonzero().flatten().tolist():
            generator = torch.Generator().manual_seed(seed[row])
            positions = ordinary[row].nonzero().flatten().tolist()
            positions, patches = agm(positions, aligned.get(row, []), M[row], generator, budgets)
            words[row, positions] = True
            hidden[row, patches] = True
        return words.to(framed.device), hidden.to(framed.device)

    def alter(self, clean, hidden, plan):
        """Fig. 5: the patches that are shown, and which of level 3 are another product's, (b, 9) bool."""
        shown = shuffle(turn(clean, plan["turn"]), plan["order"])
        shown = grey(shown, hidden[:, level(4)])
        camouflaged = hidden[:, level(3)]
        if "other" in plan:
            camouflaged = camouflaged & (plan["other"] >= 0)[:, None]
            _, donors = self.framed(plan["other_images"])
            shown = swap(shown, camouflaged, cut(donors, 3, self.config.patch_side))
        return shown, camouflaged

    @torch.no_grad()
    def target(self, patches):
        """What G2CM and B2CM regress for clean patches (n, 3, p, p): a distribution (n, 192 or 2048)."""
        return self.encoder.target(patches)

    def answer_captions(self, patches, places, captions):
        """Captioning: every word is [MASK]; the targets are the caption and its [SEP], not what follows."""
        tokens = self.all_masked(len(captions))
        _, text = self.fuse(self.look(patches), places, tokens)
        target = F.pad(captions, (0, tokens.shape[1] - captions.shape[1]))
        where = (target != 0).index_fill(1, target.new_zeros(1), False)
        return self.predict_words(text, where), target[where]


def initialise(module, deviation):
    """
    Normal, cut at two sigma, for Linear, embeddings, positions and segments; 0 for biases. BERT's deviation is 0.02 at
    width 768; a narrower model needs more, or its attention at first adds next to nothing.
    """
    for name, parameter in module.named_parameters(recurse=False):
        is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight"
        if is_matrix or name in ("position", "segment"):
            nn.init.trunc_normal_(parameter, std=deviation, a=-2 * deviation, b=2 * deviation)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(parameter)


def draw_donors(same, generator):
    """For each pair the place in the batch of another, not the `same` (G, G), each equally likely; -1 if none."""
    chance = torch.rand(same.shape, generator=generator).masked_fill(same, -1)
    best = chance.max(dim=1)
    return best.indices.masked_fill(best.values < 0, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's weights: BERT's, ResNet-50's and the authors'

load_bert = kaleido_weights.load_bert  # (model, state dict or file) -> {their key: what became of it}
load_resnet50 = kaleido_weights.load_resnet50  # the same
load_parts = kaleido_weights.load_parts  # the same, of either or of both in one dict


def load_official(checkpoint, **changes):
    """
    The authors' checkpoint (an .npz of its variables, or a dict) as a Kaleido that computes what theirs computes from
    the features of ResNet-50, which `load_resnet50` adds; `model.report` says what became of each key. Its captioner
    stays as initialised. The configuration is "base" in the shape of the weights; `changes` overrides.
    """
    weights = foreign.open_arrays(checkpoint)
    model = Kaleido(Config(**kaleido_weights.official_shape(weights) | changes))
    model.report = kaleido_weights.load_official(model, weights)
    return model.eval()
