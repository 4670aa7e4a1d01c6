"""The training step: gradients, their sums, the optimizer, and the state a run goes on from.

May import `pipeline.model`, `checkpoint` and what these may. Start reading at `trainer`.
"""
