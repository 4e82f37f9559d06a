"""A process that has imported everything but the package and its tests, and runs them in children of itself.

``python tests/mutants/server.py`` in a copy of the repository, by :mod:`tests.mutants.__main__`: a line of JSON with
pytest's arguments comes in, a line with exit status, seconds and output goes out. Importing PyTorch and diffusers takes
longer than most bugs take to be seen: it is done once, and a child begins where that has ended.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

OWN = ("tests", "i2am", "kernels", "conftest", "benchmarks", "__main__")  # what children import themselves
PATH = Path(tempfile.mkdtemp(prefix="mutants-server-"))


def in_child(arguments: list[str], output: Path, modules: Path | None) -> None:
    """Run pytest in this process, a child, and end it with pytest's exit status."""
    code = 70
    try:
        os.setsid()
        with output.open("wb", buffering=0) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        import pytest

        code = int(pytest.main(arguments))
        if modules is not None:
            modules.write_text("\n".join(name for name in list(sys.modules) if name.split(".")[0] not in OWN))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, timeout: float) -> int | None:
    """Return a child's exit status; None: it took longer than ``timeout`` seconds and was ended, with its children."""
    end = time.monotonic() + timeout
    pause = 0.01
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(arguments: list[str], timeout: float, learn: bool) -> dict[str, object]:
    """Run pytest in a child. ``learn``: import here what it had imported, for those that follow."""
    output, modules = PATH / "output", PATH / "modules"
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        in_child(arguments, output, modules if learn else None)
    code = wait(pid, timeout)
    seconds = time.monotonic() - begin
    if learn and modules.exists():
        for name in modules.read_text().split("\n"):
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        modules.unlink()
    return {"code": code, "seconds": seconds, "output": output.read_text(errors="replace")}


def main() -> None:
    sys.path[0] = os.getcwd()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py does, before the first import of triton
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
