"""Fewer steps on what is learned already: InfoBatch (Qin et al., arXiv 2303.04947) beside the default.

    python benchmarks/infobatch.py --seeds 6      train what is missing, on 45,000 training images; report
    python benchmarks/infobatch.py --report       its table in docs/speed.md, from benchmarks/results/

In each epoch an image whose loss, when last seen, was below the mean is left out with probability R, and
stands for others, with weight 1 / (1 - R), where it is not. Its loss is the sum of the blocks' (without that
of the classifier). From the share FULL of the epochs on, which is the last of 12, all images count. All else
is the default's; also AdamW, which cares little for a gradient's size, so that fewer steps are less movement.
The 15,000 other training images answer, beside the answers of frontier.py's networks of 12, 9, 8 epochs and
the same seeds (of another device); no test image is read.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import frontier, intervals
from benchmarks.control import log_p_of, measured
from benchmarks.seeds import keep_answers, mean, write
from noprop_example import Config, State, generator

RESULTS = Path(__file__).parent / "results"
R, FULL = 0.5, 0.875  # as in the paper


class Weighted:
    """The hybrid loss, in which images count by weight; keeps each image's loss in each block."""

    def __init__(self, config: Config):
        self.eta, self.lam = config.eta_loss_weight, config.lambda_global
        self.weight: Tensor | None = None  # (B,)
        self.losses: dict[int, Tensor] = {}  # by block, (B,)

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        level, u = alpha_bar[t - 1].item(), F.embedding(label, W)
        noise = draw("noise", u.shape)
        z = noprop.noisy_label(u, noise, level)
        eps_hat = block(image, z, level, W)
        u_hat = noprop.clean_label(z, eps_hat, level)
        each = self.eta * (eps_hat - noise).square().mean(1) + self.lam * (u_hat - u).square().mean(1)
        self.losses[t] = each.detach()
        return (self.weight * each).mean(), u_hat

    def head_loss(self, classifier, u_hat, label, W, draw) -> Tensor:
        return (self.weight * F.cross_entropy(classifier(u_hat), label, reduction="none")).mean()


def train(config: Config, data: noprop.Data) -> State:
    """The default's training with fewer steps, on one thread; with R = 0 the default's itself."""
    state, (images, labels) = State(config, objective=Weighted(config)), data.train
    losses = torch.full((len(labels),), torch.nan)  # of all blocks, when last seen
    for epoch in range(config.epochs):
        below = (losses < losses.nanmean()) & (epoch < FULL * config.epochs)
        drawn = torch.rand(len(labels), generator=generator(config.seed, "left out", epoch))
        weights, kept = 1 + below * R / (1 - R), (~below | (drawn >= R)).nonzero()[:, 0]
        order = kept[torch.randperm(len(kept), generator=generator(config.seed, "order", epoch))]
        batches = order.split(config.batch_size)[: len(order) // config.batch_size]
        with noprop.workers(noprop.CPU, 1) as parallel:
            for i, batch in enumerate(batches):
                state.objective.weight = weights[batch]
                image = noprop.to_float(images[batch])
                image = data.augment(image, generator(config.seed, "augment", state.step))
                lr = noprop.learning_rate((epoch + i / len(batches)) / config.epochs, config)
                noprop.train_step(state, image, labels[batch], lr, parallel)
                losses[batch] = sum(state.objective.losses[t] for t in state.blocks)
                state.step += 1
    return state


def path_of(seed: int) -> Path:
    """Where the answers of a seed are kept."""
    return RESULTS / f"infobatch-{seed}.npz"


def measure(seed: int, data: noprop.Data) -> None:
    """Train with a seed, and keep what the chain answers on the held-out images, and the steps."""
    state = train(Config(seed=seed), data)
    kept = intervals.packed(log_p_of(state.averaged, data.val.images)[:, -1], data.val.labels)
    keep_answers(path_of(seed), chain=kept, steps=np.array(state.step))
    noprop.say(f"seed {seed}: {intervals.right_and_loss(kept)[0].mean():.2f} %, {state.step} steps")


def report() -> int:
    """Print the table, and put it into docs/speed.md."""
    seeds = sorted(int(x.stem.split("-")[1]) for x in RESULTS.glob("infobatch-*.npz"))
    files, rows = [np.load(path_of(seed)) for seed in seeds], frontier.read(frontier.ROWS)
    if len(files) < 2:
        raise SystemExit("error: two seeds must be trained at least: run this without --report first")
    ours = np.stack([x["chain"][None] for x in files])
    accuracies, losses, _ = measured(ours)
    steps = np.mean([x["steps"] for x in files])
    columns = "", "steps", "accuracy", "nll", "InfoBatch less this, points"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cells = [f"{steps:.0f}", mean(accuracies), mean(losses, 4)]
    lines.append(f"| InfoBatch, 12 epochs | {' | '.join(cells)} | |")
    for setting in (frontier.DEFAULT, *frontier.QUICKER):
        theirs = [rows[setting.key(seed)]["alone"] for seed in seeds]
        kept = {"NoProp: theirs": frontier.rightly(setting)[seeds], "NoProp: ours": ours}
        drawn = intervals.resampled(kept, 0)
        apart = drawn["NoProp: ours"] - drawn["NoProp: theirs"]
        cells = [f"{setting.epochs * (45_000 // 512)}"]
        cells += [mean([x["accuracy"] for x in theirs]), mean([x["loss"] for x in theirs], 4)]
        cells += [f"{intervals.interval(apart, 3)}, {intervals.verdict(apart, len(seeds))}"]
        lines.append(f"| the default, {setting.epochs} epochs | {' | '.join(cells)} |")
    noprop.say(text := "\n".join([*lines, "", f"Seeds {', '.join(map(str, seeds))}."]))
    write("infobatch", text, "speed.md")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="train nothing")
    given = parser.parse_args()
    if given.first_seed + given.seeds > frontier.SEEDS[frontier.DEFAULT]:
        parser.error(f"frontier.py has {frontier.SEEDS[frontier.DEFAULT]} seeds, from 0, to stand beside")
    if not given.report:
        data = frontier.held_out(noprop.load_data(Config()))
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            if not path_of(seed).exists():
                measure(seed, data)
    return report()


if __name__ == "__main__":
    sys.exit(main())
