"""How fast is each attention implementation on this machine? `python -m benchmarks run|plot|compare`."""
