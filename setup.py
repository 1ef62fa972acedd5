"""Everything is declared in pyproject.toml; this file is where compiled extensions plug in."""

from setuptools import setup

setup()
