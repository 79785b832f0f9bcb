"""The command as a user meets it: files, bad input, signals, pictures, metadata."""

import gzip
import hashlib
import io
import json
import os
import pickle
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, fails, noprop, small_disk, start, wait_until
from laboratory import quick_lab, quick_main
from PIL import Image

from noprop_lab.__main__ import console
from noprop_lab.settings import WEIGHTS

SCRIPT = str(ROOT / "noprop_example.py")


@pytest.fixture
def quick():
    with quick_lab():
        yield


def test_files_of_a_run(trained, capsys):
    summary = json.loads((trained / "noprop_hybrid.json").read_text())
    assert summary["epochs"] == len(summary["history"]) == 2 and summary["finished"]
    assert summary["config"]["seed"] == 0
    by_blocks = summary["test_accuracy_by_blocks"]
    assert len(by_blocks) == 3 and by_blocks[-1] == summary["test_accuracy"]
    assert 0 < summary["seconds"] < summary["seconds_total"]
    assert summary["selected_epoch"] == 2
    for name in ("val_accuracy", "test_accuracy"):
        assert summary[name] == summary["history"][1][name] and 97 < summary[name] < 100
    checkpoint = torch.load(trained / "noprop_hybrid.pt", weights_only=True)
    assert checkpoint["config"] == summary["config"] and "output_dir" not in checkpoint["config"]
    assert {name.split(".")[0] for name in checkpoint["model"]} == {"blocks", "label_embedding", "classifier"}
    for name in ("training_progress_hybrid.png", "denoising_hybrid.png"):
        with Image.open(trained / name) as picture:
            assert picture.width >= 1000
    assert [path.name for path in trained.glob(".*")] == [".noprop_run.lock"]
    assert noprop.main(["--evaluate", str(trained / "noprop_hybrid.pt")]) == 0
    assert f"Test accuracy {summary['test_accuracy']:.2f} ±" in capsys.readouterr().out
    assert f"{summary['test_accuracy']:.2f}" != f"{summary['val_accuracy']:.2f}"  # else this shows nothing


def test_evaluation_as_the_paper_samples(trained, data, capsys):
    content = noprop.read_checkpoint(path := trained / "noprop_hybrid.pt")
    config = replace(content["config"], temperature=1.0, weights="ddpm")
    found = noprop.evaluate(noprop.build(config, content=content), data.test, config)["accuracy"][-1]
    assert noprop.main(["--evaluate", str(path), "--temperature=1", "--weights=ddpm"]) == 0
    assert f"Test accuracy {found:.2f} ±" in capsys.readouterr().out
    plain = json.loads((trained / "noprop_hybrid.json").read_text())["test_accuracy"]
    assert f"{found:.2f}" != f"{plain:.2f}"  # else this shows nothing


def test_pictures_of_any_size_and_polarity(trained, data, tmp_path, capsys):
    """Test digits as files: as they are, dark on light, enlarged, off centre, transparent, as JPEG."""
    paths, count = [], 40
    for i, image in enumerate(data.test.images[:count, 0].numpy()):
        picture = Image.fromarray(image)
        if i % 5 == 1:
            picture = Image.fromarray(255 - image)
        if i % 5 == 2:
            picture = picture.resize((300, 300))
        if i % 5 == 3:
            wide = Image.new("L", (90, 50), 255)
            wide.paste(Image.fromarray(255 - image), (55, 4))
            picture = wide
        if i % 5 == 4:
            picture = Image.merge("LA", (Image.new("L", (28, 28), 0), picture))
        paths.append(tmp_path / f"{i}.{'jpg' if i % 5 == 2 else 'png'}")
        picture.save(paths[-1])
    assert noprop.main(["--predict", str(trained / "noprop_hybrid.pt"), *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    answers = [int(re.match(r".*: (\d)  \(", line).group(1)) for line in lines]
    right = sum(a == b for a, b in zip(answers, data.test.labels[:count].tolist(), strict=True))
    assert len(answers) == count and right >= count - 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--bogus", "1"], "--bogus is no flag here: see --help"),
        (["--epoch=1"], "--epoch=1 is no flag here (is --epochs meant?)"),
        (["--presett", "accurate", "--lr", ".1"], "is --preset meant?"),
        (["a.png"], "a.png is no flag"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--preset", "none"], "--preset"),
        (["--predict"], "--predict: expected at least one argument"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch-size", "1"], "batch_size must be at least 2"),
        (["--batch-size", "60000"], "--batch-size 60000 is more than the 55000 training images"),
        (["--lr", "-0.1"], "lr must be at least 0"),
        (["--lr", "nan"], "lr must be at least 0, and at most 1,000,000,000"),
        (["--eta-min", "1"], "eta_min must be at most lr, 0.014"),
        (["--select=last", "--patience=3", "--data-root=/"], "patience has no effect with select last"),
        (["--schedule=constant", "--eta-min=0", "--data-root=/"], "eta_min has no effect with schedule"),
        (["--embedding=fixed", "--embed-wd=1", "--data-root=/"], "embed_wd has no effect with embedding"),
        (["--num-blocks", "0"], "num_blocks must be at least 1"),
        (["--embed-dim", "1" + 18 * "0"], "embed_dim must be at least 1, and at most 2,147,483,647"),
        (["--ema-decay", "1"], "ema_decay must be"),
        (["--grad-clip", "0"], "grad_clip 0 leaves nothing to learn by"),
        (["--max-norm-embed", "0"], "max_norm_embed 0 leaves nothing to learn by"),
        (["--ema-decay", "1.5"], "ema_decay must be"),
        (["--train-images", "60000"], "--train-images 60000 is more than the 55000 training images"),
        (["--train-images", "100"], "--batch-size 512 is more than the 100 training images"),
        (["--eta-loss-weight", "0", "--lambda-global", "0"], "both weights"),
        (["--temperature", "1"], "takes weights ddpm"),
        (["--temperature=1e300", "--weights=ddpm", "--data-root=/"], "temperature must be at least 0, and"),
        (["--seed", str(2**64 + 1), "--data-root=/"], "seed must be at least 0, and at most 18,446,744"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--device="], "--device= is empty"),
        (["--run-hpo", "--resume"], "choose one of"),
        (["--hpo-trials=3"], "hpo_trials is of a search"),
        (["--data-root", "/nowhere"], "No such file"),
        (["--output-dir", "/proc/nowhere"], "cannot write into --output-dir"),
        (["--evaluate", "nothing.pt"], "cannot read nothing.pt"),
        (["--predict", "nothing.pt", "a.png"], "cannot read nothing.pt"),
        (
            ["--predict", "nothing.pt", "a.png", "--checkpoint-minutes=1"],
            "checkpoint_minutes has no use here",
        ),
        (["--evaluate", "nothing.pt", "--output-dir=x"], "output_dir has no use here"),
        (["--predict", "nothing.pt", "a.png", "--data-root=x"], "data_root has no use here"),
        (["--data-root=/nowhere", "--output-dir", ""], "a value is empty"),
    ],
)
def test_bad_flags(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, arguments, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--data-root"], ["--resume", "--output-dir"]])
def test_a_path_that_cannot_even_be_looked_up_is_one_line(capsys, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, [*flags, "a" * 300], "File name too long")


def test_presets_and_flags():
    def read(*arguments: str) -> noprop.Config:
        return noprop.read_command_line(list(arguments))[0]

    config = read("--preset", "reference", "--epochs", "3")
    assert (config.epochs, config.batch_size, config.target, config.augment) == (3, 128, "noise", False)
    assert read() == noprop.Config() and noprop.RUN_HPO is False
    few = ["--preset", "reference", "--train-images", "200"]  # fewer than a batch of the default
    assert read(*few).train_images == 200
    assert read("--preset=accurate") == noprop.Config.accurate() and noprop.Config.accurate().block == "deep"


def test_the_reference_preset_is_the_recipe_of_its_description():
    found = noprop.Config.reference()
    described = dict(epochs=100, patience=15, num_blocks=10, embed_dim=20, target="noise", weights="ddpm")
    described |= dict(eta_loss_weight=2, lambda_global=1, lr=0.01, schedule="cosine", eta_min=1e-6)
    described |= dict(weight_decay=1e-3, embed_wd=1e-7, max_norm_embed=50, grad_clip=1, embedding="learned")
    described |= dict(ema_decay=0, augment=False, batch_size=128, block="reference", temperature=0)
    assert {name: getattr(found, name) for name in described} == described


def test_the_defaults_are_those_that_the_documents_and_the_network_in_the_repository_have():
    content = noprop.read_checkpoint(ROOT / "noprop_lab/weights/mnist.pt")
    assert content["config"] == noprop.Config()
    options, text = noprop.Options(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{options.hpo_trials} trials of {options.hpo_epochs} epochs" in text
    assert options.checkpoint_minutes == 10 and "every ten minutes" in text
    assert options.data_root == ROOT / "data" and options.output_dir == Path(".")


def test_a_config_of_the_wrong_type_is_refused():
    for name, value in (("patience", 1.5), ("lr", "a"), ("block", "paper"), ("augment", None), ("seed", "0")):
        with pytest.raises(ValueError, match=name):
            noprop.Config(**{name: value})
    whole = noprop.Config(
        lr=1, ema_decay=0, eta_min=0, temperature=0, seed=0, train_images=None
    )  # as JSON has it
    assert (whole.lr, whole.ema_decay) == (1, 0)
    assert noprop.Config(seed=1_795_847_400_123_456_789).seed  # a time in nanoseconds


def test_what_a_file_names_is_not_ignored_though_it_is_a_default(capsys, tmp_path):
    config = noprop.Config(**TINY)
    noprop.State(config).save(tmp_path / "noprop_hybrid.pt", "of no images")
    (path := tmp_path / "a.json").write_text(json.dumps({"epochs": 12, "lr": config.lr}))
    resume = ["--resume", f"--output-dir={tmp_path}", f"--config={path}"]
    assert noprop.read_command_line(resume)[0] == replace(config, epochs=12)
    path.write_text('{"num_blocks": 10}')
    fails(capsys, 2, resume, "--num-blocks 10 contradicts", "which has 3")
    path.write_text('{"epochs": "x"}')
    fails(capsys, 2, resume, "epochs can't be 'x'")


def test_run_hpo_decides_only_what_a_bare_call_does(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noprop, "RUN_HPO", True)
    checkpoint = trained / "noprop_hybrid.pt"
    assert noprop.read_command_line([])[1].run_hpo
    for arguments in (["--evaluate", str(checkpoint)], ["--resume", f"--output-dir={tmp_path}"]):
        assert not noprop.read_command_line(arguments)[1].run_hpo
    assert not noprop.read_command_line(["--predict", str(checkpoint), "a.png"])[1].run_hpo
    assert not noprop.read_command_line(["--no-run-hpo"])[1].run_hpo


def test_help_has_every_setting_in_a_line_the_most_used_ones_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert noprop.main(["--help"]) == 0
    _, _, _, used_most, *others = capsys.readouterr().out.split("\n\n")
    first = re.findall(r"^  (--[a-z-]+)", used_most, re.M)
    assert len(first) == 10 and {"--epochs", "--resume", "--predict"} < set(first)
    headings = ["Files and machine", "Search", "Network", "Loss", "Recipe", "Inference"]
    assert [text.split(":")[0] for text in others] == headings
    for field in (*fields(noprop.Config), *fields(noprop.Options)):
        flag = f"--{field.name.replace('_', '-')}"
        assert len(re.findall(rf"^  {flag}\b.*\S\s\s+\S", "\n".join([used_most, *others]), re.M)) == 1, flag
    assert re.search(r"--lr 0.014 +highest learning rate of AdamW", others[4])


def test_a_flag_may_have_underscores():
    config, options, _ = noprop.read_command_line(["--batch_size", "64", "--output_dir=a_b"])
    assert config.batch_size == 64 and options.output_dir == Path("a_b")


def test_a_package_that_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "optuna.trial", None)
    fails(capsys, 1, ["--run-hpo", f"--output-dir={tmp_path}"], "optuna.trial")


@pytest.mark.parametrize("name", ["epochs", "lr", "seed"])
def test_true_is_no_number(name):
    with pytest.raises(noprop.Failure, match=f"{name} must be at least .*, not True"):
        noprop.Config(**{name: True})


def test_what_is_installed():
    """The commands are functions that there are, and the trained network goes with them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    commands = {name: pkgutil.resolve_name(x) for name, x in project["project"]["scripts"].items()}
    assert commands == {"noprop": noprop.main, "noprop-lab": console}
    [held] = project["tool"]["setuptools"]["package-data"]["noprop_lab"]
    assert WEIGHTS in (ROOT / "noprop_lab").glob(held)


def test_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert noprop.read_command_line(["--output-dir=~/x"])[1].output_dir == tmp_path / "x"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "unpacked", "a folder"])
def test_damaged_data(capsys, tmp_path, damage):
    folder = shutil.copytree(ROOT / "data/MNIST/raw", tmp_path / "MNIST/raw")
    victim = folder / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    if damage == "unpacked":  # sufficient alone, and checked
        name = "t10k-images-idx3-ubyte"
        unpacked = gzip.decompress(content)
        assert hashlib.md5(unpacked).hexdigest() == noprop.MD5[name]
        good = noprop.read_mnist(folder)
        victim.write_bytes(gzip.compress(unpacked, 1))  # packed anew
        (folder / name).mkdir()  # as some archives have it
        assert torch.equal(noprop.read_mnist(folder)[1].images, good[1].images)
        victim.unlink()
        (folder / name).rmdir()
        victim = folder / "t10k-images-idx3-ubyte"
        victim.write_bytes(unpacked)
        assert torch.equal(noprop.read_mnist(folder)[1].images, good[1].images)
        content = unpacked
    if damage in ("missing", "a folder"):
        victim.unlink()
        if damage == "a folder":
            victim.mkdir()
    else:
        cut = len(content) - 1000 if damage == "truncated" else len(content)
        victim.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:cut])
    arguments = ["--data-root", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    words = {"missing": "No such file", "a folder": "Is a directory"}
    get = [f"torchvision.datasets.MNIST('{tmp_path}', download=True)"] * (damage in words)
    fails(capsys, 2, arguments, victim.name, words.get(damage, "damaged"), *get)
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_hostile_and_unfit_checkpoints(capsys, tmp_path, monkeypatch, trained):
    """Damaged ones: test_files.py, test_properties.py."""
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save(RunsCode(), "hostile-zip.pt")
    for name in ("other", "hostile", "hostile-zip"):
        fails(capsys, 2, ["--evaluate", f"{name}.pt"], f"{name}.pt", "no checkpoint of this script")
    assert not (tmp_path / "pwned").exists()
    torch.save({"format": noprop.FORMAT}, "bare.pt")
    torch.save(torch.load(trained / "noprop_hybrid.pt") | {"model": {1: torch.zeros(1)}}, "numbers.pt")
    fails(capsys, 2, ["--evaluate", "bare.pt"], "bare.pt (None: 'objective') is the lab's")
    fails(capsys, 2, ["--evaluate", "numbers.pt"], "numbers.pt does not hold the weights of its settings")
    payload = torch.load(trained / "noprop_hybrid.pt", weights_only=True)
    for change, word in (
        ({"config": payload["config"] | {"embed_dim": "a"}}, "embed_dim"),
        ({"config": payload["config"] | {"dataset": "cifar10"}}, "noprop_lab"),
        ({"objective": "dt"}, "noprop_lab"),
        ({"format": "noprop-example-1"}, "another version"),
        ({"format": "noprop-example-9"}, "another version"),
    ):
        torch.save(payload | change, "unfit.pt")
        fails(capsys, 2, ["--evaluate", "unfit.pt"], "unfit.pt", word)


def test_bad_pictures(capsys, tmp_path, trained):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (40, 40), 200).save(tmp_path / "blank.png")
    for name, word in (
        ("text.png", "cannot read the image"),
        ("none.png", "cannot read"),
        ("blank.png", "nothing"),
    ):
        fails(capsys, 2, ["--predict", str(trained / "noprop_hybrid.pt"), str(tmp_path / name)], word, name)
    fails(capsys, 2, ["--predict", str(trained / "noprop_hybrid.pt")], "at least one image")


def test_one_bad_picture_among_many_and_the_others_are_answered(capsys, tmp_path, trained, data):
    (tmp_path / "bad.png").write_text("not a picture")
    for i in range(2):
        Image.fromarray(data.test.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / name) for name in ("0.png", "bad.png", "1.png")]
    assert noprop.main(["--predict", str(trained / "noprop_hybrid.pt"), *paths]) == 2
    output = capsys.readouterr()
    assert [line.split(": ")[1][0] for line in output.out.splitlines()] == ["7", "2"]
    images = noprop.read_digit(tmp_path / "0.png")[None]
    shares = noprop.load(trained / "noprop_hybrid.pt").probabilities(images)[0, -1]
    printed = re.findall(r"(\d): ([\d.]+) %", output.out.splitlines()[0])  # the three most probable
    assert printed == [
        (str(k), f"{100 * shares[k]:.1f}") for k in shares.argsort(descending=True)[:3].tolist()
    ]
    assert output.err.startswith("error: cannot read the image") and output.err.count("\n") == 1


OUT_OF_MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")]
OUT_OF_MEMORY += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
OUT_OF_MEMORY += [RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_is_a_line(error, capsys):
    def execute(arguments: list[str]) -> int:
        raise error

    fails(capsys, 1, [], "out of memory", main=lambda arguments: noprop.main(arguments, execute))


def test_a_console_that_is_no_file(monkeypatch):
    """A notebook's: it has no reconfigure()."""
    monkeypatch.setattr(sys, "argv", ["noprop_example.py", "--evaluate", "none.pt"])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    assert noprop.main() == 2 and "none.pt" in sys.stderr.getvalue()


def test_an_accuracy_of_zero_is_printed(tmp_path, small_data, monkeypatch, capsys):
    state = noprop.State(noprop.Config(num_blocks=1))
    record = dict(epoch=1, block_losses=[0.5], classifier_loss=0.25, val_accuracy=0.0, test_accuracy=None)
    record |= dict(lr=0.01, seconds=7.0)
    monkeypatch.setattr(noprop, "train", lambda *_, **__: iter([record]))
    options = noprop.Options(output_dir=tmp_path)
    assert noprop.train_and_save(state, small_data, options, None, lambda: 0) == 0
    line = (
        "epoch   1/12  loss of blocks 0.5000, classifier 0.2500  validation 0.00 %, test nan %  lr 0.010000"
    )
    assert capsys.readouterr().out.splitlines() == [f"{line}  7 s"]


def test_ctrl_c_where_nothing_catches_it_has_its_code():
    def execute(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    assert noprop.main([], execute) == 130


def test_a_fault_of_the_program_is_no_line():
    def execute(arguments: list[str]) -> int:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        noprop.main([], execute)


@pytest.mark.parametrize(("name", "code"), [("gpu", 2), ("privateuseone", 1)])
def test_a_device_that_is_not_there(name, code, capsys):
    fails(capsys, code, [f"--device={name}"], f"--device {name} can't be used")


def test_by_itself_the_device_is_the_accelerator(monkeypatch):
    """One that is found, and can't be used: so it was asked."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("meta"))
    with pytest.raises(noprop.Failure, match="--device meta can't be used"):
        noprop.pick_device(noprop.Options())


def test_deterministic_is_asked_of_torch(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        noprop.pick_device(noprop.Options(device="cpu", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(number):
    """As under nohup, and where a shell has put the run into the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with noprop.caught_signals() as signalled:
            signal.raise_signal(number)
            assert signalled() == 0
    finally:
        signal.signal(number, before)


def test_a_list_given_in_parts_is_one():
    found = noprop.read_flags(["--predict", "n.pt", "a.png", "--predict", "b.png"], noprop.Options)
    assert found["predict"] == tuple(map(Path, ("n.pt", "a.png", "b.png")))


def test_a_constant_rate_may_be_below_what_it_does_not_end_at():
    assert noprop.Config(schedule="constant", lr=1e-7).lr < noprop.Config.eta_min


@pytest.mark.parametrize(("minutes", "saved"), [(10.0, 4), (1e-9, 6)])
def test_divergence_keeps_the_last_checkpoint(minutes, saved, quick, capsys, tmp_path):
    """Of an epoch, or where a step takes longer than --checkpoint-minutes, of the step before."""

    def poisoned(state, image, *rest):
        return noprop.train_step(state, image * (float("nan") if state.step == 6 else 1), *rest)

    config = noprop.Config(**TINY | {"epochs": 3})
    options = noprop.Options(output_dir=tmp_path, checkpoint_minutes=minutes)
    run = noprop.State(config), noprop.load_data(config), options, None, poisoned
    assert noprop.main([], lambda _: noprop.run(*run)) == 3
    assert capsys.readouterr().err.startswith("error: loss of block 1 is nan by step 7")
    checkpoint = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    assert checkpoint["training"]["step"] == saved
    assert all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_checkpoint_comes_when_it_is_time(small_data, tmp_path, monkeypatch):
    """Of twelve steps that take a minute each: every four, where one is to come after 3.5 minutes."""
    state, saved = noprop.State(noprop.Config(num_blocks=1, batch_size=40, epochs=1)), []
    clock = SimpleNamespace(monotonic=lambda: 60.0 * state.step, perf_counter=time.perf_counter)
    monkeypatch.setattr(noprop, "time", clock)
    monkeypatch.setattr(noprop.State, "save", lambda self, *_: saved.append(self.step))
    options = noprop.Options(output_dir=tmp_path, checkpoint_minutes=3.5)
    assert noprop.train_and_save(state, small_data, options, noprop.train_step, lambda: 0) == 0
    assert saved == [4, 8, 12, 12]  # the last of the epoch


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, flags, quick, capsys):
    """The picture of an earlier run stays whole."""
    for name in ("noprop_hybrid.json", "training_progress_hybrid.png"):
        (tmp_path / name).write_text("of an earlier run")
    with small_disk(65536):
        fails(capsys, 1, flags, "error: cannot write ", "noprop_hybrid.pt: File too large")
    names = {path.name for path in tmp_path.iterdir()} - {".noprop_run.lock"}
    assert names == {"noprop_hybrid.1.json", "training_progress_hybrid.png"}  # kept, and untouched


def test_a_signal_leaves_whole_files(tmp_path):
    """Of a terminal that is closed; in test_reliability.py those of Ctrl-C and kill."""
    flags = ["--epochs=50", "--train-images=2000", "--num-blocks=3", f"--output-dir={tmp_path / 'run'}"]
    process = start(output := tmp_path / "output", flags, quick_main)
    wait_until(lambda: output.exists() and "\nepoch" in output.read_text(), process)
    os.kill(process.pid, signal.SIGHUP)
    process.join(300)
    assert process.exitcode == 128 + signal.SIGHUP
    lines = output.read_text().splitlines()
    assert lines[0].startswith("NoProp on") and any(x.startswith("Test accuracy") for x in lines)
    assert not any("error" in x or "Traceback" in x for x in lines)
    checkpoint = noprop.read_checkpoint(tmp_path / "run/noprop_hybrid.pt")
    summary = json.loads((tmp_path / "run/noprop_hybrid.json").read_text())
    assert 1 <= summary["epochs"] == len(checkpoint["training"]["history"]) < 50 and not summary["finished"]
    assert all((tmp_path / "run" / name).read_bytes() == b"figure" for name in OUTPUTS[2:])


def test_importing_prints_and_writes_nothing(tmp_path):
    command = [sys.executable, "-c", "import noprop_example, sys; print(*sys.modules, file=sys.stderr)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir()), result.stderr
    modules = set(result.stderr.split())
    assert "noprop_example" in modules
    assert not {"matplotlib", "optuna", "torchvision", "PIL"} & modules


@pytest.mark.draws
def test_without_a_picture_the_results_are_there(flags, quick, tmp_path, monkeypatch, capsys):
    """Of a matplotlib that can't be imported, as with a backend that it does not know."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert noprop.main(flags) == 1
    output = capsys.readouterr()
    assert "Test accuracy" in output.out
    assert output.err.count("error: no picture") == 2 == output.err.count("\n"), output.err
    assert (tmp_path / "noprop_hybrid.json").exists() and not (tmp_path / "denoising_hybrid.png").exists()


def test_of_several_failures_the_first_decides_the_exit_code(capsys):
    def read(code: int):
        raise noprop.Failure("unreadable", code)

    assert noprop.print_classes(None, [1, 2], read) == 1 and noprop.print_classes(None, [2, 1], read) == 2
    assert capsys.readouterr().err.count("error: unreadable") == 4


def test_letters_that_a_console_lacks(monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(found := io.BytesIO(), encoding="ascii"))
    assert noprop.main() == 0 and b"--train-images" in found.getvalue() and b"\\u" in found.getvalue()


OUTPUTS = [name.format("hybrid") for name in noprop.OUTPUTS]


def test_the_script_alone_whose_reader_leaves_with_a_name_that_a_console_lacks(tmp_path, flags):
    """Copied beside data/, whatever matplotlib is told there; the run goes on where only a print failed."""
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    command = [sys.executable, "-P", "noprop_example.py", *flags, "--num-blocks=1", b"--output-dir=\xff"]
    odd = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://nonsense.backend"}
    pipe = subprocess.PIPE
    run = subprocess.Popen(command, cwd=tmp_path, env=os.environ | odd, stdout=pipe, stderr=pipe)
    assert run.stdout.readline().startswith(b"NoProp on cpu")
    run.stdout.close()
    assert run.wait(300) == 0 and run.stderr.read() == b""
    run.stderr.close()
    found = sorted(os.listdir(os.fsencode(tmp_path) + b"/\xff"))
    assert found == [b".noprop_run.lock", *sorted(x.encode() for x in OUTPUTS)]
