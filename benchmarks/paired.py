"""Networks of the headline, or of Fashion-MNIST's own settings, image by image: likelihood, calibration, and
intervals over seeds and images.

    python benchmarks/paired.py --seeds 10                       asks what evidence.py headline has made
    python benchmarks/paired.py --seeds 10 --rows NAME ...       of it these networks alone; others stay
    python benchmarks/paired.py --seeds 3 --fashion-mnist DIR    asks what evidence.py fashion has made
    python benchmarks/paired.py --report                         the tables, from benchmarks/results/

What they answer on the test images is kept in benchmarks/results/headline-SEED.npz and fashion-SEED.npz.
Beside the headline stand one and ten plain CNNs of benchmarks/control.py, whose seeds are others; beside the
chain of three blocks of seed n one and three plain CNNs, of seeds 3 n to 3 n + 2. No interval pairs these.
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
from benchmarks.evidence import DT, EVERY, HEADLINE, fashion_flags, in_order, three_cnns
from benchmarks.intervals import packed
from benchmarks.seeds import folder_of, keep_answers, network_of, sampling, summary_of
from noprop_lab.data import load_data

THREE, MEAN = "three CNNs, averaged", "the mean of its blocks"


@torch.inference_mode()
def log_probabilities(model: noprop.NoProp, images: Tensor) -> Tensor:
    """log p after every block, (N, T, classes); with a temperature, of what evaluate() draws."""
    config, logits = model.config, []
    for i, x in enumerate(images.split(500)):
        noise = noprop.generator(config.seed, "inference", 500 * i)
        logits.append(model(noprop.to_float(x), config.temperature, noise))
    return torch.cat(logits).double().log_softmax(-1)


def asked(flags: list[str], seed: int, test: noprop.Split) -> tuple[noprop.NoProp, Tensor]:
    """A trained network, and its log p after every block, whose accuracy is that of its summary."""
    summary, model = summary_of(folder := folder_of(flags, seed)), network_of(folder)
    log_p = log_probabilities(model, test.images)
    accuracy = 100 * (log_p[:, -1].argmax(-1) == test.labels).double().mean().item()
    if abs(accuracy - summary["test_accuracy"]) > 0.011:  # an image that another chip rounds otherwise
        raise SystemExit(f"error: {folder} says {summary['test_accuracy']} %, its network {accuracy}")
    noprop.say(f"{folder}: {accuracy:.2f} %")
    return model, log_p


def answers(
    settings: dict[str, list[str]], base: str, seed: int, test: noprop.Split
) -> dict[str, np.ndarray]:
    """What the networks of a seed answer, by row, (1, 2, N) each; base: the name of hybrid NoProp's."""
    rows = {}
    for name, flags in settings.items():
        model, log_p = asked(flags, seed, test)
        rows[name] = log_p[:, -1]
        if name == base:
            rows[MEAN] = control.averaged(log_p)
            rows["its block 1"] = log_p[:, 0]
        if EVERY in flags:
            rows[f"{name}, the mean of them"] = control.averaged(log_p)
        if name == base or DT in flags:
            other = 1.0 if name == base else 0.0
            rows[f"{name}, at τ = {other:g}"] = log_probabilities(sampling(model, other), test.images)[:, -1]
    return {row: packed(x, test.labels)[None] for row, x in rows.items()}


def answers_of_cnns(flags: list[str], seed: int, test: noprop.Split) -> dict[str, np.ndarray]:
    """What the three plain CNNs beside a chain of three blocks answer: each, (3, 2, N), and averaged."""
    log_p = torch.stack([asked(flags, x, test)[1][:, -1] for x in three_cnns(seed)], 1)  # (N, 3, classes)
    each = np.stack([packed(x, test.labels) for x in log_p.unbind(1)])
    return {control.ONE: each, THREE: packed(control.averaged(log_p), test.labels)[None]}


def table(rows: dict[str, np.ndarray], rival: str) -> str:
    """The Markdown tables of what replicates have answered."""
    base, *others = rows
    pairs = {name: (name, base) for name in others}
    rivals = [name for name in others if "backpropagation" in name or "CNN" in name]
    pairs |= {f"{name}, less {MEAN}": (name, MEAN) for name in rivals}
    return control.short_table(rows, f"less {base}, if nothing else is said", pairs, rival)


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    made, code = "`python benchmarks/paired.py --seeds {}{}`", None
    headline, fashion, beside = (control.kept_of(x) for x in ("headline", "fashion", "control-mnist"))
    headline |= {name: beside[name] for name in (control.ONE, control.TEN) if headline}
    for mark, rows, rival, more in (
        ("paired", headline, control.TEN, ""),
        ("paired fashion", fashion, THREE, " --fashion-mnist DIR"),
    ):
        if rows:
            seeds = len(next(iter(rows.values())))
            code = control.publish(mark, [table(rows, rival), made.format(seeds, more)])
    return control.publish("paired", []) if code is None else code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--fashion-mnist", type=Path, metavar="DIR", help="the networks of evidence.py fashion"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=HEADLINE, metavar="NAME", help="of the headline, only these"
    )
    parser.add_argument("--report", action="store_true", help="ask no network")
    given = parser.parse_args()
    if given.rows and (given.fashion_mnist or given.report):
        parser.error("--rows are of the headline's networks: leave the other flags out")
    if given.report:
        return report()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    name, settings, cnn = "headline", HEADLINE, None
    if given.fashion_mnist:
        name, settings = "fashion", fashion_flags(given.fashion_mnist)
        _, cnn = settings.popitem()
    base, settings = next(iter(settings)), {x: settings[x] for x in given.rows or settings}
    if given.rows and [x.name for x in control.replicates_of(name)] != [f"{name}-{x}.npz" for x in seeds]:
        raise SystemExit("error: --rows takes all seeds that are kept, and these alone")
    needed = [(flags, seed) for flags in settings.values() for seed in seeds]
    needed += [(cnn, x) for seed in seeds for x in three_cnns(seed) if cnn]
    if missing := [x for x in needed if not summary_of(folder_of(*x))]:  # before a test image is asked for
        more = " --fashion-mnist DIR" * (name == "fashion")
        first = f"run python benchmarks/evidence.py {name} --seeds {seeds.stop}{more} here first"
        raise SystemExit(f"error: no network in {folder_of(*missing[0])}: {first}")
    config = network_of(folder_of(*needed[0])).config
    test = load_data(config, given.fashion_mnist or noprop.Options.data_root).test
    for seed in seeds:
        found = answers(settings, base, seed, test) | (answers_of_cnns(cnn, seed, test) if cnn else {})
        path = control.RESULTS / f"{name}-{seed}.npz"
        if given.rows:
            found = in_order(dict(np.load(path)) | found)
        keep_answers(path, **found)
    return report()


if __name__ == "__main__":
    sys.exit(main())
