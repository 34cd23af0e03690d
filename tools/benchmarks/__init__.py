"""What `tools/benchmark.py` measures: the data it makes, the alternatives it compares with, the figures it takes."""
