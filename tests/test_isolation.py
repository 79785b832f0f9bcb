"""Blocks are trained alone: no gradient, no clip, no random number and no thread connects them."""

import copy
import threading

import pytest
import torch
from conftest import CPU, TINY, noprop, same, train_tiny


@pytest.fixture
def training():
    return noprop.State(noprop.Config(**TINY))


@pytest.fixture
def batch(data):
    return noprop.to_float(data.train.images[:128]), data.train.labels[:128]


@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_block_sends_gradient_to_itself_alone(training, batch, t):
    (image, label), model, lr = batch, training.model, 1e-3
    before = copy.deepcopy(model.state_dict())
    recorders = {name: Recorder() for name in training.parts}
    training.holders = {name: (*x[:2], recorders[name]) for name, x in training.holders.items()}
    noprop.train_block(training, t, image, label, lr)
    stepped = {name for name, recorder in recorders.items() if recorder.stepped}
    assert stepped == {f"blocks.{t - 1}"} | ({"classifier"} if t == 3 else set())
    for name in training.parts:
        for parameter in model.get_submodule(name).parameters():
            assert parameter.grad.any() == (name in stepped), name
    after = model.state_dict()
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned and all(
        name.startswith(f"blocks.{t - 1}.") for name in learned
    )  # batch-norm statistics only


class Recorder:
    """Stands for an optimizer: notes that it was asked to step, leaves weights and gradients as they are."""

    def __init__(self):
        self.stepped, self.param_groups = False, [{}]

    def step(self):
        self.stepped = True

    def zero_grad(self, set_to_none):
        pass


@pytest.mark.parametrize("t", [1, 3])
def test_a_step_of_a_block_leaves_the_others_bit_equal(training, batch, t):
    (image, label), model = batch, training.model
    before = copy.deepcopy(model.state_dict())
    noprop.train_block(training, t, image, label, 1e-3)
    changed = {
        name.rsplit(".", 1)[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])
    }
    own = (f"blocks.{t - 1}.",) + (("classifier",) if t == 3 else ())
    assert changed and all(name.startswith(own) for name in changed)


class TwoMethods:
    """A loss as a reader writes it: what README.md asks for, and nothing else."""

    block_loss, head_loss = noprop.Hybrid.block_loss, noprop.Hybrid.head_loss
    eta, lam = 2.0, 1.0


def test_a_loss_of_two_methods_trains(small_data, tiny_state):
    state = noprop.State(noprop.Config(**TINY), objective=TwoMethods())
    list(noprop.train(state, small_data, threads=1))
    assert same(state.model.state_dict(), tiny_state.model.state_dict())


class Blind(TwoMethods):
    """Another: it reads no label embedding."""

    def block_loss(self, block, t, alpha_bar, image, label, W, draw):
        z = draw("noise", (len(label), W.shape[1]))
        u_hat = noprop.clean_label(z, block(image, z, 0.5, None), 0.5)
        return u_hat.square().mean(), u_hat


def test_a_loss_that_reads_no_label_embedding_leaves_it_as_it_is(training, batch):
    before = copy.deepcopy(training.model.state_dict())
    training.objective = Blind()
    assert "label_embedding" not in noprop.train_step(training, *batch, 1e-3)
    after = training.model.state_dict()
    assert torch.equal(after["label_embedding.weight"], before["label_embedding.weight"])
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


class Frozen(noprop.DenoisingBlockPaper):
    """A block as a reader writes it, whose convolutions stay as they are."""

    def __init__(self, *sizes, **how):
        super().__init__(*sizes, **how)
        self.image.requires_grad_(False)


def test_what_a_block_freezes_stays_and_a_network_that_was_for_inference_trains(batch):
    config = noprop.Config(**TINY)
    model = noprop.build(config, block=Frozen).eval()
    before = copy.deepcopy(model.state_dict())
    state = noprop.State(config, model=model)
    for t in (1, 2, 3):
        noprop.train_block(state, t, *batch, 1e-2)
    for name, x in model.state_dict().items():
        statistic = name.endswith(("mean", "var", "tracked"))  # they move: the network trains
        frozen = ".image." in name and not statistic
        assert torch.equal(x, before[name]) == (frozen or name == "label_embedding.weight"), name


def test_a_part_that_is_wholly_frozen_stays(batch):
    model = noprop.build(config := noprop.Config(**TINY))
    model.classifier.requires_grad_(False), model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    noprop.train_step(noprop.State(config, model=model), *batch, 1e-2)  # weight decay would shrink it
    for name, x in model.named_parameters():
        frozen = name.startswith(("classifier", "blocks.0"))
        assert torch.equal(x, before[name]) == frozen, name


def test_a_block_alone_equals_the_block_beside_others(training, batch):
    (image, label), alone = batch, noprop.State(noprop.Config(**TINY))
    noprop.train_step(training, image, label, 1e-3)
    noprop.train_block(alone, 2, image, label, 1e-3)
    assert same(training.model.blocks[1].state_dict(), alone.model.blocks[1].state_dict())
    assert same(training.averaged.blocks[1].state_dict(), alone.averaged.blocks[1].state_dict())


def test_a_block_sees_the_same_noise_level_in_training_and_in_inference(training, batch):
    seen = [[] for _ in training.model.blocks]
    for levels, block in zip(seen, training.model.blocks, strict=True):
        block.register_forward_pre_hook(lambda _, arguments, levels=levels: levels.append(arguments[2]))
    noprop.train_step(training, *batch, 1e-3)
    training.model.eval()(batch[0])
    assert seen == [[level, level] for level in training.model.alpha_bar[:-1].tolist()]


def test_as_many_blocks_are_trained_at_once_as_there_are_threads():
    meeting = threading.Barrier(2, timeout=30)
    with noprop.workers(CPU, 2) as parallel:  # which a map, one after another, would break
        assert sorted(parallel(lambda _: meeting.wait(), range(2))) == [0, 1]
    with noprop.workers(CPU, 1) as parallel:
        assert set(parallel(lambda _: threading.get_ident(), range(2))) == {threading.get_ident()}


def test_a_large_gradient_of_one_block_does_not_shrink_the_step_of_another(batch):
    """The clip is per block: block 1's loss times a million leaves block 2 as it was."""
    (image, label), results = batch, []
    for factor in (1, 1e6):
        training = noprop.State(noprop.Config(**TINY))
        next(training.model.blocks[0].parameters()).register_hook(
            lambda gradient, factor=factor: gradient * factor
        )
        noprop.train_step(training, image, label, 1e-3)
        results.append(training.model.blocks[1].state_dict())
    assert same(*results)


def test_the_embedding_gets_the_gradient_of_all_losses(training, batch):
    """What the blocks hand back adds up to the gradient of the sum of all losses, nothing detached."""
    (image, label), model, config = batch, training.model, training.config
    W, total, found = model.label_embedding.weight, 0, []
    training.update = lambda name, lr: found.append(training.parts[name].grad.clone())
    noprop.train_step(training, image, label, 0.0)
    other = noprop.State(config)
    for t, block in enumerate(other.model.blocks, start=1):

        def draw(purpose, shape, t=t):
            return torch.randn(shape, generator=noprop.generator(config.seed, purpose, t, 0))

        arguments = block, t, model.alpha_bar, image, label, W, draw
        loss, u_hat = training.objective.block_loss(*arguments)
        total = total + loss
    total = total + torch.nn.functional.cross_entropy(other.model.classifier(u_hat), label)
    gradient = torch.autograd.grad(total, W)[0]
    torch.testing.assert_close(found[-1].view_as(gradient), gradient, rtol=1e-3, atol=1e-6)


def test_embedding_changes_and_its_norm_is_clipped(small_data):
    start = noprop.build(noprop.Config(**TINY)).label_embedding.weight
    torch.testing.assert_close(start @ start.T, torch.eye(10))
    free, clipped = (
        train_tiny(small_data, max_norm_embed=x).model.label_embedding.weight for x in (50.0, 0.5)
    )
    assert not torch.equal(free, start) and (free.norm(dim=1) > 0.6).all()
    assert (clipped.norm(dim=1) <= 0.5 + 1e-6).all()


def test_optimizer_and_average_reach_every_parameter(training, batch):
    """Parameters are views of one vector a part: a step on the vector is a step on each of them."""
    before = copy.deepcopy(training.model.state_dict())
    noprop.train_step(training, *batch, 1e-3)
    for network in (training.model, training.averaged):
        for name, parameter in network.named_parameters():
            assert not torch.equal(parameter, before[name]), name
            assert parameter.grad is None or not parameter.grad.any(), name
