"""Checkpoints of transformers, read and written: `mlmdsl import`, `mlmdsl export`.

A family is a pair of files in families/: NAME.mlm is its model in mlm, with params; NAME.toml says how config.json follows from
the params and the params from config.json, and which of their weights is which of ours, in which layout. No code here knows a
family.
"""
