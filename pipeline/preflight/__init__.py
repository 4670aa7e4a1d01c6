"""Before GPU hours are spent: are the machine, the files and the settings fit for the run?

May import `pipeline.model`, `checkpoint` and what these may. Start reading at `survey`.
"""
