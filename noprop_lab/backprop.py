"""The twin: the same chain of blocks, trained end to end through all reverse steps by cross-entropy.

With --num-blocks 1 it is a plain CNN of one block's size. With --weights learned it is the paper's own rival
(arXiv 2503.24322, equations 17-19), whose reverse steps have no noise schedule:
    z_0 ~ τ N(0, I),  z_t = (1 - α_t) z_{t-1} + α_t û_t,  α_t = tanh(w_t), and w_t is learned with block t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noprop_example import NoProp, Split, State, draw_denoising, generator
from noprop_lab.cascade import Answers
from noprop_lab.dt import paper_recipe, seed_dropout
from noprop_lab.settings import WholeConfig


@dataclass(frozen=True)
class BackpropConfig(WholeConfig):
    """What decides the result; it is saved with the network. For backpropagation through the chain."""

    objective: ClassVar[str] = "backprop"
    # Objective
    weights: Literal["equal", "ddpm", "learned"] = "equal"  # with which û enters z_t; learned: the paper's α
    supervise: Literal["last", "every"] = "last"  # the blocks after which the answer's cross-entropy counts

    WITHOUT_EFFECT = ("eta_loss_weight", "lambda_global")
    FREE = ("temperature",)

    @property
    def idle(self) -> set[str]:
        """Without target classes no block reads the label embedding; but onehot and prototype decide D."""
        if self.target == "classes":
            return super().idle
        kind = {"embedding"} if self.embedding in ("learned", "fixed") else set()
        return super().idle | kind | {"embed_wd", "max_norm_embed", "embed_scale"}

    def faults(self):
        other = self.weights != "learned" and (self.temperature or self.classify == "z")
        yield other, "without --weights learned, backprop takes no temperature, and no classify z"
        yield from super().faults()

    @classmethod
    def paper(cls, dataset: str = "mnist", **changes) -> BackpropConfig:
        """The paper's whole setting; meant for a GPU. Neither of our clips is the paper's."""
        chain = dict(weights="learned", target="classes", classify="z", temperature=1.0)
        return cls(**paper_recipe(dataset) | chain | changes)


def mixed_block(make: Callable, *arguments, **keywords) -> nn.Module:
    """A block of make(...) with a w_t. It starts at α_t = 1/2: the paper says nothing of that."""
    block = make(*arguments, **keywords)
    block.w = nn.Parameter(torch.tensor(0.5).atanh())
    return block


class Mixed(NoProp):
    """A chain of such blocks. Its classifier reads z_T, as in the paper, or û_T, as the config says."""

    config: BackpropConfig

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """û_t and z_t from images and z_{t-1}, (B, D) each. Equation 18; it draws nothing."""
        u_hat, _ = super().step(t, image, z)
        alpha = self.blocks[t - 1].w.tanh()
        return u_hat, (1 - alpha) * z + alpha * u_hat

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes), of what the config says."""
        return self.classifier(z if self.config.classify == "z" else u_hat)


def draw_answers(model: NoProp, test: Split):
    """The script's picture of a dozen test images: what the chain would answer, cut after block t."""

    def after_each(image: Tensor) -> Tensor:
        return model(image, model.config.temperature, generator("denoising")).softmax(-1)

    figure = draw_denoising(Answers(model, after_each), test)
    figure.suptitle("Class probabilities, chain cut after block t; dots: the answer; hard ones below")
    return figure


def train_step(state: State, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of the twin: {part: (loss, gradient norm)}; the one loss is that of the classifier."""
    config, model, zero = state.config, state.model, torch.zeros((), device=image.device)
    for t, block in enumerate(model.blocks, start=1):
        seed_dropout(block, partial(state.draw, t))
    short = config.precision == "bfloat16"
    with config.threads_of_step(image.device):  # blocks wait for each other: all cores on each of them
        z, logits = model.start(image), []
        if config.temperature:
            z = config.temperature * state.draw(0, "z_0", z.shape)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=short, cache_enabled=False):
            for t in range(1, config.num_blocks + 1):
                u_hat, z = model.step(t, image, z)
                if t == config.num_blocks or config.supervise == "every":
                    logits.append(model.classify(u_hat, z))
        logits = [x.float() if short else x for x in logits]
        loss = sum(F.cross_entropy(x, label) for x in logits) / len(logits)
        loss.backward()
        through_w = config.target == "classes" and config.learns_embedding
        names = [name for name in state.parts if name != "label_embedding" or through_w]
        norms = {name: state.update(name, lr) for name in names}
    return {name: (loss.detach() if name == "classifier" else zero, norm) for name, norm in norms.items()}
