"""Does NoProp work, and which part of it?

    python benchmarks/evidence.py headline --seeds 10    NoProp, NoProp-DT, backpropagation (5 hours); makes
                                                         what the results lack; --rows NAME ...: only these;
                                                         --times: only their seconds, in one sitting
    python benchmarks/evidence.py ladder --seeds 5       what the chain of blocks does (5 runs of the default)
    python benchmarks/evidence.py objectives --seeds 2   NoProp-DT's embeddings and learning rates, two epochs
    python benchmarks/evidence.py embeddings --seeds 2   of the same runs: at which blocks z tells the label
    python benchmarks/evidence.py ablation --seeds 3     every change that was made, taken back one at a time
    python benchmarks/evidence.py paper                  the paper's table, in runs of 200 s at most (1 hour);
                                                         --fashion-mnist DIR: on that too (2 hours)
    python benchmarks/evidence.py brief                  plain CNNs after as few epochs as these tables have
                                                         (10 minutes); takes --fashion-mnist DIR
    python benchmarks/evidence.py fashion                Fashion-MNIST with its own settings (5 hours);
                                                         takes --fashion-mnist DIR
    python benchmarks/evidence.py cheaper                time and memory, from benchmarks/speed.py

Prints the plan and the time left; runs that are in runs/ below the current folder are not run again. Keeps
the values of every seed in benchmarks/results/evidence-TABLE.json, draws docs/img/evidence_TABLE.png, and
puts both into docs/evidence.md. The times are those of two cores.
"""

import argparse
import copy
import json
import re
import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import control, intervals
from benchmarks.seeds import (
    DOCS,
    best_test_accuracy,
    folder_of,
    inferred,
    keep_answers,
    mean,
    mean_and_error,
    network_of,
    run,
    write,
)
from benchmarks.speed import PEAK, name_of_machine, peak_bytes, random_batch, seconds_of_steps
from noprop_lab import __main__ as lab
from noprop_lab.data import load_data
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig, WholeConfig

RESULTS = Path(__file__).parent / "results"
Rows = dict[str, dict[str, list[float]]]  # a value a seed, by row and column
P, SEEDS, LESS = "p, Holm", "seeds", "less the first row's, 95 % interval"

DT = "--objective=dt"
EVERY = "--supervise=every"  # deep supervision: each block's answer has a loss
LAST = [DT, "--updates=last"]  # cross-entropy and KL term once a step, blocks side by side
HEADLINE = {  # name: flags; 12 epochs unless they say otherwise
    "NoProp, hybrid loss: the default": [],
    "NoProp-DT, learned embedding": [DT],
    "NoProp-DT, one update a step, learned embedding, learning rate 0.003": [*LAST, "--lr=0.003"],
    "NoProp-DT, one-hot": [*LAST, "--embedding=onehot"],
    "the same chain by backpropagation": ["--objective=backprop"],
    "the same chain by backpropagation, a loss after every block": ["--objective=backprop", EVERY],
    "plain CNN of one block's size": ["--objective=backprop", "--num-blocks=1"],
    "plain CNN of one block's size, six times as long": [
        "--objective=backprop",
        "--num-blocks=1",
        "--epochs=72",
        "--patience=72",
    ],
    "plain CNN of all blocks' size": ["--objective=backprop", "--num-blocks=1", "--block=reference"],
}
FIXED, ONE_HOT, PROTOTYPES = (f"--embedding={x}" for x in ("fixed", "onehot", "prototype"))
NEAR = "--embed-scale=0.154"  # by which MNIST's prototypes are as far from each other as one-hot labels
# the paper's own rival: backpropagation through a chain that learns its α_t, from noise
RIVAL = ["--objective=backprop", "--weights=learned", "--target=classes", "--classify=z", "--temperature=1"]
OBJECTIVES = {  # name: flags, beside two epochs
    "hybrid": [],
    "NoProp-DT, embedding learned": [DT],
    "NoProp-DT, embedding learned, learning rate 0.003": [DT, "--lr=0.003"],
    "NoProp-DT, embedding fixed": [DT, FIXED],
    "NoProp-DT, one-hot": [DT, ONE_HOT],
    "NoProp-DT, one-hot, learning rate 0.004": [DT, ONE_HOT, "--lr=0.004"],
    "NoProp-DT, prototypes": [DT, PROTOTYPES],
    "NoProp-DT, prototypes, learning rate 0.004": [DT, PROTOTYPES, "--lr=0.004"],
    "NoProp-DT, one-hot, as far apart as prototypes": [DT, ONE_HOT, "--embed-scale=6.5"],
    "NoProp-DT, prototypes, as near as one-hot": [DT, PROTOTYPES, NEAR],
    "one update a step, embedding learned": LAST,
    "one update a step, embedding learned, learning rate 0.003": [*LAST, "--lr=0.003"],
    "the same chain by backpropagation": ["--objective=backprop"],
    "the paper's backpropagation, one-hot": [*RIVAL, ONE_HOT],
    "the paper's backpropagation, one-hot, learning rate 0.004": [*RIVAL, ONE_HOT, "--lr=0.004"],
    "the paper's backpropagation, one-hot, learning rate 0.05": [*RIVAL, ONE_HOT, "--lr=0.05"],
    "the paper's backpropagation, embedding learned": RIVAL,
    "the paper's backpropagation, embedding learned, learning rate 0.004": [*RIVAL, "--lr=0.004"],
    "the paper's backpropagation, embedding learned, learning rate 0.05": [*RIVAL, "--lr=0.05"],
}
ALONE = ["--threads=1"]  # two runs at once, each on a core of its own
TWO_EPOCHS = ["--epochs=2", *ALONE]
# in at most 200 s: of a chain with prototypes, of CT and FM, of these with prototypes
IMAGES, ALL_T, ALL_T_IMAGES = ([f"--epochs={x}", *ALONE] for x in (1, 10, 3))
CT, FM = "--objective=ct", "--objective=fm"
PAPER = {  # name: flags, and the paper's own accuracy on MNIST, with its networks and epochs
    "NoProp-DT, one-hot": ([*TWO_EPOCHS, DT, ONE_HOT], 99.47),
    "NoProp-DT, learned, D = 20": ([*TWO_EPOCHS, DT], 99.49),
    "NoProp-DT, prototypes": ([*IMAGES, DT, PROTOTYPES], 99.54),
    "NoProp-CT, one-hot": ([*ALL_T, CT, ONE_HOT], 97.84),
    "NoProp-CT, learned, D = 20": ([*ALL_T, CT], 97.70),
    "NoProp-CT, prototypes": ([*ALL_T_IMAGES, CT, PROTOTYPES], 97.17),
    "NoProp-CT, prototypes, as near as one-hot": ([*ALL_T_IMAGES, CT, PROTOTYPES, NEAR], None),
    "NoProp-FM, one-hot": ([*ALL_T, FM, ONE_HOT], 99.21),
    "NoProp-FM, learned, D = 20": ([*ALL_T, FM], 99.29),
    "NoProp-FM, prototypes": ([*ALL_T_IMAGES, FM, PROTOTYPES], 98.52),
    "the paper's backpropagation, one-hot": ([*TWO_EPOCHS, *RIVAL, ONE_HOT], 99.46),
    "the paper's backpropagation, learned, D = 20": ([*TWO_EPOCHS, *RIVAL], 99.43),
    "the paper's backpropagation, prototypes": ([*IMAGES, *RIVAL, PROTOTYPES], 99.44),
    "the script's chain by backpropagation": ([*TWO_EPOCHS, "--objective=backprop"], None),
}
ABLATION = {  # name: flags, beside two epochs
    "the default": [],
    "ε̂ = f(x, z) in place of û = f(x, z)": ["--target=noise"],
    "the same, with DDPM's weights": ["--target=noise", "--weights=ddpm"],
    "û = softmax(f) W, as in the paper": ["--target=classes"],
    "MSE(ε̂, ε) alone": ["--lambda-global=0"],
    "MSE(û, u) alone": ["--eta-loss-weight=0"],
    "classifier reads z_T in place of û_T": ["--classify=z"],
    "embedding fixed": ["--embedding=fixed"],
    "D = 10": ["--embed-dim=10"],
    "D = 64": ["--embed-dim=64"],
    "T = 1": ["--num-blocks=1"],
    "T = 2": ["--num-blocks=2"],
    "T = 5": ["--num-blocks=5"],
    "T = 20": ["--num-blocks=20"],
    "no gradient clip": ["--grad-clip=1e9"],
    "no weight decay": ["--weight-decay=0", "--embed-wd=0"],
    "no limit on the embedding's norm": ["--max-norm-embed=1e9"],
    "no augmentation": ["--no-augment"],
    "no averaging of weights": ["--ema-decay=0"],
    "cosine learning rate, no warm-up": ["--schedule=cosine"],
}


FASHION = {  # name: flags, beside Fashion-MNIST's own settings
    "NoProp, hybrid loss": [],
    "NoProp-DT, one-hot": [*LAST, ONE_HOT],
    "the same chain by backpropagation": ["--objective=backprop"],
    "plain CNN of one block's size": ["--objective=backprop", "--num-blocks=1"],
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


# --- Tables ------------------------------------------------------------------------------------------------


def after_two_epochs(settings: dict[str, list[str]], seeds: range) -> dict[str, list[float]]:
    """Validation accuracies by seed of the runs with each setting's flags."""
    runs = run({name: [*TWO_EPOCHS, *flags] for name, flags in settings.items()}, seeds, at_once=2)
    return {name: [x["val_accuracy"] for x in of_one] for name, of_one in runs.items()}


def networks(seeds: range, *flags: str) -> list[noprop.NoProp]:
    """The networks of the runs with these flags."""
    run({"the default": list(flags)}, seeds)
    return [noprop.load(folder_of(list(flags), seed) / "noprop_hybrid.pt") for seed in seeds]


def in_order(rows: dict) -> dict:
    """Rows of the headline, each where that stands which it is of, or else at the beginning."""

    def place(row: str) -> int:
        own = [name for name in HEADLINE if row.startswith(name)]
        return [*HEADLINE].index(max(own, key=len)) if own else 0

    return {row: rows[row] for row in sorted(rows, key=place)}


def headline(seeds: range, names: tuple[str, ...] = tuple(HEADLINE)) -> Rows:
    """Which way of training is best? Test accuracy of the weights that validation selects."""
    test, rows = noprop.load_data(noprop.Config()).test, kept("headline").get("rows", {})
    ten, *_ = control.measured(ten_cnns())
    for name in names:
        for part, more in headline_of(name, seeds, test, rows).items():
            old = rows.get(part, {})
            seen = {column: [*old[column], *more[column]] for column in more} if SEEDS in old else more
            rows[part] = seen | {column: old[column] for column in ("seconds", PEAK) if column in old}
    numbers, last = [100 + 10 * replicate for replicate in range(len(ten))], rows.pop(control.TEN, {})
    return in_order(rows) | {control.TEN: last | {SEEDS: numbers, "test accuracy": ten}}


def ten_cnns() -> np.ndarray:
    """What ten plain CNNs, averaged, answer in each replicate of control.py, (R, 1, 2, N)."""
    if not (rows := control.kept_of("control-mnist")):
        raise SystemExit("error: the last row is of control.py: run that first")
    return rows[control.TEN]


def headline_of(name: str, seeds: range, test: noprop.Split, rows: Rows) -> Rows:
    """What these rows lack of the seeds: of a way of training, and of its other way of inference."""
    flags, there = HEADLINE[name], rows.get(name, {}).get(SEEDS, [])
    if not (missing := [seed for seed in seeds if seed not in there]):
        return {}
    [of_one] = run({name: flags}, missing).values()
    found = {
        name: {
            SEEDS: missing,
            "test accuracy": [x["test_accuracy"] for x in of_one],
            "best test epoch": [best_test_accuracy(x) for x in of_one],
            "epochs": [x["epochs"] for x in of_one],
        }
    }
    if not flags or EVERY in flags:  # others have one block, one loss, or a z_1 of nearly pure noise
        found[name]["cut after block 1"] = [x["test_accuracy_by_blocks"][0] for x in of_one]
        found[name]["mean of all blocks"] = [x["test_accuracy_average"] for x in of_one]
    for temperature, wanted in ((1.0, not flags), (0.0, DT in flags)):
        if wanted:
            models = (network_of(folder_of(flags, seed)) for seed in missing)
            answers = [inferred(model, temperature, test) for model in models]
            found[f"{name}, at τ = {temperature:g}"] = {
                SEEDS: missing,
                "test accuracy": [x["accuracy"][-1] for x in answers],
                "cut after block 1": [x["accuracy"][0] for x in answers],
                "mean of all blocks": [x["accuracy_average"] for x in answers],
            }
    return found


def timed(rows: Rows) -> Rows:
    """The headline, with seconds of training: the time of a step times the steps, interleaved."""
    configs = {name: [lab.read_command_line("train", flags)[0]] for name, flags in HEADLINE.items()}
    [cnn] = configs["plain CNN of one block's size"]
    configs[control.TEN] = [replace(cnn, seed=x, step_threads=1) for x in range(10)]
    found = seconds_of_steps(configs, rounds=7)
    for name, (config, *_) in configs.items():
        rows[name]["seconds"] = [found[name] * config.epochs * (55_000 // config.batch_size)]
    rows[next(iter(rows))][PEAK] = [found[PEAK]]
    return rows


def right_ones(split: noprop.Split, answer: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """Whether answer(images (B, 1, 28, 28), labels (B,)), class scores (B, classes), is right, (N,) bools."""

    @torch.inference_mode()
    def right(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return answer(noprop.to_float(images), labels).argmax(-1) == labels

    batches = list(zip(split.images.split(500), split.labels.split(500), strict=True))
    with noprop.workers(noprop.CPU, noprop.Options.threads) as parallel:
        return torch.cat(list(parallel(right, batches))).numpy()


def answer_of(model: noprop.NoProp, blocks, steps, images: Tensor, z: Tensor, *sampling, mean=False):
    """Class logits (B, classes) after these blocks, in this order, at these steps, from z_0 = z.

    mean: of z_t/√ᾱ_t, with equal weights the mean of û_1 ... û_t, in place of the last û.
    """
    model = copy.deepcopy(model)
    model.blocks, model.steps = nn.ModuleList(blocks), list(steps)
    for t in range(1, len(model.blocks) + 1):
        u_hat, z = model.step(t, images, z, *sampling)
    return model.classify(z / model.alpha_bar[len(blocks)].item() ** 0.5 if mean else u_hat, z)


def ladder_of(model: noprop.NoProp, test: noprop.Split) -> dict[str, np.ndarray]:
    """On which test images a trained network is right, (N,) bools, used rightly and wrongly."""
    T, D, blocks, steps = len(model.blocks), model.label_embedding.embedding_dim, model.blocks, model.steps
    fresh = noprop.build(replace(model.config, seed=99)).eval().blocks  # untrained
    ddpm = noprop.reverse_steps(model.alpha_bar, equal_weights=False).tolist()

    def start(images: Tensor, scale: float = 0.0) -> Tensor:
        noise = noprop.generator("evidence", len(images))
        return scale * torch.randn(len(images), D, generator=noise)

    def chain(use, images: Tensor, z: Tensor | None = None, steps=steps, mean=False) -> Tensor:
        return answer_of(model, use, steps, images, start(images) if z is None else z, mean=mean)

    def alone(t: int, images: Tensor, z: Tensor) -> Tensor:
        return chain([blocks[t - 1]], images, z, steps[t - 1 : t])

    def true_label(t: int, images: Tensor, labels: Tensor) -> Tensor:
        """z_{t-1} drawn from q(z | y): what a leak would look like."""
        return noprop.noisy_label(model.label_embedding(labels), start(images, 1.0), steps[t - 1][0])

    order = torch.randperm(T, generator=noprop.generator("evidence", "order")).tolist()
    rest = NUMBERS[T - 1]
    found = {
        "the chain as it is used": lambda x, y: chain(blocks, x),
        "chain with DDPM's weights": lambda x, y: chain(blocks, x, steps=ddpm),
    }
    found |= {
        f"chain cut after block {t}": lambda x, y, t=t: chain(blocks[:t], x, steps=steps[:t])
        for t in (1, 2, 5)
        if t < T
    }
    found |= {
        f"classifier reads the mean of û_1 ... û_{t}, which is z_{t}/√ᾱ_{t}": lambda x, y, t=t: chain(
            blocks[:t], x, steps=steps[:t], mean=True
        )
        for t in sorted({2, 5, T})
        if t <= T
    }
    shuffled = [blocks[t] for t in order]
    found |= {
        "the same, blocks in reverse order": lambda x, y: chain(blocks[::-1], x, mean=True),
        f"the same, in the order {' '.join(str(t + 1) for t in order)}": lambda x, y: chain(
            shuffled, x, mean=True
        ),
        "mean of the blocks' probabilities, each from z = 0, no chain": lambda x, y: sum(
            alone(t, x, start(x)).softmax(-1) for t in range(1, T + 1)
        ),
        "mean of the probabilities along the chain": lambda x, y: model(x).softmax(-1).mean(1),
    }
    found |= {
        f"block {t} alone, z from N(0, I)": lambda x, y, t=t: alone(t, x, start(x, 1.0))
        for t in (1, (T + 1) // 2, T)
    }
    found |= {
        f"block {T} in all places": lambda x, y: chain([blocks[-1]] * T, x),
        f"the last block after {rest} untrained ones": lambda x, y: chain([*fresh[:-1], blocks[-1]], x),
        "the same with DDPM's weights": lambda x, y: chain([*fresh[:-1], blocks[-1]], x, steps=ddpm),
        f"{rest} trained blocks before an untrained last one": lambda x, y: chain(
            [*blocks[:-1], fresh[-1]], x
        ),
        "no image (x = 0)": lambda x, y: chain(blocks, 0 * x),
        "no image, z_0 from N(0, I)": lambda x, y: chain(blocks, 0 * x, start(x, 1.0)),
        f"LEAK: block {T} given z_{T - 1} made from the true label": lambda x, y: alone(
            T, x, true_label(T, x, y)
        ),
        f"LEAK, no image: block {T} given z_{T - 1} made from the true label": lambda x, y: alone(
            T, 0 * x, true_label(T, x, y)
        ),
    }
    return {name: right_ones(test, answer) for name, answer in found.items()}


def ladder_rows(models: list[noprop.NoProp], test: noprop.Split, others: dict[str, np.ndarray]) -> Rows:
    """Accuracies by ladder_of(), and of others, and what tells them from the first.

    Keeps which images are right. others: as intervals.packed() keeps them, (R, 1, 2, N).
    """
    found = [ladder_of(model, test) for model in models]
    for model, rows in zip(models, found, strict=True):
        path = RESULTS / f"ladder-{getattr(model.config, 'dataset', 'mnist')}-{model.config.seed}.npz"
        keep_answers(path, names=np.array([*rows]), right=np.packbits([*rows.values()], axis=1))
    base, *_ = found[0]
    rows = {x: intervals.as_kept([rows[x] for rows in found]) for x in found[0]} | others
    drawn = intervals.resampled(rows, 0)
    return {
        name: {"test accuracy": intervals.right_and_loss(rows[name])[0].mean((1, 2)).tolist()}
        | ({LESS: intervals.numbers(x - drawn[base])} if name != base else {})
        for name, x in drawn.items()
    }


def ladder(seeds: range) -> Rows:
    """What does the chain of blocks do? Networks of the default, used rightly and wrongly."""
    ten = ten_cnns()[: len(seeds)]  # where there are as many: replicates count alike in resampled()
    others = {control.TEN: ten} if len(ten) == len(seeds) else {}
    return ladder_rows(networks(seeds), noprop.load_data(noprop.Config()).test, others)


def inference(model: noprop.NoProp, val: noprop.Split) -> dict[str, float]:
    """Validation accuracies of a trained network by changes of inference alone."""
    ddpm = noprop.reverse_steps(model.alpha_bar, equal_weights=False).tolist()
    before, after = model.alpha_bar[:-1], model.alpha_bar[1:]
    b = ((1 - after) / (1 - before)).sqrt()  # DDIM: z_t = √ᾱ_t û + √(1-ᾱ_t) ε̂, and ε̂ from û and z_{t-1}
    ddim = zip(*(x.tolist() for x in (before, after.sqrt() - b * before.sqrt(), b, 0 * b)), strict=True)
    blocks = list(model.blocks)
    variants = {f"DDPM's weights, τ = {tau:g}": (blocks, ddpm, tau) for tau in (0.0, 0.25, 0.5, 1.0)}
    variants |= {
        "DDIM's step, τ = 0": (blocks, list(ddim), 0.0),
        # a block has learnt another level than that at which it is used
        "BUG: blocks one level off (DDPM, τ = 1)": ([*blocks[1:], blocks[-1]], ddpm, 1.0),
        "BUG: levels in reverse (DDPM, τ = 1)": (blocks[::-1], ddpm, 1.0),
    }

    def sample(blocks, steps, tau: float, images: Tensor) -> Tensor:
        noise = noprop.generator("evidence")
        return answer_of(model, blocks, steps, images, model.start(images, tau, noise), tau, noise)

    return {
        name: 100 * right_ones(val, lambda x, y, how=how: sample(*how, x)).mean()
        for name, how in variants.items()
    }


def differences(columns: dict[str, list[float]]) -> Rows:
    """Validation accuracies by seed, each beside the first row's of the same seed."""
    base = next(iter(columns.values()))
    return {
        name: {"validation accuracy": values, "Δ": [x - y for x, y in zip(values, base, strict=True)]}
        for name, values in columns.items()
    }


def objectives(seeds: range) -> Rows:
    """Is NoProp-DT unstable? Validation accuracy after two epochs, by seed."""
    return differences(after_two_epochs(OBJECTIVES, seeds))


@torch.inference_mode()
def follows(model: noprop.NoProp, val: noprop.Split, t: int) -> float:
    """Percent of images for which û_t is nearest to the label that z_{t-1} was made for, a wrong one."""
    W, level, draws = model.label_embedding.weight, model.steps[t - 1][0], noprop.generator("follows", t)
    wrong = (val.labels + torch.randint(1, 10, val.labels.shape, generator=draws)) % 10
    found = 0.0
    for images, label in zip(val.images.split(500), wrong.split(500), strict=True):
        z = noprop.noisy_label(W[label], torch.randn(len(label), W.shape[1], generator=draws), level)
        u_hat = noprop.clean_label(z, model.blocks[t - 1](noprop.to_float(images), z, level, W), level)
        found += (torch.cdist(u_hat, W).argmin(1) == label).sum().item()
    return 100 * found / len(wrong)


def embeddings(seeds: range) -> Rows:
    """Why do prototypes do worse? Where z tells the label: two epochs of NoProp-DT, on validation images."""
    names = [x for x in OBJECTIVES if "NoProp-DT" in x and "learning rate" not in x and "learned" not in x]
    settings = {name: OBJECTIVES[name] for name in names}
    accuracies, val = after_two_epochs(settings, seeds), noprop.load_data(noprop.Config()).val
    rows: Rows = {}
    for name, flags in settings.items():
        folders = [folder_of([*TWO_EPOCHS, *flags], seed) for seed in seeds]
        models = [network_of(folder) for folder in folders]
        rows[name] = {"validation accuracy": accuracies[name]}
        for t in (2, 4, 6, 8, 10):
            rows[name][f"follows a wrong z, block {t}"] = [follows(model, val, t) for model in models]
    return rows


def ablation(seeds: range) -> Rows:
    """Which change matters? Each taken back alone: validation accuracy after two epochs, by seed."""
    columns = after_two_epochs(ABLATION, seeds)
    val = noprop.load_data(noprop.Config()).val
    results = [inference(model, val) for model in networks(seeds, *TWO_EPOCHS)]
    rows = differences(columns | {name: [result[name] for result in results] for name in results[0]})
    values = {name: x["validation accuracy"] for name, x in rows.items() if not name.startswith("BUG")}
    base = values.pop(next(iter(values)))
    for name, p in intervals.adjusted(base, values).items():  # a bug's spread is no measure of the others'
        rows[name][P] = [p]
    return rows


def mib_and_seconds(config: LabConfig, cores: int) -> tuple[float, float]:
    """What a training keeps for the backward pass, and takes: the time of a step times the steps.

    Of the step alone: augmentation, the same for all rows, is not in it.
    """
    state, batch = LabState(config), random_batch(config.batch_size)
    with noprop.workers(noprop.CPU, cores) as parallel:
        step = partial(lab.step_of(config), state, *batch, 1e-3, parallel)
        seconds = config.epochs * (55_000 // config.batch_size) * min(timeit.repeat(step, number=1, repeat=5))
        return peak_bytes(state.model, step) / 2**20, seconds


def small_blocks(fashion_mnist: Path | None) -> dict[str, list[str]]:
    """Flags by data set, as control.DATASETS names them: with small blocks on both."""
    own = ["--block=small", "--dataset=fashion_mnist", f"--data-root={fashion_mnist}"]
    return {"mnist": []} | ({"fashion_mnist": own} if fashion_mnist else {})


def plain_cnns(models: list[noprop.NoProp], split: noprop.Split) -> dict[str, np.ndarray]:
    """Accuracy and loss of one of these networks, on average, and where there are ten of their mean."""
    log_p = torch.cat([control.log_p_of(x, split.images) for x in models], 1)  # (N, networks, classes)
    found = {"one plain CNN": log_p.unbind(1)}
    found |= {control.TEN: [control.averaged(log_p)]} if len(models) > 1 else {}
    kept = {row: np.stack([intervals.packed(x, split.labels) for x in of]) for row, of in found.items()}
    return {row: np.array(intervals.right_and_loss(x)).mean((1, 2)) for row, x in kept.items()}


def brief(seeds: range, fashion_mnist: Path | None = None) -> Rows:
    """What do plain CNNs of a block's size have after as few epochs as the short runs here?"""
    rows: Rows = {}
    for name, of_set in small_blocks(fashion_mnist).items():
        dataset = control.DATASETS[name]
        rates = json.loads((RESULTS / f"control-{name}-rates.json").read_text())
        twin = ["--objective=backprop", "--num-blocks=1", f"--lr={control.best_rate(rates['cnns'])}"]
        for epochs, count in ((2, 10), (10, 1)):
            flags = [f"--epochs={epochs}", *ALONE, *twin, *of_set]
            numbers = [range(100 + 10 * seed, 100 + 10 * seed + count) for seed in seeds]
            run({"plain CNN": flags}, [x for of_one in numbers for x in of_one], at_once=2)
            models = [[network_of(folder_of(flags, x)) for x in of_one] for of_one in numbers]
            data = load_data(models[0][0].config, fashion_mnist if of_set else noprop.Options.data_root)
            for which, split in (("validation %", data.val), ("%", data.test)):
                for of_one in models:
                    for row, (accuracy, loss) in plain_cnns(of_one, split).items():
                        columns = rows.setdefault(f"{row}, {epochs} epochs", {})
                        columns.setdefault(f"{dataset}, {which}", []).append(accuracy)
                        if which == "%":
                            columns.setdefault(f"{dataset}, nll", []).append(loss)
    return rows


def paper(seeds: range, fashion_mnist: Path | None = None) -> Rows:
    """The paper's table: its three algorithms, three embeddings, and backpropagation, in short runs."""
    rows: Rows = {}
    for dataset, of_set in small_blocks(fashion_mnist).items():
        dataset = control.DATASETS[dataset]
        flags = {name: [*own, *of_set] for name, (own, _) in PAPER.items()}
        for name, found in run(flags, seeds, at_once=2).items():
            row = rows.setdefault(name, {"epochs": [x["epochs"] for x in found]})
            if dataset == "MNIST" and PAPER[name][1]:
                row["the paper, MNIST"] = [PAPER[name][1]]
            for column, key in (("%", "test_accuracy"), ("nll", "test_loss")):
                row[f"{dataset}, {column}"] = [x[key] for x in found]
            by_steps = [x.get("test_accuracy_by_steps", {}) for x in found]
            for n in ("1", "2", "100") if all(by_steps) else ():
                row[f"{dataset}, steps: {n}"] = [x[n] for x in by_steps]
    for name, (own, _) in PAPER.items():  # nothing else computes now
        config = network_of(folder_of(own, seeds[0])).config
        mib, seconds = mib_and_seconds(config, 1)
        rows[name] |= {"MiB": [mib], "seconds on one core": [seconds]}
    return rows


def fashion_flags(fashion_mnist: Path) -> dict[str, list[str]]:
    """The flags of FASHION's runs, with the data in that folder."""
    of_set = ["--threads=1", "--dataset=fashion_mnist", f"--data-root={fashion_mnist}"]
    return {name: [*own, *of_set] for name, own in FASHION.items()}


def three_cnns(seed: int) -> range:
    """The seeds of the plain CNNs that stand beside the chain of three blocks of a seed."""
    return range(3 * seed, 3 * seed + 3)


def fashion(seeds: range, fashion_mnist: Path) -> Rows:
    """What does Fashion-MNIST have with settings of its own? And what does the chain of three blocks do?"""
    flags, rows = fashion_flags(fashion_mnist), {}
    columns = {"test accuracy": "accuracy", "nll": "loss"}
    *chained, cnn = flags
    runs = run({name: flags[name] for name in chained}, seeds, at_once=2)
    runs |= run({cnn: flags[cnn]}, [x for seed in seeds for x in three_cnns(seed)], at_once=2)
    for name, found in runs.items():
        rows[name] = {column: [x[f"test_{key}"] for x in found] for column, key in columns.items()}
        for column, key in columns.items() if not FASHION[name] else ():
            rows[name][f"{column} of the blocks' mean"] = [x[f"test_{key}_average"] for x in found]
        rows[name]["accuracy, validation images"] = [x["val_accuracy"] for x in found]
        rows[name]["epochs"] = [x["epochs"] for x in found]
    models = {name: [network_of(folder_of(flags[name], seed)) for seed in seeds] for name in chained}
    chains, dt, _ = models.values()
    test = load_data(chains[0].config, fashion_mnist).test
    averages = rows.setdefault("three of these, averaged", {column: [] for column in columns})
    for seed in seeds:
        three = [network_of(folder_of(flags[cnn], x)) for x in three_cnns(seed)]
        shares = torch.stack([x.probabilities(test.images)[:, -1] for x in three]).mean(0)
        right, loss = shares.argmax(-1) == test.labels, F.nll_loss(shares.log(), test.labels)
        averages["test accuracy"].append(100 * right.float().mean().item())
        averages["nll"].append(loss.item())
    found = [inferred(model, 0.0, test) for model in dt]
    row = {column: [x[key][-1] for x in found] for column, key in columns.items()}
    rows["NoProp-DT, one-hot, at τ = 0"] = row
    _, *others = ladder_rows(chains, test, {}).items()  # the chain is there already
    rows |= dict(others)
    configs = {name: first.config for name, [first, *_] in (models | {cnn: three}).items()}
    found = seconds_of_steps({name: [config] for name, config in configs.items()}, rounds=5)
    for name, config in configs.items():  # the twins on one core, as they were trained
        cores = 1 if isinstance(config, WholeConfig) else 2
        seconds = found[name] * config.epochs * (55_000 // config.batch_size)
        rows[name][f"seconds, cores: {cores}"] = [seconds]
    next(iter(rows.values()))[PEAK] = [found[PEAK]]
    return rows


def cheaper(_seeds: range) -> Rows:
    """Is NoProp cheaper? Activations kept for the backward pass, and time of a step (benchmarks/speed.py)."""
    if not (path := RESULTS / f"speed-{name_of_machine()}.json").exists():
        raise SystemExit(f"error: no {path.name}: run benchmarks/speed.py on this machine first")
    found = json.loads(path.read_text())
    rows: Rows = {}
    for key, value in found.items():
        if memory := re.fullmatch(r"(T = \d+): MiB of activations, \d+ images, (.*)", key):
            rows.setdefault(memory[2], {})[f"MiB, {memory[1]}"] = [value]
        if ratio := re.fullmatch(r"T = 10: time of a step of \d+ ÷ .*chain, (.*)", key):
            rows[ratio[1]] = {"time of a step, T = 10, ÷ backpropagation's": [value]} | rows.get(ratio[1], {})
    return rows


# --- Report ------------------------------------------------------------------------------------------------


def results_file(name: str) -> Path:
    """Where the values of a table are kept."""
    return RESULTS / f"evidence-{name}.json"


def kept(name: str) -> dict:
    """What a table's results file holds: its command, PyTorch's version, its rows; empty if there is none."""
    path = results_file(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


TABLES = {
    table.__name__: table
    for table in (headline, ladder, objectives, embeddings, ablation, paper, brief, fashion, cheaper)
}
BLUE, GREY, RED = "#0072B2", "#888888", "#D55E00"


def cell(column: str, values: list[float]) -> str:
    if column == SEEDS:
        return str(len(values))
    if column == P:
        return f"{values[0]:.3f}" if values[0] >= 0.001 else "< 0.001"
    if column == LESS:
        return intervals.shown(values, 2)
    digits = {"seconds": 0, "epochs": 0, "GFLOP": 0, "MiB": 1, "nll": 3}
    places = next((n for word, n in digits.items() if word in column), 2)
    return mean(values[:1] if column == "epochs" else values, places).removesuffix(" ± nan")


def markdown(rows: Rows) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        cells = [cell(column, row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Rows, title: str):
    """A dot a seed, and mean ± standard error, a row a line; or the activations by T."""
    from matplotlib.figure import Figure

    known = ("test accuracy", "Δ", "validation accuracy", "MNIST, %", "Fashion-MNIST, %")
    columns = [column for column in known if column in next(iter(rows.values()))]
    columns = ["Δ"] if "Δ" in columns else columns
    height = 1.1 + 0.27 * len(rows) if columns else 4.5
    figure = Figure(figsize=(9 + 4 * (len(columns) > 1), height), layout="constrained")
    panels = figure.subplots(1, max(1, len(columns)), squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=False):
        dots(axes, rows, column)
        if axes is panels[0]:
            axes.set_yticks(range(len(rows)), rows, fontsize=9)
        if len(columns) > 1:
            axes.set_title(column.removesuffix(", %"), fontsize=10)
    if not columns:
        activations(panels[0], rows)
    figure.suptitle(title, fontsize=11)
    return figure


def activations(axes, rows: Rows) -> None:
    measured = {name: row for name, row in rows.items() if "MiB, T = 1" in row}
    for (name, row), marker in zip(measured.items(), "os^DvP*X", strict=False):
        memory = {int(x.split()[-1]): row[x][0] for x in row if x.startswith("MiB")}
        ratio = next(value for column, [value] in row.items() if "÷" in column)
        label = f"{name} (time of a step at T = 10: {ratio:.2f})"
        axes.plot(memory.keys(), memory.values(), marker=marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="blocks T", ylabel="MiB kept for the backward pass")
    axes.set_ylim(top=1500)  # room for the legend
    axes.set_xticks(list(memory), list(memory))
    axes.legend(frameon=False)
    finish_axes(axes)


def finish_axes(axes) -> None:
    axes.margins(x=0.08)
    axes.tick_params(axis="x", which="both", pad=4)


def dots(axes, rows: Rows, column: str) -> None:
    """A dot a seed, mean ± standard error, and beside MNIST what the paper has, of one column of a table."""
    from matplotlib.ticker import FuncFormatter

    tested = any(P in row for row in rows.values())
    for y, (name, row) in enumerate(rows.items()):
        values = np.array(row[column])
        middle, error = mean_and_error(row[column])
        doubtful = tested and row.get(P, [1])[0] > 0.05
        color = RED if re.match("LEAK|BUG", name) else GREY if doubtful else BLUE
        place = (lambda x: np.maximum(100 - x, 0.1)) if column != "Δ" else np.asarray
        axes.plot(place(values), np.full(len(values), y), "o", color=color, alpha=0.3, markersize=5)
        axes.errorbar(place(middle), y, xerr=error, fmt="|", color=color, markersize=10, capsize=3)
        if theirs := row.get(f"the paper, {column[:-3]}"):
            axes.plot(place(np.array(theirs)), [y], "x", color=RED)
        text = f"{middle:{'+' if column == 'Δ' else ''}.2f} ± {error:.2f}".removesuffix(" ± nan")
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=color)
        if y == 0:
            axes.axvline(place(middle), color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if column == "Δ":
        axes.set_xscale("symlog", linthresh=0.1)
        unit = "difference of validation accuracy in points, linear up to 0.1"
        axes.set_xlabel(unit + "; grey: not resolved" * tested, loc="right")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        crosses = "; ×: the paper" * any(f"the paper, {column[:-3]}" in row for row in rows.values())
        of = "validation" if column.startswith("validation") else "test"
        right = f"; at the right, {of} accuracy in %" * (len(axes.figure.axes) == 1)
        axes.set(xscale="log", xlabel=f"{of} error in %, logarithmic{right}{crosses}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(
            FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}".strip("0.") in ("2", "5") else "")
        )
    finish_axes(axes)


def control_of(name: str) -> Rows:
    """Rows for a table of short runs: what brief() has of plain CNNs, by the names of its columns."""
    found = kept("brief").get("rows", {})
    rows = {f"{row}, {NUMBERS[len(next(iter(x.values())))]} seeds": x for row, x in found.items()}
    if name == "paper":
        return {row: {x: y for x, y in of.items() if "validation" not in x} for row, of in rows.items()}
    if name not in ("objectives", "embeddings", "ablation"):
        return {}
    of_two = {row: columns for row, columns in rows.items() if " 2 epochs" in row}
    return {row: {"validation accuracy": columns["MNIST, validation %"]} for row, columns in of_two.items()}


def write_report(name: str, found: dict) -> None:
    """Put a table, with its control, and its picture into docs/evidence.md, between their marks."""
    made = f"`python benchmarks/evidence.py {found['command']}`, PyTorch {found['torch']}"
    picture = f"![{TABLES[name].__doc__}](img/evidence_{name}.png)\n\n" if is_drawn(found["rows"]) else ""
    write(name, f"{picture}{markdown(found['rows'] | control_of(name))}\n\n{made}")


def is_drawn(rows: Rows) -> bool:
    """Whether a table has a picture: a few rows say as much by themselves."""
    return len(rows) > 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--times", action="store_true", help="of headline: measure only its seconds anew")
    parser.add_argument("--rows", nargs="+", choices=HEADLINE, help="of headline: only these", metavar="NAME")
    parser.add_argument(
        "--fashion-mnist", type=Path, metavar="DIR", help="for paper, brief, fashion: its files"
    )
    arguments = parser.parse_args()
    if arguments.fashion_mnist and arguments.table not in ("paper", "brief", "fashion"):
        parser.error("--fashion-mnist is of the tables paper, brief and fashion: leave it out")
    if arguments.table == "fashion" and not arguments.fashion_mnist:
        parser.error("fashion takes --fashion-mnist DIR, the folder with its files")
    if (arguments.times or arguments.rows) and arguments.table != "headline":
        parser.error("--times and --rows are of the table headline: leave them out")
    if arguments.times and arguments.rows:
        parser.error("--times measures all rows: leave --rows out")
    if arguments.seeds < 2:
        parser.error("a standard error takes at least 2 seeds")
    name, first = arguments.table, arguments.first_seed
    found = kept(name)
    first_row = next(iter(found.get("rows", {}).values()), {})
    fewer = name not in ("headline", "cheaper") and any(len(x) > arguments.seeds for x in first_row.values())
    if fewer or (
        name in ("paper", "brief") and "Fashion" in str([*first_row]) and not arguments.fashion_mnist
    ):
        parser.error(f"{results_file(name)} holds more than that: ask for as much, or move it away")
    if arguments.times:
        if missing := HEADLINE.keys() - found.get("rows", {}).keys():
            parser.error(f"{results_file(name)} lacks {', '.join(missing)}: leave --times out first")
        timed(found["rows"])
    else:
        more = [x for x in (arguments.fashion_mnist, arguments.rows) if x]
        rows = TABLES[name](range(first, first + arguments.seeds), *more)
        words = [word for x in sys.argv[1:] for word in x.split("=", 1)]
        command = ["DIR" if Path(x) == arguments.fashion_mnist else x for x in words]
        if arguments.rows or rows == found.get("rows"):  # the rest of the table stays, or all of it
            command = found.get("command", name).split()
        found = {"command": " ".join(command), "torch": torch.__version__, "rows": rows}
    print(markdown(rows := found["rows"]))
    results_file(name).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(name, found)
    picture = DOCS / "img" / f"evidence_{name}.png"
    return noprop.picture(draw, picture, rows, TABLES[name].__doc__) if is_drawn(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
