"""Nothing is lost: exact resume, whole files, one run a folder."""

import io
import subprocess
import sys
import time

import pytest
import torch
from conftest import CPU, ROOT, TINY, noprop
from test_command_line import fails

from benchmarks.faults import fingerprint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert noprop.main([*tiny_flags(folder), "--epochs=3"]) == 0
    return fingerprint(folder)


def tiny_flags(folder) -> list[str]:
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()),
        f"--output-dir={folder}",
    ]


def stop_after(monkeypatch, step: int) -> None:
    """Ctrl-C in that step of the next run."""
    original = noprop.train_step

    def train_step(training, *rest):
        losses = original(training, *rest)
        if training.step == step:
            noprop.signal.raise_signal(noprop.signal.SIGINT)
        return losses

    monkeypatch.setattr(noprop, "train_step", train_step)


@pytest.mark.parametrize("step", [1, 4, 6, 11])  # an epoch has four steps
def test_resume_is_exact_wherever_the_run_was_stopped(step, undisturbed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert noprop.main([*tiny_flags(tmp_path), "--epochs=3"]) == 130
    assert noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")["training"]["step"] == step
    assert "--resume goes on" in capsys.readouterr().out
    assert noprop.main(["--resume", f"--output-dir={tmp_path}"]) == 0  # the config is the checkpoint's
    assert f"{step} steps are done" in capsys.readouterr().out
    assert fingerprint(tmp_path) == undisturbed


def test_a_finished_run_is_drawn_again_and_can_be_prolonged(tmp_path, capsys):
    assert noprop.main(tiny_flags(tmp_path)) == 0
    before = fingerprint(tmp_path)
    (tmp_path / "denoising_hybrid.png").unlink()
    assert noprop.main([*tiny_flags(tmp_path), "--resume"]) == 0
    assert (tmp_path / "denoising_hybrid.png").exists() and fingerprint(tmp_path) == before
    assert noprop.main(["--resume", "--epochs=2", f"--output-dir={tmp_path}"]) == 0
    content = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    assert content["config"]["epochs"] == 2 and content["training"]["step"] == 8
    arguments = ["--resume", f"--output-dir={tmp_path}"]
    fails(capsys, 2, [*arguments, "--lr=0.5"], "--lr 0.5 contradicts", "which has 0.014")
    fails(capsys, 2, [*arguments, "--epochs=1"], "--epochs 1 contradicts")
    assert noprop.main([*tiny_flags(tmp_path / "new"), "--resume"]) == 0
    assert "Nothing to resume" in capsys.readouterr().out


def test_settings_may_be_said_again_to_resume(tmp_path):
    """Some that do not go with the defaults: fewer images than a batch of these."""
    few = ["--train-images=200", f"--output-dir={tmp_path}"]
    assert noprop.main([*few, "--batch-size=100", "--epochs=1", "--num-blocks=1"]) == 0
    assert noprop.main([*few, "--resume"]) == 0


def test_resuming_on_another_machine_says_so(tmp_path, capsys, monkeypatch):
    assert noprop.main(tiny_flags(tmp_path)) == 0
    monkeypatch.setattr(noprop, "made_with", lambda device: {"device": "cuda", "torch": "9"})
    assert noprop.main(["--resume", f"--output-dir={tmp_path}"]) == 0
    assert "exact to the bit" in capsys.readouterr().out


def test_kill_9_loses_nothing(undisturbed, tmp_path):
    command = [sys.executable, str(ROOT / "noprop_example.py"), *tiny_flags(tmp_path), "--epochs=3"]
    process = subprocess.Popen([*command, "--checkpoint-minutes=1e-9"], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "noprop_hybrid.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")["training"]["step"] < 12
    subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=120)
    assert fingerprint(tmp_path) == undisturbed


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    with noprop.output_folder(tmp_path):
        fails(capsys, 2, tiny_flags(tmp_path), "another run writes into")
    assert noprop.main(tiny_flags(tmp_path)) == 0


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    noprop.write_file(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(noprop.os, "fsync", full)
    with pytest.raises(noprop.Failure, match="cannot write .*: No space left on device") as error:
        noprop.write_file(path, b"new")
    assert error.value.code == 1
    assert [x.name for x in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


def test_the_checksum_sees_everything():
    content = {"a": [1, 2.0, None], "b": {"c": torch.zeros(3), "d": torch.zeros(3, dtype=torch.int64)}}
    torch.save(content, file := io.BytesIO())
    file.seek(0)
    same, sums = torch.load(file), set()
    assert noprop.checksum(same) == noprop.checksum(content)
    for changed in (
        content,
        content | {"a": [1, 2.0, 0]},
        content | {"a": [[1], 2.0, None]},
        content | {"b": {"c": torch.tensor([0, 0, 1e-45]), "d": content["b"]["d"]}},
        content | {"b": {"c": content["b"]["d"].float().view(1, 3), "d": content["b"]["d"]}},
        content | {"b": {"d": content["b"]["c"], "c": content["b"]["d"]}},
    ):
        sums.add(noprop.checksum(changed))
    assert len(sums) == 6


def test_memory_and_history_stay_bounded(small_data):
    """Forty epochs: no live tensor more after the last than after the second."""
    import gc

    training = noprop.Training(noprop.Config(**TINY | {"epochs": 40, "patience": 40, "num_blocks": 2}), CPU)
    live = []
    for _ in noprop.train(training, small_data):
        gc.collect()
        live.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert len(training.history) == 40 and training.log == [] and live[-1] == live[1]
