"""Networks: the ResNet14 classifier and the BigGAN-Deep generator and discriminator."""
