"""An OpenAI-compatible HTTP server over one live session. Imported by task=serve only."""
