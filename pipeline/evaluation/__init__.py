"""Perplexity by length and position, and measuring it on a run's model.

May import every package of `pipeline`. Start reading at `perplexity`.
"""
