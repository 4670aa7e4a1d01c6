"""Hugging Face model folders, read and written.

May import `pipeline.planning`, `config` and `storage`. Start reading at `checkpoint`.
"""
