"""The world of the scenes: what there is, where, and how it looks. The language is in training/scene_captions.py.

A scene is a plain background with 1 to 4 flat objects on it. All coordinates are fractions of the canvas side in [0,
1], x to the right and y downwards. Written to disk by `python -m training.scenes OUT_DIR`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# Every two of these are at least 25 CIE Lab units apart, each of them and any background too, every two backgrounds at
# least 14 (checked in tests/training/test_scenes.py).
COLOURS: dict[str, RGB] = {
    "red": (215, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (245, 205, 0),
    "green": (20, 145, 55),
    "cyan": (0, 190, 200),
    "blue": (25, 65, 205),
    "purple": (130, 35, 170),
    "pink": (250, 125, 185),
    "brown": (120, 70, 30),
    "black": (25, 25, 25),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "grey": (200, 200, 200),
    "beige": (240, 228, 205),
    "light blue": (205, 225, 245),
    "light green": (208, 238, 208),
}
# Radius of each size. At 64 pixels the objects are about 14, 20 and 27 pixels wide: areas 1 : 2.1 : 3.8. Four large
# ones still fit.
SIZES: dict[str, float] = {"small": 0.11, "medium": 0.16, "large": 0.215}
TEXTURES: dict[str, float] = {"solid": 4, "striped": 1, "dotted": 1, "hollow": 1}  # name: how often

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
BORDER = 0.016  # of the canvas that stays free: 1 pixel at 64
GAP = 0.03  # the least distance of two objects' boxes: 2 pixels at 64
SUPERSAMPLE = 4

# How many objects of each kind, and how often. Counts 2 to 4 of one kind teach counting, two kinds teach relations and
# binding.
LAYOUTS: dict[tuple[int, ...], float] = {
    (1,): 15,
    (2,): 10,
    (3,): 10,
    (4,): 10,
    (1, 1): 25,
    (1, 2): 8,
    (1, 3): 5,
    (2, 2): 5,
    (1, 1, 1): 7,
    (1, 1, 2): 3,
    (1, 1, 1, 1): 2,
}
RELATED_SHARE = 0.9  # of the scenes with two kinds of object: placed so that a relation holds


def _arc(cx: float, cy: float, radius: float, start: float, stop: float, points: int) -> list[Point]:
    """Points on a circle, angles in degrees."""
    angles = [math.radians(start + (stop - start) * i / (points - 1)) for i in range(points)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    radii = (1.12, 0.44)  # about a pentagram (inner radius 0.43)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _heart() -> list[Point]:
    """The classic parametric heart, x = 16 sin^3 t."""
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 15, -y / 15))
    return points


def _crescent() -> list[Point]:
    """A disc less a disc of radius 0.8 that lies 0.55 to the right; their edges meet at (0.602, +-0.798)."""
    outer = math.degrees(math.atan2(0.798, 0.602))
    inner = math.degrees(math.atan2(0.798, 0.602 - 0.55))
    return _arc(0, 0, 1.05, outer, 360 - outer, 32) + _arc(0.55, 0, 0.8, 360 - inner, inner, 24)


def _centred(points: Sequence[Point]) -> tuple[Point, ...]:
    """Move the middle of the bounding box to the origin: an object's (x, y) is the middle of its box."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    dx, dy = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return tuple((x - dx, y - dy) for x, y in points)


# Outlines in units of the radius. Their boxes are no wider or higher than 2.2 and all look about equally large.
_ARM = 0.3  # half the width of the cross's arms
SHAPES: dict[str, tuple[Point, ...]] = {
    "circle": _centred(_arc(0, 0, 1, 0, 360, 49)[:-1]),
    "square": _centred([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _centred([(0, -0.9), (1.05, 0.9), (-1.05, 0.9)]),
    "star": _centred(_star()),
    "heart": _centred(_heart()),
    "diamond": _centred([(0, -1.08), (0.66, 0), (0, 1.08), (-0.66, 0)]),
    "cross": _centred(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
    "crescent": _centred(_crescent()),
}
# Half the width and height of the box of each shape and size, in fractions of the canvas side.
HALF_BOX: dict[tuple[str, str], Point] = {
    (shape, size): (max(x for x, _ in outline) * radius, max(y for _, y in outline) * radius)
    for shape, outline in SHAPES.items()
    for size, radius in SIZES.items()
}

PAIRS: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# A fixed fifth of the pairs, whatever the seed, so that every scenes data set tests the same unseen combinations: two
# colours of each shape, one or two shapes of each colour.
HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape) for c, colour in enumerate(COLOURS) for s, shape in enumerate(SHAPES) if (c + 3 * s) % 5 == 3
)
SEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True, order=True)
class Kind:
    """What one object looks like: keys of SHAPES, COLOURS, SIZES and TEXTURES."""

    shape: str
    colour: str
    size: str
    texture: str


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; (x, y) is the middle of its bounding box."""

    kind: Kind
    x: float
    y: float

    @property
    def box(self) -> Box:
        """Bounding box in fractions of the canvas side."""
        half_width, half_height = HALF_BOX[self.kind.shape, self.kind.size]
        return (self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height)


@dataclass(frozen=True)
class Scene:
    """A background (key of BACKGROUNDS) and objects; different kinds in it have different (colour, shape) pairs."""

    background: str
    objects: tuple[SceneObject, ...]

    @property
    def groups(self) -> dict[Kind, tuple[SceneObject, ...]]:
        """The objects by kind, kinds in drawing order."""
        groups: dict[Kind, tuple[SceneObject, ...]] = {}
        for item in self.objects:
            groups[item.kind] = (*groups.get(item.kind, ()), item)
        return groups

    def to_json(self) -> str:
        """`{"background": ..., "objects": [{"shape", "colour", "size", "texture", "x", "y"}, ...]}`."""
        objects = [{**asdict(item.kind), "x": item.x, "y": item.y} for item in self.objects]
        return json.dumps({"background": self.background, "objects": objects})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """The scene that `to_json` wrote, exactly."""
        data = json.loads(text)
        return cls(
            data["background"],
            tuple(
                SceneObject(Kind(o["shape"], o["colour"], o["size"], o["texture"]), o["x"], o["y"])
                for o in data["objects"]
            ),
        )


def enclosing_box(objects: Iterable[SceneObject]) -> Box:
    """The smallest box around all objects."""
    lefts, tops, rights, bottoms = zip(*(item.box for item in objects), strict=True)
    return (min(lefts), min(tops), max(rights), max(bottoms))


def relation_between(a: Iterable[SceneObject], b: Iterable[SceneObject]) -> str | None:
    """How objects `a` lie to objects `b`: "left", "right", "above", "below", or None where that is open to argument.

    A is left of B only if the whole of A lies left of the whole of B with a gap, and the two stand side by side: their
    boxes share at least half of the lower one's height. So never two relations hold at once, and the opposite is
    plainly false.
    """
    box_a, box_b = enclosing_box(a), enclosing_box(b)
    for axis, names in ((0, ("left", "right")), (1, ("above", "below"))):
        other = 1 - axis
        shared = min(box_a[other + 2], box_b[other + 2]) - max(box_a[other], box_b[other])
        least = min(box_a[other + 2] - box_a[other], box_b[other + 2] - box_b[other]) / 2
        if shared < least:
            continue
        if box_a[axis + 2] + GAP <= box_b[axis]:
            return names[0]
        if box_b[axis + 2] + GAP <= box_a[axis]:
            return names[1]
    return None


def sample_scene(rng: random.Random, *, unseen: bool = False) -> Scene:
    """Draw one scene at random; the same state of `rng` gives the same scene.

    `unseen=False`: no (colour, shape) pair of HELD_OUT_PAIRS occurs (training, validation).
    `unseen=True`: at least one does (test); the other kinds are of any pair.
    """
    background = rng.choice(list(BACKGROUNDS))
    while True:  # a layout that does not fit (three large objects left of another) is drawn afresh; most fit at once
        counts = list(rng.choices(list(LAYOUTS), weights=list(LAYOUTS.values()))[0])
        rng.shuffle(counts)
        kinds = _sample_kinds(rng, len(counts), unseen)
        related = len(kinds) == 2 and rng.random() < RELATED_SHARE
        scene = place(rng, background, kinds, counts, rng.choice(list(OPPOSITE)) if related else None)
        if scene is not None:
            return scene


def _sample_kinds(rng: random.Random, number: int, unseen: bool) -> list[Kind]:
    """Kinds with distinct (colour, shape) pairs, one of them held out if `unseen`, none otherwise."""
    if unseen:
        first = rng.choice(HELD_OUT_PAIRS)
        pairs = [first, *rng.sample([pair for pair in PAIRS if pair != first], number - 1)]
        rng.shuffle(pairs)
    else:
        pairs = rng.sample(SEEN_PAIRS, number)
    return [Kind(shape, colour, *_sample_size_and_texture(rng)) for colour, shape in pairs]


def sample_look(rng: random.Random, colour: str) -> Kind:
    """A kind of that colour, of a shape that it has in training, and of any size and texture."""
    shape = rng.choice([shape for seen, shape in SEEN_PAIRS if seen == colour])
    return Kind(shape, colour, *_sample_size_and_texture(rng))


def _sample_size_and_texture(rng: random.Random) -> tuple[str, str]:
    return rng.choice(list(SIZES)), rng.choices(list(TEXTURES), weights=list(TEXTURES.values()))[0]


def place(
    rng: random.Random, background: str, kinds: Sequence[Kind], counts: Sequence[int], relation: str | None = None
) -> Scene | None:
    """`counts[i]` objects of `kinds[i]` at random places, or None if they do not fit.

    `relation`: how kinds[0] lies to kinds[1] then, as `relation_between` names it; None leaves that to chance.
    """
    related = relation is not None
    placed = _place_related(rng, kinds, counts, relation) if related else _place_freely(rng, kinds, counts)
    return None if placed is None else Scene(background, tuple(placed))


def _place_freely(rng: random.Random, kinds: Sequence[Kind], counts: Sequence[int]) -> list[SceneObject] | None:
    """Anywhere on the canvas, or one in each quarter: chance alone would hardly ever fit four large objects."""
    wanted = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    quarters = [(x, y, x + 0.5, y + 0.5) for x in (0, 0.5) for y in (0, 0.5)]
    rng.shuffle(quarters)
    return _throw(rng, wanted, [(0, 0, 1, 1)] * len(wanted)) or _throw(rng, wanted, quarters[: len(wanted)])


def _place_related(
    rng: random.Random, kinds: Sequence[Kind], counts: Sequence[int], relation: str
) -> list[SceneObject] | None:
    """Two groups on the two sides of a cut through the canvas, so that the relation holds between them."""
    axis = 0 if relation in ("left", "right") else 1
    order = (0, 1) if relation in ("left", "above") else (1, 0)  # which group comes first along the axis
    widths = [2 * (HALF_BOX[kinds[i].shape, kinds[i].size][axis] + BORDER) for i in order]
    if sum(widths) + GAP > 1:
        return None
    for _ in range(10):
        cut = rng.uniform(widths[0], 1 - widths[1] - GAP)
        near = (0, 0, cut, 1) if axis == 0 else (0, 0, 1, cut)
        far = (cut + GAP, 0, 1, 1) if axis == 0 else (0, cut + GAP, 1, 1)
        first, second = (
            _throw(rng, [kinds[i]] * counts[i], [region] * counts[i])
            for i, region in zip(order, (near, far), strict=True)
        )
        if first and second and relation_between(first, second):
            return first + second if order == (0, 1) else second + first
    return None


def _throw(rng: random.Random, kinds: Sequence[Kind], regions: Sequence[Box]) -> list[SceneObject] | None:
    """Objects at random places inside their regions and clear of each other; None if that keeps failing."""
    for _ in range(8):
        placed: list[SceneObject] = []
        for kind, region in zip(kinds, regions, strict=True):
            item = _throw_one(rng, kind, region, placed)
            if item is None:
                break
            placed.append(item)
        else:
            return placed
    return None


def _throw_one(rng: random.Random, kind: Kind, region: Box, placed: Sequence[SceneObject]) -> SceneObject | None:
    half_width, half_height = (half + BORDER for half in HALF_BOX[kind.shape, kind.size])
    left, right = region[0] + half_width, region[2] - half_width
    top, bottom = region[1] + half_height, region[3] - half_height
    if left > right or top > bottom:
        return None
    for _ in range(12):
        # Rounded, so that the JSON on disk is the very scene that was drawn.
        item = SceneObject(kind, round(rng.uniform(left, right), 4), round(rng.uniform(top, bottom), 4))
        if not any(_too_close(item.box, other.box) for other in placed):
            return item
    return None


def _too_close(a: Box, b: Box) -> bool:
    apart_x = max(b[0] - a[2], a[0] - b[2])
    apart_y = max(b[1] - a[3], a[1] - b[3])
    return max(apart_x, apart_y) < GAP


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """The scene as an RGB image of `image_size` x `image_size` pixels, drawn SUPERSAMPLE times larger and averaged."""
    side = image_size * SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for item in scene.objects:
        mask, ink = _stamp(item.kind.shape, item.kind.size, item.kind.texture, side)
        patch = Image.new("RGB", mask.size, COLOURS[item.kind.colour])
        if ink is not None:
            patch.paste(_ink_colour(COLOURS[item.kind.colour]), mask=ink)
        corner = (round(item.x * side - mask.width / 2), round(item.y * side - mask.height / 2))
        canvas.paste(patch, corner, mask)
    return canvas.reduce(SUPERSAMPLE)


@lru_cache(maxsize=len(SHAPES) * len(SIZES) * len(TEXTURES))
def _stamp(shape: str, size: str, texture: str, side: int) -> tuple[Image.Image, Image.Image | None]:
    """What an object covers of its bounding box, and where its texture is inked: masks of 0 and 255, supersampled.

    A hollow object is a rim of even width. Stripes and dots keep clear of a thin rim, or white ink on a white
    background would eat the outline.
    """
    radius = SIZES[size] * side
    half_width, half_height = (math.ceil(side * half) for half in HALF_BOX[shape, size])
    points = [(half_width + x * radius, half_height + y * radius) for x, y in SHAPES[shape]]
    body = Image.new("L", (2 * half_width + 1, 2 * half_height + 1))
    ImageDraw.Draw(body).polygon(points, fill=255)
    if texture == "solid":
        return body, None
    # 1.4 pixels at 64 for a small hollow object, or it fades away; 0.9 around a pattern.
    rim_width = max(0.022 * side, 0.2 * radius) if texture == "hollow" else 0.014 * side
    rim = Image.new("L", body.size)
    ImageDraw.Draw(rim).line([*points, *points[:2]], fill=255, width=round(2 * rim_width), joint="curve")
    if texture == "hollow":
        return ImageChops.darker(body, rim), None
    return body, ImageChops.subtract(_pattern(texture, radius, body.size, side), rim)


def _pattern(texture: str, radius: float, box: tuple[int, int], side: int) -> Image.Image:
    """Stripes or dots (255) all over a box of supersampled pixels; period 4 pixels at 64 for the small size."""
    pattern = Image.new("L", box)
    pen = ImageDraw.Draw(pattern)
    width, height = box
    period = max(0.062 * side, 0.42 * radius)
    steps = range(-math.ceil((width + height) / period), math.ceil((width + height) / period) + 1)
    if texture == "striped":  # diagonal, so that it runs along no edge of a square, cross or triangle
        for step in steps:
            x = width / 2 + step * period * math.sqrt(2)
            pen.line([(x - height, height * 1.5), (x + height, -height / 2)], fill=255, width=round(0.4 * period))
    else:
        dot = 0.28 * period
        for row in steps:
            for column in steps:
                x = width / 2 + (column + 0.5 * (row % 2)) * 1.1 * period
                y = height / 2 + row * 0.95 * period
                pen.ellipse([x - dot, y - dot, x + dot, y + dot], fill=255)
    return pattern


def _ink_colour(colour: RGB) -> RGB:
    """Stripes and dots are white on dark colours and nearly black on light ones (Rec. 601 luma)."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (255, 255, 255) if luma < 130 else (40, 40, 40)
