"""A cascade, not of the paper: block t learns from what earlier blocks make of the image, not from noise.

With f_t(x, z_{t-1}) the class logits of block t, and h_t its code of the image x, which the head reads too:
    loss of block t   CE(f_t, y)
    z_t               --hand-on features: h_1, ..., h_t, beside each other
                      --hand-on label: the mean of softmax(f_1), ..., softmax(f_t)
                      --hand-on nothing: 0, so that the blocks are T networks, as a control
In training as in inference, z is made by the blocks themselves, and is a number to those that read it: no
gradient crosses. So blocks wait for each other, but only for the way forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noprop_example import NoProp, Split, State, draw_denoising
from noprop_lab.dt import seed_dropout
from noprop_lab.settings import LabConfig


@dataclass(frozen=True)
class CascadeConfig(LabConfig):
    """What decides the result; it is saved with the network. For a cascade."""

    objective: ClassVar[str] = "cascade"
    # Objective
    hand_on: Literal["features", "label", "nothing"] = "features"  # what a block sees of those before it
    embedding: Literal["learned", "fixed", "onehot", "prototype"] = "onehot"  # as it must be: there is none

    WITHOUT_EFFECT = ("eta_loss_weight", "lambda_global", "target", "classify", "weights")
    WITHOUT_EFFECT += ("embedding", "embed_scale", "embed_wd", "max_norm_embed")
    together = "blocks of a cascade learn from those before them"


class CascadeBlock(nn.Module):
    """Block t, from a denoising block: (x, z_{t-1}) -> f_t (B, classes), and h_t (B, width)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.image, self.label, self.head = block.image, block.label, block.head

    def forward(self, image: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        code = self.image(image)
        return self.head(torch.cat([code, self.label(z)], dim=1)), code


def cascade_blocks(make: Callable, hand_on: str) -> Callable:
    """What NoProp calls for block 1, 2, ...: with features, each reads a longer z than the one before."""
    before = 1

    @torch.no_grad()
    def next_block(image_shape, embed_dim, num_classes, target) -> CascadeBlock:
        nonlocal before
        inputs = before if hand_on == "features" else num_classes
        block = CascadeBlock(make(image_shape, inputs, num_classes, target="classes"))
        before += block.image.eval()(torch.zeros(1, *image_shape)).shape[1]
        return block.train()

    return next_block


class Cascade(NoProp):
    """The network of a CascadeConfig. Label embedding and classifier of the others are there, and idle."""

    config: CascadeConfig

    def start(self, image: Tensor, temperature=0.0, noise=None) -> Tensor:
        """z_0 = 0: (B, classes), or one number where features are appended to it."""
        features = self.config.hand_on == "features"
        return image.new_zeros(len(image), 1 if features else self.classifier.out_features)

    def handed_on(self, t: int, logits: Tensor, code: Tensor, z: Tensor) -> Tensor:
        """z_t, as numbers, of what block t makes of z_{t-1}."""
        if self.config.hand_on == "features":
            return torch.cat([z, code.detach()], dim=1)
        return z.lerp(logits.detach().softmax(-1), 1 / t) if self.config.hand_on == "label" else z

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """f_t and z_t."""
        logits, code = self.blocks[t - 1](image, z)
        return logits, self.handed_on(t, logits, code, z)

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes) of what step() returns."""
        return u_hat


class Answers:
    """What noprop_example.draw_denoising() needs: z_t in which it reads the class probabilities p_t.

    At ᾱ = 1/2, with unit vectors for embeddings, that is log p_t / √2. probabilities_of: images (B, C, H, W)
    -> p_1 ... p_T, (B, T, classes).
    """

    def __init__(self, model: NoProp, probabilities_of: Callable[[Tensor], Tensor]):
        self.probabilities, self.probabilities_of = model.probabilities, probabilities_of
        unit = torch.eye(model.classifier.out_features, device=model.classifier.weight.device)
        self.label_embedding = nn.Embedding.from_pretrained(unit)
        self.alpha_bar = torch.full((len(model.blocks) + 1,), 0.5, dtype=torch.float64)

    def start(self, image: Tensor, temperature: float, noise: torch.Generator) -> Tensor:
        return image.new_zeros(len(image), self.label_embedding.embedding_dim)

    def step(self, t: int, image: Tensor, z: Tensor, temperature: float, noise) -> tuple[None, Tensor]:
        return None, self.probabilities_of(image)[:, t - 1].clamp_min(1e-38).log() / 2**0.5


def mean_answers(model: Cascade, image: Tensor) -> Tensor:
    """The mean answer of blocks 1 ... t, for each t, (B, T, classes)."""
    counts = torch.arange(1, len(model.blocks) + 1, device=image.device)
    return model(image).softmax(-1).cumsum(1) / counts.view(1, -1, 1)


def draw_answers(model: Cascade, test: Split):
    """The script's picture of a dozen test images: the mean answer of the blocks up to t."""
    figure = draw_denoising(Answers(model, partial(mean_answers, model)), test)
    figure.suptitle("Class probabilities, mean of the blocks up to t; below, hard ones")
    return figure


def train_step(state: State, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of every block: {part: (loss, gradient norm)}; the next goes forward as one goes backward."""
    model, short = state.model, state.config.precision == "bfloat16"
    z, there = {0: model.start(image)}, [Event() for _ in range(len(model.blocks) + 1)]
    there[0].set()

    def train_block(t: int) -> tuple[str, tuple[Tensor, Tensor]]:
        seed_dropout(model.blocks[t - 1], partial(state.draw, t))
        there[t - 1].wait()
        try:
            with torch.autocast(image.device.type, torch.bfloat16, enabled=short, cache_enabled=False):
                logits, z[t] = model.step(t, image, z[t - 1])
        finally:
            there[t].set()  # the next one would wait for a block that has failed, too
        loss = F.cross_entropy(logits.float() if short else logits, label)
        loss.backward()
        return f"blocks.{t - 1}", (loss.detach(), state.update(f"blocks.{t - 1}", lr))

    # on a GPU one after another, also where a graph has streams: there Event orders nothing
    return dict((map if image.is_cuda else parallel)(train_block, state.blocks))
