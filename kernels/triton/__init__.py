"""Triton kernels, one file per operation; each is imported by the operation that launches it."""
