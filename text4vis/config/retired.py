"""Keys that mean nothing here, what to do instead of giving them, and what was done before some keys existed."""

from __future__ import annotations

# Keys of the original project's YAML files that have no meaning here, and what to do instead.
RETIRED = {
    "data.train_root": "build shards with tools/build_shards.py --root and name them in data.train",
    "data.train_list": "build shards with tools/build_shards.py --annotations and name them in data.train",
    "data.val_root": "build shards with tools/build_shards.py --root and name them in data.val",
    "data.val_list": "build shards with tools/build_shards.py --annotations and name them in data.val",
    "data.image_tmpl": "give it to tools/build_shards.py --image-template",
    "data.index_bias": "delete it: the number of the first frame is found",
    "data.num_classes": "delete it: the number of classes follows from the class names",
    "data.modality": "delete it: all is RGB; lists of videos are built too, see --store video of tools/build_shards.py",
    "data.seg_length": "delete it: one frame is drawn from each segment",
    "data.random_shift": "delete it: training always draws a random frame from each segment",
    "network.type": "delete it: results go to --output",
    "network.describe": "delete it: results go to --output",
    "network.drop": "delete it: the original never read it",
    "solver.start_epoch": "delete it: a run goes on by itself, see --resume",
    "solver.epoch_offset": "delete it: a run goes on by itself, see --resume",
    "solver.evaluate": "use text4vis/evaluate.py",
    "resume": "use --resume",
}

# Keys of earlier versions. In a recipe they are errors that name the replacement; saved configurations ignore them.
FORMER = {
    "data.io_threads": "delete it: data.requests_in_flight bounds what a far store is asked, folders need no more",
}
RETIRED |= FORMER

# What was done before a key existed, where that is not its default.
EARLIER = {"data": {"resize": "shortest", "interpolation": "bicubic"}}
