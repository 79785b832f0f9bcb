"""The steps of a search, one by one: its space, its first trial, when a trial is pruned."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import noprop
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FixedTrial, TrialState, create_trial

from noprop_lab import search as hpo
from noprop_lab.settings import LabOptions


class Trial:
    """What short_training() asks of a trial."""

    number, study = 0, SimpleNamespace()

    def __init__(self, prune: bool = False):
        self.prune, self.reported, self.user_attrs = prune, [], {}

    def set_user_attr(self, name, value) -> None:
        self.user_attrs[name] = value

    def report(self, value, step) -> None:
        self.reported.append((step, value))

    def should_prune(self) -> bool:
        return self.prune


def run(trial: Trial, data: noprop.Data, epochs: int, cost=lambda record: record["val_loss"]) -> float:
    def records(config: noprop.Config):
        return noprop.train(noprop.State(config), data, threads=1, steps_too=True)

    config = noprop.Config(num_blocks=1, batch_size=128, epochs=epochs)
    return noprop.short_training(config, records, lambda: 0, lambda trial: {}, trial, cost)


def test_a_trial_reports_its_epochs_and_is_pruned_before_its_last_one_only(small_data):
    trial = Trial()
    value = run(trial, small_data, 2)
    assert trial.reported[-1] == (2, value) and len(trial.reported) == 2
    assert isinstance(trial.study.sampler, optuna.samplers.TPESampler)
    assert trial.user_attrs["record"]["val_loss"] == value
    with pytest.raises(optuna.TrialPruned):
        run(trial := Trial(prune=True), small_data, 2)
    assert len(trial.reported) == 1
    assert run(trial := Trial(prune=True), small_data, 1) == trial.reported[0][1]  # it has come to its end
    for value in (math.nan, math.inf):
        with pytest.raises(optuna.TrialPruned):
            run(Trial(), small_data, 1, cost=lambda record, value=value: value)


def test_a_signal_ends_a_trial_after_the_step_not_after_the_epoch(small_data):
    state, trial = noprop.State(noprop.Config(num_blocks=1, batch_size=128, epochs=1)), Trial()
    records, signals = noprop.train(state, small_data, threads=1, steps_too=True), iter([0, 15])
    with pytest.raises(SystemExit) as stop:
        noprop.short_training(state.config, lambda _: records, lambda: next(signals), lambda _: {}, trial)
    assert stop.value.code == 143 and state.step == 2 and not trial.reported


def test_a_trial_without_an_epoch_has_a_line(capsys):
    """And one of words."""
    spaces = {"block": CategoricalDistribution(["small", "deep"]), "lr": FloatDistribution(0, 1)}
    params = {"block": "deep", "lr": 0.01234567}
    noprop.print_trial(None, create_trial(state=TrialState.FAIL, params=params, distributions=spaces))
    expected = "fail: validation loss nan, nan % after epoch 0; block deep, lr 0.0123\n"
    assert capsys.readouterr().out.endswith(expected)


def test_the_search_space_holds_the_defaults_and_is_logarithmic():
    """From one power of ten to another, two to five apart, the default an inner point."""
    study = optuna.create_study()
    noprop.suggest(trial := study.ask())
    defaults = noprop.Config().saved()
    assert set(trial.distributions) == {"lr", "eta_loss_weight", "lambda_global", "embed_wd", "weight_decay"}
    for name, space in trial.distributions.items():
        assert space.log and space.low < defaults[name] < space.high, name
        low, high = ends = [math.log10(x) for x in (space.low, space.high)]
        assert ends == pytest.approx([round(x) for x in ends], abs=1e-9) and 2 <= round(high - low) <= 5, name
    assert noprop.suggest(FixedTrial(defaults)) == {name: defaults[name] for name in trial.distributions}


def test_a_study_of_the_same_settings_is_found_again_and_of_others_is_another(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    first = noprop.open_study(noprop.Config(), url, noprop.suggest)
    again = noprop.open_study(noprop.Config(), url, noprop.suggest)
    assert again.study_name == first.study_name and len(again.trials) == 1  # the settings as given, once
    waiting = again.trials[0].system_attrs["fixed_params"]
    assert waiting == {name: noprop.Config().saved()[name] for name in waiting} and len(waiting) == 5
    for config in (noprop.Config(num_blocks=9), noprop.Config(epochs=2)):
        assert noprop.open_study(config, url, noprop.suggest).study_name != first.study_name
    same = noprop.open_study(noprop.Config(lr=0.02), url, noprop.suggest)
    assert same.study_name == first.study_name  # what is searched for may start elsewhere

    def wider(trial) -> dict:
        return {"lr": trial.suggest_float("lr", 1e-3, 0.2, log=True)} | noprop.suggest(trial)

    with pytest.warns(RuntimeWarning, match="Inconsistent"):  # of Optuna, as lr has two ranges
        assert noprop.open_study(noprop.Config(), url, wider).study_name != first.study_name

    def plain(trial) -> dict:
        return noprop.suggest(trial) | {"augment": False}

    def turned(trial) -> dict:
        return noprop.suggest(trial) | {"augment": True}

    names = {noprop.open_study(noprop.Config(), url, x).study_name for x in (noprop.suggest, plain, turned)}
    assert len(names) == 3  # a constant is a setting too
    with pytest.raises(noprop.Failure, match="embed_wd 0 can't be searched"):  # a logarithmic range has no 0
        noprop.open_study(noprop.Config(embed_wd=0.0, num_blocks=2), url, noprop.suggest)
    with pytest.raises(noprop.Failure, match="eta_min must be at most 0.001"):
        noprop.open_study(noprop.Config(eta_min=0.01), url, noprop.suggest)
    with pytest.raises(noprop.Failure, match="no setting: speed"):
        noprop.open_study(noprop.Config(), url, lambda trial: {"speed": 1})


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take no such name")
def test_a_folder_whose_name_is_no_text(tmp_path, small_data, monkeypatch):
    monkeypatch.setattr(noprop, "load_data", lambda *_: small_data)
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(noprop.Failure, match="codec can't encode"):
        noprop.execute(["--run-hpo", f"--output-dir={folder}"])
    with pytest.raises(noprop.Failure, match="whose name is UTF-8"):
        hpo.url_of(LabOptions(output_dir=Path(folder)))


@pytest.mark.slow
def test_a_search_with_fewer_trials_than_there_are_makes_none(tmp_path, small_data, monkeypatch):
    monkeypatch.setattr(noprop, "load_data", lambda *_: small_data)
    flags = ["--run-hpo", "--epochs=1", "--hpo-epochs=1", "--num-blocks=1", "--batch-size=128"]
    flags += ["--threads=1", f"--output-dir={tmp_path}"]
    for count in (2, 1):
        assert noprop.main([*flags, f"--hpo-trials={count}"]) == 0
        url = f"sqlite:///{tmp_path / 'noprop_hpo.db'}"
        [name] = optuna.get_all_study_names(url)
        assert len(optuna.load_study(study_name=name, storage=url).trials) == 2
