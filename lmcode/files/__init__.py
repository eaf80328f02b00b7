"""Files that are on disk whole or not at all: commits, locks, folders that replace one another. No torch, no model."""
