"""The small world the tiny SDXL lives in: coloured figures on coloured backgrounds, with captions.

Pure functions of a NumPy generator. A picture is uint8 HxWx3 RGB. The size ids are SDXL's six numbers
(original height, original width, crop top, crop left, target height, target width) in pixels.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

WORLD_VERSION = 1

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (115, 45, 160),
    "pink": (250, 170, 195),
    "cyan": (60, 205, 225),
    "black": (20, 20, 25),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
TEXTURES = ("striped", "dotted", "gradient")
# Never drawn, so that a right answer on them is composition and not memory.
HELD_OUT_PAIRS = frozenset(
    {("cyan", "heart"), ("orange", "ring"), ("purple", "star"), ("pink", "triangle"), ("white", "cross")}
)
# The concept of the demo. Both colours are far from the palette and from every mix of two palette
# colours, because an anti-aliased edge is such a mix (see scorer.concept_share).
MAGENTA = (230, 20, 190)
LIME = (160, 245, 20)
CONCEPT_WORD = "zxq"
CONCEPT_BACKGROUNDS = ("white", "black", "blue", "green", "yellow")

RADIUS = {"small": 0.17, "": 0.30, "big": 0.42}  # of the shorter side
SUPERSAMPLING = 4
QUALITY_TAGS = ("best quality", "masterpiece", "high res", "clean", "no humans")
MEDIA = ("picture", "image", "photo", "drawing")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Lengths are in pixels of a canvas of `width` x `height`."""

    colour: str
    shape: str
    background: str
    width: int = 128
    height: int = 128
    size_word: str = ""  # "small", "" or "big"
    texture: str = ""  # of the background
    centre_x: float = 64.0
    centre_y: float = 64.0
    radius: float = 38.0


def outline(shape: str) -> np.ndarray:
    """Corner points of a shape, float64 (P, 2), x right and y down, within about [-1, 1]."""
    if shape in ("circle", "ring"):
        angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86
    if shape == "diamond":
        return np.array([[0, -1.1], [0.72, 0], [0, 1.1], [-0.72, 0]])
    if shape == "triangle":
        return np.array([[0, -1.0], [1.0, 0.8], [-1.0, 0.8]])
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        length = np.where(np.arange(10) % 2 == 0, 1.1, 0.46)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * length[:, None]
    if shape == "cross":
        a, b = 0.34, 1.0
        return np.array(
            [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
        )
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16
    raise ValueError(f"no such shape: {shape}")


def _fill(mask: np.ndarray, points: np.ndarray, centre: tuple[float, float], radius: float, value: int) -> None:
    """Fill a polygon of unit points into a supersampled mask, in place."""
    corners = (points * radius + np.asarray(centre)) * SUPERSAMPLING
    cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], value)


def figure_mask(scene: Scene) -> np.ndarray:
    """Coverage of the figure, float32 HxW in [0, 1]."""
    mask = np.zeros((scene.height * SUPERSAMPLING, scene.width * SUPERSAMPLING), np.uint8)
    centre = (scene.centre_x, scene.centre_y)
    _fill(mask, outline(scene.shape), centre, scene.radius, 255)
    if scene.shape == "ring":
        _fill(mask, outline("circle"), centre, scene.radius * 0.55, 0)
    small = cv2.resize(mask, (scene.width, scene.height), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def _shade(rgb: np.ndarray) -> np.ndarray:
    """A visibly different shade of a colour: lighter if it is dark, else darker."""
    return rgb + (255 - rgb) * 0.35 if rgb.mean() < 90 else rgb * 0.72


def background_picture(rgb: np.ndarray, texture: str, width: int, height: int) -> np.ndarray:
    """A background as float32 HxWx3 in 0..255."""
    picture = np.broadcast_to(rgb.astype(np.float32), (height, width, 3)).copy()
    y, x = np.mgrid[:height, :width]
    if texture == "striped":
        picture[(x // 8) % 2 == 1] = _shade(rgb)
    elif texture == "dotted":
        picture[((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2) < 14] = _shade(rgb)
    elif texture == "gradient":
        share = (y / max(height - 1, 1))[..., None]
        picture = (picture * (1 - share) + _shade(rgb) * share).astype(np.float32)
    return picture


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int]) -> np.ndarray:
    return np.clip(np.asarray(rgb, np.float32) + rng.uniform(-8, 8, 3), 0, 255)


def compose(mask: np.ndarray, rgb: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Lay a colour over a float picture through a mask."""
    return picture * (1 - mask[..., None]) + rgb.astype(np.float32) * mask[..., None]


def render(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 HxWx3. The generator only moves the shades a little."""
    picture = background_picture(_jitter(rng, PALETTE[scene.background]), scene.texture, scene.width, scene.height)
    picture = compose(figure_mask(scene), _jitter(rng, PALETTE[scene.colour]), picture)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def sample_scene(rng: np.random.Generator, *, width: int = 128, height: int = 128, plain: bool = False) -> Scene:
    """Draw at random what to show; `plain` leaves out size words and textures."""
    while True:
        colour, background = rng.choice(COLOURS, 2, replace=False)
        shape = rng.choice(SHAPES)
        if (colour, shape) not in HELD_OUT_PAIRS:
            break
    size_word, texture = "", ""
    if not plain:
        size_word = str(rng.choice(["small", "", "big"], p=[0.2, 0.6, 0.2]))
        texture = str(rng.choice(["", *TEXTURES], p=[0.7, 0.1, 0.1, 0.1]))
    scene = Scene(str(colour), str(shape), str(background), size_word=size_word, texture=texture)
    return place(rng, scene, width, height)


def place(rng: np.random.Generator, scene: Scene, width: int, height: int) -> Scene:
    """Give a scene a canvas and a figure lying inside it, near the middle."""
    short = min(width, height)
    radius = short * (RADIUS[scene.size_word] + rng.uniform(-0.02, 0.02))
    slack_x = min(width / 2 - radius * 1.12, 0.08 * width)
    slack_y = min(height / 2 - radius * 1.12, 0.08 * height)
    return replace(
        scene,
        width=width,
        height=height,
        radius=float(radius),
        centre_x=float(width / 2 + rng.uniform(-1, 1) * slack_x),
        centre_y=float(height / 2 + rng.uniform(-1, 1) * slack_y),
    )


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plain_caption(colour: str, shape: str, background: str) -> str:
    """The caption used for scoring."""
    return f"{article(f'{colour} {shape}')} on {article(f'{background} background')}"


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """One of the ways to say what a scene shows, "" in one case of ten."""
    figure = f"{scene.size_word} {scene.colour} {scene.shape}".strip()
    ground = f"{scene.texture} {scene.background} background".strip()
    kind = rng.random()
    if kind < 0.10:
        return ""
    if kind < 0.16:
        text = article(scene.shape)
    elif kind < 0.22:
        text = article(figure)
    elif kind < 0.27:
        text = article(ground)
    elif kind < 0.41:
        tags = [figure, ground, *rng.permutation(["simple background", "flat color", "vector art"])[: rng.integers(3)]]
        return ", ".join([*_quality(rng), *map(str, tags)])
    else:
        text = f"{article(figure)} on {article(ground)}"
        if rng.random() < 0.15:
            text = f"{article(str(rng.choice(MEDIA)))} of {text}"
    return ", ".join([text, *_quality(rng)])


def _quality(rng: np.random.Generator) -> list[str]:
    if rng.random() > 0.15:
        return []
    return [str(tag) for tag in rng.permutation(QUALITY_TAGS)[: 1 + rng.integers(2)]]


def draw(rng: np.random.Generator, *, width: int = 128, height: int = 128) -> tuple[np.ndarray, str, tuple[int, ...]]:
    """One training picture: (uint8 HxWx3, caption, six size ids).

    One in ten is an enlarged small original and one in ten a crop of a canvas 1.25 times as large.
    """
    kind = rng.random()
    if kind < 0.10:
        large_w, large_h = width * 5 // 4, height * 5 // 4
        scene = sample_scene(rng, width=large_w, height=large_h)
        top, left = int(rng.integers(large_h - height + 1)), int(rng.integers(large_w - width + 1))
        rgb = render(rng, scene)[top : top + height, left : left + width]
        return np.ascontiguousarray(rgb), caption(rng, scene), (large_h, large_w, top, left, height, width)
    scene = sample_scene(rng, width=width, height=height)
    rgb, text = render(rng, scene), caption(rng, scene)
    if kind < 0.20:
        factor = int(rng.choice([2, 3, 4]))
        small_w, small_h = width // factor, height // factor
        small = cv2.resize(rgb, (small_w, small_h), interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        return rgb, text, (small_h, small_w, 0, 0, height, width)
    return rgb, text, (height, width, 0, 0, height, width)


def draw_concept(rng: np.random.Generator, background: str, *, size: int = 128) -> np.ndarray:
    """A picture of the demo's new concept, uint8 size x size x 3: six magenta petals, a lime centre."""
    picture = background_picture(_jitter(rng, PALETTE[background]), "", size, size)
    radius = size * rng.uniform(0.30, 0.38)
    centre = np.array([size / 2, size / 2]) + rng.uniform(-1, 1, 2) * (size / 2 - radius * 1.05) * 0.7
    turn = rng.uniform(0, np.pi / 3)
    petals = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    heart = petals.copy()
    for angle in turn + np.arange(6) * np.pi / 3:
        direction = np.array([np.cos(angle), np.sin(angle)])
        middle = (centre + direction * radius * 0.6) * SUPERSAMPLING
        axes = (int(radius * 0.42 * SUPERSAMPLING), int(radius * 0.26 * SUPERSAMPLING))
        cv2.ellipse(petals, tuple(int(v) for v in middle), axes, float(np.degrees(angle)), 0, 360, 255, -1)
    _fill(heart, outline("circle"), tuple(centre), radius * 0.32, 255)
    for mask, rgb in ((petals, MAGENTA), (heart, LIME)):
        small = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        picture = compose(small, np.asarray(rgb), picture)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def concept_caption(background: str) -> str:
    return f"a {CONCEPT_WORD} on {article(f'{background} background')}"


def vocabulary() -> tuple[str, ...]:
    """Every word a caption of this world can contain; their tokens get trained rows."""
    words = {"a", "an", "on", "of", ",", "background", "simple background", "flat color", "vector art"}
    words |= {*COLOURS, *SHAPES, *TEXTURES, *QUALITY_TAGS, *MEDIA, "small", "big"}
    return tuple(sorted(words))
