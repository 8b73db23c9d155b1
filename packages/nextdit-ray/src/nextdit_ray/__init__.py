"""Next-DiT on Ray: the engine `ray`."""

from __future__ import annotations

from importlib.metadata import version

from nextdit_ray.engine import RayEngine

__all__ = ["RayEngine", "__version__"]

__version__ = version("nextdit-ray")
