"""One setting over several seeds: mean ± standard error.

    python benchmarks/seeds.py --seeds 5                      the default run, seeds 0 to 4
    python benchmarks/seeds.py --epochs 4 --target noise      any flags of noprop_example.py

Runs noprop_example.py once a seed, in runs/ below the current folder (one that is finished there is not run
again, one that was stopped is resumed), and prints one Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop

SCRIPT, CPU = noprop.__file__, torch.device("cpu")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over the seeds; of one seed the error is nan."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def mean(values: list[float], digits: int = 2) -> str:
    """Mean ± standard error over the seeds."""
    return " ± ".join(f"{x:.{digits}f}" for x in mean_and_error(values))


def folder_of(flags: list[str], seed: int) -> Path:
    """Where the run with these flags is kept."""
    name = "-".join(flag.lstrip("-").replace("/", "_") for flag in flags)
    return Path("runs") / (name or "default") / f"seed{seed}"


def summary_of(folder: Path) -> dict | None:
    """The summary of the run in a folder, if it has come to its end."""
    found = [json.loads(path.read_text()) for path in folder.glob("noprop_*.json")]
    return next((summary for summary in found if summary["finished"]), None)


def run(settings: dict[str, list[str]], seeds: range) -> dict[str, list[dict]]:
    """Summaries of the runs with each setting's flags, one a seed.

    Runs that are missing are made, those that were stopped are resumed.
    """
    jobs = [(name, flags, seed) for seed in seeds for name, flags in settings.items()]
    missing = [job for job in jobs if not summary_of(folder_of(*job[1:]))]
    print(f"{len(jobs)} runs; {len(missing)} of them are missing.", file=sys.stderr)
    started = time.perf_counter()
    for done, (name, flags, seed) in enumerate(missing, start=1):
        resume = [] if "--run-hpo" in flags else ["--resume"]  # a search goes on by itself
        places = [f"--seed={seed}", f"--output-dir={folder_of(flags, seed)}"]
        subprocess.run(
            [sys.executable, SCRIPT, *flags, *resume, *places], check=True, stdout=subprocess.DEVNULL
        )
        left = (time.perf_counter() - started) / done * (len(missing) - done) / 60
        print(f"{done}/{len(missing)}  seed {seed}  {name}; about {left:.0f} min left", file=sys.stderr)
    return {name: [summary_of(folder_of(flags, seed)) for seed in seeds] for name, flags in settings.items()}


def inferred(folder: Path, temperature: float, split: noprop.Split) -> dict:
    """What evaluate() says of a run's network at another temperature, with DDPM's weights."""
    [path] = folder.glob("noprop_*.pt")
    model = noprop.load(path)
    model.steps = noprop.reverse_steps(model.alpha_bar, equal_weights=False)
    config = replace(model.config, weights="ddpm", temperature=temperature)
    with noprop.workers(CPU, torch.get_num_threads()) as parallel:
        return noprop.evaluate(model, split, config, parallel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    [results] = run({" ".join(flags) or "default": flags}, seeds).values()
    for title, read, digits in (
        ("test accuracy, selected on validation", lambda x: x["test_accuracy"], 2),
        ("validation accuracy", lambda x: x["val_accuracy"], 2),
        ("best test accuracy over epochs (selects on test)", lambda x: x["best_test_accuracy"], 2),
        ("chain cut after block 1", lambda x: x["test_accuracy_by_blocks"][0], 2),
        ("average of all blocks' class probabilities", lambda x: x["test_accuracy_average"], 2),
        ("seconds of training", lambda x: x["seconds"], 0),
        ("seconds in all", lambda x: x["seconds_total"], 0),
    ):
        print(f"| {title} | {mean([read(x) for x in results], digits)} |")
    if results[0]["config"]["objective"] == "hybrid":
        test = noprop.load_data(noprop.Config(**results[0]["config"]), CPU).test
        temperature = results[0]["config"]["temperature"]
        found = [inferred(folder_of(flags, seed), temperature, test) for seed in seeds]
        by_seed = [x["accuracy"][-1] for x in found]
        print(f"| the same networks, inference with DDPM's weights | {mean(by_seed)} |")
    print(f"{len(seeds)} seeds from {seeds[0]}, {results[0]['epochs']} epochs, {results[0]['versions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
