"""Runs as functions that return their settings: of a reward, and of a generator."""
