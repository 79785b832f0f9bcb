"""A user's pictures, as the data set of a network has its own; handwriting is found on photographed paper.

From a photograph to images like MNIST's (read_digits):
    upright, at most SIDE pixels large                              open_upright
    the sheet of paper, if a darker desk lies around it             within_sheet
    ink = 1 - picture / ground, weighed by the ink's own colour     ink_of
    without the lines of ruled and squared paper, and frames        without_lines
    connected strokes, put together to digits, from left to right   digits_of
    each thickened to MNIST's strokes, 20 pixels large, centred     like_mnist
    each also turned to both sides                                  turned
Lengths are fractions of the picture's longer side where they can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from noprop_example import Failure
from noprop_lab.settings import LabConfig

SIDE = 800  # pixels of the longer side, to which pictures are shrunk
SMALL = 300  # pixels, to which small ones are enlarged
FAINT = 0.2  # of the light that ink takes away, at least: pencils take more, folds less
BROAD = 0.68  # of the light, that ink of a broad stroke takes away: shadows on a photograph take less
LOW = 0.45  # of the darkest ink's, what still belongs to a stroke that is darker elsewhere
TURN = math.radians(12)  # by which noprop_example.augment() turns at most
STROKE = 0.12  # width of a stroke, of a digit's size, to which thinner ones are thickened: MNIST's are so


def read_picture(path: Path, config: LabConfig) -> Tensor:
    """A picture file as the config's data set has its images, uint8 (C, H, W). Raises Failure."""
    channels, *size = config.image_shape
    picture = open_upright(path, max(size))
    if config.dataset == "fashion_mnist":
        return torch.from_numpy(light_on_dark(picture, size[0]).copy()).unsqueeze(0)
    colours = on_white(picture).convert("L" if channels == 1 else "RGB")
    fitted = np.array(ImageOps.fit(colours, size[::-1]))
    return torch.from_numpy(fitted).view(*size, channels).permute(2, 0, 1)


def read_pictures(path: Path, config: LabConfig) -> Tensor:
    """What there is to classify in a picture file, uint8 (V, N, C, H, W): of digits, all from left to right.

    There are V = 3 views of digits that were found on paper, see turned(); 1 of all else. Raises Failure for
    a file that can't be read, and where nothing looks like a digit.
    """
    if config.dataset in ("mnist", "kmnist"):
        return read_digits(path, size=20 if config.dataset == "mnist" else 28)
    return read_picture(path, config)[None, None]


def asked(ask: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """ask(), class probabilities (N, ...) of images (N, C, H, W), in the mean of views (V, N, C, H, W)."""
    return ask(views.flatten(0, 1)).unflatten(0, views.shape[:2]).mean(0)


# --- Files -------------------------------------------------------------------------------------------------


def open_upright(path: Path, least: int = 1) -> Image.Image:
    """A PNG or JPEG as RGBA, upright, its longer side SIDE at most, if the shorter stays at least that.

    Raises Failure.
    """
    try:
        with Image.open(path) as file:
            file.draft(None, (max(SIDE, least),) * 2)  # a JPEG need not be unpacked larger
            deep = file.mode[0] in "IF"  # 16 bits, or floats, which convert() would clip
            file.load()
            try:
                picture = ImageOps.exif_transpose(file)
            except Exception:  # of a damaged EXIF: the picture lies as it lies
                picture = file.copy()
            picture = eight_bits(picture) if deep else picture
        picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGBA")
        if (factor := min(math.ceil(max(picture.size) / SIDE), min(picture.size) // least)) > 1:
            picture = picture.reduce(factor)
        return picture.convert("RGBA")
    except Exception as error:  # a damaged file can raise anything here
        raise Failure(f"cannot read the image {path}: {Failure(error)}") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, of which a camera or scanner may have used 10 or 12, or of floats from 0 to 1."""
    values = np.nan_to_num(np.asarray(picture, np.float32)).clip(0)
    return Image.fromarray((values * (255 / max(1, values.max()))).round().astype(np.uint8))


def on_ground(picture: Image.Image, shade: str) -> Image.Image:
    """RGB of an RGBA picture on an even ground."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, shade), picture).convert("RGB")


def on_white(picture: Image.Image) -> Image.Image:
    return on_ground(picture, "white")


# --- Digits on paper ---------------------------------------------------------------------------------------


def read_digits(path: Path, size: int = 20) -> Tensor:
    """The digits in a picture, from left to right, uint8 (3, N, 1, 28, 28), size pixels large, see turned().

    A picture of 28 by 28 pixels whose ground is even is taken as it is, (1, 1, 1, 28, 28): light on dark, as
    MNIST's own. Raises Failure.
    """
    picture = open_upright(path)
    if picture.size == (28, 28) and (own := as_it_is(picture)) is not None:
        return torch.from_numpy(own.copy())[None, None, None]
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise Failure("pictures take scikit-image: pip install scikit-image", 1) from error
    found = [like_mnist(x, size) for x in find_digits(picture)]
    if not found:
        raise Failure(f"{path} shows nothing that looks like a digit")
    return turned(torch.from_numpy(np.stack(found)).unsqueeze(1))


def turned(images: Tensor) -> Tensor:
    """Views (3, N, 1, 28, 28), uint8: as they are, and turned to both sides as far as in training.

    Whoever writes on paper has no upright grid, and a network that sees one view is too sure of it.
    """
    cos, sin = math.cos(TURN), math.sin(TURN)
    theta = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]], [[cos, sin, 0], [-sin, cos, 0]]])
    theta = theta.repeat_interleave(len(images), 0)
    grid = F.affine_grid(theta, [len(theta), *images.shape[1:]], align_corners=False)
    sides = F.grid_sample(images.float().repeat(2, 1, 1, 1), grid, align_corners=False).round().byte()
    return torch.cat([images, sides]).unflatten(0, (3, -1))


def opaque(picture: Image.Image) -> Image.Image:
    """On white, but light ink on little else than nothing is put on black, so that it is seen."""
    alpha = np.asarray(picture.getchannel("A"), np.float32)
    if not 0 < alpha.mean() < 128:
        return on_white(picture)
    light = (np.asarray(picture.convert("RGB").convert("L")) * alpha).sum() / alpha.sum() > 128
    return on_ground(picture, "black" if light else "white")


def border_of(values: np.ndarray) -> np.ndarray:
    """The outermost values of (H, W)."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def as_it_is(picture: Image.Image) -> np.ndarray | None:
    """The pixels of an image of the data set's own size, light on dark; None if its ground is not even."""
    gray = np.asarray(opaque(picture).convert("L"))
    border = border_of(gray)
    ground = np.median(border)
    if ground not in (0, 255) or (border == ground).mean() < 0.9 or np.ptp(gray) < 128:
        return None
    return gray if ground == 0 else 255 - gray


def find_digits(picture: Image.Image) -> list[np.ndarray]:
    """Of each digit, from left to right, its ink 0 ... 1 in its box."""
    pixels = np.asarray(enlarged(opaque(picture)), np.float32) / 255  # (H, W, 3)
    pixels = within_sheet(pixels)
    if light_ink(pixels.mean(-1)):
        pixels = 1 - pixels
    ink = ink_of(pixels)
    return digits_of(without_lines(ink))


def enlarged(picture: Image.Image) -> Image.Image:
    """Small pictures larger, so that a stroke is some pixels wide."""
    factor = math.ceil(SMALL / max(picture.size))
    return picture.resize([factor * x for x in picture.size], Image.Resampling.BICUBIC)


def shrunk(gray: np.ndarray, side: int) -> np.ndarray:
    """Means over squares, so many that the longer side has about that many."""
    factor = max(1, max(gray.shape) // side)
    return np.asarray(Image.fromarray(gray).reduce(factor))


def light_ink(gray: np.ndarray) -> bool:
    """Whether what differs from its wide surroundings' median is mostly lighter.

    On a light ground it must be much lighter: there it is rather a patch of light between shadows.
    """
    from scipy import ndimage

    small = shrunk(gray, 48)
    differs = small - ndimage.median_filter(small, 25, mode="reflect")
    differs[abs(differs) < 0.03] = 0
    lighter, darker = (differs.clip(0) ** 2).sum(), (differs.clip(None, 0) ** 2).sum()
    return lighter > darker * (4 if np.median(small) > 0.4 else 1)


def within_sheet(pixels: np.ndarray) -> np.ndarray:
    """Where a light sheet lies on a darker desk, the desk gets the colours of the sheet's edge.

    The sheet is the largest light region, of straight sides and with a sharp edge, if the desk is along half
    of the picture's border; light that falls off, and shadows, are no desk.
    """
    from scipy import ndimage
    from skimage import filters, measure

    gray = shrunk(pixels.mean(-1), 100)
    small = ndimage.grey_closing(gray, size=9)  # without ink
    if np.ptp(small) < 0.15:
        return pixels
    light = small > (threshold := filters.threshold_otsu(small))
    dark = measure.label(np.pad(gray <= threshold, 1, constant_values=True))
    light &= (dark != dark[0, 0])[1:-1, 1:-1]  # a strip of desk that the closing covers
    labels = measure.label(light)
    sheet = ndimage.binary_fill_holes(labels == np.bincount(labels.flat)[1:].argmax() + 1)
    inside, around = ndimage.binary_erosion(sheet, iterations=2), ndimage.binary_dilation(sheet, iterations=2)
    if (
        border_of(sheet).mean() > 0.5
        or not 0.1 < sheet.mean() < 0.97
        or rectangular(sheet) < 0.82
        or not inside.any()
    ):
        return pixels
    near = small[inside & ~ndimage.binary_erosion(inside, iterations=2)].mean()
    ring = ndimage.binary_dilation(around, iterations=2) & ~around
    step = near - small[ring if ring.any() else ~sheet].mean()
    if step < max(0.15, 0.6 * (small[sheet].mean() - small[~sheet].mean())):
        return pixels
    mask = np.asarray(Image.fromarray(inside).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))
    nearest = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return pixels[tuple(nearest)]


def rectangular(region: np.ndarray) -> float:
    """The share of a region in the smallest rectangle, turned as need be, around it: an ellipse has 0.79."""
    y, x = np.nonzero(region)
    angles = np.radians(np.arange(0, 90, 3))[:, None]
    extents = [np.ptp(x * np.cos(a) + y * np.sin(a), axis=1) + 1 for a in (angles, angles + np.pi / 2)]
    return len(x) / (extents[0] * extents[1]).min()


def ink_of(pixels: np.ndarray) -> np.ndarray:
    """The share of light that ink takes away, (H, W), of pictures (H, W, 3) with dark ink; on paper about 0.

    Colours count by how much the darkest ink takes of them: so print in another colour than the ink fades.
    The ground is a closing, which follows falling light and a shadow's edge. Of its windows the smallest is
    taken that shows all of the darkest ink: a shadow as wide as a finger is wider than a pen's stroke.
    """
    from scipy import ndimage

    pixels, side = ndimage.gaussian_filter(pixels, (0.8, 0.8, 0)), max(pixels.shape)
    taken = share_taken(pixels, side // 4)
    strongest = taken.max(-1)
    weights = taken[strongest >= 0.7 * np.percentile(strongest, 99.9)].mean(0) ** 2
    gray = pixels @ (weights / max(weights.sum(), 1e-6))
    ink = share_taken(gray, side // 4)
    if (frame := frames(ink > 0.6 * darkest(ink))).any():
        gray[frame] = np.median(gray[~frame])
        ink = share_taken(gray, side // 4)
    level, dark = darkest(ink), ink > 0.9 * darkest(ink)
    pencil = level < BROAD and noise_of(ink - np.median(ink)) > 5e-4  # in a photograph: no broad brush
    for window in (side // 32,) if pencil else (side // 32, side // 16, side // 8):
        narrow = share_taken(gray, window)
        if pencil or (narrow[dark] > 0.5 * level).mean() > 0.9:
            ink = narrow
            break
    return ink - np.median(ink)  # noise lies below its own closing


def frames(mask: np.ndarray) -> np.ndarray:
    """Where a mask has frames, and a little around them."""
    from scipy import ndimage
    from skimage import measure

    labels = measure.label(mask)
    found = [x.label for x in measure.regionprops(labels) if x.area > 60 and is_frame(x)]
    return ndimage.binary_dilation(np.isin(labels, found), np.ones((5, 5)))


def share_taken(pixels: np.ndarray, window: int) -> np.ndarray:
    """1 - pixels / ground, (H, W) or (H, W, 3): the ground is the closing over a square window."""
    from scipy import ndimage

    size = (window, window, 1)[: pixels.ndim]
    return (1 - pixels / ndimage.grey_closing(pixels, size, mode="nearest").clip(0.05)).clip(0)


def darkest(ink: np.ndarray) -> float:
    """How dark the darkest strokes are: few pixels are, but more than a speck's."""
    peak = np.percentile(ink, 99.97)
    return float(np.median(ink[ink >= 0.7 * peak]))


def noise_of(ink: np.ndarray) -> float:
    """The deviation of ink where there is none: by what is lighter than the paper's median."""
    return float(-np.percentile(ink, 16))


def without_lines(ink: np.ndarray) -> np.ndarray:
    """Ink without thin straight lines from border to border: of ruled and squared paper, frames, folds.

    Where a stroke crosses a line its ink stays: it is taller than the line, or darker.
    """
    return without_flat_lines(without_flat_lines(ink).T).T


def without_flat_lines(ink: np.ndarray) -> np.ndarray:
    """Of lines that rise by 45° at most: a Hough transform proposes, what lies along each decides."""
    from scipy import ndimage

    height, width = ink.shape
    mask = ink > max(0.04, 3 * noise_of(ink))
    thick = max(4, max(ink.shape) // 80)
    tall = ndimage.binary_opening(mask, np.ones((thick + 1, 1)))
    flat = mask & ~tall  # runs downwards that are no taller than a line
    y, x = np.nonzero(flat & ~np.roll(flat, 1, 0))  # upper edges: one pixel a column and line
    slopes, middle, offset = np.linspace(-1, 1, 241), width / 2, width
    votes = np.stack(
        [
            np.bincount((y - s * (x - middle)).astype(int) + offset, minlength=height + 2 * width)
            for s in slopes
        ]
    )
    votes = ndimage.uniform_filter1d(votes.astype(np.float32), 3, axis=1) * 3
    peaks = (votes > 0.25 * width) & (votes == ndimage.maximum_filter(votes, (7, 5)))
    broad = ndimage.binary_dilation(flat, np.ones((3, 1)))
    line, columns = np.zeros_like(mask), np.arange(width)
    for i, row in zip(*np.nonzero(peaks), strict=True):
        rows = (row - offset + slopes[i] * (columns - middle)).round().astype(int)
        inside = (rows >= 0) & (rows < height)
        along = broad[rows[inside], columns[inside]]
        end = max(1, len(along) // 6)
        if len(along) > 0.3 * width and min(along.mean(), along[:end].mean(), along[-end:].mean()) > 0.5:
            line[rows[inside], columns[inside]] = True
    if not line.any():
        return ink
    line = ndimage.binary_dilation(line, np.ones((thick + 1, 1))) & flat
    level = np.median(ink[line])
    line = ndimage.binary_dilation(line, np.ones((5, 1))) & (ink < 1.5 * level)
    line &= ~tall
    cleaned = np.where(line, 0, ink)
    return np.where(
        line, np.minimum(ndimage.grey_closing(cleaned, (thick + 4, 1)), ink), ink
    )  # joins strokes


def digits_of(ink: np.ndarray) -> list[np.ndarray]:
    """The ink of each digit, from left to right."""
    from scipy import ndimage
    from skimage import filters, measure

    least = max(FAINT, 6 * noise_of(ink))
    if (level := darkest(ink)) < least:
        return []
    mask = filters.apply_hysteresis_threshold(ink, LOW * level, 0.6 * level)
    labels = measure.label(ndimage.binary_closing(np.pad(mask, 2), np.ones((3, 3)))[2:-2, 2:-2])
    groups = grouped([x for x in measure.regionprops(labels) if x.area > 12])
    groups = [g for g in groups if is_digit(g, ink.shape)]
    shades = [np.percentile(ink[tuple(np.concatenate([x.coords for x in g]).T)], 75) for g in groups]
    groups = [g for g, shade in zip(groups, shades, strict=True) if shade > 0.75 * max(shades)]
    tallest = max((extent(g)[2] - extent(g)[0] for g in groups), default=0)
    groups = [g for g in groups if extent(g)[2] - extent(g)[0] > 0.4 * tallest]
    found = []
    for group in sorted(groups, key=lambda g: extent(g)[1] + extent(g)[3]):
        top, left, bottom, right = extent(group)
        own = np.isin(labels[top:bottom, left:right], [x.label for x in group])
        values = (ink[top:bottom, left:right] / level).clip(0, 1)
        found.append(np.where(ndimage.binary_dilation(own), values, 0))
    return found


def extent(group) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of some regions."""
    top, left, bottom, right = zip(*(x.bbox for x in group), strict=True)
    return min(top), min(left), max(bottom), max(right)


def grouped(parts: list) -> list[list]:
    """Parts of one digit together: those above each other, and small ones close to a large one."""
    groups = [[x] for x in sorted(parts, key=lambda x: -x.area)]
    boxes, i = np.array([x.bbox for [x] in groups]).reshape(-1, 4), 0
    while i < len(groups):
        found = belong(boxes[i], boxes[i + 1 :]).nonzero()[0]
        if len(found):
            j = i + 1 + int(found[0])
            groups[i] += groups.pop(j)
            boxes[i] = *np.minimum(boxes[i, :2], boxes[j, :2]), *np.maximum(boxes[i, 2:], boxes[j, 2:])
            boxes = np.delete(boxes, j, 0)
        else:
            i += 1
    return groups


def belong(large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Which of the smaller boxes (N, 4), top, left, bottom, right, are part of the digit in a larger one."""
    height, width = large[2] - large[0], large[3] - large[1]
    top, left, bottom, right = small.T
    beside = np.maximum(large[1], left) - np.minimum(large[3], right)  # gaps; negative: they overlap
    above = np.maximum(large[0], top) - np.minimum(large[2], bottom)
    size = max(height, width)
    overlap = -beside / np.minimum(width, right - left)
    return ((overlap > 0.5) & (above < 0.25 * size)) | (np.maximum(beside, above) < 0.04 * size)


def is_frame(part) -> bool:
    """Whether a region has ink in all corners of its box and hardly any inside."""
    image = part.image
    height, width = image.shape
    a, b = -(-height // 10), -(-width // 10)
    corners = image[:a, :b], image[:a, -b:], image[-a:, :b], image[-a:, -b:]
    inner = image[a:-a, b:-b]
    return min(height, width) > 20 and all(x.any() for x in corners) and inner.sum() < 0.1 * image.sum()


def is_digit(group, shape) -> bool:
    """Whether the size and form may be a digit's."""
    from scipy import ndimage

    top, left, bottom, right = extent(group)
    height, width = bottom - top, right - left
    touches = top == 0 or left == 0 or bottom == shape[0] or right == shape[1]
    fills = height > 0.8 * shape[0] and width > 0.5 * shape[1]
    if height < 0.04 * max(shape) or height < 0.3 * width or (touches and not fills):
        return False
    thickest = max(2 * ndimage.distance_transform_edt(np.pad(x.image, 1)).max() for x in group)
    return thickest < 0.5 * max(height, width)


def scaled(picture: Image.Image, size: int, way=Image.Resampling.BICUBIC) -> Image.Image:
    """The picture with a longer side of so many pixels, and a shorter one of at least one."""
    return picture.resize([max(1, round(size * side / max(picture.size))) for side in picture.size], way)


def like_mnist(ink: np.ndarray, size: int = 20) -> np.ndarray:
    """Ink of a digit in its box as an image (28, 28), uint8: strokes not too thin, centred by mass."""
    from scipy import ndimage
    from skimage.morphology import skeletonize

    fine = 6 * size
    scale = fine / max(ink.shape)
    if (ink > 0.5).sum() < skeletonize(ink > 0.5).sum() / scale:  # thinner than a pixel there: it would fade
        width = math.ceil(1 / scale)
        ink = ndimage.grey_dilation(np.pad(ink, width), (width, width))
        scale = fine / max(ink.shape)
    digit = Image.fromarray(ink.astype(np.float32))
    digit = digit.resize([max(1, round(scale * x)) for x in digit.size], Image.Resampling.BILINEAR)
    digit = np.pad(np.asarray(digit), fine // 10)
    digit = (2 * digit - 0.5).clip(0, 1)
    stroke = (digit > 0.5).sum() / max(1, skeletonize(digit > 0.5).sum())
    if stroke < STROKE * fine:
        radius = (STROKE * fine - stroke) / 2
        away = ndimage.distance_transform_edt(digit <= 0.5)
        digit = np.clip(radius + 1 - away, 0, 1).astype(np.float32)
    digit = Image.fromarray(digit)
    digit = digit.crop(Image.fromarray(np.asarray(digit) > 0.25).getbbox())
    digit = scaled(digit, size, Image.Resampling.BOX)
    values, canvas = np.asarray(digit), np.zeros((28, 28), np.float32)
    y, x = ((values.sum(1 - axis) @ np.arange(n)) / values.sum() for axis, n in enumerate(values.shape))
    top, left = (int(np.clip(round(14 - c), 0, 28 - n)) for c, n in zip((y, x), values.shape, strict=True))
    canvas[top : top + values.shape[0], left : left + values.shape[1]] = values / values.max()
    return (255 * canvas).round().astype(np.uint8)


# --- Clothes -----------------------------------------------------------------------------------------------


def light_on_dark(picture: Image.Image, size: int) -> np.ndarray:
    """A thing on an even ground as Fashion-MNIST has it, (size, size): its longer side whole, light on black.

    There, photographs on white were negated; what is on black already stays.
    """
    gray = np.asarray(opaque(picture).convert("L"))
    if np.median(border_of(gray)) > 127:
        gray = 255 - gray
    if picture.size == (size, size):
        return gray
    box = Image.fromarray(gray > 16).getbbox() or (0, 0, *picture.size)
    thing, canvas = scaled(Image.fromarray(gray).crop(box), size), Image.new("L", (size, size))
    canvas.paste(thing, [round((size - side) / 2) for side in thing.size])
    return np.asarray(canvas)
