"""Threads of our own: the same bits whatever their number, the user's settings untouched, nothing left hanging."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import i2am
from i2am.ops import blockwise, streaming, workers

pytestmark = pytest.mark.skipif(not workers._own_thread_counts(), reason="torch is built without OpenMP")


@pytest.fixture
def threads():
    """Sets the number of torch's threads; as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["heads", "pieces", "rows", "pieces of rows"])
@pytest.mark.parametrize("Nk", [16, 77, 300])
def test_same_bits_whatever_the_number_of_threads(form, Nk, threads, monkeypatch):
    if "pieces" in form:
        monkeypatch.setattr(streaming, "LONG", 0)
        monkeypatch.setattr(streaming, "FEW", 1 << 20)
    if "rows" in form:
        monkeypatch.setattr(streaming, "BLOCKS", 1 << 30)
    monkeypatch.setattr(blockwise, "TILE", 1 << 14)
    monkeypatch.setattr(streaming, "KEPT", 70 << 10)  # of which each thread gets its share
    q, k, v = torch.randn(2, 5, 700, 40), torch.randn(2, 5, Nk, 40), torch.randn(2, 5, Nk, 24)
    found = {}
    for n in (1, 2, 3, 7):
        threads(n)
        found[n] = i2am.attention(q, k, v, queries=slice(30, 650), keys=slice(3, 14), backend="streaming")
    for n in (2, 3, 7):
        assert all(torch.equal(x, y) for x, y in zip(found[n], found[1], strict=True)), n


@pytest.mark.parametrize("queries", [slice(0, 700), slice(300, 400), slice(3, 60), slice(650, 700)])
@pytest.mark.parametrize("blocks", [1, 1 << 30])
def test_pieces_in_any_order(blocks, queries, monkeypatch):
    """No piece reads or writes what is another's."""
    monkeypatch.setattr(streaming, "LONG", 0)
    monkeypatch.setattr(streaming, "BLOCKS", blocks)
    monkeypatch.setattr(blockwise, "TILE", 1 << 14)
    q, k, v = torch.randn(1, 2, 700, 40), torch.randn(1, 2, 300, 40), torch.randn(1, 2, 300, 24)

    def call():
        return i2am.attention(q, k, v, queries=queries, keys=slice(30, 140), backend="streaming")

    want = call()
    monkeypatch.setattr(workers, "run", lambda tasks, then, device=None: then([t() for t in tasks[::-1]][::-1]))
    assert all(torch.equal(x, y) for x, y in zip(call(), want, strict=True))


def test_gradients_have_the_same_bits_too(threads):
    found = []
    for n in (1, 2, 4):
        threads(n)
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 3, 700, 40).requires_grad_() for _ in range(3))
        one = i2am.attention(q, k, v, read=("r2g", "g2r", "entropy"), keys=slice(3, 300))
        loss = one.out.square().sum() + one.r2g.square().sum() + one.g2r.square().sum() + one.entropy.sum()
        found.append(torch.autograd.grad(loss, (q, k, v)))
    assert all(torch.equal(x, y) for more in found[1:] for x, y in zip(more, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_calls_have_the_same_bits_too(dtype, threads):
    """Torch would split them, or not, by the number of its threads."""
    for Nq, Nk, d in ((64, 64, 16), (300, 77, 40), (1000, 16, 64), (4, 5000, 40), (1, 1, 8)):
        q, k, v = (torch.randn(1, 1, n, d, dtype=dtype) for n in (Nq, Nk, Nk))
        threads(1)
        one = i2am.attention(q, k, v, backend="streaming")
        for n in (2, 4):
            threads(n)
            more = i2am.attention(q, k, v, backend="streaming")
            assert all(x is None or torch.equal(x, y) for x, y in zip(one, more, strict=True)), (Nq, Nk, d, n)


def test_tasks_run_side_by_side_with_one_torch_thread_each(threads):
    threads(3)
    meeting = threading.Barrier(3, timeout=30)

    def task(n):
        meeting.wait()
        return n, torch.get_num_threads(), threading.get_ident()

    found = workers.run([lambda n=n: task(n) for n in range(3)], list)
    assert [n for n, _, _ in found] == [0, 1, 2]
    assert {count for _, count, _ in found} == {1}
    assert len({who for _, _, who in found} - {threading.get_ident()}) == 3
    assert torch.get_num_threads() == 3


def test_threads_to_come_find_the_users_setting(threads):
    threads(3)
    workers._forget()
    workers.run([int, int, int], list)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]


def test_one_torch_thread_means_no_other_thread(threads):
    threads(1)
    assert workers.run([threading.get_ident, threading.get_ident], list) == [threading.get_ident()] * 2


def test_an_exception_is_raised_in_the_caller_and_ends_the_rest(threads):
    threads(2)
    ran = []

    def task(n):
        ran.append(n)
        if n == 1:
            raise ZeroDivisionError("in a task")
        time.sleep(0.01)

    with pytest.raises(ZeroDivisionError, match="in a task"):
        workers.run([lambda n=n: task(n) for n in range(100)], list)
    assert len(ran) < 100
    assert workers.run([lambda: 1, lambda: 2], list) == [1, 2]  # and the next call works


def test_tasks_may_call_the_op(threads):
    """A call within a task runs in its thread: no waiting for threads that wait for it."""
    threads(2)
    q = torch.randn(1, 4, 300, 40)
    outs = workers.run([lambda: i2am.attention(q, q, q, backend="streaming").out] * 4, list)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_the_caller(mode, threads):
    threads(2)
    q = torch.randn(1, 4, 300, 40)
    true = i2am.attention(q, q, q, backend="reference")
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = i2am.attention(q, q, q, backend="streaming")
    torch.testing.assert_close(got.r2g, true.r2g.float(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got.out, true.out, rtol=1e-5, atol=1e-6)
    assert got.out.is_inference() == (mode is torch.inference_mode)


def test_several_callers_at_once(threads):
    threads(2)
    q = torch.randn(1, 4, 500, 40)
    want = i2am.attention(q, q, q, backend="streaming")
    found = []

    def call():
        found.extend(i2am.attention(q, q, q, backend="streaming").r2g for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 20
    assert all(torch.equal(r2g, want.r2g) for r2g in found)


PROGRAM = """
    import os, signal, sys, threading
    import torch, i2am
    from i2am.ops import streaming
    torch.set_num_threads(2)
    q = torch.randn(1, 4, 400, 40)
    call = lambda: i2am.attention(q, q, q, backend="streaming")
    want = call()
    {rest}
"""
FORKED = """
    child = os.fork()
    same = torch.equal(call().r2g, want.r2g)
    if child == 0:
        os._exit(0 if same else 1)
    assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
INTERRUPTED = """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    long = torch.randn(1, 8, 6000, 40)
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
    try:
        while True:
            i2am.attention(long, long, long, backend="streaming")
    except KeyboardInterrupt:
        pass
    assert torch.equal(call().r2g, want.r2g)
"""
AT_EXIT = """
    import atexit
    atexit.register(call)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "rest",
    [FORKED + AT_EXIT, INTERRUPTED, pytest.param("pass", marks=pytest.mark.slow)],
    ids=["fork and atexit", "interrupt", "exit"],
)
def test_processes_end_as_if_there_were_no_threads(rest, request):
    program = textwrap.dedent(PROGRAM).format(rest=textwrap.dedent(rest).strip())
    environment = os.environ | {"PYTHONPATH": str(request.config.rootpath)}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
