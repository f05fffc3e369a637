"""Data sets of preferences as they are published, and rows of one's own, read as comparisons."""
