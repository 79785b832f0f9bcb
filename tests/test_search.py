"""The script's search: resuming, kills, bad input; and it sees no test image."""

import json
import math
import signal
from pathlib import Path

import optuna
import pytest
import torch
from conftest import TINY, fails, noprop, small_disk
from laboratory import contents, equal


def flags(folder: Path, **changes) -> list[str]:
    values = (
        TINY
        | {"hpo_trials": 2, "hpo_epochs": 1, "threads": 1, "num_blocks": 1, "output_dir": folder}
        | changes
    )
    return ["--run-hpo", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def search(folder: Path, **changes) -> int:
    return noprop.main(flags(folder, **changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch, small_data):
    """Few images to validate and to test on."""

    def few(config, *_) -> noprop.Data:
        train = noprop.Split(*(x[: config.train_images] for x in small_data.train))
        return small_data._replace(train=train, augment=noprop.augment if config.augment else None)

    monkeypatch.setattr(noprop, "load_data", few)


def trials(folder: Path) -> list:
    """All trials in the order of their numbers."""
    [name] = optuna.get_all_study_names(url := f"sqlite:///{folder / 'noprop_hpo.db'}")
    return optuna.load_study(study_name=name, storage=url).trials


def outcome(found: list) -> list:
    return [(trial.params, trial.value) for trial in found]


def test_a_search_goes_on_with_the_missing_trials(tmp_path, capsys):
    """The first trial is the config itself; two and then one more are the three of an undisturbed search."""
    assert search(tmp_path / "a", hpo_trials=2) == search(tmp_path / "a", hpo_trials=3) == 0
    assert search(tmp_path / "b", hpo_trials=3) == 0
    resumed = trials(tmp_path / "a")
    assert outcome(resumed) == outcome(trials(tmp_path / "b"))
    assert resumed[0].params["lr"] == noprop.Config().lr
    assert len({trial.params["lr"] for trial in resumed}) == 3
    assert search(tmp_path / "a", hpo_trials=3) == 0 and len(trials(tmp_path / "a")) == 3
    assert "trial   2 complete: validation loss" in capsys.readouterr().out


def test_the_best_settings_are_trained_and_can_be_given(tmp_path, capsys):
    assert search(tmp_path, hpo_trials=3, hpo_epochs=2) == 0  # the final run has one epoch
    output = capsys.readouterr().out
    assert "The best, now in hpo_best.json" in output and "Test accuracy" in output
    best = json.loads((tmp_path / "hpo_best.json").read_text())
    winner = min(trials(tmp_path), key=lambda trial: trial.value)
    assert winner.params.items() <= best.items() and best["epochs"] == TINY["epochs"]
    assert winner.value == winner.user_attrs["record"]["val_loss"]
    assert json.loads((tmp_path / "noprop_hybrid.json").read_text())["config"] == best
    weights = contents(tmp_path / "noprop_hybrid.pt")
    assert search(tmp_path, hpo_trials=3, hpo_epochs=2) == 0  # the final run is there already
    assert "resuming" in capsys.readouterr().out and not (tmp_path / "noprop_hybrid.1.pt").exists()
    assert equal(contents(tmp_path / "noprop_hybrid.pt"), weights)

    def given(*arguments: str) -> noprop.Config:
        return noprop.read_command_line(list(arguments))[0]

    assert given("--config", str(tmp_path / "hpo_best.json")).saved() == best
    assert given("--config", str(tmp_path / "noprop_hybrid.json"), "--lr=0.5").saved() == best | {"lr": 0.5}
    (tmp_path / "some.json").write_text('{"lr": 0.25, "augment": true}')
    mixed = given("--preset=reference", "--config", str(tmp_path / "some.json"), "--epochs=7")
    assert (mixed.lr, mixed.augment, mixed.epochs, mixed.batch_size) == (0.25, True, 7, 128)


def test_what_is_there_already_is_kept_where_it_can_not_be_read(tmp_path):
    (tmp_path / "noprop_hybrid.pt").write_text("damaged")
    assert search(tmp_path, hpo_trials=1) == 0
    assert (tmp_path / "noprop_hybrid.1.pt").read_text() == "damaged"
    assert noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")


def test_another_run_that_is_there_is_kept_and_not_gone_on_with(tmp_path):
    """Of other settings, of other images, of another device, and one of weights alone."""
    assert search(tmp_path, hpo_trials=1) == 0
    made = contents(path := tmp_path / "noprop_hybrid.pt")
    lack = {name: x for name, x in made.items() if name != "data"}
    others = {"config": made["config"] | {"lr": 0.5}}, {"data": "x"}, {"made_with": {"device": "mps"}}
    for number, other in enumerate([*(made | x for x in others), lack], start=1):
        torch.save(other, path)
        assert search(tmp_path, hpo_trials=1) == 0
        assert equal(contents(tmp_path / f"noprop_hybrid.{number}.pt"), other)


def test_a_search_sees_no_test_image_and_judges_by_validation(tmp_path, small_data, monkeypatch):
    """With a poisoned test set, every trial comes out as before; not with a poisoned validation set."""
    bad = noprop.Split(255 - small_data.test.images, small_data.test.labels.flip(0))
    for name, data in (
        ("a", small_data),
        ("b", small_data._replace(test=bad)),
        ("c", small_data._replace(val=bad)),
    ):
        monkeypatch.setattr(noprop, "load_data", lambda *_, data=data: data)
        assert search(tmp_path / name, hpo_trials=1) == 0
    a, b, c = (outcome(trials(tmp_path / name)) for name in "abc")
    assert a == b and a[0][1] != c[0][1]
    assert all(trial.user_attrs["record"]["test_accuracy"] is None for trial in trials(tmp_path / "a"))


def test_a_trial_that_was_stopped_is_run_again(tmp_path, monkeypatch, capsys):
    """By a signal; that of a process that was killed is in the database just so."""
    calls, train_block = [], noprop.train_block

    def stopping(*arguments, **more):
        if len(calls.append(0) or calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_block(*arguments, **more)

    monkeypatch.setattr(noprop, "train_block", stopping)
    assert search(tmp_path, hpo_trials=1) == 143
    assert "Stopped. The same command goes on." in capsys.readouterr().out
    [stopped] = trials(tmp_path)
    assert stopped.state.name == "RUNNING" and stopped.params
    assert search(tmp_path, hpo_trials=1) == 0
    first, again = trials(tmp_path)
    assert (first.state.name, again.state.name) == ("FAIL", "COMPLETE") and again.params == stopped.params


def test_a_bad_trial_is_stopped_early_and_one_that_diverges_does_not_end_the_search(tmp_path, monkeypatch):
    """The sixth trial learns nothing, or diverges."""
    rates, train_block = [0.01] * 5 + [1e-5], noprop.train_block

    def suggest(trial):
        number = getattr(trial, "number", 0)
        return {"lr": rates[number], "weight_decay": trial.suggest_float("weight_decay", 0, 0.01)}

    def poisoned(state, t, image, *rest):
        return train_block(state, t, image * (math.nan if state.config.lr == 1e-5 else 1), *rest)

    monkeypatch.setattr(noprop, "suggest", suggest)
    for name, last in (("a", 1), ("b", None)):
        if name == "b":
            monkeypatch.setattr(noprop, "train_block", poisoned)
        assert search(tmp_path / name, hpo_epochs=2, hpo_trials=6, lr=0.01, num_blocks=3) == 0
        stopped = {x.number: x.last_step for x in trials(tmp_path / name) if x.state.name == "PRUNED"}
        assert stopped[5] == last


def test_a_search_in_which_everything_diverges_says_so(tmp_path, monkeypatch, capsys):
    train_block = noprop.train_block

    def poisoned(state, t, image, *rest):
        return train_block(state, t, image * math.nan, *rest)

    monkeypatch.setattr(noprop, "train_block", poisoned)
    fails(capsys, 3, flags(tmp_path), "no trial of the search is complete")


def test_a_space_of_the_readers_own(tmp_path, monkeypatch):
    """Choices without the config's own value, and a setting that is not searched: the best has both.

    And so have the images, of the trial and of the run that follows.
    """
    monkeypatch.setattr(
        noprop, "suggest", lambda trial: {"lr": trial.suggest_categorical("lr", [0.02]), "augment": False}
    )
    monkeypatch.setattr(noprop, "augment", lambda *_: pytest.fail("the images are augmented"))
    assert search(tmp_path, hpo_trials=1) == 0
    written = json.loads((tmp_path / "hpo_best.json").read_text())
    assert (written["lr"], written["augment"], written["epochs"]) == (0.02, False, 1)


@pytest.mark.parametrize(
    ("suggest", "words"),
    [
        (lambda trial: {"speed": trial.suggest_float("speed", 1, 2)}, "what is no setting: speed"),
        (lambda trial: {"lr": trial.suggest_float("speed", -2, -1)}, "lr must be at least 0"),
    ],
)
def test_a_suggestion_that_is_no_setting(tmp_path, monkeypatch, capsys, suggest, words):
    monkeypatch.setattr(noprop, "suggest", suggest)
    fails(capsys, 2, flags(tmp_path), words)


@pytest.mark.parametrize("name", ["x?1", "a {b} %41#c"])
def test_any_name_of_a_folder(tmp_path, name):
    assert search(tmp_path / name, hpo_trials=1) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "noprop_hpo.db").exists()


def test_a_second_search_in_the_same_folder_is_refused(tmp_path, capsys):
    with noprop.locked(tmp_path):
        fails(capsys, 2, flags(tmp_path), "another run writes into")
    assert not (tmp_path / "noprop_hpo.db").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--hpo-trials=0"], "hpo_trials must be at least 1"),
        (["--config=none.json"], "cannot use the settings in none.json"),
        (["--config=list.json"], "cannot use the settings in list.json"),
        (["--config=unknown.json"], "speed"),
        (["--config=unfit.json"], "patience"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, more, word):
    monkeypatch.chdir(tmp_path)
    for name, content in (("list", "[1]"), ("unknown", '{"speed": 1}'), ("unfit", '{"patience": 1.5}')):
        (tmp_path / f"{name}.json").write_text(content)
    fails(capsys, 2, [*flags(tmp_path), *more], word)
    assert not (tmp_path / "noprop_hpo.db").exists()


def test_a_file_that_is_no_database_is_refused(tmp_path, capsys):
    (tmp_path / "noprop_hpo.db").write_text("this is a text" * 1000)
    fails(capsys, 1, flags(tmp_path), "noprop_hpo.db", "file is not a database")


def test_a_database_of_another_version_of_optuna_is_a_line(tmp_path, capsys, monkeypatch):
    create = optuna.create_study

    def made(storage=None, **how):
        if storage:
            raise RuntimeError("The runtime optuna version 5 is no longer compatible with the table schema")
        return create(**how)

    monkeypatch.setattr(optuna, "create_study", made)
    fails(capsys, 1, flags(tmp_path), "noprop_hpo.db: The runtime optuna version")


def test_a_signal_at_the_end_of_the_last_trial_is_heard(tmp_path, monkeypatch, capsys):
    signals = [signal.SIGTERM]
    monkeypatch.setattr(noprop, "print_trial", lambda *_: signals and signal.raise_signal(signals.pop()))
    assert search(tmp_path, hpo_trials=1) == 143
    assert "Stopped. The same command goes on." in capsys.readouterr().out
    assert not (tmp_path / "noprop_hybrid.pt").exists()


def test_a_disk_that_takes_not_even_the_end_of_a_trial_is_one_line(tmp_path, monkeypatch, capsys):
    """Optuna then ends in an error of its own, which hides that of the disk."""
    storage = optuna.storages.RDBStorage
    write = storage.set_trial_state_values

    def full(*arguments, **more):
        raise optuna.exceptions.StorageInternalError("in the commit") from OSError(28, "disk is full")

    def finish(self, trial_id, state, *arguments, **more):
        return (full if state.is_finished() else write)(self, trial_id, state, *arguments, **more)

    monkeypatch.setattr(storage, "set_trial_state_values", finish)
    monkeypatch.setattr(storage, "set_trial_intermediate_value", full)
    fails(capsys, 1, flags(tmp_path), "noprop_hpo.db: disk is full")


def test_a_full_disk_in_mid_search_is_one_line(tmp_path, capsys):
    assert search(tmp_path, hpo_trials=1) == 0
    before = outcome(trials(tmp_path))
    with small_disk((tmp_path / "noprop_hpo.db").stat().st_size + 4096):
        fails(capsys, 1, flags(tmp_path, hpo_trials=200), "noprop_hpo.db: ")
    found = [x for x in trials(tmp_path) if x.state.name in ("COMPLETE", "PRUNED")]
    assert outcome(found)[:1] == before and search(tmp_path, hpo_trials=len(found) + 1) == 0
