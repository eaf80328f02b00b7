"""How a shard finds its best rows: one function a tier, the exact one being the oracle of all others."""
