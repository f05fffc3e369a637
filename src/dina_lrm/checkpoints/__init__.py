"""Folders that hold a reward: our layout, the published one, and the configuration in both."""
