"""Tests of saved models and checkpoints."""
