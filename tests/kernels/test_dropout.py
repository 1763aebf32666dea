"""Do the kernels drop what `philox.dropout_mask` says, bit for bit, forward and backward, whatever their tiles?"""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from triton_attention import attention, ops
from triton_attention.hopper.dropout import philox_words, row_sixteens_layout, sixteens_layout
from triton_attention.philox import philox_4x32
from triton_attention.portable import configs
from triton_attention.portable.configs import Tile
from triton_attention.problem import Inputs, Mask, Problem
from triton_attention.testing import next_dropout_mask

RATE = 0.4
HEADS_Q, HEADS_KV = 4, 2

jit_philox_words = triton.jit(philox_words)


def run(q, k, v, dropout_p=RATE):
    inputs = Inputs(q, k, v)
    numbers = {"softmax_scale": None, "softcap": 0.0, "dropout_p": dropout_p, "deterministic": False}
    return ops.attention(inputs, Problem.from_tensors(inputs, mask=Mask(), **numbers), "portable")


def unit_rows(seqlen, heads):
    """(2, seqlen, heads, seqlen): row i is 1 in column i, 0 elsewhere."""
    return torch.eye(seqlen)[:, None, :].expand(2, seqlen, heads, seqlen).contiguous()


@pytest.mark.parametrize("tile", [Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(64, 64, 1, 1)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_bits(monkeypatch, tile, seed):
    """With equal scores no probability is 0 by itself, and unit vectors say between which query and key it stands."""
    monkeypatch.setattr(configs, "_INTERPRETER_TILE", tile)
    configs.tile_for.cache_clear()
    torch.manual_seed(seed)
    q, k = torch.zeros(2, 50, HEADS_Q, 8), torch.zeros(2, 61, HEADS_KV, 8)
    expected = next_dropout_mask(q, k, RATE)
    out, _ = run(q, k, unit_rows(61, HEADS_KV))
    assert torch.equal(out.transpose(1, 2) != 0, expected)

    for member in range(HEADS_Q // HEADS_KV):  # of the query heads that share a key head, one at a time
        torch.manual_seed(seed)
        v = torch.zeros(2, 61, HEADS_KV, 50, requires_grad=True)
        heads = torch.arange(HEADS_Q) % (HEADS_Q // HEADS_KV) == member
        dout = unit_rows(50, HEADS_Q) * heads[:, None]
        out, _ = run(q, k, v)
        (dv,) = torch.autograd.grad(out, v, dout)  # (2, k, heads_kv, q)
        assert torch.equal(dv.permute(0, 2, 3, 1) != 0, expected[:, heads])
    configs.tile_for.cache_clear()


def test_the_helper_says_what_the_reference_will_drop():
    q, k, v = torch.zeros(2, 5, HEADS_Q, 8), torch.zeros(2, 7, HEADS_KV, 8), unit_rows(7, HEADS_KV)
    expected = next_dropout_mask(q, k, RATE)
    assert torch.equal(attention(q, k, v, dropout_p=RATE).transpose(1, 2) != 0, expected)


@pytest.mark.parametrize("dropout_p", [2**-40, 1.0 - 2**-40])
def test_rates_nearer_to_0_and_1_than_a_step(dropout_p):
    """They are 1 / 256 and 255 / 256, and what is kept grows by the factor that belongs to these."""
    q, k, v = torch.zeros(2, 5, HEADS_Q, 8), torch.zeros(2, 64, HEADS_KV, 8), torch.ones(2, 64, HEADS_KV, 8)
    torch.manual_seed(0)
    kept = next_dropout_mask(q, k, dropout_p).sum(-1).transpose(1, 2)
    out, lse = run(q, k, v, dropout_p)
    torch.testing.assert_close(out, (kept / 64 * (256 / 255 if dropout_p < 0.5 else 256))[..., None].expand_as(out))
    assert lse.isfinite().all()


def test_without_dropout_no_random_number_is_drawn():
    q, k, v = torch.zeros(2, 5, HEADS_Q, 8), torch.zeros(2, 7, HEADS_KV, 8), torch.ones(2, 7, HEADS_KV, 8)
    before = torch.get_rng_state()
    run(q, k, v, 0.0)
    assert torch.equal(torch.get_rng_state(), before)


@triton.jit
def hopper_words(words, seed):
    index = tl.arange(0, 16)
    counter = index.to(tl.uint32)
    zero = tl.to_tensor(0).to(tl.uint32)
    first, second, third, fourth = jit_philox_words(
        counter, (counter + 4_000_000_000).to(tl.uint32), counter * 3, zero, tl.load(seed)
    )
    tl.store(words + index, first.to(tl.int64))
    tl.store(words + 16 + index, second.to(tl.int64))
    tl.store(words + 32 + index, third.to(tl.int64))
    tl.store(words + 48 + index, fourth.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 5, -(2**63)])
def test_the_words_of_hopper_are_those_of_the_reference(seed):
    words = torch.empty(4, 16, dtype=torch.int64)
    hopper_words[(1,)](words, torch.tensor(seed))
    index = torch.arange(16)
    expected = philox_4x32(
        (index, index + 4_000_000_000, index * 3, index * 0),
        (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)),
    )
    assert torch.equal(words, torch.stack(expected))


@pytest.mark.parametrize(("columns", "transposed"), [(32, False), (64, False), (128, False), (64, True), (128, True)])
def test_threads_share_what_sixteen_keys_take(columns, transposed):
    """Each evaluation has one owner, of the four, or transposed eight, who have the weights that it is for."""
    layout = (row_sixteens_layout if transposed else sixteens_layout)(columns)
    owners = {}
    for warp, lane, register in product(range(4), range(32), range(columns // 32)):
        bits = [(register, layout.reg_bases), (lane, layout.lane_bases), (warp, layout.warp_bases)]
        place = [0, 0]
        for number, bases in bits:
            for bit, basis in enumerate(bases):
                if number >> bit & 1:
                    place = [old ^ new for old, new in zip(place, basis, strict=True)]
        owners.setdefault(tuple(place), []).append((warp, lane))
        if transposed:  # of keys, by sixteens, and queries
            sixteen, column = place
            assert sixteen == warp
            assert column % 8 // 2 == lane % 4
        else:
            row, _ = place
            assert row % 8 == lane // 4
            assert row // 16 == warp
    assert len(owners) == 64 * columns // 16
    assert all(len(who) == 1 for who in owners.values())
