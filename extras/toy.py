"""
A drawn fashion catalogue, so that everything runs with no download.

    python -m extras.toy --out toy --products 4000 --size 64

The boutique is a table. A product is a row of KINDS with a shape and one value from each list, drawn by chance. MARKS
gives a value its sentence in the caption and the strokes that draw it. All that a caption says can be seen.

A stroke is "TOOL PAINT NUMBERS POINTS". A garment is about 100 wide or high and hangs about x = 0; x runs to the right,
y downwards. Heights from 0 to 100 stretch to the product's length; what lies above or below keeps its size. The tools:
    once R, half R, pair R    a closed outline: as it stands, as one with its mirror image, on both sides; R rounds it
    arm R                     a pair of sleeves: y runs down the sleeve from the shoulder, x across it
    line W, lines W           a line of width W: as it stands, on both sides
    beads R GAP               discs of radius R along a line
"""

import argparse
import cmath
import json
import math
import multiprocessing
import os
import random
import zlib
from collections import namedtuple
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from extras.runtime import UserError, run, whole_file

# --- The tables ---

Kind = namedtuple("Kind", "category subcategory nouns ending lists")
Product = namedtuple("Product", "seed number kind shape values pattern colour second wording")
Stroke = namedtuple("Stroke", "tool paint numbers points")


def table(text):
    """The rows of a table, as lists of cells."""
    return [[cell.strip() for cell in row.split("|")] for row in text.strip().splitlines()]


def strokes(text):
    """The strokes of a cell. A point is a complex number, so that to turn it is to multiply it."""
    found = []
    for row in filter(None, text.split(";")):
        tool, paint, *words = row.split()
        numbers = [float(word) for word in words if "," not in word] or [2]
        points = [complex(*map(float, word.split(","))) for word in words if "," in word]
        found.append(Stroke(tool, paint, numbers, points))
    return found


COLOURS = {
    "black": (44, 44, 50), "white": (250, 249, 246), "grey": (152, 155, 161), "navy": (36, 50, 98),
    "sky blue": (150, 200, 236), "blue": (58, 108, 196), "teal": (20, 128, 132), "green": (48, 134, 82),
    "mint": (168, 224, 200), "olive": (118, 118, 64), "yellow": (246, 206, 84), "orange": (238, 134, 54),
    "red": (208, 48, 54), "pink": (246, 172, 192), "burgundy": (118, 32, 58), "purple": (126, 80, 164),
    "brown": (120, 80, 54), "beige": (226, 206, 174),
}
FITTINGS = {"gold": (218, 172, 74), "silver": (206, 210, 216), "tan": (198, 140, 84), "leather": (96, 62, 42)}
FINE = 4  # pictures are drawn so many times larger, and then made smaller
BACKDROPS = ((243, 240, 235), (236, 240, 244), (244, 238, 240), (238, 242, 237), (241, 241, 243))

# A pattern, by its sentence: the width and height of the cell that repeats, and the strokes in this cell.
PATTERNS = {
    "Solid color, with no pattern.": (400, 400, ""), "Contrast trim in {}.": (400, 400, ""),
    "Horizontal stripes in {}.": (400, 11, "once second 0 -200,0 200,0 200,5 -200,5"),
    "Vertical stripes in {}.": (9, 400, "once second 0 -2,-200 2,-200 2,200 -2,200"),
    "Check pattern in {}.": (14, 14, "half mix 0 4,-7 4,7; half mix 0 7,-4 7,4; half second 0 4,-4 4,4"),
    "Polka dots in {}.": (13, 13, "half second 3 3,-3 3,3; once second 3 4,4 10,4 10,10 4,10"),
    "Zigzag pattern in {}.": (14, 12, "once second 0 -7,6 0,0 7,6 7,11 0,5 -7,11"),
    "Argyle pattern in {}.": (15, 22, "half second 0 0,-10 7,0 0,10"),
    "Floral pattern in {}.": (16, 14, "half second 5,-2 5,2; half second 2,-5 2,5; half base 1.3,-1.3 1.3,1.3"),
    "Lower half colorblocked in {}.": (400, 400, "once second 0 -200,0 200,0 200,200 -200,200"),
}

# To how much the heights from 0 to 100 stretch. The caption says "Hem at waist."; "low-top" is said before the noun.
HEMS = {"waist": 0, "hip": 15, "thigh": 29, "knee": 43, "calf": 57, "ankle": 72}
LENGTHS = HEMS | {"low-top": 0, "high-top": 34, "ankle-high": 14, "calf-high": 34, "knee-high": 58}

SHAPES = {name: strokes(drawing) for name, drawing in table("""
top | half cloth 0,-31 9,-31 21,-27 19,-12 19,50 20,114 0,115; half trim 1 20.2,110 20.5,115
tank | half cloth 0,-31 10,-32 15,-32 15,-20 20,-10 19,50 20,114 0,115; half trim 1 20.2,110 20.5,115
shirt | half cloth 0,-31 9,-31 21,-27 19,-12 18,6 20,106 11,114 0,115
knit | half cloth 0,-31 9,-31 22,-26 20,-12 21,50 20,114 0,115; half trim 1 21,105 20.5,115
jacket | half cloth 0,-31 9,-31 22,-27 20,-12 18,0 22,114 0,115; half trim 1 21.5,110 22,115
A-line dress | half cloth 0,-31 9,-31 19,-28 17,-12 14,0 31,114 0,117; half trim 0,111 29,109 31,114 0,117
pencil dress | half cloth 0,-31 9,-31 19,-28 17,-12 14,0 19,40 17,114 0,115; half trim 1 17.4,109 17,115
tiered dress | half cloth 0,-31 9,-31 19,-28 17,-12 14,0 23,50 20,51 33,114 0,117; line trim 3 -21.5,50 21.5,50
A-line skirt | half cloth 0,-28 15,-28 31,114 0,117; half trim 16,-29 16,-23; half trim 0,111 30,109 31,114 0,117
pencil skirt | half cloth 0,-28 15,-28 20,-4 17,114 0,115; half trim 16,-29 16,-23; half trim 1 17.2,109 17,115
tiered skirt | half cloth 0,-28 15,-28 27,56 24,58 33,114 0,117; half trim 16,-29 16,-23; line trim 3 -25,55 25,55
straight-leg pants | pair cloth 0,-28 16,-28 20,-4 18,114 5,114 1,3; half trim 16,-29 16,-23; lines trim 4 5,112 18,112
wide-leg pants | pair cloth 0,-28 16,-28 20,-4 29,114 4,114 1,3; half trim 16,-29 16,-23; lines trim 4 4,112 29,112
skinny pants | pair cloth 0,-28 16,-28 19,-4 12,114 5,114 1,3; half trim 16,-29 16,-23; lines trim 4 5,112 12,112
sneaker | once cloth 3 -43,138 -45,112 -41,-2 -10,-6 -3,94 38,119 48,129 48,138; once trim 26,138 29,114 38,119 48,138
boot | once cloth 5 -31,126 -28,99 -30,-8 0,-8 -3,96 28,118 46,128 46,146 14,146 -6,133; once trim 0,-9 0,0 -30,0 -30,-9
pointed-toe heel | once cloth 3 -31,128 -34,108 -29,101 -15,118 2,125 16,122 36,134 60,147 14,148 -6,136
round-toe heel | once cloth 3 -31,128 -34,108 -29,101 -15,118 2,125 14,120 34,122 46,131 48,147 14,148 -6,136
wide tote | half cloth 3 0,-30 33,-30 28,22 0,22; half trim 1 33.2,-31 32.6,-25
tall tote | half cloth 3 0,-38 22,-38 20,34 0,34; half trim 1 22.2,-39 22,-33
backpack | lines trim 6 16,-34 33,-20 33,16 22,34; line trim 4 -7,-44 -7,-55 7,-55 7,-44; half cloth 9 24,-46 27,36
boxy bag | half cloth 4 31,-16 31,26; half trim 3 31,18 31,26
half-moon bag | half cloth 20 33,-16 31,28; half trim 4 28,18 20,28
beanie | half cloth 8 12,-38 25,-31 32,-16 34,37; half trim 1 34,30 34.5,38
cap | once cloth 8 -38,12 -38,-10 -30,-30 -8,-41 12,-38 26,-22 30,8; line ink 1 -6,-40 -8,11
""")}

MARKS = table("""
short sleeve | | arm shade -6,-4 3,-7 7,-1 7,17 -7,17 -6,4; arm trim 1 7.3,13 7.3,17.5 -7.3,17.5 -7.3,13
long sleeve | | arm shade -6,-4 3,-7 7,-1 6,20 5,48 -5,48 -6,20; arm trim 1 5.4,43 5,49 -5,49 -5.4,43
bell sleeve | | arm shade -6,-4 3,-7 7,-1 6,20 13,42 -13,42 -6,20; arm trim 1 12,39 13,43 -13,43 -12,39
crewneck | Crewneck collar. | half inner 0,-32 9,-32 7,-25 0,-22; lines trim 3 9,-32 7,-25 0,-22
v-neck | V-neck collar. | half inner 0,-32 9,-32 0,-8; lines trim 3 9,-32 0,-8
square | Square neck collar. | half inner 0 0,-32 10,-32 10,-17 0,-17; lines trim 2.5 10,-32 10,-17 0,-17
turtleneck | Folded turtleneck collar. | half trim 0,-43 8,-43 10,-25 0,-22; line ink 1 -9,-33 9,-33
spread | Pointed spread collar. | half inner 0,-33 8,-33 0,-20; pair trim 1 0,-19 6,-35 10,-34 15,-24 9,-15
band | Narrow band collar. | half inner 0,-33 7,-33 0,-21; lines trim 5 8,-33 6,-26 0,-21
hood | Drawstring at hood. | half shade 6 14,-55 17,-24 0,-14; half inner 5 8,-47 9,-30 0,-20; lines light 2 4,-17 5,-3
lapels | Notched lapel collar. | half inner 0,-33 8,-33 0,0; pair shade 1 0,4 15,-15 11,-19 15,-23 10,-34 6,-33
shawl | Rounded shawl collar. | half inner 0,-33 8,-33 0,0; pair shade 3 0,4 13,-12 13,-24 9,-34 5,-33
buttons | Button closure at front. | line ink 1 2.5,-28 2.5,114; beads light 2 11 0,-25 0,112
zip | Zip closure at front. | line black 4 0,-30 0,114; beads silver 1 3 0,-30 0,114
placket | Two-button placket. | half trim 1 0,-24 3.5,-24 3.5,-2 0,-2; beads light 1.8 8 0,-14 0,-6
double | Double-breasted closure. | line ink 1 6,4 6,114; beads gold 2.2 12 7,6 7,112; beads gold 2.2 12 -7,6 -7,112
pocket | Patch pocket at chest. | once trim 1 4,-13 15,-13 15,-3 9.5,0 4,-3
pockets | Flap pockets at chest. | pair trim 1 5,-13 15,-13 15,-1 5,-1; pair shade 1 4,-14 16,-14 16,-10 10,-8 4,-10
flaps | Flap pockets at waist. | pair trim 1 5,100 17,100 17,105 5,105
kangaroo | Kangaroo pocket at waist. | half trim 1 0,94 8,94 15,104 15,106 0,106
belt | Belted at waist. | half leather 1 14.8,-3 14.8,3; half gold 1 5,-4 5,4; half leather 0 2,-2 2,2
bow | Bow at waist. | half light 14.5,-2 14.5,2; lines light 2.5 1,1 6,14; pair light 0,0 11,-7 11,7
low belt | Belt at waistband. | half leather 1 15.8,-29 16.3,-23; half gold 1 5,-30 5,-22; half leather 0 2,-28 2,-24
drawstring | Drawstring at waistband. | lines light 2 1.5,-26 5,-8; beads light 2 1 0,-26
button | Button at waistband. | beads silver 2.2 1 0,-26
hip pockets | Slant pockets at hips. | pair trim 1 8,-23 17,-23 19,-10
laces | Lace-up closure at front. | line light 2.6 -9,97 2,92; line light 2.6 -5,104 7,98; line light 2.6 1,111 13,105
straps | Two-strap closure at front. | once trim 1 -20,112 0,91 8,96 -10,120; once trim 1 -4,124 13,104 20,109 5,131
white sole | White rubber sole. | once white 3 -46,135 -47,147 51,147 52,135
gum sole | Gum rubber sole. | once tan 3 -46,135 -47,147 51,147 52,135
side zip | Zip closure at side. | line black 4 -16,-4 -16,122; beads silver 1 3 -16,-4 -16,122
buckle | Buckle closure at ankle. | once leather 1 -31,101 1,101 4,109 -32,109; once gold -21,98 -10,98 -10,112 -21,112
block | Chunky block heel. | once trim 1 -32,124 -31,148 -17,148 -14,132
stiletto | Slender stiletto heel. | once trim 1 -32,124 -31,148 -28,148 -20,132
wedge | Solid wedge heel. | once trim 1 -32,124 -31,148 40,148 14,145 -6,133
ankle strap | Strap at ankle. | line trim 3 -33,108 -34,94 -31,90 -23,88 -15,90 -12,94 -15,98 -23,100 -31,98 -34,94
toe bow | Bow at toe. | once light 1 20,124 10,114 8,128; once light 1 20,124 32,116 31,130; beads light 4 1 20,124
short handles | Short carry handles at top. | line trim 4 -13,-20 -13,-44 -8,-48 8,-48 13,-44 13,-20
long handles | Long shoulder handles at top. | line trim 4 -13,-20 -12,-66 -7,-74 7,-74 12,-66 13,-20
face pocket | Single patch pocket at face. | half trim 3 16,2 16,19
face pockets | Twin patch pockets at face. | pair trim 2,2 18,2 18,19 2,19
chain strap | Gold-tone chain strap. | beads gold 2 4.4 -26,-14 -23,-50 -14,-60 14,-60 23,-50 26,-14
leather strap | Brown leather strap. | line leather 4 -26,-14 -23,-50 -14,-60 14,-60 23,-50 26,-14
face zip | Zip closure at face. | line black 4 -20,-6 20,-6; beads silver 1 3 -20,-6 20,-6; beads gold 2 1 20,-6
large flap | Flap with buckle. | half shade 8 25,-46 29,-14 0,-10; half leather 4,-24 4,-2; half gold 6,-13 6,-5
buckle flap | Flap with leather buckle. | half shade 6 28,-18 27,6 0,10; half leather 1 4,-8 4,17; half gold 0 6,4 6,13
turn-lock | Flap with gold-tone turn-lock. | half shade 6 28,-18 27,6 0,10; half gold 1 6,3 6,13
folded cuff | Wide folded cuff. | half trim 3 0,20 35,18 36,36 0,39
pom-pom | Fluffy pom-pom at top of crown. | half light 10 10,-56 10,-36
ear flaps | Ear flaps with leather ties at sides. | lines leather 2.4 27,50 28,66; pair trim 5 17,32 33,32 32,54 22,54
curved brim | Curved brim at front. | once trim 3 -6,12 10,4 30,3 50,12 56,26 46,20 24,14
flat brim | Flat brim at front. | once trim -6,10 28,5 58,8 58,13 -2,16
patch | Square patch at front. | once light 1 4,-22 20,-22 22,-6 4,-6
crown button | Button at crown. | beads trim 3.4 1 -6,-41
""")
STROKES = {value: strokes(drawing) for value, _, drawing in MARKS}
SENTENCES = {value: f"Hem at {value}." for value in HEMS} | {value: text for value, text, _ in MARKS if text}

# Category, sub-category, nouns (the last fits others too), how its shapes end, then lists of values; "-" draws nothing.
KINDS = [Kind(*row[:4], [values.split(", ") for values in row[4:]]) for row in table("""
TOPS | T-SHIRTS | T-shirt, tee, top | top | short sleeve, long sleeve | waist, hip | -, pocket | crewneck, v-neck
TOPS | TANK TOPS | tank top, tank, top | tank | sleeveless | waist, hip, thigh | crewneck, v-neck, square
TOPS | POLOS | polo shirt, polo, top | top | short sleeve, long sleeve | waist, hip | -, pocket | placket | spread
TOPS | SHIRTS | shirt, top | shirt | short sleeve, long sleeve | hip, thigh | buttons | pocket, pockets | spread, band
SWEATERS | CREWNECKS | sweater, pullover | knit | short sleeve, long sleeve | waist, hip, thigh | crewneck
SWEATERS | TURTLENECKS | sweater, pullover | knit | short sleeve, long sleeve | waist, hip, thigh | turtleneck
SWEATERS | CARDIGANS | cardigan, sweater | knit | short sleeve, long sleeve | hip, thigh | buttons | v-neck, shawl
SWEATERS | HOODIES | hoodie, sweatshirt, sweater | knit | short sleeve, long sleeve | waist, hip | -, kangaroo | hood
JACKETS | BOMBERS | bomber, jacket | knit | long sleeve | waist, hip | zip | -, flaps, pockets | crewneck
JACKETS | BLAZERS | blazer, jacket | jacket | long sleeve | hip, thigh | buttons, double | -, flaps | lapels, shawl
JACKETS | COATS | coat, jacket | jacket | long sleeve | knee, ankle | buttons, double, zip | flaps | lapels, hood, band
JACKETS | VESTS | vest, gilet | jacket | sleeveless | waist, hip, thigh | buttons, zip | -, flaps | v-neck, hood, band
DRESSES | SHORT DRESSES | dress | dress | sleeveless, short sleeve | thigh, knee | spread, v-neck, square | -, belt, bow
DRESSES | LONG DRESSES | gown, dress | dress | sleeveless, bell sleeve | calf, ankle | square, v-neck | -, belt, bow
SKIRTS | SHORT SKIRTS | skirt | skirt | thigh, knee | -, buttons, zip | button, low belt, drawstring
SKIRTS | LONG SKIRTS | skirt | skirt | calf, ankle | -, buttons, zip | button, low belt, drawstring
PANTS | TROUSERS | trousers, pants | pants | calf, ankle | -, hip pockets | button, low belt
PANTS | SWEATPANTS | sweatpants, lounge pants, pants | pants | calf, ankle | -, hip pockets | drawstring
SHORTS | SHORTS | shorts | -leg pants | thigh, knee | -, hip pockets | button, low belt, drawstring
SHOES | SNEAKERS | sneakers, shoes | sneaker | low-top, high-top | laces, straps | white sole, gum sole
SHOES | BOOTS | boots, shoes | boot | ankle-high, calf-high, knee-high | side zip, buckle | block, stiletto, wedge
SHOES | HEELS | heels, pumps, shoes | heel | block, stiletto, wedge | ankle strap, toe bow
BAGS | TOTE BAGS | tote bag, tote, bag | tote | -, face pocket, face pockets | short handles, long handles
BAGS | BACKPACKS | backpack, bag | backpack | face pocket, face pockets | face zip, large flap
BAGS | SHOULDER BAGS | shoulder bag, bag | bag | chain strap, leather strap | face zip, buckle flap, turn-lock
HATS | BEANIES | beanie, hat | beanie | pom-pom, ear flaps | -, folded cuff
HATS | CAPS | cap, hat | cap | patch, crown button | curved brim, flat brim
""")]


# --- Products and their captions ---


def catalogue(products, seed=0):
    """The first products of this seed's catalogue, of each kind in turn. No two say the same, even in other words."""
    made, taken = [], set()
    for number in range(products):
        chance, kind, said = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)], None
        while said is None or said & taken:
            pattern, colour = chance.choice(list(PATTERNS)), chance.choice(list(COLOURS))
            second = chance.choice([name for name in COLOURS if math.dist(COLOURS[name], COLOURS[colour]) > 120])
            shape = chance.choice([name for name in SHAPES if name.endswith(kind.ending)])
            values = [chance.choice(values) for values in kind.lists]
            product = Product(seed, number, kind, shape, values, pattern, colour, second, chance.randrange(12))
            said = {caption(product), caption(product._replace(wording=0))}
        taken |= said
        made.append(product)
    return made


def caption(product):
    """What there is to see, in a few sentences. `wording` chooses among ways to say the same."""
    wording, values = product.wording, [value for value in product.values if value != "-"]
    nouns, cut = product.kind.nouns.split(", "), product.shape.split()[:-1]
    words = [*cut, *(value for value in values if value not in SENTENCES), nouns[wording % len(nouns)]]
    first = " ".join([*words, "in", product.colour] if wording % 4 else [product.colour, *words])
    rest = [*(SENTENCES[value] for value in values if value in SENTENCES), product.pattern.format(product.second)]
    return " ".join([first[0].upper() + first[1:] + ".", *(rest if wording % 2 else rest[::-1])])


# --- Pictures ---


def draw(product, view=0, size=64):
    """The picture (PIL, RGB) of one view of a product. The pose differs between the views; view 0 is nearly upright."""
    chance, wild = random.Random(f"{product.seed} {product.number} {view}"), 1.0 if view else 0.3
    arm, turn, share = chance.uniform(0.2, 0.55), wild * chance.uniform(-0.2, 0.2), 0.9 - wild * chance.uniform(0, 0.14)
    length = next((LENGTHS[value] for value in product.values if value in LENGTHS), 100)
    length -= 16 * product.shape.endswith(("skirt", "pants"))  # these hang from the waist
    found = SHAPES[product.shape] + [stroke for value in product.values for stroke in STROKES.get(value, [])]
    found.sort(key=lambda stroke: stroke.tool != "arm")  # sleeves lie behind
    lines = [(stroke, line) for stroke in found for line in placed(stroke, length, arm)]
    canvas = Canvas(product, lines, cmath.rect(1, turn), share, FINE * size)
    for stroke, line in lines:
        canvas.draw(stroke, line)
    backdrop, garment = chance.choice(BACKDROPS), canvas.picture.reduce(FINE)
    picture, alpha = Image.new("RGB", garment.size, backdrop), garment.getchannel("A")
    shadow = ImageChops.offset(alpha, 0, round(0.025 * size)).filter(ImageFilter.GaussianBlur(0.03 * size))
    picture.paste(mixed(backdrop, (90, 90, 110), 0.25), mask=shadow)
    picture.paste(garment, mask=alpha)
    return picture


def placed(stroke, length, arm):
    """The lines of a stroke on a product of this length, whose sleeves are spread by this angle."""
    if stroke.tool == "arm":
        points = [17 - 21j + cmath.rect(1, -arm) * z for z in stroke.points]
    else:
        points = [complex(z.real, z.imag + (length / 100 - 1) * min(max(z.imag, 0), 100)) for z in stroke.points]
    mirrored = [-z.conjugate() for z in points]
    if stroke.tool == "half":
        return [points + [z for z in reversed(mirrored) if z.real]]
    return [points, mirrored] if stroke.tool in ("pair", "arm", "lines") else [points]


def rounded(points, radius):
    """The closed outline with its corners rounded."""
    curve = []
    for before, corner, after in zip(points[-1:] + points, points, points[1:] + points[:1]):
        start, end = (corner + (z - corner) * min(0.5, radius / max(abs(z - corner), 1e-6)) for z in (before, after))
        curve += [(1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t * t * end for t in (0, 0.25, 0.5, 0.75, 1)]
    return curve


def mixed(colour, other, share):
    """The colour at this share of the way to the other."""
    return tuple(round(a + share * (b - a)) for a, b in zip(colour, other))


class Canvas:
    """A picture FINE times as large as wanted, on which strokes are laid one over the other."""

    def __init__(self, product, lines, turn, share, side):
        base, second = COLOURS[product.colour], COLOURS[product.second]
        ink = mixed(base, (255, 255, 255), 0.36) if sum(base) < 230 else mixed(base, (20, 16, 30), 0.46)
        self.paints = COLOURS | FITTINGS | {"base": base, "second": second, "ink": ink, "mix": mixed(base, second, 0.5)}
        self.paints |= {"inner": mixed(base, (0, 0, 0), 0.5), "light": COLOURS["white" if sum(base) < 540 else "black"]}
        self.paints["trim"] = second if "trim" in product.pattern else mixed(base, ink, 0.22)
        self.picture = Image.new("RGBA", (side, side), (*ink, 0))
        turned = [turn * z for _, line in lines for z in line]
        xs, ys = [z.real for z in turned], [z.imag for z in turned]
        self.scale = share * side / max(max(xs) - min(xs), max(ys) - min(ys))
        self.factor = self.scale * turn  # a point z is drawn at origin + factor * z
        self.origin = (side + side * 1j - self.scale * complex(min(xs) + max(xs), min(ys) + max(ys))) / 2
        body = [z.imag for stroke, line in lines if stroke.paint == "cloth" for z in line]
        self.weave((min(body) + max(body)) / 2 * 1j, *PATTERNS[product.pattern])

    def weave(self, middle, width, height, cell):
        """Make the paints "cloth" and "shade", with a pattern that repeats from this point."""
        cloth, reach = Image.new("RGBA", self.picture.size, self.paints["base"]), 0.75 * self.picture.width / self.scale
        pen, columns, rows = ImageDraw.Draw(cloth), int(reach / width) + 1, int(reach / height) + 1
        corners = [complex(i * width, j * height) for i in range(-columns, columns + 1) for j in range(-rows, rows + 1)]
        for stroke in strokes(cell):
            outline = rounded([self.factor * z for z in placed(stroke, 100, 0)[0]], stroke.numbers[0] * self.scale)
            for at in [self.origin + self.factor * (middle + corner) for corner in corners]:
                pen.polygon([(z.real + at.real, z.imag + at.imag) for z in outline], self.paints[stroke.paint])
        self.paints["cloth"] = cloth
        self.paints["shade"] = Image.blend(cloth, Image.new("RGBA", cloth.size, self.paints["ink"]), 0.16)

    def draw(self, stroke, line):
        """Lay one line of a stroke on the picture."""
        pen, paint, ink = ImageDraw.Draw(self.picture), self.paints[stroke.paint], self.paints["ink"]
        line, size = [self.origin + self.factor * z for z in line], stroke.numbers[0] * self.scale
        if stroke.tool in ("line", "lines"):
            points, rim = [(z.real, z.imag) for z in line], 0 if stroke.paint == "ink" else self.scale
            pen.line(points, ink, round(size + rim), joint="curve")
            pen.line(points, paint, round(size), joint="curve")
        elif stroke.tool == "beads":
            for a, b in zip(line, line[1:] or line):
                steps = max(1, round(abs(b - a) / self.scale / stroke.numbers[1]))
                for z in (a + (b - a) * i / steps for i in range(steps + 1)):
                    pen.circle((z.real, z.imag), size, paint, ink, int(0.25 * size))
        else:
            outline = [(z.real, z.imag) for z in rounded(line, size)]
            if stroke.paint in ("cloth", "shade"):
                mask = Image.new("L", self.picture.size)
                ImageDraw.Draw(mask).polygon(outline, 255)
                self.picture.paste(paint, mask=mask)
            else:
                pen.polygon(outline, paint)
            pen.line(outline + outline[:2], ink, round(1.3 * self.scale), joint="curve")


# --- The catalogue on disk ---


def make(folder, products=4000, size=64, views=(1, 3), seed=0):
    """Draw a catalogue into a folder: images/, {train,val,test}.jsonl (80/10/10 by product), and last toy.json."""
    for flag, low, value, high in ("products", 10, products, 100_000), ("size", 16, size, 1024), ("views", 1, *views):
        if not low <= value <= high:
            raise UserError(f"--{flag}: must lie in [{low}, {high}], got {value}", status=2)
    folder, jobs, files = Path(folder), [], {"train.jsonl": "", "val.jsonl": "", "test.jsonl": ""}
    for product in catalogue(products, seed):
        split = {8: "val", 9: "test"}.get(product.number % 10, "train")  # of 27 kinds in turn: 80/10/10 of each
        for view in range(random.Random(f"{seed} {product.number} views").randint(*views)):
            name = f"images/{product.number:05d}_{view}.png"
            row = {"image": name, "caption": caption(product), "product_id": f"toy-{product.number:05d}",
                   "category": product.kind.category, "subcategory": product.kind.subcategory}
            files[f"{split}.jsonl"] += json.dumps(row) + "\n"
            jobs.append((product, view, size, folder / name))
    settings = {"products": products, "size": size, "views": list(views), "seed": seed}
    files["toy.json"] = json.dumps(settings | {"version": zlib.crc32(Path(__file__).read_bytes())})
    if is_finished(folder, files, jobs):
        return print(f"{folder}: already holds this toy catalogue; reused")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "toy.unfinished") as file:
        file.write(files["toy.json"].encode())
    (folder / "toy.json").unlink(missing_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    with multiprocessing.Pool(os.cpu_count()) as pool:
        list(tqdm(pool.imap_unordered(save, jobs, chunksize=16), "drawing", len(jobs), disable=None))
    for name, text in files.items():
        with whole_file(folder / name) as file:
            file.write(text.encode())
    (folder / "toy.unfinished").unlink()


def is_finished(folder, files, jobs):
    """Whether the folder holds this very catalogue. One that holds something else is refused."""
    marks = [mark for mark in (folder / "toy.json", folder / "toy.unfinished") if mark.exists()]
    if marks and marks[0].read_text(errors="replace") == files["toy.json"]:
        return all(path.exists() for path in [folder / name for name in files] + [path for *_, path in jobs])
    if marks or folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds {'another toy catalogue' if marks else 'something else'}; remove it or "
                        "use a new folder (train.py --data trains on any that is there)")
    return False


def save(job):
    """Draw one view and write it to its file."""
    product, view, size, path = job
    try:
        draw(product, view, size).save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw a fashion catalogue.")
    parser.add_argument("--out", dest="folder", default="toy", help="folder to fill (default: %(default)s)")
    parser.add_argument("--products", type=int, default=4000, help="number of products (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default: %(default)s)")
    parser.add_argument("--views", type=int, nargs=2, default=(1, 3), help="least and most pictures of a product")
    parser.add_argument("--seed", type=int, default=0, help="for another catalogue (default: %(default)s)")
    make(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run(main)
