"""Attention in plain Triton, for every GPU that Triton compiles for."""
