"""A cascade, not of the paper: block t learns from what earlier blocks make of the image, not from noise.

With f_t(x, z_{t-1}) the class logits of block t, and h_t its code of the image x, which the head reads too:
    loss of block t   CE(f_t, y)
    z_t               --hand-on features: h_1, ..., h_t, beside each other
                      --hand-on label: the mean of softmax(f_1), ..., softmax(f_t)
                      --hand-on both: that mean, and h_1, ..., h_t
                      --hand-on maps: what the second convolution of block t makes of the image and of z_{t-1}
                      --hand-on nothing: 0, so that the blocks are T networks, as a control
In training as in inference, z is made by the blocks themselves, and is a number to those that read it: no
gradient crosses. So blocks wait for each other, but only for the way forward.
"""

from __future__ import annotations

import math
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
    hand_on: Literal["features", "label", "both", "maps", "nothing"] = "features"  # what the next block sees
    estimates: Literal["live", "averaged"] = "live"  # the weights that make what is handed on, in training
    z_noise: float = 0.0  # standard deviation of noise on what is handed on, in training
    own_views: bool = False  # each block augments the images by itself
    learns: Literal["own", "mean"] = "own"  # cross-entropy of a block's own answer, or of the mean so far
    embedding: Literal["learned", "fixed", "onehot", "prototype"] = "onehot"  # as it must be: there is none

    WITHOUT_EFFECT = ("eta_loss_weight", "lambda_global", "target", "classify", "weights")
    WITHOUT_EFFECT += ("temperature", "embedding", "embed_scale", "embed_wd", "max_norm_embed")
    together = "blocks of a cascade learn from those before them"
    views = property(lambda self: self.num_blocks if self.own_views else 1)

    def faults(self):
        yield from super().faults()
        yield self.own_views and not self.augment, "own_views are augmented: they take augment"
        no_use = self.hand_on == "nothing" and self.estimates == "averaged"
        yield no_use, "estimates averaged has no effect where nothing is handed on: leave it out"


class CascadeBlock(nn.Module):
    """Block t, from a denoising block that has z of this width: (x, z_{t-1}) -> f_t (B, classes), h_t."""

    def __init__(self, block: nn.Module, width: int):
        super().__init__()
        self.image, self.label, self.head, self.z_shape = block.image, block.label, block.head, (width,)

    def forward(self, image: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        code = self.image(image)
        return self.head(torch.cat([code, self.label(z)], dim=1)), code


class MapsBlock(CascadeBlock):
    """Block t whose second convolution reads z_{t-1}, the maps (B, C, H, W) of the one before, and makes z_t.

    They are laid into the middle of what the first convolution leaves, so each block sees further than the
    one before. The way of its label reads 0.
    """

    def __init__(self, block: nn.Module, width: int, image_shape: tuple[int, int, int]):
        super().__init__(block, width)
        first, second = [i for i, x in enumerate(self.image) if isinstance(x, nn.Conv2d)][1:3]
        self.before, self.middle = self.image[:first], self.image[first:second]
        self.image, self.width, conv = self.image[second:], width, self.middle[0]
        self.z_shape = self.middle.eval()(self.before.eval()(torch.zeros(1, *image_shape))).shape[1:]
        channels, bias = (conv.in_channels + conv.out_channels, conv.out_channels), conv.bias is not None
        self.middle[0] = nn.Conv2d(*channels, conv.kernel_size, conv.stride, conv.padding, bias=bias)

    def forward(self, image: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.before(image)
        high, wide = (outer - inner for outer, inner in zip(maps.shape[2:], z.shape[2:], strict=True))
        z = F.pad(z, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        maps = self.middle(torch.cat([maps, z], dim=1))
        return super().forward(maps, image.new_zeros(len(image), self.width))[0], maps


def cascade_blocks(make: Callable, hand_on: str) -> Callable:
    """What NoProp calls for block 1, 2, ...: where features are handed on, each reads a longer z."""
    before = 0

    @torch.no_grad()
    def next_block(image_shape, embed_dim, num_classes, target) -> CascadeBlock:
        nonlocal before
        width = before + (1 if hand_on == "features" else num_classes)
        block = make(image_shape, width, num_classes, target="classes")
        if hand_on == "maps":
            return MapsBlock(block, width, image_shape).train()
        if hand_on in ("features", "both"):
            before += block.image.eval()(torch.zeros(1, *image_shape)).shape[1]
        return CascadeBlock(block, width).train()

    return next_block


class Cascade(NoProp):
    """The network of a CascadeConfig. Label embedding and classifier of the others are there, and idle."""

    config: CascadeConfig

    def start(self, image: Tensor, temperature=0.0, noise=None) -> Tensor:
        """z_0 = 0, (B, width): of classes, or 1 where features alone are appended to it; or maps."""
        return image.new_zeros(len(image), *self.blocks[0].z_shape)

    def handed_on(self, t: int, logits: Tensor, left: Tensor, z: Tensor) -> Tensor:
        """z_t, as numbers, of z_{t-1} and of what block t makes of it: logits, and its code or maps."""
        hand_on, classes = self.config.hand_on, logits.shape[1]
        if hand_on == "maps":
            return left.detach()
        if hand_on in ("label", "both"):
            mean = z[:, :classes].lerp(logits.detach().softmax(-1, dtype=z.dtype), 1 / t)
            z = torch.cat([mean, z[:, classes:]], dim=1)
        return torch.cat([z, left.detach()], dim=1) if hand_on in ("features", "both") else z

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """f_t and z_t."""
        logits, left = self.blocks[t - 1](image, z)
        return logits, self.handed_on(t, logits, left, z)

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

    def step(self, t: int, image: Tensor, z: Tensor, temperature: float, noise) -> tuple[Tensor, Tensor]:
        z = self.probabilities_of(image)[:, t - 1].clamp_min(1e-38).log() / 2**0.5
        return z, z


def mean_answers(model: Cascade, image: Tensor) -> Tensor:
    """The mean answer of blocks 1 ... t, for each t, (B, T, classes)."""
    counts = torch.arange(1, len(model.blocks) + 1, device=image.device)
    return model(image).softmax(-1).cumsum(1) / counts.view(1, -1, 1)


def draw_answers(model: Cascade, test: Split):
    """The script's picture of a dozen test images: the mean answer of the blocks up to t."""
    figure = draw_denoising(Answers(model, partial(mean_answers, model)), test)
    figure.suptitle("Class probabilities, mean of the blocks up to t; dots: the answer; hard ones below")
    return figure


def several_views(augment: Callable, views: int, images: Tensor, noise: torch.Generator) -> Tensor:
    """augment(), so many times: (views, B, C, H, W)."""
    return torch.stack([augment(images, noise) for _ in range(views)])


def train_step(state: State, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of every block: {part: (loss, gradient norm)}; the next goes forward as one goes backward.

    image: (B, C, H, W), or a view for each block, (T, B, C, H, W).
    """
    config, model = state.config, state.model
    short, T = config.precision == "bfloat16", len(model.blocks)
    views = image if image.ndim == 5 else image.expand(T, *image.shape)
    z, sums = {0: model.start(views[0])}, {0: image.new_full((), -torch.inf)}
    kind = torch.cuda.Event if image.is_cuda else Event  # blocks have a stream each, in a graph, or a thread
    there = [kind() for _ in range(T + 1)]

    def done(t: int) -> None:
        """Let block t + 1 go on."""
        there[t].record() if image.is_cuda else there[t].set()

    def train_block(t: int) -> tuple[str, tuple[Tensor, Tensor]]:
        seed_dropout(model.blocks[t - 1], partial(state.draw, t))
        there[t - 1].wait()
        try:
            with torch.autocast(image.device.type, torch.bfloat16, enabled=short, cache_enabled=False):
                before = z[t - 1]
                if config.z_noise:
                    before = before + config.z_noise * state.draw(t, "noise", before.shape)
                logits, left = model.blocks[t - 1](views[t - 1], before)
                if config.estimates == "live":
                    z[t] = model.handed_on(t, logits, left, z[t - 1])
                else:
                    with torch.no_grad():
                        z[t] = state.averaged.step(t, views[t - 1], z[t - 1])[1]
            answer = logits.float().log_softmax(-1) if short else logits.log_softmax(-1)
            if config.learns == "mean":  # of t answers, whose logarithm this is, but for a log t
                answer = sums[t - 1].logaddexp(answer)
                sums[t] = answer.detach()
        finally:
            done(t)  # the next one would wait for a block that has failed, too
        loss = F.nll_loss(answer, label) + (math.log(t) if config.learns == "mean" else 0.0)
        loss.backward()
        return f"blocks.{t - 1}", (loss.detach(), state.update(f"blocks.{t - 1}", lr))

    done(0)
    return dict(parallel(train_block, state.blocks))
