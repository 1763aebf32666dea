"""What does `python -m triton_attention` run? The same as the script `triton-attention`."""

import sys

from triton_attention.cli import main

if __name__ == "__main__":
    sys.exit(main())
