"""`lmcode bench`: what a part of the program costs beside its peers, in the same run, taking turns."""
