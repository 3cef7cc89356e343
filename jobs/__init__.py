"""What runs: the command line, recipes, and Ray."""
