"""The paper's own NoProp-DT, the twin, early exit: their mathematics, their isolation, their files."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from conftest import CPU, TINY, noprop, same
from laboratory import contents, equal, flags_of, lab, quick_lab, refused, tiny, untrained
from torch import nn

from noprop_lab import backprop, cascade, dt
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import Answers, CascadeConfig, mean_answers
from noprop_lab.ct import CTConfig
from noprop_lab.data import with_augmentation
from noprop_lab.dt import DT, DTConfig
from noprop_lab.early_exit import early_exit
from noprop_lab.fm import FMConfig
from noprop_lab.infobatch import InfoBatchConfig
from noprop_lab.networks import LabState, build, load
from noprop_lab.settings import WEIGHTS, LabConfig, shared_by


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


@pytest.fixture
def batch(data):
    return noprop.to_float(data.train.images[:128]), data.train.labels[:128]


class Recorder:
    """Stands for an optimizer: leaves weights and gradients as they are."""

    param_groups = [{}]

    def step(self):
        pass

    def zero_grad(self, set_to_none: bool):
        pass


# --- NoProp-DT ---------------------------------------------------------------------------------------------


def test_loss_and_kl_are_those_of_the_paper():
    block = noprop.DenoisingBlockPaper((1, 28, 28), 20, 10, target="classes").double()
    image, W, label = torch.rand(8, 1, 28, 28).double(), torch.rand(10, 20).double(), torch.arange(8)
    alpha_bar, u = noprop.cosine_schedule(10), W[label]
    snr, weights = alpha_bar / (1 - alpha_bar), []

    def draw(purpose, shape, kind=torch.randn):
        return kind(shape, generator=noprop.generator(purpose), dtype=torch.float64)

    for t in range(1, 11):
        loss, u_hat = DT(DTConfig()).block_loss(block, t, alpha_bar, image, label, W, draw)
        weights.append((loss / (u_hat - u).square().sum(1).mean()).item())
    torch.testing.assert_close(torch.tensor(weights).double(), 10 / 2 * 0.1 * (snr[1:] - snr[:-1]))
    level = alpha_bar[0].item()
    q = torch.distributions.Normal(level**0.5 * u, (1 - level) ** 0.5)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1).mean()
    torch.testing.assert_close(dt.kl_to_noise(u, level), kl)
    classifier = nn.Linear(20, 10).double()
    head = DT(DTConfig()).head_loss(classifier, torch.zeros(8, 20), label, W, draw)
    z = noprop.noisy_label(u, draw("z_T", u.shape), 0.999)  # not û, of which nothing is read
    torch.testing.assert_close(head, nn.functional.cross_entropy(classifier(z), label) + kl)


@pytest.mark.parametrize("kind", [noprop.DenoisingBlockPaper, dt.PaperBlock])
def test_the_estimate_is_a_mean_of_the_embeddings(kind):
    block = kind((1, 28, 28), 20, 10, target="classes").double().eval()
    image, z, w = torch.rand(4, 1, 28, 28).double(), torch.randn(4, 20).double(), torch.randn(10, 20).double()
    for level in (0.001, 0.5, 0.97):
        u_hat = noprop.clean_label(z, block(image, z, level, w), level)
        shares = torch.linalg.lstsq(w.T, u_hat.T).solution
        assert (shares > 0).all()
        torch.testing.assert_close(shares.sum(0), torch.ones(4).double())


def test_what_is_skipped_is_added():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    assert torch.equal(dt.Residual(layer)(x), x + layer(x))


def test_the_papers_block_has_its_size_and_its_order():
    block = dt.PaperBlock((1, 28, 28), 20, 10)
    assert sum(x.numel() for x in block.parameters()) == pytest.approx(2.0e6, rel=0.02)
    layers = [type(x).__name__ for x in block.image if isinstance(x, nn.Conv2d | nn.MaxPool2d)]
    assert layers == ["Conv2d", "MaxPool2d", "Conv2d", "Conv2d", "MaxPool2d"]


def test_the_papers_block_skips_in_the_way_of_the_label_and_its_recipe_is_the_papers():
    block, z = dt.PaperBlock((1, 28, 28), 20, 10).eval(), torch.randn(4, 20)
    h = block.label[:3](z)
    torch.testing.assert_close(block.label(z), h + nn.Sequential(*block.label[3])(h))
    assert sum(isinstance(layer, nn.ReLU) for layer in block.modules()) == 7
    config = DTConfig.paper()
    recipe = config.grad_clip, config.max_norm_embed, config.embed_wd, config.patience
    assert recipe == (1e9, 1e9, 1e-3, 100)
    assert DTConfig.paper("cifar100").dim == DTConfig(dataset="cifar100", embed_dim=20).dim == 20
    assert DTConfig(dataset="cifar100").dim == 100
    assert dt.PaperBlock((3, 32, 32), 20, 10).eval().image(torch.zeros(2, 3, 32, 32)).shape == (2, 256)


@pytest.mark.parametrize("updates", ["each", "last"])
@pytest.mark.parametrize("t", [1, 3])
def test_a_dt_block_is_trained_alone(batch, t, updates):
    """And its classifier reads z_T, drawn from q(z_T | y): no gradient goes from it into block T."""
    results = []
    for scale in (1.0, 1e3):
        state = LabState(DTConfig(**TINY, updates=updates))
        before = {name: x.clone() for name, x in state.model.state_dict().items()}
        state.model.classifier.weight.data *= scale
        noprop.train_block(state, t, *batch, 1e-3, head=updates == "each")
        after = state.model.state_dict()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        own = {"block" if x.startswith(f"blocks.{t - 1}.") else x.split(".")[0] for x in moved}
        assert own == {"block"} | ({"classifier"} if t == 3 or updates == "each" or scale > 1 else set())
        results.append(state.model.blocks[t - 1].state_dict())
    assert same(*results)


def test_the_embedding_gets_the_gradient_of_all_losses(batch):
    """What the blocks hand over adds up to the gradient of the sum of all losses, nothing detached."""
    (image, label), config = batch, DTConfig(**TINY, grad_clip=1e9, updates="last")
    state = LabState(config)
    state.holders = {name: (*x[:2], Recorder()) for name, x in state.holders.items()}
    noprop.train_step(state, image, label, 1e-3)
    found = state.parts["label_embedding"].grad.view(10, 20)
    model, total = LabState(config).model, 0
    objective, W = state.objective, model.label_embedding.weight
    for t, block in enumerate(model.blocks, start=1):

        def draw(purpose, shape, kind=torch.randn, t=t):
            return kind(shape, generator=noprop.generator(config.seed, purpose, t, 0))

        loss, u_hat = objective.block_loss(block, t, model.alpha_bar, image, label, W, draw)
        total = total + loss
    total = total + objective.head_loss(model.classifier, u_hat, label, W, draw)
    torch.testing.assert_close(found, torch.autograd.grad(total, W)[0], rtol=1e-3, atol=1e-4)


def test_z_goes_through_convolutions_where_embeddings_are_images(small_data):
    """As figure 6 has it: a path like the image's, with weights of its own; so z, turned, is another z."""
    for kind in ({}, {"block": "paper"}, {"block": "deep"}):
        model = LabState(DTConfig(**TINY | kind, embedding="prototype"), CPU, small_data).model.eval()
        block, z = model.blocks[0], model.label_embedding.weight.detach()
        paths = [
            [x for x in path.modules() if isinstance(x, nn.Conv2d)] for path in (block.image, block.label)
        ]
        assert [x.weight.shape for x in paths[0]] == [x.weight.shape for x in paths[1]]
        assert not any(torch.equal(x.weight, y.weight) for x, y in zip(*paths, strict=True))
        image = torch.zeros(10, 1, 28, 28)
        assert not torch.equal(block(image, z, 0.5, z), block(image, z.roll(1, 0), 0.5, z))
    for kind in (CTConfig, FMConfig):
        for size in ("small", "paper"):
            block = LabState(kind(block=size, embedding="prototype"), CPU, small_data).model.blocks[0]
            paths = [[x for x in y.modules() if isinstance(x, nn.Conv2d)] for y in (block.image, block.label)]
            assert [x.weight.shape for x in paths[0]] == [x.weight.shape for x in paths[1]]
            block.eval()(block.image(image), z, torch.full((10,), 0.5))


def test_prototypes_are_the_most_central_images(small_data):
    found = dt.prototypes(small_data.train, 10)
    images, labels = noprop.to_float(small_data.train.images).flatten(1), small_data.train.labels
    for label in range(10):
        own = images[labels == label]
        medians = [torch.stack([(x - y).norm() for y in own]).median() for x in own]
        assert torch.equal(found[label], own[torch.stack(medians).argmin()])
    for scale in (1.0, 0.25):
        config = DTConfig(**TINY, embedding="prototype", embed_scale=scale)
        state = LabState(config, CPU, small_data)
        for network in (state.model, state.averaged):
            assert torch.equal(network.label_embedding.weight, scale * found)
    with pytest.raises(noprop.Failure, match="class 9 has none"):
        few = labels < 9
        dt.prototypes(noprop.Split(small_data.train.images[few], labels[few]), 10)


@pytest.mark.parametrize("embedding", ["learned", "fixed", "onehot", "prototype"])
def test_what_becomes_of_the_embedding(small_data, embedding):
    config = DTConfig(**TINY, embedding=embedding)
    start = LabState(config, CPU, small_data).model.label_embedding.weight
    moved = not torch.equal(start, tiny(small_data, config).model.label_embedding.weight)
    assert moved == (embedding in ("learned", "prototype"))
    if embedding == "onehot":
        assert torch.equal(start, torch.eye(10))


def test_the_embedding_starts_alike_for_any_number_of_threads():
    """Of a hundred classes: the last bits of their QR would depend on it."""
    found = []
    for threads in (1, 2):
        with shared_by(threads):
            found.append(build(LabConfig(dataset="cifar100", num_blocks=1)).label_embedding.weight)
            assert torch.get_num_threads() == threads
    assert torch.equal(*found)


@pytest.mark.slow
def test_threads_change_no_bit_of_a_network_with_dropout(batch):
    states = [LabState(DTConfig.paper(updates="last", **TINY | {"num_blocks": 2})) for _ in range(2)]
    for threads, state in enumerate(states, start=1):
        with noprop.workers(CPU, threads) as parallel:
            for state.step in range(2):
                noprop.train_step(state, batch[0][:64], batch[1][:64], 1e-3, parallel)
    assert same(*(state.averaged.state_dict() for state in states))


def test_the_hybrid_loss_may_have_a_classifier_that_reads_z(batch):
    state = LabState(LabConfig(**TINY, classify="z"))
    image, zeros = batch[0][:4], torch.zeros(4, 20)
    assert torch.equal(state.model.classify(zeros, zeros + 1), state.model.classifier(zeros + 1))
    W, label = state.model.label_embedding.weight, batch[1][:4]

    def draw(purpose: str, shape, kind=torch.randn) -> torch.Tensor:
        return kind(shape, generator=noprop.generator(purpose))

    loss = state.objective.head_loss(state.model.classifier, zeros, label, W, draw)
    z = noprop.noisy_label(W[label], draw("z_T", (4, 20)), state.model.alpha_bar[-1].item())
    torch.testing.assert_close(loss, nn.functional.cross_entropy(state.model.classifier(z), label))
    before = {name: x.clone() for name, x in state.model.state_dict().items()}
    noprop.train_step(state, *batch, 1e-3)
    assert not torch.equal(before["classifier.weight"], state.model.classifier.weight)
    assert state.model(image).isfinite().all()


@pytest.mark.slow
def test_dt_learns(data):
    """Two epochs on 6,000 images, three blocks, the embedding fixed; docs/evidence.md has a learned one."""
    train = noprop.Split(data.train.images[:6_000], data.train.labels[:6_000])
    val, test = (noprop.Split(x.images[:1000], x.labels[:1000]) for x in data[1:3])
    config = DTConfig(**TINY | {"train_images": None, "epochs": 2}, embedding="fixed")
    state = tiny(data._replace(train=train, val=val, test=test), config, threads=2)
    assert state.history[-1]["val_accuracy"] > 85


# --- The twin ----------------------------------------------------------------------------------------------


def test_the_twin_is_trained_through_all_blocks(batch):
    state = LabState(BackpropConfig(**TINY))
    before = {name: x.clone() for name, x in state.model.state_dict().items()}
    results = backprop.train_step(state, *batch, 1e-3)
    assert {name for name, (loss, _) in results.items() if loss} == {"classifier"}  # the one loss
    after = state.model.state_dict()
    same_parts = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert same_parts == {"label_embedding"}
    state.model.zero_grad()
    nn.functional.cross_entropy(state.model(batch[0])[:, -1], batch[1]).backward()
    assert all(parameter.grad.any() for parameter in state.model.blocks[0].image.parameters())


def test_the_papers_rival_mixes_as_its_alphas_say(batch):
    """z_t = (1 - α_t) z_{t-1} + α_t û_t, from α = 1/2; with its w at 9, a block leaves û alone."""
    model = LabState(BackpropConfig(**TINY, weights="learned", classify="z")).model.eval()
    assert [block.w.tanh().item() for block in model.blocks] == pytest.approx([0.5] * len(model.blocks))
    image, z = batch[0], torch.randn(len(batch[0]), 20)
    u_hat, mixed = model.step(1, image, z, 1.0, noprop.generator("none"))  # which scales z_0 alone
    torch.testing.assert_close(mixed, (z + u_hat) / 2)
    torch.testing.assert_close(model(image)[:, 0], model.classifier(model.step(1, image, 0 * z)[1]))
    with torch.no_grad():
        model.blocks[0].w.fill_(9.0)
    torch.testing.assert_close(*model.step(1, image, z))


@pytest.mark.parametrize("more", [{}, {"weights": "learned", "classify": "z"}])
def test_the_picture_of_a_chain_by_backpropagation_shows_its_answers(more, small_data):
    """Not the embedding nearest to z_t, by which nothing was trained."""
    model = LabState(BackpropConfig(**TINY, **more)).averaged
    figure = backprop.draw_answers(model, small_data.test)
    shown = [int(axes.get_title().split()[0]) for axes in figure.axes[:6]]
    assert shown == model.predict(small_data.test.images[:6]).tolist()
    assert lab.end_of(model.config).keywords["draw"] is backprop.draw_answers


def test_all_threads_of_the_twin_share_a_step_and_are_given_back(batch, monkeypatch):
    """The step's number of threads is the config's, whatever --threads says; also where the step raises."""
    state, seen = LabState(BackpropConfig(**TINY, step_threads=3)), []
    start = type(state.model).start

    def watched(model, *arguments):
        seen.append(torch.get_num_threads())
        return start(model, *arguments)

    monkeypatch.setattr(type(state.model), "start", watched)
    with noprop.workers(CPU, 1) as parallel:
        backprop.train_step(state, *batch, 1e-3, parallel)
        assert seen == [3] and torch.get_num_threads() == 1
        with pytest.raises(RuntimeError):
            backprop.train_step(state, batch[0][:, :, :20], batch[1], 1e-3, parallel)
        assert seen == [3, 3] and torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_twin_keeps_the_number_of_its_threads(tmp_path, capsys):
    """Its last bits depend on them, so that one run has one number."""
    flags = flags_of(tmp_path, "--objective=backprop", num_blocks=1)
    assert lab.main(["train", *flags, "--threads=2"]) == 0
    path, resume = tmp_path / "noprop_backprop.pt", ["train", "--resume", f"--output-dir={tmp_path}"]
    assert contents(path)["config"]["step_threads"] == 2
    refused(capsys, 2, [*resume, "--threads=1"], "--threads 1 contradicts", "trained with 2")
    refused(capsys, 2, [*resume, "--step-threads=1"], "--step-threads 1 contradicts")
    assert lab.main([*resume, "--epochs=2", "--threads=2"]) == 0
    assert lab.main([*resume, "--epochs=3"]) == 0  # on any machine
    content = contents(path)
    assert (content["config"]["step_threads"], content["training"]["step"]) == (2, 12)
    assert lab.main(["evaluate", str(path), "--threads=1"]) == 0
    (file := tmp_path / "a.json").write_text('{"step_threads": 3}')  # which says nothing of this network
    for command in (resume, ["evaluate", str(path)]):
        assert lab.main([*command, f"--config={file}", "--threads=2"]) == 0


# --- Cascade -----------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit_of_a_cascade(small_data):
    one, two = (tiny(small_data, CascadeConfig(**TINY), threads) for threads in (1, 2))
    assert same(one.model.state_dict(), two.model.state_dict())


def test_a_block_that_fails_leaves_none_waiting(batch):
    state = LabState(CascadeConfig(**TINY))
    with noprop.workers(CPU, 2) as parallel, pytest.raises(RuntimeError, match="size"):
        cascade.train_step(state, batch[0][:, :, :20], batch[1], 1e-3, parallel)


@pytest.mark.parametrize("hand_on", ["features", "label", "both", "nothing"])
def test_a_cascade_reads_what_its_blocks_hand_on(hand_on, batch):
    """And is drawn as the mean answer of the blocks so far."""
    model, answers = LabState(CascadeConfig(**TINY, hand_on=hand_on)).averaged, []
    image, codes = batch[0], []
    mean = start = torch.zeros(128, 1 if hand_on == "features" else 10)
    for block in model.blocks:
        codes.append(block.image(image))
        z = {"features": [start, *codes[:-1]], "label": [mean], "both": [mean, *codes[:-1]]}
        z = torch.cat(z.get(hand_on, [start]), 1)
        answers.append(block.head(torch.cat([codes[-1], block.label(z)], 1)).softmax(-1))
        mean = sum(answers) / len(answers)
    torch.testing.assert_close(model.probabilities(image), torch.stack(answers, 1))
    chain = Answers(model, partial(mean_answers, model))
    drawn = [chain.start(image, 1.0, None)]
    for t in range(1, 4):
        drawn.append(chain.step(t, image, drawn[-1], 1.0, None)[1])
    means = [sum(answers[:t]) / t for t in range(1, 4)]
    found = [noprop.classes_in(z, chain.label_embedding.weight, 0.5) for z in drawn]
    torch.testing.assert_close(torch.stack(found, 1), torch.stack([torch.full((128, 10), 0.1), *means], 1))


def test_a_block_of_a_cascade_of_maps_sees_further_than_the_one_before(batch):
    """A pixel moves more of the maps, the later the block; block 1 alone reads no z."""
    model, seen = LabState(CascadeConfig(**TINY, hand_on="maps")).averaged, []
    image = batch[0][:8]
    other = image.clone()
    other[:, :, 0, 0] += 1
    z = z_other = model.start(image)
    for t in range(1, 4):
        (_, z), (_, z_other) = model.step(t, image, z), model.step(t, other, z_other)
        seen.append(int((z != z_other).any(1).any(0).sum()))
    assert z.shape == (8, 32, 4, 4) and seen == [1, 4, 9]


def test_each_block_of_a_cascade_can_have_views_of_its_own(small_data):
    config = CascadeConfig(**TINY, own_views=True)
    images, noise = small_data.train.images[:4] / 255, noprop.generator("views")
    views = with_augmentation(small_data, config).augment(images, noise)
    again = noprop.generator("views")
    assert torch.equal(views, torch.stack([noprop.augment(images, again) for _ in range(3)]))
    assert not torch.equal(views[0], views[1])
    with pytest.raises(noprop.Failure, match="own_views are augmented"):
        CascadeConfig(own_views=True, augment=False)


def test_nothing_that_is_handed_on_has_no_estimates():
    with pytest.raises(noprop.Failure, match="no effect where nothing is handed on"):
        CascadeConfig(hand_on="nothing", estimates="averaged")


@pytest.mark.parametrize(
    ("hand_on", "estimates"), [*product(("label", "both", "maps"), ("live", "averaged")), ("nothing", "live")]
)
def test_a_cascade_in_bfloat16_hands_on_whatever_it_hands_on(hand_on, estimates, batch):
    config = CascadeConfig(**TINY, hand_on=hand_on, estimates=estimates, precision="bfloat16")
    results = cascade.train_step(LabState(config), *batch, 1e-3)
    assert all(loss.isfinite() for loss, _ in results.values())


def test_what_a_cascade_is_not_for(tmp_path, capsys):
    path = str(untrained(tmp_path, CascadeConfig(num_blocks=2)))
    refused(capsys, 2, ["merge", path, path], "learn from those before them: there is nothing to merge")
    refused(capsys, 2, ["demo", path], "the demo shows a chain of denoising blocks, and cascade has none")


# --- All three ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        DTConfig(**TINY),
        BackpropConfig(**TINY, step_threads=1),
        CascadeConfig(**TINY),
        InfoBatchConfig(**TINY),
    ],
)
def test_bfloat16_trains_float32_weights_to_nearly_the_same(config, small_data):
    exact = tiny(small_data, config)
    config = replace(config, precision="bfloat16")
    short, again = (tiny(small_data, config, threads) for threads in (1, 2))
    assert same(short.averaged.state_dict(), again.averaged.state_dict())
    assert not same(short.averaged.state_dict(), exact.averaged.state_dict())
    assert all(x.dtype in (torch.float32, torch.int64) for x in short.model.state_dict().values())
    for name in ("block_losses", "classifier_loss"):
        assert short.history[0][name] == pytest.approx(exact.history[0][name], rel=0.02)


@pytest.mark.draws
@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", ["dt", "backprop --weights learned --temperature 1", "cascade", "infobatch"]
)
def test_the_objective_is_in_every_files_name_and_the_run_can_be_resumed(tmp_path, objective, capsys):
    flags = ["train", *flags_of(tmp_path, "--objective", *objective.split(), "--threads=1", epochs=2)]
    objective, *more = objective.split()
    assert lab.main(flags) == 0
    names = {name.format(objective) for name in noprop.OUTPUTS}
    assert {path.name for path in tmp_path.glob("[!.]*")} == names
    checkpoint = tmp_path / f"noprop_{objective}.pt"
    before = contents(checkpoint)
    steps = 6 if objective == "infobatch" else 8  # it leaves out two batches of images in its second epoch
    evaluate = ["evaluate", str(checkpoint), "--temperature=0"]  # dt samples where no flag says otherwise
    capsys.readouterr()
    assert lab.main([*evaluate, "--early-exit=0.999999999"]) == lab.main(evaluate) == 0
    exit_late, chain = re.findall("Test accuracy (.*)", capsys.readouterr().out)
    assert exit_late == chain
    if objective == "dt" or more:
        refused(capsys, 2, [*evaluate[:2], "--early-exit=0.9"], "--early-exit does not sample")
    assert lab.main([*flags, "--resume"]) == 0
    assert f"resuming, {steps} steps are done" in capsys.readouterr().out
    assert equal(contents(checkpoint), before)


# --- Early exit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CTConfig, FMConfig])
def test_an_early_exit_of_what_is_no_chain_is_refused(kind, tmp_path, data):
    with pytest.raises(ValueError, match="leaves a chain of blocks"):
        early_exit(load(untrained(tmp_path, kind())), data.test.images[:4], 0.9)


def test_an_early_exit_of_a_network_that_samples_is_by_its_blocks(data):
    """That the average answers was decided for samples, and an early exit draws none."""
    model = noprop.build(noprop.Config(num_blocks=3, temperature=1.0, weights="ddpm")).eval()
    expected = early_exit(model, data.test.images[:200], 0.2)
    model.by_average = True
    assert all(map(torch.equal, early_exit(model, data.test.images[:200], 0.2), expected))


@pytest.mark.parametrize("by_average", [False, True])
def test_an_early_exit_takes_the_answer_of_the_block_where_the_image_leaves(by_average, data):
    model, images = load(WEIGHTS), data.test.images[:600]
    model.by_average = by_average
    whole = model.probabilities(images)  # (N, T, classes)
    threshold = whole.amax(-1)[:, 1].median().item()  # so that about half leave after two blocks
    answers, blocks = early_exit(model, images, threshold)
    sure = whole.amax(-1) > threshold
    sure[:, -1] = True  # nobody goes further
    first = sure.int().argmax(1)
    assert torch.equal(blocks.long(), first + 1) and len(first.unique()) > 1
    assert not answers.requires_grad
    torch.testing.assert_close(answers, whole[torch.arange(600), first])
    assert torch.equal(early_exit(model, images.numpy(), threshold)[0], answers)
    _, blocks = early_exit(model, images[:1], whole[0, 0].max().item())  # not more probable than that
    assert blocks.item() > 1
    late, blocks = early_exit(model, images, 1.0)  # without a threshold, all blocks
    torch.testing.assert_close(late, whole[:, -1])
    assert (blocks == 10).all()
    with pytest.raises(ValueError, match="images must be"):
        early_exit(model, images[:, :, :20], 0.9)


def test_evaluation_and_prediction_with_early_exit(data, tmp_path, capsys):
    from PIL import Image

    capsys.readouterr()
    assert lab.main(["evaluate", str(WEIGHTS), "--early-exit", "0.99"]) == 0
    found = re.match(
        r"Early exit: (.*) of 10 blocks an image.\nTest accuracy (.*) ±", capsys.readouterr().out
    )
    assert 1 < float(found[1]) < 3 and float(found[2]) > 99
    Image.fromarray(data.test.images[0, 0].numpy()).save(tmp_path / "seven.png")
    for more in ([], ["--early-exit=0.5"]):
        assert lab.main(["predict", str(WEIGHTS), str(tmp_path / "seven.png"), *more]) == 0
        assert "seven.png: 7  (7: " in capsys.readouterr().out
