"""Methods compared on one stream: each is run with several seeds, and what came out is tabulated."""
