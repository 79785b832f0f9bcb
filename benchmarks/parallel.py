"""Blocks in parallel: speed, traffic and memory of several processes, and of blocks trained alone.

    python benchmarks/parallel.py            about ten minutes on two cores

Every figure is of one epoch of the real lab on MNIST, default settings, its evaluation left out; times are
medians of interleaved rounds. Prints a Markdown table and writes benchmarks/results/parallel-MACHINE.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.machine import matmul_peak
from benchmarks.seeds import refuse_fewer
from noprop_lab import __main__ as lab
from noprop_lab import networks

IMAGES = 54_784  # 107 steps of 512


def worker(flags: list[str]) -> int:
    """Run the lab as it is, and note what a step sends between processes and how much memory the run took.

    (A checkpoint collects the parts too, once an epoch at least: their averages, weights and moments.)
    """
    sent = {"all_reduce": 0, "calls": 0}
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments, **more):
        sent["all_reduce"] += tensor.numel() * tensor.element_size()
        sent["calls"] += 1
        return original(tensor, *arguments, **more)

    dist.all_reduce = all_reduce
    code = lab.main(["train", *flags])
    sent["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    folder = Path(next(x for x in flags if x.startswith("--output-dir=")).split("=", 1)[1])
    (folder / f"worker{os.environ.get('RANK', '0')}.json").write_text(json.dumps(sent))
    return code


def measure(processes: int, threads: int, *flags: str) -> dict:
    """Seconds of training, bytes a step and peak memory of one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [
            sys.executable,
            *(launcher if processes > 1 else []),
            __file__,
            "--worker",
            "--epochs=1",
            f"--threads={threads}",
            f"--output-dir={folder}",
            *flags,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        notes = [json.loads(x.read_text()) for x in Path(folder).glob("worker*.json")]
        training = networks.read_checkpoint(Path(folder) / "noprop_hybrid.pt")["training"]
    return {
        "seconds": training["seconds"],
        "bytes a step": notes[0]["all_reduce"] / training["step"],
        "calls a step": notes[0]["calls"] / training["step"],
        "peak MiB": max(note["peak_mib"] for note in notes),
    }


def main() -> int:
    if "--worker" in sys.argv:
        code = worker([x for x in sys.argv[1:] if x != "--worker"])
        sys.stdout.flush()
        os._exit(code)  # as the lab's console() does, for a thread of gloo
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    name = f"parallel-{platform.machine()}-{torch.get_num_threads()}-cores.json"
    refuse_fewer(path := Path(__file__).parent / "results" / name, "rounds", rounds)
    cases = {
        "1 process, 1 thread": (1, 1),
        "1 process, 2 threads": (1, 2),
        "2 processes of 1 thread": (2, 1),
        "2 processes of 1 thread, fixed embedding": (2, 1, "--embedding=fixed"),
        "block 1 alone, 1 thread": (1, 1, "--embedding=fixed", "--blocks=1"),
    }
    results: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            results[name].append(measure(*case))
    results["5 processes of 1 thread"] = [measure(5, 1)]
    parameters = sum(x.numel() for x in noprop.build(noprop.Config()).parameters())
    middle = {name: statistics.median(x["seconds"] for x in runs) for name, runs in results.items()}
    peak = matmul_peak()
    print(f"Float32 matmul peak {peak:.0f} GFLOP/s, {torch.get_num_threads()} cores; {rounds} rounds\n")
    print("| | images/s (range) | bytes a step | peak MiB a process |\n|---|---|---|---|")
    for name, runs in results.items():
        rates = sorted(IMAGES / x["seconds"] for x in runs)
        print(
            f"| {name} | {IMAGES / middle[name]:,.0f} ({rates[0]:,.0f}–{rates[-1]:,.0f}) | "
            f"{runs[0]['bytes a step']:.0f} in {runs[0]['calls a step']:.1f} calls | "
            f"{max(x['peak MiB'] for x in runs):.0f} |"
        )
    two, one = middle["2 processes of 1 thread"], middle["1 process, 2 threads"]
    ten, whole = 10 * middle["block 1 alone, 1 thread"], middle["1 process, 1 thread"]
    print(f"| 2 processes ÷ 1 process of 2 threads, speed | {one / two:.2f} | | |")
    print(f"| block 1 alone × 10 ÷ the whole, time, 1 thread | {ten / whole:.2f} | | |")
    print(f"| data-parallel training of the same network would send | | {4 * parameters:,} | |")
    content = {"rounds": rounds, "peak_gflops": peak, "parameters": parameters, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
