"""The layers beside attention: norm, MLP, linears with LoRA, rotary positions, the loss, and their Triton kernels.

May import what `pipeline.model` may, nothing else of it. Start reading at `linear`, then `lora`.
"""
