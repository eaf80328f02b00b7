"""Running as a job: Slurm scripts, host files, the network, requests to stop, and the detection of ranks that die or hang.
"""
