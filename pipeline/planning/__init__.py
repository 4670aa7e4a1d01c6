"""What follows from the configuration, by arithmetic: sizes, tensor names, layouts, memory, balance.

May import `pipeline.config`, `storage` and what of `parallel` needs no torch; starts without it. Start
reading at `arch`.
"""
