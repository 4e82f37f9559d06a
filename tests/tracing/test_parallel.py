"""Models that run over several processes: refused where one process does not see all that the maps need."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, ".")
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
import i2am
from tests.helpers.tiny_models import unet as pipelines
from torch.distributed.device_mesh import init_device_mesh

torch.set_num_threads(1)
unet = pipelines.unet()
x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 6, pipelines.CONTEXT)
run = lambda: unet(x, 500, context).sample
KIND
try:
    with i2am.patch_unet(unet, reference=i2am.Reference(grid=(2, 3)), time_groups=1) as tracer, torch.no_grad():
        run()
    print("traced", tuple(tracer.maps().ulam("r2g").shape))
except ValueError as error:
    print("refused", error)
dist.barrier()
dist.destroy_process_group()
"""
TENSOR_PARALLEL = """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
mesh = init_device_mesh("cpu", (2,))
for name, module in unet.named_modules():
    if name.endswith("attn2"):
        plan = {p: ColwiseParallel() for p in ("to_q", "to_k", "to_v")} | {"to_out.0": RowwiseParallel()}
        parallelize_module(module, mesh, plan)
        module.heads //= 2
"""
DATA_PARALLEL = """
wrapped = torch.nn.parallel.DistributedDataParallel(unet)
run = lambda: wrapped(x, 500, context).sample
"""


def two_processes(kind, folder):
    program = textwrap.dedent(PROGRAM).replace("KIND", textwrap.dedent(kind))
    command = [sys.executable, "-W", "ignore", "-c", program]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(folder / "meet")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=300) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outputs
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_tensor_parallel_heads_are_refused(tmp_path):
    for said in two_processes(TENSOR_PARALLEL, tmp_path):
        assert "attn2 is tensor-parallel over 2 processes" in said


@pytest.mark.slow
def test_data_parallel_models_are_traced_in_each_process(tmp_path):
    for said in two_processes(DATA_PARALLEL, tmp_path):
        assert "traced (1, 8, 8)" in said
