"""All that one model remembers, over its layers: the texts that were stored, the banks together, and their files."""
