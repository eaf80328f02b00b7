"""Tests of jobs and their ranks."""
