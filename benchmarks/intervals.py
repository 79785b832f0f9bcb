"""Accuracy, likelihood and calibration from what is kept of each image, and paired bootstrap intervals.

    python benchmarks/intervals.py benchmarks/results/evidence-headline.json ROW ROW
    python benchmarks/intervals.py benchmarks/results/evidence-paper.json ROW ROW COLUMN COLUMN

prints the first row of a results file less the second, in pairs of seeds, with the 95 % interval that these
give by themselves, for the same test images. COLUMN: of the first and of the second row; else test accuracy.
"""

import json
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

MARGIN = 0.05  # points of accuracy within which two answers are called the same


def packed(log_p: Tensor, label: Tensor) -> np.ndarray:
    """Of each image log p of the answer, and log p of the label, or 0 where that is the answer: (2, N)."""
    label, (top, answer) = label.cpu(), log_p.max(-1)
    true = log_p.gather(1, label[:, None])[:, 0].where(answer != label, 0)
    return torch.stack([top, true]).half().numpy()


def as_kept(right: list[np.ndarray]) -> np.ndarray:
    """As packed() keeps them, (R, 1, 2, N), R replicates of which only is known which images are right."""
    return np.stack([[[np.zeros(len(x)), x - 1.0]] for x in right])


def right_and_loss(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of what packed() has kept, (..., 2, N): 100 where the answer is right; and -log p of the label."""
    top, true = np.moveaxis(kept.astype(float), -2, 0)
    return 100.0 * (true == 0), -np.where(true == 0, top, true)


def calibration_error(kept: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in points, of bins with equally many images; kept: (2, N)."""
    confidence, right = 100 * np.exp(kept[0].astype(float)), right_and_loss(kept)[0]
    order = np.array_split(np.argsort(confidence, kind="stable"), bins)
    return sum(len(x) * abs(confidence[x].mean() - right[x].mean()) for x in order) / len(right)


def temperature(log_p: Tensor, label: Tensor) -> float:
    """Of validation images: the temperature by which log p is divided for the smallest loss (1706.04599)."""
    tried = torch.logspace(-0.5, 1.2, 69, dtype=torch.float64).tolist()
    losses = [F.nll_loss((log_p / x).log_softmax(-1), label).item() for x in tried]
    return tried[int(np.argmin(losses))]


@lru_cache(maxsize=1)
def images_drawn(N: int, draws: int = 4000) -> np.ndarray:
    """The share of each image in each draw, (N, draws)."""
    return np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=draws).T / N


def resampled(rows: dict[str, np.ndarray], which: int, draws=200_000) -> dict[str, np.ndarray]:
    """Means of each row: its own, then draws of what it could have been, (1 + draws,).

    rows: (R, n, 2, N), or (folds, R, n, 2, N), whose replicates have the same seeds in every fold; which: 0
    accuracy, 1 loss. Images are drawn anew, the same for all rows (bootstrap). Of R replicates, each the mean
    over folds, the mean moves by the standard error of R times a number from the t distribution with
    R - 1 degrees of freedom: by the same combination of replicates in all rows but those of CNNs, whose
    seeds are others (and maybe more, or fewer), and the same in all of these; so differences are paired where
    seeds are. Of one replicate, the draws are over images only.
    (Many draws, because the tails are long where replicates are few.)
    """
    rng, found, of_cnns = np.random.default_rng(1), {}, re.compile("CNNs|one CNN").search
    replicates = {bool(of_cnns(name)): kept.shape[-4] for name, kept in rows.items()}
    both = [replicates.get(x, replicates.get(not x)) for x in (True, False)]
    moves = [rng.standard_normal((R, draws)) / np.sqrt(max(R * (R - 1), 1)) for R in both]
    for x, R in zip(moves, both, strict=True):
        x *= np.sqrt((R - 1) / rng.chisquare(max(R - 1, 1), (1, draws)))  # now of R normal numbers' t
    for name, kept in rows.items():
        images = images_drawn(kept.shape[-1])
        values = right_and_loss(kept.reshape(-1, *kept.shape[-4:]))[which].mean(2)  # (folds, R, N)
        apart = values.mean((0, 2)) - values.mean()
        by_fold = [np.roll(x.mean(0) @ images, 1009 * fold) for fold, x in enumerate(values)]  # other draws
        over_images = np.resize(np.mean(by_fold, 0), draws)  # again and again: moves are new each time
        drawn = over_images + apart @ moves[not of_cnns(name)]
        found[name] = np.concatenate([[values.mean()], drawn])
    return found


def numbers(apart: np.ndarray) -> list[float]:
    """A difference, and its 95 % interval, of what resampled() returns."""
    return [float(apart[0]), *np.quantile(apart[1:], [0.025, 0.975]).tolist()]


def shown(found: list[float], digits: int) -> str:
    """numbers() as a table has them."""
    return "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*found, n=digits)


def interval(apart: np.ndarray, digits: int) -> str:
    """numbers(), shown()."""
    return shown(numbers(apart), digits)


def verdict(apart: np.ndarray, replicates: int) -> str:
    """What the interval of a difference in accuracy says; of one replicate, nothing."""
    low, high = np.quantile(apart[1:], [0.025, 0.975])
    if replicates < 2:
        return "one replicate"
    if max(-low, high) < MARGIN:
        return "the same"
    return "better" if low > 0 else "worse" if high < 0 else "not resolved"


def paired(values: list[float], base: list[float]) -> list[float]:
    """Mean difference of values by the same seeds, and its 95 % interval by the t distribution."""
    apart = np.subtract(values, base)
    half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
    return [float(apart.mean()), float(apart.mean() - half), float(apart.mean() + half)]


def adjusted(base: list[float], rows: dict[str, list[float]]) -> dict[str, float]:
    """Two-sided p of each row's values by seed against the same base, corrected by Holm.

    A few seeds a row don't tell its own spread: it is pooled over base and rows. A row that has the base's
    values is not compared.
    """
    rows = {name: np.array(x) for name, x in rows.items() if not np.array_equal(x, base)}
    runs = [np.array(base), *rows.values()]
    freedom = sum(len(x) - 1 for x in runs)
    spread = np.sqrt(sum((len(x) - 1) * x.var(ddof=1) for x in runs) / freedom)
    errors = {name: spread * (1 / len(x) + 1 / len(base)) ** 0.5 for name, x in rows.items()}
    t = {name: abs(x.mean() - runs[0].mean()) / errors[name] for name, x in rows.items()}
    found, least = {}, 0.0
    for i, name in enumerate(sorted(t, key=lambda name: -t[name])):
        least = max(least, (len(t) - i) * 2 * stats.t.sf(t[name], freedom))
        found[name] = min(1.0, float(least))
    return found


def by_seed(row: list[float] | dict[str, list[float]], column: str) -> dict[int, float]:
    """The values of a row of a results file, which has one column or several, by seed."""
    values = row[column] if isinstance(row, dict) else row
    return dict(zip(row["seeds"] if "seeds" in row else range(len(values)), values, strict=True))


def main(arguments: list[str]) -> int:
    try:
        path, *names = arguments
        first, second, *columns = names
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        columns = columns or ["test accuracy"]
        one, other = by_seed(rows[first], columns[0]), by_seed(rows[second], columns[-1])
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; how it is called stands at the top of {__file__}", file=sys.stderr)
        return 2
    if len(seeds := sorted(one.keys() & other.keys())) < 2:
        print(f"error: {first} and {second} have {len(seeds)} seeds in common", file=sys.stderr)
        return 2
    print(f"{len(seeds)} seeds: {shown(paired([one[x] for x in seeds], [other[x] for x in seeds]), 3)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
