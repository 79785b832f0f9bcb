"""More accuracy a minute: blocks of two sizes, how many of them, and for how many epochs.

    python benchmarks/frontier.py --device cuda    train what is missing, on 45,000 training images
    python benchmarks/frontier.py --times          seconds of a step of each, on this CPU, by itself
    python benchmarks/frontier.py --final          train what answers the test images, on all others
    python benchmarks/frontier.py --report         tables and picture, of benchmarks/results/frontier*

The 15,000 other training images answer; no test image is read but by --final. 5,000 of them are the script's
validation images, by which the default's settings were chosen: NO_VALIDATION are the others. Beside the
chains stand plain CNNs of a block's size, one and several averaged. RULES were written before anything was
measured; InfoBatch (noprop_lab/infobatch.py), small blocks for longer, and smaller batches, which are
"accurate", came after it, then plain CNNs by that recipe. Seconds are those of a CPU, a step's times the
number of steps, wherever networks were trained.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import intervals, speed
from benchmarks.control import averaged, fit, log_p_of
from benchmarks.seeds import DOCS, keep_answers, mean, write
from noprop_lab.backprop import BackpropConfig
from noprop_lab.infobatch import InfoBatchConfig
from noprop_lab.settings import LabConfig

RESULTS = Path(__file__).parent / "results"
ROWS, ANSWERS, TIMES, FINAL = (
    RESULTS / f"frontier{x}" for x in (".json", ".npz", "-times.json", "-final.json")
)


class Setting(NamedTuple):
    """What is trained."""

    way: str  # "NoProp", a chain of blocks; "InfoBatch", in fewer steps; "CNN", plain networks, averaged
    block: str  # of SIZES
    count: int  # of blocks, or of networks
    epochs: int
    batch_size: int = LabConfig.batch_size
    lr: float = LabConfig.lr

    @property
    def recipe(self) -> tuple[int, float] | tuple[()]:
        """Batch size and rate, which are not named where they are the default's."""
        return () if self[4:] == (LabConfig.batch_size, LabConfig.lr) else self[4:]

    def key(self, seed: int) -> str:
        """Under which the results of a seed are kept."""
        return "-".join(map(str, (*self[:4], *self.recipe, seed)))

    def untimed(self) -> str:
        """The same for any number of epochs or steps: under which the seconds of a step are kept."""
        way = "CNN" if self.way == "CNN" else "NoProp"
        return "-".join(map(str, (way, self.block, self.count, *self.recipe[:1])))

    def configs(self, seed: int) -> list[LabConfig]:
        """Of the one chain, or of each network."""
        recipe = dict(block=self.block, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        if self.way != "CNN":
            kind = InfoBatchConfig if self.way == "InfoBatch" else LabConfig
            return [kind(seed=seed, num_blocks=self.count, **recipe)]
        seeds = range(100 * (seed + 1), 100 * (seed + 1) + self.count)
        return [BackpropConfig(seed=x, num_blocks=1, step_threads=1, **recipe) for x in seeds]


DEFAULT, TEN_DEEP = Setting("NoProp", "small", 10, 12), Setting("NoProp", "deep", 10, 12)
SEEDS = {Setting("NoProp", "small", T, n): 2 for T in (1, 2, 3, 4, 6, 10) for n in (3, 6, 12)}
SEEDS |= {Setting("NoProp", "deep", T, n): 2 for T in (1, 2, 3, 4) for n in (3, 6, 12)}
SEEDS |= {Setting("CNN", "small", 10, n): 1 for n in (3, 6, 12)}
SEEDS |= {Setting("CNN", "deep", 4, n): 1 for n in (3, 6, 12)}
QUICKER = [Setting("NoProp", "small", 10, n) for n in (9, 8)]  # instead of the default
FEWER = [Setting("NoProp", "small", T, 12) for T in (4, 2)]
SEEDS |= dict.fromkeys([DEFAULT, *QUICKER, FEWER[0]], 10)
RULES = {  # of the deep settings in a list, that of the highest mean accuracy on held-out images
    # By times of then 6 minutes
    "accurate": [Setting("NoProp", "deep", T, n) for T, n in ((2, 20), (3, 13), (4, 10))],
    # and 20
    "best": [Setting("NoProp", "deep", T, n) for T, n in ((3, 46), (4, 35), (6, 23), (10, 14))],
}
SEEDS |= dict.fromkeys(RULES["best"], 2) | dict.fromkeys(RULES["accurate"], 4)
FEWER_STEPS = [Setting("InfoBatch", "deep", T, n) for T, n in ((4, 13), (3, 46))]  # as many blocks as chosen
SMALLER_BATCHES = Setting("NoProp", "deep", 4, 10, 256, 0.01)  # the recipe: of frontier-tried.json
EIGHT = SMALLER_BATCHES._replace(epochs=8)  # instead of "accurate", in 0.8 of its time
FASTER = Setting("InfoBatch", "small", 6, 12)  # instead of the default
LONGER = Setting("NoProp", "small", 6, 37)  # as long as four deep blocks for 10 epochs, or a little less
PLAIN = SMALLER_BATCHES._replace(way="CNN")  # the control of "accurate": its recipe, no noise, no chain
SEEDS |= {TEN_DEEP: 14, SMALLER_BATCHES: 14, FASTER: 5, FEWER_STEPS[0]: 10, FEWER_STEPS[1]: 4, LONGER: 2}
SEEDS[EIGHT] = 10
TEST_SEEDS = SEEDS[PLAIN] = 5
WITHOUT = "without validation images"
NO_VALIDATION = slice(10_000)  # of the held-out images those that are no validation images of the script's
IN_SHORT = [FEWER[0], Setting("NoProp", "small", 6, 12), DEFAULT, LONGER, SMALLER_BATCHES, FEWER_STEPS[0]]
IN_SHORT += [TEN_DEEP, RULES["best"][0], Setting("CNN", "small", 10, 12), PLAIN]


def read(path: Path):
    """Results that are there."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, results) -> None:
    noprop.write_file(path, (json.dumps(results, indent=1) + "\n").encode())


# --- Training ----------------------------------------------------------------------------------------------


def answers(setting: Setting, seed: int, data: noprop.Data) -> tuple[dict[str, np.ndarray], int]:
    """What packed() keeps of held-out images, of the chain, or a CNN, and of the mean of all; one's steps."""
    found = []
    for config in setting.configs(seed):
        state = fit(replace(config, select="last"), data, measured=False)
        found.append(log_p_of(state.averaged, data.val.images))
    log_p, label = torch.cat(found, 1), data.val.labels
    kept = {"alone": intervals.packed(log_p[:, -1], label), "mean": intervals.packed(averaged(log_p), label)}
    return kept, state.step


def held_out(data: noprop.Data, fold: slice = slice(45_000, None)) -> noprop.Data:
    """All training images but for a fold, which is in place of validation images; and none to test on.

    They are in a random order, so that any slice of the 60,000 does.
    """
    both = [torch.cat(x) for x in zip(data.train, data.val, strict=True)]
    inside = torch.zeros(len(both[1]), dtype=torch.bool, device=both[1].device)
    inside[fold] = True
    parts = (noprop.Split(*(x[chosen] for x in both)) for chosen in (~inside, inside))
    return noprop.Data(*parts, None, data.augment)


def train(device: torch.device) -> None:
    """Train what is missing, seed by seed; keep accuracy, loss, and which images were answered rightly."""
    data = held_out(noprop.load_data(noprop.Config(), device=device))
    rows, started = read(ROWS), time.perf_counter()
    right = dict(np.load(ANSWERS)) if ANSWERS.exists() else {}
    jobs = [(x, seed) for seed in range(max(SEEDS.values())) for x, n in SEEDS.items() if seed < n]
    jobs = [(x, seed) for x, seed in jobs if x.key(seed) not in rows]
    work = [x.count * x.epochs * (4 if x.block == "deep" else 1) for x, _ in jobs]
    for done, (setting, seed) in enumerate(jobs, start=1):
        name, (found, steps) = setting.key(seed), answers(setting, seed, data)
        row = {"steps": steps}
        for which, kept in found.items():
            by_image, losses = intervals.right_and_loss(kept)
            row[which] = {"accuracy": by_image.mean(), "loss": losses.mean()}
            right[f"{name}-{which}"] = np.packbits(by_image > 0)
        rows[name] = row | noprop.made_with(device)
        left = (time.perf_counter() - started) / sum(work[:done]) * sum(work[done:]) / 60
        noprop.say(f"{name}: {row['alone']['accuracy']:.2f} %; {done}/{len(jobs)}, about {left:.0f} min left")
        keep_answers(ANSWERS, **right)
        keep(ROWS, rows)


def side_by_side(networks: list[noprop.NoProp]) -> Callable[..., torch.Tensor]:
    """What evaluate() takes for a network: of several, the logits of all, as of one with all their blocks."""
    return lambda *arguments: torch.cat([network(*arguments) for network in networks], 1)


def final(device: torch.device) -> None:
    """Train what is tested on 55,000 images, select on 5,000, and answer the test images."""
    data, rows = noprop.load_data(noprop.Config(), device=device), read(FINAL)
    for seed, setting in product(range(TEST_SEEDS), tested()):
        if (key := setting.key(seed)) in rows:
            continue
        states = [fit(replace(x, patience=x.epochs), data) for x in setting.configs(seed)]
        for state in states:
            state.averaged.load_state_dict(state.selected)
        found = noprop.evaluate(side_by_side([x.averaged for x in states]), data.test, states[0].config)
        found |= {"epochs": [x.selected_epoch for x in states], "steps": states[0].step}
        found |= {"seconds": sum(x.seconds for x in states)}
        rows[key] = found | noprop.made_with(device)
        noprop.say(f"{key}: {found['accuracy'][-1]:.2f} %")
        keep(FINAL, rows)


def times(rounds: int = 3) -> None:
    """Seconds of a step of each, on this CPU: blocks side by side, or networks."""
    kinds = sorted({x._replace(epochs=1) for x in SEEDS})
    found = speed.seconds_of_steps({x.untimed(): x.configs(0) for x in kinds}, rounds)
    keep(TIMES, found)
    for name, value in found.items():
        noprop.say(f"{name}: {value:.3f}")


# --- Report ------------------------------------------------------------------------------------------------


def chosen(name: str) -> Setting:
    """What a rule chooses."""
    rows = read(ROWS)
    if missing := {x.key(seed) for x in RULES[name] for seed in range(SEEDS[x])} - rows.keys():
        raise SystemExit(f"error: {len(missing)} runs are not made yet: run this without a flag first")

    def accuracy(setting: Setting) -> float:
        names = [setting.key(seed) for seed in range(SEEDS[setting])]
        return statistics.mean(rows[x]["alone"]["accuracy"] for x in names)

    return max(RULES[name], key=accuracy)


def tested() -> list[Setting]:
    """What answers the test images."""
    return [*map(chosen, RULES), *FEWER_STEPS, SMALLER_BATCHES, PLAIN]


def rightly(setting: Setting, which: str = "alone") -> np.ndarray:
    """What resampled() takes, of which only right and wrong is kept: (seeds, 1, 2, N)."""
    with np.load(ANSWERS) as kept:
        names = [f"{setting.key(seed)}-{which}" for seed in range(SEEDS[setting])]
        return intervals.as_kept([np.unpackbits(kept[x]) for x in names])


def apart(one: np.ndarray, other: np.ndarray, paired: bool) -> list[str]:
    """Accuracy of one less the other's, with an interval over seeds and images, and a verdict.

    Two cells: by all images, and by NO_VALIDATION. one, other: of rightly(); paired: of the same seeds.
    """
    name, cells = "NoProp: the other" if paired else "CNNs", []
    for images in (slice(None), NO_VALIDATION):
        drawn = intervals.resampled({"NoProp": one[..., images], name: other[..., images]}, 0)
        less = drawn["NoProp"] - drawn[name]
        cells.append(f"{intervals.interval(less, 3)}, {intervals.verdict(less, min(len(one), len(other)))}")
    return cells


def compared(one: Setting, other: Setting, which: str = "alone") -> str:
    """A line: accuracy of one less the other's, with an interval over seeds and images, and a verdict.

    which: of the chain, or the mean of its blocks. CNNs are averaged; theirs are other seeds, not pairs.
    """
    plain, seeds = other.way == "CNN", min(SEEDS[one], SEEDS[other])
    found = rightly(one, which), rightly(other, "mean" if plain else which)
    ours = ", mean of blocks" * (which == "mean")
    theirs = ", averaged" if plain else ours
    cells = [f"{name_of(x)}, {x.epochs} epochs{how}" for x, how in ((one, ours), (other, theirs))]
    cells += apart(*(found if plain else [x[:seeds] for x in found]), paired=not plain)
    cells += [f"{SEEDS[one]} and {SEEDS[other]}" if plain else f"{seeds}"]
    return f"| {' | '.join(cells)} |"


def seconds_of(setting: Setting, by_step: dict[str, float], rows: dict) -> float:
    """Seconds of training on 55,000 images; InfoBatch has the share of the steps that it took."""
    if setting.way != "InfoBatch":
        return by_step[setting.untimed()] * setting.epochs * (55_000 // setting.batch_size)
    steps = statistics.mean(rows[setting.key(seed)]["steps"] for seed in range(SEEDS[setting]))
    size = setting.batch_size
    return by_step[setting.untimed()] * steps * (55_000 // size) / (45_000 // size)


def name_of(setting: Setting) -> str:
    """Such as "NoProp, small × 10"."""
    recipe = ", {} a step at {}".format(*setting.recipe) if setting.recipe else ""
    return f"{setting.way}, {setting.block} × {setting.count}{recipe}"


def report() -> int:
    """Print the table, put it into docs/speed.md, and draw the picture."""
    rows, by_step, final, on_test, table, line_of = read(ROWS), read(TIMES), read(FINAL), tested(), {}, {}
    needed = [(x.key(seed), rows) for x, n in SEEDS.items() for seed in range(n)]
    needed += [(x.key(0), final) for x in on_test]
    needed += [(x, by_step) for x in (speed.PEAK, *(setting.untimed() for setting in SEEDS))]
    if missing := [key for key, kept in needed if key not in kept]:
        first = "run this without a flag, with --times and with --final first"
        raise SystemExit(f"error: {len(missing)} are not measured, such as {missing[0]}: {first}")
    columns = "", "epochs", "seeds", "accuracy", "accuracy of the mean", "nll", "nll of the mean", "seconds"
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for setting, seeds in sorted(SEEDS.items()):
        found = [rows[setting.key(seed)] for seed in range(seeds)]
        cells = [[x[a][b] for x in found] for b in ("accuracy", "loss") for a in ("alone", "mean")]
        table[setting] = [*map(statistics.mean, cells), seconds := seconds_of(setting, by_step, rows)]
        text = [mean(x, d).removesuffix(" ± nan") for x, d in zip(cells, (2, 2, 4, 4), strict=True)]
        text += [f"{seconds:.0f}"]
        line_of[setting] = f"| {name_of(setting)} | {setting.epochs} | {seeds} | {' | '.join(text)} |"
    lines = [*head, *(line_of[x] for x in IN_SHORT)]
    lines += ["", "![Accuracy and likelihood against time](img/frontier.png)", ""]
    less = "held out: accuracy of", "less that of", "points", WITHOUT, "seeds"
    lines += [f"<details><summary>All {len(line_of)} settings, and comparisons</summary>", "", *head]
    lines += [*line_of.values(), "", f"| {' | '.join(less)} |", "|---" * len(less) + "|"]
    pairs = [(x, DEFAULT) for x in [*QUICKER, *FEWER, FASTER, SMALLER_BATCHES, TEN_DEEP]]
    deep = *RULES["accurate"], *RULES["best"], *FEWER_STEPS, LONGER, SMALLER_BATCHES, EIGHT
    pairs += [(x, TEN_DEEP) for x in deep]
    pairs += [(FEWER_STEPS[1], chosen("best")), (EIGHT, SMALLER_BATCHES), (SMALLER_BATCHES, PLAIN)]
    lines += [compared(*pair) for pair in pairs]
    lines += [compared(SMALLER_BATCHES, other, "mean") for other in (DEFAULT, TEN_DEEP, PLAIN)]
    lines += ["", "</details>", ""]
    columns = "on test images", "accuracy", "accuracy of the mean", "nll", "nll of the mean", "seeds"
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for setting in on_test:
        found = [final[key] for key in map(setting.key, range(TEST_SEEDS)) if key in final]
        text = [mean([x["accuracy"][-1] for x in found]), mean([x["accuracy_average"] for x in found])]
        text += [mean([x["loss"][-1] for x in found], 4), mean([x["loss_average"] for x in found], 4)]
        epochs = sorted({x for row in found for x in row["epochs"]})  # whose weights validation images select
        title = f"{name_of(setting)}, {setting.epochs} epochs"
        title += f"; weights of epoch {' to '.join(map(str, epochs[:: len(epochs) - 1 or 1]))}"
        lines += [f"| {title} | {' | '.join(text)} | {len(found)} |"]
    peak = f"Matmul peak right after the steps were timed: {by_step[speed.PEAK]:.0f} GFLOP/s."
    noprop.say(text := "\n".join([*lines, "", peak]))
    write("frontier", text, "speed.md")
    return noprop.picture(draw, DOCS / "img" / "frontier.png", table)


def draw(table: dict[Setting, list[float]]):
    """Held-out error and loss against seconds: of the mean of blocks or networks, and of one CNN."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    error, loss = figure.subplots(1, 2)
    maps = {("NoProp", "small"): "Blues", ("NoProp", "deep"): "Greens"}
    maps |= {("CNN", "small"): "Reds", ("CNN", "deep"): "Oranges"}
    maps |= {("InfoBatch", "small"): "Greys", ("InfoBatch", "deep"): "Purples"}
    lines_of = {}
    for setting in sorted(table):
        lines_of.setdefault(name_of(setting), []).append(setting)
    for name, settings in lines_of.items():
        alone, of_all, loss_alone, loss_of_all, seconds = np.array([table[x] for x in settings]).T
        way, block, count, *_ = settings[0]
        color = colormaps[maps[way, block]](0.35 + 0.06 * count)
        recipe = settings[0].recipe
        marks = ("P" if recipe else "s--") if way == "CNN" else "D" if recipe else "o-"
        lines = [(marks, name, seconds, 100 - of_all, loss_of_all)]
        if way == "CNN" and not recipe:
            lines.append(("v:", f"one CNN, {block}", seconds / count, 100 - alone, loss_alone))
        for style, label, x, *both in lines:
            for axes, y in zip((error, loss), both, strict=True):
                axes.plot(x, y, style, ms=4, color=color, label=label)
    error.set(title="Error on 15,000 held-out training images", ylabel="%")
    loss.set(title="Negative log-likelihood of these")
    for axes in (error, loss):
        axes.set(xscale="log", yscale="log", xlabel="seconds of training, two cores")
        axes.grid(alpha=0.3, which="both")
    for axes, ticks in ((error, (0.35, 0.4, 0.5, 0.6, 0.7, 0.8)), (loss, (0.014, 0.02, 0.03, 0.04))):
        axes.minorticks_off()
        axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    figure.legend(*error.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    for flag in ("--times", "--final", "--report"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = noprop.pick_device(noprop.Options(device=given.device))
    if given.times:
        times()
    elif given.final:
        final(device)
    elif not given.report:
        train(device)
    return report() if given.report else 0


if __name__ == "__main__":
    sys.exit(main())
