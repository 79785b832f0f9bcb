"""What survives: kills, signals, damaged files and full disks, tried on the real script and real data.

    python benchmarks/faults.py --rounds 200

Starts the script, kills it at a random moment of what is left of its training and evaluation (it saves after
every step: often it is writing) and resumes it; where it has ended before, that is no kill. Compares the last
weights, averages, optimizers and history with those of an undisturbed run.
Flips bits of and truncates checkpoints and data files. Limits the size of files, as a full disk does.
Prints a table, and keeps it in benchmarks/results/faults.json.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402
from tqdm import tqdm  # noqa: E402

import noprop_example as noprop  # noqa: E402
from benchmarks.seeds import refuse_fewer  # noqa: E402

RUN = [
    sys.executable,
    str(ROOT / "noprop_example.py"),
    "--epochs=4",
    "--train-images=4096",
    "--batch-size=256",
]
RUN += ["--num-blocks=3", "--checkpoint-minutes=1e-9"]
STEPS = 4 * (4096 // 256)


def digest(value) -> str:
    """SHA-256 over nested dicts and lists of tensors and plain values."""
    leaves, structure = tree_flatten(value)
    sha = hashlib.sha256(repr(structure).encode())
    for leaf in leaves:
        is_tensor = isinstance(leaf, torch.Tensor)
        sha.update(leaf.contiguous().numpy().tobytes() if is_tensor else repr(leaf).encode())
    return sha.hexdigest()


def fingerprint(folder: Path) -> str:
    """The digest of everything in the checkpoint but the timings."""
    content = noprop.read_checkpoint(folder / "noprop_hybrid.pt")
    content["path"] = content["written"] = None
    content["training"].pop("seconds")
    for record in content["training"]["history"]:
        record.pop("seconds")
    return digest(content)


def finish(folder: Path) -> bool:
    """Resume to the end; whether that worked."""
    run = subprocess.run(
        [*RUN, "--resume", f"--output-dir={folder}"], capture_output=True, text=True, timeout=300
    )
    return run.returncode == 0 and "Traceback" not in run.stderr


def begin(folder: Path) -> tuple[subprocess.Popen, int]:
    """A run in that folder that has begun to train, or to evaluate; and how many steps were done before.

    It may also have ended, as it could not go on.
    """
    command = [*RUN, "--resume", f"--output-dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = next((line for line in process.stdout if line.startswith("NoProp on")), "")
    done = re.search(r"resuming, (\d+) steps", begun)
    return process, int(done[1]) if done else 0


def kill(rng: random.Random, rounds: int, seconds: float, expected: str, table: Counter, bar: tqdm) -> None:
    """Chains of up to five kills, each followed by --resume; then to the end. seconds: from begin() on."""
    expected_codes = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
    while rounds > 0:
        with tempfile.TemporaryDirectory() as name:
            chain = []
            for _ in range(min(5, rounds)):
                number = rng.choice(list(expected_codes))
                process, done = begin(Path(name))
                time.sleep(rng.uniform(0, seconds * (1 - done / STEPS)))
                process.send_signal(number)
                _, errors = process.communicate(timeout=300)
                if not process.returncode:
                    break  # it had ended: that is no kill
                clean = process.returncode in expected_codes[number] and "Traceback" not in errors
                chain.append((signal.Signals(number).name, clean))
                rounds -= 1
                bar.update()
            exact = finish(Path(name)) and fingerprint(Path(name)) == expected
            for fault, clean in chain:
                table[fault, "survived" if clean and exact else "LOST"] += 1


def damage(rng: random.Random, content: bytes) -> bytes:
    """One flipped bit, or a truncation."""
    place = rng.randrange(len(content))
    if rng.random() < 0.3:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def corrupt(rng: random.Random, rounds: int, checkpoint: Path, table: Counter, bar: tqdm) -> None:
    """Damaged files are refused with a Failure (exit code 2), or read as if they were whole."""
    labels, images = "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
    source = ROOT / "data/MNIST/raw"
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(source, Path(name), dirs_exist_ok=True)
        packed, unpacked = (source / f"{images}.gz").read_bytes(), (source / f"{labels}.gz").read_bytes()
        for fault, content, file, read in (
            ("damaged checkpoint", checkpoint.read_bytes(), "c.pt", lambda: content_sum(folder / "c.pt")),
            ("damaged .gz", packed, f"{images}.gz", lambda: data_sum(folder)),
            ("damaged data file", gzip.decompress(unpacked), labels, lambda: data_sum(folder)),
        ):
            (folder / file).write_bytes(content)
            whole = read()
            for _ in range(rounds):
                (folder / file).write_bytes(damage(rng, content))
                try:
                    outcome = "survived" if read() == whole else "LOST"
                except noprop.Failure as failure:
                    outcome = "survived" if failure.code == 2 else "LOST"
                table[fault, outcome] += 1
                bar.update()
            (folder / file).write_bytes(content)


def content_sum(path: Path) -> str:
    return digest(noprop.read_checkpoint(path) | {"path": None, "written": None})


def data_sum(folder: Path) -> str:
    """Of the four files of MNIST that lie there."""
    return digest([list(split) for split in noprop.read_mnist(folder)])


def fill_disk(rng: random.Random, rounds: int, checkpoint: Path, table: Counter, bar: tqdm) -> None:
    """No file may grow beyond a random size: one line, exit code 1, and the older checkpoint is whole."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder, limit = Path(name), rng.randrange(1, checkpoint.stat().st_size)
            shutil.copy(checkpoint, folder / "noprop_hybrid.pt")
            run = subprocess.run(
                [*RUN, f"--output-dir={folder}"],
                capture_output=True,
                text=True,
                timeout=300,
                preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            )
            whole = content_sum(folder / "noprop_hybrid.1.pt") == content_sum(checkpoint)
            one_line = run.stderr.startswith("error: cannot write") and run.stderr.count("\n") == 1
            table["full disk", "survived" if run.returncode == 1 and one_line and whole else "LOST"] += 1
            bar.update()


def load(epochs: int) -> str:
    """Resident memory and open files over many epochs on tiny data."""
    data = noprop.load_data(noprop.Config())
    train, val, test = (noprop.Split(x.images[:512], x.labels[:512]) for x in data[:3])
    small = data._replace(train=train, val=val, test=test)
    config = noprop.Config(epochs=epochs, patience=epochs, batch_size=128, num_blocks=3)
    state, seen = noprop.State(config), []
    with tempfile.TemporaryDirectory() as name:
        for _ in noprop.train(state, small):
            state.save(Path(name) / "noprop_hybrid.pt", small.digest())
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(list(Path("/proc/self/fd").iterdir()))
            seen.append((pages * resource.getpagesize() / 2**20, files))
    points = [(epoch, *seen[epoch - 1]) for epoch in (epochs // 4, epochs // 2, epochs)]
    return "; ".join(
        f"epoch {epoch}: {mib:.0f} MiB resident, {files} open files" for epoch, mib, files in points
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="kills, and corruptions of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    refuse_fewer(path := ROOT / "benchmarks/results/faults.json", "rounds", arguments.rounds)
    rng, table, disks = random.Random(arguments.seed), Counter(), max(1, arguments.rounds // 10)
    with tempfile.TemporaryDirectory() as name, tqdm(total=4 * arguments.rounds + disks, disable=None) as bar:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a run must not inherit that it is ignored
        process, _ = begin(Path(name))
        started = time.perf_counter()
        _, errors = process.communicate(timeout=300)
        assert not process.returncode, errors
        seconds, expected = time.perf_counter() - started, fingerprint(Path(name))
        kill(rng, arguments.rounds, seconds, expected, table, bar)
        corrupt(rng, arguments.rounds, Path(name) / "noprop_hybrid.pt", table, bar)
        fill_disk(rng, disks, Path(name) / "noprop_hybrid.pt", table, bar)
    print("| fault | tried | survived | lost |\n|---|---|---|---|")
    found = {}
    for fault in dict.fromkeys(fault for fault, _ in table):
        survived, lost = table[fault, "survived"], table[fault, "LOST"]
        print(f"| {fault} | {survived + lost} | {survived} | {lost} |")
        found[fault] = {"survived": survived, "lost": lost}
    print(memory := load(200))
    kept = {"rounds": arguments.rounds, "seed": arguments.seed, "faults": found, "two hundred epochs": memory}
    text = json.dumps(kept | {"versions": noprop.made_with(noprop.CPU)}, indent=1)
    path.write_text(text + "\n")
    return any(outcome == "LOST" for _, outcome in table)


if __name__ == "__main__":
    sys.exit(main())
