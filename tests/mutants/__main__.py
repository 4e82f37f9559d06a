"""Runs the lists of mutants; see the package's docstring. Exit status 1 where one survived or the list is wrong."""

import argparse
import importlib
import itertools
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests import mutants
from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1  # pytest's exit statuses: any other says that the tests did not run
PATIENCE = 10  # times the unchanged tests' time, after which a mutant hangs: someone would see that
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu")


def copy_of_repository(folder: Path) -> Path:
    """Copy what git knows or would take, as it is in the working tree, into ``folder``."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Copy:
    """A copy of the repository and a server in it: see server.py."""

    def __init__(self, root: Path):
        self.root = root
        self._changes = itertools.count(1)
        self.server = subprocess.Popen(
            [sys.executable, "tests/mutants/server.py"],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "Copy":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def write(self, path: Path, text: str) -> None:
        """Write with a time of its own, or the bytecode of a change of the same length would stand for this one."""
        path.write_text(text)
        stamp = path.stat().st_mtime + 10 * next(self._changes)
        os.utime(path, (stamp, stamp))

    def run(self, tests: list[str], timeout: float, learn: bool = False) -> dict[str, Any]:
        """Run tests; return pytest's exit status (None: not within ``timeout`` seconds), seconds and output."""
        print(json.dumps({"arguments": [*PYTEST, *tests], "timeout": timeout, "learn": learn}), file=self.server.stdin)
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def verdict(self, mutant: Mutant, tests: list[str], timeout: float) -> str:
        """Put a mutant in, run the tests, put the file back; return what killed it, or that it survived or is wrong."""
        path = self.root / mutant.file
        if wrong := unmatched(mutant, self.root):
            return wrong
        before = path.read_text()
        self.write(path, before.replace(mutant.old, mutant.new))
        try:
            ran = self.run(tests, timeout)
        finally:
            self.write(path, before)
        if ran["code"] is None:
            return "killed (hangs)"
        if ran["code"] == PASSED:
            return "SURVIVED"
        last = [line for line in ran["output"].splitlines() if line.startswith(("FAILED", "ERROR"))]
        name = last[-1].split(" - ")[0].removeprefix("FAILED ") if last else f"exit status {ran['code']}"
        return f"killed by {name}" if ran["code"] == FAILED else f"WRONG LIST: the tests do not run: {name}"


def unmatched(mutant: Mutant, root: Path = ROOT) -> str | None:
    """Return what is wrong with a mutant's text, None where it occurs once."""
    path = root / mutant.file
    count = path.read_text().count(mutant.old) if path.is_file() else None
    if count == 1:
        return None
    return "WRONG LIST: no such file" if count is None else f"WRONG LIST: its text occurs {count} times"


def plain_run(name: str, copy: Copy, tests: tuple[str, ...], known: bool) -> float:
    """Return the seconds that tests take without a mutant; end everything where they fail. ``known``: they do not."""
    copy.run(["--collect-only", *tests], 600, learn=True)
    if known:
        return 60.0
    plain = copy.run(list(tests), 3600, learn=True)
    if plain["code"] != PASSED:
        raise SystemExit(f"{name}: the tests fail without a mutant:\n{plain['output'][-4000:]}")
    return float(plain["seconds"])


def run_area(name: str, only: str, jobs: int, known: bool) -> tuple[int, int]:
    """Run one area's mutants; return how many were killed, of how many."""
    area = importlib.import_module(f"tests.mutants.{name}")
    chosen = [m for m in area.MUTANTS if only in str(m)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ExitStack() as stack:
        copies: SimpleQueue[Copy] = SimpleQueue()
        every = [stack.enter_context(Copy(copy_of_repository(Path(folder) / str(n)))) for n in range(jobs)]
        tests = {m.file: getattr(area, "TESTS_OF", {}).get(m.file, area.TESTS) for m in chosen}
        seconds = {
            chosen_tests: plain_run(name, every[0], chosen_tests, known)
            for chosen_tests in set(map(tuple, tests.values()))
        }
        took = "" if known else f"; the unchanged tests pass in {sum(seconds.values()):.0f} s"
        print(f"{name}: {len(chosen)} mutants{took}", flush=True)
        for copy in every:
            copies.put(copy)

        def judge(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                patience = 60 + PATIENCE * seconds[tuple(tests[mutant.file])]
                found = copy.verdict(mutant, tests[mutant.file], patience)
            finally:
                copies.put(copy)
            print(f"  {found:60}  {mutant}", flush=True)
            return found.startswith("killed")

        with ThreadPoolExecutor(jobs) as pool:
            return sum(pool.map(judge, chosen)), len(chosen)


def check(names: list[str]) -> int:
    """Print every mutant whose text is not where its list says; return how many."""
    wrong = 0
    for name in names:
        for mutant in importlib.import_module(f"tests.mutants.{name}").MUTANTS:
            if said := unmatched(mutant):
                print(f"{name}: {said}: {mutant}: {mutant.old!r}")
                wrong += 1
    return wrong


def main() -> int:
    areas = sorted(m.name for m in pkgutil.iter_modules(mutants.__path__) if m.name not in ("__main__", "server"))
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=mutants.__doc__.split("\n")[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"which lists to run, of {', '.join(areas)}; all")
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutants whose line contains TEXT")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--check", action="store_true", help="run nothing; say which texts the code has no longer")
    parser.add_argument("--known", action="store_true", help="the tests are known to pass without a bug: do not look")
    given = parser.parse_args()
    if unknown := sorted(set(given.areas) - set(areas)):
        parser.error(f"no such area: {', '.join(unknown)}; there are {', '.join(areas)}")
    names = given.areas or areas
    if given.check:
        return int(check(names) > 0)
    counts = {name: run_area(name, given.k, given.jobs, given.known) for name in names}
    for name, (killed, all_) in counts.items():
        print(f"{name}: {killed} of {all_} killed")
    return int(any(killed < all_ for killed, all_ in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
