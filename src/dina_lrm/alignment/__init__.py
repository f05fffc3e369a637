"""Better pictures out of a generator, by a reward: training its LoRA, or searching while it samples."""
