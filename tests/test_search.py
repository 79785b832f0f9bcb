"""The search: resuming, several workers, kills, bad input, pictures; and it sees no test image."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, TINY, noprop
from test_command_line import fails

load_data = noprop.load_data


def few_images(*arguments) -> noprop.Data:
    """500 images to validate and to test on."""
    data = load_data(*arguments)
    val, test = (noprop.Split(x.images[:500], x.labels[:500]) for x in data[1:])
    return noprop.Data(data.train, val, test)


def quick() -> int:
    """The script with short heartbeats and few images, in a process of its own."""
    noprop.HEARTBEAT_SECONDS, noprop.GRACE_SECONDS, noprop.load_data = 1, 3, few_images
    return noprop.main(sys.argv[1:])


@pytest.fixture(autouse=True)
def quick_here(monkeypatch):
    monkeypatch.setattr(noprop, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(noprop, "GRACE_SECONDS", 3)
    monkeypatch.setattr(noprop, "load_data", few_images)


def flags(folder: Path, **changes) -> list[str]:
    values = TINY | {"hpo_trials": 2, "hpo_epochs": 1, "threads": 1, "output_dir": folder} | changes
    return ["--run-hpo", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]


def search(folder: Path, *more: str, **changes) -> int:
    return noprop.main([*flags(folder, **changes), "--no-hpo-final-run", *more])


def worker(arguments: list[str]) -> subprocess.Popen:
    code = "import sys, test_search; sys.exit(test_search.quick())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trials(folder: Path, url: str | None = None) -> list:
    """All trials in the order of their numbers."""
    url = url or f"sqlite:///{folder / 'noprop_hpo.db'}"
    return optuna.load_study(study_name="noprop", storage=url).trials


def done(found: list) -> list:
    return [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


def running(folder: Path) -> bool:
    try:
        return any(trial.state.name == "RUNNING" and len(trial.params) == 5 for trial in trials(folder))
    except Exception:  # there is no database yet
        return False


def test_a_search_goes_on_with_the_missing_trials(tmp_path, capsys):
    """The first trial is the config itself; two and then two more are the four of an undisturbed search."""
    assert search(tmp_path / "a") == 0
    assert search(tmp_path / "a", hpo_trials=4) == 0
    assert "Best of 4 complete trials" in capsys.readouterr().out
    assert search(tmp_path / "b", hpo_trials=4) == 0
    resumed, undisturbed = trials(tmp_path / "a"), trials(tmp_path / "b")
    assert [(x.params, x.value) for x in resumed] == [(x.params, x.value) for x in undisturbed]
    assert resumed[0].params["lr"] == noprop.Config().lr
    assert len({trial.params["lr"] for trial in resumed}) == 4
    assert search(tmp_path / "a", hpo_trials=4) == 0 and len(trials(tmp_path / "a")) == 4


def test_the_best_settings_are_trained_and_can_be_given(tmp_path, capsys):
    assert noprop.main(flags(tmp_path, hpo_trials=3)) == 0
    output = capsys.readouterr().out
    assert "Best of 3 complete trials" in output and "Test accuracy" in output
    best = json.loads((tmp_path / "hpo_best.json").read_text())
    winner = min(trials(tmp_path), key=lambda trial: trial.value)
    assert winner.params.items() <= best.items()
    assert json.loads((tmp_path / "noprop_hybrid.json").read_text())["config"] == best
    assert {"hpo_history.png", "hpo_importance.png"} <= {path.name for path in tmp_path.iterdir()}
    weights = (tmp_path / "noprop_hybrid.pt").read_bytes()
    assert noprop.main(flags(tmp_path, hpo_trials=3)) == 0  # the final run is there already
    assert (tmp_path / "noprop_hybrid.pt").read_bytes() == weights
    assert not (tmp_path / "noprop_hybrid.previous.pt").exists()
    given = noprop.read_config(["--config", str(tmp_path / "hpo_best.json")])
    assert given.saved() == best
    given = noprop.read_config(["--config", str(tmp_path / "noprop_hybrid.json"), "--lr=0.5"])
    assert given.saved() == best | {"lr": 0.5}  # flags win
    (tmp_path / "some.json").write_text('{"lr": 0.25, "augment": false}')
    given = noprop.read_config(["--preset=reference", "--config", str(tmp_path / "some.json"), "--epochs=7"])
    assert (given.lr, given.augment, given.epochs, given.batch_size) == (0.25, False, 7, 128)


def test_a_search_sees_no_test_image(tmp_path, monkeypatch):
    """With a poisoned test set, every trial comes out as before."""
    assert search(tmp_path / "a") == 0

    def poisoned(*arguments):
        data = few_images(*arguments)
        return data._replace(test=noprop.Split(255 - data.test.images, data.test.labels.flip(0)))

    monkeypatch.setattr(noprop, "load_data", poisoned)
    assert search(tmp_path / "b") == 0
    a, b = trials(tmp_path / "a"), trials(tmp_path / "b")
    assert [(x.params, x.value) for x in a] == [(x.params, x.value) for x in b]
    assert all(trial.user_attrs["record"]["test_accuracy"] is None for trial in a)


def test_two_workers_share_the_trials_and_one_trains(tmp_path):
    several = [worker(flags(tmp_path, hpo_trials=7)) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in several]
    assert [process.returncode for process in several] == [0, 0], outputs
    found = trials(tmp_path)
    assert len(found) == len(done(found)) == len({trial.params["lr"] for trial in found}) == 7
    assert sum("Training with the best settings" in output for output in outputs) >= 1
    assert all(("Test accuracy" in x) != ("trains in this folder already" in x) for x in outputs), outputs
    assert not (tmp_path / "noprop_hybrid.previous.pt").exists()


def test_the_trial_of_a_killed_worker_is_run_again(tmp_path):
    process = worker([*flags(tmp_path, hpo_epochs=3), "--no-hpo-final-run"])
    wait_until(lambda: running(tmp_path), process)
    process.kill()
    process.communicate()
    killed = trials(tmp_path)[-1]
    assert search(tmp_path, hpo_epochs=3) == 0
    found = trials(tmp_path)
    assert len(done(found)) == 2 and found[killed.number].state.name == "FAIL"
    assert killed.params in [trial.params for trial in done(found)]


def test_a_trial_whose_worker_died_before_its_first_heartbeat_holds_nobody_up(tmp_path):
    assert search(tmp_path, hpo_trials=1) == 0
    optuna.load_study(study_name="noprop", storage=f"sqlite:///{tmp_path / 'noprop_hpo.db'}").ask()
    assert search(tmp_path, hpo_trials=2) == 0
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_trial_taken_for_dead_is_left_to_the_worker_that_has_it(tmp_path):
    """A worker that was suspended wakes up after its trial was given away: it goes on with another."""
    process = worker([*flags(tmp_path, hpo_epochs=8, hpo_trials=3), "--no-hpo-final-run"])
    wait_until(lambda: running(tmp_path), process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    assert search(tmp_path, hpo_epochs=8, hpo_trials=1) == 0
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert len(done(trials(tmp_path))) == 3


def test_a_signal_in_a_trial_loses_nothing(tmp_path):
    process = worker(flags(tmp_path, hpo_epochs=200, hpo_trials=9, train_images=2000))
    wait_until(lambda: running(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in output, output
    assert output.endswith("are done.\nStopped. The same command goes on.\n") and not done(trials(tmp_path))


def test_after_a_signal_the_best_so_far_is_there_and_the_search_goes_on(tmp_path, monkeypatch, capsys):
    step, steps = noprop.train_step, []

    def train_step(training, *rest):
        steps.append(training.step)
        if len(steps) == 10:  # a trial has four
            signal.raise_signal(signal.SIGINT)
        return step(training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(noprop, "train_step", train_step)
        assert search(tmp_path, hpo_trials=4) == 130
    assert "Best of 2 complete trials" in capsys.readouterr().out and (tmp_path / "hpo_best.json").exists()
    interrupted = trials(tmp_path)[2]
    assert interrupted.state.name == "FAIL"
    assert search(tmp_path, hpo_trials=4) == 0
    found = done(trials(tmp_path))
    assert len(found) == 4 and interrupted.params in [trial.params for trial in found]


def test_a_bad_trial_is_stopped_early_and_one_that_diverges_does_not_end_the_search(tmp_path, monkeypatch):
    """The sixth trial learns nothing, or diverges."""
    rates = [0.01] * 5 + [1e-5]

    def suggest(trial, objective):
        return {"lr": rates[trial.number], "weight_decay": trial.suggest_float("weight_decay", 0, 0.01)}

    monkeypatch.setattr(noprop, "suggest", suggest)
    step = noprop.train_step

    def poisoned(training, image, *rest):
        return step(training, image * float("nan" if training.config.lr == 1e-5 else 1), *rest)

    more = {"hpo_trials": 6, "hpo_epochs": 2, "batch_size": 32, "num_blocks": 2}
    assert search(tmp_path / "a", **more) == 0
    stopped = [(x.number, x.last_step) for x in trials(tmp_path / "a") if x.state.name == "PRUNED"]
    assert (5, 1) in stopped
    monkeypatch.setattr(noprop, "train_step", poisoned)
    assert search(tmp_path / "b", **more) == 0
    assert (5, None) in [(x.number, x.last_step) for x in trials(tmp_path / "b") if x.state.name == "PRUNED"]


def test_a_search_in_which_everything_diverges_says_so(tmp_path, monkeypatch, capsys):
    step = noprop.train_step
    monkeypatch.setattr(noprop, "train_step", lambda t, image, *rest: step(t, image * float("nan"), *rest))
    fails(capsys, 3, [*flags(tmp_path), "--no-hpo-final-run"], "no trial of the search is complete")


def test_a_space_of_the_readers_own(tmp_path, monkeypatch):
    """Choices without the config's own value, and a setting that is not searched: the final run has both."""
    monkeypatch.setattr(
        noprop, "suggest", lambda trial, _: {"lr": trial.suggest_categorical("lr", [0.02]), "augment": False}
    )
    assert noprop.main(flags(tmp_path, hpo_trials=1)) == 0
    trained = json.loads((tmp_path / "noprop_hybrid.json").read_text())["config"]
    assert trained == json.loads((tmp_path / "hpo_best.json").read_text())
    assert (trained["lr"], trained["augment"]) == (0.02, False)


def test_a_suggestion_that_is_no_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noprop, "suggest", lambda trial, _: {"speed": trial.suggest_float("speed", 1, 2)})
    fails(capsys, 2, flags(tmp_path), "suggest() proposes what is no setting", "speed")


def test_a_time_limit_ends_the_search(tmp_path, capsys):
    assert search(tmp_path, hpo_trials=1000, hpo_timeout=0.1) == 0
    assert len(done(trials(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [({"hpo_epochs": 2}, "epochs is 1, not 2"), ({"num_blocks": 2}, "num_blocks is 3, not 2")],
)
def test_a_search_with_other_settings_is_refused(tmp_path, capsys, change, word):
    assert search(tmp_path, hpo_trials=1) == 0
    capsys.readouterr()
    fails(capsys, 2, flags(tmp_path, **change), word, "noprop_hpo.db")


def test_a_search_of_another_space_is_refused(tmp_path, capsys, monkeypatch):
    assert search(tmp_path, hpo_trials=1) == 0
    capsys.readouterr()
    monkeypatch.setattr(noprop, "suggest", lambda trial, _: {"lr": trial.suggest_float("lr", 1e-3, 1e-2)})
    fails(capsys, 2, flags(tmp_path), "the range of")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--hpo-trials=0"], "hpo_trials must be at least 1"),
        (["--hpo-timeout=0"], "hpo_timeout must be positive"),
        (["--hpo-storage=postgresql://user:secret@127.0.0.1:9/x"], "postgresql://user:***@127.0.0.1:9/x"),
        (["--hpo-storage=nonsense"], "--hpo-storage"),
        (["--hpo-storage=oracle://x"], "oracle"),
        (["--config=none.json"], "cannot read settings from none.json"),
        (["--config=list.json"], "cannot read settings from list.json"),
        (["--config=unknown.json"], "--speed"),
        (["--config=unfit.json"], "--patience"),
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
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: sqlite:///") and result.stderr.count("\n") == 1, result.stderr
    kept = len(done(trials(tmp_path)))
    assert kept >= 1 and search(tmp_path, hpo_trials=kept + 1) == 0


def test_importances_of_too_few_trials(tmp_path, monkeypatch):
    """The picture says that there are too few."""
    texts, save = {}, noprop.save_figure

    def save_figure(figure, path, **more):
        texts[path.name] = [text.get_text() for axes in figure.axes for text in axes.texts]
        save(figure, path, **more)

    monkeypatch.setattr(noprop, "save_figure", save_figure)
    assert search(tmp_path, hpo_trials=1) == 0
    assert texts["hpo_importance.png"] == ["importances take 8 complete trials, this search has 1"]
    assert (tmp_path / "hpo_importance.png").stat().st_size > 10_000


def test_postgresql(tmp_path):
    """Two workers in folders of their own share a real database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL here (Debian's package postgresql)")
    pytest.importorskip("psycopg2")
    base, user = tmp_path / "pg", []
    tmp_path.chmod(0o755)
    base.mkdir()
    if os.geteuid() == 0:  # PostgreSQL refuses root
        user = ["runuser", "-u", "postgres", "--"]
        for folder in (base, *list(tmp_path.parents)[:3]):
            folder.chmod(0o755)
        import shutil

        shutil.chown(base, "postgres", "postgres")
    run = dict(check=True, capture_output=True, cwd="/")
    subprocess.run([*user, programs[-1] / "initdb", "-D", base / "db", "-A", "trust", "-U", "me"], **run)
    options = f"-c listen_addresses= -c unix_socket_directories={base}"
    control = [*user, programs[-1] / "pg_ctl", "-D", base / "db", "-w"]
    subprocess.run([*control, "-l", base / "log", "-o", options, "start"], **run)
    try:
        url = f"postgresql+psycopg2://me@/postgres?host={base}"
        several = [
            worker([*flags(tmp_path / name, hpo_trials=5, hpo_storage=url), "--no-hpo-final-run"])
            for name in ("a", "b")
        ]
        outputs = [process.communicate(timeout=120)[0] for process in several]
        assert [process.returncode for process in several] == [0, 0], outputs
        assert len(done(trials(tmp_path, url))) == 5
        assert all((tmp_path / name / "hpo_best.json").exists() for name in ("a", "b"))
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **run)
