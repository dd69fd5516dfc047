"""Drawers of animals, plants, rocks and buildings, each in a frame of about [-1, 1] x [-1, 1]."""

from moee_analysis.data.scenes.canvas import Canvas, Colour, Draws, Point, shaded

COATS: tuple[Colour, ...] = (
    (205, 170, 125), (60, 55, 55), (150, 145, 140), (215, 140, 70), (225, 220, 210), (120, 90, 65),
)  # fmt: skip
STONES: tuple[Colour, ...] = ((150, 130, 110), (125, 125, 128), (175, 120, 90), (95, 85, 80))
WALLS: tuple[Colour, ...] = ((215, 205, 185), (170, 90, 70), (235, 235, 230), (150, 165, 180))
DARK: Colour = (30, 28, 28)


def draw_goldfish(canvas: Canvas, rng: Draws) -> None:
    """A fish with a fan tail, three fins and one eye."""
    usual = rng.choice(((240, 130, 35), (250, 175, 60), (225, 75, 40)))
    skin = rng.near(usual if rng.chance(0.45) else rng.colour())
    fin, thick = shaded(skin, rng.uniform(0.75, 1.2)), rng.uniform(0.3, 0.48)
    spread, tip = rng.uniform(0.3, 0.55), rng.uniform(-1.1, -0.9)
    canvas.polygon("tail", fin, (-0.45, 0), (tip, -spread), (-0.8, 0), (tip, spread))
    canvas.polygon("fin", fin, (-0.3, -thick * 0.7), (-0.15, -thick - 0.22), (0.3, -thick * 0.8))
    canvas.polygon("fin", fin, (-0.2, thick * 0.8), (-0.3, thick + 0.2), (0.1, thick * 0.85))
    canvas.ellipse("body", skin, 0.1, 0, 0.7, thick)
    canvas.ellipse("body", shaded(skin, 1.25), 0.1, thick * 0.45, 0.5, thick * 0.4)
    canvas.polygon("fin", shaded(fin, 0.85), (0.2, 0.08), (-0.12, 0.3), (0.05, 0.04))
    canvas.disc("eye", (240, 240, 235), 0.52, -0.1, 0.11)
    canvas.disc("eye", DARK, 0.54, -0.1, 0.06)


def _sitting(canvas: Canvas, rng: Draws, coat: Colour) -> None:
    """A sitting animal's trunk and paws."""
    canvas.ellipse("fur", shaded(coat, 0.9), 0, 0.5, rng.uniform(0.4, 0.55), 0.5)
    for x in (-0.2, 0.2):
        canvas.ellipse("fur", shaded(coat, 1.06), x, 0.85, 0.15, 0.17)


def _eyes(canvas: Canvas, iris: Colour, y: float, apart: float, size: float) -> None:
    for x in (-apart, apart):
        canvas.disc("eye", iris, x, y, size)
        canvas.disc("eye", DARK, x, y, size * 0.6)


def draw_pug(canvas: Canvas, rng: Draws) -> None:
    """A sitting dog with folded ears, a dark flat muzzle and large eyes."""
    coat = rng.near(COATS[0] if rng.chance(0.5) else rng.choice(COATS))
    dark = shaded(coat, rng.uniform(0.25, 0.5))
    canvas.disc("tail", shaded(coat, 0.8), 0.5, 0.35, 0.14)
    _sitting(canvas, rng, coat)
    canvas.ellipse("fur", coat, 0, -0.25, rng.uniform(0.46, 0.54), 0.45)
    canvas.pair("ear", dark, (0.22, -0.66), (0.56, -0.52), (0.54, -0.2), (0.38, -0.38))
    canvas.line("fur", shaded(coat, 0.7), (-0.15, -0.5), (0, -0.44), (0.15, -0.5), width=0.04)
    canvas.ellipse("muzzle", dark, 0, -0.08, rng.uniform(0.24, 0.32), 0.2)
    canvas.ellipse("muzzle", DARK, 0, -0.17, 0.09, 0.06)
    _eyes(canvas, (120, 80, 50), -0.3, rng.uniform(0.2, 0.26), 0.11)


def draw_cat(canvas: Canvas, rng: Draws) -> None:
    """A sitting cat with upright ears, a light muzzle and whiskers."""
    coat = rng.near_one(COATS)
    reach, top = rng.uniform(0.65, 0.95), rng.uniform(-0.2, 0.4)
    canvas.line("tail", shaded(coat, 0.8), (0.3, 0.85), (reach, 0.75), (reach, top), width=0.13)
    _sitting(canvas, rng, coat)
    for side in (-1, 1):
        ear = ((side * 0.12, -0.58), (side * 0.42, -rng.uniform(0.8, 0.95)), (side * 0.46, -0.32))
        canvas.polygon("ear", shaded(coat, 0.85), *ear)
    canvas.ellipse("fur", coat, 0, -0.25, rng.uniform(0.43, 0.5), 0.4)
    if rng.chance(0.5):
        for x in (-0.14, 0, 0.14):
            canvas.line("fur", shaded(coat, 0.65), (x, -0.62), (x, -0.46), width=0.05)
    canvas.ellipse("muzzle", shaded(coat, rng.uniform(0.8, 1.4)), 0, -0.07, 0.2, 0.13)
    canvas.polygon("muzzle", (200, 120, 120), (-0.05, -0.16), (0.05, -0.16), (0, -0.1))
    for side in (-1, 1):
        whisker = ((side * 0.15, -0.08), (side * 0.6, -0.12))
        canvas.line("muzzle", (235, 235, 230), *whisker, width=0.02)
    _eyes(canvas, rng.choice(((120, 170, 70), (215, 180, 60), (110, 160, 190))), -0.3, 0.2, 0.1)


def draw_owl(canvas: Canvas, rng: Draws) -> None:
    """An owl on a branch: ear tufts, huge eyes, beak, folded wings."""
    coat = rng.near_one(COATS)
    canvas.line("trunk", rng.near((95, 70, 50)), (-1.0, 0.86), (1.0, 0.8), width=0.12)
    canvas.ellipse("body", coat, 0, 0.2, rng.uniform(0.45, 0.55), 0.68)
    canvas.ellipse("body", shaded(coat, 1.3), 0, 0.38, 0.28, 0.42)
    for side in (-1, 1):
        tuft = ((side * 0.12, -0.6), (side * 0.44, -rng.uniform(0.75, 0.92)), (side * 0.46, -0.35))
        canvas.polygon("ear", shaded(coat, 0.8), *tuft)
    canvas.pair("wing", shaded(coat, 0.65), (0.4, -0.1), (0.62, 0.25), (0.4, 0.8), (0.28, 0.3))
    canvas.ellipse("body", coat, 0, -0.3, 0.47, 0.38)
    iris = rng.choice(((235, 170, 40), (225, 210, 80), (200, 110, 40)))
    _eyes(canvas, iris, -0.3, 0.2, rng.uniform(0.13, 0.19))
    canvas.polygon("beak", rng.near((210, 170, 80)), (-0.08, -0.22), (0.08, -0.22), (0, 0.0))


_LEAVES = ((-0.8, 0.05), (-0.75, -0.4), (-0.35, -0.65), (0.35, -0.65), (0.75, -0.4), (0.8, 0.05))
_DOME = (
    (-1, 0), (-0.92, 0.4), (-0.7, 0.72), (-0.38, 0.93), (0, 1), (0.38, 0.93), (0.7, 0.72),
    (0.92, 0.4), (1, 0),
)  # fmt: skip


def draw_palm(canvas: Canvas, rng: Draws) -> None:
    """A palm: a bent trunk and six hanging leaves."""
    lean, bark = rng.uniform(-0.4, 0.4), rng.near((130, 100, 70))
    bend = ((-0.05, 1.0), (lean * 0.3, 0.3), (lean, -0.4))
    canvas.line("trunk", bark, *bend, width=rng.uniform(0.1, 0.16))
    green = rng.near_one(((70, 130, 60), (110, 140, 60), (50, 100, 75)))
    for x, y in _LEAVES:
        reach = rng.uniform(0.75, 1.05)
        tip = (lean + x * reach, -0.4 + y * reach)
        knee = (lean + x * reach * 0.55, -0.5 + y * reach * 0.8)
        low = (knee[0], knee[1] + 0.16)
        canvas.polygon("foliage", rng.near(green, 14), (lean, -0.45), knee, tip, low)


def draw_mushroom(canvas: Canvas, rng: Draws) -> None:
    """A mushroom: a pale stem and a round cap, at times with spots."""
    stem = rng.near((225, 215, 190))
    wide, tall = rng.uniform(0.14, 0.24), rng.uniform(-0.15, 0.1)
    canvas.polygon("stem", stem, (-wide, tall), (wide, tall), (wide * 1.4, 0.9), (-wide * 1.4, 0.9))
    usual = rng.choice(((200, 45, 35), (150, 105, 70), (215, 160, 90)))
    cap = rng.near(usual if rng.chance(0.8) else rng.colour())
    high = rng.uniform(0.55, 0.95)
    canvas.polygon("cap", cap, *((0.8 * x, tall - high * y) for x, y in _DOME))
    canvas.ellipse("cap", shaded(cap, 0.6), 0, tall, 0.8, 0.1)
    if rng.chance(0.6):
        for x, y in ((-0.4, 0.35), (0.05, 0.65), (0.42, 0.3), (-0.05, 0.25)):
            canvas.disc("cap", (235, 230, 220), x, tall - high * y, rng.uniform(0.06, 0.11))


def draw_cliff(canvas: Canvas, rng: Draws) -> None:
    """A steep rock face with strata and grass on its edge, falling to one side."""
    stone, edge = rng.near_one(STONES), rng.uniform(-0.1, 0.35)
    top, foot = rng.uniform(-0.75, -0.4), edge + rng.uniform(0.1, 0.35)
    face = [
        (edge + (foot - edge) * t + rng.uniform(-0.09, 0.09), top + (1.6 - top) * t)
        for t in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    canvas.polygon("rock", stone, (-2.4, top - 0.1), (-0.6, top - 0.05), *face, (-2.4, 1.6))
    for t in range(1, 5):
        y = top + t * 0.35 + rng.uniform(-0.06, 0.06)
        shade = shaded(stone, rng.uniform(0.65, 0.85))
        canvas.line("rock", shade, (-2.4, y + 0.06), (edge - 0.06, y), width=0.05)
    for _ in range(3):
        x, y = rng.uniform(-1, edge), rng.uniform(top + 0.2, 0.9)
        crack = ((x, y), (x + rng.uniform(-0.1, 0.1), y + rng.uniform(0.2, 0.5)))
        canvas.line("rock", shaded(stone, 0.6), *crack, width=0.05)
    if rng.chance(0.7):
        rim = ((-2.4, top - 0.15), (-0.6, top - 0.1), face[0], (edge - 0.05, top + 0.1))
        canvas.polygon("grass", rng.near((95, 130, 65)), *rim, (-2.4, top + 0.04))


def draw_volcano(canvas: Canvas, rng: Draws) -> None:
    """A cone of rock with a crater, lava and at times smoke."""
    stone, top = rng.near_one(STONES, 30), rng.uniform(-0.6, -0.3)
    mouth, foot = rng.uniform(0.14, 0.28), rng.uniform(0.9, 1.2)
    if rng.chance(0.6):
        smoke = rng.near((150, 145, 145), 40)
        for step in range(3):
            canvas.disc("cloud", smoke, rng.uniform(-0.2, 0.3), top - 0.1 - step * 0.18, 0.16)
    canvas.polygon("rock", stone, (-foot, 0.9), (-mouth, top), (mouth, top), (foot, 0.9))
    canvas.polygon("rock", shaded(stone, 0.8), (0.1, top), (mouth, top), (foot, 0.9), (0.3, 0.9))
    glow = rng.near_one(((235, 90, 30), (245, 150, 50), (190, 50, 35)))
    canvas.ellipse("lava", glow, 0, top, mouth, 0.06)
    for _ in range(rng.integer(1, 3)):
        x, end = rng.uniform(-mouth, mouth) * 0.7, rng.uniform(-0.05, 0.6)
        canvas.line("lava", glow, (x, top), (x * 1.6, (top + end) / 2), (x * 2.6, end), width=0.08)


def draw_house(canvas: Canvas, rng: Draws) -> None:
    """A house with a pitched roof, windows, a door and at times a chimney."""
    wall = rng.near_one(WALLS)
    roof = rng.near_one(((150, 65, 50), (85, 80, 85), (120, 90, 60)))
    eave, ridge = rng.uniform(-0.2, 0.05), rng.uniform(0.4, 0.75)
    if rng.chance(0.6):
        canvas.box("wall", shaded(wall, 0.7), 0.35, eave - ridge, 0.52, eave)
    canvas.box("wall", wall, -0.8, eave, 0.8, 0.8)
    left, right, top = -0.98 * rng.unit(), 0.55 * rng.unit(), eave - ridge
    canvas.polygon("roof", roof, (-0.98, eave), (left, top), (right, top), (0.98, eave))
    glass, middle = rng.near((90, 110, 135), 40), rng.uniform(-0.2, 0.2)
    for x in (-0.6, 0.35):
        canvas.box("window", glass, x, eave + 0.2, x + 0.25, eave + 0.45)
    canvas.box("door", rng.colour(), middle - 0.12, 0.3, middle + 0.12, 0.8)


def draw_lighthouse(canvas: Canvas, rng: Draws) -> None:
    """A tapered tower with bands, a lamp room and a small roof."""
    wall = rng.near((230, 228, 222))
    band = rng.near_one(((190, 45, 40), (50, 60, 90), (60, 60, 62), (205, 195, 180)))
    foot, neck, top = rng.uniform(0.28, 0.4), rng.uniform(0.16, 0.22), -0.5
    _tower(canvas, wall, (foot, neck), (1.0, top))
    stripes = rng.integer(2, 4)
    for step in range(stripes):
        low, high = (step + 0.2) / stripes, (step + 0.7) / stripes
        halves = (foot + (neck - foot) * low, foot + (neck - foot) * high)
        _tower(canvas, band, halves, (1.0 - 1.5 * low, 1.0 - 1.5 * high))
    canvas.box("lamp", rng.near((245, 230, 150)), -0.13, top - 0.24, 0.13, top)
    canvas.box("pole", DARK, -0.26, top - 0.03, 0.26, top + 0.03)
    roof = ((-0.2, top - 0.24), (0, top - 0.48), (0.2, top - 0.24))
    canvas.polygon("roof", shaded(band, 0.8), *roof)
    canvas.box("door", DARK, -0.08, 0.75, 0.08, 1.0)


def _tower(canvas: Canvas, colour: Colour, halves: Point, ends: Point) -> None:
    """A tapered wall: half widths and heights of its foot and its top."""
    (foot, top), (low, high) = halves, ends
    canvas.polygon("wall", colour, (-foot, low), (-top, high), (top, high), (foot, low))


def draw_windmill(canvas: Canvas, rng: Draws) -> None:
    """A tapered mill with a cap and four vanes at any angle."""
    _tower(canvas, rng.near_one(WALLS), (rng.uniform(0.34, 0.46), 0.22), (1.0, -0.3))
    roof = rng.near_one(((90, 65, 55), (140, 65, 50), (70, 75, 85)))
    canvas.polygon("roof", roof, (-0.28, -0.28), (0, rng.uniform(-0.68, -0.55)), (0.28, -0.28))
    canvas.box("door", DARK, -0.1, 0.68, 0.1, 1.0)
    canvas.box("window", (70, 80, 95), -0.07, 0.1, 0.07, 0.28)
    reach, turn, vane = rng.uniform(0.65, 0.85), rng.unit(), rng.near((225, 215, 195), 40)
    for dx, dy in ((1, turn), (-turn, 1), (-1, -turn), (turn, -1)):
        size = reach / (1 + turn**2) ** 0.5
        canvas.line("rotor", vane, (0, -0.32), (dx * size, -0.32 + dy * size), width=0.1)


def draw_tent(canvas: Canvas, rng: Draws) -> None:
    """A ridge tent with a dark entrance and guy lines."""
    cloth, top = rng.near(rng.colour()), rng.uniform(-0.4, -0.1)
    ridge = rng.uniform(0.15, 0.45)
    for side in (-1, 1):
        guy = ((side * ridge, top + 0.1), (side * 1.15, 0.65))
        canvas.line("pole", (200, 200, 190), *guy, width=0.02)
    whole = ((-ridge, top), (ridge, top), (0.95, 0.6), (-0.95, 0.6))
    canvas.polygon("cloth", shaded(cloth, 0.8), *whole)
    canvas.polygon("cloth", cloth, (-ridge, top), (0.2, 0.6), (-0.95, 0.6))
    flap, dark = rng.uniform(0.12, 0.25), shaded(cloth, 0.3)
    canvas.polygon("door", dark, (-ridge, top + 0.2), (flap - ridge, 0.6), (-flap - ridge, 0.6))
