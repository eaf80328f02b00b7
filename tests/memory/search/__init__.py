"""Tests of search tiers."""
