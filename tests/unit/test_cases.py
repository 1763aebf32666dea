"""Do the cases combine what they say that they combine?"""

from itertools import combinations, product

from triton_attention.testing import CASES
from triton_attention.testing.cases import pairwise


def test_every_two_values_meet_in_few_rows():
    factors = {"a": (1, 2, 3), "b": ("x", "y"), "c": (None, 0.5, 1.5, 2.5), "d": (False, True)}
    rows = list(pairwise(**factors))
    for one, two in combinations(factors, 2):
        assert {(row[one], row[two]) for row in rows} == set(product(factors[one], factors[two]))
    assert len(rows) <= 3 * 4 + 2
    assert rows == list(pairwise(**factors))


def test_cases_are_all_different():
    assert len(set(map(str, CASES))) == len(set(CASES)) == len(CASES)
