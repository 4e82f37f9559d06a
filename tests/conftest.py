"""Shared by every test: the kernels are interpreted on CPU, and uninitialised memory is poison."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import pytest

POISONED = ("empty", "empty_like", "empty_strided")


def _poisoned(create):
    def wrapper(*args, **kwargs):
        x = create(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
