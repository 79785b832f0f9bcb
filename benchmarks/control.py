"""Is it diffusion, or ten networks? NoProp's chain of ten beside ten plain CNNs of one block's size.

    python benchmarks/control.py mnist                            train what is missing, evaluate, report
    python benchmarks/control.py fashion_mnist --data-root DIR    DIR has the four files, or FashionMNIST/raw
    python benchmarks/control.py --report                         tables and picture, from benchmarks/results/

The CNNs see no noise and no label: they are the twin with one block, trained by cross-entropy, each with its
own seed, at the chain's weights, images, epochs, augmentation, averaging of weights and selection. Networks
are kept in runs/control/ below the current folder, and those that are there are not trained again; what they
answer on the test images is kept in benchmarks/results/control-DATASET-REPLICATE.npz.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.intervals import (
    calibration_error,
    interval,
    packed,
    resampled,
    right_and_loss,
    temperature,
    verdict,
)
from benchmarks.seeds import DOCS, keep_answers, write
from benchmarks.seeds import mean as mean_and_error
from noprop_lab import backprop, networks
from noprop_lab.__main__ import kind_and_step
from noprop_lab.data import load_data
from noprop_lab.settings import LabConfig

RESULTS = Path(__file__).parent / "results"
DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
RATES = (0.0035, 0.007, 0.014, 0.028, 0.056)  # the middle one is NoProp's, which a search on MNIST left
TWO = "two CNNs, averaged"  # of which the rates are judged
CHAIN, BLOCK, ONE, TEN = "NoProp: chain of ten", "NoProp: block 1", "one CNN", "ten CNNs, averaged"


# --- Networks ----------------------------------------------------------------------------------------------


def chain(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """NoProp's default. Seeds from 5: its settings were chosen on seeds 0 to 4."""
    return [LabConfig(dataset=dataset, seed=5 + replicate, lr=lr)]


def cnns(dataset: str, replicate: int, lr: float) -> list[LabConfig]:
    """Ten plain CNNs of one block's size, each with its own weights, order of images and augmentation."""
    rest = dict(dataset=dataset, lr=lr, num_blocks=1, step_threads=1)
    return [backprop.BackpropConfig(seed=100 + 10 * replicate + i, **rest) for i in range(10)]


def path_of(config: LabConfig) -> Path:
    """Where the trained network of a config is kept."""
    name = f"{config.objective}-lr{config.lr}-seed{config.seed}"
    name += f"-{config.block}" * (config.block != "small")
    if config.objective == "backprop" and config.num_blocks > 1:
        name += f"-chain-{config.supervise}"
    return Path("runs/control") / config.dataset / f"{name}.pt"


def fit(
    config: LabConfig, data: noprop.Data, measured=True, threads=noprop.Options.threads, objective=None
) -> networks.LabState:
    """Train a network where the training images are, on a GPU with graphs; no test image is looked at.

    measured: every epoch is, on the validation images, to select one; else the last is taken. objective: in
    place of the config's own.
    """
    device = data.train.labels.device
    kind, step = kind_and_step(config, device.type == "cuda", device)

    class Measured(kind):
        def measure(self, data: noprop.Data, parallel) -> dict:
            return super().measure(data._replace(val=data.val if measured else None, test=None), parallel)

    state = Measured(config, device)
    state.objective = objective or state.objective
    for _ in noprop.train(state, data, step, threads):
        pass
    return state


def is_there(path: Path, config: LabConfig) -> bool:
    """Whether the network of a config is kept. Ends where it has other settings than its name means now."""
    if path.exists() and networks.read_checkpoint(path)["config"].saved() != config.saved():
        raise SystemExit(f"error: {path} has other settings than its name means now: move it away")
    return path.exists()


def train(configs: list[LabConfig], data: noprop.Data, threads: int) -> None:
    """Train what is missing: a chain's blocks side by side, and as many CNNs at once as there are threads."""
    missing = [config for config in configs if not is_there(path_of(config), config)]
    digest, started, blocks = data.digest(), time.perf_counter(), [x.num_blocks for x in missing]
    done: list[int] = []

    def one(config: LabConfig, threads: int = 1) -> None:
        state = fit(config, data, threads=threads)
        path_of(config).parent.mkdir(parents=True, exist_ok=True)
        state.save(path_of(config), digest)
        done.append(config.num_blocks)
        left = (time.perf_counter() - started) / sum(done) * (sum(blocks) - sum(done)) / 60
        noprop.say(f"{path_of(config)}: {len(done)} of {len(missing)}; about {left:.0f} min left of these")

    for config in missing:
        if config.num_blocks > 1:
            one(config, threads)
    with noprop.workers(data.train.labels.device, threads) as parallel:  # a GPU takes them in turn
        list(parallel(one, [config for config in missing if config.num_blocks == 1]))


@torch.inference_mode()
def log_p_of(logits: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """log p, float64, (N, T, classes), of what computes class logits (B, T, classes) of float images."""
    return torch.cat([logits(noprop.to_float(x)) for x in images.split(500)]).double().log_softmax(-1).cpu()


def log_probabilities(config: LabConfig, split: noprop.Split, chained=True) -> Tensor:
    """log p after every block of a trained network, or of every block from z = 0, (N, T, classes)."""
    model = networks.load(path_of(config), split.images.device)

    def alone(x: Tensor) -> Tensor:
        steps = (model.step(t, x, model.start(x)) for t in range(1, config.num_blocks + 1))
        return torch.stack([model.classify(*step) for step in steps], 1)

    return log_p_of(model if chained else alone, split.images)


def averaged(log_p: Tensor) -> Tensor:
    """log of the mean of probabilities, (N, networks, classes) -> (N, classes)."""
    return log_p.logsumexp(1) - np.log(log_p.shape[1])


def grid(kind, dataset: str, data: noprop.Data, threads: int) -> dict[str, dict[str, float]]:
    """Validation loss and accuracy by learning rate, of a chain or of two CNNs averaged; once for all.

    The grid is walked from its middle, as long as the loss falls; for NoProp's chain, whose answers get worse
    where its loss gets better, also as long as the accuracy rises.
    """
    path = RESULTS / f"control-{dataset}-rates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    by_rate = found.setdefault(kind.__name__, {})
    label = data.val.labels.cpu()

    def edges() -> list[float]:
        """Rates that are not tried, beside the best; at first the middle ones."""
        middle = len(RATES) // 2
        criteria = ("loss", "accuracy") if kind is chain else ("loss",)
        best = [RATES.index(best_rate(by_rate, x)) for x in criteria] if by_rate else [middle]
        near = [x for at in best for x in (at, at - 1, at + 1) if 0 <= x < len(RATES)]
        return [RATES[x] for x in dict.fromkeys(near) if str(RATES[x]) not in by_rate]

    while rates := edges():
        for lr in rates:
            configs = kind(dataset, 0, lr)[:2]
            train(configs, data, threads)
            log_p = averaged(torch.stack([log_probabilities(x, data.val)[:, -1] for x in configs], 1))
            accuracy = 100 * (log_p.argmax(-1) == label).double().mean().item()
            by_rate[str(lr)] = {"loss": F.nll_loss(log_p, label).item(), "accuracy": accuracy}
            noprop.say(f"{dataset} {kind.__name__}, learning rate {lr}: validation {by_rate[str(lr)]}")
            path.write_text(json.dumps(found, indent=1) + "\n")
    return by_rate


def best_rate(by_rate: dict[str, dict[str, float]], criterion: str = "loss") -> float:
    """The learning rate of the least validation loss, or of the highest accuracy."""
    sign = -1 if criterion == "accuracy" else 1
    return float(min(by_rate, key=lambda lr: sign * by_rate[lr][criterion]))


# --- Answers -----------------------------------------------------------------------------------------------


def answers(
    dataset: str, replicate: int, lr: dict[str, float], split: noprop.Split
) -> dict[str, list[Tensor]]:
    """log p (N, classes) of what is compared, by row; several where a replicate has several of a kind."""
    [noprop_] = chain(dataset, replicate, lr["chain"])
    along, alone = (log_probabilities(noprop_, split, chained) for chained in (True, False))
    plain = cnns(dataset, replicate, lr["cnns"])
    plain = torch.cat([log_probabilities(config, split) for config in plain], 1)  # (N, 10, classes)
    return {
        CHAIN: [along[:, -1]],
        "NoProp: mean of blocks along the chain": [averaged(along)],
        "NoProp: mean of blocks, each from z = 0": [averaged(alone)],
        BLOCK: [along[:, 0]],
        ONE: list(plain.unbind(1)),
        "four CNNs, averaged": [averaged(plain[:, i : i + 4]) for i in (0, 4)],
        TEN: [averaged(plain)],
    }


def answers_of(dataset: str, replicate: int) -> Path:
    """Where the answers of a replicate are kept."""
    return RESULTS / f"control-{dataset}-{replicate}.npz"


def replicates_of(name: str) -> list[Path]:
    """The files with answers that there are, by number of the replicate."""
    found = (x for x in RESULTS.glob(f"{name}-*.npz") if x.stem.removeprefix(f"{name}-").isdigit())
    return sorted(found, key=lambda x: int(x.stem.split("-")[-1]))


def kept_of(name: str) -> dict[str, np.ndarray]:
    """What is kept of all replicates, by row, (R, ...) each; empty if there is nothing."""
    files = [dict(np.load(path)) for path in replicates_of(name)]
    return {row: np.stack([x[row] for x in files]) for row in (files or [{}])[0]}


def evaluate(dataset: str, replicate: int, lr: dict[str, float], data: noprop.Data) -> None:
    """Answer the test images, once, and keep what is needed for accuracy, loss and calibration.

    "tempered" is loss and calibration error of each row after temperature(), (rows, 2).
    """
    test, val = (answers(dataset, replicate, lr, split) for split in (data.test, data.val))
    rows, tempered = {}, []
    for name, found in test.items():
        rows[name] = np.stack([packed(x, data.test.labels) for x in found])
        degrees = [temperature(x, data.val.labels.cpu()) for x in val[name]]
        found = [(x / degree).log_softmax(-1) for x, degree in zip(found, degrees, strict=True)]
        found = np.stack([packed(x, data.test.labels) for x in found])
        tempered.append([right_and_loss(found)[1].mean(), np.mean([calibration_error(x) for x in found])])
    keep_answers(answers_of(dataset, replicate), **rows, tempered=np.array(tempered))


# --- Report ------------------------------------------------------------------------------------------------


def measured(kept: np.ndarray) -> list[list[float]]:
    """Accuracy, loss and calibration error of a row, (R, n, 2, N): a value a replicate."""
    errors = [np.mean([calibration_error(x) for x in replicate]) for replicate in kept]
    return [*(x.mean((1, 2)).tolist() for x in right_and_loss(kept)), errors]


def table(rows: dict[str, np.ndarray], tempered: np.ndarray) -> str:
    """The Markdown tables of a data set: the rows, and what ten earn over one; tempered: (R, rows, 2)."""
    columns = "", "accuracy", "nll", "ECE", "nll, tempered", "ECE, tempered"
    columns += "accuracy − ten CNNs'", "verdict", "nll − ten CNNs'"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    accuracy, loss = (resampled(rows, which) for which in (0, 1))
    for i, (name, kept) in enumerate(rows.items()):
        values = zip([*measured(kept), *tempered[:, i].T.tolist()], (2, 4, 2, 4, 2), strict=True)
        cells = [mean_and_error(x, digits).removesuffix(" ± nan") for x, digits in values]
        a, b = (x[name] - x[TEN] for x in (accuracy, loss))
        apart = [interval(a, 2), verdict(a, len(kept)), interval(b, 4)] if name != TEN else [""] * 3
        lines.append(f"| {' | '.join([name, *cells, *apart])} |")
    pairs = {f"{more} − {less}": (more, less) for more, less in ((CHAIN, BLOCK), (TEN, ONE), (BLOCK, ONE))}
    for drawn in (accuracy, loss):
        drawn["gain"], drawn["averaging's"] = drawn[CHAIN] - drawn[BLOCK], drawn[TEN] - drawn[ONE]
    pairs["what the chain adds to block 1 − what averaging adds to one CNN"] = "gain", "averaging's"
    return "\n".join([*lines, "", *differences("", accuracy, loss, pairs)])


def differences(title: str, accuracy: dict, loss: dict, pairs: dict[str, tuple[str, str]]) -> list[str]:
    """Lines of a table: by label, accuracy and loss of one row less those of another, of what was drawn."""
    lines = [f"| {title} | accuracy | nll |", "|---|---|---|"]
    for label, (more, less) in pairs.items():
        apart = interval(accuracy[more] - accuracy[less], 2), interval(loss[more] - loss[less], 4)
        lines.append(f"| {label} | {' | '.join(apart)} |")
    return lines


def short_table(rows: dict[str, np.ndarray], title: str, pairs: dict, rival: str = TEN) -> str:
    """The Markdown tables of a data set: rows beside a rival, and differences(); rows: (R, n, 2, N) each."""
    less = f"− {rival.removesuffix(', averaged')}'"
    columns = "", "accuracy", "nll", "ECE", f"accuracy {less}", f"nll {less}"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    accuracy, loss = (resampled(rows, which) for which in (0, 1))
    for name, kept in rows.items():
        values = zip(measured(kept), (2, 4, 2), strict=True)
        cells = [mean_and_error(x, digits).removesuffix(" ± nan") for x, digits in values]
        apart = interval(accuracy[name] - accuracy[rival], 2), interval(loss[name] - loss[rival], 4)
        lines.append(f"| {' | '.join([name, *cells, *(apart if name != rival else ('', ''))])} |")
    return "\n".join([*lines, "", *differences(title, accuracy, loss, pairs)])


def draw(tables: dict[str, dict[str, np.ndarray]]):
    """Test error, loss and calibration error: a dot a replicate, a line at their mean; a data set a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 2.3 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 3, sharey=True, squeeze=False)
    for row, (dataset, rows) in zip(panels, tables.items(), strict=True):
        titles = "test error, %", "nll", "ECE, points"
        for column, (axes, title) in enumerate(zip(row, titles, strict=True)):
            for y, (name, kept) in enumerate(rows.items()):
                x = np.array(measured(kept)[column]) * (1 if column else -1) + (0 if column else 100)
                color = "#0072B2" if name.startswith("NoProp") else "#D55E00"
                axes.plot(x, np.full(len(x), y), "o", color=color, alpha=0.35, markersize=5)
                axes.plot(x.mean(), y, "|", color=color, markersize=16, markeredgewidth=2)
            axes.set(title=f"{DATASETS[dataset]}: {title}", yticks=range(len(rows)), yticklabels=list(rows))
            axes.title.set_fontsize(10)
            axes.grid(alpha=0.3)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.margins(x=0.1)
    return figure


def tried(dataset: str, kinds: dict[str, str]) -> str:
    """The learning rates that were tried, in words; kinds: what a row of the grid is called."""
    found = json.loads((RESULTS / f"control-{dataset}-rates.json").read_text())
    text = "Validation loss (and accuracy) by learning rate; the least loss decides, if no row says otherwise"
    for kind, of_kind in [(name, found[kind]) for kind, name in kinds.items() if kind in found]:
        losses = sorted((float(lr), x["loss"], x["accuracy"]) for lr, x in of_kind.items())
        ends = {best_rate(of_kind)} & {RATES[0], RATES[-1]}
        shown = (
            "{:g}: {:.4f} ({:.2f})".format(*x) + ", where the grid ends" * (x[0] in ends) for x in losses
        )
        text += f". {kind}: " + ", ".join(shown)
    return text + "."


def report() -> int:
    """Print the tables, put them into docs/evidence.md, and draw the picture."""
    tables, parts = {}, []
    for dataset, name in DATASETS.items():
        if rows := kept_of(f"control-{dataset}"):
            tempered = rows.pop("tempered")
            parts += [
                f"**{name}**, replicates: {len(tempered)}",
                table(rows, tempered),
                tried(dataset, {"cnns": TWO}),
            ]
            tables[dataset] = rows
    if parts:
        parts.insert(0, "![Error, loss and calibration of chain and CNNs](img/evidence_control.png)")
    return publish("control", parts) or noprop.picture(draw, DOCS / "img" / "evidence_control.png", tables)


def publish(mark: str, parts: list[str]) -> int:
    """Print a report, and put it into docs/evidence.md; the exit code, 2 where nothing is measured."""
    if not parts:
        noprop.say("Nothing is measured yet: leave --report out.", file=sys.stderr)
        return 2
    noprop.say(text := "\n\n".join(parts))
    write(mark, text)
    return 0


def command_line(about: str, replicates: int) -> argparse.Namespace:
    """What to train, or to report."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("dataset", choices=DATASETS, nargs="?")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    parser.add_argument("--replicates", type=int, default=replicates)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cuda: each training step is a graph")
    given = parser.parse_args()
    if not (given.dataset or given.report):
        parser.error("name a data set, or --report")
    return given


def needs_control(given: argparse.Namespace) -> None:
    """Exit where the rows of this file, beside which others stand, are missing: before anything trains."""
    for replicate in range(0 if given.report else given.replicates):
        if not answers_of(given.dataset, replicate).exists():
            first = f"run python benchmarks/control.py {given.dataset} --replicates {given.replicates} first"
            raise SystemExit(f"error: the control has no replicate {replicate} of {given.dataset}: {first}")


def beside(path: Path) -> dict[str, np.ndarray]:
    """The control's answers of the replicate whose others are in a file, such as rivals-mnist-0.npz."""
    dataset, replicate = path.stem.split("-")[-2:]
    if not (own := answers_of(dataset, int(replicate))).exists():
        raise SystemExit(f"error: no {own}: run python benchmarks/control.py {dataset} first")
    return np.load(own)


def load_images(given: argparse.Namespace) -> noprop.Data:
    """The images of the data set that the command line names, on its device."""
    torch.backends.cudnn.benchmark = True
    device = noprop.pick_device(noprop.Options(device=given.device))
    return load_data(LabConfig(dataset=given.dataset), given.data_root, device)


def main() -> int:
    given = command_line(__doc__, 5)
    if not given.report:
        data = load_images(given)
        cnn_rate = best_rate(grid(cnns, given.dataset, data, given.threads))
        lr = {"chain": LabConfig.lr, "cnns": cnn_rate}
        for replicate in range(given.replicates):
            of_one = [x for kind in (chain, cnns) for x in kind(given.dataset, replicate, lr[kind.__name__])]
            if not answers_of(given.dataset, replicate).exists():
                train(of_one, data, given.threads)
                evaluate(given.dataset, replicate, lr, data)
    return report()


if __name__ == "__main__":
    sys.exit(main())
