"""What follows from the configuration, by arithmetic: sizes, tensor names, layouts, memory, balance.

May import `pipeline.config` and `parallel.world.grid`; starts without torch. Start reading at `arch`.
"""
