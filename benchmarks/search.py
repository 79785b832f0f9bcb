"""Does the search pay, what should it rank by, and do η and λ matter?

    python benchmarks/search.py ranking      error or loss as objective, the median as pruner (20 minutes)
    python benchmarks/search.py weights      η and λ over two decades (6 minutes)
    python benchmarks/search.py pays         from a bad start to the shipped defaults (30 minutes)
    python benchmarks/search.py better       runs/search/long/hpo_best.json and the defaults on fresh seeds

Runs land in runs/ below the current folder; those that are there are not run again. Prints a table, puts it
into docs/evidence.md, and keeps the values of every seed in benchmarks/results/search-PART.json. Times are of
two cores at 200 GFLOP/s.
"""

import hashlib
import inspect
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
from benchmarks.seeds import mean, run, write

FOLDER, RESULTS = Path("runs/search"), Path(__file__).parent / "results"
SEARCHED = ("lr", "eta_loss_weight", "lambda_global", "embed_wd", "weight_decay")


def publish(part: str, lines: list[str], found: dict) -> None:
    """Print a table, put it into docs/evidence.md, and keep what it is made from."""
    print("\n".join(lines))
    found |= {"made with": noprop.made_with(noprop.CPU)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (RESULTS / f"search-{part}.json").write_text(text + "\n", encoding="utf-8")
    write(f"search {part}", "\n".join(lines))


def remembered(name: str, compute: Callable[[], list[dict]]) -> list[dict]:
    """The result of compute(), kept in a file, which one of other defaults or another space does not find."""
    of = repr((noprop.Config().saved(), inspect.getsource(random_settings), noprop.made_with(noprop.CPU)))
    path = FOLDER / f"{name}-{hashlib.sha256(of.encode()).hexdigest()[:8]}.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        noprop.write_file(path, json.dumps(compute()).encode())
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

    bounds = (1e-3, 1e-1), (0.1, 10), (0.1, 10), (1e-8, 1e-3), (1e-5, 1e-1)
    drawn = {name: log_uniform(*pair) for name, pair in zip(SEARCHED, bounds, strict=True)}
    return drawn if number else {}


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
    lines = [f"{len(whole_runs)} of {number} settings did not diverge.", ""]
    lines += ["| settings | seed ranked | by error | by loss |", "|---|---|---|---|"]
    for seed in (0, 1):
        judge = np.array([100 - pair[1 - seed][-1]["test_accuracy"] for pair in whole_runs])
        error = np.array([100 - pair[seed][-1]["val_accuracy"] for pair in whole_runs])
        loss = np.array([pair[seed][-1]["val_loss"] for pair in whole_runs])
        better = judge <= np.median(judge)
        for name, chosen in (("all", judge < math.inf), ("the better half", better)):
            values = (stats.spearmanr(x[chosen], judge[chosen]).statistic for x in (error, loss))
            lines.append(f"| {name}, rank correlation | {seed} | {' | '.join(f'{x:.2f}' for x in values)} |")
        values = " | ".join(f"{judge[x.argmin()] - judge.min():.2f}" for x in (error, loss))
        lines.append(f"| the chosen one's error above the best, points | {seed} | {values} |")
    cells = []
    for read in (lambda x: 100 - x["val_accuracy"], lambda x: x["val_loss"]):
        stopped = []
        for seed in (0, 1):
            first, last = (np.array([read(pair[seed][k]) for pair in whole_runs]) for k in (0, -1))
            stopped += list(first[last.argsort()[: len(last) // 4]] > np.median(first))
        cells.append(f"{sum(stopped)} of {len(stopped)}")
    lines.append(f"| of the best quarter, a median after epoch 1 would stop | both | {' | '.join(cells)} |")
    names = ("val_accuracy", "val_loss", "test_accuracy")  # the last: of the 10,000 images that judge
    curves = [[{x: [record[x] for record in run] for x in names} for run in pair] for pair in runs]
    settings = [random_settings(i) for i in range(number)]
    publish("ranking", lines, {"settings": settings, "by setting and seed": curves})


def weights() -> None:
    """Validation accuracy and loss after three epochs by η₁ and η₂, all else as shipped; two seeds."""
    data = noprop.load_data(noprop.Config())._replace(test=None)
    lines, found = ["| η₁ | η₂ | validation accuracy | validation loss |", "|---|---|---|---|"], {}
    for eta, lam in ((2.0, 1.0), (0.1, 0.1), (0.1, 10.0), (10.0, 0.1), (10.0, 10.0)):
        settings = {"eta_loss_weight": eta, "lambda_global": lam}
        runs = [
            remembered(f"weights-{eta}-{lam}-{seed}", lambda s=seed, x=settings: curve(s, data, **x))[-1]
            for seed in range(2)
        ]
        columns = (mean([run[key] for run in runs], n) for key, n in (("val_accuracy", 2), ("val_loss", 4)))
        lines.append(f"| {eta:g} | {lam:g} | {' | '.join(columns)} |")
        found[f"η₁ {eta}, η₂ {lam}"] = {x: [run[x] for run in runs] for x in ("val_accuracy", "val_loss")}
    publish("weights", lines, found)


def compare(part: str, name: str, flags: list[str], seeds: range) -> None:
    """A setting and the defaults, on the same seeds."""
    runs, lines, found = run({name: flags, "the defaults": []}, seeds), ["| | validation | test |"], {}
    lines.append("|---|---|---|")
    for name, of_one in runs.items():
        values = {key: [x[key] for x in of_one] for key in ("val_accuracy", "test_accuracy")}
        lines.append(f"| {name} | {' | '.join(map(mean, values.values()))} |")
        found[name] = values | {x: [summary["config"][x] for summary in of_one] for x in SEARCHED}
    apart = [a["val_accuracy"] - b["val_accuracy"] for a, b in zip(*runs.values(), strict=True)]
    publish(part, [*lines, f"| difference, by seed | {mean(apart, 3)} | |"], {"seeds": list(seeds)} | found)


def pays() -> None:
    """Short searches that begin at a learning rate of 0.3, and the defaults, seeds 1 to 3."""
    flags = ["--run-hpo", "--lr=0.3", "--hpo-trials=12", "--hpo-epochs=2"]
    compare("pays", "12 trials of 2 epochs from --lr 0.3", flags, range(1, 4))


def better() -> None:
    """What a longer search has found, and the defaults, on seeds that the search has not used."""
    best = "runs/search/long/hpo_best.json"
    compare("better", "found by the longer search", [f"--config={best}"], range(5, 10))


if __name__ == "__main__":
    parts = {part.__name__: part for part in (ranking, weights, pays, better)}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"error: name one part of {', '.join(parts)}")
    parts[sys.argv[1]]()
