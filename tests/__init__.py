"""Tests: a folder per package of lmcode/, a file per module."""
