"""The version of this program, which its files and logs carry, and the mark of files that it may replace."""

__version__ = "0.1.0"
MADE_BY = "Made by LMCODE."
