"""``python -m fastdistill``."""

import sys

from fastdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
