"""mlmdsl: describe a transformer and a cluster; get a planned, sharded PyTorch program, trained."""

__version__ = "0.1.0"
