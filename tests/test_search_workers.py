"""Several workers of a search: what they share, what survives of one that dies, and bad databases."""

import io
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
from conftest import CPU, ended, noprop, start
from filelock import FileLock, Timeout
from laboratory import contents, equal, few_images, flags_of, lab, quick_lab, refused
from PIL import Image

from noprop_lab import dt
from noprop_lab import search as hpo
from noprop_lab.dt import DTConfig
from noprop_lab.networks import LabState, weights_only
from noprop_lab.settings import LabConfig, LabOptions


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


def quick_search(arguments: list[str]) -> int:
    """The command with few images and short heartbeats."""

    def execute() -> int:
        config, options, _ = lab.read_command_line("search", arguments)
        data = few_images(config, options.data_root, CPU)

        def new_state(config) -> LabState:
            return LabState(config, CPU, data)

        def end(*arguments) -> int:
            code = noprop.finish(*arguments)
            time.sleep(0.5)  # as drawing takes, while another worker comes upon the lock
            return code

        def run(config, content) -> int:
            return noprop.run(new_state(config), data, options, content, lab.step_of(config), end)

        return hpo.search(config, options, data, new_state, run, lab.step_of, heartbeat=(1, 3))

    return noprop.main([], lambda _: execute())


def flags(folder: Path, *more: str, **changes) -> list[str]:
    return flags_of(
        folder, *more, **{"hpo_trials": 2, "hpo_epochs": 1, "threads": 1, "num_blocks": 1} | changes
    )


def search(folder: Path, *more: str, **changes) -> int:
    return quick_search(flags(folder, "--no-hpo-final-run", *more, **changes))


def trials(folder: Path, url: str | None = None) -> list:
    """All trials in the order of their numbers."""
    url = url or f"sqlite:///{folder / 'noprop_hpo.db'}"
    [name] = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url).trials


def done(found: list) -> list:
    return [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]


def silence(database: Path) -> None:
    """Make it long ago that a trial's worker has given a sign of life."""
    old = "UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'"
    with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
        while not connection.execute(old).rowcount:  # its thread is about to give the first one
            time.sleep(0.02)


def test_a_final_run_goes_on_from_just_its_settings_images_and_kind_of_device(tmp_path):
    LabState(config := LabConfig(num_blocks=1)).save(path := tmp_path / "noprop_hybrid.pt", "of these")
    assert hpo.begun(path, config, "of these", "cpu") and not hpo.begun(path, config, "of others", "cpu")
    assert not hpo.begun(path, replace(config, lr=0.02), "of these", "cpu")
    assert not hpo.begun(path, config, "of these", "mps")
    path.write_bytes(weights_only(path))
    assert not hpo.begun(path, config, "of these", "cpu")
    fixed = replace(config, embedding="fixed")
    for embedding, fits in ((None, True), (torch.zeros(10, 20), False)):  # --embedding-from another
        LabState(fixed, embedding=embedding).save(path, "of these")
        assert bool(hpo.begun(path, fixed, "of these", "cpu")) == fits


@pytest.mark.draws
def test_a_picture_that_fails_is_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(hpo, "draw_search", lambda *_: 1 / 0)
    more = ["--hpo-trials=1", "--hpo-epochs=1", "--no-hpo-final-run", "--threads=1"]
    assert lab.main(["search", *flags_of(tmp_path, *more)]) == 1


@pytest.mark.draws("saved")
@pytest.mark.parametrize("names", [["lr"], ["lr", "eta_loss_weight"]])
def test_slices_of_one_setting_and_of_several_are_drawn(names):
    study = optuna.create_study()
    study.optimize(lambda trial: sum(trial.suggest_float(x, 0.1, 1, log=True) for x in names), n_trials=2)
    worker = SimpleNamespace(study=study, options=LabOptions())
    figure = hpo.draw_search(worker, "slices")
    figure.savefig(io.BytesIO())
    assert len(figure.axes) == len(names) + 1  # and the colour bar


@pytest.mark.draws
def test_trials_on_other_pictures_are_of_another_study_and_their_run_is_another(tmp_path, capsys):
    for shade, place in enumerate("ab"):
        for k, name in enumerate("xy"):
            (folder := tmp_path / place / name).mkdir(parents=True)
            for i in range(30):
                Image.new("RGB", (30, 30), (7 * i, 99 * shade, 200 * k)).save(folder / f"{i}.png")
        flags = ["--dataset=folder", "--batch-size=16", "--num-blocks=1", "--epochs=1", "--threads=1"]
        flags += ["--hpo-trials=1", "--hpo-epochs=1", f"--data-root={tmp_path / place}"]
        assert lab.main(["search", *flags, f"--output-dir={tmp_path}"]) == 0
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 'noprop_hpo.db'}")) == 2
    assert "1 are done" not in capsys.readouterr().out and (tmp_path / "noprop_hybrid.1.pt").exists()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_the_scripts_search_leaves_a_living_workers_trial_alone(tmp_path):
    more = ["--hpo-trials=1", "--hpo-epochs=1", "--threads=1"]
    config, options, _ = lab.read_command_line("search", flags_of(tmp_path, *more))
    worker = hpo.Worker(config, options, noprop.load_data(config), None, hpo.storage_of(options, 10, 60))

    def new_state(config: LabConfig) -> LabState:
        assert noprop.main(["--run-hpo", *flags_of(tmp_path, *more)]) == 0  # while the trial runs
        return LabState(config)

    worker.new_state = new_state
    worker.study.optimize(partial(worker.trial, signalled=lambda: 0), n_trials=1)
    assert worker.study.trials[0].state.name == "COMPLETE"


def test_a_searched_augmentation_is_that_of_the_images(tmp_path, monkeypatch):
    """Of a trial, and of the run that follows."""
    monkeypatch.setattr(
        noprop, "suggest", lambda trial: {"lr": trial.suggest_categorical("lr", [0.02]), "augment": False}
    )
    monkeypatch.setattr("noprop_lab.data.augment", lambda *_: pytest.fail("the images are augmented"))
    assert lab.main(["search", *flags(tmp_path, hpo_trials=1)]) == 0


def test_a_setting_of_the_lab_may_be_searched(tmp_path, monkeypatch):
    """Though its default is not written into files."""
    monkeypatch.setattr(
        noprop, "suggest", lambda trial: {"embed_scale": trial.suggest_float("embed_scale", 0.5, 4)}
    )
    assert search(tmp_path) == 0
    first, second = trials(tmp_path)
    assert first.params == {"embed_scale": 1.0} != second.params


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_images": 100}, "can't propose train_images"),
        ({"batch_size": 99999}, "proposes batch_size 99999"),
    ],
)
def test_what_a_search_can_not_propose(settings, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noprop, "suggest", lambda trial: settings)
    refused(capsys, 2, flags(tmp_path), words, main=quick_search)


def test_a_trial_takes_the_steps_of_its_own_settings(small_data, monkeypatch):
    """Such as --updates, on which the step itself depends."""
    made, config = [], DTConfig(num_blocks=1, batch_size=128)
    monkeypatch.setattr(noprop, "train", lambda state, data, step, *_, **__: made.append(step))
    worker = hpo.Worker(config, LabOptions(), small_data, LabState, None, lab.step_of)
    for updates in ("each", "last"):
        worker.records(replace(config, updates=updates))
    assert made == [dt.train_step, noprop.train_step]


@pytest.mark.filterwarnings("ignore:Fixed parameter", "ignore::optuna.exceptions.ExperimentalWarning")
def test_a_dead_workers_trial_outside_of_the_space_is_run_again():
    """The first one has the settings as given."""
    study = optuna.create_study()
    study.enqueue_trial({"lr": 0.5})
    study.ask().suggest_float("lr", 0.001, 0.1)
    study.tell(0, state=optuna.trial.TrialState.FAIL)
    hpo.run_again(study, study.trials[0])
    assert study.ask().suggest_float("lr", 0.001, 0.1) == 0.5


def test_a_database_of_another_version_of_optuna_is_a_line(tmp_path, capsys, monkeypatch):
    def made(*_, **__):
        raise RuntimeError("The runtime optuna version 5 is no longer compatible with the table schema")

    monkeypatch.setattr(optuna.storages, "RDBStorage", made)
    refused(capsys, 2, ["search", *flags(tmp_path)], "noprop_hpo.db: The runtime optuna version")


@pytest.mark.draws
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")
def test_eight_trials_tell_which_setting_decides(tmp_path):
    config, options, _ = lab.read_command_line("search", flags(tmp_path))
    data = few_images(config, options.data_root, CPU)
    worker = hpo.Worker(config, options, data, None, hpo.storage_of(options, 10, 60))
    for number in range(8):
        trial = worker.study.ask()
        trial.set_user_attr("settings", worker.suggest(trial))
        trial.set_user_attr("record", {"val_loss": 0.1, "val_accuracy": 99.0, "epoch": 1})
        worker.study.tell(trial, 0.1 + (number - 3) ** 2)
        if number > 5:
            worker.report()
        assert (tmp_path / "hpo_importance.png").exists() == (number == 7)


@pytest.mark.draws
@pytest.mark.parametrize("objective", ["hybrid", "dt", "infobatch"])
def test_the_command_searches_and_trains_and_draws(tmp_path, capsys, objective):
    """Of another objective too; the second time, all is there."""
    command = ["search", *flags(tmp_path, f"--objective={objective}", num_blocks=2, hpo_epochs=2)]
    assert lab.main(command) == 0  # and the final run has one epoch, of four steps
    output = capsys.readouterr().out
    assert "Best of 2 complete trials" in output and "Test accuracy" in output
    names = {"noprop_hpo.db", "hpo_best.json", "hpo_history.png", "hpo_slices.png", f"noprop_{objective}.pt"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    weights = contents(tmp_path / f"noprop_{objective}.pt")
    assert lab.main(command) == 0
    assert "resuming" in capsys.readouterr().out
    assert contents(tmp_path / f"noprop_{objective}.pt")["training"]["step"] == 4
    assert equal(contents(tmp_path / f"noprop_{objective}.pt"), weights)
    given = lab.read_command_line(
        "train", [f"--config={tmp_path / 'hpo_best.json'}", f"--objective={objective}"]
    )
    content = contents(tmp_path / f"noprop_{objective}.pt")
    assert given[0].saved() == content["config"]
    both = trials(tmp_path)
    assert len({x.value for x in both}) == 2 and {x.user_attrs["record"]["epoch"] for x in both} == {2}
    assert min(both, key=lambda x: x.value).user_attrs["settings"].items() <= content["config"].items()


def test_the_best_settings_that_are_written_are_those_of_the_final_run(tmp_path, monkeypatch):
    """D goes with the embedding that is best, not with the one that the search began with."""

    def suggest(trial) -> dict:
        return {"embedding": trial.suggest_categorical("embedding", ["onehot"])}

    monkeypatch.setattr(noprop, "suggest", suggest)
    assert search(tmp_path, hpo_trials=1) == 0
    flags = [f"--config={tmp_path / 'hpo_best.json'}"]
    assert lab.read_command_line("train", flags)[0].dim == 10


@pytest.mark.parametrize("objective", ["loss", "error"])
def test_what_a_trial_is_judged_by(tmp_path, objective):
    assert search(tmp_path, f"--hpo-objective={objective}", hpo_trials=1) == 0
    for trial in trials(tmp_path):
        record = trial.user_attrs["record"]
        assert trial.value == {"loss": record["val_loss"], "error": 100 - record["val_accuracy"]}[objective]
        assert record["test_accuracy"] is None
    assert not (tmp_path / "noprop_hybrid.pt").exists()  # --no-hpo-final-run


def test_a_time_limit_ends_the_search(tmp_path):
    assert search(tmp_path, hpo_trials=1000, hpo_timeout=0.1) == 0
    assert 1 <= len(trials(tmp_path)) < 5


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_another_search_is_another_study(tmp_path, data):
    """By another measure, or of another objective; not by other threads, and the script's is the same."""

    def name(*more: str, **changes) -> str:
        config, options, _ = lab.read_command_line("search", flags(tmp_path, *more, **changes))
        return hpo.Worker(config, options, data, None, hpo.storage_of(options, 10, 60)).study.study_name

    twin = {name("--objective=backprop", threads=n) for n in (1, 2)}
    others = name("--objective=dt"), name(hpo_objective="error"), *twin
    assert len(twin) == 1 and len({name(), *others}) == 4
    config, options, _ = noprop.read_command_line(["--run-hpo", *flags(tmp_path)])
    short, url = replace(config, epochs=options.hpo_epochs), f"sqlite:///{tmp_path / 'noprop_hpo.db'}"
    assert noprop.open_study(short, url, noprop.suggest).study_name == name()


@pytest.mark.parametrize(("at", "complete"), [(2, 0), (10, 2)])  # a trial has four steps
def test_after_a_signal_the_best_so_far_is_written_and_the_trial_is_run_again(
    at, complete, tmp_path, monkeypatch, capsys
):
    steps, step = [], noprop.train_step

    def stopping(*arguments):
        if len(steps.append(0) or steps) == at:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(lab, "step_of", lambda _: stopping)
    assert search(tmp_path, hpo_trials=4) == 143
    assert "\nStopped. The same command goes on.\n" in capsys.readouterr().out
    assert (tmp_path / "hpo_best.json").exists() == bool(complete)
    *_, stopped, again = trials(tmp_path)
    assert (stopped.number, stopped.state.name, again.state.name) == (complete, "FAIL", "WAITING")
    assert again.system_attrs["fixed_params"] == stopped.params
    if complete:
        assert search(tmp_path, hpo_trials=4) == 0 and len(done(trials(tmp_path))) == 4
        assert trials(tmp_path)[again.number].params == stopped.params


def test_bad_input(tmp_path, capsys):
    refused(capsys, 2, flags(tmp_path, hpo_timeout=-1), "hpo_timeout must be at least 0", main=quick_search)
    (tmp_path / "noprop_hpo.db").write_text("this is a text" * 1000)
    refused(capsys, 2, flags(tmp_path), "noprop_hpo.db", "file is not a database", main=quick_search)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_no_two_workers_take_the_same_trial(tmp_path, monkeypatch):
    """Not in SQLite either, which can't lock a row: one looks, and the other comes before it writes."""
    mine, other = (hpo.storage_of(LabOptions(output_dir=tmp_path), 10, 60) for _ in range(2))
    study, taken, running = optuna.create_study(storage=mine), [], optuna.trial.TrialState.RUNNING
    study.enqueue_trial({})
    number = study.trials[0]._trial_id
    thread = threading.Thread(target=lambda: taken.append(other.set_trial_state_values(number, running)))

    def between(*_) -> None:
        thread.start()
        thread.join(0.5)

    monkeypatch.setattr(mine, "check_trial_is_updatable", between)
    taken.append(mine.set_trial_state_values(number, running))
    thread.join()
    assert taken == [True, False]


def test_two_workers_share_the_trials_and_one_trains(tmp_path):
    folder, files = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
    texts = ended([start(x, flags(folder, hpo_trials=5, num_blocks=3), quick_search) for x in files], files)
    found = trials(folder)
    assert len(found) == len(done(found)) == len({trial.params["lr"] for trial in found})
    assert len(found) in (5, 6)  # at the end, each worker may be in a trial
    assert sum("Training with the best settings" in text for text in texts) >= 1
    assert all(("Test accuracy" in x) != ("trains in this folder already" in x) for x in texts), texts
    assert not (folder / "noprop_hybrid.1.pt").exists()


def test_workers_on_several_machines_may_make_the_tables_at_once(tmp_path, monkeypatch):
    """The one that comes second tries again."""
    import sqlalchemy
    from optuna.storages import RDBStorage

    make, made = RDBStorage.__init__, []

    def second(self, *arguments, **more):
        made.append(self)
        if len(made) == 1:
            raise sqlalchemy.exc.IntegrityError("CREATE TABLE studies", {}, Exception("there is one"))
        make(self, *arguments, **more)

    monkeypatch.setattr(RDBStorage, "__init__", second)
    monkeypatch.setattr(hpo.time, "sleep", lambda seconds: None)
    assert search(tmp_path, hpo_trials=1) == 0 and len(made) == 2


def test_workers_report_one_after_another(tmp_path, monkeypatch):
    """They write the same files in the same folder."""
    write, written = noprop.write_file, []

    def watched(path: Path, content: bytes) -> None:
        if path.name.startswith("hpo_"):
            with pytest.raises(Timeout):
                FileLock(tmp_path / hpo.LOCK, timeout=0).acquire()
            written.append(path.name)
        write(path, content)

    monkeypatch.setattr(noprop, "write_file", watched)
    assert search(tmp_path, hpo_trials=1) == 0
    assert written == ["hpo_best.json", "hpo_history.png", "hpo_slices.png"]


def test_a_trial_whose_worker_died_before_its_first_heartbeat_holds_nobody_up(tmp_path):
    assert search(tmp_path, hpo_trials=1) == 0
    url = f"sqlite:///{tmp_path / 'noprop_hpo.db'}"
    optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url).ask()
    assert search(tmp_path, hpo_trials=2) == 0
    states = [trial.state.name for trial in trials(tmp_path)]
    assert len(states) == 3 and states.count("COMPLETE") == 2


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_trial_without_a_sign_of_life_is_run_again_and_its_worker_goes_on_with_another(tmp_path, capsys):
    """Of a worker that was killed, or that was suspended and wakes up: others can't tell which."""
    config, options, _ = lab.read_command_line("search", flags(tmp_path))
    data, lost = few_images(config, options.data_root, CPU), []
    worker = hpo.Worker(config, options, data, None, hpo.storage_of(options, 60, 120))

    def new_state(config: LabConfig) -> LabState:
        if not lost:
            lost.append(trials(tmp_path)[0])
            silence(tmp_path / "noprop_hpo.db")
            assert search(tmp_path, hpo_trials=1) == 0  # another worker
        return LabState(config)

    worker.new_state = new_state
    worker.run(lambda: 0)
    assert "taken for dead" in capsys.readouterr().out
    found = trials(tmp_path)
    assert [x.state.name for x in found] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert found[1].params == lost[0].params


@pytest.mark.parametrize(
    ("url", "word", "code"),
    [
        ("postgresql+psycopg2://user:secret@127.0.0.1:9/x", "user:***@127.0.0.1:9/x", 2),
        ("sqlite://", "--hpo-storage sqlite:// names no file: take sqlite:///FILE", 2),
        ("sqlite:///:memory:", "--hpo-storage sqlite:///:memory: names no file", 2),
        ("nonsense", "--hpo-storage is no URL of a database: nonsense", 2),
        ("oracle://x", "oracle", 1),  # whose driver is not installed
        ("nothing://x", "nothing", 2),
        ("sqlite:///x.db?timeout=abc", "x.db?timeout=abc: could not convert", 2),
        ("postgresql://user:secret/x", "no URL of a database: postgresql\n", 2),
    ],
)
def test_a_bad_database_is_named_without_its_password(tmp_path, capsys, url, word, code):
    assert lab.main(["search", *flags(tmp_path), f"--hpo-storage={url}"]) == code
    line = capsys.readouterr().err
    assert word in line and line.count("\n") == 1 and "secret" not in line
    assert not (tmp_path / "noprop_hpo.db").exists()


def test_a_folder_that_can_not_be_locked_is_a_line(tmp_path, capsys, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", forbidden)
    refused(capsys, 2, flags(tmp_path), "Permission denied", main=quick_search)


def test_a_fault_in_the_readers_space_ends_the_search(tmp_path, monkeypatch):
    """Optuna marks the trial as failed, as it does with one that was taken for dead."""

    def suggest(trial) -> dict:
        return {"lr": trial.suggest_categorical("lr", [0.01, 0.02 + trial.number])}

    monkeypatch.setattr(noprop, "suggest", suggest)
    with pytest.raises(ValueError, match="dynamic value space"):
        search(tmp_path, hpo_trials=4)


@pytest.mark.draws
def test_a_signal_after_the_last_trial_ends_the_search_before_the_final_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hpo, "draw_search", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert quick_search(flags(tmp_path)) == 143
    assert (tmp_path / "hpo_best.json").exists() and not (tmp_path / "noprop_hybrid.pt").exists()


def test_no_time_is_no_trial(tmp_path, capsys):
    refused(capsys, 3, flags(tmp_path, hpo_timeout=0), "no trial of the search", main=quick_search)


def test_postgresql(tmp_path):
    """Two workers in folders of their own share a real database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL here (Debian's package postgresql)")
    pytest.importorskip("psycopg2")
    base, user = tmp_path / "pg", []
    base.mkdir()
    if os.geteuid() == 0:  # PostgreSQL refuses root
        user = ["runuser", "-u", "postgres", "--"]
        for folder in (base, tmp_path, *list(tmp_path.parents)[:3]):
            folder.chmod(0o755)
        shutil.chown(base, "postgres", "postgres")
    run = dict(check=True, capture_output=True, cwd="/")
    subprocess.run(
        [*user, programs[-1] / "initdb", "--no-sync", "-D", base / "db", "-A", "trust", "-U", "me"], **run
    )
    options = f"-c fsync=off -c listen_addresses= -c unix_socket_directories={base}"
    control = [*user, programs[-1] / "pg_ctl", "-D", base / "db", "-w"]
    subprocess.run([*control, "-l", base / "log", "-o", options, "start"], **run)
    try:
        url = f"postgresql+psycopg2://me@/postgres?host={base}"
        storage = ("--no-hpo-final-run", f"--hpo-storage={url}")
        files = [tmp_path / "a.txt", tmp_path / "b.txt"]
        commands = [flags(x.with_suffix(""), *storage, hpo_trials=3) for x in files]
        ended([start(*pair, quick_search) for pair in zip(files, commands, strict=True)], files)
        assert len(done(trials(tmp_path, url))) in (3, 4)
        assert all((tmp_path / name / "hpo_best.json").exists() for name in ("a", "b"))
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
