"""Other people's clients, unmodified, against this server."""
