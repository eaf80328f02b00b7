"""A job among others: Slurm scripts, host files, the network, requests to stop, and the watch over its ranks."""
