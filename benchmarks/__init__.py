"""Comparisons with other libraries: one file per operator, one for the whole model, one runner."""
