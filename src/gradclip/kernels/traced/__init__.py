"""Exact norms and scaling by a framework's own operations: for what it compiles itself.

Written for operations that flush subnormal numbers to zero, reorder sums and contract products, as
compilers of graphs do: float64 holds float32 numbers, their squares and their products with a
factor, all of normal size, and whatever would be subnormal is made of integers.
"""
