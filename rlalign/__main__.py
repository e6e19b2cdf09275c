"""``python -m rlalign`` is ``rlalign``."""

from __future__ import annotations

import sys

from rlalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
