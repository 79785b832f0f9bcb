"""Blocks that are trained alone, on machines that never talk, and put together."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import noprop_example as noprop
from noprop_example import Data, Failure, Options, State, say
from noprop_lab.cascade import CascadeConfig
from noprop_lab.networks import kind_of, read_checkpoint
from noprop_lab.settings import LabConfig, WholeConfig


def part_names(blocks: list[int], num_blocks: int) -> list[str]:
    """Names of the parts that are trained where these blocks are: the classifier goes with block T."""
    return [f"blocks.{t - 1}" for t in blocks] + ["classifier"] * (num_blocks in blocks)


def end_of_part(state: State, data: Data, options: Options) -> int:
    """What stands in the place of finish() where blocks are missing."""
    path = options.checkpoint(state.config)
    if state.finished():
        say(f"Blocks {state.config.blocks} are in {path}; python -m noprop_lab merge puts parts together.")
    return 0


def merge(paths: list[Path], options: Options, load_data, device: torch.device) -> int:
    """Put separately trained blocks together, evaluate, write all files; returns the exit code.

    Where the first file is a whole network, later ones take the place of its blocks.
    """
    if not paths:
        raise Failure("merge takes the checkpoints of parts")
    contents = [read_checkpoint(path) for path in paths]
    configs = [content["config"] for content in contents]
    if len(paths) == 1 and not configs[0].blocks:
        raise Failure(f"{paths[0]} is a whole network: merge takes two checkpoints at least, or parts")
    for config in configs:
        if isinstance(config, WholeConfig | CascadeConfig):
            raise Failure(f"{config.together}: there is nothing to merge")
    check_parts(paths, contents, configs)
    whole, config = contents[0], replace(configs[0], blocks=None)
    for part, other in zip(contents[1:], configs[1:], strict=True):
        put_in(whole, part, part_names(other.own_blocks, other.num_blocks), exchange=not configs[0].blocks)
    kinds = {x in noprop.CHANNELS_LAST for x in (device.type, *(x["made_with"]["device"] for x in contents))}
    if len(kinds) > 1:
        raise Failure("parts of an Apple GPU and of others do not go together: weights lie otherwise there")
    data = load_data(config, options.data_root, device)
    whole["made_with"] = noprop.made_with(device)  # nothing is trained further
    state = kind_of(config)(config, device)
    state.resume(whole, data.digest())
    with noprop.locked(options.output_dir):
        noprop.keep_older(path := options.checkpoint(config))
        state.save(path, data.digest())
        return noprop.finish(state, data, options)


def put_in(whole: dict[str, Any], part: dict[str, Any], names: list[str], exchange: bool) -> None:
    """Put parts of one checkpoint into another; losses and seconds are added, where both trained alike."""
    mine, more = whole["training"], part["training"]
    inside = tuple(f"{name}." for name in names)
    whole["model"].update({key: x for key, x in part["model"].items() if key.startswith(inside)})
    mine["parts"].update({name: more["parts"][name] for name in names})
    if not exchange:
        mine["seconds"] += more["seconds"]
        mine["log"] = [a + b for a, b in zip(mine["log"], more["log"], strict=True)]
        for a, b in zip(mine["history"], more["history"], strict=True):
            a["block_losses"] = np.add(a["block_losses"], b["block_losses"]).tolist()
            for name in ("classifier_loss", "seconds"):
                a[name] += b[name]


def check_parts(paths: list[Path], contents: list[dict[str, Any]], configs: list[LabConfig]) -> None:
    """Raise Failure where checkpoints do not belong together.

    All blocks must be there once, trained alike on the same images; but where the first file is a whole
    network, later ones take the place of its blocks, and need only fit.
    """
    for path, content in zip(paths, contents, strict=True):
        if not {"parts", "step", "log", "history"} <= content.get("training", {}).keys():
            raise Failure(f"{path} holds weights alone: merge takes the checkpoints that training wrote")
    exchange, first = not configs[0].blocks, configs[0]
    fitting = {"dataset", "image_size", "classes", "classify", "num_blocks", "dim", "block", "target"}
    names = fitting if exchange else set(vars(first)) - {"blocks", "embed_dim"} | {"dim"}
    for path, content, config in zip(paths, contents, configs, strict=True):
        if content["objective"] != contents[0]["objective"] and not exchange:
            raise Failure(f"{path} and {paths[0]} differ in their objective")
        pair = (x["training"] for x in (content, contents[0]))
        if not exchange and len({x["loss"] for x in pair if "loss" in x}) > 1:  # earlier versions have none
            raise Failure(f"{path} and {paths[0]} differ in their loss")
        for name in sorted(names):
            here, there = (getattr(x, name) for x in (config, first))
            if here != there:
                raise Failure(f"{path} and {paths[0]} differ in {name}: {here} and {there}")
        shapes = ({name: x.shape for name, x in y["model"].items()} for y in (content, contents[0]))
        if operator.ne(*shapes):
            raise Failure(f"{path} and {paths[0]} have other weights: their blocks are built differently")
        W = [x["model"]["label_embedding.weight"] for x in (content, contents[0])]
        if not torch.allclose(*W, rtol=0, atol=1e-5):
            raise Failure(f"{path} and {paths[0]} have different label embeddings")
        if not torch.equal(*W):
            say(f"{path} has a label embedding of other last bits, of another chip: {paths[0]}'s is kept.")
        if not exchange and content["data"] != contents[0]["data"]:
            raise Failure(f"{path} and {paths[0]} were trained on other images")
        steps = ((x["training"]["step"], len(x["training"]["history"])) for x in (content, contents[0]))
        if not exchange and operator.ne(*steps):
            raise Failure(f"{path} and {paths[0]} were not trained equally long: --resume goes on")
        rates = ([epoch["lr"] for epoch in x["training"]["history"]] for x in (content, contents[0]))
        if not exchange and not np.allclose(*rates, rtol=1e-9, atol=0):
            raise Failure(f"{path} and {paths[0]} had other learning rates: one began with fewer --epochs")
    for t in range(1, first.num_blocks + 1):
        pairs = list(zip(paths, configs, strict=True))[exchange:]
        files = [str(path) for path, config in pairs if t in config.own_blocks]
        if len(files) > 1:
            raise Failure(f"block {t} is in {' and in '.join(files)}")
        if not files and not exchange:
            raise Failure(f"no file has block {t}")
