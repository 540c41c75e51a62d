"""Second moments of what layers read and of gradients at their outputs: sketches, and the file they are kept in."""
