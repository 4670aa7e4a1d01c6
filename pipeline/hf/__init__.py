"""Hugging Face model folders, read and written.

May import `pipeline.planning`, `config`, `storage` and `reporting`; no megatron. Start reading at `checkpoint`.
"""
