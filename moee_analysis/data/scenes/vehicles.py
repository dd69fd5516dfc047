"""Drawers of everything that drives, flies or sails, each in a frame of about [-1, 1] x [-1, 1]."""

from moee_analysis.data.scenes.canvas import Canvas, Colour, Draws, Point, shaded

GLASS: tuple[Colour, ...] = ((60, 75, 95), (150, 185, 205), (35, 40, 50))
TYRE: Colour = (35, 35, 38)
TRUCK_PAINTS: tuple[Colour, ...] = (
    (190, 35, 30), (225, 225, 220), (60, 110, 70), (215, 160, 40), (50, 80, 140), (110, 110, 115),
)  # fmt: skip
FLOOR = 0.42  # height at which a vehicle's body ends and its wheels stand out


def draw_wheels(canvas: Canvas, rng: Draws, places: tuple[float, ...], radius: float) -> None:
    """Wheels with hubs along the floor of a vehicle."""
    hub = rng.near((165, 165, 165), 40)
    for x in places:
        canvas.disc("wheel", TYRE, x, FLOOR, radius)
        canvas.disc("wheel", hub, x, FLOOR, radius * 0.45)


def draw_cab(canvas: Canvas, rng: Draws, paint: Colour, back: float, front: float) -> None:
    """The cab all trucks share: a box with a slanted windscreen, a side window and a headlight."""
    top, slant = rng.uniform(-0.32, -0.18), rng.uniform(0.04, 0.16)
    waist = top + 0.3
    outline = ((back, top), (front - slant, top), (front, waist), (front, FLOOR), (back, FLOOR))
    canvas.polygon("cab", paint, *outline)
    glass = rng.near_one(GLASS)
    left, high = back + 0.07, top + 0.06
    pane = ((left, high), (front - slant - 0.03, high), (front - 0.05, waist), (left, waist))
    canvas.polygon("window", glass, *pane)
    canvas.disc("lamp", (240, 230, 170), front - 0.04, FLOOR - 0.12, 0.04)


def _truck_paint(rng: Draws, usual: Colour) -> Colour:
    """The usual colour of a truck often, any truck's colour otherwise."""
    return rng.near(usual if rng.chance(0.25) else rng.choice(TRUCK_PAINTS))


def _beacon(canvas: Canvas, rng: Draws, x: float) -> None:
    colour = rng.near_one(((60, 110, 230), (245, 160, 40), (220, 50, 40)))
    canvas.box("lamp", colour, x - 0.07, -0.38, x + 0.07, -0.26)


def draw_fire_engine(canvas: Canvas, rng: Draws) -> None:
    """A truck with a closed body, a ladder on its roof and a beacon."""
    paint = _truck_paint(rng, TRUCK_PAINTS[0])
    top, back = rng.uniform(-0.2, -0.08), rng.uniform(0.42, 0.55)
    canvas.box("body", shaded(paint, 0.92), -1, top, back, FLOOR)
    canvas.box("body", rng.near((225, 220, 210)), -1, 0.12, back, 0.18)
    for step in range(rng.integer(2, 3)):
        x = -0.92 + step * 0.42
        canvas.box("body", shaded(paint, 0.72), x, top + 0.08, x + 0.32, 0.08)
    draw_cab(canvas, rng, paint, back, 1.0)
    steel, lift = rng.near((195, 195, 190), 40), rng.uniform(0, 0.3)
    low, high = (-1.0, top - 0.05), (0.75, top - 0.05 - lift)
    for rail in (0.0, -0.12):
        points = ((low[0], low[1] + rail), (high[0], high[1] + rail))
        canvas.line("ladder", steel, *points, width=0.035)
    for step in range(8):
        x = low[0] + (high[0] - low[0]) * step / 7
        y = low[1] + (high[1] - low[1]) * step / 7
        canvas.line("ladder", steel, (x, y), (x, y - 0.12), width=0.025)
    if rng.chance(0.7):
        _beacon(canvas, rng, back + 0.2)
    draw_wheels(canvas, rng, (-0.6, 0.7), rng.uniform(0.15, 0.2))


def draw_garbage_truck(canvas: Canvas, rng: Draws) -> None:
    """A truck with a tall ribbed hopper that bulges at its rear."""
    paint, fill = _truck_paint(rng, TRUCK_PAINTS[2]), _truck_paint(rng, TRUCK_PAINTS[1])
    top, back = rng.uniform(-0.55, -0.35), rng.uniform(0.4, 0.55)
    outline = (
        (-0.7, top), (back - 0.12, top), (back - 0.04, top + 0.12), (back - 0.04, 0.3),
        (-0.85, 0.36), (-1.05, 0.2), (-1.0, -0.1),
    )  # fmt: skip
    canvas.polygon("hopper", fill, *outline)
    for x in (-0.65, -0.4, -0.15, 0.1):
        canvas.line("hopper", shaded(fill, 0.75), (x, top + 0.04), (x, 0.28), width=0.04)
    bulge = ((-1.02, -0.05), (-0.8, 0.05), (-0.85, 0.33), (-1.05, 0.2))
    canvas.polygon("hopper", shaded(fill, 0.55), *bulge)
    canvas.box("bed", shaded(paint, 0.5), -0.85, 0.3, back, FLOOR)
    draw_cab(canvas, rng, paint, back, 1.0)
    draw_wheels(canvas, rng, (-0.5, -0.15, 0.72), rng.uniform(0.15, 0.19))


def draw_pickup(canvas: Canvas, rng: Draws) -> None:
    """A truck with a hood before its cab and a low open bed behind it, at times loaded."""
    paint = _truck_paint(rng, TRUCK_PAINTS[4])
    middle = rng.uniform(-0.15, 0.05)
    if rng.chance(0.4):
        canvas.ellipse("bed", rng.colour(), -0.6, 0.05, 0.28, rng.uniform(0.1, 0.22))
    canvas.box("bed", shaded(paint, 0.94), -1, 0.08, middle, FLOOR)
    canvas.line("bed", shaded(paint, 0.6), (-1, 0.08), (middle, 0.08), width=0.04)
    draw_cab(canvas, rng, paint, middle, middle + 0.55)
    hood = ((0.93, 0.13), (1.0, 0.22), (1.0, FLOOR))
    canvas.polygon("body", paint, (middle + 0.5, 0.08), *hood, (middle + 0.5, FLOOR))
    canvas.disc("lamp", (240, 230, 170), 0.95, 0.24, 0.04)
    draw_wheels(canvas, rng, (-0.6, 0.65), rng.uniform(0.16, 0.22))


def draw_tow_truck(canvas: Canvas, rng: Draws) -> None:
    """A truck with a flat bed that carries a boom with a hook."""
    paint = _truck_paint(rng, TRUCK_PAINTS[3])
    back = rng.uniform(0.1, 0.4)
    canvas.box("bed", shaded(paint, 0.7), -0.95, rng.uniform(0.15, 0.25), back, FLOOR)
    steel = rng.near_one(((70, 70, 72), (200, 60, 40), (215, 190, 60)))
    tip: Point = (rng.uniform(-1.1, -0.8), rng.uniform(-0.55, -0.2))
    canvas.line("boom", steel, (back - 0.1, 0.2), tip, width=0.08)
    middle = ((tip[0] + back) / 2, tip[1] / 2)
    canvas.line("boom", shaded(steel, 0.8), (-0.45, 0.2), middle, width=0.05)
    hook = tip[1] + rng.uniform(0.25, 0.5)
    canvas.line("boom", (40, 40, 42), tip, (tip[0], hook), width=0.025)
    canvas.disc("boom", (60, 60, 62), tip[0], hook, 0.05)
    draw_cab(canvas, rng, paint, back, 1.0 - rng.uniform(0, 0.15))
    if rng.chance(0.6):
        _beacon(canvas, rng, back + 0.2)
    draw_wheels(canvas, rng, (-0.55, 0.62), rng.uniform(0.16, 0.21))


def draw_school_bus(canvas: Canvas, rng: Draws) -> None:
    """A long body with a row of windows and a short hood, yellow more often than not."""
    paint = rng.near((235, 180, 40) if rng.chance(0.4) else rng.choice(TRUCK_PAINTS))
    top, front = rng.uniform(-0.42, -0.28), rng.uniform(0.68, 0.95)
    canvas.box("body", paint, -1, top, front, FLOOR)
    canvas.box("body", paint, front, 0.05, 1.0, FLOOR)
    glass, panes = rng.near_one(GLASS), rng.integer(4, 6)
    width = (front + 0.9) / panes
    for step in range(panes):
        x = -0.95 + step * width
        canvas.box("window", glass, x, top + 0.1, x + width * 0.75, top + 0.3)
    canvas.box("body", shaded(paint, 0.45), -1, 0.12, front, 0.17)
    draw_wheels(canvas, rng, (-0.58, 0.6), rng.uniform(0.15, 0.19))


def draw_plane(canvas: Canvas, rng: Draws) -> None:
    """An airliner from the side: fuselage, swept wing, fin and engines."""
    paint = rng.near((215, 218, 222) if rng.chance(0.5) else rng.colour())
    trim = rng.colour()
    canvas.polygon("tail", trim, (-0.95, -0.05), (-1.05, -0.5), (-0.85, -0.5), (-0.55, -0.08))
    far = rng.uniform(-0.55, -0.3)
    wing = ((0.15, -0.05), (-0.2, far), (-0.35, far), (-0.2, -0.05))
    canvas.polygon("wing", shaded(paint, 0.7), *wing)
    canvas.ellipse("body", paint, 0, 0, 1.0, rng.uniform(0.11, 0.17))
    canvas.box("window", rng.near_one(GLASS), -0.55, -0.06, 0.62, -0.01)
    canvas.polygon("window", (50, 60, 75), (0.78, -0.07), (0.9, -0.04), (0.88, 0), (0.78, 0))
    near = rng.uniform(0.3, 0.6)
    wing = ((0.25, 0.04), (-0.3, near), (-0.48, near), (-0.2, 0.04))
    canvas.polygon("wing", shaded(paint, 0.85), *wing)
    fin = ((-0.75, -0.02), (-1.08, 0.12), (-1.15, 0.1), (-0.95, -0.05))
    canvas.polygon("tail", shaded(paint, 0.8), *fin)
    for x, y in ((0.12, 0.2), (-0.1, near * 0.75)):
        canvas.ellipse("engine", shaded(trim, 0.8), x, y, 0.14, 0.07)


def draw_helicopter(canvas: Canvas, rng: Draws) -> None:
    """A helicopter from the side: cabin, tail boom, two rotors and skids."""
    paint = rng.near((215, 218, 222) if rng.chance(0.3) else rng.colour())
    canvas.polygon("tail", shaded(paint, 0.85), (0, -0.12), (-1.0, -0.1), (-1.0, -0.02), (0, 0.12))
    canvas.polygon("tail", shaded(paint, 0.7), (-0.88, -0.08), (-1.1, -0.32), (-0.98, -0.32))
    canvas.disc("rotor", rng.near((120, 120, 125)), -1.0, -0.12, rng.uniform(0.08, 0.14))
    canvas.ellipse("body", paint, 0.3, 0.02, 0.5, rng.uniform(0.26, 0.34))
    canvas.ellipse("window", rng.near_one(GLASS), 0.52, -0.03, 0.24, 0.17)
    canvas.box("rotor", (60, 60, 62), 0.22, -0.46, 0.28, -0.24)
    reach, tilt = rng.uniform(0.7, 1.05), rng.uniform(-0.06, 0.06)
    blade = rng.near((70, 70, 74), 30)
    ends = ((0.25 - reach, -0.44 - tilt), (0.25 + reach, -0.44 + tilt))
    canvas.line("rotor", blade, *ends, width=0.05)
    for x in (0.1, 0.5):
        canvas.line("pole", (60, 60, 62), (x, 0.25), (x, 0.45), width=0.03)
    canvas.line("pole", (60, 60, 62), (-0.2, 0.45), (0.8, 0.45), width=0.04)


def draw_sailboat(canvas: Canvas, rng: Draws) -> None:
    """A boat with a mast, a main sail and at times a jib."""
    cloth = rng.near((230, 228, 220) if rng.chance(0.5) else rng.colour())
    top = rng.uniform(-1.0, -0.75)
    canvas.line("pole", rng.near((110, 80, 55)), (0, 0.5), (0, top), width=0.05)
    sail = ((-0.05, top + 0.05), (-0.05, 0.32), (-rng.uniform(0.5, 0.8), 0.32))
    canvas.polygon("cloth", cloth, *sail)
    if rng.chance(0.8):
        jib = shaded(cloth, rng.uniform(0.75, 1.05))
        canvas.polygon("cloth", jib, (0.06, top + 0.2), (0.06, 0.35), (rng.uniform(0.4, 0.7), 0.35))
    hull = rng.near_one(((150, 60, 45), (240, 240, 235), (60, 70, 100), (120, 85, 55)))
    canvas.polygon("hull", hull, (-0.85, 0.42), (0.95, 0.42), (0.6, 0.72), (-0.65, 0.72))
    canvas.line("hull", shaded(hull, 0.6), (-0.8, 0.48), (0.88, 0.48), width=0.04)
