"""Counts what torch is asked to do: operations, those that a GPU would launch, and those that stop its host."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# What must know values of tensors on the host: on a GPU it waits until all queued work is done.
WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
           "aten::masked_select", "aten::bincount"}  # fmt: skip
ALLOCATING = ("aten::empty", "aten::detach", "aten::new_empty")
OURS, DEEPSPEED = "text4vis/", "deepspeed/"


class Operations(TorchDispatchMode):
    """Counts the operations of this thread within it: all, the launches among them, and waits by who asks.

    waits: how often a place ("text4vis/training/engine.py:10", "deepspeed/…") asked for values. A place is the
    innermost line of ours or DeepSpeed's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all, self.launches, self.waits = 0, 0, Counter[str]()

    def __torch_dispatch__(self, operation: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation._schema.name
        self.all += 1
        self.launches += not operation.is_view and not name.startswith(ALLOCATING)
        if name in WAITING:
            self.waits[_asker()] += 1
        return operation(*args, **(kwargs or {}))

    def waits_of(self, whose: str) -> dict[str, int]:
        """The waits of OURS or DEEPSPEED alone."""
        return {place: count for place, count in self.waits.items() if place.startswith(whose)}


def _asker() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for whose in (OURS, DEEPSPEED):
            if f"/{whose}" in path:
                return f"{whose}{path.rsplit(f'/{whose}', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
