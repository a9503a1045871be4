"""One widget a file; each has `show(...)`, which takes wire types and nothing else."""
