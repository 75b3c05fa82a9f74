"""Commands for experimenters and maintainers, and the packages with their code."""
