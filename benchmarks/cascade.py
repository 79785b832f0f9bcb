"""A chain that earns its keep? Cascades beside as many plain CNNs averaged.

    python benchmarks/cascade.py fashion_mnist --data-root DIR --seeds 2   what was tried; DIR: the four files
    python benchmarks/cascade.py fashion_mnist --data-root DIR --folds 4 --seeds 3 --arm features "plain CNNs"
                                                                the decision, on folds that chose nothing
    python benchmarks/cascade.py fashion_mnist --data-root DIR --block deep --seeds 2
                                                                three deep blocks, 24 epochs: its own settings
    python benchmarks/cascade.py mnist --folds 4 --arm "answers with noise, .3" "plain CNNs"     on MNIST
    python benchmarks/cascade.py --times                        seconds of each, on this CPU, by itself
    python benchmarks/cascade.py --report                       tables, from benchmarks/results/cascade*

The 60,000 training images are cut into four folds; a network is trained on three, and answers the fourth: no
test image is read. All arms have blocks of one size, as many epochs, the same images, augmentation and
averaging; the small ones have the learning rate that control.py found for the CNNs. A chain that is cut after
t blocks is a chain of t blocks, as no block learns from later ones: so every length is measured at once. With
--device cuda each step is a CUDA graph; --share I N takes the I-th of N parts, for processes side by side.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import intervals, speed
from benchmarks.control import DATASETS, averaged, best_rate, cnns, fit, grid, load_images, log_p_of, publish
from benchmarks.frontier import held_out, keep, read
from benchmarks.seeds import keep_answers, mean
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.data import with_augmentation
from noprop_lab.settings import LabConfig

RESULTS = Path(__file__).parent / "results"
TIMES, CNNS, FOLDS = RESULTS / "cascade-times.json", "plain CNNs", 4
BLOCKS = {  # settings, and the lengths that are shown
    "small": (dict(num_blocks=10), (1, 2, 4, 8, 10)),
    "deep": (dict(block="deep", num_blocks=3, epochs=24), (1, 2, 3)),
}
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


class Trial(NamedTuple):
    """Networks of an arm, trained without a fold."""

    dataset: str
    block: str  # of BLOCKS
    arm: str
    fold: int
    seed: int

    @property
    def rows(self) -> Path:
        """Where accuracy and loss are kept."""
        return RESULTS / f"cascade-{self.dataset}-{self.block}.json"

    @property
    def key(self) -> str:
        """Under which they are kept there."""
        return f"{self.arm}-{self.fold}-{self.seed}"

    @property
    def answers(self) -> Path:
        """Where the answers are kept, image by image."""
        return self.rows.with_name(f"{self.rows.stem}-{re.sub('[^a-z0-9]+', '_', self.key.lower())}.npz")

    def configs(self, lr: float) -> list[LabConfig]:
        """Of the one chain, or of each network."""
        settings = dict(dataset=self.dataset, lr=lr, select="last") | BLOCKS[self.block][0]
        if self.arm in ARMS:
            return [CascadeConfig(seed=self.seed, **ARMS[self.arm], **settings)]
        seeds = range(100 * (self.seed + 1), 100 * (self.seed + 1) + settings["num_blocks"])
        settings |= dict(num_blocks=1, step_threads=1)
        return [BackpropConfig(seed=x, **settings) for x in seeds]


def answers(configs: list[LabConfig], data: noprop.Data) -> tuple[torch.Tensor, int]:
    """log p of the held-out images after every block, or of every network, (N, T, classes); the weights."""

    def one(config: LabConfig) -> tuple[torch.Tensor, int]:
        state = fit(config, with_augmentation(data, config), measured=False)
        weights = sum(x.numel() for block in state.model.blocks for x in block.parameters())
        return log_p_of(state.averaged, data.val.images), weights

    with noprop.workers(data.train.labels.device, 2) as parallel:  # a chain shares out its blocks itself
        found = list((parallel if len(configs) > 1 else map)(one, configs))
    return torch.cat([log_p for log_p, _ in found], 1), sum(weights for _, weights in found)


def train(given: argparse.Namespace) -> None:
    """Train what is missing; keep accuracy and loss by length, and each image's answer."""
    data, lengths = load_images(given), BLOCKS[given.block][1]
    lr = best_rate(grid(cnns, given.dataset, data, 2)) if given.block == "small" else LabConfig.lr
    trials = product(range(given.seeds), range(given.folds), given.arm)
    trials = [Trial(given.dataset, given.block, arm, fold, seed) for seed, fold, arm in trials]
    trials = [x for x in trials[given.share[0] :: given.share[1]] if x.key not in read(x.rows)]
    for done, trial in enumerate(trials, start=1):
        part, started = held_out(data, slice(trial.fold, None, FOLDS)), time.perf_counter()
        log_p, weights = answers(trial.configs(lr), part)
        row = {"seconds": time.perf_counter() - started, "weights": weights, "lr": lr}
        means = {f"mean-{t}": averaged(log_p[:, :t]) for t in lengths}
        means |= {"late": averaged(log_p[:, log_p.shape[1] // 2 :]), "last": log_p[:, -1]}
        kept = {name: intervals.packed(x, part.val.labels) for name, x in means.items()}
        for name, x in kept.items():
            right, loss = intervals.right_and_loss(x)
            row[name] = {"accuracy": right.mean(), "loss": loss.mean()}
        mean_of_all = kept[f"mean-{lengths[-1]}"]
        keep_answers(trial.answers, mean=mean_of_all, late=kept["late"], last=kept["last"])
        row |= noprop.made_with(part.train.labels.device)
        with FileLock(Path(tempfile.gettempdir()) / "noprop-cascade.lock"):  # others train other arms
            keep(trial.rows, read(trial.rows) | {trial.key: row})
        found = "{accuracy:.2f} %, nll {loss:.4f}".format(**row[f"mean-{lengths[-1]}"])
        noprop.say(f"{trial.key}: {found}, {row['seconds']:.0f} s; {done}/{len(trials)}")


def times() -> None:
    """Seconds of training of each arm, on two cores of this CPU: the time of a step times the steps."""
    arms = product(BLOCKS, (*ARMS, CNNS))
    configs = {f"{x}, {arm}": Trial("mnist", x, arm, 0, 0).configs(LabConfig.lr) for x, arm in arms}
    found = speed.seconds_of_steps(configs, rounds=1)
    steps = {name: of[0].epochs * (45_000 // of[0].batch_size) for name, of in configs.items()}
    keep(TIMES, {name: x * steps.get(name, 1) for name, x in found.items()})


# --- Report ------------------------------------------------------------------------------------------------

TABLES = {  # title: of what; the fold that says which arm is the best does not decide
    "Fashion-MNIST, small blocks: what was tried": ("fashion_mnist", "small", range(1), range(2)),
    "Fashion-MNIST, small blocks: the decision": ("fashion_mnist", "small", range(1, FOLDS), range(3)),
    "Fashion-MNIST, small blocks: with the fold that chose": (
        "fashion_mnist",
        "small",
        range(FOLDS),
        range(3),
    ),
    "Fashion-MNIST, deep blocks: what was tried": ("fashion_mnist", "deep", range(1), range(2)),
    "MNIST, small blocks, four folds, one seed": ("mnist", "small", range(FOLDS), range(1)),
    "MNIST, small blocks, two of the folds, one seed": ("mnist", "small", range(1, FOLDS, 2), range(1)),
}
READINGS = {"mean": "mean of all", "late": "mean of the later half", "last": "the last alone"}


def apart(trials: list[Trial], reading: str) -> list[str]:
    """Accuracy and loss of an arm less those of the CNNs: with intervals over seeds and images.

    Of two seeds each by itself: they say nothing of a spread. Of one, the interval is over images.
    """

    seeds = len({x.seed for x in trials})

    def kept(trials: list[Trial], reading: str) -> np.ndarray:
        answers = np.stack([np.load(x.answers)[reading] for x in trials])  # by fold, in each by seed
        return answers.reshape(-1, seeds, 1, *answers.shape[1:])  # (folds, seeds, 1, 2, N)

    rows = {"NoProp": kept(trials, reading)}  # so resampled() calls a chain
    rows[CNNS] = kept([x._replace(arm=CNNS) for x in trials], "mean")
    cells = []
    for which, digits in ((0, 2), (1, 4)):
        if seeds == 2:
            means = [intervals.right_and_loss(x)[which].mean((0, 2, 3)) for x in rows.values()]
            cells.append(", ".join(f"{x - y:+.{digits}f}" for x, y in zip(*means, strict=True)))
        else:
            drawn = intervals.resampled(rows, which)
            cells.append(intervals.interval(drawn["NoProp"] - drawn[CNNS], digits))
    return cells


def table(dataset: str, block: str, folds: range, seeds: range) -> str:
    """The Markdown tables of these trials: by length, and beside the CNNs; or nothing."""
    lengths, seconds = BLOCKS[block][1], read(TIMES)
    columns = ["", *(f"{t} blocks" if t > 1 else "1 block" for t in lengths)]
    columns += ["the last alone", "nll of all", "weights", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    heads = [f"{text}: {of}" for text in READINGS.values() for of in ("accuracy", "nll")]
    more = ["", f"| less the {CNNS} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for arm in (*ARMS, CNNS):
        trials = [Trial(dataset, block, arm, *x) for x in product(folds, seeds)]
        rows, name = read(trials[0].rows), f"{block}, {arm}"
        if not {x._replace(arm=of).key for x in trials for of in (arm, CNNS)} <= rows.keys():
            continue  # not measured, or in part

        def by_seed(of: str, what: str = "accuracy", digits: int = 2, trials=trials, rows=rows) -> str:
            """Mean ± standard error over seeds, of each the mean over folds."""
            of_one = [[rows[x.key][of][what] for x in trials if x.seed == seed] for seed in seeds]
            return mean([statistics.mean(x) for x in of_one], digits).removesuffix(" ± nan")

        cells = [by_seed(f"mean-{t}") for t in lengths] + [by_seed("last")]
        cells += [by_seed(f"mean-{lengths[-1]}", "loss", 4), f"{rows[trials[0].key]['weights']:,}"]
        cells += [f"{seconds[name]:.0f}" if name in seconds else ""]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
        if arm != CNNS:
            texts = [text for reading in READINGS for text in apart(trials, reading)]
            more.append(f"| {arm} | {' | '.join(texts)} |")
    return "\n".join(lines + more) if len(lines) > 2 else ""


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    parts = []
    for title, what in TABLES.items():
        if text := table(*what):
            parts += [f"**{title}**", text]
    if parts and (peak := read(TIMES).get(speed.PEAK)):
        parts += [f"Seconds at a matmul peak of {peak:.0f} GFLOP/s."]
    return publish("cascade", parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=DATASETS, nargs="?")
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    parser.add_argument("--block", choices=BLOCKS, default="small")
    parser.add_argument("--arm", nargs="*", choices=(*ARMS, CNNS), default=(*ARMS, CNNS))
    parser.add_argument("--folds", type=int, default=1, choices=range(1, FOLDS + 1))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cuda: each training step is a graph")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--times", action="store_true", help="time the steps, and train nothing")
    parser.add_argument("--report", action="store_true", help="train nothing")
    given = parser.parse_args()
    if given.times:
        times()
    elif given.report:
        return report()
    elif given.dataset:
        train(given)
    else:
        parser.error("name a data set, or --times, or --report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
