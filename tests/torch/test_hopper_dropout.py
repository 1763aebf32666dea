"""Do the kernels for Hopper leave out the weights that the reference leaves out, wherever these lie in a tile?"""

from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python

from triton_attention.hopper.dropout import draw, drop
from triton_attention.philox import drop_below, dropout_mask, philox_4x32

RATE = 0.3
SEED = torch.tensor(-(2**62) - 12345)
TILES = ((0, 0, 0), (4, 64, 128), (5, 192, 64))  # matrix, first query, first key
LANGUAGE = SimpleNamespace(
    arange=lambda start, end, layout: torch.arange(start, end),
    to_tensor=torch.as_tensor,
    sum=torch.sum,
    join=lambda a, b: torch.stack((a, b), -1),
    where=torch.where,
    convert_layout=lambda tile, layout: tile,
    SliceLayout=lambda axis, layout: None,
    inline_asm_elementwise=lambda *arguments, **options: 0,  # `opaque_zero`
    uint32=torch.int64,
    int32=torch.int32,
)


def words(c0, c1, c2, c3, seed):
    """The kernels' own are tested beside the interpreter."""
    return philox_4x32((c0, c1, c2, c3), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_a_tile_loses_what_the_reference_leaves_out(columns, transposed):
    """Drawn for eight columns a word, as bits, and spread over a tile (queries, keys), or transposed."""
    draw_tile, drop_from = as_python(draw, LANGUAGE), as_python(drop, LANGUAGE)
    draw_tile.__globals__["_philox_words"] = words
    call = SimpleNamespace(extras=SimpleNamespace(drop_below=drop_below(RATE)))
    spec = SimpleNamespace(DROPOUT=True)
    kept = dropout_mask(SEED, RATE, 2, 3, 320, 256).flatten(0, 1)
    for matrix, start_m, start_n in TILES:
        bits = draw_tile(SEED, matrix, start_m, start_n, call, spec, columns, transposed)
        assert bits.shape == (64, 8 * max(columns // 64, 1))
        tile = drop_from(torch.ones(64, columns), bits, spec)
        expected = kept[matrix, start_m:, start_n:]
        expected = expected.T[:64, :columns] if transposed else expected[:64, :columns]
        assert torch.equal(tile == 1.0, expected)
