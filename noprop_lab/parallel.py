"""Blocks spread over processes, which torchrun starts: each trains its share of the blocks on all images.

A step sends the gradient of the label embedding, 800 bytes, and nothing at all where that is fixed. The first
process evaluates, draws and writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

import noprop_example as noprop
from noprop_example import Data, Failure, Options
from noprop_lab.networks import LabState
from noprop_lab.parts import part_names

CONTROL_STEPS = 10  # the processes agree so often whether to save or to stop
SAVE = 100  # above the number of any signal
GONE = re.compile(r"closed by peer|reset by peer|broken pipe|timed? ?out|not connected|socket", re.IGNORECASE)


def rank_and_size() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_rank() -> int | None:
    """The number of this process on its machine, where torchrun has started it."""
    return int(os.environ["LOCAL_RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Where torchrun has started several processes: connect them. Raises Failure (1) if one is missing."""
    if local_rank() is None:
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends again what the terminal has sent to all
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which caught_signals() leaves alone
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    except RuntimeError as error:
        raise Failure(f"the processes did not find each other: {str(error).splitlines()[0]}", 1) from error
    yield
    dist.destroy_process_group()  # not after a failure: between GPUs it would wait for the others


def collective(call: Callable, *arguments) -> None:
    """A collective of torch.distributed; raises Failure (1), which names a process that is gone as such."""
    if dist.is_initialized():
        try:
            call(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if GONE.search(reason):
                raise Failure("another process of this run is gone: --resume goes on", 1) from error
            raise Failure(f"the processes could not talk: {reason}", 1) from error


def sendable(content: Any) -> Any:
    """Tensors on the CPU with memory of their own: of a view of a part's vector all of that would be sent."""
    return tree_map_only(Tensor, lambda x: x.cpu().clone(), content)


def on_first(function: Callable, *arguments) -> Any:
    """What function returns in the first process, in all of them; where it fails, all of them fail."""
    outcome: list[Any] = [None, None]
    rank, size = rank_and_size()
    if rank == 0:
        try:
            found = function(*arguments)
            outcome[0] = sendable(found) if size > 1 else found
        except (Failure, FloatingPointError, SystemExit) as error:
            outcome[1] = error
    collective(dist.broadcast_object_list, outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def pick_device(options: Options) -> torch.device:
    """A GPU for each process of a machine, or the CPU for all. Raises Failure."""
    number = local_rank()
    if number is not None and options.device in ("auto", "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise Failure(f"there are {gpus} GPUs: start so many processes at most, or add --device cpu")
        options = replace(options, device=f"cuda:{number}")
        torch.cuda.set_device(number)  # NCCL would take the first GPU for objects
    elif number is not None and options.device == "auto":
        options = replace(options, device="cpu")  # gloo takes no tensor on MPS
    return noprop.pick_device(options)


class SharedState(LabState):
    """A state whose blocks are spread over processes; gather() brings everything to the first."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        rank, size = rank_and_size()
        if size > len(self.blocks):
            raise Failure(f"{size} processes for {len(self.blocks)} blocks: start at most one a block")
        self.blocks, self.gathered = self.blocks[rank::size], -1  # after which step

    def update(self, name: str, lr: float) -> Tensor:
        """A step of one part; all processes step the embedding alike, by what all blocks hand back."""
        if name == "label_embedding":
            collective(dist.all_reduce, self.parts[name].grad)
        return super().update(name, lr)

    def resume(self, content: dict[str, Any], digest: str) -> None:
        super().resume(content, digest)
        if rank_and_size()[0]:  # the log of an epoch is a sum over processes
            self.log = [torch.zeros_like(row) for row in self.log]

    def gather(self) -> None:
        """Bring what each process has trained, and the log of this epoch, to the first process."""
        if self.gathered == self.step:  # by measure(), before save()
            return
        self.gathered, (rank, size) = self.step, rank_and_size()
        names = part_names(self.blocks, self.config.num_blocks)
        sent = sendable(({name: self.part_state(name) for name in names}, self.log))
        received: list[Any] | None = [None] * size if rank == 0 else None
        collective(dist.gather_object, sent, received)
        if received is None:
            self.log = [torch.zeros_like(row) for row in self.log]
            return
        for parts, _ in received[1:]:
            for name, states in parts.items():
                self.load_part_state(name, states)
        self.log = [sum(rows).to(self.device) for rows in zip(*(log for _, log in received), strict=True)]

    def measure(self, data: Data, parallel: Callable) -> dict[str, Any]:
        self.gather()
        return on_first(super().measure, data, parallel)

    def save(self, path: Path, data_digest: str) -> None:
        self.gather()
        on_first(super().save, path, data_digest)


def agreement(
    state: SharedState, digest: str, options: Options, signalled: Callable[[], int]
) -> Callable[[], int]:
    """What all agree on, every CONTROL_STEPS steps: the signal that one of them has got, or to save."""
    path, steps = options.checkpoint(state.config), 0
    due = time.monotonic() + 60 * options.checkpoint_minutes

    def agreed() -> int:
        nonlocal steps, due
        steps += 1
        if steps % CONTROL_STEPS:
            return 0
        wish = torch.tensor(signalled() or SAVE * (time.monotonic() > due))
        collective(dist.all_reduce, wish, dist.ReduceOp.MAX)
        if wish == SAVE:
            state.save(path, digest)
            due = time.monotonic() + 60 * options.checkpoint_minutes
        return int(wish) % SAVE

    return agreed


def run(state: SharedState, data: Data, options: Options, content: dict[str, Any] | None, end) -> int:
    """noprop_example.run() in the first process; the others train along, and print nothing."""
    digest, digests = data.digest(), [""] * rank_and_size()[1]
    collective(dist.all_gather_object, digests, digest)
    if len({*digests}) > 1:  # all of them stop
        raise Failure("the processes have different images: give all of them the same --data-root")
    often = replace(options, checkpoint_minutes=1e9)  # the processes save when they agree to
    started = False

    @contextlib.contextmanager
    def signals() -> Iterator[Callable[[], int]]:
        nonlocal started
        with noprop.caught_signals() as signalled:
            started = True
            on_first(tuple)  # the others wait for this, or for the failure before it
            yield agreement(state, digest, options, signalled)

    if rank_and_size()[0] == 0:
        try:
            return noprop.run(state, data, often, content, noprop.train_step, end, signals)
        except Failure as failure:
            if not started:
                collective(dist.broadcast_object_list, [None, failure])  # as on_first() does
            raise
    on_first(tuple)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, noprop.caught_signals() as signalled:
        if content:
            state.resume(content, digest)
        agreed = agreement(state, digest, options, signalled)
        return noprop.train_and_save(state, data, often, noprop.train_step, agreed)
