"""Which planted bugs the tests notice: those of benchmarks/bugs.py, and a sample of cosmic-ray's mutants.

    python benchmarks/mutants.py                        both kinds; hours
    python benchmarks/mutants.py bugs --only resume     one kind, and of it those with a word in their name
    python benchmarks/mutants.py operators --list       what would be planted
    python benchmarks/mutants.py operators --only ... --tests tests/test_search.py      by all tests of a file

Plants each in a temporary copy of the project, and runs there tests that reach its line, up to the first
failure: those that run the fewest lines, as they are about these, and BUDGET seconds of them (for a bug of
meaning three times that). What each test reaches is found out before, under coverage.py, which does not see
into processes that a test starts: for what survives because of that, or of the budget, there is --tests.
Left out are changes
that can't matter, by their kind: a string that is equal made one that comes before or after; -1 made 1 as an
argument (a dimension: the last of two); arguments in SILENT, on which no result depends. What is known is
kept in runs/mutants.jsonl, below the current folder, so that a stopped call goes on; where sources or tests
have changed, all begins anew. A timeout counts as killed; what can't be imported, or ends pytest itself,
counts as neither.

Needs, beside requirements-dev.txt: pip install "cosmic-ray>=8.7,<9" "pytest-cov>=6,<8"
"""

import argparse
import ast
import difflib
import hashlib
import importlib.metadata
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from bugs import BUGS, LAB, LIKELY, SCRIPT

ROOT, KNOWN = Path(__file__).resolve().parents[1], Path("runs/mutants.jsonl")
SECTIONS = {  # of the script, by their headers: the strata of its mutants
    "Randomness": "paper",
    "Noise schedule": "paper",
    "Model": "paper",
    "Objective": "paper",
    "Configuration": "configuration",
    "Data": "data",
    "Training": "training",
    "Files and pictures": "files",
    "Search": "search",
}
OBJECTIVES = ["dt", "backprop", "flows", "ct", "fm", "cascade", "infobatch", "early_exit"]
MUTATED = (SCRIPT, *(f"{LAB}/{name}.py" for name in OBJECTIVES))
BUDGET = 60  # seconds under coverage.py, some 20 without, of the tests that are run for one mutant
STUCK = 60  # seconds that a test may take, and all of them whatever they take without a mutant
POINTLESS = re.compile(r"Variable|(Shift|Bit\w+|_Is|_IsNot|_Invert)$")  # random, or a TypeError nearly always
OUTCOMES = {0: "survived", 1: "killed", 5: "survived"}  # 5: pytest has found no test
NOTES = ("annotation", "returns")  # of nodes of ast
SILENT = ("cache_enabled", "deepcopy", "flush", "indent", "non_blocking", "set_to_none", "usedforsecurity")
running: set[subprocess.Popen] = set()


class Mutant(NamedTuple):
    kind: str
    name: str
    stratum: str
    file: str
    line: int
    source: str  # of the whole file, with the mutant in it


class Refused(Exception):
    """One line for the user, and the exit code."""


# --- Mutants -----------------------------------------------------------------------------------------------


def planted(base: Path) -> list[Mutant]:
    """The bugs of bugs.py."""
    mutants = []
    for bug in BUGS:
        source = (base / bug.file).read_text(encoding="utf-8")
        if source.count(bug.old) != 1:
            raise Refused(f"bug {bug.name!r}: its text is {source.count(bug.old)} times in {bug.file}", 2)
        line = source[: source.index(bug.old)].count("\n") + 1
        changed = source.replace(bug.old, bug.new)
        mutants.append(Mutant("bugs", bug.name, "bugs of meaning", bug.file, line, changed))
    return mutants


def pointless(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Parts of a node that are not to be changed, by operators whose names have a match of the pattern."""
    for name in NOTES:
        yield getattr(node, name, None), ""
    if isinstance(node, ast.Compare):
        sides = [getattr(x, "value", None) for x in (node.left, *node.comparators)]
        yield node if any(isinstance(x, str) for x in sides) else None, "Eq_[LG]t"
    if isinstance(node, ast.Call):
        yield from ((x, "UnaryOperator") for x in node.args if ast.unparse(x) == "-1")
        yield from ((x.value, "") for x in node.keywords if x.arg in SILENT)


def left_out(source: str) -> list[tuple]:
    """Where what is not to be changed starts and ends, (line, column) each, and by which operators."""
    lines = [line.encode() for line in source.split("\n")]

    def place(line: int, column: int) -> tuple[int, int]:  # ast counts bytes, and parso letters
        return line, len(lines[line - 1][:column].decode())

    found = [pair for node in ast.walk(ast.parse(source)) for pair in pointless(node) if pair[0]]
    return [(place(x.lineno, x.col_offset), place(x.end_lineno, x.end_col_offset), by) for x, by in found]


def chunks(source: str) -> Iterator[tuple[int, int]]:
    """First and last line of each function, class and statement of a file, from 1."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
            yield first, node.end_lineno


def places(source: str) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """All that cosmic-ray would change in a source: operator, occurrence, (line, column)."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    nodes, spared = list(ast_nodes(get_ast(source))), left_out(source)
    for name in filter(lambda name: not POINTLESS.search(name), plugins.operator_names()):
        operator = plugins.get_operator(name)()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last and re.search(by, name) for first, last, by in spared):
                yield name, occurrence, start


def strata(base: Path) -> dict[str, list[tuple]]:
    """By stratum, all that could be changed: file, first and last line of the chunk, operator, ..."""
    found: dict[str, list[tuple]] = {}
    for file in MUTATED:
        source = (base / file).read_text(encoding="utf-8")
        lines = source.split("\n")
        headers = [re.match(r"# --- (.+?) -+$", line) for line in lines]
        sections = list(accumulate((x and x[1] for x in headers), lambda old, new: new or old))
        for first, last in chunks(source):
            stratum = SECTIONS.get(sections[first - 1]) if file == SCRIPT else Path(file).name
            for change in places("\n".join(lines[first - 1 : last])) if stratum else ():
                found.setdefault(stratum, []).append((file, first, last, *change))
    return found


def mutant_of(base: Path, stratum: str, change: tuple) -> Mutant | None:
    """The mutant of a change; None if that is no Python, no change, or more than cosmic-ray can do."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    file, first, last, operator, occurrence, (line, column) = change
    source = (base / file).read_text(encoding="utf-8")
    lines = source.split("\n")
    try:
        chunk = mutate_code("\n".join(lines[first - 1 : last]), get_operator(operator)(), occurrence)
        changed = "\n".join([*lines[: first - 1], chunk, *lines[last:]])
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except (SyntaxError, AttributeError):  # the latter: an exception with a dot in its name
        return None
    line += first - 1
    name = f"{file}:{line}:{column} {operator.removeprefix('core/')}.{occurrence}"
    return Mutant("operators", name, stratum, file, line, changed)


def sampled(base: Path, size: int, seed: int) -> list[Mutant]:
    """Mutants of cosmic-ray, about as many from each stratum, and there from as many places as possible."""
    try:
        found = strata(base)
    except ModuleNotFoundError as error:
        raise Refused(f"{error}: pip install 'cosmic-ray>=8.7,<9'", 1) from error
    mutants, left = [], size
    for number, (stratum, changes) in enumerate(sorted(found.items(), key=lambda x: len(x[1]))):
        changes = random.Random(f"{seed} {stratum}").sample(changes, len(changes))
        seen: Counter = Counter()
        rank = {}
        for change in changes:
            rank[change] = seen[change[:3] + change[-1:]]
            seen[change[:3] + change[-1:]] += 1
        share, own = -(-left // (len(found) - number)), []
        for change in sorted(changes, key=rank.get):
            if len(own) < share and (mutant := mutant_of(base, stratum, change)):
                own.append(mutant)
        mutants, left = mutants + own, left - len(own)
    return mutants


def difference(base: Path, mutant: Mutant) -> str:
    """What a mutant changes, on one line."""
    old = (base / mutant.file).read_text(encoding="utf-8").split("\n")
    lines = list(difflib.unified_diff(old, mutant.source.split("\n"), n=0, lineterm=""))[2:]
    return "  ".join(f"{x[0]} {' '.join(x[1:].split())}" for x in lines if not x.startswith("@@"))


# --- Tests -------------------------------------------------------------------------------------------------


def copy_project(folder: Path) -> None:
    """What git would have of the project as it is now, but for the data, which is linked to."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("data/") and (ROOT / name).is_file():  # not what was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data").symlink_to(ROOT / "data", target_is_directory=True)


def end(process: subprocess.Popen) -> None:
    """Kill what a run of pytest has left of its own processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(folder: Path, tests: list[str], limit: float, *flags: str) -> tuple[int, str]:
    """Exit code of pytest, -1 for a timeout; and the first test that failed."""
    scratch = folder / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / "tests").write_text("\n".join(tests), encoding="utf-8")
    stuck = ["-o", f"faulthandler_timeout={STUCK}", "-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *stuck]
    command += [f"--basetemp={scratch / 'pytest'}", *flags, f"@{scratch / 'tests'}"]
    own = {"PYTHONPATH": str(folder), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONDONTWRITEBYTECODE": "1"}  # a mutant as long as another would be taken for it
    with (scratch / "output").open("w+", errors="replace") as output:  # no pipe: children may outlive pytest
        pipes = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(command, cwd=folder, env=os.environ | own, **pipes)
        running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            end(process)
            process.wait()
            running.discard(process)
        output.seek(0)
        text = output.read()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return -1 if re.search(r"^Timeout \(", text, re.MULTILINE) else code, failed[1] if failed else ""


def reach_of(folder: Path, file: str) -> dict[str, Any]:
    """Seconds of each test in a file without a mutant, and which of them run each line of each source.

    A test that fails here, as one with a time limit may on a busy machine, is left out, and named.
    """
    from coverage import CoverageData

    report = folder / "report.xml"
    flags = [f"--cov={x.removesuffix('.py')}" for x in (SCRIPT, LAB)]
    flags += ["--cov-context=test", "--cov-report=", f"--junitxml={report}"]
    code, test = run_tests(folder, [file], 3600, *flags, "-o", "faulthandler_timeout=1200")
    if code not in (0, 1):
        raise Refused(f"without a mutant {file} ends with pytest's exit code {code}: {test}", 1)
    seconds, lines = {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        if case.find("failure") is None and case.find("error") is None:
            seconds[name] = float(case.get("time"))
        else:
            print(f"left out, as it fails without a mutant: {name}", file=sys.stderr)
    (data := CoverageData(str(folder / ".coverage"))).read()
    for source in data.measured_files():
        found = data.contexts_by_lineno(source).items()
        tests = {line: sorted({x.split("|")[0] for x in names} & seconds.keys()) for line, names in found}
        lines[os.path.relpath(source, folder)] = {line: names for line, names in tests.items() if names}
    return {"file": file, "seconds": seconds, "lines": lines}


class Reach:
    """Of all tests: the seconds of each, how many lines it runs, and which tests run each line."""

    def __init__(self, entries: list[dict[str, Any]]):
        self.seconds = {test: x for entry in entries for test, x in entry["seconds"].items()}
        self.lines: dict[tuple[str, int], set[str]] = {}
        self.width: Counter[str] = Counter()
        for entry in entries:
            for source, lines in entry["lines"].items():
                for line, tests in lines.items():
                    self.lines.setdefault((source, int(line)), set()).update(tests)
                    self.width.update(tests)


def statement(source: str, line: int) -> int:
    """First line of the innermost statement that a line belongs to; of a function's head, one of its body."""
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            if first <= line < node.body[0].lineno:  # a function's first is a docstring, which is not run
                return node.body[-1].lineno if isinstance(node, ast.FunctionDef) else node.lineno
    around = [x for x in ast.walk(tree) if isinstance(x, ast.stmt)]
    return max((x.lineno for x in around if x.lineno <= line <= x.end_lineno), default=line)


@cache
def vocabulary(base: Path) -> dict[str, set[str]]:
    """The words in the source of each test, by file::name."""
    found = {}
    for path in base.glob("tests/test_*.py"):
        source = path.read_text(encoding="utf-8")
        for node in filter(lambda x: isinstance(x, ast.FunctionDef), ast.parse(source).body):
            text = ast.get_source_segment(source, node)
            found[f"tests/{path.name}::{node.name}"] = set(re.findall(r"\w+", text))
    return found


def naming(base: Path, words: set[str]) -> set[str]:
    """Tests, file::name, whose source has one of the words, but for those that a tenth of all tests have."""
    found = vocabulary(base)
    rare = {word for word in words if 10 * sum(word in x for x in found.values()) < len(found)}
    return {name for name, x in found.items() if rare & x}


def tests_of(base: Path, mutant: Mutant, reach: Reach, files: list[str]) -> list[str]:
    """The tests that could notice a mutant, as far as BUDGET goes: a likely file's, then those of few lines.

    A test that runs few lines of the project is about those; a whole command runs most of them. A line that
    no test runs by itself, such as the default of a setting, is read when the file is imported, and all tests
    could notice it: first those that name what the line names. files: of which all tests are taken instead.
    """
    if files:
        return [x for x in reach.seconds if x.split("::")[0] in files]
    source = (base / mutant.file).read_text(encoding="utf-8")
    line = statement(source, mutant.line)
    likely = [f"tests/test_{name}.py" for start, name in LIKELY.items() if mutant.name.startswith(start)]
    first = [x for x in reach.seconds if x.split("::")[0] in likely]
    rest, named = set(reach.lines.get((mutant.file, line)) or reach.seconds) - set(first), set()
    if (mutant.file, line) not in reach.lines:
        lines = [source.split("\n")[x - 1].split("#")[0] for x in (mutant.line, line)]
        named = naming(base, set(re.findall(r"\w{4,}", " ".join(lines))))
    chosen, left = [], BUDGET * (3 if mutant.kind == "bugs" else 1)
    for test in sorted(rest, key=lambda x: (x.split("[")[0] not in named, reach.width[x], x)):
        if reach.seconds[test] <= left:
            chosen.append(test)
            left -= reach.seconds[test]
    return first + chosen


def outcome_of(folder: Path, mutant: Mutant, tests: list[str], seconds: float) -> dict:
    """Plant a mutant in a copy, run the tests, take it out: whether it was killed, and by which test."""
    if not tests:  # of which pytest would make all of them
        return {"outcome": "survived", "test": "", "seconds": 0.0}
    path, started = folder / mutant.file, time.perf_counter()
    source = path.read_text(encoding="utf-8")
    path.write_text(mutant.source, encoding="utf-8")
    try:
        code, test = run_tests(folder, tests, max(STUCK, 5 * seconds), "-x")
    finally:
        path.write_text(source, encoding="utf-8")
    outcome = "timeout" if code == -1 else OUTCOMES.get(code, "broken")
    return {"outcome": outcome, "test": test, "seconds": round(time.perf_counter() - started, 1)}


# --- Results -----------------------------------------------------------------------------------------------


def digest(*words: Any) -> str:
    return hashlib.blake2b(repr(words).encode(), digest_size=12).hexdigest()


def project_digest(base: Path) -> str:
    """Of all sources and tests."""
    paths = sorted([*base.glob("*.py"), *base.glob(f"{LAB}/*.py"), *base.glob("tests/*.py")])
    paths = [*paths, base / "pyproject.toml"]
    return digest([(str(path.relative_to(base)), path.read_bytes()) for path in paths])


def known() -> dict[str, dict]:
    """What earlier calls have found, by digest; a line that was cut off is none."""
    found = {}
    for line in KNOWN.read_text(encoding="utf-8").splitlines() if KNOWN.exists() else ():
        with suppress(ValueError, KeyError):
            entry = json.loads(line)
            found[entry["key"]] = entry
    return found


def keep(entry: dict) -> dict:
    """Append a result to the file of known ones."""
    KNOWN.parent.mkdir(parents=True, exist_ok=True)
    with KNOWN.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return entry


def try_all(base: Path, mutants: list[Mutant], jobs: int, only: list[str]) -> list[dict]:
    """The result of each mutant, from the file or by running the tests; only: of these files all tests."""
    project, old, folders = project_digest(base), known(), queue.Queue()
    keys = [digest(project, only or BUDGET, x.kind, x.name, x.file, x.source) for x in mutants]
    missing = [(key, mutant) for key, mutant in zip(keys, mutants, strict=True) if key not in old]
    files = sorted(str(path.relative_to(base)) for path in base.glob("tests/test_*.py"))
    unread = [(key, file) for file in files if (key := digest(project, "reach", file)) not in old]
    for number in range(jobs):
        shutil.copytree(base, base.parent / str(number), symlinks=True, ignore=shutil.ignore_patterns("tmp"))
        folders.put(base.parent / str(number))

    def in_a_copy(function: Callable, *arguments) -> dict:
        folder = folders.get()
        try:
            return function(folder, *arguments)
        finally:
            folders.put(folder)

    def read(key: str, file: str) -> dict:
        return {"key": key, "outcome": "reach of", "name": file} | in_a_copy(reach_of, file)

    def job(key: str, mutant: Mutant) -> dict:
        tests = tests_of(base, mutant, reach, only)
        found = in_a_copy(outcome_of, mutant, tests, sum(reach.seconds[x] for x in tests))
        about = {"kind": mutant.kind, "name": mutant.name, "stratum": mutant.stratum, "file": mutant.file}
        about |= {"line": mutant.line, "diff": difference(base, mutant), "tests": len(tests)}
        return {"key": key} | about | found

    for entry in in_parallel(read, unread, jobs) if missing else ():
        keep(entry)
    old = known()
    reach = Reach([old[key] for file in files if (key := digest(project, "reach", file)) in old])
    for entry in in_parallel(job, missing, jobs):
        old[entry["key"]] = keep(entry)
    return [old[key] for key in keys]


def in_parallel(job: Callable, missing: list[tuple[str, Any]], jobs: int) -> Iterator[dict]:
    """The results of the jobs as they come; progress goes to stderr. Whoever stops it stops the tests too."""
    started, pool = time.perf_counter(), ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(job, *each) for each in missing]
        for done, future in enumerate(as_completed(futures), start=1):
            yield (entry := future.result())
            left = (time.perf_counter() - started) / done * (len(missing) - done) / 60
            name = f"{entry['outcome']:<8} {entry['name']}"
            print(f"{done}/{len(missing)}  {name}; about {left:.0f} min left", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            end(process)
        pool.shutdown()


def report(results: list[dict]) -> tuple[dict[str, Counter], list[str]]:
    """Print survivors, counts by stratum, and the last line; returns counts and survivors."""
    counts: dict[str, Counter] = {}
    for entry in results:
        counts.setdefault(entry["stratum"], Counter())[entry["outcome"]] += 1
    lines = []
    for entry in results:
        if entry["outcome"] == "survived":
            place = f"{entry['file']}:{entry['line']}"
            name = f"  ({entry['name']})" if entry["kind"] == "bugs" else ""
            lines.append(f"{place}{name}  {entry['diff']}")
    print(*lines, sep="\n", end="\n\n" if lines else "")
    print("| stratum | killed | timeout | survived | broken |\n|---|---|---|---|---|")
    for stratum, count in counts.items():
        row = " | ".join(str(count[x]) for x in ("killed", "timeout", "survived", "broken"))
        print(f"| {stratum} | {row} |")
    total = sum(counts.values(), Counter())
    killed = total["killed"] + total["timeout"]
    print(f"killed {killed} of {killed + total['survived']}")
    return counts, lines


def write(counts: dict[str, Counter], survivors: list[str], results, arguments: argparse.Namespace) -> None:
    """Keep what a call has found, by its kind; of bugs, by which test."""
    kept = {"cosmic-ray": importlib.metadata.version("cosmic-ray"), "sample": arguments.sample}
    kept |= {"seed": arguments.seed, "counts": counts, "survivors": survivors}
    kept["by"] = {x["name"]: x["test"] for x in results if x["kind"] == "bugs"}
    path = ROOT / "benchmarks" / "results" / f"mutants-{arguments.kind or 'all'}.json"
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def execute(base: Path, arguments: argparse.Namespace) -> None:
    """Plant what the command line asks for, in copies of the copy in base. Raises Refused."""
    copy_project(base)
    mutants = planted(base) if arguments.kind != "operators" else []
    mutants += sampled(base, arguments.sample, arguments.seed) if arguments.kind != "bugs" else []
    mutants = [mutant for mutant in mutants if any(x in mutant.name for x in arguments.only)]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.stratum:<16} {mutant.name}  {difference(base, mutant)}")
        return
    found = report(results := try_all(base, mutants, arguments.jobs, arguments.tests))
    if arguments.only == [""] and not arguments.tests:
        write(*found, results, arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", nargs="?", choices=["bugs", "operators"], help="both, if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the project that run tests at once")
    parser.add_argument("--sample", type=int, default=300, help="mutants of the operators")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    parser.add_argument("--only", nargs="+", default=[""], help="those with such a text in their name")
    parser.add_argument("--tests", nargs="+", default=[], help="files of which all tests are run")
    parser.add_argument("--list", action="store_true", help="plant nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        Path(name).chmod(0o755)  # another user, PostgreSQL's, must get through
        try:
            execute(Path(name) / "base", arguments)
        except Refused as refused:
            reason, code = refused.args
            print(f"error: {reason}", file=sys.stderr)
            return code
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
