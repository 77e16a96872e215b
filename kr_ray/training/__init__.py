"""Training loops: one for every classifier, one for the GAN."""
