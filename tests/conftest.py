"""What the tests share: the script as a module, real MNIST in small slices, and a small trained network."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import noprop_example as noprop  # noqa: E402

CPU = torch.device("cpu")
TINY = {"epochs": 1, "train_images": 512, "batch_size": 128, "num_blocks": 3}


SLOW = ("test_parallel", "test_parts", "test_reliability", "test_search", "test_search_workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are some files, and whatever takes the trained network; others are marked by themselves."""
    for item in items:
        if item.path.stem in SLOW or "trained" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Ctrl-C is heard, also where a shell has started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch's own threads: one, while the tests of a file run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> noprop.Data:
    return noprop.load_data(noprop.Config())


@pytest.fixture(scope="session")
def small_data(data) -> noprop.Data:
    """512 training, 500 validation and 500 test images."""
    sizes = zip(data[:3], (512, 500, 500), strict=True)
    train, val, test = (noprop.Split(x.images[:n], x.labels[:n]) for x, n in sizes)
    return data._replace(train=train, val=val, test=test)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The output folder of one epoch of the main command, default blocks, all images: one for all workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "trained.lock"):
        folder = shared / "trained"
        if not (folder / "done").exists():
            assert noprop.main(["--epochs", "1", "--output-dir", str(folder)]) == 0
            (folder / "done").touch()
    return folder


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """The command line of a run of seconds that writes into tmp_path."""
    names = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [*names, f"--output-dir={tmp_path}"]


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


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
