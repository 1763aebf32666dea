"""The backward kernel for wide heads: the gradients of k and v where no warpgroup has registers for both.

Two consumer warpgroups share a block of 64 keys. One makes the probabilities P and of them dV; the other reads P from
shared memory, makes dS and of it dK. See backward.py for the equations, and backward_queries.py for dQ.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from triton_attention.hopper.backward import store_key_dbias, store_rows
from triton_attention.hopper.backward_assistant import produce
from triton_attention.hopper.backward_call import call_of_block
from triton_attention.hopper.backward_channels import LSE, Gradients, Inputs, load_numbers, new_channels
from triton_attention.hopper.backward_scores import (
    add_transposed_bias,
    bias_gradients,
    exponents_of,
    load_key_bias,
    multiply_values,
    score_gradients,
)
from triton_attention.hopper.backward_walk import block_in, seen_by
from triton_attention.hopper.channel import hand_over, release, tile_of, wait_empty, wait_full
from triton_attention.hopper.columns import (
    Columns,
    accumulate,
    columns_of,
    multiply_transposed,
    new_sums,
    scaled,
    wait_sums,
)
from triton_attention.hopper.dropout import draw, mark
from triton_attention.hopper.heads import load_seed, load_slope
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, operand_layout, rows_layout
from triton_attention.hopper.mask import mask_keys
from triton_attention.hopper.narrow import narrow, unmarked
from triton_attention.hopper.softmax import LOG2_E


@gluon.constexpr_function
def tiles_of_weights(spec):
    """P times the derivative of a softcap, which makes dK, and where that is not P, P for the gradient of a bias."""
    return 2 if spec.SOFTCAP and spec.DBIAS == "keys" else 1


@gluon.jit
def leave(channels, step, PART: gl.constexpr, weights):
    """Store a transposed tile for the other consumer."""
    tile_of(channels.dscores.tiles, channels.dscores, step, PART).permute((1, 0)).store(weights)


@gluon.jit
def find(channels, step, PART: gl.constexpr):
    """Load it."""
    tile = tile_of(channels.dscores.tiles, channels.dscores, step, PART).permute((1, 0))
    return tile.load(accumulator_layout(tile.shape[1]))


@gluon.jit
def consume_for_values(channels, inputs, gradients, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """P^T of one block of queries after the other, for the other consumer too, and dV.

    With a softcap the other gets P times its derivative: what dP is to be multiplied by.
    """
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    WHOLE: gl.constexpr = 0  # of the parts of a block of keys
    block = block_in(gl.program_id(0), call, SPEC, TILE)
    seen = seen_by(block, block.start_n, call, SPEC, TILE)
    dv = new_sums(SPEC.BLOCK_DV, SPEC.TAIL_DV)
    zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, gl.float32, accumulator_layout(BLOCK_M))
    keys = block.start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_M))
    k = columns_of(channels.k, 0, 0, SPEC.TAIL_D)
    wait_full(channels.k, 0)
    seed = load_seed(call, SPEC)
    step = 0
    for member in range(call.group):
        head = block.head_kv * call.group + member
        matrix = block.batch * call.heads_q + head
        key_bias = load_key_bias(inputs.bias, block.batch, head, keys, call, SPEC)
        slope = load_slope(block.batch, head, call, SPEC) * LOG2_E
        for m in range(block.first, block.last):
            start_m = m * BLOCK_M
            q = columns_of(channels.q, step, 0, SPEC.TAIL_D)
            dout = columns_of(channels.dout, step, 0, SPEC.TAIL_DV)
            wait_full(channels.q, step)
            scores = multiply_transposed(k, q, zero, False, SPEC.TAIL_D)
            lse = load_numbers(channels, step, LSE)
            bits = draw(seed, matrix, start_m, block.start_n, call, SPEC, BLOCK_M, True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            exponents, derivative = exponents_of(scores, lse, slope, start_m, block.start_n, call, SPEC, True)
            weights = gl.exp2(add_transposed_bias(exponents, key_bias, channels, step, SPEC, TILE, WHOLE))
            if m < seen.full_first or m >= seen.full_last:
                weights = mask_keys(weights, start_m, block.start_n, call, SPEC, 0.0)
            weights = mark(weights, bits, SPEC)
            wait_empty(channels.dscores, step)
            leave(channels, step, 0, narrow(weights * derivative, q.block.dtype))
            weights = narrow(weights, q.block.dtype)
            if tiles_of_weights(SPEC) == 2:
                leave(channels, step, 1, weights)
            hand_over(channels.dscores, step)
            operand = gl.convert_layout(unmarked(weights, SPEC), operand_layout(SPEC.BLOCK_DV))
            wait_full(channels.dout, step)
            dv = wait_sums(accumulate(operand, dout, dv, SPEC.TAIL_DV), SPEC.TAIL_DV)
            release(channels.q, step)
            step += 1
    release(channels.k, 0)
    mbarrier.wait(channels.v.empty.index(0), 0)  # the other consumer is done with V
    store_rows(gradients.dv, channels.v, 0, dv, block, block.start_n, SPEC, WHOLE, SPEC.TAIL_DV)
    tma.store_wait(0)


@gluon.jit
def consume_for_keys(channels, inputs, gradients, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """dS^T of one block of queries after the other, and dK."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    WHOLE: gl.constexpr = 0
    block = block_in(gl.program_id(0), call, SPEC, TILE)
    dk = new_sums(SPEC.BLOCK_D, SPEC.TAIL_D)
    zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, gl.float32, accumulator_layout(BLOCK_M))
    keys = block.start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_M))
    v = columns_of(channels.v, 0, 0, SPEC.TAIL_DV)
    wait_full(channels.v, 0)
    step = 0
    for member in range(call.group):
        head = block.head_kv * call.group + member
        dbias = gl.full([WARPGROUP_ROWS], 0.0, gl.float32, rows_layout(BLOCK_M))
        for _ in range(block.first, block.last):
            q = columns_of(channels.q, step, 0, SPEC.TAIL_D)
            dout = columns_of(channels.dout, step, 0, SPEC.TAIL_DV)
            wait_full(channels.q, step)
            dweights = multiply_values(channels, v, dout, zero, step, SPEC)
            wait_full(channels.dscores, step)
            factors = find(channels, step, 0)
            weights = factors
            if tiles_of_weights(SPEC) == 2:
                weights = find(channels, step, 1)
            dweights = warpgroup_mma_wait(0, deps=[dweights])
            release(channels.dscores, step)
            if SPEC.DBIAS == "keys":
                dbias += gl.sum(bias_gradients(weights, dweights, channels, step, SPEC), 1)
            dscores = score_gradients(factors, dweights, channels, step, SPEC)
            operand = gl.convert_layout(dscores, operand_layout(SPEC.BLOCK_D))
            dk = wait_sums(accumulate(operand, q, dk, SPEC.TAIL_D), SPEC.TAIL_D)
            release(channels.q, step)
            step += 1
        if SPEC.DBIAS == "keys":
            store_key_dbias(gradients.dbias, dbias, block.batch, head, keys, call)
    release(channels.v, 0)
    mbarrier.wait(channels.k.empty.index(0), 0)  # the other consumer is done with K
    dk = scaled(dk, call.softmax_scale, SPEC.TAIL_D)
    store_rows(gradients.dk, channels.k, 0, dk, block, block.start_n, SPEC, WHOLE, SPEC.TAIL_D)
    tma.store_wait(0)


@gluon.jit
def attention_bwd_wide(
    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, rows, bias, dk, dk_tail, dv, dv_tail, dbias, call,
    SPEC: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """dK = softmax_scale dS^T Q and dV = P^T dO, summed over the query heads that share a key head.

    Grid: one program for each block of 64 keys of each key head of each batch entry. It owns these rows of `dk` and
    `dv`, and with SPEC.DBIAS == "keys" the sums of dS over the queries, `dbias` (batch, heads_q, seqlen_k). Of packed
    sequences the grid has a program for each block that they may have, see `call_of_block`.
    """
    own = call
    if SPEC.VARLEN:
        own = call_of_block(gl.program_id(0), call, True, TILE.CONSUMERS * WARPGROUP_ROWS, SPEC)
    inputs = Inputs(Columns(q, q_tail), Columns(k, k_tail), Columns(v, v_tail), Columns(dout, dout_tail), rows, bias)
    gradients = Gradients(0, Columns(dk, dk_tail), Columns(dv, dv_tail), dbias)
    channels = new_channels(inputs, None, SPEC, TILE, 2, tiles_of_weights(SPEC))
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_for_values, (channels, inputs, gradients, own, SPEC, TILE)),
            (consume_for_keys, (channels, inputs, gradients, own, SPEC, TILE)),
            (produce, (channels, inputs, call, SPEC, TILE)),
        ],
        [4, 1],
        [TILE.REGISTERS, TILE.SERVING_REGISTERS],
    )
