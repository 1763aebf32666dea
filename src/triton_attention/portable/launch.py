"""How does a call become kernel launches: outputs, arguments, Spec and Tile?

The plans are pure: they allocate and describe. So the same plan runs on a GPU and in Triton's interpreter and, made
with meta tensors, compiles for a GPU that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attention.arguments import (
    ABSENT,
    DTYPES,
    Argument,
    ceil_div,
    descriptor_strides,
    device_of,
    flat,
    has_aligned_rows,
    pointer_type,
    with_unit_last_stride,
)
from triton_attention.blocks import first_tile
from triton_attention.kernel import ForwardPlan, Launch, run
from triton_attention.philox import drop_below, kept_factor
from triton_attention.portable import backward as bwd
from triton_attention.portable import forward as fwd
from triton_attention.portable.bias import BiasTensor
from triton_attention.portable.configs import GPUS, Spec, Tile, gpu_family, tile_for, with_matrix_bias
from triton_attention.portable.heads import Extras as KernelExtras
from triton_attention.portable.heads import Slopes
from triton_attention.portable.schedule import Packing as PackingNumbers
from triton_attention.portable.tiles import Call, Strided
from triton_attention.problem import NO_EXTRAS, Extras, Mask

_LOG2_E = math.log2(math.e)
_SOFTCAPS = (1e-30, 1e30)  # beyond these a softcap or its reciprocal leaves float32, and no score tells them apart
_LARGEST_BLOCK = 256  # rows of a tile: offsets within it fit 32 bits while the stride of a row times this does


class Settings(NamedTuple):
    """What is computed from the tensors of a call, and for which family of GPUs."""

    mask: Mask
    softmax_scale: float
    family: str
    extras: Extras = NO_EXTRAS


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, softmax_scale: float, extras: Extras = NO_EXTRAS
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated call that is not empty; see `triton_attention.attention` and `attention_varlen`."""
    with device_of(q):
        settings = Settings(mask, softmax_scale, _family(q.device), extras)
        q, k, v = _of_four_axes(extras, q, k, v)
        plan = plan_forward(q, k, v, bias, settings)
        run(plan.launch)
    return (plan.out, plan.lse) if extras.packing is None else (plan.out[0], plan.lse[0])


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    mask: Mask, softmax_scale: float, needs_dbias: bool, extras: Extras = NO_EXTRAS, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv, dbias, dsink), each in the shape and dtype of its tensor; dbias is None unless it is needed.

    Each is `deterministic`, asked or not.
    """
    with device_of(q):
        settings = Settings(mask, softmax_scale, _family(q.device), extras)
        dout, q, k, v, out = _of_four_axes(extras, dout, q, k, v, out)
        plan = plan_backward(dout, dlse, q, k, v, bias, out, lse, settings, needs_dbias)
        for launch in plan.launches:
            run(launch)
        dbias = None if plan.dbias is None or bias is None else plan.dbias.sum_to_size(bias.shape).to(bias.dtype)
        dsink = None if extras.sink is None else _dsink(extras.sink, plan)
        gradients = (plan.dq, plan.dk, plan.dv)
        return *(gradients if extras.packing is None else (x[0] for x in gradients)), dbias, dsink


def _of_four_axes(extras: Extras, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors (total, heads, dim) as a batch of one."""
    return tensors if extras.packing is None else tuple(tensor[None] for tensor in tensors)


def _dsink(sink: Tensor, plan: BackwardPlan) -> Tensor:
    """- sum over the queries of a head of exp(sink - lse) * delta; lse is +inf in rows that do not count."""
    weights = torch.exp2((sink.float() * _LOG2_E)[:, None] - plan.lse_log2)
    return -(weights * plan.delta).sum(dim=(0, 2)).to(sink.dtype)


class BackwardPlan(NamedTuple):
    """The gradients, and the launches that fill them, in order.

    `dbias` has the shape and dtype of the bias, or is float32 with axes that are still to be summed.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    lse_log2: Tensor  # (batch, heads_q, seqlen_q padded), in units of log 2; of packed sequences (1, heads_q, ..)
    delta: Tensor
    launches: list[Launch]


def plan_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, settings: Settings) -> ForwardPlan:
    """Tensors have four axes; packed ones are a batch of one, and so are out and lse (1, heads_q, total_q)."""
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    planner = _Planner(q, k, v, bias, None, settings)
    launch = planner.launch(
        fwd.attention_fwd,
        lambda tile: planner.num_blocks(seqlen_q, tile.BLOCK_M) * heads,
        (planner.strided(out), flat(lse)),
    )
    return ForwardPlan(out, lse, launch)


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    settings: Settings, needs_dbias: bool,
) -> BackwardPlan:  # fmt: skip
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv = k.shape[1], k.shape[2]
    dout = with_unit_last_stride(dout)
    planner = _Planner(q, k, v, bias, dout, settings)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    kind, dbias = "none", None
    if needs_dbias and bias is not None:
        kind, dbias = planner.new_dbias(bias)

    padding = bwd.ROW_PADDING.value
    padded = planner.num_blocks(seqlen_q, padding) // batch * padding
    lse_log2, delta = q.new_empty(2, batch, heads, padded, dtype=torch.float32)
    rows = (flat(lse_log2), flat(delta))
    spec, tile = planner.variant("attention_bwd_rows")
    dlse_argument = ABSENT if dlse is None else flat(dlse.contiguous())
    read = (planner.strided(out), planner.strided(dout), flat(lse), dlse_argument, planner.extras)
    launches = [
        Launch(
            bwd.attention_bwd_rows,
            padded // tile.BLOCK_M * heads * batch,
            (*read, *rows, planner.call),
            spec,
            tile,
        ),
        planner.launch(
            bwd.attention_bwd_dkdv,
            lambda tile: planner.num_blocks(seqlen_k, tile.BLOCK_N) * heads_kv,
            (
                *rows,
                planner.strided(dk),
                planner.strided(dv),
                flat(dbias) if dbias is not None and kind == "cols" else ABSENT,
            ),
            "cols" if kind == "cols" else "none",
        ),
    ]
    along_queries = ABSENT
    if dbias is not None and kind in ("tile", "rows"):
        along_queries = _bias(dbias) if kind == "tile" else flat(dbias)
    launches.append(
        planner.launch(
            bwd.attention_bwd_dq,
            lambda tile: planner.num_blocks(seqlen_q, tile.BLOCK_M) * heads,
            (*rows, planner.strided(dq), along_queries),
            kind if kind in ("tile", "rows") else "none",
        )
    )
    if dbias is not None and kind == "shared":
        matrices = dbias.shape[0] * dbias.shape[1]
        rows_dbias, columns_dbias = dbias.shape[2:]
        sharing = bwd.Sharing(dbias.shape[1], planner.batch // dbias.shape[0], heads // dbias.shape[1])
        launches.append(
            planner.launch(
                bwd.attention_bwd_dbias,
                lambda tile: ceil_div(rows_dbias, tile.BLOCK_M) * ceil_div(columns_dbias, tile.BLOCK_N) * matrices,
                (*rows, _bias(dbias), Argument(sharing, bwd.Sharing("i32", "i32", "i32"))),
            )
        )
    return BackwardPlan(dq, dk, dv, dbias, lse_log2, delta, launches)


class _Planner:
    """The tensors that every kernel of a call reads, and the variants it needs."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dout: Tensor | None, settings: Settings
    ) -> None:
        heads, heads_kv = q.shape[2], k.shape[2]
        packing = settings.extras.packing
        self.packing = packing
        self.batch, self.seqlen_q, self.seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        if packing is not None:
            self.batch, self.seqlen_q, self.seqlen_k = packing.batch, packing.max_seqlen_q, packing.max_seqlen_k
        self.q, self.k, self.v = (with_unit_last_stride(tensor) for tensor in (q, k, v))
        self.dout = dout
        self.settings = settings
        self.bias, self.varies = None, (False, False)
        if bias is not None:
            bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
            self.varies = (bias.shape[2] > 1, bias.shape[3] > 1)
            bias = with_unit_last_stride(bias) if self.varies[1] else bias
            shape = (self.batch, heads, self.seqlen_q, self.seqlen_k)
            self.bias = bias.expand(shape)  # stride 0 along an axis that is broadcast
        self.bias_is_mask = bias is not None and bias.dtype == torch.uint8
        self.access = _access([x for x in (self.q, self.k, self.v, dout) if x is not None], settings.family)
        self.banded = (settings.mask.left is not None, settings.mask.right is not None)
        self.call = _call(self, settings, heads, heads // heads_kv)
        self.extras = _extras(self, settings, heads)

    def num_blocks(self, rows: int, block: int) -> int:
        """How many blocks of queries or keys all batch entries have; of packed sequences: at most."""
        return ceil_div(rows, block) * self.batch if self.packing is None else first_tile(rows, self.batch, block) + 1

    def strided(self, tensor: Tensor) -> Argument:
        """A (batch, seqlen, heads, dim) tensor; of a packed one the batch is counted in rows."""
        batch, row, head, _ = tensor.stride()
        types = Strided(pointer_type(tensor), *_stride_types(tensor, row))
        return Argument(Strided(tensor, batch if self.packing is None else row, head, row), types)

    def variant(self, kernel: str, dbias: str = "none") -> tuple[Spec, Tile]:
        head_dim, head_dim_v = self.q.shape[3], self.v.shape[3]
        extras = self.settings.extras
        capped, sloped = extras.softcap > 0.0, extras.alibi_slopes is not None
        spec = Spec(
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            BLOCK_D=_padded(head_dim),
            BLOCK_DV=_padded(head_dim_v),
            HAS_LOWER=self.banded[0],
            HAS_UPPER=self.banded[1],
            BIAS="none" if self.bias is None else "mask" if self.bias_is_mask else "added",
            BIAS_ROWS=self.varies[0],
            BIAS_COLS=self.varies[1],
            DBIAS=dbias,
            RAW_SCORES=self.bias is None and self.settings.softmax_scale > 0.0 and not capped and not sloped,
            SOFTCAP=capped,
            ALIBI=sloped,
            SINK=extras.sink is not None,
            DROPOUT=extras.seed is not None,
            VARLEN=self.packing is not None,
        )
        tile = tile_for(kernel, self.settings.family, self.access, spec)
        if tile.TMA and self.bias is not None and all(self.varies):
            # A descriptor of the bias would read beyond a packed sequence's part.
            described = self.packing is None and has_aligned_rows(self.bias)
            tile = with_matrix_bias(tile, self.bias.element_size(), described)
        return spec, tile

    def launch(
        self, kernel: Any, programs: Callable[[Tile], int], outputs: tuple[Argument, ...], dbias: str = "none"
    ) -> Launch:
        """A kernel over the operands that fills `outputs`, with as many programs as its tile asks for."""
        spec, tile = self.variant(kernel.__name__, dbias)
        return Launch(kernel, programs(tile), (*self.operands(spec, tile), *outputs, self.call), spec, tile)

    def operands(self, spec: Spec, tile: Tile) -> list[Argument]:
        """q, k, v, the bias, the extras, and in the backward dout."""
        if tile.TMA:
            arguments = [
                _descriptor(self.q.transpose(1, 2), tile.BLOCK_M, spec.BLOCK_D),
                _descriptor(self.k.transpose(1, 2), tile.BLOCK_N, spec.BLOCK_D),
                _descriptor(self.v.transpose(1, 2), tile.BLOCK_N, spec.BLOCK_DV),
            ]
        else:
            arguments = [self.strided(self.q), self.strided(self.k), self.strided(self.v)]
        if self.bias is None:
            arguments.append(ABSENT)
        elif tile.TMA_BIAS:
            arguments.append(_descriptor(self.bias, tile.BLOCK_M, tile.BLOCK_N))
        else:
            arguments.append(_bias(self.bias))
        arguments.append(self.extras)
        if self.dout is not None:
            dout = self.dout
            arguments.append(
                _descriptor(dout.transpose(1, 2), tile.BLOCK_M, spec.BLOCK_DV) if tile.TMA else self.strided(dout)
            )
        return arguments

    def new_dbias(self, bias: Tensor) -> tuple[str, Tensor]:
        """How the gradient of the bias is made, and the tensor that the kernels fill: see backward.py."""
        heads = self.q.shape[2]
        visits_all = self.packing is None and not any(self.banded)  # else what no program visits has to be 0
        if all(self.varies):
            new = torch.empty if visits_all or bias.shape[:2] != (self.batch, heads) else torch.zeros
            dbias = new(bias.shape, dtype=bias.dtype, device=bias.device)
            return "tile" if bias.shape[:2] == (self.batch, heads) else "shared", dbias
        new = torch.empty if self.packing is None else torch.zeros
        sizes = (1, self.seqlen_k) if self.varies[1] else (self.seqlen_q, 1)
        dbias = new(self.batch, heads, *sizes, dtype=torch.float32, device=bias.device)
        return "cols" if self.varies[1] else "rows", dbias


_CALL_TYPES = Call("i32", "i32", "i32", "i32", "i32", "i32", "fp32", "fp32")
_PACKING_TYPES = PackingNumbers("i32", "i32", "i32", "i32", "i32", "i32")


def _call(planner: _Planner, settings: Settings, heads: int, group: int) -> Argument:
    seqlen_q, seqlen_k, scale, mask = planner.seqlen_q, planner.seqlen_k, settings.softmax_scale, settings.mask
    packing = settings.extras.packing
    bounds = mask.bounds(seqlen_q, seqlen_k)
    if packing is not None:  # each sequence has a diagonal of its own, where the kernel counts the band from
        total_q, total_k = planner.q.shape[1], planner.k.shape[1]
        reach = max(total_q, total_k)
        bounds = -min(mask.left or 0, reach), min(mask.right or 0, reach)
    numbers = Call(seqlen_q, seqlen_k, heads, group, *bounds, scale, scale * _LOG2_E)
    if packing is None:
        return Argument(numbers, _CALL_TYPES)
    sizes = PackingNumbers(packing.batch, total_q, total_k, seqlen_q, seqlen_k, int(not mask.top_left))
    return Argument(numbers._replace(packing=sizes), _CALL_TYPES._replace(packing=_PACKING_TYPES))


def _padded(head_dim: int) -> int:
    """The power of two that holds a head dimension; matrix products want 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _stride_types(tensor: Tensor, row: int) -> tuple[str, str, str]:
    """Types of two outer strides and that of a row, with what is known of their divisibility."""
    multiple = 16 // tensor.element_size()
    hint = f":{multiple}" if all(stride % multiple == 0 for stride in tensor.stride()[:3]) else ""
    return f"i64{hint}", f"i64{hint}", f"{'i64' if row * _LARGEST_BLOCK >= 2**31 else 'i32'}{hint}"


def _bias(tensor: Tensor) -> Argument:
    """A (batch, heads, seqlen_q, seqlen_k) tensor."""
    batch, head, row, _ = tensor.stride()
    types = BiasTensor(pointer_type(tensor), *_stride_types(tensor, row))
    return Argument(BiasTensor(tensor, batch, head, row), types)


def _extras(planner: _Planner, settings: Settings, heads: int) -> Argument:
    """What few calls have; what is absent is None."""
    extras = settings.extras
    softcap = slopes = diagonal = sink = seed = threshold = factor = cu_seqlens_q = cu_seqlens_k = ABSENT
    if extras.softcap > 0.0:
        smallest, largest = _SOFTCAPS
        softcap = Argument(min(max(extras.softcap, smallest), largest) * _LOG2_E, "fp32")
    if extras.alibi_slopes is not None:
        strides = extras.alibi_slopes.expand(planner.batch, heads).stride()
        types = Slopes(pointer_type(extras.alibi_slopes), "i64", "i64")
        slopes = Argument(Slopes(extras.alibi_slopes, *strides), types)
        diagonal = Argument(settings.mask.diagonal(planner.seqlen_q, planner.seqlen_k), "i32")
    if extras.sink is not None:
        sink = flat(extras.sink.contiguous())
    if extras.seed is not None:
        seed, threshold = flat(extras.seed), Argument(drop_below(extras.dropout_p), "u32")
        factor = Argument(kept_factor(extras.dropout_p), "fp32")
    if extras.packing is not None:
        cu_seqlens_q, cu_seqlens_k = (flat(starts.contiguous()) for starts in extras.packing[:2])
    arguments = (softcap, slopes, diagonal, sink, seed, threshold, factor, cu_seqlens_q, cu_seqlens_k)
    if all(argument is ABSENT for argument in arguments):
        return ABSENT
    return Argument(KernelExtras(*(x.value for x in arguments)), KernelExtras(*(x.type for x in arguments)))


def _access(tensors: list[Tensor], family: str) -> str:
    """How tiles of these tensors can be read: see `configs.rows_for`."""
    if tensors[0].dtype == torch.float32:
        return "float32"
    if not all(has_aligned_rows(tensor) for tensor in tensors):
        return "elements"
    return "descriptors" if GPUS[family].descriptors else "vectors"


def _descriptor(tensor: Tensor, rows: int, columns: int) -> Argument:
    """Tiles (rows, columns) of the matrices of a (batch, heads, rows, columns) tensor."""
    block = [1, 1, rows, columns]
    descriptor: Any = TensorDescriptor(tensor, list(tensor.shape), descriptor_strides(tensor), block)
    return Argument(descriptor, f"tensordesc<{DTYPES[tensor.dtype]}{block}>")


@lru_cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    target = driver.active.get_current_target()
    return gpu_family(target.backend, target.arch)
