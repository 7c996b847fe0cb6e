"""``python -m flaskd``, and the ``flaskd`` command."""

import sys

from flaskd.cli import main

if __name__ == "__main__":
    sys.exit(main())
