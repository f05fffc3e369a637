"""The reward model: a truncated diffusion backbone, a small head, encoders, checkpoints."""
