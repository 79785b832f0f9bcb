"""Networks and states for the configs of the lab."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import noprop_example as noprop
from noprop_example import CPU, SIZES, Data, DenoisingBlockPaper, Failure, NoProp, State
from noprop_lab.backprop import BackpropConfig, Mixed, mixed_block
from noprop_lab.cascade import Cascade, CascadeConfig, cascade_blocks
from noprop_lab.ct import CT, CTConfig, CTFlow, NoiseSchedule
from noprop_lab.dt import DT, DTConfig, LabHybrid, PaperBlock, ReadsZ, image_block, prototypes
from noprop_lab.flows import FlowBlock, FlowConfig
from noprop_lab.fm import FM, FMConfig, FMFlow
from noprop_lab.infobatch import InfoBatchConfig, Pruning, Weighted
from noprop_lab.settings import LabConfig, shared_by

KINDS = (LabConfig, DTConfig, CTConfig, FMConfig, BackpropConfig, CascadeConfig, InfoBatchConfig)
CONFIGS = {kind.objective: kind for kind in KINDS}
OBJECTIVES = {DTConfig: DT, CTConfig: CT, FMConfig: FM, InfoBatchConfig: Weighted}


def objective_of(config: LabConfig):
    """The objective of blocks that are trained with this config; the twin's have none, and ignore it."""
    if type(config) in OBJECTIVES:
        return OBJECTIVES[type(config)](config)
    return LabHybrid(config.eta_loss_weight, config.lambda_global, config)


def build(config: LabConfig, device=CPU, content: dict[str, Any] | None = None) -> NoProp:
    """The network of a config, on the device: untrained, or of a checkpoint's content, for inference."""
    if isinstance(config, FlowConfig):
        ct = isinstance(config, CTConfig)
        schedule = NoiseSchedule(config.alpha_bar_start, config.alpha_bar_end) if ct else None
        block, kind = partial(FlowBlock, size=config.block, schedule=schedule), CTFlow if ct else FMFlow
    else:
        size = SIZES.get(config.block)
        block = partial(DenoisingBlockPaper, size=size) if size else PaperBlock
        kind = ReadsZ if config.classify == "z" else NoProp
    if isinstance(config, CascadeConfig):
        block, kind = cascade_blocks(block, config.hand_on), Cascade
    elif config.embedding == "prototype":
        block = partial(image_block, block)
    if isinstance(config, BackpropConfig) and config.weights == "learned":
        block, kind = partial(mixed_block, block), Mixed
    with shared_by(1):  # the last bits of the embedding, a QR, depend on their number from 33 classes on
        return noprop.build(config, device, content, block, kind)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of any checkpoint; its "config" becomes a LabConfig. Raises Failure."""
    return noprop.read_checkpoint(path, CONFIGS)


def weights_only(path: str | Path) -> bytes:
    """A checkpoint without what only training needs: a fifth of its size. Raises Failure for a part."""
    content = read_checkpoint(path)
    network_of(content, path)
    names = ("format", "objective", "model", "by_average", "made_with")
    kept = {name: content.get(name) for name in names} | {"config": content["config"].saved()}
    torch.save(kept, file := io.BytesIO())
    return file.getvalue()


def load(path: str | Path, device: torch.device | str = CPU) -> NoProp:
    """The trained network of any checkpoint, ready for predict(images).

    Raises Failure for a file that is no checkpoint, is damaged, or holds a part of a network only.
    """
    return network_of(read_checkpoint(path), path, torch.device(device))


def network_of(
    content: dict[str, Any], path: str | Path, device=CPU, config: LabConfig | None = None
) -> NoProp:
    """The network in a checkpoint, for its config or one that differs in inference. Failure for a part."""
    config = config or content["config"]
    if config.blocks:
        parts = f"{path} holds blocks {config.blocks} alone"
        raise Failure(f"{parts}: python -m noprop_lab merge puts parts together")
    return build(config, device, content)


class LabState(State):
    """A state for a config of the lab, whose embedding may start from images, or be another network's.

    Where config.blocks names some, only these are trained, and there is no chain to measure.
    """

    def __init__(
        self, config: LabConfig, device=CPU, data: Data | None = None, embedding: Tensor | None = None
    ):
        if config.blocks and (config.learns_embedding or config.select != "last"):
            raise Failure("--blocks takes --embedding fixed (or --embedding-from) and --select last")
        model = build(config, device)
        with torch.no_grad():
            if config.embedding == "onehot":
                nn.init.eye_(model.label_embedding.weight)
            if config.embedding == "prototype" and data:
                model.label_embedding.weight.copy_(prototypes(data.train, config.num_classes))
            model.label_embedding.weight.mul_(config.embed_scale)
            if embedding is not None:
                model.label_embedding.weight.copy_(embedding)
        super().__init__(config, device, model, objective_of(config))
        self.blocks = config.own_blocks

    def measure(self, data: Data, parallel) -> dict[str, Any]:
        if self.config.blocks:
            data = data._replace(val=None, test=None)
        return super().measure(data._replace(val=None) if self.config.all_images else data, parallel)


class PruningState(Pruning, LabState):
    """A state of the lab that leaves out images that are learned already."""


def kind_of(config: LabConfig) -> type[LabState]:
    """What holds a run with this config."""
    return PruningState if isinstance(config, InfoBatchConfig) else LabState


def embedding_from(path: Path, config: LabConfig) -> Tensor:
    """The label embedding of another network, for this config. Raises Failure."""
    weight = load(path).label_embedding.weight.detach()
    sizes = {"classes": config.num_classes, "embed_dim": config.dim}
    for there, (what, here) in zip(weight.shape, sizes.items(), strict=True):
        if there != here:
            raise Failure(f"the label embedding of {path} has {what} {there}, this network {here}")
    return weight
