"""The network in the repository, and a user's pictures: photographs, exports, clothes."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, noprop
from hypothesis import given, settings
from laboratory import contents, lab, refused
from PIL import Image, ImageDraw
from test_properties import SAME, check_line, pictures

from noprop_lab import networks
from noprop_lab.pictures import (
    asked,
    ink_of,
    like_mnist,
    open_upright,
    read_digits,
    read_picture,
    read_pictures,
    turned,
    without_lines,
)
from noprop_lab.settings import LabConfig

sys.path.insert(0, str(ROOT))
from benchmarks import photos  # noqa: E402

WEIGHTS = ROOT / "noprop_lab" / "weights" / "mnist.pt"
ACCURACY = "99.54"  # as the README has it


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> noprop.NoProp:
    return noprop.load(WEIGHTS)


def test_a_picture_is_not_enlarged_from_fewer_pixels_than_it_has(tmp_path):
    """Stripes two pixels wide of 1200 by 900 stay 900 high, as 512 are asked for; 28 take a half of them."""
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 2), (900, 300))
    Image.fromarray(stripes).save(path := tmp_path / "a.png")
    config = LabConfig(dataset="folder", classes=("a", "b"), image_size=512)
    assert open_upright(path, 512).size == (1200, 900) and open_upright(path, 28).size == (600, 450)
    assert read_picture(path, config).float().std() > 40


# --- The network in the repository -------------------------------------------------------------------------


def test_the_network_in_the_repository_is_small_and_holds_weights_alone(network):
    assert WEIGHTS.stat().st_size <= 2.3e6
    found = contents(WEIGHTS)
    assert found.keys() == {"format", "objective", "config", "model", "by_average", "made_with"}
    assert noprop.Config(**found["config"]) == noprop.Config() and network.config.seed == 0


def test_the_scripts_reader_takes_what_lies_on_its_head_has_16_bits_or_no_ground(data, tmp_path):
    digit = data.test.images[0, 0].numpy()
    (exif := Image.Exif())[0x0112] = 3  # upside down
    Image.fromarray(digit).save(tmp_path / "plain.png")
    Image.fromarray(digit[::-1, ::-1].copy()).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(digit.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    plain, *others = (noprop.read_digit(tmp_path / f"{x}.png") for x in ("plain", "turned", "deep"))
    assert all(torch.equal(x, plain) for x in others)
    for shade in (0, 128, 255):  # ink on a transparent ground
        pixels = np.dstack([np.full((28, 28, 3), shade, np.uint8), digit])
        Image.fromarray(pixels).save(path := tmp_path / "ink.png")
        assert (noprop.read_digit(path).int() - plain.int()).abs().max() <= 2
    card = np.zeros((48, 48, 4), np.uint8)  # black on a white card, in a frame of nothing
    card[4:44, 4:44] = 255
    card[10:38, 10:38, :3] -= digit[..., None]
    Image.fromarray(card).save(path)
    assert (noprop.read_digit(path).int() - plain.int()).abs().float().mean() < 12


def test_it_is_as_accurate_as_is_said(capsys):
    assert noprop.main(["--evaluate", str(WEIGHTS)]) == 0
    answers = f"Test accuracy {ACCURACY} ± 0.07 % by the blocks' average, 99.53 % by the last block.\n"
    assert capsys.readouterr().out == answers


def test_weights_alone_can_not_be_trained_on(tmp_path, capsys):
    (path := tmp_path / "noprop_hybrid.pt").write_bytes(WEIGHTS.read_bytes())
    resume = ["--resume", f"--output-dir={tmp_path}"]
    refused(capsys, 2, resume, "holds weights alone", main=noprop.main)
    refused(capsys, 2, ["train", *resume], "holds weights alone")
    refused(capsys, 2, ["merge", str(path), str(WEIGHTS)], "holds weights alone: merge takes")
    assert path.read_bytes() == WEIGHTS.read_bytes()


def test_the_command_that_makes_it(tmp_path, capsys):
    state = noprop.State(noprop.Config(num_blocks=1))
    state.save(source := tmp_path / "noprop_hybrid.pt", "of no images")
    assert lab.main(["weights", str(source), str(target := tmp_path / "small.pt")]) == 0
    assert target.stat().st_size < source.stat().st_size / 1.9  # there is no state of optimizers yet
    assert all(
        torch.equal(x, contents(target)["model"][name]) for name, x in contents(source)["model"].items()
    )
    for by_average in (True, False):  # what answers stays the same
        state.by_average = by_average
        state.save(source, "of no images")
        target.write_bytes(networks.weights_only(source))
        assert networks.load(target).by_average == networks.load(source).by_average == by_average
    refused(capsys, 2, ["weights", str(source), str(target)], "small.pt is there already")
    refused(capsys, 2, ["weights", str(source)], "weights takes a checkpoint and the file to write")


# --- Digits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0, 255], ids=["light on dark", "dark on light"])
def test_predict_answers_as_evaluate_for_the_same_pixels(tmp_path, data, network, flip):
    """The lab takes images of MNIST's size as they are; the script but stretches the shades."""
    path, seen = tmp_path / "digit.png", []
    for image in data.test.images[:150]:
        Image.fromarray(image[0].numpy() ^ np.uint8(flip)).save(path)
        assert torch.equal(read_digits(path), image[None, None])  # in one view
        seen.append(noprop.read_digit(path))
        assert torch.equal(seen[-1], image) or image.max() < 255
    expected = network.probabilities(data.test.images[:150])[:, -1]
    assert (network.probabilities(torch.stack(seen))[:, -1] - expected).abs().max() < 0.05


CONDITIONS = [
    "falling light",
    "shadow",
    "creases",
    "ruled paper",
    "squared paper",
    "frame",
    "sheet on a desk",
]
CONDITIONS += ["thin pen, large picture", "pencil", "coloured ink", "on transparent", "16 bits", "noise"]
CONDITIONS += ["chalk on a board", "four digits"]


@pytest.mark.parametrize("name", CONDITIONS)
def test_digits_on_paper(tmp_path, data, network, name):
    """Some validation digits under each condition, and an empty sheet."""
    group = 4 if name == "four digits" else 1
    for numbers in torch.arange(2 if group == 1 else 4).reshape(-1, group).tolist():
        picture = photos.drawn(name, numbers, data.val, np.random.default_rng([11, *numbers]))
        picture.save(path := tmp_path / "digits.png")
        found = asked(network.probabilities, read_pictures(path, LabConfig()))
        assert found[:, -1].argmax(-1).tolist() == data.val.labels[numbers].tolist()
    if name in photos.NOTHING:
        photos.CONDITIONS[name]([], np.random.default_rng(4)).save(path)
        with pytest.raises(noprop.Failure, match="shows nothing that looks like a digit"):
            read_pictures(path, LabConfig())


def test_lines_from_border_to_border_go_and_strokes_stay():
    ink = np.zeros((300, 400), np.float32)
    ink[100] = ink[200:202] = ink[:, 60] = 0.8
    ink[np.arange(300), np.arange(300) // 3 + 250] = 0.2  # a fold
    ink[50:250, 180:190] = 0.8
    cleaned = without_lines(ink)
    stroke = cleaned[50:250, 180:190]
    assert (stroke > 0.7).mean() > 0.97 and cleaned.sum() - stroke.sum() < 0.05 * (ink.sum() - 1600)


def test_a_shadow_as_wide_as_a_finger_is_no_ink():
    pixels = np.full((300, 400, 3), 0.9, np.float32)
    pixels[:, 100:140] *= 0.6
    pixels[80:220, 250:254] = 0.1
    ink = ink_of(pixels)
    assert abs(ink[:, 90:150]).max() < 0.1 and (ink[85:215, 251:253] > 0.6).all()


def test_a_thin_pen_on_a_large_picture_leaves_a_ring(tmp_path, network):
    picture = Image.new("L", (800, 800), 255)
    ImageDraw.Draw(picture).ellipse((200, 100, 600, 700), outline=0, width=2)
    picture.save(path := tmp_path / "zero.png")
    views = read_digits(path)
    assert views.shape == (3, 1, 1, 28, 28)  # upright, and turned to either side
    assert views[0, 0, 0, 13:16, 13:16].max() == 0 and network.predict(views[0]).tolist() == [0]


def test_thousands_of_specks_take_no_minutes(tmp_path):
    tile = np.full((10, 10), 255, np.uint8)
    tile[3:7, 3:7] = 0
    Image.fromarray(np.tile(tile, (80, 80))).save(path := tmp_path / "dots.png")
    started = time.monotonic()
    with pytest.raises(noprop.Failure, match="nothing that looks like a digit"):
        read_digits(path)
    assert time.monotonic() - started < 60  # it took some three minutes


def test_damaged_exif_hides_no_picture(tmp_path):
    Image.new("RGB", (40, 50), "red").save(path := tmp_path / "red.png", exif=b"nonsense")
    image = read_picture(path, LabConfig(dataset="cifar10"))
    assert (image[0] == 255).all() and (image[1:] == 0).all()


def test_thin_strokes_become_as_wide_as_those_of_mnist():
    ink = np.zeros((200, 120), np.float32)
    ink[:, 2:4] = ink[196:198] = 1
    assert 2 < like_mnist(ink)[10].sum() / 255 < 3  # without it half a pixel


def test_digits_on_paper_are_answered_in_the_mean_of_three_views(data):
    """As PIL turns them, counter-clockwise and back; asked() keeps digit by digit apart."""
    images = data.val.images[:4]
    views = turned(images)
    assert views.shape == (3, 4, 1, 28, 28) and torch.equal(views[0], images)
    for view, degrees in zip(views[1:], (12, -12), strict=True):
        for ours, image in zip(view[:, 0], images[:, 0], strict=True):
            theirs = np.asarray(Image.fromarray(image.numpy()).rotate(degrees, Image.Resampling.BILINEAR))
            assert abs(ours.numpy().astype(int) - theirs).max() <= 4
    found = asked(lambda x: x.float().flatten(1).mean(1), views)
    torch.testing.assert_close(found, views.float().mean((0, 2, 3, 4)))


def test_the_picture_in_the_repository(capsys):
    assert lab.main(["predict", str(WEIGHTS), str(ROOT / "docs/img/digits.jpg")]) == 0
    assert "digits.jpg: 9 5 6 8  (" in capsys.readouterr().out
    assert "9 5 6 8" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_predict_answers_by_the_mean_of_the_blocks(tmp_path, data, capsys):
    """And not by block 1: of the image where these are furthest apart."""
    shares = noprop.load(WEIGHTS).probabilities(data.test.images[:2000])
    i = int((shares[:, 0] - shares[:, -1]).abs().amax(1).argmax())
    answer = int(shares[i, -1].argmax())
    Image.fromarray(data.test.images[i, 0].numpy()).save(path := tmp_path / "a.png")
    assert lab.main(["predict", str(WEIGHTS), str(path)]) == 0
    assert f": {answer}  ({answer}: {100 * shares[i, -1, answer]:.1f} %" in capsys.readouterr().out


def test_predict_leaves_early(tmp_path, monkeypatch, data):
    asked = []
    Image.fromarray(data.test.images[0, 0].numpy()).save(path := tmp_path / "seven.png")

    def early_exit(model, images, probability):
        asked.append(probability)
        return torch.eye(10)[: len(images)], None

    monkeypatch.setattr(lab, "early_exit", early_exit)
    assert lab.main(["predict", str(WEIGHTS), str(path), "--early-exit=0.5"]) == 0 and asked == [0.5]


def test_what_predict_prints(tmp_path, data, capsys):
    """Several digits from left to right; a picture without any is a line, and the others are answered."""
    picture = photos.drawn("four digits", [0, 1, 2, 3], data.val, np.random.default_rng(5))
    picture.save(many := tmp_path / "many.png")
    Image.new("L", (300, 200), 250).save(blank := tmp_path / "blank.png")
    Image.fromarray(data.val.images[4, 0].numpy()).save(one := tmp_path / "one.png")
    assert lab.main(["predict", str(WEIGHTS), str(blank), str(many), str(one)]) == 2
    output, errors = capsys.readouterr()
    assert errors == f"error: {blank} shows nothing that looks like a digit\n"
    first, second = output.splitlines()
    labels = data.val.labels[:5].tolist()
    assert (
        first.startswith(f"{many}: {' '.join(map(str, labels[:4]))}  ({labels[0]}: ")
        and first.count("%") == 4
    )
    assert second.startswith(f"{one}: {labels[4]}  ({labels[4]}: ") and second.count("%") == 3


def test_without_scikit_image_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    Image.new("L", (300, 200), 250).save(path := tmp_path / "blank.png")
    monkeypatch.setitem(sys.modules, "skimage", None)
    refused(capsys, 1, ["predict", str(WEIGHTS), str(path)], "pip install scikit-image")


def test_kmnist_fills_its_images(tmp_path):
    pixels = np.full((200, 200), 255, np.uint8)
    pixels[50:150, 60:80] = pixels[130:150, 60:160] = 0
    Image.fromarray(pixels).save(path := tmp_path / "character.png")
    for dataset, size in (("mnist", 20), ("kmnist", 28)):
        [[image]] = read_pictures(path, LabConfig(dataset=dataset))[0]
        assert image.amax(1).count_nonzero() == image.amax(0).count_nonzero() == size


@settings(SAME, max_examples=25)
@given(picture=pictures())
def test_any_picture_is_refused_or_becomes_digits(picture, tmp_path_factory):
    picture.save(path := Path(tmp_path_factory.getbasetemp()) / "any.png")
    try:
        found = read_digits(path)
    except noprop.Failure as failure:
        check_line(failure, "any")
        return
    assert found.dtype == torch.uint8 and found.shape[2:] == (1, 28, 28) and len(found) in (1, 3)
    assert found.flatten(2).amax(2).min() > 0


# --- Clothes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ground", ["white", "black", "transparent"])
@pytest.mark.parametrize("shade", [60, 200])
def test_clothes_come_light_on_dark(tmp_path, ground, shade):
    """As Fashion-MNIST has them: its longer side fills the image, and the ground is black."""
    pixels = np.zeros((300, 200, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = 255 * (ground == "white"), 255 * (ground != "transparent")
    pixels[20:280, 60:140] = (shade, shade, shade, 255)
    Image.fromarray(pixels).save(path := tmp_path / "shirt.png")
    [image] = read_picture(path, LabConfig(dataset="fashion_mnist"))
    assert image.shape == (28, 28) and (image[:, :8] < 16).all() and (image[:, -8:] < 16).all()
    assert (image[1:-1, 11:17] > 40).all()


@pytest.mark.parametrize("shape", [(10, 700), (700, 10)])
def test_a_thing_as_thin_as_a_line_is_one_pixel_wide(tmp_path, shape):
    Image.fromarray(np.pad(np.full(shape, 200, np.uint8), 20)).save(path := tmp_path / "belt.png")
    [image] = read_picture(path, LabConfig(dataset="fashion_mnist"))
    assert sorted((image > 100).sum(dim).amax() for dim in (0, 1)) == [1, 28]


def test_an_image_of_fashion_mnist_is_taken_as_it_is(tmp_path):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:20, 9:14] = 90
    for flip in (0, 255):
        Image.fromarray(pixels ^ np.uint8(flip)).save(path := tmp_path / "shirt.png")
        assert np.array_equal(read_picture(path, LabConfig(dataset="fashion_mnist"))[0].numpy(), pixels)
