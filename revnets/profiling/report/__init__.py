"""Profiles as tables on the terminal, as files and as pictures.

What the figures are, and how they come about, is one folder up.
"""
