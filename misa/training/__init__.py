"""What the training commands share: options, the Trainer with safe checkpoints, measurements, and the run itself."""
