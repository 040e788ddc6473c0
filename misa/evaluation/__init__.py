"""Score a model with lm-evaluation-harness: loading the model, running a task, reading off its numbers."""
