"""Training steps replayed as CUDA graphs: the script's own step, captured once, its blocks side by side.

Small blocks leave a GPU idle: Python launches a kernel later than the one before has ended. A graph holds all
kernels of a step, and is launched as one. NoProp's blocks do not wait for each other, so each has a branch of
its own in it. What changes from step to step lies in buffers that are filled before each replay: images,
labels, InfoBatch's weights of these, learning rate, weight of the averages, and the numbers that are drawn,
which are those of any step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from noprop_example import State
from noprop_lab.infobatch import Pruning
from noprop_lab.networks import LabState

WARM_UP = 3  # steps that are run before one is captured, and undone: libraries choose and allocate in these


class GraphState(LabState):
    """A state on a GPU whose steps graphed() replays; its checkpoints are like any other's."""

    graph: torch.cuda.CUDAGraph | None = None
    fresh = property(lambda self: self.share)

    def hold(self, image: Tensor, label: Tensor) -> None:
        """Make the buffers, for batches of that size, and the streams."""
        self.image, self.label = torch.empty_like(image), torch.empty_like(label)
        self.rate, self.share = (torch.zeros((), device=self.device) for _ in range(2))
        self.drawn: dict[tuple[int, str], tuple[Callable, Tensor]] = {}
        self.streams = [torch.cuda.Stream(self.device) for _ in self.blocks]

    def capture(self, step: Callable, image: Tensor, label: Tensor) -> None:
        """Capture step(self, image, label, lr, parallel), and leave everything as it was."""
        self.hold(image, label)
        for *_, optimizer in self.holders.values():
            optimizer.param_groups[0]["capturable"] = True
        before = {name: copy.deepcopy(State.part_state(self, name)) for name in self.parts}
        self.fill(image, label, 0.0)
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                step(self, self.image, self.label, self.rate, self.side_by_side)
            torch.cuda.synchronize(self.device)
        for name, (*modules, optimizer) in before.items():
            made = self.holders[name][-1].state_dict()["state"]  # which a graph must find there
            optimizer["state"] = optimizer["state"] or tree_map_only(Tensor, torch.zeros_like, made)
            self.load_part_state(name, [*modules, optimizer])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # on the device of this state, which need not be current
            self.results = step(self, self.image, self.label, self.rate, self.side_by_side)
        self.graph = graph

    def side_by_side(self, function: Callable[[int], Any], blocks: list[int]) -> list[Any]:
        """A map() over blocks, each on a stream of its own."""
        here, results = torch.cuda.current_stream(self.device), []
        try:
            for block, stream in zip(blocks, self.streams, strict=True):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    results.append(function(block))
        finally:  # a capture whose streams do not come together says that, and not what has failed
            for stream in self.streams:
                here.wait_stream(stream)
        return results

    def fill(self, image: Tensor, label: Tensor, lr: float) -> None:
        """Put what this step needs into the buffers that the graph reads."""
        self.image.copy_(image), self.label.copy_(label)
        self.rate.fill_(lr), self.share.fill_(super().fresh)
        for (t, purpose), (kind, buffer) in self.drawn.items():
            buffer.copy_(super().draw(t, purpose, buffer.shape, kind))

    def draw(self, t: int, purpose: str, shape: torch.Size, kind: Callable = torch.randn) -> Tensor:
        """The buffer of these numbers, which in the first step of the warm-up is made."""
        if (t, purpose) not in self.drawn:
            self.drawn[t, purpose] = kind, super().draw(t, purpose, shape, kind)
        return self.drawn[t, purpose][1]

    def part_state(self, name: str) -> list[dict[str, Any]]:
        """State of a part, as a state without a graph has it."""
        states = super().part_state(name)
        states[-1]["param_groups"][0] |= {"lr": self.lr, "capturable": False}
        return states


class PruningGraphState(Pruning, GraphState):
    """A state that replays steps, and leaves out images that are learned already."""


def graphed(step: Callable) -> Callable:
    """A step for train() that replays what step does on a GraphState, see noprop_example.train_step()."""

    def replay(state: GraphState, image: Tensor, label: Tensor, lr: float, parallel=map) -> dict:
        if not state.graph:
            state.capture(step, image, label)
        state.fill(image, label, lr)
        state.graph.replay()
        return state.results

    return replay
