"""Where time and memory go, and what the rivals need: every figure beside its rival's in the same run.

    python benchmarks/speed.py                        everything (about 20 minutes on two cores)
    python benchmarks/speed.py --parts step memory    some of it

Writes benchmarks/results/speed-MACHINE.json and prints a Markdown table. Times are medians of interleaved
repeats, with the range between their quartiles. Nothing else should compute meanwhile. Images are random
except in the parts "runs" and "inference", which train on MNIST and ask what they trained.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from noprop_example import PRESETS, Config, Training

DEVICE = noprop.pick_device("auto")
THREADS = torch.get_num_threads()
NAME = (
    f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability().lower()}-{THREADS}-cores"
    if DEVICE.type == "cpu"
    else torch.cuda.get_device_name().replace(" ", "-").lower()
)
RESULTS: dict = {}  # what is printed and written


def report(name: str, value, text: str) -> None:
    """Keep a figure and print its row."""
    RESULTS[name] = value
    print(f"| {name} | {text} |", flush=True)


def preset(name: str, **changes) -> Config:
    return replace(Config(preset=name, **PRESETS[name]), **changes)


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


# --- Contestants -------------------------------------------------------------------------------------------


@contextmanager
def parallel(threads: int = THREADS):
    """The thread pool of the script, for calls in which nothing else is timed."""
    with noprop.workers(DEVICE, threads) as pool:
        yield pool


STEPS = 8  # in one call, so that starting threads does not count


def times(step: Callable[[], object]) -> Callable[[], None]:
    """A call of STEPS steps."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def noprop_steps(training: Training, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A call that makes STEPS steps of the script's own training, blocks side by side."""

    def steps() -> None:
        with parallel() as pool:
            times(lambda: noprop.train_step(training, *batch, 1e-3, pool))()

    return steps


class Backprop:
    """The same network trained end to end: cross-entropy after the chain, through all of its reverse steps.

    With num_blocks=1 it is a plain CNN of one block's size. AdamW, clip, learning rate, averaging and
    augmentation are those of the script.
    """

    def __init__(self, config: Config):
        self.config = config
        self.model = noprop.build(config).to(DEVICE)
        self.averaged = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), weight_decay=config.weight_decay, fused=DEVICE.type in ("cpu", "cuda")
        )
        pairs = zip(self.averaged.state_dict().values(), self.model.state_dict().values(), strict=True)
        self.pairs = [list(x) for x in zip(*(p for p in pairs if p[0].is_floating_point()), strict=True)]
        self.taken = 0

    def step(self, image: Tensor, label: Tensor, lr: float, parts: int = 1) -> None:
        """One optimizer step on a batch, its gradient accumulated over so many parts of it."""
        for x, y in zip(image.chunk(parts), label.chunk(parts), strict=True):
            F.cross_entropy(self.model(x)[:, -1], y).mul(len(y) / len(label)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.config.ema_decay, (1 + self.taken) / (10 + self.taken))
        torch._foreach_lerp_(*self.pairs, 1 - decay)
        self.taken += 1

    def train(self, data: noprop.Data) -> list[dict[str, float]]:
        """Train for the config's epochs; one record an epoch, evaluated like the script's."""
        config, (images, labels), history, seconds = self.config, data.train, [], 0.0
        steps = len(labels) // config.batch_size
        for epoch in range(config.epochs):
            started = time.perf_counter()
            order = torch.randperm(len(labels), generator=noprop.generator(config.seed, "order", epoch)).to(
                DEVICE
            )
            for batch in order.split(config.batch_size)[:steps]:
                image = noprop.to_float(images[batch])
                if config.augment:
                    image = noprop.augment(image, noprop.generator(config.seed, "augment", self.taken))
                lr = noprop.learning_rate(self.taken / (steps * config.epochs), config)
                self.step(image, labels[batch], lr)
            synchronize()
            seconds += time.perf_counter() - started
            with parallel() as pool:
                val, test = (noprop.evaluate(self.averaged, split, config, pool) for split in data[1:])
            history.append(
                {"val": val["accuracy"][-1], "test_accuracy": test["accuracy"][-1], "seconds": seconds}
            )
        return history


# --- Parts -------------------------------------------------------------------------------------------------


def machine() -> None:
    """Matmul peaks, float32 and bfloat16."""
    report("cores used", THREADS, f"{THREADS}")
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.rand(1024, 1024, device=DEVICE).to(dtype)
        seconds = interleaved({"matmul": lambda a=a: a @ a}, 30)["matmul"]
        name = str(dtype).split(".")[1]
        report(
            f"{name} matmul peak, GFLOP/s", 2e-9 * 1024**3 / seconds[0], f"{2e-9 * 1024**3 / seconds[0]:.0f}"
        )


def step(rounds: int = 9) -> None:
    """Time and model-FLOPs utilisation of a training step; against the naive order and the backprop twin."""
    a, peak = torch.rand(1024, 1024, device=DEVICE), RESULTS.get("float32 matmul peak, GFLOP/s", 0)
    for name in ("default", "accurate", "reference"):
        config = preset(name)
        batch, training, twin = random_batch(config.batch_size), Training(config, DEVICE), Backprop(config)
        work = flops(lambda t=training, b=batch: noprop.train_step(t, *b, 1e-3))
        twin_work = flops(lambda t=twin, b=batch: t.step(*b, 1e-3))
        seconds = interleaved(
            {
                "ours": noprop_steps(training, batch),
                "in turn": times(lambda t=training, b=batch: noprop.train_step(t, *b, 1e-3)),
                "twin": times(lambda t=twin, b=batch: t.step(*b, 1e-3)),
                "matmul": times(lambda: a @ a),
            },
            rounds if name == "default" else 3,
        )
        ours, in_turn, twins, matmul = ([x / STEPS for x in values] for values in seconds.values())
        peak = max(peak, 2e-9 * 1024**3 / matmul[0])
        rate = work / statistics.median(ours) / 1e9
        report(f"{name}: GFLOP a step of {config.batch_size} images", work / 1e9, f"{work / 1e9:.2f}")
        report(f"{name}: ms a step", statistics.median(ours) * 1e3, spread(ours))
        report(f"{name}: MFU", rate / peak, f"{rate / peak:.0%} of {peak:.0f} GFLOP/s")
        report(f"{name}: ms a step, blocks in turn, each on all cores", in_turn, spread(in_turn))
        report(f"{name}: ms a step, backprop twin", twins, spread(twins))
        ratio = statistics.median(ours) / statistics.median(twins)
        report(f"{name}: ours ÷ twin, time (FLOPs: {work / twin_work:.2f})", ratio, f"{ratio:.2f}")


def profile(repeats: int = 10) -> None:
    """Shares of a default step's time by operator, on one thread."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    config = preset("default")
    training, batch = Training(config, DEVICE), random_batch(config.batch_size)
    torch.set_num_threads(1)
    noprop.train_step(training, *batch, 1e-3)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profiler(activities=activities) as trace:
        for _ in range(repeats):
            noprop.augment(batch[0], noprop.generator("profile"))
            noprop.train_step(training, *batch, 1e-3)
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


def all_blocks_at_once(training: Training, image: Tensor, label: Tensor) -> None:
    """The losses of all blocks added up before one backward pass: the naive way to write NoProp."""
    model, config = training.model, training.config
    u, loss = model.label_embedding(label), 0
    for block, level in zip(model.blocks, model.alpha_bar.tolist(), strict=False):
        noise = torch.randn(u.shape, device=u.device)
        loss = (
            loss
            + noprop.block_loss(block, image, u, noise, level, config.eta_loss_weight, config.lambda_global)[
                0
            ]
        )
    loss.backward()


def memory(batch_size: int = 256) -> None:
    """Peak bytes of activations kept for the backward pass, by T, and what equal memory costs the twin."""
    batch, first = random_batch(batch_size), {}
    for blocks in (1, 2, 5, 10, 20, 50):
        config = preset("default", num_blocks=blocks, batch_size=batch_size)
        training, twin = Training(config, DEVICE), Backprop(config)
        contestants = {
            "one block after another": lambda t=training: noprop.train_step(t, *batch, 1e-3),
            "all losses in one backward pass": lambda t=training: all_blocks_at_once(t, *batch),
            "backprop twin": lambda t=twin: t.step(*batch, 1e-3),
            "backprop twin, T parts accumulated": lambda t=twin, b=blocks: t.step(*batch, 1e-3, parts=b),
        }
        row = []
        for name, call in contestants.items():
            mib = peak_bytes(twin.model if "twin" in name else training.model, call) / 2**20
            RESULTS[f"T = {blocks}: activations in MiB, {name}"] = mib
            first.setdefault(name, mib)
            row.append(f"{name} {mib:.1f}")
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                RESULTS[f"T = {blocks}: CUDA MiB, {name}"] = torch.cuda.max_memory_allocated() / 2**20
        print(f"| T = {blocks}: MiB of activations, {batch_size} images | {'; '.join(row)} |", flush=True)
        if blocks == 50:
            ratio = (
                RESULTS["T = 50: activations in MiB, one block after another"]
                / first["one block after another"]
            )
            report("activations, T = 50 ÷ T = 1, one block after another", ratio, f"{ratio:.2f}")
        if blocks == 10:
            seconds = interleaved(
                {
                    "ours": noprop_steps(training, batch),
                    "whole": times(lambda t=twin: t.step(*batch, 1e-3)),
                    "parts": times(lambda t=twin: t.step(*batch, 1e-3, parts=10)),
                },
                3,
            )
            ours, whole, parts = (statistics.median(x) for x in seconds.values())
            report("T = 10: twin in ten parts ÷ twin, time", parts / whole, f"{parts / whole:.2f}")
            report("T = 10: ours ÷ twin in ten parts, time", ours / parts, f"{ours / parts:.2f}")


def original() -> float:
    """Hours that the recipe we started from would take here: 100 epochs × 10 blocks × 469 batches of 128.

    Each is a training step of one 628 k block and a forward pass of the last block without gradient. The
    block is ours of that size, which pools before its batch norm and so costs less than the original's.
    """
    block = noprop.DenoisingBlockPaper(**noprop.BLOCKS["reference"], target="noise").to(DEVICE)
    last, optimizer = copy.deepcopy(block), torch.optim.AdamW(block.parameters(), lr=0.01)
    image, _ = random_batch(128)
    u, noise = torch.randn(2, 128, 20, device=DEVICE)

    def one() -> None:
        optimizer.zero_grad()
        loss, _ = noprop.block_loss(block, image, u, noise, 0.5, 2.0, 1.0)
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            last(image, u, 0.9)

    measured = interleaved({"step": one}, 15)["step"]
    seconds = statistics.median(measured) * 100 * 10 * 469
    report("original recipe, ms a block step", statistics.median(measured) * 1e3, spread(measured))
    report(
        "original recipe, hours (100 epochs × 10 blocks × 469 steps)", seconds / 3600, f"{seconds / 3600:.1f}"
    )
    return seconds


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
    """Whole runs of the script, process start to last file, beside the original's cost and two rivals."""
    totals, ratios, summaries = [], [], []
    script = Path(noprop.__file__)
    for seed in range(number):
        folder = Path("runs") / "speed" / f"seed{seed}"
        cost = original()
        started = time.perf_counter()
        command = [sys.executable, str(script), "--seed", str(seed), "--output-dir", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        totals.append(time.perf_counter() - started)
        ratios.append((cost + original()) / 2 / totals[-1])
        summaries.append(json.loads((folder / "noprop_hybrid.json").read_text()))
        print(
            f"seed {seed}: {totals[-1]:.0f} s, test {summaries[-1]['test_accuracy']:.2f} %", file=sys.stderr
        )
    report(
        "default run: seconds, process start to last file",
        statistics.median(totals),
        spread(sorted(totals), 1, 0),
    )
    ratio = statistics.median(ratios)
    report("original recipe's cost ÷ our whole run", ratio, f"{ratio:.0f}")
    for accuracy in (99.0, 99.4, 99.5):
        reached = [selected_time(x["history"], 5000, accuracy) for x in summaries]
        text = ", ".join("never" if x is None else f"{x:.0f}" for x in reached)
        report(f"default run: seconds of training to {accuracy} % test, by seed", reached, text)
    mean = statistics.mean(x["test_accuracy"] for x in summaries)
    report(f"default run: test accuracy, mean of {number}", mean, f"{mean:.2f}")
    data = noprop.load_mnist(Config().data_root, DEVICE)
    for name, blocks in (("backprop twin, ten blocks", 10), ("plain CNN of one block's size", 1)):
        history = Backprop(preset("default", num_blocks=blocks)).train(data)
        last = history[-1]
        text = f"{last['test_accuracy']:.2f} % after {last['seconds']:.0f} s"
        RESULTS[f"{name}: history, seed 0"] = history
        report(f"{name}: 12 epochs, seed 0", last["test_accuracy"], text)


def inference(number: int) -> None:
    """Images a second, blocks an image: the chain, one block, early exit, with the networks of "runs"."""
    data = noprop.load_mnist(Config().data_root, DEVICE)
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
                "early exit at 0.9": lambda i=images: models[0].predict(i, 0.9),
            },
            25,
        )
        for name, values in seconds.items():
            rate = size / statistics.median(values)
            report(f"images a second, batch {size}, {name}", rate, f"{rate:,.0f}")
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0):
        columns = []
        for split in (data.val, data.test):
            results = [model.early_exit(split.images, threshold) for model in models]
            right = [100 * (p.argmax(-1) == split.labels).float().mean().item() for p, _ in results]
            columns.append(statistics.mean(right))
        blocks = statistics.mean(used.float().mean().item() for _, used in results)
        text = f"{blocks:.2f} blocks an image, validation {columns[0]:.2f} %, test {columns[1]:.2f} %"
        report(f"early exit at probability {threshold}", blocks, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("machine", "step", "profile", "memory", "runs", "inference")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=3, help="whole runs, and networks that are asked")
    arguments = parser.parse_args()
    print("| | |\n|---|---|")
    for part in (machine, step, profile, memory):
        if part.__name__ in arguments.parts:
            part()
    for part in (runs, inference):
        if part.__name__ in arguments.parts:
            part(arguments.seeds)
    RESULTS["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    (folder := Path(__file__).parent / "results").mkdir(exist_ok=True)
    path = folder / f"speed-{NAME}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}  # of other parts, measured earlier
    path.write_text(json.dumps(kept | RESULTS, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
