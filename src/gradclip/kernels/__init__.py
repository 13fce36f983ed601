"""Loops over memory, a file per kind of device. They import nothing else of the package."""
