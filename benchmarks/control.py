"""Is it diffusion, or ten networks? NoProp's chain of ten beside ten plain CNNs of one block's size.

    python benchmarks/control.py mnist                              train what is missing, then report
    python benchmarks/control.py fashion_mnist --data-root DIR
    python benchmarks/control.py --report                           tables and picture from benchmarks/results/

The CNNs see no noise and no label: they are the twin with one block, trained by cross-entropy, each with its
own seed, at the chain's weights, images, epochs, augmentation, averaging of weights and selection. Networks
are kept in runs/control/ below the current folder, and those that are there are not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from noprop_lab import backprop, networks
from noprop_lab.data import load_data
from noprop_lab.settings import LabConfig

RESULTS, DOCS = Path(__file__).parent / "results", Path(noprop.__file__).parent / "docs"
REPLICATES, TEN = 5, 10
RATES = (0.0035, 0.007, 0.014, 0.028, 0.056)  # the middle one is NoProp's, from its search on MNIST


# --- Networks ----------------------------------------------------------------------------------------------


def chain(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """NoProp's default. Seeds from 5: its settings were chosen on seeds 0 to 4."""
    return [LabConfig(dataset=dataset, seed=5 + replicate, lr=lr)]


def cnns(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """Ten plain CNNs of one block's size, each with its own weights, order and augmentation."""
    seeds = range(100 + TEN * replicate, 100 + TEN * (replicate + 1))
    rest = dict(dataset=dataset, lr=lr, num_blocks=1, step_threads=1)
    return [backprop.BackpropConfig(seed=seed, **rest) for seed in seeds]


def path_of(config: LabConfig) -> Path:
    """Where the trained network of a config is kept."""
    return Path("runs/control") / config.dataset / f"{config.objective}-lr{config.lr}-seed{config.seed}.pt"


def fit(config: LabConfig, data: noprop.Data, digest: str, threads: int) -> None:
    """Train a network on the training images, and keep what the validation images select."""
    state = networks.LabState(config)
    step = backprop.train_step if config.objective == "backprop" else noprop.train_step
    for _ in noprop.train(state, data, step, threads):
        pass
    path_of(config).parent.mkdir(parents=True, exist_ok=True)
    state.save(path_of(config), digest)


def train(configs: Iterable[LabConfig], data: noprop.Data, threads: int) -> None:
    """Train what is missing: a chain's blocks side by side, of the CNNs as many at once as there are threads."""
    missing = [config for config in configs if not path_of(config).exists()]
    data, digest, started = data._replace(test=None), data.digest(), time.perf_counter()
    alone = [config for config in missing if config.num_blocks == 1]
    jobs = [config for config in missing if config.num_blocks > 1]
    done = 0

    def report(config: LabConfig) -> None:
        nonlocal done
        done += config.num_blocks
        left = (time.perf_counter() - started) / done * (sum(x.num_blocks for x in missing) - done) / 60
        noprop.say(f"{path_of(config)}  about {left:.0f} min left of these {len(missing)}")

    def one(config: LabConfig) -> None:
        fit(config, data, digest, 1)
        report(config)

    for config in jobs:
        fit(config, data, digest, threads)
        report(config)
    with noprop.workers(noprop.CPU, threads) as parallel:
        list(parallel(one, alone))


@torch.inference_mode()
def log_probabilities(config: LabConfig, split: noprop.Split) -> Tensor:
    """log p after every block of a trained network, (N, T, classes), float64."""
    model = networks.load(path_of(config))
    logits = [model(noprop.to_float(x)) for x in split.images.split(500)]
    return torch.cat(logits).double().log_softmax(-1)


def mean(log_p: Tensor, axis: int) -> Tensor:
    """log of the mean of probabilities over an axis."""
    return log_p.logsumexp(axis) - np.log(log_p.shape[axis])


def answer_on(configs: list[LabConfig], split: noprop.Split) -> Tensor:
    """log p (N, classes) of the answer of a chain, or of the mean of several CNNs."""
    return mean(torch.stack([log_probabilities(config, split)[:, -1] for config in configs]), 0)


def choose_rate(kind, data: noprop.Data, dataset: str, threads: int) -> dict[str, dict[str, float]]:
    """Validation loss and accuracy by learning rate, the best first; of a chain, or of two CNNs averaged.

    By the loss, as in NoProp's own search. The grid is walked from its middle, as long as the loss falls.
    """
    found: dict[float, dict[str, float]] = {}
    label, wanted = data.val.labels, [len(RATES) // 2 + x for x in (0, -1, 1)]
    while wanted:
        for lr in (RATES[at] for at in wanted):
            configs = kind(dataset, 0, lr)[:2]
            train(configs, data, threads)
            log_p = answer_on(configs, data.val)
            accuracy = 100 * (log_p.argmax(-1) == label).double().mean().item()
            found[lr] = {"loss": -log_p.gather(1, label[:, None]).mean().item(), "accuracy": accuracy}
            noprop.say(f"{dataset} {kind.__name__}, learning rate {lr}: validation {found[lr]}")
        best = RATES.index(min(found, key=lambda lr: found[lr]["loss"]))
        wanted = [x for x in (best - 1, best + 1) if 0 <= x < len(RATES) and RATES[x] not in found]
    return {str(lr): value for lr, value in sorted(found.items(), key=lambda item: item[1]["loss"])}


def rates(data: noprop.Data, dataset: str, threads: int) -> dict[str, float]:
    """The learning rates of chain and CNNs; NoProp's on MNIST is the script's, which had a search."""
    path = RESULTS / f"control-{dataset}-rates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for kind in (cnns,) if dataset == "mnist" else (cnns, chain):
        if kind.__name__ not in found:
            found[kind.__name__] = choose_rate(kind, data, dataset, threads)
            path.write_text(json.dumps(found, indent=1) + "\n")
    chosen = {name: float(next(iter(by_rate))) for name, by_rate in found.items()}
    return {"chain": LabConfig.lr} | chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=("mnist", "fashion_mnist"))
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    parser.add_argument("--replicates", type=int, default=REPLICATES)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    data = load_data(LabConfig(dataset=given.dataset), given.data_root)
    lr = rates(data, given.dataset, given.threads)
    for replicate in range(given.replicates):
        of_one = [x for kind in (chain, cnns) for x in kind(given.dataset, replicate, lr[kind.__name__])]
        train(of_one, data, given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
