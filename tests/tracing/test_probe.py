"""A model's attention read while it trains: right values and gradients, and an output that does not change by a bit."""

import os
import socket
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import i2am
from i2am import losses
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines

REFERENCE = i2am.Reference(grid=(2, 3))
READS = ("r2g", "g2r", "mass", "expected", "landing", "entropy", "col_lse")
LAYER = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def unet():
    return pipelines.unet()


def inputs(batch=2, tokens=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 4, 8, 8, generator=g),
        500,
        torch.randn(batch, tokens, pipelines.CONTEXT, generator=g),
    )


def objective(probe):
    """Every read-out of every layer, with weights of its own."""
    total = 0.0
    for n, read in enumerate(probe.reads):
        for m, name in enumerate(READS):
            if name != "mass":  # the reference is every key: 1
                total = total + ((n + 1) * (m + 1) * getattr(read, name).square()).mean()
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b, bound=1e-4):
    assert a.keys() == b.keys()
    top = max(float(x.abs().max()) for x in b.values())
    assert max(float((a[name] - b[name]).abs().max()) for name in b) < bound * top


def step(model, backend=None, inputs_=None, **keywords):
    model.zero_grad()
    with i2am.probe(model, reference=REFERENCE, reads=READS, backend=backend, **keywords) as probe:
        model(*(inputs_ or inputs())).sample.sum()  # whose gradient is not asked for
        objective(probe).backward()
    return probe, gradients(model)


def test_output_is_the_models_own(unet):
    plain = unet(*inputs()).sample
    plain.sum().backward()
    own = gradients(unet)
    unet.zero_grad()
    with i2am.probe(unet, reference=REFERENCE, reads=READS):
        probed = unet(*inputs()).sample
        probed.sum().backward()
    assert torch.equal(plain, probed)
    assert all(torch.equal(own[name], x) for name, x in gradients(unet).items())


def test_gradients_are_the_twins(unet):
    """Through the whole model, against read-outs by definition in float64."""
    _, got = step(unet)
    _, want = step(unet, backend="reference")
    close(got, want)
    assert got[f"{LAYER}.to_q.weight"].any()
    assert got["conv_in.weight"].any()


def test_reads_are_of_each_layer_in_order(unet):
    probe, _ = step(unet)
    assert [read.grid for read in probe.reads] == [(8, 8), (4, 4), (2, 2), *[(4, 4)] * 2, *[(8, 8)] * 2]
    assert all(read.key_grid == (2, 3) for read in probe.reads)
    last = probe.reads[-1]
    assert last.layer == "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
    torch.testing.assert_close(last.r2g.sum(2), torch.ones_like(last.r2g.sum(2)))
    with pytest.raises(AttributeError, match="'sram' was not read"):
        _ = last.sram
    with pytest.raises(AttributeError, match="has no 'nothing'"):
        _ = last.nothing


def test_reads_are_what_the_tracer_sums(unet):
    with torch.no_grad(), i2am.patch_unet(unet, reference=REFERENCE, layers=LAYER, guidance="none") as tracer:
        unet(*inputs())
    want = tracer.maps().ulam("r2g")
    with torch.no_grad(), i2am.probe(unet, reference=REFERENCE, layers=LAYER, reads=("r2g",)) as probe:
        unet(*inputs())
    (read,) = probe.reads
    torch.testing.assert_close(read.r2g.mean(1).unflatten(1, read.grid), want)


def test_class_tokens_are_not_read(unet):
    seven = i2am.Reference(grid=(2, 3), skip=1)
    with i2am.probe(unet, reference=seven, layers=LAYER, reads=("g2r", "mass")) as probe:
        unet(*inputs(tokens=7))
    (read,) = probe.reads
    assert read.g2r.shape[2] == 6
    assert (read.mass < 1).all()


def test_regions_and_pairs(unet):
    regions, pairs = [], []

    def region(grid, keys):
        regions.append((grid, keys))
        return torch.ones(1, grid[0] * grid[1])

    def pair(grid, keys):
        pairs.append((grid, keys))
        return torch.tensor([[0, 1], [3, 2]])

    names = ("sram", "log_p", "g2r")
    with i2am.probe(unet, reference=REFERENCE, layers=LAYER, reads=names, regions=region, pairs=pair) as probe:
        unet(*inputs())
    (read,) = probe.reads
    assert regions == pairs == [((8, 8), (2, 3))]
    torch.testing.assert_close(read.sram[:, :, 0], read.g2r)
    assert read.log_p.shape == (2, read.g2r.shape[1], 2)


@pytest.mark.parametrize("layers", [None, LAYER])
def test_checkpointing(unet, layers):
    """The layers run again during backward, and are read again, but counted once."""
    _, want = step(unet, layers=layers)
    unet.train()
    unet.enable_gradient_checkpointing()
    probe, got = step(unet, layers=layers)
    assert len(probe.reads) == (7 if layers is None else 1)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert F.scaled_dot_product_attention is SDPA


SDPA = F.scaled_dot_product_attention


def test_reentrant_checkpointing_is_refused(unet):
    unet.train()
    unet.enable_gradient_checkpointing(partial(torch.utils.checkpoint.checkpoint, use_reentrant=True))
    latents, t, context = inputs()
    with i2am.probe(unet, reference=REFERENCE, reads=READS):
        with pytest.raises(RuntimeError, match=r"read-outs would carry none.*use_reentrant=False"):
            unet(latents.requires_grad_(), t, context.requires_grad_())
    assert F.scaled_dot_product_attention is SDPA


def test_backward_outside_is_an_error_with_checkpoints(unet):
    """The second run makes other tensors than the first: checkpointing says so, no gradient is lost in silence."""
    unet.train()
    unet.enable_gradient_checkpointing()
    with i2am.probe(unet, reference=REFERENCE, reads=("entropy",)) as probe:
        unet(*inputs())
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        probe.reads[0].entropy.sum().backward()


def test_without_gradients_values_only(unet):
    with torch.no_grad(), i2am.probe(unet, reference=REFERENCE) as probe:
        unet(*inputs())
    assert len(probe.reads) == 7
    assert not probe.reads[0].expected.requires_grad


def test_autocast(unet):
    """q and k as the model's attention sees them, statistics in float32."""
    with i2am.probe(unet, reference=REFERENCE, reads=READS) as probe, torch.autocast("cpu", torch.bfloat16):
        unet(*inputs())
    objective(probe).backward()
    assert probe.reads[0].expected.dtype == torch.float32
    assert unet.conv_in.weight.grad.isfinite().all()
    assert unet.conv_in.weight.grad.any()


def test_lora(unet):
    """Only the adapters' weights train, and they get the gradient of the read-outs."""
    peft = pytest.importorskip("peft")
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    probe, got = step(unet)
    assert len(probe.reads) == 7
    assert got
    assert all("lora" in name for name in got)
    assert all(x.any() for name, x in got.items() if LAYER in name)


def test_accelerate(unet):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    _, want = step(unet)
    unet.zero_grad()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(unet, optimizer)
    with i2am.probe(accelerator.unwrap_model(model), reference=REFERENCE, reads=READS) as probe:
        model(*inputs())
        accelerator.backward(objective(probe))
    close(gradients(unet), want, 1e-6)
    optimizer.step()


def _ddp(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    unet = pipelines.unet()
    model = torch.nn.parallel.DistributedDataParallel(unet)
    with i2am.probe(model.module, reference=REFERENCE, reads=READS) as probe:
        out = model(*inputs(seed=rank)).sample
        (objective(probe) + 1e-3 * out.square().mean()).backward()
    torch.save(gradients(unet), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp(unet, tmp_path):
    """Two processes: both end with the mean of the gradients of their two batches."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_ddp, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = []
    for seed in range(2):
        unet.zero_grad()
        with i2am.probe(unet, reference=REFERENCE, reads=READS) as probe:
            out = unet(*inputs(seed=seed)).sample
            (objective(probe) + 1e-3 * out.square().mean()).backward()
        alone.append(gradients(unet))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name])
    close(found[0], {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]})


def test_a_transformer():
    """FLUX.1 Kontext's kind: generated, text and reference tokens in one attention."""
    model = dit.flux_transformer()
    h = w = 4
    ids = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), 2).reshape(-1, 2).float()
    image = torch.cat([torch.zeros(16, 1), ids], 1)
    both = torch.cat([image, torch.cat([torch.ones(16, 1), ids], 1)])
    latents = torch.randn(1, 32, 16)

    def run():
        return model(
            hidden_states=latents,
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]),
            img_ids=both,
            txt_ids=torch.zeros(5, 3),
            encoder_hidden_states=dit.text_tokens(5),
            pooled_projections=torch.randn(1, 8, generator=torch.Generator().manual_seed(0)),
        ).sample

    plain = run()
    with i2am.probe(model, reads=("expected", "mass", "r2g")) as probe:
        probed = run()
        target = losses.grid((h, w))
        sum(losses.flow(read.expected, target, mass=read.mass) for read in probe.reads).backward()
    assert torch.equal(plain, probed)
    assert len(probe.reads) == 4
    assert model.x_embedder.weight.grad.any()


def test_gradient_to_the_latents_while_sampling(unet):
    """Guidance of one's own: the latents' gradient of a loss over a probed forward, in a sampling loop."""
    scheduler = pipelines.ddim()
    scheduler.set_timesteps(2)
    latents, _, context = inputs(batch=1)
    goal = torch.tensor([0.0, 0.0]).expand(64, 2)
    for t in scheduler.timesteps:
        latents = latents.detach().requires_grad_()
        with i2am.probe(unet, reference=REFERENCE, layers=LAYER, reads=("expected",)) as probe:
            noise = unet(latents, t, context).sample
        loss = losses.flow(probe.reads[0].expected, goal)
        (gradient,) = torch.autograd.grad(loss, latents)
        assert gradient.any()
        with torch.no_grad(), i2am.probe(unet, reference=REFERENCE, layers=LAYER, reads=("expected",)) as probe:
            unet(latents - 0.1 * gradient / gradient.norm(), t, context)
        assert losses.flow(probe.reads[0].expected, goal) < loss
        latents = scheduler.step(noise.detach(), t, latents).prev_sample


def test_latents_through_a_traced_model(unet):
    """A tracer does not cut the model's own gradient, whichever output it gives."""
    latents, t, context = inputs()
    latents.requires_grad_()
    (want,) = torch.autograd.grad(unet(latents, t, context).sample.square().sum(), latents)
    with i2am.patch_unet(unet, reference=REFERENCE, guidance="none"):
        (got,) = torch.autograd.grad(unet(latents, t, context).sample.square().sum(), latents)
    assert torch.equal(got, want)


def _probed(unet):
    return i2am.probe(unet, reference=REFERENCE, reads=("r2g", "expected"))


def _traced(unet, output):
    return i2am.patch_unet(unet, reference=REFERENCE, guidance="none", output=output)


WATCHED = {"probe": _probed, "tracer": partial(_traced, output="i2am"), "own output": partial(_traced, output="model")}


@pytest.mark.parametrize("how", WATCHED)
def test_forward_mode_is_refused(unet, how):
    """The model has tangents by itself; beside them a read-out or a map would have none."""
    latents, t, context = inputs()
    unet.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        moving = forward_ad.make_dual(latents, torch.ones_like(latents))
        assert forward_ad.unpack_dual(unet(moving, t, context).sample).tangent.any()
        with WATCHED[how](unet), pytest.raises(NotImplementedError, match="forward-mode tangent"):
            unet(moving, t, context)


def test_second_derivatives_are_refused(unet):
    latents, t, context = inputs()
    latents.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), _probed(unet) as probe:
        unet(latents, t, context)
        (slope,) = torch.autograd.grad(probe.reads[-1].r2g.square().sum(), latents, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(slope.square().sum(), latents)


def test_a_tracers_maps_have_no_gradient(unet):
    """An error where one is asked for, not a zero."""
    with _traced(unet, "i2am") as tracer:
        unet(*inputs())
    with pytest.raises(RuntimeError, match="does not require grad"):
        tracer.maps().ulam("r2g").sum().backward()


def test_one_at_a_time(unet):
    with i2am.probe(unet, reference=REFERENCE):
        with pytest.raises(ValueError, match="being traced already"):
            i2am.probe(unet, reference=REFERENCE)
        with pytest.raises(ValueError, match="being traced already"):
            i2am.patch_unet(unet, reference=REFERENCE)
    i2am.probe(unet, reference=REFERENCE).unpatch()
    i2am.patch_unet(unet, reference=REFERENCE).unpatch()


def test_leaves_nothing_behind(unet):
    def state():
        return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in unet.named_modules()}

    before = state()
    with i2am.probe(unet, reference=REFERENCE) as probe:
        unet(*inputs())
    assert state() == before
    assert F.scaled_dot_product_attention is SDPA
    with pytest.raises(ValueError, match="nowhere"):
        i2am.probe(unet, reference=REFERENCE, layers="nowhere")
    assert state() == before
    with i2am.probe(unet, reference=REFERENCE), pytest.raises(RuntimeError):
        unet(torch.randn(1, 3, 8, 8), 1, inputs()[2])
    assert F.scaled_dot_product_attention is SDPA
    assert len(probe.reads) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reads="r2g"), "reads must be a sequence of names"),
        (dict(reads=("columns",)), "reads must be a sequence of names among"),
        (dict(reads=("sram",)), "regions= goes with reads of sram"),
        (dict(reads=("r2g",), pairs=lambda *_: None), "pairs= goes with reads of log_c or log_p"),
        (dict(mode="both"), "mode must be"),
        (dict(reference=None), "reference"),
    ],
)
def test_refusals(unet, change, message):
    with pytest.raises(ValueError, match=message):
        i2am.probe(unet, **{"reference": REFERENCE, **change})


def test_no_expected_place_without_a_grid(unet):
    with i2am.probe(unet, reference=i2am.Reference(), reads=("expected",)), pytest.raises(ValueError, match="no grid"):
        unet(*inputs())
