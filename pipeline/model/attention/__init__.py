"""Attention: the layer, shifted sparse attention on whole and on sharded sequences, and the kernels it may use.

May import `pipeline.model.layers` and what `pipeline.model` may. Start reading at `layer`, then `local`.
"""
