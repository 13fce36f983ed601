"""NumPy's arrays."""
