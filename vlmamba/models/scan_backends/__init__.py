"""Implementations behind `vlmamba.models.selective_scan`; each module has the same four functions.

reference  a Python loop over time, the judge of the others
torch_ops  vectorised PyTorch, runs on any device
cpu        fused C++ (`vlmamba/models/csrc`), built at first use
cuda       mamba-ssm and causal-conv1d
triton     Triton kernels, compiled at first use; a C compiler suffices, no CUDA toolkit

Shapes and meanings are those of the public functions; arguments arrive checked and positional.
"""
