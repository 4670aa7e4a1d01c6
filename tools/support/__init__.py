"""What several commands share; no command itself.

May import `pipeline` and `parallel`. Start reading at `local_ranks`.
"""
