"""The best possible block, and the chain of such: docs/evidence.md, "What a block can learn"."""

import pytest
import torch
import torch.nn.functional as F
from conftest import noprop
from torch import Tensor, nn

from benchmarks.separate import Arm, config_of
from benchmarks.theory import formula
from noprop_lab.networks import build

T, K, D = 10, 10, 20


@pytest.fixture(autouse=True)
def draws():
    with noprop.seeded("theory"):
        yield


class IdealBlock(nn.Module):
    """p(k | x, z) ∝ p(k | x) q(z | k) and û = Σ p(k | x, z) u_k, computed: the minimiser of a block's loss.

    The "image" is log p(k | x), up to a constant. spread: of what a block of its own adds to it, so that
    p_t differs from block to block; sharper: the exponent of q, 1 in an ideal block.
    """

    def __init__(self, image_shape, embed_dim, num_classes, spread=0.0, sharper=1.0):
        super().__init__()
        self.own, self.sharper = nn.Parameter(spread * torch.randn(num_classes)), sharper

    def forward(self, image: Tensor, z: Tensor, alpha_bar: float, W: Tensor) -> Tensor:
        distance = (z[:, None] - alpha_bar**0.5 * W).square().sum(-1)  # (B, classes)
        log_q = -distance / (2 * (1 - alpha_bar))
        u_hat = (image.flatten(1) + self.own + self.sharper * log_q).softmax(-1) @ W
        return (z - alpha_bar**0.5 * u_hat) / (1 - alpha_bar) ** 0.5


def ideal(W: Tensor | None = None, equal_weights=True, **block) -> noprop.NoProp:
    """NoProp as it is, of ideal blocks, in float64; W (classes, D) in place of its orthonormal embedding."""
    model = noprop.NoProp(lambda *sizes: IdealBlock(*sizes, **block), T, K, D, (1, 1, K), 0, equal_weights)
    if W is not None:
        model.label_embedding.weight.data = W
    return model.double().requires_grad_(False)


def chain(model: noprop.NoProp, log_p: Tensor) -> Tensor:
    """π_1 ... π_T, (B, T, classes), read from û_t = π_t W by W's pseudo-inverse."""
    image, found = log_p.view(-1, 1, 1, K), []
    z = model.start(image)
    for t in range(1, T + 1):
        u_hat, z = model.step(t, image, z)
        found.append(u_hat @ torch.linalg.pinv(model.label_embedding.weight))
    return torch.stack(found, 1)


def opinions(number=400) -> Tensor:
    """log p(y|x) of images on which a classifier is more and less sure, (B, classes)."""
    scale = torch.logspace(-1, 1, number, dtype=torch.float64)[:, None]
    return (scale * torch.randn(number, K, dtype=torch.float64)).log_softmax(-1)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_chain_of_ideal_blocks_is_the_formula(orthonormal, spread):
    """For any embedding, and for blocks whose p_t differ."""
    W = None if orthonormal else 0.5 * torch.randn(K, D, dtype=torch.float64)
    model, log_p = ideal(W, spread=spread), opinions()
    log_p_t = log_p[:, None] + torch.stack([block.own for block in model.blocks])
    found = chain(model, log_p)
    expected = formula(log_p_t, model.label_embedding.weight, model.alpha_bar)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert (found[:, -1] - found[:, 0]).abs().max() > 0.1  # blocks do something


@pytest.mark.parametrize("equal_weights", [True, False])
def test_equal_opinions_change_certainty_and_no_answer(equal_weights):
    """Orthonormal W, equal p_t: classes keep block 1's order after every block, at odds no smaller."""
    log_p = opinions()
    log_p = log_p.gather(1, log_p.argsort(1))  # rising from class to class: so must every π_t, then
    found = chain(ideal(equal_weights=equal_weights), log_p)
    assert (found.diff(dim=-1) > -1e-12).all()
    top = found[..., -1]
    assert (top[:, 1:] > top[:, :1] - 1e-12).all() and (top[:, -1] - top[:, 0]).max() > 0.1
    readable = (found[:, :1] > 1e-6) & (found > 1e-6)
    odds = (top[..., None] / found).log()
    assert ((odds > odds[:, :1] - 1e-6) | ~readable).all()


@pytest.mark.parametrize("premise", ["orthonormal W", "equal p_t"])
def test_both_premises_are_needed(premise):
    """With rows of unequal length, or with blocks of different opinions, later blocks do change answers."""
    W, spread = None, 1.0
    if premise == "orthonormal W":
        W, spread = torch.eye(K, D, dtype=torch.float64) * torch.linspace(0.5, 1.5, K)[:, None], 0.0
    answers = chain(ideal(W, spread=spread), opinions()).argmax(-1)
    assert (answers[:, -1] != answers[:, 0]).double().mean() > 0.1


@pytest.mark.parametrize("t", [3, 5, 7, 9])
def test_an_ideal_block_has_the_smallest_loss(t):
    """The script's own loss, y drawn from p(y|x): smaller than where z counts for less, more or nothing."""
    log_p = opinions(4000).repeat(5, 1)
    label = torch.multinomial(log_p.exp(), 1)[:, 0]
    noise = torch.randn(len(label), D, dtype=torch.float64)

    def loss(sharper: float) -> float:
        model = ideal(sharper=sharper)
        W, image = model.label_embedding.weight, log_p.view(-1, 1, 1, K)
        step = model.blocks[t - 1], t, model.alpha_bar, image, label, W, lambda *_: noise
        return noprop.Hybrid().block_loss(*step)[0].item()

    assert loss(1.0) < min(loss(0.0), loss(0.5), loss(2.0))


@pytest.mark.parametrize("t", [1, 6])
def test_the_arms_that_separate_noise_from_loss(t):
    """Without noise a block sees z = 0, with NoProp's weights of its loss; by cross-entropy, that of f."""
    image, label, alpha_bar = torch.rand(9, 1, 28, 28), torch.arange(9), noprop.cosine_schedule(10)
    level, seen = alpha_bar[t - 1].item(), []
    for loss, noise in (("mse", False), ("ce", False), ("ce", True)):
        config = config_of("mnist", 0, loss)
        model = build(config)
        block, W = model.blocks[t - 1].eval(), model.label_embedding.weight
        block.label.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        eps = torch.randn(9, 20)
        found, u_hat = Arm(2.0, 1.0, config, loss, noise).block_loss(
            block, t, alpha_bar, image, label, W, lambda *_, eps=eps: eps
        )
        z = (level**0.5 * W[label] + (1 - level) ** 0.5 * eps) if noise else torch.zeros(9, 20)
        torch.testing.assert_close(seen[-1], z)
        f = block.head(torch.cat([block.image(image), block.label(z)], 1))
        if loss == "mse":
            torch.testing.assert_close(u_hat, f, rtol=1e-4, atol=1e-5)
            expected = (2 * level / (1 - level) + 1) * F.mse_loss(f, W[label])
        else:
            torch.testing.assert_close(u_hat, f.softmax(-1) @ W)
            expected = F.cross_entropy(f, label)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
