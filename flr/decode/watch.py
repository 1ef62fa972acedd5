"""What a host may know of a device's work without waiting for it."""

from __future__ import annotations

from collections import deque

import torch


class Watch:
    """Numbers that the device computes, as of the last step that is known to be done, without waiting."""

    def __init__(self) -> None:
        self.asked: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def ask(self, numbers: torch.Tensor, ahead: int | None = None) -> list[int] | None:
        """int64 [n] or those of an earlier call; None where nothing is known yet.

        Args:
            numbers: of the latest step.
            ahead: how many steps the device may still have before it; the host waits while it has more. None: any.
        """
        if numbers.device.type == "cpu":
            return numbers.tolist()
        host, event = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True), torch.cuda.Event()
        host.copy_(numbers, non_blocking=True)
        event.record(torch.cuda.current_stream(numbers.device))
        self.asked.append((host, event))
        known: list[int] | None = None
        while self.asked and (self.asked[0][1].query() or (ahead is not None and len(self.asked) > ahead)):
            host, event = self.asked.popleft()
            event.synchronize()
            known = host.tolist()
        return known
