"""A chain that earns its keep? Cascades beside as many plain CNNs averaged, on Fashion-MNIST.

    python benchmarks/cascade.py --data-root DIR                      a seed of each arm; DIR: the four files
    python benchmarks/cascade.py --seeds 2                            so many of each: what was tried
    python benchmarks/cascade.py --folds 4 --seeds 3 --arm features   of one arm and the CNNs: the decision
    python benchmarks/cascade.py --report                             tables, from benchmarks/results/cascade*

The 60,000 training images are cut into four folds; a network is trained on three, and answers the fourth: no
test image is read. All arms have blocks of one size, 12 epochs, the same images, augmentation and averaging,
and the learning rate that control.py found for the CNNs. A chain that is cut after t blocks is a chain of t
blocks, as no block learns from later ones: so every length is measured at once.
"""

import argparse
import re
import sys
import time
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
from noprop_lab.data import load_data, with_augmentation
from noprop_lab.settings import LabConfig

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "cascade.json"
CNNS, FOLDS, T = "plain CNNs", 4, 10
LABEL, FEATURES, MAPS = (dict(hand_on=x) for x in ("label", "features", "maps"))
ARMS = {  # name: settings
    "answers": LABEL,
    "answers of averaged weights": LABEL | dict(estimates="averaged"),
    "answers with noise, .3": LABEL | dict(z_noise=0.3),
    "answers, each block its own views": LABEL | dict(own_views=True),
    "answers, loss of the mean so far": LABEL | dict(learns="mean"),
    "features": FEATURES,
    "features of averaged weights": FEATURES | dict(estimates="averaged"),
    "features with noise, .3": FEATURES | dict(z_noise=0.3),
    "features, each block its own views": FEATURES | dict(own_views=True),
    "features, loss of the mean so far": FEATURES | dict(learns="mean"),
    "features and answers": dict(hand_on="both"),
    "maps": MAPS,
    "maps of averaged weights": MAPS | dict(estimates="averaged"),
    "nothing": dict(hand_on="nothing"),
}
LENGTHS = (1, 2, 4, 8, 10)


def configs(arm: str, seed: int, lr: float) -> list[LabConfig]:
    """Of the one chain, or of each network."""
    recipe = dict(dataset="fashion_mnist", lr=lr, select="last")
    if arm in ARMS:
        return [CascadeConfig(seed=seed, num_blocks=T, **ARMS[arm], **recipe)]
    seeds = range(100 * (seed + 1), 100 * (seed + 1) + T)
    return [BackpropConfig(seed=x, num_blocks=1, step_threads=1, **recipe) for x in seeds]


def answers(arm: str, seed: int, lr: float, data: noprop.Data) -> tuple[torch.Tensor, int]:
    """log p of the held-out images after every block, or of every network, (N, T, classes); the weights."""

    def one(config: LabConfig) -> tuple[torch.Tensor, int]:
        state = fit(config, with_augmentation(data, config), noprop.CPU, measured=False)
        weights = sum(x.numel() for block in state.model.blocks for x in block.parameters())
        return log_probabilities(state.averaged, data.val.images), weights

    chosen = configs(arm, seed, lr)
    with noprop.workers(noprop.CPU, 2) as parallel:  # a chain shares out its blocks itself
        found = list((parallel if len(chosen) > 1 else map)(one, chosen))
    return torch.cat([log_p for log_p, _ in found], 1), sum(weights for _, weights in found)


def path_of(arm: str, fold: int, seed: int) -> Path:
    """Where the answers of an arm are kept, image by image."""
    return RESULTS / f"cascade-{re.sub('[^a-z0-9]+', '_', arm.lower())}-{fold}-{seed}.npz"


def train(given: argparse.Namespace) -> None:
    """Train what is missing; keep accuracy and loss by length, and each image's answer."""
    data = load_data(LabConfig(dataset="fashion_mnist"), given.data_root)
    lr = rates("fashion_mnist", data, 2)["cnns"]
    rows, jobs = read(ROWS), product(range(given.seeds), range(given.folds), (*given.arm, CNNS))
    jobs = [(seed, fold, arm) for seed, fold, arm in jobs if f"{arm}-{fold}-{seed}" not in rows]
    for done, (seed, fold, arm) in enumerate(jobs, start=1):
        part, started = held_out(data, slice(fold, None, FOLDS)), time.perf_counter()
        log_p, weights = answers(arm, seed, lr, part)
        row = {"seconds": time.perf_counter() - started, "weights": weights, "lr": lr, "peak": matmul_peak()}
        means = {f"mean-{t}": averaged(log_p[:, :t]) for t in LENGTHS}
        means |= {"late": averaged(log_p[:, T // 2 :]), "last": log_p[:, -1]}
        kept = {name: intervals.packed(x, part.val.labels) for name, x in means.items()}
        for name, x in kept.items():
            right, loss = intervals.right_and_loss(x)
            row[name] = {"accuracy": right.mean(), "loss": loss.mean()}
        np.savez_compressed(
            path_of(arm, fold, seed), mean=kept[f"mean-{T}"], late=kept["late"], last=kept["last"]
        )
        keep(ROWS, rows := rows | {(name := f"{arm}-{fold}-{seed}"): row})
        found = "{accuracy:.2f} %, nll {loss:.4f}".format(**row[f"mean-{T}"])
        left = sum(x["seconds"] for x in rows.values()) / len(rows) * (len(jobs) - done) / 60
        noprop.say(f"{name}: {found}, {row['seconds']:.0f} s; {done}/{len(jobs)}, about {left:.0f} min left")


# --- Report ------------------------------------------------------------------------------------------------

READINGS = {"mean": f"mean of {T}", "late": f"mean of the last {T - T // 2}", "last": "the last alone"}


def apart(arm: str, reading: str, seeds: dict[int, list[int]]) -> list[str]:
    """Accuracy and loss of an arm less those of ten CNNs, with intervals over seeds and images; by fold."""
    if any(reading not in np.load(path_of(arm, f, s)).files for f, of_fold in seeds.items() for s in of_fold):
        return ["", ""]  # of the first runs it was not kept
    drawn = []
    for fold, of_fold in seeds.items():
        pairs = (("NoProp", arm, reading), (CNNS, CNNS, "mean"))  # resampled() calls what is chained NoProp
        rows = {
            name: np.stack([np.load(path_of(which, fold, seed))[how] for seed in of_fold])[:, None]
            for name, which, how in pairs
        }
        found = [intervals.resampled(rows, which) for which in (0, 1)]
        drawn.append([x["NoProp"] - x[CNNS] for x in found])
    return [intervals.interval(x, digits) for x, digits in zip(np.mean(drawn, 0), (2, 4), strict=True)]


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    rows = read(ROWS)
    columns = ["", *(f"{t} blocks" if t > 1 else "1 block" for t in LENGTHS)]
    columns += ["the last alone", "nll of ten", "weights", "seconds", "folds × seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    heads = [f"{text}: {of}" for text in READINGS.values() for of in ("accuracy", "nll")]
    more = ["", f"| less ten {CNNS} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for arm in (*ARMS, CNNS):
        both = product(range(FOLDS), range(len(rows)))
        done = [(f, s) for f, s in both if all(f"{x}-{f}-{s}" in rows for x in (arm, CNNS))]
        if not done:
            continue
        found = [rows[f"{arm}-{fold}-{seed}"] for fold, seed in done]
        cells = [mean([x[f"mean-{t}"]["accuracy"] for x in found]) for t in LENGTHS]
        cells += [mean([x["last"]["accuracy"] for x in found])]
        cells += [mean([x[f"mean-{T}"]["loss"] for x in found], 4), f"{found[0]['weights']:,}"]
        cells = [x.removesuffix(" ± nan") for x in cells]
        seeds = {f: [s for fold, s in done if fold == f] for f in sorted({f for f, _ in done})}
        count = f"{len(seeds)} × {max(map(len, seeds.values()))}"
        cells += [f"{np.median([x['seconds'] for x in found]):.0f}", count]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
        if arm != CNNS:
            texts = [text for reading in READINGS for text in apart(arm, reading, seeds)]
            more.append(f"| {arm} | {' | '.join(texts)} |")
    if len(lines) == 2:
        noprop.say("No arm is measured yet: leave --report out.", file=sys.stderr)
        return 2
    peaks = [x["peak"] for x in rows.values()]
    more += ["", f"Matmul peak {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s."]
    noprop.say(text := "\n".join(lines + more))
    write("cascade", text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    parser.add_argument("--folds", type=int, default=1, choices=range(1, FOLDS + 1))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--arm", nargs="*", choices=ARMS, default=list(ARMS), help="these alone, and the CNNs"
    )
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if not given.report:
        train(given)
    return report()


if __name__ == "__main__":
    sys.exit(main())
