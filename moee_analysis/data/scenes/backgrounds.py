"""What stands around an object: the place it is in, clutter behind it and occluders before it."""

from __future__ import annotations

from collections.abc import Callable

from moee_analysis.data.scenes.canvas import Canvas, Colour, Draws, Pose, shaded

SKIES: tuple[Colour, ...] = (
    (120, 175, 225), (165, 195, 215), (190, 190, 195), (235, 190, 150), (70, 85, 125),
)  # fmt: skip
SOILS: tuple[Colour, ...] = ((150, 130, 100), (205, 185, 140), (115, 112, 110), (150, 95, 70))
GREENS: tuple[Colour, ...] = ((85, 135, 60), (120, 150, 70), (60, 100, 65))
WATERS: tuple[Colour, ...] = ((50, 100, 145), (70, 135, 150), (40, 75, 100), (95, 130, 125))


def draw_sky(canvas: Canvas, draws: Draws) -> None:
    """A sky that changes towards the horizon, in four bands."""
    top, glow = draws.near(draws.choice(SKIES)), draws.uniform(0.97, 1.12)
    for band in range(4):
        canvas.box("sky", shaded(top, glow**band), 0, band * 0.25, 1, 1)


def _below(canvas: Canvas, draws: Draws, part: str, colour: Colour) -> float:
    """Fill what lies below a drawn, slightly tilted horizon; return its height."""
    horizon, tilt = draws.uniform(0.42, 0.85), draws.uniform(-0.05, 0.05)
    canvas.polygon(part, colour, ((0, horizon - tilt), (1, horizon + tilt), (1, 1), (0, 1)))
    return horizon


def place_open(canvas: Canvas, draws: Draws) -> float:
    """Bare soil under a sky."""
    return _below(canvas, draws, "ground", draws.near(draws.choice(SOILS)))


def place_street(canvas: Canvas, draws: Draws) -> float:
    """A road with markings under a sky."""
    horizon = _below(canvas, draws, "ground", draws.near((105, 105, 108)))
    stripe, y = draws.near((215, 210, 180)), draws.uniform(horizon + 0.05, 0.98)
    for step in range(4):
        canvas.box("ground", stripe, step * 0.3 - 0.05, y, step * 0.3 + 0.08, y + 0.02)
    return horizon


def place_meadow(canvas: Canvas, draws: Draws) -> float:
    """Grass under a sky."""
    green = draws.near(draws.choice(GREENS))
    horizon = _below(canvas, draws, "grass", green)
    for _ in range(4):
        x, y = draws.unit(), draws.uniform(horizon + 0.05, 1)
        blade = draws.uniform(0.02, 0.12)
        canvas.line("grass", shaded(green, 0.8), ((x, y), (x + blade, y)), 0.01)
    return horizon


def place_sea(canvas: Canvas, draws: Draws) -> float:
    """Water with waves under a sky."""
    blue = draws.near(draws.choice(WATERS))
    horizon = _below(canvas, draws, "water", blue)
    _waves(canvas, draws, blue, horizon)
    return horizon


def place_under_water(canvas: Canvas, draws: Draws) -> float:
    """Nothing but water, with weeds at times."""
    blue = draws.near(draws.choice(WATERS), 40)
    canvas.box("water", blue, 0, 0, 1, 1)
    _waves(canvas, draws, blue, 0.0)
    for _ in range(draws.integer(0, 3)):
        x, sway = draws.unit(), draws.uniform(-0.15, 0.15)
        points = ((x, 1), (x + sway, draws.uniform(0.6, 0.85)), (x, draws.uniform(0.3, 0.6)))
        canvas.line("foliage", draws.near((60, 110, 70)), points, 0.03)
    return 0.6


def place_air(canvas: Canvas, draws: Draws) -> float:
    """Nothing but the sky and a few clouds."""
    for _ in range(draws.integer(0, 3)):
        draw_cloud(canvas, draws, 1.0)
    return 0.7


def _waves(canvas: Canvas, draws: Draws, blue: Colour, top: float) -> None:
    for _ in range(5):
        x, y = draws.uniform(-0.1, 0.9), draws.uniform(top + 0.03, 1)
        length = draws.uniform(0.08, 0.3)
        canvas.line(
            "water", shaded(blue, draws.uniform(0.8, 1.25)), ((x, y), (x + length, y)), 0.01
        )


def draw_cloud(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A cloud of three discs above the horizon."""
    x, y, size = draws.unit(), draws.uniform(0, horizon * 0.7), draws.uniform(0.05, 0.13)
    white = draws.near((225, 228, 232))
    for step in (-1, 0, 1):
        canvas.ellipse(
            "cloud", white, x + step * size, y, size * 1.2, size * (0.8 - 0.25 * abs(step))
        )


def draw_hill(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A far hill, round or pointed."""
    x, wide, high = draws.unit(), draws.uniform(0.2, 0.5), draws.uniform(0.08, 0.3)
    colour = draws.near(draws.choice(((110, 125, 140), (90, 120, 90), (140, 125, 110))))
    top = x + draws.uniform(-0.1, 0.1)
    canvas.polygon(
        "hill",
        colour,
        (
            (x - wide, horizon),
            (top - 0.05, horizon - high),
            (top + 0.07, horizon - high * 0.9),
            (x + wide, horizon),
        ),
    )


def draw_tree(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A leafy tree or a fir."""
    x, foot, size = draws.unit(), horizon + draws.uniform(0, 0.1), draws.uniform(0.08, 0.2)
    green = draws.near(draws.choice(GREENS), 30)
    canvas.box("trunk", draws.near((95, 70, 50)), x - size / 8, foot - size, x + size / 8, foot)
    if draws.chance(0.5):
        canvas.polygon(
            "foliage",
            green,
            (
                (x - size / 2, foot - size / 2),
                (x, foot - 2.4 * size),
                (x + size / 2, foot - size / 2),
            ),
        )
    else:
        canvas.disc("foliage", green, x, foot - 1.4 * size, size * 0.65)
        canvas.disc("foliage", shaded(green, 0.85), x + size * 0.3, foot - size, size * 0.4)


def draw_stone(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A stone lying on the ground."""
    x, y, size = draws.unit(), draws.uniform(horizon, 1), draws.uniform(0.03, 0.1)
    grey = draws.near((130, 125, 120), 30)
    outline = ((-1, 0.4), (-0.6, -0.5), (0.3, -0.7), (1, 0.1), (0.8, 0.5))
    canvas.polygon("rock", grey, [(x + size * px, y + size * py) for px, py in outline])


def draw_pole(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A lamp post or a sign post."""
    x, top, grey = draws.unit(), horizon - draws.uniform(0.2, 0.6), draws.near((90, 90, 95), 30)
    canvas.line("pole", grey, ((x, horizon + 0.08), (x, top)), 0.02)
    if draws.chance(0.5):
        canvas.disc("lamp", draws.near((235, 225, 160)), x, top, 0.03)
    else:
        canvas.box("pole", draws.colour(), x - 0.06, top, x + 0.06, top + 0.08)


def draw_shed(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """A far building with a flat or a pitched roof."""
    x, wide, high = draws.unit(), draws.uniform(0.06, 0.16), draws.uniform(0.08, 0.3)
    colour, top = draws.near((165, 150, 140), 35), horizon - high
    canvas.box("wall", colour, x - wide, top, x + wide, horizon + 0.02)
    if draws.chance(0.5):
        roof = draws.near((130, 75, 60), 30)
        canvas.polygon(
            "roof", roof, ((x - wide * 1.2, top), (x, top - wide), (x + wide * 1.2, top))
        )
    canvas.box("window", (70, 80, 95), x - wide * 0.5, top + 0.03, x - wide * 0.1, top + 0.07)


Place = Callable[[Canvas, Draws], float]

PLACES: dict[str, Place] = {
    "open": place_open,
    "street": place_street,
    "meadow": place_meadow,
    "sea": place_sea,
    "under_water": place_under_water,
    "air": place_air,
}
"""Every kind of place; each paints itself and returns the height of its horizon."""

CLUTTER = (draw_cloud, draw_hill, draw_tree, draw_stone, draw_pole, draw_shed)


def draw_clutter(canvas: Canvas, draws: Draws, horizon: float) -> None:
    """Up to six things behind the object."""
    for _ in range(draws.integer(0, 6)):
        draws.choice(CLUTTER)(canvas, draws, horizon)


def occlude_pole(canvas: Canvas, draws: Draws) -> None:
    """A post across the whole picture."""
    x, lean, width = draws.uniform(0.15, 0.85), draws.uniform(-0.2, 0.2), draws.uniform(0.03, 0.09)
    canvas.line("occluder", draws.near((100, 95, 90), 50), ((x, -0.1), (x + lean, 1.1)), width)


def occlude_leaves(canvas: Canvas, draws: Draws) -> None:
    """A bush that grows in from below or from a side."""
    x, y, green = draws.unit(), draws.uniform(0.75, 1.0), draws.near(draws.choice(GREENS), 40)
    for _ in range(4):
        dx, dy = draws.uniform(-0.15, 0.15), draws.uniform(-0.12, 0.12)
        canvas.disc("foliage", draws.near(green, 12), x + dx, y + dy, draws.uniform(0.06, 0.14))


def occlude_board(canvas: Canvas, draws: Draws) -> None:
    """A tilted board of any colour."""
    half, high = draws.uniform(0.08, 0.2), draws.uniform(0.08, 0.2)
    pose = Pose(draws.uniform(0.15, 0.85), draws.uniform(0.25, 0.9), 1.0, draws.uniform(-0.6, 0.6))
    with canvas.posed(pose):
        canvas.box("occluder", draws.colour(), -half, -high, half, high)


OCCLUDERS = (occlude_pole, occlude_leaves, occlude_board)
