"""The memory laboratory: bytes of every live tensor of a training step, by what the tensor is for."""
