"""The script's search: resuming, kills, bad input; and it sees no test image."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, TINY, fails, noprop


def flags(folder: Path, **changes) -> list[str]:
    values = TINY | {"hpo_trials": 2, "hpo_epochs": 1, "threads": 1, "output_dir": folder} | changes
    return ["--run-hpo", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def search(folder: Path, *more: str, **changes) -> int:
    return noprop.main([*flags(folder, **changes), "--no-hpo-final-run", *more])


def worker(folder: Path, data: noprop.Data, epochs: int = 1, trials: int = 2, **more) -> noprop.Search:
    """A search on few validation images; more: step, suggest."""
    folder.mkdir(exist_ok=True)
    options = noprop.Options(output_dir=folder, hpo_trials=trials, hpo_epochs=epochs, run_hpo=True)
    return noprop.Search(noprop.Config(**TINY), options, data, noprop.State, **more)


def trials(folder: Path) -> list:
    """All trials in the order of their numbers."""
    return optuna.load_study(study_name="noprop", storage=f"sqlite:///{folder / 'noprop_hpo.db'}").trials


def outcome(found: list) -> list:
    return [(trial.params, trial.value) for trial in found]


def test_a_search_goes_on_with_the_missing_trials(tmp_path, small_data, capsys):
    """The first trial is the config itself; two and then two more are the four of an undisturbed search."""
    worker(tmp_path / "a", small_data).run()
    worker(tmp_path / "a", small_data, trials=4).run()
    worker(tmp_path / "b", small_data, trials=4).run()
    resumed = trials(tmp_path / "a")
    assert outcome(resumed) == outcome(trials(tmp_path / "b"))
    assert resumed[0].params["lr"] == noprop.Config().lr
    assert len({trial.params["lr"] for trial in resumed}) == 4
    worker(tmp_path / "a", small_data, trials=4).run()
    assert len(trials(tmp_path / "a")) == 4
    assert "  4/4  trial  3: validation" in capsys.readouterr().out


def test_the_best_settings_are_trained_and_can_be_given(tmp_path, capsys):
    assert noprop.main(flags(tmp_path, hpo_trials=3)) == 0
    output = capsys.readouterr().out
    assert "Best of 3 complete trials" in output and "Test accuracy" in output
    best = json.loads((tmp_path / "hpo_best.json").read_text())
    winner = min(trials(tmp_path), key=lambda trial: trial.value)
    assert winner.params.items() <= best.items()
    assert json.loads((tmp_path / "noprop_hybrid.json").read_text())["config"] == best
    weights = (tmp_path / "noprop_hybrid.pt").read_bytes()
    assert noprop.main(flags(tmp_path, hpo_trials=3)) == 0  # the final run is there already
    assert "Resuming" in capsys.readouterr().out and not (tmp_path / "noprop_hybrid.1.pt").exists()
    assert (tmp_path / "noprop_hybrid.pt").read_bytes() == weights

    def given(*arguments: str) -> noprop.Config:
        return noprop.read_command_line(list(arguments))[0]

    assert given("--config", str(tmp_path / "hpo_best.json")).saved() == best
    assert given("--config", str(tmp_path / "noprop_hybrid.json"), "--lr=0.5").saved() == best | {"lr": 0.5}
    (tmp_path / "some.json").write_text('{"lr": 0.25, "augment": true}')
    mixed = given("--preset=reference", "--config", str(tmp_path / "some.json"), "--epochs=7")
    assert (mixed.lr, mixed.augment, mixed.epochs, mixed.batch_size) == (0.25, True, 7, 128)


def test_a_search_sees_no_test_image_and_judges_by_validation(tmp_path, small_data):
    """With a poisoned test set, every trial comes out as before; not with a poisoned validation set."""
    bad = noprop.Split(255 - small_data.test.images, small_data.test.labels.flip(0))
    for name, data in (
        ("a", small_data),
        ("b", small_data._replace(test=bad)),
        ("c", small_data._replace(val=bad)),
    ):
        found = worker(tmp_path / name, data)
        assert found.data.test is None
        found.run()
    a, b, c = (outcome(trials(tmp_path / name)) for name in "abc")
    assert a == b and a[0][1] != c[0][1]
    assert all(trial.user_attrs["record"]["test_accuracy"] is None for trial in trials(tmp_path / "a"))


@pytest.mark.parametrize("objective", ["loss", "error"])
def test_what_a_trial_is_judged_by(tmp_path, small_data, objective):
    found = worker(tmp_path, small_data, trials=1)
    found.options = replace(found.options, hpo_objective=objective)
    found.run()
    [trial] = trials(tmp_path)
    record = trial.user_attrs["record"]
    assert trial.value == {"loss": record["val_loss"], "error": 100 - record["val_accuracy"]}[objective]


def test_a_signal_in_a_trial_loses_nothing(tmp_path, small_data):
    """What is complete is there, and the interrupted trial is run again."""
    found, steps = worker(tmp_path, small_data, trials=4), []
    found.signalled = lambda: signal.SIGINT * (len(steps.append(0) or steps) == 10)  # a trial has four
    with pytest.raises(KeyboardInterrupt):
        found.run()
    interrupted = trials(tmp_path)[2]
    assert interrupted.state.name == "FAIL" and len(found.trials("COMPLETE")) == 2
    worker(tmp_path, small_data, trials=4).run()
    done = [trial for trial in trials(tmp_path) if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(done) == 4 and interrupted.params in [trial.params for trial in done]


def test_after_a_signal_the_best_so_far_is_written(tmp_path, small_data, capsys):
    found = worker(tmp_path, small_data, trials=3)
    steps = []
    best, code = noprop.search(found, lambda: signal.SIGTERM * (len(steps.append(0) or steps) == 6))
    assert code == 143 and best["lr"] == noprop.Config().lr and (tmp_path / "hpo_best.json").exists()
    assert "Stopped. The same command goes on." in capsys.readouterr().out


def test_the_trial_of_a_killed_process_is_run_again(tmp_path):
    command = [sys.executable, str(ROOT / "noprop_example.py"), *flags(tmp_path, hpo_epochs=500)]
    process = subprocess.Popen([*command, "--no-hpo-final-run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("Search: ")  # the database is made
    deadline = time.monotonic() + 60
    while not any(len(trial.params) == 5 for trial in trials(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert [trial.state.name for trial in trials(tmp_path)] == ["RUNNING"]
    assert search(tmp_path, hpo_epochs=500, hpo_timeout=1e-9) == 3  # no time for a trial: it only takes over
    dead, waiting = trials(tmp_path)
    assert (dead.state.name, waiting.state.name) == ("FAIL", "WAITING")
    assert waiting.system_attrs["fixed_params"] == dead.params


def test_a_bad_trial_is_stopped_early_and_one_that_diverges_does_not_end_the_search(tmp_path, small_data):
    """The sixth trial learns nothing, or diverges."""
    rates = [0.01] * 5 + [1e-5]

    def suggest(trial):
        return {"lr": rates[trial.number], "weight_decay": trial.suggest_float("weight_decay", 0, 0.01)}

    def poisoned(state, image, *rest):
        return noprop.train_step(state, image * (math.nan if state.config.lr == 1e-5 else 1), *rest)

    for name, step, last in (("a", noprop.train_step, 1), ("b", poisoned, None)):
        worker(tmp_path / name, small_data, epochs=2, trials=6, suggest=suggest, step=step).run()
        stopped = {x.number: x.last_step for x in trials(tmp_path / name) if x.state.name == "PRUNED"}
        assert stopped[5] == last


def test_a_search_in_which_everything_diverges_says_so(tmp_path, small_data):
    def poisoned(state, image, *rest):
        return noprop.train_step(state, image * math.nan, *rest)

    with pytest.raises(noprop.Failure, match="no trial of the search is complete") as failure:
        noprop.search(worker(tmp_path, small_data, step=poisoned), lambda: 0)
    assert failure.value.code == 3


def test_a_space_of_the_readers_own(tmp_path, small_data):
    """Choices without the config's own value, and a setting that is not searched: the best has both."""

    def suggest(trial):
        return {"lr": trial.suggest_categorical("lr", [0.02]), "augment": False}

    best, code = noprop.search(worker(tmp_path, small_data, trials=1, suggest=suggest), lambda: 0)
    assert (best, code) == ({"lr": 0.02, "augment": False}, 0)
    written = json.loads((tmp_path / "hpo_best.json").read_text())
    assert (written["lr"], written["augment"], written["epochs"]) == (0.02, False, 1)


def test_a_suggestion_that_is_no_setting(tmp_path, small_data):
    found = worker(tmp_path, small_data, suggest=lambda trial: {"lr": trial.suggest_float("speed", -2, -1)})
    with pytest.raises(noprop.Failure, match="proposes what is no setting"):
        found.run()


def test_a_time_limit_ends_the_search(tmp_path):
    assert search(tmp_path, hpo_trials=1000, hpo_timeout=0.1) == 0
    assert 1 <= len(trials(tmp_path)) < 5


def test_another_search_is_refused(tmp_path, small_data, capsys):
    """With other settings, of another space, or by another measure."""
    found = worker(tmp_path, small_data, trials=1)
    found.run()
    with pytest.raises(noprop.Failure, match="range of lr"):
        worker(tmp_path, small_data, suggest=lambda trial: {"lr": trial.suggest_float("lr", 1e-3, 1e-2)})
    capsys.readouterr()
    fails(capsys, 2, flags(tmp_path, num_blocks=2), "num_blocks 3, not 2")
    fails(capsys, 2, flags(tmp_path, hpo_epochs=2), "epochs 1, not 2")
    fails(capsys, 2, flags(tmp_path, hpo_objective="error"), "hpo_objective loss, not error")


@pytest.mark.parametrize("name", ["x?1", "a {b} %41#c"])
def test_any_name_of_a_folder(tmp_path, name):
    assert search(tmp_path / name, hpo_trials=1) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "noprop_hpo.db").exists()


def test_a_second_search_in_the_same_folder_is_refused(tmp_path, capsys):
    with noprop.output_folder(tmp_path):
        fails(capsys, 2, [*flags(tmp_path), "--no-hpo-final-run"], "another run writes into")
    assert not (tmp_path / "noprop_hpo.db").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--hpo-trials=0"], "hpo_trials must be at least 1"),
        (["--hpo-timeout=0"], "hpo_timeout must be positive"),
        (["--config=none.json"], "cannot read settings from none.json"),
        (["--config=list.json"], "cannot read settings from list.json"),
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
    fails(capsys, 2, flags(tmp_path), "noprop_hpo.db", "file is not a database")


def test_a_full_disk_in_mid_search_is_one_line(tmp_path):
    """A limit on the size of files stands for the full disk."""
    assert search(tmp_path, hpo_trials=1) == 0
    blocks = (tmp_path / "noprop_hpo.db").stat().st_size // 1024 + 8
    arguments = " ".join([*flags(tmp_path, hpo_trials=200), "--no-hpo-final-run"])
    command = f"ulimit -f {blocks}; exec {sys.executable} {ROOT / 'noprop_example.py'} {arguments}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200)
    assert result.returncode == 1, result.stderr
    assert "noprop_hpo.db: " in result.stderr and result.stderr.count("\n") == 1, result.stderr
    kept = len([x for x in trials(tmp_path) if x.state.name in ("COMPLETE", "PRUNED")])
    assert kept >= 1 and search(tmp_path, hpo_trials=kept + 1) == 0
