"""What the user says: every setting with its unit and its checks, and the YAML it is read from.

May import `parallel.errors`; starts without torch. Start reading at `sections`.
"""
