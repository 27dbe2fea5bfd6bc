"""
Laws of kaleido.py. `pytest -q tests/test_kaleido.py`

Where a law says "equal" it is checked in float64 on weights large enough to matter (`lively`). The references are plain
loops written here, PyTorch's own transformer, PIL, and the authors' graph from the names of their variables.
"""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import data
import kaleido
from extras import foreign
from extras.runtime import UserError
from kaleido import HIDDEN, ORDERS, PATCHES, Config, Kaleido, Recipe, agm, level

settings.register_profile("kaleido", deadline=None, max_examples=12)
settings.load_profile("kaleido")
EVEN = torch.ones(1, 4, 4)  # every cell holds the object
SEEDS = st.integers(0, 2**32 - 1)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 2, 3, 4
WORDS = SPECIAL + ["red", "blue", "wool", "##en", "coat", "7", ".", "with", "sleeve", "collar", "long", "silk", "shirt"]
V = len(WORDS)
SMALL = Config(
    image_size=32, patch_side=8, text_len=10, vocab_size=V, width=16, depth=2, heads=2, mlp_ratio=2, dropout=0.1,
    encoder="conv", feature_dim=12, sat_dim=8, sat_grid=4, n_category=3, n_subcategory=5,
)
TASKS = ("mlm", "itm", "rr", "jps", "cp", "g2cm", "b2cm")


def gen(seed):
    return torch.Generator().manual_seed(seed)


def lively(config=SMALL, seed=0, **recipe):
    """A model in float64 and eval mode whose every weight matters: fresh ones would make attention nearly uniform."""
    model, generator = Kaleido(config, Recipe(**recipe)).double().eval(), gen(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.ndim > 1:
                p.copy_(noise / math.prod(p.shape[1:]) ** 0.5 * 1.5)
            else:
                p.copy_(0.3 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    model.mask_id.fill_(MASK)
    model.captioner.ends.copy_(torch.tensor([CLS, SEP]))
    model.alignable[5:] = True
    return model


def pictures(batch, seed=0, size=32):
    return torch.rand(batch, 3, size, size, generator=gen(seed), dtype=torch.float64)


def captions(lengths, seed=0, width=None):
    """One caption for each of `lengths`: [CLS], ordinary words, [SEP], then padding up to `width`."""
    tokens = torch.zeros(len(lengths), width or max(lengths), dtype=torch.long)
    for number, (row, length) in enumerate(zip(tokens, lengths)):
        row[:length] = torch.randint(5, V, (length,), generator=gen(seed + 31 * number))
        row[0], row[length - 1] = CLS, SEP
    return tokens


class Shop(SimpleNamespace):
    """A split in memory, as the model's `plan` and `prepare` see it."""

    def __init__(self, n=12, seed=0):
        lengths = torch.randint(3, SMALL.text_len + 1, (n,), generator=gen(seed)).tolist()
        tokens = captions(lengths, seed)
        tokens[:, 1] = 5 + torch.arange(n) // 2 % (n // 2 - 1)  # captions with different numbers are different
        super().__init__(
            tokens=tokens,
            products=torch.arange(n) // 2,  # two pictures a product
            captions=torch.arange(n) // 2 % (n // 2 - 1),  # the first and the last product share their caption
            categories=torch.randint(-1, 3, (n,), generator=gen(seed + 1)),
            subcategories=torch.randint(-1, 5, (n,), generator=gen(seed + 2)),
            pictures=pictures(n, seed),
            tokenizer=SimpleNamespace(
                words=WORDS, special_ids=list(range(5)), cls_id=CLS, sep_id=SEP, mask_id=MASK,
                encode=lambda text: [CLS, SEP],
            ),
        )

    def __len__(self):
        return len(self.tokens)

    def images(self, rows, device="cpu"):
        return self.pictures[rows]

    def same(self, rows):
        products, texts = self.products[rows], self.captions[rows]
        return (products[:, None] == products) | (texts[:, None] == texts)

    def negatives(self, rows, generator):
        return data.draw_negatives(rows, torch.stack([self.products, self.captions]), generator)


def planned(model, shop, rows, seed=0, progress=1.0):
    """The plan of a batch with the donors' pictures, as the training loop gives it, and the counts."""
    plan, count = model.plan(shop, rows, lambda what: data.generator(seed, what), None, progress)
    if "other" in plan:
        plan["other_images"] = shop.pictures[rows][plan["other"].clamp(min=0)]
    return plan, count


def everything(model, visual, text, words=None):
    """All that the model answers, about the first `words` words."""
    where = torch.zeros(text[0].shape[:2], dtype=torch.bool)
    where[:, 0] = True
    which = torch.ones(len(text[0]), 25, dtype=torch.bool)
    answers = [model.match(text), model.predict_words(text, where), *model.recognise(text), model.rotation(visual)]
    answers += [model.jigsaw(visual), model.camouflage(visual)]
    answers += [model.recolour(visual, which[:, :16]), model.repaint(visual, which)]
    return visual + [text[0][:, :words]] + answers


def assert_equal(ones, others, tolerance=1e-9):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# --- Settings ---


def test_base_is_the_papers_size_and_the_presets_survive_json():
    c = Config.preset("base")
    assert (c.depth, c.width, c.heads, c.encoder, c.feature_dim) == (12, 768, 12, "resnet50", 2048)
    for size in kaleido.PRESETS:
        config = Config.preset(size)
        assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    for recipe in kaleido.RECIPES.values():
        own = {field.name for field in dataclasses.fields(Recipe)}
        Recipe(**{name: value for name, value in recipe.items() if name in own})


@pytest.mark.parametrize("changes, message", [
    (dict(patch_side=12), "patch_side must be a power of two, 8 or more, got 12"),
    (dict(patch_side=4), "patch_side must be a power of two, 8 or more, got 4"),
    (dict(heads=3), "width must be a multiple of heads = 3, got 16"),
    (dict(encoder="vgg"), "encoder must be conv or resnet50, got 'vgg'"),
    (dict(encoder="resnet50"), "feature_dim must be 2048 with encoder resnet50, got 12"),
    (dict(image_size=24), "image_size must be sat_grid = 4 times a power of two, got 24"),
    (dict(text_len=1), "text_len must be a whole number, 2 or more, got 1"),
    (dict(dropout=1), "dropout must lie in [0, 1), got 1"),
])
def test_an_impossible_configuration_is_refused_with_the_setting_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("changes, message", [
    (dict(align="sometimes"), "align must be one of told, forced, none, got 'sometimes'"),
    (dict(objectives="caption,mlm"), "objectives must name caption alone"),
    (dict(objectives="sat"), "objectives must name more than sat"),
    (dict(objectives="mlm,mir"), "objectives must name some of"),
    (dict(change_pairs=1.5), "change_pairs must lie in [0, 1], got 1.5"),
    (dict(change_pairs=0), "change_pairs must be above 0, so that mlm and rr to b2cm can read pairs, got 0"),
    (dict(change_pairs=1), "change_pairs must be below 1, so that cr and itm can read pairs, got 1"),
    (dict(align_from=1), "align_from must lie in [0, 1), got 1"),
    (dict(drop_caption=-1), "drop_caption must lie in [0, 1], got -1"),
    (dict(drop_caption=1), "drop_caption must be below 1, so that itm reads pairs that match, too, got 1"),
    (dict(foreground="no"), "foreground must be True or False, got 'no'"),
])
def test_an_impossible_recipe_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**changes)


def test_the_parameters_of_base_are_the_authors():
    with torch.device("meta"):
        model = Kaleido(Config.preset("base", text_len=512))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    bert = count["words"] + count["blocks"] + count["pooler"]
    assert bert + 768 == 109_482_240  # BERT has two segments, of which one is read
    assert (count["word_head"], count["match_head"]) == (622_650, 1_538)
    assert count["levels"] + count["place"] - 5 * 768 == 7_875_840  # of each table of types one row is read
    akpm = [count[f"{name}_head"] for name in ("rotation", "jigsaw", "camouflage", "recolour", "repaint")]
    assert sum(akpm) == 3_284_773
    assert count["encoder"] == 23_508_032
    assert 109_482_240 + 622_650 + 1_538 + 7_875_840 + 3_284_773 == 121_267_041


# --- KPG ---


@st.composite
def rectangles(draw, size=32):
    x0, y0 = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    return x0, y0, x0 + draw(st.integers(9, 14)), y0 + draw(st.integers(9, 14))


def picture_with(box, ground=0.9, colour=0.2, size=32):
    image = torch.full((3, size, size), ground)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = colour
    return image


@given(rectangles(), st.floats(0, 1), st.floats(0, 1))
def test_the_box_of_a_rectangle_on_a_plain_ground_is_that_rectangle(box, ground, colour):
    assume(abs(ground - colour) > 0.09)
    assert kaleido.frame(picture_with(box, ground, colour)[None]).tolist() == [list(box)]


def test_a_picture_without_an_object_or_without_a_plain_ground_is_taken_whole():
    busy = picture_with((0, 0, 20, 20))  # 39 of the 124 outermost pixels belong to the object
    plain, faint = picture_with((0, 0, 0, 0)), picture_with((8, 8, 20, 20), 0.5, 0.57)
    tiny = picture_with((8, 8, 15, 15))  # below 1/16 of the picture
    for image in (busy, plain, faint, tiny):
        assert kaleido.frame(image[None]).tolist() == [[0, 0, 32, 32]]
    assert kaleido.frame(picture_with((8, 8, 16, 16))[None]).tolist() == [[8, 8, 16, 16]]


@given(SEEDS, st.integers(1, 4))
def test_boxes_lie_inside_are_not_empty_and_do_not_depend_on_the_neighbours(seed, batch):
    images = torch.rand(batch, 3, 32, 32, generator=gen(seed)) * 0.3
    boxes = kaleido.frame(images)
    x0, y0, x1, y1 = boxes.unbind(1)
    assert bool(((0 <= x0) & (x0 < x1) & (x1 <= 32) & (0 <= y0) & (y0 < y1) & (y1 <= 32)).all())
    assert torch.equal(boxes, torch.cat([kaleido.frame(image[None]) for image in images]))


@given(st.integers(1, 5), SEEDS)
def test_the_tiles_of_a_level_laid_out_again_are_the_picture(k, seed):
    images = pictures(2, seed, size=8 * k)
    tiles = kaleido.cut(images, k, 8)
    rows = [torch.cat(list(tiles[:, k * r : k * r + k].unbind(1)), dim=3) for r in range(k)]
    assert torch.equal(torch.cat(rows, dim=2), images)


@given(rectangles(), SEEDS)
def test_patches_and_places_are_those_of_a_loop_over_levels_rows_and_columns(box, seed):
    images, boxes = pictures(1, seed), torch.tensor([box])
    patches, places = kaleido.patches(images, boxes, 8)
    x0, y0, x1, y1 = box
    framed = F.interpolate(images[:, :, y0:y1, x0:x1], (32, 32), mode="bilinear", antialias=True)
    number = 0
    for k in range(1, 6):
        grid = F.interpolate(framed, (8 * k, 8 * k), mode="bilinear", antialias=True)
        for row, column in itertools.product(range(k), range(k)):
            assert_equal([patches[:, number]], [grid[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]])
            width, height = (x1 - x0) / 32 / k, (y1 - y0) / 32 / k
            left, top = x0 / 32 + column * width, y0 / 32 + row * height
            expected = torch.tensor([[left, left + width, top, top + height, width * height]], dtype=places.dtype)
            assert_equal([places[:, number]], [expected])
            number += 1
        assert places[0, level(k), 4].sum().item() == pytest.approx((x1 - x0) * (y1 - y0) / 32**2)
    assert number == PATCHES == 55
    assert bool((places >= 0).all()) and bool((places <= 1).all())


@given(rectangles(), SEEDS)
def test_boxes_are_resized_as_pil_does_it(box, seed):
    pixels = torch.randint(256, (32, 32, 3), generator=gen(seed), dtype=torch.uint8)
    ours = kaleido.crop(pixels.permute(2, 0, 1)[None] / 255, torch.tensor([box]))[0].permute(1, 2, 0)
    pil = Image.fromarray(pixels.numpy()).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(ours.numpy() * 255 - np.array(pil).astype(float)).max() <= 2


# --- Fig. 5: the changes ---


def some_patches(batch, seed):
    return torch.rand(batch, PATCHES, 3, 8, 8, generator=gen(seed))


def chosen(batch, n, count, seed):
    """`count` of n places for each of the batch, bool."""
    return torch.rand(batch, n, generator=gen(seed)).argsort(1) < count


@given(SEEDS)
def test_a_turn_is_counter_clockwise_and_undone_by_its_inverse(seed):
    patches, quarters = some_patches(4, seed), torch.arange(4)
    before = patches.clone()
    turned = kaleido.turn(patches, quarters)
    assert torch.equal(kaleido.turn(turned, (4 - quarters) % 4), patches) and torch.equal(patches, before)
    assert torch.equal(turned[:, 1:], patches[:, 1:])
    assert torch.equal(turned[1, 0, :, 0, 0], patches[1, 0, :, 0, 7])  # the upper right corner comes to the upper left


@given(SEEDS)
def test_a_shuffle_is_one_of_24_orders_and_undone_by_its_inverse(seed):
    patches, order = some_patches(24, seed), torch.arange(24)
    shuffled = kaleido.shuffle(patches, order)
    assert len({tuple(row) for row in ORDERS.tolist()}) == 24
    inverse = [ORDERS.tolist().index(row.argsort().tolist()) for row in ORDERS]
    assert torch.equal(kaleido.shuffle(shuffled, torch.tensor(inverse)), patches)
    assert torch.equal(shuffled[0], patches[0])  # order 0 is the identity
    for n, j in itertools.product(range(24), range(4)):
        assert torch.equal(shuffled[n, 1 + j], patches[n, 1 + ORDERS[n, j]])
    others = [number for number in range(PATCHES) if number not in (1, 2, 3, 4)]
    assert torch.equal(shuffled[:, others], patches[:, others])


@given(SEEDS)
def test_swap_changes_exactly_the_chosen_patch_into_the_donors_of_the_same_place(seed):
    patches, donors, which = some_patches(3, seed), some_patches(3, seed + 1)[:, :9], chosen(3, 9, 1, seed)
    swapped = kaleido.swap(patches, which, donors)
    differs = (swapped != patches).flatten(2).any(2)
    assert torch.equal(differs[:, level(3)], which) and differs.sum() == 3
    assert torch.equal(swapped[:, level(3)][which], donors[which])


@given(SEEDS)
def test_grey_keeps_the_luma_of_the_chosen_patches_and_leaves_the_others_alone(seed):
    patches, which = some_patches(3, seed), chosen(3, 16, 2, seed)
    greyed = kaleido.grey(patches, which)
    differs = (greyed != patches).flatten(2).any(2)
    assert torch.equal(differs[:, level(4)], which) and differs.sum() == 6
    was, now = patches[:, level(4)][which], greyed[:, level(4)][which]
    luma = 0.299 * was[:, 0] + 0.587 * was[:, 1] + 0.114 * was[:, 2]
    for channel in range(3):
        torch.testing.assert_close(now[:, channel], luma)


@given(SEEDS)
def test_nothing_hidden_leaks(seed):
    """Other pixels in a blank patch, other colours of the same luma, another patch where one was swapped: no output."""
    model = lively(seed=seed)
    images, tokens = pictures(2, seed), captions([5, 7], seed)
    patches, places = kaleido.patches(images, kaleido.whole(images), 8)
    three, four, five = chosen(2, 9, 1, seed), chosen(2, 16, 2, seed), chosen(2, 25, 3, seed)
    donors = pictures(2 * 9, seed + 1, size=8).view(2, 9, 3, 8, 8)

    def read(patches):
        shown = kaleido.swap(kaleido.grey(patches, four), three, donors)
        return everything(model, *model.fuse(kaleido.blank(model.look(shown), five), places, tokens))

    other = patches.clone()
    for k, which in ((3, three), (5, five)):
        noise = torch.rand(patches[:, level(k)].shape, generator=gen(seed + 2), dtype=torch.float64)
        other[:, level(k)] = torch.where(which[:, :, None, None, None], noise, patches[:, level(k)])
    for one, two in zip(read(patches), read(other)):
        assert torch.equal(one, two)
    tinted = other.clone()
    shift = torch.tensor([0.587, -0.299, 0.0], dtype=torch.float64)[:, None, None]  # of no luma
    tinted[:, level(4)] += 0.2 * shift * four[:, :, None, None, None]
    assert_equal(read(patches), read(tinted))


# --- The transformer ---


@given(SEEDS)
def test_the_blocks_are_pytorchs_transformer_encoder(seed):
    model, tokens = lively(seed=seed), captions([4, 9, 6], seed)
    tokens[2] = 0  # an empty caption: its first position is a key all the same
    features = torch.randn(3, PATCHES, 12, generator=gen(seed), dtype=torch.float64)
    places = torch.rand(3, PATCHES, 5, generator=gen(seed), dtype=torch.float64)
    visual, text = model.fuse(features, places, tokens)

    gelu = nn.GELU(approximate="tanh")
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, gelu, layer_norm_eps=1e-12, batch_first=True, norm_first=False)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        for theirs, ours in zip(reference.layers, model.blocks):
            projections = (ours.query, ours.key, ours.value)
            theirs.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in projections]))
            theirs.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in projections]))
            pairs = ((theirs.self_attn.out_proj, ours.out), (theirs.linear1, ours.fc1), (theirs.linear2, ours.fc2))
            for one, other in pairs + ((theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2)):
                one.load_state_dict(other.state_dict())
    placed = places @ model.place.weight.T
    parts = [model.levels[k - 1](features[:, level(k)], placed[:, level(k)]) for k in range(1, 6)]
    padding = F.pad(tokens == 0, (0, PATCHES))
    padding[:, 0] = False
    expected = reference(torch.cat([model.words(tokens), *parts], dim=1), src_key_padding_mask=padding)
    assert_equal([text[0], torch.cat(visual, dim=1)], [expected[:, :9], expected[:, 9:]], 1e-10)


@given(SEEDS, st.lists(st.integers(2, 8), min_size=2, max_size=3))
def test_padding_changes_nothing_and_a_pair_does_not_depend_on_its_batch(seed, lengths):
    model, images, tokens = lively(seed=seed), pictures(len(lengths), seed), captions(lengths, seed)
    L = tokens.shape[1]
    together = everything(model, *model.encode(images, tokens), words=L)
    padded = F.pad(tokens, (0, 10 - L))
    assert_equal(together, everything(model, *model.encode(images, padded), words=L))
    first = everything(model, *model.encode(images[:1], tokens[:1]), words=L)
    for one, all_ in zip(first[:6], together[:6]):
        assert_equal([one], [all_[:1]])
    assert_equal([model.score(images, tokens)[:1]], [model.score(images[:1], tokens[:1])], 1e-5)


@given(SEEDS, st.integers(2, 5))
def test_the_patches_are_a_set(seed, k):
    """Permuting a level's patches with their places permutes its outputs and leaves the words alone."""
    model, tokens = lively(seed=seed), captions([6, 4], seed)
    features, places = model.look_at(pictures(2, seed))
    order = torch.arange(PATCHES)
    order[level(k)] = torch.randperm(k * k, generator=gen(seed)) + level(k).start
    visual, text = model.fuse(features, places, tokens)
    permuted, same = model.fuse(features[:, order], places[:, order], tokens)
    assert_equal(text + [torch.cat(visual, dim=1)[:, order]], same + [torch.cat(permuted, dim=1)])


@given(SEEDS)
def test_either_side_may_be_absent_and_dropout_acts_in_training_only(seed):
    model, images, tokens = lively(seed=seed), pictures(2, seed), captions([6, 4], seed)
    visual, text = model.encode(images, None)
    assert [k.shape[1] for k in visual] == [1, 4, 9, 16, 25] and text == []
    visual, text = model.encode(None, tokens)
    assert visual == [] and text[0].shape == (2, 6, 16)
    features, places = model.look_at(images)
    assert torch.equal(model.score_features(features, places, tokens), model.score(images, tokens))
    assert torch.equal(model.score(images, tokens), model.score(images, tokens))
    model.train()
    assert not torch.equal(model.score(images, tokens), model.score(images, tokens))
    with pytest.raises(ValueError, match="encode needs images or tokens"):
        model.encode(None, None)


def test_what_has_the_wrong_shape_is_refused_by_name():
    model = lively()
    with pytest.raises(ValueError, match=re.escape("images must be (B, 3, 32, 32), got (1, 3, 16, 16)")):
        model.encode(pictures(1, size=16), None)
    with pytest.raises(ValueError, match=re.escape("tokens must be (B, L) with L in 1..10, got (1, 11)")):
        model.encode(None, captions([11]))
    with pytest.raises(ValueError, match="recognise needs n_category"):
        plain = Kaleido(dataclasses.replace(SMALL, n_category=0))
        plain.classify(pictures(1).float(), captions([4]))


def test_a_photo_without_a_caption_is_classified_with_the_empty_one():
    model, images = lively(), pictures(2)
    assert_equal(model.classify(images, None), model.classify(images, torch.tensor([[CLS, SEP]] * 2)))


# --- AAG: the captioner and what it aligns ---


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def show_attend_and_tell(captioner, framed, tokens, length):
    """One picture, word by word, in numpy: the logits and maps of `length` steps; greedy where tokens is None."""
    w = {name: p.detach().numpy() for name, p in captioner.named_parameters()}
    with torch.no_grad():
        cells = captioner.look(4 * (framed - 0.5)).flatten(2)[0].T.numpy()  # (g^2, S)
    h = c = np.zeros(cells.shape[1])
    word, logits, maps = CLS, [], []
    for t in range(length):
        word = int(tokens[t]) if tokens is not None else word
        energies = [
            w["energy.weight"][0] @ np.tanh(w["cell_key.weight"] @ cell + w["query.weight"] @ h + w["query.bias"])
            for cell in cells
        ]
        alpha = np.exp(energies) / np.exp(energies).sum()
        z = sigmoid(w["gate.weight"][0] @ h + w["gate.bias"][0]) * sum(a * cell for a, cell in zip(alpha, cells))
        y = w["word.weight"][word]
        gates = w["lstm.weight_ih"] @ np.concatenate([y, z]) + w["lstm.bias_ih"]
        gates = gates + w["lstm.weight_hh"] @ h + w["lstm.bias_hh"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        output = y + w["from_state.weight"] @ h + w["from_cells.weight"] @ z
        logits.append(w["out.weight"] @ output + w["out.bias"])
        maps.append(alpha)
        word = int(np.argmax(logits[-1]))
    return np.array(logits), np.array(maps)


@given(SEEDS)
def test_the_captioner_is_show_attend_and_tell_word_by_word(seed):
    captioner, framed, tokens = lively(seed=seed).captioner, pictures(2, seed), captions([6, 4], seed)
    logits, maps = captioner(framed, tokens)
    ids, told_maps = captioner.tell(framed)
    assert_equal([maps.sum(2)], [torch.ones(2, 5, dtype=torch.float64)])
    for row in range(2):
        expected = show_attend_and_tell(captioner, framed[row : row + 1], tokens[row], 5)
        assert_equal([logits[row], maps[row]], [torch.from_numpy(x) for x in expected])
        expected = show_attend_and_tell(captioner, framed[row : row + 1], None, 9)
        said = expected[0].argmax(1).tolist() + [SEP]
        said = said[: said.index(SEP)]
        assert ids[row].tolist() == said + [0] * (9 - len(said))
        assert_equal([told_maps[row]], [torch.from_numpy(expected[1])])


@given(SEEDS, st.integers(1, 8), st.integers(1, 5))
def test_masses_are_those_of_counting_on_a_fine_grid(seed, g, k):
    map_ = torch.rand(g, g, generator=gen(seed), dtype=torch.float64)
    map_ /= map_.sum()
    side = math.lcm(g, k)
    fine = map_.repeat_interleave(side // g, 0).repeat_interleave(side // g, 1) / (side // g) ** 2
    counted = fine.unflatten(1, (k, -1)).unflatten(0, (k, -1)).sum(dim=(1, 3))
    assert_equal([kaleido.masses(map_[None], k)[0], map_.sum()], [counted, torch.ones((), dtype=torch.float64)])


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_map_of_one_cell_gives_the_patches_that_hold_it(row, column):
    map_ = torch.zeros(1, 1, 8, 8)
    map_[0, 0, row, column] = 1
    pairs = kaleido.strongest(map_, torch.ones(1, 1, dtype=torch.bool))[0]
    assert [position for position, _ in pairs] == [0, 0, 0]
    for k, (_, patch) in zip((3, 4, 5), pairs):
        y, x = divmod(patch - level(k).start, k)
        overlaps = [min((i + 1) / 8, (j + 1) / k) - max(i / 8, j / k) for i, j in ((row, y), (column, x))]
        assert min(overlaps) >= 1 / 16 - 1e-6  # half of the cell, or more, lies in that band


@given(SEEDS)
def test_rounding_does_not_choose_among_patches_of_the_same_attention(seed):
    flat = torch.full((1, 3, 8, 8), 1 / 64, dtype=torch.float64)
    noise = 1e-9 * torch.rand(flat.shape, generator=gen(seed), dtype=torch.float64)
    said = torch.ones(1, 3, dtype=torch.bool)
    first = [(position, level(k).start) for position in range(3) for k in (3, 4, 5)]
    assert kaleido.strongest(flat, said) == kaleido.strongest(flat + noise, said) == [first]


@pytest.mark.parametrize("way", ["told", "forced"])
@given(seed=SEEDS)
def test_alignable_words_that_the_captioner_says_get_the_patches_of_their_map(way, seed):
    model, framed, tokens = lively(seed=seed), pictures(3, seed), captions([9, 10, 6], seed)
    model.alignable[5:8] = False
    cells = torch.rand(3, 4, 4, generator=gen(seed), dtype=torch.float64)
    with torch.no_grad():
        model.captioner.out.weight[8:13] *= 3  # so that some words are said
    tokens[0, 1:] = model.captioner.tell(framed)[0][0]  # what the captioner says itself
    found = kaleido.align(model.captioner, framed, tokens, model.alignable, way, cells)
    maps, said = kaleido.word_maps(model.captioner, framed, tokens, way, cells)
    assert_equal([maps[said].sum(dim=(1, 2))], [torch.ones(int(said.sum()), dtype=torch.float64)])
    for row in range(3):
        expected = []
        told = show_attend_and_tell(model.captioner, framed[row : row + 1], None, 9)
        ids = told[0].argmax(1).tolist() + [SEP]
        ids = ids[: ids.index(SEP)]
        forced = show_attend_and_tell(model.captioner, framed[row : row + 1], tokens[row], tokens.shape[1] - 1)
        for position, word in enumerate(tokens[row].tolist()):
            if way == "told":
                said = [told[1][t] for t, other in enumerate(ids) if other == word]
            else:
                right = position > 0 and forced[0][position - 1].argmax() == word
                read = tokens[row].numpy() != 0
                usual = forced[1][read[1:]].sum(axis=0) / read.sum()  # where the words of this caption look
                one = forced[1][position - 1] / (usual + 1e-3) * (cells[row].flatten().numpy() + 1e-3)
                said = [one / one.sum()] if right else []
            if said and bool(model.alignable[word]):
                mean = torch.from_numpy(np.mean(said, axis=0)).view(1, 4, 4)
                for k in HIDDEN:
                    mass = kaleido.masses(mean, k).flatten().tolist()
                    first = next(place for place, share in enumerate(mass) if share > max(mass) - 1e-6)
                    expected.append((position, level(k).start + first))
        assert found[row] == expected
    backwards = kaleido.align(model.captioner, framed.flip(0), tokens.flip(0), model.alignable, way, cells.flip(0))
    assert backwards == found[::-1]


@given(words=st.integers(2, 6), common=st.floats(0, 0.9))
def test_a_place_where_all_words_look_alike_tells_nothing_of_a_word(words, common):
    maps, tokens = torch.zeros(1, 10, 16, dtype=torch.float64), torch.zeros(1, 10, dtype=torch.int64)
    tokens[0, : words + 1] = 7
    for word in range(1, words + 1):  # each looks at cell 0 and at a cell of its own, at most a ninth as much
        maps[0, word, 0], maps[0, word, word] = common, 1 - common
    cells = torch.ones(1, 16)
    found = kaleido.relative(maps, tokens, cells)[0, 1 : words + 1]
    assert found.argmax(1).tolist() == list(range(1, words + 1))
    assert_equal([found.sum(1)], [torch.ones(words, dtype=torch.float64)])
    cells[0, 1] = 0  # the first word looks beside the object
    assert common < 0.01 or kaleido.relative(maps, tokens, cells)[0, 1].argmax() == 0


@pytest.mark.parametrize("g", [2, 4, 8])
def test_the_cells_hold_the_share_of_the_object_in_the_frame(g):
    images = torch.stack([picture_with((8, 4, 24, 28)), torch.rand(3, 32, 32, generator=gen(0), dtype=torch.float64)])
    images[0, :, 4:16, 8:16] = images[0, :, :1, :1]  # the upper left quarter of its box shows the ground
    cells = kaleido.object_cells(images, kaleido.frame(images), g)
    expected = torch.ones(2, g, g)
    expected[0, : g // 2, : g // 2] = 0
    assert (cells - expected).abs().max() < 0.3 and (cells - expected).abs().mean() < 0.06  # the edge is resized
    assert torch.equal(cells[1], expected[1])


@pytest.mark.parametrize("way", ["told", "forced"])
def test_the_captioner_and_its_alignments_are_in_fp32_under_autocast(way):
    model, framed, tokens = lively(seed=1).float(), pictures(3).float(), captions([9, 10, 6])
    cells = EVEN.expand(3, 4, 4)
    plain = kaleido.word_maps(model.captioner, framed, tokens, way, cells)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, said = kaleido.word_maps(model.captioner, framed, tokens, way, cells)
        assert torch.equal(maps, plain[0]) and torch.equal(said, plain[1])
        logits, _ = model.captioner(framed, tokens)
        assert logits.dtype == model.score(framed, tokens).dtype == torch.float32
        pairs = kaleido.strongest(maps, said)
    assert pairs == kaleido.strongest(*plain)


def test_captions_learnt_by_heart_are_told_and_every_word_is_aligned():
    torch.manual_seed(0)
    captioner = Kaleido(dataclasses.replace(SMALL, sat_dim=32)).captioner
    captioner.ends.copy_(torch.tensor([CLS, SEP]))
    framed, tokens = pictures(8).float(), captions([5, 6, 7, 8, 9, 10, 7, 6])
    optimiser = torch.optim.Adam(captioner.parameters(), lr=0.01)
    for _ in range(150):
        logits, _ = captioner(framed, tokens)
        real = tokens[:, 1:] != 0
        loss = kaleido.cross_entropy(logits[real], tokens[:, 1:][real])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ids, _ = captioner.tell(framed)
    assert torch.equal(ids, tokens[:, 1:] * (tokens[:, 1:] != SEP))
    alignable = torch.arange(V) >= 5
    words = [[position for position, word in enumerate(row) if word >= 5] for row in tokens.tolist()]
    for way in ("told", "forced"):
        pairs = kaleido.align(captioner, framed, tokens, alignable, way, EVEN.expand(8, 4, 4))
        assert [sorted({position for position, _ in row}) for row in pairs] == words


@given(SEEDS)
def test_alignable_are_ordinary_words_of_letters_in_under_half_of_the_captions(seed):
    shop, model = Shop(9, seed), Kaleido(SMALL)
    model.prepare(shop)
    for number, word in enumerate(WORDS):
        standing = sum(number in row for row in shop.tokens.tolist())
        letters = number >= 5 and word.replace("##", "").isalpha()
        assert bool(model.alignable[number]) == (letters and standing < 4.5)
    assert model.captioner.ends.tolist() == [CLS, SEP] and int(model.mask_id) == MASK


def test_a_resnet_without_weights_is_refused_before_training():
    model = SimpleNamespace(config=Config(), encoder=SimpleNamespace(bn1=nn.BatchNorm2d(64)))
    with pytest.raises(ValueError, match="resnet50 needs the weights"):
        Kaleido.prepare(model, Shop())


# --- AGM ---


def level_of(patch):
    return next(k for k in range(1, 6) if patch < level(k).stop)


@st.composite
def masking_tasks(draw):
    """Ordinary words, of which some are aligned with a few patches of levels 3, 4 and 5, and how many to hide."""
    words = sorted(draw(st.sets(st.integers(1, 9), max_size=9)))
    aligned = draw(st.sets(st.sampled_from(words), max_size=4)) if words else ()
    patches = (st.sampled_from([5, 6, 7, 13]), st.sampled_from([14, 15, 29]), st.sampled_from([30, 31, 54]))
    pairs = [(word, draw(patch)) for word in aligned for patch in patches]
    return words, draw(st.permutations(pairs)), draw(st.integers(0, len(words)))


@example(([1], [(1, 5), (1, 14), (1, 30)], 1), 0)  # a patch is hidden first; then the word must be, too
@example(([1], [(1, 5), (1, 14), (1, 30)], 1), 1)
@example(([1], [(1, 5), (1, 14), (1, 30)], 1), 2)
@example(([1], [(1, 5), (1, 14), (1, 30)], 1), 3)
@given(masking_tasks(), SEEDS)
def test_agm_hides_exactly_the_budget_of_each_kind_and_no_word_that_is_not_ordinary(task, seed):
    words, pairs, M = task
    positions, patches = agm(words, pairs, M, gen(seed))
    assert len(set(positions)) == len(positions) == M and set(positions) <= set(words)
    assert sorted(level_of(patch) for patch in patches) == [3, 4, 4, 5, 5, 5] and len(set(patches)) == 6
    assert (positions, patches) == agm(words, pairs, M, gen(seed))


@given(masking_tasks(), SEEDS)
def test_agm_hides_no_pair_on_both_sides_while_there_are_enough_unaligned_candidates(task, seed):
    words, pairs, M = task
    unaligned = [word for word in words if word not in {word for word, _ in pairs}]
    free = [patch for patch in range(5, 55) if patch not in {patch for _, patch in pairs}]
    enough = len(unaligned) >= M
    for k, budget in HIDDEN.items():
        enough = enough and sum(level_of(patch) == k for patch in free) >= budget
    assume(enough)
    positions, patches = agm(words, pairs, M, gen(seed))
    assert not any(word in positions and patch in patches for word, patch in pairs)


def test_agm_leaves_the_other_patches_of_a_word_alone_once_one_of_them_is_hidden_and_its_word_visible():
    pairs = [(1, 5), (1, 20), (1, 40)]
    for seed in range(60):
        positions, patches = agm([1, 2, 3, 4], pairs, 2, gen(seed))
        assert (1 in positions) == (not {5, 20, 40} & set(patches))


def test_agm_hides_either_side_of_a_pair_with_equal_chance():
    word_hidden = 0
    for seed in range(400):
        positions, patches = agm(list(range(1, 9)), [(3, 7)], 1, gen(seed))
        assert (3 in positions) != (7 in patches)  # one of the two, never both
        word_hidden += 3 in positions
    assert 160 < word_hidden < 240  # four standard deviations


def test_agm_without_pairs_hides_everything_equally_often_and_aligned_ones_more_often():
    counts, aligned = torch.zeros(2, 8), 0
    for seed in range(600):
        positions, _ = agm(list(range(8)), [], 2, gen(seed))
        counts[0, positions] += 1
        positions, patches = agm(list(range(8)), [(5, 20), (5, 40), (6, 20)], 2, gen(seed))
        counts[1, positions] += 1
        aligned += 20 in patches
    assert bool((counts[0] - 150).abs().max() < 45)  # 150 expected, deviation 11
    assert counts[1, 5] + aligned > 1.5 * (600 * 2 / 8 + 600 * 2 / 16)


def test_agm_with_no_budget_for_a_level_hides_none_of_it_and_the_word_of_its_pairs_instead():
    for seed in range(20):
        positions, patches = agm([1, 2, 3], [(2, 6)], 1, gen(seed), budgets={3: 0, 4: 2, 5: 0})
        assert positions == [2] and [level_of(patch) for patch in patches] == [4, 4]


# --- Losses ---


@given(SEEDS, st.integers(1, 4))
def test_kld_is_zero_at_equality_never_negative_and_unchanged_by_a_constant(seed, n):
    logits, target = torch.randn(2, n, 6, generator=gen(seed))
    target = target.softmax(1).requires_grad_()
    loss = kaleido.kld_loss(logits.requires_grad_(), target)
    by_hand = 0.0
    for q, t in zip(logits.softmax(1).tolist(), target.tolist()):
        by_hand += sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, t))
    assert loss.item() == pytest.approx(by_hand, rel=1e-4, abs=1e-5) and loss.item() >= -1e-6
    assert kaleido.kld_loss(target.detach().log() + 3, target).item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert target.grad is None and bool(logits.grad.any())


def test_the_target_is_the_softmax_of_the_mean_colours_over_a_tenth():
    patch = torch.zeros(1, 3, 16, 16)
    patch[0, 0, :2, :2] = 0.4  # one of the 64 cells is red
    target = Kaleido(dataclasses.replace(SMALL, patch_side=16)).target(patch)
    expected = torch.full((192,), 1.0)
    expected[0] = math.exp(4)
    torch.testing.assert_close(target[0], expected / expected.sum())


@given(SEEDS, st.sampled_from(["forced", "told", "none"]), st.booleans())
def test_what_each_loss_counts_is_known_from_the_plan_alone(seed, way, unmasked_itm):
    model = lively(seed=seed, align=way, unmasked_itm=unmasked_itm)
    shop = Shop(seed=seed % 100)
    rows = torch.randperm(12, generator=gen(seed))[:8]
    plan, count = planned(model, shop, rows, seed)
    answers = model.answers(shop.pictures[rows], plan)
    assert set(count) == {*TASKS, "cr"} and count["cr"] == 1
    for task in TASKS:
        assert len(answers[task][0]) == len(answers[task][1]) == count[task]
    losses = model.losses(shop.pictures[rows], plan)
    for task in TASKS:
        logits, target = (x.double() for x in answers[task])
        if target.ndim == 2:
            expected = (target * (target.log() - logits.log_softmax(1))).sum()
        else:
            expected = -logits.log_softmax(1)[torch.arange(len(target)), target.long()].sum()
        assert losses[task].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    recognition = 0.0
    for task, classes in (("category", shop.categories[rows]), ("subcategory", shop.subcategories[rows])):
        true = plan["matched"] & (~plan["changed"] if unmasked_itm else torch.ones(8, dtype=torch.bool))
        known = true & (classes >= 0)
        assert torch.equal(answers[task][1], classes[known])
        if known.any():
            recognition += F.cross_entropy(answers[task][0], classes[known]).item()
    assert losses["cr"].item() == pytest.approx(recognition, rel=1e-4, abs=1e-4)


@settings(max_examples=8)
@given(SEEDS, st.sets(st.sampled_from([*TASKS, "cr", "sat"]), min_size=1).filter(lambda names: names != {"sat"}))
def test_what_trains_gets_a_gradient_and_nothing_else_does(seed, objectives):
    model = lively(seed=seed, objectives=",".join(sorted(objectives)), change_pairs=0.6)
    shop, rows = Shop(seed=seed % 100), torch.arange(12)
    for progress in (0.0, 0.19, 0.2, 1.0):
        model.zero_grad()
        plan, count = planned(model, shop, rows, seed, progress)
        losses = model.losses(shop.pictures[rows], plan)
        assert set(losses) == set(count) == set(model.active(progress))
        known = [plan[name].any() for name in ("share_category", "share_subcategory") if name in plan]
        assume(all(count.values()) and all(known))  # every head has something to count
        sum(losses.values()).backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        trained = model.trained(progress)
        invariant = {name for name in trained if name.endswith("key.bias")}  # softmax forgets an additive constant
        assert reached - invariant == trained - invariant
        captions_only = all(name.startswith("captioner.") for name in trained)
        assert captions_only == ("sat" in objectives and progress < 0.2)


def test_where_nothing_is_counted_losses_and_gradients_are_zero():
    model = lively(change_pairs=1e-9)
    shop, rows = Shop(), torch.arange(4)
    plan, count = planned(model, shop, rows)
    plan["judge"] = torch.zeros(4, dtype=torch.bool)
    losses = model.losses(shop.pictures[rows], plan)
    for task in TASKS:
        assert losses[task].item() == 0 and (count[task] == 0 or task == "itm")
    sum(losses[task] for task in TASKS).backward()
    assert not any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_no_more_than_max_masked_words_are_hidden():
    model = lively(objectives="mlm", mask_words=1.0, max_masked=2, change_pairs=0.9)
    assert planned(model, Shop(), torch.arange(12))[0]["M"].max() == 2


def test_dropout_works_on_attention_and_twice_on_patches():
    model, h = lively().train(), torch.randn(2, 5, SMALL.width).double()
    assert not torch.equal(model.blocks[0].attend(h, None), model.blocks[0].attend(h, None))
    level, counted = model.levels[0], []
    level.dropout.register_forward_hook(lambda *call: counted.append(1))
    level(torch.randn(2, 1, SMALL.feature_dim).double(), torch.zeros(2, 1, SMALL.width).double())
    assert len(counted) == 2


def test_recomputing_activations_changes_no_loss_and_no_gradient():
    gradients, shop, rows = [], Shop(), torch.arange(6)
    for recompute in (False, True):
        model = lively()
        model.recompute = recompute
        sum(model.losses(shop.pictures[rows], planned(model, shop, rows)[0]).values()).backward()
        gradients.append([p.grad for name, p in model.named_parameters() if name in model.trained(1.0)])
    assert_equal(*gradients)


def test_the_frozen_resnet_never_trains():
    with torch.device("meta"):
        model = Kaleido(Config.preset("base", depth=1, vocab_size=V))
    assert not any(name.startswith("encoder.") for name in model.trained(1.0))
    assert not model.train().encoder.bn1.training


# --- The plan ---


@given(SEEDS, st.booleans())
def test_the_plan_changes_true_pairs_only_and_matching_reads_what_test_time_looks_like(seed, unmasked_itm):
    model, shop = lively(unmasked_itm=unmasked_itm), Shop(seed=seed % 100)
    rows = torch.randperm(12, generator=gen(seed))
    plan, count = planned(model, shop, rows, seed)
    own = F.pad(shop.tokens[rows], (0, 10 - shop.tokens.shape[1]))
    tokens = F.pad(plan["tokens"], (0, 10 - plan["tokens"].shape[1]))
    empty = (plan["tokens"] != 0).sum(1) == 2
    assert torch.equal((tokens == own).all(1) | empty, plan["matched"] | empty)
    assert torch.equal(plan["change"], plan["changed"] & plan["matched"])
    assert not bool((empty & plan["changed"]).any())
    if unmasked_itm:
        assert bool((plan["matched"] | ~plan["changed"]).all()) and not bool((plan["judge"] & plan["changed"]).any())
    else:
        assert bool(plan["changed"].all()) and bool(plan["judge"].all())
        assert int(plan["matched"].sum()) == 6
    ordinary = (plan["tokens"] >= 5).sum(1)
    for n, M, changed in zip(ordinary.tolist(), plan["M"].tolist(), plan["changed"].tolist()):
        assert M == (min(10, max(1, round(0.15 * n))) if changed and n else 0)
    unchanged = ~plan["changed"]
    assert not plan["turn"][unchanged].any() and not plan["order"][unchanged].any()
    assert bool((plan["other"][unchanged] == -1).all())


@given(SEEDS)
def test_a_donor_is_another_product_with_another_caption_and_the_label_is_where_it_stands(seed):
    model, shop = lively(change_pairs=1.0, objectives="cp", seed=seed), Shop(seed=seed % 100)
    rows = torch.randperm(12, generator=gen(seed))[:9]
    plan, count = planned(model, shop, rows, seed)
    same, other = shop.same(rows), plan["other"]
    for place in range(9):
        if other[place] >= 0:
            assert not same[place, other[place]]
        else:
            assert same[place].all()
    assert count["cp"] == int((other >= 0).sum())
    _, framed = model.framed(shop.pictures[rows])
    clean = kaleido.cut_all(framed, 8)
    _, hidden = model.choose(framed, EVEN.expand(len(framed), 4, 4), plan)
    shown, _ = model.alter(clean, hidden, plan)
    differs = (shown != clean).flatten(2).any(2)[:, level(3)]
    target = model.answers(shop.pictures[rows], plan)["cp"][1]
    assert torch.equal(differs[other >= 0].int().argmax(1), target) and bool((differs.sum(1) == (other >= 0)).all())


def test_a_batch_of_one_product_has_no_donors_and_nothing_is_swapped():
    model, shop, rows = lively(objectives="cp", change_pairs=1.0), Shop(), torch.tensor([0, 1])
    plan, count = planned(model, shop, rows)
    plan["other_images"] = 1 - plan["other_images"]
    _, framed = model.framed(shop.pictures[rows])
    clean = kaleido.cut_all(framed, 8)
    _, hidden = model.choose(framed, EVEN.expand(len(framed), 4, 4), plan)
    assert plan["other"].tolist() == [-1, -1] and count == {"cp": 0} and hidden.sum() == 2
    assert torch.equal(model.alter(clean, hidden, plan)[0], clean)
    assert model.losses(shop.pictures[rows], plan)["cp"].item() == 0


def test_every_possible_donor_is_equally_likely_and_where_none_is_there_is_minus_one():
    same = torch.eye(5, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    same[4] = same[:, 4] = True
    counts = torch.zeros(5, 5)
    for seed in range(600):
        donors = kaleido.draw_donors(same, gen(seed))
        assert donors[4] == -1
        counts[torch.arange(4), donors[:4]] += 1
    expected = (~same[:4]).float() * 600 / (~same[:4]).sum(1, keepdim=True)
    assert bool(((counts[:4] - expected).abs() < 60).all()) and not bool(counts[:4][same[:4]].any())


def test_a_hidden_word_becomes_mask_in_80_percent_and_a_random_or_its_own_word_in_10_each():
    model, shop = lively(), Shop(12)
    tokens = torch.full((4000, 5), 9)
    hide = torch.ones(4000, dtype=torch.bool)
    instead = model.plan_words(shop.tokenizer, tokens, lambda what: data.generator(what), hide)["instead"]
    assert (instead == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    others = instead[(instead != MASK) & (instead != 9)]
    assert len(others) / instead.numel() == pytest.approx(0.1 * (V - 6) / (V - 5), abs=0.01)
    assert set(others.tolist()) == set(range(5, V)) - {9}


def test_the_switches_of_table_4_leave_out_what_they_name():
    shop, rows = Shop(), torch.arange(12)
    model = lively(objectives="mlm,itm", unmasked_itm=False, foreground=False, align="none")
    plan, count = planned(model, shop, rows)
    assert set(count) == {"mlm", "itm"} and "other" not in plan
    images = picture_with((8, 8, 24, 24))[None]
    assert torch.equal(model.framed(images)[1], images)
    assert not torch.equal(lively().framed(images)[1], images)
    _, framed = model.framed(shop.pictures)
    _, hidden = model.choose(framed, EVEN.expand(len(framed), 4, 4), plan)
    assert not hidden.any() and not plan["turn"].any() and not plan["order"].any()
    assert model.active(0.0) == ("mlm", "itm")
    assert lively(align="none").active(0.0) == (*TASKS, "cr")  # no captioner is needed


# --- Captioning ---


@given(SEEDS)
def test_captioning_reads_masks_alone_and_counts_the_caption_and_its_end(seed):
    model, shop = lively(seed=seed, objectives="caption"), Shop(seed=seed % 100)
    rows = torch.arange(5)
    plan, count = planned(model, shop, rows, seed)
    logits, target = model.answers(shop.pictures[rows], plan)["caption"]
    expected = [word for row in shop.tokens[rows].tolist() for word in row[1:] if word]
    assert target.tolist() == expected and count == {"caption": len(expected)}
    tokens = torch.tensor([[CLS] + [MASK] * 9] * 5)
    text = model.encode(shop.pictures[rows], tokens)[1]
    logits = model.predict_words(text, torch.ones(5, 10, dtype=torch.bool)).detach()
    to_win = (logits.amax(1) - logits[:, SEP]).quantile(0.3)  # so that [SEP] comes at some places, before other words
    with torch.no_grad():
        model.word_head.bias[SEP] += to_win
    logits[:, SEP] += to_win
    best = logits.argmax(1).view(5, 10)[:, 1:].tolist()
    told = model.caption(shop.pictures[rows])
    for words, ids in zip(best, told.tolist()):
        words = (words + [SEP])[: (words + [SEP]).index(SEP)]
        assert ids == words + [0] * (9 - len(words))


# --- Other people's weights ---

LEVEL_NAMES = ("rotation", "jigsaw", "camouflage", "greymask", "blank")
BERT_NAMES = re.compile(r"bert/(embeddings|encoder|pooler)/|cls/(predictions|seq)")
D, DEEP, WIDE, FEATURE = 16, 2, 32, 2048


def official_arrays(seed=0, root=""):
    """Random arrays under the names of the authors' variables, with the shapes that the names have there."""
    shapes = {"embeddings/word_embeddings": (V, D), "embeddings/position_embeddings": (12, D)}
    shapes |= {"embeddings/token_type_embeddings": (2, D), "position_dense": (5, D), "pooler/dense/kernel": (D, D)}
    shapes |= {"pooler/dense/bias": (D,), "embeddings/LayerNorm/gamma": (D,), "embeddings/LayerNorm/beta": (D,)}
    for i in range(DEEP):
        for part, size in (("attention/self/query", (D, D)), ("attention/self/key", (D, D)),
                           ("attention/self/value", (D, D)), ("attention/output/dense", (D, D)),
                           ("intermediate/dense", (D, WIDE)), ("output/dense", (WIDE, D))):
            shapes[f"encoder/layer_{i}/{part}/kernel"] = size
            shapes[f"encoder/layer_{i}/{part}/bias"] = size[1:]
        for part in ("attention/output/LayerNorm", "output/LayerNorm"):
            shapes[f"encoder/layer_{i}/{part}/gamma"] = shapes[f"encoder/layer_{i}/{part}/beta"] = (D,)
    for name in LEVEL_NAMES:
        table = f"{name}_embeddings/{'blankmask' if name == 'blank' else name}"
        shapes[f"{table}_projector"], shapes[f"{table}_type_embeddings"] = (FEATURE, D), (4, D)  # rows 4 and 5 lack
        shapes[f"{table}EmbLayerNorm/gamma"] = shapes[f"{table}EmbLayerNorm/beta"] = (D,)
    shapes = {f"bert/{name}": shape for name, shape in shapes.items()}
    shapes |= {
        "cls/predictions/transform/dense/kernel": (D, D), "cls/predictions/transform/dense/bias": (D,),
        "cls/predictions/transform/LayerNorm/gamma": (D,), "cls/predictions/transform/LayerNorm/beta": (D,),
        "cls/predictions/output_bias": (V,),
        "cls/seq_relationship/output_weights": (2, D), "cls/seq_relationship/output_bias": (2,),
        "cls/img_rotation/rotation_output_weights": (4, D), "cls/img_rotation/rotation_output_bias": (4,),
        "cls/img_jigsaw/jiasaw_output_weights": (24, 4 * D), "cls/img_jigsaw/jigsaw_output_bias": (24,),
        "cls/img_camouflage/camouflage_output_weights": (9, 9 * D), "cls/img_camouflage/camouflage_output_bias": (9,),
        "cls/img_greymask/greymask_output_weights": (D, FEATURE),
        "cls/img_blankmask/blanmask_output_weights": (D, FEATURE),
    }
    random, arrays = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        scale = 1.5 / math.sqrt(shape[0]) if name.endswith(("kernel", "projector")) else 0.5
        arrays[f"{root}{name}"] = (scale * random.standard_normal(shape)).astype(np.float32)
    return arrays


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def official_graph(w, features, places, tokens):
    """The authors' graph, one pair, in numpy: features (55, F) or None, places (55, 5), words (L,) -> logits."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return w[f"{name}/gamma"] * x + w[f"{name}/beta"]

    def dense(x, name):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    e = "bert/embeddings"
    h = w[f"{e}/word_embeddings"][tokens] + w[f"{e}/position_embeddings"][: len(tokens)]
    h = norm(h + w[f"{e}/token_type_embeddings"][0], f"{e}/LayerNorm")
    if features is not None:
        for k, name in enumerate(LEVEL_NAMES, start=1):
            table = f"bert/{name}_embeddings/{'blankmask' if name == 'blank' else name}"
            types = w[f"{table}_type_embeddings"]
            x = features[level(k)] @ w[f"{table}_projector"] + places[level(k)] @ w["bert/position_dense"]
            x = x + (types[k] if k < len(types) else 0)
            h = np.concatenate([h, norm(x, f"{table}EmbLayerNorm")])
    seen = np.concatenate([tokens != 0, np.ones(len(h) - len(tokens), dtype=bool)])
    for i in range(DEEP):
        b = f"bert/encoder/layer_{i}"
        q, k, v = (dense(h, f"{b}/attention/self/{part}") for part in ("query", "key", "value"))
        out = np.zeros_like(h)
        for head in (slice(0, D // 2), slice(D // 2, D)):
            scores = np.where(seen, q[:, head] @ k[:, head].T / np.sqrt(D // 2), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head]
        h = norm(h + dense(out, f"{b}/attention/output/dense"), f"{b}/attention/output/LayerNorm")
        h = norm(h + dense(gelu(dense(h, f"{b}/intermediate/dense")), f"{b}/output/dense"), f"{b}/output/LayerNorm")
    answers = {"text": h[: len(tokens)]}
    p = "cls/predictions"
    words = norm(gelu(dense(h[: len(tokens)], f"{p}/transform/dense")), f"{p}/transform/LayerNorm")
    answers["mlm"] = words @ w[f"{e}/word_embeddings"].T + w[f"{p}/output_bias"]
    pooled = np.tanh(dense(h[0], "bert/pooler/dense"))
    answers["itm"] = w["cls/seq_relationship/output_weights"] @ pooled + w["cls/seq_relationship/output_bias"]
    if features is not None:
        K = {k: h[len(tokens) :][level(k)] for k in range(1, 6)}
        r, j, c = "cls/img_rotation/rotation", "cls/img_jigsaw/jigsaw", "cls/img_camouflage/camouflage"
        answers["rr"] = w[f"{r}_output_weights"] @ K[1][0] + w[f"{r}_output_bias"]
        answers["jps"] = w["cls/img_jigsaw/jiasaw_output_weights"] @ K[2].ravel() + w[f"{j}_output_bias"]
        answers["cp"] = w[f"{c}_output_weights"] @ K[3].ravel() + w[f"{c}_output_bias"]
        answers["g2cm"] = K[4] @ w["cls/img_greymask/greymask_output_weights"]
        answers["b2cm"] = K[5] @ w["cls/img_blankmask/blanmask_output_weights"]
    return answers


SHAPE = dict(heads=2, text_len=10, image_size=32, patch_side=8, sat_dim=4, sat_grid=4)


@pytest.fixture(scope="module")
def official():
    arrays = official_arrays()
    root = "kaleido_bert_pre_trained_model/"
    extra = {"global_step": np.int64(7), f"{root}bert/pooler/dense/kernel/adam_m": np.zeros((D, D), np.float32)}
    return arrays, kaleido.load_official({f"{root}{name}": x for name, x in arrays.items()} | extra, **SHAPE)


def test_the_authors_weights_compute_what_their_graph_computes(official):
    arrays, model = official
    random = np.random.default_rng(1)
    features, places = np.abs(random.standard_normal((2, PATCHES, FEATURE))), random.random((2, PATCHES, 5))
    tokens = captions([7, 9])
    with torch.no_grad():
        visual, text = model.fuse(torch.tensor(features).float(), torch.tensor(places).float(), tokens)
        every = torch.ones(2, 25, dtype=torch.bool)
        ours = {
            "text": text[0], "itm": model.match(text), "rr": model.rotation(visual), "jps": model.jigsaw(visual),
            "mlm": model.predict_words(text, every[:, :9]).view(2, 9, V), "cp": model.camouflage(visual),
            "g2cm": model.recolour(visual, every[:, :16]).view(2, 16, -1),
            "b2cm": model.repaint(visual, every).view(2, 25, -1),
        }
    for row in range(2):
        theirs = official_graph(arrays, features[row], places[row], tokens[row].numpy())
        assert theirs.keys() == ours.keys()
        for name, answer in theirs.items():
            assert_equal([ours[name][row].double()], [torch.from_numpy(answer).double()], 1e-4)


def test_every_key_of_the_authors_is_accounted_for(official):
    arrays, model = official
    root = "kaleido_bert_pre_trained_model/"
    assert model.report.keys() == {f"{root}{name}" for name in arrays} | {
        "global_step", f"{root}bert/pooler/dense/kernel/adam_m"}
    assert model.report["global_step"].startswith("ignored")
    assert model.report[f"{root}bert/embeddings/position_embeddings"] == "used: the first 10 of 12 rows"
    assert model.report[f"{root}bert/blank_embeddings/blankmask_type_embeddings"] == "used: zeros, for want of a row 5"
    for change, message in (("missing", "must leave no weight"), ("unknown", "must hold no weight"), ("shape", "fit")):
        broken = dict(arrays)
        if change == "missing":
            del broken["cls/img_rotation/rotation_output_bias"]
        elif change == "unknown":
            broken["bert/what"] = np.zeros(3)
        else:
            broken["bert/position_dense"] = np.zeros((4, D), np.float32)
        with pytest.raises(UserError, match=message):
            kaleido.kaleido_weights.load_official(model, foreign.open_arrays(broken))
    for name, x in arrays.items():
        for other in (np.stack([x, x]), x[:0], np.zeros((), np.float32), np.full_like(x, np.nan)):
            with pytest.raises(UserError, match=re.escape(name)):
                kaleido.kaleido_weights.load_official(model, foreign.open_arrays(arrays | {name: other}))


def test_bert_in_pytorchs_and_in_tensorflows_spelling_fills_the_text_half_and_the_blocks(tmp_path):
    arrays = official_arrays(seed=3)
    bert = {name: x for name, x in arrays.items() if BERT_NAMES.match(name)}
    np.savez(tmp_path / "bert.npz", **bert)
    spelt = {}
    for name, x in bert.items():
        name = name.replace("/", ".").replace("layer_", "layer.")
        name = re.sub(r"(word|position|token_type)_embeddings$", r"\1_embeddings.weight", name)
        x = torch.from_numpy(x.T.copy() if name.endswith("kernel") else x)
        spelt[name.replace("kernel", "weight").replace("output_weights", "weight").replace("output_bias", "bias")] = x
    spelt["bert.embeddings.position_ids"] = torch.arange(12)[None]
    spelt["cls.predictions.decoder.weight"] = spelt["bert.embeddings.word_embeddings.weight"]
    torch.save(spelt, tmp_path / "bert.pt")
    tokens = captions([7])
    expected = official_graph(arrays, None, None, tokens[0].numpy())
    for source in (tmp_path / "bert.npz", str(tmp_path / "bert.pt"), spelt):
        model = Kaleido(dataclasses.replace(SMALL, width=D, heads=2)).eval()
        fresh = model.levels[0].project.weight.clone()
        report = kaleido.load_bert(model, source)
        _, text = model.encode(None, tokens)
        words = model.predict_words(text, torch.ones(1, 7, dtype=torch.bool))
        assert_equal([text[0][0].double(), words.double()],
                     [torch.from_numpy(expected["text"]).double(), torch.from_numpy(expected["mlm"]).double()], 1e-4)
        assert torch.equal(model.levels[0].project.weight, fresh)
        assert len(report) == len(bert if "npz" in str(source) else spelt)
    spelt["cls.predictions.decoder.weight"] = torch.zeros(V, D)
    with pytest.raises(UserError, match="must equal the word embedding"):
        kaleido.load_bert(model, spelt)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match="broken.npz: not a whole .npz of numbers"):
        kaleido.load_bert(model, tmp_path / "broken.npz")


def resnet50_by_names(w, x):
    """ResNet-50 from torchvision's names alone."""
    def conv(x, name, stride=1, padding=0):
        return F.conv2d(x, w[f"{name}.weight"], stride=stride, padding=padding)

    def norm(x, name):
        running = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, *running, w[f"{name}.weight"], w[f"{name}.bias"])

    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = F.max_pool2d(norm(conv(x, "conv1", 2, 3), "bn1").relu(), 3, 2, 1)
    for number, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for i in range(blocks):
            name, stride = f"layer{number}.{i}", 2 if i == 0 and number > 1 else 1
            y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2", stride, 1), f"{name}.bn2").relu()
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in w:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (x + y).relu()
    return x.mean((2, 3))


def test_resnet50_is_that_of_torchvisions_names_and_its_classifier_is_ignored(official):
    model = official[1]
    weights = {}
    for number, (name, tensor) in enumerate(model.encoder.state_dict().items()):
        noise = torch.rand(tensor.shape, generator=gen(number))
        fan = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 1
        weights[name] = (2 * noise - 1) / fan**0.5 * 2 if tensor.ndim == 4 else noise + 0.1
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
    weights |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    bert = {name: x for name, x in official_arrays(seed=5).items() if BERT_NAMES.match(name)}
    report = kaleido.load_parts(model, weights | bert)  # with BERT's in one dict
    assert report.keys() == weights.keys() | bert.keys() and report["fc.weight"].startswith("ignored")
    assert torch.equal(model.words.word.weight, torch.from_numpy(bert["bert/embeddings/word_embeddings"]))
    assert kaleido.load_resnet50(model, weights).keys() == weights.keys()
    with pytest.raises(UserError, match="encoder must be resnet50"):
        kaleido.load_parts(Kaleido(SMALL), weights)
    x = torch.rand(2, 3, 32, 32, generator=gen(0))
    with torch.no_grad():
        expected = resnet50_by_names(weights, x)
        torch.testing.assert_close(model.encoder(x), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.target(x), expected.softmax(1), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_tasks_of_figure_7_are_scored_as_pair_by_pair():
    """Accuracies counted one pair at a time, KLDs as the mean over the hidden patches; nothing else is reported."""
    shop, model = Shop(), lively(align="none")
    found = model.pretext(shop, lambda batch, what: data.generator(batch, what), batch=5)
    right, items = dict.fromkeys(TASKS, 0.0), dict.fromkeys(TASKS, 0)
    for number, rows in enumerate(torch.arange(len(shop)).split(5)):
        plan, _ = model.plan(shop, rows, lambda what: data.generator(number, what), None, 1.0)
        plan["other_images"] = shop.pictures[rows[plan["other"].clamp(min=0)]]
        for i in range(len(rows)):
            one = {name: value[i : i + 1] for name, value in plan.items()}
            for task, (logits, target) in model.answers(shop.pictures[rows[i : i + 1]], one).items():
                for guess, truth in zip(logits, target) if task in TASKS else ():
                    if truth.ndim:
                        right[task] += float((truth * (truth.log() - guess.log_softmax(0))).sum())
                    else:
                        right[task] += float(guess.argmax() == truth)
                    items[task] += 1
    assert found.keys() == set(TASKS)
    for task in TASKS:
        assert items[task] > 0 and found[task] == pytest.approx(right[task] / items[task], rel=1e-5), task
