"""Weights in and out: loading, gathering what trains, and the units that ZeRO-3 shards.

May import `pipeline.model`'s chunk and layers, and what `pipeline.model` may. Start reading at `load`.
"""
