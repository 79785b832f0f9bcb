"""A chain that earns its keep? Cascades beside as many plain CNNs averaged, on Fashion-MNIST.

    python benchmarks/cascade.py --data-root DIR          train what is missing; DIR has the four files
    python benchmarks/cascade.py --seeds 3 --folds 4      so many of each arm: the decision
    python benchmarks/cascade.py --report                 the tables, from benchmarks/results/cascade*

The 60,000 training images are cut into four folds; a network is trained on three, and answers the fourth: no
test image is read. All arms have blocks of one size, 12 epochs, the same images, augmentation and averaging,
and the learning rate that control.py found for the CNNs. A chain that is cut after t blocks is a chain of t
blocks, as no block learns from later ones: so every length is measured at once.
"""

import argparse
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import intervals
from benchmarks.control import averaged, rates
from benchmarks.frontier import fit, held_out, keep, log_probabilities, read
from benchmarks.machine import matmul_peak
from benchmarks.seeds import mean, write
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.data import load_data
from noprop_lab.settings import LabConfig

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "cascade.json"
CNNS, FEATURES, FOLDS, T = "plain CNNs", "cascade of features", 4, 10
ARMS = {FEATURES: "features", "cascade of answers": "label", "blocks that see nothing": "nothing"}
LENGTHS = (1, 2, 4, 8, 10)


def configs(arm: str, seed: int, lr: float) -> list[LabConfig]:
    """Of the one chain, or of each network."""
    recipe = dict(dataset="fashion_mnist", lr=lr, select="last")
    if arm in ARMS:
        return [CascadeConfig(seed=seed, hand_on=ARMS[arm], num_blocks=T, **recipe)]
    seeds = range(100 * (seed + 1), 100 * (seed + 1) + T)
    return [BackpropConfig(seed=x, num_blocks=1, step_threads=1, **recipe) for x in seeds]


def answers(arm: str, seed: int, lr: float, data: noprop.Data) -> tuple[torch.Tensor, int]:
    """log p of the held-out images after every block, or of every network, (N, T, classes); the weights."""

    def one(config: LabConfig) -> tuple[torch.Tensor, int]:
        state = fit(config, data, noprop.CPU, measured=False)
        weights = sum(x.numel() for block in state.model.blocks for x in block.parameters())
        return log_probabilities(state.averaged, data.val.images), weights

    chosen = configs(arm, seed, lr)
    with noprop.workers(noprop.CPU, 2) as parallel:  # a chain shares out its blocks itself
        found = list((parallel if len(chosen) > 1 else map)(one, chosen))
    return torch.cat([log_p for log_p, _ in found], 1), sum(weights for _, weights in found)


def train(given: argparse.Namespace) -> None:
    """Train what is missing; keep accuracy and loss by length, and each image's answer."""
    data = load_data(LabConfig(dataset="fashion_mnist"), given.data_root)
    lr = rates("fashion_mnist", data, 2)["cnns"]
    rows, jobs = read(ROWS), product(range(given.seeds), range(given.folds), (*ARMS, CNNS))
    jobs = [(seed, fold, arm) for seed, fold, arm in jobs if f"{arm}-{fold}-{seed}" not in rows]
    for done, (seed, fold, arm) in enumerate(jobs, start=1):
        part, started = held_out(data, slice(fold, None, FOLDS)), time.perf_counter()
        log_p, weights = answers(arm, seed, lr, part)
        row = {"seconds": time.perf_counter() - started, "weights": weights, "lr": lr, "peak": matmul_peak()}
        means = {t: averaged(log_p[:, :t]) for t in LENGTHS}
        kept = {f"mean-{t}": intervals.packed(x, part.val.labels) for t, x in means.items()}
        kept["late"] = intervals.packed(averaged(log_p[:, T // 2 :]), part.val.labels)
        kept["last"] = intervals.packed(log_p[:, -1], part.val.labels)
        for name, x in kept.items():
            right, loss = intervals.right_and_loss(x)
            row[name] = {"accuracy": right.mean(), "loss": loss.mean()}
        name = f"{arm}-{fold}-{seed}"
        path = RESULTS / f"cascade-{name.replace(' ', '_')}.npz"
        np.savez_compressed(path, mean=kept[f"mean-{T}"], late=kept["late"], last=kept["last"])
        keep(ROWS, rows := rows | {name: row})
        found = "{accuracy:.2f} %, nll {loss:.4f}".format(**row[f"mean-{T}"])
        left = sum(x["seconds"] for x in rows.values()) / len(rows) * (len(jobs) - done) / 60
        noprop.say(f"{name}: {found}, {row['seconds']:.0f} s; {done}/{len(jobs)}, about {left:.0f} min left")


def kept_of(arm: str, fold: int, seeds: int, name: str = "mean") -> np.ndarray:
    """What packed() kept, of the seeds of a fold, (seeds, 1, 2, N)."""
    paths = [RESULTS / f"cascade-{arm.replace(' ', '_')}-{fold}-{seed}.npz" for seed in range(seeds)]
    return np.stack([np.load(path)[name] for path in paths])[:, None]


def apart(arm: str, name: str, folds: int, seeds: int) -> list[str]:
    """Accuracy and loss of an arm less those of ten CNNs, with intervals over seeds and images."""
    texts = []
    for which, digits in ((0, 2), (1, 4)):
        drawn = []
        for fold in range(folds):
            rows = {"NoProp": kept_of(arm, fold, seeds, name), CNNS: kept_of(CNNS, fold, seeds)}
            found = intervals.resampled(rows, which)
            drawn.append(found["NoProp"] - found[CNNS])
        texts.append(intervals.interval(np.mean(drawn, 0), digits))
    return texts


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    rows = read(ROWS)
    arms = Counter(name.split("-", 1)[1] for name in rows)  # by fold and seed: how many arms are there
    whole = [tuple(map(int, key.split("-"))) for key, count in arms.items() if count == len(ARMS) + 1]
    if not whole:
        noprop.say("No fold is measured yet by all arms: leave --report out.", file=sys.stderr)
        return 2
    folds = max(fold for fold, _ in whole) + 1
    seeds = min(sum(x[0] == fold for x in whole) for fold in range(folds))  # that all of these folds have
    done = list(product(range(folds), range(seeds)))
    columns = ["", *(f"{t} blocks" if t > 1 else "1 block" for t in LENGTHS)]
    columns += ["the last alone", "nll of ten", "weights", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in (*ARMS, CNNS):
        found = [rows[f"{arm}-{fold}-{seed}"] for fold, seed in done]
        cells = [mean([x[f"mean-{t}"]["accuracy"] for x in found]) for t in LENGTHS]
        losses = [x[f"mean-{T}"]["loss"] for x in found]
        cells += [mean([x["last"]["accuracy"] for x in found]), mean(losses, 4)]
        cells += [f"{found[0]['weights']:,}", f"{np.median([x['seconds'] for x in found]):.0f}"]
        lines.append(f"| {arm} | {' | '.join(x.removesuffix(' ± nan') for x in cells)} |")
    lines += ["", f"| less ten {CNNS} | accuracy | nll |", "|---|---|---|"]
    compared = [(arm, "mean", f"mean of {T} blocks") for arm in ARMS]
    compared += [(FEATURES, "late", "mean of the last five"), (FEATURES, "last", "the last alone")]
    for arm, name, title in compared:
        lines.append(f"| {arm}, {title} | {' | '.join(apart(arm, name, folds, seeds))} |")
    peaks = [x["peak"] for x in rows.values()]
    machine = f"Matmul peak {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s."
    lines += ["", f"Folds: {folds}, seeds: {seeds}. {machine}"]
    noprop.say(text := "\n".join(lines))
    write("cascade", text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    parser.add_argument("--folds", type=int, default=1, choices=range(1, FOLDS + 1))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if not given.report:
        train(given)
    return report()


if __name__ == "__main__":
    sys.exit(main())
