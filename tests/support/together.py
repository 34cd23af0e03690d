"""What three ranks compute and gather together; prints rank 0's findings as JSON.

Arguments: a JSON file of an open_clip model, and a folder for a cache.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

from text4vis.classifier import embeddings
from text4vis.cluster import distributed
from text4vis.config.schema import NetworkConfig
from text4vis.model.video_clip import build_model

NAMES = [f"name {number}" for number in range(7)]
PROMPTS = ["a {}", "{} b"]


def gathered(count: int, dtype: torch.dtype) -> list:
    """Pieces of (n, 2, 2) rows, `count` of them on this rank."""
    rank = distributed.ranks().rank
    rows = torch.arange(100 * rank, 100 * rank + 4 * count).reshape(count, 2, 2).to(dtype)
    return [piece.long().flatten(1).tolist() for piece in distributed.gather_rows(rows)]


def main() -> None:
    place = distributed.start()
    distributed._PIECE_BYTES = 32  # two rows of floats
    count = (0, 5, 3)[place.rank]
    found = {"floats": gathered(count, torch.float32), "truths": gathered(count, torch.bool)}

    model = build_model(NetworkConfig(arch=sys.argv[1], sim_header="None"), 4)
    embeddings.PROMPTS_A_BATCH = 4
    encode, encoded = model.text.encode_tokens, []

    def counting(tokens, **options):
        encoded.append(len(tokens))
        return encode(tokens, **options)

    model.text.encode_tokens = counting
    tables = [
        embeddings.text_classifier(model, NAMES, PROMPTS, cache=cache) for cache in (None, *[Path(sys.argv[2])] * 2)
    ]
    ranks = distributed.gather_to_main([encoded, *(table.tolist() for table in tables)])
    if place.is_main:
        prompts = [prompt.replace("{}", name) for prompt in PROMPTS for name in NAMES]
        single = torch.cat([encode(batch) for batch in model.text.tokenize(prompts).split(4)])
        single = normalize(single, dim=-1).unflatten(0, (len(PROMPTS), len(NAMES)))
        found["encoded"] = [rank[0] for rank in ranks]
        found["equal"] = all(table == tables[0].tolist() for rank in ranks for table in rank[1:])
        found["distance"] = (normalize(single.mean(0), dim=-1) - tables[0]).abs().max().item()
        print(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main()
