"""The schedule, the reverse step, the loss: identities and an oracle."""

import pytest
import torch
from conftest import noprop
from torch import nn


def network(num_blocks: int) -> noprop.NoProp:
    return noprop.build(noprop.Config(num_blocks=num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 2, 10, 100])
def test_schedule_and_coefficients(num_blocks):
    alpha_bar = noprop.cosine_schedule(num_blocks)
    assert alpha_bar.shape == (num_blocks + 1,)
    assert (alpha_bar[0].item(), alpha_bar[-1].item()) == (1e-3, 0.999)
    rises = alpha_bar.diff()
    assert (rises >= 0).all() and (num_blocks > 50 or (rises > 0).all())
    before, a, b, c = noprop.reverse_steps(alpha_bar).T
    assert torch.equal(before, alpha_bar[:-1])
    for coefficient in (a, b, c):
        assert coefficient.isfinite().all() and (coefficient >= 0).all()
    after = alpha_bar[1:]
    torch.testing.assert_close(a + b * before.sqrt(), after.sqrt())
    torch.testing.assert_close(b**2 * (1 - before) + c, 1 - after)


@pytest.mark.parametrize("equal_weights", [False, True])
def test_z_is_a_running_mean_of_the_estimates(equal_weights):
    """z_t/√ᾱ_t = Σ w_s û_s: equal weights, or the increments of SNR = ᾱ/(1-ᾱ), whose first share is z_0's."""
    alpha_bar, estimates = noprop.cosine_schedule(10), torch.randn(10, 20, dtype=torch.float64)
    _, a, b, _ = noprop.reverse_steps(alpha_bar, equal_weights).T.tolist()
    z = torch.zeros(20, dtype=torch.float64)
    for t in range(10):
        z = a[t] * estimates[t] + b[t] * z
    snr = alpha_bar / (1 - alpha_bar)
    weights = torch.full((10,), 0.1).double() if equal_weights else snr.diff() / snr[-1]
    torch.testing.assert_close(z / alpha_bar[-1].sqrt(), weights @ estimates)


def test_schedule_values():
    expected = [0.001, 0.024, 0.094, 0.203, 0.341, 0.494, 0.647, 0.787, 0.899, 0.972, 0.999]
    torch.testing.assert_close(noprop.cosine_schedule(10), torch.tensor(expected).double(), atol=6e-4, rtol=0)


def test_ddpm_form_equals_u_hat_form():
    """a û + b z is DDPM's (z_{t-1} - (1-α)/√(1-ᾱ_{t-1}) ε̂) / √α with its time reversed, α = ᾱ_{t-1}/ᾱ_t."""
    alpha_bar = noprop.cosine_schedule(10)
    _, a, b, _ = noprop.reverse_steps(alpha_bar).T.tolist()
    z, eps_hat = torch.randn(2, 10, 20, dtype=torch.float64)
    for t in range(1, 11):
        level = alpha_bar[t - 1].item()
        u_hat = noprop.clean_label(z[t - 1], eps_hat[t - 1], level)
        alpha = level / alpha_bar[t].item()
        ddpm = (z[t - 1] - (1 - alpha) / (1 - level) ** 0.5 * eps_hat[t - 1]) / alpha**0.5
        torch.testing.assert_close(a[t - 1] * u_hat + b[t - 1] * z[t - 1], ddpm)


@pytest.mark.parametrize("target", ["label", "noise", "classes"])
def test_hybrid_loss_is_a_constant_times_the_noise_error(target):
    """(η₁ + η₂ (1-ᾱ)/ᾱ) MSE(ε̂, ε), of z = √ᾱ u + √(1-ᾱ) ε, at the level ᾱ_{t-1}; and û is z without the ε̂."""
    block, W = (
        noprop.DenoisingBlockPaper((1, 28, 28), 20, 10, target=target).double(),
        torch.randn(10, 20).double(),
    )
    image, noise = torch.rand(8, 1, 28, 28).double(), torch.randn(8, 20).double()
    label, alpha_bar = torch.arange(8), noprop.cosine_schedule(10)
    for t in (1, 6, 10):
        draw = lambda purpose, shape: {"noise": noise}[purpose]  # noqa: E731
        loss, u_hat = noprop.Hybrid(2.0, 1.0).block_loss(block, t, alpha_bar, image, label, W, draw)
        level = alpha_bar[t - 1]
        z = level.sqrt() * W[:8] + (1 - level).sqrt() * noise
        eps_hat = block(image, z, level.item(), W)
        error = (eps_hat - noise).square().mean()
        torch.testing.assert_close(loss, (2 + (1 - level) / level) * error)
        torch.testing.assert_close(level.sqrt() * u_hat + (1 - level).sqrt() * eps_hat, z)
        f = block.head(torch.cat([block.image(image), block.label(z)], dim=1))  # what the target says it is
        found = eps_hat if target == "noise" else u_hat
        torch.testing.assert_close(found, f.softmax(-1) @ W if target == "classes" else f)


def test_blocks_have_the_stated_sizes():
    blocks = {x: noprop.build(noprop.Config(block=x, num_blocks=1)).blocks for x in noprop.SIZES}
    sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks.items()}
    assert sizes == pytest.approx({"small": 51_000, "deep": 129_000, "reference": 628_000}, rel=0.01)


LAYERS = {  # (outputs, inputs, kernel) of convolutions, (outputs, inputs) of others, as docs and comments say
    "small": [(16, 1, 5), (32, 16, 3), (64, 32, 3), (64, 256), (64, 20), (64, 128), (20, 64)],
    "deep": [(24, 1, 5), (48, 24, 3), (48, 48, 3), (96, 48, 3), (96, 384), (64, 20), (96, 160), (20, 96)],
    "reference": [(32, 1, 3), (64, 32, 3), (128, 64, 3), (256, 1152)]  # image
    + [(256, 20), (256, 256), (256, 512), (128, 256), (20, 128)],  # label, head
}


@pytest.mark.parametrize("size", LAYERS)
def test_the_layers_of_a_block(size):
    block = noprop.DenoisingBlockPaper((1, 28, 28), 20, 10, noprop.SIZES[size])
    weights = [x.weight.shape for x in block.modules() if isinstance(x, nn.Conv2d | nn.Linear)]
    assert [(*shape[:2], *shape[2:3]) for shape in weights] == LAYERS[size]
    pools = {"small": [2], "deep": [2, 2], "reference": [2, 2, 3]}[size]
    assert [x.kernel_size for x in block.modules() if isinstance(x, nn.MaxPool2d)] == pools


@pytest.mark.parametrize("num_blocks", [1, 2, 60])
def test_any_number_of_blocks(num_blocks, data):
    model = network(num_blocks).eval()
    probabilities = model.probabilities(data.test.images[:5])
    assert probabilities.shape == (5, num_blocks, 10) and probabilities.isfinite().all()
    assert torch.equal(model.predict(data.test.images[:5]), probabilities[:, -1].argmax(-1))


def test_without_temperature_nothing_is_drawn():
    """Neither from the caller's generator nor from torch's own."""
    model, noise, image = network(2).eval(), torch.Generator().manual_seed(1), torch.rand(3, 1, 28, 28)
    before = noise.get_state(), torch.get_rng_state()
    with torch.inference_mode():
        cold, again = model(image, 0.0, noise), model(image)
        assert torch.equal(cold, again) and torch.equal(noise.get_state(), before[0])
        assert not torch.equal(model(image, 1.0, noise), cold)
    assert torch.equal(torch.get_rng_state(), before[1]) and not torch.equal(noise.get_state(), before[0])


def test_z_0_has_the_temperature_as_its_deviation():
    model, image = network(1), torch.zeros(20_000, 1, 1, 1)
    for temperature in (0.0, 0.5, 1.0):
        z = model.start(image, temperature, torch.Generator().manual_seed(0))
        assert z.shape == (20_000, 20) and abs(z.std().item() - temperature) < 0.01


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 27, 28),
        torch.rand(2, 3, 28, 28),
        torch.rand(2, 28, 28) * 255,
        -torch.rand(2, 28, 28),
        torch.full((2, 28, 28), torch.nan),
        torch.zeros(2, 28, 28, dtype=torch.int64),
    ],
    ids=["narrow", "colour", "to 255", "negative", "nan", "int64"],
)
def test_images_that_are_none_are_refused(images):
    model = network(1)
    for ask in (model.predict, model.probabilities):
        with pytest.raises(ValueError, match="images"):
            ask(images)


def test_images_of_numpy_are_taken():
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    assert torch.equal(network(1).predict(images.numpy()), network(1).predict(images))
