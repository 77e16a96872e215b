"""Data set distillation: a few images per class in place of a whole set, and the classifier trained on them.

`sets` (real images in the matching's units, what is left behind), `initial` (what the images start as),
`augment` (siamese augmentation), `matching` and `trajectories` (the objectives), `training` (tick by tick),
`student` (the classifier), `member` (the method).
"""
