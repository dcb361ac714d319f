"""Stopping between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType


class StopRequest(ExitStack):
    """Inside the block the first Ctrl-C or SIGTERM sets ``asked``; a second one raises ``KeyboardInterrupt`` at once.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    asked = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, number, signal.signal(number, self._request))
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
