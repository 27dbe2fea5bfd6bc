"""
Laws of vlmo.py. `pytest -q tests/test_vlmo.py`

Equality is checked in float64 on weights large enough to matter (`lively`). The references are loops written here: the
authors' whole graph straight from a state dict with their names, attention by torch.nn, the losses pair by pair.
"""

import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import data
import vlmo
from extras import vlmo_weights
from extras.runtime import UserError
from extras.table import build
from extras.tokenizer import SPECIAL, Tokenizer
from vlmo import Config, Recipe, VLMo

few = settings(deadline=None, max_examples=10)
some = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)
CLS, SEP, MASK = 2, 3, 4
WORDS = Tokenizer(SPECIAL + [f"w{i}" for i in range(9)] + [f"##p{i}" for i in range(6)])  # 20 ids; 14.. are pieces
SMALL = dict(
    image_size=16, patch_size=4, text_len=7, text_reach=9, vocab_size=20, width=8, depth=3, heads=2, mlp_ratio=2,
    fused=1, embed_dim=6, n_category=2, n_subcategory=3, dropout=0.0, drop_path=0.0,
)
PHASES = {0.0: "mim", 0.3: "textmlm", 0.5: "itc", 0.8: "itc itm mlm cr"}  # progress -> what is active under STAGED
STAGED = Recipe(image_until=0.25, text_until=0.4, itm_from=0.6)


# --- Helpers ---


def gen(seed):
    return torch.Generator().manual_seed(seed)


def lively(seed=0, recipe=STAGED, **changes):
    """A model in float64 and eval mode whose every weight matters: fresh weights leave the attention almost uniform."""
    model = VLMo(Config(**SMALL | changes), recipe).double().eval()
    generator = gen(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.ndim > 1 and "position" not in name:
                p.copy_(1.5 * noise / math.prod(p.shape[1:]) ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            elif name.startswith("log_scale"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.5 * noise)
    return model


def pictures(batch, seed=0, size=16):
    return torch.rand(batch, 3, size, size, generator=gen(seed), dtype=torch.float64)


def captions(lengths, seed=0, width=None):
    """One caption per length: [CLS], ordinary ids, [SEP], then padding up to `width`."""
    tokens = torch.zeros(len(lengths), width or max(lengths), dtype=torch.long)
    generator = gen(seed)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(len(SPECIAL), 20, (length,), generator=generator)
        row[0], row[length - 1] = CLS, SEP
    return tokens


def make_split(products, captions_of, lengths, seed=0):
    """A data.Split of tokens without pictures; equal numbers are equal products or captions."""
    n = len(products)
    classes = torch.randint(-1, 2, (2, n), generator=gen(seed))
    return data.Split(
        rows=[{}] * n, pictures=None, tokens=captions(lengths, seed), products=torch.tensor(products),
        captions=torch.tensor(captions_of), groups=torch.zeros(n, dtype=torch.long), categories=classes[0],
        subcategories=classes[1], tokenizer=WORDS, labels={}, text_len=7, fit="stretch",
    )


@st.composite
def splits(draw, least=2, most=6):
    """Splits with repeated products and captions, and captions of all lengths."""
    n = draw(st.integers(least, most))
    numbers = st.lists(st.integers(0, n), min_size=n, max_size=n)
    lengths = draw(st.lists(st.integers(2, 7), min_size=n, max_size=n))
    return make_split(draw(numbers), draw(numbers), lengths, draw(SEEDS))


def recipe_of(preset):
    """The Recipe of a preset, which also holds settings of train.py."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    return Recipe(**{name: value for name, value in vlmo.RECIPES[preset].items() if name in fields})


def draws(seed):
    return lambda what: data.generator(seed, what)


def one_step(model, split, images, parts, progress, seed):
    """The losses of one batch by parts, as the training loop computes them; gradients are left in the parameters."""
    rows, losses, vectors = torch.arange(len(split)), {}, None
    for name, p in model.named_parameters():
        p.grad, p.requires_grad = None, name in model.trained(progress)
    if "itc" in model.active(progress):
        embed = lambda part: model.embed(images[part], split.tokens[rows[part]])
        with torch.no_grad():
            vectors = torch.cat([embed(part) for part in parts], dim=1)
        vectors.requires_grad_()
        loss = model.contrast(vectors, split.same(rows))
        loss.backward()
        for part in parts:
            embed(part).backward(vectors.grad[:, part])
        losses["itc"], vectors = loss.detach(), vectors.detach()
    plan, count = model.plan(split, rows, draws(seed), vectors, progress)
    for part in parts if count else ():
        sliced = {name: value[part] for name, value in plan.items()}
        if "other" in plan:
            sliced["other_images"] = images[plan["other"][part].clamp(min=0)]
        own = None if model.reads(progress) == "captions" else images[part]
        sums = model.losses(own, sliced)
        total = sum(model.recipe.weights[name] * value / max(1, count[name]) for name, value in sums.items())
        total.backward()
        for name, value in sums.items():
            losses[name] = losses.get(name, 0) + value.detach() / max(1, count[name])
    return losses


def outputs(model, images, tokens):
    """What each mode computes."""
    fused_image, fused_text = model.encode(images, tokens)
    vectors = model.embed(images, tokens)
    return {
        "image": model.encode(images, None)[0][0],
        "text": model.encode(None, tokens)[1][0],
        "fused": torch.cat([fused_text[0], fused_image[0]], dim=1),
        "image vector": vectors[0],
        "text vector": vectors[1],
        "image_vl": vectors[2],
        "text_vl": vectors[3],
    }


# --- Which parameters reach which mode ---

MODES = ("image", "text", "fused", "image vector", "text vector", "image_vl", "text_vl")
REACH = {  # part -> which modes, in the order of MODES
    "picture": "x.xx.x.",
    "caption": ".xx.x.x",
    "cross": "..x....",
    "shared": "xxxxxxx",
    "image below": "x.xx.x.",
    "image top": "x..x...",
    "text below": ".xx.x.x",
    "text top": ".x..x..",
    "both": "..x..xx",
    "image tower": "...x...",
    "text tower": "....x..",
    "image tower vl": ".....x.",
    "text tower vl": "......x",
    "heads": ".......",
}


def part(name, lowest_fused):
    """The row of REACH that a parameter belongs to."""
    if name.startswith("blocks."):
        _, i, *rest = name.split(".")
        if rest[0] != "experts":
            return "shared"
        if rest[1] == "both":
            return "both"
        return f"{rest[1]} {'below' if int(i) < lowest_fused else 'top'}"
    first = name.removesuffix(".weight").removesuffix(".bias")
    if first in ("patches", "image_cls", "image_mark", "image_position", "positions.image"):
        return "picture"
    if first in ("word", "word_norm", "segment", "text_mark", "text_position", "positions.text"):
        return "caption"
    rows = {"positions.cross": "cross", "norm": "shared"}
    towers = ("image_tower", "text_tower", "image_tower_vl", "text_tower_vl")
    rows |= {tower: tower.replace("_", " ") for tower in towers}
    return rows.get(first, "heads")


@few
@given(SEEDS, st.sampled_from(["relative", "absolute"]), st.integers(1, 3))
def test_each_mode_is_reached_by_its_experts_and_by_the_shared_attention(seed, positions, fused):
    model = lively(seed, positions=positions, fused=fused)
    images, tokens = pictures(2, seed), captions([7, 4], seed)
    named = dict(model.named_parameters())
    for mode, output in outputs(model, images, tokens).items():
        weight = torch.randn(output.shape, generator=gen(seed), dtype=output.dtype)
        scalar = (weight * output).sum()
        gradients = torch.autograd.grad(scalar, named.values(), allow_unused=True, retain_graph=True)
        for name, gradient in zip(named, gradients):
            reached = gradient is not None and bool((gradient != 0).any())
            expected = REACH[part(name, 3 - fused)][MODES.index(mode)] == "x"
            assert reached == expected, (mode, name)


@few
@given(SEEDS, st.sampled_from(sorted(REACH)))
def test_noise_on_a_part_changes_the_modes_that_it_reaches_and_no_other_by_a_bit(seed, row):
    model = lively(seed)
    images, tokens = pictures(2, seed), captions([7, 4], seed)
    before = outputs(model, images, tokens)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part(name, 2) == row:
                p += torch.randn(p.shape, generator=gen(seed), dtype=p.dtype)
    after = outputs(model, images, tokens)
    for mode, reached in zip(MODES, REACH[row]):
        assert torch.equal(before[mode], after[mode]) == (reached == ".")


@few
@given(SEEDS, st.integers(1, 3))
def test_without_cross_attention_a_pair_is_the_two_joint_ends_read_alone(seed, fused):
    model = lively(seed, fused=fused)
    images, tokens = pictures(3, seed), captions([7, 4, 2], seed)
    with torch.no_grad():
        model.positions.cross.fill_(float("-inf"))
        (image,), (text,) = model.encode(images, tokens)
        _, image_alone = model.tower(model.image_input(images), None, True)
        _, text_alone = model.tower(model.text_input(tokens), tokens, True)
    assert torch.allclose(image, image_alone, atol=1e-12)
    assert torch.allclose(text, text_alone, atol=1e-12)


# --- Padding ---


@few
@given(SEEDS, st.integers(2, 7))
def test_padding_changes_nothing(seed, length):
    model = lively(seed)
    images, tokens = pictures(1, seed), captions([length], seed)
    padded = F.pad(tokens, (0, 7 - length))
    with torch.no_grad():
        short = outputs(model, images, tokens)
        model.word.weight[0] += 1
        long = outputs(model, images, padded)
    for mode, value in short.items():
        if mode == "text":
            long[mode] = long[mode][:, :length]
        if mode == "fused":
            long[mode] = torch.cat([long[mode][:, :length], long[mode][:, 7:]], dim=1)
        assert torch.allclose(value, long[mode], atol=1e-6 if "v" in mode else 1e-12), mode  # vectors are in fp32


@few
@given(SEEDS)
def test_a_pair_does_not_depend_on_its_batch_and_a_row_of_padding_gives_numbers(seed):
    model = lively(seed)
    images, tokens = pictures(4, seed), captions([7, 4, 2, 3], seed)
    tokens[3] = 0
    with torch.no_grad():
        together, alone = outputs(model, images, tokens), outputs(model, images[1:2], tokens[1:2])
    for mode, value in together.items():
        assert value.isfinite().all()
        assert torch.allclose(value[1:2], alone[mode], atol=1e-6 if "v" in mode else 1e-12), mode


# --- Positions ---


def loop_image_rows(W):
    rows = torch.zeros(1 + W * W, 1 + W * W, dtype=torch.long)
    for q, k in itertools.product(range(-1, W * W), repeat=2):
        if q < 0 or k < 0:
            row = (2 * W - 1) ** 2 + (2 if q == k else 0 if q < 0 else 1)
        else:
            row = (q // W - k // W + W - 1) * (2 * W - 1) + (q % W - k % W + W - 1)
        rows[q + 1, k + 1] = row
    return rows


def loop_text_rows(L, R):
    rows = torch.zeros(L, L, dtype=torch.long)
    for q, k in itertools.product(range(L), repeat=2):
        if q == 0 or k == 0:
            rows[q, k] = 2 * R - 3 + (2 if q == k else 0 if q == 0 else 1)
        else:
            rows[q, k] = k - q + R - 2
    return rows


@some
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 4))
def test_rows_of_the_position_tables_equal_a_loop_and_the_longest_text_uses_all(W, L, more):
    assert torch.equal(vlmo.image_rows(W), loop_image_rows(W))
    assert torch.equal(vlmo.text_rows(L, L + more), loop_text_rows(L, L + more))
    if W > 1:
        assert vlmo.image_rows(W).unique().tolist() == list(range((2 * W - 1) ** 2 + 3))
    if L > 2:
        assert vlmo.text_rows(L, L).unique().tolist() == list(range(2 * L))


def shuffled(images, tokens, order, words):
    """The patches of the pictures in another order, and the words between [CLS] and padding."""
    patches = F.unfold(images, 4, stride=4)[:, :, order]
    return F.fold(patches, (16, 16), 4, stride=4), torch.cat([tokens[:, :1], tokens[:, 1:][:, words]], dim=1)


@few
@given(SEEDS)
def test_without_positions_words_and_patches_are_sets_and_with_them_they_are_not(seed):
    model = lively(seed)
    images, tokens = pictures(1, seed), captions([6], seed)
    order, words = torch.randperm(16, generator=gen(seed)), torch.tensor([3, 0, 2, 4, 1])
    assume(not torch.equal(order, torch.arange(16)) and len(tokens[0].unique()) == 6)
    with torch.no_grad():
        for are_sets in (False, True):
            (image,), (text,) = model.encode(images, tokens)
            (image_moved,), (text_moved,) = model.encode(*shuffled(images, tokens, order, words))
            assert torch.allclose(text[:, 1:][:, words], text_moved[:, 1:], atol=1e-10) == are_sets
            assert torch.allclose(image[:, 1:][:, order], image_moved[:, 1:], atol=1e-10) == are_sets
            model.positions.image.zero_()
            model.positions.text.zero_()


@few
@given(SEEDS, st.integers(2, 7))
def test_a_row_of_a_position_table_gets_a_gradient_exactly_if_it_occurs(seed, length):
    model = lively(seed)
    _, (text,) = model.encode(pictures(1, seed), captions([length], seed))
    (torch.randn(text.shape, generator=gen(seed), dtype=text.dtype) * text).sum().backward()
    occurs = torch.zeros(18, dtype=torch.bool)
    occurs[loop_text_rows(length, 9).unique()] = True
    assert torch.equal((model.positions.text.grad != 0).any(dim=1), occurs)


@few
@given(SEEDS, st.integers(0, 2), st.integers(0, 1))
def test_a_column_belongs_to_one_head_of_one_block(seed, block, head):
    model = lively(seed, width=8, depth=3)
    images, tokens = pictures(1, seed), captions([5], seed)
    states, seen = [], []
    for i, layer in enumerate(model.blocks):
        layer.register_forward_hook(lambda *given: states.append(given[2]))
        layer.attn.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    with torch.no_grad():
        model.encode(images, tokens)
        for table in model.positions.parameters():
            table[:, 2 * block + head] = 0
        model.encode(images, tokens)
    for i in range(3):
        assert torch.equal(states[i], states[3 + i]) == (i < block)
        for h in range(2):
            assert torch.equal(seen[i][:, h], seen[3 + i][:, h]) == ((i, h) != (block, head))


# --- References: torch's attention, the authors' graph ---


@few
@given(SEEDS, st.booleans())
def test_a_block_equals_torchs_attention_and_layers(seed, with_scale):
    model = lively(seed, layer_scale=0.1 if with_scale else 0.0)
    block = model.blocks[2]
    reference = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    a, expert = block.attn, block.experts["both"]
    z = torch.randn(2, 5, 8, generator=gen(seed), dtype=torch.float64)
    bias = torch.randn(2, 5, 5, generator=gen(seed + 1), dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(a.qkv.weight)
        reference.in_proj_bias.copy_(torch.cat([a.q_bias, 0 * a.q_bias, a.v_bias]))
        reference.out_proj.weight.copy_(a.proj.weight)
        reference.out_proj.bias.copy_(a.proj.bias)
        gamma_1, gamma_2 = (block.gamma_1, block.gamma_2) if with_scale else (1, 1)
        normed = F.layer_norm(z, (8,), block.norm1.weight, block.norm1.bias, 1e-6)
        mask = bias.repeat(2, 1, 1)  # (B A, T, T)
        expected = z + gamma_1 * reference(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        normed = F.layer_norm(expected, (8,), expert.norm.weight, expert.norm.bias, 1e-6)
        hidden = F.gelu(F.linear(normed, expert.fc1.weight, expert.fc1.bias))
        expected = expected + gamma_2 * F.linear(hidden, expert.fc2.weight, expert.fc2.bias)
        assert torch.allclose(block(z, bias, 3, joint=True), expected, atol=1e-12)


def their_shapes(W=2, D=8, M=3, fused=1, R=5, A=2, L=4, V=20, P=4, E=8, absolute=False):
    """The names and shapes of the authors' state dict after joint pre-training."""
    shapes = {
        "transformer.patch_embed.proj.weight": (D, 3, P, P),
        "transformer.patch_embed.proj.bias": (D,),
        "transformer.cls_token": (1, 1, D),
        "text_embeddings.word_embeddings.weight": (V, D),
        "text_embeddings.position_embeddings.weight": (L, D),
        "text_embeddings.token_type_embeddings.weight": (2, D),
        "token_type_embeddings.weight": (2, D),
        "mlm_score.bias": (V,),
        "mlm_score.decoder.weight": (V, D),
        "logit_scale": (),
        "logit_vl_scale": (),
    }
    if absolute:
        shapes["transformer.pos_embed"] = (1, 1 + W * W, D)
    else:
        shapes["relative_position_bias_table"] = ((2 * W - 1) ** 2 + 3 + 2 + 2 * R, M * A)
    norms = ["transformer.norm", "text_embeddings.LayerNorm", "mlm_score.transform.LayerNorm"]
    linears = {"pooler.dense": (D, D), "itm_score.fc": (2, D), "mlm_score.transform.dense": (D, D)}
    for i in range(M):
        block = f"transformer.blocks.{i}"
        norms.append(f"{block}.norm1")
        for name in ("attn.q_bias", "attn.v_bias") + (() if absolute else ("gamma_1", "gamma_2")):
            shapes[f"{block}.{name}"] = (D,)
        shapes[f"{block}.attn.qkv.weight"] = (3 * D, D)
        linears[f"{block}.attn.proj"] = (D, D)
        for short in ("imag", "text") + (("vl",) if i >= M - fused else ()):
            norms.append(f"{block}.norm2_{short}")
            linears[f"{block}.mlp_{short}.fc1"] = (4 * D, D)
            linears[f"{block}.mlp_{short}.fc2"] = (D, 4 * D)
    for name in norms:
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("image", "text", "vl_image", "vl_text"):
        shapes[f"itc_{name}_proj.fc.weight"] = (E, D)
    return shapes


def their_weights(seed=0, **sizes):
    generator, weights = gen(seed), {}
    for name, shape in sorted(their_shapes(**sizes).items()):
        noise = torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] = 1 + 0.3 * noise
        elif len(shape) > 1 and "position" not in name:
            weights[name] = 1.5 * noise / math.prod(shape[1:]) ** 0.5
        else:
            weights[name] = 0.5 * noise
    return weights


@functools.cache
def loop_rows(W, R, words, n):
    """The authors' joint table of rows (T, T): the image's rows come first, then two for cross, then the text's."""
    first_cross, image, text = (2 * W - 1) ** 2 + 3, loop_image_rows(W), loop_text_rows(max(words, 1), R)
    rows = torch.zeros(words + n, words + n, dtype=torch.long)
    for q, k in itertools.product(range(words + n), repeat=2):
        if q < words and k < words:
            rows[q, k] = first_cross + 2 + text[q, k]
        elif q >= words and k >= words:
            rows[q, k] = image[q - words, k - words]
        else:
            rows[q, k] = first_cross + (0 if q < words else 1)
    return rows


def authors(weights, images, tokens, R=5, A=2, absolute=False):
    """The authors' graph as a loop over blocks, heads, queries and keys, from a state dict with their names."""
    w = {name: value.double() for name, value in weights.items()}
    D = w["transformer.norm.weight"].shape[0]
    M = sum(name.endswith("norm1.weight") for name in w)
    fused_from = min(int(name.split(".")[2]) for name in w if "norm2_vl" in name)
    W = images.shape[2] // w["transformer.patch_embed.proj.weight"].shape[2]
    norm = lambda z, name, eps=1e-6: F.layer_norm(z, (D,), w[f"{name}.weight"], w[f"{name}.bias"], eps)
    linear = lambda z, name: F.linear(z, w[f"{name}.weight"], w.get(f"{name}.bias"))

    proj = "transformer.patch_embed.proj"
    patches = F.conv2d((images - 0.5) / 0.5, w[f"{proj}.weight"], w[f"{proj}.bias"], stride=images.shape[2] // W)
    cls = w["transformer.cls_token"].expand(len(images), -1, -1)
    image_in = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)
    text_in = w["text_embeddings.word_embeddings.weight"][tokens]
    text_in = text_in + w["text_embeddings.token_type_embeddings.weight"][0]
    if absolute:
        image_in = image_in + w["transformer.pos_embed"]
        text_in = text_in + w["text_embeddings.position_embeddings.weight"][: tokens.shape[1]]
    text_in = norm(text_in, "text_embeddings.LayerNorm", 1e-12) + w["token_type_embeddings.weight"][0]
    image_in = image_in + w["token_type_embeddings.weight"][1]

    def bias(block, words, n):
        """(A, T, T): words first, then n image tokens."""
        if absolute:
            return torch.zeros(A, words + n, words + n, dtype=torch.float64)
        rows = loop_rows(W, R, words, n)
        return w["relative_position_bias_table"][rows][:, :, block * A : block * A + A].permute(2, 0, 1)

    def attention(z, i, unseen, words):
        name = f"transformer.blocks.{i}.attn"
        zero = torch.zeros(D, dtype=torch.float64)
        joined = torch.cat([w[f"{name}.q_bias"], zero, w[f"{name}.v_bias"]])
        q, k, v = F.linear(z, w[f"{name}.qkv.weight"], joined).split(D, dim=2)
        biases, heads, wide = bias(i, words, z.shape[1] - words), [], D // A
        for h in range(A):
            own = slice(h * wide, (h + 1) * wide)
            scores = q[..., own] / wide**0.5 @ k[..., own].transpose(1, 2) + biases[h]
            heads.append(scores.masked_fill(unseen[:, None], -math.inf).softmax(2) @ v[..., own])
        return linear(torch.cat(heads, dim=2), f"{name}.proj")

    def feed(z, i, short):
        block = f"transformer.blocks.{i}"
        hidden = F.gelu(linear(norm(z, f"{block}.norm2_{short}"), f"{block}.mlp_{short}.fc1"))
        return w.get(f"{block}.gamma_2", 1) * linear(hidden, f"{block}.mlp_{short}.fc2")

    def run(z, words, kind, unseen):
        """kind: imag, text, imag vl, text vl or pair."""
        for i in range(M):
            block, top = f"transformer.blocks.{i}", i >= fused_from
            branch = attention(norm(z, f"{block}.norm1"), i, unseen, words)
            z = z + w.get(f"{block}.gamma_1", 1) * branch
            if top and kind not in ("imag", "text"):
                z = z + feed(z, i, "vl")
            elif kind == "pair":
                text, image = z[:, :words], z[:, words:]
                z = torch.cat([text + feed(text, i, "text"), image + feed(image, i, "imag")], dim=1)
            else:
                z = z + feed(z, i, kind.split()[0])
        return norm(z, "transformer.norm")

    unseen, all_seen, L = tokens == 0, torch.zeros(len(images), image_in.shape[1], dtype=torch.bool), tokens.shape[1]
    out = {"image": run(image_in, 0, "imag", all_seen), "text": run(text_in, L, "text", unseen)}
    pair = run(torch.cat([text_in, image_in], dim=1), L, "pair", torch.cat([unseen, all_seen], dim=1))
    out["fused_text"], out["fused_image"] = pair[:, :L], pair[:, L:]
    ends = [out["image"], out["text"], run(image_in, 0, "imag vl", all_seen), run(text_in, L, "text vl", unseen)]
    names = ("image", "text", "vl_image", "vl_text")
    out["vectors"] = torch.stack([F.normalize(linear(z[:, 0], f"itc_{n}_proj.fc"), dim=1) for z, n in zip(ends, names)])
    out["match"] = linear(torch.tanh(linear(pair[:, 0], "pooler.dense")), "itm_score.fc")
    transformed = F.gelu(linear(pair[:, :L], "mlm_score.transform.dense"))
    transformed = norm(transformed, "mlm_score.transform.LayerNorm", 1e-12)
    out["words"] = F.linear(transformed, w["mlm_score.decoder.weight"], w["mlm_score.bias"])
    out["scales"] = torch.stack([w["logit_scale"], w["logit_vl_scale"]])
    return out


def ours(model, images, tokens):
    """The same outputs by vlmo.py."""
    fused_image, fused_text = model.encode(images, tokens)
    return {
        "image": model.encode(images, None)[0][0],
        "text": model.encode(None, tokens)[1][0],
        "fused_text": fused_text[0],
        "fused_image": fused_image[0],
        "vectors": model.embed(images, tokens).double(),
        "match": model.match(fused_text),
        "words": model.predict_words(fused_text, torch.ones_like(tokens, dtype=torch.bool)).view(*tokens.shape, -1),
        "scales": torch.stack([model.log_scale, model.log_scale_vl]),
    }


@pytest.mark.parametrize("absolute", [False, True])
def test_load_official_computes_what_the_authors_graph_computes_and_feels_every_key(absolute):
    changes = dict(text_reach=5) | (dict(heads=2) if absolute else {})
    weights = their_weights(absolute=absolute)
    images, tokens = pictures(3, size=8), captions([4, 2, 3])
    moved = {}
    for key in [None, *weights]:
        changed = dict(weights)
        if key:
            changed[key] = weights[key] + torch.randn(weights[key].shape, generator=gen(1))
        model = vlmo.load_official(changed, **changes)
        assert model.report.keys() == weights.keys()
        with torch.no_grad():
            expected = authors(changed, images, tokens, absolute=absolute)
            found = ours(model.double(), images, tokens)
        for name, value in found.items():
            assert torch.allclose(value, expected[name], atol=2e-6), (key, name)
        moved[key] = torch.cat([value.flatten() for value in found.values()])
    unread = {key for key in weights if torch.equal(moved[key], moved[None])}
    expected = set() if absolute else {"text_embeddings.position_embeddings.weight"}
    assert unread == expected


@pytest.mark.parametrize("absolute", [False, True])
def test_a_checkpoint_with_a_missing_unknown_or_ill_shaped_key_is_refused_by_name(absolute):
    weights, sizes = their_weights(absolute=absolute), dict(text_reach=5, heads=2)
    with pytest.raises(UserError, match="stranger"):
        vlmo.load_official(weights | {"stranger": torch.zeros(1)}, **sizes)
    for key in weights:
        without = {name: value for name, value in weights.items() if name != key}
        instead = "transformer.pos_embed" if key == "relative_position_bias_table" else key  # positions must be there
        with pytest.raises(UserError, match=re.escape(instead)):
            vlmo.load_official(without, **sizes)
        read = absolute or key != "text_embeddings.position_embeddings.weight"
        if weights[key].ndim and read:
            with pytest.raises(ValueError):
                vlmo.load_official(weights | {key: weights[key][..., :-1]}, **sizes)
        misshapen = [torch.stack([weights[key]] * 2), weights[key].flatten()[:0]]
        if weights[key].ndim:
            misshapen.append(torch.zeros(()))
        if weights[key].ndim and "_embeddings.weight" not in key:  # of a table of words the first rows would do
            misshapen.append(torch.cat([weights[key]] * 2))
        for value in misshapen:
            with pytest.raises(ValueError):
                vlmo.load_official(weights | {key: value}, **sizes)
        if weights[key].ndim and read:
            with pytest.raises(UserError, match=f"{re.escape(key)} must hold finite numbers|equal ours"):
                vlmo.load_official(weights | {key: torch.full_like(weights[key], math.nan)}, **sizes)


@pytest.mark.parametrize("absent", [
    ("_vl.", "itc", "logit", "pooler", "itm"),  # stage 2: texts alone
    ("mlm_", "itm_score", "itc_vl", "logit_vl"),  # fine-tuned for retrieval
])
def test_what_a_stage_or_a_task_lacks_stays_fresh_and_is_reported(absent):
    weights = {name: value for name, value in their_weights().items() if not any(part in name for part in absent)}
    lacking = their_weights().keys() - weights.keys()
    weights["vqa_classifier.0.weight"] = torch.zeros(3)
    saved_by_deepspeed = {"module": {f"module.{key}": value for key, value in weights.items()}}
    model = vlmo.load_official(saved_by_deepspeed, text_reach=5, fused=1)
    assert {key for key, fate in model.report.items() if fate.startswith("fresh")} == lacking
    assert model.report["vqa_classifier.0.weight"].startswith("ignored")


def test_constant_tables_of_positions_are_compared_with_ours():
    weights = their_weights()
    image, text = loop_image_rows(2), loop_text_rows(4, 5) + 12 + 2
    joint = torch.cat([
        torch.cat([text, torch.full((4, 5), 12)], dim=1),
        torch.cat([torch.full((5, 4), 13), image], dim=1),
    ])
    tables = dict(zip(vlmo_weights.INDEX_TABLES, (image, text, joint.float())))
    assert vlmo.load_official(weights | tables, text_reach=5).report["relative_position_index"].startswith("ignored")
    for name, table in tables.items():
        with pytest.raises(UserError, match=name):
            vlmo.load_official(weights | tables | {name: table.flip(0)}, text_reach=5)


def test_a_smaller_picture_keeps_the_bias_of_every_offset_and_a_larger_one_its_class_rows():
    weights = their_weights(W=4)
    full = vlmo.load_official(weights, text_reach=5).positions
    small = vlmo.load_official(weights, text_reach=5, image_size=8).positions
    large = vlmo.load_official(weights, text_reach=5, image_size=24).positions
    places = torch.tensor([0, 1, 2, 5, 6])  # the class token and the upper left 2 x 2 of 4 x 4 patches
    assert torch.equal(small(1, 0, 5), full(1, 0, 17)[:, places][:, :, places])
    assert torch.equal(large.image[-3:], full.image[-3:])
    assert torch.equal(large(0, 3, 0), full(0, 3, 0))
    absolute = their_weights(W=4, absolute=True)
    model = vlmo.load_official(absolute, text_reach=5, heads=2, image_size=24, text_len=3)
    assert torch.equal(model.image_position[0], absolute["transformer.pos_embed"][0, 0])
    assert torch.equal(model.text_position, absolute["text_embeddings.position_embeddings.weight"][:3])


@pytest.mark.parametrize("shared", [False, True])
def test_beit_becomes_the_image_encoder(shared):
    theirs = {}
    for key, value in their_weights().items():
        if key.startswith("transformer.") and "_text" not in key and "_vl" not in key:
            theirs[key.removeprefix("transformer.").replace("_imag", "")] = value
    table, n = torch.randn(12, 2, generator=gen(3)), 3
    expected_tables = [table] * n if shared else [table + i for i in range(n)]
    beit = dict(theirs, mask_token=torch.zeros(1, 1, 8))
    beit["head.weight"] = beit["blocks.0.attn.relative_position_index"] = torch.zeros(2)
    if shared:
        beit["rel_pos_bias.relative_position_bias_table"] = table
    else:
        beit |= {f"blocks.{i}.attn.relative_position_bias_table": value for i, value in enumerate(expected_tables)}
    config = Config(**SMALL | dict(image_size=8, text_len=4, text_reach=5, mlp_ratio=4))
    model = VLMo(config)
    report = vlmo.load_beit(model, {"model": beit})
    assert report.keys() == beit.keys()
    names = their_weights()
    full = torch.cat([torch.cat(expected_tables, dim=1), names["relative_position_bias_table"][12:]])
    marks = torch.stack([model.text_mark, model.image_mark]).detach()
    reference = names | {"relative_position_bias_table": full, "token_type_embeddings.weight": marks}
    images = pictures(2, size=8)
    with torch.no_grad():
        expected = authors(reference, images, captions([3, 2]))["image"]
        assert torch.allclose(model.double().eval().encode(images, None)[0][0], expected, atol=1e-6)
    del beit["blocks.1.gamma_1"]
    with pytest.raises(UserError, match="blocks.1.gamma_1"):
        vlmo.load_beit(VLMo(config), beit)


# --- Masked words ---


def word_spans(row):
    """The words of a caption of ids as lists of positions: a piece (14..) belongs to the word before it."""
    spans = []
    for place, token in enumerate(row.tolist()):
        if token < len(SPECIAL):
            continue
        starts = token < 14 or place == 0 or row[place - 1] < len(SPECIAL)
        spans.append([place]) if starts else spans[-1].append(place)
    return spans


def mask(tokens, ratio, seed):
    start = torch.tensor([not word.startswith("##") for word in WORDS.words])
    return vlmo.mask_words(tokens, start, 20, MASK, WORDS.special_ids, ratio, gen(seed))


@some
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.floats(0, 1), SEEDS)
def test_whole_words_are_hidden_and_no_special_id(lengths, ratio, seed):
    tokens = captions(lengths, seed)
    before = tokens.clone()
    masked, where = mask(tokens, ratio, seed)
    assert torch.equal(tokens, before)
    assert torch.equal(masked[~where], tokens[~where])
    special = torch.isin(masked, torch.tensor([0, 1, CLS, SEP]))
    assert not special[where].any() and not (where & (tokens < len(SPECIAL))).any()
    for row, hidden, read in zip(tokens, where, masked):
        spans = word_spans(row)
        for span in spans:
            assert len(set(hidden[span].tolist())) == 1  # all pieces or none
            assert len(set((read[span] == MASK).tolist())) == 1  # one fate for all pieces
        assert hidden.any() == (len(spans) > 0 and ratio > 0)


@pytest.mark.parametrize("padding", [0, 30])
def test_a_word_is_hidden_with_its_probability_whatever_the_padding(padding):
    tokens = F.pad(captions([22] * 3000, seed=1), (0, padding))
    masked, where = mask(tokens, 0.15, 0)
    first = torch.zeros_like(where)
    for number, row in enumerate(tokens):
        first[number, [span[0] for span in word_spans(row)]] = True
    words = first.sum().item()
    assert abs((where & first).sum().item() / words - 0.15) < 0.015  # at least one per caption adds a little
    chosen = where & first
    to_mask = (masked == MASK)[chosen].double().mean().item()
    kept = (masked == tokens)[chosen].double().mean().item()  # 10%, and a fifteenth of the random ones
    assert abs(to_mask - 0.8) < 0.02
    assert abs(kept - 0.1 - 0.1 / 15) < 0.015


# --- Stage 1: masked pictures ---


@few
@given(SEEDS, st.floats(0, 1))
def test_hidden_pixels_change_nothing_and_the_plan_hides_an_exact_number(seed, ratio):
    model = lively(seed, Recipe(objectives="mim", mask_ratio=ratio))
    split = make_split([0, 1, 2], [0, 1, 2], [2, 2, 2])
    plan, count = model.plan(split, torch.arange(3), draws(seed), None, 0.0)
    hidden = plan["hidden"]
    assert hidden.sum(dim=(1, 2, 3)).tolist() == [4 * round(ratio * 4)] * 3
    assert count == {"mim": 48 * hidden.sum()}
    images = pictures(3, seed)
    pixels = hidden.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    others = torch.where(pixels, pictures(3, seed + 1), images)
    with torch.no_grad():
        restored = model.restore(images, hidden)
        assert torch.equal(restored, model.restore(others, hidden))
    assert torch.equal(torch.where(pixels, 0, restored), torch.where(pixels, 0, images))


@few
@given(SEEDS)
def test_mim_is_the_mean_difference_over_hidden_pixels(seed):
    model = lively(seed)
    images, hidden = pictures(2, seed), torch.rand(2, 1, 4, 4, generator=gen(seed)) < 0.5
    with torch.no_grad():
        restored = model.restore(images, hidden)
        loss = model.losses(images, {"hidden": hidden})["mim"].item()
    expected = 0.0
    for b, y, x in itertools.product(range(2), range(16), range(16)):
        if hidden[b, 0, y // 4, x // 4]:
            expected += 2 * (restored[b, :, y, x] - images[b, :, y, x]).abs().sum().item()  # in [-1, 1]
    assert loss == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model.pixel_head.weight.zero_()
        model.pixel_head.bias.fill_(0.5)
        flat = torch.full_like(images, 0.75)
        assert model.losses(flat, {"hidden": hidden})["mim"] == 0
        assert model.losses(images, {"hidden": torch.zeros_like(hidden)})["mim"] == 0


# --- Contrast, hard negatives, matching ---


@some
@given(splits(), SEEDS, st.sampled_from([2, 4]))
def test_the_contrast_is_the_mean_of_the_cross_entropies_of_both_ways_and_both_ends(split, seed, n):
    model, G = lively(seed), len(split)
    same = split.same(torch.arange(G))
    vectors = F.normalize(torch.randn(n, G, 5, generator=gen(seed), dtype=torch.float64), dim=2)
    losses = []
    for first, scale in zip(range(0, n, 2), (model.log_scale, model.log_scale_vl)):
        for a, b in ((first, first + 1), (first + 1, first)):
            for i in range(G):
                chances = (scale.detach().exp() * vectors[b] @ vectors[a, i]).exp()
                others = [chances[j].item() for j in range(G) if not same[i, j]]
                losses.append(-math.log(chances[i].item() / (chances[i].item() + sum(others))))
    found = model.contrast(vectors, same).item()
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    order = torch.randperm(G, generator=gen(seed))
    assert model.contrast(vectors[:, order], same[order][:, order]).item() == pytest.approx(found, abs=1e-5)
    swapped = vectors[[1, 0, 3, 2][:n]]
    assert model.contrast(swapped, same).item() == pytest.approx(found, abs=1e-5)

    taught = torch.randn(G, G, generator=gen(seed))
    both = []
    for first, scale in zip(range(0, n, 2), (model.log_scale, model.log_scale_vl)):
        both.append(vlmo.itc_loss(vectors[first], vectors[first + 1], scale, same, taught=taught).item())
    assert model.contrast(vectors, same, taught).item() == pytest.approx(sum(both) / len(both), abs=1e-5)


@some
@given(splits(), SEEDS, st.floats(0, 1))
def test_a_negative_is_another_product_with_another_caption_and_missing_exactly_if_there_is_none(split, seed, hard):
    model = lively(seed, dataclasses.replace(STAGED, hard=hard))
    rows = torch.arange(len(split))
    same = split.same(rows)
    vectors = F.normalize(torch.randn(4, len(split), 5, generator=gen(seed)), dim=2)
    plan, count = model.plan(split, rows, draws(seed), vectors, 0.8)
    for places in (plan["other"], plan["wrong"]):
        for i, place in enumerate(places.tolist()):
            assert (place == -1) == bool(same[i].all())
            assert place == -1 or not same[i, place]
    found = plan["wrong"] >= 0
    assert torch.equal(plan["wrong_words"][found], plan["words"][plan["wrong"][found]])
    assert count["itm"] == len(split) + found.sum() + (plan["other"] >= 0).sum()
    assert count["mlm"] == plan["mlm_where"].sum()


@pytest.mark.parametrize("hard", [0.0, 0.5, 1.0])
def test_negatives_follow_the_towers_in_the_share_that_is_hard(hard):
    G, repeats = 4, 6000
    logits = torch.randn(G, G, generator=gen(3)) * 2
    same = torch.eye(G, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    drawn = vlmo.hard_negatives(logits.repeat(repeats, 1), same.repeat(repeats, 1), hard, gen(0))
    for i in range(G):
        allowed = ~same[i]
        by_the_towers = logits[i].exp() * allowed / (logits[i].exp() * allowed).sum()
        chances = hard * by_the_towers + (1 - hard) * allowed / allowed.sum()
        found = torch.bincount(drawn.view(repeats, G)[:, i], minlength=G) / repeats
        assert torch.allclose(found, chances, atol=0.03)


def test_wrong_captions_are_close_to_the_picture_and_wrong_pictures_to_the_caption():
    model = lively(recipe=dataclasses.replace(STAGED, hard=1.0))
    model.log_scale.data.fill_(math.log(100))
    split = make_split([0, 1, 2], [0, 1, 2], [3, 3, 3])
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    text = F.normalize(torch.tensor([[0.1, 0.9, 0], [0, 0.1, 0.9], [0.9, 0, 0.1]]), dim=1)  # of 0 close to picture 1
    vectors = torch.stack([image, text, text, image])  # the vision-language ends say the opposite
    plan, _ = model.plan(split, torch.arange(3), draws(0), vectors, 0.8)
    assert plan["other"].tolist() == [1, 2, 0]
    assert plan["wrong"].tolist() == [2, 0, 1]


@few
@given(splits(), SEEDS)
def test_itm_is_three_matches_of_which_one_is_true(split, seed):
    model, G = lively(seed), len(split)
    images = pictures(G, seed)
    plan, _ = model.plan(split, torch.arange(G), draws(seed), None, 0.8)
    plan["other_images"] = images[plan["other"].clamp(min=0)]
    expected = 0.0
    with torch.no_grad():
        losses = model.losses(images, plan)
        for i in range(G):
            words = split.tokens[i : i + 1]
            reads = [(i, words, 1)]
            if plan["other"][i] >= 0:
                reads.append((plan["other"][i], words, 0))
            if plan["wrong"][i] >= 0:
                reads.append((i, split.tokens[plan["wrong"][i]][None], 0))
            for place, caption, label in reads:
                logits = model.match(model.encode(images[place][None], caption)[1])
                expected += F.cross_entropy(logits, torch.tensor([label])).item()
        assert losses["itm"].item() == pytest.approx(expected, rel=1e-5)
        score = model.score(images, split.tokens)
        logits = model.match(model.encode(images, split.tokens)[1])
        assert torch.allclose(score, logits[:, 1] - logits[:, 0])
        assert torch.equal(model.embed_images(images), model.embed(images, split.tokens)[0])
        assert torch.equal(model.embed_texts(split.tokens), model.embed(images, split.tokens)[1])


@few
@given(splits(), SEEDS)
def test_mlm_and_recognition_are_cross_entropies_of_the_fused_caption(split, seed):
    model, G = lively(seed, dataclasses.replace(STAGED, objectives="mlm,cr", hard=0.0)), len(split)
    images = pictures(G, seed)
    plan, count = model.plan(split, torch.arange(G), draws(seed), None, 0.8)
    with torch.no_grad():
        losses = model.losses(images, plan)
        text = model.encode(images, plan["mlm_tokens"])[1][0]
        expected = 0.0
        for b, place in plan["mlm_where"].nonzero().tolist():
            logits = model.word_head(text[b, place], model.word.weight)
            expected -= logits.log_softmax(0)[plan["words"][b, place]].item()
        assert losses["mlm"].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        expected = 0.0
        for logits, classes in zip(model.classify(images, plan["words"]), (split.categories, split.subcategories)):
            known = classes >= 0
            if known.any():
                expected += F.cross_entropy(logits[known], classes[known]).item()
        assert losses["cr"].item() / count["cr"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- Stages ---


@pytest.mark.parametrize("progress", PHASES)
def test_a_stage_trains_exactly_what_its_objectives_reach_but_for_the_attention_in_stage_2(progress):
    model, split = lively(2), make_split([0, 1, 2, 3], [0, 1, 2, 3], [7, 6, 5, 7])
    split.categories[:], split.subcategories[:] = 1, 2
    assert " ".join(model.active(progress)) == PHASES[progress]
    assert model.reads(progress) == {"mim": "pictures", "textmlm": "captions"}.get(PHASES[progress], "pairs")
    trained = model.trained(progress)
    model.trained = lambda progress: {name for name, _ in model.named_parameters()}
    one_step(model, split, pictures(4), [slice(0, 4)], progress, 0)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    if progress == 0.3:  # stage 2 freezes them, as the authors do
        reached -= {name for name in reached if name.startswith("blocks") and "experts" not in name}
    assert trained == reached


def test_all_stages_together_train_every_parameter_and_a_recipe_with_fewer_objectives_fewer():
    model = lively()
    together = set().union(*(model.trained(progress) for progress in PHASES))
    assert together == {name for name, _ in model.named_parameters()}
    retrieve = VLMo(Config(**SMALL), recipe_of("retrieve"))
    untrained = {name for name, _ in retrieve.named_parameters()} - retrieve.trained(0.5)
    unused = ("positions.cross", "mask_token", "pixel_head", "pooler", "match_head", "word_head", "category_head")
    unused += ("subcategory_head", "image_tower_vl", "text_tower_vl", "log_scale_vl")
    assert all(".both." in name or name.startswith(unused) for name in untrained)
    assert any(".both." in name for name in untrained)


@pytest.mark.parametrize("progress", PHASES)
def test_steps_move_what_the_stage_trains_and_nothing_else_by_a_bit(progress):
    model, split = lively(4), make_split([0, 1, 2, 3], [0, 1, 2, 3], [7, 6, 5, 7])
    split.categories[:], split.subcategories[:] = 1, 2
    images = pictures(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        states = model.run(range(3), model.image_input(images), None, joint=False)
    for seed in range(3):
        one_step(model, split, images, [slice(0, 4)], progress, seed)
        optimizer.step()
    with torch.no_grad():
        moved = model.run(range(3), model.image_input(images), None, joint=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (name in model.trained(progress)), name
    assert torch.equal(states, moved) == (progress == 0.3)  # stage 2 keeps the image encoder up to the last LayerNorm


@few
@given(splits(), SEEDS)
def test_where_nothing_is_counted_the_loss_and_its_gradient_are_0(split, seed):
    split.products[:], split.categories[:], split.subcategories[:] = 0, -1, -1
    split.tokens[:, 1:] = 0
    model, G = lively(seed, dataclasses.replace(STAGED, objectives="mlm,cr", hard=0.0)), len(split)
    images = pictures(G, seed)
    plan, count = model.plan(split, torch.arange(G), draws(seed), None, 0.8)
    assert count["mlm"] == 0
    losses = model.losses(images, plan)
    sum(losses.values()).backward()
    assert losses["mlm"] == 0 and losses["cr"] == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_stages_follow_the_shares_and_the_last_one_never_ends():
    def stages(**changes):
        model = VLMo(Config(**SMALL), Recipe(**changes))
        return [" ".join(model.active(step / 10)) for step in range(11)]

    shares = dict(image_until=0.2, text_until=0.4, itm_from=0.7)
    late = ["itc itm mlm cr"] * 4
    assert stages(**shares) == ["mim"] * 2 + ["textmlm"] * 2 + ["itc"] * 3 + late
    assert stages(image_until=0.0, text_until=0.0, itm_from=0.7) == ["itc"] * 7 + late
    assert stages(objectives="mim", **shares) == ["mim"] * 11
    assert stages(objectives="mim,textmlm", **shares) == ["mim"] * 2 + ["textmlm"] * 9
    assert stages(objectives="itm,mlm", hard=0.0, **shares) == ["itm mlm"] * 11
    early = dict(image_until=0.5, text_until=0.2, itm_from=0.0)  # without stage 1 its share means nothing
    assert stages(objectives="textmlm,itc", **early) == ["textmlm"] * 2 + ["itc"] * 9


@pytest.mark.parametrize("preset", vlmo.RECIPES)
def test_every_preset_is_a_recipe_that_runs_at_nano(preset, shop):
    recipe = recipe_of(preset)
    rows = data.read(shop, "train")
    tokenizer = Tokenizer.train([row["caption"] for row in rows], 60)
    labels = {field: build(rows).class_names(field) for field in ("category", "subcategory")}
    sizes = dict(vocab_size=len(tokenizer), n_category=4, n_subcategory=8, depth=2, width=16, image_size=32)
    model = VLMo(Config.preset("nano", **sizes), recipe)
    pairs = data.open_split(shop, "train", tokenizer, labels, 32, 48)
    model.prepare(pairs)
    assert model.word_start.tolist() == [not word.startswith("##") for word in tokenizer.words]
    pools = {"pairs": pairs, "pictures": data.picture_pool(pairs), "captions": data.caption_pool(pairs)}
    for progress in (0.0, 0.15, 0.3, 0.9):
        split = pools[model.reads(progress)]
        rows = torch.arange(5)
        plan, count = model.plan(split, rows, draws(1), None, progress)
        images = None if split.pictures is None else split.images(rows)
        if "other" in plan:
            plan["other_images"] = images[plan["other"].clamp(min=0)]
        losses = model.losses(images, plan) if count else {}
        assert losses.keys() == count.keys() == set(model.active(progress)) - {"itc"}
        assert all(loss.isfinite() for loss in losses.values())


# --- The whole ---


@pytest.mark.parametrize("size, count", [("base", 202_413_982), ("large", 599_085_118), ("base_plus", 184_980_190)])
def test_the_papers_sizes_have_the_authors_number_of_parameters(size, count):
    with torch.device("meta"):
        model = VLMo(Config.preset(size))
    ours_alone = ("mask_token", "pixel_head")  # MIM's, which the authors leave to BEiT
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith(ours_alone)) == count


@pytest.mark.parametrize("setting, value", [
    ("image_size", 18), ("width", 9), ("fused", 4), ("text_reach", 6), ("init_std", 0.0),
    ("positions", "none"), ("depth", 0), ("dropout", 1.0), ("tie_words", 1), ("layer_scale", -1), ("vocab_size", 2.0),
])
def test_an_impossible_shape_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=setting):
        Config(**SMALL | {setting: value})


@pytest.mark.parametrize("name, given", [
    ("objectives", dict(objectives="itc,mir")), ("hard", dict(objectives="itm")),
    ("hard", dict(objectives="itm,itc:0")), ("mask_ratio", dict(mask_ratio=1.5)),
    ("text_until", dict(image_until=0.5, text_until=0.4)), ("second_contrast", dict(second_contrast="no")),
])
def test_an_impossible_recipe_is_refused_by_name(name, given):
    with pytest.raises(ValueError, match=name):
        Recipe(**given)


def test_inputs_of_another_shape_are_refused_by_name():
    model = lively()
    with pytest.raises(ValueError, match="images"):
        model.encode(pictures(1, size=8), None)
    with pytest.raises(ValueError, match="tokens"):
        model.encode(None, captions([8]))
    with pytest.raises(ValueError, match="encode"):
        model.encode(None, None)


@few
@given(SEEDS)
def test_recomputation_changes_nothing_and_stochastic_depth_skips_whole_samples(seed):
    model = lively(seed, drop_path=0.6).train()
    images, tokens = pictures(6, seed), captions([5] * 6, seed)
    results = []
    for model.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(seed % 1000)
        (image,), (text,) = model.encode(images, tokens)
        (image.sum() + (text**2).sum()).backward()
        results.append((text.detach(), model.patches.weight.grad))
    for plain, recomputed in zip(*results):
        assert torch.allclose(plain, recomputed, atol=1e-12)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0, 0.3, 0.6])
    block, z = vlmo.Block(model.config, ("image", "text"), 1 - 1e-6).train(), torch.randn(4, 5, model.config.width)
    assert torch.equal(block(z, None, 2, False), z)  # both branches


def test_fresh_weights_have_the_deviation_of_their_size_and_words_are_dropped_out():
    fresh = VLMo(Config(**SMALL | dict(width=32, init_std=0.1))).blocks[0].experts["text"].fc1.weight
    assert 0.16 < fresh.abs().max() <= 0.2
    model = lively(dropout=0.5).train()
    assert not torch.equal(model.text_input(captions([5])), model.text_input(captions([5])))


def test_hard_negatives_are_drawn_by_a_scale_of_at_most_100(monkeypatch):
    model, seen = lively(), []
    model.log_scale.data.fill_(math.log(1000))
    spy = lambda logits, *rest: seen.append(logits) or torch.zeros(3, dtype=torch.long)
    monkeypatch.setattr(vlmo, "hard_negatives", spy)
    model.draw_negatives(torch.eye(3).bool(), torch.eye(3).expand(4, 3, 3), draws(0))
    assert seen[0].max() == pytest.approx(100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same():
    model = lively().float()
    images, tokens = pictures(3).float(), captions([7, 2, 4])
    with torch.no_grad():
        expected = outputs(model, images, tokens)
        found = outputs(model.cuda(), images.cuda(), tokens.cuda())
    for mode, value in expected.items():
        assert torch.allclose(value, found[mode].cpu(), atol=1e-4), mode


def test_the_tied_word_head_reads_the_embedding_backwards():
    model = lively(tie_words=True)
    (text,) = model.encode(None, captions([5]))[1]
    assert model.word_head.decoder is None
    head = model.word_head
    z = head.norm(F.gelu(head.dense(text[0, 1])))
    found = model.predict_words([text], torch.tensor([[False, True, False, False, False]]))
    assert torch.allclose(found[0], model.word.weight @ z + head.bias)
