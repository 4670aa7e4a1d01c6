"""Commands that measure: the figures of docs/RESULTS.md come from here.

May import `tools.support`, `pipeline` and `parallel`. Start reading at `step`.
"""
