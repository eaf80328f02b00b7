"""What several hosts need beyond the program itself: their list, their network, a job for Slurm."""
