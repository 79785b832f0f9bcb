"""Fair rivals of NoProp's chain: by backpropagation. Each has a learning rate of its own, and so has NoProp.

    python benchmarks/rivals.py mnist                           train what is missing, evaluate, report
    python benchmarks/rivals.py fashion_mnist --data-root DIR   DIR has the four files, or FashionMNIST/raw
    python benchmarks/rivals.py --report                        the tables, from benchmarks/results/

The same chain, with a loss at its end or after every block (deep supervision), and a plain CNN of all blocks'
size: at the images, epochs, augmentation, averaging and selection of benchmarks/control.py, whose rows for
NoProp and for ten CNNs stand beside these, so it has to have run. There NoProp has the learning rate that a
search on MNIST left; here all rates are chosen on validation images, from the CNNs' grid: by the loss, and
NoProp's by the accuracy too. Networks are kept in runs/control/ below the current folder, answers in
benchmarks/results/rivals-DATASET-REPLICATE.npz. With --device cuda each training step is a CUDA graph.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import control
from benchmarks.intervals import packed
from benchmarks.seeds import keep_answers
from noprop_lab.backprop import BackpropConfig
from noprop_lab.settings import LabConfig


def last(dataset: str, replicate: int, lr: float, **changes) -> list[LabConfig]:
    """The chain by backpropagation, with NoProp's seeds."""
    return [BackpropConfig(dataset=dataset, seed=5 + replicate, lr=lr, step_threads=2, **changes)]


def every(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """The same, with a loss after every block."""
    return last(dataset, replicate, lr, supervise="every")


def wide(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """One plain CNN of all blocks' size."""
    return last(dataset, replicate, lr, num_blocks=1, block="reference")


OWN, EVERY = "NoProp: chain of ten, the rate of best accuracy", "the same, a loss after every block"
MEAN = f"{EVERY}: their mean"
RIVALS = {  # and what their rates are chosen by
    OWN: (control.chain, "accuracy"),
    "NoProp: chain of ten, the rate of least loss": (control.chain, "loss"),
    "the chain by backpropagation": (last, "loss"),
    EVERY: (every, "loss"),
    "plain CNN of all blocks' size": (wide, "loss"),
}


def path_of(dataset: str, replicate: int) -> Path:
    """Where the answers of a replicate are kept."""
    return control.RESULTS / f"rivals-{dataset}-{replicate}.npz"


def evaluate(dataset: str, replicate: int, lr: dict[str, float], data: noprop.Data, threads: int) -> None:
    """Train what is missing, answer the test images, once, and keep the answers; lr: by row."""
    path = path_of(dataset, replicate)
    rows = dict(np.load(path)) if path.exists() else {}
    for name, (kind, _) in RIVALS.items():
        same = [x for x, (other, _) in RIVALS.items() if (other, lr[x]) == (kind, lr[name])]
        if rows.get(rate := f"{name}: learning rate", lr[name]) != lr[name]:
            raise SystemExit(f"error: {path} has {name} at another learning rate: move it away")
        if name in rows or name != same[0]:  # NoProp's rates may be one
            continue
        [config] = kind(dataset, replicate, lr[name])
        control.train([config], data, threads)
        log_p = control.log_probabilities(config, data.test)
        rows |= {name: packed(log_p[:, -1], data.test.labels)[None], rate: np.array(lr[name])}
        if kind is every:
            rows[MEAN] = packed(control.averaged(log_p), data.test.labels)[None]
    keep_answers(path, **rows)


def report() -> int:
    """Print the tables, and put them into docs/evidence.md."""
    parts = []
    for dataset, title in control.DATASETS.items():
        paths = control.replicates_of(f"rivals-{dataset}")
        if paths:
            both = [(np.load(x), control.beside(x)) for x in paths]
            files = set.intersection(*(set(own.files) for own, _ in both))
            names = [x for x in (*RIVALS, MEAN) if x in files]
            rows = {name: np.stack([own[name] for own, _ in both]) for name in names}
            beside = {name: np.stack([of[name] for _, of in both]) for name in (control.CHAIN, control.TEN)}
            pairs = {name: (name, OWN) for name in (*rows, control.CHAIN) if name != OWN in rows}
            table = control.short_table(rows | beside, f"less {OWN}", pairs)
            parts += [f"**{title}**, replicates: {len(paths)}", table]
            kinds = {"cnns": control.TWO} | {kind.__name__: name for name, (kind, _) in RIVALS.items()}
            parts.append(control.tried(dataset, kinds | {"chain": control.CHAIN}))
    return control.publish("rivals", parts)


def main() -> int:
    control.needs_control(given := control.command_line(__doc__, 3))
    if not given.report:
        data = control.load_images(given)
        lr = {}
        for name, (kind, criterion) in RIVALS.items():
            lr[name] = control.best_rate(control.grid(kind, given.dataset, data, given.threads), criterion)
        for replicate in range(given.replicates):
            evaluate(given.dataset, replicate, lr, data, given.threads)
    return report()


if __name__ == "__main__":
    sys.exit(main())
