"""NoProp-CT and NoProp-FM: their mathematics, on networks that know the answer; their training and files."""

import inspect
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, noprop, same
from laboratory import contents, equal, flags_of, lab, quick_lab, refused, tiny, untrained
from torch import nn

from noprop_lab import flows
from noprop_lab.ct import CTConfig, CTFlow, NoiseSchedule
from noprop_lab.fm import FMConfig, FMFlow
from noprop_lab.networks import LabState, build, load

BOTH = pytest.mark.parametrize("kind", [CTConfig, FMConfig])
ONE = {"epochs": 1, "train_images": 512, "batch_size": 128, "num_blocks": 1}  # num_blocks: as it is


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bent(schedule: NoiseSchedule, seed: int = 0, scale: float = 2.0) -> NoiseSchedule:
    """The schedule, its parameters moved at random."""
    with torch.no_grad():
        for x in schedule.parameters():
            x.add_(scale * torch.randn(x.shape, generator=noprop.generator("bent", seed)))
    return schedule


class Oracle(nn.Module):
    """Stands for a network: answers from its code, which takes an image's place."""

    def __init__(self, answer, schedule=None):
        super().__init__()
        self.answer, self.schedule = answer, schedule

    def forward(self, code, z, t):
        return self.answer(code, z, t)


def knowing(config: flows.FlowConfig, answer, schedule=None) -> flows.Flow:
    """A network of one-hot embeddings whose logits are answer(code, z, t)."""
    model = build(replace(config, embedding="onehot"))
    model.blocks[0] = Oracle(answer, schedule)
    nn.init.eye_(model.label_embedding.weight)
    return model.requires_grad_(False)


def trajectory(model: flows.Flow, code, z, temperature=0.0) -> list:
    """z before and after each step."""
    found, noise = [z], noprop.generator("trajectory")
    for t in range(1, model.config.steps + 1):
        found.append(model.step(t, code, found[-1], temperature, noise)[1])
    return found


def orders(errors: list[float]) -> list[float]:
    """log2 by which each error is below the one before it, at half as many steps."""
    return [torch.log2(torch.tensor(a / b)).item() for a, b in itertools.pairwise(errors)]


# --- The noise schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_gamma_falls_from_end_to_end_whatever_the_parameters(double, scale):
    t = torch.linspace(0, 1, 201)
    for seed in range(20):
        schedule = bent(NoiseSchedule(0.001, 0.999), seed, scale)
        gamma, slope = schedule(t)
        assert (gamma.diff() < 0).all() and (slope < 0).all()
        assert gamma[0] - gamma[-1] > 0.999
        torch.testing.assert_close(gamma[-1], schedule.gamma_0)
        if not scale:
            ends = schedule.alpha_bar(torch.tensor([0.0, 1.0]))
            torch.testing.assert_close(ends, torch.tensor([0.001, 0.999]))


def test_the_rise_of_the_snr_in_closed_form_is_that_of_autograd(double):
    for seed in range(10):
        schedule, t = bent(NoiseSchedule(0.01, 0.97), seed), torch.rand(50).requires_grad_()
        gamma, slope = schedule(t)
        alpha_bar = schedule.alpha_bar(t)
        [by_autograd] = torch.autograd.grad((alpha_bar / (1 - alpha_bar)).sum(), t)
        torch.testing.assert_close(-slope * torch.exp(-gamma), by_autograd)


def test_the_schedule_starts_where_the_settings_say():
    schedule = build(CTConfig(alpha_bar_start=0.2, alpha_bar_end=0.7)).blocks[0].schedule
    assert schedule.alpha_bar(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.2, 0.7])
    assert schedule.summary()["alpha_bar"][::4] == pytest.approx([0.2, 0.7])


def test_t_is_drawn_once_in_each_part_of_the_interval():
    t = flows.stratified(lambda purpose, shape, kind: kind(shape, generator=noprop.generator("t")), 64)
    assert torch.equal((t * 64).floor(), torch.arange(64.0))


# --- Inference of CT, where û = u --------------------------------------------------------------------------


def true_label(code, z, t):
    return 1e4 * code


@pytest.fixture
def truth(double):
    """Labels one-hot, which are their own embeddings, noise, and a bent schedule with ends inside (0, 1)."""
    u = torch.eye(10).repeat(3, 1)
    schedule = bent(NoiseSchedule(0.02, 0.9), 1, 1.0)
    return u, torch.randn(u.shape, generator=noprop.generator("truth")), schedule


def levels(schedule, steps: int):
    return schedule.alpha_bar(torch.linspace(0, 1, steps + 1)).detach().view(-1, 1, 1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_probability_flow_ends_where_it_should(truth, solver, order):
    """At √ᾱ_1 u + √((1-ᾱ_1)/(1-ᾱ_0)) (z_0 - √ᾱ_0 u), whatever z_0 is."""
    u, z, schedule = truth
    first, last = levels(schedule, 1)
    end = last.sqrt() * u + ((1 - last) / (1 - first)).sqrt() * (z - first.sqrt() * u)
    errors = []
    for steps in (40, 80, 160, 320):
        model = knowing(CTConfig(steps=steps, solver=solver), true_label, schedule)
        errors.append((trajectory(model, u, z)[-1] - end).abs().max().item())
    assert orders(errors) == pytest.approx([order] * 3, abs=0.1)
    assert errors[-1] < 0.05 / 20 ** (order - 1)


def test_the_flow_keeps_the_marginals_on_its_way_and_that_of_public_code_does_not(truth):
    """From a draw of q(z_0 | y), z_t is √ᾱ_t u + √(1-ᾱ_t) ε at all t: mean and variance of q(z_t | y)."""
    u, noise, schedule = truth

    class Public(CTFlow):
        def field(self, code, z, t):
            u_hat, _ = super().field(code, z, t)
            return u_hat, (u_hat - z) / (1 - self.blocks[0].schedule.alpha_bar(t))

    model, level = knowing(CTConfig(steps=400, solver="heun"), true_label, schedule), levels(schedule, 400)
    public = knowing(model.config, true_label, schedule)
    public.__class__ = Public
    right = level.sqrt() * u + (1 - level).sqrt() * noise
    ours, theirs = (torch.stack(trajectory(x, u, right[0])) for x in (model, public))
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-3)
    basis, off = torch.stack([u.flatten(), noise.flatten()], 1), []
    for x, y in zip(theirs[1:-1], right[1:-1], strict=True):  # z_t = m u + s ε: how far m and s are off
        off.append(torch.linalg.lstsq(basis, (x - y).flatten()).solution.abs())
    assert (torch.stack(off).amax(0) > 0.1).all()


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_stochastic_steps_keep_the_marginals(truth, steps):
    """Equation 3 does so exactly, for any number of steps: mean and variance of q(z_t | y), 60,000 draws."""
    u, schedule = torch.eye(10)[3].expand(60_000, -1), truth[-1]
    level = levels(schedule, steps)
    z = level[0].sqrt() * u + (1 - level[0]).sqrt() * torch.randn(u.shape, generator=noprop.generator("z"))
    model = knowing(CTConfig(steps=steps), true_label, schedule)
    for found, at in zip(trajectory(model, u, z, 1.0), level, strict=True):
        torch.testing.assert_close(found.mean(0), (at.sqrt() * u)[0], rtol=0, atol=0.02)
        torch.testing.assert_close(found.var(0), (1 - at)[0].expand(10), rtol=0.03, atol=0)


def test_small_stochastic_steps_are_those_of_the_differential_equation(truth):
    """Their mean is dz = g [√ᾱ û - ½ (1+ᾱ) z] dt, their variance g (1-ᾱ) dt."""
    u, z, schedule = truth
    model, t = knowing(CTConfig(steps=10_000), true_label, schedule), torch.tensor(0.5)
    (_, slope), level = schedule(t), schedule.alpha_bar(t)
    mean = (model.step(5001, u, z)[1] - z) * 10_000
    torch.testing.assert_close(mean, -slope * (level.sqrt() * u - (1 + level) / 2 * z), rtol=1e-2, atol=1e-2)
    many = model.step(5001, u.repeat(2000, 1), z.repeat(2000, 1), 1.0, noprop.generator(0))[1]
    assert many.view(2000, *u.shape).var(0).mean() * 10_000 == pytest.approx(
        (-slope * (1 - level)).item(), rel=0.01
    )


# --- Inference of FM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_true_velocity_is_exact_in_one_step(truth, solver, steps):
    u, z, _ = truth
    model = knowing(FMConfig(steps=steps, solver=solver), lambda code, z, t: code)
    torch.testing.assert_close(trajectory(model, u - z, z)[-1], u)
    assert torch.equal(model.classify(None, u).argmax(1), u.argmax(1))
    for n in range(steps):  # wherever it is on its way, it sees the label
        torch.testing.assert_close(model.step(n + 1, u - z, z + n / steps * (u - z))[0], u)


def test_the_field_of_k_embeddings_shows_the_order_and_ends_among_them(truth):
    """E[u - z_0 | z_t] in closed form, all classes as probable as another: z_1 lies about them, σ away."""
    sigma, k = 0.3, torch.eye(10)

    def field(code, z, t):
        t = t[:1]
        s = (1 - t) ** 2 + sigma**2  # the variance of z_t about t u
        apart = z.unsqueeze(1) - t * k
        shares = (-apart.square().sum(-1) / (2 * s)).softmax(-1)
        return (shares.unsqueeze(-1) * (k - (1 - t) / s * apart)).sum(1)

    def ends(steps: int, solver: str, z):
        model = knowing(FMConfig(steps=steps, solver=solver), field)
        return trajectory(model, z, z)[-1]

    z = (1 + sigma**2) ** 0.5 * torch.randn(4000, 10, generator=noprop.generator("z"))
    exact = ends(1280, "heun", z[:30])
    for solver, order in (("euler", 1), ("heun", 2)):
        errors = [(ends(n, solver, z[:30]) - exact).abs().mean().item() for n in (40, 80, 160)]
        assert orders(errors) == pytest.approx([order] * 2, abs=0.25)
    z = ends(100, "heun", z)
    nearest = (z.unsqueeze(1) - k).square().sum(-1)
    assert nearest.argmin(1).bincount(minlength=10).float() == pytest.approx([400] * 10, abs=80)
    assert nearest.amin(1).mean() / 10 == pytest.approx(sigma**2, rel=0.03)


def test_a_chain_for_the_picture_has_the_levels_of_the_steps(truth):
    """FM's z, t u + (1-t) z_0 where the label is known, is scaled so that u has the share √ᾱ in it."""
    u, noise, schedule = truth
    ct = knowing(CTConfig(steps=5), true_label, schedule).as_chain()
    assert torch.equal(ct.alpha_bar, levels(schedule, 5).flatten())
    fm = knowing(FMConfig(steps=5, sigma=0.0), lambda code, z, t: code).as_chain()
    assert fm.alpha_bar[0] == 0 and fm.alpha_bar[-1] == pytest.approx(1 / 1.01)
    rest = (1 - torch.arange(6) / 5) ** 2 + 0.01  # the variance of z_t, σ counting as 0.1
    torch.testing.assert_close(torch.tensor(fm.sizes) ** 2 * (1 - fm.alpha_bar.float()), rest)
    z = noise / fm.sizes[0]
    for step in range(1, 6):
        z, t = fm.step(step, u - noise, z)[1], step / 5
        torch.testing.assert_close(z, fm.alpha_bar[step].sqrt() * (u + (1 - t) / t * noise))


# --- The network -------------------------------------------------------------------------------------------


@BOTH
def test_an_image_is_encoded_once_and_no_label_comes_near(kind, small_data):
    model, calls, steps = build(kind(steps=7)).eval(), [], []
    model.blocks[0].image.register_forward_hook(lambda *_: calls.append(1))
    step = model.step
    model.step = lambda t, *more: steps.append(t) or step(t, *more)
    image = noprop.to_float(small_data.test.images[:20])
    logits = model(image)
    assert logits.shape == (20, 1, 10) and len(calls) == 1
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    model.step = step
    assert torch.equal(logits, model(image, 0.0))  # as long as nobody asks for it, nothing is sampled
    z = torch.randn(20, 20)
    assert torch.equal(step(1, image, z)[1], step(1, image, z, 0.0)[1])
    for method in (model.forward, model.start, model.step, model.field, model.classify, model.encode):
        assert not {"label", "y", "labels", "u"} & set(inspect.signature(method).parameters)
    answers = noprop.Split(small_data.test.images, model.predict(small_data.test.images))
    assert noprop.evaluate(model, answers, model.config)["accuracy"] == [100.0]


@BOTH
@pytest.mark.parametrize("size", ["small", "deep", "reference", "paper"])
def test_each_size_runs_and_sees_image_z_and_t(kind, size, small_data):
    model = build(kind(block=size)).eval()
    image = noprop.to_float(small_data.test.images[:3])
    z, t = torch.randn(3, 20), torch.full((1,), 0.3)
    code = model.encode(image)
    found = model.field(code, z, t)[1]
    for other in (
        model.field(code.flip(0), z, t),
        model.field(code, z.flip(0), t),
        model.field(code, z, t + 0.3),
    ):
        assert not torch.allclose(found, other[1])
    norms = [x for x in model.modules() if isinstance(x, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert bool(norms) == (size != "paper")


def test_the_position_varies_with_t():
    """Unscaled, sines of t in [0, 1] hardly would: of 64 numbers, 50 move by less than 0.2 there."""
    spread = flows.position(torch.linspace(0, 1, 101)).std(0)
    assert (spread > 0.2).sum() > 45


@BOTH
def test_a_temperature_samples(kind):
    model, image = build(kind(steps=3)).eval().requires_grad_(False), torch.rand(5, 1, 28, 28)
    cold, one, two = (model(image, t, noprop.generator(i)) for t, i in ((0.0, 1), (1.0, 1), (1.0, 2)))
    assert not torch.equal(one, two) and not torch.equal(one, cold)
    if kind is CTConfig:  # whose steps draw too
        model.start = lambda image, *_: image.new_zeros(len(image), 20)
        assert not torch.equal(model(image, 1.0, noprop.generator(1)), model(image, 1.0, noprop.generator(2)))


@BOTH
def test_the_papers_setting(kind, small_data):
    assert [kind.paper(x).epochs for x in ("mnist", "cifar10", "cifar100")] == [100, 500, 1000]
    config = kind.paper()
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay) == (100, 128, 1e-3, 1e-3)
    assert (config.block, config.steps, config.draws, config.temperature) == ("paper", 1000, 1, 1.0)
    states = [LabState(kind.paper(**ONE), CPU, small_data) for _ in range(2)]
    image, label = noprop.to_float(small_data.train.images[:64]), small_data.train.labels[:64]
    for state in states:
        for state.step in range(2):
            flows.train_step(state, image, label, 1e-3)
    assert same(*(x.averaged.state_dict() for x in states))  # dropout has addresses too


@BOTH
@pytest.mark.parametrize("embedding", ["learned", "fixed", "onehot", "prototype"])
def test_every_embedding_trains(kind, embedding, small_data):
    config = kind(**ONE, embedding=embedding, steps=2, step_threads=1)
    start = LabState(config, CPU, small_data).model.label_embedding.weight
    state = tiny(small_data, config)
    assert torch.equal(start, state.model.label_embedding.weight) != config.learns_embedding
    assert state.model.label_embedding.weight.shape == (
        10,
        {"onehot": 10, "prototype": 784}.get(embedding, 20),
    )


@pytest.mark.parametrize(("sigma", "counts_as"), [(0.3, 0.3), (0.02, 0.1)])
def test_the_probabilities_of_fm_are_those_of_gaussians_about_the_embeddings(sigma, counts_as):
    model, z = build(FMConfig(sigma=sigma)).double(), torch.randn(7, 20, dtype=torch.float64) / 9
    density = torch.distributions.Normal(model.label_embedding.weight, counts_as)
    expected = density.log_prob(z.unsqueeze(1)).sum(-1).softmax(-1)
    torch.testing.assert_close(model.classify(None, z).softmax(-1), expected)
    assert FMConfig().sigma == 0.1  # as docs/lab.md has it


def test_the_classifier_of_fm_is_trained_where_the_embedding_is(small_data):
    for embedding in ("learned", "fixed"):
        state = LabState(FMConfig(**ONE, embedding=embedding, weight_decay=0.0), CPU, small_data)
        before = state.model.classifier.weight.clone()
        flows.train_step(
            state, noprop.to_float(small_data.train.images[:128]), small_data.train.labels[:128], 0.01
        )
        assert torch.equal(before, state.model.classifier.weight) == (embedding == "fixed")
    model = build(FMConfig(classify="classifier"))
    z = torch.randn(5, 20)
    assert torch.equal(model.classify(None, z), model.classifier(z))


@BOTH
def test_bfloat16_trains(kind, small_data):
    config, seen = kind(**ONE, precision="bfloat16", steps=2, step_threads=1), set()
    state = LabState(config, CPU, small_data)
    for name, layer in state.model.blocks[0].named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda _, x, out, name=name: seen.add((name, out.dtype)))
    list(noprop.train(state, small_data, flows.train_step, 1))
    assert {dtype for name, dtype in seen if name.startswith("head")} == {torch.bfloat16}
    assert all(x.dtype in (torch.float32, torch.int64) for x in state.model.state_dict().values())


@BOTH
def test_a_run_that_is_resumed_is_the_same_bit_for_bit(kind, small_data, tmp_path):
    config = kind(**ONE | {"epochs": 2}, steps=2, step_threads=1)
    whole, first = tiny(small_data, config), LabState(config, CPU, small_data)
    training = noprop.train(first, small_data, flows.train_step, 1, steps_too=True)
    for _ in range(3):
        next(training)
    first.save(tmp_path / "a.pt", "")
    content = noprop.read_checkpoint(tmp_path / "a.pt", {kind.objective: kind})
    second = LabState(content["config"], CPU, small_data)
    second.resume(content, "")
    list(noprop.train(second, small_data, flows.train_step, 1))
    for state, name in ((whole, "b.pt"), (second, "c.pt")):
        state.save(tmp_path / name, "")
    assert equal(*(contents(tmp_path / name)["training"] for name in ("b.pt", "c.pt")))
    assert same(whole.selected, second.selected)


# --- Pictures ----------------------------------------------------------------------------------------------


def test_what_the_picture_of_a_run_shows():
    """Accuracy by number of steps in place of blocks, and for CT the schedule in place of the rate."""
    losses = dict(block_losses=[2], classifier_loss=5, val_accuracy=90, test_accuracy=91, lr=0.1)
    summary = dict(objective="ct", history=[losses], test_images=400, config={"steps": 10})
    summary |= dict(test_accuracy=98.0, test_accuracy_by_steps={1: 97.0, 10: 98.0})
    schedule = bent(NoiseSchedule(0.02, 0.9), 1, 1.0).requires_grad_(False)
    figure = flows.draw_progress(summary, schedule)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["network", "classifier: cross-entropy"]
    [bars] = figure.axes[1].containers
    assert (list(bars[0].get_xdata()), list(bars[0].get_ydata())) == ([1, 10], [97.0, 98.0])
    t = torch.linspace(0, 1, 101)
    for line, values in zip(figure.axes[3].lines, (schedule(t)[0], 10 * schedule.alpha_bar(t)), strict=True):
        np.testing.assert_allclose(line.get_xdata(), t)
        np.testing.assert_allclose(line.get_ydata(), values, rtol=1e-5)


# --- Commands ----------------------------------------------------------------------------------------------


@BOTH
def test_the_results_are_those_of_the_selected_weights(kind, small_data, tmp_path):
    config = kind(steps=2)
    state, kept = LabState(config, CPU, small_data), build(replace(config, seed=7)).eval()
    answers = kept.predict(small_data.test.images)
    data = small_data._replace(test=small_data.test._replace(labels=answers))  # only its own are all right
    state.selected = kept.state_dict()
    assert flows.finish(state, data, noprop.Options(output_dir=tmp_path)) == 0
    found = json.loads((tmp_path / f"noprop_{kind.objective}.json").read_text())
    assert found["test_accuracy"] == 100
    assert found["val_accuracy"] == noprop.evaluate(kept, data.val, config)["accuracy"][-1] < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(CTConfig, marks=pytest.mark.draws("saved")),
        pytest.param(FMConfig, marks=pytest.mark.draws),
    ],
)
def test_a_run_writes_its_files_and_other_commands_read_them(kind, tmp_path, capsys):
    from PIL import Image

    name = kind.objective
    flags = [f"--objective={name}", "--threads=1", "--steps=3"]
    assert lab.main(["train", *flags_of(tmp_path, *flags, num_blocks=1)]) == 0
    printed = capsys.readouterr().out
    assert "3 steps of inference" in printed and ("Schedule         γ" in printed) == (name == "ct")
    assert {x.name for x in tmp_path.glob("[!.]*")} == {x.format(name) for x in noprop.OUTPUTS}
    if name == "ct":
        assert Image.open(tmp_path / "training_progress_ct.png").width >= 1000
    summary = json.loads((tmp_path / f"noprop_{name}.json").read_text())
    by_steps, path = summary["test_accuracy_by_steps"], str(tmp_path / f"noprop_{name}.pt")
    assert list(by_steps) == ["1", "2", "3", "5", "10", "20", "50", "100"]
    assert summary["test_accuracy"] == by_steps["3"]
    if name == "ct":
        assert summary["schedule"]["gamma_0"] == pytest.approx(summary["schedule"]["gamma"][-1])
    for more, accuracy in (([], by_steps["3"]), (["--steps=10"], by_steps["10"])):
        assert lab.main(["evaluate", path, *more]) == 0
        assert f"Test accuracy {accuracy:.2f} ±" in capsys.readouterr().out
    for more in ("--temperature=1", "--solver=heun"):
        assert lab.main(["evaluate", path, more]) == 0
    image = Image.new("L", (40, 40))
    image.paste(255, (18, 5, 22, 35))
    image.save(tmp_path / "b.png")
    assert lab.main(["predict", path, str(tmp_path / "b.png")]) == 0
    assert "b.png: " in capsys.readouterr().out
    assert isinstance(load(path), CTFlow if name == "ct" else FMFlow)
    assert lab.main(["train", "--resume", f"--output-dir={tmp_path}", "--epochs=1"]) == 0
    assert "resuming, 4 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--objective ct --steps 0", "steps must be at least 1"),
        ("--objective fm --sigma -1", "sigma must be at least 0"),
        ("--objective fm --draws 0", "draws must be at least 1"),
        ("--objective ct --alpha-bar-start 0.9 --alpha-bar-end 0.1", "alpha_bar_start must be well below"),
        ("--objective ct --alpha-bar-end 1", "alpha_bar_start must be well below"),
        ("--objective ct --alpha-bar-start 0", "alpha_bar_start must be well below"),
        ("--objective ct --alpha-bar-end 0.99999999", "between 0.000001 and 0.999999"),  # 1 in float32
        ("--objective ct --eta-loss-weight 0", "it would learn nothing"),
        ("--objective ct --sigma 1", "sigma"),
        ("--objective hybrid --steps 3", "steps"),
        ("--objective fm --alpha-bar-end 0.9", "alpha-bar-end"),
        ("--objective fm --solver posterior", "posterior"),
        ("--objective fm --eta-loss-weight 1", "eta_loss_weight has no effect on this objective"),
        ("--objective ct --lambda-global 2", "lambda_global has no effect on this objective"),
        ("--objective ct --num-blocks 10", "num_blocks has no effect on this objective"),
        ("--objective ct --target label", "target has no effect on this objective"),
        ("--objective fm --weights equal", "weights has no effect on this objective"),
        ("--objective ct --classify u_hat", "classify has no effect on this objective"),
        (
            "--objective fm --classify classifier --embedding onehot",
            "only a learned embedding has a classifier",
        ),
        ("--objective fm --blocks 1 --embedding fixed", "fm trains one network as a whole"),
        ("--objective hybrid --preset paper", "--preset paper is a setting of --objective dt, ct"),
        ("--objective ct --preset reference", "target has no effect on this objective"),
    ],
)
def test_bad_input_is_one_line(flags, words, capsys, tmp_path):
    if words.startswith("eta"):
        flags = flags.replace("eta-loss-weight 1", "eta-loss-weight 3")
    refused(capsys, 2, ["train", *flags.split(), f"--output-dir={tmp_path}"], words)


def test_what_contradicts_a_checkpoint_is_one_line(capsys, tmp_path):
    paths = {kind: str(untrained(tmp_path, kind())) for kind in (CTConfig, FMConfig)}
    ct, fm = paths.values()
    refused(capsys, 2, ["evaluate", ct, "--objective=fm"], "--objective fm contradicts", "which has ct")
    refused(capsys, 2, ["evaluate", ct, "--alpha-bar-end=0.99"], "contradicts", "0.9:")
    refused(capsys, 2, ["evaluate", fm, "--sigma=0.9"], "--sigma 0.9 contradicts")
    refused(capsys, 2, ["evaluate", fm, "--steps=0"], "steps must be at least 1")
    refused(capsys, 2, ["evaluate", fm, "--early-exit=0.5"], "--early-exit leaves a chain of blocks")
    refused(capsys, 2, ["merge", ct, ct], "ct trains one network as a whole")
    refused(capsys, 2, ["train", "--resume", f"--output-dir={tmp_path}"], "several runs")
    resume = ["train", "--resume", "--objective=ct", f"--output-dir={tmp_path}", "--steps=7"]
    refused(capsys, 2, resume, "--steps 7 contradicts")
    (tmp_path / "noprop_ct.pt").rename(tmp_path / "noprop_fm.pt")
    refused(capsys, 2, ["train", "--resume", "--objective=fm", f"--output-dir={tmp_path}"], "fm contradicts")
    refused(capsys, 2, ["--evaluate", fm], "(ct: 'ct') is the lab's", main=noprop.main)


@pytest.mark.slow
@BOTH
def test_they_learn(kind, data):
    """Two epochs on 6,000 images."""
    train = noprop.Split(data.train.images[:6_000], data.train.labels[:6_000])
    val, test = (noprop.Split(x.images[:1000], x.labels[:1000]) for x in data[1:3])
    config = kind(epochs=2, batch_size=128, step_threads=1)
    state = tiny(data._replace(train=train, val=val, test=test), config, threads=2)
    assert state.history[-1]["val_accuracy"] > 93


@pytest.mark.slow
def test_a_search_ends_in_a_run(tmp_path):
    flags = flags_of(tmp_path, "--objective=fm", num_blocks=1)
    assert lab.main(["search", *flags, "--hpo-trials=2", "--hpo-epochs=1", "--threads=1"]) == 0
    assert (tmp_path / "noprop_fm.json").exists()


@pytest.mark.parametrize("kind", [CTConfig, FMConfig])
def test_all_threads_share_a_step(kind, small_data):
    """As many as the config says, whatever --threads does."""
    config = kind(batch_size=64, step_threads=3)
    make, step = lab.kind_and_step(config, False, CPU)
    state, seen = make(config), []
    state.model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    images, labels = (x[:64] for x in small_data.train)
    with noprop.workers(CPU, 1) as parallel:
        step(state, noprop.to_float(images), labels, 1e-3, parallel)
        assert seen and set(seen) == {3} and torch.get_num_threads() == 1
