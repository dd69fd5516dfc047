"""What stands around an object: the place it is in, clutter behind it and occluders before it."""

from collections.abc import Callable

from moee_analysis.data.scenes.canvas import Canvas, Colour, Draws, Pose, shaded

SKIES: tuple[Colour, ...] = (
    (120, 175, 225), (165, 195, 215), (190, 190, 195), (235, 190, 150), (70, 85, 125),
)  # fmt: skip
SOILS: tuple[Colour, ...] = ((150, 130, 100), (205, 185, 140), (115, 112, 110), (150, 95, 70))
GREENS: tuple[Colour, ...] = ((85, 135, 60), (120, 150, 70), (60, 100, 65))
WATERS: tuple[Colour, ...] = ((50, 100, 145), (70, 135, 150), (40, 75, 100), (95, 130, 125))


def draw_sky(canvas: Canvas, rng: Draws) -> None:
    """A sky that changes towards the horizon, in four bands."""
    top, glow = rng.near_one(SKIES), rng.uniform(0.97, 1.12)
    for band in range(4):
        canvas.box("sky", shaded(top, glow**band), 0, band * 0.25, 1, 1)


def _below(canvas: Canvas, rng: Draws, part: str, colour: Colour) -> float:
    """Fill what lies below a drawn, slightly tilted horizon; return its height."""
    horizon, tilt = rng.uniform(0.42, 0.85), rng.uniform(-0.05, 0.05)
    canvas.polygon(part, colour, (0, horizon - tilt), (1, horizon + tilt), (1, 1), (0, 1))
    return horizon


def _place_open(canvas: Canvas, rng: Draws) -> float:
    return _below(canvas, rng, "ground", rng.near_one(SOILS))


def _place_street(canvas: Canvas, rng: Draws) -> float:
    horizon = _below(canvas, rng, "ground", rng.near((105, 105, 108)))
    stripe, y = rng.near((215, 210, 180)), rng.uniform(horizon + 0.05, 0.98)
    for step in range(4):
        canvas.box("ground", stripe, step * 0.3 - 0.05, y, step * 0.3 + 0.08, y + 0.02)
    return horizon


def _place_meadow(canvas: Canvas, rng: Draws) -> float:
    green = rng.near_one(GREENS)
    horizon = _below(canvas, rng, "grass", green)
    for _ in range(4):
        x, y = rng.unit(), rng.uniform(horizon + 0.05, 1)
        blade = rng.uniform(0.02, 0.12)
        canvas.line("grass", shaded(green, 0.8), (x, y), (x + blade, y), width=0.01)
    return horizon


def _place_sea(canvas: Canvas, rng: Draws) -> float:
    blue = rng.near_one(WATERS)
    horizon = _below(canvas, rng, "water", blue)
    _waves(canvas, rng, blue, horizon)
    return horizon


def _place_under_water(canvas: Canvas, rng: Draws) -> float:
    blue = rng.near_one(WATERS, 40)
    canvas.box("water", blue, 0, 0, 1, 1)
    _waves(canvas, rng, blue, 0.0)
    for _ in range(rng.integer(0, 3)):
        x, sway = rng.unit(), rng.uniform(-0.15, 0.15)
        points = ((x, 1), (x + sway, rng.uniform(0.6, 0.85)), (x, rng.uniform(0.3, 0.6)))
        canvas.line("foliage", rng.near((60, 110, 70)), *points, width=0.03)
    return 0.6


def _place_air(canvas: Canvas, rng: Draws) -> float:
    for _ in range(rng.integer(0, 3)):
        _draw_cloud(canvas, rng, 1.0)
    return 0.7


def _waves(canvas: Canvas, rng: Draws, blue: Colour, top: float) -> None:
    for _ in range(5):
        x, y = rng.uniform(-0.1, 0.9), rng.uniform(top + 0.03, 1)
        length = rng.uniform(0.08, 0.3)
        shade = shaded(blue, rng.uniform(0.8, 1.25))
        canvas.line("water", shade, (x, y), (x + length, y), width=0.01)


def _draw_cloud(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, y, size = rng.unit(), rng.uniform(0, horizon * 0.7), rng.uniform(0.05, 0.13)
    white = rng.near((225, 228, 232))
    for step in (-1, 0, 1):
        high = size * (0.8 - 0.25 * abs(step))
        canvas.ellipse("cloud", white, x + step * size, y, size * 1.2, high)


def _draw_hill(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, wide, high = rng.unit(), rng.uniform(0.2, 0.5), rng.uniform(0.08, 0.3)
    colour = rng.near_one(((110, 125, 140), (90, 120, 90), (140, 125, 110)))
    top = x + rng.uniform(-0.1, 0.1)
    ridge = ((top - 0.05, horizon - high), (top + 0.07, horizon - high * 0.9))
    canvas.polygon("hill", colour, (x - wide, horizon), *ridge, (x + wide, horizon))


def _draw_tree(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, foot, size = rng.unit(), horizon + rng.uniform(0, 0.1), rng.uniform(0.08, 0.2)
    green = rng.near_one(GREENS, 30)
    canvas.box("trunk", rng.near((95, 70, 50)), x - size / 8, foot - size, x + size / 8, foot)
    if rng.chance(0.5):
        half, low = size / 2, foot - size / 2
        canvas.polygon("foliage", green, (x - half, low), (x, foot - 2.4 * size), (x + half, low))
    else:
        canvas.disc("foliage", green, x, foot - 1.4 * size, size * 0.65)
        canvas.disc("foliage", shaded(green, 0.85), x + size * 0.3, foot - size, size * 0.4)


def _draw_stone(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, y, size = rng.unit(), rng.uniform(horizon, 1), rng.uniform(0.03, 0.1)
    grey = rng.near((130, 125, 120), 30)
    outline = ((-1, 0.4), (-0.6, -0.5), (0.3, -0.7), (1, 0.1), (0.8, 0.5))
    canvas.polygon("rock", grey, *[(x + size * px, y + size * py) for px, py in outline])


def _draw_pole(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, top, grey = rng.unit(), horizon - rng.uniform(0.2, 0.6), rng.near((90, 90, 95), 30)
    canvas.line("pole", grey, (x, horizon + 0.08), (x, top), width=0.02)
    if rng.chance(0.5):
        canvas.disc("lamp", rng.near((235, 225, 160)), x, top, 0.03)
    else:
        canvas.box("pole", rng.colour(), x - 0.06, top, x + 0.06, top + 0.08)


def _draw_shed(canvas: Canvas, rng: Draws, horizon: float) -> None:
    x, wide, high = rng.unit(), rng.uniform(0.06, 0.16), rng.uniform(0.08, 0.3)
    colour, top = rng.near((165, 150, 140), 35), horizon - high
    canvas.box("wall", colour, x - wide, top, x + wide, horizon + 0.02)
    if rng.chance(0.5):
        roof = rng.near((130, 75, 60), 30)
        canvas.polygon("roof", roof, (x - wide * 1.2, top), (x, top - wide), (x + wide * 1.2, top))
    canvas.box("window", (70, 80, 95), x - wide * 0.5, top + 0.03, x - wide * 0.1, top + 0.07)


PLACES: dict[str, Callable[[Canvas, Draws], float]] = {  # each returns the height of its horizon
    "open": _place_open,
    "street": _place_street,
    "meadow": _place_meadow,
    "sea": _place_sea,
    "under_water": _place_under_water,
    "air": _place_air,
}
CLUTTER = (_draw_cloud, _draw_hill, _draw_tree, _draw_stone, _draw_pole, _draw_shed)


def draw_clutter(canvas: Canvas, rng: Draws, horizon: float) -> None:
    """Up to six things behind the object."""
    for _ in range(rng.integer(0, 6)):
        rng.choice(CLUTTER)(canvas, rng, horizon)


def _occlude_pole(canvas: Canvas, rng: Draws) -> None:
    x, lean, width = rng.uniform(0.15, 0.85), rng.uniform(-0.2, 0.2), rng.uniform(0.03, 0.09)
    canvas.line("occluder", rng.near((100, 95, 90), 50), (x, -0.1), (x + lean, 1.1), width=width)


def _occlude_leaves(canvas: Canvas, rng: Draws) -> None:
    """A bush that grows in from below or from a side."""
    x, y, green = rng.unit(), rng.uniform(0.75, 1.0), rng.near_one(GREENS, 40)
    for _ in range(4):
        dx, dy = rng.uniform(-0.15, 0.15), rng.uniform(-0.12, 0.12)
        canvas.disc("foliage", rng.near(green, 12), x + dx, y + dy, rng.uniform(0.06, 0.14))


def _occlude_board(canvas: Canvas, rng: Draws) -> None:
    half, high = rng.uniform(0.08, 0.2), rng.uniform(0.08, 0.2)
    pose = Pose(rng.uniform(0.15, 0.85), rng.uniform(0.25, 0.9), 1.0, rng.uniform(-0.6, 0.6))
    with canvas.posed(pose):
        canvas.box("occluder", rng.colour(), -half, -high, half, high)


OCCLUDERS = (_occlude_pole, _occlude_leaves, _occlude_board)
