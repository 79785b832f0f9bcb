"""It learns, repeats itself exactly, chooses on validation images, and no label leaks into an answer."""

import gzip
import math

import pytest
import torch
from conftest import TINY, noprop, same, train_tiny


def test_learns_mnist(trained, data):
    model = noprop.load(trained / "noprop_hybrid.pt")
    accuracy = (model.predict(data.test.images) == data.test.labels).float().mean().item()
    assert accuracy >= 0.98
    accuracy_float = (model.predict(data.test.images[:, 0] / 255) == data.test.labels).float().mean().item()
    assert accuracy_float == accuracy


def test_same_seed_same_bits_other_seed_other_bits(small_data, tiny_state):
    first, again, other = tiny_state, *(train_tiny(small_data, seed=seed) for seed in (0, 1))
    assert same(first.averaged.state_dict(), again.averaged.state_dict())
    assert same(first.model.state_dict(), again.model.state_dict())
    assert not same(first.averaged.state_dict(), other.averaged.state_dict())


@pytest.mark.slow
def test_bfloat16_trains_float32_weights_to_nearly_the_same(small_data, tiny_state):
    exact = tiny_state
    short, again = (train_tiny(small_data, n, precision="bfloat16") for n in (1, 2))
    assert same(short.averaged.state_dict(), again.averaged.state_dict())
    assert not same(short.averaged.state_dict(), exact.averaged.state_dict())
    assert all(x.dtype in (torch.float32, torch.int64) for x in short.model.state_dict().values())
    for name in ("block_losses", "classifier_loss"):
        assert short.history[0][name] == pytest.approx(exact.history[0][name], rel=0.02)


def test_the_result_does_not_depend_on_threads(small_data, tiny_state):
    """Torch's, or those of the call; and torch's number is what it was before, also between epochs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        state = noprop.State(noprop.Config(**TINY))
        for _ in noprop.train(state, small_data, threads=3):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert same(state.averaged.state_dict(), tiny_state.averaged.state_dict())


def test_fewer_images_than_a_batch_are_a_line(small_data):
    """Of data that a user has made by hand, too."""
    state = noprop.State(noprop.Config(num_blocks=1, batch_size=len(small_data.train.labels) + 1))
    with pytest.raises(noprop.Failure, match="is more than the"):
        list(noprop.train(state, small_data))


def test_splits_are_disjoint_and_fixed(data):
    folder, names = noprop.Options.data_root / "MNIST/raw", ("train-images", "t10k-images")
    train, test = (gzip.decompress((folder / f"{name}-idx3-ubyte.gz").read_bytes()) for name in names)
    assert [len(split.labels) for split in data[:3]] == [55_000, 5_000, 10_000]
    pictures = [x.numpy().tobytes() for x in torch.cat([data.train.images, data.val.images])]
    assert sorted(pictures) == sorted(train[16 + 784 * i : 800 + 784 * i] for i in range(60_000))
    assert not set(pictures[:55_000]) & set(pictures[55_000:])
    assert data.test.images.numpy().tobytes() == test[16:]
    assert data.val.labels[:10].tolist() == [9, 5, 6, 8, 6, 7, 3, 3, 1, 6]


def test_labels_do_not_enter_the_answer(trained, data):
    """Given wrong labels, evaluate() finds the accuracy low, and just that of predict(), which takes none."""
    model, images = noprop.load(trained / "noprop_hybrid.pt"), data.test.images[:1000]
    wrong = (data.test.labels[:1000] + 1) % 10
    accuracy = noprop.evaluate(model, noprop.Split(images, wrong), model.config)["accuracy"][-1]
    assert accuracy == pytest.approx(100 * (model.predict(images) == wrong).double().mean().item())
    assert accuracy < 5


@pytest.mark.slow
def test_shuffled_labels_leave_the_test_at_chance(data, small_data):
    shuffled = data.train.labels[torch.randperm(55_000, generator=noprop.generator("shuffle"))]
    train = noprop.Split(data.train.images[:3_000], shuffled[:3_000])
    training = train_tiny(small_data._replace(train=train), 2, epochs=2, num_blocks=2, train_images=None)
    assert training.history[-1]["test_accuracy"] < 20


def test_the_test_set_decides_nothing(small_data):
    poisoned = small_data._replace(
        test=noprop.Split(255 - small_data.test.images, small_data.test.labels.flip(0))
    )
    one, other = (train_tiny(x, epochs=3, batch_size=32, num_blocks=1) for x in (small_data, poisoned))
    assert one.history[-1]["test_accuracy"] != other.history[-1]["test_accuracy"]
    assert one.selected_epoch == other.selected_epoch and same(one.selected, other.selected)


def test_selection_takes_the_last_epoch_within_one_standard_error_and_patience_ends_the_run(small_data):
    training = noprop.State(noprop.Config(**TINY | {"patience": 3, "epochs": 9}))
    chosen = []  # one standard error is 0.1 points at 99.5 %
    for epoch, accuracy in enumerate([90.0, 99.5, 99.41, 99.45, 98.0, 99.3], start=1):
        training.record({"epoch": epoch, "val_accuracy": accuracy}, 5000)
        chosen.append((training.selected_epoch, training.finished()))
    assert chosen == [(1, False), (2, False), (3, False), (4, False), (4, True), (4, True)]
    constant = noprop.State(noprop.Config(**TINY | {"patience": 2, "epochs": 9}))
    measure = constant.measure
    constant.measure = lambda *arguments: measure(*arguments) | {"val_accuracy": 50.0}
    assert len(list(noprop.train(constant, small_data))) == 3


def test_selection_counts_the_validation_images(small_data):
    """Of 50 images one standard error is 4 points, of 500 it is 1.3."""
    few = small_data._replace(val=noprop.Split(*(x[:50] for x in small_data.val)))
    training = noprop.State(noprop.Config(**TINY | {"epochs": 2, "num_blocks": 1}))
    measure, accuracies = training.measure, iter([90.0, 86.5])
    training.measure = lambda *arguments: measure(*arguments) | {"val_accuracy": next(accuracies)}
    list(noprop.train(training, few))
    assert training.selected_epoch == 2


def test_an_incomplete_last_batch_is_left_out(small_data):
    training = noprop.State(noprop.Config(**TINY | {"epochs": 2, "num_blocks": 1, "batch_size": 100}))
    list(noprop.train(training, small_data))
    assert len(small_data.train.labels) == 512 and training.step == 2 * 5


def test_a_poisoned_batch_stops_the_run_and_is_named(small_data):
    images = small_data.train.images.float() / 255
    images[77] = float("nan")
    training = noprop.State(noprop.Config(**TINY | {"augment": False}))
    with pytest.raises(FloatingPointError, match=r"loss of block 1 is nan by step [1-4]:"):
        list(noprop.train(training, small_data._replace(train=noprop.Split(images, small_data.train.labels))))


def test_a_poisoned_block_is_named(small_data):
    training = noprop.State(noprop.Config(**TINY))
    training.model.blocks[1].head[0].bias.data[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"loss of block 2 is (nan|inf) by step 1:"):
        list(noprop.train(training, small_data))
    training = noprop.State(noprop.Config(**TINY))  # and where the loss is finite and its gradient is not
    training.model.blocks[1].head[0].register_full_backward_hook(
        lambda *_: (torch.full((128, 128), math.inf),)
    )
    with pytest.raises(FloatingPointError, match=r"gradient norm of block 2 is (nan|inf) by step 1:"):
        list(noprop.train(training, small_data))


def test_temperature_one_samples_and_repeats_itself(trained, data):
    model, images = noprop.load(trained / "noprop_hybrid.pt"), noprop.to_float(data.test.images[:200])
    with torch.inference_mode():
        first, again, other = (model(images, 1.0, noprop.generator("draw", i)) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.slow
def test_reference_preset_starts_and_learns(data):
    config = noprop.Config.reference(epochs=1, num_blocks=2, lr=0.003, batch_size=64)
    sizes = zip(data[:3], (6400, 500, 500), strict=True)
    small = noprop.Data(*(noprop.Split(x.images[:n], x.labels[:n]) for x, n in sizes))
    (record,) = noprop.train(noprop.State(config), small, threads=2)
    assert record["val_accuracy"] > 60
