"""Second moments of layers' inputs: sketches of them, and the file that they are kept in."""
