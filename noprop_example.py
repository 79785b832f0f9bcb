# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "filelock>=3.16,<5",
#   "torch>=2.7,<3",
#   "torchvision>=0.22,<1",
#   "matplotlib>=3.9,<4",
#   "numpy>=1.26,<3",
#   "optuna>=4.9,<6",
#   "pillow>=10.4,<14",
#   "sqlalchemy>=2,<3",
#   "tqdm>=4.66,<5",
#   "tyro>=0.9.20,<2",
# ]
# ///
"""NoProp on MNIST: a network of denoising blocks, each trained alone (Li, Teh, Pascanu; arXiv 2503.24322).

Training, for every mini-batch (x, y) and every block t = 1 ... T, on its own:
    ε ~ N(0, I)
    z_{t-1} = √ᾱ_{t-1} u_y + √(1-ᾱ_{t-1}) ε             a noisy label
    ε̂_t = block_t(x, z_{t-1})                            the noise that the block sees in it
    û_t = (z_{t-1} - √(1-ᾱ_{t-1}) ε̂_t) / √ᾱ_{t-1}        the label that this leaves
    step on  η₁ MSE(ε̂_t, ε) + η₂ MSE(û_t, u_y)           block T adds CE(classifier(û_T), y)
Inference: z_0 = 0 (or noise), then for t = 1 ... T
    z_t = a û_t + b z_{t-1} + τ √c ξ                     one DDPM-like reverse step a block
and the answer is argmax classifier(û_T).

Time runs from noise to label: ᾱ_0 = 0.001 is noise, ᾱ_T = 0.999 is the label.

    symbol   name              shape        meaning
    T        num_blocks                     blocks, each at one noise level
    ᾱ        alpha_bar         (T+1,)       fraction of signal, increasing
    u_y      u                 (B, D)       embedding of the label: a learned row of label_embedding
    z_t      z                 (B, D)       the noisy label
    ε̂, û    eps_hat, u_hat    (B, D)       a block's estimates of noise and label
    η₁, η₂   eta, lam                       weights of the hybrid loss

Measured: 99.57 ± .01 % on MNIST's test images (mean ± standard error of seeds 0 to 9, weights chosen on
validation images; block 1 alone 99.41 ± .02), three minutes on two CPU cores (matmul peak 140-200 GFLOP/s).

    python noprop_example.py                                     train, evaluate, draw
    python noprop_example.py --evaluate noprop_hybrid.pt         test accuracy of a trained network
    python noprop_example.py --predict noprop_hybrid.pt a.png    classify pictures
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import getpass
import gzip
import hashlib
import io
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from tqdm import tqdm

RUN_HPO = False  # True: search hyperparameters with Optuna; False: train. The flag --run-hpo does the same.


# --- Randomness --------------------------------------------------------------------------------------------


def generator(*address: int | str) -> torch.Generator:
    """A generator seeded from an address such as (seed, "noise", block, step).

    No draw depends on what was drawn before: a block trained alone sees the same noise as one trained beside
    others, and evaluation never disturbs training. Draws are made on the CPU, alike for every device.
    """
    digest = hashlib.blake2b(repr(address).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def send(draws: Tensor, device: torch.device) -> Tensor:
    """Draws on the device. A GPU takes them from pinned memory: a plain copy would wait for all its work."""
    if device.type != "cuda":
        return draws.to(device)
    return draws.pin_memory().to(device, non_blocking=True)


@contextmanager
def seeded(*address: int | str) -> Iterator[None]:
    """Seed torch's global generator from an address, for code that takes none, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(*address).get_state())
        yield


# --- Noise schedule ----------------------------------------------------------------------------------------


def cosine_schedule(num_blocks: int, s: float = 0.008) -> Tensor:
    """ᾱ_0 ... ᾱ_T, shape (T+1,), float64, from noise (0.001) to label (0.999).

    Nichol and Dhariwal's cosine (arXiv 2102.09672, eq. 17), not divided by its start value, run in NoProp's
    direction and clamped. Strictly increasing up to T of about 50; beyond, the clamp makes equal levels, at
    which a = 0, b = 1, c = 0: a block without effect.
    """
    t = torch.arange(num_blocks + 1, dtype=torch.float64)
    return torch.cos(((1 - t / num_blocks) + s) / (1 + s) * math.pi / 2).square().clamp(1e-3, 0.999)


def reverse_coefficients(alpha_bar: Tensor, equal_weights: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, c of z_t = a û_t + b z_{t-1} + τ √c ξ, each of shape (T,); entry t-1 belongs to block t.

    DDPM posterior (arXiv 2006.11239, eq. 7), which is equation 3 of NoProp.
    Identities: a + b √ᾱ_{t-1} = √ᾱ_t and b² (1-ᾱ_{t-1}) + c = 1-ᾱ_t.

    The first says that z_t/√ᾱ_t is a running mean: û_t enters with weight w, what was before it with 1-w.
    DDPM's w is 1 - SNR_{t-1}/SNR_t, SNR = ᾱ/(1-ᾱ): an early û, from a noisier z, counts for little. But at
    τ = 0 z holds no noise, and every block sees the image: equal_weights makes it the plain mean, w = 1/t.
    (The second identity is about noise, and holds for DDPM's weights.)
    """
    before, after = alpha_bar[:-1], alpha_bar[1:]
    alpha = before / after
    weight = (1 - alpha) / (1 - before)
    if equal_weights:
        weight = 1 / torch.arange(1, len(alpha_bar), dtype=alpha_bar.dtype)
    return weight * after.sqrt(), (1 - weight) / alpha.sqrt(), (1 - after) * (1 - alpha) / (1 - before)


# --- Model -------------------------------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, each followed by a ReLU."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*(layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())))


class DenoisingBlockPaper(nn.Module):
    """Block t: a CNN for the image, an MLP for the noisy label, a joint head; (x, z_{t-1}) -> ε̂_t.

    convs: (channels, kernel, stride, padding, pool) of each stage: convolution, max-pool, batch norm, ReLU.
        The pool has stride 2, 0 is none; before the batch norm, it leaves that a quarter of the work.
    target: what the network f inside the block computes. "label": f estimates û, and the noise follows,
        ε̂ = (z - √ᾱ f(x, z)) / √(1-ᾱ). So f need not copy its noisy input and have its error multiplied by
        1/√ᾱ, 31 at block 1 (the idea of EDM's preconditioning, arXiv 2206.00364). "noise": ε̂ = f(x, z).
        "classes", as in the paper: f computes logits, and û = softmax(f) W is a mean of the embeddings W.
    """

    def __init__(
        self,
        image_shape=(1, 28, 28),
        embed_dim=20,
        num_classes=10,
        convs=((16, 5, 2, 0, 2), (32, 3, 1, 0, 0), (64, 3, 1, 0, 0)),
        image_width=64,
        label_widths=(64,),
        head_widths=(64,),
        target="label",
    ):
        super().__init__()
        outputs = num_classes if target == "classes" else embed_dim
        self.target, layers, channels = target, [], image_shape[0]
        for width, kernel, stride, padding, pool in convs:
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=False))
            layers += [nn.MaxPool2d(pool, 2, ceil_mode=True)] if pool else []
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        cnn = nn.Sequential(*layers, nn.Flatten())
        features = cnn.eval()(torch.zeros(1, *image_shape)).shape[1]
        full = nn.Linear(features, image_width, bias=False)
        self.image = cnn.train().extend([full, nn.BatchNorm1d(image_width), nn.ReLU()])
        self.label = mlp(embed_dim, *label_widths)
        self.head = mlp(image_width + label_widths[-1], *head_widths).append(
            nn.Linear(head_widths[-1], outputs)
        )

    def forward(self, image: Tensor, z: Tensor, alpha_bar: float, embedding: Tensor | None = None) -> Tensor:
        """ε̂, (B, D), from images (B, C, H, W) and noisy labels z (B, D) at the level ᾱ_{t-1} = alpha_bar.

        embedding is W, (classes, D), which only the target "classes" needs.
        """
        f = self.head(torch.cat([self.image(image), self.label(z)], dim=1))  # (B, D), or (B, classes)
        if self.target == "noise":
            return f
        u_hat = f.softmax(-1) @ embedding if self.target == "classes" else f
        return (z - alpha_bar**0.5 * u_hat) / (1 - alpha_bar) ** 0.5


class Dropout(nn.Module):
    """Dropout whose draws have an address: train_block() gives it a generator before each step."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.noise = p, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty(x.shape).bernoulli_(1 - self.p, generator=self.noise)
        return x * send(kept, x.device) / (1 - self.p)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PaperBlock(DenoisingBlockPaper):
    """The paper's own block for MNIST: 2.0 M parameters."""

    def __init__(self, image_shape=(1, 28, 28), embed_dim=20, num_classes=10, target="classes"):
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

        self.label = nn.Sequential(
            *full(embed_dim, 256), Residual(*full(256, 256), nn.Linear(256, 256), nn.BatchNorm1d(256))
        )
        outputs = num_classes if target == "classes" else embed_dim
        self.head = nn.Sequential(*full(512, 256), *full(256, 128), nn.Linear(128, outputs))


BLOCKS: dict[str, dict[str, Any]] = {  # arguments of DenoisingBlockPaper
    "small": {},  # 51 k parameters, 0.23 M multiply-adds
    "deep": {  # a convolution more, and no stride: 129 k parameters, 2.9 M multiply-adds
        "convs": ((24, 5, 1, 0, 2), (48, 3, 1, 0, 0), (48, 3, 1, 0, 2), (96, 3, 1, 0, 0)),
        "image_width": 96,
        "head_widths": (96,),
    },
    # the block of the description that this project started from: 628 k parameters, 8.0 M multiply-adds
    "reference": {
        "convs": ((32, 3, 1, 1, 2), (64, 3, 1, 1, 2), (128, 3, 1, 1, 3)),
        "image_width": 256,
        "label_widths": (256, 256),
        "head_widths": (256, 128),
    },
    "paper": {"kind": PaperBlock},  # 2.0 M parameters
}


def to_float(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float 0 ... 1; floats pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class NoProp(nn.Module):
    """T blocks, the label embedding that they share, and the classifier, which is the head of block T.

    Weights are drawn from (seed, block): a block starts the same whatever stands beside it. The embedding's
    rows start orthonormal, which takes embed_dim >= num_classes. equal_weights: see reverse_coefficients().
    The classifier reads û_T, or with reads_z, as in the paper, z_T.
    """

    def __init__(
        self,
        num_blocks=10,
        num_classes=10,
        embed_dim=20,
        image_shape=(1, 28, 28),
        seed=0,
        equal_weights=True,
        reads_z=False,
        kind=DenoisingBlockPaper,
        **block,
    ):
        super().__init__()
        self.reads_z = reads_z
        self.image_shape, self.alpha_bar = tuple(image_shape), cosine_schedule(num_blocks)
        self.steps = reverse_steps(self.alpha_bar, equal_weights)
        with seeded(seed, "embedding"):
            self.label_embedding = nn.Embedding(num_classes, embed_dim)
            nn.init.orthogonal_(self.label_embedding.weight)
        self.blocks = nn.ModuleList()
        for t in range(1, num_blocks + 1):
            with seeded(seed, "block", t):
                self.blocks.append(kind(image_shape, embed_dim, num_classes, **block))
        with seeded(seed, "classifier"):
            self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(
        self, image: Tensor, temperature: float = 0.0, noise: torch.Generator | None = None
    ) -> Tensor:
        """Inference: class logits after every block, (B, T, classes), of images (B, C, H, W) in [0, 1].

        temperature is τ: 1 samples a label from p(y|x), which takes DDPM's weights; 0 starts at z_0 = 0 and
        follows the mean of each step.
        """
        z = torch.randn(len(image), self.label_embedding.embedding_dim, generator=noise)
        z = send(z, image.device)
        states = self.reverse_process(self.blocks, image, temperature * z, self.steps, temperature, noise)
        return torch.stack([self.classify(*state) for state in states], dim=1)

    def reverse_process(self, blocks, image, z, steps, temperature=0.0, noise=None):
        """reverse_process() of these blocks, with the embedding of this network."""
        embedding = self.label_embedding.weight
        return reverse_process(blocks, image, z, steps, temperature, noise, embedding)

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes) of what a block leaves."""
        return self.classifier(z if self.reads_z else u_hat)

    def batches(self, images: Tensor) -> list[Tensor]:
        """Float batches (500, C, H, W) of images that a user brings; raises ValueError for unfit ones."""
        images = images.unsqueeze(1) if images.ndim == 3 else images
        if images.shape[1:] != self.image_shape or not (
            images.dtype == torch.uint8 or images.is_floating_point()
        ):
            raise ValueError(
                f"images: (N, {self.image_shape}), uint8 or float; not {images.shape}, {images.dtype}"
            )
        return [to_float(batch) for batch in images.to(self.classifier.weight.device).split(500)]

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities after every block, (N, T, classes); the answer is [:, -1].

        images: (N, C, H, W), or (N, H, W) if C = 1; uint8 up to 255 or float up to 1, light on dark. Raises
        ValueError for other shapes and types.
        """
        return torch.cat([self(batch).softmax(-1) for batch in self.batches(images)])

    @torch.inference_mode()
    def early_exit(self, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, classes), and how many blocks each image went through, (N,).

        An image leaves the chain once a class is more probable than threshold. Images as above.
        """
        answers, blocks = [], []
        for image in self.batches(images):
            z = image.new_zeros(len(image), self.label_embedding.embedding_dim)
            answer = image.new_empty(len(image), self.classifier.out_features)
            inside, used = torch.arange(len(image), device=image.device), image.new_empty(len(image))
            for t, block in enumerate(self.blocks):
                [(u_hat, z)] = self.reverse_process([block], image, z, self.steps[t : t + 1])
                answer[inside] = probability = self.classify(u_hat, z).softmax(-1)
                used[inside] = t + 1
                stay = probability.amax(-1) <= threshold
                inside, image, z = inside[stay], image[stay], z[stay]
                if not len(inside):
                    break
            answers, blocks = [*answers, answer], [*blocks, used]
        return torch.cat(answers), torch.cat(blocks)

    def predict(self, images: Tensor, threshold: float = 1.0) -> Tensor:
        """The class of each image, (N,): argmax classifier(û_T), or of an earlier û, see early_exit()."""
        return self.early_exit(images, threshold)[0].argmax(-1)


# --- Forward and reverse process ---------------------------------------------------------------------------


def noisy_label(u: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """z = √ᾱ u + √(1-ᾱ) ε, a draw from q(z | y)."""
    return alpha_bar**0.5 * u + (1 - alpha_bar) ** 0.5 * noise


def clean_label(z: Tensor, eps_hat: Tensor, alpha_bar: float) -> Tensor:
    """û = (z - √(1-ᾱ) ε̂) / √ᾱ, noisy_label() solved for u."""
    return (z - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5


def reverse_steps(alpha_bar: Tensor, equal_weights: bool) -> list[tuple[float, ...]]:
    """ᾱ_{t-1}, a, b, c for each block t."""
    columns = (alpha_bar[:-1], *reverse_coefficients(alpha_bar, equal_weights))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def reverse_process(blocks, image, z, steps, temperature, noise, embedding=None) -> Iterator:
    """From z_0 (B, D) to z_T, a step a block: yields û_t and z_t, (B, D) each. Equation 3 of NoProp.

    steps: of reverse_steps(); temperature: τ; noise: a generator, or None; embedding: (classes, D), see
    DenoisingBlockPaper.
    """
    for block, (alpha_bar, a, b, c) in zip(blocks, steps, strict=True):
        u_hat = clean_label(z, block(image, z, alpha_bar, embedding), alpha_bar)
        xi = send(torch.randn(z.shape, generator=noise), z.device)
        z = a * u_hat + b * z + temperature * c**0.5 * xi
        yield u_hat, z


# --- Objective ---------------------------------------------------------------------------------------------


def block_loss(block, image, u, noise, alpha_bar, eta, lam, embedding=None) -> tuple[Tensor, Tensor]:
    """η₁ MSE(ε̂, ε) + η₂ MSE(û, u) of one block at one noise level; and û (B, D), for block T's classifier.

    û is linear in ε̂, so this is (η₁ + η₂ (1-ᾱ)/ᾱ) MSE(ε̂, ε): one constant a block times one error.
    """
    z = noisy_label(u, noise, alpha_bar)
    eps_hat = block(image, z, alpha_bar, embedding)
    u_hat = clean_label(z, eps_hat, alpha_bar)
    return eta * F.mse_loss(eps_hat, noise) + lam * F.mse_loss(u_hat, u), u_hat


def dt_loss(block, image, u, noise, alpha_bar, t, eta, embedding) -> tuple[Tensor, Tensor]:
    """T/2 η (SNR_t - SNR_{t-1}) ‖û - u‖² of block t, SNR = ᾱ/(1-ᾱ); and û (B, D). NoProp-DT, equation 8.

    Here alpha_bar is the whole schedule, (T+1,).
    """
    level, num_blocks = alpha_bar[t - 1].item(), len(alpha_bar) - 1
    z = noisy_label(u, noise, level)
    u_hat = clean_label(z, block(image, z, level, embedding), level)
    rise = (alpha_bar / (1 - alpha_bar)).diff()[t - 1].item()
    return num_blocks / 2 * eta * rise * (u_hat - u).square().sum(1).mean(), u_hat


def kl_to_noise(u: Tensor, alpha_bar: float) -> Tensor:
    """KL(q(z_0 | y) ‖ N(0, I)) at ᾱ_0 = alpha_bar, mean over the batch. NoProp-DT, equation 8."""
    dim = u.shape[1]
    return 0.5 * (alpha_bar * u.square().sum(1).mean() - dim * alpha_bar - dim * math.log(1 - alpha_bar))


# --- Configuration -----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A data set."""

    name: str  # of its class in torchvision.datasets
    classes: int
    shape: tuple[int, int, int]  # channels, height, width
    flip: bool  # whether a mirror image is as good
    settings: dict[str, Any] = {}  # its own defaults


SOURCES = {  # only MNIST is measured
    "mnist": Source("MNIST", 10, (1, 28, 28), False),
    "fashion_mnist": Source("FashionMNIST", 10, (1, 28, 28), True, {"block": "deep", "epochs": 24}),
    "kmnist": Source("KMNIST", 10, (1, 28, 28), False),
    "cifar10": Source("CIFAR10", 10, (3, 32, 32), True, {"block": "deep", "epochs": 30}),
    "cifar100": Source("CIFAR100", 100, (3, 32, 32), True, {"block": "deep", "epochs": 30}),
}


class Failure(Exception):
    """A run that can't go on: one line for the user, and the exit code (1: the machine, 2: the input)."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Config:
    """NoProp on MNIST: train denoising blocks, each alone, and classify with them.

    Without arguments: train with the default settings, evaluate, save the network and two pictures.
    """

    preset: Literal["default", "accurate", "reference", "paper"] = "default"  # a start; flags win
    dataset: Literal["mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "folder"] = "mnist"
    image_size: int = 32  # of --dataset folder: pictures are scaled to squares of this size, in colour
    classes: tuple[str, ...] = ()  # of --dataset folder: its subfolders to tell apart; none named: all
    objective: Literal["hybrid", "dt", "backprop"] = "hybrid"  # dt: the paper's; backprop: end to end
    seed: int = 0  # decides weights, order, augmentation and noise
    epochs: int = 12  # passes over the training split, each of which trains all blocks
    batch_size: int = 512  # images a step; an incomplete last batch is left out
    train_images: int | None = None  # only the first N images of the training split, for quick tries
    num_blocks: int = 10  # T, blocks and noise levels
    embed_dim: int | None = None  # D, of the label embedding; None: 20, or as many as classes
    block: Literal["small", "deep", "reference", "paper"] = "small"  # the blocks: BLOCKS in the script
    target: Literal["label", "noise", "classes"] = "label"  # a block computes û, ε̂, or softmax(f) W
    classify: Literal["u_hat", "z"] = "u_hat"  # what the classifier reads: û_T, or z_T
    eta_loss_weight: float = 2.0  # η₁, weight of MSE(ε̂, ε)
    lambda_global: float = 1.0  # η₂, weight of MSE(û, u)
    lr: float = 0.014  # highest learning rate of AdamW
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"  # one-cycle: warms up for a fifth
    eta_min: float = 1e-6  # learning rate at the end
    weight_decay: float = 1e-3  # of blocks and classifier
    embed_wd: float = 1e-7  # weight decay of the label embedding
    max_norm_embed: float = 50.0  # rows of the label embedding are clipped to this norm
    grad_clip: float = 1.0  # gradient norm of a block, of the classifier, of the embedding, each by itself
    ema_decay: float = 0.998  # at most, of the averaged weights that are evaluated; 0: no averaging
    augment: bool = True  # rotate, scale and shift the training images at random
    weights: Literal["equal", "ddpm"] = "equal"  # with which the blocks' û enter z_t in inference
    embedding: Literal["learned", "fixed", "onehot", "prototype"] = "learned"  # fixed: stays as it starts
    blocks: str | None = None  # train only these, as in 3,4 or 3-5; takes a fixed embedding, for --merge
    precision: Literal["float32", "bfloat16"] = "float32"  # of blocks that train; bfloat16 takes hardware
    select: Literal["validation", "last"] = "validation"  # which epoch's averaged weights are kept
    temperature: float = 0.0  # τ of inference: 0 follows the mean of each step, 1 samples
    patience: int = 15  # stop after this many epochs without a better validation accuracy
    # What follows leaves the result as it is, and is not saved with it.
    output_dir: Path = Path(".")  # folder for all that is written
    resume: bool = False  # go on from noprop_hybrid.pt in the output folder, exactly
    checkpoint_minutes: float = 10.0  # save after so many minutes inside an epoch too
    data_root: Path = Path(__file__).resolve().parent / "data"  # holds MNIST/raw/*.gz, or a folder a class
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the accelerator if there is one
    threads: int = torch.get_num_threads()  # on the CPU; the result does not depend on it
    deterministic: bool = False  # on a GPU: only algorithms that repeat themselves; a CPU's always do
    embedding_from: Path | None = None  # a checkpoint whose label embedding is taken, and stays fixed
    merge: tuple[Path, ...] = ()  # checkpoints of separately trained blocks: put them together
    config: Path | None = None  # a JSON file of settings, such as hpo_best.json: over --preset, below flags
    evaluate: Path | None = None  # a checkpoint: print its test accuracy
    predict: tuple[Path, ...] = ()  # a checkpoint, then image files: classify them
    early_exit: float = 1.0  # of these two: an image leaves the chain once a class is more probable than this
    run_hpo: bool = RUN_HPO  # search hyperparameters with Optuna, then train with the best
    hpo_trials: int = 60  # trials of the search, those of earlier calls and of other workers included
    hpo_epochs: int = 3  # epochs of a trial
    hpo_timeout: float | None = None  # seconds after which no new trial starts
    hpo_objective: Literal["loss", "error"] = "loss"  # of validation images: the cross-entropy ranks better
    hpo_storage: str | None = None  # database URL for workers on several machines; None: noprop_hpo.db
    hpo_final_run: bool = True  # train with the best trial's settings after the search

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        object.__setattr__(self, "classes", tuple(self.classes))  # a list where it comes from a file
        classes = self.source.classes
        for names, holds, rule in (
            ("epochs num_blocks patience threads hpo_trials hpo_epochs", lambda x: x >= 1, "at least 1"),
            ("batch_size", lambda x: x >= 2, "at least 2"),
            ("image_size", lambda x: x >= 28, "at least 28"),
            ("lr max_norm_embed grad_clip", lambda x: 0 < x < math.inf, "positive"),
            ("checkpoint_minutes", lambda x: x > 0, "positive"),
            ("hpo_timeout", lambda x: x is None or x > 0, "positive"),
            ("eta_loss_weight lambda_global", lambda x: 0 <= x < math.inf, "0 or positive"),
            ("weight_decay embed_wd temperature", lambda x: 0 <= x < math.inf, "0 or positive"),
            ("eta_min", lambda x: 0 <= x <= self.lr, f"between 0 and lr ({self.lr})"),
            ("ema_decay", lambda x: 0 <= x < 1, "at least 0 and below 1"),
            ("early_exit", lambda x: 0 < x <= 1, "above 0, at most 1"),
            ("embed_dim", lambda x: x is None or x >= classes, f"at least {classes}, a row a class"),
            ("train_images", lambda x: x is None or x >= self.batch_size, "None or at least batch_size"),
        ):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")
        if self.embed_dim not in (None, self.dim):
            raise ValueError(f"embedding {self.embedding} has {self.dim} dimensions: leave embed_dim out")
        if self.objective == "backprop" and (self.blocks or self.temperature or self.classify == "z"):
            raise ValueError("backprop trains all blocks as one: leave out blocks, temperature, classify z")
        for name in WITHOUT_EFFECT[self.objective]:
            if getattr(self, name) != getattr(Config, name):
                raise ValueError(f"{name} has no effect on objective {self.objective}: leave it out")
        if self.classes and self.dataset != "folder" or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes are those of dataset folder, each of them once")
        if self.eta_loss_weight == 0 and (self.lambda_global == 0 or self.objective == "dt"):
            raise ValueError("the weights of the blocks' loss are 0: they would learn nothing")
        if self.temperature and self.weights != "ddpm":
            raise ValueError("a temperature above 0 samples, which takes --weights ddpm")
        if sum(map(bool, (self.evaluate, self.predict, self.merge, self.run_hpo, self.resume))) > 1:
            raise ValueError("choose one of evaluate, predict, merge, run_hpo and resume")
        if not all(1 <= t <= self.num_blocks for t in self.own_blocks):
            raise ValueError(f"blocks must lie between 1 and num_blocks ({self.num_blocks}): {self.blocks}")
        if len(set(self.own_blocks)) < max(1, len(self.own_blocks)):
            raise ValueError(f"blocks must name blocks, each of them once, not {self.blocks}")
        if self.blocks and (self.run_hpo or self.evaluate or self.predict):
            raise ValueError(f"run_hpo, evaluate and predict take all blocks, not {self.blocks} alone")
        if self.blocks and (self.learns_embedding or self.select != "last"):
            raise ValueError("blocks takes --embedding fixed (or --embedding-from) and --select last")
        if self.embedding_from and self.embedding != "fixed":
            raise ValueError("embedding_from freezes the embedding that it takes: leave --embedding out")
        if self.early_exit < 1 and not (self.evaluate or self.predict):
            raise ValueError("early_exit goes with evaluate or predict")
        if self.early_exit < 1 and self.evaluate and self.temperature:
            raise ValueError("early_exit does not sample: it takes --temperature 0")

    def path(self, name: str) -> Path:
        """An output file; the objective stands in its name where name has {}."""
        return self.output_dir / name.format(self.objective)

    @property
    def dim(self) -> int:
        """D, which some embeddings decide themselves."""
        own = {"onehot": self.source.classes, "prototype": math.prod(self.source.shape)}
        return own.get(self.embedding) or self.embed_dim or max(20, self.source.classes)

    @property
    def source(self) -> Source:
        if self.dataset == "folder":
            return Source("", len(self.classes), (3, self.image_size, self.image_size), True)
        return SOURCES[self.dataset]

    @property
    def learns_embedding(self) -> bool:
        return self.embedding in ("learned", "prototype")

    @property
    def own_blocks(self) -> list[int]:
        """The blocks that this run trains, 1 ... T; raises ValueError where blocks can't be read."""
        spans = [x.split("-") for x in (self.blocks or f"1-{self.num_blocks}").split(",")]
        if not all(x.isdecimal() for span in spans for x in span) or any(len(span) > 2 for span in spans):
            raise ValueError(f"blocks must look like 3,4 or 3-5, not {self.blocks}")
        last = self.num_blocks + 1  # is out of range, and enough of it
        return [t for span in spans for t in range(int(span[0]), min(int(span[-1]), last) + 1)]

    def saved(self) -> dict[str, Any]:
        """The fields that decide the result, as they are in a JSON file."""
        fields = list((dataclasses.asdict(self) | {"classes": list(self.classes)}).items())
        return dict(fields[: [name for name, _ in fields].index("output_dir")])


class Draft(Config):
    """A config that is not checked yet: the flags without what a preset adds to them."""

    def __post_init__(self):
        pass


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "accurate": {"block": "deep"},
    # the description that this project started from, at consistent noise levels; meant for a GPU
    "reference": {"epochs": 100, "batch_size": 128, "block": "reference", "target": "noise"}
    | {"lr": 0.01, "weights": "ddpm", "schedule": "cosine", "ema_decay": 0.0, "augment": False},
}

OBJECTIVES: dict[str, dict[str, Any]] = {  # what an objective changes where no flag says otherwise
    "hybrid": {},
    "dt": dict(target="classes", classify="z", eta_loss_weight=0.1, weights="ddpm", temperature=1.0),
    "backprop": {},
}
# settings that an objective does not know
WITHOUT_EFFECT = {"hybrid": (), "dt": ("lambda_global",), "backprop": ("eta_loss_weight", "lambda_global")}
# the paper's whole setting for MNIST; meant for a GPU
PRESETS["paper"] = {"objective": "dt", "epochs": 100, "patience": 100, "batch_size": 128}
PRESETS["paper"] |= {"block": "paper", "lr": 1e-3, "schedule": "constant", "ema_decay": 0.0, "augment": False}
PRESETS["paper"] |= {"embed_wd": 1e-3, "max_norm_embed": 1e9, "grad_clip": 1e9}  # neither clip is the paper's


# --- Data --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """images uint8 (N, C, H, W) and labels int64 (N,), on the device."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Images to train on (of MNIST 55,000), to choose by (5,000), and such that decide nothing (10,000)."""

    train: Split
    val: Split
    test: Split | None  # None: a search never sees a test image


MD5 = {  # of MNIST's files, packed and unpacked
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}


def read_mnist_file(folder: Path, name: str, sums: dict[str, tuple[str, ...]] = MD5) -> bytes:
    """Contents of one file in MNIST's format, checked by md5; raises Failure if absent or damaged."""
    for path, md5 in zip((folder / f"{name}.gz", folder / name), sums[name], strict=False):
        if path.exists():
            content = path.read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise Failure(f"{path} is damaged (md5 is not {md5}): put a fresh copy in its place")
            return gzip.decompress(content) if path.suffix == ".gz" else content
    raise Failure(f"{folder / name}.gz is missing: put the four files there, or see --data-root")


def read_mnist(root: Path, name: str = "MNIST") -> tuple[Split, Split]:
    """Training and test images of root/NAME/raw, in MNIST's format. Raises Failure."""
    folder, sums = root / name / "raw", MD5
    if name != "MNIST":
        from torchvision import datasets

        sums = {Path(file).stem: (md5,) for file, md5 in getattr(datasets, name).resources}
        if not all((folder / f"{file}.gz").exists() for file in sums):
            files = ", ".join(f"{file}.gz" for file in sums)
            download(name, root, f"put {files} into {folder}")

    def read(prefix: str) -> Split:
        images = bytearray(read_mnist_file(folder, f"{prefix}-images-idx3-ubyte", sums)[16:])
        labels = bytearray(read_mnist_file(folder, f"{prefix}-labels-idx1-ubyte", sums)[8:])
        images, labels = (torch.frombuffer(x, dtype=torch.uint8) for x in (images, labels))
        return Split(images.view(-1, 1, 28, 28), labels.long())

    return read("train"), read("t10k")


def download(name: str, root: Path, otherwise: str) -> list:
    """Training and test set as torchvision has them, downloaded if need be. Raises Failure."""
    from torchvision import datasets

    lock = FileLock(Path(tempfile.gettempdir()) / f"noprop_{name}_{getpass.getuser()}.lock")  # others wait
    try:
        with lock:
            return [getattr(datasets, name)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise Failure(
            f"{root} has no good {name}, which can't be downloaded ({reason}): {otherwise}"
        ) from error


def read_cifar(root: Path, name: str) -> tuple[Split, Split]:
    """Training and test images of CIFAR-10 or CIFAR-100. Raises Failure."""
    archive = "cifar-10-python.tar.gz" if name == "CIFAR10" else "cifar-100-python.tar.gz"
    sets = download(name, root, f"put {archive} there")
    return tuple(
        Split(torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(x.targets))
        for x in sets
    )


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the classes of a folder of pictures: its subfolders, or those of its subfolder train."""
    train = root / "train" if (root / "train").is_dir() else root
    names = sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else []
    if len(names) < 2:
        raise Failure(f"--data-root {root} must hold a folder of pictures for each class, two at least")
    return tuple(names)


def read_folder(root: Path, config: Config) -> tuple[Split, Split]:
    """Pictures in root/CLASS, or in root/train/CLASS and root/test/CLASS. Raises Failure.

    Where there is no test folder, a picture is for testing if the hash of its name says so, which is true of
    a sixth: so it stays one when others are added.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def read(folder: Path, testing: bool | None = None) -> Split:
        try:
            found = make_dataset(str(folder), {x: i for i, x in enumerate(config.classes)}, IMG_EXTENSIONS)
        except (OSError, ValueError) as error:
            raise Failure(f"cannot read the pictures in {folder}: {str(error).splitlines()[0]}") from error
        found = [(Path(path), label) for path, label in found]
        found = [x for x in found if testing in (None, for_testing(x[0].relative_to(folder).as_posix()))]
        if len(found) < 10:
            raise Failure(f"{folder} has too few pictures: {len(found)} of at least 10")
        images = torch.stack([read_picture(path, config) for path, _ in found])
        return Split(images, torch.tensor([label for _, label in found]))

    def for_testing(name: str) -> bool:
        return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 6 == 0

    train = root / "train" if (root / "train").is_dir() else root
    if train != root and (root / "test").is_dir():
        return read(train), read(root / "test")
    return read(train, testing=False), read(train, testing=True)


def split_data(train: Split, test: Split, device: torch.device, train_images: int | None = None) -> Data:
    """The three splits, alike for every seed: 5,000 training images, at most a tenth, are for validation."""
    train, test = (Split(*(x.to(device) for x in part)) for part in (train, test))
    order = torch.randperm(len(train.labels), generator=generator("split")).to(device)
    held_out = min(5000, len(order) // 10)
    val, rest = order[:held_out], order[held_out:][:train_images]
    return Data(Split(*(x[rest] for x in train)), Split(*(x[val] for x in train)), test)


def load_data(config: Config, device: torch.device) -> Data:
    """The three splits of the config's data set. Raises Failure."""
    root, name = config.data_root, config.source.name
    if config.dataset == "folder":
        parts = read_folder(root, config)
    else:
        parts = read_cifar(root, name) if "cifar" in config.dataset else read_mnist(root, name)
    data = split_data(*parts, device, config.train_images)
    if config.batch_size > len(data.train.labels) and not config.evaluate:
        raise Failure(
            f"--batch-size {config.batch_size} is more than the {len(data.train.labels)} training images"
        )
    return data


def prototypes(split: Split, classes: int) -> Tensor:
    """Of each class the image, (classes, C·H·W) in [0, 1], whose median distance to the others is smallest.

    The paper's "prototype" embedding, which is learned from there. Raises Failure for a class without images.
    """
    chosen = []
    for label in range(classes):
        images = to_float(split.images[split.labels == label]).flatten(1)
        if not len(images):
            raise Failure(f"--embedding prototype needs images of each class: class {label} has none")
        chosen.append(images[torch.cdist(images, images).median(1).values.argmin()])
    return torch.stack(chosen)


def augment(images: Tensor, noise: torch.Generator, flip: bool = False) -> Tensor:
    """Images (B, C, H, W), turned by ≤ 12°, scaled by ≤ 10 %, shifted by ≤ 6 % of the width; or mirrored."""
    limits = torch.tensor([[math.radians(12)], [0.1], [0.12], [0.12]])  # shifts: 1 is half the width
    angle, scale, dx, dy = (torch.rand(4, len(images), generator=noise) * 2 - 1) * limits
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    if flip:
        mirrored = send(torch.rand(len(images), 1, 1, 1, generator=noise), images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(send(theta, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --- Processes ---------------------------------------------------------------------------------------------

CONTROL_STEPS = 10  # several processes agree so often whether to save or to stop


@contextmanager
def processes() -> Iterator[None]:
    """Where torchrun has started several processes: connect them, and raise Failure (1) if one is missing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    on_gpu = torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=10))
    except RuntimeError as error:
        raise Failure(f"the processes did not find each other: {str(error).splitlines()[0]}", 1) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def collective(call: Callable, *arguments) -> None:
    """A collective of torch.distributed; raises Failure (1) if another process is gone."""
    if dist.is_initialized():
        try:
            call(*arguments)
        except RuntimeError as error:
            raise Failure("another process of this run is gone: --resume goes on", 1) from error


def on_first(function: Callable, *arguments) -> Any:
    """What function returns in the first process, in all of them; where it fails, all of them fail."""
    outcome: list[Any] = [None, None]
    if rank_and_size()[0] == 0:
        try:
            outcome[0] = function(*arguments)
        except (Failure, FloatingPointError, SystemExit) as error:
            outcome[1] = error
    collective(dist.broadcast_object_list, outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def largest(value: int) -> int:
    """The largest of all processes' values."""
    tensor = torch.tensor(value)
    collective(dist.all_reduce, tensor, dist.ReduceOp.MAX)
    return int(tensor)


# --- Training and evaluation -------------------------------------------------------------------------------


def build(config: Config) -> NoProp:
    """The untrained network of a config."""
    sizes = config.num_blocks, config.source.classes, config.dim, config.source.shape
    options = BLOCKS[config.block] | {"target": config.target, "equal_weights": config.weights == "equal"}
    model = NoProp(*sizes, seed=config.seed, reads_z=config.classify == "z", **options)
    return model.to(memory_format=torch.channels_last)  # twice as fast as NCHW on a CPU


@torch.no_grad()
def start_embedding(model: NoProp, config: Config, images: Split | None) -> NoProp:
    """The network, its embedding one-hot, or an image of each class, or another network's. Raises Failure."""
    weight = model.label_embedding.weight
    if config.embedding == "onehot":
        nn.init.eye_(weight)
    if config.embedding == "prototype" and images:
        weight.copy_(prototypes(images, config.source.classes))
    if config.embedding_from:
        embedding = load(config.embedding_from).label_embedding.weight
        if embedding.shape != weight.shape:
            raise Failure(f"the label embedding of {config.embedding_from} is of another --embed-dim")
        weight.copy_(embedding)
    return model


@contextmanager
def workers(device: torch.device, threads: int) -> Iterator[Callable]:
    """A map() over independent jobs: on a CPU, as many at once as there are threads, each on one thread.

    Blocks are small and independent: a core for each block beats all cores on one block after another, and a
    block's result is the same bit for bit however many threads there are. Accelerators take jobs in order.
    """
    if device.type != "cpu":
        yield map
        return
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map if threads > 1 else map
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks, which each step would fault in again: a tenth of its time.

    Where there is no glibc, nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks of up to 32 MiB come from the heap
            mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: which shrinks only if 1 GiB at its end is free


def flatten(part: nn.Module) -> nn.Parameter:
    """A part's parameters as one vector: they become views of it, and their gradients of its gradient.

    So a block's clip, its optimizer's step and its average are one operation each, not one a tensor.
    """
    parameters = list(part.parameters())
    flat = nn.Parameter(torch.cat([x.detach().as_strided((x.numel(),), (1,)) for x in parameters]))
    flat.grad, sizes = torch.zeros_like(flat), [x.numel() for x in parameters]
    for x, data, grad in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        x.data, x.grad = (v.as_strided(x.shape, x.stride()) for v in (data, grad))
    return flat


def part_names(blocks: list[int], num_blocks: int) -> list[str]:
    """Names of the parts that are trained where these blocks are: the classifier goes with block T."""
    return [f"blocks.{t - 1}" for t in blocks] + ["classifier"] * (num_blocks in blocks)


class Training:
    """All that changes while training: weights, their average, optimizers, position, history, selection.

    A part is a block, the classifier or the embedding. Of several processes each trains own_blocks, the last
    block's the classifier too, and all of them the embedding, alike; gather() brings everything to the first.
    The embedding starts orthonormal, or as one-hot rows, or as an image of each class, chosen among images.
    """

    PLAIN = ("step", "lr", "seconds", "selected_epoch", "history")

    def __init__(self, config: Config, device: torch.device, images: Split | None = None):
        self.config, self.device = config, device
        rank, size = rank_and_size()
        self.own_blocks = config.own_blocks[rank::size]
        self.model = start_embedding(build(config).to(device), config, images)
        self.averaged = copy.deepcopy(self.model).eval()
        self.embedding_norm_start = self.model.label_embedding.weight.norm(dim=1).mean().item()
        self.parts, self.optimizers, self.tensors = {}, {}, {}  # by name
        everything = list(range(1, config.num_blocks + 1))
        for name in [*part_names(everything, config.num_blocks), "label_embedding"]:
            modules = [network.get_submodule(name) for network in (self.averaged, self.model)]
            averaged, vector = (flatten(module) for module in modules)
            self.parts[name] = vector
            self.optimizers[name] = torch.optim.AdamW(
                [vector],
                weight_decay=config.embed_wd if name == "label_embedding" else config.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )
            statistics = ([x for x in module.buffers() if x.is_floating_point()] for module in modules)
            vectors = (averaged.detach(), vector.detach())
            self.tensors[name] = [[flat, *more] for flat, more in zip(vectors, statistics, strict=True)]
        self.step, self.lr, self.seconds, self.selected_epoch = 0, 0.0, 0.0, 0
        self.log: list[Tensor] = []  # what train_step() returned in the steps of this epoch
        self.history: list[dict[str, Any]] = []
        self.selected = self.averaged.state_dict()

    def update(self, name: str, lr: float) -> Tensor:
        """Clip one part's gradient by itself, step, move its average; returns the gradient's norm."""
        optimizer = self.optimizers[name]
        norm = nn.utils.clip_grad_norm_([self.parts[name]], self.config.grad_clip)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the parameters' gradients are views of this one
        if name == "label_embedding":
            self.model.label_embedding.weight.data.renorm_(2, 0, self.config.max_norm_embed)  # each row
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))  # young weights count for less
        averaged, current = self.tensors[name]
        torch._foreach_lerp_(averaged, current, 1 - decay)
        return norm

    def states(self, name: str) -> list:
        """What holds the state of a part."""
        return [self.model.get_submodule(name), self.averaged.get_submodule(name), self.optimizers[name]]

    def gather(self) -> None:
        """Bring what each process has trained, and the log of this epoch, to the first process."""
        rank, size = rank_and_size()
        if size == 1:
            return
        names = part_names(self.own_blocks, self.config.num_blocks)
        mine = {name: [state.state_dict() for state in self.states(name)] for name in names}
        sent = tree_map_only(Tensor, Tensor.cpu, (mine, self.log))
        received: list[Any] | None = [None] * size if rank == 0 else None
        collective(dist.gather_object, sent, received)
        if received is None:
            self.log = [torch.zeros_like(row) for row in self.log]
            return
        for parts, _ in received[1:]:
            for name, states in parts.items():
                for holder, state in zip(self.states(name), states, strict=True):
                    holder.load_state_dict(state)
        self.log = [sum(rows).to(self.device) for rows in zip(*(log for _, log in received), strict=True)]

    def record(self, record: dict[str, Any], val_images: int) -> None:
        """Append an epoch to the history, and select its weights, by default by the one-standard-error rule.

        Of the epochs within one standard error of the best validation accuracy, which that split can't tell
        apart, the last is selected: it has averaged more weights at a lower learning rate.
        """
        self.history.append(record)
        if self.config.select == "validation":
            best = max(record["val_accuracy"] for record in self.history)
            better = record["val_accuracy"] >= best - standard_error(best, val_images)
        if self.config.select == "last" or better:
            self.selected, self.selected_epoch = copy.deepcopy(self.averaged.state_dict()), record["epoch"]

    def out_of_patience(self) -> bool:
        if not self.history or self.config.select == "last":
            return False
        best = max(self.history, key=lambda record: record["val_accuracy"])
        return self.history[-1]["epoch"] - best["epoch"] >= self.config.patience

    def stateful(self) -> dict[str, Any]:
        return {"model": self.model, "averaged": self.averaged} | self.optimizers

    def state_dict(self) -> dict[str, Any]:
        """What going on takes, beside the config and the selected weights."""
        plain = {name: getattr(self, name) for name in (*self.PLAIN, "log")}
        return plain | {name: part.state_dict() for name, part in self.stateful().items()}

    def load_state_dict(self, state: dict[str, Any], selected: dict[str, Tensor]) -> None:
        """Go on where state_dict() was taken."""
        for name, part in self.stateful().items():
            part.load_state_dict(state[name])
        for name in self.PLAIN:
            setattr(self, name, state[name])
        mine = rank_and_size()[0] == 0  # the log of an epoch is a sum over processes
        self.log = [entry.to(self.device) * mine for entry in state["log"]]
        self.selected = selected if self.history else self.selected


def learning_rate(progress: float, config: Config) -> float:
    """The learning rate after a fraction of all steps."""
    if config.schedule == "constant":
        return config.lr
    warm_up = 0.2 if config.schedule == "one-cycle" else 0.0
    if progress < warm_up:
        return config.lr * (0.04 + 0.96 * progress / warm_up)
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))
    return config.eta_min + (config.lr - config.eta_min) * cosine


def train_block(training: Training, t: int, image: Tensor, u: Tensor, label: Tensor, lr: float):
    """One step of block t, alone: its losses, its gradient norms, the gradients of its loss by u and W."""
    config, model = training.config, training.model
    # the gradients for the shared embedding end here, and are handed over
    u, embedding = u.detach().requires_grad_(), model.label_embedding.weight.detach().requires_grad_()
    noise = draw_noise(training, t, u)
    block, level = model.blocks[t - 1], model.alpha_bar[t - 1].item()
    set_dropout(block, config.seed, t, training.step)
    with autocast(config, u.device):
        if config.objective == "dt":
            eta = config.eta_loss_weight
            loss, u_hat = dt_loss(block, image, u, noise, model.alpha_bar, t, eta, embedding)
        else:
            weights = config.eta_loss_weight, config.lambda_global
            loss, u_hat = block_loss(block, image, u, noise, level, *weights, embedding)
    losses = {f"blocks.{t - 1}": loss}
    if t == config.num_blocks:  # the classifier is the head of the last block
        losses["classifier"] = classifier_loss(training, u_hat, u, label)
    sum(losses.values()).backward()
    found = {name: (loss.detach(), training.update(name, lr)) for name, loss in losses.items()}
    return found, (u.grad, embedding.grad)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The precision of products and convolutions in training; losses, weights and averages stay float32."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def draw_noise(training: Training, t: int | str, u: Tensor) -> Tensor:
    """ε of this step for block t, or for "z_T": like u, (B, D), and on its device."""
    noise = torch.randn(u.shape, generator=generator(training.config.seed, "noise", t, training.step))
    return send(noise, u.device)


def set_dropout(block: nn.Module, seed: int, t: int, step: int) -> None:
    """Give the dropout in block t its draws of this step."""
    for module in block.modules():
        if isinstance(module, Dropout):
            module.noise = generator(seed, "dropout", t, step)


def classifier_loss(training: Training, u_hat: Tensor, u: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the classifier, of û_T or of a z_T drawn from q(z_T | y); with dt, and the KL term."""
    config, model = training.config, training.model
    if config.classify == "z":
        u_hat = noisy_label(u, draw_noise(training, "z_T", u), model.alpha_bar[-1].item())
    loss = F.cross_entropy(model.classifier(u_hat), label)
    return loss + kl_to_noise(u, model.alpha_bar[0].item()) if config.objective == "dt" else loss


def train_step(training: Training, image: Tensor, label: Tensor, lr: float, parallel=map) -> Tensor:
    """A step of each of this process's blocks, alone; returns the step's row of the log, on the device.

    It holds T + 1 losses, of blocks and classifier, and T + 2 gradient norms, of these and the embedding.
    """
    model, zero = training.model, image.new_zeros(())
    if training.config.objective == "backprop":
        results = backprop_step(training, image, label, lr)
    else:
        u = model.label_embedding(label)  # (B, D)
        steps = parallel(lambda t: train_block(training, t, image, u, label, lr), training.own_blocks)
        results, gradients = zip(*steps, strict=True)
        results = {name: pair for result in results for name, pair in result.items()}
        if training.config.learns_embedding:
            by_u, by_w = zip(*gradients, strict=True)
            u.backward(sum(by_u))  # all that the blocks share
            for gradient in (x for x in by_w if x is not None):
                model.label_embedding.weight.grad += gradient
            collective(dist.all_reduce, training.parts["label_embedding"].grad)
            results["label_embedding"] = zero, training.update("label_embedding", lr)
    training.step += 1
    losses, norms = zip(*(results.get(name, (zero, zero)) for name in training.parts), strict=True)
    return torch.stack([*losses[:-1], *norms])


def backprop_step(training: Training, image: Tensor, label: Tensor, lr: float) -> dict[str, tuple]:
    """A step of the twin: the same network, trained end to end through all reverse steps by cross-entropy."""
    config, model = training.config, training.model
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)  # blocks wait for each other: all cores on each of them
    for t, block in enumerate(model.blocks, start=1):
        set_dropout(block, config.seed, t, training.step)
    with autocast(config, image.device):
        logits = model(image)[:, -1]
    loss = F.cross_entropy(logits.float(), label)
    loss.backward()
    through_w = config.target == "classes" and config.learns_embedding
    names = [name for name in training.parts if name != "label_embedding" or through_w]
    norms = {name: training.update(name, lr) for name in names}
    torch.set_num_threads(before)
    zero = loss.new_zeros(())
    return {name: (loss.detach() if name == "classifier" else zero, norm) for name, norm in norms.items()}


def train(
    training: Training, data: Data, parallel: Callable = map, after_step: Callable = lambda: None
) -> Iterator[dict[str, Any]]:
    """Train all blocks; yields one record an epoch. Whoever stops asking has stopped early.

    after_step is called after every step, and may raise to stop there. Raises FloatingPointError for a loss
    or gradient that is not finite.
    """
    config, (images, labels) = training.config, data.train
    steps = len(labels) // config.batch_size
    for epoch in range(len(training.history), config.epochs):
        if training.out_of_patience():
            return
        order = torch.randperm(len(labels), generator=generator(config.seed, "order", epoch))
        for batch in order.to(labels.device).split(config.batch_size)[len(training.log) : steps]:
            started = time.perf_counter()
            image = to_float(images[batch])
            if config.augment:
                address = (config.seed, "augment", training.step)
                image = augment(image, generator(*address), config.source.flip)
            training.lr = learning_rate(training.step / (steps * config.epochs), config)
            training.log.append(train_step(training, image, labels[batch], training.lr, parallel))
            if labels.device.type == "cpu":  # elsewhere, to look at a value is to wait for it
                check_finite(training)
            training.seconds += time.perf_counter() - started
            after_step()
        check_finite(training)
        training.gather()
        record = on_first(epoch_record, training, data, parallel)
        training.log = []
        training.record(record, len(data.val.labels))
        yield record


def epoch_record(training: Training, data: Data, parallel: Callable) -> dict[str, Any]:
    """What the history says of an epoch that has ended; accuracies are None where blocks are missing."""
    config, epoch = training.config, len(training.history) + 1
    losses = torch.stack(training.log).mean(0).tolist()
    record = {
        "epoch": epoch,
        "block_losses": losses[: config.num_blocks],
        "classifier_loss": losses[config.num_blocks],
        "lr": training.lr,
        "seconds": training.seconds,
    }
    unknown = {"accuracy": [None], "loss": [None]}
    val, test = (
        unknown if config.blocks or split is None else evaluate(training.averaged, split, config, parallel)
        for split in data[1:]
    )
    return record | {
        "val_accuracy": val["accuracy"][-1],
        "val_loss": val["loss"][-1],
        "test_accuracy": test["accuracy"][-1],
    }


def check_finite(training: Training) -> None:
    """Raise FloatingPointError, naming the first loss or gradient norm of this epoch that is not finite."""
    if not training.log or training.log[-1].isfinite().all():
        return
    row, column = (~torch.stack(training.log).isfinite()).nonzero()[0].tolist()
    parts = [*(f"block {t + 1}" for t in range(training.config.num_blocks)), "classifier", "embedding"]
    name = [*(f"loss of {x}" for x in parts[:-1]), *(f"gradient norm of {x}" for x in parts)][column]
    value, step = training.log[row][column].item(), training.step - len(training.log) + row + 1
    raise FloatingPointError(f"{name} is {value} in step {step}: try a lower --lr")


def evaluate(model: NoProp, split: Split, config: Config, parallel: Callable = map) -> dict[str, Any]:
    """Accuracy in percent and cross-entropy of the chain cut after each block, lists of T.

    "average" is the accuracy of the mean of the blocks' class probabilities: an ensemble's answer.
    """

    @torch.inference_mode()
    def logits(start: int) -> Tensor:
        images = to_float(split.images[start : start + 500])
        return model(images, config.temperature, generator(config.seed, "inference", start))

    predictions = torch.cat(list(parallel(logits, range(0, len(split.labels), 500)))).cpu()  # (N, T, classes)
    label = split.labels.cpu()[:, None].expand(predictions.shape[:2])
    loss = F.cross_entropy(predictions.flatten(0, 1), label.flatten(), reduction="none").view(label.shape)
    answers = torch.cat([predictions, predictions.softmax(-1).mean(1, keepdim=True)], 1).argmax(-1)
    *chain, average = (100 * (answers == split.labels.cpu()[:, None]).double().mean(0)).tolist()
    return {"accuracy": chain, "average": average, "loss": loss.mean(0).tolist()}


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error, in points, of an accuracy in percent."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


# --- Files and pictures ------------------------------------------------------------------------------------

FORMAT = "noprop-example-1"
CHECKPOINT = "noprop_{}.pt"  # {} is the objective
OUTPUTS = (CHECKPOINT, "noprop_{}.json", "training_progress_{}.png", "denoising_{}.png")


def write_file(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk, rename: the file appears whole or not at all. Raises Failure (1)."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise Failure(f"cannot write {path}: {error.strerror}", 1) from error


def checksum(value: Any) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values."""
    leaves, structure = tree_flatten(value)
    sha = hashlib.sha256(repr(structure).encode())
    for leaf in leaves:
        is_tensor = isinstance(leaf, Tensor)
        sha.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() if is_tensor else repr(leaf).encode())
        sha.update(leaf.cpu().contiguous().numpy().tobytes() if is_tensor else b"")
    return sha.hexdigest()


def save_checkpoint(path: Path, training: Training) -> None:
    """Gather config, selected weights and the state of the training, and write them. Raises Failure (1)."""
    training.gather()
    if rank_and_size()[0]:
        return
    check_finite(training)
    content = {"format": FORMAT, "config": training.config.saved(), "made_with": made_with(training.device)}
    content |= {"model": training.selected, "training": training.state_dict()}
    torch.save(content | {"checksum": checksum(content)}, file := io.BytesIO())
    write_file(path, file.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint; raises Failure for a file that is none or is damaged."""
    if not is_zipfile(path):  # also where there is no file; anything else would go to a loader of old formats
        raise Failure(f"cannot read {path}, or it is not a checkpoint of this script")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything here
        raise Failure(f"{path} is not a checkpoint of this script, or is damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Failure(f"{path} is not a checkpoint of this script (format {FORMAT})")
    if content.pop("checksum", None) != checksum(content):
        raise Failure(f"{path} is damaged: its checksum does not match")
    return content


def load(path: str | Path, device: str | torch.device = "cpu") -> NoProp:
    """The trained network of a checkpoint, ready for predict(images); its config is an attribute.

    Raises Failure for a file that is no checkpoint, is damaged, or whose weights don't fit its config.
    """
    return network_of(read_checkpoint(Path(path)), path).to(device)


def config_of(content: dict[str, Any], path: str | Path) -> Config:
    """The config in the contents of a checkpoint; raises Failure, naming the path, where it does not fit."""
    try:
        return Config(**content["config"])
    except (TypeError, ValueError) as error:
        raise Failure(f"{path} does not fit this version of the script: {error}".splitlines()[0]) from error


def network_of(content: dict[str, Any], path: str | Path) -> NoProp:
    """The network in the contents of a checkpoint; raises Failure, naming the path, where they do not fit."""
    model = build(config := config_of(content, path))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise Failure(f"{path} does not fit this version of the script: {error}".splitlines()[0]) from error
    model.config = config
    return model.eval()


def save_figure(figure, path: Path, **more) -> None:
    figure.savefig(file := io.BytesIO(), format="png", dpi=110, **more)
    write_file(path, file.getvalue())


def draw_progress(path: Path, summary: dict[str, Any]) -> None:
    """Losses, accuracies and learning rate by epoch; accuracy after each block."""
    from matplotlib.figure import Figure

    blue, orange, green = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, for colour-blind readers too
    figure = Figure(figsize=(11, 7), layout="constrained")
    (losses, blocks), (accuracies, rates) = figure.subplots(2, 2)
    history, chain = summary["history"], summary["test_accuracy_by_blocks"]
    block_loss_name = {
        "hybrid": "blocks, mean: η₁ MSE(ε̂, ε) + η₂ MSE(û, u)",
        "dt": "blocks, mean: T/2 η ΔSNR ‖û - u‖²",
        "backprop": "blocks: no losses of their own",
    }[summary["config"]["objective"]]
    for axes, name, color, marker, label in (
        (losses, "block_losses", blue, "o", block_loss_name),
        (losses, "classifier_loss", orange, "s", "classifier: cross-entropy"),
        (accuracies, "val_accuracy", blue, "o", "validation, at the end {:.2f} %"),
        (accuracies, "test_accuracy", orange, "s", "test (decides nothing), at the end {:.2f} %"),
        (rates, "lr", green, "o", "at the end of the epoch"),
    ):
        x = [record["epoch"] for record in history]
        y = [np.mean(np.array(record[name], float)) for record in history]  # None becomes nan
        axes.plot(x, y, color=color, marker=marker, markersize=4, label=label.format(*y[-1:] or [math.nan]))
    cuts, images = range(1, len(chain) + 1), summary["test_images"]
    error = [standard_error(accuracy, images) for accuracy in chain]
    label = f"test, selected weights ± standard error; at the end {chain[-1]:.2f} %"
    blocks.errorbar(cuts, chain, error, color=orange, marker="s", markersize=4, capsize=2, label=label)
    losses.set(title="Training losses", xlabel="epoch", ylabel="loss", yscale="log")
    accuracies.set(title="Accuracy of the averaged weights", xlabel="epoch", ylabel="%")
    rates.set(title="Learning rate", xlabel="epoch")
    blocks.set(title="Accuracy after each block (chain cut there)", xlabel="block", ylabel="%")
    for axes in (losses, blocks, accuracies, rates):
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    save_figure(figure, path)


@torch.inference_mode()
def draw_denoising(path: Path, model: NoProp, test: Split) -> None:
    """A dozen test images, half of them hard, and the class probabilities in z_0 ... z_T of each, at τ = 1.

    Class k has the density N(z_t; √ᾱ_t u_k, (1-ᾱ_t) I) at z_t.
    """
    from matplotlib.figure import Figure

    truth = test.labels.cpu()
    certainty = model.probabilities(test.images)[:, -1].cpu().gather(1, truth[:, None])[:, 0]
    chosen = torch.cat([torch.arange(min(6, len(truth))), certainty.argsort()[:24:4]])
    image, noise, u = to_float(test.images[chosen]), generator("denoising"), model.label_embedding.weight
    z = torch.randn(len(chosen), u.shape[1], generator=noise).to(u.device)
    steps = reverse_steps(model.alpha_bar, equal_weights=False)
    states = [z, *(z for _, z in model.reverse_process(model.blocks, image, z, steps, 1.0, noise))]
    z, level = torch.stack(states, 1).unsqueeze(2), model.alpha_bar.float().to(u.device).view(-1, 1, 1)
    distance = (z - level.sqrt() * u).square().sum(-1)  # (12, T+1, classes)
    probabilities = (-distance / (2 * (1 - level[:, :, 0]))).softmax(-1).cpu()
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    figure.suptitle("Class probabilities in z_t, from noise (t = 0) to the answer (t = T); below, hard ones")
    axes = figure.subplots(4, 6, height_ratios=(1, 1.2, 1, 1.2))
    for i, (digit, chart) in enumerate(zip(axes[::2].flat, axes[1::2].flat, strict=True)):
        if i >= len(chosen):  # a small data set
            digit.set_axis_off()
            chart.set_axis_off()
            continue
        answer, label = int(probabilities[i, -1].argmax()), int(truth[chosen[i]])
        digit.imshow(image[i].permute(1, 2, 0).cpu().numpy(), cmap="gray")  # in colour if it has some
        digit.set_axis_off()
        digit.set_title(f"{answer}" if answer == label else f"{answer} (labelled {label})", fontsize=10)
        chart.imshow(probabilities[i].T.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        chart.set(xlabel="t", ylabel="class", yticks=range(0, len(u), max(3, len(u) // 4)))
    save_figure(figure, path)


# --- Using a network ---------------------------------------------------------------------------------------


def open_picture(path: Path):
    """A PNG or JPEG, upright, on white; raises Failure for a file that can't be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Failure(f"cannot read the image {path}: {error}") from error


def read_picture(path: Path, config: Config) -> Tensor:
    """A picture file as the config's data set has its images, uint8 (C, H, W). Raises Failure."""
    from PIL import ImageOps

    if config.dataset in ("mnist", "kmnist"):
        return read_character(path).unsqueeze(0)
    channels, *size = config.source.shape
    fitted = np.array(ImageOps.fit(open_picture(path).convert("RGB" if channels == 3 else "L"), size[::-1]))
    return torch.from_numpy(fitted).view(*size, channels).permute(2, 0, 1)


def read_character(path: Path) -> Tensor:
    """A picture as MNIST would have it, uint8 (28, 28): light on dark, 20 pixels large, centred by mass.

    Ink is what differs from the border's median, so dark on light and light on dark both work. Raises Failure
    for a file that can't be read and for an empty picture.
    """
    from PIL import Image

    gray = np.asarray(open_picture(path).convert("L"), np.float32)
    ink = np.abs(gray - np.median(np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])))
    if ink.max() < 16:
        raise Failure(f"{path} shows nothing: it is all one shade")
    rows, columns = (np.flatnonzero((ink > 0.25 * ink.max()).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / ink.max()
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    y, x = ((ink.sum(axis) @ np.arange(n)) / ink.sum() for axis, n in ((1, height), (0, width)))
    top, left = np.clip([round(13.5 - y), round(13.5 - x)], 0, [28 - height, 28 - width])
    canvas = np.zeros((28, 28), np.float32)
    canvas[top : top + height, left : left + width] = ink
    return torch.from_numpy((canvas * 255).round().astype(np.uint8))


def classify(config: Config, device: torch.device) -> None:
    """Print the class of each picture file of --predict, with the three most probable ones."""
    checkpoint, *pictures = config.predict
    if not pictures:
        raise Failure("--predict takes a checkpoint and then at least one image file")
    model = load(checkpoint, device)
    images = torch.stack([read_picture(path, model.config) for path in pictures])
    names = model.config.classes or range(model.config.source.classes)
    for path, probability in zip(pictures, model.early_exit(images, config.early_exit)[0], strict=True):
        top = probability.topk(min(3, len(probability))).indices.tolist()
        best = [f"{names[k]}: {100 * probability[k]:.1f} %" for k in top]
        print(f"{path}: {names[top[0]]}  ({', '.join(best)})")


def evaluate_checkpoint(config: Config, device: torch.device) -> None:
    """Print the test accuracy of the trained network of --evaluate."""
    model, test = load(config.evaluate, device), load_data(config, device).test
    model.steps = reverse_steps(model.alpha_bar, config.weights == "equal")
    with workers(device, config.threads) as parallel:
        if config.early_exit < 1:
            probability, blocks = model.early_exit(test.images, config.early_exit)
            accuracy = 100 * (probability.argmax(-1) == test.labels).float().mean().item()
            print(f"Early exit: {blocks.mean():.2f} of {len(model.blocks)} blocks an image.")
        else:
            accuracy = evaluate(model, test, config, parallel)["accuracy"][-1]
    print(f"Test accuracy {accuracy:.2f} ± {standard_error(accuracy, len(test.labels)):.2f} %.")


# --- Runs --------------------------------------------------------------------------------------------------


def catch_signals() -> Callable[[], int]:
    """A function that tells the number of the first SIGINT or SIGTERM, or 0; the second leaves at once.

    Not so under torchrun, which hands on what the terminal has sent to all already.
    """
    received: list[int] = []

    def note(number: int, _frame) -> None:
        if received and not dist.is_initialized():
            os._exit(128 + number)
        received.append(number)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return lambda: received[0] if received else 0


def pick_device(name: str) -> torch.device:
    """The device of that name; for "auto" the accelerator if there is one, else the CPU. Raises Failure."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    if name == "cuda" and dist.is_initialized() and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        (probe := torch.zeros(1, device=name)).item()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Failure(f"--device {name} can't be used here: {str(error).splitlines()[0]}") from error


def made_with(device: torch.device) -> dict[str, str]:
    """What a run's last bits depend on, beside its config."""
    return {"device": device.type, "machine": platform.machine(), "torch": version("torch")}


def make_folder(folder: Path) -> None:
    """Make the folder if need be, and try to write into it. Raises Failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Failure(f"cannot write into --output-dir {folder}: {error.strerror}") from error


class FolderInUse(Failure):
    """Another run writes into the output folder."""


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out while this lasts. Raises Failure, FolderInUse."""
    lock = FileLock(folder / ".noprop_run.lock", timeout=0)  # goes when its owner dies

    def acquire() -> None:
        make_folder(folder)
        try:
            lock.acquire()
        except Timeout as error:
            raise FolderInUse(f"another run writes into {folder}: choose another --output-dir") from error

    on_first(acquire)
    try:
        yield
    finally:
        lock.release()


def begin(config: Config, device: torch.device, path: Path, images: Split) -> Training:
    """A new training, keeping an older checkpoint under another name; or, with --resume, the checkpoint's."""
    training, content = Training(config, device, images), on_first(previous, config, device, path)
    if content:
        try:
            training.load_state_dict(content["training"], content["model"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Failure(f"{path} was made by another version of the script: it can't be resumed") from error
    return training


def previous(config: Config, device: torch.device, path: Path) -> dict[str, Any] | None:
    """The checkpoint to resume, or None after moving an older one out of the way."""
    if path.exists() and config.resume:
        content = read_checkpoint(path)
        history, step = (content["training"].get(name) for name in ("history", "step"))
        print(f"Resuming {path}: {len(history or [])} epochs and {step} steps are done.")
        if content["made_with"] != made_with(device):
            print(f"It won't be exact to the bit: {content['made_with']} is now {made_with(device)}.")
        return content
    if path.exists():
        older = path.with_suffix(".previous.pt")
        os.replace(path, older)
        print(f"Kept the older {path} as {older}.")
    elif config.resume:
        print(f"Nothing to resume at {path}: starting from the beginning.")
    return None


def summarize(training: Training, model: NoProp, data: Data, parallel: Callable) -> dict[str, Any]:
    """What noprop_hybrid.json, or that of another objective, says of a run; accuracies in percent."""
    config, history, device = training.config, training.history, training.device
    norm_end = model.label_embedding.weight.norm(dim=1).mean().item()
    val, test = (evaluate(model, split, config, parallel) for split in data[1:])
    seen = [x["test_accuracy"] for x in history if x["test_accuracy"] is not None]
    return {
        "config": config.saved(),
        "seed": config.seed,
        "device": str(device),
        "versions": made_with(device),
        "epochs": len(history),
        "finished": len(history) == config.epochs or training.out_of_patience(),
        "selected_epoch": training.selected_epoch,
        "seconds": training.seconds,
        "val_accuracy": val["accuracy"][-1],
        "test_accuracy": test["accuracy"][-1],
        "best_test_accuracy": max(seen, default=test["accuracy"][-1]),
        "test_images": len(data.test.labels),
        "test_accuracy_by_blocks": test["accuracy"],
        "test_accuracy_average": test["average"],
        "embedding_norm_start": norm_end if config.embedding == "fixed" else training.embedding_norm_start,
        "embedding_norm_end": norm_end,
        "history": history,
    }


def matmul_peak(device: str, dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """GFLOP/s of products of square matrices, the best of twenty."""
    a, seconds = torch.rand(size, size, device=device).to(dtype), []
    for _ in range(20):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - started)
    return 2e-9 * size**3 / min(seconds)


def bfloat16_slowdown(device: torch.device) -> float:
    """Time of bfloat16 products ÷ float32's: without instructions for them, a CPU has up to hundreds."""
    return matmul_peak(str(device), size=256) / matmul_peak(str(device), torch.bfloat16, size=256)


def print_summary(summary: dict[str, Any], config: Config) -> None:
    accuracy, chain = summary["test_accuracy"], summary["test_accuracy_by_blocks"]
    images = summary["test_images"]
    chosen = "chosen on validation images" if config.select == "validation" else "the last one"
    print(f"""
Test accuracy    {accuracy:.2f} ± {standard_error(accuracy, images):.2f} % (± for {images:,} images)
Weights          epoch {summary["selected_epoch"]}, {chosen}
Best test epoch  {summary["best_test_accuracy"]:.2f} % (chosen on the test set, as the original did)
After block 1 …  {" ".join(f"{x:.2f}" for x in chain)} % (chain cut there)
Blocks' average  {summary["test_accuracy_average"]:.2f} % (of the class probabilities of all blocks)
Time             {summary["seconds"]:.0f} s of training, {summary["seconds_total"]:.0f} s in all
Machine          {summary["device"]}, float32 matmul peak {matmul_peak(summary["device"]):.0f} GFLOP/s
Files            {", ".join(config.path(name).name for name in OUTPUTS)}
Folder           {config.output_dir.resolve()}""")


def finish(training: Training, data: Data, parallel: Callable, started: float) -> dict[str, Any]:
    """Evaluate the selected weights, write the summary and the pictures; returns the summary."""
    checkpoint, summary_file, progress, denoising = (training.config.path(name) for name in OUTPUTS)
    model = load(checkpoint, training.device)
    summary = summarize(training, model, data, parallel)
    draw_denoising(denoising, model, data.test)
    draw_progress(progress, summary)
    summary["seconds_total"] = time.perf_counter() - started
    write_file(summary_file, json.dumps(summary, indent=1).encode())
    return summary


def epoch_line(record: dict[str, Any], config: Config) -> str:
    losses = [record["block_losses"][t - 1] for t in config.own_blocks]
    accuracies = "" if config.blocks else "validation {val_accuracy:.2f} %, test {test_accuracy:.2f} %  "
    return (
        f"epoch {record['epoch']:>3}/{config.epochs}  loss of blocks {np.mean(losses):.4f}, "
        f"classifier {record['classifier_loss']:.4f}  {accuracies.format(**record)}"
        f"lr {record['lr']:.6f}  {record['seconds']:.0f} s"
    )


def run(config: Config, device: torch.device) -> int:
    """Train, evaluate, write all files; returns the exit code."""
    started, code, signalled = time.perf_counter(), 0, catch_signals()
    data = load_data(config, device)
    path, (rank, size) = config.path(CHECKPOINT), rank_and_size()
    if size > 1 and config.objective == "backprop":
        raise Failure("backprop trains all blocks as one network: start it without torchrun")
    if size > len(config.own_blocks):
        raise Failure(f"{size} processes for {len(config.own_blocks)} blocks: start at most one a block")
    with output_folder(config.output_dir), workers(device, config.threads) as parallel:
        training = begin(config, device, path, data.train)
        steps = config.epochs * (len(data.train.labels) // config.batch_size)
        bar = tqdm(total=steps, initial=training.step, disable=rank > 0 or None, unit="step", leave=False)
        if rank == 0:
            weights, images = sum(x.numel() for x in training.model.parameters()), len(data.train.labels)
            print(f"NoProp on {device}: {config.num_blocks} blocks, {weights:,} weights; {images:,} images")
            if config.precision == "bfloat16" and (slower := bfloat16_slowdown(device)) > 1:
                print(f"--precision bfloat16 is {slower:.1f} times slower than float32 here: leave it out.")
        due = time.monotonic() + 60 * config.checkpoint_minutes

        def after_step() -> None:
            nonlocal due
            bar.update()
            if training.step % CONTROL_STEPS and size > 1:
                return
            wish = largest(signalled() or int(time.monotonic() > due))
            if wish == 1:
                save_checkpoint(path, training)
                due = time.monotonic() + 60 * config.checkpoint_minutes
            elif wish:
                raise KeyboardInterrupt(wish)

        try:
            for record in train(training, data, parallel, after_step):
                save_checkpoint(path, training)
                if rank == 0:
                    bar.write(epoch_line(record, config))
                if number := largest(signalled()):
                    raise KeyboardInterrupt(number)
        except KeyboardInterrupt as interrupt:
            code = 128 + interrupt.args[0]
            save_checkpoint(path, training)
            if rank == 0:
                bar.write(f"Stopped after step {training.step} of {steps}; the same with --resume goes on.")
        finally:
            bar.close()
        summary = finish(training, data, parallel, started) if rank == 0 and not config.blocks else None
    if summary:
        print_summary(summary, training.config)
    elif rank == 0:
        print(f"Blocks {config.blocks} are in {path}; --merge puts them and the others together.")
    return code


def merge(config: Config, device: torch.device) -> int:
    """Put the separately trained blocks of --merge together, evaluate, write all files."""
    started, merged = time.perf_counter(), merged_checkpoint(config.merge)
    places = {"output_dir": config.output_dir, "data_root": config.data_root}
    whole = dataclasses.replace(merged["config"], **places)
    path = whole.path(CHECKPOINT)
    data = load_data(whole, device)
    with output_folder(config.output_dir), workers(device, config.threads) as parallel:
        previous(whole, device, path)
        training = Training(whole, device)
        training.load_state_dict(merged["training"], merged["model"])
        save_checkpoint(path, training)
        summary = finish(training, data, parallel, started)
    print_summary(summary, training.config)
    return 0


def merged_checkpoint(paths: tuple[Path, ...]) -> dict[str, Any]:
    """Config, selected weights and training state of separately trained blocks. Raises Failure."""
    contents = [read_checkpoint(path) for path in paths]
    configs = [network_of(*pair).config for pair in zip(contents, paths, strict=True)]
    check_parts(paths, contents, configs)
    whole, exchange = contents[0], not configs[0].blocks
    for part, config in zip(contents[1:], configs[1:], strict=True):
        names = part_names(config.own_blocks, config.num_blocks)
        prefixes = tuple(f"{name}." for name in names)
        for old, new in ((whole, part), (whole["training"], part["training"])):
            for network in {"model", "averaged"} & set(old):
                tensors = new[network].items()
                old[network].update({name: x for name, x in tensors if name.startswith(prefixes)})
        whole["training"].update({name: part["training"][name] for name in names})
        logs = () if exchange else zip(*(x["training"]["log"] for x in (whole, part)), strict=True)
        whole["training"]["log"] = [mine + more for mine, more in logs] or whole["training"]["log"]
        for mine, more in (
            [] if exchange else zip(*(x["training"]["history"] for x in (whole, part)), strict=True)
        ):
            mine["block_losses"] = np.add(mine["block_losses"], more["block_losses"]).tolist()
            mine["classifier_loss"] += more["classifier_loss"]
    return whole | {"config": dataclasses.replace(configs[0], blocks=None)}


def check_parts(paths: tuple[Path, ...], contents: list[dict[str, Any]], configs: list[Config]) -> None:
    """Raise Failure where checkpoints do not belong together.

    All blocks must be there once, trained alike; but where the first file is a whole network, later ones take
    the place of its blocks, and need only fit.
    """
    exchange, whole = not configs[0].blocks, contents[0]
    fitting = ("dataset", "image_size", "classes", "classify", "num_blocks", "dim", "block", "target")
    names = fitting if exchange else set(whole["config"]) - {"blocks", "embed_dim"} | {"dim"}
    for path, part, config in zip(paths, contents, configs, strict=True):
        for name in sorted(names):
            here, there = (getattr(x, name) for x in (config, configs[0]))
            if here != there:
                raise Failure(f"{path} and {paths[0]} differ in {name}: {here} and {there}")
        if not torch.equal(*(x["model"]["label_embedding.weight"] for x in (part, whole))):
            raise Failure(f"{path} and {paths[0]} have different label embeddings")
        if part["training"]["step"] != whole["training"]["step"] and not exchange:
            raise Failure(f"{path} and {paths[0]} were not trained equally long: --resume goes on")
    for t in range(1, configs[0].num_blocks + 1):
        pairs = list(zip(paths, configs, strict=True))[exchange:]
        files = [str(path) for path, config in pairs if t in config.own_blocks]
        if len(files) > 1:
            raise Failure(f"block {t} is in {' and in '.join(files)}")
        if not files and not exchange:
            raise Failure(f"no file has block {t}")


# --- Search ------------------------------------------------------------------------------------------------

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60  # a trial without a heartbeat for so long is dead, and run again


def suggest(trial, objective: str) -> dict[str, Any]:
    """The search space, by names of Config: edit it here (what a trial offers: optuna.trial.Trial)."""
    space = {
        "lr": (1e-3, 1e-1),
        "eta_loss_weight": (0.1, 10.0),
        "lambda_global": (0.1, 10.0),
        "embed_wd": (1e-8, 1e-3),
        "weight_decay": (1e-5, 1e-1),
    }
    names = [name for name in space if name not in WITHOUT_EFFECT[objective]]
    return {name: trial.suggest_float(name, *space[name], log=True) for name in names}


def storage_url(config: Config, hide_password: bool = False) -> str:
    """The database of the search: SQLite in the output folder unless --hpo-storage names one."""
    from sqlalchemy import make_url

    url = config.hpo_storage or f"sqlite:///{(config.output_dir / 'noprop_hpo.db').resolve()}"
    return make_url(url).render_as_string() if hide_password else url


@contextmanager
def database_failures(config: Config, code: int) -> Iterator[None]:
    """Turn what a database or its driver raises into a Failure."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        url = "--hpo-storage" if isinstance(error, ArgumentError) else storage_url(config, hide_password=True)
        raise Failure(f"{url}: {str(error.__cause__ or error).splitlines()[0]}", code) from error


def open_study(config: Config):
    """The Optuna study of this search; a new one begins with a trial of the config as it is.

    SQLite unless there is a URL: its transactions survive a kill -9, and the few workers of one machine.
    Raises Failure where the storage holds a search of another space or with other settings.
    """
    import optuna
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # the script prints its own lines
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Fixed parameter .* out of range")  # of the config as it is
    url = storage_url(config)
    probe = optuna.create_study().ask()
    searched, space = suggest(probe, config.objective), probe.distributions
    settings = dataclasses.replace(config, epochs=config.hpo_epochs).saved()
    given = {name: value for name, value in settings.items() if name not in searched}
    ranges = {f"the range of {name}": str(bounds) for name, bounds in space.items()}
    described = json.loads(json.dumps(ranges | given | {"hpo_objective": config.hpo_objective}))
    start = {name: value for name, value in settings.items() if name in space}
    start = {k: x for k, x in start.items() if x is not None and x in getattr(space[k], "choices", [x])}
    for patience in (1, 1, 0):
        try:
            storage = optuna.storages.RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # it is taken for a template
                engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3),
            )
            break
        except (IntegrityError, ProgrammingError):  # workers that make the tables at once
            if not patience:
                raise
            time.sleep(patience)
    pruner = optuna.pruners.MedianPruner()  # learning curves keep their order: README, Search
    study = optuna.create_study(storage=storage, study_name="noprop", load_if_exists=True, pruner=pruner)
    if "settings" not in study.user_attrs:
        study.set_user_attr("settings", described)
        study.enqueue_trial(start, skip_if_exists=True)
    there = study.user_attrs["settings"]
    for name in there | described:
        if there.get(name) != described.get(name):
            raise Failure(
                f"{storage_url(config, True)} holds a search in which {name} is {there.get(name)}, not "
                f"{described.get(name)}: go on with that, or choose another --output-dir or --hpo-storage"
            )
    return study


class Surplus(Exception):
    """A trial too many: another worker has begun the last one."""


class Search:
    """One worker of a search: runs trials until the study has enough, whoever ran them."""

    def __init__(self, config: Config, device: torch.device, signalled: Callable[[], int]):
        self.config, self.device, self.signalled = config, device, signalled
        self.data = load_data(config, device)._replace(test=None)  # a search never sees a test image
        self.lock = FileLock(config.output_dir / ".noprop_hpo.lock")  # among the workers in this folder
        with self.lock:
            self.study = open_study(config)

    def trials(self, *states: str) -> list:
        """The trials in these states; those that count are COMPLETE or PRUNED."""
        return [x for x in self.study.get_trials(deepcopy=False) if x.state.name in states]

    def run(self, parallel: Callable) -> None:
        """Run trials. Where the last ones are with other workers, wait: a worker may die.

        Raises KeyboardInterrupt when a signal has come.
        """
        deadline, waiting = time.monotonic() + (self.config.hpo_timeout or math.inf), False
        while time.monotonic() < deadline:
            self.check_signals()
            self.bury_the_dead()
            with self.lock:  # held until trial() has begun: SQLite might give two workers the same trial
                done, running = self.trials("COMPLETE", "PRUNED"), self.trials("RUNNING")
                if len(done) >= self.config.hpo_trials:
                    return
                if len(done) + len(running) < self.config.hpo_trials:
                    self.run_trial(parallel)
                    continue
            if not waiting:
                print("The last trials are with other workers: waiting for them.", flush=True)
            waiting = True
            time.sleep(1)

    def bury_the_dead(self) -> None:
        """Fail the trials of dead workers: those whose heart has stopped are run again."""
        import optuna

        optuna.storages.fail_stale_trials(self.study)
        for trial in self.trials("RUNNING"):  # Optuna overlooks those whose heart has never beaten
            age = (datetime.now() - trial.datetime_start).total_seconds()
            if not trial.params and age > GRACE_SECONDS:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def run_trial(self, parallel: Callable) -> None:
        try:
            self.study.optimize(partial(self.trial, parallel), n_trials=1, callbacks=[self.print_trial])
        except Surplus:
            pass
        except ValueError as error:
            if "Cannot tell a" not in str(error):
                raise
            print("A trial of this worker was taken for dead, and is run by another.")

    def check_signals(self) -> None:
        if number := self.signalled():
            raise KeyboardInterrupt(number)

    def trial(self, parallel: Callable, trial) -> float:
        """The objective: a short training. One that diverges counts as stopped early."""
        import optuna

        self.lock.release()
        earlier = self.trials("COMPLETE", "PRUNED", "RUNNING")
        if sum(x.number < trial.number for x in earlier) >= self.config.hpo_trials:
            raise Surplus
        # seeded by number: two workers never try the same, nor does a search that goes on
        seed = generator(self.config.seed, "search", trial.number).initial_seed() % 2**32
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False)
        try:
            trial.set_user_attr("settings", settings := suggest(trial, self.config.objective))
            config = dataclasses.replace(self.config, epochs=self.config.hpo_epochs, **settings)
        except (TypeError, ValueError) as error:
            raise Failure(f"suggest() proposes what is no setting: {error}") from error
        try:
            for record in train(
                Training(config, self.device, self.data.train), self.data, parallel, self.check_signals
            ):
                trial.set_user_attr("record", record)
                error = 100 - record["val_accuracy"]
                cost = record["val_loss"] if config.hpo_objective == "loss" else error
                trial.report(cost, record["epoch"])
                if not math.isfinite(cost) or record["epoch"] < config.epochs and trial.should_prune():
                    raise optuna.TrialPruned
        except FloatingPointError as error:
            raise optuna.TrialPruned from error
        except KeyboardInterrupt:
            self.study.enqueue_trial(trial.params)  # to be run again
            raise
        return cost

    def print_trial(self, study, trial) -> None:
        """A line about a trial that has ended, and the time left."""
        done, others = self.trials("COMPLETE", "PRUNED"), self.trials("RUNNING")
        seconds = sum(x.duration.total_seconds() for x in done) / len(done)
        minutes = seconds * (self.config.hpo_trials - len(done)) / (1 + len(others)) / 60
        stopped = f"stopped after epoch {trial.last_step}, " if trial.state.name == "PRUNED" else ""
        print(
            f"{len(done):>3}/{self.config.hpo_trials}  {stopped}{self.describe(trial)}  "
            f"about {minutes:.0f} min left",
            flush=True,
        )

    def describe(self, trial) -> str:
        """Number, result and settings of a trial."""
        result, record = "diverged", trial.user_attrs.get("record")
        if record:
            error = standard_error(record["val_accuracy"], len(self.data.val.labels))
            result = f"validation {record['val_accuracy']:.2f} ± {error:.2f} %, loss {record['val_loss']:.4f}"
        settings = (f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        return f"trial {trial.number:>2}: {result}; {', '.join(settings)}"

    def report(self) -> dict[str, Any]:
        """Print the five best trials, write hpo_best.json and the pictures; returns the best settings.

        Where no trial is complete, there are none: {}.
        """
        complete, stopped, folder = self.trials("COMPLETE"), self.trials("PRUNED"), self.config.output_dir
        best = sorted(complete, key=lambda trial: trial.value)[:5]
        if not best:
            return {}
        print(f"\nBest of {len(complete)} complete trials; {len(stopped)} more were stopped early:")
        print(*(self.describe(trial) for trial in best), sep="\n")
        accuracies = [trial.user_attrs["record"]["val_accuracy"] for trial in best]
        print(
            f"They span {max(accuracies) - min(accuracies):.2f} points. ± is the standard error on "
            f"{len(self.data.val.labels):,} validation images: smaller differences are noise."
        )
        settings = self.config.saved() | best[0].user_attrs["settings"]
        name = "validation loss" if self.config.hpo_objective == "loss" else "validation error, %"
        with self.lock:  # other workers write the same files
            write_file(folder / "hpo_best.json", json.dumps(settings, indent=1).encode())
            draw_search(folder, self.study, name, len(complete))
        print("Files    hpo_best.json (for --config), hpo_history.png, hpo_importance.png, hpo_slices.png")
        print(f"Look at  optuna-dashboard {storage_url(self.config, True)}  (pip install optuna-dashboard)")
        return best[0].user_attrs["settings"]


def draw_search(folder: Path, study, name: str, complete: int) -> None:
    """Optuna's pictures: the trials one after another, by each setting, and which setting decides."""
    import matplotlib
    import optuna
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna's pictures bring a style of their own
        warnings.simplefilter("ignore")  # about ranges of a single value
        history = plots.plot_optimization_history(study, target_name=name)
        slices = plots.plot_slice(study, target_name=name)
        if complete >= 8:
            quarter = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            importance = plots.plot_param_importances(study, evaluator=quarter, target_name=name)
            importance.set_title("Importance for being in the best quarter of the trials", loc="left")
        else:
            importance = pyplot.figure().subplots()
            text = f"importances take 8 complete trials, this search has {complete}"
            importance.text(0.5, 0.5, text, ha="center")
        for axes in (history, *np.ravel(slices)):
            axes.set_yscale("log")
        for axes, what in ((history, "history"), (importance, "importance"), (np.ravel(slices)[0], "slices")):
            save_figure(axes.figure, folder / f"hpo_{what}.png", bbox_inches="tight")
        pyplot.close("all")


def search(config: Config, device: torch.device) -> int:
    """Search, report, and train with the best settings; returns the exit code."""
    make_folder(config.output_dir)
    code, signalled = 0, catch_signals()
    with database_failures(config, 2):
        worker = Search(config, device, signalled)
        print(
            f"Search: {config.hpo_trials} trials of {config.hpo_epochs} epochs, the first with the settings "
            f"given; {len(worker.trials('COMPLETE', 'PRUNED'))} are done.",
            flush=True,
        )
    with database_failures(config, 1), workers(device, config.threads) as parallel:
        try:
            worker.run(parallel)
        except KeyboardInterrupt as interrupt:
            code = 128 + interrupt.args[0]
            print("Stopped. The same command goes on.")
        best = worker.report()
        code = code or (128 + signalled() if signalled() else 0)
    if not best and not code:
        raise Failure("no trial of the search is complete: look at the search space in suggest()", 3)
    if code or not config.hpo_final_run:
        return code
    final = dataclasses.replace(config, **best, run_hpo=False)
    with suppress(Failure):  # started again, go on with the final run too
        begun = read_checkpoint(final.path(CHECKPOINT))["config"] == final.saved()
        final = dataclasses.replace(final, resume=begun)
    print("\nTraining with the best settings.")
    try:
        return run(final, device)
    except FolderInUse:
        print("Another process trains in this folder already, so this one is done.")
        return 0


# --- Main --------------------------------------------------------------------------------------------------


def settings_as_flags(path: Path) -> list[str]:
    """The settings of a JSON file, such as hpo_best.json or a run's summary, as a command line.

    Raises Failure for a file that can't be read or holds none.
    """
    try:
        content = json.loads(path.read_text())
        settings = content.get("config", content)
        flags: list[str] = []
        for name, value in settings.items():
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)] if value else []
            elif isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            else:
                flags.append(f"--{name}={value}")
        return flags
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"cannot read settings from {path}: it must be like hpo_best.json") from error


def read_config(arguments: list[str] | None = None) -> Config:
    """The command line: flags win over --config, --preset, defaults; or over what a checkpoint holds."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    first = tyro.cli(Draft, args=arguments, description=Config.__doc__)
    if first.config:
        arguments = [*settings_as_flags(first.config), *arguments]
        first = tyro.cli(Draft, args=arguments)
    preset = PRESETS[first.preset]
    named = any(x.split("=")[0] == "--objective" for x in arguments)
    objective = first.objective if named else preset.get("objective", "hybrid")
    path = first.evaluate or [*first.predict, first.output_dir / CHECKPOINT.format(objective)][0]
    if first.evaluate or first.predict or first.resume and path.exists():
        start = config_of(read_checkpoint(path), path)
        given, saved = tyro.cli(Config, args=arguments, default=start), start.saved()
        free = ("temperature", "weights") if first.evaluate else ("epochs",) if first.resume else ()
        for name, new in given.saved().items():
            if new != saved[name] and (name not in free or name == "epochs" and new < saved[name]):
                flag = f"--{name.replace('_', '-')}"
                raise Failure(f"{flag} {new} contradicts {path}, which has {saved[name]}: leave it out")
        return given
    implied = first.source.settings | OBJECTIVES[objective] | preset
    implied |= {"objective": objective, "dataset": first.dataset}
    implied |= {"classes": class_folders(first.data_root)} if first.dataset == "folder" else {}
    implied |= {"embedding": "fixed"} if first.embedding_from else {}
    implied |= {"select": "last"} if first.blocks else {}
    return tyro.cli(Config, args=arguments, default=Config(preset=first.preset, **implied))


def execute(arguments: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit code."""
    config = on_first(read_config, arguments)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = pick_device(config.device)
    if (config.predict or config.evaluate or config.merge or config.run_hpo) and rank_and_size()[1] > 1:
        raise Failure("torchrun is for training: start this without it")
    if config.predict or config.evaluate:
        classify(config, device) if config.predict else evaluate_checkpoint(config, device)
        return 0
    if config.merge:
        return merge(config, device)
    return search(config, device) if config.run_hpo else run(config, device)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0; 1: the machine lacks something; 2: bad input; 3: not finite; 130, 143: signals."""
    try:
        with processes():
            return execute(arguments)
    except (Failure, FloatingPointError) as error:
        code = getattr(error, "code", 3)
        # wrong input is the same for all processes: one of them tells
        if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args or [signal.SIGINT])[0]
    except (MemoryError, torch.OutOfMemoryError):
        print("error: out of memory: try a smaller --batch-size", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # a thread of gloo that still holds a tensor while Python ends would abort it: pytorch/pytorch#179291
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
