"""Who this process is among the ranks: the grid, the environment, process groups, collectives, random state.

May import `parallel.errors` only. Start reading at `grid`, then `groups`.
"""
