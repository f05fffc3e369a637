"""The latent scoring protocol, and clients of a server that speaks it."""
