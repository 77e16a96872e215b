"""Coresets: a classifier of a part of the real images, selected by what a training on all of them shows."""
