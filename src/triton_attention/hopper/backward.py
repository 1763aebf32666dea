"""The backward kernel: the gradients of k, v and of a bias that nothing shares, in one pass over the queries; and of q.

With P the probabilities and dP = dO V^T, the gradient of the scores is dS = P (dP - delta), where
delta = rowsum(dO O) - dLSE. Then dQ = softmax_scale dS K, dK = softmax_scale dS^T Q, dV = P^T dO.

A program takes one block of keys, or one after the other. Its two or three consumer warpgroups, 64 keys each, hold dK
and dV in registers and compute transposed scores, so that P^T and dS^T are operands in registers of the products that
make dV and dK. One more warpgroup assists (backward_assistant.py): it copies the operands into shared memory, makes dQ
of the dS that the consumers leave there, and adds it to the sum over all keys in global memory. So three or four
streams of matrix products are under way, and wait for each other through barriers alone. Where dQ is made apart, in a
fixed order (see backward_queries.py), a producer warp that copies takes the place of that warpgroup.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from triton_attention.hopper.backward_assistant import serve
from triton_attention.hopper.backward_call import call_of_block
from triton_attention.hopper.backward_channels import LSE, Gradients, Inputs, load_numbers, new_channels
from triton_attention.hopper.backward_dq import new_dq_sums
from triton_attention.hopper.backward_scores import (
    add_transposed_bias,
    bias_gradients,
    exponents_of,
    load_key_bias,
    multiply_values,
    score_gradients,
)
from triton_attention.hopper.backward_walk import block_in, first_number, num_blocks, number_of, seen_by
from triton_attention.hopper.channel import (
    coordinates,
    hand_over,
    release,
    tile_of,
    wait_empty,
    wait_full,
)
from triton_attention.hopper.columns import (
    Columns,
    accumulate,
    columns_of,
    leave_columns,
    multiply_transposed,
    new_sums,
    products,
    scaled,
    store_columns,
    wait_both,
)
from triton_attention.hopper.dropout import draw, mark
from triton_attention.hopper.heads import load_seed, load_slope
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, operand_layout, rows_layout
from triton_attention.hopper.mask import mask_keys
from triton_attention.hopper.narrow import narrow, unmarked
from triton_attention.hopper.schedule import place_of_keys
from triton_attention.hopper.softmax import LOG2_E


@gluon.jit
def store_key_dbias(pointer, dbias, batch, head, keys, call):
    """Write the gradient of a bias of one number a key."""
    origin = (batch * call.heads_q + head).to(gl.int64) * call.seqlen_k
    gl.store(pointer + origin + keys, dbias, mask=keys < call.seqlen_k)


@gluon.jit
def store_rows(
    descriptors, channel, i, sums, block, start_n, SPEC: gl.constexpr, INDEX: gl.constexpr, TAIL: gl.constexpr
):  # fmt: skip
    """Write 64 rows of dK or dV, through the shared memory of this consumer's rows of the i-th K or V; at return the
    copy is under way."""
    leave_columns(channel, i, INDEX, sums, TAIL)
    fence_async_shared()
    batch, row = place_of_keys(start_n, block.batch, block.sequence, SPEC)
    place = coordinates(descriptors.block, batch, block.head_kv, row, 0)
    store_columns(descriptors, place, channel, i, INDEX)


@gluon.jit
def leave_dscores(channels, step, dscores, INDEX: gl.constexpr):
    """Leave dS of this consumer's keys for the assistant."""
    wait_empty(channels.dscores, step)
    tile_of(channels.dscores.tiles, channels.dscores, step, INDEX).permute((1, 0)).store(dscores)
    fence_async_shared()
    hand_over(channels.dscores, step)


@gluon.jit
def skip(channels, step, steps, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Let steps pass whose queries do not see this consumer's keys; their dS is 0. Returns the step after them."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    for _ in range(steps):
        wait_full(channels.q, step)
        wait_full(channels.dout, step)
        if SPEC.DQ != "apart":
            zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, channels.dscores.tiles.dtype, accumulator_layout(BLOCK_M))
            leave_dscores(channels, step, zero, INDEX)
        release(channels.q, step)
        step += 1
    return step


@gluon.jit
def consume(channels, inputs, gradients, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """A consumer warpgroup: the keys [64 INDEX, 64 INDEX + 64) of each block."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, gl.float32, accumulator_layout(BLOCK_M))
    seed = load_seed(call, SPEC)
    step = 0
    i = 0
    number = first_number(call, SPEC, TILE)
    while number < num_blocks(call, SPEC, TILE):
        here = call
        if SPEC.VARLEN:
            here = call_of_block(number, call, True, TILE.CONSUMERS * WARPGROUP_ROWS, SPEC)
        block = block_in(number, here, SPEC, TILE)
        start_n = block.start_n + INDEX * WARPGROUP_ROWS
        seen = seen_by(block, start_n, here, SPEC, TILE)
        dk = new_sums(SPEC.BLOCK_D, SPEC.TAIL_D)
        dv = new_sums(SPEC.BLOCK_DV, SPEC.TAIL_DV)
        keys = start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_M))
        k = columns_of(channels.k, i, INDEX, SPEC.TAIL_D)
        v = columns_of(channels.v, i, INDEX, SPEC.TAIL_DV)
        wait_full(channels.k, i)
        wait_full(channels.v, i)
        for member in range(here.group):
            head = block.head_kv * here.group + member
            matrix = block.batch * here.heads_q + head
            key_bias = load_key_bias(inputs.bias, block.batch, head, keys, here, SPEC)
            slope = load_slope(block.batch, head, here, SPEC) * LOG2_E
            dbias = gl.full([WARPGROUP_ROWS], 0.0, gl.float32, rows_layout(BLOCK_M))
            if SPEC.HAS_UPPER:
                step = skip(channels, step, seen.first - block.first, SPEC, TILE, INDEX)
            for m in range(seen.first, seen.last):
                start_m = m * BLOCK_M
                q = columns_of(channels.q, step, 0, SPEC.TAIL_D)
                dout = columns_of(channels.dout, step, 0, SPEC.TAIL_DV)
                bits = draw(seed, matrix, start_m, start_n, here, SPEC, BLOCK_M, True)
                wait_full(channels.q, step)
                scores = multiply_transposed(k, q, zero, False, SPEC.TAIL_D)
                lse = load_numbers(channels, step, LSE)
                if TILE.EARLY:
                    dweights = multiply_values(channels, v, dout, zero, step, SPEC)
                    scores = warpgroup_mma_wait(products(SPEC.TAIL_DV), deps=[scores])
                else:
                    scores = warpgroup_mma_wait(0, deps=[scores])
                exponents, derivative = exponents_of(scores, lse, slope, start_m, start_n, here, SPEC, True)
                weights = gl.exp2(add_transposed_bias(exponents, key_bias, channels, step, SPEC, TILE, INDEX))
                if m < seen.full_first or m >= seen.full_last:
                    weights = mask_keys(weights, start_m, start_n, here, SPEC, 0.0)
                weights = mark(weights, bits, SPEC)
                factors = narrow(weights * derivative, q.block.dtype)
                weights = narrow(weights, q.block.dtype)
                operand = gl.convert_layout(unmarked(weights, SPEC), operand_layout(SPEC.BLOCK_DV))
                if not TILE.EARLY:
                    dweights = multiply_values(channels, v, dout, zero, step, SPEC)
                dv = accumulate(operand, dout, dv, SPEC.TAIL_DV)
                dweights = warpgroup_mma_wait(products(SPEC.TAIL_DV), deps=[dweights])
                if SPEC.DBIAS == "keys":
                    dbias += gl.sum(bias_gradients(weights, dweights, channels, step, SPEC), 1)
                dscores = score_gradients(factors, dweights, channels, step, SPEC)
                if SPEC.DQ != "apart":
                    leave_dscores(channels, step, dscores, INDEX)
                operand = gl.convert_layout(dscores, operand_layout(SPEC.BLOCK_D))
                dk = accumulate(operand, q, dk, SPEC.TAIL_D)
                dv, dk = wait_both(dv, dk, SPEC.TAIL_DV, SPEC.TAIL_D)
                release(channels.q, step)
                step += 1
            if SPEC.HAS_LOWER or SPEC.VARLEN:
                step = skip(channels, step, block.last - seen.last, SPEC, TILE, INDEX)
            if SPEC.DBIAS == "keys":
                store_key_dbias(gradients.dbias, dbias, block.batch, head, keys, here)

        # Where the assistant still reads K, dK takes the way of dV, after it, and K's place is free for the next keys.
        place_of_dk = channels.k
        if SPEC.DQ != "apart":
            place_of_dk = channels.v
            release(channels.k, i)
        store_rows(gradients.dv, channels.v, i, dv, block, start_n, SPEC, INDEX, SPEC.TAIL_DV)
        if SPEC.DQ != "apart":
            tma.store_wait(0)
        dk = scaled(dk, here.softmax_scale, SPEC.TAIL_D)
        store_rows(gradients.dk, place_of_dk, i, dk, block, start_n, SPEC, INDEX, SPEC.TAIL_D)
        tma.store_wait(0)
        if SPEC.DQ == "apart":
            release(channels.k, i)
        release(channels.v, i)
        i += 1
        number = number_of(channels.turns, i, call, SPEC, TILE)


@gluon.jit
def attention_bwd(
    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, rows, bias, dq, dq_tail, dk, dk_tail, dv, dv_tail, dbias, counter,
    call, SPEC: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """dK = softmax_scale dS^T Q and dV = P^T dO, summed over the query heads that share a key head; and sums of dS K.

    Grid: any number of programs, and a `counter` of 0. Together they visit each block of 64 CONSUMERS keys of each key
    head of each batch entry once, and who visits it owns these rows of `dk` and `dv`. With SPEC.DBIAS == "tile" also
    these columns of `dbias` (batch, heads_q, seqlen_q, seqlen_k), written where a key is visible; with "keys" the sums
    of dS over the queries, `dbias` (batch, heads_q, seqlen_k). With SPEC.DQ == "added" a program adds its share to
    `dq`, in no fixed order; everything else is the same bit for bit in every run. With "kept" it has all blocks of one
    head after the other, of which it owns `dq`, too. Packed sequences have as many blocks as there can be, see
    `call_of_block`.
    """
    inputs = Inputs(Columns(q, q_tail), Columns(k, k_tail), Columns(v, v_tail), Columns(dout, dout_tail), rows, bias)
    gradients = Gradients(Columns(dq, dq_tail), Columns(dk, dk_tail), Columns(dv, dv_tail), dbias)
    ASSISTED: gl.constexpr = SPEC.DQ != "apart"
    channels = new_channels(inputs, counter, SPEC, TILE, TILE.CONSUMERS, TILE.CONSUMERS if ASSISTED else 0)
    dq_sums = new_dq_sums(gradients.dq, SPEC, TILE)
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    REGISTERS: gl.constexpr = TILE.REGISTERS
    SERVING_WARPS: gl.constexpr = 4 if ASSISTED else 1
    if TILE.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C1)),
                (serve, (channels, inputs, gradients, dq_sums, call, SPEC, TILE)),
            ],
            [4, SERVING_WARPS],
            [REGISTERS, TILE.SERVING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C1)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C2)),
                (serve, (channels, inputs, gradients, dq_sums, call, SPEC, TILE)),
            ],
            [4, 4, SERVING_WARPS],
            [REGISTERS, REGISTERS, TILE.SERVING_REGISTERS],
        )
