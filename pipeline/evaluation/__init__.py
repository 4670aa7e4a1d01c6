"""What a model can do with its context, under full attention, on any grid: perplexity, and retrieval.

May import every package of `pipeline`. Start reading at `perplexity` and `retrieval`; `prompts` and `tasks` make what
is asked, `results` keeps what was found, `evaluator` and `run_retrieval` measure a run's model.
"""
