"""Making the runs of a comparison: what is trained, how, on how many processes, and where it is kept."""
