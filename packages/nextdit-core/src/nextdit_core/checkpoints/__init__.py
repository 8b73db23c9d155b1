"""Backbones on disk: ours, the authors' and diffusers' layout, recognised, read and written."""
