"""For tools that want a setup.py; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
