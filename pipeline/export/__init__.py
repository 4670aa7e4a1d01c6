"""A trained model in the forms others read: merged, PEFT, LongLoRA; adapters read back; exports verified.

May import `pipeline.model`, `checkpoint` and what these may. Start reading at `formats`.
"""
