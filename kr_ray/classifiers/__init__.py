"""Networks by name, and the one loop that trains them."""
