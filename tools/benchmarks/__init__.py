"""What `tools/benchmark.py` measures: the data it makes, the alternatives it compares with, the figures it takes."""

NAMES = (
    *("loader", "views", "read", "build", "open", "order", "position"),
    *("remote", "step", "memory", "resume", "scale", "predict", "stored", "gpu", "search", "lock"),
)

# Loaders of others that `loader` and `remote` compare with.
PEERS = ("webdataset", "spdl", "litdata", "streaming", "energon")
