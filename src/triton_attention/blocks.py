"""Which keys may a query see, and which blocks does a program visit? Semantics shared by every kernel and dialect.

Plain functions of operators alone: each backend jits them with its own dialect (`triton.jit`, `gluon.jit`), so that
a rule stands once for forward and backward, Triton and Gluon, compiled and interpreted. A mask is a band around the
diagonal: key j is visible to query i iff `lower <= j - i <= upper`, where either bound may be absent.
"""


def allowed(rows, cols, seqlen_k, lower, upper, HAS_LOWER, HAS_UPPER):
    """Whether each key in `cols` exists and is visible to each query in `rows`; the shapes broadcast.

    What is compared with a key is made for each query first: few numbers, while there are many pairs. Keys and queries
    may be counted from another origin, if `seqlen_k` is too.
    """
    if HAS_UPPER:
        end = rows + (upper + 1)
        end = seqlen_k + (end - seqlen_k) * (end < seqlen_k)  # the smaller one; `min` would not take a whole block
        visible = cols < end
    else:
        visible = cols < seqlen_k
    if HAS_LOWER:
        visible = visible & (cols >= rows + lower)
    return visible


def visible_range(start, seqlen, seqlen_other, lower, upper, HAS_LOWER, HAS_UPPER, BLOCK, BLOCK_OTHER):
    """The keys that the queries [start, start + BLOCK) visit: (begin, full_begin, full_end, end).

    Blocks of BLOCK_OTHER keys in [full_begin, full_end) are visible to every query of the block and lie inside the
    sequence of `seqlen_other` keys, so they need no mask. Those in [begin, full_begin) and [full_end, end) do. Each
    range that is not empty begins at a multiple of BLOCK_OTHER.

    The queries that visit a block of keys are the same question transposed: the lengths and blocks change places
    and the band, seen from the keys, is [-upper, -lower].
    """
    last = min(start + BLOCK, seqlen) - 1
    begin = start * 0
    full_begin = begin
    full_end = seqlen_other
    end = seqlen_other
    if HAS_LOWER:
        begin = min(max(start + lower, 0), seqlen_other) // BLOCK_OTHER * BLOCK_OTHER
        full_begin = (min(max(last + lower, 0), seqlen_other) + BLOCK_OTHER - 1) // BLOCK_OTHER * BLOCK_OTHER
    if HAS_UPPER:
        full_end = min(max(start + upper + 1, 0), seqlen_other)
        end = min(max(last + upper + 1, 0), seqlen_other)
    full_begin = min(full_begin, end)
    full_end = max(full_end // BLOCK_OTHER * BLOCK_OTHER, full_begin)
    return begin, full_begin, full_end, end


def first_tile(start, sequence, BLOCK):
    """The number of the first tile of a packed sequence that begins at row `start`.

    So each sequence has one tile or more, enough for its length, and none needs a sum over those before it. The last
    tile there can be is that of sequence number `batch`, the rows that none has, if they begin behind the last row.
    """
    return start // BLOCK + sequence


def tile_order(program, num_blocks, heads, REVERSED):
    """(block, head, batch) of a program: the blocks of one head are neighbours, so that they share its keys in cache.

    `REVERSED` starts with the last block: under a causal mask it is the longest, and a GPU ends sooner when the
    short ones come last.
    """
    block = program % num_blocks
    if REVERSED:
        block = num_blocks - 1 - block
    batch_head = program // num_blocks
    return block, batch_head % heads, batch_head // heads


def not_below(lse):
    """A log-sum-exp in units of log 2, and where it is so large that its rounding shows, a bound that no score exceeds.

    The backward makes probabilities of exp2(score - lse). From some 1e7 on float32 does not tell what they are, but
    they must not exceed 1, lest gradients overflow.
    """
    large = 16777216.0  # 2**24
    doubt = 1.0 / 2097152.0  # 2**-21: six roundings
    return lse * (1.0 + doubt * (lse > large) - doubt * (lse < -large))
