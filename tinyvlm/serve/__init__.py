"""Answering over HTTP: OpenAI's protocol, a scheduler for the engine, the web app and its page.  Needs no Ray."""
