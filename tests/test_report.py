"""The laws of extras/report.py: every cell is its number, the page loads nothing, and no log can break it."""

import json
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from extras import report

settings.register_profile("report", deadline=None, max_examples=25)
settings.load_profile("report")
WAYS = ("tir", "itr")


# --- Tables ---


class Numbers:
    """Results of eval.py in which every number is another."""

    def __init__(self):
        self.last = 0

    def next(self):
        self.last += 1
        return float(self.last)

    def recall(self):
        shares = {name: self.next() / 1000 for name in ("R@1", "R@5", "R@10")}
        return {**shares, "SumR": self.next(), "median_rank": self.next(), "sd": {"R@1": 0.001}}

    def recognition(self):
        part = {"accuracy": self.next() / 1000, "macro_f": self.next() / 1000}
        return {**part, "classes": 2, "rows": 9, "unseen": 0}

    def run(self):
        methods = ("fusion", "towers", "reranked")
        names = "psnr ssim psnr_hidden psnr_pasted ssim_pasted floor_psnr floor_ssim floor_hidden".split()
        gallery = {way: {method: self.recall() for method in methods[1:]} for way in WAYS}
        recognition = {part: self.recognition() for part in report.CLASSES}
        about = {"model": "mvlt", "checkpoint": "best.pt", "step": 7, "preset": "demo", "objectives": "mir,itm",
                 "trained_on": "shop", "parameters": 5000, "image_size": 32, "text_len": 16, "vocab_size": 90}
        return {
            "about": about,
            "retrieval": {way: {method: self.recall() for method in methods} for way in WAYS},
            "full_gallery": {**gallery, "scores_used": 20, "scores_in_all": 30},
            "recognition": {"picture and caption": recognition},
            "generation": {**{name: self.next() for name in names}, "style": "grid", "ratio": 0.5, "unit": 8},
            "captioning": {"bleu4": self.next() / 1000, "rouge_l": self.next() / 1000, "cider_d": self.next() / 1000},
            "pretext": {"rr": self.next(), "jps": self.next()},
        }

    def results(self, names, paper=None):
        measured = {"data": "shop", "paper": paper, "split": "test", "rows": 9, "products": 8, "pictures": 7,
                    "captions": 6, "seed": 0, "best": 5}
        lists = {"queries": 9, "size": 101, "draws": 2, "lists": 18, "filled": 3}
        runs = {name: self.run() for name in names}
        return {"measured": measured, "runs": runs, "lists": {way: dict(lists) for way in WAYS}}


def cells_of(table, name):
    """The numbers in the row of that name."""
    cells, = [cells for title, cells, _ in table["rows"] if title == name]
    return [float(cell.split(" ±")[0].removesuffix(" dB")) for cell in cells if cell]


def recall_numbers(r):
    return [100 * r["R@1"], 100 * r["R@5"], 100 * r["R@10"], r["SumR"], r["median_rank"]]


def test_every_cell_of_the_tables_is_the_number_of_its_row():
    results = Numbers().results(["a", "b"])
    found = report.tables(results)
    for name, run in results["runs"].items():
        for place, task in ((0, "retrieval"), (2, "full_gallery")):
            for table, way in zip(found[place:], WAYS):
                for method, title in report.METHODS.items():
                    if method in run[task][way]:
                        wanted = recall_numbers(run[task][way][method])
                        assert cells_of(table, f"{name}: {title}") == pytest.approx(wanted)
        for table, part in zip(found[4:], report.CLASSES):
            r = run["recognition"]["picture and caption"][part]
            wanted = [100 * r["accuracy"], r["macro_f"], 100 * (r["accuracy"] + r["macro_f"])]
            assert cells_of(table, f"{name}, reads picture and caption") == pytest.approx(wanted)
        g = run["generation"]
        made, kept, floor = (cells for title, cells, _ in found[6]["rows"] if title.startswith(name))
        assert made == [f"{g['psnr']:.2f} dB", f"{g['ssim']:.3f}", f"{g['psnr_hidden']:.2f} dB"]
        assert kept == [f"{g['psnr_pasted']:.2f} dB", f"{g['ssim_pasted']:.3f}", f"{g['psnr_hidden']:.2f} dB"]
        assert floor == [f"{g['floor_psnr']:.2f} dB", f"{g['floor_ssim']:.3f}", f"{g['floor_hidden']:.2f} dB"]
        c = run["captioning"]
        assert cells_of(found[7], name) == pytest.approx([100 * c[n] for n in ("bleu4", "rouge_l", "cider_d")])
        assert cells_of(found[8], name) == list(run["pretext"].values())
    assert len(found) == 9 and all(ours for table in found for name, _, ours in table["rows"] if "floor" not in name)
    notes = [[int(number) for number in re.findall(r"\d+", table["note"])] for table in found]
    assert notes[0][:5] == [9, 101, 2, 3, 18] and notes[2] == [7, 6, 5, 20, 30]


@pytest.mark.parametrize("paper, rows", [
    (None, [0] * 9), ("COCO", [0, 0, 1, 1, 0, 0, 0, 0, 0]), ("Fashion-Gen", [5, 5, 0, 0, 2, 2, 0, 3, 1])])
def test_the_papers_rows_stand_only_beside_numbers_of_the_papers_data(paper, rows):
    found = report.tables(Numbers().results(["a"], paper))
    of_paper = [[name for name, _, ours in table["rows"] if name.startswith("paper: ")] for table in found]
    assert list(map(len, of_paper)) == rows
    assert all(f"({paper})" in name for names in of_paper for name in names)


def test_the_papers_rows_are_those_of_the_papers():
    found = report.tables(Numbers().results(["a"], "Fashion-Gen"))
    text = "\n".join(map(report.as_text, found))
    for said in ("paper: MVLT (Fashion-Gen)", "34.60", "78.00", "89.50", "202.10", "98.26", "0.896", "187.86", "32.60"):
        assert said in text


def test_a_run_without_a_task_has_no_row_in_its_table():
    results = Numbers().results(["a", "b"])
    for task in ("generation", "captioning", "pretext", "recognition"):
        del results["runs"]["a"][task]
    del results["runs"]["b"]["captioning"]
    found = {table["title"]: [name for name, _, _ in table["rows"]] for table in report.tables(results)}
    assert len(found) == 8 and all(name.startswith("b") for name in found["Generation (MIG)"])


def test_columns_of_the_text_stand_below_each_other():
    lines = report.as_text(report.tables(Numbers().results(["a", "a longer name"]))[0]).splitlines()[3:]
    assert len(set(map(len, lines))) == 1 and lines[1].startswith("  a: fusion encoder")


# --- The log ---


def test_a_log_is_drawn_as_its_means_and_a_cut_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4}\n{"step": 2, "loss": 2, "lr": 1}\n{"st')
    assert report.curves(report.read_log(tmp_path / "log.jsonl")) == {"loss": [(1, 4), (2, 2)]}
    assert report.read_log(tmp_path / "none.jsonl") == []
    drawn = report.curve([(step, step % 2) for step in range(1000)], bins=10)
    assert drawn.count("L") == 9 and ElementTree.fromstring(drawn).tag == "svg"


@pytest.mark.parametrize("line", [
    "[]", "5", "null", "{}", '{"step": [1]}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', '{"loss": 1}',
    "[" * 10**5, '{"step": ' + "9" * 400 + "}"])
def test_a_line_that_is_no_object_with_a_whole_step_is_skipped(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert report.read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_bytes_that_are_no_text_cost_their_line_alone(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"step": 5}\n{"step": 2, "loss": 1}\n')
    assert [line["step"] for line in report.read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.fixture(scope="module")
def log_file(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log.jsonl"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
VALUES = JSON | st.sampled_from([10**400, -(10**400), 1e308, -1e308])
LINES = st.dictionaries(st.sampled_from(["step", "loss", "val", "x"]), VALUES) | JSON


@settings(max_examples=100)
@given(lines=st.lists(st.fixed_dictionaries({"step": st.integers(0, 99), "loss": VALUES}) | LINES, max_size=6),
       where=st.integers(0, 400), junk=st.binary(max_size=6))
def test_no_log_whatever_breaks_the_page(log_file, lines, where, junk):
    content = "\n".join(map(json.dumps, lines)).encode()
    log_file.write_bytes(content[:where] + junk + content[where + len(junk) :])
    log = report.read_log(log_file)
    assert all(isinstance(line, dict) and type(line["step"]) is int for line in log)
    drawn = re.findall("<svg.*?</svg>", report.curves_figure(log))
    assert not any("nan" in curve or "inf" in curve for curve in drawn)


# --- The page ---


def a_split():
    rows = [{"caption": f"<b>thing</b> & {i}", "category": "top", "subcategory": "coat"} for i in range(6)]
    return SimpleNamespace(rows=rows, pictures=np.zeros((6, 8, 8, 3), np.uint8))


def figures(split, names):
    """All figures of a run for a split of six rows."""
    candidates = torch.tensor([[0, 1, 2], [3, 4, 5]])
    right = torch.tensor([[True, False, False]] * 2)
    ranking = evaluation.Ranking({"fusion": torch.tensor([1, 3])}, torch.tensor([[0, 2], [1, 2]]), torch.zeros(2, 2))
    shown = [(evaluation.Questions(way, candidates[:, 0], candidates, right), ranking) for way in WAYS]
    true = np.array([[0, 0]] * 5 + [[-1, -1]])
    predicted = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [0, 0]])
    sheet = np.zeros((24, 16, 3), np.uint8)
    return [
        *report.retrieval_figure(split, shown),
        *report.recognition_figure(split, names, true, predicted),
        *report.sheets_figure("Hidden and rebuilt (Fig. 7)", {"50% <hidden>": sheet}),
        *report.captioning_figure(split, {0: "said <i>", 3: "and & said"}),
    ]


NAMES = {"category": ["top", "<script>"], "subcategory": ["coat", 'a"b']}


def parsed(results):
    split = a_split()
    log = [{"step": i, "loss": 1 / (i + 1), "<mir>": 2.0, "val": {"R@1": 0.1}} if i % 2 else {"step": i, "loss": 1.0}
           for i in range(9)]
    shown = {run: figures(split, NAMES) for run in results["runs"]}
    text = report.page(results, report.tables(results), shown, {run: log for run in results["runs"]})
    return text, ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.parametrize("runs", [["tiny & <small>"], ["one <img onerror='x'>", "two"]])
def test_the_report_is_one_whole_page_that_loads_nothing(runs):
    text, page = parsed(Numbers().results(runs))
    tags = {element.tag for element in page.iter()}
    assert tags >= {"title", "style", "table", "svg", "img"}
    assert not tags & {"script", "link", "iframe", "object", "base", "b", "i"}
    for element in page.iter():
        assert not {name for name in element.attrib if name in ("href", "srcset", "data") or name.startswith("on")}
        if element.tag == "img":
            assert re.match(r"data:image/(png|jpeg);base64,", element.attrib["src"]) and element.attrib["alt"]
    assert "url(" not in text and "@import" not in text and "http" not in text
    headings = [element.text for element in page.iter("h2")]
    parts = ["Loss curves", "Retrieval (Fig. 5)", "Recognition (Fig. 6)", "Hidden and rebuilt (Fig. 7)", "Captioning"]
    assert headings == ["Results"] + (parts if len(runs) == 1 else [runs[0], *parts, runs[1], *parts])
    assert page.find("head/title").text == ", ".join(runs)
    assert "&lt;b&gt;thing&lt;/b&gt; &amp; 0" in text


def test_the_truth_is_outlined_and_its_rank_written():
    _, page = parsed(Numbers().results(["a"]))
    outlined = [element for element in page.iter() if element.attrib.get("class") == "match"]
    assert len(outlined) == 2  # of the first query's, one picture and one caption
    labels = [element.text for element in page.iter("div") if element.attrib.get("class") == "label"]
    assert labels == ["true answer at rank 1", "true answer at rank 3"] * 2


def test_rows_without_a_class_are_neither_right_nor_wrong():
    split, true = a_split(), np.array([[0, 0], [0, -1], [-1, 0], [0, 0], [0, 0], [-1, -1]])
    predicted = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [0, 0]])
    page = "".join(report.recognition_figure(split, NAMES, true, predicted))
    right, wrong = page.split("Read wrong")
    assert right.count("<img") == 1 and wrong.count("<img") == 2 and "&lt;script&gt;, truly top" in wrong


@given(st.integers(0, 2**31 - 1))
def test_a_confusion_counts_every_row_of_its_classes(seed):
    random = np.random.default_rng(seed)
    true, predicted = random.integers(0, 7, 40), random.integers(0, 5, 40)  # classes 5 and 6 are unknown to the run
    names, counts = report.confusion(true, predicted, list("abcde"), largest=3)
    sizes = sorted(((true == c).sum() for c in range(5)), reverse=True)[:3]
    assert [sum(row) for row in counts] == [size for size in sizes if size]
    for name, row in zip(names, counts):
        for other, count in zip(names, row):
            pair = ("abcde".index(name), "abcde".index(other))
            assert count == sum((t, p) == pair for t, p in zip(true, predicted))
