"""
What a run does, as pictures: hidden and rebuilt photos (Figs. 7 and 8), and where a model sees a caption's words.

Letters: B batch, H and W a picture's sides, g a map's.
"""

import itertools

import numpy as np
import torch
from PIL import Image

import data
import mvlt
from extras import report, runtime

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the shares hidden in Fig. 7; Table 3 (a)


def hide(images, keys, style, ratio, unit, seed=0):
    """Mask each picture by a draw that depends on its key alone -> masked pictures, hidden (B, 1, H, W) bool."""
    masked, hidden = [], []
    for image, key in zip(images, keys):
        one, where = mvlt.mask_images(image[None], style, ratio, unit, data.generator(seed, "hide", int(key)))
        masked.append(one)
        hidden.append(where)
    return torch.cat(masked), torch.cat(hidden)


def rebuild(model, masked, tokens):
    """The whole pictures, (B, 3, H, W) in [0, 1], from what is left of them and their captions."""
    with runtime.precision_of(model):
        return model.rebuild(masked, tokens).float().clamp(0, 1)


def fill_with_mean(images, hidden):
    """The floor: every hidden pixel takes the mean colour of the picture's visible ones."""
    seen = ~hidden
    mean = (images * seen).sum(dim=(2, 3), keepdim=True) / seen.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return torch.where(hidden, mean, images)


def rebuilt_sheet(images, hidden, rebuilt):
    """One column per picture (B, 3, H, W): hidden pixels in grey, rebuilt, original. -> (3 H, B W, 3) uint8."""
    lines = [images.masked_fill(hidden, 0.5), rebuilt, images]
    sheet = torch.cat([torch.cat(list(line), dim=2) for line in lines], dim=1)  # (3, 3 H, B W)
    return (sheet * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def samples(model, split, rows, style=None, ratio=None, seed=0):
    """The `rebuilt_sheet` of some rows, hidden as the model's recipe says, or in another style or ratio."""
    r = model.recipe
    with runtime.evaluating(model) as device:
        images = split.images(rows, device)
        masked, hidden = hide(images, rows, style or r.mask_style, ratio or r.mask_ratio, r.mask_unit, seed)
        return rebuilt_sheet(images, hidden, rebuild(model, masked, data.trim(split.tokens[rows]).to(device)))


def draw_samples(model, split, path, seed=0, shown=8):
    """A PNG of the first rows: hidden, rebuilt, original."""
    sheet = samples(model, split, torch.arange(min(shown, len(split))), seed=seed)
    with runtime.whole_file(path) as file:
        Image.fromarray(sheet).save(file, "PNG")


def rebuilding(model, split, shown=6):
    """Fig. 7: several ratios. Fig. 8: the four styles."""
    rows = torch.linspace(0, len(split) - 1, min(shown, len(split))).long()
    ratios = {f"{100 * ratio:g}% hidden": samples(model, split, rows, ratio=ratio) for ratio in RATIOS}
    styles = {style: samples(model, split, rows, style=style) for style in mvlt.MASK_STYLES}
    figure = report.sheets_figure("Hidden and rebuilt (Fig. 7)", ratios)
    return figure + report.sheets_figure("Four ways to hide (Fig. 8)", styles)


def alignment(model, images, tokens):
    """
    Where a model sees each word: for each pair [(word, its patches, its heat), ...], and the boxes (B, 4) that the
    heats (g, g) cover. Patches (n, 4) and boxes are x1, x2, y1, y2 as shares of the picture's sides.
    """
    places, pairs, maps = model.align(images, tokens)
    places, maps, found = places[..., :4].float().cpu().numpy(), maps.float().cpu().numpy(), []
    for row, of_row in enumerate(pairs):
        found.append([])
        for position, of_word in itertools.groupby(sorted(of_row), key=lambda pair: pair[0]):
            patches = places[row][[patch for _, patch in of_word]]
            found[row].append((model.vocabulary[tokens[row, position]], patches, maps[row, position]))
    return found, places[:, 0]


def aligned_words(model, split, shown=8, limit=64):
    """{word: a picture of where the model sees it}, each in another of the first pictures."""
    rows, drawn = torch.arange(min(limit, len(split))), {}
    with runtime.evaluating(model) as device:
        found, boxes = alignment(model, split.images(rows, device), data.trim(split.tokens[rows]).to(device))
    for row, words in enumerate(found):
        new = [one for one in words if one[0] not in drawn]
        if new and len(drawn) < shown:
            image = Image.fromarray(split.pictures[row]).resize((240, 240))
            drawn[new[0][0]] = np.asarray(report.draw_word(image, boxes[row], *new[0]))
    return drawn
