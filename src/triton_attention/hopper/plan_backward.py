"""How does a backward call become kernel launches? The plan is as pure as that of the forward.

Two numbers a query first, then the kernel for dk, dv and sums for dq, then dq; and where a bias is shared, the kernel
for its gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_attention.arguments import ABSENT, Argument, ceil_div, flat, has_aligned_rows, pointer_type
from triton_attention.hopper.backward import BackwardCall, attention_bwd
from triton_attention.hopper.bias_gradient import BLOCK_M, BLOCK_N, Sharing, attention_bwd_dbias
from triton_attention.hopper.configs import (
    BackwardSpec,
    RowsSpec,
    RowsTile,
    backward_tile_for,
    bias_gradient_tile,
)
from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.operands import bias_tensor, descriptor, row_descriptors
from triton_attention.hopper.rows import PANEL, Strided, attention_bwd_dq, attention_bwd_rows
from triton_attention.kernel import Launch
from triton_attention.problem import Mask

DIFFERENTIABLE_HEAD_DIM = 128  # the accumulators of dk and dv hold no more
_LOG2_E = math.log2(math.e)
_SECTION_BYTES = 24 << 20  # queries, their gradients, and the sums of dq, that stay in L2 together
_ROWS = WARPGROUP_ROWS.value
_PANEL = PANEL.value
_TILE_M, _TILE_N = BLOCK_M.value, BLOCK_N.value
_CALL_TYPES = BackwardCall("i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "fp32", "fp32")


class BackwardPlan(NamedTuple):
    """The gradients, and the launches that fill them, in order.

    `dbias` has the shape and dtype of the bias, or is float32 with axes that are still to be summed to `bias_shape`.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    bias: Tensor | None
    launches: list[Launch]

    def finish_dbias(self) -> Tensor | None:
        if self.dbias is None or self.bias is None:
            return None
        dbias = self.dbias.sum(0) if self.dbias.dim() > self.bias.dim() else self.dbias
        return dbias.sum_to_size(self.bias.shape).to(self.bias.dtype).contiguous()


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    mask: Mask, softmax_scale: float, needs_dbias: bool, num_sms: int,
) -> BackwardPlan:  # fmt: skip
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    block_d, block_dv = _padded(head_dim), _padded(head_dim_v)
    dout = dout if has_aligned_rows(dout) else dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    kind = _kind_of(bias, batch, heads, q.dtype) if needs_dbias and bias is not None else "none"
    operand, query_bias, bias_spec = ABSENT, ABSENT, ("none", False)
    bias_size = 0
    whole = None  # the bias with all its axes
    if bias is not None:
        rows_vary, columns_vary = bias.shape[2] > 1, bias.shape[3] > 1
        is_mask = bias.dtype == torch.bool
        bias_size = bias.element_size()
        addend = bias.view(torch.uint8) if is_mask else bias
        whole = addend.expand(batch, heads, seqlen_q, seqlen_k)
        if columns_vary:
            bias_spec = ("mask" if is_mask else "added", rows_vary)
        elif not is_mask:  # a mask of queries shows in their lse
            query_bias = bias_tensor(whole)
    spec = BackwardSpec(
        block_d, block_dv, mask.left is not None, mask.right is not None, *bias_spec,
        kind if kind in ("keys", "tile") else "none",
    )  # fmt: skip
    tile = backward_tile_for(spec, bias_size)
    if whole is not None and bias_spec != ("none", False):
        operand = descriptor(whole, tile.BLOCK_M, _ROWS) if spec.BIAS_ROWS else bias_tensor(whole)

    columns = min(block_d, 64)
    rows_spec = RowsSpec(head_dim, head_dim_v, block_d, block_dv)
    rows_tile = RowsTile(tile.BLOCK_M, columns)
    blocks_m = ceil_div(seqlen_q, tile.BLOCK_M)
    padded = blocks_m * tile.BLOCK_M
    rows = q.new_empty(batch, heads, 2, padded, dtype=torch.float32)
    sums = q.new_empty(1, 1, batch * heads * padded * block_d // _PANEL, _PANEL, dtype=torch.float32)
    group = heads // heads_kv
    section = max(1, _SECTION_BYTES // (8 * padded * block_d * group)) if mask.right is not None else 1
    numbers = BackwardCall(
        seqlen_q, seqlen_k, heads, group, batch, min(section, batch * heads_kv), *mask.bounds(seqlen_q, seqlen_k),
        softmax_scale, softmax_scale * _LOG2_E,
    )  # fmt: skip
    call = Argument(numbers, _CALL_TYPES)

    dbias, dbias_argument = None, ABSENT
    if bias is not None and kind == "keys":
        dbias = bias.new_empty(batch, heads, 1, seqlen_k, dtype=torch.float32)
        dbias_argument = flat(dbias)
    elif bias is not None and kind == "tile":
        dbias = _with_aligned_rows_like(bias, any(side is not None for side in mask[:2]))
        dbias_argument = descriptor(dbias, tile.BLOCK_M, _ROWS)
    elif bias is not None and kind == "queries":
        # dS sums up to rowsum(P dP) - delta, which is dlse, over the keys; to nothing where no key is visible.
        dlse_rows = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -math.inf, 0.0)
        dbias = dlse_rows[..., None]

    dlse_argument = ABSENT if dlse is None else flat(dlse.contiguous())
    row_programs = blocks_m * heads * batch
    arguments: tuple[Argument, ...]
    arguments = (_strided(out), _strided(dout), flat(lse), dlse_argument, query_bias, flat(rows), flat(sums), call)
    launches = [Launch(attention_bwd_rows, row_programs, arguments, rows_spec, rows_tile)]
    arguments = (
        row_descriptors(q, tile.BLOCK_M, block_d, 0)[0],
        row_descriptors(k, _ROWS, block_d, 0)[0],
        row_descriptors(v, _ROWS, block_dv, 0)[0],
        row_descriptors(dout, tile.BLOCK_M, block_dv, 0)[0],
        descriptor(rows, 1, tile.BLOCK_M),
        operand,
        descriptor(sums, tile.BLOCK_M * columns // _PANEL, _PANEL),
        row_descriptors(dk, _ROWS, block_d, 0)[0],
        row_descriptors(dv, _ROWS, block_dv, 0)[0],
        dbias_argument,
        call,
    )
    key_programs = ceil_div(seqlen_k, _ROWS * tile.CONSUMERS) * heads_kv * batch
    launches.append(Launch(attention_bwd, key_programs, arguments, spec, tile))
    launches.append(Launch(attention_bwd_dq, row_programs, (flat(sums), _strided(dq), call), rows_spec, rows_tile))

    if bias is not None and kind == "shared":
        matrices = bias.shape[0] * bias.shape[1]
        tiles = ceil_div(seqlen_q, _TILE_M) * ceil_div(seqlen_k, _TILE_N) * matrices
        sharers = batch * heads // matrices
        splits = min(sharers, max(1, num_sms // tiles))
        dtype = bias.dtype if splits == 1 else torch.float32
        dbias = bias.new_empty(splits, *bias.shape, dtype=dtype)
        sharing = Sharing(bias.shape[1], batch // bias.shape[0], heads // bias.shape[1], splits)
        width = min(64, max(block_d, block_dv))
        arguments = (
            row_descriptors(q, _ROWS, width, 0)[0],
            row_descriptors(k, _TILE_N, width, 0)[0],
            row_descriptors(v, _TILE_N, width, 0)[0],
            row_descriptors(dout, _ROWS, width, 0)[0],
            descriptor(bias.expand(batch, heads, seqlen_q, seqlen_k), _ROWS, _TILE_N),
            flat(rows),
            flat(dbias),
            Argument(sharing, Sharing("i32", "i32", "i32", "i32")),
            call,
        )
        shared_tile = bias_gradient_tile(max(block_d, block_dv), bias_size, tile.BLOCK_M)
        launches.append(Launch(attention_bwd_dbias, min(num_sms, tiles * splits), arguments, spec, shared_tile))
        dbias = dbias[0] if splits == 1 else dbias
    return BackwardPlan(dq, dk, dv, dbias, bias, launches)


def _kind_of(bias: Tensor, batch: int, heads: int, dtype: torch.dtype) -> str:
    """How the gradient of a bias is made; see the kernels."""
    if bias.shape[3] == 1:
        return "queries"
    if bias.shape[2] == 1:
        return "keys"
    return "tile" if bias.shape[:2] == (batch, heads) and bias.dtype == dtype else "shared"


def _padded(head_dim: int) -> int:
    return max(32, 1 << (head_dim - 1).bit_length())


def _with_aligned_rows_like(bias: Tensor, banded: bool) -> Tensor:
    """A new tensor of the bias's shape that descriptors can write; zeros if tiles outside a band are not visited."""
    *outer, seqlen_k = bias.shape
    multiple = 16 // bias.element_size()
    new = bias.new_zeros if banded else bias.new_empty
    return new(*outer, ceil_div(seqlen_k, multiple) * multiple)[..., :seqlen_k]


def _strided(tensor: Tensor) -> Argument:
    """A (batch, seqlen, heads, dim) tensor whose last stride is 1."""
    batch, row, head, _ = tensor.stride()
    hint = ":8" if all(stride % 8 == 0 for stride in (batch, row, head)) else ""
    strides = Strided(tensor, batch, row, head)
    return Argument(strides, Strided(pointer_type(tensor), *(f"i64{hint}" for _ in range(3))))
