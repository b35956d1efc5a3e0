"""Operators that have kernels of their own on a GPU."""
