"""The page on which one draws: what it answers, what is refused, and the page itself in a browser."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, noprop
from laboratory import lab, refused, untrained
from PIL import Image, ImageDraw

from noprop_lab import demo
from noprop_lab.backprop import BackpropConfig
from noprop_lab.ct import CTConfig
from noprop_lab.demo import answer, chart, emerging
from noprop_lab.dt import DTConfig
from noprop_lab.early_exit import early_exit
from noprop_lab.networks import load
from noprop_lab.settings import WEIGHTS, LabConfig

pytestmark = pytest.mark.usefixtures("one_thread")
STROKES = {1: [(140, 50), (140, 230)], 7: [(70, 50), (210, 50), (130, 230)]}  # on the page's 280 pixels


@pytest.fixture(scope="module")
def network() -> noprop.NoProp:
    return noprop.load(WEIGHTS)


def url_of(picture: Image.Image | bytes) -> str:
    """The data URL of a picture, or of the bytes of a file."""
    if isinstance(picture, Image.Image):
        picture.save(file := io.BytesIO(), format="png")
        picture = file.getvalue()
    return f"data:image/png;base64,{b64encode(picture).decode()}"


def drawn(*digits: int) -> Image.Image:
    """What the page's canvas holds: a black pen on nothing."""
    picture = Image.new("RGBA", (280 * len(digits), 280))
    for i, digit in enumerate(digits):
        line = [(x + 280 * i, y) for x, y in STROKES[digit]]
        ImageDraw.Draw(picture).line(line, fill="black", width=16, joint="curve")
    return picture


def read(html: str) -> str:
    """The answer in large type."""
    return re.search("id=answer>([^<]*)<", html)[1]


# --- What is answered --------------------------------------------------------------------------------------


def test_the_answer_is_that_of_predict(network, data):
    for image in data.test.images[:20]:
        html = answer(network, LabConfig(), 0.99, url_of(Image.fromarray(image[0].numpy())), 0.0, 1)
        assert read(html) == str(network.predict(image[None]).item())


def test_the_probabilities_are_those_of_the_network(network, data):
    images = data.test.images[:3]
    assert torch.equal(emerging(network, images, 0.0, 1), network.probabilities(images))
    html = answer(network, LabConfig(), 0.99, url_of(Image.fromarray(images[2, 0].numpy())), 0.0, 1)
    shown = [[float(x) for x in values.split(";")] for values in re.findall("values='([^']*)'", html)]
    expected = 200 * network.probabilities(images[2:])[0].T  # (classes, T), of bars 200 pixels long
    torch.testing.assert_close(torch.tensor(shown), torch.nn.functional.pad(expected, (1, 0)))


@pytest.mark.parametrize("blocks", [1, 10, 200])
def test_every_block_has_a_column(blocks):
    html = chart(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), torch.ones(1, blocks, 10), [*"0123456789"], 0)
    columns = re.findall(r"x=([\d.]+) width=([\d.]+) ", html)
    assert len(columns) == 10 * blocks and all(0 < float(width) < 240 / blocks for _, width in columns)


def test_the_block_of_early_exit_is_marked(network, data):
    """The mark appears with the column of its block: after 4 seconds of 10 blocks' time."""
    sure = network.probabilities(data.test.images[:2000]).amax(-1) > 0.9
    hard = (~sure[:, 0] & sure[:, -1]).nonzero()[:6, 0]
    blocks = []
    for image in data.test.images[[0, *hard.tolist()]]:
        probability, used = early_exit(network, image[None], 0.9)
        html = answer(network, LabConfig(), 0.9, url_of(Image.fromarray(image[0].numpy())), 0.0, 1)
        found = re.search("delay: ([0-9.]+)s' x=[0-9.]+>▲ early exit", html)
        assert bool(found) == bool(probability.max() > 0.9)
        if found:
            blocks.append(used.item())
            assert float(found[1]) == pytest.approx(0.4 * blocks[-1])
    assert len(set(blocks)) > 1


def test_a_sample_repeats_for_the_same_draw_and_is_another_for_the_next(network, data):
    images = data.test.images[:50]
    mean = network.probabilities(images)
    first, again, other = (emerging(network, images, 1.0, draw) for draw in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise, steps = noprop.generator("demo", 1), network.steps
    try:
        network.steps = noprop.reverse_steps(network.alpha_bar).tolist()
        with torch.inference_mode():
            expected = network(noprop.to_float(images), 1.0, noise).softmax(-1)
    finally:
        network.steps = steps
    assert torch.equal(first, expected)
    assert "early exit" not in answer(network, LabConfig(), 0.5, url_of(drawn(7)), 1.0, 1)
    assert torch.equal(emerging(network, images, 0.0, 1), mean)  # as before the samples


def test_a_black_pen_on_nothing_or_white_is_read(network):
    for picture in (drawn(7), Image.alpha_composite(Image.new("RGBA", (280, 280), "white"), drawn(7))):
        html = answer(network, LabConfig(), 0.99, url_of(picture), 0.0, 1)
        assert read(html) == "7" and "of the first" not in html


def test_of_several_digits_all_are_read_and_the_first_is_shown(network):
    html = answer(network, LabConfig(), 0.99, url_of(drawn(7, 1)), 0.0, 1)
    assert read(html) == "7 1" and "Probabilities of the first after" in html


def test_many_digits_are_sampled_too(network, data):
    assert len(emerging(network, data.test.images[:501], 1.0, 1)) == 501


def test_a_twin_that_draws_nothing_is_not_sampled(tmp_path):
    model = load(untrained(tmp_path, BackpropConfig(num_blocks=2)))
    mixes = load(untrained(tmp_path, BackpropConfig(num_blocks=2, weights="learned", classify="z")))
    for network, alike in ((model, True), (mixes, False)):
        one, other = (answer(network, network.config, 0.99, url_of(drawn(7)), tau, 1) for tau in (0.0, 1.0))
        assert (one == other) == alike


def test_what_is_no_digit_gets_a_line(network):
    def asked(url: str) -> str:
        return answer(network, LabConfig(), 0.99, url, 0.0, 1)

    assert asked("") == ""
    for blank in (Image.new("RGBA", (280, 280)), Image.new("L", (280, 280), 255)):
        assert asked(url_of(blank)) == "<p>the picture shows nothing that looks like a digit</p>"
    assert re.fullmatch("<p>cannot read the image the picture: [^<]*</p>", asked(url_of(b"no picture")))


def test_another_network_shows_its_classes(tmp_path):
    config = LabConfig(dataset="folder", classes=("a<b", "c"), num_blocks=2)
    html = answer(load(untrained(tmp_path, config)), config, 0.99, url_of(drawn(1)), 0.0, 1)
    assert read(html) in ("a&lt;b", "c") and html.count("<animate") == 2


# --- What is refused ---------------------------------------------------------------------------------------


def test_what_the_page_can_not_show_is_refused(tmp_path, capsys):
    flow = str(untrained(tmp_path, CTConfig()))
    refused(capsys, 2, ["demo", flow], "the demo shows a chain of denoising blocks, and ct has none")
    refused(capsys, 2, ["demo", str(tmp_path / "none.pt")], "cannot read")
    refused(capsys, 2, ["demo", "--device", "no"], "--device no can't be used")
    refused(capsys, 2, ["demo", "--port", "70000"], "port must be at most 65535")
    refused(capsys, 2, ["demo", "--early-exit", "1.5"], "early_exit must be above 0, at most 1")


def test_without_temperature_nothing_is_sampled_of_no_network(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("noprop_lab.demo.show", lambda ask, port: shown.append((*ask.args, port)))
    command = ["demo", str(untrained(tmp_path, DTConfig(num_blocks=2)))]
    assert lab.main([*command, "--early-exit=0.7", "--port=7000"]) == 0
    [(model, config, early_exit, port)] = shown
    assert model.config.temperature == 0 and DTConfig().temperature == 1
    assert (early_exit, port) == (0.7, 7000)


def test_without_gradio_a_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    wanted = (ROOT / "requirements-demo.txt").read_text().strip()
    refused(capsys, 1, ["demo"], f"the demo takes gradio: pip install '{wanted}'")


def test_a_port_in_use_is_a_line(capsys):
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert lab.main(["demo", f"--port={port}"]) == 1
    line = f"error: port {port} can't be used: choose another by --port\n"
    assert capsys.readouterr() == ("", line)


def test_what_else_keeps_the_page_from_opening_is_said(monkeypatch, capsys):
    gr = pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")

    def launch(*_, **__):
        raise PermissionError(13, "Permission denied", "/tmp/gradio")

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    refused(capsys, 1, ["demo"], "Permission denied: '/tmp/gradio'")


def test_an_older_gradio_is_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="5.50.0"))
    refused(capsys, 1, ["demo"], "pip install 'gradio>=6.20,<7' (5.50.0 is here)")


# --- The page ----------------------------------------------------------------------------------------------


@contextmanager
def page() -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, serving, and the page's address. Ctrl-C works in it, also under a shell's &."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "noprop_lab", "demo", "--port", str(port)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        line = process.stdout.readline()
        assert line == f"Open http://127.0.0.1:{port}/ in a browser. Ctrl-C ends it.\n", process.stderr.read()
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser(tmp_path: Path):
    """Chromium without a window, which logs what it asks for, and finds no address but this machine's."""
    driver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    options = driver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless=new", "no-sandbox", "window-size=1200,830", f"user-data-dir={tmp_path}/profile"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chromium = driver.Chrome(options, driver.ChromeService(programs[1]))
    chromium.set_script_timeout(60)
    try:
        yield chromium
    finally:
        chromium.quit()


def wait_for(what, seconds: float = 60):
    """What is true at last."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


def draw(chromium, digit: int) -> None:
    """With the mouse."""
    from selenium.webdriver import ActionChains

    canvas = wait_for(lambda: chromium.find_elements("css selector", "canvas"))[0]
    start, *others = [(x - 140, y - 140) for x, y in STROKES[digit]]  # from the middle
    mouse = ActionChains(chromium, duration=100).move_to_element_with_offset(canvas, *start).click_and_hold()
    for x, y in others:
        mouse = mouse.move_to_element_with_offset(canvas, x, y)
    mouse.release().perform()


def text_of(chromium) -> str:
    """The answer, once it is seen: it comes with the last block."""
    script = "const x = document.getElementById('answer');"
    script += "return x && getComputedStyle(x.parentElement).opacity == '1' ? x.textContent : ''"
    return chromium.execute_script(script)


def test_the_page_is_for_this_machine_alone_and_reports_nothing(monkeypatch):
    gradio = MagicMock(__version__="6.20.0")
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(demo, "threading", MagicMock())  # it does not wait
    monkeypatch.setattr(os, "environ", {})
    demo.show(None, 7860)
    how = gradio.Blocks.return_value.__enter__.return_value.launch.call_args.kwargs
    assert how["server_name"] == "127.0.0.1" and how["share"] is False
    assert gradio.Blocks.call_args.kwargs["analytics_enabled"] is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "0"


def test_in_a_browser(tmp_path):
    """Draw, wait, read the answer, drop a picture, sample; nothing is asked of another machine; Ctrl-C."""
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    shot = Path(os.environ.get("DEMO_PICTURE", tmp_path / "demo.png")).absolute()
    with browser(tmp_path) as chromium, page() as (process, address):
        chromium.get(address)
        draw(chromium, 7)
        assert wait_for(lambda: text_of(chromium)) == "7"
        assert "▲ early exit" in chromium.page_source
        time.sleep(0.5)  # the last bar
        assert chromium.save_screenshot(shot)
        [clear] = [x for x in chromium.find_elements("css selector", "button") if x.text == "Clear"]
        clear.click()
        wait_for(lambda: not chromium.find_elements("id", "answer"))
        draw(chromium, 1)
        assert wait_for(lambda: text_of(chromium)) == "1"
        drawn(7, 1).save(tmp_path / "two.png")
        chromium.find_element("css selector", "input[type=file]").send_keys(str(tmp_path / "two.png"))
        wait_for(lambda: text_of(chromium) == "7 1")
        slider = chromium.find_element("css selector", "input[type=range]")
        chromium.execute_script("arguments[0].scrollIntoView()", slider)
        slider.click()  # in its middle
        wait_for(lambda: "▲ early exit" not in chromium.page_source)
        before = chromium.find_element("id", "chart").get_attribute("outerHTML")
        [anew] = [x for x in chromium.find_elements("css selector", "button") if "anew" in x.text]
        anew.click()
        wait_for(lambda: chromium.find_element("id", "chart").get_attribute("outerHTML") != before)
        log = [json.loads(x["message"])["message"] for x in chromium.get_log("performance")]
        asked = {x["params"]["request"]["url"] for x in log if x["method"] == "Network.requestWillBeSent"}
        asked = {x for x in asked if re.match("(http|ws)s?:", x)}  # the browser's own pages are not
        assert address in asked and all(x.startswith(address.rstrip("/")) for x in asked), asked
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output.strip(), errors) == (130, "", "")
    assert shot.stat().st_size < 200_000
