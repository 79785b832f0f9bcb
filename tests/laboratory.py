"""What the tests of the lab share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CPU, TINY, fails, noprop

from noprop_lab import __main__ as lab
from noprop_lab import data as lab_data
from noprop_lab.networks import LabState, kind_of
from noprop_lab.settings import LabConfig


def flags_of(folder: Path, *more: str, **changes) -> list[str]:
    """The flags of a run of seconds that writes into the folder."""
    values = TINY | {"output_dir": folder} | changes
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), *more]


def few_images(*arguments, load: Callable = lab_data.load_data) -> noprop.Data:
    """A data set, of which 500 images are to validate and to test on."""
    data = load(*arguments)
    val, test = (noprop.Split(x.images[:500], x.labels[:500]) for x in data[1:3])
    return data._replace(val=val, test=test)


@contextmanager
def quick_lab() -> Iterator[None]:
    """Few images for the lab and the script; one thread, as tests run beside others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "load_data", few_images)
        patch.setattr(noprop, "load_data", partial(few_images, load=noprop.load_data))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def quick_main(arguments: list[str]) -> int:
    """The script's command with few images, in a process of its own."""
    with quick_lab():
        return noprop.main(arguments)


def refused(capsys, code: int, arguments: list[str], *words: str, main=lab.main) -> None:
    """fails(), of a command of the lab; what was printed before it does not count."""
    capsys.readouterr()
    fails(capsys, code, arguments, *words, main=main)


def contents(path: Path) -> dict:
    """What a checkpoint holds, as it is in the file."""
    return torch.load(path, weights_only=True)


def untrained(folder: Path, config: LabConfig | None = None) -> Path:
    """A checkpoint of a network that was not trained."""
    state = LabState(config or LabConfig(num_blocks=3))
    folder.mkdir(parents=True, exist_ok=True)
    state.save(path := folder / noprop.OUTPUTS[0].format(state.config.objective), "of no images")
    return path


def tiny(data: noprop.Data, config: LabConfig, threads: int = 1) -> LabState:
    """The state at the end of a training."""
    state = kind_of(config)(config, CPU, data)
    list(noprop.train(state, data, lab.step_of(config), threads))
    return state


def content_of(state: LabState) -> dict:
    """What resume() takes of a checkpoint of the state, with images of the digest ""."""
    training = {name: getattr(state, name) for name in state.POSITION}
    training["parts"] = {name: state.part_state(name) for name in state.parts}
    made_with = noprop.made_with(state.device)
    return {"training": training, "model": {}, "data": "", "path": "", "made_with": made_with}


def equal(a, b) -> bool:
    """Whether what checkpoints hold is equal bit for bit, but for seconds."""
    if isinstance(a, dict):
        names = a.keys() - {"seconds"}
        return names == b.keys() - {"seconds"} and all(equal(a[name], b[name]) for name in names)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
