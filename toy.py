"""
A drawn fashion catalogue, so that everything runs with no download.

    python toy.py --out toy --products 4000 --size 64

A product is a sub-category and a handful of attributes, drawn by chance. `caption` says them all, in the manner of Fashion-Gen, and
`draw` shows all that `caption` says. The same seed gives the same bytes, and a longer catalogue begins with the shorter one.

In this order: the words; cloth (patterns and fabrics); lines; the canvas; a product; one painter per family of garment; the
sub-categories; captions; the catalogue on disk.

A garment is laid out in a plane of its own, x to the right and y down, upright and about x = 0; shoulders are about 1 wide. The canvas
fits this plane into the picture, turned and sheared a little by the pose of the view.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import zlib
from collections import namedtuple
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ---------------------------------------------------------------- the words

COLOURS = {
    "black": (40, 40, 44), "white": (250, 250, 247), "grey": (146, 149, 155), "navy": (32, 44, 98), "blue": (48, 102, 206),
    "sky blue": (148, 200, 238), "teal": (0, 130, 134), "green": (40, 136, 72), "olive": (116, 116, 52), "mint": (166, 226, 196),
    "yellow": (248, 208, 66), "orange": (240, 128, 40), "red": (214, 40, 48), "burgundy": (116, 24, 52), "pink": (248, 168, 192),
    "purple": (124, 68, 164), "brown": (116, 74, 46), "beige": (224, 202, 168),
}
GOLD, SILVER, TAN, LEATHER, DARK = (214, 166, 58), (208, 211, 217), (206, 142, 72), (82, 54, 38), (52, 52, 58)

# What a caption says of an attribute's value, two ways each. A value that is not here stands in the caption's first sentence.
SENTENCES = {value: ways.split(" / ") for value, ways in {
    "trim": "Contrast trim in {second}. / Trim in {second}.", "stripes": "Striped pattern in {second}. / Horizontal stripes in {second}.",
    "vertical stripes": "Vertical stripes in {second}. / Lengthwise stripes in {second}.",
    "checks": "Check pattern in {second}. / Checked in {second}.", "dots": "Polka dot pattern in {second}. / Polka dots in {second}.",
    "flowers": "Floral pattern in {second}. / Flowers printed in {second}.",
    "zigzag": "Zigzag pattern in {second}. / Chevron stripes in {second}.",
    "argyle": "Argyle pattern in {second}. / Diamond pattern in {second}.",
    "camouflage": "Camouflage pattern in {second}. / Camo print in {second}.",
    "ombre": "Gradient effect to {second}. / Fades to {second} below.", "block": "Colorblocked in {second}. / Lower half in {second}.",
    "heart": "Heart graphic in {second}. / Heart printed in {second}.", "star": "Star graphic in {second}. / Star printed in {second}.",
    "circle": "Circle graphic in {second}. / Disc printed in {second}.",
    "side stripes": "Stripes in {second} at sides. / Side stripes in {second}.",
    "crewneck": "Ribbed crewneck collar. / Rib knit crewneck.", "v-neck": "V-neck collar. / Ribbed v-neck.",
    "scoop neck": "Scoop neck collar. / Low scoop neckline.", "square neck": "Square neck collar. / Square neckline.",
    "boat neck": "Boat neck collar. / Wide boat neckline.", "turtleneck": "Ribbed turtleneck collar. / Folded turtleneck.",
    "mock neck": "Mock neck collar. / Short stand-up neck.", "spread collar": "Spread collar. / Pointed spread collar.",
    "band collar": "Band collar. / Narrow band at neck.", "notched lapels": "Notched lapel collar. / Notched lapels.",
    "shawl collar": "Shawl collar. / Rounded shawl lapels.", "hood": "Drawstring at hood. / Hood with drawstring.",
    "buttons": "Button closure at front. / Buttons at front.", "gold buttons": "Gold-tone buttons. / Gold-tone button closure.",
    "zip": "Zip closure. / Zip fastening.", "half zip": "Half-zip closure at collar. / Half zip at front.",
    "placket": "Two-button placket. / Button placket at collar.", "toggles": "Toggle closure at front. / Wooden toggles at front.",
    "double-breasted": "Double-breasted closure. / Double-breasted, with gold-tone buttons.",
    "chest pocket": "Patch pocket at chest. / Single pocket at chest.",
    "chest pockets": "Flap pockets at chest. / Twin flap pockets at chest.",
    "patch pockets": "Patch pockets at front. / Two patch pockets.", "flap pockets": "Flap pockets at waist. / Two flap pockets.",
    "slant pockets": "Slant pockets. / Slanted side pockets.", "cargo pockets": "Cargo pockets at sides. / Flap cargo pockets.",
    "kangaroo pocket": "Kangaroo pocket at waist. / Kangaroo pocket.", "front pocket": "Patch pocket at face. / Single pocket at face.",
    "two pockets": "Twin pockets at face. / Two pockets at face.", "belt": "Belted at waist. / Leather belt at waist.",
    "drawstring": "Drawstring at waistband. / Waist with drawstring.", "pleats": "Pleats at waistband. / Pleated front.",
    "sash": "Bow at waist. / Ties in a bow at waist.", "ribbed hem": "Ribbed hem and cuffs. / Rib knit cuffs and hem.",
    "rolled cuffs": "Rolled cuffs. / Turned-up cuffs.", "ribbed cuffs": "Ribbed cuffs. / Rib knit cuffs.",
    "ruffle": "Ruffle at hem. / Ruffled hem.", "slit": "Slit at hem. / Vent at hem.",
    "elbow patches": "Leather patches at elbows. / Leather elbow patches.", "distressed": "Distressed detailing. / Ripped at front.",
    "tonal stitching": "Tonal stitching. / Stitching in tone.", "contrast stitching": "Contrast stitching in tan. / Tan topstitching.",
    "lace-up": "Lace-up closure. / Laces at front.", "straps": "Velcro straps. / Two-strap closure.",
    "slip-on": "Slip-on style. / Elasticized gussets.", "buckle": "Buckle closure. / Gold-tone buckle.",
    "turn-lock": "Turn-lock closure. / Gold-tone turn-lock.", "tab": "Press-stud tab closure. / Press-stud tab.",
    "lug sole": "Treaded rubber sole. / Lug sole.", "white sole": "White rubber sole. / Rubber sole in white.",
    "gum sole": "Gum rubber sole. / Rubber sole in tan.", "black sole": "Black rubber sole. / Rubber sole in black.",
    "flat heel": "Flat heel. / Low stacked heel.", "block heel": "Block heel. / Chunky heel.",
    "stiletto heel": "Stiletto heel. / Slender high heel.", "kitten heel": "Kitten heel. / Low slender heel.",
    "wedge heel": "Wedge heel. / Wedge sole.", "pointed toe": "Pointed toe. / Tapered to a point.",
    "round toe": "Round toe. / Rounded toe.", "open toe": "Open toe. / Peep toe.", "ankle strap": "Ankle strap. / Strap at ankle.",
    "short handles": "Twin carry handles. / Short handles at top.", "long handles": "Long shoulder handles. / Twin long handles.",
    "chain strap": "Gold-tone chain strap. / Chain shoulder strap.", "leather strap": "Brown leather strap. / Leather shoulder strap.",
    "bow": "Bow detail. / Decorative bow.", "studs": "Gold-tone studs. / Studded in gold-tone.",
    "tassel": "Tassel charm. / Hanging tassel.", "folded cuff": "Folded brim. / Rib knit folded brim.",
    "pom-pom": "Pom-pom at crown. / Pom-pom at top.", "ear flaps": "Ear flaps. / Flaps at ears.",
    "curved brim": "Curved brim. / Curved peak.", "flat brim": "Flat brim. / Flat peak.", "wide brim": "Wide brim. / Broad brim.",
    "narrow brim": "Narrow brim. / Short brim.", "ribbon": "Ribbon at crown. / Ribbon band.", "cord": "Chin cord. / Cord strap.",
    "rope": "Rope at brim. / Rope trim at brim.",
}.items()}
SAID = ("pattern", "neck", "closure", "strap", "pocket", "waist", "hem", "toe", "heel", "sole", "detail", "stitching")  # in this order
GRAPHICS = ("heart", "star", "circle")

# ---------------------------------------------------------------- cloth

def blot(distance, soft=0.02):
    """1 where the distance to an edge is negative, 0 where it is positive, with a soft edge."""
    return np.clip(0.5 - distance / soft, 0, 1)


def cell(u, size):
    """The signed distance from the middle of the nearest of the cells of this size."""
    return (u + size / 2) % size - size / 2


def speckle(i, j):
    """Noise from 0 to 1, the same wherever the whole numbers i and j are the same."""
    return (np.int32(i) * 7919 ^ np.int32(j) * 104729) % 251 / np.float32(250)


def flowers(u, v):
    a, b = cell(u + 0.18 * (np.round(v / 0.3) % 2), 0.36), cell(v, 0.3)
    return blot(np.hypot(a, b) - 0.085 - 0.045 * np.cos(5 * np.arctan2(a, b))) - blot(np.hypot(a, b) - 0.035)


def cables(u, v):
    x, bend = cell(u, 0.3), 0.055 * np.sin(v * 26)
    strand = np.minimum(np.abs(x - bend), np.abs(x + bend))
    return 1.08 - 0.34 * np.clip(strand / 0.075 - 0.35, 0, 0.7) + 0.07 * np.cos(np.clip(np.abs(x) - 0.1, 0, 1) * 180)


def threads(u, v):
    return 0.82 + 0.18 * speckle(np.floor(u / 0.028), 1) + 0.18 * speckle(2, np.floor(v / 0.028))


def sheen(u, v):
    wave = np.sin(8 * u + 3 * np.sin(2.5 * v + 1) + 3 * v)
    return 0.9 + 0.5 * np.clip(wave - 0.55, 0, 1) + 0.05 * wave


# How much of the second colour shows, from 0 to 1. u runs across the garment and v along it.
PATTERNS = {
    "stripes": lambda u, v: blot(np.abs(cell(v, 0.24)) - 0.055),
    "vertical stripes": lambda u, v: blot(np.abs(cell(u, 0.2)) - 0.042),
    "checks": lambda u, v: 0.5 * blot(np.abs(cell(u, 0.28)) - 0.07) + 0.5 * blot(np.abs(cell(v, 0.28)) - 0.07),
    "dots": lambda u, v: blot(np.hypot(cell(u + 0.12 * (np.round(v / 0.2) % 2), 0.24), cell(v, 0.2)) - 0.068),
    "flowers": flowers,
    "zigzag": lambda u, v: blot(np.abs(cell(v + np.abs(cell(u, 0.32)), 0.26)) - 0.06),
    "argyle": lambda u, v: blot((np.abs(cell(u, 0.36)) / 0.18 + np.abs(cell(v, 0.5)) / 0.25 - 0.93) * 0.2),
    "camouflage": lambda u, v: blot((np.sin(9 * u + 2 * np.sin(5 * v)) + np.sin(8 * v + 2.5 * np.sin(6 * u + 1))) * 0.2),
    "block": lambda u, v: blot(0.08 - v),
    "ombre": lambda u, v: np.clip(0.5 + v * 0.95, 0, 1),
}
# How light the fabric is, about 1: the yarns and ridges that it is made of. Cotton and what is not here is smooth.
FABRICS = {
    "ribbed": lambda u, v: 1 + 0.16 * np.cos(u * 84), "corduroy": lambda u, v: 1 + 0.16 * np.cos(u * 84),
    "cable knit": cables,
    "wool": lambda u, v: 0.84 + 0.32 * speckle(np.floor(u / 0.055 + 0.37 * np.floor(v / 0.024)), np.floor(v / 0.024)),
    "denim": lambda u, v: 0.98 + 0.12 * np.sin((u + v) * 96) + 0.14 * np.cos(3 * u) * np.cos(2 * v),
    "linen": threads, "canvas": threads,
    "leather": sheen,
    "satin": lambda u, v: 1 + 0.2 * np.sin(6 * u + 2.2 * np.sin(3.1 * v) + 3 * v),
    "quilted": lambda u, v: 0.72 + 0.4 * np.sqrt(np.abs(np.sin((u + v) * 13) * np.sin((u - v) * 13))),
    "shearling": lambda u, v: 1 + 0.13 * np.sin(54 * u + 3 * np.sin(29 * v)) + 0.13 * np.sin(54 * v + 3 * np.sin(29 * u)),
}


class Cloth(NamedTuple):
    """What a part is cut from: a colour, a fabric, and perhaps a pattern in a second colour."""
    colour: tuple
    fabric: str = ""
    second: tuple = (0, 0, 0)
    pattern: str = ""

    def lit(self, light, u, v):
        """The colours (h, w, 3) of the cloth at u, v in this light (h, w)."""
        if self.fabric in FABRICS:
            light = light * FABRICS[self.fabric](u, v)
        light, colours = light[..., None], np.float32(self.colour)
        if self.pattern in PATTERNS:
            colours = colours + PATTERNS[self.pattern](u, v)[..., None] * (np.float32(self.second) - colours)
        shine = 90 - 0.25 * sum(self.colour) / 3  # added, not multiplied: or no fold would show on black
        return np.clip(colours * light + np.float32(shine) * (light - 1), 0, 255)


def ink(colour):
    """The colour of a seam on cloth of this colour: darker, or lighter on dark cloth."""
    return tuple(int(c + 52 if sum(colour) < 185 else c * 0.56) for c in colour)

# ---------------------------------------------------------------- lines, as lists of points

def bend(a, control, b, n=8):
    """The quadratic Bezier curve from a to b."""
    t, (a, control, b) = np.linspace(0, 1, n + 1)[:, None], np.array((a, control, b), dtype=float)
    return [tuple(p) for p in (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t * t * b]


def through(*points, n=6):
    """A smooth curve (Catmull-Rom) through all the points, from the first to the last."""
    points, t = np.array([points[0], *points, points[-1]], dtype=float), np.arange(n)[:, None] / n
    spans = [b + t * (c - a) / 2 + t ** 2 * (a - 2.5 * b + 2 * c - d / 2) + t ** 3 * (1.5 * (b - c) + (d - a) / 2)
             for a, b, c, d in zip(points, points[1:], points[2:], points[3:])]
    return [tuple(p) for p in np.concatenate([*spans, points[-1:]])]


def flipped(points):
    """The same points on the other side of x = 0."""
    return [(-x, y) for x, y in points]


def mirrored(half):
    """The closed outline of which this is the right half, from top to bottom."""
    return list(half) + flipped(half)[::-1]


def box(x, y, w, h):
    """A rectangle whose top edge is centred on (x, y)."""
    return [(x - w / 2, y), (x + w / 2, y), (x + w / 2, y + h), (x - w / 2, y + h)]


def ring(x, y, w, h, n=24):
    """An ellipse of half width w and half height h, clockwise from the top."""
    return [(x + w * math.sin(2 * math.pi * i / n), y - h * math.cos(2 * math.pi * i / n)) for i in range(n)]


def ribbon(points, width):
    """The outline of a ribbon of this width that runs along the points."""
    points = np.array(points, dtype=float)
    along = np.gradient(points, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], 1) / np.hypot(*along.T)[:, None] * width / 2
    return [tuple(p) for p in np.concatenate([points + across, (points - across)[::-1]])]


def dashes(points, length):
    """Every other piece, each of this length, of the line through the points."""
    points = np.array(points, dtype=float)
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = lambda s: tuple(np.interp(s, along, axis) for axis in points.T)
    return [[at(s), at(min(s + length, along[-1]))] for s in np.arange(0, along[-1] - length / 2, 2 * length)]

# ---------------------------------------------------------------- the canvas

class Pose(NamedTuple):
    """How one view shows its product."""
    turn: float      # radians
    shear: float
    squeeze: float   # of the width, as if seen a little from the side
    zoom: float
    shift: tuple     # from -1 to 1 of the room there is, across and down
    arm: float       # how far the sleeves are spread: radians from the vertical
    folds: tuple     # the phases of the folds
    backdrop: tuple  # RGB


def pose_of(seed, number, view):
    """The pose of one view of a product. View 0 is nearly upright."""
    chance = random.Random(f"{seed} {number} {view}")
    wild, grey, warmth = 0.35 if view == 0 else 1.0, chance.randint(233, 246), chance.randint(-3, 4)
    between = lambda low, high: wild * chance.uniform(low, high)
    return Pose(turn=between(-0.16, 0.16), shear=between(-0.1, 0.1), squeeze=1 - between(0, 0.13), zoom=1 - between(0, 0.12),
                shift=(between(-1, 1), between(-1, 1)), arm=chance.uniform(0.2, 0.5),
                folds=tuple(chance.uniform(0, 6.28) for _ in range(4)), backdrop=(grey + warmth, grey, grey - warmth))


class Canvas:
    """A picture in the making: parts are laid one over the other, larger than wanted, and the whole is made smaller at the end."""
    FINE = 3  # so many times larger

    def __init__(self, size, pose):
        self.side, self.pose = size * self.FINE, pose
        self.image, self.covered = Image.new("RGB", (self.side, self.side)), Image.new("L", (self.side, self.side))
        self.pens = ((ImageDraw.Draw(self.image), None), (ImageDraw.Draw(self.covered), 255))

    def fit(self, top, bottom, width, waist=None):
        """Look at the garment's plane from top to bottom and this far to either side; patterns are centred on the waist."""
        pose, self.middle = self.pose, (top + bottom) / 2
        cos, sin = math.cos(pose.turn), math.sin(pose.turn)
        tilt = np.array([[cos, -sin], [sin, cos]]) @ np.array([[pose.squeeze, pose.shear], [0, 1]])
        reach = np.abs(tilt) @ (width, (bottom - top) / 2)  # of the tilted garment, across and down
        self.zoom, self.frame = 0.96 / reach.max(), tilt * pose.zoom
        self.inverse = np.linalg.inv(self.frame).astype(np.float32)
        self.shift = np.minimum(0.12, 0.96 - reach * self.zoom * pose.zoom) * pose.shift
        self.unit = self.zoom * pose.zoom * self.side / 2  # pixels to 1 of the plane
        self.waist = np.float32(0 if waist is None else (waist - self.middle) * self.zoom)

    def place(self, points):
        """Points of the garment's plane as pixels (n, 2)."""
        framed = (np.array(points, dtype=float) - (0, self.middle)) * self.zoom
        return ((framed @ self.frame.T + self.shift) * 0.5 + 0.5) * self.side

    def part(self, outline, cloth, turn=0.0, tone=1.0):
        """Lay on a piece of cloth of this outline, its grain turned, shaded as if it were a little padded, with a seam round it."""
        corners = self.place(outline)
        ahead = np.roll(corners, -1, 0)
        area, rim = abs((corners[:, 0] * ahead[:, 1] - corners[:, 1] * ahead[:, 0]).sum()) / 2, np.hypot(*(ahead - corners).T).sum()
        soft = float(np.clip(0.6 * area / rim, 0.8, 0.02 * self.side))  # the padding: less on a slim part
        left, top = (corners.min(0) - 3 * soft).astype(int).tolist()
        right, bottom = (corners.max(0) + 3 * soft).astype(int).tolist()
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in corners - (left, top)], fill=255)
        height = np.asarray(mask.filter(ImageFilter.GaussianBlur(soft)), dtype=np.float32) / 255
        u, v = self.plane(left, top, right, bottom)
        creased = np.float32(min(1, 20 * area / self.side ** 2))  # large parts have folds
        light = self.relief(height, soft) + creased * self.folds(u, v) + np.float32(tone - 1)
        colours = cloth.lit(light, math.cos(turn) * u + math.sin(turn) * v, math.cos(turn) * v - math.sin(turn) * u - self.waist)
        seam = np.clip((0.5 + min(0.3, 0.003 * self.side / soft) - height) * 7, 0, 1)[..., None] * np.float32(0.9)
        colours += seam * (np.float32(ink(cloth.colour)) - colours)
        self.image.paste(Image.fromarray(colours.astype(np.uint8)), (left, top), mask)
        self.covered.paste(255, (left, top), mask)

    def plane(self, left, top, right, bottom):
        """Where the pixels of a rectangle lie on the upright garment: across and along (h, w), the picture being 2 wide."""
        (a, b), (c, d) = self.inverse
        x = (np.arange(left, right, dtype=np.float32)[None, :] + 0.5) / self.side * 2 - np.float32(1 + self.shift[0])
        y = (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5) / self.side * 2 - np.float32(1 + self.shift[1])
        return a * x + b * y, c * x + d * y

    def relief(self, height, soft):
        """Light (h, w) on a padded piece: darker towards its edge, lit from the upper left."""
        slope = np.zeros_like(height)
        slope[:, 1:-1] += height[:, 2:] - height[:, :-2]
        slope[1:-1] += height[2:] - height[:-2]
        return 1 + np.float32(0.16) * (np.clip(2 * height - 1, 0, 1) - np.float32(0.8)) + np.float32(0.13 * soft) * slope

    def folds(self, u, v):
        """Light (h, w), about 0, of a few soft folds."""
        a, b, c, d = self.pose.folds
        return 0.045 * np.sin(9 * u + 3 * v + a) * np.sin(4 * v - 2 * u + b) + 0.035 * np.sin(6 * u - 5 * v + 1.5 * np.sin(3 * v + c) + d)

    def pair(self, outline, cloth, turn=0.0, tone=1.0):
        """Lay on a part and its mirror image."""
        self.part(flipped(outline), cloth, -turn, tone)
        self.part(outline, cloth, turn, tone)

    def line(self, points, colour, width, dash=0.0, pair=False):
        """A line of this width; with dash, in pieces of that length; with pair, on both sides."""
        for piece in dashes(points, dash) if dash else [points]:
            pixels = [tuple(p) for p in self.place(piece)]
            for pen, cover in self.pens:
                pen.line(pixels, fill=cover or colour, width=max(1, round(width * self.unit)), joint="curve")
        if pair:
            self.line(flipped(points), colour, width, dash)

    def dots(self, points, radius, colour):
        """Buttons: discs with a dark rim and a glint."""
        rims = (1.25, 0, tuple(c // 2 for c in colour)), (1, 0, colour), (0.4, -0.3, tuple((c + 255) // 2 for c in colour))
        for x, y in self.place(points):
            for grow, move, fill in rims:
                low, high = (move - grow) * radius * self.unit, (move + grow) * radius * self.unit
                for pen, cover in self.pens:
                    pen.ellipse([x + low, y + low, x + high, y + high], fill=cover or fill)

    def finish(self):
        """The picture at its size, over a light backdrop, with a soft shadow."""
        image, covered = (np.asarray(large.reduce(self.FINE), dtype=np.float32) for large in (self.image, self.covered))
        size = len(covered)
        move = Image.Transform.AFFINE, (1, 0, -0.012 * size, 0, 1, -0.03 * size), Image.Resampling.BILINEAR
        shadow = self.covered.reduce(self.FINE).transform((size, size), *move).filter(ImageFilter.GaussianBlur(0.03 * size))
        fall = np.linspace(1.02, 0.96, size, dtype=np.float32)[:, None]
        light = (fall - np.asarray(shadow, dtype=np.float32) * np.float32(0.3 / 255)) * (1 - covered / 255)
        picture = image + np.minimum(255, np.float32(self.pose.backdrop) * light[..., None])  # the image is black where nothing covers it
        return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))

# ---------------------------------------------------------------- a product

ATTRIBUTES = ("fabric", "length", "sleeve", "cut", *SAID)


class Product(namedtuple("Product", ("category", "subcategory", "number", "seed", "phrasing", "colour", "second", *ATTRIBUTES),
                         defaults=("",) * len(ATTRIBUTES))):
    """One thing in the shop: where it hangs and what it looks like. An attribute that it lacks is empty."""

    @property
    def cloth(self):
        return Cloth(COLOURS[self.colour], self.fabric, COLOURS[self.second], self.pattern)

    def trim(self, fabric=""):
        """The cloth of collars, cuffs, bands and straps: plain, and in the second colour if the product is so trimmed."""
        return Cloth(COLOURS[self.second if self.pattern == "trim" else self.colour], fabric)

    @property
    def facing(self):
        """The cloth of pockets, lapels and flaps: as the rest, unless the product is trimmed."""
        return self.trim(self.fabric) if self.pattern == "trim" else self.cloth

    @property
    def seam(self):
        return ink(COLOURS[self.colour])

    @property
    def contrast(self):
        """White, or black on light cloth: for cords, laces and buttons."""
        return COLOURS["white" if sum(COLOURS[self.colour]) < 480 else "black"]

# ---------------------------------------------------------------- trimmings: c is the canvas, p the product

def graphic(c, p, x, y, r):
    """The heart, star or circle of about radius r, if the product has one."""
    if p.pattern == "star":
        outline = [(k * math.sin(i * math.pi / 5), k * math.cos(i * math.pi / 5)) for i, k in enumerate((1.15, 0.45) * 5)]
    elif p.pattern == "heart":
        outline = [(math.sin(a) ** 3, (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)) / 16) for a in np.linspace(0, 6.1, 32)]
    else:
        outline = ring(0, 0, 0.95, 0.95)
    if p.pattern in GRAPHICS:
        c.part([(x + r * a, y - r * b) for a, b in outline], Cloth(COLOURS[p.second]))


def pocket(c, p, xs, y, w, h, flap=False):
    """Patch pockets, or with no height their flaps only, with their top edges centred on each x and y."""
    for x in xs:
        if h:
            c.part([*box(x, y, w, h * 0.85)[:3], (x, y + h), (x - w / 2, y + h * 0.85)], p.facing, tone=0.9)
            c.line([(x - w / 2, y + 0.03), (x + w / 2, y + 0.03)], p.seam, 0.016)
        if flap:
            c.part([*box(x, y, w * 1.12, 0.08)[:3], (x, y + 0.12), (x - w * 0.56, y + 0.08)], p.facing, tone=0.86)


def buttons(c, p, ys):
    """Buttons or toggles, one or two at each height, beside the front edge."""
    c.line([(0.045, ys[0] - 0.08), (0.045, ys[-1] + 0.12)], p.seam, 0.018)
    if p.closure == "toggles":
        for y in ys:
            c.line([(-0.15, y), (0.17, y)], p.seam, 0.024)
            c.line([(-0.07, y), (0.1, y)], TAN, 0.06)
    elif p.closure == "double-breasted":
        c.dots([(x, y) for y in ys for x in (-0.14, 0.14)], 0.036, GOLD)
    else:
        c.dots([(0, y) for y in ys], 0.034, GOLD if p.closure == "gold buttons" else p.contrast)


def zipper(c, points):
    """A zip along the points, with its pull at the start."""
    c.line(points, DARK, 0.066)
    c.line(points, SILVER, 0.036, dash=0.024)
    (x, y), (x2, y2) = points[0], points[1]
    step = 0.12 / math.hypot(x2 - x, y2 - y)
    c.line([(x, y), (x + step * (x2 - x), y + step * (y2 - y))], GOLD, 0.05)


def stitches(c, p, points, pair=False):
    """A row of stitches, in a groove if they are of another colour."""
    if p.stitching == "contrast stitching":
        c.line(points, ink(p.trim().colour), 0.045, pair=pair)
    if p.stitching:
        c.line(points, (240, 168, 84) if p.stitching == "contrast stitching" else p.seam, 0.03, dash=0.05, pair=pair)


def belt(c, y, half):
    """A leather belt of this half width, its top at y."""
    c.part(box(0, y, 2 * half, 0.11), Cloth(LEATHER))
    buckle(c, 0, y - 0.02)


def buckle(c, x, y):
    """A buckle whose top is centred on (x, y)."""
    c.line(box(x, y, 0.17, 0.15) + [(x - 0.085, y)], GOLD, 0.036)


def bow(c, p, x, y, r):
    """A bow of half width r."""
    cloth = Cloth(p.contrast)
    for s in (-r, r):
        c.part([(x, y), (x + 0.35 * s, y + 1.3 * r), (x + 0.7 * s, y + 1.2 * r)], cloth, tone=0.9)
        c.part([(x, y)] + bend((x + 0.8 * s, y - 0.6 * r), (x + 1.2 * s, y), (x + 0.8 * s, y + 0.6 * r)), cloth)
    c.part(ring(x, y, 0.22 * r, 0.26 * r), cloth, tone=0.85)


def charms(c, p, x, y, row):
    """A tassel hanging from (x, y), or studs along a row."""
    if p.detail == "studs":
        c.dots(row, 0.036, GOLD)
    if p.detail == "tassel":
        c.line([(x, y - 0.06), (x, y + 0.08)], GOLD, 0.026)
        c.part([(x - 0.035, y + 0.07), (x + 0.035, y + 0.07), (x + 0.085, y + 0.36), (x - 0.085, y + 0.36)], Cloth(p.contrast, "ribbed"))
        c.dots([(x, y + 0.09)], 0.045, GOLD)

# ---------------------------------------------------------------- tops, sweaters, jackets and coats

NECKS = {  # half the width of the neck, and how far down it goes in front
    "crewneck": (0.18, 0.14), "v-neck": (0.18, 0.42), "scoop neck": (0.23, 0.32), "square neck": (0.24, 0.26), "boat neck": (0.31, 0.08),
    "turtleneck": (0.17, 0.05), "mock neck": (0.17, 0.05), "spread collar": (0.16, 0.14), "band collar": (0.15, 0.12),
    "notched lapels": (0.17, 0.6), "shawl collar": (0.17, 0.6), "hood": (0.2, 0.22),
}
SLEEVES = {"sleeveless": 0.0, "short sleeve": 0.36, "half sleeve": 0.58, "long sleeve": 1.04, "bell sleeve": 0.9}
HEMS = {"cropped": 0.3, "": 0.66, "longline": 0.98, "knee-length": 1.3, "ankle-length": 1.8}


def upper(c, p):
    """Everything with a neck but no waist."""
    hem = HEMS[p.length]
    flare = 0.40 + 0.1 * max(0, hem - 0.66)
    frame(c, p, hem, flare)
    body(c, p, through((0.4, -0.2), (0.385, 0.1), (flare, hem)) + bend((flare, hem), (flare / 2, hem + 0.03), (0, hem + 0.03)))
    hem_line = [(x, y - 0.04) for x, y in bend((-flare, hem), (0, hem + 0.045), (flare, hem))]
    if p.hem == "ribbed hem" or p.pattern == "trim":
        c.part(ribbon(hem_line, 0.12 if p.hem else 0.07), p.trim("ribbed" if p.hem else ""))
    stitches(c, p, hem_line)
    pockets(c, p, min(hem - 0.4, 0.42))
    closure(c, p, hem)
    if p.waist == "belt":
        belt(c, 0.18, 0.40)
    collar(c, p)


def frame(c, p, hem, half):
    """Fit the canvas to a garment of this hem, and this half width there, with its neck and its sleeves."""
    reach, drop = SLEEVES[p.sleeve] * math.sin(c.pose.arm), SLEEVES[p.sleeve] * math.cos(c.pose.arm)
    top = {"hood": -1.02, "turtleneck": -0.88}.get(p.neck, -0.74)
    wide = max(reach + (0.69 if p.sleeve == "bell sleeve" else 0.6), half + 0.05)
    c.fit(top, max(hem + 0.04, drop - 0.26), wide, waist=(hem - 0.62) / 2)


def neckline(p):
    """The front edge of the neck, from its middle to the right shoulder."""
    wide, deep = NECKS[p.neck]
    low, top = (0, -0.62 + deep), (wide, -0.62)
    if p.neck == "square neck":
        return [low, (wide - 0.02, low[1]), top]
    if p.neck in ("v-neck", "notched lapels", "shawl collar"):
        return bend(low, (wide * 0.6, -0.62 + deep * 0.42), top)
    return bend(low, (wide * 0.95, low[1]), top)


def body(c, p, sides):
    """Sleeves, hood, the inside of the back, and the front down to the hem; sides run from the right armpit to the middle of the hem."""
    wide, bare, inside = NECKS[p.neck][0], p.sleeve == "sleeveless", Cloth(tuple(int(x * 0.5 + 8) for x in COLOURS[p.colour]))
    if not bare:
        sleeves(c, p)
    if p.neck == "hood":
        c.part(mirrored(bend((0, -1.0), (0.36, -1.02), (0.36, -0.7)) + bend((0.36, -0.6), (0.34, -0.46), (0.2, -0.42))), p.cloth)
        c.part(mirrored(bend((0, -0.9), (0.22, -0.9), (0.22, -0.66)) + bend((0.22, -0.6), (0.2, -0.46), (0, -0.38))), inside)
    else:
        back = bend((0, -0.57), (wide * 0.6, -0.58), (wide, -0.63))
        c.part(mirrored(back + neckline(p)[::-1]), inside)
        c.part(ribbon(flipped(back)[::-1] + back[1:], 0.055), p.trim())
    armhole = bend((wide + 0.13, -0.585), (0.28, -0.24), sides[0]) if bare else bend((0.46, -0.52), (0.37, -0.4), sides[0])
    c.part(mirrored(neckline(p) + armhole + sides), p.cloth)
    if bare:
        c.pair(ribbon(armhole, 0.05), p.trim("ribbed"))


def sleeves(c, p):
    """Both sleeves, spread as the pose has it, with their cuffs."""
    angle, length, bell = c.pose.arm, SLEEVES[p.sleeve], p.sleeve == "bell sleeve"
    along, across = np.array((math.sin(angle), math.cos(angle))), np.array((math.cos(angle), -math.sin(angle)))
    at = lambda s, half: tuple(np.array((0.43, -0.36)) + along * s + across * half)
    end, middle = (0.24, 0.11) if bell else (0.165 - 0.07 * length, 0.172 - 0.035 * length)
    c.pair([(0.3, -0.5)] + through((0.455, -0.522), at(length / 2, middle), at(length, end))
           + through(at(length, -end), at(length / 2, -middle), (0.4, -0.2)) + [(0.3, -0.2)], p.cloth, -angle)
    if p.pattern == "trim" or p.hem == "ribbed hem":
        start, knit = (length - 0.1, "ribbed") if p.hem else (length - 0.07, "")
        c.pair([at(length, end), at(length, -end), at(start, -end - 0.008), at(start, end + 0.008)], p.trim(knit), -angle)
    if p.detail == "elbow patches":
        c.pair([at(length * 0.52 + 0.15 * math.cos(t), 0.08 * math.sin(t)) for t in np.linspace(0, 6, 20)], Cloth(LEATHER))


def collar(c, p):
    """What goes round the neck."""
    edge, trim = neckline(p), p.trim("ribbed")
    whole = flipped(edge)[:0:-1] + edge
    if p.neck in ("crewneck", "v-neck", "scoop neck", "boat neck", "square neck"):
        c.part(ribbon(whole, 0.075), p.trim(), tone=0.96)
        if p.neck in ("crewneck", "v-neck"):
            c.line(whole, ink(trim.colour), 0.05, dash=0.018)
    if p.neck in ("turtleneck", "mock neck"):
        top = -0.88 if p.neck == "turtleneck" else -0.72
        c.part(mirrored([(0, top), (0.16, top + 0.01), (0.185, -0.6), (0, -0.56)]), trim)
    if p.neck == "turtleneck":
        c.part(mirrored([(0, -0.78), (0.18, -0.78), (0.2, -0.58), (0, -0.54)]), trim)
    if p.neck == "band collar":
        half = bend((0, -0.47), (0.12, -0.47), (0.15, -0.65))
        c.part(ribbon(flipped(half)[:0:-1] + half, 0.1), p.trim())
    if p.neck == "spread collar":
        c.pair([(0.0, -0.49), (0.1, -0.66), (0.15, -0.68), (0.24, -0.56), (0.17, -0.37)], p.trim("denim" if p.fabric == "denim" else ""))
    if p.neck == "hood":
        c.line([(0.09, -0.42), (0.1, -0.24), (0.09, -0.1)], p.contrast, 0.03, pair=True)
    if p.neck == "shawl collar":
        c.pair(bend((0, 0.0), (0.38, -0.32), (0.19, -0.66)) + bend((0.11, -0.66), (0.12, -0.3), (0, 0.0)), p.facing, tone=1.06)
    if p.neck == "notched lapels":
        c.pair([(0, 0.0), (0.34, -0.32), (0.21, -0.37), (0.31, -0.47), (0.19, -0.66), (0.11, -0.64), (0.1, -0.4)], p.facing, tone=1.06)
        c.line([(0.21, -0.37), (0.1, -0.42)], p.seam, 0.016, pair=True)


def closure(c, p, hem):
    """Buttons, zips and their like, from the neck down."""
    start = -0.58 + NECKS[p.neck][1]
    if p.closure in ("buttons", "gold buttons", "toggles", "double-breasted"):
        buttons(c, p, np.arange(start + 0.05, hem - 0.06, 0.2)[: 3 if p.closure == "double-breasted" else 9])
    if p.closure in ("zip", "half zip"):
        zipper(c, [(0, start - 0.06), (0, hem if p.closure == "zip" else start + 0.4)])
    if p.closure == "placket":
        c.part(box(0, start - 0.04, 0.13, 0.34), p.trim(), tone=0.94)
        c.dots([(0, start + 0.06), (0, start + 0.2)], 0.028, p.contrast)


def pockets(c, p, low):
    """The pockets and the graphic; low is where the lower pockets begin."""
    graphic(c, p, 0, min(0.08, low), 0.22)
    if p.pocket == "chest pocket":
        pocket(c, p, [0.2], -0.24, 0.2, 0.24)
    if p.pocket == "chest pockets":
        pocket(c, p, (-0.2, 0.2), -0.24, 0.2, 0.26, flap=True)
    if p.pocket == "patch pockets":
        pocket(c, p, (-0.22, 0.22), low, 0.24, 0.28)
    if p.pocket == "flap pockets":
        pocket(c, p, (-0.22, 0.22), low + 0.06, 0.24, 0, flap=True)
    if p.pocket == "slant pockets":
        c.line([(0.2, low - 0.02), (0.29, low + 0.24)], p.seam, 0.045, pair=True)
    if p.pocket == "kangaroo pocket":
        c.part(mirrored([(0, low - 0.04), (0.16, low - 0.04), (0.28, low + 0.16), (0.28, low + 0.3), (0, low + 0.3)]), p.cloth, tone=0.9)

# ---------------------------------------------------------------- dresses, skirts, trousers

SKIRT_HEMS = {"mini": 0.62, "short": 0.66, "knee-length": 0.95, "midi": 1.3, "maxi": 1.72}


def dress(c, p):
    """A bodice over a skirt."""
    hem = SKIRT_HEMS[p.length]
    frame(c, p, hem + 0.1 * (p.hem == "ruffle"), 0.33 + skirt_flare(p, hem - 0.12))
    skirt_panels(c, p, 0.12, hem, 0.28)
    body(c, p, through((0.36, -0.2), (0.3, 0.0), (0.28, 0.14)) + bend((0.28, 0.14), (0.14, 0.16), (0, 0.16)))
    if p.waist == "belt":
        belt(c, 0.08, 0.285)
    if p.waist == "sash":
        c.part(box(0, 0.1, 0.57, 0.08), Cloth(p.contrast))
        bow(c, p, 0, 0.14, 0.17)
    collar(c, p)


def skirt(c, p):
    """A skirt with its waistband."""
    hem = SKIRT_HEMS[p.length] - 0.1
    c.fit(-0.16, hem + (0.14 if p.hem == "ruffle" else 0.04), 0.38 + skirt_flare(p, hem))
    skirt_panels(c, p, 0.0, hem, 0.29)
    if p.pocket == "slant pockets":
        c.line([(0.15, 0.02), (0.29, 0.24)], p.seam, 0.045, pair=True)
    if p.pocket == "patch pockets":
        pocket(c, p, (-0.2, 0.2), 0.12, 0.2, 0.24)
    if p.closure in ("buttons", "gold buttons"):
        buttons(c, p, np.arange(0.1, hem - 0.05, 0.16))
    if p.closure == "zip":
        zipper(c, [(0, 0.02), (0, hem)])
    waistband(c, p, -0.1, 0.295)


def skirt_flare(p, tall):
    """How much wider a skirt is at the hem than at the waist, on either side."""
    return {"pencil": 0.06, "a-line": 0.34, "pleated": 0.3, "tiered": 0.36}[p.cut] * min(1.4, 0.35 + 0.65 * tall)


def skirt_panels(c, p, top, hem, waist):
    """A skirt from its waist, of this half width, to its hem, in the panels of its cut."""
    tall = hem - top
    bulge, rise = (0.09 * min(1, tall), 0.6) if p.cut == "pencil" else (0.04, 1)
    wide = lambda t: waist + skirt_flare(p, tall) * t + bulge * math.sin(math.pi * t ** rise)  # t: how far down, from 0 to 1
    edge = lambda s, a, b: [(s * wide(t), top + t * tall) for t in np.linspace(a, b, 6)]
    if p.cut == "tiered":
        for a, b in ((2 / 3, 1), (1 / 3, 2 / 3), (0, 1 / 3)):
            y, low = top + a * tall, top + b * tall
            c.part(mirrored([(0, y)] + edge(1, a, b)[:-1] + [(wide(b) + 0.03, low), (0, low + 0.03)]), p.cloth)
            for x in np.linspace(-0.85, 0.85, 8):
                c.line([(x * wide(a), y + 0.02), (x * wide(a) * 1.05, y + 0.1 * tall)], p.seam, 0.014)
    elif p.cut == "pleated":
        for i in (-4, 3, -3, 2, -2, 1, -1, 0):
            c.part(edge(i / 4, 0, 1) + [((i + 0.5) / 4 * wide(1), hem + 0.03)] + edge((i + 1) / 4, 0, 1)[::-1], p.cloth)
    else:
        c.part(mirrored([(0, top)] + edge(1, 0, 1) + bend((wide(1), hem), (wide(1) / 2, hem + 0.03), (0, hem + 0.03))), p.cloth)
    skirt_hem(c, p, hem, wide(1), tall)


def skirt_hem(c, p, hem, half, tall):
    """Trim, ruffle or slit at the hem of a skirt of this half width and height."""
    if p.pattern == "trim":
        c.part(ribbon(bend((-half, hem - 0.02), (0, hem + 0.02), (half, hem - 0.02)), 0.09), p.trim())
    if p.hem == "ruffle":
        for x in np.linspace(-half, half, 12):
            frill = bend((x + 0.075, hem + 0.06), (x, hem + 0.13), (x - 0.075, hem + 0.06))
            c.part([(x * 0.97 - 0.03, hem - 0.07), (x * 0.97 + 0.03, hem - 0.07)] + frill, p.trim(p.fabric))
    if p.hem == "slit":
        behind = Cloth(tuple(int(v * 0.8) for v in c.pose.backdrop))
        c.part([(0.5 * half, hem - 0.4 * tall), (0.55 * half + 0.08, hem + 0.035), (0.55 * half - 0.06, hem + 0.035)], behind)


def waistband(c, p, y, half):
    """A band of this half width, with what holds it."""
    elastic = p.waist == "drawstring"
    c.part([(-half, y), (half, y), (half + 0.01, y + 0.12), (-half - 0.01, y + 0.12)], p.trim("ribbed" if elastic else p.fabric), tone=0.93)
    if elastic:
        c.line(bend((0.03, y + 0.06), (0.1, y + 0.2), (0.09, y + 0.34)), p.contrast, 0.034, pair=True)
    if p.waist == "belt":
        belt(c, y + 0.005, half + 0.01)
    if p.waist == "pleats":
        for x in (0.09, 0.17):
            c.line([(x, y + 0.12), (x * 1.15, y + 0.42)], p.seam, 0.026, pair=True)
    if not p.waist:
        c.dots([(0, y + 0.06)], 0.032, SILVER)


LEGS = {  # how far out the outer and the inner edge are, at hip, knee and hem
    "skinny": ((0.35, 0.28, 0.24), (0.03, 0.11, 0.13)), "straight-leg": ((0.36, 0.36, 0.36), (0.03, 0.06, 0.08)),
    "tapered": ((0.39, 0.38, 0.25), (0.03, 0.05, 0.1)), "wide-leg": ((0.38, 0.49, 0.6), (0.03, 0.03, 0.03)),
    "flared": ((0.35, 0.29, 0.52), (0.03, 0.1, 0.04)),
}
LEG_HEMS = {"": 1.0, "cropped": 0.52, "thigh-length": -0.02, "knee-length": 0.32}


def trousers(c, p):
    """Trousers, jeans and shorts."""
    hem, knots = LEG_HEMS[p.length], (-0.45, 0.2, 1.0)
    ys = np.array((-0.45, (hem - 0.45) / 2, hem))
    outer, inner = (np.interp(ys, knots, xs) if "-length" in p.length else xs for xs in LEGS[p.cut])  # shorts are trousers cut off
    c.fit(-1.0, hem + 0.05, max(outer) + 0.08)
    side = through((0.29, -0.86), *zip(outer, ys))
    c.pair([(0, -0.86)] + side + through((inner[2], hem), (inner[1], ys[1]), (0.015, -0.24)) + [(0, -0.28)], p.cloth)
    c.line([(0, -0.86), (0, -0.25)], p.seam, 0.018)
    c.line(bend((0.1, -0.84), (0.1, -0.48), (0.0, -0.4)), p.seam, 0.014)
    if p.pattern == "side stripes":
        for x in (0.035, 0.095):
            c.pair(ribbon([(a - x, b) for a, b in side[1:]], 0.035), Cloth(COLOURS[p.second]))
    stitches(c, p, [(x - 0.035, y) for x, y in side], pair=True)
    if p.pocket == "slant pockets":
        c.line([(0.15, -0.85), (0.31, -0.6)], p.seam, 0.05, pair=True)
    if p.pocket == "cargo pockets":
        y = min(0.0, hem - 0.36)
        x = float(np.interp(y, ys, outer)) - 0.08
        pocket(c, p, (-x, x), y, 0.22, 0.28, flap=True)
    if p.pocket == "patch pockets":
        pocket(c, p, (-0.21, 0.21), -0.68, 0.2, 0.25)
    if p.detail == "distressed":
        for s in (-1, 1):
            tear(c, s * (outer[1] + inner[1]) / 2, ys[1] + 0.12 * s + 0.05)
    leg_hem(c, p, hem, outer[2], inner[2])
    waistband(c, p, -0.96, 0.295)


def leg_hem(c, p, hem, outer, inner):
    """Cuffs, or a trim, at the end of both legs."""
    band = lambda grow, tall: box((outer + inner) / 2, hem - tall, outer - inner + 2 * grow, tall + 0.02)
    if p.hem == "rolled cuffs":
        c.pair(band(0.02, 0.12), Cloth(tuple(int(x + (235 - x) * 0.4) for x in p.trim().colour), p.fabric))
    elif p.hem == "ribbed cuffs":
        c.pair(band(-0.02, 0.12), p.trim("ribbed"), tone=0.94)
    elif p.pattern == "trim":
        c.pair(band(0.005, 0.08), p.trim())


def tear(c, x, y):
    """A rip with its threads."""
    c.part(ring(x, y, 0.1, 0.075), Cloth((240, 222, 206)))
    for move in (-0.03, 0.0, 0.03):
        c.line([(x - 0.08, y + move), (x + 0.08, y + move)], (250, 250, 250), 0.016)

# ---------------------------------------------------------------- shoes, seen from the side, the toe to the right

SOLES = {"white sole": (244, 244, 240), "gum sole": TAN, "black sole": DARK}
LIFTS = {"flat heel": 0.1, "lug sole": 0.1, "kitten heel": 0.3, "wedge heel": 0.42, "block heel": 0.42, "stiletto heel": 0.6}


def sneaker(c, p):
    """A low or high sneaker."""
    high = p.cut == "high-top"
    c.fit(-0.9 if high else -0.4, 0.62, 1.02)
    back, tongue = ((-0.76, -0.74), (-0.2, -0.84)) if high else ((-0.86, -0.16), (-0.16, -0.3))
    vamp, toe = through(tongue, (-0.04, tongue[1] + 0.06), (0.2, -0.12), (0.62, 0.08)), bend((0.62, 0.08), (1.0, 0.14), (0.96, 0.4))
    c.part(through((-0.88, 0.4), (-0.88, 0.1), back) + bend(back, (-0.45, back[1] + 0.12), tongue) + vamp + toe, p.cloth)
    for cap in ([(0.52, 0.05)] + toe + bend((0.6, 0.4), (0.46, 0.22), (0.52, 0.05)),
                through((-0.9, 0.38), (-0.9, 0.1), (-0.86, -0.15)) + bend((-0.7, -0.12), (-0.7, 0.2), (-0.52, 0.38))):
        c.part(cap, p.trim(p.fabric), tone=0.94)
    if p.pattern == "side stripes":
        for x in (-0.34, -0.18, -0.02):
            c.part([(x, -0.08), (x + 0.09, -0.05), (x + 0.2, 0.36), (x + 0.08, 0.36)], Cloth(COLOURS[p.second]))
    graphic(c, p, -0.36, -0.1 if high else 0.12, 0.19)
    if p.closure == "lace-up":
        for x, y in vamp[3:-2:2]:
            c.part(ribbon([(x - 0.15, y + 0.13), (x + 0.02, y - 0.01)], 0.055), Cloth(p.contrast))
    if p.closure == "straps":
        for x, y in (vamp[7], vamp[12]):
            c.part([(x - 0.1, y - 0.04), (x + 0.08, y + 0.03), (x - 0.1, y + 0.36), (x - 0.28, y + 0.32)], p.trim(), tone=0.86)
    if p.closure == "slip-on":
        x, y = vamp[8]
        c.part([(x - 0.12, y - 0.02), (x + 0.06, y + 0.06), (x + 0.02, y + 0.34), (x - 0.1, y + 0.34)], Cloth(DARK, "ribbed"))
    heel_curve, tip_curve = bend((-0.92, 0.34), (-0.98, 0.58), (-0.8, 0.58)), bend((0.8, 0.58), (1.02, 0.58), (1.0, 0.34))
    c.part(heel_curve + tip_curve + [(0.6, 0.38), (-0.5, 0.38)], Cloth(SOLES[p.sole]))
    c.line([(-0.92, 0.49), (0.96, 0.49)], ink(SOLES[p.sole]), 0.016)


def heel(c, p, x, lift):
    """The heel under a shoe whose back is at x, its sole lifted this far."""
    seat = 0.56 - lift
    if p.heel == "wedge heel":
        outline = through((x, seat - 0.02), (-0.2, 0.36), (0.36, 0.52)) + [(0.36, 0.58), (x + 0.06, 0.58)]
    elif p.heel in ("stiletto heel", "kitten heel"):
        front = bend((x + 0.13, 0.58), (x + 0.16, seat + 0.2), (x + 0.38, seat + 0.05))
        outline = bend((x, seat - 0.02), (x + 0.08, seat + 0.2), (x + 0.07, 0.58)) + front
    else:
        outline = [(x, seat - 0.03), (x + 0.03, 0.58), (x + 0.32, 0.58), (x + 0.38, seat + 0.02)]
    c.part(outline, p.trim("leather"), tone=0.94)


def boot(c, p):
    """A boot of one of three heights."""
    top = {"ankle": -0.42, "mid-calf": -0.85, "knee-high": -1.35}[p.length]
    lift, wide, lug = LIFTS[p.heel] * 0.75, 0.04 if p.length == "ankle" else 0.1, p.heel == "lug sole"
    c.fit(top - 0.05, 0.62, 0.92)
    heel(c, p, -0.66, lift)
    floor = through((0.92, 0.52), (0.3, 0.53), (-0.1, 0.53 - 0.6 * lift), (-0.66, 0.54 - lift))
    back = through((-0.66, 0.54 - lift), (-0.68, 0.25 - lift), (-0.58, -0.18 - lift / 2), (-0.62 - wide, top))
    shin = through((-0.02 + wide, top), (-0.04, -0.2 - lift / 2), (0.12, 0.06), (0.55, 0.2))
    c.part(back + shin + bend((0.55, 0.2), (0.94, 0.26), (0.92, 0.52)) + floor, p.cloth)
    c.part(ribbon(floor, 0.14 if lug else 0.06), Cloth(DARK) if lug else p.trim(), tone=0.9)
    if lug:
        c.line(floor[2:14], (120, 120, 126), 0.07, dash=0.05)
    if p.pattern == "trim":
        c.part([(-0.63 - wide, top - 0.01), (wide - 0.01, top - 0.01), (wide - 0.02, top + 0.14), (-0.62 - wide, top + 0.14)], p.trim())
    if p.closure == "lace-up":
        for y in np.arange(top + 0.08, 0.0, 0.13):
            c.line([(-0.2, y + 0.06), (0.03, y)], p.contrast, 0.034)
            c.line([(-0.2, y), (0.03, y + 0.06)], p.contrast, 0.034)
    if p.closure == "zip":
        zipper(c, [(-0.34, top + 0.04), (-0.36, 0.32 - lift)])
    if p.closure == "slip-on":
        grey = Cloth(DARK if sum(COLOURS[p.colour]) > 200 else (126, 126, 132), "ribbed")
        c.part([(-0.44, top + 0.02), (-0.16, top + 0.02), (-0.24, top + 0.42), (-0.36, top + 0.42)], grey)
    if p.closure == "buckle":
        c.part([(-0.64, -0.12), (-0.02, -0.12), (0.06, 0.0), (-0.66, 0.0)], Cloth(LEATHER))
        buckle(c, -0.28, -0.14)


def pump(c, p):
    """A shoe with a heel."""
    lift = LIFTS[p.heel]
    seat, tip = 0.54 - lift, (1.02, 0.53) if p.toe == "pointed toe" else (0.86, 0.56)
    c.fit(-lift - (0.3 if p.strap else 0), 0.62, 1.04, 0.54 - lift / 2)
    heel(c, p, -0.76, lift)
    floor = through((tip[0], 0.56), (0.4, 0.55), (0.0, 0.5 - 0.35 * lift), (-0.4, 0.52 - 0.85 * lift), (-0.76, seat))
    rim = through((-0.72, seat - 0.36), (-0.5, seat - 0.14), (-0.1, 0.3 - 0.55 * lift), (0.2, 0.24 - 0.16 * lift), (0.36, 0.12))
    toe = bend((0.36, 0.12), (0.72, 0.34) if p.toe == "pointed toe" else (0.92, 0.16), tip)
    c.part(through((-0.76, seat), (-0.8, seat - 0.18), (-0.72, seat - 0.36)) + rim + toe + floor, p.cloth)
    c.line(floor, p.seam, 0.03)
    if p.toe == "open toe":
        c.part(ring(0.78, 0.45, 0.12, 0.09), Cloth((250, 226, 206)))
    if p.strap == "ankle strap":
        c.part(ribbon(ring(-0.55, seat - 0.5, 0.22, 0.075) + [(-0.55, seat - 0.575)], 0.05), p.trim())
        c.part(ribbon([(-0.75, seat - 0.28), (-0.74, seat - 0.48)], 0.06), p.trim())
        c.dots([(-0.45, seat - 0.43)], 0.035, GOLD)
    if p.detail == "bow":
        bow(c, p, 0.42, 0.15, 0.17)
    charms(c, p, 0, 0, [(x - 0.06, y + 0.09) for x, y in toe[1:-1:2]])

# ---------------------------------------------------------------- bags

def tote(c, p):
    """An open bag with two handles."""
    half, deep = (0.72, 0.62) if p.cut == "wide" else (0.5, 0.86)
    rise = -0.72 if p.strap == "long handles" else -0.3
    c.fit(rise - 0.06, deep + 0.05, half + 0.1, deep / 2)
    arch = lambda x: ((-0.28, 0.05), (-0.24 + x, rise * 0.7), (x, rise), (0.24 + x, rise * 0.7), (0.28, 0.05))
    c.part(ribbon(through(*arch(0.06)), 0.07), p.trim(), tone=0.72)
    c.part(mirrored([(0, 0), (half, 0), (half - 0.06, deep - 0.06), (half - 0.12, deep), (0, deep)]), p.cloth)
    graphic(c, p, 0, 0.42, 0.2)
    if p.pocket:
        pocket(c, p, [0], deep * 0.42, 0.56, deep * 0.46)
    if p.closure == "zip":
        zipper(c, [(-half + 0.03, 0.04), (half - 0.03, 0.04)])
    c.part(ribbon(through((-0.28, 0.16), *arch(0), (0.28, 0.16)), 0.075), p.trim(), tone=0.92)
    if p.closure == "tab":
        c.part(mirrored([(0, -0.05), (0.08, -0.05), (0.08, 0.2), (0, 0.25)]), p.trim(), tone=0.84)
        c.dots([(0, 0.15)], 0.045, GOLD)
    charms(c, p, half - 0.14, 0.08, [(x, deep - 0.07) for x in np.linspace(0.16 - half, half - 0.16, 7)])


def backpack(c, p):
    """A backpack from the front."""
    c.fit(-1.0, 0.8, 0.8, 0.05)
    c.pair(ribbon(through((0.4, -0.5), (0.68, -0.2), (0.7, 0.25), (0.46, 0.62)), 0.11), p.trim(), tone=0.8)
    c.part(ribbon(through((-0.16, -0.72), (-0.14, -0.92), (0.14, -0.92), (0.16, -0.72)), 0.075), p.trim(), tone=0.85)
    c.part(mirrored(bend((0, -0.76), (0.54, -0.78), (0.54, -0.25)) + bend((0.56, 0.6), (0.56, 0.76), (0.4, 0.76)) + [(0, 0.76)]), p.cloth)
    if p.pocket == "front pocket":
        pocket(c, p, [0], 0.22, 0.78, 0.5)
    if p.pocket == "two pockets":
        pocket(c, p, (-0.26, 0.26), 0.22, 0.42, 0.48, flap=True)
    if p.closure == "zip":
        zipper(c, mirrored(bend((0, -0.6), (0.42, -0.62), (0.43, -0.1)) + [(0.43, 0.1)])[::-1])
    else:
        flap = bend((0, -0.78), (0.58, -0.8), (0.57, -0.25)) + bend((0.57, -0.02), (0.54, 0.1), (0.4, 0.1)) + [(0, 0.1)]
        c.part(mirrored(flap), p.facing, tone=0.95)
    graphic(c, p, 0, -0.3, 0.2)
    for x in {"buckle": (-0.28, 0.28), "tab": (0,)}.get(p.closure, ()):
        c.part(box(x, -0.08, 0.11, 0.34), Cloth(LEATHER))
        buckle(c, x, 0.05) if p.closure == "buckle" else c.dots([(x, 0.18)], 0.045, GOLD)
    charms(c, p, 0.48, -0.18, [(x, 0.68) for x in np.linspace(-0.42, 0.42, 7)])


def shoulder_bag(c, p):
    """A small bag on a strap, with a flap or a zip."""
    c.fit(-1.02, 0.78, 0.8, 0.3)
    low = 0.16 if p.cut == "round" else 0.02
    strap = through((-0.56, low), (-0.52, -0.6), (0.0, -0.95), (0.52, -0.6), (0.56, low))
    if p.strap == "chain strap":
        c.dots([link for piece in dashes(strap, 0.045) for link in piece], 0.03, GOLD)
    else:
        c.part(ribbon(strap, 0.075), Cloth(LEATHER))
    outline = {"boxy": [(0, -0.05), (0.64, -0.05)] + bend((0.7, 0.6), (0.71, 0.7), (0.6, 0.7)) + [(0, 0.7)],
               "half-moon": [(0, -0.05)] + bend((0.7, -0.05), (0.74, 0.72), (0, 0.74)), "round": ring(0, 0.22, 0.62, 0.52)[:13]}[p.cut]
    c.part(mirrored(outline), p.cloth)
    if p.closure == "zip":
        c.part(box(0, 0.02, 1.14, 0.16), p.trim(), tone=0.92)
        zipper(c, [(-0.52, 0.1), (0.52, 0.1)])
    else:
        top = ring(0, 0.22, 0.64, 0.54)[:6] if p.cut == "round" else [(0, -0.07), (0.66, -0.07)]
        c.part(mirrored(top + bend(top[-1], (0.66, 0.38), (0, 0.42))), p.facing, tone=0.94)
    if p.closure == "turn-lock":
        c.part(box(0, 0.3, 0.22, 0.17), Cloth(GOLD))
        c.line([(0, 0.33), (0, 0.44)], DARK, 0.04)
    if p.closure == "buckle":
        c.part(box(0, 0.1, 0.13, 0.46), Cloth(LEATHER))
        buckle(c, 0, 0.31)
    if p.closure == "tab":
        c.dots([(0, 0.34)], 0.06, GOLD)
    if p.detail == "bow":
        bow(c, p, -0.34, 0.2, 0.15)
    charms(c, p, 0.5, 0.06, [(x, 0.56 - 0.12 * abs(x) * (p.cut != "boxy")) for x in np.linspace(-0.3, 0.3, 5)])

# ---------------------------------------------------------------- hats

def beanie(c, p):
    """A knitted hat."""
    c.fit(-0.98 if p.detail == "pom-pom" else -0.7, 0.95 if p.detail == "ear flaps" else 0.56, 0.76, 0)
    if p.detail == "ear flaps":
        c.pair([(0.3, 0.3)] + bend((0.66, 0.3), (0.66, 0.72), (0.44, 0.74)) + [(0.34, 0.6)], p.trim(p.fabric), tone=0.94)
        c.line([(0.46, 0.72), (0.48, 0.9)], p.contrast, 0.045, pair=True)
    if p.detail == "pom-pom":
        tufts = zip(ring(0, -0.7, 0.22, 0.22, 40)[::2], ring(0, -0.7, 0.26, 0.26, 40)[1::2])
        c.part([point for tuft in tufts for point in tuft], p.trim("shearling"))
    c.part(mirrored(bend((0, -0.62), (0.56, -0.62), (0.64, 0.2), n=16) + [(0.65, 0.5), (0, 0.5)]), p.cloth)
    graphic(c, p, 0, -0.16, 0.2)
    if p.hem == "folded cuff":
        cuff = bend((0, 0.16), (0.4, 0.15), (0.67, 0.11)) + bend((0.69, 0.45), (0.4, 0.53), (0, 0.54))
        c.part(mirrored(cuff), p.trim("ribbed"), tone=0.94)
    elif p.pattern == "trim":
        c.part(mirrored([(0, 0.4), (0.65, 0.4), (0.65, 0.52), (0, 0.52)]), p.trim())
    if p.detail == "bow":
        bow(c, p, 0.34, 0.3, 0.17)


def cap(c, p):
    """A baseball cap, its peak to the right."""
    c.fit(-0.66, 0.6, 0.98, -0.1)
    dome = through((-0.72, 0.3), (-0.68, -0.15), (-0.4, -0.5), (-0.08, -0.58), (0.28, -0.46), (0.52, -0.05), (0.56, 0.26))
    c.part(dome + bend((0.56, 0.26), (-0.1, 0.4), (-0.72, 0.3)), p.cloth)
    c.line(through((-0.08, -0.58), (-0.24, -0.2), (-0.26, 0.33)), p.seam, 0.016)
    c.line(through((-0.08, -0.58), (0.36, -0.26), (0.5, 0.27)), p.seam, 0.016)
    c.dots([(-0.08, -0.58)], 0.05, p.trim().colour)
    graphic(c, p, 0.1, -0.04, 0.2)
    stitches(c, p, bend((0.5, 0.18), (-0.1, 0.31), (-0.69, 0.21)))
    if p.detail == "ear flaps":
        flap = bend((0.0, 0.33), (-0.04, 0.62), (-0.25, 0.62)) + bend((-0.25, 0.62), (-0.46, 0.6), (-0.5, 0.3))
        c.part(flap, p.trim(p.fabric), tone=0.9)
    if p.hem == "flat brim":
        peak = [(0.02, 0.3), (0.56, 0.2), (1.0, 0.3), (1.0, 0.36), (0.3, 0.42), (0.04, 0.38)]
    else:
        tip = bend((0.8, 0.2), (1, 0.3), (0.96, 0.56))
        peak = bend((0.04, 0.34), (0.5, 0.16), (0.76, 0.2)) + tip + bend((0.9, 0.5), (0.6, 0.3), (0, 0.4))
    c.part(peak, p.trim(p.fabric), tone=0.95)
    if p.detail == "rope":
        c.line(bend((0.06, 0.35), (0.4, 0.24), (0.6, 0.2)), p.contrast, 0.07, dash=0.06)
    charms(c, p, 0, 0, [(x, 0.27) for x in (-0.55, -0.4, -0.25, -0.1, 0.05)])


def bucket(c, p):
    """A hat with a brim all round."""
    wide = 0.92 if p.hem == "wide brim" else 0.68
    c.fit(-0.6, 0.95 if p.detail == "cord" else 0.52, wide + 0.04, -0.05)
    if p.detail == "cord":
        c.line(bend((-0.46, 0.3), (0, 1.5), (0.46, 0.3), n=16), p.contrast, 0.045)
        c.dots([(0, 0.86)], 0.06, GOLD)
    c.part(mirrored(bend((0, -0.02), (0.5, 0.0), (wide, 0.36)) + bend((wide, 0.36), (0.55, 0.5), (0, 0.5))), p.facing, tone=0.94)
    crown = bend((0, -0.56), (0.36, -0.57), (0.4, -0.42)) + bend((0.5, 0.12), (0.3, 0.2), (0, 0.2))
    c.part(mirrored(crown), p.cloth)
    c.line(bend((-0.4, -0.42), (0, -0.33), (0.4, -0.42)), p.seam, 0.016)
    graphic(c, p, 0, -0.14, 0.18)
    if p.detail == "ribbon":
        band = bend((0, 0.05), (0.3, 0.05), (0.485, -0.03)) + bend((0.5, 0.1), (0.3, 0.18), (0, 0.18))
        c.part(mirrored(band), Cloth(p.contrast, "satin"))
    if p.detail == "bow":
        bow(c, p, 0.36, 0.06, 0.15)
    for t in (0.72, 0.88):
        stitches(c, p, bend((-wide * t - 0.03, 0.3 * t + 0.06), (0, 0.14 + 0.46 * t), (wide * t + 0.03, 0.3 * t + 0.06)))

# ---------------------------------------------------------------- the sub-categories

class Kind(NamedTuple):
    """A sub-category: its painter, the nouns it goes by (the last fits its neighbours too), and the values its attributes may take."""
    category: str
    subcategory: str
    paint: Callable
    nouns: list
    options: dict


def kind(category, subcategory, paint, nouns, **options):
    """A Kind whose nouns and values are written as strings, separated by commas."""
    return Kind(category, subcategory, paint, nouns.split(", "), {name: values.split(", ") for name, values in options.items()})


# An empty value, such as the first one in ", trim", is an attribute that may be absent.
WOVEN = ", trim, stripes, vertical stripes, checks, dots, flowers, zigzag, block, ombre"
KNIT = ", trim, stripes, zigzag, argyle, checks, block, ombre, dots"
PRINTED = ", trim, stripes, vertical stripes, dots, flowers, camouflage, block, ombre, heart, star, circle"
YARN, BUTTONS = "wool, cable knit, ribbed", "buttons, gold buttons, zip"

KINDS = (
    kind("TOPS", "T-SHIRTS", upper, "t-shirt, tee, top", fabric="cotton, linen, ribbed", sleeve="short sleeve, half sleeve, long sleeve",
         length=", cropped", pattern=PRINTED, neck="crewneck, v-neck, scoop neck, boat neck", pocket=", chest pocket",
         stitching=", tonal stitching"),
    kind("TOPS", "TANK TOPS", upper, "tank top, tank, top", fabric="cotton, satin, ribbed", sleeve="sleeveless",
         length=", cropped, longline", pattern=PRINTED, neck="crewneck, v-neck, scoop neck, square neck", pocket=", chest pocket"),
    kind("TOPS", "POLOS", upper, "polo, polo shirt, top", fabric="cotton, linen, ribbed", sleeve="short sleeve, long sleeve",
         length=", cropped", pattern=WOVEN, neck="spread collar", closure="placket, half zip", pocket=", chest pocket",
         hem=", ribbed hem"),
    kind("TOPS", "SHIRTS", upper, "shirt, button-up, top", fabric="cotton, satin, denim",
         sleeve="short sleeve, long sleeve, bell sleeve, sleeveless", length=", cropped, longline", pattern=WOVEN,
         neck="spread collar, band collar", closure="buttons", pocket=", chest pocket, chest pockets"),
    kind("SWEATERS", "CREWNECKS", upper, "sweater, pullover", fabric=YARN, sleeve="half sleeve, long sleeve", length=", cropped",
         pattern=KNIT + ", heart, star", neck="crewneck", hem=", ribbed hem", detail=", elbow patches"),
    kind("SWEATERS", "V-NECKS", upper, "sweater, pullover", fabric=YARN, sleeve="half sleeve, long sleeve, sleeveless",
         length=", cropped", pattern=KNIT, neck="v-neck", hem=", ribbed hem", pocket=", chest pocket, patch pockets"),
    kind("SWEATERS", "TURTLENECKS", upper, "sweater, pullover", fabric=YARN, sleeve="half sleeve, long sleeve, sleeveless",
         length=", cropped, longline", pattern=KNIT + ", heart, star", neck="turtleneck, mock neck", hem=", ribbed hem"),
    kind("SWEATERS", "CARDIGANS", upper, "cardigan, sweater", fabric=YARN, sleeve="half sleeve, long sleeve", length=", longline",
         pattern=KNIT, neck="v-neck, crewneck, shawl collar", closure=BUTTONS, pocket=", patch pockets", hem=", ribbed hem"),
    kind("SWEATERS", "HOODIES", upper, "hoodie, sweatshirt, pullover", fabric="cotton, shearling", sleeve="short sleeve, long sleeve",
         length=", cropped", pattern=PRINTED, neck="hood", closure=", zip", pocket=", kangaroo pocket", hem=", ribbed hem"),
    kind("JACKETS & COATS", "BOMBERS", upper, "bomber jacket, bomber, jacket", fabric="satin, leather, quilted, wool",
         sleeve="long sleeve", length=", cropped", pattern=WOVEN, neck="crewneck", closure="zip",
         pocket=", slant pockets, chest pockets, flap pockets", hem="ribbed hem"),
    kind("JACKETS & COATS", "BLAZERS", upper, "blazer, jacket", fabric="wool, linen, satin", sleeve="long sleeve, half sleeve",
         length=", longline", pattern=", trim, vertical stripes, checks, dots, zigzag", neck="notched lapels, shawl collar",
         closure="buttons, gold buttons, double-breasted", pocket=", flap pockets, patch pockets"),
    kind("JACKETS & COATS", "DENIM JACKETS", upper, "trucker jacket, jacket", fabric="denim", sleeve="long sleeve, sleeveless",
         length=", cropped", pattern=PRINTED, neck="spread collar, band collar", closure=BUTTONS,
         pocket=", chest pockets, flap pockets, slant pockets", stitching="tonal stitching, contrast stitching"),
    kind("JACKETS & COATS", "COATS", upper, "coat, overcoat", fabric="wool, quilted, leather, shearling", sleeve="long sleeve",
         length="knee-length, ankle-length", pattern=", trim, vertical stripes, checks, zigzag, block",
         neck="notched lapels, hood, band collar", closure="buttons, double-breasted, toggles, zip",
         pocket=", flap pockets, patch pockets", waist=", belt"),
    kind("DRESSES", "SHORT DRESSES", dress, "dress", fabric="cotton, satin, denim, ribbed",
         sleeve="sleeveless, short sleeve, long sleeve, bell sleeve", length="mini, knee-length", cut="a-line, pencil, pleated, tiered",
         pattern=WOVEN, neck="crewneck, v-neck, square neck, spread collar", waist=", belt, sash", hem=", ruffle"),
    kind("DRESSES", "LONG DRESSES", dress, "dress, gown", fabric="cotton, satin, linen, ribbed",
         sleeve="sleeveless, short sleeve, long sleeve, bell sleeve", length="midi, maxi", cut="a-line, pencil, pleated, tiered",
         pattern=WOVEN, neck="mock neck, v-neck, square neck, boat neck", waist=", belt, sash", hem=", slit"),
    kind("SKIRTS", "SHORT SKIRTS", skirt, "skirt", fabric="denim, leather, wool, satin", length="short, knee-length",
         cut="a-line, pencil, pleated, tiered", pattern=WOVEN, closure=", buttons, zip", pocket=", patch pockets",
         waist=", belt, drawstring", hem=", ruffle"),
    kind("SKIRTS", "LONG SKIRTS", skirt, "skirt", fabric="cotton, leather, wool, satin", length="midi, maxi",
         cut="a-line, pencil, pleated, tiered", pattern=WOVEN, closure=", gold buttons, zip", pocket=", slant pockets",
         waist=", belt, drawstring", hem=", slit"),
    kind("PANTS", "TROUSERS", trousers, "trousers, pants", fabric="wool, corduroy, leather, linen", length=", cropped",
         cut="skinny, straight-leg, wide-leg, flared", pattern=", trim, vertical stripes, checks, side stripes, zigzag, dots",
         pocket=", slant pockets, cargo pockets", waist=", belt, pleats", hem=", rolled cuffs"),
    kind("PANTS", "SWEATPANTS", trousers, "sweatpants, lounge pants, pants", fabric="cotton, shearling, ribbed", length=", cropped",
         cut="tapered, straight-leg, wide-leg", pattern=", trim, stripes, camouflage, side stripes, block, ombre, dots",
         pocket=", slant pockets, cargo pockets, patch pockets", waist="drawstring", hem=", ribbed cuffs"),
    kind("JEANS", "JEANS", trousers, "jeans, pants", fabric="denim", length=", cropped",
         cut="skinny, straight-leg, wide-leg, flared, tapered", pattern=", side stripes, block, ombre, flowers, checks, camouflage",
         pocket=", slant pockets, patch pockets, cargo pockets", waist=", belt", hem=", rolled cuffs", detail=", distressed",
         stitching="tonal stitching, contrast stitching"),
    kind("SHORTS", "SHORTS", trousers, "shorts", fabric="cotton, denim, linen, leather", length="thigh-length, knee-length",
         cut="straight-leg, wide-leg", pattern=WOVEN + ", side stripes, camouflage",
         pocket=", slant pockets, cargo pockets, patch pockets", waist=", belt, drawstring", hem=", rolled cuffs"),
    kind("SHOES", "SNEAKERS", sneaker, "sneakers, shoes", fabric="leather, canvas, satin", cut="low-top, high-top",
         pattern=", trim, side stripes, star, heart, dots, zigzag, camouflage, checks, stripes", closure="lace-up, straps, slip-on",
         sole="white sole, gum sole, black sole"),
    kind("SHOES", "BOOTS", boot, "boots", fabric="leather, satin, quilted", length="ankle, mid-calf, knee-high",
         pattern=", trim, stripes, checks, dots, flowers, zigzag, ombre", closure=", lace-up, zip, slip-on, buckle",
         heel="flat heel, block heel, stiletto heel, lug sole"),
    kind("SHOES", "HEELS", pump, "heels, pumps, shoes", fabric="leather, satin",
         pattern=", trim, stripes, checks, dots, flowers, zigzag, camouflage", strap=", ankle strap",
         toe="pointed toe, round toe, open toe", heel="kitten heel, wedge heel, block heel, stiletto heel", detail=", bow, studs"),
    kind("BAGS", "TOTE BAGS", tote, "tote, bag", fabric="canvas, leather, quilted", cut="wide, tall", pattern=PRINTED,
         closure=", zip, tab", strap="short handles, long handles", pocket=", front pocket", detail=", tassel, studs"),
    kind("BAGS", "BACKPACKS", backpack, "backpack, bag", fabric="canvas, leather, quilted", pattern=PRINTED, closure="zip, buckle, tab",
         pocket=", front pocket, two pockets", detail=", tassel, studs"),
    kind("BAGS", "SHOULDER BAGS", shoulder_bag, "shoulder bag, bag", fabric="leather, quilted, satin", cut="boxy, half-moon, round",
         pattern=WOVEN, closure="zip, turn-lock, buckle, tab", strap="chain strap, leather strap", detail=", tassel, studs, bow"),
    kind("HATS", "BEANIES", beanie, "beanie, hat", fabric=YARN, pattern=KNIT + ", heart, star, circle", hem=", folded cuff",
         detail=", pom-pom, ear flaps, bow"),
    kind("HATS", "CAPS", cap, "cap, hat", fabric="cotton, denim, leather, wool", pattern=PRINTED, hem="curved brim, flat brim",
         detail=", ear flaps, rope, studs", stitching=", contrast stitching"),
    kind("HATS", "BUCKET HATS", bucket, "bucket hat, hat", fabric="cotton, denim, quilted, shearling", pattern=PRINTED,
         hem="wide brim, narrow brim", detail=", cord, ribbon, bow", stitching=", contrast stitching"),
)
KIND_OF = {(each.category, each.subcategory): each for each in KINDS}

# ---------------------------------------------------------------- the catalogue and its captions

def catalogue(products, seed=0):
    """The first products of the endless catalogue of this seed, dealt to the sub-categories in turn; no two have the same caption."""
    made, taken = [], set()
    said = lambda product: {caption(product), caption(product._replace(phrasing=0))}  # nor may two differ in their phrasing only
    for number in range(products):
        chance, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
        product = invent(kind, number, seed, chance)
        while said(product) & taken:
            product = invent(kind, number, seed, chance)
        taken |= said(product)
        made.append(product)
    return made


def invent(kind, number, seed, chance):
    """A product of this kind, drawn by chance."""
    look = {name: chance.choice(values) for name, values in kind.options.items()}
    if look["pattern"] in GRAPHICS:
        look |= {name: "" for name in ("pocket", "closure") if "" in kind.options.get(name, ())}  # whose room the graphic takes
    colour = chance.choice(list(COLOURS))
    second = chance.choice([other for other, rgb in COLOURS.items() if math.dist(rgb, COLOURS[colour]) > 130])
    return Product(kind.category, kind.subcategory, number, seed, chance.randrange(1, 1 << 16), colour, second, **look)


def caption(product):
    """What there is to see, in a few sentences. The phrasing varies; what is said does not."""
    chance, noun = random.Random(product.phrasing), KIND_OF[product.category, product.subcategory].nouns
    first = chance.choice(("{cut} {fabric} {noun} in {colour}.", "{cut} {noun} in {colour} {fabric}.", "{colour} {cut} {fabric} {noun}."))
    if product.fabric in ("ribbed", "quilted"):
        first = "{cut} {fabric} {noun} in {colour}."
    cut = " ".join((product.length, product.sleeve, product.cut))
    said = [first.format(cut=cut, fabric=product.fabric, noun=chance.choice(noun), colour=product.colour)]
    said += [chance.choice(SENTENCES[value]).format(second=product.second) for value in (getattr(product, name) for name in SAID) if value]
    return " ".join([" ".join(said[0].split()).capitalize(), *said[1:]])


def draw(product, view=0, size=64):
    """The picture (PIL, RGB) of one view of a product."""
    canvas = Canvas(size, pose_of(product.seed, product.number, view))
    KIND_OF[product.category, product.subcategory].paint(canvas, product)
    return canvas.finish()

# ---------------------------------------------------------------- the catalogue on disk

class ToyError(ValueError):
    """A message for people, in one line."""


def make(out, products=4000, size=64, seed=0, views=(2, 2)):
    """
    Draw a catalogue into the folder `out`: images, and train.jsonl, val.jsonl and test.jsonl (80/10/10 by product).
    Each product has from views[0] to views[1] views. A folder that already holds this very catalogue is left as it is.
    """
    views = (views, views) if isinstance(views, int) else tuple(views)
    if products < 10:
        raise ToyError(f"products must be at least 10, to fill train, val and test, got {products}")
    if not 16 <= size <= 1024:
        raise ToyError(f"size must lie in [16, 1024], got {size}")
    if not (len(views) == 2 and 1 <= views[0] <= views[1]):
        raise ToyError(f"views must be 1 or more, or the least and the most, got {' '.join(map(str, views))}")
    out, version = Path(out), zlib.crc32(Path(__file__).read_bytes())
    settings = {"version": version, "products": products, "size": size, "seed": seed, "views": list(views)}
    if held(out, settings):
        return print(f"{out} already holds this toy catalogue: reused")
    out.mkdir(parents=True, exist_ok=True)
    (out / "toy.json").write_text(json.dumps(settings))
    (out / "images").mkdir(exist_ok=True)
    jobs, rows = [], {"train": [], "val": [], "test": []}
    for product in catalogue(products, seed):
        for view in range(random.Random(f"{seed} {product.number} views").randint(*views)):  # not `catalogue`'s key, which draws the fabric
            name = f"images/{product.number:05d}_{view}.png"
            jobs.append((product, view, size, out / name))
            rows[split_of(product.number)].append({"image": name, "caption": caption(product), "product_id": f"toy-{product.number:05d}",
                                                   "category": product.category, "subcategory": product.subcategory})
    draw_all(jobs)
    for split in rows:
        (out / f"{split}.partial").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
        os.replace(out / f"{split}.partial", out / f"{split}.jsonl")


def held(out, settings):
    """Whether the folder holds this very catalogue, whole; what is not ours to fill is refused."""
    if out.exists() and not out.is_dir():
        raise ToyError(f"{out} is a file, not a folder")
    mark = out / "toy.json"
    if mark.exists() and mark.read_text() != json.dumps(settings):
        raise ToyError(f"{out} holds another toy catalogue, {mark.read_text()}, not {json.dumps(settings)} (version: of toy.py): delete it, or choose another folder")
    if not mark.exists() and out.exists() and any(out.iterdir()):
        raise ToyError(f"{out} holds something else: choose an empty or a new folder")
    return all((out / f"{split}.jsonl").exists() for split in ("train", "val", "test"))


def split_of(number):
    """train, val or test: of ten products in a row, and of ten of one sub-category, one goes to val and one to test."""
    return {8: "val", 9: "test"}.get((number // len(KINDS) + 3 * (number % len(KINDS))) % 10, "train")


def save(job):
    """Draw one view and write it down."""
    product, view, size, path = job
    draw(product, view, size).save(path)


def draw_all(jobs):
    """Draw and save every job, on all processors."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers == 1 or len(jobs) < 200:
        return progress(map(save, jobs), len(jobs))
    with multiprocessing.Pool(workers) as pool:
        progress(pool.imap_unordered(save, jobs, chunksize=16), len(jobs))


def progress(steps, total):
    """Run through the steps and say how far they are: a moving line on a terminal, four plain lines elsewhere."""
    live = sys.stderr.isatty()
    for done, _ in enumerate(steps, 1):
        if done == total or done % max(1, total // (100 if live else 4)) == 0:
            print(f"drawing pictures: {done}/{total}", end="\r" if live and done < total else "\n", file=sys.stderr, flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw a fashion catalogue.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="toy", help="folder to fill")
    parser.add_argument("--products", type=int, default=4000, help="how many")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side")
    parser.add_argument("--views", type=int, nargs="+", default=[2], help="pictures of each product: a number, or the least and the most")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another catalogue")
    given = parser.parse_args(arguments)
    try:
        make(given.out, given.products, given.size, given.seed, given.views if len(given.views) > 1 else given.views[0])
    except (ToyError, OSError) as error:
        raise SystemExit(f"toy.py: {error}")
    except KeyboardInterrupt:
        raise SystemExit("toy.py: stopped")


if __name__ == "__main__":
    main()
