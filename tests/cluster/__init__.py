"""Tests of two hosts."""
