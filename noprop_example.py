"""NoProp on MNIST: a network of denoising blocks, each trained alone (Li, Teh, Pascanu; arXiv 2503.24322).

Training (train_block), for every mini-batch (x, y) and every block t = 1 ... T, on its own:
    ε ~ N(0, I)
    z_{t-1} = √ᾱ_{t-1} u_y + √(1-ᾱ_{t-1}) ε             a noisy label
    ε̂_t = block_t(x, z_{t-1})                            its noise; by default the block finds û_t first
    û_t = (z_{t-1} - √(1-ᾱ_{t-1}) ε̂_t) / √ᾱ_{t-1}        the label that this leaves
    step on  η₁ MSE(ε̂_t, ε) + η₂ MSE(û_t, u_y)           block T adds CE(classifier(û_T), y)
Inference (NoProp.forward): z_0 = τ ξ, ξ ~ N(0, I), by default τ = 0; then for t = 1 ... T
    z_t = a û_t + b z_{t-1} + τ √c ξ                     a DDPM-like reverse step; a, b, c: reverse_steps()
Answer: argmax classifier(û_T), or of the blocks' mean: finish(). Time runs from noise, ᾱ_0 = .001, to label.

    symbol   name              shape        meaning
    T        num_blocks                     blocks, each at one noise level
    ᾱ        alpha_bar         (T+1,)       fraction of signal, increasing; a single one is called level
    W        label_embedding   (classes, D) learned rows, one a class; its gradient is the sum of the blocks'
    u_y      u                 (B, D)       embedding of the label: its row of W
    z_t      z                 (B, D)       the noisy label
    ε̂, û    eps_hat, u_hat    (B, D)       a block's estimates of noise and label
    η₁, η₂   eta, lam                       loss weights (settings eta_loss_weight, lambda_global)

Measured: 99.58 ± .01 % on MNIST's test images (mean ± standard error of seeds 0 to 9, weights chosen on
validation images; block 1 alone 99.43 ± .01); one and a half to five minutes on two CPU cores.

    python noprop_example.py                                     train, evaluate, draw
    python noprop_example.py --evaluate noprop_hybrid.pt         test accuracy of a trained network
    python noprop_example.py --predict noprop_hybrid.pt a.png    classify pictures
Other objectives and data sets, photographs, blocks over processes: noprop_lab/, which imports this script.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import difflib
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

RUN_HPO = False  # what a bare call does. True: search hyperparameters with Optuna (--run-hpo); False: train.
CPU, BESIDE = torch.device("cpu"), Path(__file__).resolve().parent / "data"
CHANNELS_LAST = "cpu", "cuda"  # devices with that layout, 1.7 times as fast on a CPU; on MPS it was wrong


# --- Randomness --------------------------------------------------------------------------------------------


def generator(*address: int | str) -> torch.Generator:
    """A generator seeded by an address, as (seed, "noise", block, step): no draw depends on earlier ones.

    So a block trained alone sees the same noise as beside others, and evaluation never disturbs training.
    """
    digest = hashlib.blake2b(repr(address).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def send(draws: Tensor, device: torch.device) -> Tensor:
    """CPU draws on the device. A GPU takes pinned memory: a plain copy would wait for all its work."""
    pinned = device.type == "cuda" and draws.is_cpu
    return (draws.pin_memory() if pinned else draws).to(device, non_blocking=pinned)


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
    direction and clamped. From T = 50 on, the clamp makes levels equal (ᾱ_0 = ᾱ_1), and DDPM's w there 0.
    """
    t = torch.arange(num_blocks + 1, dtype=torch.float64)
    return torch.cos(((1 - t / num_blocks) + s) / (1 + s) * math.pi / 2).square().clamp(1e-3, 0.999)


def reverse_steps(alpha_bar: Tensor, equal_weights: bool = False) -> Tensor:
    """ᾱ_{t-1} and a, b, c of z_t = a û_t + b z_{t-1} + τ √c ξ for each block t, (T, 4); alpha_bar: (T+1,).

    DDPM's posterior (arXiv 2006.11239, eq. 7, whose t runs the other way), which is equation 3 of NoProp.
    Identities: signal a + b √ᾱ_{t-1} = √ᾱ_t; noise, with DDPM's weights, b² (1-ᾱ_{t-1}) + c = 1-ᾱ_t.

    By the first, z_t/√ᾱ_t = w û_t + (1-w) z_{t-1}/√ᾱ_{t-1}: a running mean. DDPM: w = 1 - SNR_{t-1}/SNR_t,
    SNR = ᾱ/(1-ᾱ), so û_t ends with the share (SNR_t - SNR_{t-1})/SNR_T: an early one, from a noisier z,
    hardly counts. But at τ = 0 no z holds noise: equal_weights takes the plain mean, w = 1/t, for all.
    """
    before, after = alpha_bar[:-1], alpha_bar[1:]  # ᾱ_{t-1} and ᾱ_t of t = 1 ... T
    alpha = before / after
    weight = (1 - alpha) / (1 - before)
    if equal_weights:
        weight = 1 / torch.arange(1, len(alpha_bar), dtype=alpha_bar.dtype)
    a, b, c = weight * after.sqrt(), (1 - weight) / alpha.sqrt(), (1 - after) * (1 - alpha) / (1 - before)
    return torch.stack([before, a, b, c], dim=1)


def noisy_label(u: Tensor, noise: Tensor, level: float) -> Tensor:
    """z = √ᾱ u + √(1-ᾱ) ε at the level ᾱ, a draw from q(z | y)."""
    return level**0.5 * u + (1 - level) ** 0.5 * noise


def clean_label(z: Tensor, eps_hat: Tensor, level: float) -> Tensor:
    """û = (z - √(1-ᾱ) ε̂) / √ᾱ, noisy_label() solved for u."""
    return (z - (1 - level) ** 0.5 * eps_hat) / level**0.5


# --- Model -------------------------------------------------------------------------------------------------

SIZES = {  # of a block: convs, image_width, label_widths, head_widths; its parameters, multiply-adds an image
    "small": (((16, 5, 2, 0, 2), (32, 3, 1, 0, 0), (64, 3, 1, 0, 0)), 64, (64,), (64,)),  # 51 k, 0.23 M
    # a convolution more, and no stride: 129 k, 2.9 M
    "deep": (((24, 5, 1, 0, 2), (48, 3, 1, 0, 0), (48, 3, 1, 0, 2), (96, 3, 1, 0, 0)), 96, (64,), (96,)),
    # of the description that this project started from: 626 k, 8.0 M
    "reference": (((32, 3, 1, 1, 2), (64, 3, 1, 1, 2), (128, 3, 1, 1, 3)), 256, (256, 256), (256, 128)),
}


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, each followed by a ReLU."""
    return nn.Sequential(*(layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())))


class DenoisingBlockPaper(nn.Module):
    """Block t: a CNN for the image, an MLP for the noisy label, a joint head; (x, z_{t-1}) -> ε̂_t.

    Its parts are the paper's, their sizes are not: the paper's own block is PaperBlock in noprop_lab/dt.py.
    size: of SIZES. Each conv (channels, kernel, stride, padding, pool) is followed by a max-pool of stride 2
        (pool 0: none), then batch norm and ReLU: after the pool, on a quarter of the pixels: cheaper.
    target: what the network f inside the block computes. "label": f = û, and the noise follows from it,
        ε̂ = (z - √ᾱ f(x, z)) / √(1-ᾱ). If f were ε̂, it would have to copy its noisy input, and û would have
        its error times √(1-ᾱ)/√ᾱ, 31.6 at block 1 (cf. EDM, arXiv 2206.00364). "noise": ε̂ = f(x, z).
        "classes", as in the paper: f computes logits, and û = softmax(f) W is a mean of the embeddings W.
    """

    def __init__(self, image_shape, embed_dim, num_classes, size=SIZES["small"], target="label"):
        super().__init__()
        self.target, channels, layers = target, image_shape[0], []
        convs, image_width, label_widths, head_widths = size
        for width, kernel, stride, padding, pool in convs:
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=False))
            layers += [nn.MaxPool2d(pool, 2, ceil_mode=True)] if pool else []
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        cnn = nn.Sequential(*layers, nn.Flatten())
        features = cnn.eval()(torch.zeros(1, *image_shape)).shape[1]  # eval: statistics stay as they are
        full = nn.Linear(features, image_width, bias=False)
        self.image = cnn.train().extend([full, nn.BatchNorm1d(image_width), nn.ReLU()])
        self.label = mlp(embed_dim, *label_widths)
        self.head = mlp(image_width + label_widths[-1], *head_widths)
        self.head.append(nn.Linear(head_widths[-1], num_classes if target == "classes" else embed_dim))

    def forward(self, image: Tensor, z: Tensor, level: float, W: Tensor | None = None) -> Tensor:
        """ε̂, (B, D), of images (B, C, H, W), noisy labels z (B, D) at the level ᾱ_{t-1}, W for "classes"."""
        f = self.head(torch.cat([self.image(image), self.label(z)], dim=1))  # (B, D), or (B, classes)
        if self.target == "noise":
            return f
        u_hat = f.softmax(-1) @ W if self.target == "classes" else f
        return (z - level**0.5 * u_hat) / (1 - level) ** 0.5  # clean_label() gives u_hat back


class NoProp(nn.Module):
    """T blocks, the label embedding that they share, and the classifier, which reads û_T, block T's answer.

    block(image_shape, embed_dim, num_classes) makes a block. Weights are drawn from (seed, block): a block
    starts the same whatever stands beside it. equal_weights: see reverse_steps(). build() sets config, and
    by_average: after t blocks the mean of their probabilities answers (see finish()); else block t alone.
    """

    def __init__(self, block, num_blocks, num_classes, embed_dim, image_shape, seed, equal_weights):
        super().__init__()
        self.image_shape, self.alpha_bar = tuple(image_shape), cosine_schedule(num_blocks)
        self.steps = reverse_steps(self.alpha_bar, equal_weights).tolist()
        with seeded(seed, "embedding"):
            self.label_embedding = nn.Embedding(num_classes, embed_dim)
            nn.init.orthogonal_(self.label_embedding.weight)  # orthonormal rows, if embed_dim >= num_classes
        self.blocks = nn.ModuleList()
        for t in range(1, num_blocks + 1):
            with seeded(seed, "block", t):
                self.blocks.append(block(image_shape, embed_dim, num_classes))
        with seeded(seed, "classifier"):
            self.classifier = nn.Linear(embed_dim, num_classes)

    def parts(self) -> dict[str, nn.Module]:
        """What is clipped, stepped and averaged by itself; names are those in the state dict."""
        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        return blocks | {"classifier": self.classifier, "label_embedding": self.label_embedding}

    def start(self, image: Tensor, temperature=0.0, noise=None) -> Tensor:
        """z_0 = τ ξ, (B, D); noise: the generator of ξ ~ N(0, I), of which τ = 0 draws nothing."""
        shape = len(image), self.label_embedding.embedding_dim
        if not temperature:
            return image.new_zeros(shape)
        return temperature * send(torch.randn(shape, generator=noise), image.device)

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """One reverse step: û_t and z_t, (B, D), from z_{t-1}. With DDPM's weights: NoProp's equation 3."""
        level, a, b, c = self.steps[t - 1]
        eps_hat = self.blocks[t - 1](image, z, level, self.label_embedding.weight)
        u_hat = clean_label(z, eps_hat, level)
        z = a * u_hat + b * z
        if temperature:
            z = z + temperature * c**0.5 * send(torch.randn(z.shape, generator=noise), z.device)
        return u_hat, z

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes) of what a block leaves: of û (z: for those of the lab that read it)."""
        return self.classifier(u_hat)

    def forward(self, image: Tensor, temperature=0.0, noise: torch.Generator | None = None) -> Tensor:
        """Inference: class logits after every block, (B, T, classes), of images (B, C, H, W) in [0, 1].

        temperature is τ: 1 samples, as the paper does, which takes DDPM's weights; 0 starts at z_0 = 0 and
        draws no noise.
        """
        z, logits = self.start(image, temperature, noise), []
        for t in range(1, len(self.blocks) + 1):
            u_hat, z = self.step(t, image, z, temperature, noise)
            logits.append(self.classify(u_hat, z))
        return torch.stack(logits, dim=1)

    def batches(self, images: Tensor) -> Iterator[Tensor]:
        """Float batches (500, C, H, W) of images that a user brings; raises ValueError for unfit ones."""
        images = torch.as_tensor(images)
        images, byte = (images.unsqueeze(1) if images.ndim == 3 else images), images.dtype == torch.uint8
        if images.shape[1:] != self.image_shape or not (byte or images.is_floating_point()):
            raise ValueError(f"images must be (N, *{self.image_shape}), uint8 or float, not {images.shape}")
        if not (byte or ((images >= 0) & (images <= 1)).all()):
            raise ValueError("images of floats must lie between 0 and 1; uint8 images go up to 255")
        return map(to_float, images.to(self.classifier.weight.device).split(500))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities after every block, (N, T, classes); the answer is [:, -1].

        images: (N, C, H, W), or (N, H, W) if C = 1; uint8 up to 255 or float up to 1, light on dark; of NumPy
        too. An error for all others. With a temperature it draws what evaluate() draws.
        """
        logits, config = [], self.config
        for i, batch in enumerate(self.batches(images)):
            logits.append(self(batch, config.temperature, generator(config.seed, "inference", 500 * i)))
        found = torch.cat(logits).softmax(-1)
        if self.by_average:
            return torch.stack([found[:, :t].mean(1) for t in range(1, found.shape[1] + 1)], dim=1)
        return found

    def predict(self, images: Tensor) -> Tensor:
        """The class of each image, (N,): the most probable one. Images as above."""
        return self.probabilities(images)[:, -1].argmax(-1)


# --- Objective ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hybrid:
    """η₁ MSE(ε̂, ε) + η₂ MSE(û, u) for each block; cross-entropy for the classifier, which reads û_T.

    û - u = -(ε̂ - ε)/√SNR, with SNR = ᾱ/(1-ᾱ): so both are one error, (η₁ SNR + η₂) MSE(û, u) together.
    W = 0 would make it 0; with the cross-entropy W's rows, of length 1 at first, end at ‖u‖² of 1.6 to 2.6.
    """

    eta: float = 2.0
    lam: float = 1.0

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        """Loss of block t, and û (B, D). W (classes, D): this block's own copy of the label embedding.

        alpha_bar: the schedule, (T+1,); draw(purpose, shape): normal numbers of this block and step.
        """
        level, u = alpha_bar[t - 1].item(), F.embedding(label, W)  # (B, D)
        noise = draw("noise", u.shape)
        z = noisy_label(u, noise, level)
        eps_hat = block(image, z, level, W)
        u_hat = clean_label(z, eps_hat, level)
        return self.eta * F.mse_loss(eps_hat, noise) + self.lam * F.mse_loss(u_hat, u), u_hat

    def head_loss(self, classifier, u_hat, label, W, draw) -> Tensor:
        """Loss of the classifier, whose gradient reaches block T through its û, and no other block."""
        return F.cross_entropy(classifier(u_hat), label)


# --- Configuration -----------------------------------------------------------------------------------------


class Failure(ValueError):
    """Ends a run, with an exit code (1: the machine, 2: the input). As text, any error in one line."""

    def __init__(self, reason: str | BaseException, code: int = 2):
        super().__init__((str(getattr(reason, "strerror", None) or reason) or repr(reason)).splitlines()[0])
        self.code = code


@dataclass(frozen=True)
class Checked:
    """Settings of the types they say. Ints are >= 1 and < 2^31 (seed: 0 to 2^64), floats >= 0 and <= 1e9."""

    def __post_init__(self):
        for wrong, fault in self.faults():
            if wrong:
                raise Failure(fault)

    def faults(self) -> Iterator[tuple[Any, str]]:
        """What can be wrong: whether it is, and the line that says so, which names the setting."""
        kinds = get_type_hints(type(self))
        for name, value in vars(self).items():
            try:
                check_type(value, kinds[name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            except TypeCheckError as error:
                yield True, f"{name} can't be {value!r}: {Failure(error)}"
            bounds = (1, 2**31 - 1) if kinds[name] in (int, int | None) else (0, 10**9)
            least, most = (0, 2**64) if name == "seed" else bounds
            number = isinstance(value, int | float) and kinds[name] is not bool
            wrong = number and (isinstance(value, bool) or not least <= value <= most)
            yield wrong, f"{name} must be at least {least}, and at most {most:,}, not {value}"


@dataclass(frozen=True)
class Config(Checked):
    """What decides the result; it is saved with the network. Comments are the help of --help."""

    # Used most
    epochs: int = 12  # passes over the training split, each of which trains all blocks
    seed: int = 0  # decides weights, order, augmentation and noise
    # Network
    num_blocks: int = 10  # T, blocks and noise levels
    embed_dim: int = 20  # D, of the label embedding
    block: Literal["small", "deep", "reference"] = "small"  # the blocks: SIZES in the script
    target: Literal["label", "noise", "classes"] = "label"  # a block computes û, ε̂, or softmax(f) W
    embedding: Literal["learned", "fixed"] = "learned"  # fixed: stays as it starts
    # Loss
    eta_loss_weight: float = 2.0  # η₁, weight of MSE(ε̂, ε)
    lambda_global: float = 1.0  # η₂, weight of MSE(û, u)
    # Recipe
    batch_size: int = 512  # images a step; an incomplete last batch is left out
    lr: float = 0.014  # highest learning rate of AdamW
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"  # one-cycle: warms up for a fifth
    eta_min: float = 1e-6  # learning rate at the end (not of a constant one)
    weight_decay: float = 1e-3  # of blocks and classifier
    embed_wd: float = 1e-7  # weight decay of the label embedding
    max_norm_embed: float = 50.0  # rows of the label embedding are clipped to this norm
    grad_clip: float = 1.0  # gradient norm of a block, of the classifier, of the embedding, each by itself
    ema_decay: float = 0.998  # of the averaged weights, which are evaluated; less at first; 0: no averaging
    augment: bool = True  # rotate, scale and shift the training images at random
    train_images: int | None = None  # only the first N images of the training split, for quick tries
    precision: Literal["float32", "bfloat16"] = "float32"  # in training; bfloat16 needs hardware for it
    select: Literal["validation", "last"] = "validation"  # which epoch's averaged weights are kept
    patience: int = 15  # stop after so many epochs without better validation accuracy (select last: never)
    # Inference
    weights: Literal["equal", "ddpm"] = "equal"  # of the blocks' û in z_t in inference: reverse_steps()
    temperature: float = 0.0  # τ of inference: 0 follows the mean of each step, 1 samples

    objective: ClassVar[str] = "hybrid"
    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)  # channels, height, width
    dim = property(lambda self: self.embed_dim)
    learns_embedding = property(lambda self: self.embedding != "fixed")
    saved = asdict  # the fields, as they are in a checkpoint and in a JSON file

    def faults(self):
        yield from super().faults()
        yield self.batch_size < 2, "batch_size must be at least 2"
        yield self.eta_min > self.lr and self.schedule != "constant", f"eta_min must be at most lr, {self.lr}"
        yield self.ema_decay >= 1, f"ema_decay must be below 1, not {self.ema_decay}"
        for name in ("grad_clip", "max_norm_embed"):
            yield getattr(self, name) == 0, f"{name} 0 leaves nothing to learn by: for no limit take 1e9"
        yield self.eta_loss_weight == self.lambda_global == 0, "both weights of the blocks' loss are 0"
        yield self.temperature and self.weights == "equal", "a temperature samples: it takes weights ddpm"

    @classmethod
    def accurate(cls, **changes) -> Config:
        """Four deeper blocks: test 99.67 ± .01 %, held out not told apart; two to three times the time."""
        return cls(**dict(block="deep", num_blocks=4, epochs=10, batch_size=256, lr=0.01) | changes)

    @classmethod
    def reference(cls, **changes) -> Config:
        """The description that this project started from, trained at the levels of inference; for a GPU."""
        recipe = dict(epochs=100, batch_size=128, block="reference", target="noise", lr=0.01, weights="ddpm")
        return cls(**recipe | dict(schedule="cosine", ema_decay=0.0, augment=False) | changes)


@dataclass(frozen=True)
class Options(Checked):
    """What to do, where and how: leaves the result as it is, and is not saved."""

    # Used most
    preset: Literal["default", "accurate", "reference"] = "default"  # a start; flags win
    resume: bool = False  # go on from noprop_hybrid.pt in the output folder, exactly
    evaluate: Path | None = None  # a checkpoint: print its test accuracy
    predict: tuple[Path, ...] = ()  # a checkpoint, then images; photographs: python -m noprop_lab predict
    run_hpo: bool = False  # search hyperparameters with Optuna, then train with the best
    output_dir: Path = Path(".")  # folder for all that is written
    data_root: Path = BESIDE if (BESIDE / "MNIST").is_dir() else Path("data")  # holds MNIST/raw (or .gz)
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the accelerator if there is one
    # Files and machine
    config: Path | None = None  # a JSON file of settings, such as hpo_best.json: over --preset, below flags
    checkpoint_minutes: float = 10.0  # save after so many minutes inside an epoch too
    threads: int = torch.get_num_threads()  # on the CPU; the result does not depend on it
    deterministic: bool = False  # on a GPU: only algorithms that repeat themselves; a CPU's always do
    # Search
    hpo_trials: int = 60  # trials of the search, those of earlier calls included
    hpo_epochs: int = 3  # epochs of a trial

    def faults(self):
        yield from super().faults()
        chosen = sum(map(bool, (self.evaluate, self.predict, self.run_hpo, self.resume)))
        yield chosen > 1, "choose one of evaluate, predict, run_hpo and resume"
        yield len(self.predict) == 1, "predict takes a checkpoint and then at least one image file"
        for field in () if self.run_hpo else fields(self):
            named = "hpo_" in field.name and getattr(self, field.name) != field.default
            yield named, f"{field.name} is of a search: leave it out"
        idle = ("output_dir", "checkpoint_minutes") if self.evaluate or self.predict else ()
        for name in (*idle, "data_root", "threads") if self.predict else idle:
            yield getattr(self, name) != getattr(type(self), name), f"{name} has no use here: leave it out"

    def checkpoint(self, config: Config) -> Path:
        """Where a run with that config keeps its network."""
        return self.output_dir / OUTPUTS[0].format(config.objective)


# --- Data --------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Images uint8 (N, C, H, W) and labels int64 (N,), on the device."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Images to train on (MNIST: 55,000), to choose the epoch by (5,000), and only to test on (10,000)."""

    train: Split
    val: Split
    test: Split | None  # None: a search never sees a test image
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None  # images (B, C, H, W) and draws

    def digest(self) -> str:
        """Of all images and labels: a run that is resumed must find those that it began with."""
        sha = hashlib.sha256()
        for part in (*self.train, *self.val, *(self.test or ())):
            sha.update(part.cpu().numpy().tobytes())
        return sha.hexdigest()


MD5 = {  # of MNIST's files, unpacked
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def read_mnist(folder: Path, sums: dict[str, str] = MD5) -> tuple[Split, Split]:
    """Training and test images of a folder with the four files, packed or not. Raises Failure."""
    tensors = []
    for name, md5 in sums.items():
        path = folder / name if os.path.isfile(folder / name) else folder / f"{name}.gz"
        try:
            content = bytearray((gzip.decompress if path.suffix else bytes)(path.read_bytes()))
        except (OSError, EOFError, zlib.error) as error:
            get = f", or in Python torchvision.datasets.MNIST('{folder.parent.parent}', download=True)"
            where = "see --data-root" + get * (sums is MD5)
            raise Failure(f"cannot read {path}: {Failure(error)}; {where}") from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise Failure(f"{path} is damaged (its md5, unpacked, is not {md5}): put a fresh copy there")
        tensors.append(torch.frombuffer(content, dtype=torch.uint8))
    x, y, *test = tensors
    return tuple(Split(x[16:].view(-1, 1, 28, 28), y[8:].long()) for x, y in ((x, y), test))


def split_data(train: Split, test: Split, config: Config, device: torch.device) -> Data:
    """The three splits, alike for every seed: 5,000 training images, at most a tenth, are for validation."""
    train, test = (Split(*(x.to(device) for x in part)) for part in (train, test))
    order = torch.randperm(len(train.labels), generator=generator("split")).to(device)
    held_out = min(5000, len(order) // 10)
    val, rest = order[:held_out], order[held_out:][: config.train_images]
    for flag, number in (("train-images", config.train_images or 0), ("batch-size", config.batch_size)):
        if number > len(rest):
            raise Failure(f"--{flag} {number} is more than the {len(rest)} training images")
    splits = (Split(*(x[chosen] for x in train)) for chosen in (rest, val))
    return Data(*splits, test, augment if config.augment else None)


def load_data(config: Config, root: Path = Options.data_root, device: torch.device = CPU) -> Data:
    """MNIST in root/MNIST/raw. Raises Failure."""
    return split_data(*read_mnist(root / "MNIST" / "raw"), config, device)


def to_float(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float 0 ... 1; floats pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def augment(images: Tensor, noise: torch.Generator) -> Tensor:
    """Images (B, C, H, W), turned, scaled, shifted at random: their grid by ≤ 12°, 10 %, 6 % of the width."""
    limits = torch.tensor([[math.radians(12)], [0.1], [0.12], [0.12]])  # shifts: 1 is half the width
    angle, scale, dx, dy = (torch.rand(4, len(images), generator=noise) * 2 - 1) * limits
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(send(theta, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# --- Training ----------------------------------------------------------------------------------------------


def build(config: Config, device=CPU, content=None, block=None, kind: type[NoProp] = NoProp) -> NoProp:
    """The network of a config, on the device: untrained, or of a checkpoint's content, for inference."""
    block = block or partial(DenoisingBlockPaper, size=SIZES[config.block])
    sizes = config.num_blocks, config.num_classes, config.dim, config.image_shape
    model = kind(partial(block, target=config.target), *sizes, config.seed, config.weights == "equal")
    model.config, model.by_average = config, False
    if content:
        try:
            model.eval().load_state_dict(content["model"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # of a user's own block, say
            raise Failure(f"{content['path']} does not hold the weights of its settings") from error
        model.by_average = content["config"] == config and content.get("by_average", False)
    nhwc = torch.channels_last if device.type in CHANNELS_LAST else torch.contiguous_format
    return model.to(device, memory_format=nhwc)


@contextmanager
def workers(device: torch.device, threads: int) -> Iterator[Callable]:
    """A map() over independent jobs: on a CPU, as many at once as there are threads, each on one thread.

    One core per block beats all cores on one block after another, and any number gives the same bits.
    """
    before, cpu = torch.get_num_threads(), device.type == "cpu"
    with suppress(AttributeError, TypeError):  # glibc: keep freed memory, or page faults take 10 % of a step
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    with ExitStack() as restore, ThreadPoolExecutor(threads) as pool:
        restore.callback(torch.set_num_threads, before)
        torch.set_num_threads(1 if cpu else before)
        yield pool.map if cpu and threads > 1 else map


def flatten(part: nn.Module) -> nn.Parameter:
    """A part's parameters as one vector: they become views of it, and their gradients of its gradient.

    So a block's clip, its optimizer's step and its average are one operation each, not one a tensor.
    """
    *others, last = [x for x in part.parameters() if x.requires_grad] or part.parameters()
    sizes = [x.numel() + -x.numel() % 4 for x in others] + [last.numel()]  # starts aligned to 16 bytes
    flat = nn.Parameter(last.new_zeros(sum(sizes)), last.requires_grad)
    flat.grad = torch.zeros_like(flat)
    for x, *vectors in zip((*others, last), flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        data, grad = (v.as_strided(x.shape, x.stride()) for v in vectors)  # strides: channels_last stays
        x.data, x.grad = data.copy_(x.detach()), grad
    return flat


class State:
    """All that changes while training: weights, their average, optimizers, position, history, selection."""

    POSITION = ("step", "lr", "seconds", "selected_epoch", "history", "log")
    # 1 - decay of the moving average; the decay grows, (1+k)/(10+k) after k steps, until it is ema_decay
    fresh = property(lambda self: 1 - min(self.config.ema_decay, (1 + self.step) / (10 + self.step)))
    loss_name = property(lambda self: type(self.objective).__name__.removeprefix("Lab"))  # LabHybrid: Hybrid

    def __init__(self, config: Config, device: torch.device = CPU, model=None, objective=None):
        self.config, self.device, self.by_average = config, device, False
        self.objective = objective or Hybrid(config.eta_loss_weight, config.lambda_global)
        self.model = (model or build(config, device)).train()
        self.averaged = copy.deepcopy(self.model).eval()
        self.blocks = list(range(1, config.num_blocks + 1))  # those that are trained here
        # By part: its vector; averages, what they follow; whose state is saved: average, module, optimizer
        self.parts, self.tensors, self.holders = {}, {}, {}
        for name, module in self.model.parts().items():
            both = self.averaged.get_submodule(name), module
            self.tensors[name] = [[flatten(x), *filter(Tensor.is_floating_point, x.buffers())] for x in both]
            vector = self.parts[name] = self.tensors[name][1][0]
            decay = config.embed_wd if name == "label_embedding" else config.weight_decay
            decay *= vector.requires_grad  # what a user froze as a whole stays as it is
            optimizer = torch.optim.AdamW([vector], weight_decay=decay, fused=device.type in ("cpu", "cuda"))
            self.holders[name] = *both, optimizer
        self.step, self.progress, self.lr, self.seconds, self.selected_epoch = 0, 0.0, 0.0, 0.0, 0
        self.history, self.selected, self.started = [], self.averaged.state_dict(), time.perf_counter()
        self.log: list[Tensor] = []  # a row a step of this epoch: losses, then gradient norms

    def update(self, name: str, lr: float) -> Tensor:
        """Clip one part's gradient by itself, step, move its average; returns the gradient's norm."""
        optimizer = self.holders[name][-1]
        norm = nn.utils.clip_grad_norm_([self.parts[name]], self.config.grad_clip)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the parameters' gradients are views of this one
        if name == "label_embedding":
            self.model.label_embedding.weight.data.renorm_(2, 0, self.config.max_norm_embed)  # each row
        for averaged, x in zip(*self.tensors[name], strict=True):
            averaged.data.lerp_(x.data, self.fresh)
        return norm

    def order(self, images: int) -> tuple[Tensor, ...]:
        """The numbers of the images in each batch of this epoch: all, in random order, in full batches."""
        order = torch.randperm(images, generator=generator(self.config.seed, "order", len(self.history)))
        return order.to(self.device).split(self.config.batch_size)[: images // self.config.batch_size]

    def draw(self, t: int, purpose: str, shape: torch.Size, kind: Callable = torch.randn) -> Tensor:
        """The numbers that block t draws in this step for that purpose, on the device."""
        return send(kind(shape, generator=generator(self.config.seed, purpose, t, self.step)), self.device)

    def measure(self, data: Data, parallel: Callable) -> dict[str, Any]:
        """The record of an epoch that has ended: losses, learning rate, seconds, accuracies in percent."""
        *blocks, classifier = torch.stack(self.log).mean(0)[: len(self.parts) - 1].tolist()  # not the norms
        record = dict(epoch=len(self.history) + 1, block_losses=blocks, classifier_loss=classifier)
        for name, split in (("val", data.val), ("test", data.test)):
            found = evaluate(self.averaged, split, self.config, parallel) if split else {}
            record |= {f"{name}_{key}": found.get(key, [None])[-1] for key in ("accuracy", "loss")}
        return record | dict(lr=self.lr, seconds=self.seconds)

    def record(self, record: dict[str, Any], val_images: int) -> None:
        """End an epoch: append its record, and select its weights, by default by the one-standard-error rule.

        Of the epochs within one standard error of the best validation accuracy, which that split can't tell
        apart, the last is selected: it has averaged more weights at a lower learning rate.
        """
        self.history, self.log = [*self.history, record], []
        best = max(x["val_accuracy"] or 0 for x in self.history)  # without validation images: None
        if self.config.select == "last" or record["val_accuracy"] >= best - standard_error(best, val_images):
            self.selected, self.selected_epoch = copy.deepcopy(self.averaged.state_dict()), record["epoch"]

    def finished(self) -> bool:
        """Whether all epochs are done, or patience has run out."""
        done, watched = len(self.history), self.history if self.config.select == "validation" else []
        late = done - max(watched, key=lambda x: x["val_accuracy"], default={"epoch": done})["epoch"]
        return done >= self.config.epochs or late >= self.config.patience

    def part_state(self, name: str) -> list[dict[str, Any]]:
        """State of a part: its average, its weights, its optimizer."""
        return [holder.state_dict() for holder in self.holders[name]]

    def load_part_state(self, name: str, states: list[dict[str, Any]]) -> None:
        """Go on from part_state(). Raises Failure for other names or shapes: no optimizer would notice."""
        shapes = {x.shape for moments in states[-1]["state"].values() for x in moments.values() if x.ndim}
        alike = [x.keys() for x in states] == [x.keys() for x in self.part_state(name)]
        if shapes - {self.parts[name].shape} or not alike:
            raise Failure(f"{name} of the checkpoint is of another block, or an earlier version: train anew")
        for holder, state in zip(self.holders[name], states, strict=True):
            holder.load_state_dict(state)

    def save(self, path: Path, digest: str) -> None:
        """Write the checkpoint. Raises Failure (1), or FloatingPointError for what is not finite."""
        check_finite(self)
        training = {name: getattr(self, name) for name in self.POSITION}
        training |= {"parts": {name: self.part_state(name) for name in self.parts}, "loss": self.loss_name}
        content = {"format": FORMAT, "objective": self.config.objective, "config": self.config.saved()}
        content |= {"model": self.selected, "by_average": self.by_average, "training": training}
        torch.save(content | {"data": digest, "made_with": made_with(self.device)}, file := io.BytesIO())
        write_file(path, file.getvalue())

    def resume(self, content: dict[str, Any], digest: str) -> None:
        """Go on from what save() wrote, with the same images. Raises Failure."""
        content, path = copy.deepcopy(content), content["path"]  # what trains on is a copy
        if not {"parts", *self.POSITION} <= content.get("training", {}).keys():
            raise Failure(f"{path} holds weights alone, to evaluate and predict with: train anew")
        if (loss := content["training"].get("loss", self.loss_name)) != self.loss_name:  # a user's own
            raise Failure(f"{path} was trained by the loss {loss}: {self.loss_name} can't go on with it")
        if content["data"] != digest:
            raise Failure(f"the images are not those that {path} was trained on: bring them back")
        if (content["made_with"]["device"] in CHANNELS_LAST) != (self.device.type in CHANNELS_LAST):
            raise Failure(f"{path} was made on another device, where weights lie otherwise: resume there")
        if content["made_with"] != made_with(self.device):
            say(f"It won't be exact to the bit: {content['made_with']} is now {made_with(self.device)}.")
        for name in self.parts:
            self.load_part_state(name, content["training"]["parts"][name])
        vars(self).update((name, content["training"][name]) for name in self.POSITION)
        self.log, self.started = [row.to(self.device) for row in self.log], self.started - self.seconds
        self.selected = content["model"] if self.history else self.selected
        self.by_average = content.get("by_average", False)


def learning_rate(progress: float, config: Config) -> float:
    """The learning rate after a fraction of all steps."""
    if config.schedule == "constant":
        return config.lr
    warm_up = 0.2 if config.schedule == "one-cycle" else 0.0
    if progress < warm_up:
        return config.lr * (0.04 + 0.96 * progress / warm_up)  # linear, from lr / 25 as OneCycleLR
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))
    return config.eta_min + (config.lr - config.eta_min) * cosine


def train_block(state, t: int, image, label, lr: float, head=False) -> tuple[dict, Tensor | None]:
    """One step of block t, alone: {part: (loss, gradient norm)}, and the gradient with respect to its W.

    The block has a copy of W of its own, and sees nothing else of the network: no gradient goes further.
    head: the classifier takes a step too; from block T, whose û it reads, it always does.
    """
    config, model, objective = state.config, state.model, state.objective
    W, draw = model.label_embedding.weight.detach().clone(), partial(state.draw, t)
    W.requires_grad_(config.learns_embedding)
    short = config.precision == "bfloat16"  # 16 bits in products and convolutions; weights, averages: float32
    with torch.autocast(image.device.type, torch.bfloat16, enabled=short, cache_enabled=False):
        loss, u_hat = objective.block_loss(model.blocks[t - 1], t, model.alpha_bar, image, label, W, draw)
        losses = {f"blocks.{t - 1}": loss}
        if head or t == config.num_blocks:
            losses["classifier"] = objective.head_loss(model.classifier, u_hat, label, W, draw)
    sum(losses.values()).backward()
    return {name: (loss.detach(), state.update(name, lr)) for name, loss in losses.items()}, W.grad


def train_step(state, image, label, lr, parallel=map) -> dict:
    """A step of every part, on images (B, C, H, W) and labels (B,): {part: (loss, gradient norm)}."""
    steps = list(parallel(lambda t: train_block(state, t, image, label, lr), state.blocks))
    results = {name: pair for result, _ in steps for name, pair in result.items()}  # all blocks' in one
    if gradients := [x for _, x in steps if x is not None]:  # of W, all that blocks share, if it is learned
        state.model.label_embedding.weight.grad.copy_(sum(gradients))  # a view, see flatten()
        results["label_embedding"] = image.new_zeros(()), state.update("label_embedding", lr)
    return results


def train(state, data: Data, step=train_step, threads=Options.threads, steps_too=False) -> Iterator[dict]:
    """Train all blocks; yields one record an epoch, and steps_too: None after each step.

    Whoever stops asking has stopped early. Raises FloatingPointError for a loss or gradient not finite.
    """
    config, (images, labels), zero = state.config, data.train, torch.zeros((), device=state.device)
    if config.batch_size > len(labels):
        raise Failure(f"batch_size {config.batch_size} is more than the {len(labels)} training images")
    while not state.finished():
        with workers(state.device, threads) as parallel:
            steps = len(batches := state.order(len(labels)))
            for batch in batches[len(state.log) :]:  # blocks share it, not noise; a log may be resumed
                started = time.perf_counter()
                image = to_float(images[batch])
                if data.augment:
                    image = data.augment(image, generator(config.seed, "augment", state.step))
                state.progress = (len(state.history) * steps + len(state.log)) / (steps * config.epochs)
                state.lr = learning_rate(state.progress, config)
                results = step(state, image, labels[batch], state.lr, parallel)
                losses, norms = zip(*(results.get(name, (zero, zero)) for name in state.parts), strict=True)
                state.log.append(torch.stack([*losses[:-1], *norms]))  # the embedding has no loss of its own
                state.step += 1
                if state.device.type == "cpu" or len(state.log) == steps:  # a GPU would wait for each look
                    check_finite(state)
                state.seconds += time.perf_counter() - started
                if steps_too:
                    yield None
            record = state.measure(data, parallel)
        state.record(record, len(data.val.labels))
        yield record


def check_finite(state: State) -> None:
    """Raise FloatingPointError, naming it, where the last step had a loss or gradient that is not finite."""
    if state.log and len(bad := (~state.log[-1].isfinite()).nonzero()):
        parts = [*(f"block {t + 1}" for t in range(state.config.num_blocks)), "classifier", "embedding"]
        names = [f"loss of {x}" for x in parts[:-1]] + [f"gradient norm of {x}" for x in parts]
        value = state.log[-1][bad[0]].item()
        raise FloatingPointError(f"{names[bad[0]]} is {value} by step {state.step}: try a lower --lr")


def evaluate(model: NoProp, split: Split, config: Config, parallel: Callable = map) -> dict[str, Any]:
    """Accuracy (%) and cross-entropy after each block, lists of T, and of the mean of their probabilities."""

    @torch.inference_mode()
    def logits(start: int) -> Tensor:
        images = to_float(split.images[start : start + 500])
        return model(images, config.temperature, generator(config.seed, "inference", start))

    log_p = torch.cat(list(parallel(logits, range(0, len(split.labels), 500)))).cpu().log_softmax(-1)
    mean = log_p.logsumexp(1, keepdim=True) - math.log(log_p.shape[1])  # of probabilities
    log_p = torch.cat([log_p, mean], dim=1)  # (N, T+1, classes)
    label = split.labels.cpu().view(-1, 1, 1).expand(*log_p.shape[:2], 1)
    *chain, average = (100 * (log_p.argmax(-1) == label[..., 0]).double().mean(0)).tolist()
    *losses, average_loss = (-log_p.gather(2, label).mean((0, 2))).tolist()
    return {"accuracy": chain, "loss": losses, "accuracy_average": average, "loss_average": average_loss}


def standard_error(accuracy: float, images: int) -> float:
    """Binomial standard error, in points, of an accuracy in percent."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


# --- Files and pictures ------------------------------------------------------------------------------------

FORMAT = "noprop-example-2"
OUTPUTS = ("noprop_{}.pt", "noprop_{}.json", "training_progress_{}.png", "denoising_{}.png")  # {}: objective


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
        raise Failure(f"cannot write {path}: {Failure(error)}", 1) from error


def keep_older(path: Path) -> None:
    """Give an earlier run's checkpoint, and its JSON file, a free numbered name: nothing is overwritten."""
    files = path, path.with_suffix(".json")
    number = next(n for n in count(1) if not any(x.with_suffix(f".{n}{x.suffix}").exists() for x in files))
    for x in filter(Path.exists, files):
        say(f"Kept the older {x} as {x.rename(x.with_suffix(f'.{number}{x.suffix}')).name}.")


def read_checkpoint(path: str | Path, kinds: Mapping = {Config.objective: Config}) -> dict[str, Any]:
    """Contents of a checkpoint; its "config" becomes that of its objective in kinds. Raises Failure."""
    try:
        with zipfile.ZipFile(path) as file:
            written, damaged = os.path.getmtime(path), file.testzip()  # torch looks at no checksum
        known = (content := torch.load(path, map_location="cpu", weights_only=True))["format"]
    except Exception as error:  # a damaged file can raise anything here
        reason = getattr(error, "strerror", None) or "it is no checkpoint of this script, or damaged"
        raise Failure(f"cannot read {path}: {reason}") from error
    if damaged or known != FORMAT:
        raise Failure(f"{path} is damaged, or of another version of this script ({known}): train again")
    try:
        content["config"] = kinds[content["objective"]](**content["config"])
        return content | {"path": path, "written": written}
    except (KeyError, TypeError, Failure) as error:
        lab = "the lab's: use python -m noprop_lab" if len(kinds) == 1 else "of another version"
        raise Failure(f"{path} ({content.get('objective')}: {error}) is {lab}") from error


def load(path: str | Path, device: torch.device | str = CPU) -> NoProp:
    """The trained network of a checkpoint, ready for predict(images). Raises Failure."""
    return build((content := read_checkpoint(path))["config"], torch.device(device), content)


def picture(draw: Callable, path: Path, *arguments) -> int:
    """Save what draw(*arguments) draws, in matplotlib's own style; a failure is a line, and exit code 1."""
    try:
        from matplotlib import style

        with style.context("default"):
            draw(*arguments).savefig(file := io.BytesIO(), format="png", dpi=110)
        write_file(path, file.getvalue())
        return 0
    except Exception as error:  # the results are there already, and no fault of a picture may hide them
        say(f"error: no picture {path.name}: {Failure(error)}", file=sys.stderr)
        return 1


def draw_progress(summary: dict[str, Any]):
    """Losses, accuracies and learning rate by epoch; accuracy after each block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    losses, blocks, accuracies, rates = figure.subplots(2, 2).flat
    history, chain = summary["history"], summary["test_accuracy_by_blocks"]
    for axes, name, label in (
        (losses, "block_losses", "blocks, mean"),
        (losses, "classifier_loss", "classifier: cross-entropy"),
        (accuracies, "val_accuracy", "validation, at the end {:.2f} %"),
        (accuracies, "test_accuracy", "test (decides nothing), at the end {:.2f} %"),
        (rates, "lr", "at the end of the epoch"),
    ):
        y = [np.mean(np.array(record[name], float)) for record in history] or [math.nan]  # None: nan
        axes.plot(range(1, len(y) + 1), y, "o-", ms=4, label=label.format(y[-1]) if y[-1] > 0 else None)
    label = f"test, selected weights ± standard error; at the end {chain[-1]:.2f} %"
    errors = [standard_error(accuracy, summary["test_images"]) for accuracy in chain]
    blocks.errorbar(range(1, len(chain) + 1), chain, errors, fmt="s-C1", ms=4, capsize=2, label=label)
    losses.set(title=f"Training losses ({summary['objective']})", xlabel="epoch", yscale="log")
    accuracies.set(title="Accuracy of the averaged weights", xlabel="epoch", ylabel="%")
    rates.set(title="Learning rate", xlabel="epoch")
    blocks.set(title="Accuracy after each block (chain cut there)", xlabel="block", ylabel="%")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(*axes.get_legend_handles_labels(), frameon=False)  # which may be none
    return figure


def classes_in(z: Tensor, u: Tensor, alpha_bar: float) -> Tensor:
    """Class probabilities (N, classes) in z (N, D), where class k has N(√ᾱ u_k, (1-ᾱ) I)."""
    distance = (z.unsqueeze(1) - alpha_bar**0.5 * u).square().sum(-1)
    return (-distance / (2 * (1 - alpha_bar))).softmax(-1)


@torch.inference_mode()
def draw_denoising(model: NoProp, test: Split):
    """A dozen test images, half of them hard: class probabilities in z_0 ... z_T at τ = 1, class of û_t."""
    from matplotlib.figure import Figure

    certainty = model.probabilities(test.images)[:, -1].gather(1, test.labels[:, None])[:, 0]
    chosen = np.resize([*range(min(6, len(certainty))), *certainty.argsort()[:24:4].tolist()], 12)
    image, label, noise = to_float(test.images[chosen]), test.labels[chosen].tolist(), generator("denoising")
    model, z, W = copy.copy(model), model.start(image, 1.0, noise), model.label_embedding.weight
    model.steps, shares, nearest = reverse_steps(model.alpha_bar).tolist(), [], []  # DDPM's weights
    for t, level in enumerate(model.alpha_bar.tolist()):
        u_hat, z = model.step(t, image, z, 1.0, noise) if t else (z, z)
        shares.append(classes_in(z, W, level))
        nearest.append(torch.cdist(u_hat, W).argmin(-1))
    shares = torch.stack(shares, dim=2).cpu().numpy()  # (12, classes, T+1)
    nearest = torch.stack(nearest[1:], dim=1).cpu().numpy()  # (12, T)
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    what = "Class probabilities in z_t, sampled (τ = 1, DDPM's weights); dots: the class of û_t"
    figure.suptitle(f"{what}; hard ones below")
    panels = figure.subplots(4, 6, height_ratios=(1, 1.2, 1, 1.2))
    for i, (digit, chart) in enumerate(zip(panels[::2].flat, panels[1::2].flat, strict=True)):
        answer = shares[i, :, -1].argmax()
        digit.set_axis_off()
        digit.imshow(image[i].permute(1, 2, 0).cpu().numpy(), cmap="gray")  # in colour if it has some
        digit.set_title(f"{answer}" if answer == label[i] else f"{answer} (labelled {label[i]})", fontsize=10)
        chart.imshow(shares[i], vmin=0, vmax=1, aspect="auto")
        chart.plot(range(1, len(model.alpha_bar)), nearest[i], "r.")
        chart.set(xlabel="t", ylabel="class", yticks=range(0, len(shares[i]), max(3, len(shares[i]) // 4)))
    return figure


# --- Using a network, runs ---------------------------------------------------------------------------------


def read_digit(path: Path) -> Tensor:
    """A picture as MNIST would have it, uint8 (1, 28, 28): light on dark, 20 pixels large, centred by mass.

    Ink is what differs from the border's median. Raises Failure where it is unreadable or empty.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file = file.point(lambda x: x / 256).convert("L") if file.mode[0] == "I" else file  # 16 bits
            upright = ImageOps.exif_transpose(file).convert("RGBA")
        alpha, shade = (np.asarray(x, np.float32) for x in (upright.getchannel("A"), upright.convert("L")))
        light = 0 < alpha.mean() < 128 and np.average(shade, weights=alpha) > 128  # ink on nothing
        gray = (shade * alpha + (0 if light else 255) * (255 - alpha)) / 255
    except Exception as error:  # a damaged file can raise anything here
        raise Failure(f"cannot read the image {path}: {Failure(error)}") from error
    ink = np.abs(gray - np.median(np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])))
    if ink.max() < 16:
        raise Failure(f"{path} shows nothing: it is all one shade")
    inside = 0.25 * ink.max() if ink.size > 784 else 0  # MNIST's own are to stay as they are
    digit = Image.fromarray(ink).crop(Image.fromarray(ink > inside).getbbox())
    digit = digit.resize([max(1, round(20 * side / max(digit.size))) for side in digit.size], Image.BOX)
    ink, canvas = np.asarray(digit), Image.new("F", (28, 28))
    y, x = (np.average(places, weights=ink) for places in np.indices(ink.shape))
    canvas.paste(digit, [min(max(round(14 - c), 0), 28 - n) for c, n in zip((x, y), digit.size, strict=True)])
    return torch.from_numpy((np.array(canvas) * (255 / ink.max())).round().astype(np.uint8)).unsqueeze(0)


def print_classes(ask: Callable[[Tensor], Tensor], pictures, read=read_digit, names=range(10)) -> int:
    """Print the classes in each picture; of one, the three most probable. 0, or the first failure's code.

    read: the images in a file; ask: of images, their class probabilities (N, classes).
    """
    code = 0
    for path in pictures:
        try:
            found = ask(read(path))
            best = found.argsort(descending=True)[:, : 3 if len(found) == 1 else 1].tolist()
            shares = [f"{names[k]}: {100 * found[i, k]:.1f} %" for i, row in enumerate(best) for k in row]
            say(f"{path}: {' '.join(str(names[row[0]]) for row in best)}  ({', '.join(shares)})")
        except Failure as failure:  # the others are answered all the same
            say(f"error: {failure}", file=sys.stderr)
            code = code or failure.code
    return code


def say(*words, file=None, **more) -> None:
    """print(), which never ends a run: what a closed pipe does not take is lost."""
    try:
        print(*words, file=file or sys.stdout, flush=True, **more)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


@contextmanager
def caught_signals() -> Iterator[Callable[[], int]]:
    """A function that tells the number of the SIGINT, SIGTERM, SIGHUP that has come, or 0. Threads get 0."""
    received: list[int] = []
    with ExitStack() as restore:

        def note(number: int, _frame) -> None:
            received.append(number)
            if len(received) > 1:  # `timeout` sends two; a third leaves at once, as it would without this
                restore.close()

        with suppress(ValueError):  # in a thread
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or in the background
                    restore.callback(signal.signal, number, signal.signal(number, note) or signal.SIG_DFL)
        yield lambda: (received or [0])[0]


def pick_device(options: Options) -> torch.device:
    """The device of that name; for "auto" the accelerator if there is one, else the CPU. Raises Failure."""
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found = torch.accelerator.current_accelerator(True) or CPU  # True: one that is there
    name = str(found) if options.device == "auto" else options.device
    try:
        (probe := torch.zeros(1, device=name)).item()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        code = 2 if "evice string" in str(error) else 1  # a name that there is not; a machine without it
        raise Failure(f"--device {name} can't be used (cpu can): {Failure(error)!s:.200}", code) from error


def made_with(device: torch.device) -> dict[str, str]:
    """What a run's last bits depend on, beside its config."""
    cuda = device.type == "cuda"
    chip = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {"device": device.type, "chip": chip, "torch": str(torch.__version__)}


def locked(folder: Path):
    """Make the folder, and keep other runs out during `with`. Raises Failure (from Timeout: one is there)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return FileLock(folder / ".noprop_run.lock", timeout=0).acquire()  # goes when its owner dies
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = "another run writes into it: take another" if isinstance(error, Timeout) else Failure(error)
        raise Failure(f"cannot write into --output-dir {folder}, or lock it: {reason}") from error


def train_and_save(state: State, data: Data, options: Options, step, signalled: Callable[[], int]) -> int:
    """train(), saved after every epoch and every checkpoint_minutes; 0, or 128 + the signal that ended it."""
    path, digest, saved = options.checkpoint(state.config), data.digest(), time.monotonic()
    hidden = None if sys.stdout else True  # None: but on a terminal; a program may have no output at all
    how = dict(bar_format="{l_bar}{bar}| {elapsed}<{remaining}", miniters=0, disable=hidden, leave=False)
    with tqdm(total=1, initial=len(state.history) / state.config.epochs, file=sys.stdout, **how) as bar:
        for record in train(state, data, step, options.threads, steps_too=True):
            bar.update(state.progress - bar.n)
            stop = signalled()
            if record or stop or time.monotonic() > saved + 60 * options.checkpoint_minutes:
                state.save(path, digest)
                saved = time.monotonic()
                bar.clear()
            if record:
                loss = np.mean([x for x in record["block_losses"] if x] or 0)  # 0: it is trained elsewhere
                val, test = np.array([record["val_accuracy"], record["test_accuracy"]], float)  # None: nan
                line = "epoch {epoch:>3}/{}  loss of blocks {:.4f}, classifier {classifier_loss:.4f}  "
                line += "validation {:.2f} %, test {:.2f} %  lr {lr:.6f}  {seconds:.0f} s"
                say(line.format(state.config.epochs, loss, val, test, **record))
            if stop and not state.finished():
                say(f"Stopped after step {state.step}, {len(state.history)} epochs done; --resume goes on.")
                return 128 + stop
    return 0


def summary_of(state: State, val: dict, test: dict, images: int) -> dict[str, Any]:
    """What the JSON file of a run holds; val, test: of evaluate(), of the selected weights."""
    config, found = state.config, {"test_accuracy_by_blocks": test["accuracy"], "test_images": images}
    for name, split in (("val", val), ("test", test)):
        found |= {f"{name}_{key}": x[-1] if isinstance(x, list) else x for key, x in split.items()}
    found |= {"objective": config.objective, "config": config.saved(), "versions": made_with(state.device)}
    found |= {"epochs": len(state.history), "finished": state.finished(), "seconds": state.seconds}
    found |= {"selected_epoch": state.selected_epoch, "seconds_total": time.perf_counter() - state.started}
    return found | {"history": state.history}


def finish(state: State, data: Data, options: Options, draw=draw_denoising) -> int:
    """Evaluate the selected weights, write and print the results, then draw; 1 if a picture fails, else 0."""
    model, images = copy.deepcopy(state.averaged), len(data.test.labels)
    model.load_state_dict(state.selected)
    with workers(state.device, options.threads) as parallel:
        val, test = (evaluate(model, split, state.config, parallel) for split in (data.val, data.test))
        chain, summary = test["accuracy"], summary_of(state, val, test, images)
        # what answers from now on: the last block is too sure where blocks disagree, see docs/evidence.md
        state.by_average = model.by_average = val["loss_average"] < val["loss"][-1]
        use = "; --evaluate and --predict answer by it" if state.by_average else ""
        files = [options.output_dir / name.format(state.config.objective) for name in OUTPUTS]
        State.save(state, files[0], data.digest())  # in this process alone
        write_file(files[1], json.dumps(summary, indent=1).encode())
        say(f"""
Test accuracy    {chain[-1]:.2f} ± {standard_error(chain[-1], images):.2f} % (± for {images:,} images)
Weights          epoch {state.selected_epoch}, select {state.config.select}
After block 1 …  {" ".join(f"{x:.2f}" for x in chain)} % (chain cut there)
Blocks' average  {test["accuracy_average"]:.2f} % (of the class probabilities of all blocks{use})
Time             {state.seconds:.0f} s of training, {summary["seconds_total"]:.0f} s in all, on {state.device}
Files            {", ".join(x.name for x in files)} in {options.output_dir.resolve()}""")
        return picture(draw_progress, files[2], summary) | picture(draw, files[3], model, data.test)


def run(state, data, options, content=None, step=train_step, end=finish, signals=caught_signals) -> int:
    """Train, evaluate, write all files; returns the exit code.

    content: of a checkpoint, to go on from; signals: as caught_signals(), or what several processes agree on.
    """
    with locked(options.output_dir):
        if content and os.path.getmtime(content["path"]) != content["written"]:  # read without the lock
            raise Failure(f"{content['path']} was written by another run meanwhile: start again")
        with signals() as signalled:
            if content:
                state.resume(content, data.digest())
                if state.finished() and state.config.epochs > content["config"].epochs:
                    raise Failure(f"by patience {state.config.patience} this run has ended: raise it too")
            if not content or Path(content["path"]).resolve() != options.checkpoint(state.config).resolve():
                keep_older(options.checkpoint(state.config))
            weights, images = sum(x.numel() for x in state.model.parameters()), len(data.train.labels)
            more = f"resuming, {state.step} steps are done" if content else f"{images:,} images"
            say(f"NoProp on {state.device}: {len(state.blocks)} blocks, {weights:,} weights; {more}")
            return max(train_and_save(state, data, options, step, signalled), end(state, data, options))


# --- Search ------------------------------------------------------------------------------------------------


def suggest(trial) -> dict[str, Any]:
    """The search space, by names of Config, the same in each trial: edit it here (see optuna.trial.Trial)."""
    return {
        "lr": trial.suggest_float("lr", 1e-3, 1e-1, log=True),
        "eta_loss_weight": trial.suggest_float("eta_loss_weight", 0.1, 10.0, log=True),
        "lambda_global": trial.suggest_float("lambda_global", 0.1, 10.0, log=True),
        "embed_wd": trial.suggest_float("embed_wd", 1e-8, 1e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True),
    }


def short_training(config, records, signalled, suggest, trial, cost=lambda record: record["val_loss"]):
    """The cost of a trial, by its last record; it is pruned if others were better by then, or it diverges.

    records: of a config, what train() yields. Proposals are seeded by the trial's number: a search stopped
    between two trials makes the same when it goes on, and two workers make others.
    """
    from optuna import TrialPruned, samplers

    seed = generator(config.seed, "search", trial.number).initial_seed() % 2**32
    trial.study.sampler = samplers.TPESampler(seed=seed)
    trial.set_user_attr("settings", settings := suggest(trial))
    worse = False
    try:
        for record in records(replace(config, **settings)):
            if worse:  # and the training goes on
                raise TrialPruned
            if number := signalled():
                say("Stopped. The same command goes on.")
                raise SystemExit(128 + number)  # Optuna takes no notice: the trial is running, and run again
            if record:
                trial.set_user_attr("record", record)
                trial.report(value := cost(record), record["epoch"])
                if not math.isfinite(value):
                    raise TrialPruned
                worse = trial.should_prune()
    except FloatingPointError as error:
        raise TrialPruned from error
    return value


def print_trial(_study, trial) -> None:
    """Number, result and settings of a trial that has ended."""
    record = trial.user_attrs.get("record", {"val_loss": math.nan, "val_accuracy": math.nan, "epoch": 0})
    result = "loss {val_loss:.4f}, {val_accuracy:.2f} % after epoch {epoch}".format(**record)
    shown = (f"{k} {x:.3g}" if isinstance(x, float) else f"{k} {x}" for k, x in trial.params.items())
    say(f"trial {trial.number:>3} {trial.state.name.lower()}: validation {result}; {', '.join(shown)}")


def open_study(config: Config, storage, suggest, judged_by: str = "loss"):
    """The Optuna study of these settings, whose first trial has them as given. Raises Failure.

    Its name is a digest of what is fixed and of suggest()'s text: if either differs, so does the study.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # the script prints its own lines
    searched, given = suggest(probe := optuna.create_study().ask()), vars(config) | config.saved()
    if unknown := searched.keys() - given.keys():
        raise Failure(f"suggest() proposes what is no setting: {', '.join(unknown)}")
    spaces = probe.distributions
    if config.eta_min > (least := getattr(spaces.get("lr"), "low", math.inf)):
        raise Failure(f"eta_min must be at most {least}, the search's least lr, not {config.eta_min}")
    first = {k: x for k, x in given.items() if k in spaces and x in getattr(spaces[k], "choices", [x])}
    if zero := [k for k, x in first.items() if not x and getattr(spaces[k], "log", 0)]:  # has no logarithm
        raise Failure(f"{zero[0]} 0 can't be searched, as its scale is logarithmic: see suggest()")
    fixed = {k: x for k, x in config.saved().items() if k not in searched} | spaces
    name = hashlib.sha256(repr((fixed, judged_by, source_of(suggest))).encode()).hexdigest()[:16]
    pruner = optuna.pruners.MedianPruner()  # learning curves keep their order: docs/search.md
    study = optuna.create_study(storage=storage, pruner=pruner, study_name=name, load_if_exists=True)
    study.enqueue_trial(first, skip_if_exists=True)
    return study


def search(config: Config, options: Options, device: torch.device) -> int:
    """Search with Optuna, train with the best settings; returns the exit code. No trial sees a test image."""
    from optuna.trial import TrialState
    from sqlalchemy import URL

    load_data(config, options.data_root, device)  # what can't be read ends a search before it begins
    path, short = options.output_dir / "noprop_hpo.db", replace(config, epochs=options.hpo_epochs)

    def records(config: Config) -> Iterator:
        data = load_data(config, options.data_root, device)._replace(test=None)  # augment may be searched too
        return train(State(config, device), data, threads=options.threads, steps_too=True)

    with locked(options.output_dir), caught_signals() as signalled:
        try:
            study = open_study(short, str(URL.create("sqlite", database=str(path.resolve()))), suggest)
            running = study.get_trials(states=[TrialState.RUNNING])  # stopped or killed, but for the lab's
            for trial in (x for x in running if "worker" not in x.user_attrs):
                study.tell(trial.number, state=TrialState.FAIL)
                study.enqueue_trial(trial.system_attrs.get("fixed_params", {}) | trial.params)
            objective = partial(short_training, short, records, signalled, suggest)
            while len(study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])) < options.hpo_trials:
                study.optimize(objective, n_trials=1, callbacks=[print_trial])  # the lab's may work beside it
            complete = study.get_trials(states=[TrialState.COMPLETE])
        except Exception as error:  # where Optuna can't even write that a trial failed, its own hides this
            known = "sqlalchemy|optuna|builtins: (The runtime optuna version|'utf-8')"  # modules, and texts
            found = [x for x in (error, error.__context__) if re.match(known, f"{type(x).__module__}: {x}")]
            if not found:
                raise
            raise Failure(f"{path}: {Failure(found[0].__cause__ or found[0])}", 1) from error
        if number := signalled():
            say("Stopped. The same command goes on.")
            return 128 + number
    if not complete:
        raise Failure("no trial of the search is complete: look at the search space in suggest()", 3)
    best = min(complete, key=lambda trial: trial.value)
    config = replace(config, **best.user_attrs["settings"])
    write_file(options.output_dir / "hpo_best.json", json.dumps(config.saved(), indent=1).encode())
    say("\nThe best, now in hpo_best.json, and trained with:")
    print_trial(study, best)
    data, content = load_data(config, options.data_root, device), None
    with suppress(Failure, KeyError):  # there is none, or it is damaged, or the lab's, or weights alone
        there = read_checkpoint(options.checkpoint(config))
        begun = there["config"], there["data"], there["made_with"]["device"]
        content = there if begun == (config, data.digest(), device.type) else None
    return run(State(config, device), data, options, content)


# --- Main --------------------------------------------------------------------------------------------------

SETTING = r"^    (?:# (.+)|(\w+): (?!ClassVar).+? = .+?  # (.+))$"  # a heading, or a field with its comment
IDLE = {"patience": ("select", "last"), "eta_min": ("schedule", "constant")}  # has no effect beside what
IDLE |= dict.fromkeys(("embed_wd", "max_norm_embed"), ("embedding", "fixed"))
source_of = cache(inspect.getsource)


def argument(hint: Any, default: Any) -> dict[str, Any]:
    """How argparse reads a field of that type, and shows it."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if "Literal" in str(hint):
        return {"choices": sorted(re.findall("'(.+?)'", str(hint)), key=lambda x: x != default)}
    kind = next((x for x in (Path, int, float) if x.__name__ in str(hint)), str)
    shown = kind.__name__.upper() if default in (None, ()) or kind is Path else str(default)
    return dict(type=kind, metavar=shown) | (dict(nargs="+", action="extend") if "tuple" in str(hint) else {})


def read_flags(arguments: list[str], *kinds: type, prog="noprop_example.py", rest=None) -> dict[str, Any]:
    """What the command line gives, by fields of these dataclasses; exits after --help. Raises Failure.

    A field's flag, help and heading are the lines of the source that define it. rest: a list that gets what
    is no flag of theirs; without one, that is refused.
    """

    def fail(message: str) -> None:
        lab = ", or python -m noprop_lab --help" * (prog == "noprop_example.py")
        raise Failure(f"{message}: see --help{lab}")

    about = "NoProp, see README.md. Flags are shown with defaults; of choices, the first is the default."
    form, flags, groups = partial(argparse.HelpFormatter, max_help_position=40), [], {}
    how = dict(formatter_class=form, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    how |= {"conflict_handler": "resolve"}  # a subclass may define a field anew
    parser = argparse.ArgumentParser(prog, f"{prog} [flags]", about, **how)
    parser.error, parser.print_help = fail, lambda: say(parser.format_help(), end="")
    for kind in kinds:
        hints, source = get_type_hints(kind), "".join(map(source_of, reversed(kind.__mro__[:-1])))
        for title, name, comment in re.findall(SETTING, source, re.MULTILINE):
            if title:
                group = groups[title] = groups.get(title) or parser.add_argument_group(title)
            else:
                how = {"help": comment.replace("%", "%%")} | argument(hints[name], getattr(kind, name))
                flags += group.add_argument(f"--{name.replace('_', '-')}", **how).option_strings
    if empty := [x for x in arguments if re.fullmatch(r"(--[\w-]+=)?", x)]:  # a shell's variable, not set
        fail(f"{empty[0] or 'a value'} is empty")
    arguments = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), x) for x in arguments]
    home = ["=".join(map(os.path.expanduser, argument.split("=", 1))) for argument in arguments]
    found, unknown = parser.parse_known_args(home)
    if rest is not None:
        rest += unknown
    elif unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.8)
        fail(f"{unknown[0]} is no flag here" + (f" (is {near[0]} meant?)" if near else ""))
    return {name: tuple(x) if isinstance(x, list) else x for name, x in vars(found).items()}


def over_checkpoint(content, given: dict[str, Any], free) -> Config:
    """The config of a checkpoint, in which settings change what is free; Failure for one that contradicts."""
    saved, changed = content["config"], replace(content["config"], **given)  # values are checked
    for name, value in given.items():
        there = getattr(saved, name)
        if value != there and (name not in free or (name == "epochs" and value < there)):
            flag = f"--{name.replace('_', '-')} {value}"
            raise Failure(f"{flag} contradicts {content['path']}, which has {there}: leave it out")
    return changed


def read_command_line(arguments: list[str]) -> tuple[Config, Options, dict[str, Any] | None]:
    """Flags win over --config, that over --preset; or over a checkpoint, whose contents come too."""
    given = read_flags(arguments, Options, Config)
    bare = not given.keys() & {"evaluate", "predict", "resume"}
    chosen = {x.name: given.pop(x.name) for x in fields(Options) if x.name in given}
    options = Options(**{"run_hpo": RUN_HPO and bare} | chosen)
    base = vars(getattr(Config, options.preset, Config)())
    try:
        file = json.loads(options.config.read_text(encoding="utf-8")) if options.config else {}
        file = file.get("config", file)
        own = base | {"epochs": Config.epochs}  # which a checkpoint may have otherwise
        wanted = {k: x for k, x in (own | file).items() if getattr(Config, k) != own[k] or k in file} | given
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Failure(f"cannot use the settings in {options.config}: {Failure(error)}") from error
    path = options.evaluate or [*options.predict, options.checkpoint(Config())][0]
    content, free = None, ("epochs", "patience") if options.resume else ("temperature", "weights")
    if options.evaluate or options.predict or (options.resume and os.path.exists(path)):
        content = read_checkpoint(path)
    elif options.resume:
        for other in path.parent.glob("noprop_[!h]*.pt") if os.path.isdir(path.parent) else ():  # or no name
            raise Failure(f"{other.name} is not the script's: try python -m noprop_lab train --resume")
        say(f"Nothing to resume at {path}: starting from the beginning.")
    config = over_checkpoint(content, wanted, free) if content else Config(**base | wanted)
    if idle := [x for x in given if x in IDLE and getattr(config, IDLE[x][0]) == IDLE[x][1]]:
        raise Failure(f"{idle[0]} has no effect with {' '.join(IDLE[idle[0]])}: leave it out")
    return config, options, content


def print_accuracy(model: NoProp, test: Split, parallel: Callable) -> int:
    """Print the test accuracy of the network's answers, see NoProp.by_average; returns the exit code."""
    found = evaluate(model, test, model.config, parallel)
    last, average = found["accuracy"][-1], model.by_average
    accuracy = found["accuracy_average"] if average else last
    more = f" by the blocks' average, {last:.2f} % by the last block" if average else ""
    say(f"Test accuracy {accuracy:.2f} ± {standard_error(accuracy, len(test.labels)):.2f} %{more}.")
    return 0


def execute(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit code."""
    config, options, content = read_command_line(arguments)
    device = pick_device(options)
    if options.run_hpo:
        return search(config, options, device)
    if not (options.predict or options.evaluate):
        return run(State(config, device), load_data(config, options.data_root, device), options, content)
    model = build(config, device, content)
    with workers(device, options.threads) as parallel:
        if options.predict:
            return print_classes(lambda x: model.probabilities(x)[:, -1], options.predict[1:])
        return print_accuracy(model, load_data(config, options.data_root, device).test, parallel)


def main(arguments: list[str] | None = None, execute: Callable[[list[str]], int] = execute) -> int:
    """The exit code: 0; 1: the machine lacks something; 2: bad input; 3: not finite; 128 + a signal."""
    for stream in (sys.stdout, sys.stderr) if arguments is None else ():  # a terminal may know few letters
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # a notebook's has none
    try:
        return execute(sys.argv[1:] if arguments is None else arguments)
    except (Failure, FloatingPointError, OSError, ImportError) as error:  # the last: of a package
        say(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError | ImportError) else getattr(error, "code", 3)
    except SystemExit as stop:  # of --help, or of a search
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:  # the latter's text tells, on a CPU
        if not re.search("MemoryError|not enough memory|out of memory|allocate memory", repr(error)):
            raise
        say("error: out of memory (a new run may take a smaller --batch-size)", file=sys.stderr)
        return 1
    finally:
        say(end="")  # what is left goes out now, and where nobody reads it, without a complaint


if __name__ == "__main__":
    sys.exit(main())
