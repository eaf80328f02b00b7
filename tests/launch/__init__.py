"""Tests of the scripts that start jobs."""
