"""
Laws of mvlt.py: the model, its masks, its losses and its training step. `pytest -q test_mvlt.py`

Where a law says "equal" it is checked in float64 on weights large enough to matter (`lively`); the references are plain
loops written here.
"""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import data
import mvlt
from extras import foreign
from mvlt import MVLT, Config

settings.register_profile("mvlt", deadline=None, max_examples=25)
settings.load_profile("mvlt")
SEEDS = st.integers(0, 2**32 - 1)
STYLES = st.sampled_from(mvlt.MASK_STYLES)
SMALL = Config(
    image_size=32,
    text_len=10,
    vocab_size=30,
    token_dim=16,
    dims=(16, 16, 24, 32),
    depths=(1, 2, 1, 1),
    heads=(1, 2, 3, 4),
    mlp_ratios=(2, 1, 1, 2),
    sr_ratios=(4, 2, 1, 1),
    n_category=3,
    n_subcategory=5,
    embed_dim=8,
)
SPECIAL = [0, 1, 2, 3, 4]  # [PAD] [UNK] [CLS] [SEP] [MASK]
CLS, SEP, MASK = 2, 3, 4


@st.composite
def configs(draw):
    """Any legal configuration, of little work."""
    patch = draw(st.sampled_from([2, 4]))
    side = draw(st.integers(1, 3))  # of stage 4's map
    heads, depths, mlp_ratios = (draw(st.tuples(*[st.integers(1, most)] * 4)) for most in (3, 2, 2))
    return Config(
        image_size=8 * patch * side,
        patch_size=patch,
        text_len=draw(st.integers(2, 9)),
        vocab_size=draw(st.integers(6, 20)),
        token_dim=draw(st.integers(2, 9)),
        dims=tuple(h * draw(st.integers(2, 5)) for h in heads),
        depths=depths,
        heads=heads,
        mlp_ratios=mlp_ratios,
        sr_ratios=tuple(
            draw(st.sampled_from([r for r in (1, 2, 3, 4, 8) if side * 2 ** (3 - k) % r == 0])) for k in range(4)
        ),
        attend_padding=draw(st.booleans()),
        embed_dim=draw(st.integers(2, 5)),
        n_category=draw(st.integers(1, 4)),
        n_subcategory=draw(st.integers(1, 4)),
    )


def lively(config, seed=0):
    """A model in float64 and eval mode whose every weight matters; fresh weights attend nearly uniformly."""
    model, generator = MVLT(config).double().eval(), gen(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.ndim > 1:
                p.copy_(noise / math.prod(p.shape[1:]) ** 0.5 * (1 if "position" in name else 1.5))
            else:
                p.copy_(0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model


def gen(seed):
    return torch.Generator().manual_seed(seed)


def pictures(config, batch, seed=0):
    return torch.rand(batch, 3, config.image_size, config.image_size, generator=gen(seed), dtype=torch.float64)


def captions(config, lengths, seed=0, width=None):
    """One caption per entry of `lengths`: [CLS], ordinary words, [SEP], then padding up to `width`."""
    tokens = torch.zeros(len(lengths), width or max(lengths), dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(len(SPECIAL), config.vocab_size, (length,), generator=gen(seed + length))
        row[0], row[length - 1] = CLS, SEP
    return tokens


def everything(model, images, tokens, words=None):
    """All that the model says of these pictures and captions, the first `words` words only."""
    visual, text = model.encode(images, tokens)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 0] = True
    answers = [model.reconstruct(visual), model.match(text), model.predict_words(text, where), *model.recognise(text)]
    return visual + [t[:, :words] for t in text] + answers


def assert_equal(ones, others, tolerance=None):
    """Equal to 1e-9 in float64; pictures and towers answer in float32, so those to 1e-6."""
    for one, other in zip(ones, others, strict=True):
        usual = 1e-9 if one.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, other, rtol=0, atol=usual if tolerance is None else tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_the_default_is_the_papers_table_1():
    c = Config.preset("tiny")
    assert (c.dims, c.depths, c.image_size, c.patch_size, c.text_len) == (
        (64, 128, 320, 512),
        (2, 2, 2, 2),
        256,
        4,
        128,
    )
    assert [c.side(k) for k in range(4)] == [64, 32, 16, 8] and c == Config()


def test_a_configuration_survives_json_and_cannot_be_edited():
    assert Config(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.image_size = 64


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=100), "image_size must be a multiple of 8 patch_size = 32, got 100"),
        (dict(image_size=0), "image_size must be a whole number, 1 or more, got 0"),
        (dict(patch_size=4.0), "patch_size must be a whole number, 1 or more, got 4.0"),
        (dict(vocab_size=True), "vocab_size must be a whole number, 1 or more, got True"),
        (dict(token_dim=-1), "token_dim must be a whole number, 1 or more, got -1"),
        (dict(embed_dim="8"), "embed_dim must be a whole number, 1 or more, got '8'"),
        (dict(text_len=1), "text_len must be a whole number, 2 or more, got 1"),
        (dict(dims=(64, 128, 320)), "dims must be four positive whole numbers, got (64, 128, 320)"),
        (dict(depths=(2, 2, 0, 2)), "depths must be four positive whole numbers, got (2, 2, 0, 2)"),
        (dict(heads=(1, 2, 5, 7)), "dims[3] must be a multiple of heads[3] = 7, got 512"),
        (dict(sr_ratios=(8, 4, 3, 1)), "sr_ratios[2] must divide the side 16 of that stage's map, got 3"),
        (dict(mlp_ratios=(8, 8, 4, -4)), "mlp_ratios must be four positive whole numbers, got (8, 8, 4, -4)"),
        (dict(dims=3), "dims must be four positive whole numbers, got 3"),
        (dict(dropout="0.1"), "dropout must lie in [0, 1), got '0.1'"),
        (dict(attend_padding="no"), "attend_padding must be True or False, got 'no'"),
        (dict(drop_path=1), "drop_path must lie in [0, 1), got 1"),
        (dict(dropout=-0.1), "dropout must lie in [0, 1), got -0.1"),
        (dict(n_category=-1), "n_category must be a whole number, 0 or more, got -1"),
        (dict(n_subcategory=1.5), "n_subcategory must be a whole number, 0 or more, got 1.5"),
    ],
)
def test_an_impossible_value_is_refused_with_the_setting_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config(**changes)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="size must be one of pico, nano, tiny, small, medium, large, got 'huge'"):
        Config.preset("huge")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, and what may be absent


@given(config=configs(), batch=st.integers(1, 3), data=st.data(), seed=SEEDS)
def test_shapes_for_any_legal_configuration_batch_and_length_with_either_side_absent(config, batch, data, seed):
    model = MVLT(config).eval()
    length = data.draw(st.integers(1, config.text_len))
    images, tokens = (
        pictures(config, batch).float(),
        torch.randint(config.vocab_size, (batch, length), generator=gen(seed)),
    )
    where = torch.rand(batch, length, generator=gen(seed)) < 0.5
    for seen, read in ((images, tokens), (images, None), (None, tokens)):
        visual, text = model.encode(seen, read)
        if seen is None:
            assert visual == []
        else:
            assert [v.shape for v in visual] == [
                (batch, config.dims[k], config.side(k), config.side(k)) for k in range(4)
            ]
            assert model.reconstruct(visual).shape == images.shape
        if read is None:
            assert text == []
        else:
            assert [t.shape for t in text] == [(batch, length, dim) for dim in config.dims]
            assert model.match(text).shape == (batch, 2)
            assert model.predict_words(text, where).shape == (where.sum(), config.vocab_size)
            assert [logits.shape for logits in model.recognise(text)] == [
                (batch, config.n_category),
                (batch, config.n_subcategory),
            ]
    assert model.embed_images(images).shape == model.embed_texts(tokens).shape == (batch, config.embed_dim)


@pytest.mark.parametrize(
    "images, tokens, message",
    [
        (None, None, "encode needs images or tokens"),
        ((2, 3, 64, 64), None, "images must be (B, 3, 32, 32), got (2, 3, 64, 64)"),
        ((2, 1, 32, 32), None, "images must be (B, 3, 32, 32), got (2, 1, 32, 32)"),
        (None, (2, 11), "tokens must be (B, L) with L in 1..10, got (2, 11)"),
        (None, (2, 0), "tokens must be (B, L) with L in 1..10, got (2, 0)"),
        (None, (5,), "tokens must be (B, L) with L in 1..10, got (5,)"),
    ],
)
def test_inputs_of_another_shape_are_refused(images, tokens, message):
    images, tokens = images and torch.zeros(images), tokens and torch.ones(tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=re.escape(message)):
        MVLT(SMALL).encode(images, tokens)


def test_recognition_without_its_heads_is_refused():
    model = lively(dataclasses.replace(SMALL, n_subcategory=0))
    _, text = model.encode(None, captions(SMALL, [4]))
    with pytest.raises(ValueError, match="recognise needs n_category and n_subcategory above 0"):
        model.recognise(text)


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 8), min_size=1, max_size=3))
def test_each_side_attends_to_the_other(seed, lengths):
    model, images, tokens = lively(SMALL, seed), pictures(SMALL, len(lengths), seed), captions(SMALL, lengths, seed)
    visual, text = model.encode(images, tokens)
    alone, _ = model.encode(images, None)
    _, unseen = model.encode(None, tokens)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(visual + text, alone + unseen))


@given(seed=SEEDS)
def test_fresh_weights_see_pixels_around_mid_grey(seed):
    """Black and white lie four times PyTorch's default either side of mid-grey."""
    torch.manual_seed(seed)
    look, bound = (
        MVLT(SMALL).stages[0].embed_image,
        1 / math.sqrt(3 * SMALL.patch_size**2),
    )  # of PyTorch's default weights and biases
    black, grey, white = (look(torch.full((1, 3, 4, 4), value)).flatten() for value in (0.0, 0.5, 1.0))
    assert grey.abs().max() <= bound + 1e-5  # the bias alone
    torch.testing.assert_close(white - grey, grey - black)
    assert 3 * bound < look.weight.abs().max() <= 4 * bound + 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Padding, neighbours, evaluation mode


@given(
    seed=SEEDS,
    lengths=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    more=st.integers(1, 2),
    with_picture=st.booleans(),
)
def test_more_padding_changes_nothing(seed, lengths, more, with_picture):
    model, short = lively(SMALL, seed), captions(SMALL, lengths, seed)
    images = pictures(SMALL, len(lengths), seed)
    long = torch.cat([short, torch.zeros(len(lengths), more, dtype=torch.long)], dim=1)
    if with_picture:
        assert_equal(everything(model, images, short, min(lengths)), everything(model, images, long, min(lengths)))
    else:
        assert_equal(*[[t[:, : min(lengths)] for t in model.encode(None, tokens)[1]] for tokens in (short, long)])
    assert_equal([model.embed_texts(short)], [model.embed_texts(long)])


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 8), min_size=1, max_size=3))
def test_what_stands_at_the_padding_changes_nothing(seed, lengths):
    model, images, tokens = (
        lively(SMALL, seed),
        pictures(SMALL, len(lengths), seed),
        captions(SMALL, lengths, seed, width=10),
    )
    before = [everything(model, images[i : i + 1], tokens[i : i + 1], length) for i, length in enumerate(lengths)]
    vectors = model.embed_texts(tokens)
    with torch.no_grad():
        model.words.word.weight[0] += 5  # [PAD]
    after = [everything(model, images[i : i + 1], tokens[i : i + 1], length) for i, length in enumerate(lengths)]
    for one, other in zip(before, after):
        one[-3], other[-3] = one[-3][:, 1:], other[-3][:, 1:]  # the logit of [PAD] itself is tied to what was changed
        assert_equal(one, other)
    assert_equal([vectors], [model.embed_texts(tokens)])


@given(seed=SEEDS, length=st.integers(2, 9), width=st.integers(0, 8))
def test_with_attend_padding_a_caption_is_read_with_all_of_its_padding_as_in_the_authors_code(seed, length, width):
    """So its result does not depend on how the batch was cut, but differs from that with masked padding."""
    config = dataclasses.replace(SMALL, attend_padding=True)
    model, masked, images = lively(config, seed), lively(SMALL, seed), pictures(SMALL, 1)
    short = captions(SMALL, [length], seed)
    wide = nn.functional.pad(short, (0, min(width, SMALL.text_len - length)))
    full = nn.functional.pad(short, (0, SMALL.text_len - length))
    answers = everything(model, images, full, length)
    for tokens in (short, wide):
        assert_equal(everything(model, images, tokens, length), answers)
        assert model.encode(images, tokens)[1][0].shape[1] == tokens.shape[1]
    assert_equal([model.embed_texts(short)], [model.embed_texts(full)])
    assert (everything(masked, images, full, length)[-4] - answers[-4]).abs().max() > 1e-6


def test_an_empty_caption_and_even_a_row_of_padding_give_numbers():
    tokens = torch.tensor([[CLS, SEP, 0], [0, 0, 0]])
    model = lively(SMALL)
    assert all(
        out.isfinite().all() for out in everything(model, pictures(SMALL, 2), tokens) + [model.embed_texts(tokens)]
    )


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 10), min_size=2, max_size=3))
def test_a_result_does_not_depend_on_the_neighbours_in_the_batch(seed, lengths):
    model, images, tokens = lively(SMALL, seed), pictures(SMALL, len(lengths), seed), captions(SMALL, lengths, seed)
    together = everything(model, images, tokens) + [model.embed_images(images), model.embed_texts(tokens)]
    for i in range(len(lengths)):
        one, words = images[i : i + 1], tokens[i : i + 1]
        alone = everything(model, one, words) + [model.embed_images(one), model.embed_texts(words)]
        assert_equal([out[i : i + 1] for out in together], alone)


def test_dropout_and_drop_path_work_in_training_and_are_off_in_evaluation():
    config = dataclasses.replace(SMALL, dropout=0.5, drop_path=0.5)
    images, tokens = pictures(config, 4), captions(config, [6] * 4)
    model, plain = lively(config), lively(dataclasses.replace(config, dropout=0.0, drop_path=0.0))
    assert_equal(everything(model, images, tokens), everything(plain, images, tokens), 0)
    for part in (mvlt.DropPath, nn.Dropout):
        for module in model.modules():
            module.training = isinstance(module, part)
        torch.manual_seed(0)
        assert (everything(model, images, tokens)[7] - everything(plain, images, tokens)[7]).abs().max() > 1e-3


@given(seed=SEEDS, rate=st.sampled_from([0.1, 0.5, 0.9]), batch=st.integers(1, 20))
def test_drop_path_skips_whole_samples_and_scales_up_the_rest(seed, rate, batch):
    torch.manual_seed(seed)
    branch = torch.rand(batch, 3, 2, dtype=torch.float64) + 1
    for one, out in zip(branch, mvlt.DropPath(rate).train()(branch)):
        assert (out == 0).all() or torch.allclose(out, one / (1 - rate))


def test_a_dropped_sample_skips_both_branches_of_a_block():
    block, z = mvlt.Block(8, 2, 2, 1, 1 - 1e-6).train(), torch.randn(4, 5, 8)
    assert torch.equal(block(z, 5, 0, None), z)


def test_fresh_matrices_are_normal_of_0_02_cut_at_two_deviations_and_biases_are_0():
    torch.manual_seed(0)
    for module in MVLT(Config.preset("pico")).modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            chance = 5 * 0.0176 / math.sqrt(2 * module.weight.numel())  # five standard errors of the deviation
            assert module.weight.abs().max() <= 0.04 and abs(module.weight.std() - 0.0176) < chance
            assert getattr(module, "bias", None) is None or not module.bias.any()


@given(seed=SEEDS, keys=st.integers(1, 6), masked=st.booleans())
def test_attention_written_out_for_the_cpu_equals_pytorchs_own_for_the_gpu(seed, keys, masked):
    q, k, v = (
        torch.randn(2, 3, 5, 4, generator=gen(seed)).double(),
        *torch.randn(2, 2, 3, keys, 4, generator=gen(seed)).double(),
    )
    seen = torch.rand(2, 1, 1, keys, generator=gen(seed)) < 0.5
    seen[..., 0] = True
    seen = seen if masked else None
    assert_equal(
        [mvlt.attend(q, k, v, seen)], [torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)]
    )


def test_drop_path_grows_from_0_to_its_rate_and_drops_that_share():
    """False alarm: 4000 samples, each dropped with probability 0.3; Bernstein's bound fails for one seed in 1e9."""
    rates = [
        block.drop_path.rate
        for stage in MVLT(dataclasses.replace(SMALL, drop_path=0.4)).stages
        for block in stage.blocks
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    dropped = (mvlt.DropPath(0.3).train()(torch.ones(4000, 1, 1)) == 0).sum().item()
    assert abs(dropped - 1200) <= deviation(4000, 0.3)


def test_recomputing_activations_changes_neither_results_nor_gradients():
    results = []
    for recompute in (False, True):
        model = lively(dataclasses.replace(SMALL, dropout=0.3, drop_path=0.5)).train()
        model.recompute = recompute
        torch.manual_seed(0)
        out = model.match(model.encode(pictures(SMALL, 2), captions(SMALL, [5, 7]))[1])
        out.square().sum().backward()
        results.append([out] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) > 100
    assert_equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where attention takes another path")
def test_a_gpu_computes_the_same():
    model, images, tokens = lively(SMALL), pictures(SMALL, 2), captions(SMALL, [5, 7])
    expected = everything(model, images, tokens)
    found = everything(model.cuda(), images.cuda(), tokens.cuda())
    assert_equal([out.cpu() for out in found], expected)
    masked, where = mvlt.mask_tokens(tokens.cuda(), 30, MASK, SPECIAL, generator=gen(0))
    assert_equal([masked.cpu(), where.cpu()], mvlt.mask_tokens(tokens, 30, MASK, SPECIAL, generator=gen(0)), 0)
    masked, hidden = mvlt.mask_images(images.cuda(), unit=4, generator=gen(0))
    assert_equal([masked.cpu(), hidden.cpu()], mvlt.mask_images(images, unit=4, generator=gen(0)), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def plain_attention(attention, z, words, side, seen):
    """The same, one number at a time: z (L + N, D), seen a list of bool for the words; pictures are always seen."""
    D, heads, R = z.shape[1], attention.heads, attention.sr.kernel_size[0] if attention.sr else 1
    keys, allowed = [z[i] for i in range(words)], list(seen)
    for row, column in itertools.product(range(0, side, R), range(0, side, R)):
        window = {(i, j): z[words + (row + i) * side + column + j] for i in range(R) for j in range(R)}
        key = window[0, 0]
        if R > 1:
            key = attention.sr.bias + sum(attention.sr.weight[:, :, i, j] @ patch for (i, j), patch in window.items())
            key = layer_norm(key, attention.norm.weight, attention.norm.bias, 1e-5)
        keys.append(key)
        allowed.append(True)
    weight, bias, d = attention.kv.weight, attention.kv.bias, D // heads
    out = torch.zeros_like(z)
    for i, h in itertools.product(range(len(z)), range(heads)):
        part = slice(h * d, (h + 1) * d)
        q = (attention.q.weight @ z[i] + attention.q.bias)[part]
        exps = [
            float(ok) * torch.exp(q @ (weight[:D] @ key + bias[:D])[part] / d**0.5) for key, ok in zip(keys, allowed)
        ]
        values = [(weight[D:] @ key + bias[D:])[part] for key in keys]
        out[i, part] = sum(e / sum(exps) * v for e, v in zip(exps, values))
    return torch.stack([attention.proj.weight @ row + attention.proj.bias for row in out])


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(eps).sqrt() * weight + bias


@torch.no_grad()
@given(
    seed=SEEDS,
    heads=st.integers(1, 3),
    each=st.integers(1, 3),
    reduction=st.integers(1, 2),
    windows=st.integers(0, 2),
    data=st.data(),
)
def test_attention_with_reduction_equals_a_plain_loop(seed, heads, each, reduction, windows, data):
    seen = (
        data.draw(st.lists(st.booleans(), max_size=3))
        if windows
        else [True] + data.draw(st.lists(st.booleans(), max_size=3))
    )
    torch.manual_seed(seed)
    side, dim = reduction * windows, heads * each
    attention = mvlt.Attention(dim, heads, reduction).double()
    z = torch.randn(1, len(seen) + side * side, dim, dtype=torch.float64)
    mask = torch.tensor(seen + [True] * windows**2)[None, None, None]
    out = attention(z, len(seen), side, mask)[0]
    assert_equal([out], [plain_attention(attention, z[0], len(seen), side, seen)])
    if all(seen):
        assert_equal([attention(z, len(seen), side, None)[0]], [out])


@torch.no_grad()
@given(
    seed=SEEDS,
    heads=st.integers(1, 4),
    each=st.integers(1, 4),
    batch=st.integers(1, 3),
    words=st.integers(1, 5),
    side=st.integers(0, 3),
)
def test_attention_without_reduction_equals_nn_multihead_attention(seed, heads, each, batch, words, side):
    torch.manual_seed(seed)
    ours, reference = (
        mvlt.Attention(heads * each, heads, 1).double(),
        nn.MultiheadAttention(heads * each, heads, batch_first=True).double(),
    )
    reference.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
    reference.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
    reference.out_proj.load_state_dict(ours.proj.state_dict())
    z = torch.randn(batch, words + side**2, heads * each, dtype=torch.float64)
    seen = torch.rand(batch, words + side**2) < 0.7
    seen[:, 0] = True
    assert_equal(
        [ours(z, words, side, seen[:, None, None])], [reference(z, z, z, key_padding_mask=~seen, need_weights=False)[0]]
    )


@given(
    seed=SEEDS,
    batch=st.integers(0, 6),
    tokens=st.integers(1, 4),
    dim=st.integers(1, 4),
    hidden=st.integers(1, 6),
    at_once=st.integers(1, 60),
)
def test_the_mlp_in_pieces_equals_linear_gelu_linear_and_keeps_its_hidden_layer_once(
    seed, batch, tokens, dim, hidden, at_once
):
    torch.manual_seed(seed)
    mlp = mvlt.MLP(dim, hidden).double()
    mlp.AT_ONCE, sizes, kept = at_once, [], []
    places = set()  # of what may be kept: the input, and the hidden layer before GELU
    mlp.fc1.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel()) or places.add(out.data_ptr()))
    z = torch.randn(batch, tokens, dim, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        out = mlp(z)
    assert max(sizes) <= max(at_once, tokens * hidden)
    places |= {z.data_ptr() + z.element_size() * tokens * dim * i for i in range(batch + 1)}
    places |= {p.data_ptr() for p in mlp.parameters()}
    assert set(kept) <= places
    out.square().sum().backward()
    grads = [z.grad.clone(), *(p.grad.clone() for p in mlp.parameters())]

    z.grad = None
    mlp.zero_grad()
    whole = (
        0.5 * (x := z @ mlp.fc1.weight.T + mlp.fc1.bias) * (1 + torch.erf(x / 2**0.5)) @ mlp.fc2.weight.T + mlp.fc2.bias
    )
    whole.square().sum().backward()
    assert_equal([out, *grads], [whole, z.grad, *(p.grad for p in mlp.parameters())])


# ---------------------------------------------------------------------------------------------------------------------
# Picture masks


def deviation(n, p, alarm=1e-9):
    """How far a binomial count may be from n p: by Bernstein's inequality, further with a probability below `alarm`."""
    a = math.log(2 / alarm)
    return a / 3 + math.sqrt(a**2 / 9 + 2 * a * n * p * (1 - p))


UNITS = dict(h=st.integers(1, 8), w=st.integers(1, 8), unit=st.integers(1, 5), ratio=st.floats(0, 1), seed=SEEDS)


@given(**UNITS, batch=st.integers(1, 4))
def test_random_hides_exactly_its_share_of_whole_aligned_units_in_every_picture(h, w, unit, ratio, seed, batch):
    images = torch.rand(batch, 3, h * unit, w * unit, generator=gen(seed))
    _, hidden = mvlt.mask_images(images, "random", ratio, unit, gen(seed))
    units = hidden[:, 0, ::unit, ::unit]
    assert (units.sum(dim=(1, 2)) == round(ratio * h * w)).all()
    for i, j in itertools.product(range(h * unit), range(w * unit)):
        assert (hidden[:, 0, i, j] == units[:, i // unit, j // unit]).all()


def test_random_makes_every_choice_of_units_equally_likely():
    """False alarm: 20 choices of 3 in 6 units, 20000 draws, Bernstein's bound for 1e-9: fails for one seed in 5e7."""
    units = mvlt.draw_units(20000, (2, 3), "random", 0.5, 1, gen(0)).flatten(1)
    counts = (units * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    for number, count in enumerate(counts.tolist()):
        if number.bit_count() == 3:
            assert abs(count - 1000) <= deviation(20000, 1 / 20)
        else:
            assert count == 0


@given(style=STYLES, **UNITS)
def test_hidden_pixels_are_filled_the_others_kept_and_the_input_is_not_edited(style, h, w, unit, ratio, seed):
    images = torch.rand(2, 3, h * unit, w * unit, generator=gen(seed)) + 0.1
    before = images.clone()
    masked, hidden = mvlt.mask_images(images, style, ratio, unit, gen(seed))
    assert hidden.shape == (2, 1, h * unit, w * unit) and hidden.dtype == torch.bool
    assert torch.equal(images, before)
    assert torch.equal(masked, torch.where(hidden, 1e-6, images))
    again, _ = mvlt.mask_images(images, style, ratio, unit, gen(seed))
    assert torch.equal(masked, again)  # the same generator gives the same mask
    assert hidden.all() if ratio == 1 else not hidden.any() if ratio == 0 else True


@pytest.mark.parametrize("style", ["random", "stroke"])
def test_another_generator_gives_another_mask_and_pictures_differ(style):
    units = mvlt.draw_units(2, (32, 32), style, 0.5, 4, gen(0))
    assert not torch.equal(units[0], units[1]) and not torch.equal(
        units, mvlt.draw_units(2, (32, 32), style, 0.5, 4, gen(1))
    )


@given(h=st.integers(1, 9), w=st.integers(1, 9), ratio=st.floats(0, 1))
def test_grid_is_a_regular_lattice_and_none_comes_nearer_to_the_ratio(h, w, ratio):
    units = mvlt.draw_units(2, (h, w), "grid", ratio, 1)
    lattice = units[0, 0].tolist()
    assert torch.equal(units[0], units[1])
    assert all(lattice[i][j + 1] == lattice[i + 1][j] for i in range(h - 1) for j in range(w - 1))
    share = sum(map(sum, lattice)) / (h * w)
    for m in range(1, max(h, w) + 1):
        for n in range(m + 1):
            other = sum((i + j) % m < n for i in range(h) for j in range(w)) / (h * w)
            assert abs(share - ratio) <= abs(other - ratio) + 1e-6


def test_grid_at_one_half_is_a_chessboard():
    assert mvlt.draw_units(1, (64, 64), "grid", 0.5, 16)[0, 0].tolist() == [
        [(i + j) % 2 == 0 for j in range(4)] for i in range(4)
    ]


@given(H=st.integers(1, 40), W=st.integers(1, 40), ratio=st.floats(0, 1))
def test_center_is_one_centred_rectangle_of_that_area(H, W, ratio):
    hidden = mvlt.draw_units(1, (H, W), "center", ratio, 1)[0, 0]
    rows, columns = hidden.any(1).nonzero().flatten().tolist(), hidden.any(0).nonzero().flatten().tolist()
    if not hidden.any():
        assert min(H, W) * ratio**0.5 <= 0.5  # too thin to be drawn
        return
    for line, side in ((rows, H), (columns, W)):
        assert line == list(range(line[0], line[-1] + 1)) and abs(len(line) - side * ratio**0.5) <= 0.5
        assert abs(line[0] - (side - len(line)) / 2) <= 0.5  # as much before it as behind
    assert hidden.sum() == len(rows) * len(columns)


@given(most=st.integers(8, 64), width=st.integers(1, 6), ratio=st.floats(0, 1), seed=SEEDS)
def test_strokes_hide_exactly_the_ratio(most, width, ratio, seed):
    size = most // width * width
    hidden = mvlt.draw_units(1, (size, size), "stroke", ratio, width, gen(seed))[0, 0].sum().item()
    assert hidden == round(ratio * size**2)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_a_stroke_is_as_wide_as_a_unit_and_goes_any_way(seed):
    hidden = mvlt.draw_units(1, (64, 64), "stroke", 20 / 64**2, 4, gen(seed))[0, 0]
    again = gen(seed)  # where the first stroke starts, and how it goes
    y, x = divmod(int(torch.randint(64 * 64, (), generator=again)), 64)
    angle, length = (torch.rand(2, generator=again) * torch.tensor([2 * math.pi, 32])).tolist()
    steps = [t * length / 200 for t in range(201)]
    path = [(y + step * math.sin(angle), x + step * math.cos(angle)) for step in steps]
    cells = itertools.product(range(64), range(64))
    near = {cell for cell in cells if min(math.dist(cell, place) for place in path) <= 2.01}
    assume(len(near) >= 25)  # otherwise a second stroke follows
    assert {tuple(cell) for cell in hidden.nonzero().tolist()} <= near


@pytest.mark.parametrize(
    "style, ratio, unit, message",
    [
        ("dots", 0.5, 4, "mask style must be one of random, grid, stroke, center, got 'dots'"),
        ("random", 1.5, 4, "mask ratio must lie in [0, 1], got 1.5"),
        ("grid", float("nan"), 4, "mask ratio must lie in [0, 1], got nan"),
        ("random", 0.5, 5, "mask unit must divide the picture's sides 16 and 24, got 5"),
        ("center", 0.5, 0, "mask unit must divide the picture's sides 16 and 24, got 0"),
    ],
)
def test_an_impossible_mask_is_refused(style, ratio, unit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mvlt.mask_images(torch.zeros(1, 3, 16, 24), style, ratio, unit)


@given(style=STYLES, seed=SEEDS, ratio=st.floats(0.1, 0.9))
def test_hidden_pixels_cannot_leak(style, seed, ratio):
    model, tokens, images = (
        lively(SMALL).float(),
        captions(SMALL, [5, 7]),
        torch.rand(2, 3, 32, 32, generator=gen(seed)),
    )
    masked, hidden = mvlt.mask_images(images, style, ratio, 4, gen(seed))
    others, _ = mvlt.mask_images(torch.where(hidden, 1 - images, images), style, ratio, 4, gen(seed))
    assert torch.equal(masked, others)  # all that the model gets
    if not hidden.all():
        shown, _ = mvlt.mask_images(torch.where(hidden, images, 1 - images), style, ratio, 4, gen(seed))
        assert any(
            (one != other).any()
            for one, other in zip(everything(model, masked, tokens), everything(model, shown, tokens))
        )


# ---------------------------------------------------------------------------------------------------------------------
# Word masks


def mask_words(tokens, ratio=0.15, seed=0, vocab_size=30):
    return mvlt.mask_tokens(
        tokens, vocab_size=vocab_size, mask_id=MASK, special_ids=SPECIAL, ratio=ratio, generator=gen(seed)
    )


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 30), min_size=1, max_size=5), ratio=st.floats(0, 1))
def test_word_masks_touch_ordinary_words_only_at_least_one_per_caption_and_keep_the_rest(seed, lengths, ratio):
    tokens = captions(SMALL, lengths, seed)
    before = tokens.clone()
    masked, where = mask_words(tokens, ratio, seed)
    assert torch.equal(tokens, before)
    assert torch.equal(masked[~where], tokens[~where])
    assert (tokens[where] >= len(SPECIAL)).all()  # neither [CLS] nor [SEP] nor padding is to be predicted
    assert ((masked[where] == MASK) | (masked[where] >= len(SPECIAL))).all()  # and no special word is drawn
    if ratio > 0:
        assert (where.any(1) == torch.tensor([length > 2 for length in lengths])).all()
    else:
        assert not where.any()
    if ratio == 1:
        assert torch.equal(where, tokens >= len(SPECIAL))
    again, where_again = mask_words(tokens, ratio, seed)
    assert torch.equal(masked, again) and torch.equal(where, where_again)


@pytest.mark.parametrize(
    "words, captions_", [(400, 1000), (1, 60000)]
)  # long captions; captions whose only word has to be chosen
def test_15_percent_of_the_words_are_chosen_and_of_those_80_masked_10_replaced_10_kept(words, captions_):
    """False alarm: at most 30 counts, each within Bernstein's bound for 1e-9: fails for one seed in 3e7."""
    word = 7
    tokens = torch.full((captions_, words + 2), word)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    masked, where = mask_words(tokens)
    n = where.sum().item()
    if words > 1:  # no caption of 400 words is left without a choice but for 0.85^400 = 6e-29
        assert abs(n - 0.15 * words * captions_) <= deviation(words * captions_, 0.15)
    else:
        assert n == captions_
    counts = masked[where].bincount(minlength=30).tolist()
    assert abs(counts[MASK] - 0.8 * n) <= deviation(n, 0.8)
    assert abs(counts[word] - (0.1 + 0.1 / 25) * n) <= deviation(n, 0.1 + 0.1 / 25)  # kept, or replaced by itself
    assert abs(n - counts[MASK] - counts[word] - 0.1 * 24 / 25 * n) <= deviation(n, 0.1 * 24 / 25)
    for other in set(range(5, 30)) - {word}:
        assert abs(counts[other] - 0.1 / 25 * n) <= deviation(n, 0.1 / 25)


def test_the_word_that_has_to_be_chosen_is_any_of_the_caption():
    """False alarm: 4 counts within Bernstein's bound for 1e-9: fails for one seed in 2e8."""
    tokens = torch.tensor([[CLS, 5, 6, 7, 8, SEP, 0]]).repeat(8000, 1)
    _, where = mask_words(tokens, ratio=1e-9)
    assert (where.sum(1) == 1).all()
    assert all(abs(where[:, i].sum().item() - 2000) <= deviation(8000, 0.25) for i in range(1, 5))


def test_word_masks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=re.escape("mask ratio of words must lie in [0, 1], got 2")):
        mask_words(captions(SMALL, [4]), ratio=2)
    with pytest.raises(ValueError, match="vocab_size must leave an ordinary word beside special_ids, got 5"):
        mask_words(torch.tensor([[CLS, SEP]]), vocab_size=5)


# ---------------------------------------------------------------------------------------------------------------------
# Losses

NUMBERS = st.floats(-3, 3, width=32)


@given(pairs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_mir_loss_is_smooth_l1_number_by_number(pairs):
    rebuilt, images = (torch.tensor(side).view(1, 1, 1, -1) for side in zip(*pairs))
    expected = [0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in pairs]
    assert mvlt.mir_loss(rebuilt, images).item() == pytest.approx(sum(expected) / len(pairs), abs=1e-5)
    assert mvlt.mir_loss(images, images).item() == 0  # a perfect reconstruction costs nothing


@pytest.mark.parametrize(
    "error, value, slope",
    [
        (0.3, 0.045, 0.3),
        (-0.3, 0.045, -0.3),
        (0.999, 0.499, 0.999),
        (1.001, 0.501, 1),
        (2, 1.5, 1),
        (-2, 1.5, -1),
    ],
)
def test_mir_loss_has_its_value_and_slope_on_both_sides_of_1(error, value, slope):
    rebuilt = torch.tensor([[[[error, 0.0]]]], requires_grad=True)
    loss = mvlt.mir_loss(rebuilt, torch.zeros(1, 1, 1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(value / 2, abs=1e-3)
    assert rebuilt.grad.flatten().tolist() == pytest.approx([slope / 2, 0])


def cross_entropy(logits, right):
    return -math.log(math.exp(logits[right]) / sum(map(math.exp, logits)))


@given(rows=st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans()), min_size=1, max_size=6))
def test_itm_loss_is_the_cross_entropy_worked_by_hand(rows):
    logits, matched = torch.tensor([row[:2] for row in rows]), torch.tensor([row[2] for row in rows])
    expected = sum(cross_entropy(row[:2], int(row[2])) for row in rows) / len(rows)
    assert mvlt.itm_loss(logits, matched).item() == pytest.approx(expected, abs=1e-5)


@given(rows=st.lists(st.tuples(st.lists(NUMBERS, min_size=5, max_size=5), st.integers(-1, 4)), min_size=1, max_size=6))
def test_mlm_and_recognition_losses_are_the_cross_entropy_worked_by_hand_over_what_is_known(rows):
    logits, right = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    known = [cross_entropy(*row) for row in rows if row[1] >= 0]
    expected = sum(known) / max(1, len(known))
    everyone = torch.ones(len(rows), dtype=torch.bool)
    assert mvlt.recognition_loss(logits, *mvlt.share_known(right, everyone)).item() == pytest.approx(expected, abs=1e-5)
    assert mvlt.mlm_loss(logits[right >= 0], right[right >= 0]).item() == pytest.approx(expected, abs=1e-5)


def test_the_papers_weights_are_10_1_1_and_a_flag_may_change_each():
    assert mvlt.Recipe(objectives="mir,itm,mlm").weights == {"mir": 10, "itm": 1, "mlm": 1}  # Eq. 8
    assert mvlt.Recipe(objectives="mlm:0.5,mir").weights == {"mlm": 0.5, "mir": 10}
    for wrong in ("", "mir,mir", "mir,colour", "mir:x", "mir:-1", "mir:inf"):
        with pytest.raises(ValueError, match="objectives must"):
            mvlt.Recipe(objectives=wrong)


def test_mlm_with_nothing_hidden_costs_0_with_gradient_0():
    model, tokens = lively(SMALL), captions(SMALL, [5, 7])
    _, text = model.encode(pictures(SMALL, 2), tokens)
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    loss = mvlt.mlm_loss(model.predict_words(text, nowhere), tokens[nowhere])
    loss.backward()
    assert loss.item() == 0
    assert model.word_head.dense.weight.grad is not None
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@given(
    seed=SEEDS,
    products=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    log_scale=st.floats(-1, 3),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    has_teachers=st.booleans(),
)
def test_itc_loss_equals_a_plain_loop_in_which_the_same_product_is_never_a_negative(
    seed, products, log_scale, smoothing, has_teachers
):
    random = gen(seed)
    images, texts = nn.functional.normalize(
        torch.randn(2, len(products), 4, generator=random, dtype=torch.float64), dim=-1
    )
    taught = 5 * torch.randn(len(products), len(products), generator=random) if has_teachers else None
    same = torch.tensor(products)[:, None] == torch.tensor(products)
    costs = []
    for way, (one, other) in enumerate(((images, texts), (texts, images))):
        for i, product in enumerate(products):
            rivals = [i] + [j for j, rival in enumerate(products) if rival != product]
            logits = [(math.exp(log_scale) * one[i] @ other[j]).item() for j in rivals]
            each = [cross_entropy(logits, j) for j in range(len(rivals))]
            cost = (1 - smoothing) * each[0] + smoothing * sum(each) / len(rivals)
            if has_teachers:
                theirs = [math.exp(taught[(i, j) if way == 0 else (j, i)]) for j in rivals]
                imitation = sum(share * one_cost for share, one_cost in zip(theirs, each)) / sum(theirs)
                cost = 0.2 * cost + 0.8 * imitation
            costs.append(cost)
    scale, back = torch.tensor(log_scale), taught.T if has_teachers else None
    loss = mvlt.itc_loss(images, texts, scale, same, smoothing, taught).item()
    assert loss == pytest.approx(sum(costs) / len(costs), rel=1e-5, abs=1e-5)
    assert mvlt.itc_loss(texts, images, scale, same, smoothing, back).item() == pytest.approx(loss, rel=1e-5, abs=1e-5)


def test_the_contrast_is_smoothed_in_training_and_not_in_validation():
    model = MVLT(SMALL, mvlt.Recipe(smoothing=0.2))
    vectors, same = nn.functional.normalize(torch.randn(2, 5, 8, generator=gen(0)), dim=-1), torch.eye(5).bool()
    plain, smooth = (mvlt.itc_loss(*vectors, model.log_scale, same, smoothing) for smoothing in (0.0, 0.2))
    assert model.train().contrast(vectors, same) == smooth != plain == model.eval().contrast(vectors, same)


def test_the_contrast_imitates_the_teachers_the_right_way_round():
    model, same = MVLT(SMALL), torch.eye(5).bool()
    vectors = nn.functional.normalize(torch.randn(2, 5, 8, generator=gen(0)), dim=-1)
    taught = 5 * torch.randn(5, 5, generator=gen(1))
    assert model.contrast(vectors, same, taught) == mvlt.itc_loss(*vectors, model.log_scale, same, 0.0, taught)


def test_itc_loss_gives_no_gradient_to_an_entry_of_the_same_product_and_bounds_its_scale_at_100():
    images, texts = nn.functional.normalize(torch.randn(2, 3, 4, generator=gen(0)), dim=-1)
    texts.requires_grad_()
    same = torch.ones(3, 3, dtype=torch.bool)
    loss = mvlt.itc_loss(images, texts, torch.tensor(1.0), same)
    loss.backward()
    assert loss.item() == 0 and (texts.grad == 0).all()  # every other entry is the same product: nothing to tell apart
    apart = torch.eye(3, dtype=torch.bool)
    assert mvlt.itc_loss(images, texts, torch.tensor(50.0), apart) == mvlt.itc_loss(
        images, texts, torch.tensor(100.0).log(), apart
    )


@torch.no_grad()
@given(seed=SEEDS, objectives=st.sampled_from(["itm", "itm,itc"]))
def test_scores_and_classes_are_computed_in_float32_from_the_encoder_in_bf16(seed, objectives):
    """So that the scores of two candidates tie only where the encoder cannot tell them apart."""
    model = lively(dataclasses.replace(SMALL, n_category=2, n_subcategory=3)).float().eval()
    model.recipe = mvlt.Recipe(objectives=objectives)
    images = torch.rand(2, 3, SMALL.image_size, SMALL.image_size, generator=gen(seed))
    tokens = torch.randint(1, SMALL.vocab_size, (2, 5), generator=gen(seed))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        visual, text = model.encode(images, tokens)
        score, classes = model.score(images, tokens), model.classify(images, tokens)
    logits = model.match_pair([v.float() for v in visual], [t.float() for t in text], tokens)
    assert score.equal(logits[:, 1] - logits[:, 0])
    assert all(ours.equal(right) for ours, right in zip(classes, model.recognise([t.float() for t in text])))


def test_itc_loss_is_computed_in_float32_under_autocast_too():
    images, texts = torch.nn.functional.normalize(torch.randn(2, 9, 6, generator=gen(0)), dim=-1)
    alone = mvlt.itc_loss(images, texts, torch.tensor(3.0), torch.eye(9, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mvlt.itc_loss(images, texts, torch.tensor(3.0), torch.eye(9, dtype=torch.bool)) == alone


# ---------------------------------------------------------------------------------------------------------------------
# Which loss reaches which part

REACHED = {
    "mir": {"words", "stages", "decoder"},
    "itm": {"words", "stages", "match_head"},
    "itm with towers": {"words", "stages", "match_head", "image_tower", "text_tower"},
    "mlm": {"words", "stages", "word_head"},
    "itc": {"words", "stages", "image_tower", "text_tower", "log_scale"},
    "distil": {"words", "stages", "image_tower", "text_tower"},
    "recognition": {"words", "stages", "category_head", "subcategory_head"},
}


def losses(model):
    """Every loss of the model on one small batch."""
    images, tokens = pictures(SMALL, 3), captions(SMALL, [10, 7, 8])
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 2:4] = True
    visual, text = model.encode(images, tokens)
    category, subcategory = model.recognise(text)
    known = mvlt.share_known(torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool))
    return {
        "mir": mvlt.mir_loss(model.reconstruct(visual), images),
        "itm": mvlt.itm_loss(model.match(text), torch.tensor([1, 0, 1])),
        "itm with towers": mvlt.itm_loss(model.match_pair(visual, text, tokens), torch.tensor([1, 0, 1])),
        "mlm": mvlt.mlm_loss(model.predict_words(text, where), tokens[where]),
        "itc": mvlt.itc_loss(
            model.embed_images(images), model.embed_texts(tokens), model.log_scale, torch.eye(3, dtype=torch.bool)
        ),
        "distil": mvlt.distil_loss(model.pair_vectors(visual, text, tokens), model.embed(images, tokens).detach()),
        "recognition": mvlt.recognition_loss(category, *known) + mvlt.recognition_loss(subcategory, *known),
    }


def touched(model, loss):
    """The names of the parameters to which a loss gives a gradient (above rounding)."""
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, gradients) if gradient is not None and gradient.abs().max() > 1e-9}


@pytest.mark.parametrize("name", REACHED)
def test_a_loss_reaches_every_parameter_of_its_parts_and_of_no_other(name):
    model = lively(SMALL)
    assert touched(model, losses(model)[name]) == {
        p for p, _ in model.named_parameters() if p.split(".")[0] in REACHED[name]
    }


def test_every_parameter_is_reached_by_the_total_loss():
    model = lively(SMALL)
    parts = losses(model)
    eq_8 = sum(weight * parts[name] for name, weight in mvlt.Recipe(objectives="mir,itm,mlm").weights.items())
    ours = {
        "image_tower",
        "text_tower",
        "log_scale",
        "category_head",
        "subcategory_head",
    }  # what the paper's pre-training does not have
    assert touched(model, eq_8) == {p for p, _ in model.named_parameters() if p.split(".")[0] not in ours}
    assert touched(model, sum(parts.values())) == {p for p, _ in model.named_parameters()}


def test_the_decoder_is_a_u_net_in_pytorchs_own_functions():
    model, f = lively(SMALL), nn.functional
    visual, _ = model.encode(pictures(SMALL, 2), None)
    x = visual[3]
    for up, skip in zip(model.decoder.up, visual[2::-1]):
        x = torch.cat([f.conv_transpose2d(x, up.grow.weight, up.grow.bias, 2), skip], 1)
        for conv, norm in ((up.join, up.norm1), (up.refine, up.norm2)):
            x = f.gelu(f.group_norm(f.conv2d(x, conv.weight, conv.bias, padding=1), 8, norm.weight, norm.bias))
    x = f.conv2d(x, model.decoder.pixels.weight, model.decoder.pixels.bias, padding=1)  # (2, 3 P^2, 8, 8)
    x = x.view(2, 3, 4, 4, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 32, 32)
    assert_equal([model.reconstruct(visual)], [x.sigmoid().float()])


@pytest.mark.parametrize("level", range(4))
def test_mir_reads_each_of_the_four_maps(level):
    model = lively(SMALL)
    visual, _ = model.encode(pictures(SMALL, 1), captions(SMALL, [5]))
    without = [torch.zeros_like(v) if k == level else v for k, v in enumerate(visual)]
    assert (model.reconstruct(visual) - model.reconstruct(without)).abs().max() > 1e-3


@given(seed=SEEDS, lengths=st.lists(st.integers(2, 10), min_size=1, max_size=3))
def test_towers_give_unit_vectors_from_one_side_alone(seed, lengths):
    model, images, tokens = lively(SMALL, seed), pictures(SMALL, len(lengths), seed), captions(SMALL, lengths, seed)
    for vectors in (model.embed_images(images), model.embed_texts(tokens)):
        assert_equal([vectors.norm(dim=1)], [torch.ones(len(lengths))])
    _, text = model.encode(None, tokens)
    for i, length in enumerate(lengths):
        means = means_word_by_word(model, text[3][i, :length], tokens[i, :length])
        assert_equal([model.text_tower(means[None])], [model.embed_texts(tokens)[i : i + 1]])


def test_the_text_tower_trains_the_word_embeddings_directly_and_the_stages():
    model, tokens = lively(SMALL), captions(SMALL, [6])
    t4 = [t.detach() for t in model.encode(None, tokens)[1]]
    without_stages = model.text_vector(t4, tokens)[0, 0]
    (gradient,) = torch.autograd.grad(without_stages, model.words.word.weight)
    read = torch.zeros(len(gradient), dtype=torch.bool)
    read[tokens] = True
    assert ((gradient != 0).any(dim=1) == read).all()
    last = model.stages[3].blocks[-1].mlp.fc2.weight
    (gradient,) = torch.autograd.grad(model.embed_texts(tokens)[0, 0], last)
    assert gradient.abs().max() > 0


def normalised(x):
    """x with a mean of 0 and a variance of 1 (a little less, for the 1e-5) over its last dimension."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def means_word_by_word(model, t4, tokens):
    """What the text tower reads of one caption without padding, t4 (L, D4) and tokens (L,), written out."""
    embeddings = model.words.word.weight
    alone = sum(embeddings[token] for token in tokens) / len(tokens)
    in_context = sum(t4) / len(tokens)
    return torch.cat([normalised(alone), normalised(in_context)])


def places_one_by_one(visual, batch):
    """V3 and V4 place by place: the mean of the pixels that each of at most 4 x 4 cells touches, then normalised."""
    places = []
    for v in visual[2:]:
        side = v.shape[2]
        grid = min(side, 4)
        for down in range(grid):
            for right in range(grid):
                rows, columns = (
                    [y for y in range(side) if y * grid < (cell + 1) * side and (y + 1) * grid > cell * side]
                    for cell in (down, right)
                )
                mean = sum(v[:, :, y, x] for y in rows for x in columns) / len(rows) / len(columns)  # (B, D_k)
                places.append(normalised(mean))
    return torch.cat(places, dim=1).view(batch, -1)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 8])
def test_the_image_tower_keeps_apart_the_places_of_v3_and_v4_and_averages_them_from_five_a_side_on(side):
    model = lively(dataclasses.replace(SMALL, image_size=32 * side))
    images = pictures(model.config, 2)
    visual, _ = model.encode(images, None)
    assert_equal([model.image_tower(places_one_by_one(visual, 2))], [model.embed_images(images)])


# ---------------------------------------------------------------------------------------------------------------------
# One training step: the recipe, its plan and its losses

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"red blue green coat dress hat wool silk long short".split()]


def shop(products=12, seed=0):
    """A split without pictures whose products share some captions and sub-categories."""
    random = gen(seed)
    rows = []
    for number in range(products):
        words = [WORDS[5 + i] for i in torch.randint(10, (3,), generator=random).tolist()]
        kind = "" if number % 5 == 4 else f"kind {number % 3}"
        row = dict(image=f"{number}.png", caption=" ".join(words), product_id=str(number // 2), where="")
        rows.append(row | dict(category=kind and "things", subcategory=kind))
    labels = {"category": ["things"], "subcategory": ["kind 0", "kind 1", "kind 2"]}
    return data.make_split(rows, None, data.Tokenizer(WORDS), labels, SMALL.text_len, "stretch")


def drawer(seed):
    return lambda what: data.generator(seed, 3, what)


@st.composite
def recipes(draw):
    objectives = draw(st.sampled_from(["mir,itm,mlm,itc,distil,cr", "mir,itm,mlm", "mir,mlm", "itm,itc", "cr"]))
    inner = st.floats(0.05, 0.95)
    hard_from = [0.0, 0.99] if "distil" in objectives else [0.0, 1.0] if "itc" in objectives else [1.0]
    return mvlt.Recipe(
        objectives=objectives,
        unmasked_itm=draw(st.booleans()),
        mask_pictures=draw(inner),
        mask_style=draw(STYLES),
        mask_ratio=draw(st.floats(0, 1)),
        mask_unit=8,
        mask_words=draw(st.sampled_from([0.0, 0.15, 1.0])),
        hard_from=draw(st.sampled_from(hard_from)),
        drop_caption=draw(st.sampled_from([0.0, 0.5, 0.9])),
    )


def tower_vectors(recipe, G, seed):
    """What the towers might say of G pairs, where the recipe has towers."""
    if "itc" not in recipe.weights:
        return None
    return nn.functional.normalize(torch.randn(2, G, SMALL.embed_dim, generator=gen(seed)), dim=2)


def stepper(recipe):
    config = dataclasses.replace(SMALL, vocab_size=len(WORDS), n_category=1, n_subcategory=3)
    return MVLT(config, recipe)


@given(recipe=recipes(), seed=SEEDS, G=st.integers(1, 12))
def test_a_plan_keeps_its_promises(recipe, seed, G):
    split, model = shop(), stepper(recipe)
    rows = torch.randperm(len(split), generator=gen(seed))[:G]
    vectors = tower_vectors(recipe, G, seed)
    torch.manual_seed(seed)  # the global generator has no influence
    plan, count = model.plan(split, rows, drawer(seed), vectors, 1.0)
    torch.manual_seed(seed + 1)
    again, _ = model.plan(split, rows, drawer(seed), vectors, 1.0)
    assert all(torch.equal(plan[name], again[name]) and len(plan[name]) == G for name in plan)
    assert count.keys() == recipe.weights.keys() - {"itc"}

    hidden = plan["units"].flatten(1).any(dim=1)
    own = mvlt.trim(split.tokens[rows])
    own = nn.functional.pad(own, (0, 99))[:, : plan["words"].shape[1]]
    no_caption = (plan["words"] != 0).sum(dim=1) == 2  # [CLS] [SEP]
    assert torch.equal((plan["words"] == own).all(dim=1), plan["matched"] & ~no_caption)
    if "itm" not in recipe.weights:
        assert plan["matched"].all()
    elif not recipe.unmasked_itm:
        alone = split.same(rows).all(dim=1) & (vectors is not None)  # the batch has no wrong caption for them
        assert plan["matched"][alone].all()
        assert (G + 1) // 2 - int(alone.sum()) <= int((plan["matched"] & ~alone).sum()) <= (G + 1) // 2
    for name in ("rebuild", "predict"):  # MIR and MLM learn from true pairs only
        assert not (plan[name].view(G, -1).any(dim=1) & ~plan["matched"]).any()
    where = plan["predict"]
    assert not torch.isin(plan["words"][where], torch.tensor(SPECIAL)).any()
    changed = (plan["tokens"] != plan["words"]).any(dim=1)
    assert not (changed & plan["matched"] & ~where.any(dim=1)).any()
    if recipe.unmasked_itm:
        assert not (hidden | changed)[plan["judge"]].any()  # matching reads pairs as they come at test time
    if not {"mir", "mlm"} & recipe.weights.keys() and (recipe.unmasked_itm or "itm" not in recipe.weights):
        assert not hidden.any()  # nothing is hidden from a pair for objectives that do not read it then
    counted = (plan["share_category"] > 0) | (plan["share_subcategory"] > 0)
    assert not (hidden & counted).any() and not (counted & ~plan["matched"]).any()
    assert not (no_caption & plan["judge"]).any()
    expected = dict(mir=plan["rebuild"].sum(), itm=plan["judge"].sum(), mlm=where.sum(), cr=1)
    expected["distil"] = plan["judge"].sum()  # the pairs of ITM
    assert all(count[name] == int(expected[name]) for name in count)
    for share in (plan["share_category"], plan["share_subcategory"]):
        assert share.sum() == pytest.approx(1) or not share.any()


@given(seed=SEEDS, towers_choose=st.booleans())
def test_a_wrong_caption_is_of_another_product_and_says_something_else(seed, towers_choose):
    split = shop(seed=seed)
    split.tokens = split.tokens[:]
    split.tokens[:, 1] = torch.arange(len(split)) % 10 + 5
    split.tokens[:, 2] = torch.arange(len(split)) // 10 + 5  # words 1 and 2 say which row a caption came from
    recipe = mvlt.Recipe(objectives="itm,mir,itc", unmasked_itm=False, mask_unit=8, hard_from=0.5)
    model = stepper(recipe)
    rows = torch.randperm(len(split), generator=gen(seed))[:8]
    plan, _ = model.plan(split, rows, drawer(seed), tower_vectors(recipe, 8, seed), 0.5 if towers_choose else 0.4)
    for place in (~plan["matched"]).nonzero().flatten().tolist():
        row, words = rows[place], plan["words"][place]
        other = int(words[1] - 5 + 10 * (words[2] - 5))
        assert split.products[other] != split.products[row] and split.captions[other] != split.captions[row]
        assert other in rows or not towers_choose


def test_the_towers_choose_the_wrong_captions_that_they_find_likely():
    recipe = mvlt.Recipe(objectives="itm,itc", hard_from=0.0, mask_pictures=0.0)
    model, split = stepper(recipe), shop()
    model.log_scale.data.fill_(99.0)  # no sharper than 100, as in the contrast
    split.products = split.captions = torch.arange(12)
    split.tokens = split.tokens[:]
    split.tokens[:, 1] = torch.arange(12) % 10 + 5
    vectors = torch.eye(SMALL.embed_dim)[:4]
    vectors = torch.stack([vectors.roll(-1, 0), vectors])  # picture i is like caption i + 1
    plan, _ = model.plan(split, torch.arange(4), drawer(0), vectors, 0.5)
    likely = (torch.arange(4) + 1) % 4
    assert torch.equal(plan["words"][:, 1], torch.where(plan["matched"], torch.arange(4), likely) + 5)


@given(seed=SEEDS, log_scale=st.floats(-1, 4))
def test_log_lift_is_how_many_times_as_likely_as_by_chance_a_caption_is_drawn(seed, log_scale):
    model = stepper(mvlt.Recipe(objectives="itm,itc", hard_from=0.0))
    model.log_scale.data.fill_(log_scale)
    vectors = nn.functional.normalize(torch.randn(2, 5, 3, generator=gen(seed)), dim=2)
    same = torch.rand(5, 5, generator=gen(seed)) < 0.3
    same = same | same.T | torch.eye(5, dtype=torch.bool)
    same[4] = same[:, 4] = True  # no caption is wrong for pair 4
    matched = torch.tensor([True, False, False, True, False])
    place, log_lift = model.choose_captions(vectors, same, matched, drawer(seed))
    for i, j in enumerate(place.tolist()):
        favour = [math.exp(math.exp(log_scale) * vectors[0, i] @ vectors[1, k]) for k in range(5)]
        wrong = [favour[k] for k in range(5) if not same[i, k]]
        expected = favour[j] / (sum(wrong) / len(wrong)) if wrong else 1.0
        assert log_lift[i].item() == pytest.approx(math.log(expected), abs=1e-3)
        assert j == i or not (matched[i] or same[i, j])


def test_captions_are_drawn_as_often_as_their_lift_says():
    """Of n wrong captions each is drawn with probability lift / n."""
    model = stepper(mvlt.Recipe(objectives="itm,itc", hard_from=0.0))
    vectors = nn.functional.normalize(torch.randn(2, 4, 3, generator=gen(0)), dim=2)
    model.log_scale.data.fill_(1.0)
    counts, lift = torch.zeros(4, 4), torch.zeros(4, 4)
    for seed in range(1000):
        place, log_lift = model.choose_captions(vectors, torch.eye(4).bool(), torch.zeros(4).bool(), drawer(seed))
        counts[torch.arange(4), place] += 1
        lift[torch.arange(4), place] = log_lift.exp()
    for count, chance in zip(counts.flatten().tolist(), (lift / 3).flatten().tolist()):
        assert abs(count - 1000 * chance) <= deviation(1000, chance)


def test_where_wrong_captions_are_drawn_evenly_no_logit_is_corrected():
    recipe = mvlt.Recipe(objectives="itm,itc", hard_from=0.5)
    plan, _ = stepper(recipe).plan(shop(), torch.arange(8), drawer(0), tower_vectors(recipe, 8, 0), 0.4)
    assert not plan["log_lift"].any() and not plan["matched"].all()


def test_pictures_are_masked_and_captions_dropped_with_their_probabilities():
    recipe = mvlt.Recipe(objectives="mir,cr", mask_unit=8, mask_pictures=0.3, drop_caption=0.2)
    plan, _ = stepper(recipe).plan(shop(), torch.zeros(4000, dtype=torch.long), drawer(0), None, 1.0)
    dropped = (plan["words"] != 0).sum(dim=1) == 2  # [CLS] [SEP]
    assert abs(plan["rebuild"].sum() - 1200) <= deviation(4000, 0.3)
    assert abs(dropped.sum() - 560) <= deviation(4000, 0.7 * 0.2)


def test_with_hard_from_1_the_towers_never_choose():
    recipe = mvlt.Recipe(objectives="itm,itc", hard_from=1.0)
    plans = [stepper(recipe).plan(shop(), torch.arange(8), drawer(0), vectors, 1.0)[0]
             for vectors in (None, tower_vectors(recipe, 8, 0))]
    assert torch.equal(plans[0]["words"], plans[1]["words"])


def test_a_batch_without_a_wrong_caption_is_matched():
    recipe = mvlt.Recipe(objectives="itm,itc", hard_from=0.0, mask_pictures=0.0)
    plan, _ = stepper(recipe).plan(shop(), torch.tensor([3, 3]), drawer(0), tower_vectors(recipe, 2, 0), 0.5)
    assert plan["matched"].all()


def vectors_alone(model, visual, text, tokens):
    """The towers on what the fusion made of one pair, written out."""
    length = int((tokens != 0).sum())
    means = means_word_by_word(model, text[3][0, :length], tokens[0, :length])
    return model.image_tower(places_one_by_one(visual, 1)), model.text_tower(means[None])


def match_alone(model, visual, text, tokens):
    """ITM's logits of one pair, written out: the head on [CLS], and the towers on what the fusion made of both."""
    logits = model.match(text)
    if "itc" in model.recipe.weights:
        picture, caption = vectors_alone(model, visual, text, tokens)
        logits[0, 1] += model.log_scale.exp() * (picture @ caption.T).squeeze()
    return logits


@given(recipe=recipes(), seed=SEEDS)
def test_the_losses_are_those_of_the_papers_equations_over_the_pairs_that_count(recipe, seed):
    """Eq. 5 to 7, pair by pair: each pair read alone, its loss written out with PyTorch's own functions."""
    split, model = shop(), stepper(recipe).double().eval()
    split.tokens = split.tokens[:]
    split.tokens[:6, 1] = torch.arange(6) + 5  # word 1 says which row a caption came from
    rows, images = torch.arange(6), pictures(SMALL, 6, seed)
    vectors = tower_vectors(recipe, 6, seed)
    plan, count = model.plan(split, rows, drawer(seed), vectors, 1.0)
    sums = model.losses(images, plan)
    expected = dict.fromkeys(count, 0.0)
    F = nn.functional
    for i in range(6):
        hidden = plan["units"][i : i + 1].repeat_interleave(32 // plan["units"].shape[2], 2)
        hidden = hidden.repeat_interleave(32 // plan["units"].shape[3], 3)
        visual, text = model.encode(torch.where(hidden, 1e-6, images[i : i + 1]), plan["tokens"][i : i + 1])
        if "mir" in count and plan["rebuild"][i]:
            expected["mir"] += F.smooth_l1_loss(model.reconstruct(visual), images[i : i + 1].float())
        if "itm" in count and plan["judge"][i]:
            logits = match_alone(model, visual, text, plan["tokens"][i : i + 1])
            logits[0, 1] -= plan["log_lift"][i]
            expected["itm"] += F.cross_entropy(logits, plan["matched"][i : i + 1].long())
        if "distil" in count and plan["judge"][i]:
            j = int(plan["words"][i, 1]) - 5
            fused = vectors_alone(model, visual, text, plan["tokens"][i : i + 1])
            for one, alone in zip(fused, (vectors[0, i], vectors[1, j])):
                expected["distil"] += (1 - F.cosine_similarity(one[0], alone, dim=0)) / 2
        for j in plan["predict"][i].nonzero().flatten().tolist() if "mlm" in count else ():
            at = torch.zeros_like(plan["tokens"][i : i + 1], dtype=torch.bool)
            at[0, j] = True
            expected["mlm"] += F.cross_entropy(model.predict_words(text, at), plan["words"][i, j : j + 1])
        if "cr" in count:
            for logits, field in zip(model.recognise(text), ("category", "subcategory")):
                expected["cr"] += plan[f"share_{field}"][i] * F.cross_entropy(logits, plan[field][i : i + 1])
    as_numbers = lambda sums: {name: float(torch.as_tensor(total).detach()) for name, total in sums.items()}
    sums, expected = as_numbers(sums), as_numbers(expected)
    for name in count:
        assert sums.get(name, 0) == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_the_towers_train_alone_until_itm_from_and_every_step_reads_pairs():
    model = stepper(mvlt.Recipe(itm_from=0.25))
    names = {name for name, _ in model.named_parameters()}
    assert model.active(0.0) == ("itc",) and model.plan(shop(), torch.arange(4), drawer(0), None, 0.0) == ({}, {})
    assert model.active(0.25) == ("mir", "itm", "mlm", "itc", "cr") and model.trained(0.25) == names
    late_model = stepper(mvlt.Recipe(objectives="itm,itc,distil", hard_from=0.5))
    assert late_model.active(0.4) == ("itm", "itc") and late_model.active(0.5) == ("itm", "itc", "distil")
    late = ("decoder", "match_head", "word_head", "category_head", "subcategory_head")
    assert model.trained(0.0) == {name for name in names if not name.startswith(late)}
    assert {model.reads(progress) for progress in (0.0, 0.5, 1.0)} == {"pairs"}


@pytest.mark.parametrize("modality", mvlt.MODALITIES)
def test_recognition_reads_what_it_is_told_to(modality):
    model = stepper(mvlt.Recipe(objectives="cr", modality=modality, drop_caption=0.0)).eval()
    split, images = shop(), pictures(SMALL, 4).float()
    plan, _ = model.plan(split, torch.arange(4), drawer(0), None, 0.0)
    loss = model.losses(images, plan)["cr"]
    assert torch.equal(loss, model.losses(1 - images, plan)["cr"]) == (modality == "text")
    assert ((plan["words"] != 0).sum(dim=1) == 2).all() == (modality == "image")
    names = {name for name, _ in model.named_parameters()}
    used = touched(model, loss)
    assert used <= model.trained(0.0) <= names
    assert any(".embed_image" in name for name in model.trained(0.0)) == (modality != "text")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mask_ratio=1.5), "mask_ratio must lie in [0, 1], got 1.5"),
        (dict(mask_style="dots"), "mask_style must be one of random, grid, stroke, center, got 'dots'"),
        (dict(itm_from=1.0), "itm_from must lie in [0, 1), got 1.0"),
        (dict(smoothing=1), "smoothing must lie in [0, 1), got 1"),
        (dict(smoothing=-0.1), "smoothing must lie in [0, 1), got -0.1"),
        (dict(drop_caption=1.0), "drop_caption must be below 1, so that itm reads pairs that match, too, got 1.0"),
        (dict(mask_pictures=0.0), "mask_pictures must be above 0, so that mir and mlm can read pairs, got 0.0"),
        (
            dict(mask_pictures=1.0, objectives="itm"),
            "mask_pictures must be below 1, so that itm can read pairs, got 1.0",
        ),
        (
            dict(objectives="mir,itm,distil", hard_from=0.5),
            "hard_from must be 1 without itm and itc: the towers choose the wrong captions of matching, got 0.5",
        ),
        (
            dict(objectives="mlm,itc", hard_from=0.5),
            "hard_from must be 1 without itm and itc: the towers choose the wrong captions of matching, got 0.5",
        ),
        (
            dict(objectives="itm,itc:0", hard_from=0.5),
            "hard_from must be 1 without itm and itc: the towers choose the wrong captions of matching, got 0.5",
        ),
        (dict(objectives="itm,itc,distil"), "hard_from must be below 1 for distil, got 1.0"),
        (dict(modality="image"), "modality must be both, unless cr is the only objective, got 'image'"),
        (
            dict(objectives="mir,colour"),
            "objectives must name some of mir,itm,mlm,itc,distil,cr, each once, got 'mir,colour'",
        ),
    ],
)
def test_an_impossible_recipe_is_refused_with_the_setting_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mvlt.Recipe(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# python mvlt.py


def test_the_visual_half_of_tiny_has_the_published_size_of_pvt_tiny():
    """PVT-Tiny as published, at 224 px and with its last LayerNorm and classifier: 13.2 M parameters, 1.9 G."""
    with torch.device("meta"):
        model = MVLT(Config.preset("tiny", image_size=224)).eval()
        _, multiply_adds = mvlt.multiply_adds(model.encode, torch.empty(1, 3, 224, 224), None)
    names = foreign.their_names(model, foreign.VISUAL_PARTS)
    visual = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert round((visual + 2 * 512 + 513_000) / 1e6, 1) == 13.2
    assert round((multiply_adds + 0.512) / 1000, 1) == 1.9


@pytest.mark.parametrize("preset", mvlt.PRESETS)
def test_the_table_counts_the_multiply_adds_that_a_formula_gives(preset):
    c, rows = Config.preset(preset), {row[0]: row for row in mvlt.table(preset)}
    assert rows["in all"][4] == pytest.approx(
        sum(row[4] for name, row in rows.items() if name != "in all"), abs=1e-5
    )  # only log_scale has no row
    for k, (D, R, hidden) in enumerate(zip(c.dims, c.sr_ratios, c.mlp_ratios)):
        L, N, S = c.text_len, c.side(k) ** 2, c.text_len + c.side(k) ** 2
        keys = L + N // R**2
        block = (
            2 * S * D * D + 2 * keys * D * D + 2 * S * keys * D + 2 * S * hidden * D * D + (N * D * D if R > 1 else 0)
        )
        embed = L * (c.dims[k - 1] if k else c.token_dim) * D + N * (4 * c.dims[k - 1] if k else 48) * D
        assert rows[f"stage {k + 1}"][5] * 1e6 == pytest.approx(embed + c.depths[k] * block)
        assert rows[f"stage {k + 1}"][1:3] == (f"{D} x {c.side(k)} x {c.side(k)}", f"{L} x {D}")
