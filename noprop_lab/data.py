"""Data sets beside MNIST: those of torchvision, and folders of pictures."""

from __future__ import annotations

import getpass
import gzip
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

import noprop_example
from noprop_example import CPU, Data, Failure, Split, augment, read_mnist, say, send, split_data
from noprop_lab import parallel
from noprop_lab.cascade import several_views
from noprop_lab.pictures import read_picture
from noprop_lab.settings import LabConfig

MD5 = {  # of the unpacked files, in the order of noprop_example.MD5; KMNIST's are those of its packed files
    "FashionMNIST": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    )
}
FILES = tuple(noprop_example.MD5)


def load_data(config: LabConfig, root: Path, device: torch.device = CPU) -> Data:
    """The three splits of the config's data set. Raises Failure."""
    name = config.source.name
    with reading(root):
        if config.dataset == "folder":
            train, test = read_folder(root, config)
        elif "cifar" in config.dataset:
            train, test = read_cifar(root, name)
        else:
            train, test = read_mnist(root / name / "raw") if name == "MNIST" else read_like_mnist(root, name)
    data = split_data(train, test, replace(config, batch_size=2) if config.all_images else config, device)
    if config.all_images:  # a batch may be of these
        data = data._replace(train=Split(*(torch.cat(x) for x in zip(data.train, data.val, strict=True))))
    return with_augmentation(data, config)


@contextmanager
def reading(root: Path) -> Iterator[None]:
    """Turn what a folder raises that is not there, or is another user's, into a Failure."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot read --data-root {root}: {Failure(error)}") from error


def with_augmentation(data: Data, config: LabConfig) -> Data:
    """The same images, augmented as that config has it."""
    how = augment_or_mirror if config.source.flip else augment
    how = partial(several_views, how, config.views) if config.views > 1 else how
    return data._replace(augment=how if config.augment else None)


def augment_or_mirror(images: Tensor, noise: torch.Generator) -> Tensor:
    """augment(), and half of the images mirrored left to right."""
    mirrored = send(torch.rand(len(images), 1, 1, 1, generator=noise), images.device) < 0.5
    return augment(torch.where(mirrored, images.flip(3), images), noise)


def read_like_mnist(root: Path, name: str) -> tuple[Split, Split]:
    """A set in MNIST's format, in root itself or in root/NAME/raw, packed or not. Raises Failure."""
    folder = root / name / "raw"
    for place in (folder, root):
        if all((place / file).exists() or (place / f"{file}.gz").exists() for file in FILES):
            folder = place
            break
    else:
        files = ", ".join(f"{file}.gz" for file in FILES)
        download(name, root, f"put {files} into {folder}")
    sums = MD5.get(name) or known_when_packed(name, folder)
    return read_mnist(folder, dict(zip(FILES, sums, strict=True)))


def known_when_packed(name: str, folder: Path) -> list[str]:
    """Of a set whose unpacked md5 is not known: from the packed files, which torchvision knows.

    An unpacked file, or one that was packed anew, can't be checked, and is refused: Failure.
    """
    from torchvision import datasets

    known, sums = dict(getattr(datasets, name).resources), []
    for file in FILES:
        path = folder / f"{file}.gz"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != known[path.name]:
            raise Failure(f"{path} is missing or damaged: put the packed file of the {name} authors there")
        sums.append(hashlib.md5(gzip.decompress(content), usedforsecurity=False).hexdigest())
    return sums


def user() -> str:
    """Who runs this: a name, or a number where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def download(name: str, root: Path, otherwise: str) -> list:
    """Training and test set as torchvision has them, downloaded if need be. Raises Failure."""
    from torchvision import datasets

    try:
        with FileLock(Path(tempfile.gettempdir()) / f"noprop_{name}_{user()}.lock"):  # others wait
            return [getattr(datasets, name)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())  # torchvision's reasons stand in lines of their own
        bad = f"{root} has no good {name}, which can't be downloaded ({why or repr(error)})"
        raise Failure(f"{bad}: {otherwise}, or see --data-root") from error


def read_cifar(root: Path, name: str) -> tuple[Split, Split]:
    """Training and test images of CIFAR-10 or CIFAR-100. Raises Failure."""
    archive = "cifar-10-python.tar.gz" if name == "CIFAR10" else "cifar-100-python.tar.gz"
    sets = download(name, root, f"put {archive} there")
    return tuple(
        Split(torch.from_numpy(x.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(x.targets))
        for x in sets
    )


# --- Folders of pictures -----------------------------------------------------------------------------------

TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # by preference


def hidden(name: str) -> bool:
    """What programs leave among pictures: .ipynb_checkpoints, ._a.png, __MACOSX, ..."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path) -> dict[str, Path]:
    """By name, without the hidden ones."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in found if path.is_dir() and not hidden(path.name)}


def layout(root: Path) -> tuple[Path, Path | None]:
    """The folders that hold the classes to train and to test on; None: a part of the former is for testing.

    A subfolder train is a split's if it holds folders, two at least; else it is a class, as bus and car.
    """
    folders = {name.lower(): path for name, path in reversed(subfolders(root).items())}
    train = next((folders[x] for x in TRAIN if x in folders and len(subfolders(folders[x])) > 1), None)
    if train is None:
        return root, None
    return train, next((folders[x] for x in TEST if x in folders and subfolders(folders[x])), None)


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the classes of a folder of pictures: its subfolders, or those of its subfolder train."""
    with reading(root):
        names = tuple(subfolders(layout(root)[0]))
    if len(names) < 2 or {x.lower() for x in names} <= {*TRAIN, *TEST}:  # splits, of one class
        raise Failure(f"--data-root {root} must hold a folder of pictures for each class, two at least")
    return names


def refuse(error: OSError) -> None:
    """A folder that can't be read is no empty one."""
    raise Failure(f"cannot read the pictures in {error.filename}: {Failure(error)}") from error


def walked(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk() through links, but into no hidden folder, and into none that it is inside of."""
    above = {os.fspath(top): ()}  # of a folder that is to come: the real ones that lead to it
    for place, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        yield place, folders.copy(), files
        inside = *above.pop(place), Path(os.path.realpath(place))
        real = {x: os.path.realpath(os.path.join(place, x)) for x in folders if not hidden(x)}
        folders[:] = [name for name, path in real.items() if not any(x.is_relative_to(path) for x in inside)]
        above |= {os.path.join(place, name): inside for name in folders}


def find_pictures(folder: Path, classes: tuple[str, ...], skipped: list[Path]) -> list[tuple[Path, int]]:
    """Picture files and their labels, in order; what else there is is added to skipped. Raises Failure."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, there = [], subfolders(folder)
    for label, name in enumerate(classes):
        before = len(found)
        for place, folders, files in sorted(walked(folder / name)) if name in there else ():
            paths = [Path(place, x) for x in sorted(files)]
            good = dict.fromkeys(
                x for x in paths if x.suffix.lower() in IMG_EXTENSIONS and not hidden(x.name)
            )
            found += [(x, label) for x in good]
            skipped += [x for x in paths if x not in good] + [Path(place, x) for x in folders if hidden(x)]
        if len(found) == before:
            raise Failure(f"no pictures in {folder}: it has none of class {name}, see --data-root")
    return found


def read_folder(root: Path, config: LabConfig) -> tuple[Split, Split]:
    """Pictures in root/CLASS, or in root/train/CLASS and root/test/CLASS, see layout(). Raises Failure.

    Where there is no test folder, a picture is for testing if the hash of its name says so, which is true of
    a sixth: so it stays one when others are added. Prints classes, counts, and what was skipped.
    """
    if not config.classes:
        raise Failure("no classes are named: class_folders(root) finds all")
    train, test = layout(root)
    skipped = []
    for place in dict.fromkeys(x for x in (root, train, test) if x):
        used = [train, test] if place == root != train else subfolders(train).values()
        used = {x.name for x in used if x}  # classes not asked for are no mistake
        skipped += [x for x in sorted(place.iterdir()) if x.name not in used]

    def for_testing(path: Path) -> bool:
        name = path.relative_to(train).as_posix()
        return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=4).digest()[0] % 6 == 0

    pictures = find_pictures(train, config.classes, skipped)
    if test:
        parts = pictures, find_pictures(test, config.classes, skipped)
    else:
        parts = [[x for x in pictures if for_testing(x[0]) == wanted] for wanted in (False, True)]
    for place, part, use in zip((train, test or train), parts, ("train", "test"), strict=True):
        if len(part) < 10:
            raise Failure(f"{place} has too few pictures to {use} on: {len(part)} of at least 10")
    if parallel.rank_and_size()[0] == 0:
        tell_pictures(config.classes, [[label for _, label in part] for part in parts], skipped, root)
    return tuple(
        Split(
            torch.stack([read_picture(path, config) for path, _ in part]), torch.tensor([x for _, x in part])
        )
        for part in parts
    )


def tell_pictures(classes: tuple[str, ...], labels: list[list[int]], skipped: list[Path], root: Path) -> None:
    """Print how many pictures of each class there are, and what was left out."""
    counts = [f"{name} {labels[0].count(i)} + {labels[1].count(i)}" for i, name in enumerate(classes)]
    say(f"Pictures to train + test on: {', '.join(counts)}")
    if skipped:
        names = [x.relative_to(root).as_posix() for x in skipped]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        say(f"Skipped: {', '.join(names[:5])}{more}")
