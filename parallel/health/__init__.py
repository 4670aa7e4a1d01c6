"""What watches the ranks: dead and silent processes, signals, and replicas that no longer agree.

May import `parallel.world` and `parallel.errors`. Start reading at `watch`.
"""
