"""A short run of tests/support/soak.py: killed and stopped jobs, a flaky store, damaged videos."""

import pytest
from soak import Soak

SETTINGS = ("solver.global_batch=6", "solver.epochs=6", "data.batch_size=2", "engine.zero_stage=1")


@pytest.mark.slow
def test_nothing_is_lost_while_everything_fails(project, tmp_path):
    soak = Soak(
        project.config, project.shards, project.shards, tmp_path, ranks=(1, 2, 3), steps=(4, 8), seed=6,
        settings=(*SETTINGS, "logging.save_steps=3"), damaged_share=0.08, slow=0.1,
    )  # fmt: skip
    assert soak.run(minutes=0) == 1
    assert soak.counts["killed"] and soak.counts["asked to stop"] and soak.counts["faults of the store"], soak.counts
    assert soak.samples_as_planned(0) == (26, True, True)
    assert soak.skipped(0) and soak.skipped(0) <= set(soak.damaged)
