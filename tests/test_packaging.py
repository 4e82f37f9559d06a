"""How the package installs: `i2am` is its only top-level name, though its kernels live in a folder named `kernels`.

Another package of that name is imported by transformers and diffusers where it is installed; a stub stands in for it.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import i2am

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "docs", "i2am", "kernels", "notebooks", "tests")
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
import i2am.kernels.forward as attention
assert "kernels.forward" not in sys.modules
print(attention.__name__, attention.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, as a fresh clone has them."""
    target = tmp_path_factory.mktemp("src") / "i2am"
    target.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name not in (".git", ".gitignore"):
            shutil.copy(path, target / path.name)
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


def test_the_wheel_promises_what_the_metadata_says(wheel):
    """Floors are the versions of `make test-lowest`; type checkers find the annotations; no test is installed."""
    with zipfile.ZipFile(wheel) as z:
        (metadata,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        found = email.message_from_bytes(z.read(metadata))
        assert "i2am/py.typed" in z.namelist()
    assert found["Version"] == i2am.__version__
    assert found["Requires-Python"] == ">=3.10"
    assert wheel.stat().st_size < 25 * 2**20
    assert (found["Author"], found["License-Expression"]) == ("The i2am developers", "Apache-2.0")
    assert {"attention", "diffusion models", "saliency"} <= set(found["Keywords"].split(","))
    assert "attribution" in found["Summary"]
    assert {line.split(",")[0] for line in found.get_all("Project-URL")} >= {"Homepage", "Issues", "Changelog", "Paper"}
    floors = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints-lowest.txt").read_text(), re.M))
    required = [re.match(r"([\w-]+)>=([\w.]+)", line) for line in found.get_all("Requires-Dist") if "extra" not in line]
    assert len(required) >= 10
    for requirement in required:
        name, floor = requirement.groups()
        assert f"{floors[name]}.0.0".startswith(floor), f"{name}: make test-lowest runs {floors[name]}, not {floor}"


def test_hints_name_extras_that_exist():
    """`pip install i2am[...]`, wherever a message or a page says it."""
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    known = set(re.findall(r"^(\w+) = \[", extras, re.M))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    texts = [path.read_text(encoding="utf-8") for path in [*(ROOT / "i2am").rglob("*.py"), *pages]]
    hints = {
        name for text in texts for group in re.findall(r"(?:i2am|\.)\[([\w, ]+)\]", text) for name in group.split(",")
    }
    assert hints & known
    assert {name.strip() for name in hints if not name.strip().isdigit()} - known == set()


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", build, out], checkout)
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(out, filter="data")
    (folder,) = (p for p in out.iterdir() if p.is_dir())
    return folder


def test_the_sdist_holds_everything(checkout, sdist):
    def files(folder):
        generated = {"__pycache__", "i2am.egg-info", "build", "PKG-INFO", "setup.cfg"}
        paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return {p.as_posix() for p in paths if not generated & set(p.parts)}

    assert files(checkout) == files(sdist)


@pytest.mark.slow
def test_the_sdists_own_tests_run(sdist):
    """All are collected, and those of one room pass, with the sdist's files and no others."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers"]
    assert str(sdist) in run([sys.executable, "-c", "import i2am; print(i2am.__file__)"], sdist)
    run([*tests, "--collect-only"], sdist)
    assert " passed" in run([*tests, "tests/ops", "tests/maps/test_maps.py", "-m", "not slow"], sdist)


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


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory):
    """The Python of an environment into which the checkout was installed with ``pip install -e``."""
    folder = tmp_path_factory.mktemp("editable")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    install = ["install", "-e", checkout, "--no-deps", "--no-build-isolation"]
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run([sys.executable, "-m", "pip", "--python", python, *install], folder)
    return python


def test_editable_install_beside_the_other_package(checkout, stub, editable, tmp_path):
    path = stub, Path(sysconfig.get_path("purelib"))
    assert str(checkout / "kernels") in run([editable, "-c", CHECK], tmp_path, *path)


def test_editable_install_from_the_folder_above_the_clone(checkout, editable):
    """A script there has a folder named i2am beside it, the clone, which is no package."""
    (checkout.parent / "script.py").write_text("import i2am, i2am.kernels.forward; print(i2am.trace, i2am.__file__)")
    assert str(checkout / "i2am" / "__init__.py") in run([editable, "script.py"], checkout.parent)
