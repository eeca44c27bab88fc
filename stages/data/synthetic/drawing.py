"""How each synthetic answer looks.

Coarse, over the whole frame: scene (layout and hue), genre (light and contrast), year (film look). Fine, in a few
pixels: director (stripes of a corner emblem), writer (shape of a glyph somewhere in the lower band), way_speaking (the
mouth of a small face). Only over time: relationship (how two discs turn).
"""

from dataclasses import dataclass

import numpy as np

SIZE_PX = 112
EMBLEM_PX = 21
EMBLEM_CORNER_PX = (4, 4)  # row, column
GLYPH_PX = 24
GLYPH_ROWS_PX, GLYPH_COLUMNS_PX = (78, 87), (2, 87)  # where its upper left corner may lie
FACE_PX = 24
FACE_ROWS_PX, FACE_COLUMNS_PX = (3, 7), (80, 86)
ORBIT_CENTRES_PX = ((54.0, 30.0), (54.0, 82.0))  # row, column of discs A and B
ORBIT_RADIUS_PX = 13.0
DISC_RADIUS_PX = 9.0
DISC_COLOURS = ((1.0, 0.85, 0.0), (0.1, 0.15, 1.0))  # yellow with a black rim, blue with a white rim
_RIM_COLOURS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_RIM_PX = 1.5
_BAR_PX = 13
_GRAIN = 0.012
_SPEED_RAD_S = (1.0, 1.4)  # under half a turn between frames one second apart, so the sense stays visible

_SCENE_COLOURS = {
    "office": ((0.30, 0.55, 0.60), (0.60, 0.85, 0.85)),
    "hotel": ((0.80, 0.45, 0.35), (0.45, 0.25, 0.25)),
    "prison": ((0.35, 0.45, 0.30), (0.65, 0.75, 0.55)),
    "restaurant": ((0.75, 0.50, 0.75), (0.40, 0.25, 0.45)),
}
_GENRE_LIGHT = {  # gain per channel, contrast
    "comedy": ((1.40, 1.32, 1.20), 1.0),
    "action": ((1.0, 1.0, 1.0), 2.0),
    "romance": ((1.05, 0.92, 0.98), 0.4),
    "thriller": ((0.38, 0.42, 0.48), 1.0),
}
_TURNS = {  # direction of A and of B; 0 rests
    "friend": (1, 1),
    "ex-boyfriend ex-girlfriend": (1, -1),
    "husband wife": (0, 0),
    "boyfriend girlfriend": (1, 0),
}
# Row, column, height, width of dark patches on the face. All mouths have one area and one centre, so that only their
# shape tells them apart, not the mean grey of the region.
_MOUTHS = {
    "explain": ((15, 6, 4, 12),),
    "confront": ((14, 8, 6, 8),),
    "discuss": ((14, 6, 6, 4), (14, 14, 6, 4)),
    "teach": ((14, 5, 3, 4), (17, 8, 3, 8), (14, 15, 3, 4)),
}
_EYES = ((6, 6, 3, 3), (6, 15, 3, 3))
STRIPE_SHIFTS = 24  # a common multiple of the stripes' periods, 6 and 8


@dataclass(frozen=True)
class Motion:
    """The discs' angles: `phase_rad` at time 0 and `speed_rad_s`, each for A and B; the start is no clue."""

    phase_rad: tuple[float, float]
    speed_rad_s: tuple[float, float]


def draw_motion(relationship: str, rng: np.random.Generator) -> Motion:
    """Draw phases uniformly, speeds within 1.0 to 1.4 rad/s, and an overall direction that is no clue either."""
    sense = rng.choice((-1.0, 1.0))
    phases = rng.uniform(0, 2 * np.pi, size=2)
    speeds = rng.uniform(*_SPEED_RAD_S, size=2)
    turn_a, turn_b = _TURNS[relationship]
    return Motion(
        (float(phases[0]), float(phases[1])), (float(sense * turn_a * speeds[0]), float(sense * turn_b * speeds[1]))
    )


@dataclass(frozen=True)
class Marks:
    """Where chance put what a video shows: `row, column` of upper left corners in pixels, and how the discs move."""

    emblem_shift: int
    glyph_px: tuple[int, int]
    face_px: tuple[int, int]
    motion: Motion


def draw_frames(labels: dict[str, str], seed: tuple[int, ...], times_s: np.ndarray) -> np.ndarray:
    """Return the frames at `times_s` as `[T, 112, 112, 3]` uint8 RGB; the same seed draws the same video."""
    return draw_video(labels, seed, times_s)[0]


def draw_video(labels: dict[str, str], seed: tuple[int, ...], times_s: np.ndarray) -> tuple[np.ndarray, Marks]:
    """Return the frames as `draw_frames` does, and where in them the answers stand."""
    rng = np.random.default_rng(seed)
    motion = draw_motion(labels["relationship"], rng)
    still = _film_look(_lit(_scene(labels["scene"], rng), labels["genre"]), labels["year"])
    # The grain stands still: moving grain would be most of the file.
    still = np.clip(still + rng.normal(0, _GRAIN, size=(SIZE_PX, SIZE_PX, 1)), 0, 1)
    # Shifted stripes: their direction is the director, not the grey that a blurred corner happens to have.
    marks = Marks(
        emblem_shift=int(rng.integers(STRIPE_SHIFTS)),
        glyph_px=(int(rng.integers(*GLYPH_ROWS_PX)), int(rng.integers(*GLYPH_COLUMNS_PX))),
        face_px=(int(rng.integers(*FACE_ROWS_PX)), int(rng.integers(*FACE_COLUMNS_PX))),
        motion=motion,
    )
    _paste(still, emblem(labels["director"], marks.emblem_shift), *EMBLEM_CORNER_PX)
    _paste(still, glyph(labels["writer"]), *marks.glyph_px)
    _paste(still, face(labels["way_speaking"]), *marks.face_px)
    return _with_discs(still, motion, times_s), marks


def _grid() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / (SIZE_PX - 1)
    return rows, columns


def _scene(scene: str, rng: np.random.Generator) -> np.ndarray:
    rows, columns = _grid()
    shift = rng.uniform(-0.06, 0.06)
    layouts = {
        "office": rows + shift,
        "hotel": columns + shift,
        "prison": 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * (4 * columns + 4 * shift))),
        "restaurant": 1.4 * np.hypot(rows - 0.5 + shift, columns - 0.5),
    }
    mix = np.clip(layouts[scene], 0, 1)[..., None]
    first, second = (np.asarray(colour) + rng.uniform(-0.03, 0.03, size=3) for colour in _SCENE_COLOURS[scene])
    return first * (1 - mix) + second * mix


def _lit(image: np.ndarray, genre: str) -> np.ndarray:
    gain, contrast = _GENRE_LIGHT[genre]
    return np.clip(((image - 0.5) * contrast + 0.5) * np.asarray(gain), 0, 1)


def _film_look(image: np.ndarray, year: str) -> np.ndarray:
    rows, columns = _grid()
    grey = image @ np.array([[0.299], [0.587], [0.114]])
    if year == "0":
        return np.repeat(grey, 3, axis=2)
    if year == "3":
        return grey * np.array([1.12, 0.92, 0.62])
    if year == "6":
        far = np.maximum(abs(rows - 0.5), abs(columns - 0.5))[..., None]
        return image * np.clip((0.52 - far) / 0.14, 0.05, 1)
    assert year == "8"
    bars = image.copy()
    bars[:_BAR_PX] = bars[-_BAR_PX:] = 0
    return bars


def emblem(director: str, shift: int) -> np.ndarray:
    """Return a `[21, 21]` grey tile whose stripes, about 3 px wide, run in the director's direction."""
    rows, columns = np.mgrid[0:EMBLEM_PX, 0:EMBLEM_PX]
    across, width = {
        "steven": (rows, 3),
        "martin": (columns, 3),
        "ron": (rows + columns, 4),  # one step in both axes crosses a diagonal stripe by 1.4 px
        "mark": (rows - columns, 4),
    }[director]
    return np.where((across + shift) // width % 2 == 0, 1.0, 0.0)


def glyph(writer: str) -> np.ndarray:
    """Return a `[24, 24]` grey tile with the writer's shape in white on black."""
    rows, columns = np.mgrid[0:GLYPH_PX, 0:GLYPH_PX] - (GLYPH_PX - 1) / 2
    square = np.maximum(abs(rows), abs(columns))
    # 144 pixels of ink each, so that only the shape tells them apart.
    inked = {
        "ian": (np.minimum(abs(rows), abs(columns)) < 2) & (square < 10),
        "stephen": abs(np.hypot(rows, columns) - 8.1) < 1.5,
        "john": (square > 8) & (square < 10),
        "david": (rows < 7) & (1.6 * abs(columns) < rows + 8.25),
    }
    return np.where(inked[writer], 1.0, 0.0)


def face(way_speaking: str) -> np.ndarray:
    """Return a `[24, 24]` grey tile: a pale head with two eyes and the mouth of this way of speaking."""
    rows, columns = np.mgrid[0:FACE_PX, 0:FACE_PX] - (FACE_PX - 1) / 2
    tile = np.where(np.hypot(rows, columns) < FACE_PX / 2, 0.9, 0.0)
    for row, column, height, width in (*_EYES, *_MOUTHS[way_speaking]):
        tile[row : row + height, column : column + width] = 0.0
    return tile


def _paste(image: np.ndarray, tile: np.ndarray, row: int, column: int) -> None:
    image[row : row + tile.shape[0], column : column + tile.shape[1]] = tile[..., None]


def _with_discs(still: np.ndarray, motion: Motion, times_s: np.ndarray) -> np.ndarray:
    frames = np.repeat(_as_uint8(still)[None], len(times_s), axis=0)
    reach = ORBIT_RADIUS_PX + DISC_RADIUS_PX + 1
    for disc, (row, column) in enumerate(ORBIT_CENTRES_PX):
        # Only the square that the disc can reach is drawn for each frame.
        area = np.s_[int(row - reach) : int(row + reach) + 1, int(column - reach) : int(column + reach) + 1]
        rows, columns = (axis[area] for axis in np.mgrid[0:SIZE_PX, 0:SIZE_PX].astype(np.float32))
        angle = (motion.phase_rad[disc] + motion.speed_rad_s[disc] * times_s).astype(np.float32)[:, None, None]
        distance = np.hypot(
            rows - row - ORBIT_RADIUS_PX * np.sin(angle), columns - column - ORBIT_RADIUS_PX * np.cos(angle)
        )
        pixels = still[area][None]
        for radius, colour in ((DISC_RADIUS_PX, _RIM_COLOURS[disc]), (DISC_RADIUS_PX - _RIM_PX, DISC_COLOURS[disc])):
            cover = np.clip(radius - distance + 0.5, 0, 1)[..., None]
            pixels = pixels * (1 - cover) + np.asarray(colour, dtype=np.float32) * cover
        frames[:, area[0], area[1]] = _as_uint8(pixels)
    return frames


def _as_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(image * 255).astype(np.uint8)
