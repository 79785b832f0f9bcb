"""Draws denoising.gif: what two easy and two hard test digits have in z_t and û_t, block after block.

python docs/img/make_animation.py [CHECKPOINT]     without one, of the network in the repository
"""

import sys
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import noprop_example as noprop

HERE = Path(__file__).resolve().parent


@torch.inference_mode()
def probabilities(model: noprop.NoProp, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities in z_0 ... z_T and in û_1 ... û_T, sampled (τ = 1), (N, T+1, K) and (N, T, K)."""
    noise, u, levels = noprop.generator("animation"), model.label_embedding.weight, model.alpha_bar.tolist()
    model.steps = noprop.reverse_steps(model.alpha_bar).tolist()  # DDPM's weights
    z, in_u_hat = model.start(image, 1.0, noise), []
    in_z = [noprop.classes_in(z, u, levels[0])]
    for t, level in enumerate(levels[1:], start=1):
        u_hat, z = model.step(t, image, z, 1.0, noise)
        in_z.append(noprop.classes_in(z, u, level))
        in_u_hat.append(model.classifier(u_hat).softmax(-1))
    return torch.stack(in_z, 1), torch.stack(in_u_hat, 1)


def main() -> int:
    model = noprop.load(sys.argv[1] if sys.argv[1:] else HERE.parents[1] / "noprop_lab/weights/mnist.pt")
    test = noprop.load_data(model.config).test
    sure = model.probabilities(test.images)[:, -1].gather(1, test.labels[:, None])[:, 0]
    chosen = [0, 1, *sure.argsort()[[24, 36]].tolist()]
    images = noprop.to_float(test.images[chosen])
    in_z, in_u_hat = probabilities(model, images)
    T = in_u_hat.shape[1]
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    panels = figure.subplots(3, 4, height_ratios=(1.5, 1, 1))
    bars = []
    for i, (digit, *charts) in enumerate(panels.T):
        digit.imshow(images[i, 0].numpy(), cmap="gray_r")
        digit.set_title(f"labelled {test.labels[chosen[i]]}", fontsize=9)
        digit.set_axis_off()
        for axes, color in zip(charts, ("#0072B2", "#D55E00"), strict=True):
            bars.append(axes.bar(range(10), [0] * 10, color=color))
            axes.set(ylim=(0, 1.02), xticks=range(10), yticks=[])
            axes.tick_params(length=0, labelsize=8)
            axes.spines[["top", "right", "left"]].set_visible(False)
    panels[1, 0].set_ylabel("in $z_t$")
    panels[2, 0].set_ylabel(r"in $\hat u_t$")

    def draw(frame: int) -> None:
        t = min(frame, T)
        figure.suptitle(
            f"Class probabilities after block {t} of {T}" if t else "Noise, before the first block"
        )
        for i in range(4):
            shares = in_z[i, t], in_u_hat[i, t - 1] if t else torch.zeros(10)
            for bar, heights in zip(bars[2 * i : 2 * i + 2], shares, strict=True):
                for rectangle, height in zip(bar, heights.tolist(), strict=True):
                    rectangle.set_height(height)

    hold = 4  # frames, of the last block
    FuncAnimation(figure, draw, frames=T + 1 + hold).save(HERE / "denoising.gif", PillowWriter(fps=2), dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
