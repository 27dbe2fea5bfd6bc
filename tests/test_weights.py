"""Laws of extras/weights.py and extras/foreign.py: checkpoints, ours and other people's, and broken ones."""

import argparse
import dataclasses
import math
import os
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import weights as checkpoints
from mvlt import MVLT, Config
from test_mvlt import SMALL, assert_equal, captions, everything, gen, layer_norm, lively, pictures

# ---------------------------------------------------------------------------------------------------------------------
# Our own files


def test_save_then_load_gives_the_same_model(tmp_path):
    model = lively(SMALL).float()
    model.vocabulary = ["[PAD]", "été", *(f"word {number}" for number in range(28))]
    model.labels = {"category": list("abc"), "subcategory": list("defgh")}
    checkpoints.save(tmp_path / "model.pt", model, step=7, run={"seed": 1})
    loaded = checkpoints.load(tmp_path / "model.pt")
    assert (loaded.config, loaded.vocabulary, loaded.labels) == (model.config, model.vocabulary, model.labels)
    assert not loaded.training
    images, tokens = pictures(SMALL, 2).float(), captions(SMALL, [5, 7])
    assert_equal(everything(loaded, images, tokens), everything(model, images, tokens), 0)
    contents = checkpoints.read(tmp_path / "model.pt")
    assert (contents["step"], contents["run"]) == (7, {"seed": 1}) and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_is_stopped_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    model, path = MVLT(SMALL), tmp_path / "model.pt"
    checkpoints.save(path, model, step=1)

    def stopped(*args):
        if moment == "torch.save":
            args[1].write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, stopped)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, model, step=2)
    assert checkpoints.read(path)["step"] == 1 and os.listdir(tmp_path) == ["model.pt"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = MVLT(SMALL), tmp_path / "model.pt"
    checkpoints.save(path, model, step=1)
    monkeypatch.setattr("os.fsync", lambda file: os.kill(os.getpid(), 9))
    child = os.fork()
    if child == 0:
        checkpoints.save(path, model, step=2)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert checkpoints.read(path)["step"] == 1


class Bomb:
    """A pickle that makes a folder when it is opened by a trusting reader."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


OPEN = [
    checkpoints.read,
    checkpoints.load,
    checkpoints.load_official,
    lambda path: checkpoints.load_pvt(MVLT(SMALL), path),
]


@pytest.mark.parametrize("open_file", OPEN)
@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, open_file, write):
    write({"model": Bomb(tmp_path / "exploded")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: not a whole file of plain tensors \(it asks for \w+.mkdir\)$"):
        open_file(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("open_file", OPEN)
def test_what_is_no_checkpoint_is_refused_by_its_name_in_one_line(tmp_path, open_file):
    (tmp_path / "notes.pt").write_text("These are notes.")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("notes.pt", "empty.pt", "absent.pt", "."):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as error:
            open_file(tmp_path / name)
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@settings(max_examples=15)
@given(share=st.floats(0, 0.9999))
def test_a_truncated_file_is_refused(tmp_path_factory, share):
    path = tmp_path_factory.getbasetemp() / "whole.pt"
    if not path.exists():
        checkpoints.save(path, MVLT(SMALL))
    cut = path.with_name("cut.pt")
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for open_file in OPEN:
        with pytest.raises(ValueError, match="cut.pt: not a whole file of plain tensors"):
            open_file(cut)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda contents: contents.pop("config"),
        lambda contents: contents["model"].popitem(),
        lambda contents: contents["config"].update(colour=1),
        lambda contents: contents["config"].update(vocab_size=31),
        lambda contents: contents.update(model=3),
        lambda contents: contents.update(config=3),
    ],
)
def test_a_file_of_tensors_that_is_no_model_of_ours_is_refused_in_one_line(tmp_path, spoil):
    checkpoints.save(tmp_path / "model.pt", MVLT(SMALL))
    contents = checkpoints.read(tmp_path / "model.pt")
    spoil(contents)
    torch.save(contents, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: .+") as error:
        checkpoints.load(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's weights


def visual_weights(c, image_size):
    """PVT's names and shapes by rule, filled with noise: a checkpoint for pictures of that size."""
    shapes, below = {"cls_token": (1, 1, c.dims[3])}, 3
    for k, (D, R, hidden) in enumerate(zip(c.dims, c.sr_ratios, c.mlp_ratios)):
        side, stride = image_size // (c.patch_size << k), 2 if k else c.patch_size
        shapes[f"pos_embed{k + 1}"] = (1, side**2 + (k == 3), D)  # stage 4 has a class slot
        shapes |= with_bias(f"patch_embed{k + 1}.proj", D, below, stride, stride) | with_bias(
            f"patch_embed{k + 1}.norm", D
        )
        for i in range(c.depths[k]):
            block = f"block{k + 1}.{i}"
            shapes |= with_bias(f"{block}.norm1", D) | with_bias(f"{block}.norm2", D)
            shapes |= (
                with_bias(f"{block}.attn.q", D, D)
                | with_bias(f"{block}.attn.kv", 2 * D, D)
                | with_bias(f"{block}.attn.proj", D, D)
            )
            shapes |= with_bias(f"{block}.mlp.fc1", hidden * D, D) | with_bias(f"{block}.mlp.fc2", D, hidden * D)
            if R > 1:
                shapes |= with_bias(f"{block}.attn.sr", D, D, R, R) | with_bias(f"{block}.attn.norm", D)
        below = D
    return noise(shapes)


def pvt_weights(c, image_size):
    return visual_weights(c, image_size) | noise(with_bias("norm", c.dims[3]) | with_bias("head", 1000, c.dims[3]))


def official_weights(c, image_size, long=16):
    """The MVLT authors' names and shapes by rule; of the `long` rows of their table of words text_len are used."""
    words, shapes = "text_embeddings", {}
    shapes[f"{words}.word_embeddings.weight"] = (c.vocab_size, c.token_dim)
    shapes[f"{words}.position_embeddings.weight"] = (long, c.token_dim)
    shapes[f"{words}.token_type_embeddings.weight"] = (2, c.token_dim)
    shapes |= with_bias(f"{words}.LayerNorm", c.token_dim)
    for k, (below, D) in enumerate(zip((c.token_dim, *c.dims), c.dims)):
        shapes |= (
            with_bias(f"text_embed{k + 1}.0", D, below)
            | with_bias(f"text_embed{k + 1}.1", D)
            | {f"text_pos_embed{k + 1}": (1, c.text_len, D)}
        )
    for head, classes in dict(itm=2, sup_cls=c.n_category, sub_cls=c.n_subcategory, mlm=0).items():
        shapes |= with_bias(f"{head}_head_embed.0", c.token_dim, c.dims[3]) | with_bias(
            f"{head}_head_embed.1", c.token_dim
        )
        if classes:
            shapes |= with_bias(f"{head}_head.linear", classes, c.token_dim) | {f"{head}_head.linear_bias": (classes,)}
    shapes |= with_bias("mlm_head.transform.dense", c.token_dim, c.token_dim) | with_bias(
        "mlm_head.transform.LayerNorm", c.token_dim
    )
    shapes |= {"mlm_head.bias": (c.vocab_size,)} | with_bias("t2i_head.score.0", 3, 12, 1, 1)
    weights = visual_weights(c, image_size) | noise(shapes)
    weights["mlm_head.mlm_decoder.weight"] = weights[f"{words}.word_embeddings.weight"]
    weights[f"{words}.position_ids"] = torch.arange(long)[None]
    return weights


def with_bias(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def noise(shapes):
    """Weights of each shape, large enough to matter."""
    weights, generator = {}, gen(0)
    for name, shape in shapes.items():
        around = 1 if len(shape) == 1 and name.endswith("weight") else 0  # a LayerNorm's weight
        weights[name] = around + torch.randn(shape, generator=generator) * (
            1.5 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3
        )
    return weights


def resize_table(table, old, new):
    """Bilinear resizing of a (old^2, D) table to (new^2, D), position by position, pixel centres aligned."""

    def neighbours(i):
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(at), max(old - 2, 0))
        return [(low, 1 - (at - low)), (min(low + 1, old - 1), at - low)]

    rows = [
        sum(a * b * table[y * old + x] for y, a in neighbours(i) for x, b in neighbours(j))
        for i in range(new)
        for j in range(new)
    ]
    return torch.stack(rows)


@torch.no_grad()
def authors_network(w, c, images, tokens):
    """What the authors' network computes, key by key: maps, words, logits of ITM, MLM, M-CR and S-CR."""
    w = {name: value.double() for name, value in w.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x, name, eps=1e-5: layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)
    gelu = lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def patches(
        x, name, size
    ):  # a convolution whose stride is its kernel: cut into squares, flatten, multiply. (B, C, H, W) -> (B, N, D)
        B, C, H, W = x.shape
        cut = (
            x.reshape(B, C, H // size, size, W // size, size).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * size * size)
        )
        return cut @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    e, L = "text_embeddings", tokens.shape[1]
    text = (
        w[f"{e}.word_embeddings.weight"][tokens]
        + w[f"{e}.position_embeddings.weight"][:L]
        + w[f"{e}.token_type_embeddings.weight"][0]
    )
    text, image, outputs = norm(text, f"{e}.LayerNorm", 1e-12), images, {}
    for k in range(1, 5):
        D, heads, R, side = c.dims[k - 1], c.heads[k - 1], c.sr_ratios[k - 1], c.side(k - 1)
        table = w[f"pos_embed{k}"][0, 1 if k == 4 else 0 :]
        m = norm(linear(text, f"text_embed{k}.0"), f"text_embed{k}.1") + w[f"text_pos_embed{k}"][0, :L]
        n = norm(patches(image, f"patch_embed{k}.proj", c.patch_size if k == 1 else 2), f"patch_embed{k}.norm")
        z = torch.cat([m, n + resize_table(table, math.isqrt(len(table)), side)], dim=1)
        for i in range(c.depths[k - 1]):
            block = f"block{k}.{i}"
            x = norm(z, f"{block}.norm1", 1e-6)
            keys = x
            if R > 1:
                grid = x[:, L:].transpose(1, 2).reshape(len(x), D, side, side)
                keys = torch.cat([x[:, :L], norm(patches(grid, f"{block}.attn.sr", R), f"{block}.attn.norm")], dim=1)
            q, kv, heard = linear(x, f"{block}.attn.q"), linear(keys, f"{block}.attn.kv"), []
            for h in torch.arange(D).chunk(heads):  # every word is a key, padding too
                attention = (q[..., h] @ kv[..., h].transpose(1, 2) / (D // heads) ** 0.5).softmax(-1)
                heard.append(attention @ kv[..., D + h])
            z = z + linear(torch.cat(heard, dim=-1), f"{block}.attn.proj")
            z = z + linear(gelu(linear(norm(z, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        text, image = z[:, :L], z[:, L:].transpose(1, 2).reshape(len(z), D, side, side)
        outputs |= {f"v{k}": image, f"t{k}": text}
    for head in ("itm", "sup_cls", "sub_cls"):
        t = norm(linear(text[:, 0], f"{head}_head_embed.0"), f"{head}_head_embed.1")
        outputs[head] = linear(t, f"{head}_head.linear") + w[f"{head}_head.linear_bias"]
    t = norm(linear(text, "mlm_head_embed.0"), "mlm_head_embed.1")
    t = norm(gelu(linear(t, "mlm_head.transform.dense")), "mlm_head.transform.LayerNorm", 1e-12)
    return outputs | {"mlm": t @ w["mlm_head.mlm_decoder.weight"].T + w["mlm_head.bias"]}


def official_changes(c):
    """What the small network has that the authors' has not."""
    names = ("text_len", "vocab_size", "token_dim", "dims", "depths", "heads", "mlp_ratios", "sr_ratios")
    return {name: getattr(c, name) for name in names}


@pytest.mark.parametrize("trained_on, image_size", [(32, 32), (32, 64), (96, 64)])
def test_the_authors_checkpoint_computes_what_their_network_computes(trained_on, image_size):
    c = dataclasses.replace(SMALL, image_size=image_size)
    weights = official_weights(c, trained_on)
    model = checkpoints.load_official({"model": weights}, image_size=image_size, **official_changes(c))
    assert set(model.report) == set(weights) and model.config.attend_padding and not model.training
    assert (model.config.n_category, model.config.n_subcategory) == (3, 5)
    model, images, tokens = model.double(), pictures(c, 2), captions(c, [5, 7], width=c.text_len)
    with torch.no_grad():
        visual, text = model.encode(images, tokens)
        ours = {f"v{k + 1}": visual[k] for k in range(4)} | {f"t{k + 1}": text[k] for k in range(4)}
        ours |= {
            "itm": model.match(text),
            "mlm": model.predict_words(text, torch.ones_like(tokens, dtype=torch.bool)).unflatten(0, tokens.shape),
        }
        ours["sup_cls"], ours["sub_cls"] = model.recognise(text)
    theirs = authors_network(weights, c, images, tokens)
    assert ours.keys() == theirs.keys()
    assert_equal(
        [ours[name] for name in theirs], list(theirs.values()), 1e-5
    )  # tables are resized, and biases added, in float32


def test_the_authors_checkpoint_without_recognition_gives_a_model_without_it():
    weights = {name: value for name, value in official_weights(SMALL, 32).items() if "_cls_" not in name}
    model = checkpoints.load_official(weights, image_size=32, **official_changes(SMALL))
    assert model.category_head is None and model.subcategory_head is None


def test_an_untied_decoder_or_a_lonely_second_bias_is_refused():
    weights = official_weights(SMALL, 32)
    untied = weights | {"mlm_head.mlm_decoder.weight": weights["mlm_head.mlm_decoder.weight"] + 1}
    with pytest.raises(
        ValueError, match="mlm_head.mlm_decoder.weight must equal the word embedding, to which it is tied"
    ):
        checkpoints.load_official(untied, image_size=32, **official_changes(SMALL))
    with pytest.raises(ValueError, match="itm_head.linear_bias"):
        checkpoints.load_official(
            weights | {"itm_head.linear_bias": torch.zeros(3)}, image_size=32, **official_changes(SMALL)
        )


def their_place(model, theirs):
    """Our parameter for one of PVT's keys, found by walking the model rather than by the table of mvlt.py."""
    part, k, rest = re.fullmatch(r"(pos_embed|patch_embed|block)(\d)\.?(.*)", theirs).groups()
    stage = model.stages[int(k) - 1]
    if part == "pos_embed":
        return stage.position_image
    owner = {"patch_embed": {"proj": "embed_image", "norm": "norm_image"}.get(rest.split(".")[0]), "block": "blocks"}[
        part
    ]
    return stage.get_parameter(f"{owner}.{rest if part == 'block' else rest.split('.')[1]}")


def test_pvt_at_224_is_copied_exactly_and_every_key_accounted_for():
    config = Config.preset("tiny", image_size=224, vocab_size=30, token_dim=8, embed_dim=8)
    weights, model = pvt_weights(config, 224), MVLT(config)
    visual = re.compile(r"stages\.\d\.(position_image|embed_image|norm_image|blocks)")
    others = {name: p.clone() for name, p in model.named_parameters() if not visual.match(name)}
    report = checkpoints.load_pvt(model, weights)
    assert set(report) == set(weights)
    for name, value in weights.items():
        if re.match("cls_token|norm|head", name):
            assert report[name].startswith("ignored: ")
        else:
            value = value[0, 1:] if name == "pos_embed4" else value[0] if name.startswith("pos_embed") else value
            assert report[name] == "used" and torch.equal(their_place(model, name), value), name
    assert all(
        torch.equal(model.get_parameter(name), value) for name, value in others.items()
    )  # the rest is left alone


@pytest.mark.parametrize("image_size", [64, 96])
def test_pvt_at_another_size_has_its_position_tables_resized_bilinearly(image_size):
    weights, model = pvt_weights(SMALL, 64), MVLT(dataclasses.replace(SMALL, image_size=image_size))
    report = checkpoints.load_pvt(model, weights)
    for k in range(4):
        old, new = 16 >> k, image_size // 4 >> k
        assert report[f"pos_embed{k + 1}"] == ("used" if old == new else f"resized from {old} x {old} to {new} x {new}")
        assert_equal(
            [model.stages[k].position_image.data],
            [resize_table(weights[f"pos_embed{k + 1}"][0, k == 3 :], old, new)],
            1e-5,
        )


PVT, OFFICIAL = pvt_weights(SMALL, 32), official_weights(SMALL, 32)
NEEDED = re.compile(r"(?!cls_token|norm|head|t2i_head|.*linear_bias|mlm_head.mlm_decoder|.*position_ids)")


@pytest.mark.parametrize("official", [False, True])
@given(data=st.data())
def test_a_missing_an_ill_shaped_or_an_unknown_key_is_refused_by_name_and_nothing_is_copied(official, data):
    weights = OFFICIAL if official else PVT
    name = data.draw(
        st.sampled_from([name for name in weights if NEEDED.match(name) and "_cls_head.linear." not in name])
    )
    kind = data.draw(st.sampled_from(["missing", "longer", "transposed", "unknown"]))
    spoilt = dict(weights)
    value = spoilt.pop(name)
    if kind == "longer":
        spoilt[name] = torch.cat([value, value, value], dim=-1)
    elif kind == "transposed":
        spoilt[name] = (
            value.unsqueeze(-1) if value.ndim == 1 else value.transpose(0, -1).repeat(1, *[1] * (value.ndim - 2), 3)
        )
    elif kind == "unknown":
        name = f"{name}.unknown"
        spoilt = weights | {name: value}
    with pytest.raises(ValueError, match=re.escape(name)):
        if official:
            checkpoints.load_official(spoilt, image_size=32, **official_changes(SMALL))
        else:
            model = MVLT(SMALL)
            before = [p.clone() for p in model.parameters()]
            try:
                checkpoints.load_pvt(model, spoilt)
            finally:
                assert_equal(before, model.parameters(), 0)


def test_weights_are_read_from_a_file_as_from_a_dict_and_nothing_else_is_taken(tmp_path):
    models = [MVLT(SMALL), MVLT(SMALL)]
    torch.save(
        {"model": PVT, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "pvt.pth"
    )  # as PVT's training code writes them
    reports = [checkpoints.load_pvt(models[0], tmp_path / "pvt.pth"), checkpoints.load_pvt(models[1], PVT)]
    assert reports[0] == reports[1]
    for name in PVT.keys() - {"cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}:
        assert torch.equal(their_place(models[0], name), their_place(models[1], name))
    torch.save([1, 2], tmp_path / "list.pth")
    for nothing in ({}, {"model": {}}, {"a": 1}, tmp_path / "list.pth"):
        with pytest.raises(ValueError, match="must be a state dict|must hold a dict"):
            checkpoints.load_pvt(models[0], nothing)


def test_of_several_files_the_authors_checkpoint_is_told_from_bert_and_resnet(tmp_path):
    bert = {"bert/embeddings/word_embeddings": np.zeros((3, 2), np.float32)}
    resnet = {"conv1.weight": torch.ones(1)}
    np.savez(tmp_path / "bert.npz", **bert)
    np.savez(tmp_path / "authors.npz", **bert, **{"bert/position_dense": np.zeros((5, 2), np.float32)})
    torch.save(resnet, tmp_path / "resnet.pth")
    whole, part = checkpoints.open_init("kaleido", f"{tmp_path}/bert.npz,{tmp_path}/resnet.pth")
    assert whole == {} and part.keys() == bert.keys() | resnet.keys()
    whole, part = checkpoints.open_init("kaleido", f"{tmp_path}/resnet.pth,{tmp_path}/authors.npz")
    assert whole.keys() == bert.keys() | {"bert/position_dense"} and part.keys() == resnet.keys()
    with pytest.raises(ValueError, match="absent.npz"):
        checkpoints.open_init("kaleido", f"{tmp_path}/absent.npz")
