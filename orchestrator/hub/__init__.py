"""Models and adapters that lie on a hub: what is one, what of it is needed, and how it gets here."""
