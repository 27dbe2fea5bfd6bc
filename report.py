"""
What eval.py shows: the tables beside the paper's, for the screen, and report.html, one file that needs no script and loads nothing.

The results are eval.py's; pictures are uint8 arrays (H, W, 3), embedded in the page as data URIs.
"""

import base64
import html
import io
import json
from pathlib import Path

from PIL import Image

DIRECTIONS = {"tir": "text to picture (TIR)", "itr": "picture to text (ITR)"}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Tables beside the paper's

FASHION_GEN = {  # R@1, R@5, R@10 with 101 candidates: Tables 2 and 5
    "tir": {"MVLT": (34.6, 78.0, 89.5), "Kaleido-BERT": (33.88, 60.60, 68.59), "FashionBERT": (26.75, 46.48, 55.74),
            "OSCAR": (25.10, 49.14, 56.68), "CLIP zero-shot": (16.3, 40.6, 55.6)},
    "itr": {"MVLT": (33.1, 77.2, 91.1), "Kaleido-BERT": (27.99, 60.09, 68.37), "FashionBERT": (23.96, 46.31, 52.12),
            "OSCAR": (23.39, 44.67, 52.55), "CLIP zero-shot": (13.6, 43.1, 57.6)},
}
COCO = {"tir": {"MVLT": (49.66, 79.88, 87.50)}, "itr": {"MVLT": (65.38, 90.04, 93.60)}}  # the 5K test: Table 6
CLASSES = {  # accuracy and macro-F: Table 2
    "main": {"MVLT": (98.26, 0.896), "Kaleido-BERT": (95.07, 0.714)},
    "sub": {"MVLT": (93.57, 0.829), "Kaleido-BERT": (88.07, 0.636)},
}
CLASS_TITLES = {"main": "Recognition, main category (M-CR)", "sub": "Recognition, sub-category (S-CR)"}
METHODS = {"": "this run: fusion encoder", "_towers": "this run: towers alone", "_reranked": "this run: towers, then both"}
GALLERY_METHODS = {"": "this run: towers, then both", "_towers": "this run: towers alone"}


def tables(results):
    """[{"title", "note", "columns", "rows": [(name, cells, True for our own)]}, ...], for the screen and for the report."""
    found, galleries = [], []
    gallery = results.get("full_gallery")
    for way, title in DIRECTIONS.items():
        if "candidates" in results:
            lists = results["candidates"][way]
            best = lists["best"] if f"{way}_reranked" in results["retrieval"] else 0
            note = (f"{lists['queries']} queries, {lists['size']} candidates each, mean ± sd of {lists['draws']} draw(s); {lists['filled']} of the "
                    f"{lists['lists']} lists filled from other sub-categories.{reranked(best)}")
            found.append(recall_table(f"Retrieval, {title}", note, way, results["retrieval"], METHODS, FASHION_GEN, "Fashion-Gen"))
        if gallery:
            note = (f"{gallery['pictures']} pictures, {gallery['captions']} captions.{reranked(gallery['best'])} Cost: {gallery['towers_read']} tower "
                    f"readings and {gallery['pairs_read']} pairs through the fusion encoder, instead of {gallery['pairs_whole']} pairs for all.")
            galleries.append(recall_table(f"Full gallery, {title}", note, way, gallery, GALLERY_METHODS, COCO, "COCO 5K"))
    if "recognition" in results:
        found += [recognition_table(part, title, results["recognition"]) for part, title in CLASS_TITLES.items()]
    if "generation" in results:
        found.append(generation_table(results["generation"]))
    return found + galleries


def reranked(best):
    return f" Towers, then both: the towers' best {best} put in order by the towers' logit and half of ITM's." * (best > 0)


def recall_table(title, note, way, results, methods, paper, where):
    rows = [(name, recall_cells(results[way + method]), True) for method, name in methods.items() if way + method in results]
    for name, values in paper[way].items():
        rows.append((f"paper: {name} ({where})", [*(f"{value:.2f}" for value in values), f"{sum(values):.2f}", ""], False))
    return {"title": title, "note": note, "columns": ["R@1", "R@5", "R@10", "SumR", "median"], "rows": rows}


def recall_cells(result):
    def cell(name, scale, digits):
        sd = result.get("sd", {}).get(name)
        return f"{scale * result[name]:.{digits}f}" + (f" ± {scale * sd:.{digits}f}" if sd is not None else "")

    return [*(cell(f"R@{k}", 100, 2) for k in (1, 5, 10)), cell("SumR", 1, 2), cell("median_rank", 1, 1)]


def recognition_table(part, title, results):
    def cells(accuracy, f):
        return [f"{100 * accuracy:.2f}", f"{f:.3f}", f"{100 * (accuracy + f):.2f}"]

    ours = {results["reads"]: results[part], **{reads: other[part] for reads, other in results["also"].items()}}
    rows = [(f"this run, reads {reads}", cells(r["accuracy"], r["macro_f"]), True) for reads, r in ours.items()]
    rows += [(f"paper: {name} (Fashion-Gen)", cells(accuracy / 100, f), False) for name, (accuracy, f) in CLASSES[part].items()]
    whole = results[part]
    note = f"{whole['classes']} classes. Rows of classes the run never saw, each counted as an error: {whole['unseen']}."
    return {"title": title, "note": note, "columns": ["accuracy", "macro-F", "SumC"], "rows": rows}


def generation_table(r):
    def cells(*names):
        return [f"{r[name]:.3f}" if "ssim" in name else f"{r[name]:.2f} dB" for name in names]

    rows = [("this run: the picture it makes", cells("psnr", "ssim", "psnr_hidden"), True),
            ("this run: visible pixels kept", cells("psnr_pasted", "ssim_pasted", "psnr_hidden"), True),
            ("floor: mean colour, visible pixels kept", cells("floor_psnr", "floor_ssim", "floor_psnr_hidden"), False)]
    note = (f"{r['pictures']} pictures, {100 * r['ratio']:g}% hidden ({r['style']}, {r['unit']} px), each with its caption. "
            "The paper shows pictures, no numbers.")
    return {"title": "Generation (MIG)", "note": note, "columns": ["PSNR", "SSIM", "PSNR, hidden"], "rows": rows}


def as_text(table):
    """A table for the terminal."""
    names = [name for name, _, _ in table["rows"]]
    widths = [max(map(len, [column, *(cells[i] for _, cells, _ in table["rows"])])) for i, column in enumerate(table["columns"])]
    lines = ["", table["title"], f"  {table['note']}"]
    for name, cells in [("", table["columns"])] + [(name, cells) for name, cells, _ in table["rows"]]:
        lines.append(f"  {name:{max(map(len, names))}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #68727c; --line: #dfe3e7; --page: #fbfbfa; --card: #ffffff; --accent: #0b6bcb; --good: #15803d; --bad: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a2ac; --line: #30363d; --page: #14171a; --card: #1c2024; --accent: #6cb2ff; --good: #4ade80; --bad: #fb923c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.note, .paper, figcaption, .score, .label { color: var(--soft); }
.note { font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; margin: .8rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .8rem; }
.cards .card { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: .3rem; background: var(--line); }
figure { margin: 0; }
.query { display: flex; gap: .8rem; align-items: center; margin-bottom: .6rem; }
.query img { width: 5.5rem; flex: none; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); gap: .8rem; }
.pairs .card { margin: 0; }
.answers { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .3rem; }
.answers figure { padding: .2rem; border: 2px solid transparent; border-radius: .5rem; }
.score { font-size: .8rem; text-align: center; font-variant-numeric: tabular-nums; }
.answers .match, .texts .match { border-color: var(--good); }
.match .score { color: var(--good); font-weight: 600; }
.texts { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.texts li { display: flex; gap: .7rem; padding: .2rem .5rem; border: 2px solid transparent; border-radius: .5rem; }
.texts .score { flex: none; width: 3.4em; text-align: left; padding-top: .1rem; }
.example { display: flex; gap: .7rem; font-size: .8rem; line-height: 1.4; overflow-wrap: anywhere; }
.example img { width: 4.5rem; flex: none; align-self: flex-start; }
.example > div { min-width: 0; }
.caption { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
.example .caption, td small { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.heat td { text-align: center; }
.heat td:first-child { text-align: left; }
.heat th { white-space: normal; vertical-align: bottom; text-align: center; font-size: .75rem; min-width: 3rem; }
.strips { display: grid; grid-template-columns: 6.5rem repeat(var(--pictures), minmax(0, 1fr)); gap: .35rem; margin-bottom: .8rem; max-width: 50rem; }
.strips .label { font-size: .85rem; align-self: center; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg path { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
svg line { stroke: var(--line); }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  table { font-size: .8rem; }
  td small { display: block; }
  th, td { padding: .35rem .3rem; }
  td:first-child { white-space: normal; min-width: 5.5rem; line-height: 1.3; }
  .strips { grid-template-columns: repeat(var(--pictures), minmax(0, 1fr)); gap: .2rem; }
  .strips .label { grid-column: 1 / -1; margin-top: .3rem; }
  .answers { gap: .15rem; }
}
"""


def tag(name, *inside, **attributes):
    """An element around HTML; `kind` is its class. A text of ours or of the data goes through `html.escape` first."""
    names = {"kind": "class"}
    words = "".join(f' {names.get(key, key)}="{html.escape(str(value))}"' for key, value in attributes.items() if value)
    return f"<{name}{words}>{''.join(inside)}</{name}>"


def said(text, name="p", kind="note"):
    """An element around plain text."""
    return tag(name, html.escape(text), kind=kind)


def page(about, tables, figures, log):
    """The whole report as one HTML text. about: what was measured on what; figures: eval.py's; log: the lines of log.jsonl."""
    parts = ["Results", *map(table_html, tables), "Loss curves", curves_section(log)]
    if "retrieval" in figures:
        parts += ["Retrieval (Fig. 5)", *retrieval_section(figures["retrieval"])]
    if "recognition" in figures:
        parts += ["Recognition (Fig. 6)", *recognition_section(figures["recognition"])]
    if "generation" in figures:
        pictures = figures["generation"]
        legend = said("Top: the originals. Below, what the run sees (hidden in grey) and the picture it makes of that and the caption.")
        parts += ["Hidden and rebuilt (Fig. 7)", legend, strips(pictures["original"], pictures["ratios"])]
        parts += ["Four ways to hide (Fig. 8)", strips(pictures["original"], pictures["styles"])]
    title = f"MVLT, {about['run']}"
    body = "\n".join(part if part.startswith("<") else said(part, "h2", "") for part in parts)
    head = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>' + said(title, "title", "") + tag("style", STYLE)
    top = said(title, "h1", "") + said(in_words(about), "p", "")
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n{body}\n</body></html>\n'


def in_words(about):
    """The run in one paragraph."""
    a = about
    steps = f", after {a['step']:,} steps" if a["step"] is not None else ""
    return (
        f"A Masked Vision-Language Transformer of {a['parameters'] / 1e6:.1f} million parameters ({a['preset']} settings, task {a['task']}; "
        f"pictures of {a['image_size']} px, captions of up to {a['text_len']} words from {a['vocab_size']:,}), trained on {a['trained_on']}, "
        f"read from {a['checkpoint']}{steps}. Measured on the {a['split']} split of {a['data']}: {a['rows']:,} rows, {a['products']:,} products, "
        f"{a['pictures']:,} pictures, {a['captions']:,} captions; seed {a['seed']}. The paper's numbers, in grey, were measured on the data set "
        f"named beside them: they compare only with a run on that data set."
    )


def table_html(table):
    rows = [tag("tr", *(said(column, "th", "") for column in ("", *table["columns"])))]
    for name, cells, ours in table["rows"]:
        rows.append(tag("tr", said(name, "td", ""), *(tag("td", small_sd(cell)) for cell in cells), kind="" if ours else "paper"))
    return said(table["title"], "h3", "") + said(table["note"]) + tag("div", tag("table", *rows), kind="scroll")


def small_sd(cell):
    """On a phone the deviation goes below the mean."""
    mean, sign, sd = cell.partition(" ± ")
    return f"{mean} <small>± {sd}</small>" if sign else mean


def read_log(path):
    """The lines of log.jsonl as dicts; without the file, none. A last line cut short by a crash is left out."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


NOT_LOSSES = ("step", "epoch", "lr", "grad_norm", "images_per_s", "memory_gb")


def curves(log):
    """{name: [(step, value), ...]} of the losses, and of what was measured in validation."""
    found = {}
    for line in log:
        measured = {f"validation: {name}": value for name, value in line["val"].items()} if isinstance(line.get("val"), dict) else line
        for name, value in measured.items():
            if name not in NOT_LOSSES and isinstance(value, (int, float)) and "step" in line:
                found.setdefault(name, []).append((line["step"], value))
    return {name: points for name, points in found.items() if len(points) > 1}


def curves_section(log):
    cards = [tag("figure", said(name, "figcaption", ""), curve(points), kind="card") for name, points in curves(log).items()]
    return tag("div", *cards, kind="cards") if cards else said("This folder holds no log.jsonl with losses.")


def curve(points, bins=150):
    """A line of at most `bins` points, each the mean of its neighbours, with the ends of both axes written out."""
    per = -(-len(points) // bins)
    groups = [points[i : i + per] for i in range(0, len(points), per)]
    x, y = [[sum(point[axis] for point in group) / len(group) for group in groups] for axis in (0, 1)]
    left, top, width, height = 54, 8, 162, 84  # left of it up to seven signs, as 0.00581
    span_x, span_y = max(x) - min(x) or 1, max(y) - min(y) or 1
    path = "L".join(f"{left + width * (a - min(x)) / span_x:.1f} {top + height * (max(y) - b) / span_y:.1f}" for a, b in zip(x, y))
    words = [(left - 5, top + 8, "end", f"{max(y):.3g}"), (left - 5, top + height, "end", f"{min(y):.3g}"),
             (left, top + height + 16, "start", f"{points[0][0]:,}"), (left + width, top + height + 16, "end", f"step {points[-1][0]:,}")]
    lines = "".join(f'<line x1="{left}" x2="{left + width}" y1="{h}" y2="{h}"/>' for h in (top, top + height))
    text = "".join(f'<text x="{a}" y="{b}" text-anchor="{anchor}">{word}</text>' for a, b, anchor, word in words)
    return f'<svg viewBox="0 0 220 114" role="img">{lines}<path d="M{path}"/>{text}</svg>'


def picture(pixels, alt):
    """An <img> that carries its own bytes: PNG when small, else JPEG."""
    file, kind = io.BytesIO(), "png" if max(pixels.shape) <= 128 else "jpeg"
    Image.fromarray(pixels).save(file, kind, quality=88, optimize=True)
    return f'<img src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}" alt="{html.escape(alt)}"/>'


def retrieval_section(entries):
    parts = [said("The first queries of the first draw, not chosen, and their best five candidates: by towers and ITM together, or by ITM "
                  "where there are no towers. With each, ITM's probability of a match. Outlined: the truth.")]
    for way in dict.fromkeys(entry["way"] for entry in entries):
        parts.append(said(way[0].upper() + way[1:], "h3", ""))
        parts.append(tag("div", *(retrieval_card(entry) for entry in entries if entry["way"] == way), kind="pairs"))
    return parts


def retrieval_card(entry):
    place = said(f"true answer at rank {entry['rank']}", "div", "label")
    if isinstance(entry["query"], str):
        query, answers = tag("div", html.escape(entry["query"]), place), picture_answers(entry["answers"])
    else:
        query, answers = picture(entry["query"], "the query") + place, text_answers(entry["answers"])
    return tag("div", tag("div", query, kind="query"), answers, kind="card")


def score(answer, name):
    return said(f"{100 * answer['score']:.1f}%", name, "score")


def picture_answers(answers):
    figures = (tag("figure", picture(a["item"], "an answer"), score(a, "figcaption"), kind="match" * a["match"]) for a in answers)
    return tag("div", *figures, kind="answers")


def text_answers(answers):
    return tag("ol", *(tag("li", score(a, "span"), said(a["item"], "span", "caption"), kind="match" * a["match"]) for a in answers), kind="texts")


def recognition_section(figure):
    parts = []
    for kind in ("right", "wrong"):
        cards = [tag("div", example(entry), kind="card") for entry in figure[kind]]
        parts += [said(f"Read {kind}", "h3", ""), tag("div", *cards, kind="cards") if cards else said("None.")]
    for field, (names, counts) in figure["confusion"].items():
        parts += [said(f"Confusion among the largest classes: {field}", "h3", ""), said("Rows: the true class; columns: what the run says.")]
        parts.append(heat(names, counts))
    return parts


def example(entry):
    lines = []
    for truth, guess in zip(entry["truth"], entry["guess"]):
        lines.append(said(guess, "div", "good") if truth == guess else said(f"{guess}, truly {truth}", "div", "bad"))
    return tag("div", picture(entry["picture"], "a product"), tag("div", *lines, said(entry["caption"], "div", "caption")), kind="example")


def heat(names, counts):
    """The confusion as a table, each cell as dark as its share of the row."""
    rows = [tag("tr", *(said(name, "th", "") for name in ("", *names, "other")))]
    for name, row in zip(names, counts):
        shades = [f"background: color-mix(in srgb, var(--accent) {45 * count / max(1, sum(row)):.0f}%, transparent)" for count in row]
        rows.append(tag("tr", said(name, "td", ""), *(tag("td", str(count or ""), style=shade) for count, shade in zip(row, shades))))
    return tag("div", tag("table", *rows, kind="heat"), kind="scroll")


def strips(originals, named):
    """The originals, and per name two rows beneath: what is left of them, and what was rebuilt."""
    def row(label, pictures):
        return [said(label, "div", "label"), *(picture(pixels, label) for pixels in pictures)]

    cells = row("original", originals)
    for name, (hidden, rebuilt) in named.items():
        cells += [*row(name, hidden), *row("rebuilt", rebuilt)]
    return tag("div", *cells, kind="strips", style=f"--pictures: {len(originals)}")
