"""Can this Python run the package on a GPU as it is? Exit status 0: PyTorch and Triton are here and see a GPU.

The Makefile then uses this Python and installs nothing, so that a GPU machine without a network works. Anything that
keeps PyTorch or Triton from loading (not installed, a broken driver) is a no.
"""

import sys

try:
    import torch
    import triton  # noqa: F401  (only whether it loads matters)

    usable = torch.cuda.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
except Exception:
    usable = False
sys.exit(0 if usable else 1)
