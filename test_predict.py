"""The laws of predict.py: a tiny random model, a handful of drawn pictures, every command."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import mvlt
import predict

HERE = os.path.dirname(os.path.abspath(predict.__file__))
WORDS = [*data.SPECIAL, "a", "red", "green", "blue", "coat", "boot", "wool", "old"]
LABELS = {"category": ["foot", "top"], "subcategory": ["boot", "coat", "hat"]}
CONFIG = mvlt.Config(
    image_size=32, text_len=8, vocab_size=len(WORDS), token_dim=16, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2),
    mlp_ratios=(2, 2, 2, 2), n_category=2, n_subcategory=3, embed_dim=8,
)
TEXTS = ["a red coat", "blue boot", "old green wool coat", "wool"]


def save_run(folder, seed=0, **run):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = mvlt.MVLT(CONFIG)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)  # so that different pictures get clearly different answers
    model.vocabulary, model.labels = WORDS, LABELS
    mvlt.save(folder / "last.pt", model, step=7, run={"mask_unit": 8, **run})
    return folder


def draw(path, number):
    random = np.random.default_rng(number)
    pixels = np.full((24, 20, 3), random.integers(0, 256, 3), np.uint8)
    pixels[random.integers(12) :, random.integers(10) :] = random.integers(0, 256, 3)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return predict.load(save_run(tmp_path_factory.mktemp("runs") / "1"))


@pytest.fixture
def fresh(tmp_path):
    """A run of one's own, with no index yet."""
    return predict.load(save_run(tmp_path / "run"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(9):
        draw(folder / ("more" if number % 2 else "") / f"{number}.png", number)
    return folder


@pytest.fixture
def exact(monkeypatch):
    """fp32 where equality is the claim."""
    monkeypatch.setattr(predict.evaluation, "autocast", lambda device: contextlib.nullcontext())


def paths(folder):
    return [os.path.join(folder, name) for name in predict.files_below(folder)]


def plain_score(run, image, text):
    pixels = torch.from_numpy(data.picture("", image, 32)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        mismatch, match = run.model.match(run.model.encode(pixels, torch.tensor([run.tokenizer.encode(text)]))[1])[0].tolist()
    return match - mismatch


# --- Functions ---


def test_a_score_is_the_matching_heads_verdict_on_the_pair(run, photos, exact):
    for image, text in zip(paths(photos), TEXTS):
        assert predict.score(run, image, text) == pytest.approx(plain_score(run, image, text), abs=1e-4)


@pytest.mark.parametrize("way", ["pictures", "texts"])
def test_rank_gives_every_answer_once_in_the_order_of_its_score(run, photos, exact, way):
    answers, query = (paths(photos), TEXTS[0]) if way == "pictures" else (TEXTS, paths(photos)[0])
    pair = (lambda answer: (answer, query)) if way == "pictures" else (lambda answer: (query, answer))
    ranked = predict.rank(run, query, answers)
    scores = [score for _, score in ranked]
    assert sorted(answer for answer, _ in ranked) == sorted(answers)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert scores == pytest.approx([plain_score(run, *pair(answer)) for answer, _ in ranked], abs=1e-4)


def test_classify_gives_probabilities_from_what_the_run_reads(run, photos):
    image, other = paths(photos)[:2]
    found = predict.classify(run, image, "a red coat")
    for field, names in LABELS.items():
        chances = [chance for _, chance in found[field]]
        assert sorted(name for name, _ in found[field]) == names
        assert sum(chances) == pytest.approx(1, abs=1e-5) and chances == sorted(chances, reverse=True)
    by_image, by_text = (run._replace(settings={**run.settings, "modality": modality}) for modality in ("image", "text"))
    assert predict.classify(run, image) != found
    assert predict.classify(by_image, image, "a red coat") == predict.classify(run, image) != predict.classify(by_image, other)
    read = predict.classify(by_text, image, "a red coat")
    assert read == predict.classify(by_text, other, "a red coat") != predict.classify(by_text, image, "boot")
    with pytest.raises(data.DataError, match="by the text alone"):
        predict.classify(by_text, image)


@pytest.mark.parametrize("share, shown", [(0, 16), (0.25, 12), (0.5, 8), (1, 0)])
def test_rebuild_hides_that_share_and_leaves_the_original_alone(run, photos, share, shown):
    image = paths(photos)[0]
    result = predict.rebuild(run, image, hide=share)
    assert (result["original"] == data.picture("", image, 32)).all()
    kept = (result["hidden"] == result["original"]).all(axis=2).reshape(4, 8, 4, 8).all(axis=(1, 3))  # squares of the mask's unit, 8
    assert kept.sum() == shown and (result["hidden"].reshape(4, 8, 4, 8, 3).swapaxes(1, 2)[~kept] == 128).all()
    if share == 1:
        error = ((result["rebuilt"] / 255.0 - result["original"] / 255.0) ** 2).mean()
        assert result["psnr"] == pytest.approx(-10 * np.log10(error), abs=0.1)


def test_fill_answers_each_mask_with_words_and_leaves_the_others(run, photos):
    found, text = predict.fill(run, paths(photos)[0], "a [MASK] wool [MASK]")
    best = [one[0][0] for one in found]
    assert text == run.tokenizer.decode(run.tokenizer.encode(f"a {best[0]} wool {best[1]}"))
    for one in found:
        assert len(one) == 5 and not {word for word, _ in one} & set(data.SPECIAL)
        assert [chance for _, chance in one] == sorted((chance for _, chance in one), reverse=True)
    with pytest.raises(data.DataError, match="must hold"):
        predict.fill(run, paths(photos)[0], "a red coat")


def test_a_text_must_say_something_and_its_cut_is_said(run, fresh, photos, capsys):
    for text, reason in (("", "empty"), ("  ", "empty"), ("zzz", "knows none")):
        with pytest.raises(data.DataError, match=reason):
            predict.score(run, paths(photos)[0], text)
    assert predict.score(run, paths(photos)[0], "red " * 9) == predict.score(run, paths(photos)[0], "red " * 6)
    assert "of its 9 pieces (words as the run's vocabulary cuts them) the run reads the first 6" in capsys.readouterr().err
    predict.index(fresh, photos)
    for best in (0, 2):
        predict.search(fresh, "red " * 9, predict.open_index(fresh), best)
        assert capsys.readouterr().err.count("of its 9 pieces (words as the run's vocabulary cuts them) the run reads the first 6") == 1  # once, whoever reads it


# --- The index ---


def tower(run, pixels):
    with torch.no_grad():
        return run.model.embed_images(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]


def test_search_equals_reading_every_picture_one_by_one(fresh, photos, exact):
    predict.index(fresh, photos)
    opened = predict.open_index(fresh)
    every = predict.files_below(photos)
    with torch.no_grad():
        query = fresh.model.embed_texts(torch.tensor([fresh.tokenizer.encode(TEXTS[0])]))[0]
    near = {name: (tower(fresh, data.picture(photos, name, 32)) @ query).item() for name in every}
    found = predict.search(fresh, TEXTS[0], opened, best=0, show=20)
    assert sorted(answer["image"] for answer in found) == every and len({answer["near"] for answer in found}) > 1
    assert [answer["near"] for answer in found] == pytest.approx(sorted(near.values(), reverse=True), abs=1e-5)
    assert {answer["image"]: answer["near"] for answer in found} == pytest.approx(near, abs=1e-5)

    first = [answer["image"] for answer in found]
    again = predict.search(fresh, TEXTS[0], opened, best=4, show=6)
    match = {name: score for name, score in predict.rank(fresh, TEXTS[0], [os.path.join(photos, name) for name in first[:4]])}
    scale = fresh.model.log_scale.exp().item()
    both = {name: match[os.path.join(photos, name)] / 2 + scale * near[name] for name in first[:4]}
    assert [answer["image"] for answer in again[:4]] == sorted(both, key=both.get, reverse=True)
    assert [answer["image"] for answer in again[4:]] == first[4:6]
    assert [answer["match"] is None for answer in again] == [False] * 4 + [True] * 2
    assert predict.search(fresh, TEXTS[0], opened, best=4, show=2) == again[:2]


def test_a_picture_finds_itself(fresh, photos, exact):
    predict.index(fresh, photos)
    for name in predict.files_below(photos):
        found = predict.search(fresh, os.path.join(photos, name), predict.open_index(fresh))
        assert found[0]["image"] == name and found[0]["near"] == pytest.approx(1, abs=1e-5)


KILLED = """
import contextlib, os, sys, predict
predict.evaluation.autocast = lambda device: contextlib.nullcontext()
predict.PART, whole = 2, predict.write_part
def write_part(run, folder, names, path, parts=[]):
    if len(parts) == 3:
        os._exit(9)
    parts.append(path)
    whole(run, folder, names, path)
predict.write_part = write_part
predict.index(predict.load(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_index_goes_on_where_it_stopped_and_a_grown_folder_costs_what_follows_its_first_new_name(fresh, photos, exact, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", KILLED, fresh.home, photos], cwd=HERE, capture_output=True)
    assert killed.returncode == 9 and len(list(fresh.home.glob("index-photos/*.npz"))) == 3
    with pytest.raises(data.DataError, match="no index"):
        predict.open_index(fresh)

    written, write_part = [], predict.write_part
    monkeypatch.setattr(predict, "PART", 2)
    monkeypatch.setattr(predict, "write_part", lambda *arguments: (written.extend(arguments[2]), write_part(*arguments)))
    assert predict.index(fresh, photos)[1:] == (9, []) and written == predict.files_below(photos)[6:]
    one_by_one = [tower(fresh, data.picture(photos, name, 32)) for name in predict.files_below(photos)]
    assert torch.allclose(predict.open_index(fresh).vectors, torch.stack(one_by_one), atol=1e-5)

    written.clear()
    draw(photos / "more" / "99.png", 99)
    assert predict.index(fresh, photos)[1:] == (10, []) and written == predict.files_below(photos)[8:]
    assert len(list(fresh.home.glob("index-photos/*.npz"))) == 5
    written.clear()
    draw(photos / "0.png", 77)  # another picture of the same name
    assert predict.index(fresh, photos)[1:] == (10, []) and written == predict.files_below(photos)[:2]


def test_bad_files_are_named_and_left_out(fresh, photos, capsys):
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[:-30])
    (photos / "empty.png").touch()
    (photos / "notes.txt").write_text("not to be sold")
    (photos / ".hidden").write_text("?")
    _, count, bad = predict.index(fresh, photos)
    assert count == 9 and [line.split(":")[0] for line in bad] == ["cut.png", "empty.png", "notes.txt"]
    assert predict.index(fresh, photos)[1:] == (count, bad)  # told again when nothing is read again
    assert len(predict.search(fresh, TEXTS[0], predict.open_index(fresh), show=99)) == 9
    with pytest.raises(data.DataError, match="cut.png: .*1 more"):
        predict.rank(fresh, TEXTS[0], [str(photos / name) for name in ("0.png", "cut.png", "empty.png")])
    ranked = predict.rank(fresh, TEXTS[0], paths(photos), skip_bad=True)
    said = capsys.readouterr().err
    assert len(ranked) == 9 and all(f"{name}: " in said for name in ("cut.png", "empty.png", "notes.txt"))
    for path in paths(photos):
        os.remove(path)
    with pytest.raises(data.DataError, match="missing picture"):
        predict.search(fresh, TEXTS[0], predict.open_index(fresh))
    with pytest.raises(data.DataError, match="no picture that can be read"):
        predict.index(fresh, photos)


def test_a_data_folder_is_indexed_by_its_rows(fresh, photos):
    rows = [{"image": f"{i}.png", "caption": f"number {i}", "product_id": f"p{i}"} for i in (0, 2, 4, 4, 5)]
    (photos / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, count, bad = predict.index(fresh, photos, "shop")
    assert count == 3 and bad == ["items.jsonl:5: missing picture 5.png"]
    found = predict.search(fresh, TEXTS[0], predict.open_index(fresh, "shop"))
    assert sorted((answer["caption"], answer["product_id"]) for answer in found) == [(f"number {i}", f"p{i}") for i in (0, 2, 4)]


@pytest.mark.parametrize("best", [0, 3])
def test_of_a_products_pictures_search_shows_the_nearest_only(fresh, photos, best):
    owner = {f"{i}.png": "p0" if i < 4 else f"p{i}" for i in (0, 2, 4)}
    rows = [{"image": image, "caption": f"number {image}", "product_id": product} for image, product in owner.items()]
    (photos / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    predict.index(fresh, photos, "shop")
    opened = predict.open_index(fresh, "shop")
    apart = opened._replace(items=[[image, caption, ""] for image, caption, _ in opened.items])  # as if nobody knew whose they are
    near = {answer["image"]: answer["near"] for answer in predict.search(fresh, TEXTS[0], apart, best=0)}
    found = predict.search(fresh, TEXTS[0], opened, best=best)
    assert {answer["image"] for answer in found} == {max(("0.png", "2.png"), key=near.get), "4.png"}
    assert len(predict.search(fresh, TEXTS[0], opened, best=best, show=1)) == 1


def test_an_index_belongs_to_its_weights_and_its_folder(fresh, photos):
    predict.index(fresh, photos)
    (photos / "more" / "photos").mkdir()
    draw(photos / "more" / "photos" / "1.png", 1)
    with pytest.raises(data.DataError, match="--name"):
        predict.index(fresh, photos / "more" / "photos")
    predict.index(fresh, photos / "more" / "photos", "other")
    with pytest.raises(data.DataError, match="choose one by --name: other, photos"):
        predict.open_index(fresh)
    assert len(predict.open_index(fresh, "other").items) == 1
    trained = predict.load(save_run(fresh.home, seed=1))
    with pytest.raises(data.DataError, match="other weights"):
        predict.open_index(trained, "photos")
    predict.index(trained, photos)
    assert len(predict.open_index(trained, "photos").items) == 10
    part = next((fresh.home / "index-photos").glob("*.npz"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(data.DataError, match=f"{part.name}: damaged"):
        predict.open_index(trained, "photos")


# --- What the run was not trained for ---


def test_an_untrained_part_is_refused_by_name(tmp_path, photos):
    image = paths(photos)[0]
    paper, towers = (predict.load(save_run(tmp_path / name, objectives=name)) for name in ("mir,itm,mlm", "itc"))
    for ask in (lambda: predict.index(paper, photos), lambda: predict.open_index(paper)):
        with pytest.raises(data.DataError, match="the towers are untrained in this run: its objectives are mir,itm,mlm, without itc"):
            ask()
    words = predict.load(save_run(tmp_path / "words", objectives="mir,mlm"))
    with pytest.raises(data.DataError, match=r"matching is untrained in this run: its"):  # without towers that could be asked instead
        predict.score(words, image, "coat")
    for part, ask in {
        "matching": lambda: predict.score(towers, image, "coat"), "the decoder": lambda: predict.rebuild(towers, image),
        "the word head": lambda: predict.fill(towers, image, "[MASK]"), "recognition": lambda: predict.classify(towers, image),
    }.items():
        with pytest.raises(data.DataError, match=f"{part} is untrained"):
            ask()
    early = predict.load(save_run(tmp_path / "early", objectives="itm,itc", itm_from=0.5, steps=20))  # saved at step 7
    with pytest.raises(data.DataError, match="up to step 10"):
        predict.score(early, image, "coat")
    predict.index(early, photos)
    assert len(predict.search(early, "coat", predict.open_index(early), best=0)) == 9


def test_a_constant_model_is_said_to_be_one(tmp_path, photos, capsys):
    constant = predict.load(save_run(tmp_path / "constant"))
    torch.nn.init.zeros_(constant.model.match_head.classify.weight)
    contents = mvlt.read(constant.home / "last.pt")
    mvlt.save(constant.home / "last.pt", constant.model, run=contents["run"], step=7)
    predict.main([str(constant.home), "rank", "coat", str(photos)])
    assert "cannot tell these apart" in capsys.readouterr().err


# --- The command line ---


def test_the_command_ends_in_status_0_or_in_one_line_and_status_1(fresh, photos):
    for image, status in (paths(photos)[0], 0), ("nowhere.jpg", 1):
        asked = [sys.executable, os.path.join(HERE, "predict.py"), fresh.home, "score", image, "a coat"]
        done = subprocess.run(asked, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "predict.py: missing picture nowhere.jpg\n" * status)


def test_a_name_that_the_terminal_cannot_spell_does_not_cost_the_answer(fresh, photos):
    shutil.copy(paths(photos)[0], photos / "é.png")
    asked = [sys.executable, os.path.join(HERE, "predict.py"), fresh.home, "rank", "a coat", photos / "é.png"]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\xe9.png" in done.stdout, done.stderr


def test_every_command_prints_its_answer(fresh, photos, tmp_path, exact, monkeypatch, capsys):
    def command(*arguments):
        predict.main([str(argument) for argument in (fresh.home, *arguments)])
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    monkeypatch.chdir(tmp_path)
    images = paths(photos)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n")
    assert command("score", images[0], "a coat")[1][2:] == [images[0], "a", "coat"]
    assert [line[3] for line in command("rank", "a coat", photos)[1:]] == [path for path, _ in predict.rank(fresh, "a coat", images)]
    ranked = [text.split() for text, _ in predict.rank(fresh, images[0], TEXTS)]
    Path("some.txt").write_text(TEXTS[0]), Path("others.txt").write_text("\n".join(TEXTS[2:]))
    for texts in ["texts.txt"], TEXTS, ["some.txt", TEXTS[1], "others.txt"]:
        assert [line[3:] for line in command("rank", images[0], *texts)[1:]] == ranked
    assert [line[0] for line in command("classify", images[0]) if line[0] in LABELS] == ["category", "subcategory"]
    assert len(command("fill", images[0], "a [MASK] coat")) == 7
    command("rebuild", images[0], "a coat", "--hide", "0.25")
    with Image.open("0-rebuilt.png") as sheet:
        assert sheet.size == (3 * 320, 384)  # three pictures of 20 x 24
    assert command("index", photos)[0][:2] == ["9", "pictures"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("a coat\n\n???\nboot\n"))  # of one query it knows no word: it goes on
    answers = command("search", "--best", 2, "--show", 3, "--out", "found.png")
    found = [predict.search(fresh, text, predict.open_index(fresh), best=2, show=3) for text in ("a coat", "boot")]
    assert [line[-1] for line in answers[1:4] + answers[6:9]] == [answer["image"] for one in found for answer in one]
    assert len(answers) == 10 and os.path.exists("found.png")

    (photos / "0.png").rename(tmp_path / "away.png")  # the index still names it: told, and the next query answered
    monkeypatch.setattr(sys, "stdin", io.StringIO("a coat\nboot\n"))
    predict.main([str(fresh.home), "search", "--best", "0", "--show", "9", "--out", "found.png"])
    said = capsys.readouterr()
    (tmp_path / "away.png").rename(photos / "0.png")
    assert said.out.count("among 9 pictures") == 2 and said.err.count("missing picture 0.png") == 2


@pytest.mark.parametrize("arguments, says", [
    (["score", "nowhere.jpg", "a coat"], "missing picture nowhere.jpg"),
    (["score", "notes.txt", "a coat"], "notes.txt: not a picture"),
    (["score", ".", "a coat"], "Is a directory"),
    (["rank", "nowhere.jpg", "notes.txt"], "missing picture nowhere.jpg"),
    (["rank", "photos/0.png", "nowhere.txt"], "nowhere.txt: cannot read the texts"),
    (["rank", "photos/0.png", "photos/2.png"], "photos/2.png: cannot read the texts"),
    (["rank", "photos/0.png", "blank.txt"], "nothing to rank"),
    (["rank", "photos/0.png", "photos"], "photos: is a folder, but a picture ranks texts"),
    (["rank", "a coat", "photos/0.png", "nowhere.png"], "missing picture nowhere.png"),
    (["rank", "a coat", "void"], "nothing to rank"),
    (["rebuild", "photos/0.png", "--out", "nowhere/x.png"], "nowhere/x.png: cannot be written (No such file or directory)"),
    (["rebuild", "photos/0.png", "--hide", "0.01"], "--hide must cover a square of 8 px or more, got 0.01"),
    (["fill", "photos/0.png", "a coat"], "must hold [MASK]"),
    (["index", "nowhere"], "nowhere: no such folder"),
    (["index", "void"], "void: holds no picture"),
    (["search", "a coat"], "has no index; make one with index DIR"),
    (["search", "a coat", "--name", "shop"], "has no index 'shop'"),
])
def test_an_error_is_one_line_that_says_what_and_where(arguments, says, fresh, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a coat\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "void").mkdir()
    with pytest.raises(SystemExit) as ended:
        predict.main([str(fresh.home), *arguments])
    assert str(ended.value).startswith("predict.py: ") and says in ended.value.code and "\n" not in ended.value.code


def test_a_missing_run_is_an_error_and_wrong_usage_another(fresh):
    with pytest.raises(SystemExit, match="nowhere: no run here"):
        predict.main(["nowhere", "score", "a.jpg", "coat"])
    for wrong in ("rebuild a.jpg --hide 2", "search coat --best -1", "search coat --show 0", "rank coat", "paint"):
        with pytest.raises(SystemExit) as ended:
            predict.main([str(fresh.home), *wrong.split()])
        assert ended.value.code == 2


def test_rebuild_reads_the_text_and_hides_as_the_run_was_trained(run, photos, exact):
    image, trained = paths(photos)[1], run._replace(settings={**run.settings, "mask_style": "grid", "fit": "pad"})
    result = predict.rebuild(trained, image, "a red coat", seed=3)
    pixels = torch.from_numpy(data.picture("", image, 32, "pad")).permute(2, 0, 1)[None] / 255
    masked, hidden = mvlt.mask_images(pixels, "grid", 0.5, 8, data.generator(3, "hide", 0))
    with torch.no_grad():
        whole = run.model.reconstruct(run.model.encode(masked, torch.tensor([run.tokenizer.encode("a red coat")]))[0]).clamp(0, 1)
    assert np.abs(result["rebuilt"] - 255 * whole[0].permute(1, 2, 0).numpy()).max() <= 0.51
    floor = torch.stack([channel.masked_fill(hidden[0, 0], channel[~hidden[0, 0]].mean()) for channel in pixels[0]])
    error = {"psnr": whole[0], "floor": floor}
    for name, shown in error.items():
        assert result[name] == pytest.approx(-10 * np.log10(((shown - pixels[0])[:, hidden[0, 0]] ** 2).mean().item()), abs=1e-3)
