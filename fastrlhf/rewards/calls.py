"""Calls of a user's function that may raise or never come back."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """A reward function that raised, hung or returned something unusable."""


class GuardedFunction:
    """A reward function whose every failure is a RewardError that names it.

    timeout: seconds after which a call is held to hang. With one, calls run in a daemon thread, which nothing can end:
        one that hangs is left behind. While it does, the function is not called a second time beside it: a later call
        waits for it, `timeout` seconds at most. None calls in the caller's own thread.
    retries: how many times more a call that raised or hung is tried, each failure logged as a warning.
    """

    def __init__(self, name: str, func: Callable[..., Any], timeout: float | None = None, retries: int = 0) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"reward_timeout={timeout} must be greater than 0, or None")
        if retries < 0:
            raise ValueError(f"reward_retries={retries} must be at least 0")
        self.name = name
        self.func = func
        self.timeout = timeout
        self.retries = retries
        self.hung: _Call | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. Raises RewardError, its cause what the function raised."""
        for retry in range(1, self.retries + 1):
            try:
                return self._once(*args, **kwargs)
            except RewardError as error:
                logger.warning("retry %d of %d after: %s", retry, self.retries, error, exc_info=True)
        return self._once(*args, **kwargs)

    def _once(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self.func, args, kwargs)
        if self.timeout is None:
            call.run()
        else:
            self._in_thread(call, self.timeout)
        if isinstance(call.error, Exception):
            raise RewardError(
                f"reward_funcs: {self.name} raised {type(call.error).__name__}: {call.error}{_place(call.error)}"
            ) from call.error
        if call.error is not None:  # Ctrl-C and exits
            raise call.error
        return call.result

    def _in_thread(self, call: _Call, timeout: float) -> None:
        if self.hung is not None:
            self.hung.join(timeout)
            if self.hung.is_alive():
                raise RewardError(
                    f"reward_funcs: {self.name} was not called: an earlier call still hangs{self.hung.stack()}"
                )
            self.hung = None
        call.start()
        call.join(timeout)
        if call.is_alive():
            self.hung = call
            raise RewardError(
                f"reward_funcs: {self.name} has not returned after {timeout:g} seconds (reward_timeout){call.stack()}"
            )


class _Call(threading.Thread):
    """One call, with what came of it. `start` makes it in a thread of its own, `run` right here."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.call = func, args, kwargs
        self.result: Any = None
        self.error: BaseException | None = None
        # A new thread would compute on GPU 0, whichever is this process's.
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run(self) -> None:
        func, args, kwargs = self.call
        try:
            if self.device is not None:
                torch.cuda.set_device(self.device)
            self.result = func(*args, **kwargs)
        except BaseException as error:
            self.error = error

    def stack(self) -> str:
        """Where it is, from the function on, as a traceback shows it."""
        frame = sys._current_frames().get(self.ident)
        frames = traceback.extract_stack(frame) if frame else []
        below = [i for i, at in enumerate(frames) if at.filename == __file__]
        return " at\n" + "".join(traceback.format_list(frames[below[-1] + 1 :])) if below else ""


def _place(error: BaseException) -> str:
    """File and line that raised, for messages that are shown without their cause; nothing where it was this file."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
