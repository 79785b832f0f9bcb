"""On an NVIDIA GPU, if there is one: no step waits, all repeats itself, a graph is the step it captured."""

import os
import warnings
from functools import partial

import pytest
import torch
from conftest import noprop
from laboratory import content_of

from noprop_lab import __main__ as lab
from noprop_lab import parallel
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.ct import CTConfig
from noprop_lab.dt import DTConfig
from noprop_lab.fm import FMConfig
from noprop_lab.graphs import GraphState, graphed
from noprop_lab.infobatch import InfoBatchConfig
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# A rate that float32 can hold: a graph reads it from there. num_blocks=3 is for the chains.
QUICK = {"epochs": 2, "batch_size": 128, "schedule": "constant", "lr": 2**-8}
CONFIGS = {
    "hybrid": lambda: LabConfig(num_blocks=3, **QUICK),
    "bfloat16": lambda: LabConfig(num_blocks=3, precision="bfloat16", **QUICK),
    "reference": lambda: LabConfig.reference(num_blocks=3, **QUICK),
    "dropout": lambda: LabConfig(num_blocks=3, block="paper", **QUICK),
    "dt": lambda: DTConfig.paper(num_blocks=3, **QUICK),
    "dt, side by side": lambda: DTConfig(num_blocks=3, updates="last", **QUICK),
    "prototypes": lambda: DTConfig(num_blocks=3, embedding="prototype", **QUICK),
    "ct": lambda: CTConfig(steps=3, **QUICK),
    "fm": lambda: FMConfig(steps=3, **QUICK),
    "backprop": lambda: BackpropConfig(num_blocks=3, **QUICK),
    "backprop, paper": lambda: BackpropConfig.paper(num_blocks=3, **QUICK),
    "cascade": lambda: CascadeConfig(num_blocks=3, **QUICK),
    "cascade, varied": lambda: CascadeConfig(
        num_blocks=3, hand_on="maps", estimates="averaged", z_noise=0.5, learns="mean", **QUICK
    ),
    "infobatch": lambda: InfoBatchConfig(num_blocks=3, **QUICK | {"epochs": 4}),  # later ones are shorter
}


@pytest.fixture(scope="module")
def gpu():
    """A GPU whose algorithms repeat themselves."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    device = noprop.pick_device(noprop.Options(device="cuda", deterministic=True))
    yield device
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
    if before:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


@pytest.fixture(scope="module")
def images(gpu, data):
    """1,280 training images: ten steps an epoch; 500 to validate and to test on."""
    splits = zip(data[:3], (1280, 500, 500), strict=True)
    train, val, test = (noprop.Split(x.images[:n].to(gpu), x.labels[:n].to(gpu)) for x, n in splits)
    return data._replace(train=train, val=val, test=test)


def weights_of(state) -> torch.Tensor:
    """All weights, their averages, batch-norm statistics and optimizers' moments, as one vector."""
    tensors = []
    for name in state.parts:
        *modules, optimizer = state.part_state(name)
        tensors += [x.flatten().double() for module in modules for x in module.values()]
        tensors += [x.flatten().double() for values in optimizer["state"].values() for x in values.values()]
    return torch.cat(tensors).cpu()


def trained(kind, step, config, gpu, images, steps=20, resume_at=None):
    """The state after so many steps; resume_at: after which a new one goes on from the state's checkpoint."""
    state = kind(config, gpu, images)
    records = noprop.train(state, images, step, steps_too=True)
    while state.step < steps:
        next(records)
        if state.step == resume_at:
            content = content_of(state)
            state = kind(config, gpu, images)
            state.resume(content, "")
            records, resume_at = noprop.train(state, images, step, steps_too=True), None
    return state


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_is_the_step_that_it_captured(name, gpu, images):
    config = CONFIGS[name]()
    plain, graph = (trained(*lab.kind_and_step(config, x, gpu), config, gpu, images) for x in (False, True))
    assert torch.equal(weights_of(plain), weights_of(graph))
    assert torch.equal(torch.stack(plain.log), torch.stack(graph.log))
    assert not torch.equal(weights_of(plain), weights_of(LabState(config, gpu, images)))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["hybrid", "dropout", "dt", "ct", "infobatch"])
def test_runs_repeat_and_resume_exactly(name, graphs, gpu, images):
    config = CONFIGS[name]()
    run = partial(trained, *lab.kind_and_step(config, graphs, gpu), config, gpu, images, 16)
    first, again, resumed = run(), run(), run(resume_at=7)
    assert torch.equal(weights_of(first), weights_of(again))
    assert torch.equal(weights_of(first), weights_of(resumed))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_waits(name, graphs, gpu, images):
    config = CONFIGS[name]()
    kind, step = lab.kind_and_step(config, graphs, gpu)
    state = trained(kind, step, config, gpu, images, 4)
    records = noprop.train(state, images, step, steps_too=True)
    next(records)  # which puts the order of images on the GPU, and waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(records), next(records)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_first_steps_are_those_of_a_cpu(gpu, images):
    """Convolutions of a GPU round more coarsely (TF32), unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    config = LabConfig(num_blocks=3, **QUICK)
    cpu = images._replace(
        **{x: noprop.Split(*(y.cpu() for y in getattr(images, x))) for x in ("train", "val", "test")}
    )
    there = trained(LabState, noprop.train_step, config, gpu, images, 3)
    here = trained(LabState, noprop.train_step, config, noprop.CPU, cpu, 3)
    torch.backends.cudnn.allow_tf32 = before
    assert torch.allclose(torch.stack(there.log).cpu(), torch.stack(here.log), rtol=2e-3, atol=1e-4)


def test_a_checkpoint_of_graphs_is_like_any_other(gpu, images, tmp_path):
    config = LabConfig(num_blocks=3, **QUICK)
    state = trained(GraphState, graphed(noprop.train_step), config, gpu, images, 8)
    state.save(tmp_path / "noprop_hybrid.pt", "")
    content = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt", {"hybrid": LabConfig})
    for device, kind in ((noprop.CPU, LabState), (gpu, LabState)):
        other = kind(config, device)
        other.resume(content, "")
        data = images._replace(train=noprop.Split(*(x.to(device) for x in images.train)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            next(noprop.train(other, data, steps_too=True))
        assert other.step == 9


def test_nccl_with_one_process(gpu, images):
    config = LabConfig(num_blocks=3, **QUICK)
    plain = trained(LabState, noprop.train_step, config, gpu, images, 3)
    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    try:
        shared = trained(parallel.SharedState, noprop.train_step, config, gpu, images, 3)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(weights_of(plain), weights_of(shared))
