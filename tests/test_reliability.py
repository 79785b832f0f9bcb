"""Nothing is lost: exact resume, whole files, one run a folder."""

import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, fails, noprop, start, wait_until
from laboratory import quick_lab, quick_main

from benchmarks.faults import fingerprint


@pytest.fixture(autouse=True, scope="module")
def quick(data):
    """Few images to validate and to test on; not in the fixture of all tests, which is there before."""
    with quick_lab():
        yield


@pytest.fixture(scope="module")
def undisturbed(quick, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert noprop.main([*tiny_flags(folder), "--epochs=3"]) == 0
    return fingerprint(folder)


def tiny_flags(folder) -> list[str]:
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()),
        f"--output-dir={folder}",
    ]


def slow_main(arguments: list[str]) -> int:
    """quick_main(), which waits after each write, so that a kill comes in its midst."""
    write = noprop.write_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noprop, "write_file", lambda *x: (write(*x), time.sleep(0.1)))
        return quick_main(arguments)


def stopping_after(step: int, number: int):
    """A train_step() with a signal in that step."""

    def train_step(state, *rest):
        if state.step == step - 1:
            signal.raise_signal(number)
        return noprop.train_step(state, *rest)

    return train_step


def run(folder, step=noprop.train_step) -> int:
    """The main command of three tiny epochs, with a step of ours."""
    config, options = noprop.Config(**TINY | {"epochs": 3}), noprop.Options(output_dir=folder)
    return noprop.run(noprop.State(config), noprop.load_data(config), options, step=step)


@pytest.mark.parametrize(("step", "number"), [(1, 2), (4, 15), (10, 2)])  # an epoch has four steps
def test_resume_is_exact_wherever_the_run_was_stopped(step, number, undisturbed, tmp_path, capsys):
    """By Ctrl-C, by kill."""
    assert run(tmp_path, stopping_after(step, number)) == 128 + number
    assert noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")["training"]["step"] == step
    assert "--resume goes on" in capsys.readouterr().out
    assert noprop.main(["--resume", f"--output-dir={tmp_path}"]) == 0  # the config is the checkpoint's
    assert f"{step} steps are done" in capsys.readouterr().out
    assert fingerprint(tmp_path) == undisturbed


def test_a_picture_that_fails_does_not_hide_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(noprop, "picture", lambda *_: 1)
    assert run(tmp_path, stopping_after(1, signal.SIGINT)) == 130


def test_a_finished_run_is_drawn_again_and_can_be_prolonged(tmp_path, capsys):
    assert noprop.main(tiny_flags(tmp_path)) == 0
    before = fingerprint(tmp_path)
    (tmp_path / "denoising_hybrid.png").unlink()
    assert noprop.main([*tiny_flags(tmp_path), "--resume"]) == 0
    assert (tmp_path / "denoising_hybrid.png").exists() and fingerprint(tmp_path) == before
    assert noprop.main(["--resume", "--epochs=2", f"--output-dir={tmp_path}"]) == 0
    content = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    assert content["config"].epochs == 2 and content["training"]["step"] == 8
    arguments = ["--resume", f"--output-dir={tmp_path}"]
    fails(capsys, 2, [*arguments, "--lr=0.5"], "--lr 0.5 contradicts", "which has 0.014")
    fails(capsys, 2, [*arguments, "--epochs=1"], "--epochs 1 contradicts")
    fails(capsys, 2, [*arguments, "--preset=reference"], "--block reference contradicts")
    assert noprop.read_command_line([*tiny_flags(tmp_path / "new"), "--resume"])[2] is None
    assert "Nothing to resume" in capsys.readouterr().out


class L1(noprop.Hybrid):
    """A user's own loss."""


def test_a_run_by_a_loss_of_ones_own_does_not_go_on_with_another(data, tmp_path, capsys):
    config, options = noprop.Config(**TINY), noprop.Options(output_dir=tmp_path)
    noprop.State(config, objective=L1()).save(path := options.checkpoint(config), data.digest())
    noprop.State(config, objective=L1()).resume(noprop.read_checkpoint(path), data.digest())
    with pytest.raises(noprop.Failure, match="was trained by the loss L1: Hybrid can't"):
        noprop.State(config).resume(noprop.read_checkpoint(path), data.digest())
    made = noprop.read_checkpoint(path)
    del made["training"]["loss"]  # as a version before has it
    noprop.State(config).resume(made, data.digest())


def test_more_epochs_for_a_run_that_patience_has_ended_take_more_patience(tmp_path, capsys):
    state = noprop.State(config := noprop.Config(**TINY | {"epochs": 9, "patience": 1}))
    for epoch, accuracy in ((1, 50.0), (2, 40.0)):
        state.record({"epoch": epoch, "val_accuracy": accuracy}, 5000)
    state.save(tmp_path / "noprop_hybrid.pt", noprop.load_data(config).digest())
    more = ["--resume", "--epochs=20", f"--output-dir={tmp_path}"]
    fails(capsys, 2, more, "by patience 1 this run has ended: raise it too")


def test_what_may_change_when_a_run_is_resumed(tmp_path, capsys):
    """More epochs, and a patience that lets them be; a preset's epochs are those of a new run."""
    folder = [f"--output-dir={tmp_path}"]
    state = noprop.State(noprop.Config.reference(epochs=20, patience=1, num_blocks=1))
    state.save(tmp_path / "noprop_hybrid.pt", "")
    read, resume = noprop.read_command_line, [*folder, "--resume"]
    assert read([*resume, "--preset=reference"])[0].epochs == read(resume)[0].epochs == 20
    assert read([*folder, "--preset=reference"])[0].epochs == 100
    changed = read([*resume, "--epochs=30", "--patience=9"])[0]
    assert (changed.epochs, changed.patience) == (30, 9)
    fails(capsys, 2, [*resume, "--epochs=12"], "--epochs 12 contradicts")
    evaluate = ["--preset=reference", f"--evaluate={tmp_path / 'noprop_hybrid.pt'}"]
    assert read(evaluate)[0] == state.config


def test_settings_may_be_said_again_to_resume(tmp_path, capsys):
    """Some that do not go with the defaults: fewer images than a batch of these."""
    few = ["--train-images=200", f"--output-dir={tmp_path}"]
    assert noprop.main([*few, "--batch-size=100", "--epochs=1", "--num-blocks=1"]) == 0
    assert noprop.main([*few, "--resume"]) == 0
    assert "exact to the bit" not in capsys.readouterr().out  # that is said where it is not


@pytest.mark.parametrize(("what", "other"), [("chip", "another"), ("torch", "9.0"), ("device", "cuda")])
def test_resuming_on_another_machine_says_so(what, other, capsys):
    state, content = noprop.State(noprop.Config(num_blocks=1)), {"path": "a.pt", "data": "", "model": {}}
    training = {name: getattr(state, name) for name in state.POSITION}
    training["parts"] = {name: state.part_state(name) for name in state.parts}
    content |= {"training": training, "made_with": noprop.made_with(state.device) | {what: other}}
    content["training"]["seconds"] = 1000.0
    state.resume(content, "")
    assert "exact to the bit" in capsys.readouterr().out
    assert time.perf_counter() - state.started > 1000  # "in all" is of all calls
    content["made_with"]["device"] = "mps"  # whose memory format is another, so moments would be mixed up
    with pytest.raises(noprop.Failure, match="weights lie otherwise"):
        state.resume(content, "")


def test_kill_9_loses_nothing(undisturbed, tmp_path):
    command = [*tiny_flags(tmp_path), "--epochs=3", "--checkpoint-minutes=1e-9"]
    process = start(tmp_path / "output", command, slow_main)
    wait_until((tmp_path / "noprop_hybrid.pt").exists, process)
    process.kill()
    process.join()
    assert noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")["training"]["step"] < 12
    assert noprop.main([*command, "--resume"]) == 0
    assert fingerprint(tmp_path) == undisturbed


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    with noprop.locked(tmp_path):
        fails(capsys, 2, tiny_flags(tmp_path), "another run writes into")
    with noprop.locked(tmp_path):
        pass


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


def test_every_run_in_a_folder_is_kept(tmp_path, capsys):
    """Its checkpoint and its results, however many follow, and a resumed one does not count."""
    kept = {}
    for seed in range(2):
        assert noprop.main([*tiny_flags(tmp_path), f"--seed={seed}"]) == 0
        assert noprop.main([*tiny_flags(tmp_path), f"--seed={seed}", "--resume"]) == 0
        kept[seed] = [(tmp_path / f"noprop_hybrid.{x}").read_bytes() for x in ("pt", "json")]
    assert "Kept the older" in capsys.readouterr().out
    for name, seed in (("noprop_hybrid.1", 0), ("noprop_hybrid", 1)):
        assert [(tmp_path / f"{name}.{x}").read_bytes() for x in ("pt", "json")] == kept[seed]


def test_a_run_on_other_images_is_not_resumed(tmp_path, capsys):
    """Though its config is the same."""
    data = noprop.load_data(noprop.Config(**TINY))
    other = data._replace(train=data.train._replace(labels=data.train.labels.flip(0)))
    assert data.digest() == noprop.load_data(noprop.Config(**TINY)).digest() != other.digest()
    assert noprop.main(tiny_flags(tmp_path)) == 0
    content = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    state, options = noprop.State(noprop.Config(**TINY)), noprop.Options(output_dir=tmp_path)
    with pytest.raises(noprop.Failure, match="the images are not those that"):
        noprop.run(state, other, options, content)


def test_what_was_written_since_it_was_read_is_not_written_over(tmp_path):
    """By another run that ended between this one's start and its lock."""
    config, path = noprop.Config(**TINY), tmp_path / "noprop_hybrid.pt"
    assert noprop.main(tiny_flags(tmp_path)) == 0
    stale, fresh = noprop.read_checkpoint(path), noprop.read_checkpoint(path)
    data, options = noprop.load_data(config), noprop.Options(output_dir=tmp_path)
    assert noprop.run(noprop.State(replace(config, epochs=2)), data, options, fresh) == 0
    with pytest.raises(noprop.Failure, match="was written by another run meanwhile"):
        noprop.run(noprop.State(replace(config, epochs=3)), data, options, stale)
    assert noprop.read_checkpoint(path)["training"]["step"] == 8


def test_a_run_that_goes_on_in_another_folder_keeps_the_network_there(tmp_path):
    config, (one, other) = noprop.Config(**TINY), (tmp_path / x / "noprop_hybrid.pt" for x in "ab")
    assert [noprop.main(tiny_flags(x.parent)) for x in (one, other)] == [0, 0]
    content, before = noprop.read_checkpoint(one), other.read_bytes()
    options = noprop.Options(output_dir=other.parent)
    assert noprop.run(noprop.State(config), noprop.load_data(config), options, content) == 0
    assert other.with_name("noprop_hybrid.1.pt").read_bytes() == before


def test_an_older_file_that_can_not_be_renamed_is_a_line(tmp_path, monkeypatch, capsys):
    """As one of another user in a sticky folder."""
    (tmp_path / "noprop_hybrid.pt").write_text("another user's")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", forbidden)
    fails(capsys, 1, tiny_flags(tmp_path), "Permission denied")


@pytest.mark.parametrize("place", ["evaluate", "write_file"])  # of the last epoch, of the results
def test_a_signal_after_the_last_step_does_not_stop_a_finished_run(tmp_path, monkeypatch, capsys, place):
    function, calls = getattr(noprop, place), []

    def interrupted(*arguments):
        if not calls:
            calls.append(signal.raise_signal(signal.SIGINT))
        return function(*arguments)

    monkeypatch.setattr(noprop, place, interrupted)
    assert noprop.main(tiny_flags(tmp_path)) == 0
    assert "Stopped" not in capsys.readouterr().out and (tmp_path / "noprop_hybrid.json").exists()


def test_a_program_without_any_output_trains(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert noprop.main(flags) == 0 and (tmp_path / "noprop_hybrid.json").exists()


def test_a_checkpoint_without_what_resuming_needs_is_a_line(flags, tmp_path, capsys):
    assert noprop.main(flags) == 0
    content = torch.load(path := tmp_path / "noprop_hybrid.pt", weights_only=True)
    average = content["training"]["parts"]["blocks.1"][0]
    average["renamed"] = average.pop("label.0.weight")
    for change, word in (({}, "blocks.1 of the checkpoint is of another"), ({"training": {}}, "train anew")):
        torch.save(content | change, path)
        fails(capsys, 2, ["--resume", f"--output-dir={tmp_path}"], word)


def test_signals_are_as_before_afterwards_and_in_a_thread_there_are_none(tmp_path):
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    codes = [noprop.main(tiny_flags(tmp_path / "a"))]
    thread = threading.Thread(target=lambda: codes.append(noprop.main(tiny_flags(tmp_path / "b"))))
    thread.start()
    thread.join()
    assert codes == [0, 0]
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_the_third_signal_does_what_it_did_before():
    """`timeout` sends two, one to the process and one to its group."""
    with pytest.raises(KeyboardInterrupt), noprop.caught_signals() as signalled:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            assert signalled() == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)


def test_the_last_of_three_signals_inside_a_step_saves_no_half_of_it(undisturbed, tmp_path):
    """Whatever the last Ctrl-C does, --resume is exact."""

    def often(state, *rest):
        if state.step == 5:
            signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
            noprop.train_block(state, 1, *rest[:-1])
            signal.raise_signal(signal.SIGINT)
        return noprop.train_step(state, *rest)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, often)
    assert noprop.main([*tiny_flags(tmp_path), "--epochs=3", "--resume"]) == 0
    assert fingerprint(tmp_path) == undisturbed


def test_another_users_lock_and_a_file_system_without_locks_are_one_line(tmp_path, monkeypatch):
    for error in (PermissionError(13, "Permission denied"), NotImplementedError("no locks here")):

        def acquire(*_, error=error):
            raise error

        monkeypatch.setattr(noprop.FileLock, "acquire", acquire)
        expected = pytest.raises(noprop.Failure, match="Permission denied|no locks here")
        with expected as failure, noprop.locked(tmp_path):
            pass
        assert failure.value.code == 2


def test_memory_and_history_stay_bounded(small_data):
    """Four epochs: no live tensor more after the last than after the second."""
    import gc

    training = noprop.State(noprop.Config(**TINY | {"epochs": 4, "num_blocks": 1}))
    live = []
    for _ in noprop.train(training, small_data):
        gc.collect()
        live.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert len(training.history) == 4 and training.log == [] and live[-1] == live[1]
