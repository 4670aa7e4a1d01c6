"""RULER's tasks that need no download (arXiv 2404.06654): prompts, answers and scores of lm-evaluation-harness.

Imports no torch. Start reading at `tasks`; `words` has what keys are made of; `needles`, `variables` and `counting`
make the prompts; `score` judges answers.
"""
