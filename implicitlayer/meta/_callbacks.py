"""What a trainer tells to others while it trains, five events, and how it is asked to stop: between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

EVENTS = ("on_start", "on_step", "on_validation", "on_checkpoint", "on_end")


class Callback:
    """Base class of what ``Trainer(callbacks=[...])`` calls: define the events that you want to hear of.

    Called in the first process of a group only, between steps, so it may read everything of the trainer. An exception
    ends the run. What draws from the global random generators makes a resumed run differ from one that was not stopped.

    Example:
        >>> import implicitlayer as il
        >>> losses = []
        >>> class Losses(il.meta.Callback):
        ...     def on_step(self, trainer, record):
        ...         losses.append(record["loss"])
    """

    def on_start(self, trainer: Any) -> None:
        """``fit`` begins, after a resume if there was one: ``trainer.step`` steps are made."""

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        """A meta-step was made; ``record`` is that of ``trainer.history``."""

    def on_validation(self, trainer: Any, record: dict[str, Any]) -> None:
        """The record has got ``validation`` and ``validation_interval``."""

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        """A checkpoint was written to ``path``."""

    def on_end(self, trainer: Any) -> None:
        """``fit`` ends, by an exception too."""


def check_callbacks(callbacks: Sequence[Any]) -> None:
    for callback in callbacks:
        heard = [name for name in dir(callback) if name.startswith("on_")]
        wrong = sorted(set(heard) - set(EVENTS))
        if isinstance(callback, type) or wrong or not heard:
            what = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
            said = f"no event is called {wrong[0]}" if wrong else "make one" if heard else "it hears no event"
            raise TypeError(f"callbacks holds {what}: {said}. The events are {', '.join(EVENTS)}.")


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
