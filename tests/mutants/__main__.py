"""Runs the lists of mutants; see the package's docstring. Exit status 1 where one survived or the list is wrong."""

import argparse
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests import mutants
from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1  # pytest's exit statuses: any other says that the tests did not run
PATIENCE = 10  # times the unchanged tests' time, after which a mutant hangs: someone would see that


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


def run_tests(root: Path, tests: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def verdict(root: Path, mutant: Mutant, tests: list[str], timeout: float) -> str:
    """Put a mutant into the copy at ``root``, run the tests, put the file back: killed by what, survived, or wrong."""
    path = root / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        return f"WRONG LIST: its text occurs {before.count(mutant.old)} times"
    path.write_text(before.replace(mutant.old, mutant.new))
    try:
        ran = run_tests(root, tests, timeout)
    except subprocess.TimeoutExpired:
        return "killed (hangs)"
    finally:
        path.write_text(before)
    if ran.returncode == PASSED:
        return "SURVIVED"
    last = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    name = last[-1].split(" - ")[0].removeprefix("FAILED ") if last else f"exit status {ran.returncode}"
    return f"killed by {name}" if ran.returncode == FAILED else f"WRONG LIST: the tests do not run: {name}"


def plain_run(name: str, root: Path, tests: tuple[str, ...]) -> float:
    """Return the seconds that tests take without a mutant; end everything where they fail."""
    begin = time.monotonic()
    plain = run_tests(root, list(tests))
    if plain.returncode != PASSED:
        raise SystemExit(f"{name}: the tests fail without a mutant:\n{plain.stdout[-2000:]}{plain.stderr[-2000:]}")
    return time.monotonic() - begin


def run_area(name: str, only: str, jobs: int) -> tuple[int, int]:
    """Run one area's mutants; return how many were killed, of how many."""
    area = importlib.import_module(f"tests.mutants.{name}")
    chosen = [m for m in area.MUTANTS if only in str(m)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        roots = [copy_of_repository(Path(folder) / str(n)) for n in range(jobs)]
        tests = {m.file: getattr(area, "TESTS_OF", {}).get(m.file, area.TESTS) for m in chosen}
        seconds = {
            chosen_tests: plain_run(name, roots[0], chosen_tests) for chosen_tests in set(map(tuple, tests.values()))
        }
        print(f"{name}: {len(chosen)} mutants; the unchanged tests pass in {sum(seconds.values()):.0f} s", flush=True)
        for root in roots:
            copies.put(root)

        def judge(mutant: Mutant) -> bool:
            root = copies.get()
            try:
                found = verdict(root, mutant, tests[mutant.file], 60 + PATIENCE * seconds[tuple(tests[mutant.file])])
            finally:
                copies.put(root)
            print(f"  {found:60}  {mutant}", flush=True)
            return found.startswith("killed")

        with ThreadPoolExecutor(jobs) as pool:
            return sum(pool.map(judge, chosen)), len(chosen)


def main() -> int:
    areas = sorted(m.name for m in pkgutil.iter_modules(mutants.__path__) if m.name != "__main__")
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=mutants.__doc__.split("\n")[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"which lists to run, of {', '.join(areas)}; all")
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutants whose line contains TEXT")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    given = parser.parse_args()
    if unknown := sorted(set(given.areas) - set(areas)):
        parser.error(f"no such area: {', '.join(unknown)}; there are {', '.join(areas)}")
    counts = {name: run_area(name, given.k, given.jobs) for name in given.areas or areas}
    for name, (killed, all_) in counts.items():
        print(f"{name}: {killed} of {all_} killed")
    return int(any(killed < all_ for killed, all_ in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
