"""`python -m fastrlhf`, the same as `fastrlhf`."""

import sys

from fastrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
