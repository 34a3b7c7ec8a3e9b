"""Triton kernels: the portable twin of the CUDA ones, for any GPU that Triton serves.

A module here mirrors one of ``csrc/common`` (same names, same formulas) and offers its engine functions over
torch tensors. Importing this package does not import triton; importing a module of it does. With
``TRITON_INTERPRET=1`` in the environment before that, the kernels run on CPU tensors in Triton's interpreter:
slow, and for tests.
"""
