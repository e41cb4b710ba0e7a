"""Operators against their peers on the machine at hand: a wrong one is not timed.

`cases` are the shapes, `peers` who takes part, `gate` compares results, `timing` measures, `race` puts them together,
and `tune` writes tables of block sizes. Imports jax alone; torch and other libraries only where they are installed.
"""
