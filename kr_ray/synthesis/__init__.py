"""Synthetic sets: sampling a checkpoint, labelling, regenerating."""
