"""A page on which people say which of two pictures they prefer, and the file that keeps what they said."""
