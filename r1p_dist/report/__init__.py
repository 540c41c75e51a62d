"""One page about a run: what it learned, what it kept, how training went. `write` makes it of the others' sections."""
