"""Each loss against a materialised version: probabilities in float64, the published formula, plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

import i2am
from i2am import losses
from i2am.ops import naive

B, H, SIZE, KEYS = 2, 3, (4, 5), (6, 3)
Q, K, D = math.prod(SIZE), math.prod(KEYS), 8


@pytest.fixture
def call():
    """q, k, v in float64 whose reference is the last 18 of 23 keys."""
    g = torch.Generator().manual_seed(1)
    return [2 * torch.randn(B, H, n, D, generator=g, dtype=torch.float64) for n in (Q, 23, 23)]


def leaves(call, dtype=torch.float64):
    return [x.detach().to(dtype).requires_grad_() for x in call]


REFERENCE = slice(5, 23)


def read(q, k, v, *names, **keywords):
    return i2am.attention(q, k, v, keys=REFERENCE, read=names, **keywords)


def materialised(q, k):
    p = naive.probabilities(q, k, scale=D**-0.5, keys=REFERENCE)
    return p.rows[..., REFERENCE], p.columns  # [B, H, Q, K] each


def agree(call, ours, theirs):
    """Values and gradients, in float64 and float32."""
    want_inputs = leaves(call)
    want = theirs(*want_inputs)
    wanted = torch.autograd.grad(want, want_inputs[:2])
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        inputs = leaves(call, dtype)
        got = ours(*inputs)
        assert got.item() == pytest.approx(want.item(), rel=bound)
        for a, b in zip(torch.autograd.grad(got, inputs[:2]), wanted, strict=True):
            assert b.any()
            assert float((a.double() - b).abs().max() / b.abs().max()) < bound


def test_grid():
    assert losses.grid((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    with pytest.raises(ValueError, match="at least one token"):
        losses.grid((0, 3))


@pytest.mark.parametrize("heads", [True, False])
def test_flow(call, heads):
    target, weight = torch.rand(B, Q, 2, dtype=torch.float64) * 5, torch.rand(Q, dtype=torch.float64)
    weight[3] = 0

    def ours(q, k, v):
        one = read(q, k, v, "expected", "mass", key_coordinates=losses.grid(KEYS))
        return losses.flow(one.expected, target, mass=one.mass, weight=weight, heads=heads)

    def theirs(q, k, v):
        p, _ = materialised(q, k)
        p = p / p.sum(3, keepdim=True)
        e = torch.stack([(p * (torch.arange(K) // KEYS[1])).sum(3), (p * (torch.arange(K) % KEYS[1])).sum(3)], 3)
        if heads:
            e = e.mean(1, keepdim=True)
        off = ((e - target[:, None]) ** 2).sum(3).mean(1)
        return (off * weight / weight.sum()).sum(1).mean()

    agree(call, ours, theirs)


def test_photometric(call):
    reference, picture, weight = (torch.rand(B, *n, dtype=torch.float64) for n in ((3, 12, 9), (3, Q), (Q,)))
    temperature = 2.0

    def ours(q, k, v):
        one = read(q, k, v, "expected", "mass", key_coordinates=losses.grid(KEYS), scale=D**-0.5 / temperature)
        return losses.photometric(
            one.expected,
            reference,
            picture,
            size=KEYS,
            mass=one.mass,
            weight=weight,
            temperature=temperature,
        )

    def theirs(q, k, v):
        s = (q @ k.transpose(2, 3) / math.sqrt(D) / temperature)[..., REFERENCE]
        e = s.softmax(3) @ losses.grid(KEYS).double()
        e = e.mean(1)
        y, x = (e[..., 0] * 11 / 5).clamp(0, 11), (e[..., 1] * 8 / 2).clamp(0, 8)  # pixels of a 12 × 9 image
        y0, x0 = y.detach().floor().clamp(max=10).long(), x.detach().floor().clamp(max=7).long()
        total = 0.0
        for dy in (0, 1):
            for dx in (0, 1):
                share = (1 - (y - y0 - dy).abs()) * (1 - (x - x0 - dx).abs())  # [B, Q]
                pixels = torch.stack([reference[b, :, y0[b] + dy, x0[b] + dx] for b in range(B)]).double()
                total = total + share[:, None] * pixels
        off = ((total - picture) ** 2).mean(1)
        return temperature * ((off * weight).sum(1) / weight.sum(1)).mean()

    agree(call, ours, theirs)


def test_variation(call):
    garment = (torch.rand(B, Q) > 0.3).double()

    def ours(q, k, v):
        one = read(q, k, v, "expected", "mass", key_coordinates=losses.grid(KEYS))
        return losses.variation(one.expected, size=SIZE, mass=one.mass, weight=garment)

    def theirs(q, k, v):
        """A [B, h, w, h', w'] map times coordinates, as StableVITON's attention loss materialises it."""
        p, _ = materialised(q, k)
        a = p / p.sum(3, keepdim=True)
        a = a.mean(1).reshape(B, *SIZE, *KEYS)
        y = (a * torch.arange(KEYS[0])[:, None]).sum((3, 4))
        x = (a * torch.arange(KEYS[1])).sum((3, 4))
        f, m = torch.stack([y, x], 3), garment.reshape(B, *SIZE)
        down, right = (f[:, 1:] - f[:, :-1]).abs().sum(3), (f[:, :, 1:] - f[:, :, :-1]).abs().sum(3)
        both = m[:, 1:] * m[:, :-1], m[:, :, 1:] * m[:, :, :-1]
        return (down * both[0]).sum() / both[0].sum() + (right * both[1]).sum() / both[1].sum()

    agree(call, ours, theirs)


@pytest.mark.parametrize("dual", [False, True])
def test_matches(call, dual):
    pairs, weight = (
        torch.tensor([[0, 3], [4, 17], [4, 0], [19, 9]]),
        torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64),
    )

    def ours(q, k, v):
        one = read(q, k, v, "log_p", *(["log_c"] if dual else []), pairs=pairs)
        return losses.matches(one.log_p, one.log_c, weight=weight)

    def theirs(q, k, v):
        p, c = materialised(q, k)
        if dual:
            p = p * c  # LoFTR's confidence matrix
        return -(p[:, :, pairs[:, 0], pairs[:, 1]].log() * weight / weight.sum()).sum(2).mean()

    agree(call, ours, theirs)


@pytest.mark.parametrize("what", ["r2g", "g2r", "sram", "mass"])
def test_inside(call, what):
    count = Q if what in ("r2g", "mass") else K
    mask = (torch.arange(count) % 3 == 0).double()
    region = torch.rand(1, Q, dtype=torch.float64)

    def ours(q, k, v):
        one = read(q, k, v, what, **(dict(regions=region) if what == "sram" else {}))
        share = getattr(one, what)
        return losses.inside(share[:, :, 0] if what == "sram" else share, mask)

    def theirs(q, k, v):
        p, c = materialised(q, k)
        share = {
            "r2g": c.mean(3),
            "g2r": p.mean(2),
            "mass": p.sum(3),
            "sram": (p * region[0, :, None]).sum(2) / region.sum(),
        }[what]
        return -((share * mask).sum(2) / share.sum(2)).log().mean()

    agree(call, ours, theirs)


def test_entropy(call):
    weight = torch.rand(Q, dtype=torch.float64)

    def ours(q, k, v):
        return losses.entropy(read(q, k, v, "entropy").entropy, weight=weight)

    def theirs(q, k, v):
        p = (q @ k.transpose(2, 3) / math.sqrt(D)).softmax(3)
        return (-(p * p.log()).sum(3).mean(1) * weight / weight.sum()).sum(1).mean()

    agree(call, ours, theirs)


def test_distil(call):
    teacher = torch.rand(B, 5, K, dtype=torch.float64)

    def ours(q, k, v):
        return losses.distil(read(q, k, v, "g2r").g2r, teacher)

    def theirs(q, k, v):
        p, _ = materialised(q, k)
        s, t = p.mean(2).mean(1), teacher.mean(1)
        s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
        return F.kl_div(s.log(), t, reduction="batchmean")

    agree(call, ours, theirs)


def test_distil_gives_the_teacher_nothing():
    student, teacher = torch.rand(1, 2, 7, requires_grad=True), torch.rand(1, 2, 7, requires_grad=True)
    losses.distil(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None
    assert float(losses.distil(student, student)) == pytest.approx(0, abs=1e-7)


def test_images_without_weight_do_not_count():
    """The second image has no known place: the loss is the first one's alone."""
    expected, target = torch.rand(2, 1, 4, 2), torch.rand(2, 4, 2)
    weight = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    alone = losses.flow(expected[:1], target[:1], weight=weight[0])
    torch.testing.assert_close(losses.flow(expected, target, weight=weight), alone)


def test_variation_of_one_row():
    expected = torch.tensor([0.0, 1.0, 3.0]).reshape(1, 1, 3, 1)
    assert float(losses.variation(expected, size=(1, 3))) == pytest.approx(1.5)


E4 = torch.rand(1, 2, 4, 2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: losses.flow(E4, torch.rand(3, 2)), r"target must be \[4, 2\]"),
        (lambda: losses.flow(E4, torch.rand(4, 2), weight=torch.zeros(4)), "not zero everywhere"),
        (lambda: losses.flow(E4, torch.rand(4, 2), weight=-torch.ones(4)), "non-negative"),
        (lambda: losses.flow(E4, torch.rand(4, 2), mass=torch.rand(1, 2, 3)), "mass must be"),
        (lambda: losses.variation(E4, size=(2, 3)), "grid of 6"),
        (lambda: losses.variation(E4, size=(2, 2), weight=torch.tensor([1.0, 0, 0, 1])), "no two neighbouring"),
        (lambda: losses.photometric(E4, torch.rand(1, 3, 4, 4), torch.rand(1, 3, 5), size=(2, 2)), "target must be"),
        (
            lambda: losses.photometric(E4, torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4), size=(2, 2), temperature=0),
            "temperature must be positive",
        ),
        (lambda: losses.matches(torch.full((1, 1, 2), -torch.inf)), "masked out of the attention"),
        (lambda: losses.matches(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3)), "log_c must be"),
        (lambda: losses.inside(torch.rand(1, 2, 4), torch.zeros(4)), "mask is empty"),
        (lambda: losses.inside(torch.rand(1, 2, 4), torch.ones(5)), r"mask must be \[4\]"),
        (lambda: losses.distil(torch.rand(1, 2, 4), torch.rand(1, 2, 5)), "teacher must be"),
    ],
)
def test_refusals(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()
