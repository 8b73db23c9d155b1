"""Engines: where the training loop runs. The one in this package is `local`."""
