"""The networks of the headline, image by image: likelihood, calibration, and intervals over seeds and images.

    python benchmarks/paired.py --seeds 5    asks the networks that benchmarks/evidence.py headline has made
    python benchmarks/paired.py --report     the table, from benchmarks/results/

What they answer on the test images is kept in benchmarks/results/headline-SEED.npz. Beside them stand one and
ten plain CNNs of benchmarks/control.py, whose seeds are others.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import control
from benchmarks.evidence import DT, HEADLINE
from benchmarks.intervals import packed
from benchmarks.seeds import folder_of, keep_answers, network_of, sampling, summary_of

BASE, *_ = HEADLINE


@torch.inference_mode()
def log_probabilities(model: noprop.NoProp, images: Tensor) -> Tensor:
    """log p after every block, (N, T, classes); with a temperature, of what evaluate() draws."""
    config, logits = model.config, []
    for i, x in enumerate(images.split(500)):
        noise = noprop.generator(config.seed, "inference", 500 * i)
        logits.append(model(noprop.to_float(x), config.temperature, noise))
    return torch.cat(logits).double().log_softmax(-1)


def answers(seed: int, test: noprop.Split) -> dict[str, np.ndarray]:
    """What the networks of a seed answer, by row, (1, 2, N) each."""
    rows = {}
    for name, flags in HEADLINE.items():
        summary, model = summary_of(folder := folder_of(flags, seed)), network_of(folder)
        log_p = log_probabilities(model, test.images)
        found = {name: log_p[:, -1]}
        if name == BASE:
            found["the mean of its blocks"] = control.averaged(log_p)
            found["its block 1"] = log_p[:, 0]
        if name == BASE or DT in flags:
            other = 1.0 if name == BASE else 0.0
            found[f"{name}, at τ = {other:g}"] = log_probabilities(sampling(model, other), test.images)[:, -1]
        rows |= {row: packed(x, test.labels)[None] for row, x in found.items()}
        accuracy = 100 * (log_p[:, -1].argmax(-1) == test.labels).double().mean().item()
        if abs(accuracy - summary["test_accuracy"]) > 0.011:  # an image that another chip rounds otherwise
            raise SystemExit(f"error: {folder} says {summary['test_accuracy']} %, its network {accuracy}")
        noprop.say(f"seed {seed}, {name}: {accuracy:.2f} %")
    return rows


def report() -> int:
    """Print the table, and put it into docs/evidence.md."""
    both = zip(control.replicates_of("headline"), control.replicates_of("control-mnist"), strict=False)
    files = [(np.load(own), np.load(control_)) for own, control_ in both]
    if not files:
        return control.publish("paired", [])
    rows = {name: np.stack([own[name] for own, _ in files]) for name in files[0][0].files}
    rows |= {name: np.stack([of[name] for _, of in files]) for name in (control.ONE, control.TEN)}
    pairs = {name: (name, BASE) for name in rows if name != BASE}
    table = control.short_table(rows, f"less {BASE}", pairs)
    made = f"`python benchmarks/paired.py --seeds {len(files)}`"
    return control.publish("paired", [table, made])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="ask no network")
    given = parser.parse_args()
    if given.report:
        return report()
    folders = [folder_of(flags, seed) for flags in HEADLINE.values() for seed in range(given.seeds)]
    if missing := [x for x in folders if not summary_of(x)]:  # before a test image is asked for
        first = f"run python benchmarks/evidence.py headline --seeds {given.seeds} here first"
        raise SystemExit(f"error: no network in {missing[0]}: {first}")
    test = noprop.load_data(noprop.Config()).test
    for seed in range(given.seeds):
        keep_answers(control.RESULTS / f"headline-{seed}.npz", **answers(seed, test))
    return report()


if __name__ == "__main__":
    sys.exit(main())
