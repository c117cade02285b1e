"""Loading, the step's context, and compilation of small functions."""
