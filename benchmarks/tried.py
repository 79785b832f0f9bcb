"""What makes a step faster, and what was tried and left out: each in turn with what the script has.

    python benchmarks/tried.py    two minutes; table in docs/speed.md, values in benchmarks/results/tried.json

Of the default's small block, 512 images, on one thread: a forward and a backward pass, and what follows them.
A way that is to compute the same as the script's is first checked to do so, up to rounding. Memory that is
kept can't be undone in a process, so these two ways are a process each, in turn.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.machine import matmul_peak
from benchmarks.seeds import refuse_fewer, write
from benchmarks.speed import interleaved

PAIRS = 9  # of processes, for what memory that is kept saves
OURS = "as the script has it"
IMAGES = torch.rand(512, 1, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.randn(512, 20, generator=torch.Generator().manual_seed(1))


# --- Ways to compute the same ------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A max-pool of 2 as the largest of four shifted images."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class Amax(nn.Module):
    """A max-pool of 2 as the maximum over two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-3, -1))


class Comparison(torch.autograd.Function):
    """A max-pool of 2 whose gradient goes where input and output are equal, in place of by indices."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = F.max_pool2d(x, 2)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        y, gradient = (F.interpolate(v, scale_factor=2.0) for v in (y, gradient))
        return torch.where(x == y, gradient, 0)


class Compared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Comparison.apply(x)


class Patches(nn.Module):
    """A convolution of stride 1 without padding, as a product of patches with its weights."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.size = conv.weight, conv.kernel_size[0]

    def forward(self, x: Tensor) -> Tensor:
        patches = x.permute(0, 2, 3, 1).unfold(1, self.size, 1).unfold(2, self.size, 1)  # (B, H, W, C, k, k)
        return (patches.flatten(3) @ self.weight.flatten(1).T).permute(0, 3, 1, 2)


class SpaceToDepth(nn.Module):
    """A convolution of stride 2, 5 by 5 on one channel, as one of stride 1, 3 by 3 on four half as large."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight = F.pixel_unshuffle(F.pad(conv.weight.detach(), (0, 1, 0, 1)), 2)  # (16, 4, 3, 3)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last), self.weight)


def with_layers(block: nn.Module, kind: type, make: Callable, which=lambda layer: True) -> nn.Module:
    """A copy of the block in which layers of that kind are others."""
    block = copy.deepcopy(block)
    for i, layer in enumerate(block.image):
        if isinstance(layer, kind) and which(layer):
            block.image[i] = make(layer)
    return block


def pool_after_norm(block: nn.Module) -> nn.Module:
    """A copy with the pool where it usually is, after batch norm and ReLU, on four times the pixels."""
    block = copy.deepcopy(block)
    conv, pool, norm, relu, *rest = block.image
    block.image = nn.Sequential(conv, norm, relu, pool, *rest)
    return block


def blocks() -> dict[str, nn.Module]:
    """The script's block, and others; all but the last compute the same."""
    ours = noprop.State(noprop.Config(num_blocks=1)).model.blocks[0]
    return {
        OURS: copy.deepcopy(ours),  # whose gradients are no views, as those of the others
        "pool: the largest of four shifted images": with_layers(ours, nn.MaxPool2d, lambda _: Shifted()),
        "pool: the maximum over two axes (amax)": with_layers(ours, nn.MaxPool2d, lambda _: Amax()),
        "pool: gradient by comparing, no indices": with_layers(ours, nn.MaxPool2d, lambda _: Compared()),
        "ReLU in place": with_layers(ours, nn.ReLU, lambda _: nn.ReLU(inplace=True)),
        "second and third convolution: products of patches": with_layers(
            ours, nn.Conv2d, Patches, lambda layer: layer.in_channels > 1
        ),
        "first convolution: on four half-sized channels": with_layers(
            ours, nn.Conv2d, SpaceToDepth, lambda layer: layer.in_channels == 1
        ),
        "images one after another in memory, not channels_last": copy.deepcopy(ours).to(
            memory_format=torch.contiguous_format
        ),
        "pool after batch norm and ReLU (another function)": pool_after_norm(ours),
    }


def passes(block: nn.Module) -> tuple[Tensor, Tensor]:
    """A forward and a backward pass; ε̂, and the gradient of the first convolution."""
    block.zero_grad(set_to_none=False)
    eps_hat = block(IMAGES, LABELS, 0.5)
    eps_hat.square().mean().backward()
    return eps_hat.detach(), block.image[0].weight.grad


def check(found: dict[str, nn.Module]) -> None:
    """Raise AssertionError where a way does not compute what the script's block does."""
    expected = [x.clone() for x in passes(copy.deepcopy(found[OURS]))]
    for name, block in list(found.items())[:-1]:
        eps_hat, gradient = passes(copy.deepcopy(block))
        if gradient.shape[1] == 4:  # of SpaceToDepth
            gradient = F.pixel_shuffle(gradient, 2)[..., :5, :5]
        for x, y in zip((eps_hat, gradient), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5, msg=name)


# --- What follows the passes, and memory -------------------------------------------------------------------


def updates() -> dict[str, Callable[[], object]]:
    """Clip, step and average of a block: of one vector, as the script does it, and of a tensor each."""
    state = noprop.State(noprop.Config(num_blocks=1))
    averaged, block = (noprop.build(noprop.Config(num_blocks=1)).blocks[0] for _ in range(2))
    parameters, decay = list(block.parameters()), state.config.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay, fused=True)
    pairs = list(zip(averaged.parameters(), parameters, strict=True))
    pairs += [(x, y) for x, y in zip(averaged.buffers(), block.buffers(), strict=True) if x.ndim]
    for x in parameters:
        x.grad = torch.full_like(x, 1e-3)

    def each() -> None:
        nn.utils.clip_grad_norm_(parameters, state.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for x, y in pairs:
            x.data.lerp_(y.data, 0.01)

    return {OURS: lambda: state.update("blocks.0", 0.01), "a tensor each": each}


def seconds_in_a_process(kept: bool) -> float:
    """Median seconds of the passes, in a process that keeps freed memory, or does not."""
    command = [sys.executable, __file__, "--child", "kept" if kept else "freed"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(kept: bool) -> None:
    """Print the median seconds of the passes."""
    block = blocks()[OURS]
    torch.set_num_threads(1)
    with noprop.workers(noprop.CPU, 1) if kept else nullcontext():
        print(statistics.median(interleaved({"": lambda: passes(block)}, 15)[""]))


# --- Report ------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--child", choices=["kept", "freed"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child == "kept")
        return 0
    path = Path(__file__).parent / "results" / "tried.json"
    refuse_fewer(path, "rounds", given.rounds)
    check(found := blocks())
    with noprop.workers(noprop.CPU, 1):
        measured = interleaved({name: lambda x=x: passes(x) for name, x in found.items()}, given.rounds)
        after = interleaved({name: lambda x=x: [x() for _ in range(20)] for name, x in updates().items()}, 25)
    memory = [[seconds_in_a_process(kept) for kept in (True, False)] for _ in range(PAIRS)]
    kept, freed = zip(*memory, strict=True)
    seconds = {f"passes, {name}": x for name, x in measured.items()}
    seconds |= {f"update, {name}": [s / 20 for s in x] for name, x in after.items()}
    seconds |= {"passes, memory kept": kept, "passes, memory given back": freed}
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    content = {"rounds": given.rounds, "peak_gflops": (peak := matmul_peak()), "seconds": seconds}
    text = json.dumps(content | noprop.made_with(noprop.CPU), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    whole = medians[f"passes, {OURS}"] + medians[f"update, {OURS}"]
    lines = [
        "| one block, 512 images, one thread | ms | passes and update, ÷ the script's |",
        "|---|---|---|",
    ]
    for name, median in medians.items():
        part, way = name.split(", ", 1)
        less = medians["passes, memory kept"] if ", memory " in name else medians[f"{part}, {OURS}"]
        lines.append(f"| {name} | {1e3 * median:.1f} | {1 + (median - less) / whole:.2f} |")
    lines += ["", f"Matmul peak of all cores right after it: {peak:.0f} GFLOP/s."]
    noprop.say(table := "\n".join(lines))
    write("tried", table, "speed.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
