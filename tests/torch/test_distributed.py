"""Do data parallelism (DDP) and sharded parameters (FSDP2) train what one process trains? Two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_attention

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

PROCESSES = 2
WORKER = '''
import os
import sys

import torch
from torch import nn
from torch.distributed import barrier, destroy_process_group, init_process_group

from triton_attention import attention

mode, rank, world, meeting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


class Layer(nn.Module):
    """Attention with a learned bias, which is a parameter that is shared like any other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return self.out(attention(q, k, v, bias=self.bias, causal=True).flatten(-2))


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def train(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(parameter).detach().clone() for parameter in model.parameters()]


torch.manual_seed(0)
alone, parallel = Layer(), Layer()
parallel.load_state_dict(alone.state_dict())
batch = torch.randn(4, 6, 16)
before = [parameter.detach().clone() for parameter in alone.parameters()]
expected = train(alone, batch)
assert not any(torch.equal(one, other) for one, other in zip(before, expected, strict=True))

init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
if mode == "ddp":
    parallel = nn.parallel.DistributedDataParallel(parallel)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(parallel, mesh=init_device_mesh("cpu", (world,)))
    assert parallel.qkv.weight.to_local().shape[0] == 48 // world
result = train(parallel, batch.chunk(world)[rank])
for one, other in zip(result, expected, strict=True):
    torch.testing.assert_close(one, other)
barrier()  # nobody leaves while another still talks to it
destroy_process_group()
print("equal", flush=True)
os._exit(0)  # PyTorch's threads do not always survive the interpreter's own end, which is not what is tried here
'''


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_parallel_training_is_training(mode, tmp_path):
    source = str(Path(triton_attention.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, mode, str(rank), str(PROCESSES), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "equal\n"
