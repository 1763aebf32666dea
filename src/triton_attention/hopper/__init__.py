"""The Hopper backend: warp-specialised Gluon kernels for sm_90."""
