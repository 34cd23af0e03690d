"""The hand-over of batches between streams, in every order in which a program and a simulated GPU can go on.

The simulated GPU follows CUDA's rules: the work of a stream is done in order, that of two streams in any order, unless
an event orders them. Its allocator follows PyTorch's: memory belongs to the stream that it was allocated on, and is
lent again there at once when it is freed; if other streams were recorded on it, only after the work they had by then.
"""

import copy
import dataclasses
from contextlib import contextmanager

import pytest

from text4vis.data.handover import HandOver

BATCHES = 3
LOADING, TRAINING = 0, 1


@dataclasses.dataclass
class Event:
    """done: whether the GPU has come to it."""

    done: bool = True
    gpu: object = None

    def record(self, stream) -> None:
        self.done = False
        self.gpu.queues[stream.number].append(("happen", self))

    def query(self) -> bool:
        return self.done


@dataclasses.dataclass
class Stream:
    number: int
    gpu: object

    def wait_event(self, event: Event) -> None:
        self.gpu.queues[self.number].append(("wait", event))


@dataclasses.dataclass
class Block:
    """Memory of the GPU. content: the batch that it holds, None while it is written. pending: see `Gpu.release`."""

    owner: int
    content: int | None = None
    free: bool = False
    recorded: set = dataclasses.field(default_factory=set)
    pending: list = dataclasses.field(default_factory=list)

    def record_stream(self, stream: Stream) -> None:
        self.recorded.add(stream.number)


class Gpu:
    def __init__(self) -> None:
        self.loading, self.training = Stream(LOADING, self), Stream(TRAINING, self)
        self.queues: list[list] = [[], []]
        self.current = self.training
        self.blocks: list[Block] = []

    def new_event(self) -> Event:
        return Event(gpu=self)

    @contextmanager
    def on(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self) -> Stream:
        return self.current

    def allocate(self) -> Block:
        for block in self.blocks:
            if block.free and block.owner == self.current.number and all(event.done for event in block.pending):
                block.free, block.pending, block.recorded = False, [], set()
                return block
        self.blocks.append(Block(self.current.number))
        return self.blocks[-1]

    def release(self, block: Block) -> None:
        block.free = True
        for number in sorted(block.recorded - {block.owner}):
            event = self.new_event()
            event.record(Stream(number, self))
            block.pending.append(event)

    def can_go_on(self, number: int) -> bool:
        queue = self.queues[number]
        return bool(queue) and not (queue[0][0] == "wait" and not queue[0][1].done)

    def go_on(self, number: int) -> None:
        """One step of a stream. A write and a read take two steps each, between which all else may happen."""
        kind, *what = self.queues[number].pop(0)
        if kind == "happen":
            what[0].done = True
        elif kind == "write":
            block, host, is_last = what
            block.content = host["content"] if is_last else None
        elif kind == "read":
            block, expected = what
            assert block.content == expected, f"batch {expected} was read as {block.content}"


class World:
    """A loader, a trainer that frees its batches, a GPU, and pinned memory that is lent when nobody holds it."""

    def __init__(self, hand_over: type[HandOver]) -> None:
        self.gpu = Gpu()
        self.hand_over = hand_over(self.gpu)
        self.host: list[dict] = []
        self.made: list = []
        self.taken = self.freed = 0

    def steps(self) -> list[str]:
        possible = [f"stream {number}" for number in (LOADING, TRAINING) if self.gpu.can_go_on(number)]
        if len(self.made) < BATCHES:
            possible.append("produce")
        if self.taken < len(self.made):
            possible.append("consume")
        if self.freed < self.taken:
            possible.append("free")
        return possible

    def step(self, name: str) -> None:
        if name.startswith("stream"):
            self.gpu.go_on(int(name[-1]))
        else:
            getattr(self, name)()

    def produce(self) -> None:
        held = [sources for _, sources in self.hand_over._held]
        host = next((block for block in self.host if not any(block is one for one in held)), None)
        if host is None:
            host = {"number": len(self.host)}
            self.host.append(host)
        host["content"] = len(self.made)

        def make() -> Block:
            block = self.gpu.allocate()
            self.gpu.queues[self.gpu.current.number] += [("write", block, host, False), ("write", block, host, True)]
            return block

        self.made.append(self.hand_over.send(make, host))

    def consume(self) -> None:
        frames, ready = self.made[self.taken]
        self.hand_over.receive(frames, ready)
        self.gpu.queues[TRAINING] += [("read", frames, self.taken)] * 2
        self.taken += 1

    def free(self) -> None:
        self.gpu.release(self.made[self.freed].frames)
        self.freed += 1

    def key(self) -> str:
        """Alike for worlds that go on alike."""
        names: dict[int, int] = {}

        def plain(value):
            if isinstance(value, Event):
                return "event", names.setdefault(id(value), len(names)), value.done
            if isinstance(value, Block):
                blocks = [plain(event) for event in value.pending]
                return self.gpu.blocks.index(value), value.content, value.free, sorted(value.recorded), blocks
            return [plain(one) for one in value] if isinstance(value, list | tuple) else repr(value)

        held = [(plain(event), host["number"]) for event, host in self.hand_over._held]
        made = [(self.gpu.blocks.index(frames), plain(ready)) for frames, ready in self.made]
        progress = plain(self.gpu.queues), plain(self.gpu.blocks), self.taken, self.freed
        return repr((progress, held, made, self.host))


def explore(hand_over: type[HandOver]) -> int:
    """Goes every way to its end; returns the number of different states. AssertionError: a batch was read wrongly."""
    seen: set[str] = set()
    open_ends = [World(hand_over)]
    while open_ends:
        world = open_ends.pop()
        steps = world.steps()
        if not steps:
            assert world.freed == BATCHES and not any(world.gpu.queues), "somebody waits for ever"
        for step in steps:
            after = copy.deepcopy(world)
            after.step(step)
            if (key := after.key()) not in seen:
                seen.add(key)
                open_ends.append(after)
    return len(seen)


def test_no_order_of_events_lets_a_batch_be_written_while_it_is_read():
    assert explore(HandOver) > 1000


class WithoutRecord(HandOver):
    def receive(self, frames, ready):
        self._gpu.current_stream().wait_event(ready)


class WithoutWait(HandOver):
    def receive(self, frames, ready):
        frames.record_stream(self._gpu.current_stream())


class ForgetsSources(HandOver):
    def send(self, make, sources):
        sent = super().send(make, sources)
        self._held.clear()
        return sent


class AllocatesElsewhere(HandOver):
    """On the stream that is current anyway, as a copy does that is made outside `on`."""

    def send(self, make, sources):
        gpu = self._gpu
        block, allocate = gpu.allocate(), gpu.allocate
        gpu.allocate = lambda: block
        sent = super().send(make, sources)
        gpu.allocate = allocate
        return sent


@pytest.mark.parametrize("faulty", [WithoutRecord, WithoutWait, ForgetsSources, AllocatesElsewhere])
def test_each_rule_is_needed(faulty):
    with pytest.raises(AssertionError, match="was read as"):
        explore(faulty)
