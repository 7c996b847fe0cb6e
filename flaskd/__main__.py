"""``python -m flaskd``, and the ``flaskd`` command."""

import gc
import sys

from flaskd.process.bootstrap import heed_signals, open_standard_streams


def main() -> int:
    """Run the command. A server heeds SIGTERM and SIGINT from here on, long before its own handlers are in place."""
    open_standard_streams()
    # Imports make no garbage, and looking for it would cost a twentieth of their time. A client is gone before there is
    # any; a server looks for it again from `flaskd.cli.serve_app` on.
    gc.disable()
    if sys.argv[1:2] == ["serve"]:
        heed_signals()
    from flaskd.cli import main as run  # noqa: PLC0415 - after the handlers

    return run()


if __name__ == "__main__":
    sys.exit(main())
