"""Text in and out: chat templates, tokens, sampling and streaming."""
