"""A second trainer, in the paper's notation: plain loops over blocks and tensors, and nothing of the script.

It is slow, and written from the equations. Weights come as state dicts, batches and draws as tensors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

T, ETA, LAMBDA = 3, 2.0, 1.0
CLIP, DECAY, DECAY_W, MAX_NORM, AVERAGE = 0.05, 0.3, 0.2, 0.98, 0.15  # which binds from step 2 on

# the last five: of the noise schedule; "w" also of a chain that learns its α_t
LEARNED = "weight", "bias", "gamma_0", "spread", "w", ".v", ".b"


def level(t: int) -> float:
    """ᾱ_t."""
    return min(max(math.cos((1 - t / T + 0.008) / 1.008 * math.pi / 2) ** 2, 0.001), 0.999)


def snr(t: int) -> float:
    return level(t) / (1 - level(t))


def normalized(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """Batch norm in training, which moves its running statistics by a tenth."""
    axes = [axis for axis in range(h.ndim) if axis != 1]
    mean, variance = h.mean(axes, keepdim=True), h.var(axes, keepdim=True, correction=0)
    with torch.no_grad():
        p[f"{name}.running_mean"] += 0.1 * (mean.flatten() - p[f"{name}.running_mean"])
        p[f"{name}.running_var"] += 0.1 * (h.var(axes) - p[f"{name}.running_var"])
    shape = mean.shape
    scale, shift = p[f"{name}.weight"].view(shape), p[f"{name}.bias"].view(shape)
    return (h - mean) / (variance + 1e-5).sqrt() * scale + shift


def still(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """Batch norm in inference."""
    mean, variance, scale, shift = (
        p[f"{name}.{x}"].view(1, -1, *[1] * (h.ndim - 2))
        for x in ("running_mean", "running_var", "weight", "bias")
    )
    return (h - mean) / (variance + 1e-5).sqrt() * scale + shift


def maps(p: dict[str, Tensor], x: Tensor, z: Tensor | None = None, norm=normalized) -> Tensor:
    """What the first two convolutions of a small network, of weights p, make of images x, and of maps z."""
    first, second = ("image", "image") if z is None else ("before", "middle")
    h = F.max_pool2d(F.conv2d(x, p[f"{first}.0.weight"], stride=2), 2, 2, ceil_mode=True)
    h = F.relu(norm(h, p, f"{first}.2"))
    h = h if z is None else torch.cat([h, F.pad(z, (1, 1, 1, 1))], 1)
    return F.relu(norm(F.conv2d(h, p[f"{second}.4.weight"]), p, f"{second}.5"))


def code(p: dict[str, Tensor], maps: Tensor, norm=normalized) -> Tensor:
    """What the rest of its convolutions and its full layer make of them."""
    h = F.relu(norm(F.conv2d(maps, p["image.7.weight"]), p, "image.8"))
    return F.relu(norm(h.flatten(1) @ p["image.11.weight"].T, p, "image.12"))


def f(p: dict[str, Tensor], code: Tensor, z: Tensor, *more: Tensor) -> Tensor:
    """The network in a small block, of weights p, for codes of images and noisy labels z; more: of t."""
    h = torch.cat([code, F.relu(z @ p["label.0.weight"].T + p["label.0.bias"]), *more], 1)
    h = F.relu(h @ p["head.0.weight"].T + p["head.0.bias"])
    return h @ p["head.2.weight"].T + p["head.2.bias"]


class Trainer:
    """Blocks 1 ... T, classifier and W, each with an AdamW and an average of its own."""

    blocks = T

    def __init__(self, weights: dict[str, Tensor], objective: str, learned: bool, classes: bool):
        self.objective, self.learned, self.classes, self.k = objective, learned, classes, 0
        names = [*(f"blocks.{t}." for t in range(self.blocks)), "classifier.", "label_embedding."]
        self.parts = [{k[len(n) :]: x.clone() for k, x in weights.items() if k.startswith(n)} for n in names]
        self.averages = [{k: x.clone() for k, x in part.items()} for part in self.parts]
        self.optimizers = []
        for name, part in zip(names, self.parts, strict=True):
            decay = DECAY_W if name == "label_embedding." else DECAY
            learn = [x.requires_grad_() for k, x in part.items() if k.endswith(LEARNED)]
            self.optimizers.append(torch.optim.AdamW(learn, weight_decay=decay, foreach=False))

    def estimate(self, t: int, x: Tensor, z: Tensor, W: Tensor) -> Tensor:
        """û_t of z_{t-1}."""
        out = f(self.parts[t - 1], code(self.parts[t - 1], maps(self.parts[t - 1], x)), z)
        return out.softmax(1) @ W if self.classes else out

    def losses(self, t: int, x: Tensor, y: Tensor, W: Tensor, eps: Tensor, eps_T: Tensor) -> Tensor:
        """Of block t, alone: with the classifier's for block T, or, in Algorithm 1 of NoProp-DT, for all."""
        u, a = W[y], level(t - 1)
        z = math.sqrt(a) * u + math.sqrt(1 - a) * eps
        u_hat = self.estimate(t, x, z, W)
        eps_hat = (z - math.sqrt(a) * u_hat) / math.sqrt(1 - a)
        loss = ETA * ((eps_hat - eps) ** 2).mean() + LAMBDA * ((u_hat - u) ** 2).mean()
        read = u_hat
        if self.objective.startswith("dt"):
            loss = T / 2 * ETA * (snr(t) - snr(t - 1)) * ((u_hat - u) ** 2).sum(1).mean()
            read = math.sqrt(level(T)) * u + math.sqrt(1 - level(T)) * eps_T
        if t < T and self.objective != "dt, each":
            return loss
        if self.objective.startswith("dt"):  # KL(N(√ᾱ u, (1-ᾱ) I) ‖ N(0, I)), summed over D, by PyTorch
            q = torch.distributions.Normal(math.sqrt(level(0)) * u, math.sqrt(1 - level(0)))
            prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
            loss = loss + torch.distributions.kl_divergence(q, prior).sum(1).mean()
        return loss + F.cross_entropy(read @ self.parts[-2]["weight"].T + self.parts[-2]["bias"], y)

    def chain(self, x: Tensor, y: Tensor, W: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy at the end of the chain, from z = 0. At equal weights z_t/√ᾱ_t is the mean of û.

        "learned": equations 17-19 of the paper, from z ~ N(0, I). "every": the mean of all blocks' losses.
        """
        learned, losses, mean = "learned" in self.objective, [], 0
        z = z if learned else torch.zeros_like(z)
        for t in range(1, T + 1):
            u_hat = self.estimate(t, x, z, W)
            mean = mean + (u_hat - mean) / t
            alpha = self.parts[t - 1]["w"].tanh() if learned else None
            z = (1 - alpha) * z + alpha * u_hat if learned else math.sqrt(level(t)) * mean
            read = z if learned else u_hat
            logits = read @ self.parts[-2]["weight"].T + self.parts[-2]["bias"]
            losses.append(F.cross_entropy(logits, y))
        return sum(losses) / T if "every" in self.objective else losses[-1]

    def step(self, x: Tensor, y: Tensor, lr: float, eps: list[Tensor], eps_T: list[Tensor]) -> None:
        """One step of all parts, on images x, labels y and the draws of blocks 1 ... T."""
        W, gradient = self.parts[-1]["weight"], 0
        whole = self.objective.startswith("backprop")
        if whole:
            own = W.detach().clone().requires_grad_()
            self.chain(x, y, own, eps[0]).backward()
            gradient = own.grad  # None where no block reads W
        for t in range(1, T + 1) if not whole else ():
            own = W.detach().clone().requires_grad_()
            self.losses(t, x, y, own, eps[t - 1], eps_T[t - 1]).backward()
            gradient = gradient + own.grad
            if self.objective == "dt, each":
                self.update(lr, own.grad)  # of block t, classifier and W: no other has a gradient
                gradient = 0
        if self.objective != "dt, each":
            self.update(lr, gradient)
        self.k += 1

    def update(self, lr: float, gradient: Tensor | None) -> None:
        """Clip, step and average each part that has a gradient; gradient: that by W."""
        W = self.parts[-1]["weight"]
        if self.learned:
            W.grad = gradient
        for part, average, optimizer in zip(self.parts, self.averages, self.optimizers, strict=True):
            learn = optimizer.param_groups[0]["params"]
            if learn[0].grad is None:
                continue
            clip_grad_norm_(learn, CLIP)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                if part is self.parts[-1]:
                    norm = W.norm(dim=1, keepdim=True)
                    W *= torch.where(norm > MAX_NORM, MAX_NORM / (norm + 1e-7), 1)  # torch.renorm's 1e-7
                d = min(AVERAGE, (1 + self.k) / (10 + self.k))
                for name in part:
                    average[name] = d * average[name] + (1 - d) * part[name].detach()


class CascadeTrainer(Trainer):
    """Each block learns its logits by cross-entropy; z is what earlier blocks make of the image, a number."""

    def z(self, hand_on: str, answers: list[Tensor], codes: list[Tensor], last: Tensor) -> Tensor:
        """What is handed on by blocks that answered so, left these codes, and the last of them these maps."""
        mean = sum(answers) / len(answers)
        nothing = torch.zeros_like(mean)
        return {
            "features": torch.cat([nothing[:, :1], *codes], 1),
            "label": mean,
            "both": torch.cat([mean, *codes], 1),
            "maps": last,
            "nothing": nothing,
        }[hand_on]

    def step(
        self, views: list[Tensor], y: Tensor, lr: float, eps, hand_on, estimates, learns
    ) -> list[Tensor]:
        """One step on a view of the images for each block, and labels y; returns the blocks' losses.

        eps(t, shape): the noise, scaled, on what block t reads.
        """
        n = len(y)
        start = {"features": (n, 1), "maps": (n, 32, 4, 4)}.get(hand_on, (n, 10))
        z, said, answers, codes, losses = torch.zeros(start), [], [], [], []

        def block(p: dict[str, Tensor], x: Tensor, z: Tensor, norm=normalized) -> tuple[Tensor, ...]:
            m = maps(p, x, z if hand_on == "maps" else None, norm)
            h = code(p, m, norm)
            return f(p, h, torch.zeros(n, 10) if hand_on == "maps" else z), h, m

        for t, (p, average) in enumerate(zip(self.parts[:T], self.averages[:T], strict=True), start=1):
            x = views[t - 1]
            logits, h, m = block(p, x, z + eps(t, z.shape))
            mean = (sum(said) + logits.softmax(1)) / t
            losses.append(-mean[range(n), y].log().mean() if learns == "mean" else F.cross_entropy(logits, y))
            losses[-1].backward()
            said.append(logits.detach().softmax(1))
            if estimates == "averaged":
                with torch.no_grad():
                    logits, h, m = block(average, x, z, still)
            answers.append(logits.detach().softmax(1))
            codes.append(h.detach())
            z = self.z(hand_on, answers, codes, m.detach())
        self.update(lr, None)
        self.k += 1
        return losses


def gamma(p: dict[str, Tensor], t: Tensor) -> Tensor:
    """γ of a single t, with g a network of positive weights beside a straight line."""
    w, v, b = (p[f"schedule.{name}"] for name in "wvb")

    def g(t):
        return t + sum(F.softplus(v[j]) * torch.sigmoid(F.softplus(w[j]) * t + b[j]) for j in range(len(w)))

    gamma_0, gamma_1 = p["schedule.gamma_0"], p["schedule.gamma_0"] + 1 + F.softplus(p["schedule.spread"])
    return gamma_0 + (gamma_1 - gamma_0) * (1 - (g(t) - g(0.0)) / (g(1.0) - g(0.0)))


def time(p: dict[str, Tensor], t: float) -> Tensor:
    """What a network of all t makes of t, (1, width)."""
    angles = [1000 * t / 10_000 ** (k / 32) for k in range(32)]
    h = torch.tensor([[math.sin(a) for a in angles] + [math.cos(a) for a in angles]])
    return F.relu(h @ p["time.0.weight"].T + p["time.0.bias"])


class FlowTrainer(Trainer):
    """NoProp-CT and NoProp-FM: one network for all t. An image and a t at a time, after the image's code."""

    blocks = 1

    def step(self, x: Tensor, y: Tensor, lr: float, u: Tensor, draws: dict[str, Tensor], sigma=0.0) -> None:
        """One step on images x and labels y. u: the uniform numbers by which t is drawn, one a draw."""
        p, classifier = self.parts[:2]
        W = self.parts[-1]["weight"].detach().clone().requires_grad_()
        codes, n, total, ends = code(p, maps(p, x)), len(u), 0, []
        for i in range(n):
            label, h, t = y[i % len(y)], codes[i % len(y)][None], ((i + u[i]) / n).item()
            if self.objective == "ct":
                loss = self.ct(p, h, W, label, torch.tensor(t, requires_grad=True), draws["noise"][i])
            else:
                z_0 = draws["z_0"][i]
                z = t * W[label] + (1 - t) * z_0 + sigma * draws["noise"][i]
                v = (f(p, h, z[None], time(p, t)) @ W)[0]
                loss = ((v - (W[label] - z_0)) ** 2).sum()
                ends.append(z + (1 - t) * v)
            total = total + loss / n
        if self.objective == "ct":
            first, last = (torch.sigmoid(-gamma(p, torch.tensor(t))) for t in (0.0, 1.0))
            q = torch.distributions.Normal(first.sqrt() * W[y], (1 - first).sqrt())
            prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
            total = total + torch.distributions.kl_divergence(q, prior).sum(1).mean()
            ends = list(last.sqrt() * W[y] + (1 - last).sqrt() * draws["z_1"])
        if self.objective == "ct" or self.learned:
            logits = torch.stack(ends) @ classifier["weight"].T + classifier["bias"]
            total = total + F.cross_entropy(logits, y.repeat(len(ends) // len(y)))
        total.backward()
        if classifier["weight"].grad is None:  # its decay acts all the same
            classifier["weight"].grad, classifier["bias"].grad = (
                torch.zeros_like(x) for x in classifier.values()
            )
        self.update(lr, W.grad)
        self.k += 1

    def ct(
        self, p: dict[str, Tensor], code: Tensor, W: Tensor, label: Tensor, t: Tensor, eps: Tensor
    ) -> Tensor:
        """η/2 SNR′(t) ‖û - u‖², SNR′ by autograd."""
        g, u = gamma(p, t), W[label]
        [slope] = torch.autograd.grad(torch.exp(-g), t, create_graph=True)
        alpha_bar = torch.sigmoid(-g)
        z = alpha_bar.sqrt() * u + (1 - alpha_bar).sqrt() * eps
        u_hat = (f(p, code, z[None], time(p, t.item())).softmax(1) @ W)[0]
        return ETA / 2 * slope * ((u_hat - u) ** 2).sum()
