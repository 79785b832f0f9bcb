"""Data sets beside MNIST, on small files of the right format; a reader's own pictures, made from MNIST."""

import gzip
import hashlib
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import noprop
from PIL import Image
from test_command_line import fails

SMALL = ["--epochs=1", "--batch-size=64", "--num-blocks=2", "--block=small"]


def write_idx(folder, prefix: str, images: torch.Tensor, labels: torch.Tensor) -> dict[str, str]:
    """Two files in MNIST's format; their names and md5 sums."""
    sums = {}
    for name, values, dims in (
        ("images-idx3", images, (len(images), 28, 28)),
        ("labels-idx1", labels, (len(labels),)),
    ):
        header = bytes([0, 0, 8, len(dims)]) + b"".join(n.to_bytes(4, "big") for n in dims)
        path = folder / f"{prefix}-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + values.to(torch.uint8).numpy().tobytes()))
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize(("dataset", "name"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_files_in_the_format_of_mnist(tmp_path, data, monkeypatch, capsys, dataset, name):
    from torchvision import datasets

    folder = tmp_path / name / "raw"
    folder.mkdir(parents=True)
    sums = write_idx(folder, "train", data.train.images[:600], data.train.labels[:600])
    sums |= write_idx(folder, "t10k", data.test.images[:100], data.test.labels[:100])
    monkeypatch.setattr(getattr(datasets, name), "resources", list(sums.items()))
    arguments = [
        f"--dataset={dataset}",
        f"--data-root={tmp_path}",
        f"--output-dir={tmp_path / 'out'}",
        *SMALL,
    ]
    assert noprop.main(arguments) == 0
    assert "540 images" in (output := capsys.readouterr().out) and "(± for 100 images)" in output
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    fails(capsys, 2, arguments, "train-labels-idx1-ubyte.gz is damaged")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist", "cifar10", "cifar100"])
def test_a_data_set_that_is_absent_and_offline_tells_where_to_put_it(tmp_path, capsys, monkeypatch, dataset):
    import urllib.request

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    arguments = [
        f"--dataset={dataset}",
        f"--data-root={tmp_path}",
        f"--output-dir={tmp_path / 'out'}",
        *SMALL,
    ]
    words = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    fails(capsys, 2, arguments, "can't be downloaded", words.get(dataset, "train-images-idx3-ubyte.gz"))


@pytest.mark.parametrize(
    ("dataset", "name", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar(tmp_path, monkeypatch, capsys, dataset, name, key):
    from torchvision import datasets

    source, rng = getattr(datasets, name), np.random.default_rng(0)
    folder, classes = tmp_path / source.base_folder, noprop.SOURCES[dataset].classes
    folder.mkdir()

    def write(file: str, images: int) -> list[str]:
        labels = [i % classes for i in range(images)]
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels}))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    monkeypatch.setattr(source, "train_list", [write("train", 400)])
    monkeypatch.setattr(source, "test_list", [write("test", 100)])
    (folder / source.meta["filename"]).write_bytes(
        pickle.dumps({source.meta["key"]: list(map(str, range(classes)))})
    )
    digest = hashlib.md5((folder / source.meta["filename"]).read_bytes()).hexdigest()
    monkeypatch.setattr(source, "meta", source.meta | {"md5": digest})
    arguments = [
        f"--dataset={dataset}",
        f"--data-root={tmp_path}",
        f"--output-dir={tmp_path / 'out'}",
        *SMALL,
    ]
    assert noprop.main(arguments) == 0
    model = noprop.load(tmp_path / "out" / "noprop_hybrid.pt")
    assert model.image_shape == (3, 32, 32) and model.classifier.out_features == classes
    assert (
        noprop.main(["--evaluate", str(tmp_path / "out" / "noprop_hybrid.pt"), f"--data-root={tmp_path}"])
        == 0
    )
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert (
        noprop.main(["--predict", str(tmp_path / "out" / "noprop_hybrid.pt"), str(tmp_path / "red.png")]) == 0
    )
    assert re.match(r".*red.png: \d+  \(", capsys.readouterr().out)


def write_pictures(root, split: noprop.Split, names: list[str]) -> None:
    """Pictures of the digits 0, 1 and 7, each in the folder of its class."""
    for i, (image, label) in enumerate(zip(split.images[:, 0].numpy(), split.labels.tolist(), strict=True)):
        if label in (0, 1, 7):
            folder = root / names[(0, 1, 7).index(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").resize((40, 50)).save(folder / f"{i}.png")


@pytest.mark.parametrize("layout", ["one folder", "train and test"])
def test_a_folder_of_pictures(tmp_path, data, capsys, layout):
    names, root = ["one", "seven", "zero"], tmp_path / "pictures"
    order = ["zero", "one", "seven"]
    train = noprop.Split(*(x[:3000] for x in data.train))
    if layout == "one folder":
        write_pictures(root, train, order)
    else:
        write_pictures(root / "train", train, order)
        write_pictures(root / "test", noprop.Split(*(x[:500] for x in data.test)), order)
    out = tmp_path / "out"
    arguments = ["--dataset=folder", f"--data-root={root}", f"--output-dir={out}"]
    assert noprop.main([*arguments, "--epochs=10", "--batch-size=32", "--num-blocks=2", "--lr=0.005"]) == 0
    accuracy = float(re.search(r"Test accuracy +(\S+)", capsys.readouterr().out)[1])
    assert accuracy > 90
    assert noprop.load(out / "noprop_hybrid.pt").config.classes == tuple(names)
    picture = next((root / ("train" if layout != "one folder" else "") / "seven").glob("*.png"))
    assert noprop.main(["--predict", str(out / "noprop_hybrid.pt"), str(picture)]) == 0
    assert re.match(rf"{picture}: (one|seven|zero)  \(", capsys.readouterr().out)
    assert noprop.main(["--evaluate", str(out / "noprop_hybrid.pt"), f"--data-root={root}"]) == 0
    assert f"Test accuracy {accuracy:.2f}" in capsys.readouterr().out


def test_the_pictures_for_testing_are_not_trained_on_and_stay_when_others_are_added(tmp_path, data):
    names, digits = ["zero", "one", "seven"], noprop.Split(*(x[:1500] for x in data.train))
    write_pictures(tmp_path, digits, names)
    config = noprop.Config(dataset="folder", classes=tuple(sorted(names)), data_root=tmp_path)
    train, test = (
        {image.numpy().tobytes() for image in split.images} for split in noprop.read_folder(tmp_path, config)
    )
    pictures = len(list(tmp_path.glob("*/*.png")))
    assert not train & test and len(train) + len(test) == pictures and 4 < pictures / len(test) < 9
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "one" / "0000.png")
    again = {image.numpy().tobytes() for image in noprop.read_folder(tmp_path, config)[1].images}
    assert test <= again


def test_bad_folders(tmp_path, capsys):
    arguments = ["--dataset=folder", f"--output-dir={tmp_path / 'out'}"]
    fails(capsys, 2, [*arguments, f"--data-root={tmp_path / 'none'}"], "a folder of pictures for each class")
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
    fails(capsys, 2, [*arguments, f"--data-root={tmp_path / 'x'}"], "cannot read the pictures")
    for i in range(20):
        (tmp_path / "x" / "ab"[i % 2] / f"{i}.png").write_text("no picture")
    fails(capsys, 2, [*arguments, f"--data-root={tmp_path / 'x'}"], "cannot read the image", ".png")


def test_mirror_images_where_they_are_as_good(data, monkeypatch):
    """Half of the images are mirrored left to right, where the data set allows it."""
    images = noprop.to_float(data.train.images[:200])
    monkeypatch.setattr(noprop.F, "grid_sample", lambda images, *_, **__: images)
    plain, mirrored = (noprop.augment(images, noprop.generator("a"), flip) for flip in (False, True))
    same = (mirrored == images).flatten(1).all(1)
    other = (mirrored == images.flip(3)).flatten(1).all(1)
    assert torch.equal(plain, images) and (same ^ other).all() and 70 < other.sum() < 130
    assert not noprop.Config().source.flip and noprop.SOURCES["fashion_mnist"].flip
