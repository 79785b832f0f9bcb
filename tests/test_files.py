"""Files, function by function: written whole, kept under free names, and read only if they are good."""

import io
import os
import pickle
import zipfile

import pytest
import torch
from conftest import TINY, noprop, same


@pytest.fixture
def checkpoint(tmp_path):
    """Of a network that has not been trained: (its path, its state)."""
    state = noprop.State(noprop.Config(**TINY))
    state.save(tmp_path / "noprop_hybrid.pt", "digest of the data")
    return tmp_path / "noprop_hybrid.pt", state


def changed(path, **changes):
    """The same checkpoint with other contents; None: without that."""
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: x for name, x in content.items() if x is not None}, path)
    return path


def test_a_checkpoint_holds_what_its_readers_need(checkpoint):
    path, state = checkpoint
    content = noprop.read_checkpoint(path)
    assert content["config"] == state.config and content["path"] == path
    assert content["data"] == "digest of the data"
    assert same(content["model"], state.averaged.state_dict())
    assert content["made_with"] == {
        "device": "cpu",
        "chip": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }
    assert content["training"].keys() == {*noprop.State.POSITION, "parts", "loss"}
    model = noprop.load(path)
    assert same(model.state_dict(), state.averaged.state_dict()) and not model.training
    assert noprop.load(path, "meta").classifier.weight.is_meta
    other = noprop.State(noprop.Config(**TINY | {"seed": 1}))
    other.resume(content, "digest of the data")
    assert same(other.model.state_dict(), state.model.state_dict())
    assert same(other.averaged.state_dict(), state.averaged.state_dict())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format": "noprop-example-1"}, "another version of this script (noprop-example-1): train again"),
        ({"format": "noprop-example-3"}, "another version of this script (noprop-example-3): train again"),
        ({"format": None}, "no checkpoint of this script"),
        ({"objective": "dt"}, "(dt: 'dt') is the lab's: use python -m noprop_lab"),
        ({"config": {"embed_dim": "a"}}, "embed_dim can't be 'a'"),
        ({"config": {"dataset": "cifar10"}}, "is the lab's"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(checkpoint, changes, word):
    with pytest.raises(noprop.Failure) as failure:
        noprop.read_checkpoint(changed(checkpoint[0], **changes))
    assert word in str(failure.value) and "noprop_hybrid.pt" in str(failure.value)
    assert failure.value.code == 2


def test_a_byte_that_is_flipped_in_a_checkpoint_is_noticed(checkpoint):
    path, _ = checkpoint
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda x: x.file_size)
    content[largest.header_offset + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(noprop.Failure, match="is damaged"):
        noprop.read_checkpoint(path)


class Hostile:
    """What pickle would run as a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path):
    path, _ = checkpoint
    torch.save({"format": noprop.FORMAT, "objective": Hostile(str(tmp_path / "made"))}, path)
    with pytest.raises(noprop.Failure, match="no checkpoint of this script, or damaged"):
        noprop.read_checkpoint(path)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Hostile(str(tmp_path / "made"))))  # it would have
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "file.pt").write_bytes(content)
    reasons = {
        "file.pt": "it is no checkpoint of this script",
        "none.pt": "No such file or directory",
        ".": "Is a",
    }
    for name, reason in reasons.items():
        with pytest.raises(noprop.Failure, match=f"cannot read .*: {reason}"):
            noprop.read_checkpoint(tmp_path / name)


def test_older_files_get_the_next_free_number(tmp_path, capsys):
    """Checkpoint and results together, also where one of them alone has the number already."""
    path = tmp_path / "noprop_hybrid.pt"
    noprop.keep_older(path)  # there is none
    for content in ("first", "second", "third"):
        path.write_text(content)
        path.with_suffix(".json").write_text(content)
        if content == "third":
            (tmp_path / "noprop_hybrid.3.json").write_text("a stranger's")
        noprop.keep_older(path)
    names = {x.name: x.read_text() for x in tmp_path.iterdir()}
    assert names == {
        **{f"noprop_hybrid.{n}.{x}": y for n, y in ((1, "first"), (2, "second")) for x in ("pt", "json")},
        "noprop_hybrid.3.json": "a stranger's",
        **{f"noprop_hybrid.4.{x}": "third" for x in ("pt", "json")},
    }
    assert f"Kept the older {path} as noprop_hybrid.4.pt." in capsys.readouterr().out


def test_a_file_is_flushed_before_it_takes_its_name(tmp_path, monkeypatch):
    """And nothing is left beside it; a folder that is not there is a line."""
    path, events = tmp_path / "file", []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(os.fstat(number).st_size), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("named"), rename(*names)))
    noprop.write_file(path, b"content")
    assert events == [7, "named"] and [x.name for x in tmp_path.iterdir()] == ["file"]
    with pytest.raises(noprop.Failure, match="cannot write .*: No such file or directory") as failure:
        noprop.write_file(tmp_path / "none" / "file", b"content")
    assert failure.value.code == 1


def test_a_state_that_is_not_finite_is_not_saved(checkpoint):
    path, state = checkpoint
    before = path.read_bytes()
    state.log = [torch.tensor([float("nan")] * (2 * len(state.parts) - 1))]
    with pytest.raises(FloatingPointError, match="loss of block 1 is nan by step 0"):
        state.save(path, "")
    assert path.read_bytes() == before


def test_what_is_written_is_read_by_torch_alone(checkpoint):
    content = torch.load(io.BytesIO(checkpoint[0].read_bytes()), weights_only=True)
    assert content["format"] == "noprop-example-2" and content["config"] == vars(checkpoint[1].config)


def test_the_digest_of_data_tells_every_image_and_label(small_data):
    whole, digests = small_data.digest(), set()
    for name in ("train", "val", "test"):
        for i in (0, 1):
            part = [x.clone() for x in getattr(small_data, name)]
            part[i][0] = 9 - part[i][0]
            digests.add(small_data._replace(**{name: noprop.Split(*part)}).digest())
    assert len(digests | {whole, small_data._replace(test=None).digest()}) == 8
