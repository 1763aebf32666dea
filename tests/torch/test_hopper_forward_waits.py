"""Do the warps of the Hopper forward wait for each other without end, or read what is not meant for them?

The kernel runs as Python, its partitions as threads of which one runs at a time, chosen at random at each barrier. For
a tile stands which operand it is of, and where in it.
"""

import threading
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python, language

from triton_attention.hopper import forward, schedule
from triton_attention.hopper.launch import plan_forward
from triton_attention.problem import NO_EXTRAS, Extras, Mask

ROWS = 64  # of a consumer
DROPOUT = Extras(dropout_p=0.1, seed=torch.tensor(1))


class Place:
    """A tile in shared memory, or a barrier there."""

    def init(self, count):
        self.count = self.pending = count
        self.phase = 0

    def arrive(self):
        assert self.pending > 0
        self.pending -= 1
        if self.pending == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def is_over(self, phase):
        return self.phase % 2 != phase

    def store(self, values):
        self.values = values

    def load(self, layout):
        return self.values

    def reshape(self, shape):
        return self

    def permute(self, axes):
        return self


class Memory:
    def __init__(self, dtype, shape, layout):
        self.shape, self.places = shape, [Place() for _ in range(shape[0])]

    def index(self, number):
        return self.places[number]


class Bits:
    """What was drawn for a tile."""

    def __init__(self, matrix, start_m, start_n):
        self.tile, self.shape = (matrix, start_m, start_n), [4, 8, 4, 1]

    def reshape(self, shape):
        return self


class Partitions:
    """Threads of which one runs until it waits for what is not there; then another one does."""

    def __init__(self, random):
        self.random, self.waiting, self.error = random, {}, None
        self.turn = threading.Condition()

    def run(self, functions, warps, registers):
        self.threads = [threading.Thread(target=self.start, args=function) for function in functions]
        self.running = None
        with self.turn:
            self.waiting = {thread: lambda: True for thread in self.threads}
            for thread in self.threads:
                thread.start()
            self.choose()
        for thread in self.threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def start(self, function, arguments):
        try:
            self.pause()
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.turn:
            del self.waiting[threading.current_thread()]
            self.choose()

    def choose(self):
        ready = [thread for thread, condition in self.waiting.items() if self.error or condition()]
        if self.waiting and not ready:
            self.error = AssertionError(f"{len(self.waiting)} partitions wait without end")
            ready = list(self.waiting)
        self.running = self.random.choice(ready) if ready else None
        self.turn.notify_all()

    def pause(self):
        """Until it is this thread's turn."""
        with self.turn:
            self.turn.wait_for(lambda: self.running is threading.current_thread())
        if self.error is not None:
            raise self.error

    def wait(self, barrier, phase, pred=True):
        if pred:
            with self.turn:
                self.waiting[threading.current_thread()] = lambda: barrier.is_over(phase)
                self.choose()
            self.pause()


def multiplied(products):
    """Instead of a matrix product: scores are which queries meet which keys, the other products are listed."""

    def multiply(left, right, acc, **_):
        if isinstance(left, Place):
            return left.values, right.values
        weights, bits = left
        if weights is not None:
            products.append((*weights, bits, right.values))
        return acc

    return multiply


def run(launch, tile, program, programs, counter, random):
    """The products with v of a program, as (queries, keys, bits, values)."""
    products = []
    partitions = Partitions(random)

    def count(counter, number):
        counter[0] += number
        return counter[0] - number

    def copy(descriptor, place, barrier, tile):
        tile.store((descriptor.name, *place))

    def descriptor(name, rows):
        block = SimpleNamespace(shape=[1, 1, rows, 64])
        return SimpleNamespace(name=name, dtype=None, layout=None, block_type=block)

    def nothing(*_, **__):
        return None

    stand_in = SimpleNamespace(
        **vars(language([program], programs))
        | {
            "allocate_shared_memory": Memory,
            "atomic_add": count,
            "convert_layout": lambda tile, layout: tile,
            "full": nothing,
            "float32": None,
            "uint32": None,
            "static_assert": nothing,
            "SwizzledSharedLayout": nothing,
            "warp_specialize": partitions.run,
        }
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=nothing,
        init=lambda barrier, count: barrier.init(count),
        wait=partitions.wait,
        arrive=lambda barrier, count: barrier.arrive(),
        expect=lambda barrier, size: barrier.arrive(),
    )
    ignored = (
        "accumulator_layout", "fence_async_shared", "has_packed_rows", "load_bias", "load_row_bias", "load_seed",
        "load_sink", "new_rows", "no_bits", "owners_layout", "store", "threads_layout",
    )  # fmt: skip
    instead = dict.fromkeys(ignored, nothing) | {
        "as_operand": lambda weights, bits, *_: (weights, bits),
        "bytes_of": lambda descriptor: 0,
        "copy_to_shared": copy,
        "draw": lambda seed, matrix, start_m, start_n, *_: Bits(matrix, start_m, start_n),
        "mask_queries": lambda scores, *_: scores,
        "mbarrier": mbarrier,
        "place_in_section": as_python(schedule.place_in_section, stand_in),
        "number": lambda fields, field: int(fields[field]),
        "query_head": lambda work, call, spec: SimpleNamespace(
            limits=None, seed=None, number=work.batch * call.heads_q + work.head
        ),
        "scale_scores": lambda scores, *_: (scores, None),
        "corrected": lambda output, *_: output,
        "tma": SimpleNamespace(store_wait=nothing),
        "warpgroup_mma": multiplied(products),
        "warpgroup_mma_wait": lambda count, deps: deps[0],
        "weigh": lambda rows, scores, *_: (rows, scores, None),
        "words_of": lambda columns: 1,
    }
    q, k, v = descriptor("q", ROWS), descriptor("k", tile.BLOCK_N), descriptor("v", tile.BLOCK_N)
    out = descriptor("out", ROWS)
    call = launch.arguments[-1].value
    as_python(forward.attention_fwd, stand_in, instead)(
        q, None, k, None, v, None, None, out, None, None, counter, call, launch.spec, tile
    )
    return products


@pytest.mark.parametrize("extras", [NO_EXTRAS, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("mask", [Mask(), Mask(None, 0), Mask(100, 50)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("skips", [False, True], ids=["all", "skips"])
@pytest.mark.parametrize("seed", range(4))
def test_nobody_waits_without_end_and_everybody_reads_what_is_meant_for_it(head_dim, mask, extras, skips, seed):
    random = Random(seed)
    heads, seqlen_q, seqlen_k = 2, random.randrange(1, 700), random.randrange(1, 900)
    q, k = torch.empty(2, seqlen_q, heads, head_dim).half(), torch.empty(2, seqlen_k, heads, head_dim).half()
    launch = plan_forward(q, k, k, None, mask, 0.1, 132, extras).launch
    tile = replace(launch.tile, SKIPS=skips)
    programs = random.randrange(1, 4)
    counter, products = [0], []
    for program in range(programs):
        products += run(launch, tile, program, programs, counter, random)
    for queries, keys, bits, values in products:
        assert (queries[0], keys[0], values[0]) == ("q", "k", "v")
        assert keys[1:] == values[1:]
        assert queries[1:3] == keys[1:3]
        if extras is DROPOUT:
            assert bits.tile == (queries[1] * heads + queries[2], queries[3], keys[3])
    seen = {(*queries[1:4], keys[3]) for queries, keys, _, _ in products}
    assert len(seen) == len(products)
    assert {place[:3] for place in seen} >= {
        (batch, head, row) for batch in range(2) for head in range(heads) for row in range(0, seqlen_q, ROWS)
    }
