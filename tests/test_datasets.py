"""Data sets beside MNIST, on small files of the right format; a reader's own pictures, made from MNIST."""

import getpass
import gzip
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, noprop
from laboratory import flags_of, lab, quick_lab, refused, untrained
from PIL import Image

from noprop_lab import data as lab_data
from noprop_lab import parallel
from noprop_lab.networks import load
from noprop_lab.pictures import read_picture
from noprop_lab.settings import SOURCES, LabConfig


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


def small(dataset: str, root, out, *more: str) -> list[str]:
    """The flags of a run of a moment."""
    flags = flags_of(out, batch_size=64, num_blocks=2)
    flags = [x for x in flags if "train-images" not in x]
    return [*flags, "--block=small", f"--dataset={dataset}", f"--data-root={root}", *more]


# --- Files like MNIST's ------------------------------------------------------------------------------------


def idx_files(data: noprop.Data) -> dict[str, bytes]:
    """The four files of 600 and 100 images in MNIST's format, unpacked."""
    files = {}
    for prefix, split, n in (("train", data.train, 600), ("t10k", data.test, 100)):
        for name, values in (("images-idx3", split.images[:n, 0]), ("labels-idx1", split.labels[:n])):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(x.to_bytes(4, "big") for x in values.shape)
            files[f"{prefix}-{name}-ubyte"] = header + values.to(torch.uint8).numpy().tobytes()
    return files


@pytest.fixture
def fashion(data, monkeypatch) -> dict[str, bytes]:
    """Small files in the place of Fashion-MNIST's."""
    files = idx_files(data)
    assert tuple(files) == lab_data.FILES
    sums = tuple(hashlib.md5(content).hexdigest() for content in files.values())
    monkeypatch.setitem(lab_data.MD5, "FashionMNIST", sums)
    return files


FASHION = LabConfig(dataset="fashion_mnist", batch_size=64)


@pytest.mark.parametrize("place", ["FashionMNIST/raw", ""])
@pytest.mark.parametrize("form", ["unpacked", "packed", "packed anew", "both"])
def test_files_in_the_format_of_mnist(tmp_path, data, fashion, place, form):
    """In torchvision's folder or a flat one; packed by whomever: their unpacked bytes are checked."""
    (folder := tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, content in fashion.items():
        if form != "unpacked":
            packed = gzip.compress(content, 9 if form == "packed" else 1, mtime=0 if form == "packed" else 1)
            (folder / f"{name}.gz").write_bytes(packed)
        if form in ("unpacked", "both"):
            (folder / name).write_bytes(content)
    found = lab_data.load_data(FASHION, tmp_path)
    assert [len(x.labels) for x in found[:3]] == [540, 60, 100]
    assert torch.equal(found.test.images, data.test.images[:100])
    assert torch.equal(found.test.labels, data.test.labels[:100])
    pixels = torch.cat([found.train.images, found.val.images]).flatten(1).sort(0).values
    assert torch.equal(pixels, data.train.images[:600].flatten(1).sort(0).values)
    for name in ("t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz"):
        if (victim := folder / name).exists():
            content = fashion["t10k-labels-idx1-ubyte"][:-1] + b"\x0b"  # of a label, to one that there is not
            victim.write_bytes(content if victim.suffix != ".gz" else gzip.compress(content))
    with pytest.raises(noprop.Failure, match="t10k-labels-idx1-ubyte.* is damaged"):
        lab_data.load_data(FASHION, tmp_path)


def test_a_run_on_fashion_mnist(tmp_path, fashion, capsys):
    """Its own block and epochs may be other ones: here and later."""
    for name, content in fashion.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    flags = small("fashion_mnist", tmp_path, out := tmp_path / "out")
    assert lab.main(["train", *flags]) == 0
    output = capsys.readouterr().out
    assert "540 images" in output and "(± for 100 images)" in output
    accuracy = re.search(r"Test accuracy +(\S+)", output)[1]
    path, root = out / "noprop_hybrid.pt", f"--data-root={tmp_path}"
    assert lab.main(["evaluate", str(path), root]) == 0
    assert f"Test accuracy {accuracy} ±" in capsys.readouterr().out
    assert lab.main(["train", "--resume", f"--output-dir={out}", "--epochs=2", root]) == 0
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    refused(capsys, 2, ["train", *flags], "train-labels-idx1-ubyte.gz", "Not a gzipped file")


def test_all_images_are_those_to_train_and_to_choose_by_and_nothing_is_chosen(tmp_path, data, capsys):
    few = LabConfig(all_images=True, select="last", train_images=400)  # a batch may hold more than these
    assert len(lab_data.load_data(few, noprop.Options.data_root).train.labels) == 5400
    whole = lab_data.load_data(LabConfig(all_images=True, select="last"), noprop.Options.data_root)
    assert len(whole.train.labels) == 60_000 and torch.equal(whole.test.images, data.test.images)
    for mine, (kept, held_out) in zip(whole.train, zip(data.train, data.val, strict=True), strict=True):
        assert torch.equal(mine[:55_000], kept) and torch.equal(mine[55_000:], held_out)
    flags = flags_of(tmp_path, "--all-images", "--select=last", num_blocks=2, train_images=256)
    assert lab.main(["train", *flags]) == 0 and "validation nan %" in capsys.readouterr().out
    assert load(tmp_path / "noprop_hybrid.pt").config.all_images


def test_kmnist_is_checked_by_its_packed_files(tmp_path, data, monkeypatch, capsys):
    from torchvision import datasets

    (folder := tmp_path / "KMNIST" / "raw").mkdir(parents=True)
    sums = []
    for name, content in idx_files(data).items():
        (folder / f"{name}.gz").write_bytes(packed := gzip.compress(content))
        sums.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.KMNIST, "resources", sums)
    flags = small("kmnist", tmp_path, tmp_path / "out")
    found = lab_data.load_data(LabConfig(dataset="kmnist", batch_size=64), tmp_path)
    assert [len(x.labels) for x in found[:3]] == [540, 60, 100] and found.augment is noprop.augment
    victim = folder / "train-labels-idx1-ubyte.gz"
    victim.with_suffix("").write_bytes(gzip.decompress(victim.read_bytes()))
    for damage in (lambda: victim.write_bytes(b"damaged"), victim.unlink):
        damage()
        refused(capsys, 2, ["train", *flags], "train-labels-idx1-ubyte.gz is missing or damaged")


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist", "cifar10", "cifar100"])
def test_a_data_set_that_is_absent_and_offline_tells_where_to_put_it(tmp_path, capsys, monkeypatch, dataset):
    import urllib.request

    def offline(*_, **__):
        raise OSError("no\n network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    files = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    file = files.get(dataset, "train-images-idx3-ubyte.gz")
    words = "can't be downloaded", "no network", file, "see --data-root"
    refused(capsys, 2, ["train", *small(dataset, tmp_path, tmp_path / "out")], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 12345"), OSError("no user name")])
def test_a_user_without_a_name_is_a_number(monkeypatch, error):
    """As in a container that runs under the number of somebody outside."""

    def nobody():
        raise error

    assert lab_data.user() == getpass.getuser()
    monkeypatch.setattr(getpass, "getuser", nobody)
    assert lab_data.user() == str(os.getuid())


# --- Colour ------------------------------------------------------------------------------------------------


@pytest.mark.draws
@pytest.mark.parametrize(
    ("dataset", "name", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")]
)
def test_cifar(tmp_path, monkeypatch, capsys, dataset, name, key):
    from torchvision import datasets

    source, rng, written = getattr(datasets, name), np.random.default_rng(0), {}
    folder, classes = tmp_path / source.base_folder, SOURCES[dataset].classes
    folder.mkdir()

    def write(file: str, images: int) -> list[str]:
        labels = [i % classes for i in range(images)]
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        written[file] = torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(labels)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: labels}))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    monkeypatch.setattr(source, "train_list", [write("train", 400)])
    monkeypatch.setattr(source, "test_list", [write("test", 100)])
    names = {source.meta["key"]: list(map(str, range(classes)))}
    (folder / source.meta["filename"]).write_bytes(content := pickle.dumps(names))
    monkeypatch.setattr(source, "meta", source.meta | {"md5": hashlib.md5(content).hexdigest()})
    found = lab_data.load_data(LabConfig(dataset=dataset, batch_size=64), tmp_path)
    assert [len(x.labels) for x in found[:3]] == [360, 40, 100]
    assert all(map(torch.equal, found.test, written["test"]))
    assert lab.main(["train", *small(dataset, tmp_path, tmp_path / "out")]) == 0
    path = str(tmp_path / "out" / "noprop_hybrid.pt")
    model = load(path)
    assert model.image_shape == (3, 32, 32) and model.classifier.out_features == classes
    assert lab.main(["evaluate", path, f"--data-root={tmp_path}"]) == 0
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert lab.main(["predict", path, str(tmp_path / "red.png")]) == 0
    assert re.match(r".*red.png: \d+  \(", capsys.readouterr().out)


def test_pictures_of_a_data_set_in_colour_keep_it(tmp_path):
    """Cropped to the middle and scaled, channels first, upright, on white; grey where the data set is."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 10:50] = (250, 10, 60)
    pixels[20:, 10:50, 1] = 200  # green in the lower half
    Image.fromarray(pixels).save(path := tmp_path / "wide.png")
    cifar, folder = (
        LabConfig(dataset="cifar10"),
        LabConfig(dataset="folder", classes=("a", "b"), image_size=40),
    )
    for config, size in ((cifar, 32), (folder, 40)):
        image = read_picture(path, config)
        assert image.dtype == torch.uint8 and image.shape == (3, size, size)
        near = (image.int() - torch.tensor([250, 10, 60]).view(3, 1, 1)).abs() < 15  # of the interpolation
        assert near[0].all() and near[2].all()  # nothing of the black sides
        assert near[1, : size // 2 - 2].all() and (image[1, size // 2 + 2 :] > 180).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(path := tmp_path / "turned.png", exif=exif)
    assert (read_picture(path, cifar)[1, :14] > 180).all()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(path := tmp_path / "clear.png")
    assert (read_picture(path, cifar) == 255).all()
    fashion = read_picture(tmp_path / "wide.png", LabConfig(dataset="fashion_mnist"))
    assert fashion.shape == (1, 28, 28) and len(fashion.unique()) >= 2
    Image.fromarray(np.full((50, 50), 130, np.uint8)).save(path := tmp_path / "grey.png")
    assert (read_picture(path, cifar) == 130).all()


def test_pictures_of_a_grey_data_set_of_ones_own_become_grey(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "kmnist", SOURCES["kmnist"]._replace(shape=(1, 40, 32)))
    Image.new("RGB", (64, 80), (0, 255, 0)).save(path := tmp_path / "green.png")
    image = read_picture(path, LabConfig(dataset="kmnist"))
    assert image.shape == (1, 40, 32) and (image == 150).all()  # of green, as ITU-R 601 has it


# --- Folders of pictures -----------------------------------------------------------------------------------


def write_pictures(root, split: noprop.Split, names: list[str], images: int) -> None:
    """The first pictures of the digits 0, 1 and 7, each in the folder of its class."""
    split = noprop.Split(*(x[:images] for x in split))
    for i, (image, label) in enumerate(zip(split.images[:, 0].numpy(), split.labels.tolist(), strict=True)):
        if label in (0, 1, 7):
            folder = root / names[(0, 1, 7).index(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").resize((40, 50)).save(folder / f"{i}.png")


ORDER = ["zero", "one", "seven"]


def test_a_folder_of_pictures(tmp_path, data, capsys, monkeypatch):
    root, out = tmp_path / "pictures", tmp_path / "out"
    write_pictures(root / "train", data.train, ORDER, 2000)
    write_pictures(root / "test", data.test, ORDER, 400)
    flags = small("folder", root, out, "--image-size=28")
    assert lab.main(["train", *flags, "--epochs=10", "--batch-size=32", "--lr=0.005"]) == 0
    accuracy = float(re.search(r"Test accuracy +(\S+)", capsys.readouterr().out)[1])
    assert accuracy > 85
    path = out / "noprop_hybrid.pt"
    assert load(path).config.classes == ("one", "seven", "zero")
    assert lab.main(["evaluate", str(path), f"--data-root={root}"]) == 0
    assert f"Test accuracy {accuracy:.2f}" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for own in ("one", "seven"):
        pictures = sorted((root / "train" / own).glob("*.png"))[:20]
        assert lab.main(["predict", str(path), *map(str, pictures)]) == 0  # and does not need the folder
        answers = re.findall(r"png: (\w+)  \(", capsys.readouterr().out)
        assert len(answers) == 20 and answers.count(own) > 12


def test_a_folder_to_which_something_was_added_is_not_gone_on_with(tmp_path, data, capsys):
    root, out = tmp_path / "pictures", tmp_path / "out"
    write_pictures(root, data.train, ORDER, 900)
    assert lab.main(["train", *small("folder", root, out)]) == 0
    resume = ["train", "--resume", f"--output-dir={out}", f"--data-root={root}"]
    assert lab.main([*resume, "--epochs=2"]) == 0
    Image.new("RGB", (40, 50), "blue").save(added := root / "one" / "added.png")
    refused(capsys, 2, resume, "the images are not those that", "noprop_hybrid.pt was trained on")
    added.unlink()
    (root / "two").mkdir()
    Image.new("RGB", (40, 50), "blue").save(root / "two" / "added.png")
    refused(capsys, 2, resume, "has the classes one seven zero", "one seven two zero", "--classes one seven")
    assert lab.main([*resume, "--classes", "one", "seven", "zero"]) == 0
    refused(capsys, 2, [*resume, "--classes", "one", "two"], "--classes ('one', 'two') contradicts")


def test_some_of_the_classes(tmp_path, data):
    write_pictures(tmp_path, data.train, ORDER, 900)
    flags = small("folder", tmp_path, tmp_path / "out", "--classes", "zero", "one")
    assert lab.main(["train", *flags]) == 0
    assert load(path := tmp_path / "out" / "noprop_hybrid.pt").config.classes == ("zero", "one")
    assert lab.main(["train", *flags, "--resume"]) == 0
    assert lab.main(["evaluate", str(path), f"--data-root={tmp_path}"]) == 0


def test_the_pictures_for_testing_are_not_trained_on_and_stay_when_others_are_added(tmp_path, data):
    write_pictures(tmp_path, data.train, ORDER, 1500)
    config = LabConfig(dataset="folder", classes=tuple(sorted(ORDER)))

    def read() -> list[set[bytes]]:
        splits = lab_data.read_folder(tmp_path, config)
        return [{image.numpy().tobytes() for image in split.images} for split in splits]

    train, test = read()
    pictures = len(list(tmp_path.glob("*/*.png")))
    assert not train & test and len(train) + len(test) == pictures and 4 < pictures / len(test) < 9
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "one" / "0000.png")
    assert test <= read()[1]


def test_a_network_is_evaluated_on_fewer_pictures_than_a_batch(tmp_path, data):
    write_pictures(tmp_path / "few", data.train, ORDER, 300)
    config = LabConfig(dataset="folder", classes=tuple(sorted(ORDER)), num_blocks=1)
    path = untrained(tmp_path / "run", config)
    assert lab.main(["evaluate", str(path), f"--data-root={tmp_path / 'few'}"]) == 0


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--mirror", "--no-augment"], "mirror is part of the augmentation"),
        (["--classes", "one"], "classes must be two at least"),
    ],
)
def test_what_would_say_nothing_is_refused(more, word, tmp_path, data, capsys):
    write_pictures(tmp_path / "a", data.train, ORDER, 100)
    refused(capsys, 2, ["train", *small("folder", tmp_path / "a", tmp_path), *more], word)


def test_bad_folders(tmp_path, capsys):
    flags = ["train", "--dataset=folder", f"--output-dir={tmp_path / 'out'}"]
    refused(capsys, 2, [*flags, f"--data-root={tmp_path / 'none'}"], "a folder of pictures for each class")
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
    root = f"--data-root={tmp_path / 'x'}"
    refused(capsys, 2, [*flags, root], "it has none of class a")
    for i in range(99):
        (tmp_path / "x" / "ab"[i % 2] / f"{i}.png").write_text("no picture")
    refused(capsys, 2, [*flags, root], "cannot read the image", ".png")
    refused(capsys, 2, [*flags, root, "--classes", "a", "c"], "it has none of class c")
    for path in (tmp_path / "x").glob("*/[1-9]?.png"):
        path.unlink()
    refused(capsys, 2, [*flags, root], "has too few pictures")


def blue_and_red(root, names=("blue", "red"), images: int = 80) -> None:
    """Pictures of one colour a class."""
    for name, colour in zip(names, ("blue", "red", "green"), strict=False):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            Image.new("RGB", (30, 30), colour).save(root / name / f"{i}.png")


@pytest.mark.parametrize(
    ("train", "test"),
    [("training", "testing"), ("Train", "Test"), ("train", "valid"), ("TRAIN", "validation")],
)
def test_names_of_split_folders(tmp_path, capsys, train, test):
    blue_and_red(tmp_path / train, images=20)
    blue_and_red(tmp_path / test, images=7)
    assert lab_data.class_folders(tmp_path) == ("blue", "red")
    found = lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
    assert [len(x.labels) for x in found] == [40, 14]
    assert capsys.readouterr().out == "Pictures to train + test on: blue 20 + 7, red 20 + 7\n"
    with pytest.raises(noprop.Failure, match="no classes are named"):
        lab_data.read_folder(tmp_path, LabConfig(dataset="folder"))


def test_only_torchruns_other_processes_do_not_tell_of_pictures(tmp_path, capsys, monkeypatch):
    blue_and_red(tmp_path, images=40)
    monkeypatch.setenv("RANK", "1")  # of another launcher
    for launched, told in ((False, True), (True, False)):
        if launched:
            monkeypatch.setattr(parallel, "rank_and_size", lambda: (1, 2))
        lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
        assert bool(capsys.readouterr().out) == told


@pytest.mark.parametrize("layout", ["", "train"])
def test_a_path_is_no_class(layout, tmp_path, capsys):
    """Which would be of pictures anywhere: of those to train on for those to test on."""
    for part in {layout, layout and "test"}:
        blue_and_red(tmp_path / part, images=20)
    flags = ["train", "--dataset=folder", f"--data-root={tmp_path}", f"--output-dir={tmp_path / 'out'}"]
    for name in (tmp_path / layout / "blue", "../train/blue", "."):
        refused(capsys, 2, [*flags, "--classes", str(name), "red"], "it has none of class", "--data-root")
    for name in (5, ["blue"], {}):
        (tmp_path / "some.json").write_text(json.dumps({"dataset": "folder", "classes": ["red", name]}))
        refused(capsys, 2, [*flags, f"--config={tmp_path / 'some.json'}"], f"classes can't be ('red', {name}")


def test_of_two_test_folders_one_is_taken_by_its_name(tmp_path):
    for name, images in (("train", 20), ("val", 7), ("test", 8)):
        blue_and_red(tmp_path / name, images=images)
    found = lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
    assert [len(x.labels) for x in found] == [40, 16]


def test_pictures_are_found_in_folders_of_a_class_behind_links_and_in_capital_letters(tmp_path):
    for place in ("cats/a/b", "elsewhere", "dogs"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / place / "1.JPG", "JPEG")
    (tmp_path / "cats" / "more").symlink_to(tmp_path / "elsewhere")
    found = lab_data.find_pictures(tmp_path, ("cats", "dogs"), skipped := [])
    names = [(str(path.relative_to(tmp_path)), label) for path, label in found]
    assert names == [("cats/a/b/1.JPG", 0), ("cats/more/1.JPG", 0), ("dogs/1.JPG", 1)] and not skipped


def test_a_test_folder_without_classes_is_passed_over(tmp_path, capsys):
    """As in competitions, whose pictures to test on have no labels."""
    blue_and_red(tmp_path / "train", images=20)
    blue_and_red(tmp_path / "val", images=7)
    (tmp_path / "test").mkdir()
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "test" / "1.png")
    found = lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
    assert [len(x.labels) for x in found] == [40, 14] and "Skipped: test" in capsys.readouterr().out


def test_what_is_of_no_class_is_named(tmp_path, capsys):
    """Pictures beside the classes, and in the test folder a class that is not trained on."""
    blue_and_red(tmp_path / "train", images=20)
    blue_and_red(tmp_path / "test", ("blue", "red", "zebra"), images=7)
    for place in (tmp_path, tmp_path / "train"):
        Image.new("RGB", (30, 30)).save(place / "loose.png")
    lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
    skipped = "Skipped: loose.png, train/loose.png, test/zebra\n"
    assert capsys.readouterr().out.endswith(skipped)


def test_splits_of_one_class_are_no_classes(tmp_path):
    for name in ("train", "test"):
        blue_and_red(tmp_path / name, ("blue",))
    with pytest.raises(noprop.Failure, match="for each class, two at least"):
        lab_data.class_folders(tmp_path)
    flags = ["--dataset=folder", f"--data-root={tmp_path}", "--classes", "train", "test"]
    assert lab.read_command_line("train", flags)[0].classes == ("train", "test")  # but where they are named


def test_a_folder_that_is_not_there_or_can_not_be_read_is_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = untrained(tmp_path, LabConfig(num_blocks=2, dataset="folder", classes=("a", "b")))
    refused(capsys, 2, ["evaluate", str(path), "--data-root=typo"], "cannot read --data-root typo: No such")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lab_data, "subfolders", forbidden)
    refused(capsys, 2, ["train", "--dataset=folder", "--data-root=typo"], "Permission denied")


def test_a_damaged_file_in_a_folder_without_a_parent(tmp_path, fashion, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fm").mkdir()
    for name, content in fashion.items():
        (Path("fm") / f"{name}.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(noprop.Failure, match="cannot read fm/.*; see --data-root"):
        lab_data.load_data(FASHION, Path("fm"))


def test_a_link_to_a_folder_above_adds_no_picture_and_a_hidden_one_is_not_entered(
    tmp_path, data, monkeypatch
):
    write_pictures(tmp_path, data.train, ORDER, 200)
    before = lab_data.find_pictures(tmp_path, tuple(ORDER), [])
    (tmp_path / "one" / "again").symlink_to(".")
    (tmp_path / "zero" / "all").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "one" / "out").symlink_to(tmp_path / "elsewhere")  # two, each of which leads to the other
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "one")
    (tmp_path / "one" / ".Trash-0").mkdir()
    scandir = os.scandir

    def guarded(path="."):
        if Path(path).name == ".Trash-0":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert lab_data.find_pictures(tmp_path, tuple(ORDER), skipped := []) == before
    assert [x.name for x in skipped] == [".Trash-0"]


def test_a_class_may_be_named_train(tmp_path, capsys):
    blue_and_red(tmp_path, ("bus", "car", "train"))
    assert lab_data.class_folders(tmp_path) == ("bus", "car", "train")
    config = LabConfig(dataset="folder", classes=("bus", "car", "train"))
    assert sum(len(x.labels) for x in lab_data.read_folder(tmp_path, config)) == 240
    line = capsys.readouterr().out
    counts = re.findall(r"(bus|car|train) (\d+) \+ (\d+)", line)
    assert [name for name, *_ in counts] == ["bus", "car", "train"] and "Skipped" not in line
    assert all(int(a) + int(b) == 80 for _, a, b in counts)


def test_what_programs_leave_among_pictures_is_skipped_and_said(tmp_path, capsys):
    blue_and_red(tmp_path / "train")
    blue_and_red(tmp_path / "test", images=8)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        blue_and_red(tmp_path / name)
        (tmp_path / "train" / name).mkdir()
    blue_and_red(tmp_path / "train" / "blue" / ".ipynb_checkpoints")
    (tmp_path / "val").mkdir()
    for name in ("._0.png", ".DS_Store", "notes.txt"):
        (tmp_path / "train" / "red" / name).write_text("no picture")
    assert lab_data.class_folders(tmp_path) == ("blue", "red")
    found = lab_data.read_folder(tmp_path, LabConfig(dataset="folder", classes=("blue", "red")))
    assert [len(x.labels) for x in found] == [160, 16]
    counts, skipped = capsys.readouterr().out.splitlines()
    assert counts.endswith("blue 80 + 8, red 80 + 8")
    assert skipped.startswith("Skipped: ") and "__MACOSX" in skipped and skipped.endswith("and 4 more")


def test_a_folder_is_mirrored_only_if_asked_for(tmp_path, capsys):
    blue_and_red(tmp_path)
    plain = LabConfig(dataset="folder", classes=("blue", "red"), batch_size=8)
    asked = LabConfig(dataset="folder", classes=("blue", "red"), batch_size=8, mirror=True)
    assert lab_data.load_data(plain, tmp_path).augment is noprop.augment
    assert lab_data.load_data(asked, tmp_path).augment is lab_data.augment_or_mirror
    assert "mirror" not in plain.saved() and asked.saved()["mirror"]
    refused(capsys, 2, ["train", "--mirror"], "mirror is of dataset folder")


def test_mirror_images_where_they_are_as_good(data, monkeypatch, fashion, tmp_path):
    """Half of the images are mirrored left to right, where the data set allows it."""
    images = noprop.to_float(data.train.images[:200])
    monkeypatch.setattr(noprop.F, "grid_sample", lambda images, *_, **__: images)
    plain, mirrored = (
        how(images, noprop.generator("a")) for how in (noprop.augment, lab_data.augment_or_mirror)
    )
    same = (mirrored == images).flatten(1).all(1)
    other = (mirrored == images.flip(3)).flatten(1).all(1)
    assert torch.equal(plain, images) and (same ^ other).all() and 70 < other.sum() < 130
    for name, content in fashion.items():
        (tmp_path / name).write_bytes(content)
    assert lab_data.load_data(FASHION, tmp_path, CPU).augment is lab_data.augment_or_mirror
    off = LabConfig(dataset="fashion_mnist", batch_size=64, augment=False)
    assert lab_data.load_data(off, tmp_path).augment is None
    assert not SOURCES["mnist"].flip and not SOURCES["kmnist"].flip and SOURCES["cifar10"].flip
