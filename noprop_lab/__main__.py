"""The commands of the lab: python -m noprop_lab train | evaluate | predict | merge | search | weights ..."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import noprop_example as noprop
from noprop_example import Failure, NoProp, say
from noprop_lab import backprop, cascade, dt, flows, infobatch, parallel, parts
from noprop_lab import demo as drawing
from noprop_lab.data import class_folders, load_data, with_augmentation
from noprop_lab.early_exit import early_exit
from noprop_lab.graphs import GraphState, PruningGraphState, graphed
from noprop_lab.networks import (
    CONFIGS,
    LabState,
    embedding_from,
    kind_of,
    network_of,
    read_checkpoint,
    weights_only,
)
from noprop_lab.pictures import asked, read_pictures
from noprop_lab.settings import SOURCES, DemoOptions, LabConfig, LabOptions, WholeConfig

COMMANDS = {"--evaluate": "evaluate", "--predict": "predict", "--merge": "merge", "--run-hpo": "search"}
USAGE = """usage: python -m noprop_lab COMMAND ...

    train [flags]                     train; under torchrun, blocks are spread over its processes
    evaluate CHECKPOINT [flags]       test accuracy of a trained network
    predict CHECKPOINT PICTURES ...   classes of pictures
    merge CHECKPOINTS ... [flags]     put separately trained blocks together
    search [flags]                    one worker of a search for hyperparameters, then a run with the best
    weights CHECKPOINT FILE           write what evaluate and predict need of a checkpoint, without the rest
    demo [CHECKPOINT] [flags]         a page on which one draws a digit and sees the label emerge

    COMMAND --help lists the flags; --objective dt --help those of an objective."""


def translated(command: str, arguments: list[str]) -> list[str]:
    """The flags that say what a command and its files mean."""
    return {"train": [], "search": ["--run-hpo"]}.get(command, [f"--{command}"]) + arguments


def settings_in(arguments: list[str], kind: type[LabConfig], read: Callable) -> dict[str, Any]:
    """What the command line gives of a config of that kind. Raises Failure for what is no flag at all."""
    options = {field.name for field in fields(LabOptions)}
    return {name: x for name, x in read(arguments, kind, LabOptions).items() if name not in options}


def read_command_line(
    command: str, arguments: list[str]
) -> tuple[LabConfig, LabOptions, dict[str, Any] | None]:
    """Flags win over --config, over --preset, over a data set's settings; or over what a checkpoint holds."""
    files = {"evaluate": " CHECKPOINT", "predict": " CHECKPOINT PICTURES ..."}.get(command, "")
    read = partial(noprop.read_flags, prog=f"python -m noprop_lab {command}{files}")
    if {"--help", "-h"} & set(arguments):
        plain = [x for x in arguments if x not in ("--help", "-h")]
        given = read(plain, LabOptions, rest=[])
        named = LabOptions(**{x: given[x] for x in ("objective", "preset") if x in given}).named_objective
        read(["--help"], CONFIGS[named or "hybrid"], LabOptions)
    arguments = translated(command, arguments)
    named = read(arguments, LabOptions, rest=[])
    options = LabOptions(**named)
    path = checkpoint_of(options)
    if options.evaluate or options.predict or (options.resume and os.path.exists(path)):
        content = read_checkpoint(path)
        given = settings_in(arguments, type(content["config"]), read)
        return over_checkpoint(options, content, path, given, arguments), options, content
    if options.resume:
        say(f"Nothing to resume at {path}: starting from the beginning.")
    given = settings_in(arguments, kind := CONFIGS[options.named_objective or "hybrid"], read)
    if "threads" in named and issubclass(kind, WholeConfig):  # a flag, which wins over a file
        given = {"step_threads": options.threads} | given
    config = kind(**settings_of(options, given))
    idle = [x for x in given if x in config.idle and getattr(config, x) != getattr(kind, x)]
    idle += ["embedding_from"] if options.embedding_from and "embedding" in config.idle else []
    if idle and not (options.run_hpo and deciding()):  # a trial may have what gives it an effect
        by, choice = noprop.IDLE.get(idle[0], ("", ""))
        unread = "as no label embedding is trained, or read"
        others = f"with {by} {choice}" if getattr(config, by, None) == choice else unread
        raise Failure(f"{idle[0]} has no effect {others}: leave it out")
    if config.mirror and not config.augment:
        raise Failure("mirror is part of the augmentation: it takes augment")
    if len(config.classes) == 1:
        raise Failure("classes must be two at least")
    return config, options, None


def deciding() -> Set[str]:
    """The settings that a search proposes by which others have an effect, or none."""
    from noprop_lab import search as hpo  # here: training takes no Optuna

    return hpo.proposed() & hpo.DECIDING


def checkpoint_of(options: LabOptions) -> Path:
    """The checkpoint that is read, or written."""
    if options.evaluate or options.predict:
        return options.evaluate or options.predict[0]
    found = [x for x in map(options.checkpoint, CONFIGS.values()) if os.path.exists(x)]
    if options.resume and not options.named_objective and found:
        if len(found) > 1:
            names = ", ".join(x.stem.removeprefix("noprop_") for x in found)
            raise Failure(f"{options.output_dir} has several runs: add --objective, one of {names}")
        return found[0]
    return options.checkpoint(CONFIGS[options.named_objective or "hybrid"])


def read_settings(path: Path | None) -> dict[str, Any]:
    """The settings of a JSON file, such as hpo_best.json or a run's summary. Raises Failure."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        settings = dict(content.get("config", content))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Failure(f"cannot use {path} as hpo_best.json: {Failure(error)}") from error
    return {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}


def settings_of(options: LabOptions, flags: dict[str, Any], saved: LabConfig | None = None) -> dict[str, Any]:
    """What flags change, over a file, over a data set's own settings, over a preset. Raises Failure.

    saved: of a checkpoint, which has all that a data set brings, or another choice. A data set's own number
    of blocks goes with its block: not with another, of a preset, a file, or a flag.
    """
    kind = type(saved) if saved else CONFIGS[options.named_objective or "hybrid"]
    file = read_settings(options.config)
    if unknown := file.keys() - {field.name for field in fields(kind)}:
        raise Failure(f"cannot use {options.config}: {', '.join(sorted(unknown))} is no setting of this")
    with suppress(Failure):  # written by a run, with all settings: D is a choice only if those had another
        own = kind(**{name: x for name, x in file.items() if name != "embed_dim"}).dim
        if "seed" in file and not saved and own == file.get("embed_dim"):
            del file["embed_dim"]
    if options.preset == "paper" and not hasattr(kind, "paper"):
        raise Failure("--preset paper is a setting of --objective dt, ct, fm or backprop")
    dataset = options.dataset or file.get("dataset", (saved or kind).dataset)
    if dataset not in (*SOURCES, "folder"):
        raise Failure(f"dataset can't be {dataset!r}: it is one of {', '.join(SOURCES)}, folder")
    make = kind if options.preset == "default" else getattr(kind, options.preset)
    try:
        start = make(**{"dataset": dataset} if options.preset == "paper" and dataset != "folder" else {})
    except Failure as failure:
        named = f"--preset {options.preset} does not go with --objective {kind.objective}"
        raise Failure(f"{named}: {failure}") from failure
    preset = {name: x for name, x in vars(start).items() if x != getattr(kind, name)}
    for name in ("epochs", "patience") if saved else ():  # which may have been given others
        preset.pop(name, None)
    own = {} if saved or dataset == "folder" else SOURCES[dataset].settings
    if dataset == "folder" and not saved and "classes" not in file | flags:
        own = {"classes": class_folders(options.data_root)}
    taken = {*preset, *kind.WITHOUT_EFFECT}
    if "block" in preset or (file | flags).get("block", own.get("block")) != own.get("block"):
        taken.add("num_blocks")
    found = preset | {name: x for name, x in own.items() if name not in taken} | file | {"dataset": dataset}
    found |= {"embedding": "fixed"} if options.embedding_from else {}
    found |= {"blocks": options.blocks, "select": "last"} if options.blocks else {}
    return found | flags


def over_checkpoint(options: LabOptions, content, path: Path, given: dict[str, Any], arguments: list[str]):
    """The config of a checkpoint, in which flags change what is free; Failure for what contradicts it."""
    saved, flags = content["config"], {x.split("=")[0] for x in arguments}
    kind = options.objective or saved.objective
    if kind != saved.objective:
        raise Failure(f"--objective {kind} contradicts {path}, which has {saved.objective}: leave it out")
    free = saved.FREE if options.evaluate or options.predict else {"epochs", "patience"} - saved.idle
    if isinstance(saved, WholeConfig):  # whose last bits depend on --threads
        if options.resume and "--threads" in flags and options.threads != saved.step_threads:
            there = f"which was trained with {saved.step_threads}: leave it out"
            raise Failure(f"--threads {options.threads} contradicts {path}, {there}")
        given = {"step_threads": saved.step_threads} | given  # a file's number says nothing of this network
    given = settings_of(options, given, saved)
    config = noprop.over_checkpoint(content, given, free)
    if options.resume and saved.dataset == "folder" and "classes" not in given:
        there, here = (" ".join(x) for x in (saved.classes, class_folders(options.data_root)))
        if there != here:
            raise Failure(f"{path} has the classes {there}, --data-root {here}: add --classes {there}")
    if options.embedding_from:
        other = embedding_from(options.embedding_from, config)
        if not torch.equal(other, content["model"]["label_embedding.weight"]):
            raise Failure(f"--embedding-from {options.embedding_from} is not the embedding that {path} has")
    return config


# --- Commands ----------------------------------------------------------------------------------------------


def train(
    config: LabConfig, options: LabOptions, content: dict[str, Any] | None, device: torch.device
) -> int:
    """Train, evaluate, write all files; returns the exit code."""
    if options.embedding_from and config.embedding != "fixed":
        raise Failure("--embedding-from freezes the embedding that it takes: leave --embedding out")
    if options.embedding_from and config.embed_scale != 1:
        raise Failure("--embedding-from takes an embedding as long as it is: leave --embed-scale out")
    embedding = embedding_from(options.embedding_from, config) if options.embedding_from else None
    data = load_data(config, options.data_root, device)
    _, size = parallel.rank_and_size()
    if size > 1:
        if config.together:
            raise Failure(f"{config.together}: start it without torchrun")
        if options.graphs:
            raise Failure("--graphs puts all blocks on one GPU: start it without torchrun")
        state = parallel.SharedState(config, device, data, embedding)
        return parallel.run(state, data, options, content, end_of(config))
    kind, step = kind_and_step(config, options.graphs, device)
    state = kind(config, device, data, embedding)
    return noprop.run(state, data, options, content, step, end=end_of(config))


def kind_and_step(config: LabConfig, graphs: bool, device: torch.device) -> tuple[type[LabState], Callable]:
    """What holds a run, and makes its steps. Raises Failure (1) for graphs without an NVIDIA GPU."""
    if not graphs:
        return kind_of(config), step_of(config)
    if device.type != "cuda":
        raise Failure(f"--graphs takes an NVIDIA GPU, and this run is on {device}: leave it out", 1)
    if isinstance(config, infobatch.InfoBatchConfig):
        return PruningGraphState, partial(infobatch.train_step, step=graphed(noprop.train_step))
    return GraphState, graphed(step_of(config))


def step_of(config: LabConfig) -> Callable:
    if isinstance(config, flows.FlowConfig):
        return flows.train_step
    if isinstance(config, dt.DTConfig) and config.updates == "each":
        return dt.train_step
    if isinstance(config, cascade.CascadeConfig):
        return cascade.train_step
    if isinstance(config, infobatch.InfoBatchConfig):
        return infobatch.train_step
    return backprop.train_step if isinstance(config, backprop.BackpropConfig) else noprop.train_step


def end_of(config: LabConfig) -> Callable:
    if isinstance(config, flows.FlowConfig):
        return flows.finish
    if isinstance(config, cascade.CascadeConfig):
        return partial(noprop.finish, draw=cascade.draw_answers)
    if isinstance(config, backprop.BackpropConfig):
        return partial(noprop.finish, draw=backprop.draw_answers)
    return parts.end_of_part if config.blocks else noprop.finish


def evaluate(
    model: NoProp, config: LabConfig, options: LabOptions, device: torch.device, pool: Callable
) -> int:
    """Print the test accuracy of a trained network, with the temperature and weights of the config."""
    few = replace(config, batch_size=2, train_images=None)  # images to train on may be fewer than a batch
    test = load_data(few, options.data_root, device).test
    if options.early_exit == 1:
        return noprop.print_accuracy(model, test, pool)
    parts = pool(lambda images: early_exit(model, images, options.early_exit), test.images.split(500))
    probability, blocks = map(torch.cat, zip(*parts, strict=True))
    accuracy = 100 * (probability.argmax(-1) == test.labels).float().mean().item()
    say(f"Early exit: {blocks.float().mean():.2f} of {len(model.blocks)} blocks an image.")
    say(f"Test accuracy {accuracy:.2f} ± {noprop.standard_error(accuracy, len(test.labels)):.2f} %.")
    return 0


def predict(model: NoProp, config: LabConfig, options: LabOptions) -> int:
    """Print the classes in each picture file, of several digits from left to right."""

    def probability(images: Tensor) -> Tensor:
        if options.early_exit == 1:
            return model.probabilities(images)[:, -1]
        return early_exit(model, images, options.early_exit)[0]

    names = config.classes or range(config.num_classes)
    read = partial(read_pictures, config=config)
    return noprop.print_classes(partial(asked, probability), options.predict[1:], read, names)


def search(config: LabConfig, options: LabOptions, device: torch.device) -> int:
    """One worker of a search, then a run with the best settings; returns the exit code."""
    from noprop_lab import search as hpo  # here: training takes no Optuna

    if config.all_images or config.blocks:
        raise Failure(
            "a search judges whole networks by validation images: it takes no all_images, no blocks"
        )
    kind, _ = kind_and_step(config, options.graphs, device)
    data = load_data(config, options.data_root, device)

    def new_state(config: LabConfig) -> LabState:
        return kind(config, device, data)

    def own_step(config: LabConfig) -> Callable:
        return kind_and_step(config, options.graphs, device)[1]

    def run(config: LabConfig, content: dict[str, Any] | None) -> int:
        own = with_augmentation(data, config)
        return noprop.run(new_state(config), own, options, content, own_step(config), end=end_of(config))

    return hpo.search(config, options, data, new_state, run, own_step)


def merge(arguments: list[str]) -> int:
    """Put separately trained blocks together, evaluate, write all files; returns the exit code."""
    rest: list[str] = []
    options = LabOptions(
        **noprop.read_flags(
            arguments, LabOptions, prog="python -m noprop_lab merge CHECKPOINTS ...", rest=rest
        )
    )
    names = ("preset", "config", "resume", "objective", "dataset", "blocks", "embedding_from", "graphs")
    names += ("checkpoint_minutes",)
    flags = [f"--{x.replace('_', '-')}" for x in names if getattr(options, x) != getattr(LabOptions, x)]
    flags += [x for x in rest if x.startswith("-")]
    if flags:
        raise Failure(f"merge takes no {flags[0]}: settings are those of the parts")
    return parts.merge([Path(x) for x in rest], options, load_data, noprop.pick_device(options))


def weights(arguments: list[str]) -> int:
    """Write a checkpoint without what only training needs; returns the exit code."""
    if {"--help", "-h"} & {*arguments}:
        say(USAGE)
        return 0
    if len(arguments) != 2:
        raise Failure("weights takes a checkpoint and the file to write")
    source, target = map(Path, arguments)
    if os.path.exists(target):
        raise Failure(f"{target} is there already: remove it, or choose another name")
    if not target.parent.is_dir():
        raise Failure(f"there is no folder {target.parent}")
    noprop.write_file(target, content := weights_only(source))
    say(f"{target}: {len(content) / 1e6:.2f} MB, for evaluate and predict.")
    return 0


def demo(arguments: list[str]) -> int:
    """A page on which one draws a digit, until Ctrl-C; returns the exit code."""
    named = ["--checkpoint"] if arguments and not arguments[0].startswith("-") else []
    given = noprop.read_flags([*named, *arguments], DemoOptions, prog="python -m noprop_lab demo")
    options = DemoOptions(**given)
    content = read_checkpoint(options.checkpoint)
    config, device = content["config"], noprop.pick_device(LabOptions(device=options.device))
    if isinstance(config, flows.FlowConfig | cascade.CascadeConfig):
        raise Failure(f"the demo shows a chain of denoising blocks, and {config.objective} has none")
    model = network_of(content, options.checkpoint, device, replace(config, temperature=0.0))
    drawing.show(partial(drawing.answer, model, config, options.early_exit), options.port)
    return 0


def execute(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit code."""
    command, *rest = arguments or ["--help"]
    if command not in ("train", "evaluate", "predict", "merge", "search", "weights", "demo"):
        helps = command in ("--help", "-h")
        say("" if helps else f"error: {command} is no command\n", end="", file=sys.stderr)
        say(USAGE, file=sys.stdout if helps else sys.stderr)
        return 0 if helps else 2
    with parallel.processes(), told_once():
        named = {x.split("=")[0].replace("_", "-").replace("--no-", "--") for x in rest}
        for flag in named & COMMANDS.keys():
            raise Failure(f"{flag} is a command: python -m noprop_lab {COMMANDS[flag]} ...")
        if parallel.rank_and_size()[1] > 1 and command != "train":
            raise Failure("torchrun is for training: start this without it")
        if command == "merge":
            return merge(rest)
        if command == "weights":
            return weights(rest)
        if command == "demo":
            return demo(rest)
        config, options, content = parallel.on_first(read_command_line, command, rest)
        device = parallel.pick_device(options)
        if command == "train":
            return train(config, options, content, device)
        if command == "search":
            return search(config, options, device)
        if options.early_exit < 1 and isinstance(config, flows.FlowConfig):
            raise Failure(f"--early-exit leaves a chain of blocks, and {config.objective} has none")
        if options.early_exit < 1 and config.temperature:
            raise Failure("--early-exit does not sample: it takes --temperature 0")
        model = network_of(content, checkpoint_of(options), device, config)
        with noprop.workers(device, options.threads) as pool:
            if command == "predict":
                return predict(model, config, options)
            return evaluate(model, config, options, device, pool)


@contextmanager
def told_once() -> Iterator[None]:
    """Wrong input is the same for all processes of torchrun: one of them tells."""
    try:
        yield
    except Failure as failure:
        if failure.code == 2 and parallel.local_rank():
            raise SystemExit(2) from failure
        raise


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, see noprop_example.main()."""
    return noprop.main(arguments, execute)


def console() -> int:
    """main() at a terminal."""
    code = main()
    if parallel.local_rank() is not None:
        # a thread of gloo that still holds a tensor while Python ends would abort it: pytorch/pytorch#179291
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(console())
