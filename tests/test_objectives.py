"""The paper's own NoProp-DT and the backprop twin: their mathematics, their isolation, their files."""

import re

import pytest
import torch
from conftest import CPU, TINY, noprop, same, train_tiny
from test_command_line import fails
from test_isolation import Recorder
from torch import nn


@pytest.fixture
def batch(data):
    return noprop.to_float(data.train.images[:128]), data.train.labels[:128]


def dt_config(**changes) -> noprop.Config:
    return noprop.Config(**TINY | noprop.OBJECTIVES["dt"] | {"objective": "dt"} | changes)


def test_loss_and_kl_are_those_of_the_paper():
    block = noprop.DenoisingBlockPaper(target="classes").double()
    image, u, noise, w = (torch.rand(size).double() for size in ((8, 1, 28, 28), (8, 20), (8, 20), (10, 20)))
    alpha_bar = noprop.cosine_schedule(10)
    snr, weights = alpha_bar / (1 - alpha_bar), []
    for t in range(1, 11):
        loss, u_hat = noprop.dt_loss(block, image, u, noise, alpha_bar, t, 0.1, w)
        weights.append((loss / (u_hat - u).square().sum(1).mean()).item())
    torch.testing.assert_close(torch.tensor(weights).double(), 10 / 2 * 0.1 * (snr[1:] - snr[:-1]))
    level = alpha_bar[0].item()
    q = torch.distributions.Normal(level**0.5 * u, (1 - level) ** 0.5)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1).mean()
    torch.testing.assert_close(noprop.kl_to_noise(u, level), kl)


@pytest.mark.parametrize("kind", [noprop.DenoisingBlockPaper, noprop.PaperBlock])
def test_the_estimate_is_a_mean_of_the_embeddings(kind):
    block = kind(target="classes").double().eval()
    image, z, w = torch.rand(4, 1, 28, 28).double(), torch.randn(4, 20).double(), torch.randn(10, 20).double()
    for level in (0.001, 0.5, 0.97):
        u_hat = noprop.clean_label(z, block(image, z, level, w), level)
        shares = torch.linalg.lstsq(w.T, u_hat.T).solution
        assert (shares > 0).all()
        torch.testing.assert_close(shares.sum(0), torch.ones(4).double())


def test_the_papers_block_has_its_size():
    assert sum(x.numel() for x in noprop.PaperBlock().parameters()) == pytest.approx(2.0e6, rel=0.02)


@pytest.mark.parametrize("t", [1, 3])
def test_a_dt_block_is_trained_alone(batch, t):
    """And its classifier reads z_T, drawn from q(z_T | y): no gradient goes from it into block T."""
    (image, label), results = batch, []
    for scale in (1.0, 1e3):
        training = noprop.Training(dt_config(), CPU)
        before = {name: x.clone() for name, x in training.model.state_dict().items()}
        training.model.classifier.weight.data *= scale
        noprop.train_block(training, t, image, training.model.label_embedding(label), label, 1e-3)
        after = training.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        own = (f"blocks.{t - 1}.",) + (("classifier.",) if t == 3 else ())
        own += ("classifier.",) if scale > 1 else ()
        assert changed and all(name.startswith(own) for name in changed)
        results.append(training.model.blocks[t - 1].state_dict())
    assert same(*results)


def test_the_embedding_gets_the_gradient_of_all_losses_through_u_and_w(batch):
    """What the blocks hand over adds up to the gradient of the sum of all losses, nothing detached."""
    (image, label), config = batch, dt_config(grad_clip=1e9)
    training = noprop.Training(config, CPU)
    training.optimizers = {name: Recorder() for name in training.parts}
    noprop.train_step(training, image, label, 1e-3)
    found = training.parts["label_embedding"].grad.view(10, 20)
    other = noprop.Training(config, CPU)
    model, total = other.model, 0
    u, w = model.label_embedding(label), model.label_embedding.weight
    for t, block in enumerate(model.blocks, start=1):
        noise = torch.randn(u.shape, generator=noprop.generator(config.seed, "noise", t, 0))
        loss, u_hat = noprop.dt_loss(block, image, u, noise, model.alpha_bar, t, config.eta_loss_weight, w)
        total = total + loss
    total = total + noprop.classifier_loss(other, u_hat, u, label)
    torch.testing.assert_close(found, torch.autograd.grad(total, w)[0], rtol=1e-3, atol=1e-4)


def test_the_twin_is_trained_through_all_blocks(batch):
    training = noprop.Training(noprop.Config(**TINY, objective="backprop"), CPU)
    before = {name: x.clone() for name, x in training.model.state_dict().items()}
    noprop.train_step(training, *batch, 1e-3)
    after = training.model.state_dict()
    same_parts = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert same_parts == {"label_embedding"}
    training.model.zero_grad()
    nn.functional.cross_entropy(training.model(batch[0])[:, -1], batch[1]).backward()
    assert all(parameter.grad.any() for parameter in training.model.blocks[0].image.parameters())


def test_prototypes_are_the_most_central_images(small_data):
    found = noprop.prototypes(small_data.train, 10)
    images, labels = noprop.to_float(small_data.train.images).flatten(1), small_data.train.labels
    for label in range(10):
        own = images[labels == label]
        medians = [torch.stack([(x - y).norm() for y in own]).median() for x in own]
        assert torch.equal(found[label], own[torch.stack(medians).argmin()])
    training = noprop.Training(dt_config(embedding="prototype"), CPU, small_data.train)
    assert torch.equal(training.model.label_embedding.weight, found)
    assert torch.equal(training.averaged.label_embedding.weight, found)


@pytest.mark.parametrize("embedding", ["learned", "fixed", "onehot", "prototype"])
def test_what_becomes_of_the_embedding(small_data, embedding):
    training = noprop.Training(dt_config(embedding=embedding), CPU, small_data.train)
    start = training.model.label_embedding.weight.clone()
    list(noprop.train(training, small_data))
    moved = not torch.equal(start, training.model.label_embedding.weight)
    assert moved == (embedding in ("learned", "prototype"))
    if embedding == "onehot":
        assert torch.equal(start, torch.eye(10))


def test_threads_change_no_bit_of_a_network_with_dropout(small_data):
    paper = noprop.PRESETS["paper"] | {"num_blocks": 2}
    one, two = (train_tiny(small_data, threads, **paper | {"epochs": 1}) for threads in (1, 2))
    assert same(one.averaged.state_dict(), two.averaged.state_dict())


@pytest.mark.parametrize("objective", ["dt", "backprop"])
def test_the_objective_is_in_every_files_name_and_the_run_can_be_resumed(tmp_path, flags, objective, capsys):
    flags = [*flags, f"--objective={objective}"]
    assert noprop.main([*flags, "--epochs=2"]) == 0
    names = {name.format(objective) for name in noprop.OUTPUTS}
    assert {path.name for path in tmp_path.glob("[!.]*")} == names
    checkpoint = tmp_path / f"noprop_{objective}.pt"
    weights = noprop.load(checkpoint).state_dict()
    assert noprop.main(["--evaluate", str(checkpoint)]) == 0
    capsys.readouterr()
    evaluate = ["--evaluate", str(checkpoint), "--temperature=0"]  # dt samples where no flag says otherwise
    assert noprop.main([*evaluate, "--early-exit=0.999999999"]) == noprop.main(evaluate) == 0
    exit_late, chain = re.findall("Test accuracy (.*)", capsys.readouterr().out)
    assert exit_late == chain
    fails(capsys, 2, [*evaluate, "--lr=1"], "--lr 1.0 contradicts")
    if objective == "dt":
        fails(capsys, 2, [*evaluate[:2], "--early-exit=0.9"], "early_exit does not sample")
    assert noprop.main([*flags, "--epochs=2", "--resume"]) == 0
    assert "2 epochs and 8 steps are done" in capsys.readouterr().out
    assert same(noprop.load(checkpoint).state_dict(), weights)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--objective=backprop", "--blocks=1", "--embedding=fixed"], "backprop trains all blocks as one"),
        (
            ["--objective=backprop", "--eta-loss-weight=1"],
            "eta_loss_weight has no effect on objective backprop",
        ),
        (["--objective=dt", "--lambda-global=2"], "lambda_global has no effect on objective dt"),
        (["--embedding=onehot", "--embed-dim=30"], "embedding onehot has 10 dimensions"),
        (["--objective=none"], "--objective"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, more, word):
    fails(capsys, 2, [*flags, *more], word)


def test_dt_learns(data):
    """Two epochs on 12,000 images, three blocks, the embedding fixed: see EVIDENCE.md for a learned one."""
    train = noprop.Split(data.train.images[:12_000], data.train.labels[:12_000])
    small = noprop.Data(train, *(noprop.Split(x.images[:2000], x.labels[:2000]) for x in data[1:]))
    training = noprop.Training(dt_config(train_images=None, epochs=2, embedding="fixed"), CPU)
    with noprop.workers(CPU, 2) as parallel:
        accuracies = [record["val_accuracy"] for record in noprop.train(training, small, parallel)]
    assert accuracies[-1] > 85
