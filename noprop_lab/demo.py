"""A page on which one draws a digit, and sees the label emerge: python -m noprop_lab demo"""

import copy
import io
import os
import threading
from base64 import b64decode, b64encode
from html import escape

import torch
from PIL import Image

from noprop_example import Failure, NoProp, generator, reverse_steps, say
from noprop_lab.pictures import asked, read_pictures
from noprop_lab.settings import LabConfig, WholeConfig

TEXT = """# NoProp: the label emerges
Each block makes a noisy label less noisy, looking at the picture. **Draw a digit**, or drop a file below."""
CSS = """canvas {border: 1px solid; background: white; touch-action: none} #chart {font: 13px sans-serif}
#chart text {fill: currentColor} #chart rect {fill: #2563eb; stroke: #2563eb40; height: 24px}
.then {animation: then 0s both} @keyframes then {0% {opacity: 0}}"""
PAD = "<canvas width=280 height=280></canvas><p><button>Clear</button> <input type=file></p>"
PEN = """const [pad, clear, file] = element.querySelectorAll('canvas, button, input'), url = new FileReader();
const pen = pad.getContext('2d'), send = picture => {props.value = picture; trigger('submit')};
url.onload = () => send(url.result); file.onchange = () => url.readAsDataURL(file.files[0]);
clear.onclick = () => {pen.clearRect(0, 0, 280, 280); file.value = ''; send('')};
pad.onpointerup = () => send(pad.toDataURL()); pen.lineWidth = 16; pen.lineCap = pen.lineJoin = 'round';
pad.onpointermove = e => {if (e.buttons) {pen.lineTo(e.offsetX, e.offsetY); pen.stroke()}};
pad.onpointerdown = e => {pad.setPointerCapture(e.pointerId); pen.beginPath(); pad.onpointermove(e)};"""


@torch.inference_mode()
def emerging(model: NoProp, images: torch.Tensor, temperature: float, draw: int) -> torch.Tensor:
    """Class probabilities after every block, (N, T, classes); at τ > 0 of a sample, by a draw of noise."""
    if not temperature:
        return model.probabilities(images).cpu()
    (model := copy.copy(model)).steps = reverse_steps(model.alpha_bar).tolist()  # DDPM's weights
    noise = generator("demo", draw)
    return torch.cat([model(x, temperature, noise) for x in model.batches(images)]).softmax(-1).cpu()


def chart(images: torch.Tensor, frames: torch.Tensor, names: list[str], leaves: int) -> str:
    """SVG: images (N, C, H, W), their classes, the first of frames (N, T, classes); leaves: early, or 0."""
    best, T = frames[0, -1].topk(min(10, len(names))).indices.sort().values, frames.shape[1]
    Image.fromarray(torch.dstack([*images]).movedim(0, 2).squeeze(2).numpy()).save(png := io.BytesIO(), "png")
    read, wide = " ".join(names[k] for k in frames[:, -1].argmax(-1)), 240 / T
    then = [f"class=then style='animation-delay: {4 * (t + 1) / T}s' x={200 + wide * t}" for t in range(T)]
    svg = "".join(f"<text y=36 {x}>{t}</text>" for t, x in enumerate(then, 1))
    for i, k in enumerate(best):
        shares = frames[0, :, k].tolist()
        each = zip(then, shares, strict=True)
        cells = [f"<rect {x} width={0.875 * wide} fill-opacity={p} />" for x, p in each]
        svg += f"""<g transform='translate(0 {44 + 26 * i})'><text x=190 y=17 text-anchor=end>{names[k]}
</text><rect x=470><animate attributeName=width values='0;{";".join(str(200 * p) for p in shares)}' dur=4s
fill=freeze /></rect>{"".join(cells)}<g {then[-1]}><text x=680 y=17>{shares[-1]:.1%}</text></g></g>"""
    svg += f"<text y=324 {then[leaves - 1]}>▲ early exit: sure enough</text>" * (leaves > 0)
    return f"""<svg id=chart viewBox='0 0 740 335'>{svg}<text y=14>The network sees</text><image y=30
width=140 href='data:image/png;base64,{b64encode(png.getvalue()).decode()}' image-rendering=pixelated />
<text y=200>and answers</text><text x=200 y=14>Probabilities {"of the first " * (len(images) > 1)}after each
block</text><g font-size={240 / max(2, len(read))} {then[-1]}><text y=305 id=answer>{read}</text></g></svg>"""


def answer(model: NoProp, config: LabConfig, threshold: float, url: str, temperature: float, draw: int):
    """HTML of what the network sees in a picture, a data URL, and answers; or why it can't, in a line."""
    if not url:
        return ""
    try:
        views = read_pictures(file := io.BytesIO(b64decode(url.partition(",")[2])), config)
    except Failure as failure:
        return f"<p>{escape(str(failure).replace(str(file), 'the picture'))}</p>"
    names = [escape(str(x)) for x in config.classes or range(config.num_classes)]
    if isinstance(config, WholeConfig) and config.weights != "learned":
        temperature = 0.0  # a chain by backpropagation was trained to draw nothing
    frames = asked(lambda images: emerging(model, images, temperature, draw), views)
    sure = (frames[0].amax(-1) > threshold).nonzero()
    leaves = int(sure[0]) + 1 if len(sure) and not temperature else 0  # early exit does not sample
    return chart(views[0], frames, names, leaves)


def show(ask, port: int) -> None:
    """The page, until Ctrl-C; ask: answer() of a network. Raises Failure."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "0", "GRADIO_RUN_HISTORY": "0", "no_proxy": "*"}
    try:
        import gradio as gr

        if tuple(map(int, gr.__version__.split(".")[:2])) < (6, 20):
            raise ImportError(f"{gr.__version__} is here")
    except ImportError as error:
        raise Failure(f"the demo takes gradio: pip install 'gradio>=6.20,<7' ({error})", 1) from error
    with gr.Blocks(title="NoProp", analytics_enabled=False) as page:
        gr.Markdown(TEXT)
        with gr.Row():
            with gr.Column():
                pad, draw = gr.HTML("", html_template=PAD, js_on_load=PEN), gr.State(1)
                tau = gr.Slider(0, 2, 0, step=0.1, label="Temperature τ", info="above 0 it samples")
                gr.Button("Draw the noise anew").click(lambda n: n + 1, draw, draw)
            with gr.Column(scale=2):
                chart = gr.HTML()
        gr.on([pad.submit, tau.release, draw.change], ask, [pad, tau, draw], chart, show_progress="hidden")
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")  # none from the web
    look = dict(theme=theme, css=CSS, footer_links=[], prevent_thread_lock=True, quiet=True)
    try:
        page.launch(server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, **look)
    except OSError as error:  # without a number it is gradio's, of the port
        reason = str(error) if error.errno else f"port {port} can't be used: choose another by --port"
        raise Failure(reason, 1) from error
    say(f"Open {page.local_url} in a browser. Ctrl-C ends it.")
    threading.Event().wait()
