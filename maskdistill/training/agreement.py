"""What all processes must decide alike: where to write, whether to stop, what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maskdistill.training.distributed import Processes

T = TypeVar("T")


class Agreement:
    """Small decisions among the processes of a run; one process decides alone, at no cost.

    They go over a group of their own on the CPU, beside the gradients. Every method must be called
    by all processes.

    >>> Agreement(Processes(0, 1, torch.device("cpu"))).by_main(lambda: "runs/first")
    'runs/first'

    Args:
        processes: of the run, joined already.
    """

    def __init__(self, processes: Processes) -> None:
        self._world, self._is_main = processes.world, processes.is_main
        self._rank = processes.rank
        self._group: Any = dist.new_group(backend="gloo") if self._world > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def by_main(self, decide: Callable[[], T]) -> T:
        """Return what ``decide`` returns in the main process, or raise what it raises there."""
        if self._group is None:
            return decide()
        answer: list[Any] = [None, None]
        if self._is_main:
            try:
                answer[0] = decide()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        result: T = answer[0]
        return result

    def highest(self, flag: int) -> int:
        """Return the highest flag that any process raised before its previous call.

        The answer to one call is fetched in the next, so that no step waits for it, and is the
        same in all processes at the same step.

        Args:
            flag: >= 0; with one process it is the answer.
        """
        if self._group is None:
            return flag
        answer = self.settle()
        self._flag = torch.tensor([flag])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return answer

    def settle(self) -> int:
        """Wait for the answer that is under way, return it and ask nothing new; 0 if none is."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._flag)

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's share of some work, of the same length in all processes.

        Every process must make the same number of forwards where weights are sharded, so the last
        item comes again where the work does not divide.
        """
        mine = list(items[self._rank :: self._world])
        length = -(-len(items) // self._world)
        return mine + list(items[-1:]) * (length - len(mine))

    def join(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows that all processes made of their shares, in the order of the work.

        Args:
            rows: one per item of this process's ``share``, on the CPU.
            count: items of all.
        """
        if self._group is None:
            return rows
        everyones = [torch.empty_like(rows) for _ in range(self._world)]
        dist.all_gather(everyones, rows.contiguous(), group=self._group)
        return torch.stack(everyones, dim=1).flatten(0, 1)[:count]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each process, in the order of their ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return [mine.tolist()]
        everyones = [torch.empty_like(mine) for _ in range(self._world)]
        dist.all_gather(everyones, mine, group=self._group)
        return [theirs.tolist() for theirs in everyones]
