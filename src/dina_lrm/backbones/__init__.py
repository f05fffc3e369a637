"""Denoisers of diffusion pipelines, read block by block: one file a family, and what all of them share."""
