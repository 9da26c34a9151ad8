"""TinyVLM: make and serve a small vision-language model, from image links to an endpoint."""

__version__ = "0.1.0"
