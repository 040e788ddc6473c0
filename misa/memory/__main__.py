"""`python -m misa.memory`: bytes by category of one training step, per method."""

import sys

from misa.memory.command import main

sys.exit(main())
