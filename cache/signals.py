"""Ending on a signal: through every `finally`, and never past a new draft."""

import signal
from typing import NoReturn


def unwind_on_signals() -> None:
    """Makes SIGTERM and SIGHUP end the program as control-C does, through every `finally`.

    Batch systems stop a job with SIGTERM; without this its draft stays until the next sweep.
    Python drops what is raised inside a weak reference's callback, and h5py has many of these;
    therefore no draft is begun or published after such a signal either.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)  # nohup ignores SIGHUP, and means it


_stopped: list[int] = []


def _stop(number: int, _frame: object) -> NoReturn:
    _stopped.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def go_on() -> None:
    """Nothing, unless a signal asked this process to end."""
    if _stopped:
        _stop(_stopped[0], None)
