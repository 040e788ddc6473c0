"""`python -m misa.dynamics VERB`: measurements of what happens during training."""

import sys

from misa.dynamics.command import main

sys.exit(main())
