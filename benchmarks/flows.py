"""NoProp-CT or NoProp-FM over several seeds, and whether they pass by ignoring z.

    python benchmarks/flows.py ct --seeds 3                 any flags of python -m noprop_lab train may follow
    python benchmarks/flows.py fm --seeds 3 --dataset=fashion_mnist --data-root=DIR

Beside each run: a plain network of the same encoder, trained by cross-entropy for as many epochs; the trained
network with other numbers of steps, one among them; with z = 0 in place of z at every step; and with another
image's z from half-way on, or in the last step, judged by its own label and by the other's. Runs in runs/
below the current folder are not run again. Prints a Markdown table, and keeps the values of every seed in
benchmarks/results/flows-*.json.
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.seeds import data_root, folder_of, joined, mean, network_of, refuse_fewer, run, shown
from noprop_lab import __main__ as lab
from noprop_lab.data import load_data

# With the encoder by cross-entropy a flow shares these; and of the recipe what its flags change.
SHARED = ("epochs", "patience", "block", "batch_size", "dataset")
RECIPE = ("lr", "schedule", "eta_min", "weight_decay", "grad_clip", "ema_decay", "augment", "train_images")
RECIPE += ("precision", "select")


class Blind(nn.Module):
    """A network that never sees z."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.image, self.schedule = block, block.image, block.schedule

    def forward(self, code: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.block(code, torch.zeros_like(z), t)


@torch.inference_mode()
def exchanged(model, split: noprop.Split, steps: int) -> tuple[float, float]:
    """Accuracy in percent where z is another image's after so many steps: by own label, by the other's."""
    own = other = 0
    for image, label in zip(model.batches(split.images), split.labels.split(500), strict=True):
        code, z = model.encode(image), model.start(image)
        for t in range(1, model.config.steps + 1):
            z = z.roll(1, 0) if t == steps + 1 else z
            u_hat, z = model.step(t, code, z)
        answer = model.classify(u_hat, z).argmax(-1)
        own, other = own + (answer == label).sum().item(), other + (answer == label.roll(1)).sum().item()
    return 100 * own / len(split.labels), 100 * other / len(split.labels)


def controls(model, split: noprop.Split) -> dict[str, float]:
    """Accuracies in percent of a trained network, without what the name says."""
    blind = copy.deepcopy(model)
    blind.blocks[0] = Blind(model.blocks[0])
    rows = {"z = 0 at every step": noprop.evaluate(blind, split, model.config)["accuracy"][-1]}
    last = model.config.steps - 1
    for when, steps in (("from half-way on", model.config.steps // 2), ("in the last step", last)):
        own, other = exchanged(model, split, steps)
        rows |= {f"another image's z {when}": own, f"another image's z {when}, by its label": other}
    return rows


def flag(setting: tuple[str, object]) -> str:
    """A setting as the command line has it."""
    name, value = setting[0].replace("_", "-"), setting[1]
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("objective", choices=["ct", "fm"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments, flags = parser.parse_known_args()
    flags = joined(flags)
    machine = [x for x in flags if x.startswith(("--data-root=", "--threads="))]
    dataset = [x for x in flags if x.startswith("--dataset=")]
    named = [x for x in flags if x not in machine + dataset]
    seeds, name = range(arguments.seeds), f"NoProp-{arguments.objective.upper()}"
    flow = [f"--objective={arguments.objective}", *flags]
    default = lab.read_command_line("train", [flow[0], *dataset, *machine])[0]
    parts = ["flows", arguments.objective, default.dataset] + [folder_of(named, 0).parent.name] * bool(named)
    path = Path(__file__).parent / "results" / f"{'-'.join(parts)}.json"
    refuse_fewer(path, "seeds", len(seeds))
    results = run({name: flow}, seeds)[name]
    config = network_of(folder_of(flow, 0)).config
    shared = {x: getattr(config, x) for x in SHARED}
    shared |= {x: getattr(config, x) for x in RECIPE if getattr(config, x) != getattr(default, x)}
    plain = ["--objective=backprop", "--num-blocks=1", *map(flag, shared.items()), *machine]
    twins = run({"plain": plain}, seeds)["plain"]
    test = load_data(config, data_root(flags)).test
    found = [controls(network_of(folder_of(flow, seed)), test) for seed in seeds]
    rows = {name: [x["test_accuracy"] for x in results]}
    rows |= {"the same encoder by cross-entropy": [x["test_accuracy"] for x in twins]}
    rows |= {title: [x[title] for x in found] for title in found[0]}
    for n in results[0]["test_accuracy_by_steps"]:
        rows[f"steps of inference: {n}"] = [x["test_accuracy_by_steps"][n] for x in results]
    rows |= {"validation accuracy": [x["val_accuracy"] for x in results]}
    rows |= {"negative log-likelihood": [x["test_loss"] for x in results]}
    rows |= {"seconds of training": [x["seconds"] for x in results]}
    given = [arguments.objective, f"--seeds={len(seeds)}", *shown(flags)]
    command = shlex.join(["python", "benchmarks/flows.py", *given])
    print(f"`{command}`: {len(seeds)} seeds, {results[0]['epochs']} epochs, {config.steps} steps\n")
    print("| test accuracy in %, mean ± standard error | |\n|---|---|")
    for title, values in rows.items():
        cell = mean(values, 0 if "seconds" in title else 4 if "log" in title else 2)
        print(f"| {title} | {cell.removesuffix(' ± nan')} |")
    kept = {"command": command, "seeds": list(seeds), "versions": results[0]["versions"]}
    kept |= {"config": results[0]["config"], "epochs": [x["epochs"] for x in results], "rows": rows}
    kept |= {"epochs of the encoder": [x["epochs"] for x in twins]}
    kept |= {"schedule": [x["schedule"] for x in results]} if "schedule" in results[0] else {}
    kept |= {"val_accuracy_by_epoch": [[y["val_accuracy"] for y in x["history"]] for x in results]}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
