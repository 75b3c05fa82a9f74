"""Code that several tools share: arguments, files that are written completely, and streams."""
