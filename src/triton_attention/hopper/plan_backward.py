"""How does a backward call become kernel launches? The plan is as pure as that of the forward.

Two numbers a query first, then the kernel for dk, dv and sums for dq, then dq. Where dq is to be the same in every run,
and where heads are wide, dq has a kernel of its own. Where a bias is shared, its gradient has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_attention.arguments import (
    ABSENT,
    Argument,
    ceil_div,
    flat,
    pointer_type,
    with_unit_last_stride,
)
from triton_attention.blocks import first_tile
from triton_attention.hopper.backward import attention_bwd
from triton_attention.hopper.backward_call import BackwardCall
from triton_attention.hopper.backward_queries import attention_bwd_queries
from triton_attention.hopper.backward_wide import attention_bwd_wide
from triton_attention.hopper.bias_gradient import BLOCK_M, BLOCK_N, Sharing, attention_bwd_dbias
from triton_attention.hopper.configs import (
    REGISTER_HEAD_DIM,
    BackwardSpec,
    BackwardTile,
    RowsSpec,
    RowsTile,
    bias_gradient_tile,
    kept_tile_for,
    keys_tile_for,
    padded_head_dim,
    queries_tile_for,
    takes_turns,
)
from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.operands import (
    bias_tensor,
    descriptor,
    extras_argument,
    packing_argument,
    relative_bounds,
    row_descriptors,
    softcap_of,
    split_columns,
)
from triton_attention.hopper.rows import PANEL, Strided, attention_bwd_dq, attention_bwd_rows
from triton_attention.kernel import Launch
from triton_attention.philox import kept_factor
from triton_attention.problem import Extras, Mask

_LOG2_E = math.log2(math.e)
_SECTION_BYTES = 24 << 20  # queries, their gradients, and the sums of dq, that stay in L2 together
_FEW_ROWS = 1 << 14  # of a head, whose sums of dq may be padding
_SPLITS_OF_SEVERAL_ROUNDS = 8  # at most; each is a float32 copy of the gradient
_ROWS = WARPGROUP_ROWS.value
_PANEL = PANEL.value
_TILE_M, _TILE_N = BLOCK_M.value, BLOCK_N.value
_CALL_TYPES = BackwardCall(*("i32",) * 9, "fp32", "fp32", "i32")


class SinkRows(NamedTuple):
    """A sink, and the numbers of the queries that its gradient is made of."""

    sink: Tensor
    lse: Tensor
    rows: Tensor  # see `attention_bwd_rows`
    packed: bool
    kept_factor: float  # of dropout, by which its -delta is divided

    def dscores(self) -> Tensor:
        """dS of the sink, for which dP = 0: - exp(sink - lse) delta, (batch, heads_q, seqlen_q).

        Of packed sequences (1, heads_q, total_q padded), and 0 where there is no query.
        """
        if self.packed:  # the factor of dropout is in both numbers, and cancels
            lse, negative_delta = self.rows.unbind(2)
            return torch.exp2(self.sink.float()[:, None] * _LOG2_E - lse) * negative_delta
        lse = self.lse.masked_fill(self.lse == -math.inf, math.inf)
        probability = torch.exp(self.sink.float()[:, None] - lse)
        return probability * self.rows[:, :, 1, : lse.shape[2]] * self.kept_factor


class BackwardPlan(NamedTuple):
    """The gradients, and the launches that fill them, in order.

    `dbias` has the shape and dtype of the bias, or is float32 with axes that are still to be summed to its shape.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    bias: Tensor | None
    sink_rows: SinkRows | None
    launches: list[Launch]

    def finish_dbias(self) -> Tensor | None:
        if self.dbias is None or self.bias is None:
            return None
        dbias = self.dbias.sum(0) if self.dbias.dim() > self.bias.dim() else self.dbias
        if self.bias.shape[3] == 1 and self.sink_rows is not None:  # what the keys' sum lacks is the sink's
            dbias = dbias - self.sink_rows.dscores()[..., None]
        return dbias.sum_to_size(self.bias.shape).to(self.bias.dtype).contiguous()

    def finish_dsink(self) -> Tensor | None:
        if self.sink_rows is None:
            return None
        return self.sink_rows.dscores().sum(dim=(0, 2)).to(self.sink_rows.sink.dtype)


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    mask: Mask, softmax_scale: float, needs_dbias: bool, extras: Extras, deterministic: bool, num_sms: int,
) -> BackwardPlan:  # fmt: skip
    """Tensors have four axes; packed ones are a batch of one, and so is lse (1, heads_q, total_q).

    Rows of dout are aligned and dlse is contiguous: a plan does not compute.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    columns, columns_v = _columns(head_dim), _columns(head_dim_v)
    matrices, group = batch * heads, heads // heads_kv
    bounds = mask.bounds(seqlen_q, seqlen_k)
    packing, packed = extras.packing, extras.packing is not None
    if packing is not None:
        bounds = relative_bounds(mask, seqlen_q, seqlen_k)
        batch, seqlen_q, seqlen_k = packing.batch, packing.max_seqlen_q, packing.max_seqlen_k
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    addend = _Addend.of(bias, (batch, heads, seqlen_q, seqlen_k))
    kind = _kind_of_dbias(bias, q, extras) if needs_dbias and bias is not None else "none"
    dbias = _new_dbias(kind, bias, dlse, lse, mask)
    spec = BackwardSpec(
        *columns, *columns_v, mask.left is not None, mask.right is not None, addend.kind, addend.varies_along_queries,
        SOFTCAP=extras.softcap > 0.0, ALIBI=extras.alibi_slopes is not None, DROPOUT=extras.seed is not None,
        VARLEN=packed,
    )  # fmt: skip
    blocks_m = ceil_div(seqlen_q, _ROWS) if packing is None else first_tile(q.shape[1], batch, _ROWS) + 1
    way = _way_of_dq(q, k, spec, addend, blocks_m, deterministic, num_sms)
    dbias_of_keys = kind if kind == "keys" or (kind == "tile" and way != "apart") else "none"  # a tile comes with dq
    spec_of_keys = replace(spec, DBIAS=dbias_of_keys, DQ=way)
    tile_of_keys = kept_tile_for(spec, addend.size, seqlen_q) if way == "kept" else None
    tile_of_keys = tile_of_keys or keys_tile_for(spec_of_keys, addend.size, k.shape[1])
    block_m = tile_of_keys.BLOCK_M
    blocks_m = ceil_div(blocks_m * _ROWS, block_m)
    rows = q.new_empty(q.shape[0], heads, 2, blocks_m * block_m, dtype=torch.float32)
    row_bytes = (8 if way == "added" else 4) * sum(columns)  # of q and dout, and of the sums of dq
    bytes_of_queries = row_bytes * ceil_div(seqlen_q, block_m) * block_m * group
    section, last_section = 1, 1
    if mask.right is not None and way != "kept":
        section = max(1, _SECTION_BYTES // bytes_of_queries)
        if mask.left is None and not packed:
            # With two blocks a program or more, the last ones are short, and no program is alone with a long one.
            last_section = ceil_div(2 * num_sms, max(1, seqlen_k // (2 * _ROWS)))
    without_sink = extras._replace(sink=None)  # it is in lse
    kernel_extras = extras_argument(without_sink, batch, heads, mask.diagonal(seqlen_q, seqlen_k))
    sequences = packing_argument(packing, q.shape[1], k.shape[1], mask)
    numbers = BackwardCall(
        seqlen_q, seqlen_k, heads, group, batch, min(section, matrices // group), last_section, *bounds, softmax_scale,
        softmax_scale / softcap_of(extras) if spec.SOFTCAP else softmax_scale * _LOG2_E, blocks_m * block_m,
        kernel_extras.value, sequences.value,
    )  # fmt: skip
    call = Argument(numbers, _CALL_TYPES._replace(extras=kernel_extras.type, packing=sequences.type))
    counter = Argument(q.new_empty(1, dtype=torch.int32), "*i32:16") if takes_turns(spec_of_keys) else ABSENT
    tensors = _Tensors(q, k, v, dout, rows, addend, dq, dk, dv, dbias, counter, call, num_sms)

    row_programs = blocks_m * matrices
    rows_spec = RowsSpec(head_dim, head_dim_v, *columns, _padded(head_dim_v), packed, spec.DROPOUT)
    variant = (rows_spec, RowsTile(block_m, min(spec.BLOCK_D, 64)))
    dlse_argument = ABSENT if dlse is None else flat(dlse)
    results = (_strided(out, packed), _strided(dout, packed), flat(lse), dlse_argument, addend.of_queries(), flat(rows))
    if way == "kept":
        launches = [
            Launch(attention_bwd_rows, row_programs, (*results, ABSENT, ABSENT, call), *variant),
            tensors.launch_of_keys(spec_of_keys, tile_of_keys, None),
        ]
    elif way == "added":
        sums = q.new_empty(1, 1, row_programs * block_m * sum(columns) // _PANEL, _PANEL, dtype=torch.float32)
        launches = [
            Launch(attention_bwd_rows, row_programs, (*results, flat(sums), counter, call), *variant),
            tensors.launch_of_keys(spec_of_keys, tile_of_keys, sums),
            Launch(attention_bwd_dq, row_programs, (flat(sums), _strided(dq, packed), call), *variant),
        ]
    else:
        launches = [
            Launch(attention_bwd_rows, row_programs, (*results, ABSENT, counter, call), *variant),
            tensors.launch_of_keys(spec_of_keys, tile_of_keys, None),
            tensors.launch_of_queries(replace(spec, DBIAS="tile" if kind == "tile" else "none")),
        ]
    if bias is not None and kind == "shared":
        dbias, launch = _plan_shared_dbias((q, k, v, dout), bias, rows, call, spec, num_sms)
        launches.append(launch)
    sink_rows = None if extras.sink is None else SinkRows(extras.sink, lse, rows, packed, kept_factor(extras.dropout_p))
    return BackwardPlan(dq, dk, dv, dbias, bias, sink_rows, launches)


def _way_of_dq(
    q: Tensor, k: Tensor, spec: BackwardSpec, addend: _Addend, blocks_m: int, deterministic: bool, num_sms: int
) -> str:
    """How dq is made, see `BackwardSpec.DQ`."""
    if padded_head_dim(spec) > REGISTER_HEAD_DIM or (spec.BLOCK_D, spec.TAIL_D) != (spec.BLOCK_DV, spec.TAIL_DV):
        return "apart"  # dk takes the way of dv
    batch, seqlen_q, heads, _ = q.shape
    # One after the other for each program: few would leave multiprocessors idle in the last round.
    has_matrices = not spec.VARLEN and heads == k.shape[2] and batch * heads >= 4 * num_sms
    if has_matrices and kept_tile_for(spec, addend.size, seqlen_q) is not None:
        return "kept"
    # Of many short sequences the sums would be mostly padding.
    padded = spec.VARLEN and blocks_m * _ROWS > max(2 * seqlen_q, _FEW_ROWS)
    return "apart" if deterministic or padded else "added"


class _Tensors(NamedTuple):
    """What the kernels that make dq, dk and dv read and write."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    rows: Tensor
    addend: _Addend
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    counter: Argument  # of blocks of keys that programs take in turn; absent where each has one
    call: Argument
    num_sms: int

    def launch_of_keys(self, spec: BackwardSpec, tile: BackwardTile, dq_sums: Tensor | None) -> Launch:
        """The kernel for dk and dv."""
        columns, columns_v = (spec.BLOCK_D, spec.TAIL_D), (spec.BLOCK_DV, spec.TAIL_DV)
        inputs = (
            *row_descriptors(self.q, tile.BLOCK_M, *columns, spec.VARLEN),
            *row_descriptors(self.k, _ROWS, *columns, spec.VARLEN),
            *row_descriptors(self.v, _ROWS, *columns_v, spec.VARLEN),
            *row_descriptors(self.dout, tile.BLOCK_M, *columns_v, spec.VARLEN),
            descriptor(self.rows, 1, tile.BLOCK_M),
            self.addend.of_keys(tile.BLOCK_M, _ROWS),
        )
        gradients = (
            *row_descriptors(self.dk, _ROWS, *columns, spec.VARLEN),
            *row_descriptors(self.dv, _ROWS, *columns_v, spec.VARLEN),
            self._dbias_argument(spec, tile.BLOCK_M, _ROWS),
        )
        heads_kv = self.k.shape[2]
        blocks = self._blocks_of(self.k, _ROWS * tile.CONSUMERS) * heads_kv
        if padded_head_dim(spec) > REGISTER_HEAD_DIM:
            return Launch(attention_bwd_wide, blocks, (*inputs, *gradients, self.call), spec, tile)
        programs = blocks if self.counter is ABSENT else min(blocks, self.num_sms)
        dq = (ABSENT, ABSENT)
        if spec.DQ == "kept":
            programs = min(self.q.shape[0] * self.q.shape[2], self.num_sms)
            dq = row_descriptors(self.dq, _ROWS, *columns)
        elif dq_sums is not None:
            dq = _pieces_of(dq_sums, tile.BLOCK_M, *columns)
        return Launch(attention_bwd, programs, (*inputs, *dq, *gradients, self.counter, self.call), spec, tile)

    def launch_of_queries(self, spec: BackwardSpec) -> Launch:
        """The kernel for dq, where that for dk and dv does not add it up."""
        tile = queries_tile_for(spec, self.addend.size, self.k.shape[1])
        columns, columns_v = (spec.BLOCK_D, spec.TAIL_D), (spec.BLOCK_DV, spec.TAIL_DV)
        arguments = (
            *row_descriptors(self.q, _ROWS, *columns, spec.VARLEN),
            *row_descriptors(self.k, tile.BLOCK_N, *columns, spec.VARLEN),
            *row_descriptors(self.v, tile.BLOCK_N, *columns_v, spec.VARLEN),
            *row_descriptors(self.dout, _ROWS, *columns_v, spec.VARLEN),
            flat(self.rows),
            self.addend.of_keys(_ROWS, tile.BLOCK_N),
            *row_descriptors(self.dq, _ROWS, *columns, spec.VARLEN),
            self._dbias_argument(spec, _ROWS, tile.BLOCK_N),
            self.call,
        )
        programs = self._blocks_of(self.q, _ROWS * tile.CONSUMERS) * self.q.shape[2]
        return Launch(attention_bwd_queries, programs, arguments, spec, tile)

    def _blocks_of(self, tensor: Tensor, block: int) -> int:
        """How many blocks of rows the batch entries of a head have; packed sequences: at most."""
        batch, rows = tensor.shape[:2]
        call: Any = self.call.value
        return ceil_div(rows, block) * batch if call.packing is None else first_tile(rows, call.batch, block) + 1

    def _dbias_argument(self, spec: BackwardSpec, block_m: int, block_n: int) -> Argument:
        if self.dbias is None or spec.DBIAS == "none":
            return ABSENT
        return flat(self.dbias) if spec.DBIAS == "keys" else descriptor(self.dbias, block_m, block_n)


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
        return cls("none", False, bias.element_size(), tensor)

    def of_queries(self) -> Argument:
        """A bias that does not vary along the keys: it is taken from lse."""
        return bias_tensor(self.tensor) if self.tensor is not None and self.kind == "none" else ABSENT

    def of_keys(self, block_m: int, block_n: int) -> Argument:
        """One that does: tiles, or one number a key."""
        if self.tensor is None or self.kind == "none":
            return ABSENT
        return descriptor(self.tensor, block_m, block_n) if self.varies_along_queries else bias_tensor(self.tensor)


def _new_dbias(kind: str, bias: Tensor | None, dlse: Tensor | None, lse: Tensor, mask: Mask) -> Tensor | None:
    """The gradient of a bias that is not shared, or memory for it."""
    if bias is None or kind in ("none", "shared"):
        return None
    if kind == "queries":
        # Over keys and sink dS sums up to rowsum(P dP) - delta, which is dlse; to nothing where no key is visible.
        sums = torch.zeros_like(lse) if dlse is None else dlse.masked_fill(lse == -math.inf, 0.0)
        return sums[..., None]
    if kind == "keys":
        return bias.new_empty(*lse.shape[:2], 1, bias.shape[3], dtype=torch.float32)
    new = bias.new_empty if mask[:2] == (None, None) else bias.new_zeros  # tiles outside a band are not visited
    return _with_whole_rows(new, bias.shape, bias.dtype)


def _with_whole_rows(new: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor whose rows begin at multiples of 16 bytes, as descriptors want."""
    multiple = 16 // dtype.itemsize
    return new(*shape[:3], ceil_div(shape[3], multiple) * multiple, dtype=dtype)[..., : shape[3]]


def _plan_shared_dbias(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor, rows: Tensor, call: Argument, spec: BackwardSpec,
    num_sms: int,
) -> tuple[Tensor, Launch]:  # fmt: skip
    """The gradient of a bias that batch entries or heads share, perhaps in parts that are still to be added."""
    q, k, v, dout = operands
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    matrices = bias.shape[0] * bias.shape[1]
    tiles = ceil_div(seqlen_q, _TILE_M) * ceil_div(seqlen_k, _TILE_N) * matrices
    splits = _splits(tiles, batch * heads // matrices, num_sms)
    sharing = Sharing(bias.shape[1], batch // bias.shape[0], heads // bias.shape[1], splits)
    head_dim = padded_head_dim(spec)
    columns = min(64, head_dim)
    dtype = bias.dtype if splits == 1 else torch.float32
    dbias = _with_whole_rows(bias.new_empty, (splits * bias.shape[0], *bias.shape[1:]), dtype)
    arguments = (
        _rows_of(q, _ROWS, columns),
        _rows_of(k, _TILE_N, columns),
        _rows_of(v, _TILE_N, columns),
        _rows_of(dout, _ROWS, columns),
        descriptor(bias.expand(batch, heads, seqlen_q, seqlen_k), _ROWS, _TILE_N),
        descriptor(rows, 1, _ROWS),
        descriptor(dbias, _ROWS, _TILE_N),
        Argument(sharing, Sharing("i32", "i32", "i32", "i32")),
        call,
    )
    tile = bias_gradient_tile(head_dim, bias.element_size(), dtype.itemsize)
    launch = Launch(attention_bwd_dbias, min(num_sms, tiles * splits), arguments, spec, tile)
    return dbias if splits == 1 else dbias.unflatten(0, (splits, bias.shape[0])), launch


def _splits(tiles: int, sharers: int, num_sms: int) -> int:
    """How many programs divide the sharers of a tile among them, where there are fewer tiles than multiprocessors.

    As few as come within a twentieth of the shortest time: rounds of programs, each of which takes 1 / splits.
    """
    if tiles >= num_sms:
        return 1
    most = min(sharers, max(_SPLITS_OF_SEVERAL_ROUNDS, num_sms // tiles))
    times = {splits: ceil_div(tiles * splits, num_sms) / splits for splits in range(1, most + 1)}
    shortest = min(times.values())
    return next(splits for splits, time in times.items() if time <= 1.05 * shortest)


def _rows_of(tensor: Tensor, rows: int, columns: int) -> Argument:
    """Tiles of a (batch, seqlen, heads, head_dim) tensor."""
    return row_descriptors(tensor, rows, columns, 0)[0]


def _pieces_of(dq_sums: Tensor, block_m: int, block_d: int, tail_d: int) -> tuple[Argument, Argument]:
    """The rows of the matrix as which 64 columns of the sums of dq lie, or all of a narrower block, and those of the
    tail."""
    block = descriptor(dq_sums, block_m * min(block_d, 64) // _PANEL, _PANEL)
    return block, descriptor(dq_sums, block_m * tail_d // _PANEL, _PANEL) if tail_d else ABSENT


def _kind_of_dbias(bias: Tensor, q: Tensor, extras: Extras) -> str:
    """How the gradient of a bias is made; see the kernels."""
    if bias.shape[3] == 1:
        return "queries"
    if bias.shape[2] == 1:
        return "keys"
    is_dscores = extras.softcap == 0.0 and bias.dtype == q.dtype  # what makes dq and dk
    return "tile" if is_dscores and bias.shape[:2] == (q.shape[0], q.shape[2]) else "shared"


def _padded(head_dim: int) -> int:
    return max(32, 1 << (head_dim - 1).bit_length())


def _columns(head_dim: int) -> tuple[int, int]:
    """As what a head dimension is computed: BLOCK and TAIL; one of 256 whole, which a warpgroup has registers for."""
    block, tail = split_columns(head_dim)
    return (2 * block, 0) if tail == block else (block, tail)


def _strided(tensor: Tensor, packed: bool) -> Argument:
    """A (batch, seqlen, heads, dim) tensor whose last stride is 1; of a packed one the batch is counted in rows."""
    batch, row, head, _ = tensor.stride()
    batch = row if packed else batch
    hint = ":8" if all(stride % 8 == 0 for stride in (batch, row, head)) else ""
    strides = Strided(tensor, batch, row, head)
    return Argument(strides, Strided(pointer_type(tensor), *(f"i64{hint}" for _ in range(3))))
