"""What Optuna does not do by itself: workers that share a search, on one machine or several.

Each worker is the same command. SQLite in the output folder serves a handful on one machine; a database URL
(PostgreSQL) serves several machines. A worker that gives no sign of life for a minute has lost its trial,
which is run again.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import optuna
import torch
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

import noprop_example as noprop
from noprop_example import Data, Failure, say, standard_error
from noprop_lab.data import with_augmentation
from noprop_lab.networks import LabState, read_checkpoint
from noprop_lab.settings import LabConfig, LabOptions, WholeConfig

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
LOCK = ".noprop_hpo.lock"  # among the workers that share an output folder
DECIDING = {"target", *(by for by, _ in noprop.IDLE.values())}  # by which others have an effect, or none
READ = {"dataset", "image_size", "classes", "all_images", "train_images"}  # decide which images there are


def url_of(options: LabOptions):
    """The database: SQLite in the output folder, unless one is named. Raises Failure for what is no URL."""
    if options.hpo_storage:
        try:
            url = make_url(options.hpo_storage)
        except (ArgumentError, ValueError) as error:  # of a port that is no number
            shown = options.hpo_storage.partition(":")[0]  # what follows may hold a password
            raise Failure(f"--hpo-storage is no URL of a database: {shown}") from error
        if url.drivername.startswith("sqlite") and ":memory:" in (url.database or ":memory:"):
            shown = unquote(url.render_as_string())  # without a password
            raise Failure(f"--hpo-storage {shown} names no file: take sqlite:///FILE")
        return url
    url = URL.create("sqlite", database=str((options.output_dir / "noprop_hpo.db").resolve()))
    try:
        url.render_as_string()
    except UnicodeEncodeError as error:
        raise Failure(f"{options.output_dir}: a search takes a folder whose name is UTF-8", 1) from error
    return url


def run_again(study, trial) -> None:
    """Put the trial of a dead worker back into the queue; who takes it says anew whose it is."""
    trial.user_attrs.pop("worker", None)
    # as fixed, not as found: so settings outside of the space, the first ones as given, are tried again too
    trial.system_attrs["fixed_params"] = trial.system_attrs.get("fixed_params", {}) | trial.params
    trial.params, trial.distributions = {}, {}
    optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)(study, trial)


def storage_of(options: LabOptions, heartbeat: int, grace: int):
    """Optuna's storage, in which a trial shows every so many seconds that its worker is alive."""
    url = url_of(options)
    sqlite = url.get_backend_name() == "sqlite"
    make = partial(
        optuna.storages.RDBStorage,
        url.render_as_string(hide_password=False),
        engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {},
        heartbeat_interval=heartbeat,
        grace_period=grace,
        heartbeat_stale_trial_callback=run_again,
    )
    try:
        storage = make()
    except (IntegrityError, ProgrammingError):  # a worker on another machine makes the tables too
        time.sleep(2)
        storage = make()
    except (RuntimeError, ValueError) as error:  # the tables are of another version of Optuna; a wrong option
        raise Failure(f"{url.render_as_string()}: {Failure(error)}") from error
    if sqlite:  # Python's driver reads outside of transactions: two workers would take the same trial
        storage.engine.dispose()  # what is open already would stay as it is
        event.listen(storage.engine, "connect", lambda driver, _: setattr(driver, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def database_failures(where: str, code: int) -> Iterator[None]:
    """Turn what a database or its driver raises into a Failure."""
    try:
        yield
    except (SQLAlchemyError, OptunaError, ImportError) as error:
        missing = isinstance(error.__cause__ or error, ImportError)  # a driver
        raise Failure(f"{where}: {Failure(error.__cause__ or error)}", 1 if missing else code) from error
    except (AssertionError, UnboundLocalError) as error:
        # of Optuna, where it can't even write that a trial failed: they hide what the database said
        if not isinstance(hidden := error.__context__, SQLAlchemyError | OptunaError):
            raise
        raise Failure(f"{where}: {Failure(hidden.__cause__ or hidden)}", code) from error


def proposed() -> Set[str]:
    """The settings that the script's suggest() proposes."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return noprop.suggest(optuna.create_study().ask()).keys()


def space_of(config: LabConfig) -> Callable[[Any], dict[str, Any]]:
    """The script's search space, without the settings that an objective does not know, or that do nothing.

    Optuna is not asked for these: its sampler would model them, and its pictures show them. Raises Failure.
    """
    if read := (names := proposed()) & READ:
        raise Failure(f"suggest() can't propose {min(read)}: a search reads its images once")
    by_trial = names & DECIDING
    idle = {*config.WITHOUT_EFFECT} | (set() if by_trial else config.idle)

    class Asked:
        """A trial that answers for what is idle by itself: with the lower bound, or the first choice."""

        def __init__(self, trial):
            self.trial = trial

        def __getattr__(self, method: str):
            ask = getattr(self.trial, method)

            def suggest(name: str, *bounds, **more):
                first = next(iter([*bounds, *more.values()]))
                first = first if isinstance(first, int | float) else first[0]
                return first if name in idle else ask(name, *bounds, **more)

            return suggest if method.startswith("suggest_") else ask

    @wraps(noprop.suggest)  # so that a study of the script's has the same name
    def suggest(trial) -> dict[str, Any]:
        found = noprop.suggest(Asked(trial))
        return {name: value for name, value in found.items() if name not in idle}

    return suggest


def draw_search(search: Worker, what: str):
    """One of Optuna's pictures: the trials one after another, by each setting, or which setting decides."""
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
    alone = what == "slices" and len(axes) == 1  # beside a colour bar: constrained would divide by zero
    figure.set_layout_engine("tight" if alone else "constrained")  # Optuna's own cuts long names off
    pyplot.close(figure)  # it would be kept for a window
    return figure


class Worker:
    """One of several workers of a search, of whose trials none sees a test image.

    new_state(config) makes what a trial trains, step_of(config) how.
    """

    def __init__(self, config, options, data, new_state, storage, step_of=lambda _: noprop.train_step):
        self.config, self.options, self.data = config, options, data._replace(test=None)
        self.new_state, self.step_of, self.suggest = new_state, step_of, space_of(config)
        self.short = replace(config, epochs=options.hpo_epochs)
        warnings.filterwarnings("ignore", "Fixed parameter .* out of range")  # of the settings given
        shared = replace(self.short, step_threads=1) if isinstance(config, WholeConfig) else self.short
        images = self.data.digest() if config.dataset == "folder" else ""  # others are always the same
        judged_by = f"{options.hpo_objective} {images}".strip()
        self.study = noprop.open_study(shared, storage, self.suggest, judged_by)
        self.failed = 0  # 1: a picture can't be drawn

    def trials(self, *states: str) -> list:
        """The trials in these states. Those that count are COMPLETE or PRUNED."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in states]

    def run(self, signalled: Callable[[], int]) -> None:
        """Run trials until the study has enough, whoever ran them. Raises SystemExit at a signal."""
        limit = self.options.hpo_timeout
        deadline = time.monotonic() + (math.inf if limit is None else limit)
        while len(self.trials("COMPLETE", "PRUNED")) < self.options.hpo_trials:
            if time.monotonic() > deadline:
                break
            try:
                trial = partial(self.trial, signalled=signalled)
                self.study.optimize(trial, n_trials=1, callbacks=[noprop.print_trial])
            except (ValueError, UpdateFinishedTrialError) as error:  # Optuna raises either
                if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a FAIL trial"):
                    raise
                say("A trial of this worker was taken for dead, and is run by another.")

    def trial(self, trial, signalled: Callable[[], int]) -> float:
        """The objective: a short training."""
        trial.set_user_attr("worker", True)  # so a search of the script leaves it alone
        try:
            return noprop.short_training(self.short, self.records, signalled, self.suggest, trial, self.cost)
        except SystemExit:
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)  # at once, for whoever is there
            raise

    def records(self, config: LabConfig) -> Iterator[dict[str, Any] | None]:
        """What a trial's training yields."""
        if config.batch_size > (n := len(self.data.train.labels)):
            raise Failure(f"suggest() proposes batch_size {config.batch_size}, more than the {n} images")
        state, data = self.new_state(config), with_augmentation(self.data, config)
        return noprop.train(state, data, self.step_of(config), self.options.threads, steps_too=True)

    def cost(self, record: dict[str, Any]) -> float:
        """What the search makes small, of an epoch's record."""
        return record["val_loss"] if self.options.hpo_objective == "loss" else 100 - record["val_accuracy"]

    def report(self) -> dict[str, Any]:
        """Print the five best trials, write hpo_best.json, draw; returns the best settings. Or a Failure."""
        complete, stopped = self.trials("COMPLETE"), self.trials("PRUNED")
        if not complete:
            raise Failure("no trial of the search is complete: look at suggest(), or give it more time", 3)
        best, folder = sorted(complete, key=lambda trial: trial.value)[:5], self.options.output_dir
        error = standard_error(best[0].user_attrs["record"]["val_accuracy"], len(self.data.val.labels))
        say(f"\nBest of {len(complete)} complete trials; {len(stopped)} more were stopped early:")
        for trial in best:
            noprop.print_trial(self.study, trial)
        say(f"The standard error of an accuracy is {error:.2f} %: smaller differences are noise.")
        settings = best[0].user_attrs["settings"]
        with FileLock(folder / LOCK):  # others write the same files
            content = json.dumps(replace(self.config, **settings).saved(), indent=1)
            noprop.write_file(folder / "hpo_best.json", content.encode())
            enough = len(complete) >= 8  # to tell which setting decides
            for what in ("history", "slices", "importance")[: 3 if enough else 2]:
                self.failed |= noprop.picture(draw_search, folder / f"hpo_{what}.png", self, what)
        say("Files    hpo_best.json (for --config), hpo_*.png")
        return settings


def search(
    config: LabConfig,
    options: LabOptions,
    data: Data,
    new_state: Callable,
    run: Callable[[LabConfig, dict[str, Any] | None], int],
    step_of: Callable[[LabConfig], Callable] = lambda _: noprop.train_step,
    heartbeat: tuple[int, int] = (HEARTBEAT_SECONDS, GRACE_SECONDS),
) -> int:
    """One worker's search; one of the workers then trains, by run(config, contents of a checkpoint or None).

    Returns the exit code.
    """
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(options.output_dir / LOCK):  # whether it can be made
            pass
    except (OSError, NotImplementedError) as error:
        raise Failure(f"cannot write into --output-dir {options.output_dir}: {Failure(error)}") from error
    where = url_of(options).render_as_string()  # without a password
    warnings.simplefilter("ignore", ExperimentalWarning)  # so Optuna calls its heartbeats
    with noprop.caught_signals() as signalled:
        with database_failures(where, 2), FileLock(options.output_dir / LOCK):
            storage = storage_of(options, *heartbeat)  # the lock: two at once would make the tables twice
            worker = Worker(config, options, data, new_state, storage, step_of)
        with database_failures(where, 1):
            done, epochs = len(worker.trials("COMPLETE", "PRUNED")), options.hpo_epochs
            say(f"Search: {options.hpo_trials} trials of {epochs} epochs, as given first; {done} are done.")
            try:
                worker.run(signalled)
            except SystemExit as stop:
                if worker.trials("COMPLETE"):
                    worker.report()
                return stop.code
            best = worker.report()
            if number := signalled():
                say("Stopped. The same command goes on.")
                return 128 + number
    if not options.hpo_final_run:
        return worker.failed
    say("\nTraining with the best settings.")
    final, device = replace(config, **best), data.train.labels.device.type
    try:
        content = begun(options.checkpoint(final), final, data.digest(), device)
        return max(worker.failed, run(final, content))
    except Failure as failure:
        if not isinstance(failure.__cause__, Timeout):
            raise
        say("Another process trains in this folder already: this one leaves the final run to it.")
        say("If hpo_best.json has changed since: train --config hpo_best.json trains with that.")
        return worker.failed


def begun(path: Path, config: LabConfig, images: str, device: str) -> dict[str, Any] | None:
    """The contents of a checkpoint of just this config, images and kind of device, to go on from; or None.

    A fixed embedding is that of the config, and not another network's.
    """
    try:
        content = read_checkpoint(path)
        there = content["config"].saved(), content["data"], content["made_with"]["device"]
    except (Failure, KeyError):  # there is none, or it is damaged, or weights alone
        return None
    fits = there == (config.saved(), images, device)
    if fits and config.embedding == "fixed":
        models = LabState(config).model.state_dict(), content["model"]
        fits = torch.allclose(*(x["label_embedding.weight"] for x in models), rtol=0, atol=1e-5)
    return content if fits else None
