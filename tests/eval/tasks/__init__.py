"""Tests of evaluation tasks."""
