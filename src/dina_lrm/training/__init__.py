"""Training a reward on preference pairs.

`trainer.train` is the loop, `optim` what it optimises with, `state` what it needs to go on after a stop.
"""
