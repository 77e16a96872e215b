"""Real images: loading, splitting, augmenting."""
