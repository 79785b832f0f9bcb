"""The twin: the same chain of blocks, trained end to end through all reverse steps by cross-entropy.

With --num-blocks 1 it is a plain CNN of one block's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from noprop_example import Failure, State
from noprop_lab.dt import seed_dropout
from noprop_lab.settings import WholeConfig


@dataclass(frozen=True)
class BackpropConfig(WholeConfig):
    """What decides the result; it is saved with the network. For backpropagation through the chain."""

    objective: ClassVar[str] = "backprop"

    WITHOUT_EFFECT = ("eta_loss_weight", "lambda_global")

    def __post_init__(self):
        super().__post_init__()
        if self.temperature or self.classify == "z":
            raise Failure("backprop trains all blocks as one: leave out temperature, classify z")


def train_step(state: State, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of the twin: {part: (loss, gradient norm)}; the one loss is that of the classifier."""
    config, model, zero = state.config, state.model, torch.zeros((), device=image.device)
    for t, block in enumerate(model.blocks, start=1):
        seed_dropout(block, partial(state.draw, t))
    short = config.precision == "bfloat16"
    with config.threads_of_step(image.device):  # blocks wait for each other: all cores on each of them
        with torch.autocast(image.device.type, torch.bfloat16, enabled=short, cache_enabled=False):
            logits = model(image)[:, -1]
        loss = F.cross_entropy(logits.float() if short else logits, label)
        loss.backward()
        through_w = config.target == "classes" and config.learns_embedding
        names = [name for name in state.parts if name != "label_embedding" or through_w]
        norms = {name: state.update(name, lr) for name in names}
    return {name: (loss.detach() if name == "classifier" else zero, norm) for name, norm in norms.items()}
