"""Which recipe works? Trains each of a list of recipes by the product's own trainer, and judges them all alike.

`plan` reads the list, `run` trains and judges, `table` compares. Start reading in `__main__`.
"""
