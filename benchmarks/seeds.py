"""One setting over several seeds: mean ± standard error.

    python benchmarks/seeds.py --seeds 5                      the default run, seeds 0 to 4
    python benchmarks/seeds.py --epochs 4 --target noise      any flags of noprop_example.py
    python benchmarks/seeds.py --objective dt                 or of python -m noprop_lab train

Runs noprop_example.py, or for the lab's flags the lab, once a seed, in runs/ below the current folder (one
that is finished there is not run again, one that was stopped is resumed), prints one Markdown
table, and keeps the values of every seed in benchmarks/results/.
"""

import argparse
import copy
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from noprop_lab import __main__ as lab
from noprop_lab import data, networks

ROOT = Path(noprop.__file__).parent
DOCS = ROOT / "docs"


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


def joined(flags: list[str], names: tuple[str, ...] = ("--data-root", "--threads", "--dataset")) -> list[str]:
    """The flags, of which these are one word each, as shown() knows them."""
    flags = list(flags)
    for i in reversed(range(len(flags) - 1)):
        if flags[i] in names:
            flags[i : i + 2] = ["=".join(flags[i : i + 2])]
    return flags


def data_root(flags: list[str]) -> Path:
    """The folder with the data that the flags name."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    return known.parse_known_args(flags)[0].data_root


def shown(flags: list[str]) -> list[str]:
    """The flags as a results file names them: DIR for a folder of this machine."""
    return [re.sub("^--data-root=.*", "--data-root=DIR", x) for x in flags]


def summary_of(folder: Path) -> dict | None:
    """The summary of the run in a folder, if it has come to its end."""
    paths = [path for path in folder.glob("noprop_*.json") if len(path.suffixes) == 1]  # 2: kept, older
    found = [json.loads(path.read_text()) for path in paths]
    return next((summary for summary in found if summary["finished"]), None)


def network_of(folder: Path) -> noprop.NoProp:
    """The network of the run in a folder."""
    return networks.load(folder / noprop.OUTPUTS[0].format(summary_of(folder)["objective"]))


def command(flags: list[str], folder: Path) -> list[str]:
    """A run with these flags: of noprop_example.py, or of the lab where a flag is the lab's."""
    start, searches = [noprop.__file__], "--run-hpo" in flags
    try:
        noprop.read_flags(flags, noprop.Options, noprop.Config)
    except noprop.Failure:  # a flag, or a choice, that the script does not have
        start = ["-m", "noprop_lab", "search" if searches else "train"]
        flags = [flag for flag in flags if flag != "--run-hpo"]
    if not searches:  # a search goes on by itself
        if any(folder.glob("noprop_*.pt")):  # says itself what these say, and takes no second word
            known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            for name in ("--preset", "--config", "--embedding-from"):
                known.add_argument(name)
            _, flags = known.parse_known_args(flags)
        flags = [*flags, "--resume"]
    return [sys.executable, *start, *flags]


def environment() -> dict[str, str]:
    """In which python -m noprop_lab is found from any folder."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def stale(summary: dict, flags: list[str], seed: int) -> str:
    """The settings that a finished run has otherwise than its flags say now; of a search, none."""
    if "--run-hpo" in flags:
        return ""
    wanted, there = replace(lab.read_command_line("train", flags)[0], seed=seed).saved(), summary["config"]
    names = (wanted.keys() | there.keys()) - {"step_threads"}  # which is of the machine
    return ", ".join(sorted(x for x in names if wanted.get(x) != there.get(x)))


def run(settings: dict[str, list[str]], seeds: range, at_once: int = 1) -> dict[str, list[dict]]:
    """Summaries of the runs with each setting's flags, one a seed.

    Runs that are missing are made, so many at once; those that were stopped are resumed.
    """
    jobs = [(name, flags, seed) for seed in seeds for name, flags in settings.items()]
    missing = [job for job in jobs if not summary_of(folder_of(*job[1:]))]

    def check() -> None:
        """End where a finished run has other settings than its flags mean now."""
        for name, flags, seed in jobs:
            summary = summary_of(folder := folder_of(flags, seed))
            if summary and (other := stale(summary, flags, seed)):
                raise SystemExit(f"error: {folder} ({name}) was trained with another {other}: move it away")

    check()
    print(f"{len(jobs)} runs; {len(missing)} of them are missing.", file=sys.stderr)
    started = time.perf_counter()

    def make(name: str, flags: list[str], seed: int) -> str:
        folder = folder_of(flags, seed)
        subprocess.run(
            [*command(flags, folder), f"--seed={seed}", f"--output-dir={folder}"],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment(),
        )
        return f"seed {seed}  {name}"

    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(make, *job) for job in missing]
        try:
            for done, finished in enumerate(as_completed(running), start=1):
                what = finished.result()
                left = (time.perf_counter() - started) / done * (len(missing) - done) / 60
                print(f"{done}/{len(missing)}  {what}; about {left:.0f} min left", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that wait would still be made
            raise
    check()  # those that were resumed have the settings that they began with
    return {name: [summary_of(folder_of(flags, seed)) for seed in seeds] for name, flags in settings.items()}


def keep_answers(path: Path, **answers: np.ndarray) -> None:
    """Write arrays of answers, whole or not at all: test images are asked once."""
    np.savez_compressed(file := io.BytesIO(), **answers)
    noprop.write_file(path, file.getvalue())


def refuse_fewer(path: Path, key: str, number: int) -> None:
    """End where a results file, which docs cite, is of more seeds or rounds (its key) than are asked for."""
    there = json.loads(path.read_text(encoding="utf-8")).get(key, 0) if path.exists() else 0
    if (there if isinstance(there, int) else len(there)) > number:
        raise SystemExit(f"error: {path} holds more than that ({key}): ask for as much, or move it away")


def write(mark: str, content: str, name: str = "evidence.md") -> None:
    """Put content into a file of docs/, between its marks."""
    path, begin, end = DOCS / name, f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if begin not in path.read_text("utf-8"):
        raise SystemExit(f"error: {path} has no {begin}")
    text = re.sub(
        f"{begin}.*?{end}", lambda _: f"{begin}{content}\n{end}", path.read_text("utf-8"), flags=re.DOTALL
    )
    path.write_text(text, encoding="utf-8")


def best_test_accuracy(summary: dict) -> float:
    """Of all epochs, chosen on the test set."""
    return max(epoch["test_accuracy"] for epoch in summary["history"])


def sampling(model: noprop.NoProp, temperature: float) -> noprop.NoProp:
    """A copy of a network that answers at another temperature, with DDPM's weights."""
    model = copy.deepcopy(model)
    model.steps = noprop.reverse_steps(model.alpha_bar, equal_weights=False).tolist()
    model.config = replace(model.config, weights="ddpm", temperature=temperature)
    return model


def inferred(model: noprop.NoProp, temperature: float, split: noprop.Split) -> dict:
    """What evaluate() says of a network at another temperature, with DDPM's weights."""
    model = sampling(model, temperature)
    with noprop.workers(noprop.CPU, noprop.Options.threads) as parallel:
        return noprop.evaluate(model, split, model.config, parallel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    flags = joined(flags)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    [results] = run({" ".join(flags) or "default": flags}, seeds).values()
    rows: dict[str, list[float]] = {}
    for title, read, digits in (
        ("test accuracy, selected on validation", lambda x: x["test_accuracy"], 2),
        ("validation accuracy", lambda x: x["val_accuracy"], 2),
        ("best test accuracy over epochs (selects on test)", best_test_accuracy, 2),
        ("chain cut after block 1", lambda x: x["test_accuracy_by_blocks"][0], 2),
        ("average of all blocks' class probabilities", lambda x: x["test_accuracy_average"], 2),
        ("seconds of training", lambda x: x["seconds"], 0),
        ("seconds in all", lambda x: x["seconds_total"], 0),
    ):
        if results[0]["objective"] in ("ct", "fm") and "block" in title:  # see flows.py
            continue
        rows[title] = [read(x) for x in results]
        print(f"| {title} | {mean(rows[title], digits)} |")
    if results[0]["objective"] == "hybrid":
        config = network_of(folder_of(flags, seeds[0])).config
        test = data.load_data(config, data_root(flags)).test
        models = (network_of(folder_of(flags, seed)) for seed in seeds)
        found = [inferred(model, config.temperature, test) for model in models]
        rows["inference with DDPM's weights"] = by_seed = [x["accuracy"][-1] for x in found]
        print(f"| the same networks, inference with DDPM's weights | {mean(by_seed)} |")
    print(f"{len(seeds)} seeds from {seeds[0]}, {results[0]['epochs']} epochs, {results[0]['versions']}")
    named = [x for x in flags if not x.startswith("--data-root")]
    kept = {
        "flags": " ".join(shown(flags)) or "default",
        "seeds": list(seeds),
        "versions": results[0]["versions"],  # those of other seeds, where they differ, by seed
        "epochs": [x["epochs"] for x in results],
        "rows": rows,
    }
    others = [x["versions"] for x in results]
    kept |= {"versions by seed": others} if any(x != others[0] for x in others) else {}
    path = Path(__file__).parent / "results" / f"seeds-{folder_of(named, 0).parent.name}.json"
    if path.exists() and not {*json.loads(path.read_text("utf-8"))["seeds"]} <= {*seeds}:  # it is cited
        path = path.with_name(f"{path.stem}-of-{seeds[0]}-to-{seeds[-1]}.json")
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
