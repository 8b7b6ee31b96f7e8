"""The job functions that a producer may name; everything else is refused."""
