"""`python -m misa.memory`: bytes by category of one training step, per method."""

from misa.extras import exit_with
from misa.memory.command import main

exit_with(main, "train")
