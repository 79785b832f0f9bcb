"""What the tests share: the script as a module, real MNIST in small slices, and a small trained network."""

import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each of pytest's processes: read when torch is imported

import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from sqlalchemy import Engine, event

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import noprop_example as noprop  # noqa: E402

CPU = torch.device("cpu")
load_all, picture, savefig = noprop.load_data, noprop.picture, Figure.savefig  # whatever a test puts there
TINY = {"epochs": 1, "train_images": 512, "batch_size": 128, "num_blocks": 3}


SLOW = (
    "test_search_workers",
    "test_parallel",
    "test_reliability",
    "test_search",
    "test_datasets",
    "test_parts",
    "test_command_line",
    "test_lab_commands",
    "test_pictures",
    "test_demo",
)
FORKS = multiprocessing.get_context("forkserver")  # imports these once, before the first process
FORKS.set_forkserver_preload(["noprop_lab.__main__", "torch._dynamo", "torchvision", "forked"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are some files, and whatever takes the trained network; others are marked one by one.

    With several workers the slow files come first, so that at the end none waits for another.
    """
    for item in items:
        if item.path.stem in SLOW or "trained" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: [*SLOW, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Ctrl-C is heard, also where a shell has started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@event.listens_for(Engine, "connect")
def unflushed(connection, _) -> None:
    """No test cuts the power: SQLite need not wait for the disk."""
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.Error):  # of what is no database: the code is to find that
            connection.execute("PRAGMA synchronous = OFF")


def undrawn(draw: Callable, path: Path, *arguments) -> int:
    """noprop.picture(), where no test looks at what is drawn."""
    noprop.write_file(path, b"figure")
    return 0


def spare(patch: pytest.MonkeyPatch) -> None:
    """Take away most of a short run's time: MNIST is read once, nothing is drawn or flushed to the disk.

    The repository's MNIST, that is; other folders are read whenever one asks.
    """
    read, ours = noprop.read_mnist, noprop.Options.data_root / "MNIST" / "raw"
    kept = read(ours)

    def again(folder: Path, sums: dict[str, str] = noprop.MD5) -> tuple[noprop.Split, noprop.Split]:
        return kept if (folder, sums) == (ours, noprop.MD5) else read(folder, sums)

    patch.setattr(noprop, "read_mnist", again)
    patch.setattr("noprop_lab.data.read_mnist", again)
    patch.setattr(noprop, "picture", undrawn)
    patch.setattr(Figure, "savefig", lambda figure, file, **how: file.write(b"figure"))
    patch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(autouse=True, scope="session")
def spared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        spare(patch)
        yield


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch) -> None:
    """Pictures are drawn where a test is marked so, and with "saved" laid out and saved too."""
    if mark := request.node.get_closest_marker("draws"):
        monkeypatch.setattr(noprop, "picture", picture)
        if "saved" in mark.args:
            monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch's own threads: one, while the tests of a file run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> noprop.Data:
    return load_all(noprop.Config())


@pytest.fixture(scope="session")
def small_data(data) -> noprop.Data:
    """512 training, 500 validation and 500 test images."""
    sizes = zip(data[:3], (512, 500, 500), strict=True)
    train, val, test = (noprop.Split(x.images[:n], x.labels[:n]) for x, n in sizes)
    return data._replace(train=train, val=val, test=test)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The output folder of a short run of the main command (98.7 %): one for all workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "trained.lock"):
        folder = shared / "trained"
        if not (folder / "done").exists():
            flags = ["--epochs=2", "--num-blocks=3", "--train-images=20000"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(noprop, "picture", picture)
                patch.setattr(Figure, "savefig", savefig)
                assert noprop.main([*flags, "--output-dir", str(folder)]) == 0
            (folder / "done").touch()
    return folder


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """The command line of a run of seconds that writes into tmp_path."""
    names = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [*names, f"--output-dir={tmp_path}"]


def enter(main: Callable, arguments: list[str], output: Path) -> None:
    """What a started process does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup has the tests ignore it
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.exit(main(arguments))


def start(output: Path, arguments: list[str], main: Callable) -> multiprocessing.Process:
    """A command in a process of its own, that prints into a file; without Python's start and its imports."""
    process = FORKS.Process(target=enter, args=(main, arguments, output), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for forked.py alone
        process.start()
    return process


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """A limit on the bytes of a file stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_until(holds: Callable[[], bool], process: multiprocessing.Process | subprocess.Popen) -> None:
    """Wait until something holds, which the process is to bring about before it ends."""
    deadline = time.monotonic() + 300
    ended = process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
    while not holds():
        assert ended() is None and time.monotonic() < deadline
        time.sleep(0.02)


def ended(processes: list[multiprocessing.Process], outputs: list[Path], code: int = 0) -> list[str]:
    """What the processes have printed, after all have ended with that code."""
    for process in processes:
        process.join(300)
    found = [output.read_text() for output in outputs]
    assert [process.exitcode for process in processes] == [code] * len(processes), found
    assert not any("Traceback" in text for text in found), found
    return found


def fails(capsys, code: int, arguments: list[str], *words: str, main=noprop.main) -> None:
    """The command ends with that exit code and a line that holds the words; no traceback."""
    result = main(arguments)
    message = capsys.readouterr().err
    assert result == code, message
    assert "Traceback" not in message and message.count("\n") == 1, message
    for word in words:
        assert word in message, message


def train_tiny(data: noprop.Data, threads: int = 1, **changes) -> noprop.State:
    config = noprop.Config(**TINY | changes)
    state = noprop.State(config)
    for _ in noprop.train(state, data if config.augment else data._replace(augment=None), threads=threads):
        pass
    return state


@pytest.fixture(scope="session")
def tiny_state(small_data) -> noprop.State:
    """After TINY, on one thread; nobody changes it."""
    return train_tiny(small_data)


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
