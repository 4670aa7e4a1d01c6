"""One file for each axis of parallelism: data, tensor, context, pipeline, and ZeRO-3's shards of frozen weights.

May import `parallel.world` and `parallel.errors`. Start reading at `data`; `context` needs `halo_plan` first.
"""
