"""A run's state on disk: written beside training, whole or not there, read back by any grid that may.

May import `pipeline.data`, `hf`, `planning`, `config` and `storage`. Start reading at `manifest`, then `saver`.
"""
