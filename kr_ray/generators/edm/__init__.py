"""Class-conditional diffusion in pixels (EDM: Karras et al. 2022, arXiv 2206.00364), from scratch, for images
of 16 to 64 px.

The paper's steps and their files: `preconditioning` (section 5, Table 1: what the network is asked, and
its loss), `networks` (our own U-Net in place of DDPM++), `training`, `solvers` (section 3 and
DPM-Solver++(2M)), `sampling` (images from a checkpoint), `checkpoint` (the file between the two),
`section` (the configuration's keys).
"""
