"""NoProp-FM, flow matching (arXiv 2503.24322): one network for all t, which learns a velocity.

With z_0 ~ N(0, I), z_t ~ N(t u + (1-t) z_0, σ² I), and v̂ = f(x, z_t, t) W, logits times embeddings:
    loss = ‖v̂ - (u - z_0)‖²,  t ~ U(0, 1);   where W is learned, + CE(classifier(z̃), y), z̃ = z_t + (1-t) v̂
Inference follows dz/dt = v̂ from z_0 ~ τ N(0, I) to t = 1; the answer is the embedding nearest to z_1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from noprop_lab.dt import seed_dropout
from noprop_lab.flows import Flow, FlowConfig, paper_setting, stratified


@dataclass(frozen=True)
class FMConfig(FlowConfig):
    """What decides the result; it is saved with the network. For NoProp-FM."""

    objective: ClassVar[str] = "fm"
    # Objective
    sigma: float = 0.1  # σ, of the noise about the straight path from z_0 to u; the paper names no value
    classify: Literal["nearest", "classifier"] = "nearest"  # the answer: nearest embedding, or by classifier

    WITHOUT_EFFECT = (*FlowConfig.WITHOUT_EFFECT, "eta_loss_weight")

    def faults(self):
        yield from super().faults()
        without = self.classify == "classifier" and not self.learns_embedding
        yield without, f"only a learned embedding has a classifier, not {self.embedding}: leave classify out"

    @classmethod
    def paper(cls, dataset: str = "mnist", **changes) -> FMConfig:
        """The paper's whole setting; meant for a GPU. Neither of our clips is the paper's."""
        return cls(**paper_setting(dataset) | changes)


@dataclass(frozen=True)
class FM:
    """The objective of NoProp-FM."""

    config: FMConfig

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        """‖v̂ - (u - z_0)‖², and z̃ (draws B, D), where v̂ leads. Arguments: see Hybrid.block_loss().

        t and alpha_bar are a chain's: here each image gets config.draws values of t.
        """
        seed_dropout(block, draw)
        u = F.embedding(label, W).repeat(self.config.draws, 1)  # (draws B, D)
        t = stratified(draw, len(u)).to(u.dtype)
        start, rest = draw("z_0", u.shape), (1 - t).unsqueeze(1)
        z = (1 - rest) * u + rest * start + self.config.sigma * draw("noise", u.shape)
        v_hat = block(block.image(image), z, t) @ W
        return (v_hat - (u - start)).square().sum(1).mean(), z + rest * v_hat

    def head_loss(self, classifier, z, label, W, draw) -> Tensor:
        """Cross-entropy of the classifier on z̃, whose gradient reaches the network and W; 0 for a fixed W."""
        if not self.config.learns_embedding:
            return z.new_zeros(())
        return F.cross_entropy(classifier(z), label.repeat(self.config.draws))


class FMFlow(Flow):
    """The network of NoProp-FM."""

    def field(self, code: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z̃ = z + (1-t) v̂, which is the label seen in z, and v̂, (B, D) each."""
        v_hat = self.blocks[0](code, z, t) @ self.label_embedding.weight
        return z + (1 - t) * v_hat, v_hat

    def classify(self, u_hat: Tensor, z: Tensor) -> Tensor:
        """Class logits (B, classes): log N(z_1; u_k, σ² I) but for a constant, greatest for the nearest u_k.

        A σ below 0.1 counts as that. Or, if the config says so, the classifier's logits of z_1.
        """
        if self.config.classify == "classifier":
            return self.classifier(z)
        squares = (z.unsqueeze(1) - self.label_embedding.weight).square().sum(-1)
        return -squares / (2 * max(self.config.sigma, 0.1) ** 2)

    def as_chain(self) -> FMChain:
        return FMChain(self)


class FMChain:
    """What noprop_example.draw_denoising() needs: z_t scaled to have the mean and variance of a chain's.

    z_t ~ N(t u, ((1-t)² + σ²) I) over √(t² + (1-t)² + σ²) is N(√ᾱ u, (1-ᾱ) I).
    """

    def __init__(self, model: FMFlow):
        self.model, self.label_embedding = model, model.label_embedding
        self.start, self.probabilities = model.start, model.probabilities
        t = torch.linspace(0, 1, model.config.steps + 1, dtype=torch.float64)
        size = (t**2 + (1 - t) ** 2 + max(model.config.sigma, 0.1) ** 2).sqrt()
        self.alpha_bar, self.sizes = t**2 / size**2, size.tolist()

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        u_hat, z = self.model.step(t, image, z * self.sizes[t - 1], temperature, noise)
        return u_hat, z / self.sizes[t]
