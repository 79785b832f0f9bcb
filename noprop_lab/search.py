"""What Optuna does not do by itself: workers that share a search, on one machine or several.

Each worker is the same command. SQLite in the output folder serves a handful on one machine; a database URL
(PostgreSQL) serves several machines. A worker that gives no sign of life for a minute has lost its trial,
which is run again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError

import noprop_example as noprop
from noprop_example import CHECKPOINT, Data, Failure, FolderInUse, Search, say
from noprop_lab.networks import objective_of
from noprop_lab.settings import LabConfig, LabOptions

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
LOCK = ".noprop_hpo.lock"  # among the workers that share an output folder


def url_of(options: LabOptions):
    """The database: SQLite in the output folder, unless one is named. Raises Failure for no URL."""
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        if options.hpo_storage:
            return make_url(options.hpo_storage)
    except ArgumentError as error:
        raise Failure(f"--hpo-storage is no URL of a database: {options.hpo_storage}") from error
    return URL.create("sqlite", database=str((options.output_dir / "noprop_hpo.db").resolve()))


def storage_of(options: LabOptions, heartbeat: int, grace: int):
    """Optuna's storage, in which a trial shows every so many seconds that its worker is alive."""
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy import event
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    url = url_of(options)
    sqlite = url.get_backend_name() == "sqlite"
    make = partial(
        RDBStorage,
        url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
        engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {},
        heartbeat_interval=heartbeat,
        grace_period=grace,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
    )
    try:
        storage = make()
    except (IntegrityError, ProgrammingError):  # a worker on another machine makes the tables too
        time.sleep(2)
        storage = make()
    if sqlite:  # Python's driver reads outside of transactions: two workers would take the same trial
        storage.engine.dispose()  # what is open already would stay as it is
        event.listen(storage.engine, "connect", lambda driver, _: setattr(driver, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def space_of(config: LabConfig) -> Callable[[Any], dict[str, Any]]:
    """The script's search space, without the settings that an objective does not know."""

    def suggest(trial) -> dict[str, Any]:
        found = noprop.suggest(trial)
        return {name: value for name, value in found.items() if name not in config.WITHOUT_EFFECT}

    return suggest


def draw_search(search: Search, what: str):
    """One of Optuna's pictures: the trials one after another, by each setting, or which setting decides."""
    import optuna
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    name = {"loss": "validation loss", "error": "validation error, %"}[search.options.hpo_objective]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ranges of a single value
        if what == "importance":
            quarter = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            axes = [plots.plot_param_importances(search.study, evaluator=quarter, target_name=name)]
            axes[0].set_title(
                "Importance for being in the best quarter of the trials", loc="left", fontsize=11
            )
        else:
            plot = {"history": plots.plot_optimization_history, "slices": plots.plot_slice}[what]
            axes = np.ravel(plot(search.study, target_name=name))
            for x in axes:
                x.set_yscale("log")
    figure = axes[0].figure
    figure.set_layout_engine("constrained")  # Optuna's own cuts long names off
    pyplot.close(figure)  # it would be kept for a window
    return figure


class Worker(Search):
    """One of several workers of a search."""

    number = None  # of the trial that it runs

    def run(self) -> None:
        """Run trials until the study has enough, whoever ran them. Raises KeyboardInterrupt at a signal."""
        while True:
            try:
                return super().run()
            except (ValueError, UpdateFinishedTrialError):  # Optuna raises either
                if self.study.trials[self.number].state.name != "FAIL":
                    raise
                say("A trial of this worker was taken for dead, and is run by another.")

    def trial(self, trial) -> float:
        self.number = trial.number
        return super().trial(trial)

    def report(self) -> dict[str, Any]:
        """And draw Optuna's pictures."""
        folder = self.options.output_dir
        with FileLock(folder / LOCK):  # others write the same files
            best = super().report()
            enough = len(self.trials("COMPLETE")) >= 8  # to tell which setting decides
            for what in ("history", "slices", "importance")[: 3 if enough else 2]:
                noprop.picture(draw_search, folder / f"hpo_{what}.png", self, what)
        say("Files    hpo_best.json (for --config), hpo_*.png")
        return best


def search(
    config: LabConfig,
    options: LabOptions,
    data: Data,
    new_state: Callable,
    run: Callable[[LabConfig, dict[str, Any] | None], int],
    step: Callable = noprop.train_step,
    suggest: Callable | None = None,
    heartbeat: tuple[int, int] = (HEARTBEAT_SECONDS, GRACE_SECONDS),
) -> int:
    """One worker's search; one of the workers then trains, by run(config, contents of a checkpoint or None).

    Returns the exit code.
    """
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot write into --output-dir {options.output_dir}: {error.strerror}") from error
    where = url_of(options).render_as_string()  # without a password
    warnings.simplefilter("ignore", ExperimentalWarning)  # so Optuna calls its heartbeats
    with noprop.caught_signals() as signalled:
        with noprop.database_failures(where, 2), FileLock(options.output_dir / LOCK):
            storage = storage_of(options, *heartbeat)  # the lock: two at once would make the tables twice
            worker = Worker(config, options, data, new_state, step, suggest or space_of(config), storage)
        with noprop.database_failures(where, 1):
            best, code = noprop.search(worker, signalled)
    if code or not options.hpo_final_run:
        return code
    say("\nTraining with the best settings.")
    final = replace(config, **best)
    name = CHECKPOINT.format(objective_of(final).name)
    try:
        return run(final, noprop.begun(options.output_dir / name, final))
    except FolderInUse:
        say("Another process trains in this folder already, so this one is done.")
        return 0
