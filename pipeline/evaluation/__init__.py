"""What a model can do with its context: retrieval at every length and depth, under full attention, on any grid.

Imports pipeline.model, pipeline.data and what lies below. Start reading in `retrieval`; `prompts` and `tasks` make what
is asked, `results` keeps what was found.
"""
