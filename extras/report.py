"""
What eval.py shows: tables for the screen, and report.html, one file that needs no script and loads nothing.

Tables have a row for every run, beside the paper's rows where the data set is the paper's. The results are those of
results.json; pictures are uint8 arrays (H, W, 3), embedded in the page as data URIs.
"""

import base64
import html
import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DIRECTIONS = {"tir": "text to picture (TIR)", "itr": "picture to text (ITR)"}
METHODS = {"fusion": "fusion encoder", "towers": "towers alone", "reranked": "towers, then both"}
CLASSES = {"category": "main category (M-CR)", "subcategory": "sub-category (S-CR)"}

# ----------------------------------------------------------------------------------------------------------------------
# The paper's rows

RECALLS = {  # R@1, R@5, R@10: with 101 candidates (Tables 2 and 5), and of the full gallery of COCO 5K (Table 6)
    ("Fashion-Gen", "tir"): {
        "MVLT": (34.6, 78.0, 89.5), "Kaleido-BERT": (33.88, 60.60, 68.59), "FashionBERT": (26.75, 46.48, 55.74),
        "OSCAR": (25.10, 49.14, 56.68), "CLIP zero-shot": (16.3, 40.6, 55.6)},
    ("Fashion-Gen", "itr"): {
        "MVLT": (33.1, 77.2, 91.1), "Kaleido-BERT": (27.99, 60.09, 68.37), "FashionBERT": (23.96, 46.31, 52.12),
        "OSCAR": (23.39, 44.67, 52.55), "CLIP zero-shot": (13.6, 43.1, 57.6)},
    ("COCO", "tir"): {"MVLT": (49.66, 79.88, 87.50)},
    ("COCO", "itr"): {"MVLT": (65.38, 90.04, 93.60)},
}
ACCURACIES = {  # on Fashion-Gen: accuracy and macro-F (Table 2)
    "category": {"MVLT": (98.26, 0.896), "Kaleido-BERT": (95.07, 0.714)},
    "subcategory": {"MVLT": (93.57, 0.829), "Kaleido-BERT": (88.07, 0.636)},
}
CAPTIONS = {  # on Fashion-Gen: BLEU-4, ROUGE-L and CIDEr in percent (Kaleido-BERT's Table 3)
    "Kaleido-BERT": (5.70, 32.9, 32.6), "OSCAR": (4.50, 30.1, 30.7), "FashionBERT": (3.30, 29.7, 30.1),
}
PRETEXT = {"rr": 0.95, "jps": 0.98, "cp": 0.97, "itm": 0.83, "mlm": 0.46, "g2cm": 0.18, "b2cm": 0.68}  # its Fig. 7


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def tables(results):
    """[{"title", "note", "columns", "rows": [(name, cells, True for our own)]}, ...], for the screen and the report."""
    found = []
    if "lists" in results:
        found += [list_table(results, way) for way in DIRECTIONS]
    if runs_with(results, "full_gallery"):
        found += [gallery_table(results, way) for way in DIRECTIONS]
    if runs_with(results, "recognition"):
        found += [recognition_table(results, field) for field in CLASSES]
    for task, make in (("generation", generation_table), ("captioning", captioning_table), ("pretext", pretext_table)):
        if runs_with(results, task):
            found.append(make(results))
    return found


def runs_with(results, task):
    """{run: its results of the task}, for the runs that have any."""
    return {name: run[task] for name, run in results["runs"].items() if task in run}


def paper_rows(results, data_set, values, cells):
    """The paper's rows, which stand only beside numbers that were measured on the same data set."""
    if results["measured"]["paper"] != data_set:
        return []
    return [(f"paper: {name} ({data_set})", cells(*numbers), False) for name, numbers in values.items()]


def list_table(results, way):
    measured, lists = results["measured"], results["lists"][way]
    note = (f"{lists['queries']} queries, {lists['size']} candidates each, mean ± sd of {lists['draws']} draw(s); "
            f"{lists['filled']} of the {lists['lists']} lists filled from other sub-categories.")
    rows, reranked = recall_rows(runs_with(results, "retrieval"), way, measured)
    rows += paper_rows(results, "Fashion-Gen", RECALLS["Fashion-Gen", way], recall_cells_of_paper)
    return recall_table(f"Retrieval, {DIRECTIONS[way]}", note + reranked, rows)


def gallery_table(results, way):
    measured, runs = results["measured"], runs_with(results, "full_gallery")
    note = f"{measured['pictures']} pictures, {measured['captions']} captions."
    rows, reranked = recall_rows(runs, way, measured)
    rows += paper_rows(results, "COCO", RECALLS["COCO", way], recall_cells_of_paper)
    if reranked:
        run = max((run for run in runs.values() if "reranked" in run[way]), key=lambda run: run["scores_used"])
        reranked += f" ITM's scores, both ways: {run['scores_used']}; without towers: {run['scores_in_all']}."
    return recall_table(f"Full gallery, {DIRECTIONS[way]}", note + reranked, rows)


def recall_rows(runs, way, measured):
    """A row for each run and method, and a sentence on re-ranking where any run does it."""
    rows, reranked = [], ""
    for name, run in runs.items():
        for method, result in run[way].items():
            rows.append((f"{name}: {METHODS[method]}", recall_cells(result), True))
            if method == "reranked":
                reranked = (f" Towers, then both: the towers' best {measured['best']} put in order by the towers' "
                            "logit and half of ITM's.")
    return rows, reranked


def recall_table(title, note, rows):
    return {"title": title, "note": note, "columns": ["R@1", "R@5", "R@10", "SumR", "median"], "rows": rows}


def recall_cells(result):
    cells = []
    for name in ("R@1", "R@5", "R@10", "SumR", "median_rank"):
        scale, digits = (100 if name.startswith("R@") else 1), (1 if name == "median_rank" else 2)
        sd = result.get("sd", {}).get(name)
        cells.append(f"{scale * result[name]:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else ""))
    return cells


def recall_cells_of_paper(*values):
    return [*(f"{value:.2f}" for value in values), f"{sum(values):.2f}", ""]


def recognition_table(results, field):
    def cells(percent, f):
        return [f"{percent:.2f}", f"{f:.3f}", f"{percent + 100 * f:.2f}"]

    rows, notes = [], []
    for name, run in runs_with(results, "recognition").items():
        for reads, result in run.items():
            r = result[field]
            rows.append((f"{name}, reads {reads}", cells(100 * r["accuracy"], r["macro_f"]), True))
        if r["unseen"]:
            notes.append(f"{name} never saw the classes of {r['unseen']} of the {r['rows']} rows: errors.")
    rows += paper_rows(results, "Fashion-Gen", ACCURACIES[field], cells)
    title = f"Recognition, {CLASSES[field]}"
    note = " ".join([f"{r['classes']} classes, {r['rows']} rows.", *notes])
    return {"title": title, "note": note, "columns": ["accuracy", "macro-F", "SumC"], "rows": rows}


def generation_table(results):
    lines = {"the picture it makes": ("psnr", "ssim", "psnr_hidden"),
             "visible pixels kept": ("psnr_pasted", "ssim_pasted", "psnr_hidden"),
             "floor: mean colour, visible pixels kept": ("floor_psnr", "floor_ssim", "floor_hidden")}
    rows, notes = [], []
    for name, run in runs_with(results, "generation").items():
        for title, (whole, similarity, hidden) in lines.items():
            cells = [f"{run[whole]:.2f} dB", f"{run[similarity]:.3f}", f"{run[hidden]:.2f} dB"]
            rows.append((f"{name}: {title}", cells, not title.startswith("floor")))
        notes.append(f"{name} sees {100 * run['ratio']:g}% hidden ({run['style']}, {run['unit']} px).")
    note = f"{results['measured']['pictures']} pictures, each with its caption. {' '.join(notes)}"
    return {"title": "Generation (MIG)", "note": note, "columns": ["PSNR", "SSIM", "PSNR, hidden"], "rows": rows}


def captioning_table(results):
    def cells(*values):
        return [f"{value:.2f}" for value in values]

    rows = []
    for name, run in runs_with(results, "captioning").items():
        rows.append((name, cells(100 * run["bleu4"], 100 * run["rouge_l"], 100 * run["cider_d"]), True))
    rows += paper_rows(results, "Fashion-Gen", CAPTIONS, cells)
    note = "In percent, against one caption of each picture. METEOR needs an outside program and is not reported."
    return {"title": "Captioning", "note": note, "columns": ["BLEU-4", "ROUGE-L", "CIDEr-D"], "rows": rows}


def pretext_table(results):
    runs = runs_with(results, "pretext")
    columns = list(dict.fromkeys(task for run in runs.values() for task in run))

    def cells(values):
        return [f"{values[task]:.3f}" if task in values else "" for task in columns]

    rows = [(name, cells(run), True) for name, run in runs.items()]
    rows += paper_rows(results, "Fashion-Gen", {"Kaleido-BERT, about": (PRETEXT,)}, cells)
    title, note = "The tasks of pre-training (Kaleido-BERT's Fig. 7)", "Accuracies; of g2cm and b2cm the loss."
    return {"title": title, "note": note, "columns": columns, "rows": rows}


def as_text(table):
    """A table for the terminal."""
    lines = [("", table["columns"]), *((name, cells) for name, cells, _ in table["rows"])]
    names = max(len(name) for name, _ in lines)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines))]
    text = ["", table["title"], f"  {table['note']}"]
    for name, cells in lines:
        text.append(f"  {name:{names}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return "\n".join(text)


# ----------------------------------------------------------------------------------------------------------------------
# The log


def read_log(path):
    """
    The lines of log.jsonl as dicts; none where there is no file. What is no JSON object with a whole-number "step" is
    skipped, such as the last line of a killed run.
    """
    found = []
    text = Path(path).read_bytes().decode(errors="replace") if Path(path).is_file() else ""
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] < 2**63:
            found.append(entry)
    return found


def curves(log):
    """{name: [(step, value), ...]} of the losses, and of what was measured in validation."""
    found = {}
    for line in log:
        measured = line
        if isinstance(line.get("val"), dict):
            measured = {f"validation: {name}": value for name, value in line["val"].items()}
        for name, value in measured.items():
            if name not in NOT_LOSSES and type(value) in (int, float) and abs(value) < 1e300:  # and no NaN
                found.setdefault(name, []).append((line["step"], value))
    return {name: points for name, points in found.items() if len(points) > 1}


NOT_LOSSES = ("step", "epoch", "lr", "grad_norm", "images_per_s", "memory_gb")


# ----------------------------------------------------------------------------------------------------------------------
# The page

STYLE = Path(__file__).with_name("report.css").read_text()


def tag(name, *inside, **attributes):
    """An element around HTML; `kind` is its class. A text of ours or of the data goes through `html.escape` first."""
    names = {"kind": "class"}
    words = [f' {names.get(key, key)}="{html.escape(str(value))}"' for key, value in attributes.items() if value]
    return f"<{name}{''.join(words)}>{''.join(inside)}</{name}>"


def plain(text, name="p", kind="note"):
    """An element around plain text."""
    return tag(name, html.escape(text), kind=kind)


def page(results, tables, figures, logs):
    """The report as one HTML text. figures: {run: [HTML, ...]}; logs: {run: the lines of its log.jsonl}."""
    title = ", ".join(results["runs"])
    parts = [plain(title, "h1", ""), *(plain(text, "p", "") for text in in_words(results)), plain("Results", "h2", "")]
    parts += map(table_html, tables)
    for run in results["runs"]:
        heading = plain(run, "h2", "run") if len(results["runs"]) > 1 else ""
        parts += [heading, plain("Loss curves", "h2", ""), curves_figure(logs[run]), *figures[run]]
    head = ['<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>',
            plain(title, "title", ""), tag("style", STYLE)]
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{body}\n</body></html>\n'


def in_words(results):
    """What was measured on what: a paragraph for each run and one for the data."""
    for name, run in results["runs"].items():
        a = run["about"]
        steps = f" after {a['step']:,} steps" if a["step"] is not None else ""
        preset = f"preset {a['preset']}, " if a["preset"] else ""
        yield (f"{name}: {a['model']} of {a['parameters'] / 1e6:.1f} million parameters ({preset}{a['objectives']}; "
               f"pictures of {a['image_size']} px, captions of up to {a['text_len']} words from {a['vocab_size']:,}), "
               f"trained on {a['trained_on']}, read from {a['checkpoint']}{steps}.")
    m = results["measured"]
    yield (f"Measured on the {m['split']} split of {m['data']}: {m['rows']:,} rows, {m['products']:,} products, "
           f"{m['pictures']:,} pictures, {m['captions']:,} captions; seed {m['seed']}.")


def table_html(table):
    rows = [tag("tr", *(plain(column, "th", "") for column in ("", *table["columns"])))]
    for name, cells, ours in table["rows"]:
        cells = [tag("td", small_sd(cell)) for cell in cells]
        rows.append(tag("tr", plain(name, "td", ""), *cells, kind="" if ours else "paper"))
    return plain(table["title"], "h3", "") + plain(table["note"]) + tag("div", tag("table", *rows), kind="scroll")


def small_sd(cell):
    """On a phone the deviation goes below the mean."""
    mean, sign, sd = cell.partition(" ± ")
    return f"{mean} <small>± {sd}</small>" if sign else mean


def curves_figure(log):
    cards = []
    for name, points in curves(log).items():
        cards.append(tag("figure", plain(name, "figcaption", ""), curve(points), kind="card"))
    return tag("div", *cards, kind="cards") if cards else plain("This run's folder holds no log.jsonl with losses.")


def curve(points, bins=150):
    """A line of at most `bins` points, each the mean of its neighbours, with the ends of both axes written out."""
    per = -(-len(points) // bins)
    x, y = [], []
    for first in range(0, len(points), per):
        steps, values = zip(*points[first : first + per])
        x.append(sum(steps) / len(steps))
        y.append(sum(values) / len(values))
    left, top, width, height = 54, 8, 162, 84  # left of it up to seven signs, as 0.00581
    span_x, span_y = max(x) - min(x) or 1, max(y) - min(y) or 1
    path = []
    for a, b in zip(x, y):
        path.append(f"{left + width * (a - min(x)) / span_x:.1f} {top + height * (max(y) - b) / span_y:.1f}")
    words = [(left - 5, top + 8, "end", f"{max(y):.3g}"), (left - 5, top + height, "end", f"{min(y):.3g}"),
             (left, top + height + 16, "start", f"{points[0][0]:,}"),
             (left + width, top + height + 16, "end", f"step {points[-1][0]:,}")]
    lines = "".join(f'<line x1="{left}" x2="{left + width}" y1="{h}" y2="{h}"/>' for h in (top, top + height))
    text = "".join(f'<text x="{a}" y="{b}" text-anchor="{anchor}">{word}</text>' for a, b, anchor, word in words)
    return f'<svg viewBox="0 0 220 114" role="img">{lines}<path d="M{"L".join(path)}"/>{text}</svg>'


def picture(pixels, alt):
    """An <img> that carries its own bytes: PNG when small, else JPEG."""
    file, kind = io.BytesIO(), "png" if max(pixels.shape) <= 128 else "jpeg"
    Image.fromarray(np.asarray(pixels)).save(file, kind, quality=88, optimize=True)
    text = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{text}" alt="{html.escape(alt)}"/>'


# ----------------------------------------------------------------------------------------------------------------------
# Figures 5 to 8. Each is a list of HTML elements that begins with its heading.


def retrieval_figure(split, shown, queries=4):
    """Fig. 5. shown: (Questions, Ranking) for each way, from eval.py's `retrieval`."""
    legend = ("The first queries of the first draw, not chosen, and their best five candidates: by towers and ITM "
              "together, or by the one that the run has. With each, ITM's probability of a match (without ITM, the "
              "towers' cosine). Outlined: the truth. A tie with the truth is shown as it is counted, against us.")
    parts = [plain("Retrieval (Fig. 5)", "h2", ""), plain(legend)]
    for questions, ranking in shown:
        cards = [query_card(split, questions, ranking, i) for i in range(min(queries, len(questions.queries)))]
        title = DIRECTIONS[questions.way]
        parts += [plain(title[0].upper() + title[1:], "h3", ""), tag("div", *cards, kind="pairs")]
    return parts


def query_card(split, questions, ranking, i):
    """A query with its best answers."""
    method = next(name for name in ("reranked", "fusion", "towers") if name in ranking.ranks)
    scores = ranking.scores[i].sigmoid() if "fusion" in ranking.ranks else ranking.scores[i]
    place = plain(f"true answer at rank {int(ranking.ranks[method][i])}", "div", "label")
    query, answers = int(questions.queries[i]), []
    for column, score in zip(ranking.best[i].tolist(), scores.tolist()):
        row, kind = int(questions.candidates[i, column]), "match" if questions.right[i, column] else ""
        if questions.way == "tir":
            score = plain(f"{score:.3f}", "figcaption", "score")
            answers.append(tag("figure", picture(split.pictures[row], "an answer"), score, kind=kind))
        else:
            score, text = plain(f"{score:.3f}", "span", "score"), split.rows[row]["caption"]
            answers.append(tag("li", score, plain(text, "span", "caption"), kind=kind))
    if questions.way == "tir":
        asked = tag("div", html.escape(split.rows[query]["caption"]), place)
        answers = tag("div", *answers, kind="answers")
    else:
        asked, answers = picture(split.pictures[query], "the query") + place, tag("ol", *answers, kind="texts")
    return tag("div", tag("div", asked, kind="query"), answers, kind="card")


def recognition_figure(split, labels, true, predicted, shown=8):
    """Fig. 6: rows read right and wrong, evenly spread, and the confusion. true, predicted: (n, 2) classes, -1 none."""
    names = [labels[field] for field in CLASSES]
    right, known = (true == predicted).all(axis=1), (true >= 0).all(axis=1)
    parts = [plain("Recognition (Fig. 6)", "h2", "")]
    for title, which in (("Read right", right), ("Read wrong", ~right & known)):
        numbers, cards = np.flatnonzero(which), []
        for i in numbers[:: -(-len(numbers) // shown) or 1]:
            lines = []
            for column, field in enumerate(CLASSES):
                guess, truth = names[column][predicted[i, column]], split.rows[i][field]
                good = guess == truth
                lines.append(plain(guess if good else f"{guess}, truly {truth}", "div", "good" if good else "bad"))
            cards.append(example(split, int(i), lines))
        parts += [plain(title, "h3", ""), tag("div", *cards, kind="cards") if cards else plain("None.")]
    for column, field in enumerate(CLASSES):
        parts += [plain(f"Confusion among the largest classes: {field}", "h3", ""),
                  plain("Rows: the true class; columns: what the run says."),
                  heat(*confusion(true[:, column], predicted[:, column], names[column]))]
    return parts


def example(split, row, lines):
    """A row's picture, some lines beside it, and its caption."""
    words = tag("div", *lines, plain(split.rows[row]["caption"], "div", "caption"))
    return tag("div", tag("div", picture(split.pictures[row], "a product"), words, kind="example"), kind="card")


def confusion(true, predicted, names, largest=8):
    """(names of the largest classes, counts): counts[t][p] rows of the t-th class read as the p-th; last: any other."""
    size = np.bincount(true[true >= 0], minlength=len(names))[: len(names)]
    classes = [c for c in np.argsort(-size, kind="stable")[:largest] if size[c]]
    counts = []
    for t in classes:
        row = [int(((true == t) & (predicted == p)).sum()) for p in classes]
        counts.append([*row, int(size[t]) - sum(row)])
    return [names[c] for c in classes], counts


def heat(names, counts):
    """The confusion as a table, each cell as dark as its share of the row."""
    rows = [tag("tr", *(plain(name, "th", "") for name in ("", *names, "other")))]
    for name, row in zip(names, counts):
        cells = []
        for count in row:
            share = 45 * count / max(1, sum(row))
            shade = f"background: color-mix(in srgb, var(--accent) {share:.0f}%, transparent)"
            cells.append(tag("td", str(count or ""), style=shade))
        rows.append(tag("tr", plain(name, "td", ""), *cells))
    return tag("div", tag("table", *rows, kind="heat"), kind="scroll")


def sheets_figure(title, sheets):
    """Fig. 7 and Fig. 8. sheets: {name: (3 H, B W, 3) of hidden, rebuilt and original pictures}."""
    parts = [plain(title, "h2", ""), plain("Hidden pixels in grey, the picture that the run makes, the original.")]
    for name, sheet in sheets.items():
        parts.append(tag("figure", plain(name, "figcaption", "label"), picture(sheet, name), kind="card"))
    return parts


def captioning_figure(split, texts, shown=8):
    """Pictures with their own captions and the run's. texts: {row: text}."""
    cards = [example(split, row, [plain(text, "div", "good")]) for row, text in list(texts.items())[:shown]]
    return [plain("Captioning", "h2", ""), plain("Coloured: what the run says. Grey: the picture's own caption."),
            tag("div", *cards, kind="cards")]


def alignment_figure(pictures):
    """Where Kaleido-BERT's captioner looks. pictures: {word: picture}, as `draw_word` makes them."""
    legend = ("Words of the captions that the captioner says, each in another picture: dark where it does not look "
              "when it says the word, outlined the patches of levels 3, 4 and 5 with the most of its attention.")
    tiles = [picture(image, word) for word, image in pictures.items()]
    return [plain("Words and patches (AAG)", "h2", ""), plain(legend), tag("div", *tiles, kind="card")]


def draw_word(image, box, word, patches, heat):
    """Darken a square picture where the word has little heat, outline the word's patches, and write the word."""
    side, draw = image.width, ImageDraw.Draw(image)
    x1, x2, y1, y2 = (side * box).round().astype(int).tolist()
    shade = Image.fromarray((200 * (1 - heat / heat.max())).astype(np.uint8)).resize((x2 - x1, y2 - y1))
    image.paste("black", (x1, y1), shade)
    colours = itertools.cycle(("red", "yellow", "cyan"))
    for (left, right, top, bottom), colour in zip((side * patches).tolist(), colours):
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=2)
    draw.text((6, 6), word, "white", stroke_width=1, stroke_fill="black")
    return image
