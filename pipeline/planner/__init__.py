"""Will it fit, how fast, which layout: answered from sizes and a GPU's description alone, without torch.

May import `pipeline.planning` and what it may. Start reading at `choose`.
"""
