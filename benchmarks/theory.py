"""Does a trained chain do what an ideal one does? See docs/evidence.md, "What a block can learn".

    python benchmarks/theory.py mnist                            the chains that benchmarks/control.py trained
    python benchmarks/theory.py fashion_mnist --data-root DIR

On the 5,000 validation images. A block's class probabilities are π = û W⁺, clipped at a floor and normalised
again: û is linear, and what is below that is its error. The values of every seed go to benchmarks/results/.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import noprop_example as noprop
from benchmarks.control import DATASETS, RESULTS, chain, path_of
from benchmarks.seeds import mean_and_error, refuse_fewer, write
from noprop_lab import networks
from noprop_lab.data import load_data
from noprop_lab.settings import LabConfig

FLOORS, DRAWS = (1e-3, 1e-2), 3  # the table has the first, the results file both


def formula(log_p: Tensor, W: Tensor, alpha_bar: Tensor) -> Tensor:
    """π_t = softmax(log p_t + SNR_{t-1} (G π̄_{t-1} - ½ diag G)), G = W Wᵀ, π̄ the mean of earlier π, π̄_0 = 0.

    log_p: of block t's own opinion of the image, up to a constant, (B, T, classes), as is the result. W:
    (classes, D); alpha_bar: (T+1,).
    """
    G, found = W @ W.T, []
    for t in range(log_p.shape[1]):
        before = torch.stack(found).mean(0) if found else torch.zeros_like(log_p[:, 0])
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        found.append((log_p[:, t] + snr * (before @ G - G.diag() / 2)).softmax(-1))
    return torch.stack(found, 1)


def interaction(log_pi: Tensor) -> float:
    """Share of x × z in a two-way analysis of variance of log-odds; log_pi: (images, labels z, classes)."""
    odds = log_pi - log_pi.mean(-1, keepdim=True)
    odds = odds - odds.mean((0, 1))
    rest = odds - odds.mean(0) - odds.mean(1, keepdim=True)
    return (rest.square().sum() / odds.square().sum()).item()


class Reader:
    """A trained chain on images, read block by block; block t's estimate is f(x, z) = û."""

    @torch.inference_mode()
    def __init__(self, model: noprop.NoProp, split: noprop.Split, floor: float):
        self.floor, self.model, self.labels, self.W = (
            floor,
            model,
            split.labels,
            model.label_embedding.weight.detach(),
        )
        self.inverse, self.noise = torch.linalg.pinv(self.W), noprop.generator("theory")
        batches = [noprop.to_float(x) for x in split.images.split(500)]
        self.zero = torch.zeros(len(split.labels), self.W.shape[1])
        self.features = [torch.cat([block.image(x) for x in batches]) for block in model.blocks]

    def u_hat(self, t: int, z: Tensor, rows=slice(None)) -> Tensor:
        """û_t (B, D) of z_{t-1} (B, D), for these rows of the images."""
        block = self.model.blocks[t - 1]
        return block.head(torch.cat([self.features[t - 1][rows], block.label(z)], 1))

    def clipped(self, pi: Tensor) -> Tensor:
        """log π, at least log floor."""
        pi = pi.clamp_min(self.floor)
        return (pi / pi.sum(-1, keepdim=True)).log()

    def log_pi(self, t: int, z: Tensor, rows=slice(None)) -> Tensor:
        """log π_t (B, classes)."""
        return self.clipped(self.u_hat(t, z, rows) @ self.inverse)

    def log_q(self, t: int, z: Tensor) -> Tensor:
        """log q(z_{t-1} | k) of every class k, up to a constant, (B, classes)."""
        level = self.model.alpha_bar[t - 1].item()
        squares = self.W.square().sum(1)
        return (level**0.5 * z @ self.W.T - level * squares / 2) / (1 - level)

    def noisy(self, t: int, label: Tensor) -> Tensor:
        """z_{t-1} ~ q(z | label), (B, D)."""
        noise = torch.randn(len(label), self.W.shape[1], generator=self.noise)
        return noprop.noisy_label(self.W[label], noise, self.model.alpha_bar[t - 1].item())

    def along(self) -> Tensor:
        """log π_t of the chain as it is used, (N, T, classes)."""
        z, found = self.zero, []
        for t, (_, a, b, _) in enumerate(self.model.steps, start=1):
            u_hat = self.u_hat(t, z)
            z = a * u_hat + b * z
            found.append(self.clipped(u_hat @ self.inverse))
        return torch.stack(found, 1)

    def opinion(self, t: int, at_zero: bool) -> Tensor:
        """log p_t (N, classes): the block's log π less log q, at z = 0, or on average over z ~ q(z | j)."""
        labels = [torch.full_like(self.labels, j) for j in range(len(self.W)) for _ in range(DRAWS)]
        z = [self.zero] if at_zero else [self.noisy(t, label) for label in labels]
        return torch.stack([self.log_pi(t, x) - self.log_q(t, x) for x in z]).mean(0)

    def pairs(self, t: int, images: int = 300) -> tuple[Tensor, Tensor]:
        """log π_t, and log q, of each of some images with each of thirty z, (images, 30, classes)."""
        z = self.noisy(t, torch.arange(len(self.W)).repeat(DRAWS))
        rows = slice(0, images)
        found = [self.log_pi(t, x.expand(images, -1), rows) for x in z]
        return torch.stack(found, 1), self.log_q(t, z).expand(images, -1, -1)


@torch.inference_mode()
def measure(model: noprop.NoProp, split: noprop.Split, floor: float) -> dict[str, list[float]]:
    """Each measure, a value a block."""
    reader, blocks, found = Reader(model, split, floor), range(1, len(model.blocks) + 1), {}
    along = reader.along()
    at_zero, over_z = (torch.stack([reader.opinion(t, x) for t in blocks], 1) for x in (True, False))
    before = along.exp().cumsum(1) / torch.arange(1, len(blocks) + 1)[:, None]  # means of π_1 ... π_t
    predictions = {
        "formula, p at z = 0": formula(at_zero, reader.W, model.alpha_bar),
        "formula, p over z": formula(over_z, reader.W, model.alpha_bar),
        "formula, block 1's p": formula(at_zero[:, :1].expand_as(at_zero), reader.W, model.alpha_bar),
        "block t from z = 0": torch.stack([reader.log_pi(t, reader.zero) for t in blocks], 1).exp(),
        "mean of blocks 1 … t-1": torch.cat([before[:, :1], before[:, :-1]], 1),
        "block 1": along[:, :1].exp().expand_as(along),
    }
    for name, pi in predictions.items():
        pi = reader.clipped(pi)
        equal = (pi.argmax(-1) == along.argmax(-1)).double().mean(0)
        found[f"answers equal, %: {name}"] = (100 * equal).tolist()
        found[f"distance: {name}"] = ((pi.exp() - along.exp()).abs().sum(-1) / 2).mean(0).tolist()
    wrong = (split.labels + torch.randint(1, 10, split.labels.shape, generator=reader.noise)) % 10
    for name in ("follows a wrong z, %", "the same, ideal", "interaction, %", "interaction, ideal, %"):
        found[name] = []
    for t in blocks:
        z, p = reader.noisy(t, wrong), at_zero[:, t - 1]
        log_pi, log_q = reader.pairs(t)
        ideal = reader.clipped((p[: len(log_q), None] + log_q).softmax(-1))
        follows = reader.log_pi(t, z).argmax(-1) == wrong, (p + reader.log_q(t, z)).argmax(-1) == wrong
        values = [x.double().mean().item() for x in follows] + [interaction(log_pi), interaction(ideal)]
        for name, value in zip(list(found)[-4:], values, strict=True):
            found[name].append(100 * value)
    return found


def gram_of(model: noprop.NoProp) -> list[float]:
    """Of the learned embedding: smallest and largest squared length, largest product of two rows."""
    G = (model.label_embedding.weight @ model.label_embedding.weight.T).detach()
    apart = (G - G.diag().diag()).abs().max()
    return [round(x.item(), 3) for x in (G.diag().min(), G.diag().max(), apart)]


def table(by_seed: list[dict[str, list[float]]]) -> str:
    """The Markdown table: a measure a row, a block a column; means, and a row's largest standard error."""
    T = len(next(iter(by_seed[0].values())))
    lines = [f"| block | {' | '.join(str(t + 1) for t in range(T))} | ± at most |", "|---" * (T + 2) + "|"]
    for name in by_seed[0]:
        digits = 3 if name.startswith("distance") else 1
        means, errors = zip(*(mean_and_error([x[name][t] for x in by_seed]) for t in range(T)), strict=True)
        cells = [f"{x:.{digits}f}" for x in (*means, max(errors))]
        lines.append(f"| {name} | {' | '.join(cells).removesuffix('nan')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data-root", type=Path, default=noprop.Options.data_root)
    given = parser.parse_args()
    data = load_data(LabConfig(dataset=given.dataset), given.data_root)
    configs = [x for replicate in range(5) for x in chain(given.dataset, replicate, LabConfig.lr)]
    paths = [path for path in map(path_of, configs) if path.exists()]
    if not paths:
        parser.error("runs/control below this folder has no network of NoProp: control.py trains them")
    refuse_fewer(path := RESULTS / f"theory-{given.dataset}.json", "seeds", len(paths))
    models = [networks.load(path) for path in paths]
    by_floor = {x: [measure(model, data.val, x) for model in models] for x in FLOORS}
    gram = {path.name: gram_of(model) for path, model in zip(paths, models, strict=True)}
    seeds = [model.config.seed for model in models]
    kept = {"command": f"theory.py {given.dataset}", "seeds": seeds} | noprop.made_with(noprop.CPU)
    kept |= {"smallest, largest square, largest product": gram}
    kept |= {"by floor, by seed": by_floor}
    path.write_text(json.dumps(kept) + "\n")
    noprop.say(text := table(by_floor[FLOORS[0]]))
    write(f"theory {given.dataset}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
