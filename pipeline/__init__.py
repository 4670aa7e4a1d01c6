"""Everything between a YAML file and a trained, exported model: `train` is the command, `build` puts a run together.

May import `parallel`. Start reading at `build`; every package below says what it is for.
"""
