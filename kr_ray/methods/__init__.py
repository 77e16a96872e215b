"""Ways of making a classifier from private images, a file for each."""
