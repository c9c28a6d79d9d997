"""Specializing beyond reading: a few steps on a prompt's own examples."""
