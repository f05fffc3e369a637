"""Pictures and prompts to latent shards, once, before training."""
