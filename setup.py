"""The one thing pyproject.toml cannot say: how the cffi extension is built."""

from setuptools import setup

setup(cffi_modules=["reactor/_native_build.py:ffibuilder"])
