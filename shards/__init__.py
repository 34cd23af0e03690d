"""Video data sets as WebDataset tar shards: lists, building, checking, reading, and the order of the samples.

A library of its own: numpy, webdataset and fsspec, without torch, DALI or text4vis.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
