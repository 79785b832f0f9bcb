"""What holds for whatever a user brings: settings, flags, pictures, lists of blocks, checkpoints."""

import io
import math
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from itertools import product
from typing import get_type_hints

import numpy as np
import pytest
import torch
from conftest import noprop, same
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from noprop_lab.dt import DTConfig
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def check_line(failure: noprop.Failure, *names: str) -> None:
    """It is one line, which holds one of the names, if any are given."""
    line = str(failure)
    assert line and line.splitlines() == [line]
    assert not names or any(re.search(rf"\b{name}\b", line) for name in names), line


# --- Settings ----------------------------------------------------------------------------------------------

WILD = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.0, 0.5, 1, 1.5, 1e308, 1e-320, 10**30, None]
WILD += ["", "a\nb", "none", "1", b"1", [], (1,), {}, True, False, 10**400]
FEW = {  # values of which most go together, and take little time
    "num_blocks": st.integers(1, 3),
    "batch_size": st.integers(1, 20),
    "embed_dim": st.integers(9, 24),
    "block": st.sampled_from(["small"] * 6 + ["deep", "reference"]),
    "lr": st.floats(1e-3, 1e3),
    "eta_min": st.floats(0, 1e-3),
    "ema_decay": st.floats(0, 1),
    "temperature": st.sampled_from([0.0, 0.0, 1.0]),
    "image_size": st.sampled_from([32] * 6 + [28, 40]),
    "classes": st.sampled_from([(), ("a", "b"), ["a", "b", "c"], ("a", "a")]),
    "blocks": st.sampled_from([None, "1", "1-2"]),
}
KINDS = {int: st.integers(1, 99), float: st.floats(0, 100), int | None: st.none() | st.integers(1, 99)}


@st.composite
def settings_of(draw, kind: type[noprop.Config]) -> dict:
    """Arguments of a config, of which two at most are anything at all."""
    hints = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
    usual = {name: FEW.get(name, KINDS.get(hint, st.from_type(hint))) for name, hint in hints.items()}
    needed = {name: usual.pop(name) for name in ("num_blocks", "batch_size")}
    wild = st.dictionaries(st.sampled_from(sorted(hints)), st.sampled_from(WILD), max_size=2)
    some = st.lists(st.sampled_from(sorted(usual)), min_size=4, max_size=12, unique=True)
    chosen = needed | {name: usual[name] for name in draw(some)}
    return draw(st.fixed_dictionaries(chosen)) | draw(wild)


def tiny_data(config: noprop.Config) -> noprop.Data:
    """40, 10 and 10 images of noise."""
    draws, splits = noprop.generator("properties"), []
    for n in (40, 10, 10):
        images = torch.randint(256, (n, *config.image_shape), generator=draws, dtype=torch.uint8)
        splits.append(noprop.Split(images, torch.arange(n) % config.num_classes))
    return noprop.Data(*splits, noprop.augment if config.augment else None)


def check_settings(kind: type[noprop.Config], changes: dict, state_of) -> None:
    """They are refused with a line that names one of them, or a training step can be taken."""
    try:
        config = kind(**changes)
        assert all(0 <= x < math.inf for x in vars(config).values() if isinstance(x, int | float))
        quick = config.num_blocks <= 3 and config.batch_size <= 20 and config.dim <= 3 * 32**2
        if quick and math.prod(config.image_shape) <= 3 * 40**2 and config.num_classes:
            state = state_of(config, data := tiny_data(config))
            with suppress(FloatingPointError):
                assert next(noprop.train(state, data, threads=1, steps_too=True)) is None
    except noprop.Failure as failure:
        weights = {"eta_loss_weight", "lambda_global"} & changes.keys()
        check_line(failure, *changes, *(["blocks' loss"] if weights else []))


@pytest.mark.slow
@settings(SAME, max_examples=100)
@given(settings_of(noprop.Config))
def test_settings_are_refused_by_name_or_train(changes):
    check_settings(noprop.Config, changes, lambda config, _: noprop.State(config))


@pytest.mark.parametrize("kind", [noprop.Config, LabConfig, DTConfig])
def test_each_setting_alone_is_refused_by_name_or_a_finite_number(kind):
    for name, value in product((field.name for field in fields(kind)), WILD):
        try:
            found = getattr(kind(**{name: value}), name)
            assert not isinstance(found, int | float) or 0 <= found < math.inf, name
        except noprop.Failure as failure:
            check_line(failure, name, *(["blocks' loss"] if name == "eta_loss_weight" else []))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LabConfig, DTConfig])
@settings(SAME, max_examples=30)
@given(st.data())
def test_settings_of_the_lab_are_refused_by_name_or_train(kind, data):
    changes = data.draw(settings_of(kind))
    check_settings(kind, changes, lambda config, images: LabState(config, data=images))


BAD = ("nan", "-1", "-inf", "a", "", "1.5.2", "\x1b")
FIELDS = [field.name.replace("_", "-") for field in fields(noprop.Config)]


@settings(SAME, max_examples=25)
@given(st.sampled_from(FIELDS), st.sampled_from(BAD) | st.text(max_size=9))
def test_flags_with_bad_values_end_with_2_and_no_traceback(name, value):
    def read(arguments: list[str]) -> int:
        noprop.read_command_line(arguments)
        return 0

    with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()) as output:
        code = noprop.main([f"--{name}={value}"], read)
    assert code == 2 or (code == 0 and value not in BAD)
    assert (code == 0) == (
        errors.getvalue() == ""
    ) and "Traceback" not in errors.getvalue() + output.getvalue()


# --- Pictures ----------------------------------------------------------------------------------------------

MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1, "1": 1, "I;16": 1}
SIDES = st.integers(1, 60) | st.sampled_from([1, 2, 40, 41, 60])


@st.composite
def pictures(draw) -> Image.Image:
    """Noise, or a few dots, or one shade."""
    mode, width, height = draw(st.sampled_from(sorted(MODES))), draw(SIDES), draw(SIDES)
    rng, amount = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from([0, 0.01, 0.5, 1]))
    deep = mode == "I;16"
    shape = (height, width) if MODES[mode] == 1 else (height, width, MODES[mode])
    noise, shade = rng.integers(0, 2**16 if deep else 256, shape), rng.integers(0, 256)
    pixels = np.where(rng.random(shape) < amount, noise, shade).astype(np.uint16 if deep else np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return picture.convert("1") if mode == "1" else picture


@settings(SAME, max_examples=100)
@given(picture=pictures())
def test_any_picture_is_refused_or_becomes_a_digit(picture, folder):
    picture.save(path := folder / "any\npicture.png")
    try:
        digit = noprop.read_digit(path)
    except noprop.Failure as failure:
        check_line(failure, "any")
        return
    assert digit.dtype == torch.uint8 and digit.shape == (1, 28, 28)
    rows, columns = (digit[0].amax(axis).nonzero().flatten() for axis in (1, 0))
    assert len(rows) and len(columns)
    assert rows[-1] - rows[0] < 20 and columns[-1] - columns[0] < 20


@st.composite
def blobs(draw) -> np.ndarray:
    """Shares of ink of a rectangle, from which a corner may be taken, on a free ground."""
    width, height, thick, long = (draw(st.integers(1, 30)) for _ in range(4))
    left, above, right, below = (draw(st.integers(1, 12)) for _ in range(4))
    ink = np.ones((height, width))
    ink[: min(long, height - 1), : min(thick, width - 1)] = 0
    return np.pad(ink, ((above, below), (left, right)))


@settings(SAME, max_examples=60)
@given(ink=blobs(), ground=st.integers(0, 255), contrast=st.integers(17, 255), colour=st.booleans())
def test_a_blob_reads_alike_dark_and_light_and_lies_in_the_middle(ink, ground, contrast, colour, folder):
    assume(contrast <= max(ground, 255 - ground))
    gray = ground + ink * (contrast if ground + contrast <= 255 else -contrast)
    found = []
    for i, pixels in enumerate((gray, 255 - gray)):
        picture = Image.fromarray(pixels.astype(np.uint8))
        (picture.convert("RGB") if colour else picture).save(path := folder / f"blob{i}.png")
        found.append(noprop.read_digit(path)[0].double())
    assert (found[0] - found[1]).abs().max() <= 2
    for axis in (0, 1):
        mass = found[0].sum(1 - axis)
        clipped = mass[0] or mass[-1]
        assert clipped or abs(mass @ torch.arange(28.0, dtype=torch.double) / mass.sum() - 13.5) <= 1


# --- Lists of blocks ---------------------------------------------------------------------------------------

SPAN = st.integers(0, 9).map(str) | st.tuples(st.integers(0, 9), st.integers(0, 9)).map(
    "{0[0]}-{0[1]}".format
)
LISTS = st.lists(SPAN, min_size=1, max_size=4).map(",".join) | st.text("0123456789,-", max_size=6)


def plain_blocks(text: str, last: int) -> list[int] | None:
    """The blocks that a text names, one after another; None where it is to be refused."""
    blocks = []
    for span in text.split(",") if text else [f"1-{last}"]:
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", span)):
            return None
        first, end = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= end <= last:
            return None
        while first <= end:
            blocks.append(first)
            first += 1
    return blocks if len(set(blocks)) == len(blocks) else None


@settings(SAME, max_examples=400)
@given(text=LISTS, last=st.integers(1, 9))
def test_a_list_of_blocks_is_refused_or_read_plainly(text, last):
    try:
        found = LabConfig(blocks=text, num_blocks=last).own_blocks
    except noprop.Failure as failure:
        check_line(failure, "blocks")
        found = None
    assert found == plain_blocks(text, last)


# --- Checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(folder):
    """The bytes of a checkpoint, and the network in it."""
    noprop.State(noprop.Config(num_blocks=1)).save(path := folder / "good.pt", "of no images")
    return path.read_bytes(), noprop.load(path).state_dict()


PLACES = st.floats(0, 1) | st.integers(0, 3000) | st.integers(-3000, -1)  # a share, or from an end


def damaged(content: bytes, kind: str, place: float, length: int, bits: int) -> bytes:
    place = int(place * len(content)) if isinstance(place, float) else place % len(content)
    before, part, after = content[:place], content[place : place + length], content[place + length :]
    return {
        "cut": before + after,
        "cut off": before,
        "flip": before + bytes(x ^ bits for x in part[:1]) + part[1:] + after,
        "insert": before + bytes([bits]) * length + part + after,
        "repeat": before + 2 * part + after,
    }[kind]


@settings(SAME, max_examples=150)
@given(
    kind=st.sampled_from(["flip", "flip", "cut", "cut off", "insert", "repeat"]),
    place=PLACES,
    length=st.integers(1, 9) | st.integers(1, 10**6),
    bits=st.integers(1, 255),
)
def test_a_damaged_checkpoint_is_refused_or_the_good_one(kind, place, length, bits, checkpoint, folder):
    content, good = checkpoint
    (path := folder / "damaged.pt").write_bytes(damaged(content, kind, place, length, bits))
    try:
        assert same(noprop.load(path).state_dict(), good)
    except noprop.Failure as failure:
        check_line(failure, "damaged.pt")
