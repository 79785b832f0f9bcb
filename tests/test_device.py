"""The steps on a device other than the CPU, without one: torch's "meta" device computes shapes only.

A tensor that stays on the CPU is refused there as on a GPU, and so is whatever makes the CPU wait for a
value, such as item(). What this can't see: numbers, memory, speed.
"""

import contextlib

import pytest
import torch
from laboratory import content_of

import noprop_example as noprop
from noprop_lab.__main__ import step_of
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.ct import CTConfig
from noprop_lab.dt import DTConfig
from noprop_lab.early_exit import early_exit
from noprop_lab.fm import FMConfig
from noprop_lab.graphs import GraphState
from noprop_lab.infobatch import InfoBatchConfig
from noprop_lab.networks import LabState, PruningState
from noprop_lab.settings import LabConfig

META = torch.device("meta")
SIZES = {"num_blocks": 3, "batch_size": 16}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch.autocast knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def script_state(**changes) -> noprop.State:
    return noprop.State(noprop.Config(**SIZES | changes), META)


def pruning_state() -> PruningState:
    """In an epoch whose batches are chosen: this waits, but only once an epoch."""
    state = PruningState(InfoBatchConfig(**SIZES), META)
    state.losses, state.counts = (torch.ones(64, device=META) for _ in range(2))
    state.taken = torch.zeros(64, dtype=torch.int64, device=META).split(16)
    state.order = lambda images: state.taken
    return state


VARIED = dict(hand_on="maps", estimates="averaged", z_noise=0.5, learns="mean")
STATES = {
    "hybrid": script_state,
    "classes": lambda: script_state(target="classes", weights="ddpm", temperature=1.0),
    "reference": lambda: noprop.State(noprop.Config.reference(**SIZES), META),
    "lab": lambda: LabState(LabConfig(**SIZES), META),
    "dt": lambda: LabState(DTConfig.paper(**SIZES), META),
    "dt, side by side": lambda: LabState(DTConfig(**SIZES, updates="last"), META),
    "ct": lambda: LabState(CTConfig(batch_size=16, steps=3), META),
    "fm": lambda: LabState(FMConfig(batch_size=16, steps=3), META),
    "backprop": lambda: LabState(BackpropConfig(**SIZES), META),
    "backprop, paper": lambda: LabState(BackpropConfig.paper(**SIZES), META),
    "cascade": lambda: LabState(CascadeConfig(**SIZES), META),
    "infobatch": pruning_state,
    "cascade, varied": lambda: LabState(CascadeConfig(**SIZES, **VARIED), META),
}


@pytest.mark.parametrize("name", STATES)
def test_no_tensor_is_left_behind_and_no_step_waits(name):
    state = STATES[name]()
    step, labels = step_of(state.config), torch.zeros(64, dtype=torch.int64, device=META)
    split = noprop.Split(torch.zeros(64, 1, 28, 28, dtype=torch.uint8, device=META), labels)
    data = noprop.Data(split, split, split, noprop.augment)
    for steps in (1, 2):
        assert next(noprop.train(state, data, step, threads=1, steps_too=True)) is None
        assert len(state.log) == steps and state.log[-1].device == META
        state.resume(content_of(state), "")
    model, noise = state.averaged, noprop.generator("inference")
    assert model(noprop.to_float(split.images), state.config.temperature, noise).device == META
    assert model.probabilities(torch.zeros(5, 28, 28, dtype=torch.uint8)).shape[::2] == (5, 10)


@pytest.mark.parametrize("name", STATES)
def test_parameters_start_where_a_gpu_can_read_them(name):
    """At multiples of 16 bytes of a part's vector, and so do their gradients and averages."""
    state = STATES[name]()
    tensors = [*state.model.parameters(), *state.averaged.parameters()]
    tensors += [x.grad for x in state.model.parameters()]
    assert {x.storage_offset() * x.element_size() % 16 for x in tensors} == {0}


def test_moments_that_are_laid_out_otherwise_are_refused():
    """As an earlier version did, and as those of another block are."""
    for state in (STATES["backprop, paper"](), noprop.State(noprop.Config(num_blocks=1, embed_dim=21))):
        optimizer = state.holders["blocks.0"][-1]
        optimizer.step()
        states = state.part_state("blocks.0")
        moments = states[-1]["state"][0]
        moments["exp_avg"] = moments["exp_avg"][:-3]
        with pytest.raises(noprop.Failure, match="blocks.0 of the checkpoint is of another block, or"):
            state.load_part_state("blocks.0", states)


def test_what_a_graph_reads_is_what_each_step_draws(monkeypatch):
    """Its buffers, filled for a step; on a CPU too, where nothing can be captured (tests/test_cuda.py)."""
    state, other = (kind(LabConfig(**SIZES), noprop.CPU) for kind in (GraphState, LabState))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    image, label = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    state.hold(image, label)
    kinds = {"noise": (torch.randn, (16, 20)), "t": (torch.rand, (16,))}
    buffers = {(t, x): state.draw(t, x, shape, kind) for t in (1, 3) for x, (kind, shape) in kinds.items()}
    for state.step in (0, 7, 8):
        other.step = state.step
        state.fill(image, label, lr=0.25)
        for (t, purpose), buffer in buffers.items():
            kind, shape = kinds[purpose]
            assert torch.equal(buffer, other.draw(t, purpose, shape, kind))
            assert state.draw(t, purpose, shape, kind) is buffer
        assert torch.equal(state.image, image) and torch.equal(state.label, label) and state.rate == 0.25
        assert state.fresh.item() == torch.tensor(other.fresh).item()


def test_a_checkpoint_of_graphs_says_what_any_other_says():
    state = GraphState(LabConfig(**SIZES), noprop.CPU)
    state.lr, group = 0.125, state.holders["classifier"][-1].param_groups[0]
    group |= {"lr": torch.tensor(0.5), "capturable": True}
    saved = state.part_state("classifier")[-1]["param_groups"][0]
    assert (saved["lr"], saved["capturable"]) == (0.125, False) and group["capturable"]


def test_what_a_gpu_would_refuse_is_refused():
    with pytest.raises(RuntimeError, match="expected device cpu"):
        torch.rand(3) + torch.rand(3, device=META)
    with pytest.raises(RuntimeError, match="item"):
        torch.rand((), device=META).item()
    with pytest.raises(RuntimeError):  # it decides for each image whether it goes on: it has to wait
        early_exit(script_state().averaged, torch.zeros(5, 28, 28, dtype=torch.uint8), 0.9)
