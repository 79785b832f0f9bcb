"""What NoProp-CT and NoProp-FM share: one network for all t, which moves z from noise, at 0, to label, at 1.

Here too nothing is learned through the steps of inference: each z in training is drawn at a t of its own.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import noprop_example as noprop
from noprop_example import SIZES, DenoisingBlockPaper, NoProp, evaluate, mlp, say, standard_error
from noprop_lab.dt import PaperBlock, paper_recipe
from noprop_lab.settings import WholeConfig

# Numbers of steps that are measured at the end of a run, up to 100 or config.steps.
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class FlowConfig(WholeConfig):
    """What decides the result; it is saved with the network. For one network at all t in [0, 1]."""

    # Objective
    epochs: int = 30  # passes over the training split
    steps: int = 10  # of inference, from t = 0 to t = 1; may be others at each evaluation
    draws: int = 4  # values of t for each image of a step, which is encoded once for all of them
    solver: Literal["euler", "heun"] = "euler"  # of the differential equation that inference follows
    num_blocks: int = 1  # the one network
    target: Literal["label", "noise", "classes"] = "classes"  # f computes logits, one a class
    weights: Literal["equal", "ddpm"] = "ddpm"  # this and the two above are as they must be

    WITHOUT_EFFECT = ("num_blocks", "target", "weights", "lambda_global")
    FREE = ("temperature", "steps", "solver")


def paper_setting(dataset: str) -> dict[str, Any]:
    """The paper's, of CT and FM, for a data set."""
    epochs = {"cifar10": 500, "cifar100": 1000}.get(dataset, 100)
    return paper_recipe(dataset, epochs) | dict(draws=1, steps=1000, temperature=1.0)


# --- Model -------------------------------------------------------------------------------------------------


def position(t: Tensor, width: int = 64) -> Tensor:
    """Sines and cosines of 1000 t at frequencies from 1 down to nearly 1/10000, (B, width), for t (B,).

    Vaswani et al. (arXiv 1706.03762), made for whole numbers: of t itself they would hardly vary.
    """
    frequencies = 10_000 ** (-torch.arange(width // 2, device=t.device, dtype=t.dtype) / (width // 2))
    angles = 1000 * t.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FlowBlock(nn.Module):
    """The network of all t: (code of x, z, t) -> logits f, (B, classes); image(x) is the code, for any t.

    size: of SIZES, or "paper", the paper's for CT and FM on MNIST, which has no batch norm. schedule: a
        module that is trained along.
    """

    def __init__(self, image_shape, embed_dim, num_classes, target="classes", size="small", schedule=None):
        super().__init__()
        if size == "paper":
            self.image = PaperBlock(image_shape, embed_dim, num_classes).image[:-1]
            width, label, head = 256, 256, (256, 128)
        else:
            self.image = DenoisingBlockPaper(image_shape, embed_dim, num_classes, SIZES[size]).image
            _, width, (label, *_), head = SIZES[size]
        self.label, self.time = mlp(embed_dim, label), mlp(64, label)
        self.head = mlp(width + 2 * label, *head).append(nn.Linear(head[-1], num_classes))
        self.schedule = schedule

    def forward(self, code: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """f, (B, classes), of codes, (B, C) or fewer and repeated, z (B, D), and t, (B,) or (1,) for all."""
        code, at = code.repeat(len(z) // len(code), 1), self.time(position(t)).expand(len(z), -1)
        return self.head(torch.cat([code, self.label(z), at], dim=1))


class Flow(NoProp):
    """The network, embedding and classifier of a FlowConfig. field() says what inference follows."""

    config: FlowConfig

    def with_steps(self, steps: int) -> Flow:
        """The same network, whose inference takes other steps."""
        other = copy.copy(self)
        other.config = replace(self.config, steps=steps)
        return other

    def encode(self, image: Tensor) -> Tensor:
        """The code of images (B, C, H, W), (B, width); codes pass."""
        return self.blocks[0].image(image) if image.ndim == 4 else image

    def times(self, t: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Where step t of config.steps starts and ends in [0, 1], (1,) each, beside z."""
        return tuple(z.new_full((1,), n / self.config.steps) for n in (t - 1, t))

    def field(self, code: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The label that the network sees in z (B, D) at t (1,), and dz/dt, (B, D) each."""
        raise NotImplementedError

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """Step t of config.steps: the label seen before it, and z after it. image: images, or their codes."""
        code, width, (start, end) = self.encode(image), 1 / self.config.steps, self.times(t, z)
        u_hat, slope = self.field(code, z, start)
        if self.config.solver == "heun":  # the mean of the slopes at both ends
            slope = (slope + self.field(code, z + width * slope, end)[1]) / 2
        return u_hat, z + width * slope

    def as_chain(self) -> Flow:
        """A copy whose alpha_bar, (steps + 1,), are the levels before and after its steps, for a picture."""
        raise NotImplementedError

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes) of what the last step leaves: of z, as in the paper."""
        return self.classifier(z)

    def forward(self, image: Tensor, temperature=0.0, noise: torch.Generator | None = None) -> Tensor:
        """Inference: class logits after the last step, (B, 1, classes), of images (B, C, H, W) in [0, 1].

        The image is encoded once. temperature is τ, by which z_0 is scaled: 0 samples nothing.
        """
        code, z = self.encode(image), self.start(image, temperature, noise)
        for t in range(1, self.config.steps + 1):
            u_hat, z = self.step(t, code, z, temperature, noise)
        return self.classify(u_hat, z).unsqueeze(1)


def stratified(draw, count: int) -> Tensor:
    """t ~ U(0, 1), (count,), one in each of count equal parts of [0, 1]: less variance than free draws."""
    jitter = draw("t", (count,), torch.rand)
    return (torch.arange(count, device=jitter.device) + jitter) / count


# --- Training and results ----------------------------------------------------------------------------------


def train_step(state, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of every part, see noprop_example.train_step(); on a CPU, all threads share the one network."""
    with state.config.threads_of_step(image.device):
        return noprop.train_step(state, image, label, lr)


def finish(state, data, options) -> int:
    """Evaluate the selected weights by number of steps, write and print the results, then draw; see run()."""
    model, config = copy.deepcopy(state.averaged), state.config
    model.load_state_dict(state.selected)
    counts = sorted({n for n in STEPS if n <= max(100, config.steps)} | {config.steps})
    with noprop.workers(state.device, options.threads) as parallel:
        val = evaluate(model, data.val, config, parallel)
        found = {n: evaluate(model.with_steps(n), data.test, config, parallel) for n in counts}
    by_steps, images = {n: x["accuracy"][-1] for n, x in found.items()}, len(data.test.labels)
    summary = noprop.summary_of(state, val, found[config.steps], images)
    accuracy, total = by_steps[config.steps], summary["seconds_total"]
    summary["test_accuracy_by_steps"] = by_steps
    schedule = model.blocks[0].schedule
    summary |= {"schedule": schedule.summary()} if schedule else {}
    files = [options.output_dir / name.format(config.objective) for name in noprop.OUTPUTS]
    noprop.write_file(files[1], json.dumps(summary, indent=1).encode())
    say(f"""
Test accuracy    {accuracy:.2f} ± {standard_error(accuracy, images):.2f} % (± for {images:,} images)
Weights          epoch {state.selected_epoch}, select {config.select}; {config.steps} steps of inference
By steps         {", ".join(f"{n}: {x:.2f}" for n, x in by_steps.items())} %""")
    if schedule:
        say(f"Schedule         {schedule}")
    say(f"""Time             {state.seconds:.0f} s of training, {total:.0f} s in all, on {state.device}
Files            {", ".join(x.name for x in files)} in {options.output_dir.resolve()}""")
    failed = noprop.picture(draw_progress, files[2], summary, schedule)
    return failed | noprop.picture(draw_denoising, files[3], model.as_chain(), data.test)


def draw_denoising(chain, test: noprop.Split):
    """The script's picture of a dozen test images, from noise by the config's own steps."""
    figure = noprop.draw_denoising(chain, test)
    figure.suptitle("Class probabilities in z_t, from noise (τ = 1); dots: the class of û_t; hard ones below")
    return figure


def draw_progress(summary: dict[str, Any], schedule: nn.Module | None = None):
    """The script's picture, with accuracy by number of steps; a learned schedule, where there is one."""
    by_steps, images = summary["test_accuracy_by_steps"], summary["test_images"]
    count = summary["config"]["steps"]
    figure = noprop.draw_progress(summary | {"test_accuracy_by_blocks": list(by_steps.values())})
    losses, steps, _, last = figure.axes
    losses.lines[0].set_label("network")
    steps.clear()
    errors = [standard_error(x, images) for x in by_steps.values()]
    label = f"test, selected weights ± standard error; {summary['test_accuracy']:.2f} % after {count}"
    steps.errorbar(list(by_steps), list(by_steps.values()), errors, fmt="s-C1", ms=4, capsize=2, label=label)
    steps.set(title="Accuracy by number of steps", xlabel="steps of inference", xscale="log")
    steps.set_xticks(list(by_steps), [str(n) for n in by_steps], minor=False)
    steps.minorticks_off()
    steps.margins(y=0.3)
    if schedule:
        last.clear()
        schedule.draw(last)
    for axes in (losses, steps, last):
        axes.grid(alpha=0.3)
        axes.legend(*axes.get_legend_handles_labels(), frameon=False)
    return figure
