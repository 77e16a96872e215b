"""`kr bench`: what the product's way of computing is worth, measured beside the plain way in one process."""
