"""Measurements of this machine with the library's own code and nothing else: `tinyvlm bench …`."""
