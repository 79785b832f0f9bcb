"""The tests with the lowest versions that the requirements allow: python benchmarks/lowest.py

Makes an environment in a temporary folder, of the Python that runs this, and installs into it (3 GB to
download, 6 GB on the disk); prints the versions; ends with the exit code of pytest. --keep DIR keeps the
environment there, and uses again what is there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = (
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PYTHONHOME",
    "PYTHONPATH",
)  # as setup_env.sh


def pip_setting(name: str) -> str | None:
    """A setting of pip on this machine: of the environment, or else of its files."""
    asked = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return os.environ.get(f"PIP_{name.replace('-', '_').upper()}") or found or None


def environment() -> dict[str, str]:
    """The variables that uv runs with, which reads none of pip's settings by itself."""
    kept = {name: x for name, x in os.environ.items() if name not in ELSEWHERE}
    settings = {"UV_DEFAULT_INDEX": pip_setting("index-url"), "SSL_CERT_FILE": pip_setting("cert")}
    return {"UV_LINK_MODE": "copy"} | {name: x for name, x in settings.items() if x} | kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder of the environment")
    keep, variables = parser.parse_args().keep, environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary) / "lowest").resolve()
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
        uv = [python, "-m", "uv", "pip"]
        lowest = ["--resolution=lowest-direct", "--only-binary=:all:", "-r", "requirements-dev.txt"]
        for command in (
            [python, "-m", "pip", "install", "--quiet", "uv"],
            [*uv, "install", f"--python={python}", *lowest],  # wheels: of some old versions only the sources
            [*uv, "list", f"--python={python}"],
        ):
            subprocess.run(command, cwd=ROOT, env=variables, check=True)
        return subprocess.run(
            [python, "-m", "pytest", "-q", "-m", "not slow"], cwd=ROOT, env=variables
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
