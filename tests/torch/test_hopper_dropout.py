"""Do the kernels for Hopper leave out the weights that the reference leaves out, wherever these lie in a tile?"""

from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python
from triton._C.libtriton import gluon_ir, ir

from triton_attention.hopper.dropout import draw, drop, kept_bytes, no_bits, spread
from triton_attention.hopper.layouts import accumulator_layout
from triton_attention.philox import drop_below, dropout_mask, philox_4x32

RATE = 0.3
SEED = torch.tensor(-(2**62) - 12345)
TILES = ((0, 0, 0), (4, 64, 128), (5, 192, 64))  # matrix, first query, first key
SPEC = SimpleNamespace(DROPOUT=True)
LANGUAGE = SimpleNamespace(
    arange=lambda start, end, layout: torch.arange(start, end),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    to_tensor=torch.as_tensor,
    split=lambda tile: tile.unbind(-1),
    join=lambda a, b: torch.stack((a, b), -1),
    where=torch.where,
    convert_layout=lambda tile, layout: tile,
    SliceLayout=lambda axis, layout: None,
    uint32=torch.int64,
    float32=torch.float32,
)


def words(c0, c1, c2, c3, seed):
    """The kernels' own are tested beside the interpreter."""
    return philox_4x32((c0, c1, c2, c3), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def signs_of_bytes(word, high):
    """As the instruction does it: the highest bit of a byte, 16 times, in two halves."""
    first, second = (word >> 8 * byte + 7 & 1 for byte in ((2, 3) if high else (0, 1)))
    return first * 0xFFFF | second * 0xFFFF0000


def masked_pairs(tile, masks):
    """As the instruction does it with pairs of numbers; here these are 0 and 1."""
    assert torch.equal(masks[:, ::2], masks[:, 1::2])
    return tile & masks >> torch.arange(tile.shape[1]) % 2 * 16


INSTEAD = {
    "_philox_words": words,
    "majority": lambda a, b, c: a & b | a & c | b & c,
    "merged": lambda first, second, bits: first & bits | second & ~bits,
    "opaque_zero": lambda: 0,
    "pair_mask": signs_of_bytes,
    "masked_pairs": masked_pairs,
    "owners_layout": lambda words: None,
    "axes_layout": lambda shape, lanes: None,
    "words_of": lambda columns: max(columns // 64, 1),
}
DRAW, DROP, KEPT_BYTES, NO_BITS, SPREAD = (
    as_python(function, LANGUAGE, INSTEAD) for function in (draw, drop, kept_bytes, no_bits, spread)
)


def drawn(tile, dropout_p, columns, transposed):
    call = SimpleNamespace(extras=SimpleNamespace(drop_below=drop_below(dropout_p)))
    return DRAW(SEED, *tile, call, SPEC, columns, transposed)


def expected(tile, dropout_p, columns, transposed):
    matrix, start_m, start_n = tile
    kept = dropout_mask(SEED, dropout_p, 2, 3, 320, 256).flatten(0, 1)[matrix, start_m:, start_n:]
    return kept.T[:64, :columns] if transposed else kept[:64, :columns]


@pytest.mark.parametrize(("columns", "transposed"), [(32, False), (64, False), (128, False), (64, True), (128, True)])
@pytest.mark.parametrize("dropout_p", [0.001, 0.3, 0.5, 0.7, 0.999])
def test_a_tile_loses_what_the_reference_leaves_out(columns, transposed, dropout_p):
    """Drawn for sixteen columns at once, as bits, and spread over a tile (queries, keys), or transposed."""
    for tile in TILES:
        bits = drawn(tile, dropout_p, columns, transposed)
        assert bits.shape == (4, 8, 4, max(columns // 64, 1))
        kept = SPREAD(bits, columns, transposed) >> 31 & 1 == 1
        assert torch.equal(kept, expected(tile, dropout_p, columns, transposed))


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_pairs_of_numbers_lose_the_same(columns):
    for tile in TILES:
        bits = drawn(tile, RATE, columns, False)
        for dtype in (torch.int16, torch.float32):
            ones = torch.ones(64, columns, dtype=dtype)
            assert torch.equal(DROP(ones, bits, SPEC) == 1, expected(tile, RATE, columns, False))
    assert not DROP(ones, NO_BITS(SPEC, columns), SPEC).any()


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_a_thread_has_pairs_of_neighbouring_columns(columns):
    """An instruction takes two numbers that a thread has one after the other."""
    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    layout = builder.to_linear_layout(accumulator_layout(columns)._to_ir(builder), [64, columns])
    assert layout.reg_bases[0] == [0, 1]


@pytest.mark.parametrize("drop_below", range(1, 256))
def test_four_bytes_are_compared_at_once(drop_below):
    """Every byte at every place, beside bytes from which most and least is carried."""
    byte = torch.arange(256)
    for place in range(4):
        for others in (0, 0xFFFFFFFF):
            word = others & ~(0xFF << 8 * place) | byte << 8 * place
            kept = KEPT_BYTES(word, drop_below)
            for other in range(4):
                assert torch.equal(kept >> 8 * other + 7 & 1 == 1, (word >> 8 * other & 0xFF) >= drop_below)
