"""Runs as one page for people: what was measured, how sure it is, and pictures of where the time goes."""
