"""The engines: a table of what each can do, the protocol, and one adapter per engine."""
