"""Scores of images (clip.py, needs torch) and the expressions that decide on them (gates.py, does not)."""
