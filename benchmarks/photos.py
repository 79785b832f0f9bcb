"""How well photographed digits are read: python benchmarks/photos.py

Puts MNIST digits on synthetic paper, under the conditions of people's pictures, reads the files by
noprop_lab/pictures.py, and asks the network in noprop_lab/weights/mnist.pt. Prints two Markdown tables, the
time and memory of pictures of 12 megapixels, and keeps the values in benchmarks/results/photos.json.

    python benchmarks/photos.py                         200 test digits a condition
    python benchmarks/photos.py --split val --seed 1    validation digits, on which the reader was tuned
    python benchmarks/photos.py --only shadow --save DIR    one condition; its pictures, and what the network sees

Every picture is drawn from (seed, condition, number): paper, light, ink, place, size and noise differ.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from skimage.morphology import skeletonize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.machine import matmul_peak
from noprop_lab.networks import load
from noprop_lab.pictures import read_pictures
from noprop_lab.settings import LabConfig

ROOT = Path(noprop.__file__).parent
WEIGHTS, RESULTS = ROOT / "noprop_lab/weights/mnist.pt", ROOT / "benchmarks/results/photos.json"
Rng = np.random.Generator
SHAPE = (660, 880)  # of a photograph: height, width

# --- Digits ------------------------------------------------------------------------------------------------


def stencil(digit: np.ndarray, size: int, pen: float | None = None) -> np.ndarray:
    """Share of ink, (size, size) of 0 ... 1: a digit (28, 28) enlarged, or drawn along its middle with a pen."""
    large = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), float) / 255
    if pen is None:
        return np.clip((large - 0.4) * size / 56 + 0.5, 0, 1)
    smooth = ndimage.gaussian_filter(large, size / 90)  # or the middle has spurs
    distance = ndimage.distance_transform_edt(~skeletonize(smooth > 0.35))
    return np.clip(pen / 2 + 0.5 - distance, 0, 1)


def placed(digits: list[np.ndarray], shape: tuple[int, int], rng: Rng, pen=None, part=(0.35, 0.8)) -> np.ndarray:
    """Share of ink on a sheet: digits side by side, of that part of its height, as far as there is room."""
    ink = np.zeros(shape)
    if not digits:
        return ink
    height, width = shape
    size = int(min(rng.uniform(*part) * height, 0.95 * width / len(digits)))
    left = rng.integers(0, width - size * len(digits) + 1)
    top = rng.integers(0, height - size + 1)
    for i, digit in enumerate(digits):
        x, y = left + i * size, int(np.clip(top + rng.integers(-size // 10, size // 10 + 1), 0, height - size))
        ink[y : y + size, x : x + size] = stencil(digit, size, pen)
    return ink


# --- Paper, light, camera ----------------------------------------------------------------------------------


def smooth_noise(shape: tuple[int, int], rng: Rng, grain: float) -> np.ndarray:
    """Noise of mean 0 and deviation 1 whose spots are grain pixels large."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), grain)
    return noise / noise.std()


def gradient(shape: tuple[int, int], rng: Rng, low: float = 0.5) -> np.ndarray:
    """Light that falls from 1 to low in any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[: shape[0], : shape[1]]
    t = x * np.cos(angle) + y * np.sin(angle)
    return 1 - (1 - low) * (t - t.min()) / np.ptp(t)


def polygon(shape: tuple[int, int], points) -> np.ndarray:
    canvas = Image.new("L", shape[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(map(float, p)) for p in points], fill=255)
    return np.asarray(canvas, float) / 255


def shadow(shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """Light of which a hand or a head, half of the picture large, takes a third to a half, with a soft edge."""
    height, width = shape
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    radius = rng.uniform(0.3, 0.6, 7) * width
    centre = rng.uniform(0, width), rng.choice([0, height])
    points = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], 1)
    dark = ndimage.gaussian_filter(polygon(shape, points), rng.uniform(2, 25))
    return 1 - rng.uniform(0.35, 0.5) * dark


def creases(shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """Light on paper that was folded two to four times: at each fold one side is darker, beside a bright edge."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    light = 1 + 0.02 * smooth_noise(shape, rng, 20)
    for _ in range(rng.integers(2, 5)):
        angle, depth = rng.uniform(0, np.pi), rng.uniform(0.08, 0.2)
        away = (x - rng.uniform(0.2, 0.8) * shape[1]) * np.cos(angle)
        away = away + (y - rng.uniform(0.2, 0.8) * shape[0]) * np.sin(angle)
        width = rng.uniform(1.5, 4)
        light = light - depth * np.exp(-((away / width) ** 2)) + 0.1 * np.exp(-(((away - 3 * width) / width) ** 2))
        light = light - 0.5 * depth * np.exp(-np.abs(away) / 30) * (away < 0)
    return light


def lines(shape: tuple[int, int], rng: Rng, squared: bool) -> np.ndarray:
    """Share of print: ruled or squared paper, turned by ≤ 3°."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    angle, pitch = np.radians(rng.uniform(-3, 3)), rng.uniform(30, 70) * (0.8 if squared else 1)
    width, phase, found = rng.uniform(1.2, 2.6), rng.uniform(0, 70), np.zeros(shape)
    for t in (y * np.cos(angle) - x * np.sin(angle), x * np.cos(angle) + y * np.sin(angle))[: 1 + squared]:
        away = np.abs((t + phase) % pitch - pitch / 2)
        found = np.maximum(found, np.clip(width / 2 + 0.5 - away, 0, 1))
    return found


def photograph(colours: np.ndarray, light: np.ndarray, rng: Rng, noise: float = 3, jpeg: bool = True):
    """What a camera makes of reflectances (H, W, 3) in 0 ... 255 under a light (H, W)."""
    seen = colours * light[..., None]
    seen = ndimage.gaussian_filter(seen, (0.7, 0.7, 0)) + rng.normal(scale=noise, size=seen.shape)
    picture = Image.fromarray(seen.clip(0, 255).astype(np.uint8))
    if not jpeg:
        return picture
    picture.save(file := io.BytesIO(), "JPEG", quality=85)
    return Image.open(file).convert("RGB")


PENS = ((25, 25, 30), (20, 30, 110), (40, 45, 60))  # black, blue, faded
COLOURS = ((190, 30, 40), (30, 60, 200), (20, 130, 60), (220, 110, 20), (130, 40, 150))


def page(
    digits, rng: Rng, light: Callable | None = None, print_=None, ink=PENS, pen=None, share=1.0, noise=3.0, **more
):
    """A photograph of digits on a page.

    light and print_: of (shape, rng), the light and the share of printed lines; pen: limits of its width in
    pixels, None: the digit's own; share: of ink, 1 covers the paper.
    """
    paper = rng.uniform(225, 250) * np.array([1, rng.uniform(0.97, 1), rng.uniform(0.9, 1)])
    colours = np.broadcast_to(paper, (*SHAPE, 3))
    if print_:
        printed = print_(SHAPE, rng) * rng.uniform(0.45, 0.8)
        colour = np.array([(90, 130, 200), (120, 120, 120), (200, 120, 120)][rng.integers(3)])
        colours = colours + printed[..., None] * (colour - colours)
    width = rng.uniform(*pen) if pen else None
    cover = placed(digits, SHAPE, rng, width, **more) * share
    if share != 1:  # graphite stays on the paper's tips
        cover = cover * np.clip(1 + 0.25 * smooth_noise(SHAPE, rng, 1), 0, None)
    colours = colours + cover[..., None] * (np.array(ink[rng.integers(len(ink))]) - colours)
    return photograph(colours, light(SHAPE, rng) if light else np.ones(SHAPE), rng, noise)


# --- Conditions --------------------------------------------------------------------------------------------


def enlarged(digits, rng: Rng):
    """A drawing program's export, dark on light or light on dark."""
    size = int(rng.integers(100, 600))
    ink = placed(digits, (size, size), rng, part=(0.5, 1.0))
    return Image.fromarray((255 * (ink if rng.random() < 0.5 else 1 - ink)).astype(np.uint8))


def thin(digits, rng: Rng):
    """A pen of one to three pixels on a large empty picture."""
    size, pen = int(rng.integers(280, 1200)), rng.uniform(1, 3)
    ink = placed(digits, (size, size), rng, pen if size < 500 else pen * size / 500, part=(0.5, 0.95))
    return Image.fromarray((255 * (1 - ink)).astype(np.uint8))


def framed(digits, rng: Rng):
    """A picture with a frame of one to six pixels, at its border or a little inside."""
    size, width, inset = int(rng.integers(100, 600)), int(rng.integers(1, 7)), int(rng.integers(0, 12))
    ink = np.zeros((size, size))
    inner = inset + width + 4
    ink[inner : size - inner, inner : size - inner] = placed(digits, (size - 2 * inner,) * 2, rng, part=(0.5, 0.9))
    edge = np.zeros_like(ink)
    edge[inset : size - inset, inset : size - inset] = 1
    edge[inset + width : size - inset - width, inset + width : size - inset - width] = 0
    return Image.fromarray((255 * (1 - np.maximum(ink, edge))).astype(np.uint8))


def desk(digits, rng: Rng):
    """A sheet, turned by ≤ 10°, on a desk with a grain, which is darker."""
    height, width = SHAPE
    wood = np.array([(120, 80, 50), (70, 60, 55), (150, 115, 80), (60, 70, 90)][rng.integers(4)], float)
    grain = ndimage.gaussian_filter(rng.normal(size=SHAPE), (1, 40))
    desktop = wood * (1 + 0.15 * grain / grain.std())[..., None]
    sheet = int(0.8 * height), int(rng.uniform(0.55, 0.8) * width)
    ink = placed(digits, sheet, rng, part=(0.4, 0.8))
    paper = rng.uniform(225, 250)
    colours = np.full((*sheet, 3), paper)
    colours = colours + ink[..., None] * (np.array(PENS[rng.integers(3)]) - colours)
    layer = Image.fromarray(colours.astype(np.uint8)).convert("RGBA")
    layer = layer.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    whole = Image.fromarray(desktop.clip(0, 255).astype(np.uint8)).convert("RGBA")
    place = [int(rng.uniform(-0.02, 1.02) * (a - b)) for a, b in zip(whole.size, layer.size, strict=True)]
    under = Image.new("L", whole.size)
    under.paste(layer.getchannel("A"), [x + 6 for x in place])
    dark = Image.new("RGBA", whole.size, (0, 0, 0, 255))
    whole = Image.composite(dark, whole, under.filter(ImageFilter.GaussianBlur(8)).point(lambda x: x * 0.4))
    whole.paste(layer, place, layer)
    return photograph(np.asarray(whole.convert("RGB"), float), gradient(SHAPE, rng, 0.75), rng)


def transparent(digits, rng: Rng):
    """White, black or coloured ink on nothing."""
    size = int(rng.integers(100, 600))
    alpha = Image.fromarray((255 * placed(digits, (size, size), rng, part=(0.5, 1.0))).astype(np.uint8))
    shade = [(255, 255, 255), (0, 0, 0), *COLOURS][rng.integers(7) if rng.random() < 0.5 else 0]
    picture = Image.new("RGBA", (size, size), (*shade, 255))
    picture.putalpha(alpha)
    return picture


def sixteen_bits(digits, rng: Rng):
    """A PNG of 16 bits, which may use 12 of them."""
    size, top = int(rng.integers(100, 600)), [2**16 - 1, 2**12 - 1][rng.integers(2)]
    ink = placed(digits, (size, size), rng, part=(0.5, 1.0))
    return Image.fromarray(((ink if rng.random() < 0.5 else 1 - ink) * top).astype(np.uint16))


def chalk(digits, rng: Rng):
    """Chalk on a board."""
    board = np.array([(35, 60, 50), (40, 40, 45)][rng.integers(2)]) * np.ones((*SHAPE, 3))
    board = board * (1 + 0.08 * smooth_noise(SHAPE, rng, 30))[..., None]
    cover = placed(digits, SHAPE, rng, rng.uniform(8, 20)) * (0.85 + 0.08 * smooth_noise(SHAPE, rng, 1)).clip(0, 1)
    colours = board + cover[..., None] * (np.array([235, 235, 230]) - board)
    return photograph(colours, gradient(SHAPE, rng, 0.6), rng, 4)


def many(digits, rng: Rng):
    return page(digits, rng, light=gradient, part=(0.3, 0.6))


def everything(digits, rng: Rng):
    """A ball pen on ruled paper, in falling light with a shadow, noisy."""

    def light(shape, rng):
        return gradient(shape, rng, 0.65) * shadow(shape, rng)

    return page(digits, rng, light, partial(lines, squared=rng.random() < 0.5), pen=(4, 8), noise=5)


CONDITIONS: dict[str, Callable] = {
    "export, enlarged": enlarged,
    "plain paper": page,
    "falling light": partial(page, light=gradient),
    "shadow": partial(page, light=shadow),
    "noise": partial(page, noise=20.0),
    "creases": partial(page, light=creases),
    "ruled paper": partial(page, print_=partial(lines, squared=False)),
    "squared paper": partial(page, print_=partial(lines, squared=True)),
    "frame": framed,
    "sheet on a desk": desk,
    "thin pen, large picture": thin,
    "ball pen": partial(page, pen=(3, 6), part=(0.3, 0.7)),
    "pencil": partial(page, pen=(4, 9), ink=((90, 90, 95),), share=0.6, noise=4),
    "coloured ink": partial(page, ink=COLOURS, pen=(6, 16)),
    "on transparent": transparent,
    "16 bits": sixteen_bits,
    "chalk on a board": chalk,
    "four digits": many,
    "ball pen, ruled or squared, shadow, noise": everything,
}
NOTHING = ("plain paper", "falling light", "shadow", "noise", "creases", "ruled paper", "squared paper")
NOTHING += ("frame", "sheet on a desk", "ball pen, ruled or squared, shadow, noise")


# --- Measuring ---------------------------------------------------------------------------------------------


def drawn(name: str, numbers, split: noprop.Split, seed: int) -> tuple[Image.Image, list[int]]:
    """The picture of a condition with these digits of a split, and their labels."""
    rng = np.random.default_rng([seed, *name.encode(), *(list(numbers) or [0])])
    digits = [split.images[i, 0].numpy() for i in numbers]
    return CONDITIONS[name](digits, rng), split.labels[list(numbers)].tolist()


def answers(picture: Image.Image, model: noprop.NoProp, folder: Path):
    """The network's images of a picture, and its class probabilities, (N, classes); None where it is refused."""
    picture.save(path := folder / "picture.png")
    try:
        images = read_pictures(path, LabConfig())
    except noprop.Failure:
        return None, None
    return images, model.probabilities(images)[:, -1]


def measure(name: str, split: noprop.Split, count: int, seed: int, model, save: Path | None) -> dict[str, float]:
    """Of count digits: right, wrong and above 99 % sure, refused (not found); seconds a picture."""
    together = 4 if "four" in name else 1
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(split.labels))[:count]
    right = sure = refused = 0
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for i, numbers in enumerate(order.reshape(-1, together)):
            picture, labels = drawn(name, numbers.tolist(), split, seed)
            started = time.perf_counter()
            images, found = answers(picture, model, Path(folder))
            seconds += time.perf_counter() - started
            if found is None:
                refused += together
            else:
                best, said = found.max(-1).values.tolist(), found.argmax(-1).tolist()
                good = [a == b for a, b in zip(said, labels, strict=False)]
                good = good if len(said) == len(labels) else [False] * len(labels)
                right += sum(good)
                sure += sum(p > 0.99 and not g for p, g in zip(best, good, strict=False))
            if save and (found is None or not all(good)):
                save.mkdir(parents=True, exist_ok=True)
                stem = name.replace(" ", "_").replace(",", "") + f"_{i}"
                picture.convert("RGBA").save(save / f"{stem}.png")
                if found is not None:
                    seen = np.concatenate(list(images[:, 0].numpy()), 1)
                    Image.fromarray(seen).resize((seen.shape[1] * 5, 140), 0).save(save / f"{stem}_seen.png")
                print(stem, labels, None if found is None else (said, [f"{x:.3f}" for x in best]))
    return {"right": right, "sure and wrong": sure, "refused": refused, "digits": len(order), "seconds": seconds / (count / together)}
