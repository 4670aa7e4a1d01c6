"""Files that are whole or not there: durable writing, and the safetensors format.

May import `parallel.errors`. Start reading at `durable`.
"""
