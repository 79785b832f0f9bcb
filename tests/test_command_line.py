"""The command as a user meets it: files, bad input, signals, pictures, metadata."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, noprop
from PIL import Image

SCRIPT = str(ROOT / "noprop_example.py")


def fails(capsys, code: int, arguments: list[str], *words: str) -> None:
    """The command ends with that exit code and a line, or tyro's box, that holds the words; no traceback."""
    try:
        result = noprop.main(arguments)
    except SystemExit as exit:
        result = exit.code
    message = capsys.readouterr().err
    assert result == code, message
    assert "Traceback" not in message
    assert message.count("\n") == 1 or "For full helptext" in message, message
    flat = re.sub(r"[\s│]+", " ", message)
    for word in words:
        assert word in flat, message


def test_files_of_a_run(trained, capsys):
    summary = json.loads((trained / "noprop_hybrid.json").read_text())
    assert summary["epochs"] == len(summary["history"]) == 1 and summary["finished"]
    assert summary["seed"] == 0
    by_blocks = summary["test_accuracy_by_blocks"]
    assert len(by_blocks) == 10 and by_blocks[-1] == summary["test_accuracy"] == summary["best_test_accuracy"]
    assert summary["embedding_norm_start"] == pytest.approx(1) != summary["embedding_norm_end"]
    assert 0 < summary["seconds"] < summary["seconds_total"]
    checkpoint = torch.load(trained / "noprop_hybrid.pt", weights_only=True)
    assert checkpoint["config"] == summary["config"] and "output_dir" not in checkpoint["config"]
    assert {name.split(".")[0] for name in checkpoint["model"]} == {"blocks", "label_embedding", "classifier"}
    for name in ("training_progress_hybrid.png", "denoising_hybrid.png"):
        with Image.open(trained / name) as picture:
            assert picture.width >= 1000
    assert [path.name for path in trained.glob(".*")] == [".noprop_run.lock"]
    assert noprop.main(["--evaluate", str(trained / "noprop_hybrid.pt")]) == 0
    assert f"Test accuracy {summary['test_accuracy']:.2f} ±" in capsys.readouterr().out


def test_evaluation_with_early_exit(trained, capsys):
    assert noprop.main(["--evaluate", str(trained / "noprop_hybrid.pt"), "--early-exit", "0.5"]) == 0
    found = re.match(
        r"Early exit: (.*) of 10 blocks an image.\nTest accuracy (.*) ±", capsys.readouterr().out
    )
    assert 1 < float(found[1]) < 5 and float(found[2]) > 97


def test_an_older_checkpoint_is_kept(flags, tmp_path, capsys):
    assert noprop.main(flags) == 0
    older = (tmp_path / "noprop_hybrid.pt").read_bytes()
    assert noprop.main([*flags, "--seed", "1"]) == 0
    assert "Kept the older" in capsys.readouterr().out
    assert (tmp_path / "noprop_hybrid.previous.pt").read_bytes() == older


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
        (["--bogus", "1"], "--bogus"),
        (["--epochs", "many"], "--epochs"),
        (["--preset", "none"], "--preset"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch-size", "1"], "batch_size must be at least 2"),
        (["--batch-size", "60000"], "--batch-size 60000 is more than the 55000 training images"),
        (["--lr", "-0.1"], "lr must be positive"),
        (["--lr", "nan"], "lr must be positive"),
        (["--eta-min", "1"], "eta_min must be between"),
        (["--num-blocks", "0"], "num_blocks must be at least 1"),
        (["--embed-dim", "9"], "embed_dim must be at least 10"),
        (["--ema-decay", "1"], "ema_decay must be"),
        (["--train-images", "100"], "train_images must be"),
        (["--eta-loss-weight", "0", "--lambda-global", "0"], "learn nothing"),
        (["--early-exit", "0"], "early_exit must be above 0"),
        (["--temperature", "1"], "takes --weights ddpm"),
        (["--early-exit", "0.9"], "early_exit goes with evaluate or predict"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--run-hpo", "--resume"], "choose one of"),
        (["--data-root", "/nowhere"], "train-images-idx3-ubyte.gz is missing"),
        (["--output-dir", "/proc/nowhere"], "cannot write into --output-dir"),
        (["--evaluate", "nothing.pt"], "cannot read nothing.pt"),
        (["--predict", "nothing.pt"], "cannot read nothing.pt"),
    ],
)
def test_bad_flags(capsys, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, arguments, word)
    assert not list(tmp_path.iterdir())


def test_presets_and_flags():
    config = noprop.read_config(["--preset", "reference", "--epochs", "3"])
    assert (config.epochs, config.batch_size, config.target, config.augment) == (3, 128, "noise", False)
    assert noprop.read_config([]) == noprop.Config() and noprop.RUN_HPO is False
    few = ["--preset", "reference", "--train-images", "200"]  # fewer than a batch of the default
    assert noprop.read_config(few).train_images == 200


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "unpacked"])
def test_damaged_data(capsys, tmp_path, damage):
    folder = shutil.copytree(ROOT / "data/MNIST/raw", tmp_path / "MNIST/raw")
    victim = folder / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    if damage == "unpacked":  # sufficient alone, and checked
        unpacked = noprop.read_mnist_file(folder, "t10k-images-idx3-ubyte")
        victim.unlink()
        victim = folder / "t10k-images-idx3-ubyte"
        victim.write_bytes(unpacked)
        assert noprop.read_mnist_file(folder, "t10k-images-idx3-ubyte") == unpacked
        content = unpacked
    if damage == "missing":
        victim.unlink()
    else:
        cut = len(content) - 1000 if damage == "truncated" else len(content)
        victim.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:cut])
    arguments = ["--data-root", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    fails(capsys, 2, arguments, victim.name, "missing" if damage == "missing" else "damaged")
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_damaged_and_hostile_checkpoints(capsys, tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    content = (trained / "noprop_hybrid.pt").read_bytes()
    good = noprop.checksum(noprop.load(trained / "noprop_hybrid.pt").state_dict())
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save(RunsCode(), "hostile-zip.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    for name in ("other", "hostile", "hostile-zip", "text", "empty", "cut"):
        fails(capsys, 2, ["--evaluate", f"{name}.pt"], f"{name}.pt", "not a checkpoint of this script")
    assert not (tmp_path / "pwned").exists()
    refused = 0
    for i in range(25):  # a flipped bit is refused, or changes nothing
        place = int.from_bytes(hashlib.sha256(bytes([i])).digest()[:4], "big") % len(content)
        (tmp_path / "flipped.pt").write_bytes(
            content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        )
        try:
            assert noprop.checksum(noprop.load("flipped.pt").state_dict()) == good
        except noprop.Failure as failure:
            refused += failure.code == 2
    assert refused >= 20
    payload = torch.load(trained / "noprop_hybrid.pt", weights_only=True)
    payload["config"]["embed_dim"] = 30
    payload.pop("checksum")
    torch.save(payload | {"checksum": noprop.checksum(payload)}, "unfit.pt")
    fails(capsys, 2, ["--evaluate", "unfit.pt"], "does not fit")


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


@pytest.mark.parametrize("speed, told", [(1.0, True), (8.0, False)])
def test_a_machine_that_is_slow_with_bfloat16_says_so(capsys, flags, monkeypatch, speed, told):
    def peak(device, dtype=torch.float32, size=0):
        return speed if dtype == torch.bfloat16 else 4.0

    monkeypatch.setattr(noprop, "matmul_peak", peak)
    assert noprop.main([*flags, "--precision", "bfloat16"]) == 0
    assert ("bfloat16 is 4.0 times slower than float32 here" in capsys.readouterr().out) == told


def test_divergence_keeps_the_last_checkpoint(capsys, tmp_path, flags, monkeypatch):
    flags = [*flags, "--epochs", "3"]
    step = noprop.train_step

    def poisoned(training, image, *rest):
        return step(training, image * (float("nan") if training.step == 6 else 1), *rest)

    monkeypatch.setattr(noprop, "train_step", poisoned)
    fails(capsys, 3, flags, "loss of block 1 is nan in step 7")
    checkpoint = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    assert checkpoint["training"]["step"] == 4
    assert all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path):
    """A file-size limit stands for the full disk; the picture of an earlier run stays whole."""
    for name in ("noprop_hybrid.json", "training_progress_hybrid.png"):
        (tmp_path / name).write_text("of an earlier run")
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items())
    command = f"ulimit -f 64; exec {sys.executable} {SCRIPT} {flags} --output-dir={tmp_path}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"error: cannot write .*noprop_hybrid.pt: File too large\n", result.stderr)
    names = {path.name for path in tmp_path.iterdir()} - {".noprop_run.lock"}
    assert names == {"noprop_hybrid.json", "training_progress_hybrid.png"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_whole_files(tmp_path, number, code):
    command = [
        sys.executable,
        SCRIPT,
        "--epochs=50",
        "--train-images=2000",
        "--num-blocks=3",
        f"--output-dir={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline(), process.stdout.readline()]  # the header, the first epoch
    assert lines[1].startswith("epoch")
    time.sleep(0.3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors == "" and "Test accuracy" in output
    checkpoint = noprop.read_checkpoint(tmp_path / "noprop_hybrid.pt")
    summary = json.loads((tmp_path / "noprop_hybrid.json").read_text())
    assert 1 <= summary["epochs"] == len(checkpoint["training"]["history"]) < 50 and not summary["finished"]
    assert {"training_progress_hybrid.png", "denoising_hybrid.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_importing_prints_and_writes_nothing(tmp_path):
    command = [sys.executable, "-c", "import noprop_example, sys; print(*sys.modules, file=sys.stderr)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "" and not list(tmp_path.iterdir())
    assert not {"matplotlib", "optuna", "torchvision", "PIL", "tyro"} & set(result.stderr.split())


def test_requirements_agree():
    header = re.search(r"# dependencies = \[\n(.*?)# \]", (ROOT / "noprop_example.py").read_text(), re.DOTALL)
    assert re.findall(r'"(.*?)"', header.group(1)) == (ROOT / "requirements.txt").read_text().split("\n")[:-1]
