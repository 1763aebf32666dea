"""Which names are public? FlashAttention in Python and Triton, with bias and its gradient, and no compile step."""

from triton_attention.api import attention, attention_varlen, explain

__all__ = ["__version__", "attention", "attention_varlen", "explain"]
__version__ = "0.1.0"
