"""Video data sets as WebDataset tar shards: annotation lists, the format, the writer, the reader and the order.

Plain Python, numpy, webdataset and fsspec. Imports neither torch, DALI nor text4vis.
"""
