"""Text to training windows: tokenized once into shards, packed, shuffled, loaded beside the step.

May import `pipeline.planning`, `config`, `storage` and `reporting`; no megatron. Start reading at
`shards`, then `packing`; for conversations `chat`, then `samples`.
"""
