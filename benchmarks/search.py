"""Does the search pay, what should it rank by, and do η and λ matter?

    python benchmarks/search.py ranking      error or loss as objective, the median as pruner (20 minutes)
    python benchmarks/search.py weights      η and λ over two decades (6 minutes)
    python benchmarks/search.py pays         from a bad start to the shipped defaults (30 minutes)
    python benchmarks/search.py better       runs/search/long/hpo_best.json and the defaults on fresh seeds

Runs land in runs/ below the current folder; those that are there are not run again. Prints Markdown.
The times are those of two cores.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.seeds import mean, run

FOLDER = Path("runs/search")


def remembered(name: str, compute: Callable[[], list[dict]]) -> list[dict]:
    """The result of compute(), kept in a file."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def curve(seed: int, data: noprop.Data, **settings: float) -> list[dict]:
    """The records of three epochs; fewer if the training diverges."""
    config, history = noprop.Config(epochs=3, seed=seed, **settings), []
    try:
        for record in noprop.train(noprop.State(config), data):
            history.append(record)
    except FloatingPointError:
        print(f"diverged: {settings}", file=sys.stderr)
    return history


def random_settings(number: int) -> dict[str, float]:
    """A point of the search space; the first is the default."""
    rng = random.Random(1000 + number)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    return (
        {}
        if number == 0
        else {
            "lr": log_uniform(1e-3, 1e-1),
            "eta_loss_weight": log_uniform(0.1, 10),
            "lambda_global": log_uniform(0.1, 10),
            "embed_wd": log_uniform(1e-8, 1e-3),
            "weight_decay": log_uniform(1e-5, 1e-1),
        }
    )


def ranking(number: int = 16) -> None:
    """How well a trial ranks settings, judged by other images and another seed.

    Settings are trained twice for three epochs on 45,000 images. One training is ranked as a trial is, on
    5,000 images, by error or by loss; the other gives the error on 10,000 images that neither has seen.
    """
    whole = noprop.load_data(noprop.Config())
    images, labels = (torch.cat([whole.val[i], whole.train[i]]) for i in (0, 1))
    parts = ((15_000, 60_000), (0, 5_000), (5_000, 15_000))
    data = noprop.Data(*(noprop.Split(images[a:b], labels[a:b]) for a, b in parts), whole.augment)
    runs = [
        [
            remembered(f"ranking-{i}-{seed}", lambda i=i, seed=seed: curve(seed, data, **random_settings(i)))
            for seed in (0, 1)
        ]
        for i in range(number)
    ]
    whole_runs = [pair for pair in runs if min(map(len, pair)) == 3]
    print(f"{len(whole_runs)} of {number} settings did not diverge.")
    print("| settings | seed ranked | by error | by loss |\n|---|---|---|---|")
    for seed in (0, 1):
        judge = np.array([100 - pair[1 - seed][-1]["test_accuracy"] for pair in whole_runs])
        error = np.array([100 - pair[seed][-1]["val_accuracy"] for pair in whole_runs])
        loss = np.array([pair[seed][-1]["val_loss"] for pair in whole_runs])
        better = judge <= np.median(judge)
        for name, chosen in (("all", judge < math.inf), ("the better half", better)):
            values = (stats.spearmanr(x[chosen], judge[chosen]).statistic for x in (error, loss))
            print(f"| {name}, rank correlation | {seed} | {' | '.join(f'{x:.2f}' for x in values)} |")
        values = (judge[x.argmin()] - judge.min() for x in (error, loss))
        print(
            f"| the chosen one's error above the best | {seed} | {' | '.join(f'{x:.2f}' for x in values)} |"
        )
    print("| best quarter that a median after epoch 1 would stop | both | ", end="")
    for read in (lambda x: 100 - x["val_accuracy"], lambda x: x["val_loss"]):
        stopped = []
        for seed in (0, 1):
            first, last = (np.array([read(pair[seed][k]) for pair in whole_runs]) for k in (0, -1))
            stopped += list(first[last.argsort()[: len(last) // 4]] > np.median(first))
        print(f"{sum(stopped)} of {len(stopped)} | ", end="")
    print()


def weights() -> None:
    """Validation accuracy and loss after three epochs by η₁ and η₂, all else as shipped; two seeds."""
    data = noprop.load_data(noprop.Config())._replace(test=None)
    print("| η₁ | η₂ | validation accuracy | validation loss |\n|---|---|---|---|")
    for eta, lam in ((2.0, 1.0), (0.1, 0.1), (0.1, 10.0), (10.0, 0.1), (10.0, 10.0)):
        settings = {"eta_loss_weight": eta, "lambda_global": lam}
        runs = [
            remembered(f"weights-{eta}-{lam}-{seed}", lambda s=seed, x=settings: curve(s, data, **x))[-1]
            for seed in range(2)
        ]
        columns = (mean([run[key] for run in runs], n) for key, n in (("val_accuracy", 2), ("val_loss", 4)))
        print(f"| {eta} | {lam} | {' | '.join(columns)} |", flush=True)


def compare(name: str, flags: list[str], seeds: range) -> list[dict]:
    """Print a setting and the defaults, on the same seeds; returns the setting's runs."""
    runs = run({name: flags, "shipped defaults": []}, seeds)
    print("| | validation | test |\n|---|---|---|")
    for name, of_one in runs.items():
        columns = (mean([x[key] for x in of_one]) for key in ("val_accuracy", "test_accuracy"))
        print(f"| {name} | {' | '.join(columns)} |")
    apart = [a["val_accuracy"] - b["val_accuracy"] for a, b in zip(*runs.values(), strict=True)]
    print(f"| difference, by seed | {mean(apart, 3)} | |")
    return next(iter(runs.values()))


def pays() -> None:
    """Short searches that begin at a learning rate of 0.3, and the defaults, seeds 5 to 7."""
    flags = ["--run-hpo", "--lr=0.3", "--hpo-trials=12", "--hpo-epochs=2"]
    for found in compare("12 trials of 2 epochs from --lr 0.3", flags, range(5, 8)):
        names = ("lr", "eta_loss_weight", "lambda_global", "embed_wd", "weight_decay")
        config = found["config"]
        print(f"seed {config['seed']}: " + ", ".join(f"{name} {config[name]:.2g}" for name in names))


def better() -> None:
    """What a longer search has found, and the defaults, on seeds that the search has not used."""
    best = "runs/search/long/hpo_best.json"
    compare("found by the longer search", [f"--config={best}"], range(5, 10))


if __name__ == "__main__":
    parts = {part.__name__: part for part in (ranking, weights, pays, better)}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"error: name one part of {', '.join(parts)}")
    parts[sys.argv[1]]()
