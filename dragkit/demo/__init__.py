"""The bundled demo: a knowledge base about the world, and questions over it."""

from dragkit.demo.dataset import DemoFiles, build_demo, demo_files

__all__ = ["DemoFiles", "build_demo", "demo_files"]
