"""Does NoProp work, and which part of it?

    python benchmarks/evidence.py ladder --seeds 5       what the chain of blocks does (5 runs of the default)
    python benchmarks/evidence.py objectives --seeds 3   NoProp-DT and backpropagation, two epochs
    python benchmarks/evidence.py ablation --seeds 3     every change that was made, taken back one at a time
    python benchmarks/evidence.py headline --seeds 5     NoProp, the paper's NoProp-DT, backpropagation

Prints the plan and the time left; runs that are in runs/ below the current folder are not run again. Keeps
what it finds in benchmarks/results/evidence-TABLE.json, and writes EVIDENCE.md from these files.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.seeds import SCRIPT, finished, mean

CPU, RUNS, RESULTS = torch.device("cpu"), Path("runs"), Path(__file__).parent / "results"
HEADLINE = {  # name: flags; 12 epochs unless they say otherwise
    "hybrid (this script's default)": [],
    "NoProp-DT, learned embedding": ["--objective=dt"],
    "NoProp-DT, one-hot": ["--objective=dt", "--embedding=onehot"],
    "NoProp-DT, prototypes": ["--objective=dt", "--embedding=prototype"],
    "backprop twin: the same chain, end to end": ["--objective=backprop"],
    "plain CNN of one block's size": ["--objective=backprop", "--num-blocks=1"],
    "the same for as many seconds": [
        "--objective=backprop",
        "--num-blocks=1",
        "--epochs=72",
        "--patience=72",
    ],
    "plain CNN of all blocks' size": ["--objective=backprop", "--num-blocks=1", "--block=reference"],
}
OBJECTIVES = {  # name: flags, beside two epochs
    "as it is": [],
    "NoProp-DT, embedding learned": ["--objective=dt"],
    "NoProp-DT, embedding fixed": ["--objective=dt", "--embedding=fixed"],
    "NoProp-DT, one-hot": ["--objective=dt", "--embedding=onehot"],
    "NoProp-DT, prototypes": ["--objective=dt", "--embedding=prototype"],
    "backprop through the chain": ["--objective=backprop"],
}
ABLATION = {  # name: flags, beside two epochs
    "as it is": [],
    "ε̂ = f(x, z) in place of û = f(x, z)": ["--target=noise"],
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
}


# --- Runs --------------------------------------------------------------------------------------------------


def folder_of(flags: list[str], seed: int) -> Path:
    return RUNS / ("-".join(flag.lstrip("-") for flag in flags) or "default") / f"seed{seed}"


def summary_of(folder: Path) -> Path | None:
    """The summary of a finished run."""
    return next((path for path in folder.glob("noprop_*.json") if finished(path)), None)


def run(table: dict[str, list[str]], seeds: range, *more: str) -> dict[str, list[dict]]:
    """The summaries of each row's runs, one a seed; missing ones are run, half-made ones resumed."""
    rows = {name: [*more, *flags] for name, flags in table.items()}
    jobs = [(name, flags, seed) for seed in seeds for name, flags in rows.items()]
    missing = [job for job in jobs if not summary_of(folder_of(job[1], job[2]))]
    print(f"{len(jobs)} runs, {len(missing)} of them are missing.", file=sys.stderr)
    started = time.perf_counter()
    for i, (name, flags, seed) in enumerate(missing):
        folder = folder_of(flags, seed)
        command = [
            sys.executable,
            str(SCRIPT),
            "--resume",
            f"--seed={seed}",
            f"--output-dir={folder}",
            *flags,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        left = (time.perf_counter() - started) / (i + 1) * (len(missing) - i - 1) / 60
        print(f"{i + 1}/{len(missing)}  seed {seed}  {name}; about {left:.0f} min left", file=sys.stderr)
    return {
        name: [json.loads(summary_of(folder_of(flags, seed)).read_text()) for seed in seeds]
        for name, flags in rows.items()
    }


def networks(seeds: range, *flags: str) -> list[noprop.NoProp]:
    run({"as it is": []}, seeds, *flags)
    return [noprop.load(folder_of(list(flags), seed) / "noprop_hybrid.pt") for seed in seeds]


# --- Tables ------------------------------------------------------------------------------------------------


def headline(seeds: range) -> list[str]:
    """Test accuracy of the weights that validation selects, at equal epochs, and at equal seconds."""
    lines = ["| MNIST, test accuracy in % | selected on validation | best test epoch | epochs | seconds |"]
    lines.append("|---|---|---|---|---|")
    for name, runs in run(HEADLINE, seeds).items():
        test, best, seconds = (
            mean([x[key] for x in runs], digits)
            for key, digits in (("test_accuracy", 2), ("best_test_accuracy", 2), ("seconds", 0))
        )
        lines.append(f"| {name} | {test} | {best} | {runs[0]['epochs']} | {seconds} |")
    return lines


def accuracy(split: noprop.Split, answer: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Percent right of answer(images (B, 1, 28, 28), labels (B,)), class scores (B, classes)."""

    @torch.inference_mode()
    def right(batch: tuple[Tensor, Tensor]) -> int:
        images, labels = batch
        return int((answer(noprop.to_float(images), labels).argmax(-1) == labels).sum())

    batches = list(zip(split.images.split(500), split.labels.split(500), strict=True))
    with noprop.workers(CPU, torch.get_num_threads()) as parallel:
        return 100 * sum(parallel(right, batches)) / len(split.labels)


def ladder_of(model: noprop.NoProp, test: noprop.Split) -> dict[str, float]:
    """Test accuracies of a trained network, used rightly and wrongly."""
    T, D, blocks, steps = len(model.blocks), model.label_embedding.embedding_dim, model.blocks, model.steps
    fresh = noprop.NoProp(T, seed=99).eval().blocks  # untrained
    ddpm = noprop.reverse_steps(model.alpha_bar, equal_weights=False)

    def start(images: Tensor, scale: float = 0.0) -> Tensor:
        noise = noprop.generator("evidence", len(images))
        return scale * torch.randn(len(images), D, generator=noise)

    def chain(use, images: Tensor, z: Tensor | None = None, steps=steps) -> Tensor:
        *_, (u_hat, _) = model.reverse_process(use, images, start(images) if z is None else z, steps)
        return model.classifier(u_hat)

    def alone(t: int, images: Tensor, z: Tensor) -> Tensor:
        return chain([blocks[t - 1]], images, z, steps[t - 1 : t])

    def true_label(t: int, images: Tensor, labels: Tensor) -> Tensor:
        """z_{t-1} drawn from q(z | y): what a leak would look like."""
        return noprop.noisy_label(model.label_embedding(labels), start(images, 1.0), steps[t - 1][0])

    order = torch.randperm(T, generator=noprop.generator("evidence", "order")).tolist()
    found = {
        f"block {t} alone, z from N(0, I)": lambda x, y, t=t: alone(t, x, start(x, 1.0)) for t in (1, 5, T)
    }
    found |= {
        f"chain cut after block {t}": lambda x, y, t=t: chain(blocks[:t], x, steps=steps[:t])
        for t in (1, 2, 5, T)
    }
    found |= {
        "mean of the blocks' probabilities, each from z = 0, no chain": lambda x, y: sum(
            alone(t, x, start(x)).softmax(-1) for t in range(1, T + 1)
        ),
        "mean of the probabilities along the chain": lambda x, y: model(x).softmax(-1).mean(1),
        "chain with DDPM's weights": lambda x, y: chain(blocks, x, steps=ddpm),
        "the last block after nine untrained ones": lambda x, y: chain([*fresh[:-1], blocks[-1]], x),
        "the same with DDPM's weights": lambda x, y: chain([*fresh[:-1], blocks[-1]], x, steps=ddpm),
        "nine trained blocks before an untrained last one": lambda x, y: chain([*blocks[:-1], fresh[-1]], x),
        "blocks in reverse order": lambda x, y: chain(blocks[::-1], x),
        f"blocks in the order {' '.join(str(t + 1) for t in order)}": lambda x, y: chain(
            [blocks[t] for t in order], x
        ),
        "block 1 in all places": lambda x, y: chain([blocks[0]] * T, x),
        f"block {T} in all places": lambda x, y: chain([blocks[-1]] * T, x),
        "no image (x = 0)": lambda x, y: chain(blocks, 0 * x),
        "no image, z_0 from N(0, I)": lambda x, y: chain(blocks, 0 * x, start(x, 1.0)),
        f"LEAK: block {T} given z_{T - 1} made from the true label": lambda x, y: alone(
            T, x, true_label(T, x, y)
        ),
        f"LEAK, no image: block {T} given z_{T - 1} made from the true label": lambda x, y: alone(
            T, 0 * x, true_label(T, x, y)
        ),
    }
    return {name: accuracy(test, answer) for name, answer in found.items()}


def ladder(seeds: range) -> list[str]:
    """What the chain of blocks does: networks of the default, used rightly and wrongly; test accuracy."""
    test = noprop.load_mnist(noprop.Config().data_root, CPU).test
    results = [ladder_of(model, test) for model in networks(seeds)]
    rows = (f"| {name} | {mean([result[name] for result in results])} |" for name in results[0])
    return ["| the same networks, test accuracy in % | |", "|---|---|", *rows]


def inference(model: noprop.NoProp, val: noprop.Split) -> dict[str, float]:
    """Validation accuracies of a trained network by changes of inference alone."""
    alpha_bar = model.alpha_bar
    ddpm = noprop.reverse_steps(alpha_bar, equal_weights=False)
    before, after = alpha_bar[:-1], alpha_bar[1:]
    b = ((1 - after) / (1 - before)).sqrt()  # DDIM: z_t = √ᾱ_t û + √(1-ᾱ_t) ε̂, and ε̂ from û and z_{t-1}
    ddim = zip(*(x.tolist() for x in (before, after.sqrt() - b * before.sqrt(), b, 0 * b)), strict=True)
    late = [(level, *rest) for level, (_, *rest) in zip(after.tolist(), ddpm, strict=True)]
    reversed_levels = [
        (level, *rest) for level, (_, *rest) in zip(before.flip(0).tolist(), ddpm, strict=True)
    ]
    variants = {f"DDPM's weights, τ = {tau}": (ddpm, tau) for tau in (0.0, 0.25, 0.5, 1.0)}
    variants |= {
        "DDIM's step, τ = 0": (list(ddim), 0.0),
        "BUG: inference one level late (DDPM, τ = 1)": (late, 1.0),
        "BUG: levels in reverse order at inference (DDPM, τ = 1)": (reversed_levels, 1.0),
    }
    found = {}
    for name, (steps, tau) in variants.items():
        other = copy.copy(model)
        other.steps = steps
        found[name] = accuracy(
            val, lambda x, y, m=other, tau=tau: m(x, tau, noprop.generator("evidence"))[:, -1]
        )
    return found


def differences(columns: dict[str, list[float]]) -> list[str]:
    """A row for each column of validation accuracies by seed, beside the first."""
    base = next(iter(columns.values()))
    lines = ["| change | validation accuracy | Δ | |", "|---|---|---|---|"]
    for name, values in columns.items():
        apart = [x - y for x, y in zip(values, base, strict=True)]
        delta, error = statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5
        verdict = "matters" if abs(delta) > max(3 * error, 0.05) else "not resolved"
        verdict = "" if values is base else verdict
        lines.append(f"| {name} | {mean(values)} | {delta:+.2f} ± {error:.2f} | {verdict} |")
    return lines


def objectives(seeds: range) -> list[str]:
    """The paper's NoProp-DT and backpropagation after two epochs: validation accuracy, difference by seed."""
    runs = run(OBJECTIVES, seeds, "--epochs=2")
    return differences({name: [x["val_accuracy"] for x in of_one] for name, of_one in runs.items()})


def ablation(seeds: range) -> list[str]:
    """Each change taken back alone: validation accuracy after two epochs, difference by seed."""
    runs = run(ABLATION, seeds, "--epochs=2")
    columns = {name: [x["val_accuracy"] for x in of_one] for name, of_one in runs.items()}
    val = noprop.load_mnist(noprop.Config().data_root, CPU).val
    results = [inference(model, val) for model in networks(seeds, "--epochs=2")]
    columns |= {name: [result[name] for result in results] for name in results[0]}
    return differences(columns)


# --- Report ------------------------------------------------------------------------------------------------

TABLES = {table.__name__: table for table in (headline, ladder, objectives, ablation)}


def write_report() -> None:
    """EVIDENCE.md, from what the tables have left in benchmarks/results."""
    parts = [
        "# Evidence\n\nMade by `python benchmarks/evidence.py TABLE`; ± is the standard error over seeds.\n"
    ]
    for name, table in TABLES.items():
        path = RESULTS / f"evidence-{name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            parts.append(f"## {name.capitalize()}\n\n{table.__doc__}\n\n" + "\n".join(kept["lines"]))
            parts.append(f"\n`python benchmarks/evidence.py {kept['command']}`; PyTorch {kept['torch']}.\n")
    (RESULTS.parents[1] / "EVIDENCE.md").write_text("\n".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a standard error takes at least 2 seeds")
    lines = TABLES[arguments.table](range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    print(*lines, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    content = {"command": " ".join(sys.argv[1:]), "torch": torch.__version__, "lines": lines}
    (RESULTS / f"evidence-{arguments.table}.json").write_text(json.dumps(content, indent=1) + "\n")
    write_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
