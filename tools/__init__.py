"""The commands, one a file: `python -m tools.NAME --help`.

May import `pipeline` and `parallel`. Start reading at the command you use.
"""
