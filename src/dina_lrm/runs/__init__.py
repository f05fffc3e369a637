"""What training a reward and aligning a generator share: optimizer, averages, state, progress."""
