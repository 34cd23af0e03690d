"""What the ranks of a job share: rows that are gathered as they are, and work that each does a part of."""

import json

import pytest
from launch import run
from tiny import write_clip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What three ranks of tests/support/together.py found."""
    base = tmp_path_factory.mktemp("together")
    text = run("tests/support/together.py", write_clip(base / "clip"), base / "cache", ranks=3)
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


@pytest.mark.slow
def test_rows_of_unequal_shares_come_in_order_and_in_small_pieces(found):
    """Rank 0 has no rows, rank 1 five, rank 2 three; two fit into a message."""
    rows = [
        [100 * rank + 4 * row + column for column in range(4)]
        for rank, count in ((1, 5), (2, 3))
        for row in range(count)
    ]
    assert [len(piece) for piece in found["floats"]] == [2, 2, 1, 2, 1]
    assert [row for piece in found["floats"] for row in piece] == rows
    assert [row for piece in found["truths"] for row in piece] == [[int(value > 0) for value in row] for row in rows]


@pytest.mark.slow
def test_each_rank_encodes_its_share_of_the_prompts_and_all_have_the_same(found):
    """14 prompts are batches of 4, 4, 4 and 2, once without a cache and once for it; what is kept is not encoded again.

    The embeddings are to the bit those of one rank, which computes the same batches.
    """
    assert found["encoded"] == [[4, 2, 4, 2]] * 3
    assert found["equal"] and found["distance"] == 0
