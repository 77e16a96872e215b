"""Attacks and privacy figures, as functions of scores."""
