"""The check of a step's gradients against torch's own clipping and GradScaler."""

from types import SimpleNamespace

import pytest
import torch

from text4vis.training import logs
from text4vis.training.gradients import GradientCheck, read_later


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (1,))]


def built(given, *, largest_norm=0.0, scales_loss=False) -> tuple[torch.optim.Optimizer, GradientCheck]:
    optimizer = torch.optim.AdamW(given, lr=0.1, weight_decay=0.2, fused=True)
    place = torch.device("cpu")
    check = GradientCheck(optimizer, place, largest_norm=largest_norm, scales_loss=scales_loss, partitioned=False)
    return optimizer, check


def loss_of(given, factor: float) -> torch.Tensor:
    return factor * sum(each.square().sum() for each in given)


@pytest.mark.parametrize(("largest_norm", "scales_loss"), [(0.0, False), (0.5, False), (0.0, True), (0.5, True)])
def test_updates_are_those_of_plain_torch_and_a_wrong_one_changes_nothing(largest_norm, scales_loss):
    ours, theirs = parameters(), parameters()
    optimizer, check = built(ours, largest_norm=largest_norm, scales_loss=scales_loss)
    plain = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.2)
    for factor in (1.0, float("nan"), 0.01, float("inf"), 3.0):
        optimizer.zero_grad()
        check.scaled(loss_of(ours, factor)).backward()
        finite = check.look([each.grad for each in ours])
        before = [each.detach().clone() for each in ours]
        optimizer.step()
        assert read_later(finite)() == (0 < factor < 100)
        if not read_later(finite)():
            assert all(map(torch.equal, before, ours))
            continue
        plain.zero_grad()
        loss_of(theirs, factor).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, largest_norm or float("inf"))
        plain.step()
        assert check.norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert all(map(torch.allclose, ours, theirs))
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_the_loss_scale_is_gradscalers():
    scaler = torch.amp.GradScaler("cpu")
    first, interval = scaler.get_scale(), scaler.get_growth_interval()
    ours, theirs = parameters(), parameters()
    (optimizer, check), (plain, _) = built(ours, scales_loss=True), built(theirs)
    assert check.state() == {"scale": first, "steps_since_growth": 0}
    check.restore({"scale": first, "steps_since_growth": interval - 2})
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": interval - 2, "scale": first})
    scales = []
    for factor in (1.0, 1.0, 1.0, float("inf"), float("nan"), 1.0):
        optimizer.zero_grad()
        plain.zero_grad()
        check.scaled(loss_of(ours, factor)).backward()
        check.look([each.grad for each in ours])
        optimizer.step()
        scaler.scale(loss_of(theirs, factor)).backward()
        scaler.step(plain)
        scaler.update()
        state = check.state()
        assert state == {"scale": scaler.get_scale(), "steps_since_growth": scaler._get_growth_tracker()}
        assert all(map(torch.allclose, ours, theirs))
        scales.append(state["scale"] / first)
    assert scales == [1, 2, 2, 1, 0.5, 0.5]


def test_a_loss_that_is_not_scaled_has_no_state():
    _, check = built(parameters())
    loss = torch.ones(())
    assert check.scaled(loss) is loss and check.state() == {}
    check.restore({})


class Gpu:
    """Copies to page-locked memory end when an event is waited for that was recorded after them."""

    def __init__(self) -> None:
        self.queue = []

    def memory(self, *_, dtype, pin_memory) -> SimpleNamespace:
        assert dtype == torch.bool and pin_memory, "a copy to other memory makes the host wait"
        value = torch.zeros((), dtype=dtype)

        def copy(source, *, non_blocking):
            assert non_blocking
            self.queue.append(lambda: value.copy_(source.value))

        return SimpleNamespace(copy_=copy, numpy=value.numpy)

    def event(self) -> SimpleNamespace:
        recorded = []

        def wait():
            for work in recorded[0]:
                work()

        return SimpleNamespace(record=lambda: recorded.append(list(self.queue)), synchronize=wait)


def test_an_answer_of_a_gpu_is_read_without_waiting_for_later_work(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch, "empty", gpu.memory)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    for answer in (True, False):
        read = read_later(SimpleNamespace(is_cuda=True, value=torch.tensor(answer)))
        gpu.queue.append(lambda: pytest.fail("waited for later work"))
        assert read() is answer
        gpu.queue.clear()


class Event:
    """As a torch.cuda.Event: work on the GPU takes until the time at which it is recorded."""

    clock = 0.0
    read = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def elapsed_time(self, later) -> float:
        Event.read += 1
        return 1000 * (later.at - self.at)


def test_a_gpu_waits_for_data_while_it_has_nothing_to_do_and_is_asked_at_log_lines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = logs.Meter(SimpleNamespace(is_cuda=True), started=0.0)
    for seconds in (0.5, 0.0, 0.25):
        Event.clock += 7
        with meter.waiting():
            Event.clock += seconds
    assert Event.read == 0 and meter.wait_seconds() == 0.75


def test_on_the_host_waiting_is_what_the_clock_says(monkeypatch):
    times = iter([1.0, 1.5, 4.0, 4.25])
    meter = logs.Meter.new(torch.device("cpu"))
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(times))
    for _ in range(2):
        with meter.waiting():
            pass
    assert meter.wait_seconds() == 0.75
