"""``python -m flaskd``, and the ``flaskd`` command."""

import os
import signal
import sys


def main() -> int:
    """Run the command. A server heeds SIGTERM and SIGINT from here on, long before its own handlers are in place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by who started us; what is opened next must not get its number
            os.open(os.devnull, os.O_RDWR)
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _leave_at_once)
    from flaskd.cli import main as run  # noqa: PLC0415 - after the handlers

    return run()


def _leave_at_once(_number: int, _frame: object) -> None:
    """Leave: nothing has been made yet, or all has been put away."""
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
