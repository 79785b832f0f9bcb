"""What decides a result, each against its own value: rates, draws, orders, averages, choices, pictures."""

import gc
import json
import time
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, load_all, noprop
from PIL import Image
from torch import nn

from noprop_lab.__main__ import step_of
from noprop_lab.backprop import BackpropConfig
from noprop_lab.cascade import CascadeConfig
from noprop_lab.dt import Dropout, DTConfig, PaperBlock
from noprop_lab.networks import LabState
from noprop_lab.settings import LabConfig

# --- Learning rate, order, draws ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("one-cycle", {0: 0.04 * 0.5, 0.1: 0.52 * 0.5, 0.2: 0.5, 0.6: 0.3, 1: 0.1}),
        ("cosine", {0: 0.5, 0.25: 0.1 + 0.4 * (0.5 + 0.5**1.5), 0.5: 0.3, 1: 0.1}),
        ("constant", {0: 0.5, 0.2: 0.5, 1: 0.5}),
    ],
)
def test_learning_rate(schedule, rates):
    config = noprop.Config(lr=0.5, eta_min=0.1, schedule=schedule)
    for progress, rate in rates.items():
        assert noprop.learning_rate(progress, config) == pytest.approx(rate, rel=1e-12), progress


class Watched(noprop.Hybrid):
    """The hybrid loss, which notes the draws that it gets; seen is set by its owner."""

    def block_loss(self, block, t, alpha_bar, image, label, W, draw):
        def noted(purpose, shape):
            self.seen[purpose, t, len(self.seen)] = numbers = draw(purpose, shape)
            return numbers

        return super().block_loss(block, t, alpha_bar, image, label, W, noted)


def watched_training(data: noprop.Data, **changes) -> dict[str, list]:
    """What two epochs of four steps use: rates, images, seeds of the augmentation, noise of all blocks."""
    config, notes = noprop.Config(**TINY | {"epochs": 2} | changes), {"rates": [], "images": [], "seeds": []}
    object.__setattr__(objective := Watched(), "seen", noise := {})
    state = noprop.State(config, objective=objective)

    def augment(images, generator):
        notes["images"] += [x.numpy().tobytes() for x in images]
        notes["seeds"].append(generator.initial_seed())
        return images

    def step(state, image, label, lr, parallel):
        notes["rates"].append(lr)
        return noprop.train_step(state, image, label, lr)

    list(noprop.train(state, data._replace(augment=augment), step))
    return notes | {"noise": [x.numpy().tobytes() for x in noise.values()]}


def test_every_step_and_epoch_has_draws_of_its_own_and_they_repeat(small_data):
    """Noise of each block and step, augmentation of each step, order of each epoch; the rate of each step."""
    first, again = watched_training(small_data), watched_training(small_data)
    assert first == again
    assert len(first["noise"]) == len(set(first["noise"])) == 3 * 8
    assert len(set(first["seeds"])) == 8
    one, two = first["images"][:512], first["images"][512:]
    assert (
        sorted(one)
        == sorted(two)
        == sorted(noprop.to_float(x).numpy().tobytes() for x in small_data.train[0])
    )
    assert one != two and sorted(one) != one
    config = noprop.Config(**TINY | {"epochs": 2})
    assert first["rates"] == [noprop.learning_rate(k / 8, config) for k in range(8)]
    other = watched_training(small_data, seed=1)
    assert not set(other["noise"]) & set(first["noise"]) and other["images"] != first["images"]
    assert not set(other["seeds"]) & set(first["seeds"])


def test_the_seed_decides_the_weights_of_each_part():
    one, two = (noprop.build(noprop.Config(num_blocks=2, seed=seed)).state_dict() for seed in (0, 1))
    for name, x in one.items():
        if name.endswith("weight") and x.ndim > 1:
            assert not torch.equal(x, two[name]), name
    assert not torch.equal(one["blocks.0.head.0.weight"], one["blocks.1.head.0.weight"])


@pytest.mark.parametrize("kind", [LabConfig, DTConfig, BackpropConfig, CascadeConfig])
def test_dropout_masks_differ_by_layer_block_and_step_and_repeat(kind, small_data):
    """Of the paper's block, in training, what its dropout layers draw."""
    masks = []
    for _ in range(2):
        state, seen = LabState(kind(num_blocks=2, block="paper"), CPU, small_data), []
        for block in state.model.blocks:
            for layer in block.image:
                if type(layer).__name__ == "Dropout":
                    layer.register_forward_pre_hook(
                        lambda layer, x, seen=seen: seen.append(layer.draw(x[0].shape, torch.rand))
                    )
        image, label = noprop.to_float(small_data.train.images[:16]), small_data.train.labels[:16]
        for state.step in range(2):
            step_of(state.config)(state, image, label, 1e-3)
        masks.append([x.detach().numpy().tobytes() for x in seen])
    assert masks[0] == masks[1] and len(set(masks[0])) == 2 * 2 * 3


def test_a_state_is_freed_when_nobody_has_it_any_more(small_data):
    """At once, as those of a search's trials must be: Python's own search for cycles may take its time."""
    state = LabState(DTConfig(num_blocks=2, block="paper"), CPU, small_data)
    image, label = noprop.to_float(small_data.train.images[:16]), small_data.train.labels[:16]
    noprop.train_step(state, image, label, 1e-3)
    kept = weakref.ref(state)
    gc.disable()
    del state
    gc.enable()
    assert kept() is None


def test_the_papers_block_drops_a_fifth():
    layers = [x.p for x in PaperBlock((1, 28, 28), 20, 10).modules() if isinstance(x, Dropout)]
    assert layers == [0.2, 0.2, 0.2]


def test_dropout_scales_what_it_keeps():
    layer = Dropout(0.2)
    layer.draw = lambda shape, kind: torch.linspace(0, 0.999, 1000).view(shape)
    out = layer(torch.ones(1000))
    assert torch.equal(out[200:], torch.full((800,), 1 / 0.8)) and not out[:200].any()
    assert torch.equal(layer.eval()(torch.ones(1000)), torch.ones(1000))


# --- Augmentation ------------------------------------------------------------------------------------------


def smooth_picture() -> torch.Tensor:
    """Three smooth spots, (28, 28): no symmetry, and nothing near the border."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    spots = ((13, 9, 1.0), (18, 17, 0.7), (9, 17, 0.5))
    return sum(h * torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 16) for a, b, h in spots)


def test_whether_there_is_augmentation():
    assert load_all(noprop.Config()).augment is noprop.augment
    assert load_all(noprop.Config(augment=False)).augment is None


def test_to_make_a_network_leaves_the_callers_draws_alone():
    before = torch.get_rng_state()
    noprop.build(noprop.Config(num_blocks=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_is_what_pillow_does():
    """Turned about the middle, scaled, shifted, one after another, each by the draws: to interpolation."""
    picture, count = smooth_picture(), 40
    found = noprop.augment(picture.expand(count, 1, 28, 28), torch.Generator().manual_seed(3))
    draws = torch.rand(4, count, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert draws.abs().amax(1).min() > 0.9  # so that the limits are tested
    for image, (angle, scale, dx, dy) in zip(found[:, 0], draws.T.tolist(), strict=True):
        right, down, box = 0.06 * 28 * dx, 0.06 * 28 * dy, 14 * (1 + 0.1 * scale)
        moved = Image.fromarray(picture.numpy()).transform(
            (28, 28), Image.Transform.AFFINE, (1, 0, right, 0, 1, down), Image.Resampling.BILINEAR
        )
        edges = (14 - box, 14 - box, 14 + box, 14 + box)
        scaled = moved.transform((28, 28), Image.Transform.EXTENT, edges, Image.Resampling.BILINEAR)
        turned = scaled.rotate(12 * angle, Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(turned) - image.numpy())[3:25, 3:25].max() < 0.06


def test_the_limits_of_the_augmentation(monkeypatch):
    """The largest draws: 12°, a tenth, and 6 % of the width, which is 0.12 of half of it."""
    seen, affine_grid = [], noprop.F.affine_grid

    def noted(theta, *rest, **more):
        seen.append(theta)
        return affine_grid(theta, *rest, **more)

    monkeypatch.setattr(noprop.torch, "rand", lambda *shape, generator: torch.ones(shape))
    monkeypatch.setattr(noprop.F, "affine_grid", noted)
    noprop.augment(torch.zeros(1, 1, 28, 28), noprop.generator())
    cos, sin = 1.1 * np.cos(np.radians(12)), 1.1 * np.sin(np.radians(12))
    torch.testing.assert_close(seen[0], torch.tensor([[[cos, -sin, 0.12], [sin, cos, 0.12]]]).float())


# --- Inference ---------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """A block that knows the label: its "image" is u itself, and its answer is the true noise."""

    def forward(self, u, z, level, W):
        return (z - level**0.5 * u) / (1 - level) ** 0.5


class ShowsZ(noprop.NoProp):
    """Its "logits" are what is handed on."""

    def classify(self, u_hat, z):
        return z


def test_the_chain_has_the_marginals_of_the_noisy_label():
    """At τ = 1, through forward(): z_t ~ N(√ᾱ_t u, (1-ᾱ_t) I) after every block; noise from z_0 on."""
    config = noprop.Config(weights="ddpm", temperature=1.0)
    model = noprop.build(config, block=lambda *_, target: Oracle(), kind=ShowsZ)
    u = nn.init.orthogonal_(torch.empty(10, 20)).repeat(20_000, 1)
    z = model(u, 1.0, torch.Generator().manual_seed(0))
    levels = torch.tensor([0.024, 0.094, 0.203, 0.341, 0.494, 0.647, 0.787, 0.899, 0.972, 0.999])
    for t, level in enumerate(model.alpha_bar[1:].tolist()):
        assert level == pytest.approx(levels[t].item(), abs=6e-4)
        residual = (z[:, t] - level**0.5 * u) / (1 - level) ** 0.5
        assert abs(residual.mean().item()) < 3e-3 and abs(residual.var().item() - 1) < 3e-3, t


def test_evaluate_counts_as_a_loop_does(small_data):
    """Accuracy and loss after each block, and of the mean of the blocks' probabilities."""
    matrix = torch.randn(784, 3, 10, generator=torch.Generator().manual_seed(0))

    def model(images, temperature, noise):
        return torch.einsum("bi,itk->btk", images.flatten(1), matrix)

    logits = model(noprop.to_float(small_data.test.images), 0, None)
    labels = logits.mean(1).argmax(1)  # so that some are right
    labels[::2], labels[::3] = logits[::2, 1].argmax(1), logits[::3, 2].argmax(1)
    found = noprop.evaluate(model, noprop.Split(small_data.test.images, labels), noprop.Config())
    right, losses, average, average_loss = [0] * 3, [0.0] * 3, 0, 0.0
    for answer, label in zip(logits, labels.tolist(), strict=True):
        shares = [row.exp() / row.exp().sum() for row in answer]
        for t in range(3):
            right[t] += int(answer[t].argmax()) == label
            losses[t] -= shares[t][label].log().item()
        average += int(sum(shares).argmax()) == label
        average_loss -= (sum(shares)[label] / 3).log().item()
    assert found["accuracy"] == pytest.approx([100 * x / 500 for x in right])
    assert found["accuracy_average"] == pytest.approx(100 * average / 500)
    assert found["loss"] == pytest.approx([x / 500 for x in losses], rel=1e-4)
    assert found["loss_average"] == pytest.approx(average_loss / 500, rel=1e-4)
    assert len({*right, average}) == 4  # else the test could not tell them apart
    split = noprop.Split(small_data.test.images, labels)
    sure = noprop.evaluate(lambda *x: 30 * model(*x), split, noprop.Config())["loss"]
    expected = nn.functional.cross_entropy(
        30 * logits.double().movedim(1, 2), labels[:, None].expand(-1, 3), reduction="none"
    )
    assert sure == pytest.approx(expected.mean(0).tolist())
    assert expected.max() > 104  # and exp(-104) is 0 in float32


class Table(noprop.NoProp):
    """Its answers are given: block 1 says 1, block 2 says 2, block 3 says 3, and the mean says 4."""

    def forward(self, image, temperature=0.0, noise=None):
        shares = torch.full((3, 10), 0.01)
        for t in range(3):
            shares[t, t + 1], shares[t, 4] = 0.5, 0.4
        return shares.log().expand(len(image), 3, 10)


@pytest.mark.parametrize("weights", ["equal", "ddpm"])
def test_the_chain_has_the_weights_that_the_config_names(weights):
    model = noprop.build(noprop.Config(num_blocks=4, weights=weights))
    assert model.steps == noprop.reverse_steps(noprop.cosine_schedule(4), weights == "equal").tolist()


def test_the_answer_is_that_of_the_last_block_or_of_the_average_so_far():
    model = noprop.build(noprop.Config(num_blocks=3), kind=Table)
    images = torch.zeros(7, 28, 28, dtype=torch.uint8)
    assert model.predict(images).tolist() == [3] * 7
    assert model.probabilities(images).argmax(-1).tolist() == [[1, 2, 3]] * 7
    model.by_average, alone = True, model.probabilities(images)
    assert model.predict(images).tolist() == [4] * 7
    for t in range(3):
        torch.testing.assert_close(model.probabilities(images)[:, t], alone[:, : t + 1].mean(1))


@pytest.mark.parametrize("by_average", [False, True])
def test_predict_gives_the_answers_that_evaluate_counts(by_average, data):
    """Also where it samples, which it does in batches of 500."""
    config = noprop.Config(num_blocks=3, temperature=1.0, weights="ddpm", seed=3)
    model = noprop.build(config).eval()
    model.by_average = by_average
    answers = model.predict(data.val.images[:1200])
    found = noprop.evaluate(model, noprop.Split(data.val.images[:1200], answers), config)
    assert [found["accuracy"][-1], found["accuracy_average"]][by_average] == 100
    assert [found["accuracy"][-1], found["accuracy_average"]][not by_average] < 100


def test_images_of_bytes_and_of_shares_are_the_same(small_data):
    model, images = noprop.build(noprop.Config(num_blocks=2)).eval(), small_data.test.images[:20]
    assert torch.equal(model.probabilities(images), model.probabilities(images.float() / 255))


def test_evaluate_samples_at_the_configs_temperature_with_noise_of_its_own_for_each_batch(data):
    seen = []

    def model(images, temperature, noise):
        seen.append((len(images), temperature, noise.initial_seed()))
        return torch.zeros(len(images), 1, 10)

    for seed in (0, 0, 1):
        noprop.evaluate(model, data.val, noprop.Config(temperature=0.5, weights="ddpm", seed=seed))
    assert {x[:2] for x in seen} == {(500, 0.5)} and seen[:10] == seen[10:20]
    assert len({x[2] for x in seen}) == 20


def test_each_step_has_its_learning_rate_and_the_epoch_the_means_of_its_steps(small_data):
    """And no more seconds than have gone by."""
    config, started = noprop.Config(**TINY | {"epochs": 2}), time.perf_counter()
    state, rates, logs = noprop.State(config), [], []
    for record in noprop.train(state, small_data._replace(test=None), threads=1, steps_too=True):
        if record:
            losses = torch.stack(logs[-4:])[:, :4].double().mean(0)  # of three blocks and the classifier
            assert [*record["block_losses"], record["classifier_loss"]] == pytest.approx(losses.tolist())
            assert len(record["block_losses"]) == 3 and record["lr"] == rates[-1]
        else:
            rates.append(state.lr)
            logs.append(state.log[-1])
            assert len(logs[-1]) == 4 + 5  # these losses, and the norms of these and of the embedding
    assert rates == pytest.approx([noprop.learning_rate(k / 8, config) for k in range(8)])
    assert 0 < record["seconds"] < time.perf_counter() - started


def test_the_split_of_an_epochs_record(small_data):
    """Validation and test accuracies are those of their own images; the model is in evaluation mode."""
    labels = torch.zeros_like(small_data.val.labels)
    data = small_data._replace(val=small_data.val._replace(labels=labels))
    state = noprop.State(noprop.Config(**TINY))
    [record] = noprop.train(state, data)
    for name, split in (("val", data.val), ("test", data.test)):
        right = (state.averaged.predict(split.images) == split.labels).float().mean().item()
        assert record[f"{name}_accuracy"] == pytest.approx(100 * right)
    assert record["val_accuracy"] != record["test_accuracy"] and not state.averaged.training
    assert state.model.training


# --- Selection ---------------------------------------------------------------------------------------------


def invented(accuracies: list[float], **changes) -> noprop.State:
    """A state after epochs with these validation accuracies; its average has the epoch for a bias."""
    state = noprop.State(noprop.Config(num_blocks=1, epochs=9, **changes))
    for epoch, accuracy in enumerate(accuracies, start=1):
        state.averaged.classifier.bias.data.fill_(epoch)
        state.record(dict(epoch=epoch, val_accuracy=accuracy, test_accuracy=100.0 - epoch), 5000)
    return state


@pytest.mark.parametrize(
    ("accuracies", "changes", "selected"),
    [
        ([99.0, 99.6, 99.52, 99.4], {}, 3),  # the standard error of 99.6 % of 5,000 images is .089
        ([99.0, 99.6, 99.5, 99.4], {}, 2),
        ([99.0, 99.1, 99.2, 99.3], {}, 4),
        ([99.0, 99.6, 99.52, 99.4], {"select": "last"}, 4),
    ],
)
def test_which_epochs_weights_are_kept(accuracies, changes, selected, tmp_path):
    """And are those of the network that a checkpoint holds, and kept where that is gone on with."""
    state = invented(accuracies, **changes)
    assert state.selected_epoch == selected
    state.save(path := tmp_path / "noprop_hybrid.pt", "")
    assert torch.equal(noprop.load(path).classifier.bias, torch.full((10,), float(selected)))
    content, again = noprop.read_checkpoint(path), noprop.State(state.config)
    again.resume(content, "")
    assert again.selected_epoch == selected and again.history == state.history
    assert torch.equal(again.selected["classifier.bias"], torch.full((10,), float(selected)))
    assert torch.equal(again.averaged.classifier.bias, torch.full((10,), float(len(accuracies))))


def test_a_run_that_was_stopped_before_its_first_epoch_goes_on(tmp_path):
    """What it has selected is what it averages, as before; and seconds are counted on."""
    state = noprop.State(noprop.Config(num_blocks=1))
    state.seconds = 7.0
    state.save(path := tmp_path / "noprop_hybrid.pt", "")
    (again := noprop.State(state.config)).resume(noprop.read_checkpoint(path), "")
    again.averaged.classifier.bias.data.fill_(5)
    assert again.selected["classifier.bias"].eq(5).all() and again.seconds == 7


def test_the_results_are_those_of_the_selected_weights(small_data, tmp_path, capsys):
    """And not of the average as the last epoch left it."""
    state = noprop.State(noprop.Config(num_blocks=1))
    kept = noprop.build(noprop.Config(num_blocks=1, seed=7)).eval()
    answers = kept.predict(small_data.test.images)
    data = small_data._replace(test=small_data.test._replace(labels=answers))  # only its own are all right
    state.selected, state.selected_epoch = kept.state_dict(), 1
    assert noprop.finish(state, data, noprop.Options(output_dir=tmp_path)) == 0
    assert json.loads((tmp_path / "noprop_hybrid.json").read_text())["test_accuracy"] == 100
    printed = capsys.readouterr().out
    assert "Test accuracy    100.00 ± 0.00 % (± for 500 images)" in printed
    assert "After block 1 …  100.00 %" in printed and "Blocks' average  100.00 %" in printed
    assert "Weights          epoch 1, select validation" in printed
    assert json.loads((tmp_path / "noprop_hybrid.json").read_text())["selected_epoch"] == 1
    assert noprop.evaluate(state.averaged, data.test, state.config)["accuracy"][-1] < 100


def test_results_are_written_and_printed_before_anything_is_drawn(small_data, tmp_path, monkeypatch, capsys):
    """A picture never hides a result, though drawing it may end the process."""
    seen, state = [], noprop.State(noprop.Config(num_blocks=1))

    def picture(*_) -> int:
        seen.append(({x.name for x in tmp_path.iterdir()}, capsys.readouterr().out))
        return 0

    monkeypatch.setattr(noprop, "picture", picture)
    assert noprop.finish(state, small_data, noprop.Options(output_dir=tmp_path)) == 0
    (files, printed), _ = seen
    assert {"noprop_hybrid.pt", "noprop_hybrid.json"} <= files and "Test accuracy" in printed


def test_weights_and_gradients_lie_in_memory_as_convolutions_are_fast():
    """So does a checkpoint's moments' vector: in another order it would be another's."""
    state = noprop.State(noprop.Config(num_blocks=1))
    for network in (state.model, state.averaged):
        weight = network.blocks[0].image[4].weight  # (32, 24, 3, 3)
        for x in (weight, weight.grad):
            assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("sure", [3, 0])
def test_the_blocks_average_answers_where_it_fits_validation_images_better(
    sure, small_data, tmp_path, capsys
):
    """Of validation images, all of class 3: block 3 is sure, rightly or wrongly; blocks 1 and 2 are not."""

    class Last(Table):
        def forward(self, image, temperature=0.0, noise=None):
            logits = torch.zeros(len(image), 3, 10)
            logits[:, 2, sure] = 9.0
            return logits

    data = small_data._replace(val=small_data.val._replace(labels=torch.full((500,), 3)))
    state = noprop.State(
        noprop.Config(num_blocks=3), model=noprop.build(noprop.Config(num_blocks=3), kind=Last)
    )
    assert noprop.finish(state, data, noprop.Options(output_dir=tmp_path)) == 0
    summary = json.loads((tmp_path / "noprop_hybrid.json").read_text())
    losses = summary["val_loss_average"], summary["val_loss"]
    by_average = sure != 3  # a wrong answer that is sure costs more than the mean with two that are not
    assert (losses[0] < losses[1]) == state.by_average == by_average
    printed, error = capsys.readouterr().out, noprop.standard_error(summary["test_accuracy"], 500)
    assert f"± {error:.2f} % (± for 500 images)" in printed and error > 1
    assert ("--evaluate and --predict answer by it" in printed) == by_average
    assert noprop.load(tmp_path / "noprop_hybrid.pt").by_average == by_average
    content = torch.load(tmp_path / "noprop_hybrid.pt", weights_only=True)
    fresh = noprop.State(noprop.Config(num_blocks=3))  # which may be killed before it is decided anew
    fresh.resume(noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt"), content["data"])
    assert fresh.by_average == by_average
    other = noprop.Config(num_blocks=3, temperature=1.0, weights="ddpm")  # not what it was decided for
    assert not noprop.build(other, content=noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")).by_average
    del content["by_average"]  # as checkpoints were
    torch.save(content, tmp_path / "older.pt")
    assert not noprop.load(tmp_path / "older.pt").by_average


def test_standard_error():
    assert noprop.standard_error(99.6, 5000) == pytest.approx(0.0893, abs=1e-4)
    assert noprop.standard_error(50, 100) == pytest.approx(5)


@pytest.mark.parametrize(
    ("accuracies", "changes", "finished"),
    [
        ([99.0, 99.5, 99.5], {"patience": 2}, False),  # the same is no improvement
        ([99.0, 99.5, 99.5, 99.4], {"patience": 2}, True),
        ([99.0, 99.5, 99.4, 99.6], {"patience": 2}, False),
        ([99.0, 98.0, 97.0], {"patience": 2, "select": "last"}, False),
        ([99.0] * 9, {"patience": 99}, True),
        ([99.0] * 8, {"patience": 99}, False),
        ([], {}, False),
    ],
)
def test_when_a_training_is_finished(accuracies, changes, finished):
    assert invented(accuracies, **changes).finished() == finished


# --- Pictures ----------------------------------------------------------------------------------------------


def test_what_the_picture_of_a_training_shows():
    """Every line's values, by the words of its label; the bars are standard errors."""
    history = [
        dict(epoch=k, block_losses=[k, 3 * k], classifier_loss=5 * k, val_accuracy=90 + right)
        | dict(test_accuracy=80 + right, lr=0.1 / k)
        for k, right in ((1, 1), (2, 3), (3, 2))  # the last is not the best
    ]
    summary = dict(objective="hybrid", history=history, test_accuracy_by_blocks=[98, 97], test_images=400)
    figure, lines = noprop.draw_progress(summary), {}
    for axes in figure.axes:
        for line in axes.get_lines():
            lines[axes.get_title(), line.get_label().split(",")[0]] = list(line.get_ydata())
            assert list(line.get_xdata()) == list(range(1, 1 + len(line.get_ydata())))
    losses = "Training losses (hybrid)"
    accuracies = "Accuracy of the averaged weights"
    expected = {
        (losses, "blocks"): [2, 4, 6],
        (losses, "classifier: cross-entropy"): [5, 10, 15],
        (accuracies, "validation"): [91, 93, 92],
        (accuracies, "test (decides nothing)"): [81, 83, 82],
        ("Learning rate", "at the end of the epoch"): pytest.approx([0.1, 0.05, 0.1 / 3]),
    }
    assert {name: lines[name] for name in expected} == expected
    [bars] = figure.axes[1].containers
    chain, _, [segments] = bars
    assert list(chain.get_ydata()) == [98, 97] and "after each block" in figure.axes[1].get_title()
    error = (segments.get_segments()[0][1, 1] - segments.get_segments()[0][0, 1]) / 2
    assert error == pytest.approx(100 * (0.98 * 0.02 / 400) ** 0.5)
    labels = " ".join(x for axes in figure.axes for x in axes.get_legend_handles_labels()[1])
    for words in ("validation, at the end 92.", "nothing), at the end 82.", "error; at the end 97."):
        assert words in labels, words
    cascade = summary | {"history": [record | {"classifier_loss": 0} for record in history]}  # it has none
    legend = noprop.draw_progress(cascade).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["blocks, mean"]
    nothing = {"val_accuracy": None, "test_accuracy": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for records in ([x | nothing for x in history], []):  # parts put together; stopped in the first epoch
            legend = noprop.draw_progress(summary | {"history": records}).axes[2].get_legend()
            assert not legend.get_texts()


def test_what_the_picture_of_the_denoising_shows(small_data, monkeypatch):
    """Each chart's columns are distributions: flat in z_0, and in z_T the answer that the title gives.

    A dot a block is at the class whose embedding û_t is next to.
    """
    model, u_hats = noprop.build(noprop.Config(num_blocks=4)).eval(), []
    step, steps = noprop.NoProp.step, model.steps
    monkeypatch.setattr(noprop.NoProp, "step", lambda *x: u_hats.append(step(*x)) or u_hats[-1])
    figure = noprop.draw_denoising(model, small_data.test)
    apart = torch.stack([u_hat for u_hat, _ in u_hats[-4:]], 1)[:, :, None] - model.label_embedding.weight
    nearest = apart.norm(dim=-1).argmin(-1)  # (12, 4)
    digits, charts = figure.axes[0:6] + figure.axes[12:18], figure.axes[6:12] + figure.axes[18:24]
    assert model.steps == steps  # the network that is drawn is left as it was
    for digit, chart, classes in zip(digits, charts, nearest.tolist(), strict=True):
        [dots] = chart.lines
        assert dots.get_xydata().tolist() == [list(x) for x in enumerate(classes, start=1)]
        shares = chart.get_images()[0].get_array()
        assert shares.shape == (10, 5) and np.allclose(shares.sum(0), 1, atol=1e-5)
        assert shares[:, 0].max() < 0.2 and shares[:, -1].argmax() == int(digit.get_title().split()[0])
    for i, digit in enumerate(digits[:6]):
        assert np.allclose(digit.get_images()[0].get_array(), small_data.test.images[i, 0] / 255)
        answer, *more = digit.get_title().split(" ", 1)
        label = str(int(small_data.test.labels[i]))
        assert more == ([] if answer == label else [f"(labelled {label})"])
    certainty = model.probabilities(small_data.test.images)[:, -1].gather(1, small_data.test.labels[:, None])
    hard = small_data.test.images[certainty[:, 0].argsort()[:24], 0] / 255
    for digit in digits[6:]:
        assert any(np.allclose(digit.get_images()[0].get_array(), image) for image in hard)


def test_the_picture_of_the_denoising_is_of_samples_as_the_paper_draws_them(small_data, monkeypatch):
    model, seen, step = noprop.build(noprop.Config(num_blocks=4)).eval(), [], noprop.NoProp.step
    read, classes_in = [], noprop.classes_in

    def watched(self, t, image, z, temperature=0.0, noise=None):
        seen.append((temperature, self.steps))
        return step(self, t, image, z, temperature, noise)

    monkeypatch.setattr(noprop.NoProp, "step", watched)
    monkeypatch.setattr(noprop, "classes_in", lambda *x: read.append(x) or classes_in(*x))
    noprop.draw_denoising(model, small_data.test)
    assert [level for _, _, level in read] == model.alpha_bar.tolist()
    assert read[0][0].std().item() == pytest.approx(1, abs=0.2)  # z_0 is noise
    assert seen[-4:] == [(1.0, noprop.reverse_steps(model.alpha_bar).tolist())] * 4


# --- Search ------------------------------------------------------------------------------------------------


def test_trials_differ_and_a_search_that_goes_on_proposes_the_same():
    """By the seed and the trial's number."""
    import optuna

    def suggest(trial) -> dict:
        return {"lr": trial.suggest_float("x", 0, 1)}

    def records(config: noprop.Config) -> list[dict]:
        return [{"val_loss": config.lr, "epoch": config.epochs}]

    def proposed(seed: int, trials: int = 8, study=None) -> list[float]:
        study, config = study or optuna.create_study(), noprop.Config(seed=seed)
        study.optimize(partial(noprop.short_training, config, records, lambda: 0, suggest), trials)
        return [trial.params["x"] for trial in study.trials]

    first = proposed(0)
    assert len(set(first)) == 8 and proposed(0) == first and not set(first) & set(proposed(1))
    study = optuna.create_study()  # of two workers that begin at once, each sees the other's trial
    study.enqueue_trial({}), study.enqueue_trial({})
    assert proposed(0, 2) == first[:2] == proposed(0, 2, study)
