"""Level 3: what did the compiler do for us? The same in Gluon, with barriers, layouts and shared memory written out.

One warpgroup of 128 threads owns 64 queries. It starts the copies of a block of keys and values, waits for their
barrier, multiplies, takes the softmax, multiplies again. Nothing overlaps, which shows what there is to overlap.
"""

from __future__ import annotations

import sys

import torch
from harness import HEAD_DIM, LOG2_E, main
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_attention._compat import copy_to_shared


@gluon.jit
def attention_fwd(q, k, v, out, seqlen, scale_log2, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """out = softmax(scale q k^T) v. Grid: (blocks of 64 queries, heads); a program owns its rows of `out`."""
    # Where the elements of a matrix product's results are, among the threads of a warpgroup: the hardware says so.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    q_tile = gl.allocate_shared_memory(q.dtype, [64, HEAD_DIM], q.layout)
    k_tile = gl.allocate_shared_memory(k.dtype, [BLOCK_N, HEAD_DIM], k.layout)
    v_tile = gl.allocate_shared_memory(v.dtype, [BLOCK_N, HEAD_DIM], v.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    fence_async_shared()

    origin = gl.program_id(1) * seqlen
    start_m = origin + gl.program_id(0) * 64
    mbarrier.expect(arrived, q.block_type.nbytes)
    copy_to_shared(q, [start_m, 0], arrived, q_tile)
    mbarrier.wait(arrived, 0)
    phase = 1  # a barrier's phase is the parity of how often it was used

    maximum = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.full([64, HEAD_DIM], 0.0, gl.float32, OUT)
    nothing = gl.full([64, BLOCK_N], 0.0, gl.float32, SCORES)
    for start_n in range(0, seqlen, BLOCK_N):
        mbarrier.expect(arrived, k.block_type.nbytes + v.block_type.nbytes)
        copy_to_shared(k, [origin + start_n, 0], arrived, k_tile)
        copy_to_shared(v, [origin + start_n, 0], arrived, v_tile)
        mbarrier.wait(arrived, phase)
        phase ^= 1
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores]) * scale_log2
        new_maximum = gl.maximum(maximum, gl.max(scores, 1))
        weights = gl.exp2(scores - new_maximum[:, None])
        correction = gl.exp2(maximum - new_maximum)
        total = total * correction + gl.sum(weights, 1)
        maximum = new_maximum
        acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUT))[:, None]
        operand = gl.convert_layout(weights.to(v.dtype), WEIGHTS)
        acc = warpgroup_mma(operand, v_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    rows = start_m + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    gl.store(out + rows[:, None].to(gl.int64) * HEAD_DIM + dims[None, :], acc.to(q.dtype))


def rows_of(tensor: Tensor, block: int) -> TensorDescriptor:
    """A descriptor of tiles of `block` rows."""
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[tensor.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([block, HEAD_DIM], dtype)
    return TensorDescriptor.from_tensor(tensor.view(-1, HEAD_DIM), [block, HEAD_DIM], layout)


def level(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; see harness.py for what q, k and v are."""
    heads, seqlen, _ = q.shape
    out = torch.empty_like(q)
    scale = LOG2_E * HEAD_DIM**-0.5
    operands = rows_of(q, 64), rows_of(k, 128), rows_of(v, 128)
    attention_fwd[(seqlen // 64, heads)](*operands, out, seqlen, scale, HEAD_DIM, 128, num_warps=4)
    return out


if __name__ == "__main__":
    sys.exit(main(level, needs_hopper=True))
