"""What a model can do with its context, under full attention, on any grid: perplexity, retrieval, and RULER.

May import every package of `pipeline`. Start reading at `perplexity` and `retrieval`; `prompts`, `tasks` and `ruler`
make what is asked, `results` keeps what was found, `states` loads a model, and `evaluator`, `run_retrieval` and
`run_ruler` measure it.
"""
