"""`python -m misa.dynamics VERB`: measurements of what happens during training."""

from misa.dynamics.command import main
from misa.extras import exit_with

exit_with(main, "train")
