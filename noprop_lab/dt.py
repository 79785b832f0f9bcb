"""NoProp-DT, the paper's own objective (arXiv 2503.24322, equation 8), its block, and its embeddings.

Here û = softmax(f) W; block t's update minimises, as in Algorithm 1,
    CE(classifier(z_T), y) + KL(q(z_0|y) ‖ N(0, I)) + T/2 η (SNR_t - SNR_{t-1}) ‖û_t - u‖²,  SNR = ᾱ/(1-ᾱ)
so that classifier and embedding take T updates where a block takes one; inference samples (τ = 1).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noprop_example import (
    DenoisingBlockPaper,
    Failure,
    Hybrid,
    NoProp,
    Split,
    State,
    clean_label,
    cosine_schedule,
    noisy_label,
    to_float,
    train_block,
)
from noprop_lab.settings import LabConfig


@dataclass(frozen=True)
class DTConfig(LabConfig):
    """What decides the result; it is saved with the network. For NoProp-DT."""

    objective: ClassVar[str] = "dt"
    # Objective
    target: Literal["label", "noise", "classes"] = "classes"  # a block computes û, ε̂, or softmax(f) W
    classify: Literal["u_hat", "z"] = "z"  # what the classifier reads: û_T (updates each: every û_t), or z_T
    eta_loss_weight: float = 0.1  # η
    weights: Literal["equal", "ddpm"] = "ddpm"  # with which the blocks' û enter z_t in inference
    temperature: float = 1.0  # τ of inference: 0 follows the mean of each step, 1 samples
    updates: Literal["each", "last"] = "each"  # that hold CE and KL: each block's, in turn; the last block's

    WITHOUT_EFFECT = ("lambda_global",)
    together = property(lambda self: "blocks take turns without --updates last" * (self.updates == "each"))

    def faults(self):
        yield from super().faults()
        yield self.eta_loss_weight == 0, "the weight of the blocks' loss is 0: they would learn nothing"
        idle = self.weights == "equal" and not cosine_schedule(self.num_blocks).diff().all()
        fault = f"of {self.num_blocks} blocks some see no rise of SNR, and learn nothing: take ddpm"
        yield idle, f"weights equal: {fault}"

    @classmethod
    def paper(cls, dataset: str = "mnist", **changes) -> DTConfig:
        """The paper's whole setting; meant for a GPU. Neither of our clips is the paper's."""
        return cls(**paper_recipe(dataset) | changes)


def paper_recipe(dataset: str, epochs: int | None = None) -> dict[str, Any]:
    """What the paper's settings share; for CT and FM it has Adam, here AdamW. epochs: None: a chain's."""
    epochs = epochs or (150 if "cifar" in dataset else 100)
    recipe = dict(epochs=epochs, patience=epochs, batch_size=128, block="paper", lr=1e-3, schedule="constant")
    recipe |= dict(ema_decay=0.0, augment=False, embed_wd=1e-3, max_norm_embed=1e9, grad_clip=1e9)
    return recipe | {"dataset": dataset}


# --- Objectives --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabHybrid(Hybrid):
    """The script's objective, for blocks with dropout too, and a classifier that may read z_T."""

    config: LabConfig | None = None

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        seed_dropout(block, draw)
        return super().block_loss(block, t, alpha_bar, image, label, W, draw)

    def head_loss(self, classifier, u_hat, label, W, draw) -> Tensor:
        return F.cross_entropy(classifier(classified(self.config, u_hat, label, W, draw)), label)


@dataclass(frozen=True)
class DT:
    """The objective of NoProp-DT: a block's SNR term, and what the updates of config.updates add to it."""

    config: DTConfig

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        """T/2 η (SNR_t - SNR_{t-1}) ‖û - u‖² of block t; and û (B, D). Arguments: see Hybrid.block_loss()."""
        seed_dropout(block, draw)
        level, u = alpha_bar[t - 1].item(), F.embedding(label, W)
        z = noisy_label(u, draw("noise", u.shape), level)
        u_hat = clean_label(z, block(image, z, level, W), level)
        rise = (alpha_bar / (1 - alpha_bar)).diff()[t - 1].item()
        weight = (len(alpha_bar) - 1) / 2 * self.config.eta_loss_weight * rise
        return weight * (u_hat - u).square().sum(1).mean(), u_hat

    def head_loss(self, classifier, u_hat, label, W, draw) -> Tensor:
        """Cross-entropy of the classifier, plus KL(q(z_0 | y) ‖ N(0, I))."""
        logits = classifier(classified(self.config, u_hat, label, W, draw))
        level = cosine_schedule(self.config.num_blocks)[0].item()
        return F.cross_entropy(logits, label) + kl_to_noise(F.embedding(label, W), level)


def train_step(state: State, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
    """A step of every part, blocks in turn, each with one of classifier and embedding: Algorithm 1.

    (The algorithm takes all batches with block 1, then all with block 2; here all blocks with each batch.)
    """
    results: dict = {}
    for t in state.blocks:
        losses, gradient = train_block(state, t, image, label, lr, head=True)
        results |= losses
        if gradient is not None:
            state.model.label_embedding.weight.grad.copy_(gradient)
            results["label_embedding"] = gradient.new_zeros(()), state.update("label_embedding", lr)
    return results


def classified(config: LabConfig, u_hat: Tensor, label: Tensor, W: Tensor, draw) -> Tensor:
    """What the classifier reads in training, (B, D): û_T, or a z_T drawn from q(z_T | y)."""
    if config.classify == "u_hat":
        return u_hat
    u = F.embedding(label, W)
    return noisy_label(u, draw("z_T", u.shape), cosine_schedule(config.num_blocks)[-1].item())


def kl_to_noise(u: Tensor, alpha_bar: float) -> Tensor:
    """KL(q(z_0 | y) ‖ N(0, I)) at ᾱ_0 = alpha_bar, mean over the batch of u (B, D). Equation 8."""
    dim = u.shape[1]
    return 0.5 * (alpha_bar * u.square().sum(1).mean() - dim * alpha_bar - dim * math.log(1 - alpha_bar))


class ReadsZ(NoProp):
    """A network whose classifier reads z_T, as in the paper."""

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        return self.classifier(z)


# --- The paper's block -------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Dropout whose draws have an address, see seed_dropout()."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.draw = p, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        draw, self.draw = self.draw, None  # it holds the state, which could not be freed at once
        return x * (draw(x.shape, partial(uniform, x.device)) >= self.p) / (1 - self.p)


def uniform(device: torch.device, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1), which a GPU draws itself: a run has so many that one CPU thread takes hours."""
    if device.type == "cuda":
        generator = torch.Generator(device).manual_seed(generator.initial_seed())
    return torch.rand(shape, generator=generator, device=generator.device)


def seed_dropout(block: nn.Module, draw) -> None:
    """Give each dropout layer of a block the draws of this step: draw(purpose, shape, kind)."""
    layers = [module for module in block.modules() if isinstance(module, Dropout)]
    for i, layer in enumerate(layers):
        layer.draw = lambda shape, kind, i=i: draw(f"dropout {i}", shape, kind)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PaperBlock(DenoisingBlockPaper):
    """The paper's own block for MNIST: 2.0 M parameters."""

    def __init__(self, image_shape, embed_dim, num_classes, target="classes"):
        nn.Module.__init__(self)
        self.target, layers, channels = target, [], image_shape[0]
        for width, pool in ((32, True), (64, False), (128, True)):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
            layers += [Dropout(0.2)]
            channels = width
        features = channels * (image_shape[1] // 4) * (image_shape[2] // 4)
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 256), nn.BatchNorm1d(256))

        def full(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]

        skipped = Residual(*full(256, 256), nn.Linear(256, 256), nn.BatchNorm1d(256))
        self.label = nn.Sequential(*full(embed_dim, 256), skipped)
        outputs = num_classes if target == "classes" else embed_dim
        self.head = nn.Sequential(*full(512, 256), *full(256, 128), nn.Linear(128, outputs))


def image_block(make, image_shape, embed_dim, num_classes, target) -> nn.Module:
    """A block of make(...) for an embedding of images: z goes through convolutions like the image's.

    Figure 6 of the paper. D is the size of an image, (C, H, W) of image_shape.
    """
    block = make(image_shape, embed_dim, num_classes, target=target)
    path, head = copy.deepcopy(block.image), block.head[0]
    for layer in path.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    before, after = (
        [x.out_features for x in way.modules() if isinstance(x, nn.Linear)][-1] for way in (block.label, path)
    )
    block.label = nn.Sequential(nn.Unflatten(1, image_shape), *path)
    block.head[0] = nn.Linear(head.in_features - before + after, head.out_features)
    return block


# --- The paper's embeddings --------------------------------------------------------------------------------


def prototypes(split: Split, classes: int) -> Tensor:
    """Of each class the image, (classes, C·H·W) in [0, 1], whose median distance (itself: 0) is smallest.

    The paper's "prototype" embedding, which is learned from there. Raises Failure for a class without images.
    """
    chosen = []
    for label in range(classes):
        images = to_float(split.images[split.labels == label]).flatten(1)
        if not len(images):
            raise Failure(f"--embedding prototype needs images of each class: class {label} has none")
        medians = torch.cdist(images, images).sort(1).values[:, (len(images) - 1) // 2]  # CUDA's median
        chosen.append(images[medians.argmin()])  # is not deterministic
    return torch.stack(chosen)
