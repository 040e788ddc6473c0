"""List the commands of the package: `python -m misa`."""

COMMANDS = {
    "train": "fine-tune a model on instructions, by any of the compared methods",
    "pretrain": "train a LLaMA of a chosen size from scratch",
    "evaluate": "score a model on tasks of lm-evaluation-harness",
    "memory": "count the bytes of a training step, or find what fits",
    "blocks": "list the blocks of a model",
    "dynamics": "measure gradient norms, noise and variance",
    "models": "fetch a model",
    "data": "make data to train on",
    "results": "collect results into tables",
    "figures": "draw figures from tables",
}


def main() -> int:
    """Print them."""
    for name, text in COMMANDS.items():
        print(f"python -m misa.{name:10}{text}")
    print("\nEach has --help.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
