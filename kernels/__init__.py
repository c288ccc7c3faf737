"""Triton kernels, one file per operator; installed as ``mfd_fast.kernels``.

A launcher validates nothing: ``mfd_fast.ops`` did.  The tests call every one on meta tensors
(``tests/support/kernel_launches.py``) and compile what it launches for every architecture.
"""
