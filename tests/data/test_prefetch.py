"""What keeps a loop from waiting for the garbage collector."""

import gc
import weakref

import pytest

from text4vis import train
from text4vis.cluster.stop import StopRequest
from text4vis.config.schema import Config
from text4vis.data.prefetch import settled


class Knot:
    """An object that only the garbage collector can free."""

    def __init__(self):
        self.itself = self


def test_what_exists_is_left_alone_until_the_end():
    old = Knot()
    is_alive = weakref.ref(old)
    with settled():
        assert len(gc.get_objects()) < 1000  # of the hundreds of thousands that there are
        del old
        gc.collect()
        assert is_alive()
    gc.collect()
    assert not is_alive()


def test_what_comes_into_being_inside_is_collected_as_ever():
    with settled():
        is_alive = weakref.ref(Knot())
        others = [[] for _ in range(2 * gc.get_threshold()[0])]  # so many that the collector comes by itself
        assert others and not is_alive()


def test_an_error_ends_it():
    with pytest.raises(ValueError), settled():
        raise ValueError
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("dry_run", [False, True])
def test_training_is_settled(monkeypatch, tmp_path, dry_run):
    seen = []

    class Trainer:
        def __init__(self, *_):
            assert gc.get_freeze_count() == 0  # the model is built before

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def fit(self):
            seen.append(gc.get_freeze_count())

        def dry_run(self):
            seen.append(gc.get_freeze_count())

    monkeypatch.setattr("text4vis.training.trainer.Trainer", Trainer)
    monkeypatch.setattr("text4vis.training.logs.log_to", lambda _: None)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "x.yaml", *["--dry-run"] * dry_run])
    train.train(train.parse_arguments(), Config(), tmp_path, StopRequest())
    assert (seen[0] > 100_000) is not dry_run
