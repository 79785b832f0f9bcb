"""Networks and states for the configs of the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import noprop_example as noprop
from noprop_example import BLOCKS, CPU, Data, Failure, NoProp, State
from noprop_lab.backprop import Backprop, BackpropConfig
from noprop_lab.dt import DT, DTConfig, LabHybrid, PaperBlock, ReadsZ, prototypes
from noprop_lab.settings import LabConfig

CONFIGS: dict[str, type[LabConfig]] = {"hybrid": LabConfig, "dt": DTConfig, "backprop": BackpropConfig}


def objective_of(config: LabConfig):
    """The objective that a config is for."""
    if isinstance(config, DTConfig):
        return DT(config)
    if isinstance(config, BackpropConfig):
        return Backprop(config)
    return LabHybrid(config.eta_loss_weight, config.lambda_global, config)


def build(config: LabConfig) -> NoProp:
    """The untrained network of a config."""
    kind = ReadsZ if config.classify == "z" else NoProp
    return noprop.build(config, BLOCKS | {"paper": PaperBlock}, kind)


def config_of(content: dict[str, Any], path: str | Path) -> LabConfig:
    """The config in the contents of a checkpoint; raises Failure, naming the path, where it does not fit."""
    try:
        return CONFIGS[content["objective"]](**content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"{path} does not fit this version of the lab: {error}".splitlines()[0]) from error


def load(path: str | Path, device: torch.device | str = CPU) -> NoProp:
    """The trained network of any checkpoint, ready for predict(images); its config is an attribute.

    Raises Failure for a file that is no checkpoint, is damaged, or holds a part of a network only.
    """
    config = config_of(content := noprop.read_checkpoint(Path(path)), path)
    return network_of(content, config, path, torch.device(device))


def network_of(content: dict[str, Any], config: LabConfig, path: str | Path, device=CPU) -> NoProp:
    """The network in the contents of a checkpoint, on the device. Raises Failure."""
    if config.blocks:
        raise Failure(
            f"{path} holds blocks {config.blocks} alone: python -m noprop_lab merge puts parts together"
        )
    model = noprop.place(noprop.network_of(content, build(config), path), device)
    model.config = config
    return model


class LabState(State):
    """A state for a config of the lab, whose embedding may start from images, or be another network's.

    Where config.blocks names some, only these are trained, and there is no chain to measure.
    """

    def __init__(
        self, config: LabConfig, device=CPU, data: Data | None = None, embedding: Tensor | None = None
    ):
        if config.blocks and (config.learns_embedding or config.select != "last"):
            raise Failure("--blocks takes --embedding fixed (or --embedding-from) and --select last")
        model = build(config)
        with torch.no_grad():
            if config.embedding == "onehot":
                nn.init.eye_(model.label_embedding.weight)
            if config.embedding == "prototype" and data:
                model.label_embedding.weight.copy_(prototypes(data.train, config.num_classes))
            if embedding is not None:
                model.label_embedding.weight.copy_(embedding)
        super().__init__(config, device, model, objective_of(config))
        self.blocks = config.own_blocks

    def measure(self, data: Data, parallel) -> dict[str, Any]:
        hidden = data._replace(val=None, test=None) if self.config.blocks else data
        return super().measure(hidden, parallel)


def embedding_from(path: Path, config: LabConfig) -> Tensor:
    """The label embedding of another network, for this config. Raises Failure."""
    weight = load(path).label_embedding.weight.detach()
    if weight.shape != (config.num_classes, config.dim):
        raise Failure(f"the label embedding of {path} is of another --embed-dim")
    return weight
