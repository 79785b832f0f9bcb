"""The script's step, which is fast, against the paper's equations, which are plain: in float64, to 1e-10."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import noprop

from noprop_lab.__main__ import step_of
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.ct import CTConfig
from noprop_lab.dt import DTConfig
from noprop_lab.fm import FMConfig
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig

SETTINGS = dict(
    num_blocks=reference.T,
    grad_clip=reference.CLIP,
    weight_decay=reference.DECAY,
    embed_wd=reference.DECAY_W,
    max_norm_embed=reference.MAX_NORM,
    ema_decay=reference.AVERAGE,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NAMES = ("hybrid", "hybrid, classes", "dt", "dt, each")
NAMES += ("backprop", "backprop, classes", "backprop, learned", "backprop, every")


def configs(embedding: str) -> dict[str, noprop.Config]:
    weights = dict(eta_loss_weight=reference.ETA, lambda_global=reference.LAMBDA, embedding=embedding)
    dt = DTConfig(**SETTINGS, eta_loss_weight=reference.ETA, embedding=embedding)
    twin = BackpropConfig(**SETTINGS, embedding=embedding)
    papers = dict(weights="learned", target="classes", classify="z", temperature=0.5)
    return {
        "hybrid": noprop.Config(**SETTINGS, **weights),
        "hybrid, classes": LabConfig(**SETTINGS, **weights, target="classes"),
        "dt, each": dt,
        "dt": replace(dt, updates="last"),
        "backprop": twin,
        "backprop, classes": replace(twin, target="classes"),
        "backprop, learned": replace(twin, **papers),
        "backprop, every": replace(twin, supervise="every"),
    }


def same_weights(slow: reference.Trainer, state: noprop.State) -> None:
    for network, found in ((slow.parts, state.model), (slow.averages, state.averaged)):
        for own, part in zip(network, found.parts().values(), strict=True):
            for key, x in part.state_dict().items():
                if not key.endswith("num_batches_tracked"):
                    torch.testing.assert_close(x, own[key].detach(), rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("embedding", ["learned", "fixed"])
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_those_of_the_equations(name, embedding, data):
    """Weights, averages, batch-norm statistics, embedding; the clip, both decays and the row norms act."""
    state = (noprop.State if name == "hybrid" else LabState)(configs(embedding)[name])
    classes, learned = state.config.target == "classes", embedding == "learned"
    objective = name if name == "dt, each" or name.startswith("backprop") else state.config.objective
    slow = reference.Trainer(state.model.state_dict(), objective, learned, classes)
    step = step_of(state.config)
    for k, lr in enumerate((0.003, 0.01, 0.002)):
        rows = slice(64 * k, 64 * (k + 1))
        image, label = data.train.images[rows].double() / 255, data.train.labels[rows]
        shape = (64, state.config.dim)

        def draw(purpose: str, t: int, k=k, shape=shape) -> torch.Tensor:
            return torch.randn(shape, generator=noprop.generator(state.config.seed, purpose, t, k))

        eps, eps_T = ([draw(x, t) for t in range(1, reference.T + 1)] for x in ("noise", "z_T"))
        eps = [state.config.temperature * draw("z_0", 0)] if "learned" in name else eps
        slow.step(image, label, lr, eps, eps_T)
        results = step(state, image, label, lr)
        state.step += 1
        assert max(norm for _, norm in results.values()) > reference.CLIP
    same_weights(slow, state)
    rows = state.model.label_embedding.weight.norm(dim=1)
    assert (rows <= reference.MAX_NORM + 1e-12).all() == (
        learned and name not in ("backprop", "backprop, every")
    )


@pytest.mark.parametrize("ways", [{}, dict(estimates="averaged", z_noise=0.5, own_views=True, learns="mean")])
@pytest.mark.parametrize("hand_on", ["features", "label", "both", "maps", "nothing"])
def test_three_steps_of_a_cascade_are_those_of_the_equations(hand_on, ways, data):
    """As it is, and with all that can be varied."""
    ways = ways | ({"estimates": "live"} if hand_on == "nothing" else {})
    settings = {name: x for name, x in SETTINGS.items() if name not in CascadeConfig.WITHOUT_EFFECT}
    state = LabState(config := CascadeConfig(**settings, hand_on=hand_on, **ways))
    slow = reference.CascadeTrainer(state.model.state_dict(), "cascade", False, True)
    for k, lr in enumerate((0.003, 0.01, 0.002)):
        rows = slice(64 * k, 64 * (k + 1))
        images, label = data.train.images[rows].double() / 255, data.train.labels[rows]
        views = [images.flip(2), images, images.flip(3)] if config.own_views else [images] * reference.T

        def eps(t: int, shape, k=k) -> torch.Tensor:
            return config.z_noise * torch.randn(shape, generator=noprop.generator(0, "noise", t, k))

        losses = slow.step(views, label, lr, eps, hand_on, config.estimates, config.learns)
        results = step_of(config)(state, torch.stack(views) if config.own_views else images, label, lr)
        state.step += 1
        assert list(results) == [f"blocks.{t}" for t in range(reference.T)]
        assert [x.item() for x, _ in results.values()] == pytest.approx([x.item() for x in losses])
        assert min(norm for _, norm in results.values()) > reference.CLIP
    same_weights(slow, state)


@pytest.mark.parametrize("embedding", ["learned", "fixed"])
@pytest.mark.parametrize("kind", [CTConfig, FMConfig])
def test_three_steps_of_ct_and_fm_are_those_of_the_equations(kind, embedding, data):
    """The same, and for CT the noise schedule, whose SNR′ the reference differentiates by autograd."""
    more = dict(eta_loss_weight=reference.ETA) if kind is CTConfig else dict(sigma=0.3)
    settings = SETTINGS | more | dict(num_blocks=1, embedding=embedding, draws=2, step_threads=1)
    state = LabState(kind(**settings))
    if kind is CTConfig:  # a bent γ
        for model in (state.model, state.averaged):
            model.blocks[0].schedule.v.data.add_(torch.linspace(0, 6, 16))
    slow = reference.FlowTrainer(state.model.state_dict(), kind.objective, embedding == "learned", True)
    for k, lr in enumerate((0.003, 0.01, 0.002)):
        rows = slice(16 * k, 16 * (k + 1))
        image, label = data.train.images[rows].double() / 255, data.train.labels[rows]

        def draw(purpose: str, n: int, k=k) -> torch.Tensor:
            of = noprop.generator(state.config.seed, purpose, 1, k)
            return torch.rand(n, generator=of) if purpose == "t" else torch.randn(n, 20, generator=of)

        draws = {purpose: draw(purpose, n) for purpose, n in (("noise", 32), ("z_0", 32), ("z_1", 16))}
        slow.step(image, label, lr, draw("t", 32), draws, more.get("sigma", 0.0))
        before = {name: x.clone() for name, x in state.model.state_dict().items()}
        results = step_of(state.config)(state, image, label, lr)
        state.step += 1
        assert max(norm for _, norm in results.values()) > reference.CLIP
        for name in state.model.blocks[0].schedule.state_dict() if kind is CTConfig else ():
            name = f"blocks.0.schedule.{name}"
            assert not torch.equal(before[name], state.model.state_dict()[name]), name
    same_weights(slow, state)
