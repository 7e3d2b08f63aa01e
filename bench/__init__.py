"""Benchmarks of the ops beside their peers and the physical limits: `fastrlhf bench kernels`.

Installed as `fastrlhf.bench`. A family of ops has one file, which lists its rows; `measure` times them, `limits` says
what the memory allows, `peers` and `eager` hold whom they are compared with, and `readme` writes the tables.
"""
