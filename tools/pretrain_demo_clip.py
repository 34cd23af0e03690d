"""Pre-trains the demo's small CLIP contrastively on rendered pairs of a frame and a caption.

Examples:
    python tools/pretrain_demo_clip.py --output configs/models
    python tools/pretrain_demo_clip.py --output quick --steps 20 --frames 2000

Reads the architecture (open_clip's JSON format) from `--config` and writes three files that belong together:
`demo-clip.json`, `demo-clip-bpe.txt.gz` (the first merges of CLIP's own vocabulary, as many as `vocab_size` allows) and
`demo-clip.safetensors` (16-bit). The default run took 23 minutes on two busy cores.

An auxiliary loss helps: a linear layer, thrown away at the end, predicts the positions of the joints from the image
embedding. Without it the small model is slow to learn limbs.

To judge zero-shot results on the demo's unseen classes, one must know what this model has seen. It sees single frames,
no videos. They show training actions (`ACTIONS`) or random postures, never `UNSEEN_ACTIONS`, and no caption contains
the name of an unseen action. Captions name the training action or describe the posture limb by limb ("the left arm up
and the right knee raised"), with random clothes and places. So the words of the unseen names do occur, and postures
that those actions pass through may occur. At the end, the program prints the zero-shot accuracy on videos of both kinds
of action.
"""

import argparse
from pathlib import Path

from text4vis.common.programs import run_program

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "models" / "demo-clip.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the JSON, the vocabulary and the weights"
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="architecture in open_clip's JSON format")
    parser.add_argument("--steps", type=int, default=1500, help="batches (1500)")
    parser.add_argument("--batch-size", type=int, default=64, help="frames in a batch (64)")
    parser.add_argument("--frames", type=int, default=24_000, help="rendered frames to draw the batches from")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--joint-weight", type=float, default=20.0, help="weight of the joints' squared error")
    parser.add_argument("--seed", type=int, default=0, help="seed of frames and order (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from drawings.pretraining import pretrain  # loads torch: too slow for --help

    pretrain(arguments)
    return 0


if __name__ == "__main__":
    run_program(main)
