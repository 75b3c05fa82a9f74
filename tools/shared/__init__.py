"""What several tools use: argument parsers and files that are written whole."""
