"""Words and numbers that every room uses."""
