"""Where time and memory go, and what the rivals need: every figure beside its rival's in the same run.

    python benchmarks/speed.py                        everything (about 25 minutes on two cores)
    python benchmarks/speed.py --parts step memory    some of it
    python benchmarks/speed.py --device cuda          on a GPU, with graphs too

Writes benchmarks/results/speed-MACHINE.json and prints a Markdown table. Times are medians of interleaved
repeats, with the range between their quartiles. Nothing else should compute meanwhile. Images are random
except in the parts "runs" and "inference", which train on MNIST and ask what they trained.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.machine import matmul_peak
from benchmarks.seeds import environment, refuse_fewer
from noprop_example import Config, State
from noprop_lab import backprop
from noprop_lab.__main__ import kind_and_step, step_of
from noprop_lab.data import with_augmentation
from noprop_lab.dt import DTConfig
from noprop_lab.early_exit import early_exit
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig

DEVICE = noprop.CPU  # unless the command line names another
THREADS = torch.get_num_threads()
RESULTS: dict = {}  # what is printed and written
TIMED = "default", "deep", "reference"  # two presets, and the default with deep blocks

OURS, IN_TURN = "NoProp, a block on each core", "NoProp, one block after another"
AT_ONCE, PARTS = "NoProp, all losses in one backward pass", "backpropagation, a T-th of the batch at a time"
SHORT = "NoProp in bfloat16"
TWIN, PLAIN = "backpropagation through the chain", "plain CNN of one block's size by backpropagation"
CHECKPOINTED = "backpropagation, each block's activations computed again"


def report(name: str, value, text: str) -> None:
    """Keep a figure and print its row."""
    RESULTS[name] = value
    print(f"| {name} | {text} |", flush=True)


def preset(name: str, kind: type[Config] = Config, **changes) -> Config:
    """The settings of one of TIMED."""
    made = {"default": kind, "deep": partial(kind, block="deep"), "reference": kind.reference}
    return made[name](**changes)


def synchronize() -> None:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def interleaved(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, every contestant once a round, two rounds to warm up; sorted."""
    seconds = {name: [] for name in contestants}
    for _ in range(repeats + 2):
        for name, call in contestants.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: sorted(values[2:]) for name, values in seconds.items()}


def spread(values: list[float], unit: float = 1e3, digits: int = 1) -> str:
    """Median (and quartiles) of sorted seconds, in milliseconds."""
    low, middle, high = (values[round(q * (len(values) - 1))] * unit for q in (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def random_batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 1, 28, 28, device=DEVICE), torch.randint(0, 10, (size,), device=DEVICE)


def flops(call: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bfloat16_slowdown() -> float:
    """Time of bfloat16 products ÷ float32's: without instructions for them, a CPU has up to hundreds."""
    long, short = (matmul_peak(str(DEVICE), x, size=256) for x in (torch.float32, torch.bfloat16))
    return long / short


# --- Contestants -------------------------------------------------------------------------------------------


def train_step(state: State, image: Tensor, label: Tensor, parallel=map) -> None:
    """A step of training, as the config has it."""
    step_of(state.config)(state, image, label, 1e-3, parallel)
    state.step += 1


PEAK = "matmul peak, GFLOP/s"
STEPS = 8  # in one call, so that starting threads does not count


def times(step: Callable[[], object]) -> Callable[[], None]:
    """A call of STEPS steps."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def pooled(step: Callable[[Callable], object]) -> Callable[[], None]:
    """A call of STEPS steps, each of which gets a map() for what it makes side by side."""

    def steps() -> None:
        with noprop.workers(DEVICE, THREADS) as pool:
            times(partial(step, pool))()

    return steps


def noprop_steps(state: State, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A call that makes STEPS steps of the script's own training, blocks side by side."""
    return pooled(lambda pool: train_step(state, *batch, pool))


def seconds_of_steps(configs: dict[str, list[LabConfig]], rounds: int) -> dict[str, float]:
    """Seconds of a step, interleaved, of a config's blocks or several networks side by side; and the peak."""

    def call(of_one: list[LabConfig]) -> Callable[[], None]:
        """A call that makes STEPS steps as train() has them, with augmentation, on one batch."""
        states, (image, label) = [LabState(x) for x in of_one], random_batch(of_one[0].batch_size)
        augment = with_augmentation(noprop.Data(None, None, None), of_one[0]).augment

        def step(pool: Callable, state: LabState) -> None:
            train_step(state, augment(image, noprop.generator(state.step)), label, pool)

        if len(states) == 1:
            return pooled(lambda pool: step(pool, states[0]))
        return pooled(lambda pool: list(pool(partial(step, map), states)))

    measured = interleaved({name: call(of_one) for name, of_one in configs.items()}, rounds)
    found = {name: statistics.median(x) / STEPS for name, x in measured.items()}
    return found | {PEAK: matmul_peak()}


def twin_of(name: str, **changes) -> LabState:
    """A preset's network, for backpropagation; with num_blocks=1 it is a plain CNN of one block's size."""
    return LabState(preset(name, backprop.BackpropConfig, **changes), DEVICE)


def end_step(twin: State) -> None:
    """What follows a backward pass of the twin."""
    for name in twin.parts.keys() - {"label_embedding"}:
        twin.update(name, 1e-3)
    twin.step += 1


def accumulated_step(twin: State, image: Tensor, label: Tensor, parts: int) -> None:
    """A step of the twin, its gradient accumulated over so many parts of the batch."""
    for x, y in zip(image.chunk(parts), label.chunk(parts), strict=True):
        F.cross_entropy(twin.model(x)[:, -1], y).mul(len(y) / len(label)).backward()
    end_step(twin)


def checkpointed_step(twin: State, image: Tensor, label: Tensor) -> None:
    """A step of the twin that keeps only what goes from block to block: the rest is computed again."""
    z = twin.model.start(image).requires_grad_()  # the reentrant kind, whose second pass the meter sees, asks
    for t in range(1, twin.config.num_blocks + 1):
        u_hat, z = checkpoint(twin.model.step, t, image, z, use_reentrant=True)
    F.cross_entropy(twin.model.classify(u_hat, z), label).backward()
    end_step(twin)


# --- Parts -------------------------------------------------------------------------------------------------


def machine() -> None:
    """Matmul peaks, float32 and bfloat16."""
    report("cores used", THREADS, f"{THREADS}")
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(str(DEVICE), dtype)
        report(f"{str(dtype).split('.')[1]} matmul peak, GFLOP/s", peak, f"{peak:.0f}")


def step(rounds: int = 9) -> None:
    """Time and model-FLOPs utilisation of a training step; against the naive order and backpropagation."""
    a, peak = torch.rand(1024, 1024, device=DEVICE), RESULTS.get("float32 matmul peak, GFLOP/s", 0)
    for name in TIMED:
        config = preset(name)
        batch, state, twin = random_batch(config.batch_size), State(config, DEVICE), twin_of(name)
        one = twin_of(name, num_blocks=1)
        work, twin_work = (flops(partial(train_step, x, *batch)) for x in (state, twin))
        contestants = {
            OURS: noprop_steps(state, batch),
            IN_TURN: times(partial(train_step, state, *batch)),
            TWIN: times(partial(train_step, twin, *batch)),
            PLAIN: times(partial(train_step, one, *batch)),
            "matmul": times(lambda: a @ a),
        }
        if bfloat16_slowdown() < 1:
            short = State(preset(name, precision="bfloat16"), DEVICE)
            contestants[SHORT] = noprop_steps(short, batch)
        seconds = interleaved(contestants, rounds if name == "default" else 3)
        medians = {key: statistics.median(values) / STEPS for key, values in seconds.items()}
        peak = max(peak, 2e-9 * 1024**3 * STEPS / seconds.pop("matmul")[0])
        rate = work / medians[OURS] / 1e9
        report(f"{name}: GFLOP a step of {config.batch_size} images", work / 1e9, f"{work / 1e9:.2f}")
        report(f"{name}: MFU", rate / peak, f"{rate / peak:.0%} of {peak:.0f} GFLOP/s")
        for key, values in seconds.items():
            ratio = medians[key] / medians[TWIN]
            text = f"{spread(values, 1e3 / STEPS)}, {ratio:.2f} × {TWIN}"
            report(f"{name}: ms a step, {key}", [x * 1e3 / STEPS for x in values], text)
        report(f"{name}: FLOPs of {OURS} ÷ {TWIN}", work / twin_work, f"{work / twin_work:.2f}")


def graphs(rounds: int = 5) -> None:
    """What graphs do for a step on a GPU: of TIMED, and of the paper's setting of NoProp-DT."""
    paper = DTConfig.paper()
    configs = {name: preset(name, LabConfig) for name in TIMED}
    for name, config in (configs | {"paper": paper}).items():
        batch, contestants = random_batch(config.batch_size), {}
        for precision in ("float32", "bfloat16"):
            now = replace(config, precision=precision)
            for graph in (False, True):
                kind, call = kind_and_step(now, graph, DEVICE)
                contestant = times(partial(call, kind(now, DEVICE), *batch, 1e-3))
                contestants[precision + ", graphs" * graph] = contestant
        measured = interleaved(contestants, rounds)
        first = statistics.median(next(iter(measured.values())))
        for key, values in measured.items():
            ratio = statistics.median(values) / first
            text = f"{spread(values, 1e3 / STEPS, 2)}, {ratio:.2f} ×"
            report(f"{name}: ms a step, {key}", [x * 1e3 / STEPS for x in values], text)


def compiled(rounds: int = 5) -> None:
    """What torch.compile does to a default step; on a GPU with the blocks' kernels captured as graphs."""
    config, mode = preset("default"), "reduce-overhead" if DEVICE.type == "cuda" else "default"
    batch, eager, state = random_batch(config.batch_size), State(config, DEVICE), State(config, DEVICE)
    for block in state.model.blocks:
        block.compile(mode=mode)
    started = time.perf_counter()
    train_step(state, *batch)
    seconds = time.perf_counter() - started
    report("torch.compile: seconds of the first step", seconds, f"{seconds:.0f}")
    pair = interleaved({"eager": noprop_steps(eager, batch), mode: noprop_steps(state, batch)}, rounds)
    ratio = statistics.median(pair[mode]) / statistics.median(pair["eager"])
    report(f"torch.compile, mode {mode}: time of a step ÷ eager", ratio, f"{ratio:.2f}")


def profile(repeats: int = 10) -> None:
    """Shares of a default step's time by operator, on one thread."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    config = preset("default")
    state, batch = State(config, DEVICE), random_batch(config.batch_size)
    torch.set_num_threads(1)
    train_step(state, *batch)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profiler(activities=activities) as trace:
        for _ in range(repeats):
            noprop.augment(batch[0], noprop.generator("profile"))
            train_step(state, *batch)
    torch.set_num_threads(THREADS)
    on_gpu = DEVICE.type == "cuda"
    times = {
        x.key: x.self_device_time_total if on_gpu else x.self_cpu_time_total for x in trace.key_averages()
    }
    whole = sum(times.values())
    for key in sorted(times, key=times.get, reverse=True)[:10]:
        report(f"share of a step: `{key}`", times[key] / whole, f"{times[key] / whole:.0%}")


class Meter:
    """Bytes that autograd keeps for the backward pass: now, and at most. Each storage counts once."""

    def __init__(self, ignored: nn.Module):
        self.ignored = {x.untyped_storage().data_ptr() for x in ignored.state_dict().values()}
        self.uses: dict[int, int] = {}
        self.now = self.peak = 0

    class Kept:
        def __init__(self, meter: "Meter", tensor: Tensor):
            self.meter, self.tensor = meter, tensor
            storage = tensor.untyped_storage()
            self.key, self.size = storage.data_ptr(), storage.nbytes()
            uses = meter.uses[self.key] = meter.uses.get(self.key, 0) + 1
            meter.now += self.size * (uses == 1 and self.key not in meter.ignored)
            meter.peak = max(meter.peak, meter.now)

        def __del__(self):
            self.meter.uses[self.key] -= 1
            gone = self.meter.uses[self.key] == 0 and self.key not in self.meter.ignored
            self.meter.now -= self.size * gone

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: Meter.Kept(self, x), lambda kept: kept.tensor
        )


def peak_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    meter = Meter(model)
    with meter.hooks():
        call()
    return meter.peak


def all_blocks_at_once(state: State, image: Tensor, label: Tensor) -> None:
    """A step of NoProp written the naive way: all losses added up, and one backward pass."""
    model, objective, loss = state.model, state.objective, 0
    W = model.label_embedding.weight

    def draw(_purpose: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, device=image.device)

    for t, block in enumerate(model.blocks, start=1):
        one_loss, u_hat = objective.block_loss(block, t, model.alpha_bar, image, label, W, draw)
        loss = loss + one_loss
    (loss + objective.head_loss(model.classifier, u_hat, label, W, draw)).backward()
    for name in state.parts:
        state.update(name, 1e-3)
    state.step += 1


def memory(batch_size: int = 256) -> None:
    """Peak bytes of activations kept for the backward pass, by T, and what equal memory costs the twin."""
    batch = random_batch(batch_size)
    for blocks in (1, 2, 5, 10, 20, 50):
        sizes = dict(num_blocks=blocks, batch_size=batch_size)
        state, twin = State(preset("default", **sizes), DEVICE), twin_of("default", **sizes)
        contestants = {
            IN_TURN: partial(train_step, state, *batch),
            AT_ONCE: partial(all_blocks_at_once, state, *batch),
            TWIN: partial(train_step, twin, *batch),
            CHECKPOINTED: partial(checkpointed_step, twin, *batch),
            PARTS: partial(accumulated_step, twin, *batch, blocks),
        }
        for name, call in contestants.items():
            mib = peak_bytes(twin.model if "backprop" in name else state.model, call) / 2**20
            report(f"T = {blocks}: MiB of activations, {batch_size} images, {name}", mib, f"{mib:.1f}")
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                mib = torch.cuda.max_memory_allocated() / 2**20
                report(f"T = {blocks}: MiB on the GPU, {name}", mib, f"{mib:.1f}")
        if blocks == 10:
            timed = {OURS: noprop_steps(state, batch)}
            timed |= {
                name: times(contestants[name]) for name in (IN_TURN, AT_ONCE, TWIN, CHECKPOINTED, PARTS)
            }
            seconds = {name: statistics.median(x) for name, x in interleaved(timed, 3).items()}
            for name, value in seconds.items():
                ratio = value / seconds[TWIN]
                report(f"T = 10: time of a step of {batch_size} ÷ {TWIN}, {name}", ratio, f"{ratio:.2f}")


def original() -> float:
    """Seconds that the recipe we started from would take here: 100 epochs × 10 blocks × 469 batches of 128.

    Each is a training step of one 628 k block and a forward pass of the last block without gradient. The
    block is ours of that size, which pools before its batch norm and so costs less than the original's.
    """
    block = noprop.build(noprop.Config.reference(num_blocks=1), DEVICE).blocks[0]
    last, optimizer = copy.deepcopy(block), torch.optim.AdamW(block.parameters(), lr=0.01)
    (image, label), alpha_bar, loss_of = random_batch(128), noprop.cosine_schedule(10), noprop.Hybrid()
    W, noise = torch.randn(10, 20, device=DEVICE), torch.randn(128, 20, device=DEVICE)

    def one() -> None:
        optimizer.zero_grad()
        loss, _ = loss_of.block_loss(block, 5, alpha_bar, image, label, W, lambda *_: noise)
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            last(image, noise, 0.9)

    measured = interleaved({"step": one}, 15)["step"]
    return statistics.median(measured) * 100 * 10 * 469


def selected_time(history: list[dict], images: int, accuracy: float) -> float | None:
    """Seconds of training until the weights that validation selects so far have this test accuracy."""
    best = 0.0
    for record in history:
        best = max(best, record["val_accuracy"])
        chosen = record["val_accuracy"] >= best - noprop.standard_error(best, images)
        if chosen and record["test_accuracy"] >= accuracy:
            return record["seconds"]
    return None


def runs(number: int) -> None:
    """Whole runs of the script, or, on a GPU, of the lab with graphs, beside the original's cost."""
    totals, costs, summaries = [], [], []
    for seed in range(number):
        folder = Path("runs") / "speed" / f"seed{seed}"
        costs.append(original())
        started = time.perf_counter()
        program = ["-m", "noprop_lab", "train", "--graphs"] if DEVICE.type == "cuda" else [noprop.__file__]
        command = [sys.executable, *program, f"--seed={seed}", f"--output-dir={folder}", f"--device={DEVICE}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
        totals.append(time.perf_counter() - started)
        costs.append(original())
        summaries.append(json.loads((folder / "noprop_hybrid.json").read_text()))
        print(
            f"seed {seed}: {totals[-1]:.0f} s, test {summaries[-1]['test_accuracy']:.2f} %", file=sys.stderr
        )
    report("default run: seconds, process start to last file, by seed", totals, spread(sorted(totals), 1, 0))
    hours = [x / 3600 for x in costs]  # before and after each run
    text = f"{min(hours):.1f} to {max(hours):.1f}"
    report("original recipe, hours (100 epochs × 10 blocks × 469 steps), by timing", hours, text)
    pairs = zip(costs[::2], costs[1::2], totals, strict=True)
    ratio = statistics.median((before + after) / 2 / total for before, after, total in pairs)
    report("original recipe's cost ÷ our whole run", ratio, f"{ratio:.0f}")
    for accuracy in (99.0, 99.4, 99.5):
        reached = [selected_time(x["history"], 5000, accuracy) for x in summaries]
        text = ", ".join("never" if x is None else f"{x:.0f}" for x in reached)
        report(f"default run: seconds of training to {accuracy} % test, by seed", reached, text)
    mean = statistics.mean(x["test_accuracy"] for x in summaries)
    report(f"default run: test accuracy, mean of {number}", mean, f"{mean:.2f}")


def inference(number: int) -> None:
    """Images a second, blocks an image: the chain, one block, early exit, with the networks of "runs"."""
    data = noprop.load_data(Config(), device=DEVICE)
    models = [
        noprop.load(Path("runs/speed") / f"seed{seed}" / "noprop_hybrid.pt", DEVICE) for seed in range(number)
    ]
    one = copy.deepcopy(models[0])
    one.blocks, one.steps = one.blocks[:1], one.steps[:1]
    for size in (1, 1000):
        images = data.test.images[:size]
        seconds = interleaved(
            {
                "chain": lambda i=images: models[0].predict(i),
                "block 1": lambda i=images: one.predict(i),
                "early exit at 0.9": lambda i=images: early_exit(models[0], i, 0.9),
            },
            25,
        )
        for name, values in seconds.items():
            rate = size / statistics.median(values)
            report(f"images a second, batch {size}, {name}", rate, f"{rate:,.0f}")
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0):
        columns = []
        for split in (data.val, data.test):
            results = [early_exit(model, split.images, threshold) for model in models]
            right = [100 * (p.argmax(-1) == split.labels).float().mean().item() for p, _ in results]
            columns.append(statistics.mean(right))
        blocks = statistics.mean(used.float().mean().item() for _, used in results)
        text = f"{blocks:.2f} blocks an image, validation {columns[0]:.2f} %, test {columns[1]:.2f} %"
        found = {"blocks": blocks, "validation": columns[0], "test": columns[1]}
        report(f"early exit at probability {threshold}", found, text)


def name_of_machine() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    held = "held-to-" if "ATEN_CPU_CAPABILITY" in os.environ else ""  # by hand: the chip has more
    return f"{platform.machine()}-{held}{torch.backends.cpu.get_cpu_capability().lower()}-{THREADS}-cores"


def keep(path: Path, part: str) -> None:
    """Write what has been measured, the part last, over what is there of it, and beside that of others."""
    RESULTS["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    kept = json.loads(path.read_text()) if path.exists() else {}
    own = {"runs": ("default run", "original recipe"), "profile": ("share of a step",)}.get(part, ())
    kept = {name: x for name, x in kept.items() if not name.startswith(own)}  # whose names change
    made = RESULTS["versions"] | {name: x for name, x in RESULTS.items() if name.startswith("float32 matmul")}
    by_part = kept.get("versions by part", {}) | {part: made}
    path.write_text(json.dumps(kept | RESULTS | {"versions by part": by_part}, indent=1) + "\n")


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("machine", "step", "graphs", "compiled", "profile", "memory", "runs", "inference")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=3, help="whole runs, and networks that are asked")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    arguments = parser.parse_args()
    DEVICE = noprop.pick_device(noprop.Options(device=arguments.device))
    chosen = [part for part in arguments.parts if part != "graphs" or DEVICE.type == "cuda"]
    path = Path(__file__).parent / "results" / f"speed-{name_of_machine()}.json"
    if "runs" in chosen:
        refuse_fewer(path, "default run: seconds of training to 99.0 % test, by seed", arguments.seeds)
    print("| | |\n|---|---|")
    for part in (machine, step, graphs, compiled, profile, memory, runs, inference):
        if part.__name__ in chosen:
            part(arguments.seeds) if part in (runs, inference) else part()
            keep(path, part.__name__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
