"""What private methods and private generators share: secret noise, per-image gradients, what they leave."""
