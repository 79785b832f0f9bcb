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
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "noprop_example.py"
sys.path.insert(0, str(SCRIPT.parent))

import torch  # noqa: E402

import noprop_example as noprop  # noqa: E402


def mean(values: list[float], digits: int = 2) -> str:
    """Mean ± standard error over the seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def ddpm(folder: Path) -> float:
    """Test accuracy of a run's network with the reverse step's own weights."""
    model = noprop.load(folder / "noprop_hybrid.pt")
    model.steps = noprop.reverse_steps(model.alpha_bar, equal_weights=False)
    test = noprop.load_mnist(model.config.data_root, torch.device("cpu")).test
    return noprop.evaluate(model, test, model.config)["accuracy"][-1]


def finished(path: Path) -> bool:
    """Whether a run has come to its end, and was not stopped."""
    return path.exists() and json.loads(path.read_text())["finished"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side; more than one spoils the timing"
    )
    arguments, flags = parser.parse_known_args()
    name = "-".join(flag.lstrip("-") for flag in flags) or "default"
    folders = [Path("runs") / name / f"seed{seed}" for seed in range(arguments.seeds)]
    waiting = [x for x in enumerate(folders) if not finished(x[1] / "noprop_hybrid.json")]
    for start in range(0, len(waiting), arguments.at_once):
        command = [sys.executable, str(SCRIPT), "--resume", *flags]
        jobs = [
            subprocess.Popen([*command, "--seed", str(seed), "--output-dir", str(folder)])
            for seed, folder in waiting[start : start + arguments.at_once]
        ]
        if sum(job.wait() for job in jobs):
            return 1
    results = [json.loads((folder / "noprop_hybrid.json").read_text()) for folder in folders]
    for title, read, digits in (
        ("test accuracy, selected on validation", lambda x: x["test_accuracy"], 2),
        ("validation accuracy", lambda x: x["val_accuracy"], 2),
        ("best test accuracy over epochs (selects on test)", lambda x: x["best_test_accuracy"], 2),
        ("chain cut after block 1", lambda x: x["test_accuracy_by_blocks"][0], 2),
        ("average of all blocks' class probabilities", lambda x: x["test_accuracy_average"], 2),
        ("mean over the cuts 1 ... T-1", lambda x: statistics.mean(x["test_accuracy_by_blocks"][:-1]), 2),
        ("seconds of training", lambda x: x["seconds"], 0),
        ("seconds in all", lambda x: x["seconds_total"], 0),
    ):
        print(f"| {title} | {mean([read(x) for x in results], digits)} |")
    print(f"| the same networks, inference with DDPM's weights | {mean([ddpm(x) for x in folders])} |")
    print(f"{name}: {arguments.seeds} seeds, {results[0]['epochs']} epochs, {results[0]['versions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
