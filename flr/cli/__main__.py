"""``python -m flr.cli`` is ``flr``, for launchers that start modules: ``torchrun … -m flr.cli sft``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
