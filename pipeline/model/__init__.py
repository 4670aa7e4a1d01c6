"""The model: what one rank holds of it and runs.

May import `pipeline.hf`, `data`, `planning`, `config` and `storage`. Start reading at `rank_model`, then
`chunk` and `spec`.
"""
