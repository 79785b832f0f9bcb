"""The hybrid loss in two thirds of the steps: InfoBatch (Qin et al., arXiv 2303.04947).

In each epoch an image whose loss, when last seen, was below the mean is left out with probability r. Where it
is not, it stands for those that are, with weight 1 / (1 - r): the gradient's expectation stays. An image's
loss is the sum of its blocks' (without that of the classifier). The last epochs, after δ of them, take all.

AdamW cares little for a gradient's size, so that fewer steps are less movement: docs/speed.md measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import noprop_example as noprop
from noprop_example import State, generator
from noprop_lab.dt import classified, seed_dropout
from noprop_lab.settings import LabConfig


@dataclass(frozen=True)
class InfoBatchConfig(LabConfig):
    """What decides the result; it is saved with the network. For the hybrid loss with InfoBatch."""

    objective: ClassVar[str] = "infobatch"
    # Objective
    prune_ratio: float = 0.5  # r, of the images with a loss below the mean, that an epoch leaves out
    anneal_from: float = 0.875  # δ, the share of the epochs after which all are taken (none of fewer than 8)

    together = "images are left out by the losses of all blocks"

    def faults(self):
        yield from super().faults()
        yield self.prune_ratio >= 1, f"prune_ratio must be below 1, not {self.prune_ratio}"
        yield self.anneal_from > 1, f"anneal_from must be at most 1, not {self.anneal_from}"


class Weighted:
    """noprop_example.Hybrid, in which images count by weight; it keeps each image's loss in each block."""

    def __init__(self, config: LabConfig):
        self.config = config
        self.weight = torch.empty(0)  # of the images of this step, (B,); one tensor, which a graph reads
        self.losses: dict[int, Tensor] = {}  # by block, (B,)

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        """Loss of block t, and û (B, D). Arguments: see Hybrid.block_loss()."""
        seed_dropout(block, draw)
        level, u = alpha_bar[t - 1].item(), F.embedding(label, W)
        noise = draw("noise", u.shape)
        z = noprop.noisy_label(u, noise, level)
        eps_hat = block(image, z, level, W)
        u_hat = noprop.clean_label(z, eps_hat, level)
        eta, lam = self.config.eta_loss_weight, self.config.lambda_global
        each = eta * (eps_hat - noise).square().mean(1) + lam * (u_hat - u).square().mean(1)
        self.losses[t] = each.detach()
        return (self.weight * each).mean(), u_hat

    def head_loss(self, classifier, u_hat, label, W, draw) -> Tensor:
        """Cross-entropy of the classifier."""
        logits = classifier(classified(self.config, u_hat, label, W, draw))
        return (self.weight * F.cross_entropy(logits, label, reduction="none")).mean()


class Pruning(State):
    """A state whose epochs leave out images that are learned already."""

    POSITION = (*State.POSITION, "losses", "counts")
    losses = torch.empty(0)  # of each training image, when last seen, (N,); nan: not yet
    counts = torch.empty(0)  # what each counts in this epoch, (N,); above 1: for others too, if it is taken
    taken: tuple[Tensor, ...] = ()  # the batches of this epoch

    def order(self, images: int) -> tuple[Tensor, ...]:
        """As State.order(), without those that are left out; all, where the others fill no batch."""
        config, epoch = self.config, len(self.history)
        if not len(self.losses):
            self.losses = torch.full((images,), torch.nan, device=self.device)
        if not self.log:  # an epoch that is resumed goes on with what counted when it began
            below = (self.losses < self.losses.nanmean()) & (epoch < config.anneal_from * config.epochs)
            self.counts = 1 + below * config.prune_ratio / (1 - config.prune_ratio)
        drawn = torch.rand(images, generator=generator(config.seed, "left out", epoch)).to(self.device)
        kept = ((self.counts == 1) | (drawn >= config.prune_ratio)).nonzero()[:, 0]
        if len(kept) < config.batch_size:
            self.counts, kept = torch.ones_like(self.counts), torch.arange(images, device=self.device)
        self.taken = tuple(kept[batch] for batch in super().order(len(kept)))
        return self.taken

    def resume(self, content: dict[str, Any], digest: str) -> None:
        super().resume(content, digest)
        self.losses, self.counts = self.losses.to(self.device), self.counts.to(self.device)


def train_step(
    state: Pruning, image: Tensor, label: Tensor, lr: float, parallel: Callable = map, step=noprop.train_step
) -> dict:
    """noprop_example.train_step(), weighted, whose losses decide who is left out of the next epoch.

    step: makes it, or replays a graph of it.
    """
    batch, objective = state.taken[len(state.log)], state.objective
    if not len(objective.weight):
        objective.weight = torch.empty(len(batch), device=state.device)
    objective.weight.copy_(state.counts[batch])
    results = step(state, image, label, lr, parallel)
    state.losses[batch] = sum(objective.losses[t] for t in state.blocks)
    return results
