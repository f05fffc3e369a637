"""Sampling with a generator: rollouts, search, rewards of latents. Nothing here trains."""
