"""Draws diagram.png, training beside inference:  python docs/img/make_diagram.py [FILE.png, FILE.svg]"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
ROWS = (("1", "0", 5.6), ("2", "1", 3.95), ("T", "T-1", 1.3))  # block, level of its input, height on the page


def box(axes, x, y, width, height, text, color, size=11.5):
    """A rounded box around (x, y)."""
    corner = x - width / 2 + 0.08, y - height / 2 + 0.08
    axes.add_patch(
        FancyBboxPatch(corner, width - 0.16, height - 0.16, "round,pad=0.08", fc=color + "22", ec=color)
    )
    axes.text(x, y, text, ha="center", va="center", size=size)


def arrow(axes, start, end, color="black", **style):
    """An arrow; gradients are dashed."""
    look = dict(arrowstyle="-|>", mutation_scale=12, shrinkA=0, shrinkB=0, lw=1.3, color=color)
    axes.add_patch(FancyArrowPatch(start, end, **look | style))


def draw_training(axes):
    """Left: every block by itself."""
    axes.text(0.1, 7.3, "Training: every block alone", size=15, weight="bold")
    axes.text(
        0.1,
        6.95,
        "each with noise of its own; no signal and no gradient passes from block to block",
        size=11.5,
        color=GREY,
    )
    middle = (ROWS[0][2] + ROWS[-1][2]) / 2
    box(axes, 0.72, middle, 1.3, ROWS[0][2] - ROWS[-1][2] + 1, "", GREEN)
    text = "label\nembedding\n$W$\n\n$u_y$: row of\nthe label $y$\n\nall that the\nblocks share"
    axes.text(0.72, middle, text, ha="center", va="center", size=11.5)
    for t, before, y in ROWS:
        level = rf"\bar\alpha_{{{before}}}"
        z = rf"$z_{{{before}}}=\sqrt{{{level}}}\,u_y$" + "\n" + rf"$+\,\sqrt{{1-{level}}}\;\varepsilon$"
        box(axes, 3.0, y, 2.1, 0.95, z, GREY)
        box(axes, 5.1, y, 1.2, 0.8, f"block ${t}$", BLUE, 13)
        a, b = rf"\hat\varepsilon_{{{t}}}", rf"\hat u_{{{t}}}"
        loss = rf"$\eta_1\,\mathrm{{MSE}}({a},\varepsilon)$" + "\n" + rf"$+\,\eta_2\,\mathrm{{MSE}}({b},u_y)$"
        box(axes, 7.75, y, 2.15, 0.95, loss, ORANGE)
        axes.text(6.18, y + 0.26, f"${a}$, ${b}$", ha="center", size=11.5)
        for x, name in ((3.0, r"noise $\varepsilon$"), (5.1, "image $x$")):
            top = y + (0.475 if x == 3.0 else 0.4)
            axes.text(x, y + 0.85, name, ha="center", va="center", size=11.5)
            arrow(axes, (x, y + 0.7), (x, top))
        for left, right in ((1.37, 1.95), (4.05, 4.5), (5.7, 6.675)):
            arrow(axes, (left, y + 0.12), (right, y + 0.12))
            arrow(axes, (right, y - 0.15), (left, y - 0.15), ORANGE, ls="--")
        axes.text(1.64, y + 0.26, "$u_y$", ha="center", size=11.5)
    for x in (3.0, 5.1, 7.75):
        axes.text(x, 2.85, "⋮", ha="center", va="center", size=18)
    box(axes, 7.75, 0.3, 2.15, 0.7, "cross-entropy of\nclassifier($\\hat u_T$) and $y$", ORANGE, 11)
    corner = "angle,angleA=90,angleB=180,rad=4"
    arrow(axes, (6.18, 1.42), (6.675, 0.42), connectionstyle=corner)
    arrow(axes, (6.675, 0.18), (5.1, 0.9), ORANGE, ls="--", connectionstyle="angle,angleA=0,angleB=90,rad=4")
    note = "dashed: gradients, which end at a block and at $W$\n(by $u_y$ in a loss too). "
    note += "$W$ takes the sum of what\nall blocks hand back."
    axes.text(0.1, 0.14, note, size=11, color=ORANGE, va="center", linespacing=1.4)


def draw_inference(axes):
    """Right: the blocks in a chain."""
    axes.text(9.7, 7.3, "Inference: the blocks in a chain", size=15, weight="bold")
    axes.text(9.7, 6.95, "no label anywhere; τ = 0: nothing is drawn", size=11.5, color=GREY)
    for t, before, y in ROWS:
        axes.text(10.03, y, "image\n$x$", ha="center", va="center", size=11.5)
        arrow(axes, (10.4, y), (10.75, y))
        box(axes, 11.35, y, 1.2, 0.8, f"block ${t}$", BLUE, 13)
        arrow(axes, (11.95, y), (12.75, y))
        axes.text(12.33, y + 0.1, rf"$\hat u_{{{t}}}$", ha="center", size=11.5)
        step = rf"$z_{{{t}}}=a\,\hat u_{{{t}}}$" + "\n" + rf"$+\,b\,z_{{{before}}}$"
        box(axes, 13.6, y, 1.7, 0.8, step, GREY)
        start = rf"$z_{{{before}}}$" if before != "0" else "$z_0=0$"
        axes.text(13.6, y + 0.87, start, ha="center", va="center", size=12.5)
        arrow(axes, (13.6, y + 0.72), (13.6, y + 0.4))
        arrow(axes, (13.2, y + 0.87), (11.6, y + 0.4))
    arrow(axes, (13.6, 5.2), (13.6, 5.0))
    arrow(axes, (13.6, 3.55), (13.6, 3.2))
    arrow(axes, (13.6, 2.6), (13.6, 2.35))
    for x in (11.35, 13.6):
        axes.text(x, 2.9, "⋮", ha="center", va="center", size=18)
    arrow(axes, (12.33, 1.3), (12.33, 0.65))
    box(axes, 12.33, 0.3, 3.6, 0.7, r"answer: argmax classifier($\hat u_T$)", GREEN, 12)


def main(path: str) -> None:
    figure = Figure(figsize=(14.6, 7.8))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, 14.6), ylim=(-0.2, 7.7))
    axes.set_axis_off()
    axes.plot([9.25, 9.25], [0, 7.5], color="#bbbbbb", lw=1)
    draw_training(axes)
    draw_inference(axes)
    figure.savefig(path, dpi=110, facecolor="white")


if __name__ == "__main__":
    main((sys.argv[1:] or [Path(__file__).with_name("diagram.png")])[0])
