"""Shared by every test: the kernels are interpreted on CPU, and uninitialised memory is poison."""

import gc
import os
from fnmatch import fnmatch
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import pytest

from tests import support_table as support
from tests.helpers import older_versions

if older_versions.OLDER:
    older_versions.stand_in_for_missing_classes()
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.helpers import interpreter

    interpreter.hasten()

POISONED = ("empty", "empty_like", "empty_strided")


def _poisoned(create):
    def wrapper(*args, **kwargs):
        x = create(*args, **kwargs)
        if x.is_floating_point():
            x.detach().fill_(float("nan"))
        return x

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """``torch.empty`` and its kin return NaN: whoever reads memory that nobody wrote is found out."""
    for name in POISONED:
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they lose more to waiting for each other's threads than they win."""
    from i2am import demo

    with demo.one_thread():
        yield


def pytest_collection_finish():
    """What was imported stays: the collector of garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_support_table.py")  # after the tests that it is about
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def _skipping_what_is_missing(item):
    try:
        return (yield)
    except ImportError as error:
        if older_versions.OLDER:
            older_versions.skip_if_older(error)
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skipping_what_is_missing)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skipping_what_is_missing)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers side by side take whole files, whose fixtures are shared; what docs/support.md shows is one piece.

    (A scheduler of our own: pytest 9.2 no longer looks where ``--dist loadgroup`` of xdist 3.8 writes its groups.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0].removeprefix("tests/")
            shown = any(fnmatch(file, pattern) for pattern in (*support.FILES, "test_support_table.py"))
            return "support" if shown else file

    return Files(config, log)
