"""Tasks of lm-evaluation-harness that read a local folder: one YAML each, and what they share in `documents`."""
