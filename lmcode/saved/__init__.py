"""What a model leaves on disk: folders for other people, checkpoints and where they lie, changes to a saved memory."""
