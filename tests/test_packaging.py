"""How the package installs: `i2am` is its only top-level name, though its kernels live in a folder named `kernels`.

Another package of that name is imported by transformers and diffusers where it is installed; a stub stands in for it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUB = """
STUB, __version__ = True, "0.18.2"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    decorate = {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, decorated: decorated}
    return type(name, (), decorate)
"""
CHECK = """
import sys
import kernels
assert kernels.STUB, kernels
import transformers.modeling_utils  # imports `kernels` where there is one
import i2am.kernels.attention as attention
assert "kernels.attention" not in sys.modules
print(attention.__name__, attention.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, as a fresh clone has them."""
    target = tmp_path_factory.mktemp("src") / "repo"
    target.mkdir()
    for name in ("i2am", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A site folder with another distribution's `kernels`, in which everything anyone asks for exists."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STUB)
    (folder / "kernels-0.18.2.dist-info").mkdir()
    (folder / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    return folder


def run(command, cwd, *path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", checkout, "--no-deps", "--no-build-isolation", "-w", out], out)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        (top_level,) = [n for n in names if n.endswith("top_level.txt")]
        assert z.read(top_level).decode().split() == ["i2am"]
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"i2am"}
    shipped = {n.removeprefix("i2am/kernels/") for n in names if n.startswith("i2am/kernels/")}
    assert shipped >= {p.name for p in (ROOT / "kernels").glob("*.py")}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "i2am").rglob("*.py")}
    assert sources - {"i2am/kernels/__init__.py"} <= set(names)


def test_kernels_has_no_init():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_beside_the_other_package(wheel, stub, tmp_path):
    site = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    assert str(site) in run([sys.executable, "-c", CHECK], tmp_path, site, stub)


def test_bare_checkout_beside_the_other_package(checkout, stub):
    """With the repository's root first on the path, as in a notebook or under `python -m pytest`."""
    assert str(checkout / "kernels") in run([sys.executable, "-c", CHECK], checkout, checkout, stub)


def test_editable_install_beside_the_other_package(checkout, stub, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    install = ["install", "-e", checkout, "--no-deps", "--no-build-isolation"]
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run([sys.executable, "-m", "pip", "--python", python, *install], tmp_path)
    shutil.copytree(stub, site, dirs_exist_ok=True)
    assert str(checkout / "kernels") in run([python, "-c", CHECK], tmp_path)
