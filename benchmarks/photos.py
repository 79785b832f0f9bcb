"""How well photographed digits are read: python benchmarks/photos.py

Puts MNIST digits on synthetic paper, under the conditions of people's pictures, reads the files by
noprop_lab/pictures.py, and asks the network in noprop_lab/weights/mnist.pt. Prints a Markdown table, the
time and memory of pictures of 12 megapixels, and keeps the values in benchmarks/results/photos.json.

    python benchmarks/photos.py                         200 test digits a condition
    python benchmarks/photos.py --split val --seed 1    validation digits, on which the reader was tuned
    python benchmarks/photos.py --only shadow --save DIR   one condition, keeping its pictures

Every picture is drawn from (seed, condition, number): paper, light, ink, place, size and noise differ.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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
from noprop_lab.pictures import asked, read_pictures
from noprop_lab.settings import LabConfig

ROOT = Path(noprop.__file__).parent
WEIGHTS, RESULTS = ROOT / "noprop_lab/weights/mnist.pt", ROOT / "benchmarks/results/photos.json"
Rng = np.random.Generator
SHAPE = (660, 880)  # of a photograph: height, width

# --- Digits ------------------------------------------------------------------------------------------------


def stencil(digit: np.ndarray, size: int, pen: float | None = None) -> np.ndarray:
    """Share of ink, (size, size) 0 ... 1: a digit (28, 28) enlarged, or drawn with a pen along its middle."""
    large = np.asarray(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), float) / 255
    if pen is None:
        return np.clip((large - 0.4) * size / 56 + 0.5, 0, 1)
    smooth = ndimage.gaussian_filter(large, size / 90)  # or the middle has spurs
    distance = ndimage.distance_transform_edt(~skeletonize(smooth > 0.35))
    return np.clip(pen / 2 + 0.5 - distance, 0, 1)


def placed(
    digits: list[np.ndarray], shape: tuple[int, int], rng: Rng, pen=None, part=(0.35, 0.8)
) -> np.ndarray:
    """Share of ink on a sheet: digits side by side, of that part of its height, as far as there is room."""
    ink = np.zeros(shape)
    if not digits:
        return ink
    height, width = shape
    size = int(min(rng.uniform(*part) * height, 0.95 * width / len(digits)))
    left = rng.integers(0, width - size * len(digits) + 1)
    top = rng.integers(0, height - size + 1)
    for i, digit in enumerate(digits):
        x, y = (
            left + i * size,
            int(np.clip(top + rng.integers(-size // 10, size // 10 + 1), 0, height - size)),
        )
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
    """Light of which something half of the picture large takes a third to a half, with a soft edge."""
    height, width = shape
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    radius = rng.uniform(0.3, 0.6, 7) * width
    centre = rng.uniform(0, width), rng.choice([0, height])
    points = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], 1)
    dark = ndimage.gaussian_filter(polygon(shape, points), rng.uniform(2, 25))
    return 1 - rng.uniform(0.35, 0.5) * dark


def creases(shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """Light on paper that was folded two to four times: a dark line beside a bright edge."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    light = 1 + 0.02 * smooth_noise(shape, rng, 20)
    for _ in range(rng.integers(2, 5)):
        angle, depth = rng.uniform(0, np.pi), rng.uniform(0.08, 0.2)
        away = (x - rng.uniform(0.2, 0.8) * shape[1]) * np.cos(angle)
        away = away + (y - rng.uniform(0.2, 0.8) * shape[0]) * np.sin(angle)
        width = rng.uniform(1.5, 4)
        light = (
            light
            - depth * np.exp(-((away / width) ** 2))
            + 0.1 * np.exp(-(((away - 3 * width) / width) ** 2))
        )
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
    digits,
    rng: Rng,
    light: Callable | None = None,
    print_=None,
    ink=PENS,
    pen=None,
    share=1.0,
    noise=3.0,
    **more,
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
    ink[inner : size - inner, inner : size - inner] = placed(
        digits, (size - 2 * inner,) * 2, rng, part=(0.5, 0.9)
    )
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
    cover = placed(digits, SHAPE, rng, rng.uniform(8, 20)) * (0.85 + 0.08 * smooth_noise(SHAPE, rng, 1)).clip(
        0, 1
    )
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


def drawn(name: str, numbers: list[int], split: noprop.Split, rng: Rng) -> Image.Image:
    """A picture of a condition with these digits of a split."""
    return CONDITIONS[name]([split.images[i, 0].numpy() for i in numbers], rng)


def answer(picture: Image.Image, model: noprop.NoProp, folder: str):
    """What the network sees of a picture, and class probabilities (N, classes); None where it is refused."""
    picture.save(path := Path(folder) / "picture.png", compress_level=1)
    try:
        views = read_pictures(path, LabConfig())
    except noprop.Failure:
        return None, None
    return views[0], asked(lambda images: model.probabilities(images)[:, -1], views)


def keep(picture: Image.Image, images: torch.Tensor | None, folder: Path, name: str) -> None:
    """Save a picture, and beside it what the network sees of it."""
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
    if images is not None:
        seen = Image.fromarray(np.concatenate(list(images[:, 0].numpy()), 1))
        seen.resize([5 * x for x in seen.size], Image.Resampling.NEAREST).save(folder / f"{name}_seen.png")


def measure(name: str, split: str, count: int, seed: int, save: Path | None) -> dict[str, int]:
    """Of count digits of a split: right; wrong, but above 99 % sure; refused. Another number found: wrong."""
    torch.set_num_threads(1)
    part, model = getattr(noprop.load_data(noprop.Config()), split), load(WEIGHTS)
    group, found = 4 if "four" in name else 1, {"right": 0, "wrong and sure": 0, "refused": 0}
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(part.labels))[:count]
    with tempfile.TemporaryDirectory() as folder:
        for i, numbers in enumerate(order.reshape(-1, group).tolist()):
            picture = drawn(name, numbers, part, np.random.default_rng([seed, *name.encode(), *numbers]))
            images, probability = answer(picture, model, folder)
            labels = part.labels[numbers]
            if images is None:
                found["refused"] += group
            elif len(images) == len(labels):
                certainty, said = probability.max(-1)
                found["right"] += (said == labels).sum().item()
                found["wrong and sure"] += ((said != labels) & (certainty > 0.99)).sum().item()
            else:
                found["wrong and sure"] += (probability.max(-1).values > 0.99).any().item()
            if save:
                keep(picture, images, save, f"{name.replace(' ', '_')}_{i}_{labels.tolist()}")
    return found


def refused_blank(name: str, count: int, seed: int, save: Path | None) -> int:
    """How many of count pictures without a digit are refused."""
    torch.set_num_threads(1)
    model, refused = load(WEIGHTS), 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            picture = CONDITIONS[name]([], np.random.default_rng([seed, *name.encode(), i, 1]))
            images, _ = answer(picture, model, folder)
            refused += images is None
            if save:
                keep(picture, images, save, f"blank_{name.replace(' ', '_')}_{i}")
    return refused


def exports() -> dict[str, float]:
    """Accuracy on all test images, saved as they are, and how many answers are unlike evaluate's."""
    test, model = noprop.load_data(noprop.Config()).test, load(WEIGHTS)
    expected, found = model.predict(test.images), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flip in (("light on dark", 0), ("dark on light", 255)):
            images = []
            for image in test.images[:, 0].numpy():
                Image.fromarray(image ^ np.uint8(flip)).save(path := Path(folder) / "picture.png")
                images.append(read_pictures(path, LabConfig()))
            said = model.predict(torch.cat(images).flatten(0, 1))
            accuracy = 100 * (said == test.labels).float().mean().item()
            found[name] = {"accuracy": accuracy, "differ": (said != expected).sum().item()}
    return found


READING = """
import sys, time
from pathlib import Path
import skimage.filters, skimage.measure, skimage.morphology
from noprop_lab.networks import load
from noprop_lab.pictures import asked, read_pictures
from noprop_lab.settings import LabConfig

def megabytes(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024

model, path = load(sys.argv[1]), Path(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before, started = megabytes("VmRSS:"), time.perf_counter()
asked(model.probabilities, read_pictures(path, LabConfig()))
print(time.perf_counter() - started, megabytes("VmHWM:") - before)
"""  # of Linux


def large(seed: int) -> dict[str, list[float]]:
    """Seconds for a picture of 4000 by 3000 pixels, and MiB above what the process had before."""
    test, found = noprop.load_data(noprop.Config()).test, {}
    picture = drawn("falling light", [0], test, np.random.default_rng([seed, 12])).resize((4000, 3000))
    with tempfile.TemporaryDirectory() as folder:
        for kind, form in (("jpg", "RGB"), ("png", "RGB"), ("png", "RGBA")):
            picture.convert(form).save(path := Path(folder) / f"large.{kind}", compress_level=1)
            command = [sys.executable, "-c", READING, str(WEIGHTS), str(path)]
            runs = [
                subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                for _ in range(3)
            ]
            values = [list(map(float, run.stdout.split())) for run in runs]
            found[f"{kind}, {form}"] = [min(x[0] for x in values), max(x[1] for x in values)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--count", type=int, default=200, help="digits a condition, a multiple of 4")
    parser.add_argument("--blank", type=int, default=100, help="pictures without a digit a condition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(CONDITIONS), help="one condition, beside the others' results")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="keep the pictures, and what the network sees"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    names = [args.only] if args.only else list(CONDITIONS)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {}
        for x in names:
            jobs[x] = [pool.submit(measure, x, args.split, args.count, args.seed, args.save)]
            if x in NOTHING:
                jobs[x].append(pool.submit(refused_blank, x, args.blank, args.seed, args.save))
        print("| digits on | right, % | wrong, above 99 % sure | refused | without a digit: refused, % |")
        print("|---|---|---|---|---|")
        rows = {}
        for name, (job, *empty) in jobs.items():
            rows[name] = job.result()
            right, sure, refused = rows[name].values()
            for x in empty:
                rows[name]["blank refused"] = x.result()
            share = f"{100 * rows[name]['blank refused'] / args.blank:.0f}" if empty else ""
            print(f"| {name} | {100 * right / args.count:.1f} | {sure} | {refused} | {share} |", flush=True)
    if args.only:
        if args.split == "test":
            kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            asked = {"seed": args.seed, "digits": args.count, "blank": args.blank}
            kept.setdefault("by itself", {})[args.only] = asked | rows[args.only]
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        return
    linux = sys.platform == "linux"  # whose /proc tells the memory
    clean, twelve, peak = exports(), large(args.seed) if linux else {}, matmul_peak()
    for name, found in clean.items():
        print(f"Exports of 28 by 28, {name}: {found['accuracy']:.2f} %, {found['differ']} unlike evaluate's")
    for name, (seconds, megabytes) in twelve.items():
        print(f"12 megapixels, {name}: {seconds:.2f} s, {megabytes:.0f} MiB")
    print(f"float32 matmul peak {peak:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    result = {"split": args.split, "seed": args.seed, "digits": args.count, "blank": args.blank, "rows": rows}
    result |= {"exports": clean, "twelve megapixels (s, MiB)": twelve, "matmul peak (GFLOP/s)": peak}
    result |= {"versions": noprop.made_with(noprop.CPU)}
    if args.split == "test":
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        result |= {key: kept[key] for key in ("by itself",) if key in kept}  # which --only made
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
