"""The latent scoring protocol, and clients of a server that speaks it."""

TOKEN_VARIABLE = "DINA_LRM_TOKEN"
"""Environment variable with the token, of a server and of its clients, where none is passed."""
