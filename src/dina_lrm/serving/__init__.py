"""A reward over HTTP: the server of the latent protocol, its page, and the page that collects preferences."""
