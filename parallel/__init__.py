"""Ranks and shards; knows no YAML, no data and no steps.

Imports nothing of this repository outside itself. Start reading at `world.grid`: how ranks are numbered by axis.
"""
