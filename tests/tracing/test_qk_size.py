"""The run on shapes alone that says what a record will take leaves nothing of itself in a model."""

import functools
import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from i2am.tracing.qk_size import run_on_shapes


def cached_behind_a_decorator(function):
    kept = functools.lru_cache(function)

    @functools.wraps(function)
    def called(*args):
        return kept(*args)

    return called


@functools.lru_cache
def of_the_file(length):
    return torch.arange(length)


@cached_behind_a_decorator
def wrapped(length):
    return torch.arange(length) + 1


class Places(nn.Module):
    """Keeps what it has computed in every way that models do."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(3, 3), None
        self.own = functools.lru_cache(lambda length: torch.arange(length) + 2)

    @functools.lru_cache  # noqa: B019
    def method(self, length):
        return torch.arange(length) + 3

    @cached_behind_a_decorator
    def decorated(self, length):
        return torch.arange(length) + 4

    @functools.cached_property
    def kept(self):
        return torch.arange(3) + 5

    def forward(self, x):
        n = x.shape[-1]
        places = of_the_file(n), wrapped(n), self.own(n), self.method(n), self.decorated(n), self.kept
        if self.last is None:
            self.last = x.new_ones(n)
        return self.linear(x) + sum(places) + self.last


@pytest.fixture
def frozen():
    """As servers do before they fork: the garbage collector no longer knows the objects that there are."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_nothing_fake_stays_in_a_models_caches():
    model, x = Places(), torch.randn(2, 3)
    run_on_shapes(model, (x,), {})
    assert "kept" not in vars(model)
    assert model.last is None
    with torch.no_grad():
        out = model(x)
    assert not isinstance(out, FakeTensor)
    torch.testing.assert_close(out, model.linear(x) + 6 * torch.arange(3) + 15 + 1)


@pytest.mark.usefixtures("frozen")
def test_not_even_of_a_run_that_fails():
    class Failing(Places):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no memory")

    model = Failing()
    with pytest.raises(RuntimeError, match="no memory"):
        run_on_shapes(model, (torch.randn(2, 3),), {})
    assert not isinstance(Places.forward(model, torch.randn(2, 3)), FakeTensor)
