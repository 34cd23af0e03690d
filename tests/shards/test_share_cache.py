"""A short run of tests/support/share_cache.py."""

import pytest
from share_cache import share


@pytest.mark.slow
def test_processes_that_share_a_small_cache_get_all_bytes_and_end(tmp_path):
    assert share(tmp_path, seed=3, minutes=2, rounds=2, seconds=2.0) == 0
