"""Tests of commits of files."""
