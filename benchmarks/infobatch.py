"""Fewer steps on what is learned already: InfoBatch (noprop_lab/infobatch.py) beside the default.

    python benchmarks/infobatch.py --seeds 10     train what is missing, on 45,000 training images; report
    python benchmarks/infobatch.py --runs 3       whole runs of both and of accurate: seconds, test accuracy
    python benchmarks/infobatch.py --report       the tables in docs/speed.md, from benchmarks/results/

The 15,000 other training images answer, beside the answers of frontier.py's networks of 12, 9, 8 epochs and
the same seeds (of another device). Test images are read by --runs alone, which decides nothing. With
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment a chip that
has AVX512 does without it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks import frontier, intervals
from benchmarks.control import fit, log_p_of, measured
from benchmarks.machine import matmul_peak
from benchmarks.seeds import keep_answers, mean, refuse_fewer, run, write
from benchmarks.speed import name_of_machine
from noprop_lab.infobatch import InfoBatchConfig

RESULTS = Path(__file__).parent / "results"


def path_of(seed: int) -> Path:
    """Where the answers of a seed are kept."""
    return RESULTS / f"infobatch-{seed}.npz"


def measure(seed: int, data: noprop.Data) -> None:
    """Train with a seed, and keep what the chain answers on the held-out images, and the steps."""
    state = fit(InfoBatchConfig(seed=seed, select="last"), data, measured=False, threads=1)
    kept = intervals.packed(log_p_of(state.averaged, data.val.images)[:, -1], data.val.labels)
    keep_answers(path_of(seed), chain=kept, steps=np.array(state.step))
    noprop.say(f"seed {seed}: {intervals.right_and_loss(kept)[0].mean():.2f} %, {state.step} steps")


def runs(number: int) -> None:
    """Train the default, InfoBatch and accurate in turn, with all cores; keep seconds and accuracies.

    In runs/, which must not be there: what was trained before had the machine as it was then.
    """
    path = RESULTS / f"infobatch-runs-{name_of_machine()}.json"
    refuse_fewer(path, "seeds", number)
    if Path("runs").exists():
        raise SystemExit("error: the runs are to follow each other: start this in a folder without runs/")
    settings = {"the default": [], "InfoBatch": ["--objective=infobatch"], "accurate": ["--preset=accurate"]}
    found = run(settings, range(number))
    names = {"seconds": "seconds of training", "test_accuracy": "test accuracy, %"}
    rows = {x: {name: [y[key] for y in of_one] for key, name in names.items()} for x, of_one in found.items()}
    kept = {"seeds": number, "rows": rows, "versions": found["InfoBatch"][0]["versions"]}
    kept |= {"peak_gflops": matmul_peak()}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def table_of_runs() -> str:
    """What runs() has kept, a line a machine and setting, in Markdown."""
    columns = "machine", "matmul peak right after it", "seeds", "", "seconds of training"
    columns += "share of the default's", "test %"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path in sorted(RESULTS.glob("infobatch-runs-*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        machine = path.stem.removeprefix("infobatch-runs-"), f"{kept['peak_gflops']:.0f} GFLOP/s"
        default, *_ = (row["seconds of training"] for row in kept["rows"].values())
        for name, row in kept["rows"].items():
            seconds, accuracies = row.values()
            shares = sorted(one / other for one, other in zip(seconds, default, strict=True))
            share = f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
            cells = *machine, str(kept["seeds"]), name, mean(seconds, 0), share, mean(accuracies)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report() -> int:
    """Print the tables, and put them into docs/speed.md."""
    seeds = sorted(int(x.stem.split("-")[1]) for x in RESULTS.glob("infobatch-*.npz"))
    files, rows = [np.load(path_of(seed)) for seed in seeds], frontier.read(frontier.ROWS)
    if len(files) < 2:
        raise SystemExit("error: two seeds must be trained at least: run this without --report first")
    ours = np.stack([x["chain"][None] for x in files])
    accuracies, losses, _ = measured(ours)
    steps = np.mean([x["steps"] for x in files])
    columns = "", "steps", "accuracy", "nll", "InfoBatch less this, points", frontier.WITHOUT
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cells = [f"{steps:.0f}", mean(accuracies), mean(losses, 4)]
    lines.append(f"| InfoBatch, 12 epochs | {' | '.join(cells)} | | |")
    for setting in (frontier.DEFAULT, *frontier.QUICKER):
        theirs = [rows[setting.key(seed)]["alone"] for seed in seeds]
        cells = [f"{setting.epochs * (45_000 // 512)}"]
        cells += [mean([x["accuracy"] for x in theirs]), mean([x["loss"] for x in theirs], 4)]
        cells += frontier.apart(ours, frontier.rightly(setting)[seeds], paired=True)
        lines.append(f"| the default, {setting.epochs} epochs | {' | '.join(cells)} |")
    noprop.say(text := "\n".join([*lines, "", f"Seeds {', '.join(map(str, seeds))}."]))
    write("infobatch", text, "speed.md")
    if any(RESULTS.glob("infobatch-runs-*.json")):
        noprop.say(text := table_of_runs())
        write("infobatch runs", text, "speed.md")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", type=int, metavar="N", help="time and test both, in turn, with N seeds")
    parser.add_argument("--report", action="store_true", help="train nothing")
    given = parser.parse_args()
    if given.first_seed + given.seeds > frontier.SEEDS[frontier.DEFAULT]:
        parser.error(f"frontier.py has {frontier.SEEDS[frontier.DEFAULT]} seeds, from 0, to stand beside")
    if given.runs:
        runs(given.runs)
    elif not given.report:
        data = frontier.held_out(noprop.load_data(noprop.Config()))
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            if not path_of(seed).exists():
                measure(seed, data)
    return report()


if __name__ == "__main__":
    sys.exit(main())
