"""What experimenters and maintainers run: short commands, and the packages that they call."""
