"""How does one check this package on one's own machine? Cases, inputs, the tolerance, and compilation without a GPU."""

from triton_attention.testing.cases import CASES, Case
from triton_attention.testing.dropout import next_dropout_mask
from triton_attention.testing.inputs import make_inputs
from triton_attention.testing.tolerance import Check, check_against_float64

__all__ = ["CASES", "Case", "Check", "check_against_float64", "make_inputs", "next_dropout_mask"]
