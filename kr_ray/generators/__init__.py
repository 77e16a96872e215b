"""What makes images, a file or folder for each kind."""
