"""`python -m loadtest.bench`: the same as `fairdrop bench`."""

from __future__ import annotations

import sys

from loadtest.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
