"""DoRA by PEFT: LoRA, and the length of each output's weights trained beside it (arXiv 2402.09353)."""

from misa.methods.lora import method

METHOD = method(
    "dora",
    "low-rank adapters and a length for each output of all linear layers (PEFT); fp32 adapters and lengths, their "
    "gradients and two moments; each step also makes the adapted weights for their norms",
    use_dora=True,
)
