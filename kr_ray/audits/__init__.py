"""What trains and asks models in order to attack them, a file for each audit."""
