"""Training: the engine, the loop that reads from top to bottom, what it saves, resumes and logs, the trainer."""
