"""Readers of real data sets in their own formats, streamed through Grain; nothing here downloads.

A reader is a random-access source: `len(source)` examples, `source[i]` a dictionary of NumPy arrays.
Needs the extra `jax-apt[data]`.
"""
