"""Blocks split over processes are the blocks of one run."""

import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, ended, noprop, start, wait_until
from laboratory import contents, equal, flags_of, lab, quick_lab, refused
from torch.utils._pytree import tree_leaves

from noprop_lab import parallel
from noprop_lab.settings import LabConfig


@pytest.fixture(autouse=True, scope="module")
def quick():
    with quick_lab():
        yield


def member(rank: int, size: int, port: int, arguments: list[str]) -> int:
    """One of several processes, with the environment that torchrun gives it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, size, size, "localhost", port)
    os.environ |= dict(zip(names, map(str, values), strict=True)) | {"TORCHELASTIC_RUN_ID": "test"}
    with quick_lab():
        return lab.main(["train", "--threads=1", *arguments])


def several(size: int, output: Path, flags: list[str]) -> list[multiprocessing.Process]:
    """Processes that share a run and print into one file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(output, flags, partial(member, rank, size, port)) for rank in range(size)]


def finished(size: int, output: Path, flags: list[str]) -> str:
    return ended(several(size, output, flags), [output])[0]


def checkpoint(folder: Path) -> dict:
    return contents(folder / "noprop_hybrid.pt")


def test_a_weight_is_sent_once(monkeypatch):
    """Weights are views of one vector, of which pickle would write all for each of them."""

    def gathered(call, sent, received) -> None:
        received[0] = sent

    def bytes_of(content) -> tuple[int, int]:
        numbers = [x for x in tree_leaves(content) if isinstance(x, torch.Tensor)]
        return len(pickle.dumps(content)), sum(x.numel() * x.element_size() for x in numbers)

    sent = []
    monkeypatch.setattr(parallel, "collective", lambda call, *x: sent.append(x[0]) or gathered(call, *x))
    state = parallel.SharedState(LabConfig(num_blocks=2))
    state.gather()
    monkeypatch.setattr(parallel, "collective", lambda *_: None)
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    parts = {name: state.part_state(name) for name in state.parts}  # as in a checkpoint that is read
    for content in (sent[0], parallel.on_first(lambda: parts)):
        pickled, numbers = bytes_of(content)
        assert numbers > 800_000 and pickled < 1.1 * numbers


FIXED, RUN = "--embedding=fixed", {"train_images": 400, "batch_size": 32, "epochs": 6}  # of 72 steps


@pytest.fixture(scope="module")
def alone(quick, tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert lab.main(["train", *flags_of(folder, FIXED, "--threads=1", **RUN)]) == 0
    return folder


def test_two_processes_train_the_same_network_as_one(tmp_path, alone):
    often = "--checkpoint-minutes=0.0001"  # in the midst of the epoch too
    output = finished(2, tmp_path / "output", flags_of(tmp_path / "run", FIXED, often, **RUN))
    assert equal(checkpoint(alone), checkpoint(tmp_path / "run"))
    assert len(re.findall("Test accuracy", output)) == len(re.findall("epoch   1/6", output)) == 1
    assert {x.name for x in alone.iterdir()} == {x.name for x in (tmp_path / "run").iterdir()}


def test_a_learned_embedding_is_the_same_up_to_rounding(tmp_path):
    """Sums are made in another order."""
    assert lab.main(["train", *flags_of(tmp_path / "one", "--threads=1")]) == 0
    finished(2, tmp_path / "output", flags_of(tmp_path / "two"))
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)


def test_ctrl_c_stops_a_run_of_torchrun(tmp_path):
    """All its processes, in the midst of an epoch."""
    more = {"train_images": 50_000, "batch_size": 32, "num_blocks": 2}  # of 1,562 steps
    often = "--checkpoint-minutes=0.0001"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.Popen(
        [
            sys.executable,
            *launcher,
            "-m",
            "noprop_lab",
            "train",
            "--threads=1",
            *flags_of(tmp_path, often, **more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a process group of its own, as at a terminal
    )
    wait_until((tmp_path / "noprop_hybrid.pt").exists, run)
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.1)
    for worker in found.stdout.split():  # torchrun too sends its processes a second one
        with suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGINT)
    output = run.communicate(timeout=300)[0]
    assert run.returncode != 0 and "Test accuracy" in output, output
    assert output.count("Stopped after step") == 1
    assert checkpoint(tmp_path)["training"]["step"] < 1562


def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    """Of two processes one gets Ctrl-C in the midst of an epoch; three go on to the same end as one."""
    output = tmp_path / "output"
    processes = several(2, output, flags_of(tmp_path / "run", FIXED, **RUN))
    wait_until(lambda: output.exists() and "epoch   1/6" in output.read_text(), processes[0])
    os.kill(processes[1].pid, signal.SIGINT)
    for process in processes:
        process.join(300)
    assert output.read_text().count("Stopped after step") == 1
    assert checkpoint(tmp_path / "run")["training"]["step"] < 72
    finished(3, output, ["--resume", f"--output-dir={tmp_path / 'run'}"])
    assert equal(checkpoint(alone), checkpoint(tmp_path / "run"))


def test_the_death_of_a_process_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    processes = several(2, output := tmp_path / "output", flags_of(tmp_path / "run", epochs=1000))
    wait_until((tmp_path / "run/noprop_hybrid.pt").exists, processes[0])
    processes[1].kill()
    processes[0].join(300)
    assert processes[0].exitcode == 1
    assert output.read_text().count("another process of this run is gone") == 1
    assert checkpoint(tmp_path / "run")["training"]["step"] > 0


def test_a_folder_in_which_another_run_writes_is_one_line_of_all_processes(tmp_path):
    with noprop.locked(tmp_path / "run"):
        processes = several(2, output := tmp_path / "output", flags_of(tmp_path / "run", num_blocks=2))
        assert ended(processes, [output], 2)[0].count("error: ") == 1
    assert "another run writes into" in output.read_text()


def test_a_gpu_for_each_process(monkeypatch):
    """Asked of a machine that says that it has two."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(noprop, "pick_device", lambda options: options.device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.pick_device(noprop.Options()) == "auto"  # left over from another launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parallel.pick_device(noprop.Options()) == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(noprop.Failure, match="there are 2 GPUs"):
        parallel.pick_device(noprop.Options())


def test_too_many_processes_are_refused_once(tmp_path):
    processes = several(2, output := tmp_path / "output", flags_of(tmp_path / "run", num_blocks=1))
    assert ended(processes, [output], 2)[0].count("error: 2 processes for 1 blocks") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [::1]:9\nmore"), "another process"),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), "another process"),
        (RuntimeError("Tensors must be contiguous\nException raised from"), "talk: Tensors must"),
        (torch.OutOfMemoryError("CUDA out of memory."), None),
        (ValueError("no group"), None),
    ],
)
def test_an_error_in_a_collective_is_named_as_what_it_is(error, message, monkeypatch, capsys):
    def call():
        raise error

    parallel.collective(call)  # without processes, nothing is called
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(noprop.Failure if message else type(error)) as caught:
        parallel.collective(call)
    if message:
        assert message in str(caught.value) and caught.value.code == 1 and "\n" not in str(caught.value)
    else:
        assert caught.value is error


def test_processes_with_other_images_do_not_train(monkeypatch, tmp_path, data):
    def gathered(_, found, own) -> None:
        assert own == data.digest()
        found[:] = [own, "of other images"]

    monkeypatch.setattr(parallel, "collective", gathered)
    state = parallel.SharedState(LabConfig(num_blocks=2))
    with pytest.raises(noprop.Failure, match="the processes have different images"):
        parallel.run(state, data, noprop.Options(output_dir=tmp_path), None, noprop.finish)


def test_processes_save_when_it_is_time(monkeypatch):
    """After more than ten minutes, asked every so many steps; a signal comes through the moment after."""
    saved, clock, signals = [], [0.0], []

    class Saves:
        config = LabConfig()

        def save(self, path: Path, digest: str) -> None:
            saved.append(path)

    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: 60 * clock[0]))
    agreed = parallel.agreement(Saves(), "", noprop.Options(), lambda: (signals or [0])[0])
    for clock[0], count in ((9.9, 0), (10.1, 1), (10.2, 1), (20.0, 1), (20.2, 2)):
        assert not any(agreed() for _ in range(parallel.CONTROL_STEPS)) and len(saved) == count
    signals.append(15)
    assert [agreed() for _ in range(parallel.CONTROL_STEPS)][-1] == 15 and len(saved) == 2


def test_processes_on_a_mac_take_the_cpu(monkeypatch):
    """gloo can't add up what is on MPS."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda _=False: torch.device("mps"))
    assert parallel.pick_device(noprop.Options()).type == "cpu"


def test_what_is_not_for_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    for command in (["search"], ["evaluate", "a.pt"], ["merge", "a.pt", "b.pt"]):
        refused(capsys, 2, command, "torchrun is for training")
    for objective in ("backprop", "cascade", "infobatch"):
        flags = flags_of(tmp_path, f"--objective={objective}")
        refused(capsys, 2, ["train", *flags], "start it without torchrun")
