"""BigGAN-Deep (section 3.2): networks, training, sampling."""
