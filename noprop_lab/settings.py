"""Config and Options of the lab: those of the script, and what it does not know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from noprop_example import IDLE, Checked, Config, Failure, Options


class Source(NamedTuple):
    """A data set."""

    name: str  # of its class in torchvision.datasets
    classes: int
    shape: tuple[int, int, int]  # channels, height, width
    flip: bool  # whether a mirror image is as good
    settings: dict[str, Any] = {}  # its own defaults


WEIGHTS = Path(__file__).parent / "weights" / "mnist.pt"  # a trained network that is in the repository
DEEP = {"block": "deep", "epochs": 30}
SOURCES = {  # MNIST and Fashion-MNIST are measured
    "mnist": Source("MNIST", 10, (1, 28, 28), False),
    "fashion_mnist": Source("FashionMNIST", 10, (1, 28, 28), True, DEEP | {"epochs": 24, "num_blocks": 3}),
    "kmnist": Source("KMNIST", 10, (1, 28, 28), False),
    "cifar10": Source("CIFAR10", 10, (3, 32, 32), True, DEEP),
    "cifar100": Source("CIFAR100", 100, (3, 32, 32), True, DEEP),
}
Dataset = Literal[(*SOURCES, "folder")]
Objective = Literal["hybrid", "dt", "ct", "fm", "backprop", "cascade", "infobatch"]


@dataclass(frozen=True)
class LabConfig(Config):
    """What decides the result; it is saved with the network. For the hybrid loss, the script's."""

    # Network
    embed_dim: int | None = None  # D, of the label embedding; None: 20, or as many as classes
    block: Literal["small", "deep", "reference", "paper"] = "small"  # paper: the paper's own, 2.0 M weights
    embedding: Literal["learned", "fixed", "onehot", "prototype"] = "learned"  # prototype: an image a class
    embed_scale: float = 1.0  # by which the start of the embedding is multiplied: its SNR, by the square
    classify: Literal["u_hat", "z"] = "u_hat"  # what the classifier reads: û_T, or z_T
    # Recipe
    all_images: bool = False  # train on the validation images too; takes --select last
    # Folders of pictures
    image_size: int = 32  # of --dataset folder: pictures are scaled to squares of this size, in colour
    classes: tuple[str, ...] = ()  # of --dataset folder: subfolders to tell apart; no such flag: all
    mirror: bool = False  # of --dataset folder: half of the pictures are mirrored, at random
    dataset: Dataset = "mnist"
    blocks: str | None = None

    WITHOUT_EFFECT = ()  # settings that the objective does not know
    FREE = ("temperature", "weights")  # that each evaluation may change
    together = ""  # why its blocks can't be trained apart
    views = 1  # of each image, that a step takes

    def __post_init__(self):
        if isinstance(self.classes, list):  # as a file has it
            object.__setattr__(self, "classes", tuple(self.classes))
        super().__post_init__()

    def faults(self):
        for field in fields(self):
            idle = field.name in self.WITHOUT_EFFECT and getattr(self, field.name) != field.default
            yield idle, f"{field.name} has no effect on this objective: leave it out"
        yield from super().faults()
        fault = f"embedding {self.embedding} has {self.dim} dimensions: leave embed_dim out"
        yield self.embed_dim not in (None, self.dim), fault
        yield self.embed_scale == 0, "embed_scale 0 makes all labels the same"
        fault = f"image_size must be at least 28, and at most 1024, not {self.image_size}"
        yield not 28 <= self.image_size <= 1024, fault
        other, twice = self.dataset != "folder", len(set(self.classes)) < len(self.classes)
        fault = "image_size is of dataset folder: the others have a size of their own"
        yield other and self.image_size != LabConfig.image_size, fault
        yield (other and self.classes) or twice, "classes are those of dataset folder, each of them once"
        fault = "all_images leaves none to select by: it takes select last"
        yield self.all_images and self.select != "last", fault
        fault = "mirror is of dataset folder: the others know whether a mirror image is as good"
        yield other and self.mirror, fault
        yield self.blocks and self.together, f"{self.together}: leave out blocks"
        unread = self.blocks and not self.own_blocks  # which itself refuses what can't be read
        yield unread, f"blocks must name blocks, not {self.blocks}"

    @property
    def dim(self) -> int:
        """D, which some embeddings decide themselves."""
        own = {"onehot": self.num_classes, "prototype": math.prod(self.image_shape)}
        usual = 20 if self.block == "paper" else max(20, self.num_classes)  # the paper: 20, always
        return own.get(self.embedding) or self.embed_dim or usual

    @property
    def learns_embedding(self) -> bool:
        return self.embedding in ("learned", "prototype")

    @property
    def idle(self) -> set[str]:
        """Settings that change nothing, given what the others are."""
        found = {name for name, (by, choice) in IDLE.items() if getattr(self, by) == choice}
        return found | (set() if self.learns_embedding else {"embed_wd", "max_norm_embed"})

    @property
    def source(self) -> Source:
        if self.dataset == "folder":
            return Source("", len(self.classes), (3, self.image_size, self.image_size), self.mirror)
        return SOURCES[self.dataset]

    @property
    def num_classes(self) -> int:
        return self.source.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.shape

    @property
    def own_blocks(self) -> list[int]:
        """The blocks that this run trains, 1 ... T; raises Failure where blocks can't be read."""
        if not self.blocks:
            return list(range(1, self.num_blocks + 1))
        spans = [x.split("-") for x in self.blocks.split(",")]
        if not all(x.isdecimal() and len(x) < 9 for span in spans for x in span) or max(map(len, spans)) > 2:
            raise Failure(f"blocks must look like 3,4 or 3-5, not {self.blocks}")
        spans, last = [(int(span[0]), int(span[-1])) for span in spans], self.num_blocks
        blocks = [t for a, b in spans for t in range(a, min(b, last) + 1)]
        if not all(1 <= a <= b <= last for a, b in spans) or len(set(blocks)) < len(blocks):
            raise Failure(
                f"blocks must name blocks between 1 and num_blocks ({last}) once, not {self.blocks}"
            )
        return blocks

    def saved(self) -> dict[str, Any]:
        """The script's fields, and of the lab's those that say something: the script reads what it knows."""
        ours = dict(classify="u_hat", all_images=False, image_size=32, classes=(), mirror=False)
        ours |= dict(dataset="mnist", blocks=None, embed_scale=1.0)
        whole = asdict(self) | {"embed_dim": self.dim}
        plain = {name for name, x in ours.items() if x == whole[name] == getattr(type(self), name)}
        kept = {name: x for name, x in whole.items() if name not in plain}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in kept.items()}


@contextmanager
def shared_by(threads: int) -> Iterator[None]:
    """Let so many of PyTorch's own threads share what is inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class WholeConfig(LabConfig):
    """For an objective that trains one network as a whole, on which all threads work at once."""

    # Objective
    step_threads: int = torch.get_num_threads()  # that share one step on a CPU: its last bits depend on them

    together = property(lambda self: f"{self.objective} trains one network as a whole")

    def faults(self):
        yield from super().faults()
        fault = f"threads must be at most 1024 here, where they share each step, not {self.step_threads}"
        yield self.step_threads > 1024, fault

    def threads_of_step(self, device: torch.device):
        """On a CPU, let step_threads share what is inside."""
        return shared_by(self.step_threads if device.type == "cpu" else torch.get_num_threads())


@dataclass(frozen=True)
class LabOptions(Options):
    """What to do, where and how."""

    # Used most
    preset: Literal["default", "accurate", "reference", "paper"] = "default"  # a start; flags win
    resume: bool = False  # go on from noprop_OBJECTIVE.pt in the output folder, exactly
    objective: Objective | None = None  # paper: dt, ct, fm; infobatch: the hybrid loss, in fewer steps
    dataset: Dataset | None = None  # mnist if none is named; what is missing of the others is downloaded
    graphs: bool = False  # on an NVIDIA GPU: replay each training step as one CUDA graph, which is faster
    # Files and machine
    threads: int = torch.get_num_threads()  # on the CPU; last bits depend on it for ct, fm and backprop alone
    # Parts of a network
    blocks: str | None = None  # train only these, as in 3,4 or 3-5; takes a fixed embedding, for merge
    embedding_from: Path | None = None  # a checkpoint whose label embedding is taken, and stays fixed
    early_exit: float = 1.0  # evaluate, predict: an image leaves the chain once a class is more probable
    # Search
    hpo_storage: str | None = None  # a database URL for several machines; None: noprop_hpo.db
    hpo_timeout: float | None = None  # seconds after which no new trial starts
    hpo_objective: Literal["loss", "error"] = "loss"  # on validation images: which trial is the best
    hpo_final_run: bool = True  # train with the best trial's settings afterwards

    @property
    def named_objective(self) -> str | None:
        """The objective that the flags name: --preset paper is a setting of dt."""
        return self.objective or ("dt" if self.preset == "paper" else None)

    def faults(self):
        yield from super().faults()
        asks, early = self.evaluate or self.predict, self.early_exit
        yield not 0 < early <= 1, f"early_exit must be above 0, at most 1, not {early}"
        yield early < 1 and not asks, "early_exit goes with evaluate or predict"
        fault = "--embedding-from is of training: a search has the embedding that it starts from"
        yield self.run_hpo and self.embedding_from, fault
        yield self.graphs and asks, "--graphs is of training: leave it out"
        fault = f"search, evaluate and predict take all blocks, not {self.blocks} alone"
        yield self.blocks and (self.run_hpo or asks), fault


@dataclass(frozen=True)
class DemoOptions(Checked):
    """Draw a digit in a browser, and see what the network would answer after each block."""

    # Used most
    checkpoint: Path = WEIGHTS  # a trained network, a chain of blocks; it may stand first, without a flag
    port: int = 7860  # of the page, which other machines can't open
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the accelerator if there is one
    early_exit: float = 0.99  # the block is marked after which a class is more probable

    def faults(self):
        yield from super().faults()
        yield self.port > 65535, "port must be at most 65535"
        yield not 0 < self.early_exit <= 1, "early_exit must be above 0, at most 1"
