"""Tests of all that one model remembers."""
