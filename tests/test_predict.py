"""The laws of predict.py and extras/index.py: tiny untrained models of all three kinds, and a few drawn pictures."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import kaleido
import mvlt
import predict
import vlmo
from extras import index as index_files
from extras import pictures, runtime, weights
from extras.runtime import UserError
from extras.tokenizer import SPECIAL

HERE = Path(predict.__file__).parent
WORDS = [*SPECIAL, "a", "red", "green", "blue", "coat", "boot", "wool", "old"]
LABELS = {"category": ["foot", "top"], "subcategory": ["boot", "coat", "hat"]}
TEXTS = ["a red coat", "blue boot", "old green wool coat", "wool"]
SIZES = dict(image_size=32, text_len=8, vocab_size=len(WORDS), n_category=2, n_subcategory=3)
CONFIGS = {
    "mvlt": mvlt.Config(
        token_dim=16, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), mlp_ratios=(2, 2, 2, 2),
        embed_dim=8, **SIZES,
    ),
    "kaleido": kaleido.Config(
        patch_side=8, width=16, depth=1, heads=2, encoder="conv", feature_dim=8, sat_dim=8, sat_grid=4, **SIZES
    ),
    "vlmo": vlmo.Config(
        patch_size=8, text_reach=8, width=16, depth=2, heads=2, fused=1, embed_dim=8, tie_words=True, **SIZES
    ),
}


def save_run(folder, kind="mvlt", seed=0, step=7, recipe={}, **run):
    """A run's folder with an untrained model."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    mask_unit = {"mask_unit": 8} if kind == "mvlt" else {}
    model = weights.MODELS[kind](CONFIGS[kind], weights.FILES[kind].Recipe(**mask_unit | recipe))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)  # so that different pictures get clearly different answers
    model.vocabulary, model.labels = WORDS, LABELS
    if kind == "kaleido":  # what prepare() takes from a data set
        model.captioner.ends.copy_(torch.tensor([WORDS.index("[CLS]"), WORDS.index("[SEP]")]))
        model.mask_id.fill_(WORDS.index("[MASK]"))
        model.alignable.fill_(True)
    weights.save(folder / "last.pt", model, step=step, run=run)
    return folder


def draw(path, number):
    random = np.random.default_rng(number)
    pixels = np.full((24, 20, 3), random.integers(0, 256, 3), np.uint8)
    pixels[random.integers(12) :, random.integers(10) :] = random.integers(0, 256, 3)
    Image.fromarray(pixels).save(path)


def draw_photos(folder):
    (folder / "more").mkdir(parents=True)
    for number in range(9):
        draw(folder / ("more" if number % 2 else "") / f"{number}.png", number)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The fastest for tiny models; and OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return predict.load(save_run(tmp_path_factory.mktemp("runs") / "1"))


@pytest.fixture
def fresh(tmp_path):
    """A run of this test alone, with no index yet."""
    return predict.load(save_run(tmp_path / "run"))


@pytest.fixture
def photos(tmp_path):
    return draw_photos(tmp_path / "photos")


@pytest.fixture
def exact(monkeypatch):
    """fp32 where equality is the claim."""
    monkeypatch.setattr(runtime, "autocast", lambda device, enabled=True: contextlib.nullcontext())


def paths(folder):
    return [os.path.join(folder, name) for name in pictures.files_below(folder)]


def contents(folder):
    """{path: bytes} of all files below a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def floats(image, fit="stretch"):
    return torch.from_numpy(pictures.picture("", image, 32, fit)).permute(2, 0, 1)[None].float() / 255


def plain_score(run, image, text):
    with torch.no_grad():
        tokens = torch.tensor([run.tokenizer.encode(text)])
        visual, encoded = run.model.encode(floats(image), tokens)
        joined = hasattr(run.model, "match_pair")  # MVLT's towers join in
        logits = run.model.match_pair(visual, encoded, tokens) if joined else run.model.match(encoded)
        mismatch, match = logits[0].tolist()
    return match - mismatch


# --- Functions ---


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_score_is_the_matching_heads_logit_for_the_pair(tmp_path, photos, exact, kind):
    run = predict.load(save_run(tmp_path / kind, kind))
    for image, text in zip(paths(photos), TEXTS):
        assert predict.score(run, image, text) == pytest.approx(plain_score(run, image, text), abs=1e-4)


@pytest.mark.parametrize("way", ["pictures", "texts"])
def test_rank_gives_every_answer_once_in_the_order_of_its_score(run, photos, exact, monkeypatch, way):
    monkeypatch.setattr(predict, "BATCH", 3)
    monkeypatch.setattr(predict, "PART", 4)
    answers, query = (paths(photos), TEXTS[0]) if way == "pictures" else (TEXTS, paths(photos)[0])
    ranked = predict.rank(run, query, answers)
    scores = [score for _, score in ranked]
    assert sorted(answer for answer, _ in ranked) == sorted(answers)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    for answer, score in ranked:
        image, text = (answer, query) if way == "pictures" else (query, answer)
        assert score == pytest.approx(plain_score(run, image, text), abs=1e-4)


def test_classify_gives_probabilities_from_what_the_run_reads(run, photos, tmp_path):
    image, other = paths(photos)[:2]
    found = predict.classify(run, image, "a red coat")
    for field, names in LABELS.items():
        chances = [chance for _, chance in found[field]]
        assert sorted(name for name, _ in found[field]) == names
        assert sum(chances) == pytest.approx(1, abs=1e-5) and chances == sorted(chances, reverse=True)
    by = {}
    for modality in ("image", "text"):
        recipe = {"objectives": "cr", "modality": modality, "mask_pictures": 0.0}
        by[modality] = predict.load(save_run(tmp_path / modality, recipe=recipe))
    alone = predict.classify(run, image)
    assert alone != found
    assert predict.classify(by["image"], image, "a red coat") == alone != predict.classify(by["image"], other)
    read = predict.classify(by["text"], image, "a red coat")
    assert read == predict.classify(by["text"], other, "a red coat") != predict.classify(by["text"], image, "boot")
    with pytest.raises(UserError, match="by the text alone"):
        predict.classify(by["text"], image)


@pytest.mark.parametrize("share, shown", [(0, 16), (0.25, 12), (0.5, 8), (1, 0)])
def test_rebuild_hides_that_share_and_leaves_the_original_alone(run, photos, share, shown):
    image = paths(photos)[0]
    result = predict.rebuild(run, image, hide=share)
    assert (result["original"] == pictures.picture("", image, 32)).all()
    units = (result["hidden"] == result["original"]).all(axis=2).reshape(4, 8, 4, 8).all(axis=(1, 3))  # of 8 x 8 pixels
    assert units.sum() == shown
    assert (result["hidden"].reshape(4, 8, 4, 8, 3).swapaxes(1, 2)[~units] == 128).all()
    if share == 1:
        error = ((result["rebuilt"] / 255.0 - result["original"] / 255.0) ** 2).mean()
        assert result["psnr"] == pytest.approx(-10 * math.log10(error), abs=0.1)


def test_rebuild_reads_the_text_and_hides_as_the_run_was_trained(tmp_path, photos, exact):
    image, run = paths(photos)[1], predict.load(save_run(tmp_path / "grid", recipe={"mask_style": "grid"}, fit="pad"))
    result = predict.rebuild(run, image, "a red coat", seed=3)
    pixels = floats(image, "pad")
    masked, hidden = mvlt.mask_images(pixels, "grid", 0.5, 8, data.generator(3, "hide", 0))
    with torch.no_grad():
        rebuilt = run.model.rebuild(masked, torch.tensor([run.tokenizer.encode("a red coat")]))[0].clamp(0, 1)
    assert np.abs(result["rebuilt"] - 255 * rebuilt.permute(1, 2, 0).numpy()).max() <= 0.51
    floor = torch.stack([colour.masked_fill(hidden[0, 0], colour[~hidden[0, 0]].mean()) for colour in pixels[0]])
    for name, shown in {"psnr": rebuilt, "floor": floor}.items():
        error = ((shown - pixels[0])[:, hidden[0, 0]] ** 2).mean().item()
        assert result[name] == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_the_seed_chooses_what_rebuild_hides(run, photos):
    one, again, other = (predict.rebuild(run, paths(photos)[0], seed=seed)["hidden"] for seed in (3, 3, 4))
    assert (one == again).all() and (one != other).any()


def test_chances_are_shares_of_all_names_not_of_the_five_that_are_shown():
    chances = dict(predict.likeliest(torch.tensor([2.0, 1, 0, 0, 0, 0, 0]), list("abcdefg")))
    assert chances["a"] == pytest.approx(math.e**2 / (math.e**2 + math.e + 5))


def test_an_index_of_pictures_in_another_shape_is_another(fresh):
    padded = fresh._replace(settings={**fresh.settings, "fit": "pad"})
    assert predict.fingerprint(fresh) != predict.fingerprint(padded)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fill_answers_each_mask_with_words_and_leaves_the_others(tmp_path, photos, kind):
    run = predict.load(save_run(tmp_path / kind, kind))
    found, text = predict.fill(run, paths(photos)[0], "a [MASK] wool [MASK]")
    best = [one[0][0] for one in found]
    assert text == run.tokenizer.decode(run.tokenizer.encode(f"a {best[0]} wool {best[1]}"))
    for one in found:
        assert len(one) == 5 and not {word for word, _ in one} & set(SPECIAL)
        assert [chance for _, chance in one] == sorted((chance for _, chance in one), reverse=True)
    with pytest.raises(UserError, match="must hold"):
        predict.fill(run, paths(photos)[0], "a red coat")


def test_a_text_without_a_known_word_is_refused_and_a_cut_is_reported_once(run, fresh, photos, capsys):
    for text, reason in (("", "empty"), ("  ", "empty"), ("zzz", "knows none")):
        with pytest.raises(UserError, match=reason):
            predict.score(run, paths(photos)[0], text)
    assert predict.score(run, paths(photos)[0], "red " * 9) == predict.score(run, paths(photos)[0], "red " * 6)
    assert "the run reads the first 6 of 9 word pieces" in capsys.readouterr().err
    predict.index(fresh, photos)
    for best in (0, 2):
        predict.search(fresh, "red " * 9, predict.open_index(fresh), best)
        assert capsys.readouterr().err.count("the run reads the first 6 of 9 word pieces") == 1


def test_align_shows_the_patches_that_the_model_aligns_with_each_word(tmp_path, photos, monkeypatch, capsys):
    run = predict.load(save_run(tmp_path / "run", "kaleido", recipe={"align": "told"}))
    run.model.captioner.out.bias.data[WORDS.index("coat")] = 1e4  # a captioner that says nothing else
    image = paths(photos)[0]
    [(word, patches, heat)], box = predict.align(run, image, "a red coat")
    assert word == "coat" and heat.shape == (4, 4) and heat.sum() == pytest.approx(1, abs=1e-5)
    assert len(box) == 4 and (patches[:, 0] >= box[0] - 1e-6).all() and (patches[:, 1] <= box[1] + 1e-6).all()
    sides = (box[1] - box[0]) / (patches[:, 1] - patches[:, 0])
    assert sides.round(3).tolist() == [3, 4, 5]  # one patch of each of these levels
    weights.save(run.folder / "last.pt", run.model, run={})
    monkeypatch.chdir(tmp_path)
    predict.main([str(run.folder), "align", image, "a red coat"])
    assert capsys.readouterr().out.splitlines()[1].startswith("coat ")
    with Image.open(f"{Path(image).stem}-aligned.png") as sheet:
        assert sheet.size == (2 * 240, 240)
    with pytest.raises(UserError, match="none of its words"):
        predict.main([str(run.folder), "align", image, "a red boot"])


def test_caption_is_the_text_that_the_model_writes(tmp_path, photos, capsys):
    folder = save_run(tmp_path / "run", "kaleido", recipe={"objectives": "caption"})
    run = predict.load(folder)
    run.model.word_head.bias.data[WORDS.index("wool")] = 1e4
    assert predict.caption(run, paths(photos)[0]) == " ".join(["wool"] * 7)
    predict.main([str(folder), "caption", paths(photos)[0]])
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- The index ---


def tower(run, image):
    with torch.no_grad():
        return run.model.embed_images(floats(image))[0]


@pytest.mark.parametrize("kind", ["mvlt", "vlmo"])
def test_search_equals_reading_every_picture_one_by_one(tmp_path, photos, exact, monkeypatch, kind):
    run = predict.load(save_run(tmp_path / kind, kind))
    monkeypatch.setattr(predict, "PART", 4)
    predict.index(run, photos)
    opened, every = predict.open_index(run), pictures.files_below(photos)
    with torch.no_grad():
        query = run.model.embed_texts(torch.tensor([run.tokenizer.encode(TEXTS[0])]))[0]
    near = {name: (tower(run, photos / name) @ query).item() for name in every}
    found = predict.search(run, TEXTS[0], opened, best=0, show=20)
    assert sorted(answer["image"] for answer in found) == every and len({answer["near"] for answer in found}) > 1
    assert [answer["near"] for answer in found] == pytest.approx(sorted(near.values(), reverse=True), abs=1e-5)
    assert {answer["image"]: answer["near"] for answer in found} == pytest.approx(near, abs=1e-5)

    first = [answer["image"] for answer in found]
    again = predict.search(run, TEXTS[0], opened, best=4, show=6)
    scale = run.model.log_scale.exp().item()
    both = {name: scale * near[name] + plain_score(run, photos / name, TEXTS[0]) / 2 for name in first[:4]}
    assert [answer["image"] for answer in again[:4]] == sorted(both, key=both.get, reverse=True)
    assert [answer["both"] for answer in again[:4]] == pytest.approx(sorted(both.values(), reverse=True), abs=1e-3)
    assert [answer["image"] for answer in again[4:]] == first[4:6]
    assert [answer["match"] is None for answer in again] == [False] * 4 + [True] * 2
    assert predict.search(run, TEXTS[0], opened, best=4, show=2) == again[:2]


def test_a_picture_finds_itself(fresh, photos, exact):
    predict.index(fresh, photos)
    opened = predict.open_index(fresh)
    for name in pictures.files_below(photos):
        found = predict.search(fresh, os.path.join(photos, name), opened)
        assert found[0]["image"] == name and found[0]["near"] == pytest.approx(1, abs=1e-5)


def embedded(monkeypatch, killed_at=None):
    """The names that `index` decodes from now on, in a list that grows. PART is 2."""
    names, open_many = [], predict.open_many

    def open_and_note(run, folder, part):
        if killed_at is not None and len(names) >= killed_at:
            os._exit(9)
        names.extend(part)
        return open_many(run, folder, part)

    monkeypatch.setattr(predict, "PART", 2)
    monkeypatch.setattr(predict, "open_many", open_and_note)
    return names


def test_a_killed_index_goes_on_where_it_stopped_and_ends_with_the_same_bytes(fresh, photos, monkeypatch):
    child = os.fork()
    if child == 0:
        embedded(monkeypatch, killed_at=6)
        predict.index(fresh, photos)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    home = fresh.folder / "index-photos"
    assert len(list(home.glob("*.npy"))) == 3
    with pytest.raises(UserError, match="no index"):
        predict.open_index(fresh)
    (home / f"{'0' * 16}.npy.{'1' * 32}.tmp").write_bytes(b"half of a part")

    names = embedded(monkeypatch)
    assert predict.index(fresh, photos)[1:] == (9, []) and names == pictures.files_below(photos)[6:]
    gone_on = contents(home)
    shutil.rmtree(home)
    predict.index(fresh, photos)
    assert contents(home) == gone_on


def test_a_grown_folder_costs_what_follows_its_first_new_name_and_a_changed_file_its_part(fresh, photos, monkeypatch):
    names = embedded(monkeypatch)
    predict.index(fresh, photos)
    names.clear()
    draw(photos / "more" / "99.png", 99)
    assert predict.index(fresh, photos)[1:] == (10, []) and names == pictures.files_below(photos)[8:]
    assert len(list((fresh.folder / "index-photos").iterdir())) == 2 * 5 + 1
    names.clear()
    draw(photos / "0.png", 77)  # another picture of the same name
    assert predict.index(fresh, photos)[1:] == (10, []) and names == pictures.files_below(photos)[:2]
    names.clear()
    assert predict.index(fresh, photos)[1:] == (10, []) and names == []


def test_bad_files_are_named_and_left_out(fresh, photos, capsys):
    (photos / "cut.png").write_bytes((photos / "0.png").read_bytes()[:-30])
    (photos / "empty.png").touch()
    (photos / "notes.txt").write_text("not to be sold")
    (photos / ".hidden").write_text("?")
    _, count, bad = predict.index(fresh, photos)
    assert count == 9 and [line.split(":")[0] for line in bad] == ["cut.png", "empty.png", "notes.txt"]
    assert predict.index(fresh, photos)[1:] == (count, bad)  # reported again when nothing is read again
    assert len(predict.search(fresh, TEXTS[0], predict.open_index(fresh), show=99)) == 9
    with pytest.raises(UserError, match="cut.png: .*1 more"):
        predict.rank(fresh, TEXTS[0], [str(photos / name) for name in ("0.png", "cut.png", "empty.png")])
    ranked = predict.rank(fresh, TEXTS[0], paths(photos), skip_bad=True)
    warned = capsys.readouterr().err
    assert len(ranked) == 9 and all(f"{name}: " in warned for name in ("cut.png", "empty.png", "notes.txt"))
    for path in paths(photos):
        os.remove(path)
    with pytest.raises(UserError, match="photos: none of the index's pictures is there any more"):
        predict.search(fresh, TEXTS[0], predict.open_index(fresh))
    with pytest.raises(UserError, match="no picture that can be read"):
        predict.index(fresh, photos)


def test_a_part_without_a_readable_picture_does_no_harm(fresh, photos, monkeypatch):
    monkeypatch.setattr(predict, "PART", 2)
    for name in ("0.png", "2.png"):
        (photos / name).write_bytes(b"no picture")
    assert predict.index(fresh, photos)[1] == 7
    assert len(predict.search(fresh, TEXTS[0], predict.open_index(fresh), show=99)) == 7


def write_items(folder, rows):
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_data_folder_is_indexed_by_its_rows(fresh, photos):
    rows = [{"image": f"{i}.png", "caption": f"number {i}", "product_id": f"p{i}"} for i in (0, 2, 4, 4, 5)]
    write_items(photos, rows)
    _, count, bad = predict.index(fresh, photos, "shop")
    assert count == 3 and bad == ["items.jsonl:5: missing picture 5.png"]

    def answers():
        found = predict.search(fresh, TEXTS[0], predict.open_index(fresh, "shop"))
        return sorted((answer["caption"], answer["product_id"]) for answer in found)

    assert answers() == [(f"number {i}", f"p{i}") for i in (0, 2, 4)]
    write_items(photos, [{**rows[0], "caption": "of another name"}, *rows[1:4]])
    predict.index(fresh, photos, "shop")
    assert answers() == [("number 2", "p2"), ("number 4", "p4"), ("of another name", "p0")]


@pytest.mark.parametrize("best", [0, 3])
def test_of_a_products_pictures_search_shows_only_the_nearest(fresh, photos, best):
    owner = {f"{i}.png": "p0" if i < 4 else f"p{i}" for i in (0, 2, 4)}
    rows = [{"image": image, "caption": f"number {image}", "product_id": product} for image, product in owner.items()]
    predict.index(fresh, photos, "photos")  # products unknown: all are shown
    near = {}
    for answer in predict.search(fresh, TEXTS[0], predict.open_index(fresh), best=0, show=99):
        near[answer["image"]] = answer["near"]
    write_items(photos, rows)
    predict.index(fresh, photos, "shop")
    opened = predict.open_index(fresh, "shop")
    found = predict.search(fresh, TEXTS[0], opened, best=best)
    assert {answer["image"] for answer in found} == {max(("0.png", "2.png"), key=near.get), "4.png"}
    assert len(predict.search(fresh, TEXTS[0], opened, best=best, show=1)) == 1


def test_an_index_belongs_to_its_weights_and_its_folder(fresh, photos, exact):
    predict.index(fresh, photos)
    (photos / "more" / "photos").mkdir()
    draw(photos / "more" / "photos" / "1.png", 1)
    with pytest.raises(UserError, match="--name"):
        predict.index(fresh, photos / "more" / "photos")
    predict.index(fresh, photos / "more" / "photos", "other")
    with pytest.raises(UserError, match="choose one by --name: other, photos"):
        predict.open_index(fresh)
    assert predict.open_index(fresh, "other").size == 1
    trained = predict.load(save_run(fresh.folder, seed=1))
    with pytest.raises(UserError, match="other weights"):
        predict.open_index(trained, "photos")
    for again in trained, predict.load(save_run(fresh.folder, seed=2)):
        predict.index(again, photos)
        opened = predict.open_index(again, "photos")
        assert opened.size == 10
        near = predict.search(again, paths(photos)[0], opened)[0]["near"]
        assert near == pytest.approx(1, abs=1e-5)  # the vectors are those of the new weights


# --- A damaged or hostile index ---


def save_index(folder):
    """A run with a complete index of drawn photos, in two parts."""
    run = predict.load(save_run(folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "PART", 5)
        predict.index(run, draw_photos(folder / "photos"))
    return run


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return save_index(tmp_path_factory.mktemp("indexed"))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["/etc/passwd", "../last.pt", "a/../../x", "0" * 16, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4,
)


@st.composite
def damaged_json(draw, text):
    """A JSON text in which one node, the root included, is another value, is missing, or stands twice."""
    root = json.loads(text)
    parent, key, node = None, None, root
    while isinstance(node, (dict, list)) and node and draw(st.integers(0, 4)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, draw(st.sampled_from(keys))
        node = node[key]
    change = draw(st.sampled_from(["replace", "remove", "repeat"]))
    if parent is None:
        root = draw(values)
    elif change == "replace" or isinstance(parent, dict) and change == "repeat":
        parent[key] = draw(values)
    elif change == "remove":
        del parent[key]
    else:
        parent.append(parent[key])
    return json.dumps(root).encode()


@st.composite
def damaged_array(draw):
    """A .npy file of another type or shape, or with numbers that no unit vector has."""
    shape = draw(st.sampled_from([(5, 8), (4, 8), (5, 7), (40,), (), (0, 8), (5, 8, 1), (5, 0)]))
    kind = draw(st.sampled_from([np.float32, np.float64, ">f4", np.int64, bool, object]))
    array = np.full(shape, draw(st.sampled_from([0.1, np.nan, np.inf, 1e30])) if kind is not object else None)
    file = io.BytesIO()
    with np.errstate(invalid="ignore"):
        np.save(file, array.astype(kind))
    return file.getvalue()


@st.composite
def damaged_bytes(draw, content):
    """Bytes that are cut, changed, put in, or nested too deeply."""
    place = draw(st.integers(0, len(content)))
    put = draw(st.sampled_from([b"", b"\0", b"\xff\xfe", b"[" * 100_000, b"\n\n", b"{}", b"9" * 5000, bytes(2000)]))
    return content[:place] + put + content[place + draw(st.integers(0, 100)) :] * draw(st.integers(0, 1))


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # numpy's opinion of some damaged headers
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_index_gives_an_answer_or_one_error_that_names_it_and_touches_nothing_else(indexed, drawn):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(shutil.copytree(indexed.folder, Path(folder) / "run")) / "index-photos"
        run = indexed._replace(folder=home.parent)
        file = drawn.draw(st.sampled_from(sorted(home.iterdir())))
        damage = damaged_bytes(file.read_bytes())
        if drawn.draw(st.booleans()):
            damage = damaged_array() if file.suffix == ".npy" else damaged_json(file.read_text())
        file.write_bytes(drawn.draw(damage))
        others = {path: content for path, content in contents(folder).items() if not path.startswith(str(home))}
        for best in (0, 9):
            try:
                assert len(predict.search(run, TEXTS[0], predict.open_index(run), best, show=9)) > 0
            except UserError as error:
                assert str(home) in str(error) or "missing picture" in str(error) or "link leads" in str(error)
                assert "\n" not in str(error) and len(str(error)) < 500
        with contextlib.suppress(UserError):
            predict.index(run, indexed.folder.parent / "photos")
        assert {path: content for path, content in contents(folder).items() if not path.startswith(str(home))} == others


HEAD = {"folder": "x", "weights": "x", "parts": ["0" * 16]}


@pytest.mark.parametrize("file, content", [
    ("index.json", "{}"),
    ("index.json", "[]"),
    ("index.json", "null"),
    ("index.json", "[" * 100_000),
    ("index.json", json.dumps({**HEAD, "parts": "/etc/passwd"})),
    ("index.json", json.dumps({**HEAD, "parts": ["/etc/passwd"]})),
    ("index.json", json.dumps({**HEAD, "parts": ["../" + "0" * 13]})),
    ("index.json", json.dumps({**HEAD, "parts": [7]})),
    ("index.json", json.dumps({**HEAD, "parts": []})),
    ("index.json", json.dumps({**HEAD, "folder": ["x"]})),
    ("index.json", json.dumps({**HEAD, "folder": "\ud800"})),
    ("index.json", json.dumps({**HEAD, "parts": ["0" * 16], "more": 1})),
    ("*.json", "{}"),
    ("*.json", json.dumps({"rows": [], "bad": {}})),
    ("*.json", json.dumps({"rows": [["a", "b"]] * 5, "bad": {}})),
    ("*.json", json.dumps({"rows": [["/etc/passwd", "", ""]] * 5, "bad": {}})),
    ("*.json", json.dumps({"rows": [["../../x.png", "", ""]] * 5, "bad": {}})),
    ("*.json", json.dumps({"rows": [["x.png", "", 1]] * 5, "bad": {}})),
    ("*.npy", "no array"),
    ("*.npy", np.ones((5, 8))),
    ("*.npy", np.ones((5, 8), np.int64)),
    ("*.npy", np.ones((5, 7), np.float32)),
    ("*.npy", np.ones(5, np.float32)),
    ("*.npy", np.full((5, 8), np.nan, np.float32)),
    ("*.npy", np.full((5, 8), np.inf, np.float32)),
    ("*.npy", None),  # missing
    ("*.npy", os.mkfifo),  # opening a pipe would wait for ever
    ("*.json", os.mkfifo),
])
def test_a_damaged_file_of_an_index_is_one_error_that_names_it(indexed, tmp_path, file, content):
    home = Path(shutil.copytree(indexed.folder, tmp_path / "run")) / "index-photos"
    [first, *_] = index_files.read_head(home)[2]
    path = home / file.replace("*", first)
    path.unlink()
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    elif content:
        content(path)
    run = indexed._replace(folder=home.parent)
    with pytest.raises(UserError) as raised:
        predict.search(run, TEXTS[0], predict.open_index(run), best=0, show=99)
    assert str(raised.value) == f"{path}: damaged; remove it and run index again"
    path.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "PART", 5)
        predict.index(run, indexed.folder.parent / "photos")  # as the message says
    assert predict.open_index(run).size == 9


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/tmp/x", "a/../../other", "x\0y"])
def test_a_name_that_could_leave_the_runs_folder_is_refused_and_nothing_changes(fresh, photos, tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.npy").touch()
    (fresh.folder / "index-a").mkdir()
    before = contents(tmp_path)
    for ask in (lambda: predict.index(fresh, photos, name), lambda: predict.open_index(fresh, name)):
        with pytest.raises(UserError, match="^--name: must not be empty, start with a dot or hold a slash"):
            ask()
    assert contents(tmp_path) == before


def test_index_deletes_only_files_of_its_own_form_and_follows_no_link(fresh, photos, tmp_path):
    home, elsewhere = fresh.folder / "index-photos", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    kept = ["precious.npz", "x.tmp", "notes.json", f"{'0' * 15}.npy", f"{'0' * 16}.npz", f"index.json.{'0' * 31}.tmp"]
    stale = [f"{'0' * 16}.npy", f"{'0' * 16}.json", f"{'0' * 16}.npy.{'0' * 32}.tmp", f"index.json.{'0' * 32}.tmp"]
    for name in kept + stale:
        (home / name).touch()
    predict.index(fresh, photos)
    assert not [name for name in stale if (home / name).exists()]
    assert all((home / name).exists() for name in kept)
    (fresh.folder / "index-linked").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        predict.index(fresh, photos, "linked")
    assert not list(elsewhere.iterdir())


# --- What the model lacks, or the run was not trained for ---


def test_a_model_that_lacks_a_method_says_so_in_one_line(tmp_path, photos):
    image, run = paths(photos)[0], {kind: predict.load(save_run(tmp_path / kind, kind)) for kind in CONFIGS}
    no_towers = "run: this model has no towers, which search needs; rank reads every picture"
    for kind, ask, says in (
        ("kaleido", lambda r: predict.open_index(r), no_towers.replace("run", str(run["kaleido"].folder))),
        ("kaleido", lambda r: predict.index(r, photos), "no towers, which index needs"),
        ("kaleido", lambda r: predict.rebuild(r, image), "no picture decoder, which rebuild needs"),
        ("mvlt", lambda r: predict.caption(r, image), "no caption writer, which caption needs"),
        ("vlmo", lambda r: predict.align(r, image, "coat"), "no alignment of words with patches, which align needs"),
    ):
        with pytest.raises(UserError) as raised:
            ask(run[kind])
        assert says in str(raised.value) and "\n" not in str(raised.value)


def test_an_untrained_part_is_refused_by_name(tmp_path, photos):
    image = paths(photos)[0]

    def saved(name, objectives, **run):
        return predict.load(save_run(tmp_path / name, recipe={"objectives": objectives}, **run))

    paper, towers = saved("paper", "mir,itm,mlm"), saved("towers", "itc")
    says = "the towers, untrained in this run: its objectives are mir,itm,mlm, without itc"
    for ask in (lambda: predict.index(paper, photos), lambda: predict.open_index(paper)):
        with pytest.raises(UserError, match=says):
            ask()
    for part, ask in {
        "matching head": lambda: predict.score(towers, image, "coat"),
        "picture decoder": lambda: predict.rebuild(towers, image),
        "word head": lambda: predict.fill(towers, image, "[MASK]"),
        "recognition heads": lambda: predict.classify(towers, image),
    }.items():
        with pytest.raises(UserError, match=f"needs the {part}, untrained in this run"):
            ask()


@pytest.mark.parametrize("learnt", [{"itc"}, {"itm", "itc"}])
def test_a_command_asks_for_what_has_been_trained_so_far(tmp_path, photos, learnt):
    folder = save_run(tmp_path / "early", recipe={"objectives": "itm,itc", "mask_pictures": 0.0})
    model, image = weights.load(folder / "last.pt"), paths(photos)[0]
    model.learnt = learnt
    weights.save(folder / "last.pt", model, step=10, run={"steps": 20})
    run = predict.load(folder)
    predict.index(run, photos)
    found = predict.search(run, "coat", predict.open_index(run), best=9)
    assert len(found) == 9 and all((answer["match"] is not None) == ("itm" in learnt) for answer in found)
    refused = pytest.raises(UserError, match="itm trains later in the run, and last.pt is of step 10 of 20")
    with contextlib.nullcontext() if "itm" in learnt else refused:
        predict.score(run, image, "coat")


def test_a_constant_model_is_reported(tmp_path, photos, capsys):
    constant = predict.load(save_run(tmp_path / "constant"))
    for layer in (constant.model.match_head.classify, constant.model.image_tower.project):
        torch.nn.init.zeros_(layer.weight)
    weights.save(constant.folder / "last.pt", constant.model, run={})
    predict.main([str(constant.folder), "rank", "coat", str(photos)])
    assert "cannot tell these apart" in capsys.readouterr().err


# --- The command line ---


def test_an_error_ends_the_command_in_one_line_that_any_terminal_shows_and_status_1(fresh):
    asked = [sys.executable, HERE / "predict.py", fresh.folder, "score", "é.jpg", "a coat"]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (1, "predict.py: missing picture \\xe9.jpg\n")


def test_every_command_prints_its_answer(fresh, photos, tmp_path, exact, monkeypatch, capsys):
    def command(*arguments):
        predict.main([str(argument) for argument in (fresh.folder, *arguments)])
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    monkeypatch.chdir(tmp_path)
    images = paths(photos)
    Path("texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    assert command("score", images[0], "a coat")[1][2:] == [images[0], "a", "coat"]
    ranked = [path for path, _ in predict.rank(fresh, "a coat", images)]
    assert [line[3] for line in command("rank", "a coat", photos)[1:]] == ranked
    ranked = [text.split() for text, _ in predict.rank(fresh, images[0], TEXTS)]
    Path("some.txt").write_text(TEXTS[0]), Path("others.txt").write_text("\n".join(TEXTS[2:]))
    for texts in ["texts.txt"], TEXTS, ["some.txt", TEXTS[1], "others.txt"]:
        assert [line[3:] for line in command("rank", images[0], *texts)[1:]] == ranked
    fields = [line[0] for line in command("classify", images[0]) if line[0] in LABELS]
    assert fields == ["category", "subcategory"]
    assert len(command("fill", images[0], "a [MASK] coat")) == 7
    command("rebuild", images[0], "a coat", "--hide", "0.25")
    with Image.open("0-rebuilt.png") as sheet:
        assert sheet.size == (3 * 320, 384)  # three pictures of 20 x 24
    assert command("index", photos)[0][:2] == ["9", "pictures"]


def test_a_run_of_towers_alone_searches_by_them(tmp_path, photos):
    run = predict.load(save_run(tmp_path / "towers", recipe=dict(objectives="itc", hard_from=1.0)))
    predict.index(run, photos)
    opened = predict.open_index(run)
    assert predict.search(run, TEXTS[0], opened) == predict.search(run, TEXTS[0], opened, best=0)


def test_search_answers_one_query_a_line_and_goes_on_after_an_error(fresh, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    predict.index(fresh, photos)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a coat\n\n???\nboot\n"))  # of one query it knows no word
    predict.main([str(fresh.folder), "search", "--best", "2", "--show", "3", "--out", "found.png"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    answers = []
    for text in ("a coat", "boot"):
        answers += predict.search(fresh, text, predict.open_index(fresh), best=2, show=3)
    assert [line[-1] for line in lines[1:4] + lines[6:9]] == [answer["image"] for answer in answers]
    assert len(lines) == 10 and Path("found.png").exists()

    (photos / "0.png").rename(tmp_path / "away.png")  # the index still names it
    monkeypatch.setattr(sys, "stdin", io.StringIO("a coat\nboot\n"))
    predict.main([str(fresh.folder), "search", "--best", "0", "--show", "9", "--out", "found.png"])
    printed = capsys.readouterr()
    assert printed.out.count("among 9 pictures") == 2 and printed.out.count(".png") == 2 * 8
    assert " 0.png" not in printed.out and not printed.err


def test_what_a_caption_holds_cannot_break_the_lines_of_an_answer_or_reach_the_terminal(capsys):
    predict.table(("rank", "caption"), ("1", "two\nlines \x1b[31mred\u2028"), ("2", "caf\u00e9"))
    assert capsys.readouterr().out.splitlines() == ["rank  caption", "1     two lines  [31mred", "2     caf\u00e9"]


def test_a_folder_whose_rows_name_pictures_by_a_detour_is_indexed(fresh, photos):
    rows = [dict(image=f"away/../{name}", caption="a coat", product_id=name) for name in pictures.files_below(photos)]
    (photos / "away").mkdir()
    write_rows(photos / "test.jsonl", rows)
    for _ in range(2):
        assert predict.index(fresh, photos)[1] == len(rows)
    assert predict.open_index(fresh).size == len(rows)


@pytest.mark.parametrize("arguments, says, status", [
    (["score", "nowhere.jpg", "a coat"], "missing picture nowhere.jpg", 1),
    (["score", "notes.txt", "a coat"], "notes.txt: not a picture", 1),
    (["score", ".", "a coat"], "missing picture .", 1),
    (["rank", "nowhere.jpg", "notes.txt"], "missing picture nowhere.jpg", 1),
    (["rank", "photos/0.png", "nowhere.txt"], "nowhere.txt: ", 1),
    (["rank", "photos/0.png", "photos/2.png"], "photos/2.png: must be UTF-8 text", 1),
    (["rank", "photos/0.png", "blank.txt"], "nothing to rank", 1),
    (["rank", "photos/0.png", "photos"], "photos: is a folder, but a picture ranks texts", 1),
    (["rank", "a coat", "photos/0.png", "nowhere.png"], "missing picture nowhere.png", 1),
    (["rank", "a coat", "void"], "nothing to rank", 1),
    (["rebuild", "photos/0.png", "--out", "nowhere/x.png"], "nowhere/x.png: cannot be written (No such file", 1),
    (["rebuild", "photos/0.png", "--hide", "0.01"], "--hide: must cover a square of 8 px or more, got 0.01", 2),
    (["fill", "photos/0.png", "a coat"], "must hold [MASK]", 1),
    (["index", "nowhere"], "nowhere: no such folder", 1),
    (["index", "void"], "void: holds no picture", 1),
    (["index", "/"], "--name: must not be empty", 2),
    (["search", "a coat"], "has no index; make one with index DIR", 1),
    (["search", "a coat", "--name", "shop"], "has no index 'shop'", 1),
])
def test_an_error_is_one_line_that_says_what_and_where(arguments, says, status, fresh, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a coat\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError) as raised:
        predict.main([str(fresh.folder), *arguments])
    assert says in str(raised.value) and "\n" not in str(raised.value) and raised.value.status == status


def test_a_missing_run_is_an_error_and_wrong_usage_another(fresh):
    with pytest.raises(UserError, match="nowhere: no run here"):
        predict.main(["nowhere", "score", "a.jpg", "coat"])
    for wrong in ("rebuild a.jpg --hide 2", "search coat --best -1", "search coat --show 0", "rank coat", "paint"):
        with pytest.raises(SystemExit) as ended:
            predict.main([str(fresh.folder), *wrong.split()])
        assert ended.value.code == 2
