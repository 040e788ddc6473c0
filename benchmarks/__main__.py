"""`python -m benchmarks`: speed, memory and loss of every method in one run."""

import sys

from benchmarks.training import main

if __name__ == "__main__":
    sys.exit(main())
