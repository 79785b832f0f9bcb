"""NoProp-CT, in continuous time (arXiv 2503.24322): one network for all t, and a learned noise schedule.

With SNR(t) = exp(-γ(t)) and ᾱ(t) = σ(-γ(t)), z_t = √ᾱ u + √(1-ᾱ) ε and û = softmax(f(x, z_t, t)) W:
    loss = CE(classifier(z_1), y) + KL(q(z_0|y) ‖ N(0, I)) + η/2 SNR′(t) ‖û - u‖²,  t ~ U(0, 1)
Inference, with g = -γ′, follows, from z_0 ~ τ N(0, I), one of
    dz = g [√ᾱ û - ½ (1+ᾱ) z] dt + τ √(g (1-ᾱ)) dW        of which equation 3 is the finite step
    dz/dt = ½ g [√ᾱ û - ᾱ z]                              the probability flow: the same marginals, no noise
and the answer is argmax classifier(z_1).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noprop_example import noisy_label, reverse_steps, send
from noprop_lab.dt import seed_dropout
from noprop_lab.flows import Flow, FlowConfig, paper_setting, stratified


@dataclass(frozen=True)
class CTConfig(FlowConfig):
    """What decides the result; it is saved with the network. For NoProp-CT."""

    objective: ClassVar[str] = "ct"
    # Objective
    solver: Literal["posterior", "euler", "heun"] = "posterior"  # equation 3 (τ = 0: its mean); or the flow
    eta_loss_weight: float = 1.0  # η
    classify: Literal["u_hat", "z"] = "z"  # the classifier reads z_1
    alpha_bar_start: float = 0.05  # ᾱ(0) before training: noise
    alpha_bar_end: float = 0.9  # ᾱ(1) before training: label

    WITHOUT_EFFECT = (*FlowConfig.WITHOUT_EFFECT, "classify")

    def faults(self):
        yield from super().faults()
        low, high = self.alpha_bar_start, self.alpha_bar_end
        apart = (
            1e-6 <= low < high <= 1 - 1e-6 and log_odds(high) - log_odds(low) > 1
        )  # float32 loses 1-ᾱ near 1
        ends = "alpha_bar_start must be well below alpha_bar_end, both between 0.000001 and 0.999999"
        yield not apart, f"{ends}, not {low} and {high}"
        yield self.eta_loss_weight == 0, "the weight of the network's loss is 0: it would learn nothing"

    @classmethod
    def paper(cls, dataset: str = "mnist", **changes) -> CTConfig:
        """The paper's whole setting; meant for a GPU. Neither of our clips is the paper's."""
        return cls(**paper_setting(dataset) | changes)


def log_odds(p: float) -> float:
    """σ⁻¹(p) = -γ of ᾱ = p."""
    return math.log(p / (1 - p))


class NoiseSchedule(nn.Module):
    """γ(t) = γ_0 + (γ_1 - γ_0)(1 - γ̄(t)), falling from γ_1 at t = 0 to γ_0 at t = 1; all of it is learned.

    γ̄ = (g(t) - g(0))/(g(1) - g(0)) with g(t) = t + Σ v σ(w t + b), a two-layer network with positive weights
    v, w beside a straight line: γ falls strictly, whatever the parameters. γ_1 - γ_0 exceeds 1. It starts
    nearly straight, between the given ᾱ.
    """

    def __init__(self, start: float, end: float, width: int = 16):
        super().__init__()
        self.gamma_0 = nn.Parameter(torch.tensor(-log_odds(end)))
        self.spread = nn.Parameter(torch.tensor(math.log(math.expm1(log_odds(end) - log_odds(start) - 1))))
        self.w, self.v = nn.Parameter(torch.full((width,), 8.0)), nn.Parameter(torch.full((width,), -5.0))
        self.b = nn.Parameter(-8 * torch.linspace(0, 1, width))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """γ and γ′ < 0 at t, of its shape. SNR′ = -γ′ exp(-γ)."""
        w, v = F.softplus(self.w), F.softplus(self.v)

        def g(t: Tensor) -> tuple[Tensor, Tensor]:
            s = torch.sigmoid(w * t.unsqueeze(-1) + self.b)
            return t + (v * s).sum(-1), 1 + (v * w * s * (1 - s)).sum(-1)

        (low, _), (high, _), (here, slope) = g(torch.zeros_like(t)), g(torch.ones_like(t)), g(t)
        spread = 1 + F.softplus(self.spread)
        return self.gamma_0 + spread * (high - here) / (high - low), -spread * slope / (high - low)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at t, of its shape, in float64, which steps need for its small differences; MPS has none."""
        gamma = self(t)[0]
        return torch.sigmoid(-(gamma if gamma.device.type == "mps" else gamma.double()))

    @torch.inference_mode()
    def summary(self) -> dict[str, Any]:
        """The parameters, and γ and ᾱ at t = 0, 0.25, … 1."""
        t = torch.linspace(0, 1, 5, device=self.b.device)
        found = {"t": t.tolist(), "gamma": self(t)[0].tolist(), "alpha_bar": self.alpha_bar(t).tolist()}
        return found | {name: x.tolist() for name, x in self.named_parameters()}

    def __str__(self) -> str:
        x = self.summary()
        gamma, level = (
            " ".join(f"{value:.{n}f}" for value in x[name]) for name, n in (("gamma", 2), ("alpha_bar", 4))
        )
        return f"γ {gamma}, ᾱ {level} at t = 0, 0.25 … 1"

    @torch.inference_mode()
    def draw(self, axes) -> None:
        """γ and ᾱ by t."""
        t = torch.linspace(0, 1, 101, device=self.b.device)
        gamma = self(t)[0].cpu()
        axes.plot(t.cpu(), gamma, label=f"γ, from {gamma[0]:.2f} to {gamma[-1]:.2f}")
        axes.plot(t.cpu(), 10 * torch.sigmoid(-gamma), label="10 ᾱ")
        axes.set(title="Learned noise schedule", xlabel="t")


@dataclass(frozen=True)
class CT:
    """The objective of NoProp-CT, with W, classifier and γ all learned by the one loss."""

    config: CTConfig

    def block_loss(self, block, t, alpha_bar, image, label, W, draw) -> tuple[Tensor, Tensor]:
        """KL + η/2 SNR′ ‖û - u‖²; and a z_1 (B, D), for the classifier. Arguments: see Hybrid.block_loss().

        t and alpha_bar are a chain's: here each image gets config.draws values of t, and γ gives ᾱ.
        """
        seed_dropout(block, draw)
        u = F.embedding(label, W).repeat(self.config.draws, 1)  # (draws B, D)
        t = stratified(draw, len(u)).to(u.dtype)
        gamma, slope = block.schedule(t)
        noise, rise = draw("noise", u.shape), -slope * torch.exp(-gamma)  # SNR′
        z = noisy_label(u, noise, torch.sigmoid(-gamma).unsqueeze(1))
        u_hat = block(block.image(image), z, t).softmax(-1) @ W
        loss = self.config.eta_loss_weight / 2 * (rise * (u_hat - u).square().sum(1)).mean()
        ends = torch.arange(2, device=t.device, dtype=t.dtype)  # 0 and 1
        u, (start, end) = u[: len(label)], block.schedule.alpha_bar(ends)
        return loss + kl_to_noise(u, start), noisy_label(u, draw("z_1", u.shape), end)

    def head_loss(self, classifier, z, label, W, draw) -> Tensor:
        """Cross-entropy of the classifier on z_1, whose gradient reaches γ_0 and W."""
        return F.cross_entropy(classifier(z), label)


def kl_to_noise(u: Tensor, alpha_bar: Tensor) -> Tensor:
    """KL(q(z_0 | y) ‖ N(0, I)), mean over the batch of u (B, D), with a gradient to ᾱ_0 = alpha_bar, ()."""
    dim = u.shape[1]
    return 0.5 * (alpha_bar * u.square().sum(1).mean() - dim * alpha_bar - dim * torch.log1p(-alpha_bar))


class CTFlow(Flow):
    """The network of NoProp-CT."""

    def field(self, code: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """û and the probability flow dz/dt = -½ γ′ [√ᾱ û - ᾱ z], (B, D) each."""
        u_hat = self.blocks[0](code, z, t).softmax(-1) @ self.label_embedding.weight
        gamma, slope = self.blocks[0].schedule(t)
        alpha_bar = torch.sigmoid(-gamma)
        return u_hat, -slope / 2 * (alpha_bar.sqrt() * u_hat - alpha_bar * z)

    def step(self, t: int, image: Tensor, z: Tensor, temperature=0.0, noise=None) -> tuple[Tensor, Tensor]:
        """Step t of config.steps: û before it, z after it. If û = u, equation 3 is exact for any width."""
        if self.config.solver != "posterior":
            return super().step(t, image, z, temperature, noise)
        times = self.times(t, z)
        u_hat, _ = self.field(self.encode(image), z, times[0])
        _, a, b, c = reverse_steps(self.blocks[0].schedule.alpha_bar(torch.cat(times)))[0].to(z.dtype)
        z = a * u_hat + b * z
        if temperature:
            z = z + temperature * c**0.5 * send(torch.randn(z.shape, generator=noise), z.device)
        return u_hat, z

    def as_chain(self) -> CTFlow:
        chain = copy.copy(self)
        t = torch.linspace(0, 1, self.config.steps + 1, device=self.classifier.weight.device)
        chain.alpha_bar = self.blocks[0].schedule.alpha_bar(t)
        return chain
