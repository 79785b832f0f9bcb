"""Blocks split over processes, or trained alone and merged, are the blocks of one run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, noprop, same
from test_command_line import fails


def command(folder: Path, *flags: str, **changes) -> list[str]:
    values = TINY | {"output_dir": folder} | changes
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), *flags]


def torchrun(processes: int, flags: list[str]) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "noprop_example.py"), "--threads=1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a process group of its own, as at a terminal
    )


def workers(run: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(x) for x in found.stdout.split()]


def finished(processes: int, flags: list[str]) -> str:
    run = torchrun(processes, flags)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 0, output
    return output


def checkpoint(folder: Path) -> dict:
    return noprop.read_checkpoint(folder / "noprop_hybrid.pt")


def equal(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same but for seconds."""
    for content in (a, b):
        content["training"]["seconds"] = 0
        for record in content["training"]["history"]:
            record["seconds"] = 0
    return noprop.checksum(a) == noprop.checksum(b)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_trains_the_same_network(tmp_path, processes):
    fixed, learned = ("--embedding=fixed", "--embedding=learned")
    often = "--checkpoint-minutes=0.0001"  # in the midst of the epoch too
    flags = [command(tmp_path / name, fixed, often, train_images=1600) for name in ("one", "several")]
    assert noprop.main([*flags[0], "--threads=1"]) == 0
    output = finished(processes, flags[1])
    assert equal(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "several"))
    assert len(re.findall("Test accuracy", output)) == len(re.findall("epoch   1/1", output)) == 1
    assert {x.name for x in (tmp_path / "one").iterdir()} == {
        x.name for x in (tmp_path / "several").iterdir()
    }
    if processes == 2:  # with a learned embedding, sums are made in another order
        assert noprop.main([*command(tmp_path / "one", learned), "--threads=1"]) == 0
        finished(processes, command(tmp_path / "several", learned))
        one, several = (checkpoint(tmp_path / name)["model"] for name in ("one", "several"))
        for name, value in one.items():
            torch.testing.assert_close(value, several[name], rtol=1e-3, atol=1e-4)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path):
    """Ctrl-C stops all, in the midst of an epoch; three go on to the same end as one."""
    flags = {"train_images": 1600, "epochs": 4}
    assert noprop.main([*command(tmp_path / "one", "--embedding=fixed", **flags), "--threads=1"]) == 0
    several = command(tmp_path / "several", "--embedding=fixed", **flags)
    run = torchrun(2, several)
    wait_for(tmp_path / "several" / "noprop_hybrid.pt")
    started = workers(run)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.1)
    for worker in started:  # torchrun too sends its processes a second one
        os.kill(worker, signal.SIGINT)
    output = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and "Test accuracy" in output, output
    assert output.count("Stopped after step") == 1
    assert checkpoint(tmp_path / "several")["training"]["step"] < 48
    finished(3, [*several, "--resume"])
    assert equal(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "several"))


def test_the_death_of_a_process_ends_the_run_and_leaves_a_checkpoint(tmp_path):
    run = torchrun(2, command(tmp_path, epochs=1000))
    wait_for(tmp_path / "noprop_hybrid.pt")
    os.kill(workers(run)[1], signal.SIGKILL)
    output = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and output.count("another process of this run is gone") == 1, output
    assert checkpoint(tmp_path)["training"]["step"] > 0


def test_too_many_processes_are_refused_once(tmp_path):
    run = torchrun(4, command(tmp_path))
    output = run.communicate(timeout=60)[0]
    assert run.returncode != 0 and output.count("error: 4 processes for 3 blocks") == 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Three blocks, each trained alone, and in "whole" the same three trained together."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("1", "2", "3"):
        assert noprop.main(command(folder / name, "--embedding=fixed", f"--blocks={name}")) == 0
    assert noprop.main(command(folder / "whole", "--embedding=fixed", "--select=last")) == 0
    return folder


def test_blocks_trained_alone_and_merged_equal_the_whole(parts, tmp_path):
    assert [x.name for x in (parts / "2").glob("[!.]*")] == ["noprop_hybrid.pt"]
    files = [str(parts / name / "noprop_hybrid.pt") for name in ("1", "3", "2")]
    assert noprop.main(["--merge", *files, "--output-dir", str(tmp_path)]) == 0
    merged, whole = checkpoint(tmp_path), checkpoint(parts / "whole")
    assert same(merged["model"], whole["model"]) and merged["config"] == whole["config"]
    for name in ("blocks.0", "blocks.2", "classifier"):
        assert noprop.checksum(merged["training"][name]) == noprop.checksum(whole["training"][name])
    names = {x.name for x in (parts / "whole").iterdir()}
    assert {x.name for x in tmp_path.iterdir()} == names


def test_a_block_of_a_whole_network_is_exchanged(trained, parts, tmp_path):
    """A block retrained beside the embedding of a trained network takes the old one's place."""
    whole, retrained = trained / "noprop_hybrid.pt", tmp_path / "new" / "noprop_hybrid.pt"
    flags = ["--blocks=2", "--train-images=1024", "--epochs=1", "--seed=7", f"--embedding-from={whole}"]
    assert noprop.main([*flags, f"--output-dir={tmp_path / 'new'}"]) == 0
    assert noprop.main(["--merge", str(whole), str(retrained), "--output-dir", str(tmp_path)]) == 0
    old, new, merged = (noprop.read_checkpoint(x)["model"] for x in (whole, retrained, tmp_path / whole.name))
    for name, value in merged.items():
        assert torch.equal(value, (new if name.startswith("blocks.1.") else old)[name]), name


def test_a_block_trained_in_the_folder_of_the_network_whose_embedding_it_takes(parts, tmp_path, capsys):
    path = tmp_path / "noprop_hybrid.pt"
    path.write_bytes(content := (parts / "whole" / path.name).read_bytes())
    flags = command(tmp_path, f"--embedding-from={tmp_path / 'typo.pt'}", "--blocks=2")
    fails(capsys, 2, flags, "cannot read")
    assert path.read_bytes() == content
    assert noprop.main(command(tmp_path, f"--embedding-from={path}", "--blocks=2")) == 0
    assert (tmp_path / "noprop_hybrid.previous.pt").read_bytes() == content
    for use in (["--evaluate"], ["--predict", "a.png"]):  # a chain with untrained blocks in it
        fails(capsys, 2, [use[0], str(path), *use[1:]], "take all blocks, not 2 alone")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["1", "2"], "no file has block 3"),
        (["1", "2", "3", "2"], "block 2 is in"),
        (["1", "2", "other"], "differ in seed"),
        (["whole", "seed"], "different label embeddings"),
        (["1", "nowhere"], "cannot read"),
    ],
)
def test_parts_that_do_not_belong_together(parts, tmp_path, capsys, files, word):
    if files[-1] in ("other", "seed") and not (parts / files[-1]).exists():
        flags = command(parts / files[-1], "--embedding=fixed", "--blocks=3", seed=1)
        assert noprop.main(flags) == 0
        capsys.readouterr()
    paths = [str(parts / name / "noprop_hybrid.pt") for name in files]
    fails(capsys, 2, ["--merge", *paths, "--output-dir", str(tmp_path / "out")], word)
    assert not (tmp_path / "out" / "noprop_hybrid.pt").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--blocks=3"], "takes --embedding fixed"),
        (["--blocks=3", "--embedding=fixed", "--select=validation"], "and --select last"),
        (["--embedding=learned", "--embedding-from=a.pt"], "freezes the embedding"),
        (["--blocks=0", "--embedding=fixed"], "between 1 and num_blocks"),
        (["--blocks=11", "--embedding=fixed"], "between 1 and num_blocks"),
        (["--blocks=2,1-3", "--embedding=fixed"], "each of them once"),
        (["--blocks=a", "--embedding=fixed"], "must look like"),
        (["--blocks=3-1", "--embedding=fixed"], "must name blocks"),
        (["--blocks=1", "--embedding-from=nothing.pt"], "cannot read nothing.pt"),
    ],
)
def test_bad_flags(capsys, tmp_path, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, flags, word)
