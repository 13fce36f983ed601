"""Loops over a GPU's memory, in Triton."""
