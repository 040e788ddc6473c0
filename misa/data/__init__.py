"""Training data: instruction records, generated reasoning tasks, and pre-training text."""
