"""How does a call become a kernel launch: outputs, arguments, Spec and Tile?

The plan is pure: it allocates and describes. So the same plan runs on a GPU and, made with meta tensors, compiles for
one that is not there.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from triton_attention import recipes
from triton_attention.arguments import ABSENT, Argument, ceil_div, device_of, flat, has_aligned_rows
from triton_attention.blocks import first_tile
from triton_attention.eager import layout
from triton_attention.hopper.channel import PACKED_ROWS
from triton_attention.hopper.configs import Spec, tile_for
from triton_attention.hopper.forward import attention_fwd
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
    with_aligned_rows,
)
from triton_attention.hopper.plan_backward import BackwardPlan, plan_backward
from triton_attention.hopper.schedule import Call
from triton_attention.kernel import ForwardPlan, Launch, run
from triton_attention.problem import NO_EXTRAS, Extras, Mask, read_by_rows

_LOG2_E = math.log2(math.e)
_ROWS = WARPGROUP_ROWS.value
_SECTION_BYTES = 32 << 20  # keys and values that stay in L2 together
_LEAST_SCALE = 2.0**-20  # that ALiBi's slopes are divided by


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, softmax_scale: float, extras: Extras = NO_EXTRAS,
    *, known: object = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """(out, lse) of a validated call that is not empty; see `triton_attention.attention` and `attention_varlen`.

    None where the rows of q, k, v or a matrix of bias are not aligned: an eager call that asks the backend's `support`
    does not come here with those, but a graph of torch.compile learns strides and addresses only when it runs.

    Without extras, what follows from the layout of the tensors is worked out once, see `recipes`; `known`, if there is
    such an object, stands for it.
    """
    device = q.device

    def make(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> ForwardPlan | None:
        if not _takes(q, k, v, bias):
            return None
        return plan_forward(q, k, v, bias, mask, softmax_scale, _num_sms(device), extras)

    if known is None:
        known = (mask, softmax_scale, *map(layout, (q, k, v, bias)))
    with device_of(q):
        if extras.absent:
            plan = recipes.run(known, make, (q, k, v, bias))
            return None if plan is None else (plan.out, plan.lse)
        if extras.packing is not None:
            q, k, v = q[None], k[None], v[None]
        plan = make(q, k, v, bias)
        if plan is None:
            return None
        run(plan.launch)
        return (plan.out, plan.lse) if extras.packing is None else (plan.out[0], plan.lse[0])


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    mask: Mask, softmax_scale: float, needs_dbias: bool, extras: Extras, deterministic: bool, *, known: object = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None:  # fmt: skip
    """(dq, dk, dv, dbias, dsink), each in the shape and dtype of its tensor; dbias is None unless it is needed.

    With `deterministic` dq is added up in a fixed order. None where rows are not aligned, and where the backward does
    not take the extras.

    `known` is as in `forward`, and stands for the mask and the scale and for the layouts of all tensors.
    """
    if not differentiates(extras, bias is not None):
        return None
    device, packed = q.device, extras.packing is not None
    if packed:
        dout, q, k, v, out, lse = (x[None] for x in (dout, q, k, v, out, lse))

    def make(
        dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor,
        lse: Tensor,
    ) -> BackwardPlan | None:  # fmt: skip
        if not _takes(q, k, v, bias):
            return None
        numbers = (mask, softmax_scale, needs_dbias, extras, deterministic, _num_sms(device))
        return plan_backward(dout, dlse, q, k, v, bias, out, lse, *numbers)

    if known is None:
        known = (mask, softmax_scale, *map(layout, (dout, dlse, q, k, v, bias, out, lse)))
    # What is copied is copied here, so that plans do not compute.
    dout = dout if has_aligned_rows(dout) else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    tensors = (dout, dlse, q, k, v, bias, out, lse)
    with device_of(q):
        if extras.absent:
            plan = recipes.run((known, needs_dbias, deterministic), make, tensors)
        else:
            plan = make(*tensors)
            for launch in () if plan is None else plan.launches:
                run(launch)
        if plan is None:
            return None
        dq, dk, dv = (x[0] if packed else x for x in (plan.dq, plan.dk, plan.dv))
        return dq, dk, dv, plan.finish_dbias(), plan.finish_dsink()


def differentiates(extras: Extras, has_bias: bool) -> bool:
    """Whether the backward kernels take what few calls have: no bias of packed sequences."""
    return extras.packing is None or not has_bias


def _takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether rows are aligned, and no more than a tensor descriptor of packed ones has."""
    return all(map(has_aligned_rows, read_by_rows(q, k, v, bias))) and max(q.shape[1], k.shape[1]) <= PACKED_ROWS.value


def _new_counter(like: Tensor) -> Tensor:
    """The number that programs count up where they take tiles as they come: see `schedule.next_tile`."""
    return like.new_zeros(1, dtype=torch.int32)


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, softmax_scale: float, num_sms: int,
    extras: Extras = NO_EXTRAS,
) -> ForwardPlan:  # fmt: skip
    """Tensors have four axes; packed ones are a batch of one, and so are out and lse (1, heads_q, total_q)."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_kv, head_dim_v = v.shape[1:]
    out = q.new_empty(batch, seqlen_q, heads, head_dim_v)
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    packing, packed = extras.packing, extras.packing is not None
    bounds = mask.bounds(seqlen_q, seqlen_k)
    if packing is not None:
        bounds = relative_bounds(mask, seqlen_q, seqlen_k)
        batch, seqlen_q, seqlen_k = packing.batch, packing.max_seqlen_q, packing.max_seqlen_k
    varies = (False, False)
    shared = False
    if bias is not None:
        bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
        varies = (bias.shape[2] > 1, bias.shape[3] > 1)
        shared = all(varies) and bias.shape[0] == 1 and not packed
        if varies[1] and not varies[0]:
            bias = with_aligned_rows(bias)  # a few numbers
        bias = bias.expand(batch, heads, seqlen_q, seqlen_k)
    capped, sloped = extras.softcap > 0.0, extras.alibi_slopes is not None
    spec = Spec(
        BLOCK_D=split_columns(head_dim)[0],
        BLOCK_DV=split_columns(head_dim_v)[0],
        TAIL_D=split_columns(head_dim)[1],
        TAIL_DV=split_columns(head_dim_v)[1],
        HAS_LOWER=mask.left is not None,
        HAS_UPPER=mask.right is not None,
        BIAS="none" if bias is None else "mask" if bias.dtype == torch.uint8 else "added",
        BIAS_ROWS=varies[0],
        BIAS_COLS=varies[1],
        BIAS_SHARED=shared,
        RAW_SCORES=bias is None and not capped and softmax_scale > (_LEAST_SCALE if sloped else 0.0),
        UNEVEN=packed or (mask.left is None and mask.right is not None),
        SOFTCAP=capped,
        ALIBI=sloped,
        DROPOUT=extras.seed is not None,
        VARLEN=packed,
        SINK=extras.sink is not None,
    )
    tile = tile_for(spec, 0 if bias is None else bias.element_size(), seqlen_k)
    group = heads // heads_kv
    block_m = tile.CONSUMERS * _ROWS
    num_blocks = first_tile(out.shape[1], batch, block_m) + 1 if packed else ceil_div(seqlen_q, block_m) * batch
    num_tiles = num_blocks * heads
    scale = softmax_scale
    if spec.RAW_SCORES:
        scale *= _LOG2_E
    elif capped:
        scale /= softcap_of(extras)
    section = _section(spec, 1 if packed else batch, heads, group, seqlen_k)
    call = Call(seqlen_q, seqlen_k, heads, group, batch, section, *bounds, scale)
    numbers = extras_argument(extras, batch, heads, mask.diagonal(seqlen_q, seqlen_k))
    sequences = packing_argument(packing, q.shape[1], k.shape[1], mask)
    call = call._replace(extras=numbers.value, packing=sequences.value)
    if bias is None:
        bias_argument = ABSENT
    elif varies == (True, True):
        bias_argument = descriptor(bias, _ROWS, tile.BLOCK_N)
    elif varies[1]:  # a copy wants its place in shared memory at a multiple of 128 bytes: no row is shorter
        bias_argument = descriptor(bias, 1, max(tile.BLOCK_N, 128 // bias.element_size()))
    else:
        bias_argument = bias_tensor(bias)
    programs = min(num_sms, num_tiles)
    counter = _new_counter(q) if spec.UNEVEN and num_tiles > programs else lse
    arguments = (
        *row_descriptors(q, _ROWS, spec.BLOCK_D, spec.TAIL_D, packed),
        *row_descriptors(k, tile.BLOCK_N, spec.BLOCK_D, spec.TAIL_D, packed),
        *row_descriptors(v, tile.BLOCK_N, spec.BLOCK_DV, spec.TAIL_DV, packed),
        bias_argument,
        *row_descriptors(out, _ROWS, spec.BLOCK_DV, spec.TAIL_DV, packed),
        flat(lse),
        Argument(counter, "*i32:16"),
        Argument(call, _CALL_TYPES._replace(extras=numbers.type, packing=sequences.type)),
    )
    return ForwardPlan(out, lse, Launch(attention_fwd, programs, arguments, spec, tile))


def _section(spec: Spec, batch: int, heads: int, group: int, seqlen_k: int) -> int:
    """How many matrices' tiles are interleaved, see `schedule.place`."""
    together = batch if spec.BIAS_SHARED else group  # those that share a bias, or keys
    if not spec.HAS_UPPER:
        return together
    bytes_of_keys = 2 * seqlen_k * (spec.BLOCK_D + spec.TAIL_D + spec.BLOCK_DV + spec.TAIL_DV)
    fit = max(1, _SECTION_BYTES // bytes_of_keys) * group
    return min(ceil_div(fit, together) * together, batch * heads)


_CALL_TYPES = Call("i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "fp32")


@lru_cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
