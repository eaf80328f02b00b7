"""The version of this program, which its files and logs carry."""

__version__ = "0.1.0"
