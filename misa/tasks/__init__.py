"""Tasks of lm-evaluation-harness, one YAML each: the paper's benchmarks and two of our own.

`documents` is what the family-relations task and perplexity call, `benchmarks` reads the paper's test sets (`hub` where
there is no local folder), `answers` reads the answer out of a response.
"""
