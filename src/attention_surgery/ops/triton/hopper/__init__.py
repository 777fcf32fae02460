"""Kernels for compute capability 9.0 whose warps are specialized: some bring tiles, others compute on them.

Each takes the place of one in the folder above at the shape of the paper's feature maps (head dim 128, degree 2,
16-bit dtypes), where the latter wait for φ's weights from L2 and for each other's barriers: here a tile's 128 tokens
share the weights, in two groups of four warps that go their own ways, or, where the code would be too long for that, in
one of eight. They are written in Gluon, Triton's language below Triton.
"""
