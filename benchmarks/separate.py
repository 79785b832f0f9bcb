"""Noise or loss: which of the two tells NoProp's ten blocks from ten plain CNNs?

    python benchmarks/separate.py mnist                           train what is missing, evaluate, report
    python benchmarks/separate.py fashion_mnist --data-root DIR   DIR has the four files, or FashionMNIST/raw
    python benchmarks/separate.py --report                        the tables, from benchmarks/results/

benchmarks/control.py changes both at once. Here ten blocks are trained side by side on the same batches, at
NoProp's settings and learning rate, with or without noise, by either loss, W fixed; after it has run, as its
rows for NoProp and the CNNs stand beside these. Networks are kept in runs/separate/ below the current folder,
answers in benchmarks/results/separate-DATASET-REPLICATE.npz. --device cuda takes a GPU, with CUDA graphs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.control import (
    BLOCK,
    CHAIN,
    DATASETS,
    ONE,
    RESULTS,
    TEN,
    averaged,
    beside,
    command_line,
    fit,
    is_there,
    load_images,
    log_p_of,
    needs_control,
    publish,
    replicates_of,
    short_table,
)
from benchmarks.intervals import packed
from benchmarks.seeds import keep_answers
from noprop_lab import networks
from noprop_lab.dt import LabHybrid
from noprop_lab.settings import LabConfig

ARMS = {"MSE, no noise": ("mse", False), "cross-entropy, noise": ("ce", True)}
ARMS |= {"cross-entropy, no noise": ("ce", False), "MSE, noise": ("mse", True)}
CHAIN_AVERAGE = "NoProp: mean of blocks along the chain"


@dataclass(frozen=True)
class Arm(LabHybrid):
    """The hybrid loss, or cross-entropy of a block's class logits; with noise, or at z = 0."""

    loss: str = "mse"
    noise: bool = True

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        level, u = alpha_bar[t - 1].item(), F.embedding(label, W)

        def without(purpose: str, shape, *more) -> Tensor:
            """The noise that makes z = √ᾱ u + √(1-ᾱ) ε zero."""
            return -((level / (1 - level)) ** 0.5) * u

        draw = draw if self.noise else without
        if self.loss == "mse":
            return super().block_loss(block, t, alpha_bar, image, label, W, draw)
        z = noprop.noisy_label(u, draw("noise", u.shape), level)
        logits = block.head(torch.cat([block.image(image), block.label(z)], dim=1))
        return F.cross_entropy(logits, label), logits.softmax(-1) @ W


def config_of(dataset: str, replicate: int, loss: str) -> LabConfig:
    """NoProp's settings, with the seeds of control.py.

    W is fixed: learned, it would make z a plainer hint by cross-entropy, and without noise shrink.
    """
    target = "classes" if loss == "ce" else "label"
    return LabConfig(dataset=dataset, seed=5 + replicate, select="last", embedding="fixed", target=target)


def trained(dataset: str, replicate: int, loss: str, noise: bool, data: noprop.Data, threads: int):
    """The trained network of an arm."""
    config = config_of(dataset, replicate, loss)
    path = Path("runs/separate") / dataset / f"{loss}-{'noise' if noise else 'none'}-seed{config.seed}.pt"
    if not is_there(path, config):
        arm = Arm(config.eta_loss_weight, config.lambda_global, config, loss, noise)
        state = fit(config, data, threads=threads, objective=arm)
        noprop.say(f"{path}: {state.seconds:.0f} s")
        path.parent.mkdir(parents=True, exist_ok=True)
        state.save(path, data.digest())
    return networks.load(path, data.train.labels.device)


def log_probabilities(model, split: noprop.Split, chained: bool) -> Tensor:
    """log p after every block, along the chain or each at z = 0, (N, T, classes).

    By cross-entropy of the block's own logits; by MSE, of what the classifier makes of û.
    """

    def logits(x: Tensor) -> Tensor:
        z, rows = (start := model.start(x)), []
        for t, block in enumerate(model.blocks, start=1):
            before = z if chained else start
            u_hat, z = model.step(t, x, before)
            if model.config.target == "classes":
                rows.append(block.head(torch.cat([block.image(x), block.label(before)], dim=1)))
            else:
                rows.append(model.classify(u_hat, z))
        return torch.stack(rows, 1)

    return log_p_of(logits, split.images)


def evaluate(dataset: str, replicate: int, data: noprop.Data, threads: int) -> None:
    """Train what is missing, answer the test images, once, and keep the answers."""
    path = RESULTS / f"separate-{dataset}-{replicate}.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    for name, (loss, noise) in ARMS.items():
        if f"NoProp's blocks, {name}: block 1" in kept:
            continue
        model = trained(dataset, replicate, loss, noise, data, threads)
        log_p = log_probabilities(model, data.test, chained=noise)
        rows = {"block 1": log_p[:, 0], "mean of ten blocks": averaged(log_p)}
        rows |= {"chain of ten": log_p[:, -1]} if noise else {}
        of_arm = {x: packed(found, data.test.labels)[None] for x, found in rows.items()}
        kept |= {f"NoProp's blocks, {name}: {x}": found for x, found in of_arm.items()}
        keep_answers(path, **kept)


def table(rows: dict[str, np.ndarray]) -> str:
    """The Markdown tables of a data set; rows: (R, n, 2, N) each."""
    arms = {name: f"NoProp's blocks, {name}: mean of ten blocks" for name in ARMS} | {"NoProp": CHAIN_AVERAGE}
    mse, noisy, plain, both = ARMS
    compared = [(plain, noisy), (mse, both), (plain, mse), (noisy, both), (noisy, mse)]
    compared += [(both, "NoProp"), (noisy, "NoProp")]
    compared = [pair for pair in compared if {arms[x] for x in pair} <= rows.keys()]
    pairs = {f"{more} − {less}": (arms[more], arms[less]) for more, less in compared}
    return short_table(rows, "of the mean of ten blocks", pairs)


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    parts = []
    for dataset, title in DATASETS.items():
        paths = replicates_of(f"separate-{dataset}")
        files = [(np.load(x), beside(x)) for x in paths]
        if files:
            shared = set.intersection(*(set(own.files) for own, _ in files))
            names = [(0, name) for name in files[0][0].files if name in shared]
            names += [(1, name) for name in (CHAIN, CHAIN_AVERAGE, BLOCK, ONE, TEN)]
            rows = {name: np.stack([pair[i][name] for pair in files]) for i, name in names}
            parts += [f"**{title}**, replicates: {len(files)}", table(rows)]
    return publish("separate", parts)


def main() -> int:
    needs_control(given := command_line(__doc__, 3))
    if not given.report:
        data = load_images(given)
        for replicate in range(given.replicates):
            evaluate(given.dataset, replicate, data, given.threads)
    return report()


if __name__ == "__main__":
    sys.exit(main())
