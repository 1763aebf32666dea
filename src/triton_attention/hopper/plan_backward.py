"""How does a backward call become kernel launches? The plan is as pure as that of the forward.

Two numbers a query first, then the kernel for dk, dv and sums for dq, then dq; and where a bias is shared, the kernel
for its gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from triton_attention.arguments import (
    ABSENT,
    Argument,
    ceil_div,
    flat,
    has_aligned_rows,
    pointer_type,
    with_unit_last_stride,
)
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

    addend = _Addend.of(bias, (batch, heads, seqlen_q, seqlen_k))
    kind = _kind_of_dbias(bias, q) if needs_dbias and bias is not None else "none"
    spec = BackwardSpec(
        block_d, block_dv, mask.left is not None, mask.right is not None, addend.kind, addend.varies_along_queries,
        kind if kind in ("keys", "tile") else "none",
    )  # fmt: skip
    tile = backward_tile_for(spec, addend.size)
    block_m, columns = tile.BLOCK_M, min(block_d, 64)
    blocks_m, group = ceil_div(seqlen_q, block_m), heads // heads_kv
    rows = q.new_empty(batch, heads, 2, blocks_m * block_m, dtype=torch.float32)
    sums = q.new_empty(1, 1, batch * heads * blocks_m * block_m * block_d // _PANEL, _PANEL, dtype=torch.float32)
    section = max(1, _SECTION_BYTES // (8 * blocks_m * block_m * block_d * group)) if mask.right is not None else 1
    numbers = BackwardCall(
        seqlen_q, seqlen_k, heads, group, batch, min(section, batch * heads_kv), *mask.bounds(seqlen_q, seqlen_k),
        softmax_scale, softmax_scale * _LOG2_E,
    )  # fmt: skip
    call = Argument(numbers, _CALL_TYPES)
    dbias, dbias_argument = _new_dbias(kind, bias, dlse, lse, mask, block_m)

    row_programs = blocks_m * heads * batch
    variant = (RowsSpec(head_dim, head_dim_v, block_d, block_dv), RowsTile(block_m, columns))
    dlse_argument = ABSENT if dlse is None else flat(dlse.contiguous())
    results = (_strided(out), _strided(dout), flat(lse), dlse_argument, addend.of_queries())
    operands = (
        _rows_of(q, block_m, block_d),
        _rows_of(k, _ROWS, block_d),
        _rows_of(v, _ROWS, block_dv),
        _rows_of(dout, block_m, block_dv),
        descriptor(rows, 1, block_m),
        addend.of_keys(block_m),
        descriptor(sums, block_m * columns // _PANEL, _PANEL),
        _rows_of(dk, _ROWS, block_d),
        _rows_of(dv, _ROWS, block_dv),
        dbias_argument,
        call,
    )
    key_programs = ceil_div(seqlen_k, _ROWS * tile.CONSUMERS) * heads_kv * batch
    launches = [
        Launch(attention_bwd_rows, row_programs, (*results, flat(rows), flat(sums), call), *variant),
        Launch(attention_bwd, key_programs, operands, spec, tile),
        Launch(attention_bwd_dq, row_programs, (flat(sums), _strided(dq), call), *variant),
    ]
    if bias is not None and kind == "shared":
        dbias, launch = _plan_shared_dbias((q, k, v, dout), bias, rows, call, spec, block_m, num_sms)
        launches.append(launch)
    return BackwardPlan(dq, dk, dv, dbias, bias, launches)


class _Addend(NamedTuple):
    """A bias or mask as the kernels read it."""

    kind: str  # "added" or "mask" if it varies along the keys, else "none"
    varies_along_queries: bool  # as well
    size: int  # bytes of a number
    tensor: Tensor | None  # (batch, heads_q, seqlen_q, seqlen_k)

    @classmethod
    def of(cls, bias: Tensor | None, sizes: tuple[int, int, int, int]) -> _Addend:
        if bias is None:
            return cls("none", False, 0, None)
        is_mask = bias.dtype == torch.bool
        if bias.shape[3] > 1:  # numbers of neighbouring keys are read as neighbours
            bias = with_unit_last_stride(bias)
        tensor = (bias.view(torch.uint8) if is_mask else bias).expand(sizes)
        if bias.shape[3] > 1:
            return cls("mask" if is_mask else "added", bias.shape[2] > 1, bias.element_size(), tensor)
        return cls("none", False, bias.element_size(), None if is_mask else tensor)  # such a mask shows in lse

    def of_queries(self) -> Argument:
        """A bias that does not vary along the keys: it is taken from lse."""
        return bias_tensor(self.tensor) if self.tensor is not None and self.kind == "none" else ABSENT

    def of_keys(self, block_m: int) -> Argument:
        """One that does: tiles, or one number a key."""
        if self.tensor is None or self.kind == "none":
            return ABSENT
        return descriptor(self.tensor, block_m, _ROWS) if self.varies_along_queries else bias_tensor(self.tensor)


def _new_dbias(
    kind: str, bias: Tensor | None, dlse: Tensor | None, lse: Tensor, mask: Mask, block_m: int
) -> tuple[Tensor | None, Argument]:
    """The gradient of a bias as far as it comes with dk and dv, and what the kernel writes of it."""
    if bias is not None and kind == "queries":
        # Over the keys dS sums up to rowsum(P dP) - delta, which is dlse, and to nothing where no key is visible.
        sums = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -math.inf, 0.0)
        return sums[..., None], ABSENT
    if bias is not None and kind == "keys":
        dbias = bias.new_empty(*lse.shape[:2], 1, bias.shape[3], dtype=torch.float32)
        return dbias, flat(dbias)
    if bias is not None and kind == "tile":
        new = bias.new_empty if mask[:2] == (None, None) else bias.new_zeros  # tiles outside a band are not visited
        multiple = 16 // bias.element_size()
        whole_rows = new(*bias.shape[:3], ceil_div(bias.shape[3], multiple) * multiple)  # descriptors want such
        dbias = whole_rows[..., : bias.shape[3]]
        return dbias, descriptor(dbias, block_m, _ROWS)
    return None, ABSENT


def _plan_shared_dbias(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor, rows: Tensor, call: Argument, spec: BackwardSpec,
    block_m: int, num_sms: int,
) -> tuple[Tensor, Launch]:  # fmt: skip
    """The gradient of a bias that batch entries or heads share, perhaps in parts that are still to be added."""
    q, k, v, dout = operands
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    matrices = bias.shape[0] * bias.shape[1]
    tiles = ceil_div(seqlen_q, _TILE_M) * ceil_div(seqlen_k, _TILE_N) * matrices
    splits = min(batch * heads // matrices, max(1, num_sms // tiles))
    dbias = bias.new_empty(splits, *bias.shape, dtype=bias.dtype if splits == 1 else torch.float32)
    sharing = Sharing(bias.shape[1], batch // bias.shape[0], heads // bias.shape[1], splits)
    head_dim = max(spec.BLOCK_D, spec.BLOCK_DV)
    columns = min(64, head_dim)
    arguments = (
        _rows_of(q, _ROWS, columns),
        _rows_of(k, _TILE_N, columns),
        _rows_of(v, _TILE_N, columns),
        _rows_of(dout, _ROWS, columns),
        descriptor(bias.expand(batch, heads, seqlen_q, seqlen_k), _ROWS, _TILE_N),
        flat(rows),
        flat(dbias),
        Argument(sharing, Sharing("i32", "i32", "i32", "i32")),
        call,
    )
    tile = bias_gradient_tile(head_dim, bias.element_size(), block_m)
    launch = Launch(attention_bwd_dbias, min(num_sms, tiles * splits), arguments, spec, tile)
    return dbias[0] if splits == 1 else dbias, launch


def _rows_of(tensor: Tensor, rows: int, columns: int) -> Argument:
    """Tiles of a (batch, seqlen, heads, head_dim) tensor."""
    return row_descriptors(tensor, rows, columns, 0)[0]


def _kind_of_dbias(bias: Tensor, q: Tensor) -> str:
    """How the gradient of a bias is made; see the kernels."""
    if bias.shape[3] == 1:
        return "queries"
    if bias.shape[2] == 1:
        return "keys"
    return "tile" if bias.shape[:2] == (q.shape[0], q.shape[2]) and bias.dtype == q.dtype else "shared"


def _padded(head_dim: int) -> int:
    return max(32, 1 << (head_dim - 1).bit_length())


def _strided(tensor: Tensor) -> Argument:
    """A (batch, seqlen, heads, dim) tensor whose last stride is 1."""
    batch, row, head, _ = tensor.stride()
    hint = ":8" if all(stride % 8 == 0 for stride in (batch, row, head)) else ""
    strides = Strided(tensor, batch, row, head)
    return Argument(strides, Strided(pointer_type(tensor), *(f"i64{hint}" for _ in range(3))))
