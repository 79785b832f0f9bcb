"""Blocks that are trained alone, and put together, are the blocks of one run."""

from pathlib import Path

import pytest
import torch
from conftest import noprop, same
from laboratory import contents, equal, flags_of, lab, quick_lab, refused, untrained

from noprop_lab.backprop import BackpropConfig
from noprop_lab.networks import LabState, read_checkpoint
from noprop_lab.parts import end_of_part
from noprop_lab.settings import LabConfig, LabOptions

FIXED = "--embedding=fixed"


@pytest.fixture(autouse=True)
def quick():
    with quick_lab():
        yield


def checkpoint(folder: Path) -> dict:
    return contents(folder / "noprop_hybrid.pt")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Three blocks, each trained alone, and in "whole" the same three trained together, by the script."""
    folder = tmp_path_factory.mktemp("parts")
    with quick_lab():
        for name in ("1", "2", "3", "1,3"):
            assert lab.main(["train", *flags_of(folder / name, FIXED, f"--blocks={name}")]) == 0
        assert noprop.main(flags_of(folder / "whole", FIXED, "--select=last")) == 0
    return folder


def merge(*files: Path, into: Path) -> int:
    return lab.main(["merge", *(str(x / "noprop_hybrid.pt") for x in files), f"--output-dir={into}"])


@pytest.mark.parametrize("names", [("1", "3", "2"), ("2", "1,3")])
def test_blocks_trained_alone_and_merged_equal_the_whole(parts, tmp_path, names):
    assert [x.name for x in (parts / "2").glob("[!.]*")] == ["noprop_hybrid.pt"]
    assert merge(*(parts / name for name in names), into=tmp_path) == 0
    merged, whole = checkpoint(tmp_path), checkpoint(parts / "whole")
    assert same(merged["model"], whole["model"]) and merged["config"] == whole["config"]
    for name in ("blocks.0", "blocks.1", "blocks.2", "classifier"):
        assert equal(merged["training"]["parts"][name], whole["training"]["parts"][name])
    last = [x["training"]["history"][-1] for x in (merged, whole)]
    losses = [[*x["block_losses"], x["classifier_loss"]] for x in last]
    assert losses[0] == pytest.approx(losses[1]) and last[0]["val_accuracy"] is None  # no chain was measured
    seconds = [checkpoint(parts / name)["training"]["seconds"] for name in names]
    assert merged["training"]["seconds"] == pytest.approx(sum(seconds))
    assert last[0]["seconds"] == pytest.approx(sum(seconds))
    assert {x.name for x in tmp_path.iterdir()} == {x.name for x in (parts / "whole").iterdir()}
    assert merge(*(parts / name for name in names), into=tmp_path) == 0  # which takes no network's place
    assert same(contents(tmp_path / "noprop_hybrid.1.pt")["model"], merged["model"])


def test_a_part_of_all_blocks_is_merged_alone(parts, tmp_path, capsys):
    with quick_lab():
        assert lab.main(["train", *flags_of(tmp_path / "all", FIXED, "--blocks=1-3")]) == 0
        assert merge(tmp_path / "all", into=tmp_path) == 0
    assert same(checkpoint(tmp_path)["model"], checkpoint(parts / "whole")["model"])
    assert merge(parts / "1", into=tmp_path) == 2 and "no file has block 2" in capsys.readouterr().err


def test_a_part_that_was_stopped_is_not_said_to_be_ready(parts, capsys):
    there = read_checkpoint(parts / "1" / "noprop_hybrid.pt")
    state, options = LabState(there["config"]), LabOptions(output_dir=parts / "1")
    assert end_of_part(state, None, options) == 0 and not capsys.readouterr().out
    state.history = there["training"]["history"]
    assert end_of_part(state, None, options) == 0 and "Blocks 1 are in" in capsys.readouterr().out


def test_a_block_of_a_whole_network_is_exchanged(tmp_path):
    """A block retrained beside the learned embedding of a network takes the old one's place."""
    whole, new = tmp_path / "whole", tmp_path / "new"
    assert lab.main(["train", *flags_of(whole)]) == 0
    flags = flags_of(new, "--blocks=2", f"--embedding-from={whole / 'noprop_hybrid.pt'}", seed=7)
    assert lab.main(["train", *flags]) == 0
    assert lab.main(["train", "--resume", f"--output-dir={new}"]) == 0
    assert merge(whole, new, into=tmp_path) == 0
    histories = [checkpoint(x)["training"]["history"] for x in (whole, tmp_path)]
    assert histories[0] == histories[1]  # of the whole network, to which the new block's losses do not add
    old, new, merged = (checkpoint(x)["model"] for x in (whole, new, tmp_path))
    assert not same(old, merged)
    for name, value in merged.items():
        assert torch.equal(value, (new if name.startswith("blocks.1.") else old)[name]), name


def test_a_block_trained_in_the_folder_of_the_network_whose_embedding_it_takes(parts, tmp_path, capsys):
    path = tmp_path / "noprop_hybrid.pt"
    path.write_bytes(content := (parts / "whole" / path.name).read_bytes())
    typo = f"--embedding-from={tmp_path / 'typo.pt'}"
    refused(capsys, 2, ["train", *flags_of(tmp_path, typo, "--blocks=2")], "cannot read")
    assert path.read_bytes() == content
    assert lab.main(["train", *flags_of(tmp_path, f"--embedding-from={path}", "--blocks=2")]) == 0
    assert (tmp_path / "noprop_hybrid.1.pt").read_bytes() == content


def test_parts_on_other_images_or_of_a_twin_or_of_other_blocks(parts, tmp_path, capsys, monkeypatch):
    files = [str(parts / name / "noprop_hybrid.pt") for name in ("1", "2", "3")]
    command = ["merge", f"--output-dir={tmp_path / 'out'}"]
    twin = str(untrained(tmp_path / "twin", BackpropConfig(num_blocks=3)))
    refused(capsys, 2, [*command, twin, twin], "backprop trains one network as a whole")
    content = contents(Path(files[1]))
    content["model"]["blocks.1.more"] = torch.zeros(1)
    torch.save(content, tmp_path / "more.pt")
    refused(capsys, 2, [*command, files[0], str(tmp_path / "more.pt"), files[2]], "have other weights")
    for change, word in (
        ({"data": "x"}, "trained on other images"),
        ({"step": 9}, "not trained equally long"),
        ({"history": []}, "not trained equally long"),  # as one that was stopped in an epoch's last step
        ({"made_with": {"device": "mps"}}, "parts of an Apple GPU and of others"),
    ):
        content = contents(Path(files[1]))
        (content["training"] if {"step", "history"} & {*change} else content).update(change)
        torch.save(content, tmp_path / "other.pt")
        refused(capsys, 2, [*command, files[0], str(tmp_path / "other.pt"), files[2]], word)
    content = contents(Path(files[1]))  # as one that began with fewer epochs, and went on to these
    content["training"]["history"][0]["lr"] *= 0.5
    torch.save(content, tmp_path / "other.pt")
    refused(capsys, 2, [*command, files[0], str(tmp_path / "other.pt"), files[2]], "other learning rates")
    few = lab.load_data

    def fewer(*arguments) -> noprop.Data:
        return few(*arguments)._replace(test=few(*arguments).val)

    monkeypatch.setattr(lab, "load_data", fewer)
    refused(capsys, 2, [*command, *files], "the images are not those that")
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_another_chip_has_rounded_otherwise_fits(parts, tmp_path, capsys):
    """The first file's is kept; one of another seed does not fit (below)."""
    files = [parts / name / "noprop_hybrid.pt" for name in ("1", "2", "3")]
    content = contents(files[1])
    content["model"]["label_embedding.weight"] += 1e-7
    files[1] = tmp_path / "other.pt"
    torch.save(content, files[1])
    assert lab.main(["merge", *map(str, files), f"--output-dir={tmp_path / 'out'}"]) == 0
    assert "is kept" in capsys.readouterr().out
    merged, first = checkpoint(tmp_path / "out"), contents(files[0])
    name = "label_embedding.weight"
    assert torch.equal(merged["model"][name], first["model"][name])


@pytest.mark.parametrize(
    "change", [{"target": "noise"}, {"classify": "z"}, {"block": "deep"}, {"dataset": "kmnist"}]
)
def test_a_block_that_is_asked_otherwise_takes_no_place(change, tmp_path, capsys):
    whole = untrained(tmp_path / "whole", LabConfig(num_blocks=2, embedding="fixed"))
    part = LabConfig(num_blocks=2, embedding="fixed", select="last", blocks="1", **change)
    files = [str(whole), str(untrained(tmp_path / "part", part))]
    refused(capsys, 2, ["merge", *files, f"--output-dir={tmp_path}"], f"differ in {[*change][0]}")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["1", "2"], "no file has block 3"),
        (["1", "2", "3", "2"], "block 2 is in"),
        (["1", "2", "other"], "differ in seed"),
        (["whole", "other"], "different label embeddings"),
        (["1", "nowhere"], "cannot read"),
    ],
)
def test_parts_that_do_not_belong_together(parts, tmp_path, capsys, files, word):
    if files[-1] == "other" and not (parts / "other").exists():
        assert lab.main(["train", *flags_of(parts / "other", FIXED, "--blocks=3", seed=1)]) == 0
    paths = [str(parts / name / "noprop_hybrid.pt") for name in files]
    refused(capsys, 2, ["merge", *paths, f"--output-dir={tmp_path / 'out'}"], word)
    assert not (tmp_path / "out").exists()


def test_parts_by_different_losses_are_refused_where_their_names_are_known(parts, tmp_path, capsys):
    files = [parts / name / "noprop_hybrid.pt" for name in ("1", "2", "3")]
    for loss, code in (("L1", 2), (None, 0)):
        made = torch.load(files[2], weights_only=True)
        made["training"] = {k: x for k, x in made["training"].items() if k != "loss"}
        made["training"] |= {"loss": loss} if loss else {}
        torch.save(made, other := tmp_path / "other.pt")
        paths = [str(x) for x in (*files[:2], other)]
        assert lab.main(["merge", *paths, f"--output-dir={tmp_path}"]) == code
        said = capsys.readouterr().err
        assert ("other.pt and" in said and "differ in their loss" in said) == bool(loss)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--blocks=3"], "takes --embedding fixed"),
        (["--blocks=3", "--embedding=fixed", "--select=validation"], "and --select last"),
        (["--embedding=learned", "--embedding-from=a.pt"], "freezes the embedding"),
        (["--blocks=0", "--embedding=fixed"], "between 1 and num_blocks"),
        (["--blocks=11", "--embedding=fixed"], "between 1 and num_blocks"),
        (["--blocks=2,1-3", "--embedding=fixed"], "must name blocks"),
        (["--blocks=a", "--embedding=fixed"], "must look like"),
        (["--blocks=3-1", "--embedding=fixed"], "must name blocks"),
        (["--blocks=1", "--embedding-from=nothing.pt"], "cannot read nothing.pt"),
    ],
)
def test_bad_flags(capsys, tmp_path, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    refused(capsys, 2, ["train", *flags], word)
    assert not list(tmp_path.iterdir())
