"""Self-contained pages of what runs found: their parts, the figures, and the template that they all share."""
