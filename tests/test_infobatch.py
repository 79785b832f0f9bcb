"""InfoBatch: which images an epoch leaves out, what the others count, and that a stop changes nothing."""

import pytest
import torch
from conftest import CPU, TINY, noprop, same
from laboratory import contents, equal, flags_of, lab, quick_lab

from noprop_lab.infobatch import InfoBatchConfig, Weighted, train_step
from noprop_lab.networks import PruningState, read_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(config, data, path=None, save_at=None):
    """The state at the end of a training; at (epochs done, steps done) it goes on from its checkpoint."""
    state = PruningState(config, CPU, data)
    for _ in noprop.train(state, data, train_step, threads=1, steps_too=True):
        if (len(state.history), state.step) == save_at:
            state.save(path, "")
            state = PruningState(config, CPU, data)
            state.resume(read_checkpoint(path), "")
            list(noprop.train(state, data, train_step, threads=1))
            break
    return state


def test_with_a_ratio_of_0_it_is_the_hybrid_loss_to_the_bit(small_data, tiny_state):
    state = trained(InfoBatchConfig(**TINY, prune_ratio=0.0), small_data)
    for one, other in ((state.model, tiny_state.model), (state.averaged, tiny_state.averaged)):
        assert same(one.state_dict(), other.state_dict())


def test_a_checkpoint_that_was_read_once_is_gone_on_from_twice(small_data, tmp_path):
    """To the same end: a training writes into nothing of what was read."""
    config, ends = InfoBatchConfig(**TINY | {"epochs": 2}), []
    state = PruningState(config, CPU, small_data)
    next(noprop.train(state, small_data, train_step, threads=1))
    state.save(path := tmp_path / "a.pt", "")
    content = read_checkpoint(path)
    for _ in range(2):
        state = PruningState(config, CPU, small_data)
        state.resume(content, "")
        list(noprop.train(state, small_data, train_step, threads=1))
        ends.append(state)
    assert len(content["training"]["history"]) == 1
    assert same(ends[0].model.state_dict(), ends[1].model.state_dict())


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_an_epoch_leaves_out_images_below_the_mean_and_rescales_the_rest_of_these(ratio):
    n, size = 2000, 10
    state = PruningState(InfoBatchConfig(num_blocks=1, batch_size=size, prune_ratio=ratio))
    all_seen = torch.cat(state.order(n))
    assert all_seen.sort().values.equal(torch.arange(n))  # none has a loss yet
    assert state.counts.equal(torch.ones(n))
    state.losses = torch.linspace(0, 1, n).square()  # 1,154 are below the mean, 1/3
    below, order = state.losses < state.losses.mean(), []
    for epoch in range(1, 11):
        state.history = [{}] * epoch
        order.append(taken := torch.cat(state.order(n)))
        assert len(taken.unique()) == len(taken) and taken.sort().values.tolist() != taken.tolist()
        assert (~below).sum() - (~below)[taken].sum() < size  # those of the last batch, which is not full
        assert state.counts.equal(torch.where(below, 1 / (1 - ratio), 1.0))
    total = sum(state.counts[taken].sum() for taken in order) / len(order)
    assert total == pytest.approx(n, abs=0.02 * n)  # the expectation of the gradient is that of all images
    assert not order[0].equal(order[1])
    state.history = [{}] * 11  # 11 of 12 are more than .875
    assert torch.cat(state.order(n)).sort().values.equal(torch.arange(n))
    assert state.counts.equal(torch.ones(n))


def test_an_epoch_too_small_for_a_batch_takes_all():
    state = PruningState(InfoBatchConfig(num_blocks=1, batch_size=90, prune_ratio=0.9))
    state.losses, state.history = torch.cat([torch.zeros(99), torch.ones(1)]), [{}]
    [taken] = state.order(100)
    assert len(taken) == 90 and state.counts.equal(torch.ones(100))


def test_each_image_counts_by_its_weight_and_its_loss_is_that_of_all_blocks(small_data):
    """Against the hybrid loss of each image by itself: in evaluation, where batch norm mixes none."""
    config = InfoBatchConfig(num_blocks=3, eta_loss_weight=0.7, lambda_global=0.3)
    model, objective, hybrid = noprop.build(config).eval(), Weighted(config), noprop.Hybrid(0.7, 0.3)
    image, label = noprop.to_float(small_data.train.images[:4]), small_data.train.labels[:4]
    W, noise = model.label_embedding.weight, torch.randn(4, 20)
    objective.weight, each = torch.tensor([1.0, 2.0, 2.0, 1.0]), [slice(i, i + 1) for i in range(4)]

    def weighted(losses: list[torch.Tensor]) -> torch.Tensor:
        return (losses[0] + 2 * losses[1] + 2 * losses[2] + losses[3]) / 4

    def alone(block, t, i):
        return hybrid.block_loss(block, t, model.alpha_bar, image[i], label[i], W, lambda *_: noise[i])[0]

    for t, block in enumerate(model.blocks, start=1):
        loss, u_hat = objective.block_loss(block, t, model.alpha_bar, image, label, W, lambda *_: noise)
        slow = [alone(block, t, i) for i in each]
        torch.testing.assert_close(objective.losses[t], torch.stack(slow).detach())
        torch.testing.assert_close(loss, weighted(slow))
    slow = [hybrid.head_loss(model.classifier, u_hat[i], label[i], W, None) for i in each]
    head = objective.head_loss(model.classifier, u_hat, label, W, None)
    torch.testing.assert_close(head, weighted(slow))
    state = PruningState(InfoBatchConfig(**TINY))
    batch, state.counts = state.order(512)[0], torch.linspace(1, 2, 512)
    train_step(state, noprop.to_float(small_data.train.images[batch]), small_data.train.labels[batch], 0.01)
    assert state.objective.weight.equal(state.counts[batch])
    torch.testing.assert_close(state.losses[batch], sum(state.objective.losses[t] for t in (1, 2, 3)))
    assert state.losses.isnan().sum() == 512 - 128
    first = state.objective.weight
    train_step(state, noprop.to_float(small_data.train.images[batch]), small_data.train.labels[batch], 0.01)
    assert state.objective.weight is first  # which a graph reads


@pytest.mark.parametrize("save_at", [(0, 4), (1, 4), (1, 5)])
def test_a_run_goes_on_exactly_from_an_epochs_end_and_from_inside_one(save_at, small_data, tmp_path):
    """Inside an epoch its order is that of the losses at its start, which have changed since."""
    config = InfoBatchConfig(**TINY | {"epochs": 4}, anneal_from=0.75)  # the fourth epoch takes all
    whole, stopped = trained(config, small_data), trained(config, small_data, tmp_path / "a.pt", save_at)
    assert len(whole.history) == 4 and whole.step in (12, 13)  # of 16
    for name, state in (("whole", whole), ("stopped", stopped)):
        state.save(tmp_path / name, "")
    assert equal(contents(tmp_path / "whole"), contents(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_block_of_its_network_is_exchanged_and_the_run_goes_on(tmp_path, capsys):
    whole, part = tmp_path / "noprop_infobatch.pt", tmp_path / "part"
    with quick_lab():
        assert lab.main(["train", *flags_of(tmp_path, "--objective=infobatch")]) == 0
        assert lab.main(["train", *flags_of(part, "--blocks=2", f"--embedding-from={whole}", seed=7)]) == 0
        assert lab.main(["merge", str(whole), str(part / "noprop_hybrid.pt"), f"--output-dir={part}"]) == 0
        assert (
            lab.main(["train", "--resume", "--epochs=2", "--objective=infobatch", f"--output-dir={part}"])
            == 0
        )
    assert "resuming, 4 steps are done" in capsys.readouterr().out
    assert len(contents(part / whole.name)["training"]["history"]) == 2
