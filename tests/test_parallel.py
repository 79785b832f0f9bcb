"""Blocks split over processes are the blocks of one run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, noprop
from laboratory import contents, equal, flags_of, lab, refused

from noprop_lab import parallel


def torchrun(processes: int, flags: list[str]) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "noprop_lab", "train", "--threads=1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a process group of its own, as at a terminal
    )


def workers(run: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(x) for x in found.stdout.split()]


def finished(processes: int, flags: list[str]) -> str:
    run = torchrun(processes, flags)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    return output


def checkpoint(folder: Path) -> dict:
    return contents(folder / "noprop_hybrid.pt")


def wait_for(path: Path, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)


FIXED, RUN = "--embedding=fixed", {"train_images": 1600, "epochs": 3}  # of 36 steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert lab.main(["train", *flags_of(folder, FIXED, "--threads=1", **RUN)]) == 0
    return folder


def test_two_processes_train_the_same_network_as_one(tmp_path, alone):
    often = "--checkpoint-minutes=0.0001"  # in the midst of the epoch too
    output = finished(2, flags_of(tmp_path, FIXED, often, **RUN))
    assert equal(checkpoint(alone), checkpoint(tmp_path))
    assert len(re.findall("Test accuracy", output)) == len(re.findall("epoch   1/3", output)) == 1
    assert {x.name for x in alone.iterdir()} == {x.name for x in tmp_path.iterdir()}


def test_a_learned_embedding_is_the_same_up_to_rounding(tmp_path):
    """Sums are made in another order."""
    assert lab.main(["train", *flags_of(tmp_path / "one", "--threads=1")]) == 0
    finished(2, flags_of(tmp_path / "several"))
    one, several = (checkpoint(tmp_path / name)["model"] for name in ("one", "several"))
    for name, value in one.items():
        torch.testing.assert_close(value, several[name], rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    """Ctrl-C stops all, in the midst of an epoch; three go on to the same end as one."""
    run = torchrun(2, flags_of(tmp_path, FIXED, **RUN))
    wait_for(tmp_path / "noprop_hybrid.pt", run)
    started = workers(run)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.1)
    for worker in started:  # torchrun too sends its processes a second one
        os.kill(worker, signal.SIGINT)
    output = run.communicate(timeout=300)[0]
    assert run.returncode != 0 and "Test accuracy" in output, output
    assert output.count("Stopped after step") == 1
    assert checkpoint(tmp_path)["training"]["step"] < 36
    finished(3, ["--resume", f"--output-dir={tmp_path}"])
    assert equal(checkpoint(alone), checkpoint(tmp_path))


def test_the_death_of_a_process_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    run = torchrun(2, flags_of(tmp_path, epochs=1000))
    wait_for(tmp_path / "noprop_hybrid.pt", run)
    os.kill(workers(run)[1], signal.SIGKILL)
    output = run.communicate(timeout=300)[0]
    assert run.returncode != 0 and output.count("another process of this run is gone") == 1, output
    assert checkpoint(tmp_path)["training"]["step"] > 0


def test_too_many_processes_are_refused_once(tmp_path):
    run = torchrun(2, flags_of(tmp_path, num_blocks=1))
    output = run.communicate(timeout=300)[0]
    assert run.returncode != 0 and output.count("error: 2 processes for 1 blocks") == 1
    assert not list(tmp_path.iterdir())


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


def test_what_is_not_for_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "rank_and_size", lambda: (0, 2))
    for command in (["search"], ["evaluate", "a.pt"], ["merge", "a.pt", "b.pt"]):
        refused(capsys, 2, command, "torchrun is for training")
    refused(capsys, 2, ["train", *flags_of(tmp_path, "--objective=backprop")], "start it without torchrun")
