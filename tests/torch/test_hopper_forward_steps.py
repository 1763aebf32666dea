"""Do the consumers of the Hopper forward take every block of keys once, the one that the producer sends next?

Else a barrier waits for what never comes. The loops run as Python; what they call in each step is written down.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python, language

from triton_attention.blocks import allowed
from triton_attention.hopper import forward, schedule
from triton_attention.hopper.launch import plan_forward
from triton_attention.problem import NO_EXTRAS, Mask

ROWS = 64  # of a consumer
MASKS = [
    Mask(), Mask(None, 0), Mask(None, 0, top_left=True), Mask(70, 40), Mask(20, -30), Mask(0, 0), Mask(None, 130),
    Mask(130, None), Mask(64, 64),
]  # fmt: skip
DATA = (  # what the loops call for data alone
    "new_rows", "accumulator_layout", "wait_full", "as_operand", "multiply_values", "load_sink",
    "load_row_bias", "load_bias", "warpgroup_mma_wait", "store", "draw", "no_bits", "release",
)  # fmt: skip


class Shared:
    """A place in shared memory."""

    def store(self, values):
        self.values = values

    def load(self, layout):
        return self.values


class Ticker:
    """What the producer tells the consumers of a tile."""

    def __init__(self, consumers):
        places = [Shared() for _ in range(2 * consumers)]
        self.tiles = SimpleNamespace(shape=[2 * consumers, 8], index=lambda index: places[index])
        self.full = self.empty = SimpleNamespace(index=lambda slot: None)


def stand_in():
    full = {"full": lambda *_: None, "float32": None}
    return SimpleNamespace(**vars(language([0], 1)) | full)


INSTEAD = {
    "mbarrier": SimpleNamespace(wait=lambda *_: None, arrive=lambda *_, count: None),
    "number": lambda fields, field: int(fields[field]),
}
ANNOUNCE, HEAR = (as_python(function, stand_in(), INSTEAD) for function in (schedule.announce, schedule.hear))


def steps_of(work, spec, tile, call):
    """(step, block of keys, whether it is masked) of each that a consumer takes, None where it lets one pass."""
    steps, first = [], []
    heard = iter([work, work._replace(tile_last=0)])

    def visit(progress, queries, channels, step, n, *others):
        steps.append((step, n, others[-1]))
        return progress

    def scale_scores(scores, values, head, start_m, start_n, *_):  # of the first block: the others are visited
        steps.append((first[0], start_n // tile.BLOCK_N, False))
        return None, None

    def mask_queries(*_):
        steps[-1] = (*steps[-1][:2], True)

    def nothing(*_, **__):
        return None

    instead = dict.fromkeys(DATA, nothing) | {
        "hear": lambda *_: next(heard),
        "query_head": lambda *_: SimpleNamespace(limits=None, seed=None, number=None),
        "new_output": lambda *_: work,
        "wait_values": lambda *_: work,
        "multiply_keys": lambda channels, i, step, *_: first.append(step),
        "scale_scores": scale_scores,
        "mask_queries": mask_queries,
        "weigh": lambda *_: (None, None, None),
        "visit": visit,
        "skip": lambda channels, step, *_: steps.append((step, None, None)),
        "tma": SimpleNamespace(store_wait=nothing),
    }
    channels = SimpleNamespace(**dict.fromkeys(("ticker", "q", "k", "v", "bias")))
    as_python(forward.consume, stand_in(), instead)(
        channels, SimpleNamespace(bias=None), None, None, call, spec, tile, 0
    )
    return steps


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (1, 70), (300, 1000), (513, 130), (130, 513)])
def test_a_consumer_visits_every_block_of_keys_once(mask, head_dim, seqlen_q, seqlen_k):
    q, k = torch.empty(1, seqlen_q, 1, head_dim).half(), torch.empty(1, seqlen_k, 1, head_dim).half()
    launch = plan_forward(q, k, k, None, mask, 0.1, 132, NO_EXTRAS).launch
    call, spec, tile = launch.arguments[-1].value, launch.spec, launch.tile
    tiles = -(-seqlen_q // (ROWS * tile.CONSUMERS))
    owned = []
    for number in range(tiles):
        ticker = Ticker(tile.CONSUMERS)
        _, produced = ANNOUNCE(ticker, 0, number, tiles, None, call, spec, tile)
        sent = range(produced.tile_last - 1, produced.first - 1, -1)
        for consumer in range(tile.CONSUMERS):
            work = HEAR(ticker, 0, spec, tile, consumer)
            owned.append(work.start_m)
            steps = steps_of(work, spec, tile, call)
            assert [step for step, _, _ in steps] == list(range(len(sent)))
            visited = {}
            for step, n, masked in steps:
                assert n is None or n == sent[step]
                if n is not None:
                    visited[n] = masked
            check_what_is_seen(work.start_m, visited, call, spec, tile)
    assert sorted(owned) == list(range(0, tiles * tile.CONSUMERS * ROWS, ROWS))


def check_what_is_seen(start_m, visited, call, spec, tile):
    """What is not visited, nobody sees; where no mask is applied, everybody sees everything."""
    end_m = min(start_m + ROWS, call.seqlen_q)
    rows = sorted({start_m, start_m + ROWS // 2, end_m - 1} & set(range(start_m, end_m)))
    bounds = (call.lower, call.upper, spec.HAS_LOWER, spec.HAS_UPPER)
    for i, n in product(rows, range(-(-call.seqlen_k // tile.BLOCK_N) + 1)):
        keys = range(n * tile.BLOCK_N, (n + 1) * tile.BLOCK_N)
        seen = [allowed(i, j, call.seqlen_k, *bounds) for j in keys]
        assert n in visited or not any(seen)
        assert all(seen) or n not in visited or visited[n]
