"""SIGTERM and Ctrl-C while a run trains: the step is finished, a checkpoint is saved, and all processes end alike."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from peftkit.console import Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

HEEDED = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Notes signals while it is entered; a second one ends the process at once. For the main thread; nothing in others.

    A signal that whoever started the process told it to ignore stays ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._got: list[int] = []
        self._agreed: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.getsignal(one) for one in HEEDED if signal.getsignal(one) != signal.SIG_IGN}
        for one in self._before:
            signal.signal(one, self._heed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    @property
    def is_asked(self) -> bool:
        """Whether all processes are to stop after this step."""
        return self._signal() is not None

    def summed(self, total: Tensor) -> float:
        """The sum of a number over all processes, with which goes, in the same message, whether one is to stop."""
        import torch

        asked = total.new_tensor([float(one in self._got) for one in HEEDED])
        number, *counts = self._accelerator.reduce(torch.cat([total[None], asked]), "sum").tolist()
        self._agreed = next((one for one, count in zip(HEEDED, counts, strict=True) if count), None)
        return float(number)

    def leave(self, step: int) -> None:
        """End the run, whose checkpoint of this step is saved, if that was asked for.

        Raises:
            Interrupted: for `guard` to tell.
        """
        number = self._signal()
        if number is None:
            return
        self._accelerator.wait_for_everyone()
        raise Interrupted(
            number,
            f"interrupted; step {step:,} is done and its checkpoint is saved. The run goes on from there when its "
            "command is given again, without output.overwrite",
        )

    def _signal(self) -> int | None:
        """What to stop for: of one process what it got, of several what they agreed on in the last step."""
        alone = self._accelerator.num_processes == 1
        return next(iter(self._got), None) if alone else self._agreed

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if self._got:
            # the disk is as after a kill: the last checkpoint is whole
            os._exit(128 + number)
        self._got.append(number)
        if self._accelerator.is_local_main_process:
            # print() may be in the middle of a line
            os.write(2, f"{signal.Signals(number).name}: finishing this step; a second one ends at once\n".encode())
