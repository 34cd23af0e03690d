"""How the global batch of a step is shared by ranks, micro batches and accumulation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError, DataConfig, SolverConfig


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_the_global_batch_is_kept_or_refused(micro, total, ranks):
    config = Config(data=DataConfig(batch_size=micro), solver=SolverConfig(global_batch=total))
    if total % ranks:
        with pytest.raises(ConfigError, match="cannot be shared equally"):
            BatchSizes.of(config, ranks)
        return
    sizes = BatchSizes.of(config, ranks)
    assert sizes.micro * sizes.accumulation * ranks == total == sizes.global_batch
    share = total // ranks
    assert sizes.micro == max(size for size in range(1, micro + 1) if share % size == 0), "as large as is allowed"
    assert BatchSizes.of(config, ranks, total) == sizes


def test_the_global_batch_of_a_run_outlives_its_ranks():
    config = Config(data=DataConfig(batch_size=8), solver=SolverConfig(grad_accumulation_steps=2))
    assert BatchSizes.of(config, 4).global_batch == 64
    assert BatchSizes.of(config, 2, 64) == BatchSizes(micro=8, accumulation=4, world_size=2)
    with pytest.raises(ConfigError, match="63 or 66 can, or start 2 ranks"):
        BatchSizes.of(config, 3, 64)
