"""``python -m flaskd``, and the ``flaskd`` command."""

import gc
import sys

from flaskd.process.bootstrap import heed_signals, open_standard_streams


def main() -> int:
    """Run the command. From here on a server acts on SIGTERM and SIGINT, long before its own handlers are set."""
    open_standard_streams()
    # Imports make no garbage, and looking for it takes a twentieth of their time. A client ends before it has any; a
    # server switches the collector on again in `flaskd.cli.serve_app`.
    gc.disable()
    if sys.argv[1:2] == ["serve"]:
        heed_signals()
    from flaskd.cli import main as run  # noqa: PLC0415 - after the signal handlers are set

    return run()


if __name__ == "__main__":
    sys.exit(main())
