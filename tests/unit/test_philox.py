"""Is dropout's choice Philox-4x32-7, and does it depend on nothing but the seed and the position?"""

import pytest
import torch

from triton_attention.philox import draw_seed, drop_below, dropout_mask, kept_factor, philox_4x32

# Known answers of Random123 (kat_vectors: philox4x32, 7 rounds): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox_4x32(words(counter), words(key)) == words(expected)


def python_philox(counter, key):
    """Philox-4x32-7 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 % 2**32, (product0 >> 32) ^ c3 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF, -2, -(2**63)])
def test_mask_reads_the_bits_of_its_position(seed):
    batch, heads, seqlen_q, seqlen_k, dropout_p = 2, 3, 2, 21, 0.4
    mask = dropout_mask(torch.tensor(seed), dropout_p, batch, heads, seqlen_q, seqlen_k)
    key = (seed % 2**32, (seed >> 32) % 2**32)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (batch, heads, seqlen_q, seqlen_k))).tolist():
        word = python_philox((j // 16, i, b * heads + h, 0), key)[j % 8 // 2]
        number = word.to_bytes(4, "little")[j % 16 // 8 * 2 + j % 2]
        assert mask[b, h, i, j] == (number >= round(dropout_p * 256))


def test_mask_of_a_part_is_the_part_of_the_mask():
    seed = torch.tensor(7)
    whole = dropout_mask(seed, 0.5, 2, 3, 16, 33)
    assert torch.equal(dropout_mask(seed, 0.5, 2, 3, 9, 10), whole[:, :, :9, :10])
    assert torch.equal(dropout_mask(seed, 0.5, 1, 3, 16, 33), whole[:1])


def test_a_part_of_the_batch():
    seed = torch.tensor(5)
    assert torch.equal(dropout_mask(seed, 0.5, 1, 3, 16, 33, first_batch=1), dropout_mask(seed, 0.5, 2, 3, 16, 33)[1:])


@pytest.mark.parametrize(
    ("dropout_p", "number"), [(0.0, 0), (2**-40, 1), (0.1, 26), (0.5, 128), (0.999, 255), (1 - 2**-40, 255)]
)
def test_threshold_fits_8_bits_and_what_is_kept_grows_by_its_rate(dropout_p, number):
    assert drop_below(dropout_p) == number
    assert kept_factor(dropout_p) == 1 / (1 - number / 256)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_rate(dropout_p):
    mask = dropout_mask(torch.tensor(1), dropout_p, 2, 4, 64, 128)
    rate = drop_below(dropout_p) / 256
    assert abs(rate - dropout_p) <= 1 / 512
    standard_deviation = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert abs((~mask).double().mean() - rate) <= 4 * standard_deviation


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert first == draw_seed(torch.device("cpu")) != second
    assert (first.dtype, first.shape) == (torch.int64, ())
